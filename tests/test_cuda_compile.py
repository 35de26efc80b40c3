"""What the compilers make of the CUDA kernels: no GPU is needed for it, only NVRTC, or nvcc."""

import functools
import os
import shutil
import subprocess

import pytest

from fastflow.__main__ import main
from fastflow.bench import nvrtc, resources
from fastflow.ops.cuda import FAMILIES, source
from fastflow.ops.cuda.instances import USUAL, Instance
from fastflow.errors import MissingPackage

NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
REDUCTIONS = ("gaussian_log_prob_fwd", "gaussian_kl_fwd")  # which store a number per sample
FILES = list(dict.fromkeys(instance.file for instance in USUAL))


@functools.cache
def missing():
    try:
        nvrtc.version()
    except MissingPackage as error:
        return str(error)


@pytest.fixture
def compiler():
    if missing():
        pytest.skip(missing())


def chosen():
    """Every instance for Hopper; of the forward kernels those in float32 and bfloat16 for Ampere and Blackwell too.

    Quick are the first two of every file.
    """
    for file in FILES:
        for number, instance in enumerate(resources.usual(file)):
            portable = instance.kernel.endswith("_fwd") and uniform(instance)
            for arch in (90, 80, 100) if portable else (90,):
                marks = () if arch == 90 and number < 2 else pytest.mark.slow
                yield pytest.param(instance, arch, id=f"{instance.name}-{arch}", marks=marks)


def uniform(instance):
    """All in float32 or all in bfloat16?"""
    return {p for p in instance.parameters if not p.isdigit()} in ({"float"}, {"BFloat16"})


@pytest.mark.parametrize(("instance", "arch"), list(chosen()))
def test_instance(compiler, instance, arch):
    compiled = nvrtc.compiled(source.text(instance), arch)
    assert compiled.binary.startswith(b"\x7fELF") and resources.warnings(compiled.log) == ""
    found = resources.resources(instance, compiled)
    assert 0 < found.registers <= 65536 // instance.threads
    if "double" not in instance.parameters:
        assert found.spills == 0, found
        assert found.stack == 0, found  # an array with a computed index would be there
    step = next((parameter for parameter in instance.parameters if parameter.isdigit()), "1")
    if step != "1":
        assert found.loads.get(16), found
        assert found.stores.get(16) or instance.kernel in REDUCTIONS, found


def test_families():
    """All are listed, under names of their own."""
    assert set(FAMILIES) <= set(FILES)
    assert len({instance.name for instance in USUAL}) == len(USUAL)


# --- the measure itself -----------------------------------------------------------------------------

PLANTED = Instance("planted", "planted", "Planted", ("4",), 1024)
HEAD = (
    '#define FF_ENTRY(name, kernel, A, n, m) extern "C" __global__ void __launch_bounds__(n) name(A a) { kernel(a); }\n'
)
TEXT = f"""{HEAD}
struct Planted {{ float* x; long n; }};
template <int N> __device__ void planted(const Planted& a) {{
  BODY
}}
{PLANTED.entry}
"""


def measured(body):
    compiled = nvrtc.compiled(TEXT.replace("BODY", body), 90)
    return resources.resources(PLANTED, compiled), resources.warnings(compiled.log)


def test_widths_and_shared_memory(compiler):
    found, said = measured(
        """__shared__ float4 kept[1024];
        kept[threadIdx.x ^ 1] = reinterpret_cast<float4*>(a.x)[threadIdx.x];
        __syncthreads();
        reinterpret_cast<float2*>(a.x)[threadIdx.x] = {kept[threadIdx.x].x, a.x[1]};
        if (a.n) reinterpret_cast<char*>(a.x)[threadIdx.x] = 1;"""
    )
    assert (found.loads, found.stores, said) == ({16: 1, 4: 1}, {8: 1, 1: 1}, "")
    assert (found.shared, found.stack, found.spills) == (16384, 0, 0)
    assert found.threads(128, 90) == 2048 and found.threads(128, 86) == 1536
    assert found._replace(registers=65).threads(256, 90) == 768  # 72 are granted


def test_local_memory(compiler):
    found, _ = measured("volatile float kept[64]; kept[a.n] = 1; a.x[0] = kept[2 * a.n];")
    assert found.stack >= 256 and found.spills == 0


def test_spills(compiler):
    """A block of 1024 threads leaves 64 registers to each."""
    unrolled = "#pragma unroll\nfor (int i = 0; i < 200; ++i)"
    found, _ = measured(f"float kept[200];\n{unrolled} kept[i] = a.x[i];\n{unrolled} a.x[7 * i] = kept[i];")
    assert found.spills > 0


def test_warning(compiler):
    assert "unused" in measured("int unused;")[1]


def test_error(compiler):
    with pytest.raises(nvrtc.CompileError, match='identifier "nonsense" is undefined'):
        measured("nonsense();")


# --- the command, and the other compiler ------------------------------------------------------------


def test_command(compiler, capsys, tmp_path):
    assert main(["bench", "--resources", "sums", "--arch", "80", "--json", str(tmp_path / "result.json")]) == 0
    assert "finish_sums_float" in capsys.readouterr().out and '"arch": 80' in (tmp_path / "result.json").read_text()
    assert main(["bench", "--resources", "nonsense"]) == 2
    assert "expected one of coupling" in capsys.readouterr().err


def test_without_compiler(monkeypatch, capsys):
    nvrtc._library.cache_clear()
    monkeypatch.setattr(nvrtc, "_places", lambda: iter(()))
    assert main(["bench", "--resources"]) == 2
    assert "pip install 'fastflow[nvrtc]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", FILES)
def test_nvcc(file, tmp_path):
    """It takes the same text: here the first two instances of every file."""
    unit, binary = tmp_path / f"{file}.cu", tmp_path / f"{file}.fatbin"
    unit.write_text(source.text(*resources.usual(file)[:2]))
    command = [*NVCC.split(), "-fatbin", "-std=c++17", "-arch=sm_90", str(unit), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr[:3000]
    assert binary.stat().st_size > 1000
