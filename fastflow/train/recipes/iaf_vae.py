"""The top-down VAE with convolutional inverse autoregressive flows (https://arxiv.org/abs/1606.04934)."""

from typing import Any

from ..config import TrainConfig
from ..data import Images
from ..recipe import Recipe


def config(data: Images, depth: int, **options: Any) -> dict[str, Any]:
    """Arguments for the images of `data`: every scale halves height and width, which some sizes allow less often."""
    _, height, width = data.shape
    halvings = ((height | width) & -(height | width)).bit_length() - 1
    bits = {"likelihood": "bernoulli"} if data.binary else {"likelihood": "logistic", "levels": data.levels}
    return {"image_shape": data.shape, "depth": max(1, min(depth, halvings)), **bits, **options}


def _short(form: str, options: dict[str, Any], **train: Any) -> Recipe:
    settings = {"batch_size": 64, "lr": 2e-3, "optimizer": "adamax", "clip": None, "cooldown": 0.3, **train}
    small = {"depth": 2, "blocks": 1, "hidden": 32, "latent": 8, "free_bits": 0.1, "samples": 20, **options}
    return Recipe("IAFVAE", lambda data: config(data, **small), TrainConfig(**settings), {"form": form})


RECIPES = {
    "digits": _short("integers", {}, epochs=40, lr=4e-3),
    "mnist": _short("dynamic", {}, epochs=4, final=500),
    "images": _short("integers", {"hidden": 64, "latent": 16}, epochs=50, final=500),
    "npz": _short("integers", {"hidden": 64, "latent": 16}, epochs=50, final=500),
}

PUBLISHED = {
    # images: the 50 000 of CIFAR-10 as files
    "images": Recipe(
        "IAFVAE",
        lambda data: config(data, 1, blocks=20, hidden=160, latent=32, free_bits=0.1, samples=10000),
        TrainConfig(epochs=500, batch_size=16, lr=2e-3, optimizer="adamax", clip=None, ema=0.999),
        {"form": "integers"},
        (3.11, "bits/dim on CIFAR-10, Kingma et al. 2016"),
    ),
}
