"""Modules: bijections (x, context) -> (z, logdet) and back, base distributions, and the flow they make."""

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.base import Bijection, Inverse, Sequential
from fastflow.nn.base_distribution import Base, DiagonalGaussian, Logistic, StandardNormal
from fastflow.nn.batch_norm import BatchNorm
from fastflow.nn.conv1x1 import InvertibleConv1x1, Weights, weights
from fastflow.nn.coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.debugging import NonFiniteError, debug
from fastflow.nn.diagnostics import InverseError, inverse_error
from fastflow.nn.flow import Flow
from fastflow.nn.likelihood import Bernoulli, Categorical, DiscretizedLogistic, Likelihood
from fastflow.nn.logit import Logit
from fastflow.nn.made import MADE, MaskedLinear
from fastflow.nn.masked_affine import MaskedAffine
from fastflow.nn.masked_conv import ConvAutoregressive, MaskedConv2d, WeightNormConv2d
from fastflow.nn.mlp_coupling import CouplingStack, MLPCoupling
from fastflow.nn.observations import Observations
from fastflow.nn.permutation import Permutation
from fastflow.nn.planar import Planar
from fastflow.nn.radial import Radial
from fastflow.nn.reshape import Squeeze
from fastflow.nn.scaling import Scaling
from fastflow.nn.split_prior import SplitPrior
from fastflow.nn.sylvester import Sylvester, SylvesterParameters

__all__ = [
    "MADE",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Base",
    "BatchNorm",
    "Bernoulli",
    "Bijection",
    "Categorical",
    "ConvAutoregressive",
    "CouplingStack",
    "DiagonalGaussian",
    "DiscretizedLogistic",
    "Flow",
    "Inverse",
    "InverseError",
    "InvertibleConv1x1",
    "Likelihood",
    "Logistic",
    "Logit",
    "MLPCoupling",
    "MaskedAffine",
    "MaskedConv2d",
    "MaskedLinear",
    "NonFiniteError",
    "Observations",
    "Permutation",
    "Planar",
    "Radial",
    "Scaling",
    "Sequential",
    "SplitPrior",
    "Squeeze",
    "StandardNormal",
    "Sylvester",
    "SylvesterParameters",
    "WeightNormConv2d",
    "Weights",
    "debug",
    "inverse_error",
    "weights",
]
