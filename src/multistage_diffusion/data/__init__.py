"""Data sets: uint8 images, read by index from several kinds of sources (data/sources opens them)."""

from .dataset import ImageData, to_float, to_uint8

__all__ = ["ImageData", "to_float", "to_uint8"]
