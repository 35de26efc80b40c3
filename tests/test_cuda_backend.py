"""Around the CUDA kernels: the choice of the backend, its self-test, how kernels are loaded and given arguments."""

import importlib.util
import sys
import types

import emulation
import pytest
import torch

from fastflow import BackendError, info, ops, testing
from fastflow.ops import _backend
from fastflow.ops.cuda import load, source
from fastflow.ops.cuda.instances import USUAL, Instance
from fastflow.testing import selftest

pytestmark = [
    pytest.mark.skipif(emulation.CXX is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("emulated"),
]


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
