"""Every row of the table against every property, backend and dtype."""

import pytest

from fastflow import testing
from fastflow.testing.cli import able


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", able("cpu"))
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.id)
def test_conformance(case, backend, dtype):
    if dtype not in case.dtypes:
        with pytest.raises((TypeError, ValueError)):
            case.run(backend=backend, **testing.cast(case, case.inputs("tiny"), dtype))
        return
    testing.check(case, backend, dtype)
