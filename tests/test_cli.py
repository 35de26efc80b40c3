"""The command line: what it prints, and its exit codes."""

import json
import subprocess
import sys

import pytest

from fastflow.__main__ import COMMANDS, main
from fastflow.bench import table
from fastflow.ops._backend import NATIVE


def call(*arguments, block=()):
    """``fastflow arguments`` in a process in which the packages ``block`` are not installed."""
    code = f"import sys; sys.modules |= dict.fromkeys({block!r})\nfrom fastflow.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def one_line(capsys, *arguments):
    """The line with which a mistake is answered."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("fastflow")
    return err


def test_info(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for word in ("fastflow", "python", "torch", "backend cpu", "backend reference", "backend cuda", "self-tests"):
        assert any(line.startswith(word) for line in lines), word


def test_info_describes_what_is_available(monkeypatch, capsys):
    for name, backend in NATIVE.items():
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "description", lambda name=name: f"described {name}")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in NATIVE:
        assert f"available: described {name}" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"fastflow {command}" in capsys.readouterr().out


def test_mistakes(capsys, tmp_path):
    assert "COMMAND" in one_line(capsys)
    assert "'swim'" in one_line(capsys, "swim")
    assert "coupling" in one_line(capsys, "verify", "nonsense")
    assert "'nonsense'" in one_line(capsys, "verify", "coupling", "--backend", "nonsense")
    assert "'nowhere'" in one_line(capsys, "verify", "coupling", "--device", "nowhere")
    assert "coupling" in one_line(capsys, "bench", "nonsense")
    assert "none.json" in one_line(capsys, "bench", "--compare", str(tmp_path / "none.json"))
    assert "digits" in one_line(capsys, "train", "glow", "--data", "nonsense", "--out", str(tmp_path))
    assert "checkpoint" in one_line(capsys, "sample", str(tmp_path))


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("pytest_benchmark", ["bench"]), ("sklearn", ["train", "glow", "--data", "digits", "--out", "never"])],
)
def test_missing_package(package, arguments):
    done = call(*arguments, block=(package,))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "pip install 'fastflow[" in done.stderr


def test_verify_says_what_failed(monkeypatch, capsys):
    from fastflow import testing
    from fastflow.testing import cli

    case = testing.CASES[0]

    def broken(*arguments):
        raise AssertionError("planted")

    monkeypatch.setattr(cli, "cases", lambda family: (case,))
    monkeypatch.setattr(cli, "CHECKS", {"forward": testing.CHECKS["forward"]})
    assert main(["verify", case.family, "--dtype", "float32"]) == 0
    assert "0 failed" in capsys.readouterr().out
    monkeypatch.setattr(cli, "CHECKS", {"forward": broken})
    assert main(["verify", case.family, "--dtype", "float32"]) == 1
    assert f"FAILED {case.id} reference float32 forward: AssertionError: planted" in capsys.readouterr().out


def test_interrupted(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastflow.info.run", interrupted)
    assert main(["info"]) == 130


RESULT = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "abc1234",
    "machine": {"cpu": "a CPU", "cores": 2, "library": "avx2", "torch": "2.13", "python": "3.11", "fastflow": "0.1.0"},
    "limits": {"triad": 5e10, "copy": 5e10, "gemm": 2e11},
    "rows": [
        {
            "family": "coupling",
            "name": "one",
            "floor": 5e-4,
            "targets": {"eager": 3.5, "torch.compile": 1.5, "floor": 0.8},
            "rounds": 5,
            "contenders": {
                "fastflow": {"seconds": 1e-3, "spread": 0.01, "memory": 1 << 20},
                "eager": {"seconds": 4e-3, "spread": 0.01, "memory": 3 << 20},
            },
            "absent": {"torch.compile": "no compiler"},
        }
    ],
}


def test_table(tmp_path):
    text = table.text(RESULT, RESULT)
    for part in ("3.5× eager met", "1.5× torch.compile not run", "80% of floor MISSED", "4.00", "1M / 3M", "abc1234"):
        assert part in text, part
    document, result = tmp_path / "README.md", tmp_path / "result.json"
    result.write_text(json.dumps(RESULT))
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.main(str(result), str(document))
    once = document.read_text()
    assert "| coupling: one | 1 ms |" in once and "old" not in once and once.endswith("after\n")
    table.main(str(result), str(document))
    assert document.read_text() == once
