"""Glow on a device, end to end: ``python -m fastflow.testing.end_to_end --device cuda``.

What the table of cases cannot see: that training learns and sampling inverts it, that a step never makes the host
wait, and that it runs within a CUDA graph, on another stream and on another GPU. ``tests/test_gpu.py`` runs the same.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow.bench.row import captured
from fastflow.models import Glow
from fastflow.ops._backend import use_backend

__all__ = ["CHECKS", "Skipped", "run"]

SHAPE = {"image_shape": (3, 16, 16), "levels": 2, "steps": 4, "hidden": 32}
BATCH = 16


class Skipped(Exception):
    """This machine cannot run the check, and why."""


def _model(device: str) -> tuple[Glow, Tensor]:
    """A model of which no layer is the identity, and a batch."""
    torch.manual_seed(0)
    model, x = Glow(**SHAPE), torch.rand(BATCH, *SHAPE["image_shape"]) - 0.5
    model.initialize(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(device), x.to(device)


def _trainer(model: Glow, x: Tensor, bf16: bool = False, lr: float = 1e-3) -> Callable[[], Tensor]:
    """A training step on this batch; its loss per dimension stays on the device."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=x.device.type == "cuda")

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            log_prob = model.log_prob(x)
        loss = -log_prob.mean() / x[0].numel()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _need_cuda(device: str) -> None:
    if torch.device(device).type != "cuda":
        raise Skipped(f"needs a CUDA device, not {device}")


def _near(what: str, value: Tensor | float, expected: Tensor | float, allowed: float) -> str:
    """Raises AssertionError unless they differ by at most ``allowed`` of the larger number or of one."""
    value, expected = (torch.as_tensor(t).double().cpu() for t in (value, expected))
    error = ((value - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    if not error <= allowed:  # NaN fails
        raise AssertionError(f"{what}: differs by {error:.3g}, {allowed:.3g} is allowed")
    return f"{what} to {error:.1e}"


# --- checks: each returns what to say --------------------------------------------------------------------


def training(device: str, bf16: bool = False) -> str:
    """The loss falls."""
    step = _trainer(*_model(device), bf16)
    losses = [loss.item() for loss in [step() for _ in range(12)]]
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.01):
        raise AssertionError(f"the loss does not fall: {losses}")
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats/dim in {len(losses)} steps"


def training_bf16(device: str) -> str:
    """The same under autocast."""
    return training(device, bf16=True)


def densities(device: str) -> str:
    """log p(x) and its gradient are those of the reference in float64."""
    model, x = _model(device)
    exact = copy.deepcopy(model).double()
    value = model.log_prob(x)
    value.sum().backward()
    with use_backend("reference"):
        truth = exact.log_prob(x.double())
        truth.sum().backward()
    said = _near("log p", value, truth, 1e-4)
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        _near(f"gradient of {name}", p.grad, q.grad, 1e-2)
    return said


@torch.no_grad()
def inverse(device: str) -> str:
    """decode(encode(x)) is x."""
    model, x = _model(device)
    return _near("inverse(forward(x))", model.decode(model.encode(x)[0]), x, 1e-4)


@torch.no_grad()
def sampling(device: str) -> str:
    """A sample comes with its density, and a seed repeats it."""
    model, _ = _model(device)
    first, again = ((torch.manual_seed(1), model.sample_and_log_prob(BATCH, temperature=0.7))[1] for _ in range(2))
    if not torch.equal(first[0], again[0]):
        raise AssertionError("the same seed gave other samples")
    return _near("log p of samples", first[1], model.log_prob(first[0]), 1e-3)


def no_sync(device: str) -> str:
    """No step and no sample makes the host wait for the device."""
    _need_cuda(device)
    model, x = _model(device)
    step = _trainer(model, x)
    for _ in range(2):  # self-tests and compilers are at work in the first
        step()
        model.sample(BATCH)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        model.sample(BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "a training step and a sample"


def graph(device: str) -> str:
    """A step as a CUDA graph, replayed, is the step."""
    _need_cuda(device)
    model, x = _model(device)
    eager, replayed = _trainer(copy.deepcopy(model), x), captured(_trainer(model, x))
    expected = [eager() for _ in range(3 + 5)][3:]  # captured() takes three steps before it records
    return _near(
        "losses of 5 replays", torch.stack([replayed().clone() for _ in range(5)]), torch.stack(expected), 1e-4
    )


def stream(device: str) -> str:
    """On a stream that is not the default one."""
    _need_cuda(device)
    model, x = _model(device)
    here, there = _trainer(copy.deepcopy(model), x), _trainer(model, x)
    expected = torch.stack([here() for _ in range(5)])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        found = torch.stack([there() for _ in range(5)])
    torch.cuda.synchronize()
    return _near("losses of 5 steps", found, expected, 1e-4)


def second_device(device: str) -> str:
    """On a GPU that is not the current one."""
    _need_cuda(device)
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    other = f"cuda:{(torch.cuda.current_device() + 1) % torch.cuda.device_count()}"
    losses = [torch.stack([step() for _ in range(3)]) for step in (_trainer(*_model(d)) for d in (device, other))]
    return _near(f"losses on {other}", losses[1], losses[0], 1e-4)


def _exact(check: Callable[[str], str]) -> Callable[[str], str]:
    """Without TensorFloat-32, in which cuDNN convolves float32 by default: its error would hide all others."""

    @functools.wraps(check)
    def exact(device: str) -> str:
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        try:
            return check(device)
        finally:
            torch.backends.cudnn.allow_tf32 = before

    return exact


CHECKS: dict[str, Callable[[str], str]] = {
    check.__name__: _exact(check)
    for check in (densities, inverse, training, training_bf16, sampling, no_sync, graph, stream, second_device)
}


def run(device: str, checks: dict[str, Callable[[str], str]] | None = None) -> bool:
    """Runs all and prints a line for each; were they all right?"""
    good = True
    for name, check in (checks or CHECKS).items():
        start, verdict = time.perf_counter(), "ok"
        try:
            words: Any = check(device)
        except Skipped as why:
            verdict, words = "skipped", why
        except Exception as error:  # a crash is a failure like a wrong number
            good, verdict, words = False, "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(f"glow {name:<14} {verdict}: {words} ({time.perf_counter() - start:.1f} s)", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    return 0 if run(parser.parse_args().device) else 1


if __name__ == "__main__":
    sys.exit(main())
