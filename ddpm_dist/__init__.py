"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020), trained at scale."""

__version__ = "0.1.0"
