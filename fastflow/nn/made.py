"""Masked networks: a linear layer and an MLP in which an output depends on earlier variables only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.ops import masked
from fastflow.ops.autoregressive import reaches_of
from fastflow.ops.masked import ACTIVATIONS, Activation

__all__ = ["MADE", "MaskedLinear", "hidden_degrees"]


def hidden_degrees(width: int, features: int, context: bool = False) -> Tensor:
    """The degrees 1 ... features - 1, spread over ``width`` hidden units, sorted; from 0 on with a context.

    A unit of degree g knows the first g variables. Fewer units than degrees leave some out: an output then does not
    see the very last variables before it.
    """
    lowest = 0 if context or features == 1 else 1
    count = features - lowest
    return torch.div((torch.arange(width) + 1) * count + width - 1, width, rounding_mode="floor") + lowest - 1


class MaskedLinear(nn.Linear):
    """A linear layer in which output j sees input i where ``out_degrees[j] >= in_degrees[i]``, or > with ``strict``.

    Args:
        in_degrees, out_degrees: of every input and output, integers in any order.
        strict: of an output layer.

    >>> layer = MaskedLinear([1, 2, 3], [3, 1, 2], strict=True)
    >>> layer(torch.randn(4, 3)).shape, layer.mask.int().tolist()
    (torch.Size([4, 3]), [[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    """

    def __init__(
        self,
        in_degrees: Sequence[int] | Tensor,
        out_degrees: Sequence[int] | Tensor,
        bias: bool = True,
        strict: bool = False,
    ) -> None:
        inside, outside = torch.as_tensor(in_degrees).long(), torch.as_tensor(out_degrees).long()
        super().__init__(len(inside), len(outside), bias)
        inside, outside = inside.sort(stable=True), outside.sort(stable=True)
        reach = torch.searchsorted(inside.values, outside.values, right=not strict)
        # the units sorted by degree, and the way back; None where they are sorted as they come
        for name, indices in (("_columns", inside.indices), ("_rows", outside.indices)):
            self.register_buffer(name, None if _identity(indices) else indices)
        self.register_buffer("_back", None if self._rows is None else self._rows.argsort())
        self.register_buffer("_reach", reach)

    @property
    def mask(self) -> Tensor:
        """[m, n], bool."""
        mask = masked.staircase(self._reach, self.in_features)
        mask = mask if self._columns is None else mask[:, self._columns.argsort()]
        return mask if self._back is None else mask[self._back]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = _permuted(self.weight, self._rows, self._columns), _taken(self.bias, self._rows)
        y = ops.masked_linear(_taken(x, self._columns, 1), weight, bias, self._reach)
        return _taken(y, self._back, 1)


class Network(NamedTuple):
    """What :func:`fastflow.ops.masked_mlp` and :func:`fastflow.ops.autoregressive_inverse` take of a MADE."""

    weights: list[Tensor]
    starts: list[Tensor]
    direct: Tensor | None


class MADE(nn.Module):
    r"""Masked autoencoder: the ``params`` outputs of a variable depend on the variables before it, and the context.

    Weights are kept in the order of the autoregression: column d of the first layer is that of variable ``order[d]``,
    and the rows ``params * d ...`` of the last are its outputs.

    Args:
        features: D.
        hidden: the widths of the hidden layers; () is a linear model.
        params: how many outputs each variable has.
        order: the variables in the order of the autoregression; None is 0, 1, ..., "reversed" ..., 1, 0.
        degrees: of the hidden units; how many variables each knows. "sequential" spreads 1 ... D - 1 evenly (a width
            below D - 1 then leaves some out); "random" draws each between the lowest degree of the layer before and
            D - 1; or a sequence of tensors, one for each hidden layer. With a context there are also units of degree
            0, which know it alone, so that the first variable depends on it.
        seed: of the random degrees.
        num_masks: more than 1 is order-agnostic training: :meth:`resample` goes on to the next of so many draws, each
            with random degrees and, with ``resample_order``, a random order of its own. Draw i is made of the seed and
            i; which draw it is, and all it drew, is in the ``state_dict``.
        context_features: P of a context [B, P]. It enters linearly before the first activation and, in a residual
            block, between its layers.
        context_activation: the activation is applied to the context's part in the first layer (as nflows has it).
        activation: "relu", "tanh", "softplus", "elu" or "silu".
        residual: ``hidden`` is a first layer and then blocks of two layers, each added to what came before.
        direct: a masked linear layer from the variables to the outputs besides.
        packing: of the result. "chunked" is all first outputs, then all second ones; "interleaved" has those of a
            variable side by side.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Paper: https://arxiv.org/abs/1502.03509.

    >>> made = MADE(3, hidden=(16,), params=2)
    >>> made(torch.randn(5, 3)).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        params: int = 2,
        order: Literal["reversed"] | Sequence[int] | Tensor | None = None,
        degrees: Literal["sequential", "random"] | Sequence[Tensor] = "sequential",
        seed: int = 0,
        num_masks: int = 1,
        resample_order: bool = True,
        context_features: int = 0,
        context_activation: bool = False,
        activation: Activation = "relu",
        residual: bool = False,
        direct: bool = False,
        packing: Literal["chunked", "interleaved"] = "chunked",
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        _check_options(features, hidden, params, activation, packing, residual, degrees, num_masks, context_features)
        self.features, self.hidden, self.params, self.context_features = features, hidden, params, context_features
        self.num_masks, self.resample_order, self.random = num_masks, resample_order, degrees == "random"
        self.context_activation, self.activation, self.packing, self.residual = (
            context_activation, activation, packing, residual,
        )  # fmt: skip
        widths = (features, *hidden, params * features)
        self.linears = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths, widths[1:], strict=False))
        if residual:  # a block starts as almost nothing
            for linear in self.linears[2:-1:2]:
                nn.init.uniform_(linear.weight, -1e-3, 1e-3)
                nn.init.uniform_(linear.bias, -1e-3, 1e-3)
        self.direct = nn.Linear(features, params * features, bias=False) if direct else None
        # layers that see the context: the first, and the first of every block
        self._seeing = [0, *range(1, len(hidden), 2)] if residual else [0]
        self.contexts = nn.ModuleList(
            nn.Linear(context_features, widths[i + 1], bias=context_activation)
            for i in (self._seeing if context_features else ())
        )
        self.register_buffer("order", _order(order, features))
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("draw", torch.tensor(0))
        # of this draw: which variable of ``order`` comes d-th, and the degrees of the units as they are stored
        self.register_buffer("shuffle", torch.arange(features))
        if not isinstance(degrees, str):
            given = [torch.as_tensor(d).long() for d in degrees]
            _check_degrees(given, hidden, features)
        elif degrees == "sequential" and num_masks == 1:
            given = [hidden_degrees(width, features, context_features > 0) for width in hidden]
        else:
            given = self._drawn(0)
        for i, degree in enumerate(given):
            self.register_buffer(f"degrees_{i}", degree)
        self._derive()

    # --- masks ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def resample(self, index: int | None = None) -> None:
        """Takes the next of ``num_masks`` draws, or that of this index."""
        index = (int(self.draw) + 1 if index is None else index) % self.num_masks
        if self.num_masks == 1:
            return
        degrees = self._drawn(index)
        self.draw.fill_(index)
        for i, degree in enumerate(degrees):
            getattr(self, f"degrees_{i}").copy_(degree)
        self._derive()

    def _drawn(self, index: int) -> list[Tensor]:
        """The degrees of a draw; it also sets the order. With one mask only they are sorted: no unit is special."""
        generator = torch.Generator().manual_seed(int(self.seed) + index)
        if self.num_masks > 1 and self.resample_order:
            self.shuffle.copy_(torch.randperm(self.features, generator=generator))
        lowest, degrees = 0 if self.context_features or self.features == 1 else 1, []
        for width in self.hidden:
            drawn = torch.randint(lowest, max(self.features, lowest + 1), (width,), generator=generator)
            degrees.append(drawn if self.num_masks > 1 else drawn.sort().values)
            lowest = int(drawn.min())
        return degrees

    def _derive(self) -> None:
        """What follows from the degrees: how the units are sorted, and the staircases that the masks then are."""
        counts, last = [], torch.arange(self.features + 1, device=self.order.device)
        variables = None if _identity(self.shuffle) else self.shuffle
        self._set("_variables", variables)
        for i in range(len(self.hidden)):
            degrees = getattr(self, f"degrees_{i}")
            values, indices = degrees.sort(stable=True)
            self._set(f"_units_{i}", None if _identity(indices) else indices)
            counts.append(torch.searchsorted(values, last, right=True))
        counts = torch.stack(counts) if counts else last.new_empty((0, self.features + 1))
        self._set("_counts", counts)
        *reaches, direct = reaches_of(counts, self.hidden, self.features, self.params)
        for i, reach in enumerate(reaches):
            self._set(f"_reach_{i}", reach)
        self._set("_direct_reach", direct)
        outputs = torch.arange(self.params * self.features, device=last.device).view(self.features, self.params)
        self._set("_outputs", None if variables is None else outputs[variables].flatten())
        order = self.order[self.shuffle]
        self._set("_order", None if _identity(order) else order)
        self._set("_back", None if _identity(order) else order.argsort())

    def _set(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.order.is_meta:
            self._derive()

    # --- the network ------------------------------------------------------------------------------------

    @property
    def counts(self) -> Tensor:
        """[L, D + 1]: how many units of hidden layer l have a degree of at most d."""
        return self._counts

    @property
    def reaches(self) -> list[Tensor]:
        """How many of its sorted inputs each sorted unit sees, of every layer."""
        return [getattr(self, f"_reach_{i}") for i in range(len(self.linears))]

    def sort(self, x: Tensor) -> Tensor:
        """The variables [B, D] in the order of the autoregression."""
        self.check(x)
        return _taken(x, self._order, 1)

    def unsort(self, x: Tensor) -> Tensor:
        """The variables [B, D, ...] in their own order again."""
        return _taken(x, self._back, 1)

    def network(self, context: Tensor | None, batch: int) -> Network:
        """The layers with their units sorted by degree; the context is part of what their sums start from."""
        parts = dict(zip(self._seeing, self._contexts(context, batch), strict=False))
        weights, starts, before = [], [], self._variables
        for i, linear in enumerate(self.linears):
            units = getattr(self, f"_units_{i}") if i < len(self.hidden) else self._outputs
            start = linear.bias if i not in parts else linear.bias + parts[i]
            weights.append(_permuted(linear.weight, units, before))
            starts.append(_taken(start, units, -1))
            before = units
        direct = None if self.direct is None else _permuted(self.direct.weight, self._outputs, self._variables)
        return Network(weights, starts, direct)

    def _contexts(self, context: Tensor | None, batch: int) -> list[Tensor]:
        if not self.context_features:
            return []
        if context is None or tuple(context.shape) != (batch, self.context_features):
            got = "None" if context is None else list(context.shape)
            raise ValueError(f"context: expected [{batch}, {self.context_features}], got {got}")
        parts = [layer(context) for layer in self.contexts]
        if self.context_activation:
            parts[0] = masked.activate(ACTIVATIONS.index(self.activation), parts[0])
        return parts

    def sorted_forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs [B, D * params] for variables in the order of the autoregression, those of each side by side."""
        weights, starts, direct = self.network(context, len(x))
        return ops.masked_mlp(
            x,
            weights,
            starts,
            self.reaches,
            activation=self.activation,
            residual=self.residual,
            direct=direct,
            direct_reach=None if direct is None else self._direct_reach,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        params = self.sorted_forward(self.sort(x), context).view(len(x), self.features, self.params)
        params = self.unsort(params)
        if self.packing == "chunked" and self.params > 1:
            params = params.transpose(1, 2)
        return params.reshape(len(x), self.params * self.features)

    def inverse(self, z: Tensor, context: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
        """:func:`fastflow.ops.autoregressive_inverse` with this network: (x [B, D], logdet [B])."""
        weights, starts, direct = self.network(context, len(z))
        x, logdet = ops.autoregressive_inverse(
            self.sort(z),
            weights,
            starts,
            self.counts,
            activation=self.activation,
            residual=self.residual,
            direct=direct,
            **options,
        )
        return self.unsort(x), logdet

    def check(self, x: Tensor) -> None:
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x: expected [B, {self.features}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.features}, hidden={self.hidden}, params={self.params}, activation={self.activation}"


# --- small things -----------------------------------------------------------------------------------


def _identity(indices: Tensor) -> bool:
    return torch.equal(indices, torch.arange(len(indices), device=indices.device))


def _taken(x: Tensor | None, indices: Tensor | None, dim: int = 0) -> Tensor | None:
    return x if x is None or indices is None else x.index_select(dim, indices)


def _permuted(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return _taken(_taken(weight, rows), columns, 1)


def _order(order: str | Sequence[int] | Tensor | None, features: int) -> Tensor:
    if order is None:
        return torch.arange(features)
    if isinstance(order, str):
        if order != "reversed":
            raise ValueError(f"order: expected None, 'reversed' or a permutation, got {order!r}")
        return torch.arange(features - 1, -1, -1)
    order = torch.as_tensor(order)
    whole = order.dim() == 1 and not order.is_floating_point()
    if not whole or not torch.equal(order.long().sort().values, torch.arange(features)):
        raise ValueError(f"order: expected each of 0 ... {features - 1} once, got {order.tolist()}")
    return order.long().clone()


def _check_options(features, hidden, params, activation, packing, residual, degrees, num_masks, context_features):
    for name, value, least in (
        ("features", features, 1), ("params", params, 1), ("num_masks", num_masks, 1),
        ("context_features", context_features, 0), *(("hidden", width, 1) for width in hidden),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if packing not in ("chunked", "interleaved"):
        raise ValueError(f"packing: expected 'chunked' or 'interleaved', got {packing!r}")
    if isinstance(degrees, str) and degrees not in ("sequential", "random"):
        raise ValueError(f"degrees: expected 'sequential', 'random' or tensors, got {degrees!r}")
    if residual and (len(hidden) % 2 == 0 or len(set(hidden)) > 1):
        raise ValueError(
            f"hidden: residual blocks of two layers after a first one need an odd number of equal widths, got {hidden}"
        )
    if residual and (degrees == "random" or num_masks > 1):
        raise ValueError("degrees: the units of a residual block need the degrees of those they are added to; "
                         "random degrees do not have that")  # fmt: skip


def _check_degrees(degrees: list[Tensor], hidden: tuple[int, ...], features: int) -> None:
    if [tuple(d.shape) for d in degrees] != [(width,) for width in hidden]:
        shapes = [list(d.shape) for d in degrees]
        raise ValueError(f"degrees: expected a tensor for each width in {hidden}, got {shapes}")
    for i, degree in enumerate(degrees):
        if int(degree.min()) < 0 or int(degree.max()) > max(features - 1, 0):
            raise ValueError(f"degrees[{i}]: expected 0 ... {features - 1}, got {degree.tolist()}")
