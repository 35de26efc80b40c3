"""Launches of csrc/cuda/ode_stages.cu: what surrounds the products of fastflow/ops/ode_stages.py."""

from __future__ import annotations

from torch import Tensor

from fastflow.ops.cuda import trace
from fastflow.ops.cuda.plan import NULL, Address, Launch, Plan, accumulates, matrix, planned
from fastflow.ops.cuda.source import Instance
from fastflow.ops.cuda.walk import THREADS
from fastflow.ops.ode_stages import BLOCK, NORMS, Kernels, State

__all__ = ["STAGES"]

ADDRESSES = (
    *(
        "tolerances",
        "method",
        "times",
        "grid",
        "y",
        "ends",
        "slopes",
        "nodes",
        "weights",
        "control",
        "verdict",
        "partial",
        "errors",
    ),
    *("values", "traces", "energies", "steps", "counts", "states"),
)


@planned
def _combine(base: Tensor, slopes: Tensor, weights: Tensor, out: Tensor) -> Plan:
    fields = [Address(0), Address(1), Address(2), *matrix(3, out), *out.shape, weights.shape[0], slopes.stride(0)]
    instance = Instance("ode_stages", "ode_combine", "Combine", (accumulates(base),))
    return Plan([Launch(instance, -(-out.numel() // THREADS), fields)])


@planned
def _launch(kernel: str, *arguments) -> Plan:  # noqa: ANN002
    """A kernel that takes struct Stages; the arguments are all that is in a State."""
    state = State(*arguments)
    outputs, samples, features = state.values.shape
    blocks = {"ode_norms": state.partial.shape[0], "ode_decide": 1, "ode_apply": -(-state.y.shape[0] // THREADS)}
    fields = [samples, features, state.traces.shape[1], state.energies.shape[1], state.y.shape[0]]
    fields += [outputs, state.states.shape[0], state.max_steps, state.partial.shape[0]]
    fields += [NULL if getattr(state, n) is None else Address(1 + State._fields.index(n)) for n in ADDRESSES]
    instance = Instance("ode_stages", kernel, "Stages", (accumulates(state.y),))
    return Plan([Launch(instance, blocks[kernel], fields, shared=BLOCK * NORMS * 8)])


STAGES = Kernels(
    combine=_combine,
    norms=lambda state: _launch("ode_norms", *state),
    decide=lambda state: _launch("ode_decide", *state),
    apply=lambda state: _launch("ode_apply", *state),
    rows=trace.trace_rows,
    rows_bwd=trace.trace_rows_bwd,
    contract=trace.trace_contract,
    layer_fwd=trace.trace_layer_fwd,
    layer_bwd=trace.trace_layer_bwd,
)
