"""What an instance of a kernel is, and the usual ones of every family.

An install compiles these ahead (FASTFLOW_CUDA_ARCHS) and the resource table lists them; any other is compiled when met.
setup.py runs this file by itself, where there is no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["USUAL", "Instance"]


# those that would spill with three
RESIDENT = {
    "coupling_bwd": 2,
    "gaussian_kl_bwd": 2,
    "conv1x1_bwd": 2,
    "gru_ode_fwd": 2,
    "gru_ode_bwd": 1,
    "ode_solve": 1,
    "ode_step": 2,
    "ode_bwd": 2,
    "ode_adjoint_solve": 1,
    "ode_adjoint_step": 2,
}


class Instance(NamedTuple):
    """``kernel<parameters>`` of csrc/cuda/``file``.cu, which takes one struct ``arguments``."""

    file: str
    kernel: str
    arguments: str
    parameters: tuple[str, ...] = ()
    threads: int = 256

    @property
    def name(self) -> str:
        """The function's name in the compiled module."""
        return "_".join(("fastflow", self.kernel, *self.parameters))

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor that registers are kept for: three have 80 each, which is what most need."""
        return max(1, RESIDENT.get(self.kernel, 3) - ("double" in self.parameters))

    @property
    def entry(self) -> str:
        template = f"<{', '.join(self.parameters)}>" if self.parameters else ""
        # in parentheses: the commas of the parameters are not those of the macro
        return f"FF_ENTRY({self.name}, ({self.kernel}{template}), {self.arguments}, {self.threads}, {self.resident})"


_BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
_ONE = [(s,) for s in _BYTES]
# x and its parameters: alike, or half precision beside float32
_TWO = [*((s, s) for s in _BYTES), ("float", "BFloat16"), ("float", "Half")]
_THREE = [(s, t, t) for s, t in _TWO]  # of the parameters a second set is a tensor of its own
_ACCUMULATORS = [("float",), ("double",)]
_BOTH_WAYS = [(*s, inverse) for s in _ONE for inverse in ("false", "true")]


def _each(file: str, kernels: dict[str, str], types: Iterable[tuple[str, ...]]) -> list[Instance]:
    """``{kernel: arguments}`` with each of the types."""
    return [Instance(file, kernel, arguments, t) for kernel, arguments in kernels.items() for t in types]


def _steps(
    file: str, kernels: dict[str, str], types: Iterable[tuple[str, ...]], general: bool = False
) -> list[Instance]:
    """The same in single and wide steps; kernels that take ``general`` too have an instance where it is set."""
    return [
        Instance(file, kernel, arguments, (*t, *rest))
        for kernel, arguments in kernels.items()
        for t in types
        for rest in _rest(16 // max(_BYTES[s] for s in t), general)
    ]


def _rest(wide: int, general: bool) -> list[tuple[str, ...]]:
    return [("1", "0"), (str(wide), "0"), ("1", "1")] if general else [("1",), (str(wide),)]


_GAUSSIAN = {
    "gaussian_log_prob_fwd": "LogProbForward",
    "gaussian_log_prob_bwd": "LogProbBackward",
    "gaussian_sample_fwd": "SampleForward",
    "gaussian_sample_bwd": "SampleBackward",
}


def _sweeps() -> list[Instance]:
    kernels = {"autoregressive_fwd": "SweepForward", "autoregressive_bwd": "SweepBackward"}
    return [Instance("autoregressive", k, a, t, 128) for k, a in kernels.items() for t in _ACCUMULATORS]


_MLP_COUPLING = {
    "mlp_coupling_fwd": "StackForward",
    "mlp_coupling_bwd": "StackBackward",
}
_ODE = {"ode_solve": "OdeForward", "ode_step": "OdeForward"}
_ODE_ADJOINT = {"ode_adjoint_solve": "OdeAdjoint", "ode_adjoint_step": "OdeAdjoint"}
_STAGES = {"ode_norms": "Stages", "ode_combine": "Combine", "ode_decide": "Stages", "ode_apply": "Stages"}
_SYLVESTER = {"sylvester_fwd": "SylvesterForward", "sylvester_bwd": "SylvesterBackward"}

USUAL = [
    *_steps("coupling", {"coupling_fwd": "CouplingForward", "coupling_bwd": "CouplingBackward"}, _THREE, general=True),
    *_steps("actnorm", {"actnorm_fwd": "ActNormForward"}, _ONE),
    *_each("actnorm", {"actnorm_bwd": "ActNormBackward"}, _ONE),
    *_each("actnorm", {"actnorm_finish": "ActNormFinish"}, _ACCUMULATORS),
    *_steps("conv1x1", {"conv1x1_fwd": "ConvForward", "conv1x1_bwd": "ConvBackward"}, _ONE),
    *_each("conv1x1", {"conv1x1_finish": "ConvFinish"}, _ACCUMULATORS),
    *_each("conv1x1_weights", {"lu_weights_fwd": "Factors", "lu_weights_bwd": "Factors"}, _ONE),
    *_steps("gaussian", _GAUSSIAN, _THREE),
    *_steps("gaussian", {"gaussian_kl_fwd": "KlForward", "gaussian_kl_bwd": "KlBackward"}, _TWO),
    *_each("gru_ode", {"gru_ode_fwd": "Filter"}, _ACCUMULATORS),
    *_each("gru_ode_backward", {"gru_ode_bwd": "FilterBackward"}, _ACCUMULATORS),
    *_each("planar", {"planar_fwd": "StepsForward", "planar_bwd": "StepsBackward"}, _BOTH_WAYS),
    *_each("planar", {"planar_finish": "StepsFinish"}, _ACCUMULATORS),
    *_each("radial", {"radial_fwd": "StepsForward", "radial_bwd": "StepsBackward"}, _BOTH_WAYS),
    *_each("radial", {"radial_finish": "StepsFinish"}, _ACCUMULATORS),
    *_each("mlp_coupling", _MLP_COUPLING, _ACCUMULATORS),
    *(i._replace(threads=64) for i in _each("sylvester", _SYLVESTER, _ACCUMULATORS)),
    *_each("trace", {"trace_rows": "Rows", "trace_contract": "Contract"}, _ACCUMULATORS),
    *_steps("trace", {"trace_activation_fwd": "Dual", "trace_activation_bwd": "DualBackward"}, _ACCUMULATORS),
    *_each("wavenet", {"wavenet_gate_fwd": "GateRows", "wavenet_gate_bwd": "GateRows"}, _ACCUMULATORS),
    *_each("wavenet", {"wavenet_generate": "Generate"}, _ACCUMULATORS),
    *_each("ode", _ODE, _ACCUMULATORS),
    *_each("ode_adjoint", _ODE_ADJOINT, _ACCUMULATORS),
    *_each("ode_stages", _STAGES, _ACCUMULATORS),
    *_each("ode_backward", {"ode_bwd": "OdeBackward"}, _ACCUMULATORS),
    *_sweeps(),
    *_each("shares", {"add_shares": "Shares"}, _ACCUMULATORS),
    *_each("sums", {"finish_sums": "Finish"}, _ACCUMULATORS),
]
