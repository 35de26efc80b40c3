"""Every row of the table against every property, backend and dtype."""

import pytest

from fastflow import testing
from fastflow.ops import _backend

BACKENDS = [name for name, module in _backend.NATIVE.items() if module.unavailable() is None]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.id)
def test_conformance(case, backend, dtype):
    if dtype not in case.dtypes:
        with pytest.raises((TypeError, ValueError)):
            case.run(backend=backend, **testing.cast(case, case.inputs("tiny"), dtype))
        return
    testing.check(case, backend, dtype)
