import doctest
import os

import emulation
import pytest
import torch

from fastflow.errors import MissingPackage
from fastflow.ops import _backend
from fastflow.ops.cuda import load

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU


class SkipsWithoutPackage:
    """What needs a package of an extra that is not installed is skipped, doctests of fastflow too."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        try:
            return (yield)
        except Exception as error:
            first = getattr(error, "failures", [error])[0]  # those of a doctest
            cause = first.exc_info[1] if isinstance(first, doctest.UnexpectedException) else first
            if isinstance(cause, MissingPackage):
                pytest.skip(str(cause))
            raise


def pytest_configure(config):
    config.pluginmanager.register(SkipsWithoutPackage())  # hooks of a conftest would see tests/ alone


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote reads as NaN, and nothing that depends on the order of threads passes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Where what the emulation of a GPU compiled is kept."""
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture
def emulated(libraries, monkeypatch, tmp_path):
    """The backend cuda serves CPU tensors, by emulation and without its self-test."""
    monkeypatch.setattr(_backend, "TESTED", ())
    monkeypatch.setenv("FASTFLOW_CACHE", str(tmp_path))
    before = load.use_driver(emulation.Emulation(libraries))
    yield load.driver()
    load.use_driver(before)


@pytest.fixture(scope="session")
def digits():
    from fastflow.train import load_data

    return load_data("digits")


@pytest.fixture
def one_thread():
    """For models that are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def standins():
    """The models of standins.py have recipes."""
    from standins import mount, unmount

    mount()
    yield
    unmount()
