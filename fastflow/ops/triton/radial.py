"""Radial flows in Triton."""

from __future__ import annotations

from fastflow.ops.radial import rows
from fastflow.ops.triton.steps import RADIAL, kernels

__all__ = ["radial_bwd", "radial_fwd"]

radial_fwd, radial_bwd = kernels(RADIAL, rows)
