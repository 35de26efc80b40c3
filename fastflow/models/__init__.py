"""Published models, one file per paper."""

from fastflow.models.glow import Glow
from fastflow.models.planar import Planar
from fastflow.models.radial import Radial

__all__ = ["Glow", "Planar", "Radial"]
