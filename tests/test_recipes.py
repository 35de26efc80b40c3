"""Every recipe on a little data of its kind: the model fits the data, learns two steps, comes back, draws samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from standins import random_images, save_png, write_idx

from fastflow.train import PUBLISHED, RECIPES, load_data, load_model, train
from fastflow.train.data import BUNDLED
from fastflow.train.recipe import build_model, model_config
from fastflow.train.sampling import default_name, write_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def table(book):
    rows = [(model, name) for model, recipes in book.items() for name in recipes]
    return pytest.mark.parametrize(("model", "name"), rows, ids=["-".join(row) for row in rows])


def files(name, folder):
    """The path of a data set like `name`, as small as may be."""
    path = folder / {"rows": "table.csv", "caltech": "x.mat"}.get(name, "x.npz")
    bits = {part: random_images(40, 784, high=2) for part in ("train", "valid", "test")}
    if name == "mnist":
        for part in ("train", "t10k"):
            write_idx(folder / f"{part}-images-idx3-ubyte", random_images(40, 28, 28))
        return folder
    if name == "mnist-static":
        np.savez(path, **{part: np.packbits(rows, axis=1) for part, rows in bits.items()})
    elif name == "binary":
        np.savez(path, **{part: rows[:, :100] for part, rows in bits.items()})
    elif name == "freyfaces":
        np.savez(path, x=random_images(60, 28, 20))
    elif name == "omniglot":
        for word in ("background", "evaluation"):
            np.savez(folder / f"{word}.npz", ink=random_images(4, 10, 105, 105) > 250)
        return folder
    elif name == "caltech":
        pytest.importorskip("scipy.io").savemat(path, {"X": bits["train"]})
    elif name == "images":
        for i, image in enumerate(random_images(40, 16, 16, 3)):
            save_png(folder / f"{i}.png", image)
        return folder
    elif name == "npz":
        np.savez(path, x=random_images(40, 16, 16))
    elif name == "rows":
        np.savetxt(path, np.random.default_rng(0).normal(size=(60, 6)), delimiter=",")
    elif name == "patches":
        for part in ("train", "test"):
            for i in range(3):
                save_png(folder / part / f"{i}.png", random_images(20, 20))
        return folder
    elif name == "audio":
        sound = np.random.default_rng(0).normal(size=20000).clip(-1, 1)
        np.savez(path, audio=sound, offsets=np.arange(0, 20001, 500), test=np.arange(40) < 20)
    else:
        raise AssertionError(f"no little {name!r} here: add it")
    return path


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
