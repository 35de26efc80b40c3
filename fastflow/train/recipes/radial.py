"""Radial flows, of the same paper as planar ones (https://arxiv.org/abs/1505.05770)."""

from .planar import PAPER, SHORT, recipe

RECIPES = {"moons": recipe("Radial", **SHORT)}
PUBLISHED = {"moons": recipe("Radial", **PAPER)}
