"""The CUDA kernels without a GPU: run by emulation, and everything around them that a GPU is not needed for."""

import importlib.util
import sys
import types
from pathlib import Path

import emulation
import pytest
import sanitizers
import torch

from fastflow import BackendError, info, ops, testing, use_backend
from fastflow.models import Glow
from fastflow.ops import _backend
from fastflow.ops.cuda import load, source
from fastflow.ops.cuda.instances import USUAL, Instance
from fastflow.testing import selftest

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64]

pytestmark = pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(autouse=True)
def emulated(libraries, monkeypatch, tmp_path):
    """The backend cuda serves CPU tensors; its self-test is the business of the tests below."""
    monkeypatch.setattr(_backend, "TESTED", ())
    monkeypatch.setenv("FASTFLOW_CACHE", str(tmp_path))
    before = load.use_driver(emulation.Emulation(libraries))
    yield load.driver()
    load.use_driver(before)


def names(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


# --- the table --------------------------------------------------------------------------------------


def sizes_of(case):
    """The layers of a trace run through the emulation for seconds: the ragged sizes of the others find as much."""
    return ("tiny",) if case.family == "trace" else ("tiny", "odd")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@names(testing.CASES)
def test_conformance(case, dtype):
    testing.CHECKS["forward"](case, "cuda", dtype, sizes=sizes_of(case))
    testing.CHECKS["gradient"](case, "cuda", dtype, sizes=sizes_of(case))
    testing.CHECKS["inverse"](case, "cuda", dtype)


@names([case for case in testing.CASES if case.selftest and case.family != "trace"])
def test_half_precision(case):
    for dtype in (torch.bfloat16, torch.float16):
        testing.CHECKS["forward"](case, "cuda", dtype)
        testing.CHECKS["gradient"](case, "cuda", dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_beside_float32(half):
    """What autocast makes: x in float32, the network's output in half precision; or mean and raw scale that differ."""
    x, wide, narrow = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4).to(half)
    packed = torch.randn(3, 8, 4, 4).to(half)
    calls = [
        lambda b: ops.affine_coupling(x, packed, backend=b),
        lambda b: ops.affine_coupling(x, wide, narrow, backend=b),
        lambda b: ops.affine_coupling(narrow, wide, wide, backend=b),
        lambda b: (ops.gaussian_log_prob(x, packed, backend=b),),
        lambda b: (ops.gaussian_log_prob(narrow, wide, narrow, backend=b),),
        lambda b: (ops.gaussian_kl(packed, prior=packed.float(), backend=b),),
        lambda b: ops.conv1x1(narrow, torch.eye(4) + 0.1, torch.ones(4), torch.zeros(()), backend=b),
    ]
    for call in calls:
        for value, expected in zip(call("cuda"), call("reference"), strict=True):
            torch.testing.assert_close(value, expected)


# --- shapes that take other ways through the kernels ---------------------------------------------------


def both(run, *inputs):
    """Outputs and gradients on the backend cuda and on the reference."""
    found = []
    for backend in ("cuda", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = run(*leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((o.double() ** 2).mean() for o in outputs)
        found.append((*outputs, *torch.autograd.grad(total, leaves)))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, slice(3, None), slice(0, 3), torch.tensor([4, 0, 2])], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_samples_in_several_parts(mask, channels_last):
    """A sample that several blocks share: their sums meet in a second launch."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 6, 64, 64).contiguous(memory_format=form)
    h = torch.randn(2, 12 if mask is None else 6, 64, 64).contiguous(memory_format=form)
    both(lambda x, h, backend: ops.affine_coupling(x, h, mask=mask, backend=backend), x, h)
    both(lambda x, backend: ops.gaussian_log_prob(x, running=torch.ones(2), backend=backend), x)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 13, 48, 64])
def test_conv1x1_of_every_width(channels):
    for x in (torch.randn(2, channels, 8, 8), torch.randn(70, channels)):
        weight = torch.eye(channels) + 0.1 * torch.randn(channels, channels)
        run = lambda x, w, b, backend: ops.conv1x1(x, w, b, torch.tensor(0.5, dtype=x.dtype), backend=backend)  # noqa: E731
        both(run, x, weight, torch.randn(channels))
        both(run, *(t.double() for t in (x, weight)), torch.randn(channels, dtype=torch.float64))


def test_more_layers_than_one_launch_takes():
    layers, n = 67, 3
    lower, upper, log_s = torch.randn(layers, n, n), torch.randn(layers, n, n), torch.randn(layers, n)
    permutation, sign = torch.stack([torch.randperm(n) for _ in range(layers)]), torch.ones(layers, n)
    found, expected = (ops.lu_weights(lower, upper, log_s, permutation, sign, backend=b) for b in ("cuda", "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_seed_needs_no_new_plan():
    """A training step draws one each time."""
    layers = [(torch.randn(6, 3), torch.zeros(6)), (torch.randn(3, 6), torch.zeros(3))]
    x, kernel = torch.randn(4, 3), _backend.NATIVE["cuda"].kernel("trace_rows")
    (plans,) = (cell.cell_contents for cell in kernel.__closure__ if isinstance(cell.cell_contents, dict))
    plans.clear()
    for seed in (0, 1, 2**40):
        run = lambda b, seed=seed: ops.mlp_trace(  # noqa: E731
            x, 0.0, layers, layer="ignore", probes=ops.Rademacher(2, seed), backend=b
        )
        torch.testing.assert_close(run("cuda"), run("reference"))
    assert len(plans) == 1


def test_wrong_index_reaches_nothing():
    """The device cannot raise: a channel that does not exist is left alone and shows as NaN."""
    x, h = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    z, logdet = ops.affine_coupling(x, h, mask=torch.tensor([1, 9]), backend="cuda")
    assert torch.isnan(logdet).all()
    assert torch.equal(z[:, [0, 2, 3]], x[:, [0, 2, 3]]) and not torch.equal(z[:, 1], x[:, 1])


def test_whole_numbers_are_numbers():
    """What is a double in a struct of arguments may come as an int."""
    x, a, b, h = torch.randn(2, 3, 2), torch.randn(3), torch.randn(3), torch.randn(2, 6, 2)
    both(lambda x, a, b, backend: ops.actnorm(x, a, b, gain=2, backend=backend), x, a, b)
    both(lambda x, h, backend: ops.affine_coupling(x, h, shift_gain=2, backend=backend), x, h)
    both(lambda n, h, backend: ops.gaussian_sample(h, noise=n, temperature=2, backend=backend), x, h)


def test_in_place():
    x, h = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    own = x.clone()
    z, _ = ops.affine_coupling(own, h, mask=slice(2, None), out=own, backend="cuda")
    assert z is own
    torch.testing.assert_close(own, ops.affine_coupling(x, h, mask=slice(2, None), backend="reference")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    """The emulation lets the threads run in another order every time."""
    x, h = torch.randn(3, 6, 40, 40, dtype=dtype), torch.randn(3, 12, 40, 40, dtype=dtype)
    run = lambda: (*ops.affine_coupling(x, h, backend="cuda"), ops.gaussian_log_prob(x, h, backend="cuda"))  # noqa: E731
    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


# --- models, compile ----------------------------------------------------------------------------------


def test_glow_trains_alike():
    torch.manual_seed(0)
    model = Glow((3, 8, 8), levels=2, steps=2, hidden=8)
    x = torch.rand(4, 3, 8, 8) - 0.5
    model.initialize(x)
    found = {}
    for backend in ("cuda", "reference"):
        model.zero_grad()
        with use_backend(backend):
            loss = -model.log_prob(x).mean()
            loss.backward()
        found[backend] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for a, b in zip(found["cuda"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compiles_without_graph_breaks():
    x, h, weight = torch.randn(2, 4, 3, 3), torch.randn(2, 8, 3, 3).requires_grad_(), torch.eye(4)

    def program(x, h):
        z, logdet = ops.affine_coupling(x, h, backend="cuda")
        z, logdet = ops.conv1x1(z, weight, None, torch.zeros(()), logdet=logdet, backend="cuda")
        return ops.gaussian_log_prob(z, running=logdet, backend="cuda")

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), program(x, h))
    (grad,) = torch.autograd.grad(compiled(x, h).sum(), h)
    torch.testing.assert_close(grad, torch.autograd.grad(program(x, h).sum(), h)[0])


# --- the choice -----------------------------------------------------------------------------------------


def test_cpu_tensors_are_never_chosen_for_it():
    assert _backend.choose(_backend.Family("coupling"), (torch.zeros(1),)) in ("cpu", "reference")


def test_the_reason_names_what_is_missing():
    load.use_driver(load.CuPy())
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    assert "no CUDA device" in _backend.reasons()["cuda"]
    with pytest.raises(BackendError, match="no CUDA device"):
        ops.gaussian_log_prob(torch.zeros(2, 3), backend="cuda")


@pytest.fixture
def tested(monkeypatch):
    monkeypatch.setattr(_backend, "TESTED", ("cuda",))
    monkeypatch.setattr(_backend, "_verdicts", {})


def test_self_test_runs_once(tested, emulated, monkeypatch, tmp_path):
    runs = []
    check = selftest.check_forward
    monkeypatch.setattr(selftest, "check_forward", lambda *a, **k: (runs.append(a), check(*a, **k)))
    x = torch.zeros(2, 3)
    ops.gaussian_log_prob(x, backend="cuda")
    ran = len(runs)
    assert ran > 0
    ops.gaussian_log_prob(x, backend="cuda")
    assert len(runs) == ran
    _backend._verdicts.clear()  # as in another process: what passed is remembered on disk
    ops.gaussian_log_prob(x, backend="cuda")
    assert len(runs) == ran
    monkeypatch.setattr(source, "fingerprint", lambda: "other sources")
    _backend._verdicts.clear()
    ops.gaussian_log_prob(x, backend="cuda")
    assert len(runs) == 2 * ran


def test_a_wrong_build_is_found_and_not_used(tested, monkeypatch):
    right = source.text
    monkeypatch.setattr(source, "text", lambda *i: right(*i).replace("T(0.5) * e * e", "T(0.5001) * e * e"))
    x = torch.randn(40, 3)
    with pytest.raises(BackendError, match="its self-test failed"), pytest.warns(UserWarning, match="does not use"):
        ops.gaussian_log_prob(x, backend="cuda")
    compiled = torch.compile(lambda x: ops.gaussian_log_prob(x, backend="cuda"), backend="aot_eager")
    with pytest.raises(BackendError, match="its self-test failed"):
        compiled(x)


def test_info_says_what_the_self_tests_say(tested, monkeypatch):
    right = source.text
    monkeypatch.setattr(source, "text", lambda *i: right(*i).replace("T(0.5) * e * e", "T(0.5001) * e * e"))
    found = dict(info.verdicts("cuda", "cpu"))
    assert found["  coupling"] == "passed its self-test" and "error" in found["  gaussian"]


def test_self_test_does_not_mind_where_it_is_asked_for(tested):
    """Within a checkpoint, whose hooks count what autograd saves; in inference mode; in deterministic mode."""
    x = torch.randn(4, 3, requires_grad=True)
    run = lambda x: ops.gaussian_log_prob(x, backend="cuda")  # noqa: E731
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, -x.detach())
    torch.use_deterministic_algorithms(True)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        _backend._verdicts.clear()
        with mode:
            assert _backend.doubt("cuda", _backend.Family("gaussian"), x) is None
    assert torch.are_deterministic_algorithms_enabled()


def test_no_verdict_without_a_test(tested, monkeypatch):
    """An interrupt, or too little memory, says nothing about the kernels."""
    for error in (KeyboardInterrupt, torch.OutOfMemoryError):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(selftest, "check_forward", fails)
        with pytest.raises((KeyboardInterrupt, BackendError)):
            ops.gaussian_log_prob(torch.zeros(2, 3), backend="cuda")
        assert _backend._verdicts == {}


def test_a_kernel_that_does_not_compile_is_a_reason(tested, monkeypatch):
    monkeypatch.setattr(source, "text", lambda *instances: "#error nothing works today")
    with pytest.raises(BackendError, match="nothing works today"), pytest.warns(UserWarning):
        ops.gaussian_log_prob(torch.zeros(2, 3), backend="cuda")


# --- CuPy, as far as it can be without a GPU ------------------------------------------------------------


class FakeCuPy(types.ModuleType):
    """What is used of CuPy, with the calls it got. Its functions are those of the emulation."""

    __version__ = "0"

    def __init__(self, driver):
        super().__init__("cupy")
        self.driver, self.compiled, self.launches = driver, [], []
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: 13000)
        error = types.SimpleNamespace(CUDADriverError=KeyError)
        self.cuda = types.SimpleNamespace(runtime=runtime, driver=error)

    def RawModule(self, code=None, path=None, options=()):
        def get_function(name):
            if path is not None:
                raise KeyError(name)  # an architecture that the binary does not have
            self.compiled.append((name, options))
            (instance,) = (i for i in USUAL if i.name == name)

            def function(grid, block, arguments, shared_mem, stream):
                (packed,) = arguments
                assert packed.size == 1 and block == (instance.threads,)
                self.launches.append(stream.ptr)
                self.driver.launch(instance, torch.device("cpu"), grid[0], shared_mem, packed.tobytes())

            function.kernel = None
            return function

        return types.SimpleNamespace(get_function=get_function)


@pytest.fixture
def through_cupy(emulated, monkeypatch):
    fake = FakeCuPy(emulated)
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=7),
        is_current_stream_capturing=lambda: False,
    )
    monkeypatch.setattr(load, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake)
    driver = load.CuPy()
    driver.device_type = "cpu"
    load.use_driver(driver)
    return fake


def test_launches_on_the_current_stream(through_cupy):
    x, h = torch.randn(3, 4, 5, 5), torch.randn(3, 8, 5, 5)
    for _ in range(2):
        z, logdet = ops.affine_coupling(x, h, backend="cuda")
    expected = ops.affine_coupling(x, h, backend="reference")
    torch.testing.assert_close((z, logdet), expected)
    assert len(through_cupy.compiled) == 1 and through_cupy.launches == [7, 7]


def test_a_first_call_may_be_compiled(through_cupy):
    """Whether the backend serves is asked while torch.compile traces."""
    compiled = torch.compile(lambda x: ops.gaussian_log_prob(x, backend="cuda"), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), ops.gaussian_log_prob(x, backend="reference"))


def test_nothing_is_loaded_within_a_cuda_graph(through_cupy, monkeypatch):
    monkeypatch.setattr(load.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make the call once before"):
        ops.gaussian_log_prob(torch.zeros(2, 3), backend="cuda")


def test_binaries_are_preferred_where_they_serve(through_cupy, monkeypatch, tmp_path):
    """One that lacks this GPU's architecture does not: the kernel is compiled."""
    asked = []
    monkeypatch.setattr(source, "binary", lambda file: asked.append(file) or tmp_path)
    ops.gaussian_log_prob(torch.zeros(2, 3), backend="cuda")
    assert asked == ["gaussian"] and len(through_cupy.compiled) == 1


def test_a_cupy_that_does_not_work_is_a_reason(through_cupy, monkeypatch):
    def broken():
        raise OSError("the driver is too old")

    monkeypatch.setattr(through_cupy.cuda.runtime, "runtimeGetVersion", broken)
    assert load.driver().unavailable() is None
    assert "the driver is too old" in load.driver().description()
    assert "the driver is too old" in load.driver().unavailable()


# --- sources ----------------------------------------------------------------------------------------


def test_sources_stand_alone():
    for family in source.folder().joinpath("cuda").glob("*.cu"):
        assert '#include "' not in source.flattened(family.stem)


def test_arguments_fit_the_launch(monkeypatch):
    """Every struct of arguments has the size that Python packs, and fits the 4 KB that every GPU takes."""
    sizes = {}

    class Recorder(emulation.Emulation):
        def launch(self, instance, device, blocks, shared, arguments):
            sizes[instance] = len(arguments)
            super().launch(instance, device, blocks, shared, arguments)

    recorder = Recorder(load.driver().folder)
    load.use_driver(recorder)
    for case in testing.CASES:
        if case.selftest:
            testing.CHECKS["gradient"](case, "cuda", torch.float32, sizes=("tiny",))
    kinds = {(i.file, i.arguments): size for i, size in sizes.items()}
    assert len(kinds) > 15
    for (file, arguments), size in kinds.items():
        assert size <= 4096
        probe = Instance(file, "unused", arguments)
        text = f'{source.flattened(file)}\nstatic_assert(sizeof(fastflow::{arguments}) == {size}, "");\n'
        recorder.compile(probe, text)


# --- what the emulation catches -------------------------------------------------------------------------

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
