"""The trace of a Jacobian by random probes: tr A = E[e . A e] for any e of zero mean and unit covariance (Hutchinson).

A probe can be contracted with the Jacobian J of f from the left (a reverse pass, eᵀJ) or from the right (a forward
tangent, Je): the number is the same. For the MLPs of continuous flows see :mod:`fastflow.ops.trace_mlp`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastflow.ops import _check
from fastflow.ops._op import accumulator

__all__ = ["Rademacher", "TraceEstimate", "bottleneck_trace", "exact_trace", "hutchinson", "probes", "signs"]

KINDS = ("rademacher", "gaussian")
METHODS = ("vjp", "jvp")

Function = Callable[[Tensor], Tensor]
Kind = Literal["rademacher", "gaussian"]
Method = Literal["vjp", "jvp"]


class TraceEstimate(NamedTuple):
    """f(x), the mean over the probes of each sample's estimates [B], and the standard error of that mean [B]."""

    value: Tensor
    trace: Tensor
    standard_error: Tensor


# --- probes -----------------------------------------------------------------------------------------


def probes(
    shape: tuple[int, ...],
    kind: Kind = "rademacher",
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent probes of zero mean and unit variance: signs, or normal numbers.

    Of all distributions signs have the least variance; the estimate of tr A then has the variance
    2 (‖A_s‖² - Σ A_ii²), and 2 ‖A_s‖² with normal numbers, A_s being the symmetric part of A.

    A ``seed`` gives the same probes on every device and in every dtype, and signs are then :func:`signs`, made on the
    device itself; a ``generator`` draws on its own device.

    >>> bool((probes((3, 5, 2), seed=0) == probes((3, 5, 2), seed=0, dtype=torch.float64)).all())
    True
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if seed is not None and generator is not None:
        raise ValueError("seed: expected a seed or a generator, got both")
    if seed is not None and kind == "rademacher":
        return signs(shape, seed, dtype=dtype, device=device)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    where = device if generator is None else generator.device
    if kind == "gaussian":
        drawn = torch.randn(shape, generator=generator, device=where)
    else:
        drawn = torch.randint(2, shape, generator=generator, device=where, dtype=torch.int8) * 2 - 1
    return drawn.to(device, dtype)


_draw = probes  # where an argument takes the name


class Rademacher(NamedTuple):
    """``count`` probes of signs for every sample, made where they are used: ``signs((count, B, D), seed)``.

    The seed is a number of the host: a CUDA graph has the same signs in every replay.
    """

    count: int
    seed: int


def signs(
    shape: tuple[int, ...], seed: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The signs 1 and -1 that every backend makes of a seed: element i has bit i mod 128 of Philox-4x32-10 at i / 128.

    Raises:
        ValueError: a seed that is not within [0, 2^63).

    Paper: parallel random numbers, as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405.

    >>> signs((8,), seed=0).tolist()
    [-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0]
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a number from 0 to 2^63 - 1, got {seed}")
    count, low = math.prod(shape), 0xFFFFFFFF
    index = torch.arange((count + 127) // 128, device=device)
    words = [index & low, index >> 32, torch.zeros_like(index), torch.zeros_like(index)]
    k0, k1 = seed & low, seed >> 32
    for _ in range(10):
        # int64 products wrap, but keep the 64 bits of the unsigned ones
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [((b >> 32) & low) ^ words[1] ^ k0, b & low, ((a >> 32) & low) ^ words[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    bits = torch.stack(words, 1).view(-1, 1) >> torch.arange(32, device=device) & 1
    return (1 - 2 * bits).flatten()[:count].view(shape).to(dtype)


# --- public -----------------------------------------------------------------------------------------


def hutchinson(
    f: Function,
    x: Tensor,
    *,
    probes: int | Tensor = 1,
    kind: Kind = "rademacher",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    method: Method = "vjp",
) -> TraceEstimate:
    r"""f(x) and the estimate :math:`\frac1S \sum_s e_s^\top \frac{\partial f}{\partial x} e_s` of the Jacobian's trace.

    Args:
        f: any function from [B, ...] to the same shape that does not mix samples. It is called once.
        x: [B, ...].
        probes: how many to draw, or the probes themselves, [S, B, ...]. All S are contracted in one batched pass.
        kind, seed, generator: as for :func:`probes`.
        method: ``vjp`` (reverse mode; anything autograd knows) or ``jvp`` (forward mode; to train through it takes
            only first derivatives). The numbers are the same.

    Returns:
        :class:`TraceEstimate`: f(x), the mean [B] and its standard error [B] over the probes, NaN for a single one.
        All are differentiable with respect to x and whatever f reads, unless gradients are disabled.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Papers: Hutchinson, https://doi.org/10.1080/03610919008812866; FFJORD, https://arxiv.org/abs/1810.01367.

    >>> weight = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    >>> estimate = hutchinson(lambda x: x @ weight.T, torch.randn(4, 2), probes=100, seed=0)
    >>> bool(((estimate.trace - 4).abs() < 4 * estimate.standard_error).all())
    True
    """
    e = _given(probes, x.shape, x, kind, seed, generator)
    value, products = jacobian_products(f, x, e, method)
    return _estimate(value, dot(products, e))


def exact_trace(f: Function, x: Tensor, *, method: Method = "vjp") -> tuple[Tensor, Tensor]:
    """f(x) and the trace [B] of its Jacobian, by all D unit probes at once; for small D. Arguments as in hutchinson.

    >>> value, trace = exact_trace(torch.sin, torch.zeros(2, 3))
    >>> trace.tolist()
    [3.0, 3.0]
    """
    unit = unit_probes(x)
    value, products = jacobian_products(f, x, unit, method)
    return value, dot(products, unit).sum(0)


def bottleneck_trace(
    h: Function,
    g: Function,
    x: Tensor,
    *,
    probes: int | Tensor = 1,
    kind: Kind = "rademacher",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    method: Method = "vjp",
) -> TraceEstimate:
    r"""As :func:`hutchinson` for f = g(h(x)), with probes of the width H of h(x).

    :math:`\mathrm{tr}\,\frac{\partial g}{\partial h}\frac{\partial h}{\partial x} =
    \mathrm{tr}\,\frac{\partial h}{\partial x}\frac{\partial g}{\partial h}`, a matrix H x H: less variance where H is
    much smaller than D. ``probes``: how many, or [S, B, H]. The method jvp calls h twice.

    Paper: FFJORD, https://arxiv.org/abs/1810.01367, section 3.1.1.
    """

    def given(hidden: Tensor) -> Tensor:
        return _given(probes, hidden.shape, x, kind, seed, generator)

    value, products, e = bottleneck_products(h, g, x, given, method)
    return _estimate(value, dot(products, e))


# --- products with the Jacobian: (f(x), [S, ...]) ---------------------------------------------------


def jacobian_products(f: Function, x: Tensor, e: Tensor, method: Method = "vjp") -> tuple[Tensor, Tensor]:
    """f(x) and the products [S, B, ...] of its Jacobian with the probes e [S, B, ...], from the method's side."""
    return _PRODUCTS[_method(method)](_same_shape("f", f, x.shape), _input(x), e)


def bottleneck_products(
    h: Function, g: Function, x: Tensor, probes: Callable[[Tensor], Tensor], method: Method = "vjp"
) -> tuple[Tensor, Tensor, Tensor]:
    """g(h(x)), the products [S, B, H] of the bottleneck's matrix with the probes [S, B, H] that ``probes`` makes for
    h(x), and these."""
    _method(method)
    x = _input(x)
    g = _same_shape("g", g, x.shape)
    with torch.set_grad_enabled(method == "vjp" or torch.is_grad_enabled()):
        hidden = h(x)
    e = probes(hidden)
    if method == "jvp":
        value, tangent = _jvp(g, hidden, e)
        return value, _jvp(h, x, tangent)[1], e
    with torch.enable_grad():
        value = g(hidden)
    products = _reverse(value, hidden, _reverse(hidden, x, e))
    return (value if torch.is_grad_enabled() else value.detach()), products, e


def unit_probes(x: Tensor) -> Tensor:
    """[D, B, ...], one for every element of a sample: with them the products are the whole Jacobian."""
    size = math.prod(x.shape[1:])
    return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:]).expand(-1, *x.shape)


def _vjp(f: Function, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        value = f(x)
    products = _reverse(value, x, e)
    return (value if torch.is_grad_enabled() else value.detach()), products


def _reverse(value: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """e_s . dvalue/dx of every probe; the graph stays, for the caller's own backward pass or the next product."""
    if not value.requires_grad:  # a constant
        return x.new_zeros(e.shape[0], *x.shape)
    batched = e.shape[0] != 1  # a single probe needs no vmap, under which some functions cannot run
    (products,) = torch.autograd.grad(
        value,
        x,
        e.to(value.dtype) if batched else e[0].to(value.dtype),
        retain_graph=True,
        create_graph=torch.is_grad_enabled(),
        is_grads_batched=batched,
        materialize_grads=True,
    )
    return products if batched else products[None]


def _jvp(f: Function, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    def one(tangent: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(f, (x,), (tangent,))

    e = e.to(x.dtype)
    if e.shape[0] == 1:
        value, tangent = one(e[0])
        return value, tangent[None]
    return torch.func.vmap(one, out_dims=(None, 0))(e)


_PRODUCTS = {"vjp": _vjp, "jvp": _jvp}


def dot(products: Tensor, e: Tensor) -> Tensor:
    """Per probe and sample, [S, B]."""
    dtype = accumulator(products.dtype)
    return (products.to(dtype) * e.to(dtype)).flatten(2).sum(2) if products.dim() > 2 else products.to(dtype) * e


def _estimate(value: Tensor, each: Tensor) -> TraceEstimate:
    count = each.shape[0]
    if count == 1:
        return TraceEstimate(value, each[0], torch.full_like(each[0], math.nan))
    return TraceEstimate(value, each.mean(0), each.std(0) / math.sqrt(count))


# --- checks -----------------------------------------------------------------------------------------


def _method(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return method


def _input(x: Tensor) -> Tensor:
    """x as something to differentiate by: itself where its graph goes on, a fresh leaf otherwise."""
    _check.floating("x", x, dims=1)
    return x if x.requires_grad and torch.is_grad_enabled() else x.detach().requires_grad_()


def _given(
    probes: int | Tensor, shape: torch.Size, x: Tensor, kind: Kind, seed: int | None, generator: torch.Generator | None
) -> Tensor:
    _check.floating("x", x, dims=1)
    if isinstance(probes, Tensor):
        if probes.shape[1:] != shape or probes.dim() != len(shape) + 1 or probes.shape[0] == 0:
            raise ValueError(f"probes: expected [S, {', '.join(map(str, shape))}], got {list(probes.shape)}")
        if probes.device != x.device:
            raise ValueError(f"probes: expected device {x.device} like x, got {probes.device}")
        return probes
    if probes < 1:
        raise ValueError(f"probes: expected at least one, got {probes}")
    return _draw((probes, *shape), kind, seed=seed, generator=generator, dtype=accumulator(x.dtype), device=x.device)


def _same_shape(name: str, f: Function, shape: torch.Size) -> Function:
    """``f``, its output checked before anything is contracted with it."""

    def checked(x: Tensor) -> Tensor:
        value = f(x)
        if value.shape != shape:
            raise ValueError(f"{name}: expected an output of shape {list(shape)} like x, got {list(value.shape)}")
        return value

    return checked
