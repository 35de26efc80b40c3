"""``make gpu`` on the CPU, where its tensors are tiny and its figures none: does every part of it work?"""

import json
from functools import partial

import pytest
import torch

from fastflow.bench import conv1x1, coupling, device, gaussian, gpu, gru_ode, ode, table, trace, wavenet
from fastflow.bench.contest import Contest
from fastflow.bench.plain_glow import PlainGlow
from fastflow.bench.row import Row, contenders
from fastflow.models import Glow
from fastflow.testing import end_to_end


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile hands back the function: compiling takes longer than these tests may."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(device, "SECONDS", 0.0)
    monkeypatch.setattr(device.machine, "limits", lambda device: {"copy": 1e10, "gemm": 1e11})


def test_parts(tmp_path, monkeypatch, capfd):
    """All three as processes, the result file and its table."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.chdir(tmp_path)  # the processes must find what is tested, not the checkout
    assert gpu.verify("cpu", tmp_path, 120.0, ("actnorm",), ("float32",))
    assert gpu.bench("cpu", tmp_path, 120.0, "log-likelihood 256 KB float32")
    out = capfd.readouterr().out
    assert "cpu float32 actnorm:" in out and "0 failed" in out
    assert "backend cuda: torch sees no CUDA device" in out or torch.cuda.is_available()
    result = json.loads((tmp_path / "gpu-cpu-test.json").read_text())
    (row,) = result["rows"]
    assert result["failed"] == {} and result["left_out"] == [] and result["running"] is None
    assert {"fastflow", "eager", "torch.compile", "max-autotune"} <= set(row["contenders"])
    assert {"seconds", "spread", "memory"} == set(row["contenders"]["fastflow"])
    assert "CUDA" in row["absent"]["eager graph"] and row["floor"] > 0 and row["bytes"] > 0
    for part in ("gaussian: log-likelihood 256 KB float32", "GB/s", "no figures of a GPU", "× eager"):
        assert part in out, part


def test_out_of_time(tmp_path, capfd):
    assert gpu.verify("cpu", tmp_path, 0.0, ("actnorm",), ("float32", "float64"))
    assert "NOT verified: cpu float32 actnorm, cpu float64 actnorm" in capfd.readouterr().out


def test_reports_failures(tmp_path, capsys):
    assert not gpu._report("coupling float32", 1, "FAILED one\nFAILED two\n2 checks, 2 failed", False, tmp_path)
    assert not gpu._report("coupling float32", -11, "", False, tmp_path)
    out = capsys.readouterr().out
    assert not gpu._report("cuda bfloat16 trace", -9, "FAILED three", True, tmp_path)  # killed, but known to be wrong
    assert gpu._report("cuda bfloat16 coupling", -9, "", True, tmp_path)
    assert "FAILED two" in out and "exit status -11" in out
    assert "FAILED one" in (tmp_path / "gpu-verify.log").read_text()


def test_mistakes(capsys):
    for arguments in (["swim"], *([] if torch.cuda.is_available() else [["verify"]])):
        with pytest.raises(SystemExit) as stop:
            gpu.main(arguments)
        assert stop.value.code == 2
    assert "swim" in capsys.readouterr().err


@pytest.mark.parametrize("name", end_to_end.CHECKS)
def test_glow(name, capsys, monkeypatch):
    """Those that need a GPU are skipped and say so."""
    monkeypatch.setattr(end_to_end, "SHAPE", {"image_shape": (3, 8, 8), "levels": 2, "steps": 2, "hidden": 16})
    assert end_to_end.run("cpu", {name: end_to_end.CHECKS[name]})
    out = capsys.readouterr().out
    assert ("skipped: needs a CUDA device" in out) == (name in ("no_sync", "graph", "stream", "second_device"))


def test_glow_says_what_failed(capsys):
    def broken(device):
        raise AssertionError("planted")

    assert not end_to_end.run("cpu", {"broken": broken})
    assert "FAILED: AssertionError: planted" in capsys.readouterr().out


SIZE = 1 << 18


@pytest.mark.parametrize(
    "row",
    [
        row
        for family in (coupling, gaussian, conv1x1, trace, wavenet, ode, gru_ode)
        for row in family.gpu_rows(SIZE)
        if "LU" not in row.name
    ],
    ids=lambda row: row.id,
)
def test_contenders_agree(row, uncompiled):
    if row.family == "ode":
        pytest.importorskip("torchdiffeq")
    contest = Contest(row)
    assert {"fastflow", "eager"} <= set(contest.contenders) and set(contest.absent) <= {"triton", "eager graph"}


def test_plain_glow():
    """It is the same model: densities, gradients, samples that it can invert; loads what fastflow trained."""
    torch.manual_seed(0)
    shape = {"image_shape": (3, 8, 8), "levels": 2, "steps": 2, "hidden": 8}
    ours, plain, x = Glow(**shape), PlainGlow(**shape), torch.rand(8, 3, 8, 8) - 0.5
    ours.initialize(x)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain.load_state_dict(ours.state_dict())
    value, expected = plain.log_prob(x), ours.log_prob(x)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-3)
    value.sum().backward(), expected.sum().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * max(1, q.grad.abs().max()), msg=name)
    step = plain.levels[0][0]
    z = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(step.inverse(step(z)[0]), z, rtol=1e-3, atol=1e-4)
    assert plain.sample(3).shape == (3, 3, 8, 8)


def planted(name, run, **options):
    x = torch.ones(4)
    return Row("planted", name, partial(contenders, torch.exp, run, (x,), more=()), targets={"eager": 1e9}, **options)


def test_result(uncompiled, tmp_path, monkeypatch):
    """What disagrees fails, what there is no time for is left out, both are said; a second run goes on."""
    rows = [planted("wrong", torch.sin), planted("right", torch.exp), planted("slow", torch.exp, seconds=1e9)]
    monkeypatch.setattr(device, "rows", lambda *_: iter(rows))
    path = tmp_path / "result.json"
    result = device.measure(path, "cpu", 60.0)
    assert result == json.loads(path.read_text())
    assert "eager disagree" in result["failed"]["planted: wrong"] and result["left_out"] == ["planted: slow"]
    (row,) = result["rows"]
    assert row["name"] == "right" and row["profile"]["top"]  # its target is out of reach
    text = table.text(result)
    for part in ("planted: wrong FAILED", "for want of time: planted: slow", "1e+09× eager MISSED"):
        assert part in text, part
    result["running"] = "planted: slow"  # as a process leaves it that the row has killed
    path.write_text(json.dumps(result))
    again = device.measure(path, "cpu", 60.0)
    assert again["failed"]["planted: slow"] == "the process died"
    assert again["left_out"] == [] and again["rows"] == result["rows"]


def test_table_of_a_gpu(uncompiled, tmp_path, monkeypatch):
    """Into its own place of a document, and only what a GPU gave."""
    monkeypatch.setattr(device, "rows", lambda *_: iter([planted("one", torch.exp)]))
    path, document = tmp_path / "gpu-cpu-test.json", tmp_path / "README.md"
    result = device.measure(path, "cpu", 60.0)
    document.write_text(f"{table.BEGIN}\nkept\n{table.END}\n{table.GPU_BEGIN}\nold\n{table.GPU_END}\n")
    with pytest.raises(SystemExit, match="made on the CPU"):
        table.main(str(path), str(document))
    backends = {"cpu": "available", "cuda": "available", "triton": "no"}
    result["machine"] |= {"gpu": "A card", "cuda": "13.0", "backends": backends, "cuda_backend": "CuPy 14"}
    path.write_text(json.dumps(result | {"device": "cuda"}))
    table.main(str(path), str(path), str(document))
    text = document.read_text()
    assert "kept" in text and "old" not in text and text.count("A card, CUDA 13.0, CuPy 14; backends: cuda") == 2
