from __future__ import annotations

import processes
import torch

from multistage_diffusion.distributed import ALONE, World
from multistage_diffusion.evaluation import FeatureExtractor, get_features, sharded


class Counted(FeatureExtractor):
    """Pixels; counts the images of each call."""

    title, digest, comparable_to, preprocessing = "counted", "abc", "itself", "none"
    has_logits = True

    def __init__(self) -> None:
        self.given: list[int] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.given.append(len(images))
        return images.flatten(1).double() / 255

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :2]


def images(count: int) -> torch.Tensor:
    return torch.arange(count * 4, dtype=torch.uint8).reshape(count, 1, 2, 2)


def extracted(world: World) -> tuple[list[int], list[bool]]:
    inner = Counted()
    outer = sharded(inner, world)
    assert (outer.name, outer.comparable_to, outer.preprocessing) == ("counted (abc)", "itself", "none")
    assert outer.has_logits
    assert torch.equal(outer.logits(torch.ones(3, 4)), torch.ones(3, 2))
    same = [torch.equal(outer(images(n)), Counted()(images(n))) for n in (5, 1, 2)]
    return inner.given, same


def test_each_process_computes_its_share_and_gets_all():
    (first, same), (second, same_too) = processes.run(2, extracted)
    assert (first, second) == ([2, 1], [3, 1, 1])
    assert same == same_too == [True] * 3


def test_one_process_keeps_the_extractor_itself():
    extractor = get_features("pixels")
    assert sharded(extractor, ALONE) is extractor
