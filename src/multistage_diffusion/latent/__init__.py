"""Autoencoders (codecs) and data sets of latents."""
