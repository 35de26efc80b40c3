"""VAEs with flows for their posterior (https://arxiv.org/abs/1803.05649): `--set posterior=iaf`, `sylvester-orthogonal`
and so on choose the flow, and everything else stays as it is. Figures while training are the bound, the last one is
importance-sampled."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..config import TrainConfig
from ..data import Images
from ..recipe import Published, Recipe


def config(data: Images, **options: Any) -> dict[str, Any]:
    """Arguments for the images of `data`: bits are Bernoulli, integers have a logit for every level."""
    bits = {"likelihood": "bernoulli"} if data.binary else {"likelihood": "categorical", "levels": data.levels}
    return {"image_shape": data.shape, **bits, **options}


# its negative log-likelihoods by posterior; there is no radial flow in it
_PAPER = "van den Berg et al. 2018"
_MNIST = {
    "diagonal": 82.14,
    "planar": 81.91,
    "iaf": 80.79,
    "sylvester-orthogonal": 80.22,
    "sylvester-householder": 80.29,
    "sylvester-triangular": 80.28,
}
_FACES = {"diagonal": 4.40, "planar": 4.31, "iaf": 4.38, "sylvester-orthogonal": 4.39,
          "sylvester-householder": 4.35, "sylvester-triangular": 4.35}  # fmt: skip


def _published(figures: Mapping[str, float]) -> Callable[[Mapping[str, Any]], Published | None]:
    def find(options: Mapping[str, Any]) -> Published | None:
        found = figures.get(options["posterior"])
        return found and (found, _PAPER)

    return find


def _short(form: str, options: Mapping[str, Any], figures: Mapping[str, float] = {}, **train: Any) -> Recipe:
    """Fully connected, small, minutes on two cores."""
    small = {"latent": 16, "encoder": "mlp", "width": 200, "hidden": 128, "warmup": 0.2, **options}
    small |= {"iaf_width": 160, "forget_bias": 4.0}  # gates that start nearly open learn faster
    settings = {"batch_size": 100, "lr": 3e-3, "clip": None, "cooldown": 0.3, **train}
    return Recipe(
        "FlowVAE",
        lambda data: config(data, **small),
        TrainConfig(**settings),
        {"form": form},
        _published(figures),
    )


_BITS: dict[str, Any] = {"samples": 50}
# a pixel's 256 logits are a linear function of 16 features: little to overfit, little to compute
_GREY: dict[str, Any] = {"width": 300, "hidden": 256, "head": 16, "samples": 50}

RECIPES = {
    "digits": _short("integers", {**_GREY, "width": 128, "hidden": 64}, epochs=60, batch_size=32, lr=1e-3),
    "mnist": _short("dynamic", _BITS, epochs=10),
    "mnist-static": _short("static", _BITS, _MNIST, epochs=10),
    "omniglot": _short("dynamic", _BITS, epochs=20),
    "caltech": _short("dynamic", _BITS, epochs=40),
    "freyfaces": _short("integers", _GREY, _FACES, epochs=30, batch_size=32, patience=3),  # overfits after some 20
    "npz": _short("integers", _GREY, epochs=30, patience=3),
}


def with_posterior(posterior: str, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The same recipes of bits and of faces with another posterior."""

    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, config=lambda data: {**recipe.config(data), "posterior": posterior})

    return {name: change(recipes[name]) for name in ("mnist-static", "freyfaces") if name in recipes}


def _paper(form: str, figures: Mapping[str, float] = {}, **options: Any) -> Recipe:
    """The settings of the paper: beta rises over 100 epochs, at most 2000, 5000 importance samples.

    Its optimiser has an eps of 1e-7, ours 1e-8.
    """
    options = {"posterior": "sylvester-orthogonal", "warmup": 0.05, "samples": 5000, **options}
    settings = TrainConfig(epochs=2000, batch_size=100, lr=5e-4, optimizer="adamax", clip=None, ema=0.0, patience=100)
    return Recipe("FlowVAE", lambda data: config(data, **options), settings, {"form": form}, _published(figures))


PUBLISHED = {
    "mnist-static": _paper("static", _MNIST),
    "freyfaces": _paper("integers", _FACES, variance=(0.01, 7.0)),
    "omniglot": _paper("dynamic"),
    "caltech": _paper("dynamic"),
}
