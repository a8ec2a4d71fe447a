"""Features of images, computed by several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from ..distributed import World


class Sharded:
    """A feature extractor that all processes of a world call with the same images: each computes its share.

    Args:
        extractor: what is shared out.
        world: the processes.
    """

    def __init__(self, extractor: FeatureExtractor, world: World) -> None:
        self.extractor, self.world = extractor, world
        self.name, self.preprocessing = extractor.name, extractor.preprocessing
        self.comparable_to = extractor.comparable_to

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of all images, on their device; see contracts.FeatureExtractor."""
        share = self.world.share(len(images))
        own = self.extractor(images[share.start : share.stop]) if len(share) else torch.empty(0)
        return self.world.all_gather_rows(own).to(images.device)


def sharded(extractor: FeatureExtractor, world: World) -> FeatureExtractor:
    """Return an extractor shared out to all processes; itself, for one."""
    return extractor if world.size == 1 else Sharded(extractor, world)
