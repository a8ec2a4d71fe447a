"""Feature extraction distributed over several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import World
from .registry import FeatureExtractor


class Sharded(FeatureExtractor):
    """A feature extractor that splits the images over ranks; all ranks must call it with the same images.

    Args:
        extractor: feature function that each rank calls on its part.
        world: the processes.
    """

    def __init__(self, extractor: FeatureExtractor, world: World) -> None:
        self.extractor, self.world = extractor, world
        self.title, self.digest = extractor.title, extractor.digest
        self.comparable_to, self.preprocessing = extractor.comparable_to, extractor.preprocessing
        self.activation_bytes, self.has_logits = extractor.activation_bytes, extractor.has_logits

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of all images on every rank, on the images' device; see contracts.FeatureExtractor."""
        share = self.world.share(len(images))
        own = self.extractor(images[share.start : share.stop]) if len(share) else torch.empty(0)
        return self.world.all_gather_rows(own).to(images.device)

    def logits(self, features: Tensor) -> Tensor:
        """Return the extractor's logits, on every rank."""
        return self.extractor.logits(features)


def sharded(extractor: FeatureExtractor, world: World) -> FeatureExtractor:
    """Return an extractor distributed over all ranks; for a single process the extractor itself."""
    return extractor if world.size == 1 else Sharded(extractor, world)
