"""Plans: everything about a call that its tensors' shapes, strides and dtypes decide, made once and kept.

A plan holds the launches of a call with their arguments packed but for the addresses; a call with the same layouts only
fills these in. Arguments are structs of 8-byte fields, in the order in which the CUDA source declares them.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops.cuda.load import driver
from fastflow.ops.cuda.source import C_TYPES, Instance

__all__ = ["NULL", "Address", "Field", "Launch", "Plan", "Value", "accumulates", "matrix", "planned"]


class Address(NamedTuple):
    """A field that holds the address of an argument, plus bytes; of a scratch tensor where ``scratch``."""

    argument: int
    offset: int = 0
    scratch: bool = False


class Value(NamedTuple):
    """A field that holds an argument itself, a whole number that no plan depends on."""

    argument: int


NULL = 0
Field = int | float | Address | Value


def matrix(number: int, tensor: Tensor | None) -> list[Field]:
    """``struct Matrix`` of csrc/cuda/launch.cuh: the argument ``number``, a tensor of two dimensions, or nothing."""
    return [NULL, 0, 0] if tensor is None else [Address(number), *tensor.stride()]


class Launch:
    """One kernel with its arguments."""

    def __init__(self, instance: Instance, blocks: int, fields: Sequence[Field], shared: int = 0):
        if blocks >= 2**31:
            raise ValueError(f"{instance.kernel}: a grid of {blocks} blocks is beyond what a GPU can launch")
        self.instance, self.blocks, self.shared = instance, blocks, shared
        self.format = struct.Struct("=" + "".join("d" if isinstance(f, float) else "q" for f in fields))
        self.values = [0 if isinstance(f, (Address, Value)) else f for f in fields]
        self.addresses = [(i, *f) for i, f in enumerate(fields) if isinstance(f, Address)]
        self.given = [(i, f.argument) for i, f in enumerate(fields) if isinstance(f, Value)]

    def run(self, device: torch.device, arguments: Sequence[Any], scratch: Sequence[Tensor]) -> None:
        values = self.values.copy()
        for i, argument, offset, in_scratch in self.addresses:
            values[i] = (scratch if in_scratch else arguments)[argument].data_ptr() + offset
        for i, argument in self.given:
            values[i] = arguments[argument]
        driver().launch(self.instance, device, self.blocks, self.shared, self.format.pack(*values))


class Plan(NamedTuple):
    """The launches of a call in their order, and the scratch tensors (size, dtype) they share."""

    launches: list[Launch]
    scratch: Sequence[tuple[int, torch.dtype]] = ()


def planned(make: Callable[..., Plan], values: Sequence[int] = ()) -> Callable[..., None]:
    """The kernel's function from ``make(*arguments)``, which may look at everything of a tensor but its values.

    ``values``: the arguments that it uses only as :class:`Value`.
    """
    plans: dict[tuple, Plan] = {}

    @functools.wraps(make)
    def run(*arguments: Any) -> None:
        key = tuple([_key(a) for i, a in enumerate(arguments) if i not in values])
        plan = plans.get(key)
        if plan is None:
            if len(plans) > 4096:  # a program whose shapes never come back
                plans.clear()
            plan = plans[key] = make(*arguments)
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        scratch = [torch.empty(size, dtype=dtype, device=device) for size, dtype in plan.scratch]
        for launch in plan.launches:
            if launch.blocks:
                launch.run(device, arguments, scratch)

    return run


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # 16: the alignment decides on wide accesses
        return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, (list, tuple)):
        return tuple(map(_key, argument))
    return argument


def accumulates(tensor: Tensor) -> str:
    """The C type that kernels compute in."""
    return C_TYPES[accumulator(tensor.dtype)]
