"""Published models, one file per paper."""

from fastflow.models.glow import Glow

__all__ = ["Glow"]
