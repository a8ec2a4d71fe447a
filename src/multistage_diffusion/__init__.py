"""Multi-stage diffusion models."""
