"""``fastflow bench``: correctness first, then the rows of :mod:`fastflow.bench.suite`, as a table and as JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastflow.errors import MissingPackage, UserError

__all__ = ["add_arguments", "measure", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("family", nargs="?", help="coupling, conv1x1, gaussian, trace, masked or glow (default: all)")
    parser.add_argument("--compare", metavar="FILE", type=Path, help="an earlier --json: shows how the times changed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to keep the figures")
    parser.add_argument("--resources", action="store_true", help="what the CUDA kernels take; no GPU is needed for it")
    parser.add_argument("--arch", metavar="SM", type=int, default=90, help="of --resources (default: 90)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; 0, or 1 when something is not right, and then no figure."""
    from fastflow.bench import table

    if arguments.resources:
        return _resources(arguments)
    before = read(arguments.compare) if arguments.compare else None
    _require()
    from fastflow.bench.row import FAMILIES
    from fastflow.testing.cli import FAMILIES as VERIFIED
    from fastflow.testing.cli import able, verify

    if arguments.family not in (None, *FAMILIES):
        raise UserError(f"unknown family {arguments.family!r}: expected one of {', '.join(FAMILIES)}")
    # a model is made of all of them
    if not verify(arguments.family if arguments.family in VERIFIED else None, ["float32"], able()[:1]):
        print("fastflow bench: no figures, because these results are wrong", file=sys.stderr)
        return 1
    result = measure(arguments.family)
    if result is None:
        return 1
    print("\n" + table.text(result, before))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _resources(arguments: argparse.Namespace) -> int:
    from fastflow.bench import resources

    families = list(dict.fromkeys(instance.file for instance in resources.usual(None)))
    if arguments.family not in (None, *families):
        raise UserError(f"unknown family {arguments.family!r}: expected one of {', '.join(families)}")
    result = resources.measure(arguments.family, arguments.arch)
    print(resources.text(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def read(path: Path) -> dict[str, Any]:
    """An earlier result."""
    try:
        result = json.loads(path.read_text())
        result["rows"], result["machine"], result["limits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the JSON file of an earlier fastflow bench ({error!r})") from error
    return result


def measure(family: str | None = None, demo: bool = False) -> dict[str, Any] | None:
    """The figures of one family or all, or of the short table; None if a row failed."""
    _require()
    import pytest

    from fastflow.bench import machine

    with tempfile.TemporaryDirectory() as folder:
        settings, raw = Path(folder, "pytest.ini"), Path(folder, "raw.json")
        settings.write_text("[pytest]\n")  # not those of a project we may be called in
        chosen = ["-k", "demo" if demo else family or ""]
        quiet = ["-p", "no:cacheprovider", "-p", "no:terminal", "--benchmark-quiet"]
        where = ["-c", str(settings), "--rootdir", folder, "--pyargs", "fastflow.bench.suite"]
        code = pytest.main([*quiet, *where, f"--benchmark-json={raw}", *chosen], plugins=[Reporter()])
        if code != 0:
            return None
        entries = [entry["extra_info"] for entry in json.loads(raw.read_text())["benchmarks"]]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "limits": entries[0]["limits"],  # those that the floors were computed from
        "rows": [entry["row"] for entry in entries],
    }


class Reporter:
    """One line on stderr for every row as it runs, and the reason where one fails."""

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print(nodeid.partition("[")[2].removesuffix("]"), file=sys.__stderr__, flush=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.__stderr__, flush=True)


def _require() -> None:
    for module, package in (("pytest", "pytest"), ("pytest_benchmark", "pytest-benchmark")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(f"bench needs {package}, which is not installed: pip install 'fastflow[bench]'")
