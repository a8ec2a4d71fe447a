"""Data sets: images at rest as uint8, opened from many places, and an analytic mixture for exact tests."""

from .dataset import ImageData, to_float, to_uint8
from .mixture import GaussianMixture
from .sources import open_configured, open_data

__all__ = ["GaussianMixture", "ImageData", "open_configured", "open_data", "to_float", "to_uint8"]
