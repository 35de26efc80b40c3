"""What an instance of a kernel is, and the usual ones of every family.

An install compiles these ahead (FASTFLOW_CUDA_ARCHS) and the resource table lists them; any other is compiled when met.
setup.py runs this file by itself, where there is no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["USUAL", "Instance"]


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
    def entry(self) -> str:
        template = f"<{', '.join(self.parameters)}>" if self.parameters else ""
        # in parentheses: the commas of the parameters are not those of the macro
        return f"FF_ENTRY({self.name}, ({self.kernel}{template}), {self.arguments}, {self.threads})"


_BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}
# x, its parameters, and a second set of them that is a tensor of its own: all alike, or half precision beside float32
_TYPES = [(s, s, s) for s in _BYTES] + [("float", s, s) for s in ("BFloat16", "Half")]


def _elementwise(file: str, kernels: dict[str, str], types: int, general: bool = False) -> list[Instance]:
    """``{kernel: arguments}`` with every combination of ``types`` types, in single and wide steps.

    With ``general`` the kernels take that parameter too, and have an instance where it is set.
    """
    return [
        Instance(file, kernel, arguments, (*t, *rest))
        for kernel, arguments in kernels.items()
        for t in dict.fromkeys(t[:types] for t in _TYPES)
        for rest in _steps(16 // max(_BYTES[s] for s in t), general)
    ]


def _steps(wide: int, general: bool) -> list[tuple[str, ...]]:
    return [("1", "0"), (str(wide), "0"), ("1", "1")] if general else [("1",), (str(wide),)]


def _each(file: str, kernel: str, arguments: str, types: Iterable[str]) -> list[Instance]:
    return [Instance(file, kernel, arguments, (t,)) for t in types]


_ACCUMULATORS = ("float", "double")
_DENSITIES = {
    "gaussian_log_prob_fwd": "LogProbForward",
    "gaussian_log_prob_bwd": "LogProbBackward",
    "gaussian_sample_fwd": "SampleForward",
    "gaussian_sample_bwd": "SampleBackward",
}

USUAL = [
    *_elementwise("coupling", {"coupling_fwd": "CouplingForward", "coupling_bwd": "CouplingBackward"}, 3, general=True),
    *_elementwise("gaussian", _DENSITIES, 3),
    *_elementwise("gaussian", {"gaussian_kl_fwd": "KlForward", "gaussian_kl_bwd": "KlBackward"}, 2),
    *_elementwise("actnorm", {"actnorm_fwd": "ActNormForward"}, 1),
    *_each("actnorm", "actnorm_bwd", "ActNormBackward", _BYTES),
    *_each("actnorm", "actnorm_finish", "ActNormFinish", _ACCUMULATORS),
    *_elementwise("conv1x1", {"conv1x1_fwd": "ConvForward", "conv1x1_bwd": "ConvBackward"}, 1),
    *_each("conv1x1", "conv1x1_finish", "ConvFinish", _ACCUMULATORS),
    *_each("sums", "finish_sums", "Finish", _ACCUMULATORS),
]
