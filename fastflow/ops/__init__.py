"""The functional API: one file per family, each with its meaning (reference), contract and gradient."""

from fastflow.ops._backend import BackendError, use_backend
from fastflow.ops.coupling import additive_coupling, affine_coupling
from fastflow.ops.gaussian import gaussian_log_prob, gaussian_sample
from fastflow.ops.gaussian_kl import gaussian_kl
from fastflow.ops.scale_map import ScaleMap, scale_map
from fastflow.ops.trace import TraceEstimate, bottleneck_trace, exact_trace, hutchinson, probes
from fastflow.ops.trace_mlp import mlp_trace

__all__ = [
    "BackendError",
    "ScaleMap",
    "TraceEstimate",
    "additive_coupling",
    "affine_coupling",
    "bottleneck_trace",
    "exact_trace",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_sample",
    "hutchinson",
    "mlp_trace",
    "probes",
    "scale_map",
    "use_backend",
]
