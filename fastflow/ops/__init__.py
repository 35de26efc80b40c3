"""The functional API: one file per family, each with its meaning (reference), contract and gradient."""

from fastflow.ops._backend import BackendError, use_backend
from fastflow.ops.actnorm import actnorm
from fastflow.ops.autoregressive import autoregressive_inverse
from fastflow.ops.conv1x1 import conv1x1
from fastflow.ops.conv1x1_weights import dense_weights, lu_weights
from fastflow.ops.coupling import additive_coupling, affine_coupling
from fastflow.ops.gaussian import gaussian_log_prob, gaussian_sample
from fastflow.ops.gaussian_kl import gaussian_kl
from fastflow.ops.gru_ode import gru_ode_filter
from fastflow.ops.masked import masked_linear, masked_mlp
from fastflow.ops.mlp_coupling import mlp_coupling
from fastflow.ops.mlp_stack import ActNormStep, CouplingStep, MLPStack, PermutationStep
from fastflow.ops.ode import Solution, Steps, mlp_ode
from fastflow.ops.orthonormal import orthogonality, orthonormal
from fastflow.ops.planar import planar
from fastflow.ops.radial import radial
from fastflow.ops.scale_map import ScaleMap, scale_map
from fastflow.ops.sylvester import sylvester
from fastflow.ops.trace import Rademacher, TraceEstimate, bottleneck_trace, exact_trace, hutchinson, probes
from fastflow.ops.trace_mlp import mlp_trace
from fastflow.ops.wavenet import wavenet_stack
from fastflow.ops.wavenet_generate import WaveNetWeights, wavenet_feed, wavenet_generate, wavenet_weights

__all__ = [
    "ActNormStep",
    "BackendError",
    "CouplingStep",
    "MLPStack",
    "PermutationStep",
    "Rademacher",
    "ScaleMap",
    "Solution",
    "Steps",
    "TraceEstimate",
    "WaveNetWeights",
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "autoregressive_inverse",
    "bottleneck_trace",
    "conv1x1",
    "dense_weights",
    "exact_trace",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_sample",
    "gru_ode_filter",
    "hutchinson",
    "lu_weights",
    "mlp_coupling",
    "masked_linear",
    "masked_mlp",
    "mlp_ode",
    "mlp_trace",
    "orthogonality",
    "orthonormal",
    "planar",
    "probes",
    "radial",
    "scale_map",
    "sylvester",
    "use_backend",
    "wavenet_feed",
    "wavenet_generate",
    "wavenet_stack",
    "wavenet_weights",
]
