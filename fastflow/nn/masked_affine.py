"""An affine autoregressive layer: parallel in one direction, one incremental sweep in the other."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastflow import ops
from fastflow.nn.base import Bijection
from fastflow.nn.made import MADE
from fastflow.ops.packing import unpack
from fastflow.ops.scale_map import ScaleMap, scale_map

__all__ = ["MaskedAffine"]


class MaskedAffine(Bijection):
    r"""Every variable is changed by a shift t and a scale s(h) that a MADE makes of the variables before it.

    ``forward`` is one pass of the network, and so, in cost, is ``inverse``: a sweep that finishes each hidden unit as
    soon as the variables it knows are known.

    Args:
        made: the network, two parameters a variable.
        form: "scale_first" is :math:`z = x s + t`, "shift_first" :math:`z = (x + t) s` (MAF), and "gate"
            :math:`z = s x + (1 - s) t` with a sigmoid s (IAF).
        scale: s(h); None is exp, of a gate sigmoid(h + 2).
        packing: "interleaved", the parameters of a variable are (t, h), or "interleaved_st", (h, t), as nflows has it.

    Papers: MAF, https://arxiv.org/abs/1705.07057; IAF, https://arxiv.org/abs/1606.04934.

    >>> import torch
    >>> layer = MaskedAffine(MADE(3, hidden=(16, 16)))
    >>> x = torch.randn(5, 3)
    >>> z, logdet = layer(x)
    >>> back, minus = layer.inverse(z)
    >>> bool(torch.allclose(back, x, atol=1e-4)), bool(torch.allclose(minus, -logdet, atol=1e-4))
    (True, True)
    """

    def __init__(
        self,
        made: MADE,
        form: Literal["scale_first", "shift_first", "gate"] = "scale_first",
        scale: str | ScaleMap | None = None,
        packing: Literal["interleaved", "interleaved_st"] = "interleaved",
    ) -> None:
        super().__init__()
        if made.params != 2:
            raise ValueError(f"made: expected two parameters a variable, got {made.params}")
        if form not in ("scale_first", "shift_first", "gate"):
            raise ValueError(f"form: expected 'scale_first', 'shift_first' or 'gate', got {form!r}")
        if packing not in ("interleaved", "interleaved_st"):
            raise ValueError(f"packing: expected 'interleaved' or 'interleaved_st', got {packing!r}")
        self.made, self.form, self.packing = made, form, packing
        self.scale = scale_map(("sigmoid2" if form == "gate" else "exp") if scale is None else scale)

    @property
    def context_features(self) -> int:
        """P of the context [B, P]; 0 takes none."""
        return self.made.context_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.made.sort(x)
        params = self.made.sorted_forward(x, context)
        options = {"packing": self.packing, "scale": self.scale}
        if self.form == "gate":  # s x + (1 - s) t = (x - t) s + t
            z, logdet = ops.affine_coupling(x, params, order="shift_first", shift_gain=-1.0, **options)
            z = z + unpack(params, None, self.packing)[0]
        else:
            z, logdet = ops.affine_coupling(x, params, order=self.form, **options)
        return self.made.unsort(z), logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        swapped = self.packing == "interleaved_st"
        return self.made.inverse(z, context, form=self.form, scale=self.scale, swapped=swapped)

    def extra_repr(self) -> str:
        return f"form={self.form}, scale={self.scale.kind}"
