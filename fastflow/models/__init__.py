"""Published models, one file per paper."""

from fastflow.models.glow import Glow
from fastflow.models.wavenet import WaveNet

__all__ = ["Glow", "WaveNet"]
