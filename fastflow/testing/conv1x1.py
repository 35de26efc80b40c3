"""The cases of the invertible 1x1 convolution: the op, the assembly of weights, and both together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.testing.case import Case, Inputs, randn

IMAGES = {"tiny": (2, 4, 2, 3), "odd": (11, 7, 5, 9), "bench": (64, 12, 16, 16)}
VECTORS = {"tiny": (3, 4), "odd": (37, 7), "bench": (4096, 64)}
WIDE = {"tiny": (2, 5, 3, 1), "odd": (3, 67, 5, 9), "bench": (64, 96, 4, 4)}
ONE = {"tiny": (2, 1, 2, 3), "odd": (5, 1, 5, 9), "bench": (64, 1, 16, 16)}
CHAIN = IMAGES | {"odd": (5, 7, 5, 3)}
LAYERS = {"tiny": (3, 4), "odd": (5, 7), "bench": (32, 48)}  # N, C
SELFTEST = ("lu-actnorm", "lu-actnorm-inverse")
FACTORS = ("weight", "bias", "lower", "upper", "log_s", "permutation", "log_scale", "shift")


def _matrix(n: int, seed: int = 0) -> Tensor:
    """A well-conditioned matrix."""
    return torch.linalg.qr(randn(n, n, seed=seed)).Q + 0.1 * randn(n, n, seed=seed + 1)


def _factors(layers: int, n: int, actnorm: bool, dense: bool) -> Inputs:
    generator = torch.Generator().manual_seed(n)
    if dense:
        made = {"weight": torch.stack([_matrix(n, seed=k) for k in range(layers)])}
    else:
        # numbers in the unused triangles too: nothing may look at them
        made = {
            "lower": randn(layers, n, n, seed=3) / n**0.5,
            "upper": randn(layers, n, n, seed=4) / n**0.5,
            "log_s": 0.3 * randn(layers, n, seed=5),
            "permutation": torch.stack([torch.randperm(n, generator=generator) for _ in range(layers)]),
        }
    if actnorm:
        made |= {"log_scale": 0.1 * randn(layers, n, seed=7), "shift": randn(layers, n, seed=8)}
    return made


def _weights(inverse: bool = False, backend: str | None = None, **f: Tensor) -> tuple[Tensor, ...]:
    options = {"inverse": inverse}
    if "log_scale" in f:
        options |= {"actnorm_log_scale": f["log_scale"], "actnorm_bias": f["shift"], "actnorm_gain": 2.0}
    if "weight" in f:
        return ops.dense_weights(f["weight"].unbind(), **options)
    sign_s = (1 - 2 * (f["permutation"] % 2)).to(f["log_s"].dtype)  # any signs: they have no gradient
    factors = (f["lower"], f["upper"], f["log_s"], f["permutation"], sign_s)
    return ops.lu_weights(*factors, backend=backend, **options)


def _plain_weights(inverse: bool = False, backend: str | None = None, **f: Tensor) -> tuple[Tensor, ...]:
    """The same, layer after layer in the dtype of the factors."""
    return tuple(torch.stack(t) for t in zip(*(_plain_layer(inverse, f, k) for k in range(_layers(f))), strict=True))


def _layers(f: Inputs) -> int:
    return next(iter(f.values())).shape[0]


def _plain_layer(inverse: bool, f: Inputs, k: int) -> tuple[Tensor, ...]:
    if "weight" in f:
        matrix = f["weight"][k]
        logdet = torch.linalg.slogdet(matrix).logabsdet
    else:
        log_s, order = f["log_s"][k], f["permutation"][k]
        left = f["lower"][k].tril(-1) + torch.eye(len(log_s), dtype=log_s.dtype, device=log_s.device)
        right = f["upper"][k].triu(1) + torch.diag((1 - 2 * (order % 2)) * torch.exp(log_s))
        matrix, logdet = (left @ right)[order], log_s.sum()
    shift = torch.zeros_like(matrix[0])
    if "log_scale" in f:
        scale, shift = 2.0 * f["log_scale"][k], f["shift"][k]
        matrix, logdet = matrix * torch.exp(scale), logdet + scale.sum()
    return (torch.linalg.inv(matrix), -shift, -logdet) if inverse else (matrix, matrix @ shift, logdet)


def _chain(
    x: Tensor, weights: Callable = _weights, inverse: bool = False, backend: str | None = None, **factors: Tensor
) -> tuple[Tensor, Tensor]:
    """All layers one after the other, or back."""
    logdet = None
    layers = list(zip(*weights(inverse, backend, **factors), strict=True))
    for weight, bias, weight_logdet in reversed(layers) if inverse else layers:
        x, logdet = ops.conv1x1(x, weight, bias, weight_logdet, logdet=logdet, backend=backend)
    return x, logdet


def _chain_back(outputs: tuple[Tensor, ...], x: Tensor, inverse: bool = False, **rest) -> Tensor:
    return _chain(outputs[0], inverse=not inverse, **rest)[0]


def _chain_inputs(size: str, shapes: dict, actnorm: bool, dense: bool) -> Inputs:
    x = randn(*shapes[size])
    return {"x": x, **_factors(2, x.shape[1], actnorm, dense)}


def _op_inputs(size: str, shapes: dict, bias: bool) -> Inputs:
    x = randn(*shapes[size])
    made = {"x": x, "weight": _matrix(x.shape[1])}
    return made | {"bias": randn(x.shape[1], seed=2)} if bias else made


def _op_back(outputs: tuple[Tensor, ...], x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest) -> Tensor:
    inverse = torch.linalg.inv(weight)
    shift = None if bias is None else -(inverse @ bias.to(inverse.dtype))
    return ops.conv1x1(outputs[0], inverse, shift, **rest)[0]


def cases() -> Iterator[Case]:
    for name, shapes in (("image", IMAGES), ("vector", VECTORS), ("wide", WIDE), ("one", ONE)):
        for bias in (False, True):
            yield Case(
                "conv1x1",
                f"{name}-bias" if bias else name,
                ops.conv1x1,
                partial(_op_inputs, shapes=shapes, bias=bias),
                back=_op_back,
                logdet=1,
                keep=FACTORS,
                selftest=bias,
            )
    for dense in (False, True):
        for actnorm in (False, True):
            for inverse in (False, True):
                name = "-".join(("dense" if dense else "lu", *["actnorm"] * actnorm, *["inverse"] * inverse))
                yield from _pair(name, inverse, actnorm=actnorm, dense=dense)


def _pair(name: str, inverse: bool, **factors: bool) -> Iterator[Case]:
    """The weights alone, and a chain of layers with them."""

    def weights(run: Callable, **more) -> Case:
        inputs = partial(lambda size, **o: _factors(*LAYERS[size], **o), **factors)
        return Case("conv1x1", f"weights-{name}", partial(run, inverse=inverse), inputs, keep=FACTORS, **more)

    def chain(run: Callable, **more) -> Case:
        options = {"weights": run, "inverse": inverse}
        inputs = partial(_chain_inputs, shapes=VECTORS if factors["dense"] else CHAIN, **factors)
        back = partial(_chain_back, **options)
        more["selftest"] = name in SELFTEST
        return Case("conv1x1", name, partial(_chain, **options), inputs, back, logdet=1, keep=FACTORS, **more)

    yield weights(_weights, plain=weights(_plain_weights))
    yield chain(_weights, plain=chain(_plain_weights))
