"""GRU-ODE-Bayes as a filter that goes on: observations come one at a time, predictions are there at any time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.nn.observations import MISSING, OBSERVED
from fastflow.ops.gru_ode import Filtered

if TYPE_CHECKING:
    from fastflow.models.gru_ode_bayes import GRUODEBayes

__all__ = ["GRUODEStream"]

Series = int | Sequence[int] | Tensor

_STATE = ("state", "time", "count", "covariates")


class GRUODEStream:
    """n series, each at the time of its last observation: ``state`` [n, H], ``time`` [n] and the number of
    observations ``count`` [n].

    It has a copy of the model, in evaluation. What it predicts is what the model predicts of all observations at once,
    as far as the solver takes the same steps: between two observations, whatever was predicted there.
    ``state_dict`` and ``load_state_dict`` save and restore where it stands, in tensors; the model is saved by itself.

    >>> from fastflow.models import GRUODEBayes
    >>> stream = GRUODEBayes(features=2, hidden=8).stream(3)
    >>> mean, std = stream.observe([0, 2], 0.5, [[1.0, 2.0], [0.0, float("nan")]])  # what it predicted there
    >>> mean, std = stream.predict(0.8)  # of all three
    >>> mean.shape, stream.time
    (torch.Size([3, 2]), tensor([0.5000, 0.0000, 0.5000], dtype=torch.float64))
    """

    @torch.no_grad()
    def __init__(self, model: GRUODEBayes, n: int = 1, covariates: Tensor | None = None) -> None:
        if n < 0:
            raise ValueError(f"n: expected at least 0 series, got {n}")
        self.model = copy.deepcopy(model).eval()
        weight = model.cell.hidden_weight
        given = weight.new_zeros(n, 0) if covariates is None else torch.as_tensor(covariates).to(weight).clone()
        if given.shape != (n, model.covariates):
            raise ValueError(f"covariates: expected [{n}, {model.covariates}], got {list(given.shape)}")
        if not bool(given.isfinite().all()):
            raise ValueError("covariates: expected finite ones, got NaN or infinity")
        self.covariates, self.state = given, self.model.initial(given)
        self.time = torch.zeros(n, dtype=torch.float64, device=weight.device)
        self.count = torch.zeros(n, dtype=torch.int64, device=weight.device)

    @torch.no_grad()
    def observe(
        self,
        series: Series,
        time: float | Sequence[float] | Tensor,
        value: Sequence[float] | Tensor,
        mask: Sequence[float] | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values [k, D] of k different series, at one time or one each [k]; mask 1 observed, 0 missing, by default what
        is not NaN. One series: its number and [D]. Returns what was predicted, mean and standard deviation [k, D].

        Raises:
            ValueError: a series that does not exist or comes twice, a time before that of the series or that of its
                last observation, NaN or infinity; then nothing has been observed.
        """
        chosen, now = self._arguments(series, time)
        shape = (len(chosen), self.model.features)
        value = torch.as_tensor(value, dtype=self.state.dtype, device=self.state.device)
        value = value[None] if value.dim() == 1 else value
        if value.shape != shape:
            raise ValueError(f"value: expected {list(shape)}, got {list(value.shape)}")
        mask = ~value.isnan() if mask is None else torch.as_tensor(mask, device=value.device)
        mask = mask[None] if mask.dim() == 1 else mask
        if mask.shape != shape or not bool(((mask == MISSING) | (mask == OBSERVED)).all()):
            raise ValueError(f"mask: expected {list(shape)} of 0 and 1, got {mask.tolist()}")
        value = torch.where(mask == OBSERVED, value, 0)
        if not bool(value.isfinite().all()):
            b, d = (~value.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"value: expected finite numbers, got {value[b, d]} in channel {d} of series {int(chosen[b])}"
            )
        self.model.channels.check(value, mask)
        self._refuse_again(chosen, now)
        made = self._run(chosen, now, value, mask, True)
        self._set(chosen, made.states, now, 1)
        return self.model.channels.moments(made.pre)

    @torch.no_grad()
    def predict(self, time: float | Sequence[float] | Tensor, series: Series | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [k, D] at a time, or one time for each of the series (default: all of them), not
        before their last observations. Nothing moves."""
        chosen, now = self._arguments(torch.arange(len(self.time)) if series is None else series, time)
        return self.model.channels.moments(self._ask(chosen, now).pre)

    @torch.no_grad()
    def sample(
        self,
        times: Sequence[float] | Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Goes on with values [n, L, D] at times [L], each drawn from its prediction and then observed."""
        drawn, everyone = [], torch.arange(len(self.time))
        for time in torch.as_tensor(times, dtype=torch.float64).tolist():
            chosen, now = self._arguments(everyone, time)
            self._refuse_again(chosen, now)
            made = self._ask(chosen, now)
            drawn.append(self.model.channels.draw(made.pre, temperature, generator))
            self._set(chosen, made.states, now, 0)
            made = self._run(chosen, now, drawn[-1], torch.ones_like(drawn[-1]), True)
            self._set(chosen, made.states, now, 1)
        return torch.stack(drawn, 1) if drawn else self.state.new_zeros(len(self.time), 0, self.model.features)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of where the series stand."""
        return {name: getattr(self, name).clone() for name in _STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes back to where a stream of this model and size stood."""
        if missing := [name for name in _STATE if name not in state]:
            raise ValueError(f"state: expected {', '.join(_STATE)}, got no {missing[0]}")
        for name in _STATE:
            if state[name].shape != getattr(self, name).shape:
                expected, came = list(getattr(self, name).shape), list(state[name].shape)
                raise ValueError(f"{name}: expected {expected} like this stream's, got {came}")
            if not bool(state[name].isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        for name in _STATE:
            getattr(self, name).copy_(state[name])

    def _arguments(self, series: Series, time: float | Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """(series [k], times [k]), checked."""
        n, device = len(self.time), self.time.device
        chosen = torch.as_tensor(series, device=device)
        if chosen.numel() and (chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.dim() > 1):
            raise ValueError(f"series: expected numbers of series, got {series}")
        chosen = chosen.reshape(-1).long()
        if len(chosen) and not bool(((chosen >= 0) & (chosen < n)).all()):
            raise ValueError(f"series: expected 0 to {n - 1}, got {chosen.tolist()}")
        if len(chosen.unique()) != len(chosen):
            raise ValueError(f"series: expected every series once, got {chosen.tolist()}")
        now = torch.as_tensor(time, dtype=torch.float64, device=device)
        if now.dim() > 1 or now.dim() == 1 and len(now) != len(chosen):
            raise ValueError(
                f"time: expected one number or one for each of {len(chosen)} series, got {list(now.shape)}"
            )
        now = now.expand(len(chosen))
        wrong = ~((now >= self.time[chosen]) & (now < torch.inf))
        if bool(wrong.any()):
            b = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"time: expected a finite one from {self.time[chosen[b]]:g} on, where series {int(chosen[b])} stands, "
                f"got {now[b]:g}"
            )
        return chosen, now

    def _refuse_again(self, chosen: Tensor, now: Tensor) -> None:
        again = (now == self.time[chosen]) & (self.count[chosen] > 0)
        if bool(again.any()):
            b = int(again.nonzero()[0, 0])
            raise ValueError(
                f"time: expected one after the last observation, got {now[b]:g} twice in series {int(chosen[b])}"
            )

    def _ask(self, chosen: Tensor, now: Tensor) -> Filtered:
        nothing = self.state.new_zeros(len(chosen), self.model.features)
        return self._run(chosen, now, nothing, nothing, False)

    def _run(self, chosen: Tensor, now: Tensor, values: Tensor, masks: Tensor, jump: bool) -> Filtered:
        """From where these series are to now, one row each."""
        offsets = torch.arange(len(chosen) + 1, device=chosen.device)
        jumps = torch.full((len(chosen),), jump, device=chosen.device)
        schedule = self.model.schedule(offsets, self.time[chosen], now, now, jumps, horizon=0.0)
        return self.model.integrate(self.state[chosen], schedule, values, masks.to(values.dtype))

    def _set(self, chosen: Tensor, states: Tensor, now: Tensor, observed: int) -> None:
        self.state[chosen], self.time[chosen] = states, now
        self.count[chosen] += observed
