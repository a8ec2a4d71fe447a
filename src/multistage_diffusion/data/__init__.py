"""Data sets: uint8 images, read by index from several kinds of sources; an analytic Gaussian mixture."""

from .dataset import ImageData, to_float, to_uint8
from .mixture import GaussianMixture
from .sources import open_configured, open_data

__all__ = ["GaussianMixture", "ImageData", "open_configured", "open_data", "to_float", "to_uint8"]
