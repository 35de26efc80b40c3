"""Published models, one file per paper."""

from fastflow.models.glow import Glow
from fastflow.models.iaf import IAF, IAFlow
from fastflow.models.made import MADE, GaussianMADE
from fastflow.models.maf import MAF
from fastflow.models.nice import NICE
from fastflow.models.realnvp import RealNVP

__all__ = ["IAF", "MADE", "MAF", "NICE", "GaussianMADE", "Glow", "IAFlow", "RealNVP"]
