"""FFJORD as it is written on torchdiffeq: the adjoint, autograd's VJP for the trace, a tuple for a state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.nn import MLPDynamics

__all__ = ["PlainFFJORD"]


class ConcatSquash(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.hyper = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.view(1, 1)
        return self.linear(x) * torch.sigmoid(self.gate(t)) + self.hyper(t)


class Dynamics(nn.Module):
    """(t, (x, log-determinant)) -> their derivatives; the probes are set before every solve, None: the exact trace."""

    def __init__(self, features: int, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        widths = [features, *hidden, features]
        self.net = nn.ModuleList(ConcatSquash(n, m) for n, m in zip(widths, widths[1:], strict=False))
        self.activation = {"tanh": torch.tanh, "softplus": F.softplus}[activation]
        self.probes: Tensor | None = None
        self.evaluations = 0

    def network(self, t: Tensor, x: Tensor) -> Tensor:
        for layer in self.net[:-1]:
            x = self.activation(layer(t, x))
        return self.net[-1](t, x)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0]
        self.evaluations += 1
        with torch.enable_grad():
            x.requires_grad_(True)
            value = self.network(t, x)
            if self.probes is None:
                parts = [
                    torch.autograd.grad(value[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])
                ]
                trace = torch.stack(parts).sum(0)
            else:
                product = torch.autograd.grad(value, x, self.probes, create_graph=True)[0]
                trace = (product * self.probes).sum(1)
        return value, trace[:, None]


class PlainFFJORD(nn.Module):
    """One block with the parameters of ``dynamics``, over a standard normal."""

    def __init__(self, dynamics: MLPDynamics, time: float, tolerance: float) -> None:
        super().__init__()
        config = dynamics.config
        self.dynamics = Dynamics(config["features"], config["hidden"], config["activation"])
        self.dynamics.load_state_dict(dynamics.state_dict())
        self.time, self.tolerance = time, tolerance

    def solve(self, x: Tensor, times: tuple[float, float], probes: Tensor | None) -> tuple[Tensor, Tensor]:
        from torchdiffeq import odeint_adjoint

        self.dynamics.probes, self.dynamics.evaluations = probes, 0
        x, logdet = odeint_adjoint(
            self.dynamics,
            (x, x.new_zeros(len(x), 1)),
            x.new_tensor(times),
            rtol=self.tolerance,
            atol=self.tolerance,
            method="dopri5",
        )
        return x[-1], logdet[-1, :, 0]

    def log_prob(self, x: Tensor, probes: Tensor | None) -> Tensor:
        z, logdet = self.solve(x, (0.0, self.time), probes)
        return _normal(z) + logdet

    def sample_and_log_prob(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of given noise."""
        x, logdet = self.solve(z, (self.time, 0.0), probes)
        return x, _normal(z) - logdet


def _normal(z: Tensor) -> Tensor:
    return -0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
