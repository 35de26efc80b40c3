"""Published models, one file per paper."""

from fastflow.models.flow_vae import FlowVAE
from fastflow.models.glow import Glow
from fastflow.models.gru_ode_bayes import GRUODEBayes
from fastflow.models.iaf import IAF, IAFlow
from fastflow.models.iaf_vae import IAFVAE
from fastflow.models.made import MADE, GaussianMADE
from fastflow.models.maf import MAF
from fastflow.models.nice import NICE
from fastflow.models.planar import Planar
from fastflow.models.radial import Radial
from fastflow.models.realnvp import RealNVP, VectorRealNVP
from fastflow.models.wavenet import WaveNet

__all__ = [
    "FlowVAE",
    "GRUODEBayes",
    "GaussianMADE",
    "Glow",
    "IAF",
    "IAFlow",
    "IAFVAE",
    "MADE",
    "MAF",
    "NICE",
    "Planar",
    "Radial",
    "RealNVP",
    "VectorRealNVP",
    "WaveNet",
]
