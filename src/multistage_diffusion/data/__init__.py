"""Data sets: uint8 images, read by index from several kinds of sources."""

from .dataset import ImageData, to_float, to_uint8
from .sources import open_configured, open_data

__all__ = ["ImageData", "open_configured", "open_data", "to_float", "to_uint8"]
