"""Checks that public functions share: which argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOATING", "floating", "matching", "beside", "logdet_like", "number", "strided", "unsuited", "whole"]

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may hold its values elsewhere


def unsuited(tensors: Iterable[Tensor | None], device: str) -> str | None:
    """Why kernels for this type of device cannot serve these tensors; None if they can."""
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}"
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            return f"the tensors are on {first} and {tensor.device}"
        if tensor.dtype not in FLOATING:
            return f"a tensor has dtype {tensor.dtype}"
        if type(tensor) not in PLAIN:
            return f"a tensor is a {type(tensor).__name__}"
    return None


def whole(name: str, value: Any, least: int = 1) -> None:
    """A whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def number(name: str, value: Any) -> None:
    """A real number, also infinity and NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def floating(name: str, tensor: Tensor, dims: int = 2) -> None:
    """A floating point tensor of at least ``dims`` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() < dims:
        raise ValueError(f"{name}: expected at least {dims} dimensions [B, C, ...], got {tuple(tensor.shape)}")


def matching(name: str, tensor: Tensor, x: Tensor, channels: tuple[int, ...] | None = None, of: str = "x") -> None:
    """``tensor`` goes with ``x``: its device, batch and positions, a compatible dtype, one of these channel counts."""
    floating(name, tensor)
    _compatible(name, tensor, x, of)
    allowed = channels if channels is not None else (x.shape[1],)
    if tensor.shape[0] != x.shape[0] or tensor.shape[2:] != x.shape[2:] or tensor.shape[1] not in allowed:
        shapes = " or ".join(str([x.shape[0], c, *x.shape[2:]]) for c in dict.fromkeys(allowed))
        raise ValueError(f"{name}: expected shape {shapes} for {of} of shape {list(x.shape)}, got {list(tensor.shape)}")


def beside(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], of: str = "x") -> None:
    """A parameter that goes with x: its device, a compatible dtype, this shape."""
    floating(name, tensor, 0)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: expected shape {list(shape)} for {of} of shape {list(x.shape)}, got {list(tensor.shape)}"
        )
    _compatible(name, tensor, x, of)


def _compatible(name: str, tensor: Tensor, x: Tensor, of: str) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like {of}, got {tensor.device}")
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{name}: float64 goes with float64 only, got {tensor.dtype} with {of} of {x.dtype}")


def logdet_like(name: str, logdet: Tensor | None, x: Tensor, dtype: torch.dtype) -> None:
    """A running per-sample sum [B] in the accumulator's dtype."""
    if logdet is None:
        return
    if logdet.shape != x.shape[:1] or logdet.dtype != dtype or logdet.device != x.device:
        raise ValueError(
            f"{name}: expected [{x.shape[0]}] of {dtype} on {x.device}, "
            f"got {list(logdet.shape)} of {logdet.dtype} on {logdet.device}"
        )


def strided(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself if its positions (dimensions 2 and on) are one strided dimension to a kernel, else a copy.

    Channel splits, interleaved halves, channels_last and expanded tensors are; a spatial slice is not.
    """
    if tensor is None or tensor.dim() < 4 or tensor.is_contiguous():
        return tensor
    shape, stride = tensor.shape, tensor.stride()
    size, step = shape[-1], stride[-1]
    for n, outer in zip(shape[-2:1:-1], stride[-2:1:-1], strict=True):
        if n == 1:
            continue
        if size > 1 and outer != size * step:
            return tensor.contiguous()
        step = outer if size == 1 else step
        size *= n
    return tensor
