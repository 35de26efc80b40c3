"""Affine and additive coupling layers: part of x changes, by parameters a network makes from the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastflow import ops
from fastflow.nn.base import Bijection
from fastflow.ops.coupling import checkerboard
from fastflow.ops.scale_map import ScaleMap, scale_map

__all__ = ["AffineCoupling", "AdditiveCoupling"]

Mask = Literal["second_half", "first_half", "checkerboard_even", "checkerboard_odd"] | slice | Tensor


class _Coupling(Bijection):
    """What both couplings share: the mask, what the network sees, and the two directions."""

    def __init__(self, network: nn.Module, mask: Mask) -> None:
        super().__init__()
        self.network = network
        self.mask: str | slice | None = None if isinstance(mask, Tensor) else mask
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or mask.dim() != 1:
                raise ValueError(f"mask: expected a bool tensor [C], got {mask.dtype} {list(mask.shape)}")
            self.register_buffer("changed", mask.nonzero().flatten())
            self.register_buffer("kept", (~mask).nonzero().flatten())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        mask, kept = self._parts(x)
        params = self.network(kept) if context is None else self.network(kept, context)
        return self._op(x, params, mask, inverse)

    def _op(self, x: Tensor, params: Tensor, mask: slice | Tensor | str, inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _parts(self, x: Tensor) -> tuple[slice | Tensor | str, Tensor]:
        """(the mask as an op wants it, what the network sees of x)"""
        channels = x.shape[1]
        if self.mask is None:
            return self.changed, x[:, self.kept]
        if isinstance(self.mask, str) and self.mask.startswith("checkerboard"):
            # the network sees all positions, with zeros where x will change
            return self.mask, x * ~checkerboard(x, int(self.mask == "checkerboard_odd"))
        # the first half keeps the odd channel, as torch.chunk has it
        halves = {"second_half": slice(channels - channels // 2, channels), "first_half": slice(0, (channels + 1) // 2)}
        changed = halves[self.mask] if isinstance(self.mask, str) else self.mask
        start, stop, _ = changed.indices(channels)
        before, after = x[:, :start], x[:, stop:]
        kept = after if start == 0 else before if stop == channels else torch.cat([before, after], 1)
        return changed, kept

    def extra_repr(self) -> str:
        return f"mask={self.changed.tolist() if self.mask is None else self.mask}"


class AffineCoupling(_Coupling):
    r"""Affine coupling :math:`z_2 = x_2 \odot s(h) + t` with :math:`(t, h)` = network(x_1), :math:`z_1 = x_1`.

    Args:
        network: maps the kept part (and the context, if the layer is called with one) to two parameters for every
            changed channel; with a checkerboard, for every channel.
        mask: what changes: half of the channels (the default is the second half; of an odd number of channels the
            first half is the larger), a slice of channels, a bool tensor [C], or every other position.
        packing, scale, order, shift_gain: as in :func:`fastflow.ops.affine_coupling`.
        rescale: number of learned factors in front of the tanh of ``scale="tanh_rescale"`` (RealNVP): 1 or one for
            every changed channel; 0 for none.

    Shapes: x [B, C, ...] -> z [B, C, ...], logdet [B].

    Papers: RealNVP, https://arxiv.org/abs/1605.08803; Glow, https://arxiv.org/abs/1807.03039.

    >>> layer = AffineCoupling(torch.nn.Linear(2, 4))
    >>> z, logdet = layer(torch.randn(8, 4))
    >>> z.shape, logdet.shape
    (torch.Size([8, 4]), torch.Size([8]))
    """

    def __init__(
        self,
        network: nn.Module,
        mask: Mask = "second_half",
        *,
        packing: str = "interleaved",
        scale: str | ScaleMap = "sigmoid2",
        order: Literal["scale_first", "shift_first"] = "scale_first",
        shift_gain: float = 1.0,
        rescale: int = 0,
    ) -> None:
        super().__init__(network, mask)
        self.packing, self.scale, self.order, self.shift_gain = packing, scale_map(scale), order, shift_gain
        self.rescale = nn.Parameter(torch.ones(rescale)) if rescale else None

    def _op(self, x: Tensor, params: Tensor, mask: slice | Tensor | str, inverse: bool) -> tuple[Tensor, Tensor]:
        scale = self.scale if self.rescale is None else scale_map(self.scale, amplitude=self.rescale)
        return ops.affine_coupling(
            x,
            params,
            packing=self.packing,
            scale=scale,
            order=self.order,
            mask=mask,
            inverse=inverse,
            shift_gain=self.shift_gain,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale.kind}, packing={self.packing}, order={self.order}"


class AdditiveCoupling(_Coupling):
    """Additive coupling z_2 = x_2 + network(x_1), z_1 = x_1; volume-preserving, so logdet is 0.

    Paper: NICE, https://arxiv.org/abs/1410.8516. Arguments as in :class:`AffineCoupling`.
    """

    def __init__(self, network: nn.Module, mask: Mask = "second_half") -> None:
        super().__init__(network, mask)

    def _op(self, x: Tensor, params: Tensor, mask: slice | Tensor | str, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.additive_coupling(x, params, mask=mask, inverse=inverse)
