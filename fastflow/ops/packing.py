"""How a network's output holds two parameters per variable: (shift, raw scale) or (mean, raw scale).

=================  ====================  =======================================
packing            channels              used by
=================  ====================  =======================================
interleaved        t0 s0 t1 s1 ...       openai/glow, normflows, SRFlow, zuko
interleaved_st     s0 t0 s1 t1 ...       conditional Glow (5yearsKim)
chunk_ts           t0 t1 ... s0 s1 ...   nflows, Wolf, LNFMM
chunk_st           s0 s1 ... t0 t1 ...   rosinality, FrEIA, ffjord
=================  ====================  =======================================
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["PACKINGS", "unpack", "packing_code"]

PACKINGS = ("interleaved", "interleaved_st", "chunk_ts", "chunk_st", "separate")  # as in csrc/cpu/packing.h


def packing_code(packing: str) -> int:
    if packing not in PACKINGS[:4]:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS[:4])}, got {packing!r}")
    return PACKINGS.index(packing)


def unpack(params: Tensor, separate: Tensor | None, packing: str) -> tuple[Tensor, Tensor | None]:
    """(shift or mean, raw scale) as views of ``params`` [B, 2C, ...], or the two tensors where they are separate."""
    if packing == "separate":
        return params, separate
    if packing.startswith("interleaved"):
        first, second = params[:, 0::2], params[:, 1::2]
    else:
        first, second = params.chunk(2, dim=1)
    return (second, first) if packing.endswith("_st") else (first, second)
