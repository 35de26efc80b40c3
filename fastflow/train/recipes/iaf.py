"""A VAE with inverse autoregressive flows for its posterior (https://arxiv.org/abs/1606.04934), fully connected;
that with convolutional ones is `iaf_vae`."""

from . import flow_vae

RECIPES = flow_vae.with_posterior("iaf", flow_vae.RECIPES)
PUBLISHED = flow_vae.with_posterior("iaf", flow_vae.PUBLISHED)
