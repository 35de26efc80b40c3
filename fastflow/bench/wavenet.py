"""WaveNet: generation and a training pass, against the same model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastflow import ops
from fastflow.bench.plain_wavenet import Generator, log_prob
from fastflow.bench.row import Contenders, Row
from fastflow.models import WaveNet

SIZES = {"residual": 32, "dilation": 32, "skip": 128, "blocks": 3, "depth": 10}
TINY = {"levels": 16, "residual": 16, "dilation": 16, "skip": 16, "blocks": 1, "depth": 3}


def _flops(levels: int = 256, *, residual: int, dilation: int, skip: int, blocks: int, depth: int) -> int:
    """Of a code, forward."""
    layer = 2 * dilation * 2 * residual + dilation * (residual + skip)
    return 2 * (blocks * depth * layer + skip * skip + skip * levels)


def _model(sizes: dict[str, int]) -> WaveNet:
    torch.manual_seed(0)
    return WaveNet(**sizes)


def _generation(sizes: dict[str, int], streams: int, steps: int) -> Contenders:
    model = _model(sizes)
    uniforms = torch.rand(streams, steps, dtype=torch.float64)
    stream = model.stream(streams)

    def ours() -> Tensor:
        past, recent = torch.zeros_like(stream.past), torch.full_like(stream.recent, -1)
        return ops.wavenet_generate(stream.weights, past, recent, uniforms).double()

    eager = Generator(model, streams)
    return {"fastflow": ours, "eager": lambda: eager(uniforms).double()}


def _training(sizes: dict[str, int], batch: int, steps: int, compiled: bool) -> Contenders:
    model = _model(sizes)
    codes, parameters = torch.randint(model.levels, (batch, steps)), list(model.parameters())

    def gradient(function: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            loss = -function(codes).sum() / codes.numel()
            return loss, *torch.autograd.grad(loss, parameters)

        return run

    plain = partial(log_prob, model)
    made = {"fastflow": gradient(model), "eager": gradient(plain)}
    return made | {"torch.compile": gradient(torch.compile(plain))} if compiled else made


def _generation_row(sizes: dict[str, int], streams: int, steps: int, **options) -> Row:
    layers = f"{sizes['blocks'] * sizes['depth']} layers x {sizes['residual']} skip {sizes['skip']}"
    # at the slowest rate wanted, 8000 samples a second and stream
    name = f"generation {layers} B={streams}, {steps} samples (8 kHz: {steps / 8:g} ms)"
    flops = streams * steps * _flops(**sizes)
    return Row("wavenet", name, partial(_generation, sizes, streams, steps), flops=flops, **options)


def _training_row(sizes: dict[str, int], batch: int, steps: int, compiled: bool, **options) -> Row:
    name = f"forward+backward {sizes['blocks'] * sizes['depth']} layers x {sizes['residual']} B={batch} T={steps}"
    flops = 3 * batch * steps * _flops(**sizes)
    make = partial(_training, sizes, batch, steps, compiled)
    return Row("wavenet", name + " skip " + str(sizes["skip"]), make, flops=flops, **options)


def rows() -> Iterator[Row]:
    yield _generation_row(SIZES, 1, 400, targets={"eager": 20.0}, demo=True)
    yield _generation_row(SIZES, 16, 100)
    yield _training_row(SIZES, 4, 4096, False, targets={"eager": 1.5})
    yield _training_row({**SIZES, "blocks": 1, "depth": 4}, 4, 2048, True)  # torch.compile takes a while over more


def gpu_rows(size: int) -> Iterator[Row]:
    """The published channels, unless ``size`` says that this is only a test."""
    sizes, batch, steps = (SIZES, 4, 16384) if size >= 2**20 else (TINY, 2, 8)
    for streams in (1, 64):
        yield _generation_row(sizes, streams, min(100, steps), targets={"eager": 20.0})
    yield _training_row(sizes, batch, steps, False)
