"""Masked layers, and flows of MADEs in training and sampling, against masks multiplied in and D passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import ops
from fastflow.bench.row import Contenders, Row, contenders, on
from fastflow.nn import MADE, MaskedAffine, Sequential
from fastflow.ops import masked

STEPS, BATCH = 5, 256
SHARE = 49  # of nflows' passes one in so many is timed where all would take minutes


def _degrees(features: int, hidden: int) -> Tensor:
    """nflows' degrees of a hidden layer, as it stores the units."""
    return torch.arange(hidden) % (features - 1) + 1


def _flow(features: int, hidden: int) -> Sequential:
    """Layers that nflows' MaskedAffineAutoregressiveTransform can be given the weights of."""
    torch.manual_seed(0)
    degrees = [_degrees(features, hidden).sort().values] * 2
    mades = (MADE(features, (hidden, hidden), degrees=degrees) for _ in range(STEPS))
    return Sequential(*(MaskedAffine(made, scale="softplus_eps", packing="interleaved_st") for made in mades))


def _nflows(flow: Sequential) -> nn.Module:
    """The same flow in nflows: the same function of the same weights."""
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform

    layers = []
    for layer in flow:
        made = layer.made
        peer = MaskedAffineAutoregressiveTransform(
            made.features, made.hidden[0], num_blocks=1, use_residual_blocks=False
        )
        net = peer.autoregressive_net
        place = _degrees(made.features, made.hidden[0]).argsort(stable=True).argsort()  # of a unit among the sorted
        for i, (ours, theirs) in enumerate(
            zip(made.linears, (net.initial_layer, net.blocks[0].linear, net.final_layer), strict=True)
        ):
            rows = place if i < 2 else slice(None)
            columns = place if i > 0 else slice(None)
            theirs.weight.data.copy_(ours.weight.data[rows][:, columns])
            theirs.bias.data.copy_(ours.bias.data[rows])
        layers.append(peer)
    return CompositeTransform(layers)


def _maybe_nflows(flow: Sequential, task: Callable[[nn.Module], Callable]) -> Callable:
    """A contender that fails, and is left out, where nflows is not installed."""
    try:
        return task(_nflows(flow))
    except ImportError as error:
        message = str(error)

        def absent() -> None:
            raise ImportError(message)

        return absent


# --- tasks ------------------------------------------------------------------------------------------


def _step(flow: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The loss with the gradients of all parameters."""
    parameters = list(flow.parameters())

    def run() -> Tensor:
        z, logdet = flow(x)
        loss = (0.5 * z.square().sum(1) - logdet).mean()
        torch.autograd.grad(loss, parameters)
        return loss

    return run


def _training(features: int, hidden: int) -> Contenders:
    flow, x = _flow(features, hidden), torch.randn(BATCH, features)
    return {
        "fastflow": _step(flow, x),
        "eager": on("reference", _step(flow, x)),
        "nflows": _maybe_nflows(flow, lambda peer: _step(peer, x)),
    }


def _sampling(features: int, hidden: int, share: int = 1) -> Contenders:
    flow, z = _flow(features, hidden), torch.randn(BATCH, features)
    with torch.no_grad():
        x = flow.inverse(z)[0]

    def own_forward() -> tuple[Tensor, Tensor]:
        return x, -torch.no_grad()(flow)(x)[1]

    made = {"fastflow": partial(torch.no_grad()(flow.inverse), z), "own forward": own_forward}
    if share == 1:
        return made | {"nflows": _maybe_nflows(flow, lambda peer: partial(torch.no_grad()(peer.inverse), z))}

    def some_passes(peer: nn.Module) -> Callable[[], None]:
        def run() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                for layer in peer._transforms:
                    for _ in range(features // share):
                        layer._elementwise_inverse(z, layer.autoregressive_net(z))
            return x, z[:, 0]

        return run

    return made | {f"nflows, 1/{share}": _maybe_nflows(flow, some_passes)}


def _layer(width: int) -> Contenders:
    x, weight, bias = torch.randn(BATCH, width), torch.randn(width, width), torch.randn(width)
    reach = torch.arange(width)
    mask = masked.staircase(reach, width).float()
    eager = lambda x, weight, bias: (F.linear(x, weight * mask, bias),)  # noqa: E731
    ours = lambda x, weight, bias: (ops.masked_linear(x, weight, bias, reach),)  # noqa: E731
    return contenders(ours, eager, (x, weight, bias), (torch.randn(BATCH, width),))


def _products(features: int, hidden: int) -> int:
    """Operations of a pass of all networks, half of the weights counted."""
    return STEPS * BATCH * (features * hidden + hidden * hidden + hidden * 2 * features)


def rows() -> Iterator[Row]:
    half = BATCH * 512 * 512  # of 2 operations for each weight half are not there
    name = "layer 512-512 B=256 forward+backward"
    yield Row("masked", name, partial(_layer, 512), flops=3 * half, targets={"eager": 1.5})
    small, large = (63, 512), (784, 1024)
    name = f"{STEPS} MADEs D=%d H=%d B={BATCH} %s"
    yield Row(
        "masked",
        name % (*small, "training"),
        partial(_training, *small),
        flops=3 * _products(*small),
        targets={"nflows": 1.5},
    )
    yield Row(
        "masked",
        name % (*small, "sampling"),
        partial(_sampling, *small),
        flops=_products(*small),
        targets={"own forward": 1 / 3, "nflows": 30.0},
        demo=True,
    )
    yield Row(
        "masked",
        name % (*large, "sampling"),
        partial(_sampling, *large, SHARE),
        flops=_products(*large),
        targets={"own forward": 1 / 3, f"nflows, 1/{SHARE}": 100.0 / SHARE},
        comparable=False,
    )
