"""Flows of K small steps on a GPU: launches of csrc/cuda/steps.cuh for the family that asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.ops._op import accumulator
from fastflow.ops._steps import Prepare, pack, unpack_gradient
from fastflow.ops.cuda.plan import NULL, Address, Field, Launch, Plan, accumulates, planned
from fastflow.ops.cuda.source import C_TYPES, Instance

__all__ = ["kernels"]

THREADS = 256  # of a block; fewer where shared memory is short
SHARED = 48 * 1024
TEAMS = 8192  # of a backward launch: each has memory for the states of a sample and for sums of gradients
SCRATCH = 2**22  # elements of all that memory


def _teams(width: int, shared: Callable[[int], int]) -> tuple[int, int, int]:
    """(lanes of a team, teams of a block, threads): ``shared(teams)`` is what a block takes."""
    lanes = max(8, min(32, 1 << (width - 1).bit_length()))
    threads = THREADS
    while threads > 32 and shared(threads // lanes) > SHARED:
        threads //= 2
    return lanes, threads // lanes, threads


def _rows(number: int, tensor: Tensor) -> list[Field]:
    """struct Rows"""
    return [Address(number), *tensor.stride()]


def _steps(z: Tensor, parameters: Tensor, each: bool, lanes: int, teams: int) -> list[Field]:
    """struct Steps, of the arguments 0 and 1"""
    return [*_rows(0, z), Address(1), *z.shape, *parameters.shape[-2:], int(each), lanes, teams]


def kernels(family: str, prepare: Prepare) -> dict[str, Callable[..., None]]:
    """{family}_fwd and {family}_bwd; ``prepare`` makes of the family's parameters what its steps use."""

    @planned
    def forward(z, parameters, running, y, logdet, each: bool, inverse: bool) -> Plan:
        shared = lambda teams: teams * z.shape[1] * parameters.element_size()  # noqa: E731
        lanes, teams, threads = _teams(z.shape[1], shared)
        fields = [*_steps(z, parameters, each, lanes, teams), *_rows(3, y)]
        fields += [NULL if running is None else Address(2), Address(4)]
        fields += [0 if running is None else running.stride(0), logdet.stride(0)]
        types = (C_TYPES[z.dtype], str(inverse).lower())
        instance = Instance(family, f"{family}_fwd", "StepsForward", types, threads)
        return Plan([Launch(instance, -(-z.shape[0] // teams), fields, shared(teams))])

    @planned
    def backward(z, parameters, gy, glogdet, gz, gradient, each: bool, inverse: bool) -> Plan:
        samples, width = z.shape
        steps, size = parameters.shape[-2:]
        item = parameters.element_size()
        shared = lambda teams: teams * 2 * width * item  # noqa: E731
        lanes, teams, threads = _teams(width, shared)
        columns, states = steps * size, steps * (width + 1)
        total = max(1, min(samples, TEAMS, SCRATCH // max(1, states + (0 if each else columns))))
        dtype = accumulator(z.dtype)
        scratch = [(total * states, dtype), *([] if each else [(total * columns, dtype)])]
        sums = Address(5) if each else Address(1, 0, scratch=True)
        fields = [*_steps(z, parameters, each, lanes, teams), *_rows(2, gy), *_rows(4, gz)]
        fields += [Address(3), glogdet.stride(0), sums, total, -(-samples // total), Address(0, 0, scratch=True)]
        types = (C_TYPES[z.dtype], str(inverse).lower())
        instance = Instance(family, f"{family}_bwd", "StepsBackward", types, threads)
        launches = [Launch(instance, -(-total // teams) if samples else 0, fields, shared(teams))]
        if not each:
            finish = Instance(family, f"{family}_finish", "StepsFinish", (accumulates(z),))
            fields = [sums, Address(5), total if samples else 0, columns]
            launches.append(Launch(finish, -(-columns // 256), fields))
        return Plan(launches, scratch)

    def fwd(z, *rest):
        *given, running, y, logdet, each, inverse = rest
        forward(z, pack(prepare, z, given), running, y, logdet, each, inverse)

    def bwd(z, *rest):
        *given, gy, glogdet, gz, g0, g1, g2, each, inverse = rest
        parameters = pack(prepare, z, given)
        gradient = torch.empty_like(parameters)
        backward(z, parameters, gy, glogdet, gz, gradient, each, inverse)
        unpack_gradient(prepare, given, gradient, (g0, g1, g2))

    return {f"{family}_fwd": fwd, f"{family}_bwd": bwd}
