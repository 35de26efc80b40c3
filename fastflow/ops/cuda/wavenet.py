"""Launches of csrc/cuda/wavenet.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.source import Instance
from fastflow.ops.cuda.walk import THREADS

__all__ = ["KERNELS"]


def _gate(kernel: str, acts: Tensor, z: Tensor, fields: list) -> Plan:
    instance = Instance("wavenet", kernel, "GateRows", (accumulates(acts),))
    fields += [z.shape[0] * z.shape[1], acts.shape[2] // 2, z.shape[2]]
    return Plan([Launch(instance, -(-z.numel() // THREADS), fields)])


@planned
def wavenet_gate_fwd(acts, z) -> Plan:
    return _gate("wavenet_gate_fwd", acts, z, [Address(0), NULL, Address(1)])


@planned
def wavenet_gate_bwd(acts, gz, z) -> Plan:
    return _gate("wavenet_gate_bwd", acts, z, [Address(0), Address(1), Address(2)])


@planned
def _generate(
    embedding, gate, bias, residual, skip, hidden, output, context, past, recent, uniforms, dilations, position: int,
    temperature: float, codes, logits,
) -> Plan:  # fmt: skip
    (taps, levels, channels), (layers, depth, both), heads = embedding.shape, gate.shape, hidden.shape[1]
    features, skipped, gated, padded = (
        0 if context is None else context.shape[2],
        skip.shape[2],
        both // 2,
        output.shape[1],
    )
    fields = [*map(Address, range(7)), NULL if context is None else Address(7), Address(8)]
    fields += [NULL if logits is None else Address(15), Address(9), Address(14), Address(11), Address(10)]
    fields += [layers, (depth - features) // channels, channels, gated, skipped, heads, levels, padded, features, taps]
    fields += [codes.shape[1], position, past.shape[1], bias.stride(0), bias.stride(1), float(temperature)]
    # as wavenet_generate lays them out: vectors, partial sums of two products at once
    numbers = channels + depth + gated + 1 + skipped + 1 + heads + 1 + 2 * padded
    numbers += max(THREADS, both, channels) + max(THREADS, skipped, heads, padded)
    instance = Instance("wavenet", "wavenet_generate", "Generate", (accumulates(past),))
    return Plan([Launch(instance, codes.shape[0], fields, 8 * THREADS + numbers * past.element_size())])


@functools.lru_cache(maxsize=64)
def _on_device(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(dilations, device=device)


def wavenet_generate(*arguments: Tensor | Sequence[int] | int | float | None) -> None:
    """A stream for every block; where a logit is not finite the codes are -1 from there on."""
    dilations, past = arguments[11], arguments[8]
    _generate(*arguments[:11], _on_device(tuple(dilations), past.device), *arguments[12:])


KERNELS = {run.__name__: run for run in (wavenet_gate_fwd, wavenet_gate_bwd, wavenet_generate)}
