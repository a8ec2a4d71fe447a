"""Spacings: coordinates in which the noise levels of a trajectory are equally far apart.

A module here that registers a `Spacing`, with `@SPACINGS.add("name")` (of config.sampling), adds one.
"""

from .base import Spacing as Spacing
