"""What the emulation of a GPU catches, and the CUDA kernels in it under the sanitizers."""

from pathlib import Path

import emulation
import pytest
import sanitizers

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler")

PLANTED = """
#include "{root}/csrc/cuda/launch.cuh"
namespace fastflow {{
struct Reversed {{ char *from, *to; int64_t n; }};
// to = from reversed, by way of shared memory
FF_D void reversed(const Reversed& a) {{
  FF_SHARED(float, shared);
  shared[threadIdx.x] = reinterpret_cast<const float*>(a.from)[threadIdx.x];
  {barrier}
  reinterpret_cast<float*>(a.to)[threadIdx.x] = shared[a.n - 1 - threadIdx.x + {beyond}];
}}
FF_ENTRY(planted, (reversed), Reversed, 64, 1)
}}
"""

RUN = """
import sys
from pathlib import Path
import torch
import emulation
from fastflow.ops.cuda.plan import Address, Launch
from fastflow.ops.cuda.source import Instance

class Planted(Instance):
    name = "planted"

folder, flags, text = sys.argv[1:]
driver = emulation.Emulation(Path(folder), flags)
driver.compile = lambda instance: emulation.Emulation.compile(driver, instance, text)
from fastflow.ops.cuda import load
load.use_driver(driver)
x, y = torch.arange(64.0), torch.zeros(64)
launch = Launch(Planted("planted", "reversed", "Reversed", (), 64), 1, [Address(0), Address(1), 64], 256)
launch.run(torch.device("cpu"), [x, y], [])
print("right" if torch.equal(y, x.flip(0)) else "wrong")
"""


def planted(libraries, barrier="__syncthreads();", beyond=0, flags=""):
    text = PLANTED.format(root=ROOT, barrier=barrier, beyond=beyond)
    run = sanitizers.run_sanitized if flags else sanitizers.run
    return run(RUN, libraries, flags, text)


def test_planted_kernel_without_a_fault(libraries):
    assert planted(libraries).stdout.strip() == "right"


def test_planted_missing_barrier_is_caught(libraries):
    assert planted(libraries, barrier="").stdout.strip() == "wrong"


def test_planted_divergent_barrier_is_caught(libraries):
    done = planted(libraries, barrier="if (threadIdx.x == 5) __shfl_xor_sync(kWarp, 1, 1); else __syncthreads();")
    assert done.returncode != 0 and "wait for each other at different places" in done.stderr


@pytest.fixture
def sanitized(libraries):
    """The flags, at -O0: an instance then compiles in seconds."""
    probe = libraries / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n")
    sanitizers.compile_library(probe, libraries / "probe.so")
    return f"-O0 {sanitizers.FLAGS}"


@pytest.mark.slow
def test_planted_read_out_of_bounds_is_caught(libraries, sanitized):
    assert planted(libraries, flags=sanitized).stdout.strip() == "right"
    done = planted(libraries, beyond=1, flags=sanitized)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


SANITIZED = """
import contextlib, sys
from pathlib import Path
import torch
import emulation
from fastflow import testing
from fastflow.ops import _backend
from fastflow.ops.cuda import load
_backend.TESTED = ()
load.use_driver(emulation.Emulation(Path(sys.argv[1]), sys.argv[2]))
cases = [case for case in testing.CASES if case.selftest]
for case in cases:
    for dtype in (torch.float32, torch.float64):
        for check in ("forward", "gradient"):
            with contextlib.suppress(AssertionError):  # of a tolerance: numbers are the business of the table above
                testing.CHECKS[check](case, "cuda", dtype, sizes=("tiny",))
print("ran", len(cases))
"""


@pytest.mark.slow
def test_kernels_under_the_sanitizers(libraries, sanitized):
    done = sanitizers.run_sanitized(SANITIZED, libraries, sanitized)
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]
