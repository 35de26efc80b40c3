"""The CPU kernels under the address and undefined-behaviour sanitizers.

The baseline library is built with them and a part of the table runs through it. torch takes its memory from the same
allocator, which the preloaded sanitizer replaces, so a read beyond a tensor is seen; the last test plants one.
"""

from pathlib import Path

import pytest
import sanitizers

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the checkout")]

# only one library: on a machine of an unknown kind setup.py builds the baseline alone
BUILD = """
import platform, runpy, sys
platform.machine = lambda: "unknown"
sys.argv = ["setup.py", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/temp"]
runpy.run_path("setup.py", run_name="__main__")
"""

CASES = """
import contextlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("fastflow._cpu_baseline", sys.argv[1])
library = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where fastflow looks first
spec.loader.exec_module(library)
import torch
from fastflow import testing
from fastflow.ops import cpu
assert cpu.description().startswith("baseline"), cpu.description()
for case in testing.CASES[::5]:
    for name in ("forward", "gradient"):
        with contextlib.suppress(AssertionError):  # of a tolerance: numbers are the business of test_ops.py
            testing.CHECKS[name](case, "cpu", torch.float32)
with open("/proc/self/maps") as maps:
    assert [line for line in maps if "_cpu_" in line and sys.argv[1] not in line] == []
print("ran", len(testing.CASES[::5]))
"""

PLANTED = """
import ctypes, sys
import torch
x = torch.ones(1000)
peek = ctypes.CDLL(sys.argv[1]).peek
peek.restype, peek.argtypes = ctypes.c_float, (ctypes.c_void_p, ctypes.c_long)
assert peek(x.data_ptr(), 999) == 1
print("inside", flush=True)
peek(x.data_ptr(), 1000)
print("outside")
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A library that reads where it is told to; skips where the compiler lacks the sanitizers."""
    folder = tmp_path_factory.mktemp("planted")
    source, library = folder / "peek.cpp", folder / "peek.so"
    source.write_text('extern "C" float peek(const float* p, long i) { return p[i]; }\n')
    sanitizers.compile_library(source, library)
    return library


def test_planted_read_is_caught(planted):
    done = sanitizers.run_sanitized(PLANTED, planted, ATEN_CPU_CAPABILITY="default")
    assert "inside" in done.stdout and "outside" not in done.stdout
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_kernels(planted, tmp_path):
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    built = sanitizers.run(BUILD, tmp_path, cwd=ROOT, FASTFLOW_CXXFLAGS=f"{sanitizers.FLAGS} -O1")
    assert built.returncode == 0, built.stderr[-4000:]
    (library,) = tmp_path.glob("fastflow/_cpu_baseline*")
    done = sanitizers.run_sanitized(CASES, library, cwd=ROOT, ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
