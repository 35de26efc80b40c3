"""A flow over time: its stages, and the pictures of them."""

import pytest
import torch
from standins import command, sample_command

from fastflow.models import FFJORD, MAF, Planar, RealNVP, VectorRealNVP
from fastflow.train.errors import UserError
from fastflow.train.over_time import _samples, _stages, draw_over_time

MODELS = {
    "maf": lambda: MAF(2, steps=2, hidden=(8,), norm="act"),
    "realnvp": lambda: VectorRealNVP(2, layers=3, hidden=(8,)),
    "planar": lambda: Planar(2, steps=5),
    "planar from latents": lambda: Planar(2, steps=5, direction="sampling"),
    "ffjord": lambda: FFJORD(2, (8,), blocks=2, batch_norm=True, time=0.7, method="rk4", step_size=0.05, trace="exact"),
}


def filled(name):
    torch.manual_seed(1)
    model = MODELS[name]()
    model.initialize(torch.randn(64, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_stages_lead_from_the_base_to_the_flow(name):
    model = filled(name)
    stages = _stages(model, 6)
    assert stages[0].label == "base" and 3 <= len(stages) <= 7
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(stages[0].flow.log_prob(x), model.base.log_prob(x))
    torch.testing.assert_close(stages[-1].flow.log_prob(x), model.log_prob(x), rtol=1e-5, atol=1e-5)
    drawn = _samples(model, stages, 40, 1.0, seed=3)
    sample = model.sample(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn[-1], sample, rtol=1e-4, atol=1e-4)
    # every stage's own samples have its own density
    for before, stage, start, x in zip(stages, stages[1:], drawn, drawn[1:], strict=False):
        wanted = before.flow.log_prob(start) + stage.part(x)[1]
        torch.testing.assert_close(stage.flow.log_prob(x), wanted, rtol=1e-4, atol=1e-4)


def test_files(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    model = filled("planar").float()
    strip, animation = tmp_path / "a.png", tmp_path / "a.gif"
    assert draw_over_time(model, strip, n=50) == 6 and draw_over_time(model, animation, n=50) == 6
    assert image.open(strip).size[0] > 1000
    moving = image.open(animation)
    assert moving.n_frames == 6 and moving.info["loop"] == 0
    with pytest.raises(UserError, match="a.csv: expected a name that ends in .png or .gif"):
        draw_over_time(model, tmp_path / "a.csv")
    for wrong in (RealNVP((1, 4, 4), hidden=4, blocks=1), VectorRealNVP(3, layers=2, hidden=(4,))):
        with pytest.raises(UserError, match="expected a flow of points in the plane, got"):
            draw_over_time(wrong, strip)


def test_command(tmp_path, capsys):
    for package in ("PIL", "matplotlib", "sklearn", "safetensors"):
        pytest.importorskip(package)
    out = tmp_path / "run"
    arguments = ("planar", "--data", "moons", "--set", "steps=3", "--steps", 2, "--batch-size", 32)
    assert command(*arguments, "--out", out) == 0
    assert sample_command(out, "--over-time", tmp_path / "x.png", "--n", 20) == 0
    assert "base to the data in 4 pictures" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
