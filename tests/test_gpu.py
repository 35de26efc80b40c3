"""What only a GPU can show: ``make gpu`` runs the same without pytest."""

import pytest
import torch

from fastflow import testing
from fastflow.ops import _backend
from fastflow.testing import end_to_end

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = [name for name in _backend.TESTED if _backend.NATIVE[name].unavailable() is None]


@pytest.mark.parametrize("name", end_to_end.CHECKS)
def test_glow(name):
    try:
        end_to_end.CHECKS[name]("cuda")
    except end_to_end.Skipped as why:
        pytest.skip(str(why))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.id)
def test_conformance(case, backend, dtype):
    if dtype in case.dtypes and backend in case.backends:
        testing.check(case, backend, dtype, "cuda")
