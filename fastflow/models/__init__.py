"""Published models, one file per paper."""

from fastflow.models.glow import Glow
from fastflow.models.nice import NICE
from fastflow.models.planar import Planar
from fastflow.models.radial import Radial
from fastflow.models.realnvp import RealNVP, VectorRealNVP
from fastflow.models.wavenet import WaveNet

__all__ = ["Glow", "NICE", "Planar", "Radial", "RealNVP", "VectorRealNVP", "WaveNet"]
