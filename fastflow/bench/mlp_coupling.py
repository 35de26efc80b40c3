"""A flow of 32 couplings with small networks on two variables: against plain PyTorch, its own layers, and normflows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.bench.row import Contenders, Row, captured
from fastflow.nn import CouplingStack, Flow, MLPCoupling, Permutation, Sequential, StandardNormal
from fastflow.ops import ScaleMap

LAYERS, HIDDEN = 32, (64, 64)


class Plain(nn.Module):
    """The same flow as people write it: (x_2 - t) e^-s, and the two variables exchanged."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def log_prob(self, x: Tensor) -> Tensor:
        logdet = x.new_zeros(x.shape[0])
        for network in self.networks:
            seen, changed = x.flip(1).chunk(2, 1)
            shift, log_scale = network(seen).chunk(2, 1)
            x = torch.cat([seen, (changed - shift) * torch.exp(-log_scale)], 1)
            logdet = logdet - log_scale.sum(1)
        return StandardNormal(2).log_prob(x) + logdet


def flow(layers: int, hidden: tuple[int, ...], chain: type[Sequential]) -> Flow:
    """normflows' AffineCouplingBlock and Permute, from data to latent; networks alike whatever the chain."""
    torch.manual_seed(0)
    scale = ScaleMap("exp", reciprocal=True)
    parts: list[Any] = []
    for _ in range(layers):
        coupling = MLPCoupling(2, hidden, scale=scale, order="shift_first", shift_gain=-1.0, zero_init=False)
        parts += [Permutation([1, 0]), coupling]
    return Flow(StandardNormal(2), chain(*parts))


def _networks(model: Flow) -> list[nn.Module]:
    return [layer.network for layer in model.bijection if isinstance(layer, MLPCoupling)]


def _normflows(layers: int, hidden: tuple[int, ...]) -> nn.Module:
    import normflows as nf

    flows = []
    for network in reversed(_networks(flow(layers, hidden, Sequential))):
        mlp = nf.nets.MLP([1, *hidden, 2], init_zeros=True)
        mlp.net.load_state_dict(network.state_dict())
        flows += [nf.flows.AffineCouplingBlock(mlp), nf.flows.Permute(2, mode="swap")]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows)


def _step(model: nn.Module, x: Tensor, wrap: Callable = lambda f: f) -> Callable[[], Tensor]:
    """The loss and all gradients, as a training step needs them."""
    log_prob = wrap(lambda x: model.log_prob(x))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        loss = -log_prob(x).mean()
        loss.backward()
        return loss.detach()

    return step


def _log_prob(model: nn.Module, x: Tensor, wrap: Callable = lambda f: f) -> Callable[[], Tensor]:
    log_prob = wrap(lambda x: model.log_prob(x))

    def run() -> Tensor:
        with torch.no_grad():
            return log_prob(x)

    return run


def _make(task: Callable, batch: int, layers: int = LAYERS, hidden: tuple[int, ...] = HIDDEN) -> Contenders:
    x = torch.randn(batch, 2)
    plain = lambda: Plain(_networks(flow(layers, hidden, Sequential)))  # noqa: E731
    made = {
        "fastflow": task(flow(layers, hidden, CouplingStack), x),
        "eager": task(plain(), x),
        "layers": task(flow(layers, hidden, Sequential), x),
    }
    if x.device.type == "cuda":
        return made | {"eager graph": captured(task(plain(), x))}
    if batch <= 512:  # it compiles for half a minute
        made["torch.compile"] = task(plain(), x, torch.compile)
    try:
        made["normflows"] = task(_normflows(layers, hidden), x)
    except ImportError as error:
        made["normflows"] = partial(_missing, error)
    return made


def _missing(error: ImportError) -> None:
    raise error


def rows() -> Iterator[Row]:
    widths = (1, *HIDDEN, 2)
    once = LAYERS * 2 * sum(n * m for n, m in zip(widths, widths[1:], strict=False))
    name = f"{LAYERS} layers {'-'.join(map(str, widths))}"
    for batch, target in ((512, 5.0), (4096, 4.0)):
        make, flops = partial(_make, _step, batch), 3 * once * batch
        yield Row("mlp_coupling", f"{name} B={batch} training", make, flops=flops, targets={"normflows": target})
    for batch in (512, 4096):
        make, flops, targets = partial(_make, _log_prob, batch), once * batch, {"normflows": 6.0}
        yield Row("mlp_coupling", f"{name} B={batch} log_prob", make, flops=flops, targets=targets, demo=batch == 512)


def gpu_rows(size: int) -> Iterator[Row]:
    """The same, unless ``size`` says that this is only a test."""
    layers, hidden, batch = (LAYERS, HIDDEN, 4096) if size >= 2**20 else (2, (4,), 8)
    for task, what in ((_step, "training"), (_log_prob, "log_prob")):
        make = partial(_make, task, batch, layers, hidden)
        yield Row("mlp_coupling", f"{layers} layers B={batch} {what}", make, comparable=True)
