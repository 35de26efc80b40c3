"""GRU-ODE-Bayes: a filter of time series observed at irregular times, a few channels at a time.

De Brouwer et al., 2019, https://arxiv.org/abs/1905.12374. Streams of observations: ``gru_ode_stream.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.models.gru_ode_stream import GRUODEStream
from fastflow.nn.clock import CLOCKS, TOLERANCE, Clock, between, until
from fastflow.nn.gru_ode import Channels, GRUODECell, Jump, PostLoss
from fastflow.nn.observations import OBSERVED, TARGET, Observations
from fastflow.ops.gru_ode import Cell, Filtered, Gru, Observe, Prep, Schedule, gru_ode_filter
from fastflow.ops.observations import equal_steps

__all__ = ["PRESETS", "GRUODEBayes", "Scores"]

PRESETS: dict[str, dict[str, Any]] = {
    # edebrouwer/gru_ode_bayes, the scripts of its experiments
    "double-ou": {"features": 2, "covariates": 1, "covariates_hidden": 1, "step": 0.05, "horizon": 10.0},
    "brusselator": {"features": 2, "covariates": 1, "covariates_hidden": 1, "step": 0.05, "horizon": 50.0},
    "climate": {"features": 5, "covariates": 1, "prep_hidden": 10, "step": 0.1, "horizon": 200.0, "dropout": 0.2},
}


class Scores(NamedTuple):
    """Of every series, over what is scored in it; [B] each. Sums over all series, divided by that of the counts, are
    the figures of the literature."""

    log_likelihood: Tensor
    squared_error: Tensor
    count: Tensor


class GRUODEBayes(nn.Module):
    r"""A hidden state h with :math:`dh/dt = (1 - z) \odot (u - h)` between observations, a GRU on them.

    At an observation the state first predicts every channel, :math:`p(h)`: a mean and the logarithm of a variance, or a
    logit; then it jumps, :math:`h \to GRU(prep(y, p(h)), h)`. What is minimised is, over all that is observed,

    .. math:: -\log p_{pre}(y) + \lambda \, L_{post}, \qquad L_{post} = KL(p_{post} || N(y, \sigma_{obs}^2))
        \text{ or } KL(p_{Bayes} || p_{post})

    with :math:`p_{Bayes} \propto p_{pre} N(y, \sigma_{obs}^2)`. Series are given as :class:`fastflow.nn.Observations`
    or as the tensor of its ``to_tensor``, [B, L, 1 + 2D + C], and all of them are filtered in one call.

    Args:
        features: D.
        covariates: C, of a series: its first state is a function of them; 0: none, all series begin alike.
        hidden: H, of the state. p_hidden, prep_hidden, covariates_hidden: of the networks p, prep (per channel) and
            that of the covariates.
        cell: z and u are those of a "full" GRU, or of the "minimal" one without a reset gate.
        impute: feed p(h) to the differential equation; without, it has no input and no bias, and h = 0 is at rest.
        solver: "euler" or "midpoint" with steps of ``step``, or "dopri5" with tolerances ``rtol`` and ``atol``.
        clock: "exact" or "legacy", :mod:`fastflow.nn.clock`; the latter repeats the published code.
        mixing: lambda: 1e-4 belongs to the post_loss "code"; "paper" is smaller by orders, and wants about 1.
        post_loss: "code", the first of the two, as published code has it, or "paper", the second.
        observation_std: :math:`\sigma_{obs}`; for binary channels the chance that an observation is wrong.
        binary: the channels that are 0 or 1, with Bernoulli predictions; their second parameter only scales what prep
            is told of the error.
        dropout: in all of these networks but prep while training; not with impute.
        horizon: T, until which the final state goes on; None: it is that after the last observation.
        classes: of a classifier of the final state, :meth:`classify`; 0: none. classes_hidden: its hidden layer.

    Raises:
        ValueError: a setting, or observations that are not as they should be; the message says which.
        fastflow.SolverError: a state that is not finite, a step that underflows.

    >>> model = GRUODEBayes(features=2, hidden=8)
    >>> seen = Observations.from_lists([[0.2, 1.0], [0.5]], [[[1.0, 0.0], [2.0, 3.0]], [[0.0, 1.0]]])
    >>> model(seen).shape, model(seen.to_tensor()).shape
    (torch.Size([2]), torch.Size([2]))
    >>> mean, std = model.forecast(seen, [0.7, 1.5, 2.0])
    >>> mean.shape, std.shape
    (torch.Size([2, 3, 2]), torch.Size([2, 3, 2]))
    >>> stream = model.stream(2)
    >>> _ = stream.observe(0, 0.2, [1.0, 0.0])
    >>> stream.predict(0.7)[0].shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        features: int,
        covariates: int = 0,
        hidden: int = 50,
        p_hidden: int = 25,
        prep_hidden: int = 25,
        *,
        covariates_hidden: int = 50,
        cell: Literal["full", "minimal"] = "full",
        impute: bool = False,
        solver: Literal["euler", "midpoint", "dopri5"] = "euler",
        step: float = 0.05,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        clock: Clock = "exact",
        mixing: float = 1e-4,
        post_loss: PostLoss = "code",
        observation_std: float = 1e-2,
        binary: Sequence[int] = (),
        dropout: float = 0.0,
        horizon: float | None = None,
        classes: int = 0,
        classes_hidden: int = 2,
    ) -> None:
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")} | {"binary": tuple(binary)}
        sizes = ("features", "hidden", "p_hidden", "prep_hidden", "covariates_hidden", "classes_hidden")
        for name, least in (*((size, 1) for size in sizes), ("covariates", 0), ("classes", 0), ("mixing", 0)):
            if not self.config[name] >= least:
                raise ValueError(f"{name}: expected at least {least}, got {self.config[name]}")
        for name, allowed in (
            ("solver", ("euler", "midpoint", "dopri5")),
            ("clock", CLOCKS),
            ("post_loss", ("code", "paper")),
        ):
            if self.config[name] not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {self.config[name]!r}")
        if not 0 <= dropout < 1 or dropout and impute:
            also = " with impute, whose equation has p in it: 0" if impute else ""
            raise ValueError(f"dropout: expected a number from 0 to below 1{also}, got {dropout}")
        if not 0 < step < math.inf:
            raise ValueError(f"step: expected a positive number, got {step}")
        if horizon is not None and not 0 <= horizon < math.inf:
            raise ValueError(f"horizon: expected a number of at least 0 or None, got {horizon}")
        self.features, self.covariates, self.hidden = features, covariates, hidden
        self.impute, self.solver, self.step, self.rtol, self.atol = impute, solver, step, rtol, atol
        self.clock, self.horizon = clock, horizon
        self.mixing, self.post_loss, self.observation_std = mixing, post_loss, observation_std
        self.channels = Channels(features, binary, observation_std)
        self.cell = GRUODECell(hidden, 2 * features if impute else 0, cell)
        self.jump = Jump(features, hidden, prep_hidden)
        self.observe = nn.Sequential(
            nn.Linear(hidden, p_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(p_hidden, 2 * features)
        )
        self.covariates_map = nn.Sequential(
            nn.Linear(max(1, covariates), covariates_hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(covariates_hidden, hidden),
            nn.Tanh(),
        )
        self.classifier = None
        if classes:
            self.classifier = nn.Sequential(
                nn.Linear(hidden, classes_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(classes_hidden, classes)
            )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.constant_(layer.bias, 0.05)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GRUODEBayes:
        """A published configuration by name (``PRESETS``), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what the published code saved: the ``state_dict`` of its ``NNFOwithBayesianJumps``."""
        full, own = self.cell.kind == "full", {}
        gates = [f"gru_c.lin_h{gate}.weight" for gate in ("rzh" if full else "zn")]
        taken = {"cell.hidden_weight": gates}
        if self.impute:
            inputs = ("x",) if full else ("xz", "xn")
            taken |= {f"cell.input_{kind}": [f"gru_c.lin_{x}.{kind}" for x in inputs] for kind in ("weight", "bias")}
        networks = {"observe": "p_model", "covariates_map": "covariates_map", "classifier": "classification_model"}
        for name in self.state_dict():
            network, _, rest = name.partition(".")
            if network in networks:
                taken[name] = [f"{networks[network]}.{rest}"]
            elif network == "jump":
                published = (
                    rest.replace("gru.", "gru_d.").replace("prep_weight", "w_prep").replace("prep_bias", "bias_prep")
                )
                taken[name] = [f"gru_obs.{published}"]
        for name, parts in taken.items():
            if missing := [part for part in parts if part not in state]:
                raise ValueError(f"state: expected {missing[0]} for a {self.cell.kind} cell, got {', '.join(state)}")
            own[name] = torch.cat([state[part] for part in parts])
        self.load_state_dict(own)

    # --- the filter -----------------------------------------------------------------------------------

    def filter(self, x: Tensor | Observations, to_horizon: bool = True) -> Filtered:
        """(pre, post [N, 2D], state [B, H], states [N, H], steps): the predictions p(h) before and after every row, the
        state at the horizon and those after every row, what the solver did. Rows are those of ``Observations``.

        A row of which only targets are known is read and nothing jumps; one of which nothing is known jumps. Without
        ``to_horizon`` the state is that after the last row.
        """
        return self._filter(self.observations(x), to_horizon)

    def _filter(self, observations: Observations, to_horizon: bool = False) -> Filtered:
        offsets, times, values, masks, covariates = observations
        start, horizon = self.initial(covariates), (to_horizon and self.horizon) or 0.0
        if self.solver == "dopri5" or self.clock == "exact":
            step = 0.0 if self.solver == "dopri5" else self.step
            if (steps := equal_steps(offsets, times, masks, step, horizon, TOLERANCE)) is not None:
                *segments, seen = steps
                return self.integrate(start, Schedule(offsets, *segments), values, seen)
        seen = masks == OBSERVED
        jumps = seen.any(1) | ~(masks == TARGET).any(1)
        before = F.pad(times, (1, 0))  # [N + 1]: of every row the time of the row before
        last = torch.where(offsets.diff() > 0, before[offsets[1:]], 0)
        previous = before.index_fill(0, offsets, 0)[:-1]  # a first row has none
        schedule = self.schedule(offsets, previous, times, last, jumps, horizon)
        return self.integrate(start, schedule, values, seen.to(start.dtype))

    def schedule(
        self, offsets: Tensor, previous: Tensor, times: Tensor, last: Tensor, jumps: Tensor, horizon: float
    ) -> Schedule:
        """Solver steps from the ``previous`` times [N] to those of the rows, from the ``last`` [B] to the horizon."""
        if self.solver == "dopri5":  # takes its own steps
            gaps = torch.cat((times - previous, (horizon - last).clamp(min=0)))
            return Schedule(offsets, (gaps > 0).long(), gaps, jumps)
        parts = between(previous, times, self.step, self.clock), until(last, horizon, self.step, self.clock)
        return Schedule(offsets, *(torch.cat(pair) for pair in zip(*parts, strict=True)), jumps)

    def integrate(self, start: Tensor, schedule: Schedule, values: Tensor, masks: Tensor) -> Filtered:
        """The native call: from the states ``start`` [B, H] through all rows."""
        first, _, drop, second = self.observe
        dropout = None
        if self.training and drop.p > 0:  # of each of the two predictions of a row
            dropout = F.dropout(start.new_ones(len(values), 2, len(first.weight)), drop.p)
        cell, gru = self.cell, self.jump.gru
        return gru_ode_filter(
            start,
            schedule,
            values,
            masks,
            Cell(cell.hidden_weight, cell.input_weight, cell.input_bias, cell.kind),
            Observe(first.weight, first.bias, second.weight, second.bias),
            Prep(self.jump.prep_weight, self.jump.prep_bias),
            Gru(gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh),
            dropout=dropout,
            method=self.solver,
            impute=self.impute,
            rtol=self.rtol,
            atol=self.atol,
        )

    def observations(self, x: Tensor | Observations) -> Observations:
        """x as the model takes it: checked, in the dtype and on the device of the parameters."""
        weight = self.cell.hidden_weight
        x = x.checked() if isinstance(x, Observations) else Observations.from_tensor(x, self.features)
        if not (x.rows or x.features):  # lists without a row do not tell how many channels there are
            x = x._replace(values=x.values.new_zeros(0, self.features), masks=x.masks.new_zeros(0, self.features))
        if x.values.shape[1] != self.features or x.covariates.shape[1] != self.covariates:
            raise ValueError(
                f"x: expected {self.features} channels and {self.covariates} covariates, got "
                f"{x.values.shape[1]} and {x.covariates.shape[1]}"
            )
        self.channels.check(x.values, x.masks)
        return x.to(weight.device, weight.dtype)

    def initial(self, covariates: Tensor) -> Tensor:
        """h(0) [B, H] in (-1, 1)"""
        first, _, drop, second, _ = self.covariates_map
        x = covariates if self.covariates else covariates.new_zeros(len(covariates), 1)
        a = torch.relu(F.linear(x, first.weight, first.bias))
        a = F.dropout(a, drop.p) if self.training and drop.p > 0 else a
        return torch.tanh(F.linear(a, second.weight, second.bias))

    # --- likelihoods and losses -----------------------------------------------------------------------

    def forward(self, x: Tensor | Observations, context: None = None) -> Tensor:
        """The log-likelihood [B] in nats of all that is observed, each predicted from what is observed before it, and
        of targets."""
        return self.scores(x, targets=False).log_likelihood

    def log_prob(self, x: Tensor | Observations, context: None = None) -> Tensor:
        """As :meth:`forward`."""
        return self(x)

    def evaluate(self, x: Tensor | Observations) -> Tensor:
        """The log-likelihood [B] of the targets; where the batch has none, of all that is observed, one step ahead."""
        return self.scores(x).log_likelihood

    def scores(self, x: Tensor | Observations, targets: bool = True) -> Scores:
        """Log-likelihoods, squared errors of the means and numbers of the targets, or, where the batch has none or
        without ``targets``, of all that is not missing."""
        observations = self.observations(x)
        scored = observations.masks == TARGET
        if not (targets and bool(scored.any())):
            scored = observations.masks != 0
        pre = self._filter(observations).pre
        squared = (self.channels.moments(pre)[0] - observations.values).square()
        parts = self.channels.log_prob(pre, observations.values), squared, torch.ones_like(squared)
        return Scores(*(observations.total(torch.where(scored, part, 0)) for part in parts))

    def metrics(self, x: Tensor | Observations) -> dict[str, Tensor]:
        """The squared errors of :meth:`scores`, [B], for a training loop to report beside the likelihood."""
        return {"MSE": self.scores(x).squared_error}

    def loss(self, x: Tensor | Observations, progress: float = 0.0) -> Tensor:
        """What is minimised, [B]: -log p before the jumps + mixing * the loss after them."""
        observations = self.observations(x)
        seen, scored = observations.masks == OBSERVED, observations.masks != 0
        pre, post, *_ = self._filter(observations)
        cost = torch.where(scored, -self.channels.log_prob(pre, observations.values), 0)
        if self.mixing:
            after = self.channels.post_loss(pre, post, observations.values, self.post_loss)
            cost = cost + self.mixing * torch.where(seen, after, 0)
        return observations.total(cost)

    def classify(self, x: Tensor | Observations) -> Tensor:
        """Logits [B, classes] from the state at the horizon; a cross entropy of them can be added to :meth:`loss`."""
        if self.classifier is None:
            raise ValueError("classes: expected a model with classes, got one with 0")
        return self.classifier(self.filter(x).state)

    def initialize(self, batch: Tensor, context: None = None) -> None:
        """Nothing here is set by data."""

    # --- forecasts, samples, streams ------------------------------------------------------------------

    def forecast(self, x: Tensor | Observations, times: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, T, D] at times [T] or [B, T], each from what is observed before that time.

        What is observed later changes nothing; what is observed at that very time neither. Targets are not looked at.
        """
        observations = self.observations(x)
        b, d = observations.batch, self.features
        asked = torch.as_tensor(times, dtype=torch.float64, device=observations.times.device)
        if asked.dim() not in (1, 2) or asked.dim() == 2 and len(asked) != b:
            raise ValueError(f"times: expected [T] or [{b}, T], got {list(asked.shape)}")
        if not bool((good := (asked >= 0) & (asked < torch.inf)).all()):
            raise ValueError(f"times: expected finite ones from 0 on, got {asked[~good][0]:g}")
        asked, t = asked.expand(b, asked.shape[-1]).flatten(), asked.shape[-1]
        series = torch.arange(b, device=asked.device).repeat_interleave(t)
        stamps, owner = torch.cat((asked, observations.times)), torch.cat((series, observations.series))
        order = torch.argsort(stamps, stable=True)  # a question comes before the observation of the same time
        order = order[torch.argsort(owner[order], stable=True)]

        def merged(question: float, rows: Tensor) -> Tensor:
            return torch.cat((rows.new_full((len(asked), d), question), rows))[order]

        both = Observations(
            torch.cat((observations.offsets.new_zeros(1), torch.bincount(owner, minlength=b).cumsum(0))),
            stamps[order],
            merged(0.0, observations.values),
            merged(TARGET, observations.masks),
            observations.covariates,
        )
        pre = self._filter(both).pre
        pre = pre[torch.argsort(order)[: len(asked)]].view(b, t, 2 * d)
        return self.channels.moments(pre)

    def stream(self, n: int = 1, covariates: Tensor | None = None) -> GRUODEStream:
        """``n`` series at their beginning, with covariates [n, C], to be observed one at a time."""
        return GRUODEStream(self, n, covariates)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        times: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """n series with covariates ``context`` [n, C], as a tensor [n, L, 1 + 2D + C] of fully observed rows.

        At each of the ``times`` [L] (default: 50, evenly up to the horizon) a value is drawn from the prediction and
        observed. The temperature multiplies standard deviations.
        """
        if times is None:
            if self.horizon is None:
                raise ValueError("times: expected the times of the samples for a model without horizon, got none")
            times = torch.linspace(0, self.horizon, 51, dtype=torch.float64)[1:]
        stream = self.stream(n, context)
        values = stream.sample(times, temperature, generator)
        rows = values.new_empty(n, values.shape[1], 1 + 2 * self.features + self.covariates)
        rows[..., 0] = torch.as_tensor(times)
        rows[..., 1 : 1 + self.features] = values
        rows[..., 1 + self.features : 1 + 2 * self.features] = OBSERVED
        rows[..., 1 + 2 * self.features :] = stream.covariates[:, None]
        return rows
