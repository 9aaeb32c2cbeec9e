"""Scaling studies of masked diffusion (LLaDA) against autoregression, under the same compute."""

__version__ = "0.1.0"
