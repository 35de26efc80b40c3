"""The table of cases that tests, ``fastflow verify`` and the benchmarks share, and what every case must satisfy.

One file of cases per family; ``checks`` holds the properties.
"""

from __future__ import annotations

from fastflow.testing import (
    actnorm,
    autoregressive,
    conv1x1,
    coupling,
    gaussian,
    gru_ode,
    masked,
    mlp_coupling,
    ode,
    planar,
    sylvester,
    trace,
    wavenet,
)
from fastflow.testing.case import DTYPES, Case
from fastflow.testing.checks import CHECKS, cast, check, tolerance

__all__ = ["CASES", "CHECKS", "DTYPES", "Case", "cases", "cast", "check", "tolerance"]

_FAMILIES = (
    coupling,
    actnorm,
    conv1x1,
    gaussian,
    trace,
    mlp_coupling,
    wavenet,
    planar,
    autoregressive,
    masked,
    sylvester,
    gru_ode,
    ode,
)

CASES: tuple[Case, ...] = tuple(case for family in _FAMILIES for case in family.cases())


def cases(family: str | None = None) -> tuple[Case, ...]:
    """The rows of one family, or all."""
    return tuple(case for case in CASES if family in (None, case.family))
