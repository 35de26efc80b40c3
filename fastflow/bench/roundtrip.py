"""How far inverse(forward(x)) is from x, by dtype and depth: ``python -m fastflow.bench.roundtrip``.

K steps of Glow (ActNorm, LU 1x1 convolution, affine coupling with a random network) on [64, 12, 8, 8]. In every dtype
the arithmetic of fastflow's ops is float32 (float64 for float64); what differs is how x is stored between the layers,
and what the network computes in.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from fastflow import nn
from fastflow.bench.table import align

__all__ = ["errors", "steps"]

DEPTHS = (1, 4, 16, 64)
SHAPE = (64, 12, 8, 8)
# how x is stored, what the networks compute in
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "float32, networks in bfloat16 (autocast)": (torch.float32, torch.bfloat16),
    "float32, networks in float16 (autocast)": (torch.float32, torch.float16),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
}


def steps(depth: int, channels: int = SHAPE[1]) -> nn.Sequential:
    """``depth`` steps with random networks whose scales stay within a factor of about two."""
    layers: list[torch.nn.Module] = []
    for _ in range(depth):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(channels // 2, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, channels, 1)
        )
        layers += [nn.ActNorm(channels), nn.InvertibleConv1x1(channels), nn.AffineCoupling(network)]
    return nn.Sequential(*layers)


def errors(depth: int, dtype: torch.dtype, network: torch.dtype | None, device: str = "cpu") -> tuple[float, float]:
    """(the largest |x' - x| where x is standard normal, the largest |logdet + logdet'| per variable)"""
    torch.manual_seed(depth)
    flow, x = steps(depth), torch.randn(SHAPE)
    with torch.no_grad():
        flow(x)  # ActNorm takes its statistics in float32
        flow, x = flow.to(device, dtype), x.to(device, dtype)
        with torch.autocast(device.split(":")[0], dtype=network or torch.bfloat16, enabled=network is not None):
            z, logdet = flow(x)
            back, minus = flow.inverse(z)
    difference = (logdet.double() + minus.double()).abs().max().item()
    return (back.double() - x.double()).abs().max().item(), difference / x[0].numel()


def rows(device: str = "cpu") -> Iterator[list[str]]:
    """The table, its head first."""
    yield ["x stored in", *(f"K = {depth}" for depth in DEPTHS)]
    for name, precision in PRECISIONS.items():
        found = (errors(depth, *precision, device=device) for depth in DEPTHS)
        yield [name, *(f"{value:.1e} ({logdet:.1e})" for value, logdet in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    print(align(list(rows(parser.parse_args().device))))


if __name__ == "__main__":
    main()
