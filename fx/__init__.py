"""fx: which images was this personalised diffusion model trained on? The thin module behind the FineXtract notebooks."""

__version__ = "0.1.0"
