"""``fastflow verify``: the table of cases on the user's machine."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from fastflow.errors import UserError
from fastflow.ops import _backend
from fastflow.testing import CASES, CHECKS, DTYPES, Case, cases

__all__ = ["able", "add_arguments", "run", "verify"]

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
FAMILIES = tuple(dict.fromkeys(case.family for case in CASES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", help=f"{', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--device", default="cpu", help="where the tensors are (default: %(default)s)")
    parser.add_argument(
        "--backend",
        action="append",
        help=f"{', '.join(_backend.BACKENDS)}; may be repeated (default: every one that can run there)",
    )
    parser.add_argument("--dtype", choices=NAMES, help="(default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Prints what failed and one line per family; 0 if nothing did."""
    if arguments.family not in (None, *FAMILIES):
        raise UserError(f"unknown family {arguments.family!r}: expected one of {', '.join(FAMILIES)}")
    dtypes = [arguments.dtype] if arguments.dtype else list(NAMES)
    backends = able(arguments.device, arguments.backend)
    return 0 if verify(arguments.family, dtypes, backends, arguments.device) else 1


def verify(family: str | None, dtypes: Sequence[str], backends: Sequence[str], device: str = "cpu") -> bool:
    """Runs the rows of one family or all, with progress; were they all right?"""
    failed = total = 0
    with _poisoned():
        for name in FAMILIES if family is None else (family,):
            found, count = _family(name, dtypes, backends, device)
            failed += found
            total += count
    print(f"{total} checks on {', '.join(backends)} ({device}), {failed} failed")
    return failed == 0


def able(device: str = "cpu", asked: Sequence[str] | None = None) -> list[str]:
    """The backends asked for, or all that can serve a tensor on this device; raises where one cannot."""
    try:
        probe = torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    reasons = _backend.reasons((probe,))
    if asked is None:
        return [name for name, reason in reasons.items() if reason is None]
    for name in asked:
        if name not in reasons or reasons[name] is not None:
            raise UserError(f"backend {name!r}: {reasons.get(name) or 'expected one of ' + ', '.join(reasons)}")
    return list(asked)


def _family(name: str, dtypes: Sequence[str], backends: Sequence[str], device: str) -> tuple[int, int]:
    """(how many checks failed, how many ran); says at once what failed, for the next one may end the process"""
    rows = cases(name)
    failed = count = 0
    for i, case in enumerate(rows, 1):
        _progress(f"{name:<12} {i}/{len(rows)} {case.name}")
        for what, error in _checks(case, dtypes, backends, device):
            count += 1
            if error:
                failed += 1
                _progress("")
                print(f"FAILED {what}: {error}", flush=True)
    _progress("")
    print(f"{name:<12} {len(rows)} cases, {count} checks, {failed or 'none'} failed", flush=True)
    return failed, count


def _checks(
    case: Case, dtypes: Sequence[str], backends: Sequence[str], device: str
) -> Iterator[tuple[str, str | None]]:
    """(case, backend, dtype and property; what is wrong) for every check of a case."""
    for backend in (name for name in backends if name in case.backends):
        for dtype in dtypes:
            if NAMES[dtype] not in case.dtypes:
                continue
            for prop, check in CHECKS.items():
                error = None
                try:
                    check(case, backend, NAMES[dtype], device)
                except Exception as caught:  # a crash is a failure like a wrong number
                    error = " ".join(f"{type(caught).__name__}: {caught}".split())
                yield f"{case.id} {backend} {dtype} {prop}", error


class _poisoned:
    """Memory that nobody wrote reads as NaN."""

    def __enter__(self) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products on a GPU here
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]


def _progress(line: str) -> None:
    """A line that the next one overwrites, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:78]}", end="", file=sys.stderr, flush=True)
