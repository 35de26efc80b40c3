"""Every recipe on a little data of its kind: the model fits the data, learns two steps, comes back, draws samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from standins import files

from fastflow.train import PUBLISHED, RECIPES, load_data, load_model, train
from fastflow.train.data import BUNDLED
from fastflow.train.recipe import build_model, model_config
from fastflow.train.sampling import default_name, write_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def table(book):
    rows = [(model, name) for model, recipes in book.items() for name in recipes]
    return pytest.mark.parametrize(("model", "name"), rows, ids=["-".join(row) for row in rows])


def little(recipe, name, folder):
    options = dict(recipe.data)
    if "valid" in options:
        options["valid"] = 10
    if name == "patches":
        options |= {"train": 60, "held_out": 20, "test": 20}
    if name == "audio":
        options |= {"length": 64}
    data = load_data(name, None if name in BUNDLED else files(name, folder), **options)
    test = None if data.test is None else data.test[:6]
    return replace(data, train=data.train[:24], held_out=data.held_out[:6], test=test)


@table(RECIPES)
def test_recipe(model, name, tmp_path):
    recipe = RECIPES[model][name]
    data = little(recipe, name, tmp_path)
    torch.manual_seed(0)
    flow = build_model(recipe.model, model_config(recipe, data))
    few = {"steps": 2, "batch_size": 4, "init_batch": 16, "eval_every": None, "checkpoint_every": None}
    result = train(flow, data, replace(recipe.train, **few), tmp_path / "run", progress=False)
    assert result.step == 2 and np.isfinite(result.held_out)
    again, meta = load_model(tmp_path / "run")
    write_samples(again, meta["data"], tmp_path / default_name(meta["data"]), [1.0], n=2)


@pytest.mark.slow
@table(PUBLISHED)
def test_published_recipe(model, name, tmp_path):
    recipe = PUBLISHED[model][name]
    data = little(recipe, name, tmp_path)
    flow = build_model(recipe.model, model_config(recipe, data))
    x = data.inputs(data.train[:2], torch.arange(2), 0)
    with torch.no_grad():
        flow.initialize(data.inputs(data.train[:16], torch.arange(16), 0))
        assert flow(x).isfinite().all()
