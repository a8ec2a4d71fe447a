"""Train diffusion models faster: one shared encoder, a tailored decoder for every noise range."""

__version__ = "0.1.0"
