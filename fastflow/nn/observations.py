"""Batches of time series that are observed at times of their own, a few channels at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.ops.observations import checked_values

__all__ = ["MISSING", "OBSERVED", "TARGET", "Observations"]

MISSING, OBSERVED, TARGET = 0, 1, 2


class Observations(NamedTuple):
    """B series with N observations in all, one row for every time at which something is known of a series.

    Rows are sorted by series, and by time within a series; those of series b begin at ``offsets[b]`` and end before
    ``offsets[b + 1]``. A mask says what is known of a channel at that time: 0, missing: the value there means nothing;
    1, observed; 2, the target of a forecast: predicted and scored, but never shown to the filter.

    :meth:`from_lists` and :meth:`from_tensor` make and check them. A training loop wants one tensor, :meth:`to_tensor`,
    [B, L, 1 + 2D + C]: of every row its time, D values, D masks and the C covariates of its series; shorter series end
    in rows with time infinity and zeros. Times in float32 are exact to 7 digits.

    >>> made = Observations.from_lists([[0.5, 2.0], []], [[[1.0, 0.0], [2.0, 3.0]], []], [[[1, 0], [1, 1]], []])
    >>> made.offsets, made.times
    (tensor([0, 2, 2]), tensor([0.5000, 2.0000], dtype=torch.float64))
    >>> made.to_tensor().shape
    torch.Size([2, 2, 5])
    """

    offsets: Tensor
    """[B + 1], int64"""
    times: Tensor
    """[N], float64, from 0 on"""
    values: Tensor
    """[N, D], zero where missing"""
    masks: Tensor
    """[N, D] of 0, 1 and 2, in the dtype of the values"""
    covariates: Tensor
    """[B, C]"""

    @property
    def batch(self) -> int:
        """B"""
        return len(self.offsets) - 1

    @property
    def features(self) -> int:
        """D"""
        return self.values.shape[1]

    @property
    def series(self) -> Tensor:
        """[N], int64: the series of every row"""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.batch, device=lengths.device), lengths, output_size=self.rows)

    @property
    def rows(self) -> int:
        """N"""
        return len(self.times)

    @property
    def positions(self) -> Tensor:
        """[N], int64: the number of every row within its series"""
        return torch.arange(self.rows, device=self.offsets.device) - self.offsets[self.series]

    @classmethod
    def from_lists(
        cls,
        times: Sequence[Any],
        values: Sequence[Any],
        masks: Sequence[Any] | None = None,
        covariates: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Observations:
        """From B series: times [N_b], values [N_b, D] and masks like these (default: 1 where the value is not NaN).

        Covariates are [B, C]. Series and rows are lists or tensors.

        Raises:
            ValueError: times that are not sorted, occur twice in a series, lie before 0 or are not finite; NaN or
                infinity where something is observed or in a covariate; shapes that do not fit. The message names series
                and times.
        """
        dtype = dtype or torch.get_default_dtype()
        for name, given in (("values", values), ("masks", masks), ("covariates", covariates)):
            if given is not None and len(given) != len(times):
                raise ValueError(f"{name}: expected those of {len(times)} series like the times, got {len(given)}")
        clocks = [torch.as_tensor(t, dtype=torch.float64).reshape(-1) for t in times]
        tables = [torch.as_tensor(v, dtype=dtype) for v in values]
        width = next((v.shape[-1] for v in tables if v.dim() == 2), 0)
        tables = [v if v.dim() == 2 else v.reshape(0, width) if not v.numel() else v for v in tables]
        for b, (t, v) in enumerate(zip(clocks, tables, strict=True)):
            if v.shape != (len(t), width):
                raise ValueError(f"values: expected [{len(t)}, {width or 'D'}] for series {b}, got {list(v.shape)}")
        if masks is None:
            known = [(~v.isnan()).to(dtype) for v in tables]
        else:
            known = [torch.as_tensor(m, dtype=dtype).reshape(-1, width) for m in masks]
        for b, (m, v) in enumerate(zip(known, tables, strict=True)):
            if m.shape != v.shape:
                raise ValueError(f"masks: expected {list(v.shape)} for series {b} like its values, got {list(m.shape)}")
        lengths = torch.tensor([0, *map(len, clocks)])
        context = torch.zeros(len(clocks), 0) if covariates is None else torch.as_tensor(covariates)
        if context.dim() != 2:
            raise ValueError(f"covariates: expected [{len(clocks)}, C], got {list(context.shape)}")
        rows = [torch.cat(part) if part else torch.zeros(0, width) for part in (tables, known)]
        stamps = torch.cat(clocks) if clocks else torch.zeros(0, dtype=torch.float64)
        return cls(lengths.cumsum(0), stamps, *rows, context.to(dtype)).checked()

    @classmethod
    def from_tensor(cls, x: Tensor, features: int) -> Observations:
        """From the tensor [B, L, 1 + 2D + C] with D ``features``; raises as :meth:`from_lists` does, and where rows
        follow the padding or a series has other covariates in another row."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected Observations or a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] < 1 + 2 * features or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point rows [B, L, {1 + 2 * features} + C] of time, {features} values, as many "
                f"masks and C covariates, got {list(x.shape)} of {x.dtype}"
            )
        times, rest = x[..., 0], x[..., 1:]
        present = times != torch.inf
        lengths = present.sum(1)
        index = present.flatten().nonzero()[:, 0]
        offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        rows = rest.flatten(0, 1)[index]
        parts = rows.split((features, features, rest.shape[2] - 2 * features), 1)
        values, masks, covariates = (part.contiguous() for part in parts)
        # a series without rows has its covariates in the first row of its padding
        first = rest[:, 0, 2 * features :].contiguous() if x.shape[1] else rest.new_zeros(len(x), covariates.shape[1])
        made = cls(offsets, times.flatten()[index].double(), values, masks, first)
        series = made.series
        if len(index) and bool((index - series * x.shape[1] != made.positions).any()):
            b = int(series[(index - series * x.shape[1] != made.positions).nonzero()[0, 0]])
            raise ValueError(
                f"x: expected padding, rows of time infinity, at the end only, got a row after it in series {b}"
            )
        if covariates.shape[1] and bool((same := (covariates == first[series]).all(1)).logical_not().any()):
            r = int(same.logical_not().nonzero()[0, 0])  # NaN is not equal either
            raise ValueError(
                f"covariates: expected the same finite ones in every row of series {int(series[r])}, got "
                f"{covariates[r].tolist()} at time {made.times[r]:g} after {first[series[r]].tolist()}"
            )
        return made.checked()

    def to_tensor(self) -> Tensor:
        """[B, L, 1 + 2D + C], L the rows of the longest series, at least one, in the dtype of the values."""
        b, d = self.batch, self.features
        longest = max(1, int(self.offsets.diff().max())) if b else 1
        x = self.values.new_zeros(b, longest, 1 + 2 * d + self.covariates.shape[1])
        x[..., 0] = torch.inf
        x[:, 0, 1 + 2 * d :] = self.covariates
        series = self.series
        rows = (self.times[:, None].to(x.dtype), self.values, self.masks, self.covariates[series])
        x[series, self.positions] = torch.cat(rows, 1)
        return x

    def total(self, rows: Tensor) -> Tensor:
        """[B]: of something [N, D] that belongs to the rows the sum over those of every series and over D."""
        return rows.new_zeros(self.batch).index_add(0, self.series, rows.sum(1))

    def to(self, *args: Any, **kwargs: Any) -> Observations:
        """On another device or in another dtype; offsets and times keep theirs."""
        values, masks, covariates = (t.to(*args, **kwargs) for t in self[2:])
        return Observations(self.offsets.to(values.device), self.times.to(values.device), values, masks, covariates)

    def checked(self) -> Observations:
        """With zeros for what is missing, if everything is as it should be; raises as :meth:`from_lists` does."""
        for name, given in zip(self._fields, self, strict=True):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}; from_lists takes lists")
        times, values, masks = self.times, self.values, self.masks
        b, n, d = self.batch, self.rows, values.shape[-1]
        wanted = [(b + 1,), (n,), (n, d), (n, d), (b, self.covariates.shape[-1])]
        shapes = [t.shape for t in self]
        if b < 0 or shapes != wanted or self.offsets.dtype != torch.int64 or times.dtype != torch.float64:
            raise ValueError(
                "x: expected int64 offsets, float64 times, values, masks and covariates of the shapes "
                f"{[*map(list, wanted)]}, got {[*map(list, shapes)]} with offsets of {self.offsets.dtype} and times of "
                f"{times.dtype}"
            )
        if (clean := checked_values(*self)) is not None:
            return self._replace(values=clean)
        # what the compiled library does not look at, and what is wrong
        if bool((self.offsets[0] != 0) | (self.offsets[-1] != n) | (self.offsets.diff() < 0).any()):
            raise ValueError(f"offsets: expected to rise from 0 to {n}, got {self.offsets.tolist()[:8]} ...")

        def complain(name: str, wrong: Tensor, expected: str, what: Tensor) -> None:
            r = int(wrong.nonzero()[0, 0])
            b = int(self.series[r])
            raise ValueError(f"{name}: expected {expected}, got {what[r].tolist()} in series {b} at time {times[r]:g}")

        missing = masks == MISSING
        values = torch.where(missing, 0, values)
        strange = ~(missing | (masks == OBSERVED) | (masks == TARGET))
        gaps = torch.full((n + 1,), torch.inf, dtype=times.dtype, device=times.device)
        torch.sub(times[1:], times[:-1], out=gaps[1:n])
        gaps = gaps.index_fill_(0, self.offsets, torch.inf)[:n]  # a first row has none
        # x - x is 0 or NaN; one look at all of it: each look at a device's memory stops the device
        unbounded = (values - values).any() | (times - times).any() | (self.covariates - self.covariates).any()
        if bool(strange.any() | unbounded | (times < 0).any() | ~(gaps > 0).all()):
            early, not_finite = ~(times >= 0) | (times == torch.inf), ~values.isfinite()
            if bool(early.any()):
                r = int(early.nonzero()[0, 0])
                raise ValueError(
                    f"times: expected finite ones from 0 on, got {times[r]:g} in series {int(self.series[r])}"
                )
            if bool((gaps < 0).any()):
                r = int((gaps < 0).nonzero()[0, 0])
                b = int(self.series[r])
                raise ValueError(f"times: expected sorted ones, got {times[r]:g} after {times[r - 1]:g} in series {b}")
            if bool((gaps == 0).any()):
                r = int((gaps == 0).nonzero()[0, 0])
                raise ValueError(
                    f"times: expected one row for a time, got {times[r]:g} twice in series {int(self.series[r])}"
                )
            if bool(strange.any()):
                complain("masks", strange, "0 (missing), 1 (observed) or 2 (target)", masks)
            if bool(not_finite.any()):
                complain("values", not_finite, "finite numbers where the mask is not 0", self.values)
            b = int((~self.covariates.isfinite()).nonzero()[0, 0])
            raise ValueError(f"covariates: expected finite ones, got {self.covariates[b].tolist()} for series {b}")
        return self._replace(values=values)
