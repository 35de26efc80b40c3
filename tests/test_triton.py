"""The Triton kernels without a GPU: through Triton's interpreter, and compiled ahead for two of them.

Triton decides between interpreter and compiler when it is imported, so everything here runs in processes of its own:
this file is also the program that they run.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from fastflow.testing import CASES

if __name__ != "__main__":
    pytest.importorskip("triton")

FAMILIES = tuple(dict.fromkeys(case.family for case in CASES if "triton" in case.backends))
# Ragged sizes in float32 only, for the interpreter is slow: other dtypes differ in how they are loaded, stored and
# rounded, and float64 in its scalar functions, which the tiny sizes show in every layout.
TINY = ("tiny forward", "tiny gradient")
CHECKS = {
    "float64": (*TINY, "logdet", "gradcheck"),
    "float32": ("forward", "gradient", "inverse"),
    "bfloat16": TINY,
    "float16": TINY,
}
# a program for every sample, or all stages of many steps, which the interpreter runs for a while: tiny sizes, the
# self-test's cases beside float32
SLOW = ("autoregressive", "sylvester", "ode", "gru_ode")
# what is seen of the autograd.Function around the kernels is the same for all cases of an op
FEW = ("logdet", "gradcheck")
# what it has of gradients is that of wavenet-plain; finite differences of a filter take minutes
UNDIFFERENTIATED = ("wavenet-generation", "gru_ode-full-euler-dropout", "gru_ode-minimal-euler-impute")
# dozens of launches for every step: adaptive and fixed ones; half precision is made float32 before the kernels
ONLY = {"ode": ("ode-dopri5-concat_squash-softplus-1-regularize-back", "ode-rk4-concat-tanh-exact-step-widest-back")}
QUICK = (
    *("coupling-sigmoid2-forward", "coupling-index-vector", "actnorm-image-inverse", "conv1x1-image-bias"),
    *("conv1x1-weights-lu-actnorm-inverse", "gaussian-kl-softplus", "trace-concat_squash-silu-1-wide"),
    *("planar-shared-inverse", "radial-each-forward", "autoregressive-gate", "mlp_coupling-networks-masked"),
    *("ode-dopri5-concat_squash-softplus-1-regularize-back",),
)
BENCH = ("coupling-sigmoid2-forward", "gaussian-log_prob-exp", "actnorm-image-forward", "conv1x1-image-bias")


def run(*arguments: str, interpret: bool = True, cache: Path | None = None, seconds: int = 600) -> str:
    """This file as a program; its output. What it reports as wrong fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "TRITON_INTERPRET": "1" if interpret else "0",
            "TRITON_CACHE_DIR": folder,
            "FASTFLOW_CACHE": str(cache or folder),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# --- the table, through the interpreter -----------------------------------------------------------------


def test_quick():
    run("table", "all", "float32", ",".join(TINY), *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_table(family, dtype):
    run("table", family, dtype, ",".join(CHECKS[dtype]))


@pytest.mark.slow
def test_deterministic():
    """At a size where samples are summed in parts; a few cases, because it takes the interpreter a while."""
    run("table", "all", "float32", "deterministic", *BENCH)


def test_samples_in_parts():
    run("parts")


def test_flows_of_steps_in_rounds():
    run("rounds")


def test_filters_in_windows():
    run("filters")


def test_index_out_of_range():
    run("index")


def test_compile():
    run("compile")


def test_selftest_is_remembered(tmp_path):
    run("remember", cache=tmp_path)
    passed = list((tmp_path / "selftest").iterdir())
    assert len(passed) == 1
    run("remember", cache=tmp_path)
    assert list((tmp_path / "selftest").iterdir()) == passed


def test_import_leaves_triton_alone():
    run("import")


# --- compiled ahead -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "mlp_coupling"]
)  # has no kernel of its own
def test_compiled_ahead(family, arch):
    run("ahead", str(arch), family, interpret=False)


# --- the programs ---------------------------------------------------------------------------------------


def _untested() -> None:
    """The table holds all of the self-test: there is no need to run that first."""
    from fastflow.ops import _backend

    _backend.TESTED = ()


def _rounding() -> None:
    """The interpreter cuts float32 to bfloat16; a GPU rounds, and PyTorch does."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = rounded


def table(family: str, dtype: str, checks: str, *names: str) -> None:
    from functools import partial

    from fastflow import testing

    tiny = {f"tiny {name}": partial(testing.CHECKS[name], sizes=("tiny",)) for name in ("forward", "gradient")}
    known = testing.CHECKS | tiny
    _untested()
    _rounding()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failures, begin = [], time.perf_counter()
    for case in testing.cases(None if family == "all" else family):
        if (
            "triton" not in case.backends
            or (names and case.id not in names)
            or getattr(torch, dtype) not in case.dtypes
        ):
            continue
        for name in checks.split(","):
            few = name in FEW or (case.family in SLOW and dtype != "float32")
            if (few and not case.selftest) or (name in FEW and case.id in UNDIFFERENTIATED):
                continue
            if case.family == "sylvester" and name == "inverse":
                continue
            if case.family == "ode" and (name in FEW or dtype in ("bfloat16", "float16")):
                continue
            if case.family in SLOW and f"tiny {name}" in known:
                name = f"tiny {name}"
            try:
                known[name](case, "triton", getattr(torch, dtype), "cpu")
            except Exception as error:
                failures.append(f"{case.id} {dtype} {name}: {type(error).__name__}: {str(error)[-1000:]}")
    print(f"{time.perf_counter() - begin:.1f} s", *failures, sep="\n")
    sys.exit(bool(failures))


def parts() -> None:
    """Large samples, summed in parts, and offsets of 64 bits, which only tensors too large for a test need."""
    from fastflow.ops.triton import rows, tiles

    _untested()
    for shape in ((2, 6, 30, 41), (3, 5000)):
        _large(*shape)
    rows.wide = tiles.wide = lambda *_: True
    _large(2, 6, 30, 41)


def _large(*shape: int) -> None:
    from fastflow import ops

    samples, channels = shape[:2]
    torch.manual_seed(0)
    x, h = torch.randn(2, *shape, dtype=torch.float64)
    start, (a, b) = torch.randn(samples, dtype=torch.float64), torch.randn(2, channels, dtype=torch.float64)
    last = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    half, index = slice(channels // 2, None), torch.arange(0, channels, 2)
    calls = {
        "half": lambda **o: ops.affine_coupling(x, h, mask=half, logdet=start, **o),
        "in place": lambda **o: ops.affine_coupling(y := x.clone(), h, mask=half, out=y, **o),
        "index": lambda **o: ops.affine_coupling(x, h, mask=index, logdet=start, **o),
        "channels_last": lambda **o: ops.affine_coupling(last, h, mask=half, logdet=start, **o),
        "gaussian": lambda **o: (ops.gaussian_log_prob(x, torch.cat([h, x], 1), running=start, **o),),
        "actnorm": lambda **o: ops.actnorm(x, a, b, logdet=start, **o),
    }
    for name, call in calls.items():
        for ours, theirs in zip(call(backend="triton"), call(backend="reference"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=f"{name} {shape}")


def rounds() -> None:
    """Programs that take several tiles of samples through the steps of a flow."""
    from fastflow import ops
    from fastflow.ops.triton import steps

    _untested()
    steps.PROGRAMS, steps.TILE = 2, 32
    torch.manual_seed(0)
    z, u, w, b = (torch.randn(s, dtype=torch.float64) for s in ((43, 3), (4, 3), (4, 3), (4,)))
    own = [torch.randn(43, *p.shape, dtype=torch.float64) for p in (u, w, b)]
    calls = {
        "planar": (ops.planar, (u, w, b)),
        "radial": (ops.radial, (u, b.abs() + 0.5, b)),
        "planar, each": (ops.planar, own),
    }
    for name, (op, given) in calls.items():
        for inverse in (False, True):
            found = []
            for backend in ("triton", "reference"):
                leaves = [t.clone().requires_grad_() for t in (z, *given)]
                y, logdet = op(*leaves, inverse=inverse, backend=backend)
                found.append((y, logdet, *torch.autograd.grad((y * y).sum() + logdet.sum(), leaves)))
            for ours, theirs in zip(*found, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=f"{name} inverse={inverse}")


def filters() -> None:
    """Programs that take more ticks than they keep states of, several rows at a tick; and what is refused."""
    from test_gru_ode_op import intervals, problem

    from fastflow import BackendError, ops
    from fastflow.ops.triton import gru_ode, gru_ode_backward

    _untested()
    gru_ode_backward.TICKS = 2
    h0, schedule, values, masks, *nets = problem(rows=(3, 0, 2, 1, 1))
    counts = torch.tensor([2, 0, 1, 0, 0, 3, 1, 0, 4, 2, 1, 0])
    schedule = schedule._replace(counts=counts, jumps=torch.arange(7) != 1)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (h0, values, nets[0].hidden, *nets[1], *nets[2], *nets[3])]
        cell, given = nets[0]._replace(hidden=leaves[2]), iter(leaves[3:])
        made = [type(n)(*(next(given) for _ in n)) for n in nets[1:]]
        out = ops.gru_ode_filter(leaves[0], schedule, leaves[1], masks, cell, *made, backend=backend)
        loss = sum((o * o).sum() for o in out[:4])
        found.append((*out, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for change, words in (({"method": "dopri5"}, "adaptive"), ({}, "does not fit")):
        with pytest.raises(BackendError, match=f"triton: .*{words}"):
            ops.gru_ode_filter(h0, intervals(schedule), values, masks, *nets, backend="triton", **change)
        gru_ode.MATRIX = 100
    gru_ode.MATRIX = 64 * 1024
    for series in (0, 2):  # nothing to do
        h, nothing = h0[:series].clone().requires_grad_(), problem(rows=(0,) * series, last=0)[1]
        out = ops.gru_ode_filter(h, nothing, values[:0], masks[:0], *nets, backend="triton")
        assert torch.equal(out.state, h) and torch.equal(torch.autograd.grad(out.state.sum(), h)[0], torch.ones_like(h))


def index() -> None:
    """A channel that is not there is neither read nor written; the log-determinant says so."""
    from fastflow.ops.coupling import Options
    from fastflow.ops.triton import kernel

    for shape in ((3, 4), (3, 4, 2, 5)):
        x, params = torch.randn(shape), torch.randn(shape)
        y, logdet = torch.full(shape, torch.nan), torch.empty(3)
        options = tuple(Options(0, 2, False, False, 1.0, [1.0, 2.0, 1.0, 0.0, torch.inf], [0, 4, -1, shape[-1]]))
        channels = torch.tensor([1, 10**9])
        kernel("coupling_fwd")(x, params, None, None, channels, None, y, logdet, options)
        assert logdet.isnan().all()
        rest = [0, 2, 3]
        assert torch.equal(y[:, rest], x[:, rest]) and not torch.equal(y[:, 1], x[:, 1])
        gx, gparams = torch.empty(shape), torch.zeros(shape)
        kernel("coupling_bwd")(
            x, params, None, None, channels, y, torch.ones(3), gx, gparams, None, None, False, options
        )
        assert torch.equal(gx[:, rest], y[:, rest]) and gparams.isfinite().all()


def compile() -> None:
    """torch.compile sees one graph."""
    from fastflow import ops

    def model(x, h):
        z, logdet = ops.affine_coupling(x, h, mask=slice(2, None), backend="triton")
        return ops.gaussian_log_prob(z, running=logdet, backend="triton")

    _untested()
    x, h = (torch.randn(3, 4, 5, 4, requires_grad=True) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for_grad = [torch.autograd.grad(f(x, h).sum(), (x, h)) for f in (compiled, model)]
    assert torch.equal(compiled(x, h), model(x, h))
    assert all(torch.equal(a, b) for a, b in zip(*for_grad, strict=True))


def remember() -> None:
    from fastflow import ops

    ops.actnorm(torch.randn(2, 3), torch.zeros(3), torch.zeros(3), backend="triton")


def import_() -> None:
    import fastflow.ops.triton as backend

    assert "triton" not in sys.modules
    assert backend.unavailable() is None and backend.refuses((torch.ones(1), None)) is None
    assert "int64" in backend.refuses((torch.ones(1, dtype=torch.int64),))
    assert "triton" not in sys.modules


AHEAD = {
    "coupling": ("sigmoid2-forward", "softplus-inverse", "learned-checkerboard", "index", "vector", "additive"),
    "actnorm": ("image-forward", "vector-inverse"),
    "conv1x1": ("image-bias", "vector-bias", "weights-lu-actnorm", "weights-lu-actnorm-inverse"),
    "gaussian": ("log_prob-softplus", "standard", "sample-glow", "kl-softplus"),
    "planar": ("shared-forward", "shared-inverse", "each-forward"),
    "radial": ("shared-forward", "shared-inverse", "each-inverse"),
    "sylvester": ("orthogonal-forward", "householder-forward", "triangular-inverse"),
    "trace": ("concat-tanh-3-wide", "concat_squash-silu-1-wide", "concat-tanh-3-wide-signs"),
    "wavenet": ("plain", "generation"),
    "autoregressive": ("nflows", "gate", "residual"),
    "ode": ("dopri5-concat_squash-softplus-1-regularize-back", "rk4-concat_squash-tanh-2-regularize-step-back"),
    "gru_ode": ("full-euler-dropout", "minimal-euler-impute"),
}
WIDE = ("coupling-sigmoid2-forward", "gaussian-log_prob-softplus", "gaussian-sample-glow", "gaussian-kl-softplus",
        "actnorm-image-forward", "conv1x1-image-bias")  # fmt: skip
SIXTEEN_BYTES = r"ld\.global\S*\.(v4\.[bf]32|v2\.[bf]64)|cp\.async\S* .*, (0x10|16)"
# what a slow path may take, and addresses that a long loop keeps aside for once a layer; why Sylvester's backward has a
# frame on sm_90 is not known yet
FRAMES = {
    ("conv1x1", "_substitute"): 16, ("wavenet", "_generate"): 64, ("sylvester", "_backward"): 8,
    ("gru_ode", "_forward"): 24, ("gru_ode", "_backward"): 176,  # bytes at H=50, float64's the larger ones
}  # fmt: skip
HELPERS = ("_finish", "_sum_partials", "_sum_logdet")  # that read a few numbers per sample or channel


def ahead(arch: str, family: str) -> None:
    """Every launch of some cases is compiled instead of run. Those bound by memory must read 16 bytes at a time, and
    none may put registers into memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastflow import testing
    from fastflow.ops import ode_stages
    from fastflow.ops import triton as backend

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", int(arch), 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    made = []

    def launch(self, grid):
        return lambda *a, **k: made.append((self.fn.__name__, self.run(*a, grid=grid, warmup=True, **k)))

    driver.set_active(Driver())
    JITFunction.__getitem__ = launch
    ode_stages.until_done = lambda turn, *_: turn()  # nothing runs that could end a solve
    backend.unavailable, backend.refuses = (lambda: None), (lambda tensors: None)
    importlib.import_module("fastflow.ops.triton.gru_ode").where = lambda *_: None  # is all finite?
    _untested()
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    failures, seen = [], set()
    for case in testing.cases(family):
        if case.name not in AHEAD[family]:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 3 if arch == "90" else 1]:
            if dtype == torch.float64 and case.id.startswith("conv1x1-") and triton.__version__ < "3.6":
                continue  # it cannot multiply matrices of float64: the self-test finds that out
            made.clear()
            inputs = testing.cast(case, case.inputs("bench"), dtype)
            inputs = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
            total = sum(o.sum() for o in case.run(backend="triton", **inputs))
            if family != "ode":  # whose backward has no kernels of its own, and needs the steps that were made
                total.backward()
            assert made, case.id
            for name, kernel in made:
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                where = f"{case.id} {dtype} {name} sm_{arch}"
                if case.id in WIDE and name not in HELPERS and not re.search(SIXTEEN_BYTES, kernel.asm["ptx"]):
                    failures.append(f"{where}: no wide load")
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(kernel.asm["cubin"])
                    file.flush()
                    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
                stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("STACK", "LOCAL"))
                # float64, which decides on the steps of ode in any dtype, has slow paths with a small frame; a sweep
                # holds more addresses than fit
                framed = dtype == torch.float64 or family in ("autoregressive", "ode")
                if local or stack > max(FRAMES.get((family, name), 0), 16 if framed else 0):
                    failures.append(f"{where}: {stack} bytes of stack, {local} of local memory")
    print(f"{len(seen)} kernels", *failures, sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    programs = {
        f.__name__.rstrip("_"): f for f in (table, parts, rounds, filters, index, compile, remember, import_, ahead)
    }
    programs[sys.argv[1]](*sys.argv[2:])
