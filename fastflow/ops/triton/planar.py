"""Planar flows in Triton."""

from __future__ import annotations

from fastflow.ops.planar import rows
from fastflow.ops.triton.steps import PLANAR, kernels

__all__ = ["planar_bwd", "planar_fwd"]

planar_fwd, planar_bwd = kernels(PLANAR, rows)
