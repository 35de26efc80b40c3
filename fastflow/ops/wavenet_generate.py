"""Generation by a WaveNet, code by code, from the layers' past inputs: a code costs the same at any time.

What a layer needs of the past lies in a ring of (w - 1) d rows, the input of step t in row t mod (w - 1) d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.ops import _check, wavenet
from fastflow.ops._backend import Family, choose
from fastflow.ops._op import accumulator, op, without_autocast
from fastflow.ops.wavenet import PAD, pack, padded

__all__ = ["WaveNetWeights", "embed", "wavenet_feed", "wavenet_generate", "wavenet_weights"]

FAMILY = Family("wavenet")


class WaveNetWeights(NamedTuple):
    """A network's weights as the kernel reads them, in float32 or float64; channels are padded to multiples of 16."""

    embedding: Tensor
    """[w, V, R]: what a code adds to the first layer's input, from the oldest of the last w codes to the newest."""
    gate: Tensor
    bias: Tensor
    residual: Tensor
    skip: Tensor
    """The stack: [L, w R + Cc, 2D], [L, 1 or B, 2D], [L, D + 1, R], [L, D + 1, S]."""
    hidden: Tensor
    output: Tensor
    """The head: [S + 1, H], [H + 1, V], whose last rows are biases."""
    dilations: tuple[int, ...]

    width: int
    """w of the stack."""
    features: int
    """Cc"""

    @property
    def rows(self) -> int:
        """P: rows of the rings of all layers."""
        return (self.width - 1) * sum(self.dilations)

    @property
    def levels(self) -> int:
        """V"""
        return self.embedding.shape[1]


def wavenet_weights(
    embedding: Tensor,
    stack: Sequence[Tensor],
    head: Sequence[Tensor],
    dilations: Sequence[int],
    context_weight: Tensor | None = None,
) -> WaveNetWeights:
    """A snapshot of a network's weights for :func:`wavenet_generate`.

    Args:
        embedding: [w, V, R], of the oldest of w codes first.
        stack: weight to skip_bias of :func:`wavenet_stack`; the bias [L, 2D], or [L, B, 2D] for B streams.
        head: H [H, S], its bias [H], O [V, H], its bias [V]; the logits are O relu(H relu(skip)).
        dilations: of the stack.
        context_weight: [L, 2D, Cc].
    """
    dtype = accumulator(embedding.dtype)
    embedding, *rest = (t.detach().to(dtype) for t in (embedding, *stack, *head))
    stack, head = rest[:6], rest[6:]
    context_weight = None if context_weight is None else context_weight.detach().to(dtype)
    samples = stack[1].shape[1] if stack[1].dim() == 3 else 1
    gate, bias, residual, skip = pack(*stack, context_weight, samples=samples, pad=PAD)
    return WaveNetWeights(
        padded(embedding, 2, PAD).contiguous(),
        gate,
        bias.contiguous(),
        residual,
        skip,
        wavenet._with_bias(head[0], head[1], PAD),
        wavenet._with_bias(head[2], head[3], PAD),
        tuple(int(d) for d in dilations),
        stack[0].shape[3],
        0 if context_weight is None else context_weight.shape[2],
    )


# --- meaning ----------------------------------------------------------------------------------------


def reference(
    embedding: Tensor, gate: Tensor, bias: Tensor, residual: Tensor, skip: Tensor, hidden: Tensor, output: Tensor,
    context: Tensor | None, past: Tensor, recent: Tensor, uniforms: Tensor, dilations: Sequence[int], position: int,
    temperature: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(codes [B, n], logits [B, n, V]) in plain PyTorch, a step of the whole stack for every code."""
    rows = wavenet._rows(past, gate, context, dilations)
    before, levels = in_order(past, rows, position), embedding.shape[1]
    codes, kept = uniforms.new_empty(uniforms.shape, dtype=torch.int64), []
    for step in range(uniforms.shape[1]):
        c = None if context is None else context[:, step : step + 1]
        h = embed(recent, embedding)
        _, total, before = wavenet.reference(h, gate, bias, residual, skip, c, before, dilations)
        logits = _head(total[:, 0], hidden, output)[:, :levels]
        if not logits.isfinite().all():
            raise ValueError("the logits of a WaveNet are not finite")
        codes[:, step] = draw(logits, uniforms[:, step], temperature)
        recent.copy_(torch.cat([recent[:, 1:], codes[:, step : step + 1]], 1))
        kept.append(logits)
    past.copy_(in_order(before, rows, -position - uniforms.shape[1]))
    return codes, torch.stack(kept, 1) if keep and kept else past.new_empty(0)


def embed(codes: Tensor, embedding: Tensor) -> Tensor:
    """h_j = sum over i of E_i[x_{j + i}]: [B, w + n - 1] codes, -1 for none, and E [w, V, R] to [B, n, R]."""
    steps = codes.shape[1] - len(embedding) + 1
    tables = F.pad(embedding, (0, 0, 1, 0))  # a row of zeros for no code
    return sum(F.embedding(codes[:, i : i + steps] + 1, table) for i, table in enumerate(tables))


def _head(skip: Tensor, hidden: Tensor, output: Tensor) -> Tensor:
    a = torch.relu(torch.relu(skip) @ hidden[:-1] + hidden[-1])
    return a @ output[:-1] + output[-1]


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """The first code at which the sum of e^(logit / temperature) exceeds u times the total; at 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(1)
    weights = torch.exp((logits - logits.amax(1, keepdim=True)) / temperature)
    sums = weights.double().cumsum(1)
    return torch.searchsorted(sums, (uniforms[:, None] * sums[:, -1:]), right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def in_order(past: Tensor, rows: Sequence[int], position: int) -> Tensor:
    """Rings [B, P, R] at ``position`` to histories, the oldest step first; with the negative position back."""
    if not any(rows):
        return past
    parts = past.split(list(rows), 1)
    return torch.cat([part.roll(-(position % max(n, 1)), 1) for part, n in zip(parts, rows, strict=True)], 1)


# --- contract ---------------------------------------------------------------------------------------


@op(
    "wavenet_generate(Tensor embedding, Tensor gate, Tensor bias, Tensor residual, Tensor skip, Tensor hidden,"
    " Tensor output, Tensor? context, Tensor(a!) past, Tensor(b!) recent, Tensor uniforms, int[] dilations,"
    " int position, float temperature, bool keep) -> (Tensor, Tensor)"
)
def _generate(
    kernel, embedding, gate, bias, residual, skip, hidden, output, context, past, recent, uniforms, dilations,
    position, temperature, keep,
):  # fmt: skip
    codes = torch.empty_like(uniforms, dtype=torch.int64)
    logits = past.new_empty((*uniforms.shape, embedding.shape[1]) if keep else 0)
    kernel(
        embedding, gate, bias, residual, skip, hidden, output, context, past, recent, uniforms, dilations, position,
        temperature, codes, logits if keep else None,
    )  # fmt: skip
    return codes, logits


# --- public -----------------------------------------------------------------------------------------


def wavenet_generate(
    weights: WaveNetWeights,
    past: Tensor,
    recent: Tensor,
    uniforms: Tensor,
    *,
    position: int = 0,
    temperature: float = 1.0,
    context: Tensor | None = None,
    return_logits: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Codes that a WaveNet draws, many for many streams in one call.

    Every step embeds the last codes, :math:`h = \sum_i E_i[x_{t-w+i}]`, takes h through the stack and the head to
    logits, and draws :math:`x_t`: the first code at which the cumulated :math:`e^{logit / temperature}` exceeds
    :math:`u_t` times their sum.

    Args:
        weights: from :func:`wavenet_weights`.
        past: the rings of all layers [B, P, R], R padded as in the weights; zeros at the beginning. Written to.
        recent: the last w codes [B, w], int64, -1 where there was none yet. Written to.
        uniforms: u [B, n] in [0, 1), float64.
        position: steps since the rings were histories in order; a call of n steps advances it by n.
        temperature: 0 takes the likeliest code.
        context: local conditioning of these steps [B, n, Cc].
        return_logits: also return what the codes were drawn from.
        backend: a backend by name; None chooses.

    Returns:
        codes [B, n], int64; with ``return_logits`` also the logits [B, n, V].

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; where logits are not finite.
        BackendError: the backend asked for cannot serve the call.

    Paper: Fast WaveNet Generation Algorithm, https://arxiv.org/abs/1611.09482.

    >>> L, R, D, S, V = 3, 16, 16, 16, 8
    >>> stack = [torch.randn(s) for s in ((L, 2 * D, R, 2), (L, 2 * D), (L, R, D), (L, R), (L, S, D), (L, S))]
    >>> head = [torch.randn(s) for s in ((S, S), (S,), (V, S), (V,))]
    >>> weights = wavenet_weights(torch.randn(2, V, R), stack, head, dilations=(1, 2, 4))
    >>> past, recent = torch.zeros(5, 7, R), torch.full((5, 2), -1)
    >>> wavenet_generate(weights, past, recent, torch.rand(5, 100, dtype=torch.float64)).shape
    torch.Size([5, 100])
    """
    _check_state(weights, past, recent, uniforms, torch.float64, "uniforms", position, context)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    tensors = (past, *weights[:7], uniforms, context)
    backend = choose(FAMILY, tensors, backend)
    embedding, gate, bias, *rest = weights[:7]
    if context is not None:
        context = padded(context.to(past.dtype), 2, PAD).contiguous()
    run = reference if backend == "reference" else _generate[backend]
    with without_autocast(past):
        codes, logits = run(
            embedding, gate, bias.expand(-1, past.shape[0], -1), *rest, context, past, recent, uniforms.contiguous(),
            list(weights.dilations), position, float(temperature), return_logits,
        )  # fmt: skip
    return (codes, logits) if return_logits else codes


@torch.no_grad()
def wavenet_feed(
    weights: WaveNetWeights,
    past: Tensor,
    recent: Tensor,
    codes: Tensor,
    *,
    position: int = 0,
    context: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Given codes [B, n] go through the network, all steps in parallel: the logits [B, n, V] of each from those before.

    ``past`` and ``recent`` are then as if :func:`wavenet_generate`, which see for the arguments, had drawn them.
    """
    _check_state(weights, past, recent, codes, torch.int64, "codes", position, context)
    if codes.numel() and not (0 <= codes.min() and codes.max() < weights.levels):
        raise ValueError(f"codes: expected 0 to {weights.levels - 1}, got {codes.min()} to {codes.max()}")
    backend = choose(wavenet.FAMILY, (past, *weights[:7], context), backend)
    embedding, gate, bias, residual, skip, hidden, output = weights[:7]
    if context is not None:
        context = padded(context.to(past.dtype), 2, PAD).contiguous()
    rows, steps = wavenet._rows(past, gate, context, weights.dilations), codes.shape[1]
    every = torch.cat([recent, codes], 1)
    matrices = (gate, bias.expand(-1, past.shape[0], -1), residual, skip)
    before, x = in_order(past, rows, position), embed(every[:, :-1], embedding)
    with without_autocast(past):
        _, total, after = wavenet.run(backend, x, *matrices, context, before, list(weights.dilations), True)
        logits = _head(total, hidden, output)[..., : weights.levels]
    past.copy_(in_order(after, rows, -position - steps))
    recent.copy_(every[:, steps:])
    return logits


def _check_state(
    weights: WaveNetWeights, past: Tensor, recent: Tensor, steps: Tensor, dtype: torch.dtype, name: str, position: int,
    context: Tensor | None,
) -> None:  # fmt: skip
    """``steps`` [B, n] are the codes or uniforms."""
    _check.floating("past", past, 3)
    (taps, _, channels), samples = weights.embedding.shape, past.shape[0]
    if past.dtype != weights.embedding.dtype or past.shape[1:] != (weights.rows, channels) or not past.is_contiguous():
        raise ValueError(
            f"past: expected a dense [B, {weights.rows}, {channels}] of {weights.embedding.dtype} for these weights,"
            f" got {list(past.shape)} of {past.dtype}"
        )
    for what, tensor, wanted, shape in (
        ("recent", recent, torch.int64, [samples, taps]),
        (name, steps, dtype, [samples, *steps.shape[1:2]]),
    ):
        if tensor.dtype != wanted or tensor.dim() != 2 or list(tensor.shape) != shape or tensor.device != past.device:
            raise ValueError(
                f"{what}: expected {[samples, shape[1] if len(shape) > 1 else 'n']} of {wanted} on {past.device} for"
                f" past of {list(past.shape)}, got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    if not recent.is_contiguous():
        raise ValueError("recent: expected a dense tensor, for it is written to")
    if weights.bias.shape[1] not in (1, samples):
        raise ValueError(
            f"weights: expected one bias or one for each of {samples} streams, got {weights.bias.shape[1]}"
        )
    if position < 0:
        raise ValueError(f"position: expected at least 0, got {position}")
    if (0 if context is None else context.shape[-1]) != weights.features:
        came = "none" if context is None else list(context.shape)
        raise ValueError(f"context: expected {weights.features} channels for these weights, got {came}")
    if context is not None:
        _check.beside("context", context, past, (*steps.shape, weights.features))
