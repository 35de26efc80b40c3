"""Published models, one file per paper."""

from fastflow.models.flow_vae import FlowVAE
from fastflow.models.glow import Glow
from fastflow.models.iaf import IAF, IAFlow
from fastflow.models.iaf_vae import IAFVAE
from fastflow.models.planar import Planar
from fastflow.models.radial import Radial

__all__ = ["IAF", "IAFVAE", "FlowVAE", "Glow", "IAFlow", "Planar", "Radial"]
