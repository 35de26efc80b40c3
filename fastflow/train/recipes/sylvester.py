"""A VAE with Sylvester flows for its posterior (https://arxiv.org/abs/1803.05649), the orthogonal ones;
`--set posterior=sylvester-householder` and `sylvester-triangular` are the others."""

from . import flow_vae

RECIPES = flow_vae.with_posterior("sylvester-orthogonal", flow_vae.RECIPES)
PUBLISHED = flow_vae.with_posterior("sylvester-orthogonal", flow_vae.PUBLISHED)
