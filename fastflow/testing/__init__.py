"""The table of cases that tests, ``fastflow verify`` and the benchmarks share, and what every case must satisfy.

One file of cases per family; ``checks`` holds the properties.
"""

from __future__ import annotations

from fastflow.testing import coupling, gaussian, trace
from fastflow.testing.case import DTYPES, Case
from fastflow.testing.checks import CHECKS, cast, check, tolerance

__all__ = ["CASES", "CHECKS", "DTYPES", "Case", "cases", "cast", "check", "tolerance"]

CASES: tuple[Case, ...] = (*coupling.cases(), *gaussian.cases(), *trace.cases())


def cases(family: str | None = None) -> tuple[Case, ...]:
    """The rows of one family, or all."""
    return tuple(case for case in CASES if family in (None, case.family))
