"""Autoencoders, and data sets of latents."""
