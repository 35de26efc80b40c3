"""Published models, one file per paper."""

from fastflow.models.glow import Glow
from fastflow.models.iaf import IAF, IAFlow

__all__ = ["IAF", "Glow", "IAFlow"]
