"""ODENVP: FFJORD on images, continuous flows of convolutions at several scales.

Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud, 2018, https://arxiv.org/abs/1810.01367.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastflow.models.cnf import ContinuousModel, check_traces
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection, Sequential
from fastflow.nn.continuous import Continuous
from fastflow.nn.conv_dynamics import ConvDynamics
from fastflow.nn.dynamics import Activation, LayerKind
from fastflow.nn.logit import Logit
from fastflow.nn.multi_scale import MultiScale
from fastflow.nn.reshape import Squeeze
from fastflow.nn.split_prior import SplitPrior

__all__ = ["ODENVP"]

# arguments that are those of every continuous flow
_SOLVE = ("time", "train_time", "trace", "eval_trace", "probes", "kind", "method", "rtol", "atol", "step_size",
          "adjoint", "max_steps")  # fmt: skip


class ODENVP(ContinuousModel, MultiScale):
    r"""FFJORD on images.

    A scale is ``blocks`` continuous flows with convolutional dynamics, a squeeze to [4C, H/2, W/2], and as many flows
    again; then half of the channels leave to a standard normal. The last scale is ``blocks`` flows alone.

    Args:
        image_shape: (C, H, W).
        scales: 1 or more; None: one for every time that both sides are at least 4 in halving them, 3 for 28 x 28. A
            side must be even wherever it is halved.
        blocks: continuous flows one after the other.
        hidden, layer, activation: of the dynamics, :class:`fastflow.nn.ConvDynamics`.
        alpha: α of the :class:`fastflow.nn.Logit` that images in [-1/2, 1/2) first go through; None for none.
        norm: ``actnorm`` in front of the flows of every size of image, set by the first batch; ``none`` in the paper.
        kinetic, jacobian: weights of the integrals of |f|² and |J e|², summed over all flows, in :meth:`loss` alone;
            they keep the solutions straight and the solver's steps few (https://arxiv.org/abs/2002.02798).
        time, train_time, trace, eval_trace, probes, kind, method, rtol, atol, step_size, adjoint, max_steps: of every
            flow, :class:`fastflow.nn.Continuous`.

    With ``adjoint`` training keeps no more than the states where flows begin, however many evaluations they take;
    without it, every evaluation's intermediate results, and is faster by the solves that it does not repeat.

    The probes of the trace are drawn from torch's global generator, once for every solve: ``log_prob`` is an unbiased
    estimate, unless the trace is ``exact``. Samples need no trace.

    The latent is a list, the part that left first in front. Densities are in nats, of x as it came.

    >>> model = ODENVP((1, 4, 4), scales=2, blocks=1, hidden=(8,), method="rk4", step_size=0.5)
    >>> x = torch.rand(16, 1, 4, 4) - 0.5
    >>> model.initialize(x)
    >>> model.log_prob(x).shape, model.sample(4, temperature=0.7).shape
    (torch.Size([16]), torch.Size([4, 1, 4, 4]))
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        scales: int | None = None,
        blocks: int = 2,
        hidden: Sequence[int] = (64, 64, 64),
        *,
        layer: LayerKind = "concat",
        activation: Activation = "softplus",
        alpha: float | None = 1e-6,
        norm: Literal["none", "actnorm"] = "none",
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        time: float = 1.0,
        train_time: bool = True,
        trace: Literal["hutchinson", "exact"] = "hutchinson",
        eval_trace: Literal["hutchinson", "exact"] | None = None,
        probes: int = 1,
        kind: Literal["rademacher", "gaussian"] = "rademacher",
        method: str = "dopri5",
        rtol: float = 1e-5,
        atol: float = 1e-5,
        step_size: float | None = None,
        adjoint: bool = True,
        max_steps: int = 1000,
    ) -> None:
        super().__init__(image_shape)
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.config |= {"image_shape": self.image_shape, "hidden": tuple(hidden)}
        check_traces(trace, eval_trace)
        if norm not in ("none", "actnorm"):
            raise ValueError(f"norm: expected none or actnorm, got {norm!r}")
        if blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {blocks}")
        self._regularise(kinetic, jacobian)
        self.preprocess = Sequential() if alpha is None else Sequential(Logit(alpha, -0.5, 0.5))
        channels, count = self.image_shape[0], _scales(self.image_shape, scales)
        for scale in range(count):
            layers = self._blocks(channels)
            if scale < count - 1:
                layers += [Squeeze(), *self._blocks(4 * channels)]
                self.splits.append(SplitPrior(4 * channels, network=None))
                channels *= 2
            self.scales.append(Sequential(*layers))
        self.to(memory_format=torch.channels_last)

    def _blocks(self, channels: int) -> list[Bijection]:
        c = self.config
        settings: dict[str, Any] = {name: c[name] for name in _SOLVE}
        flows = [
            Continuous(ConvDynamics(channels, c["hidden"], c["layer"], c["activation"]), **settings)
            for _ in range(c["blocks"])
        ]
        return [ActNorm(channels), *flows] if c["norm"] == "actnorm" else flows

    def decode(self, latents: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """The image of given latents: the inverse of :meth:`encode`."""
        with self._blocks_with(trace=None):
            return super().decode(latents, context)

    @torch.no_grad()
    def initialize(self, batch: Tensor, context: Tensor | None = None) -> None:
        """Data-dependent initialisation of every ActNorm, if there are any, from one batch; refuses a second one."""
        norms = [m for m in self.modules() if isinstance(m, ActNorm)]
        if any(m.ready for m in norms):
            raise RuntimeError("initialize: this model has been initialised already")
        if norms:
            with self._blocks_with(trace=None):
                self.encode(batch, context)


def _scales(image_shape: Sequence[int], scales: int | None) -> int:
    """The number of scales; raises where a side cannot be halved."""
    _, height, width = image_shape
    small = min(height, width)
    count = max(1, small.bit_length() - 2) if scales is None else scales  # so often small >= 4 in halving it
    divisor = 2 ** (count - 1)
    if count < 1 or height % divisor or width % divisor:
        common = height | width
        most = 1 + (common & -common).bit_length() - 1  # one for every factor 2 of both
        raise ValueError(
            f"image_shape, scales: expected sides divisible by {divisor} for {count} scales, got {height} x {width}, "
            f"which can have 1 to {most}"
        )
    return count
