from __future__ import annotations

import pytest
import torch

from multistage_diffusion.evaluation import FeatureExtractor, get_features
from multistage_diffusion.evaluation.pixels import PixelFeatures


def test_pixels_are_scaled_and_flattened_in_order() -> None:
    images = torch.tensor([[[[0, 255], [51, 204]]], [[[255, 0], [0, 0]]]], dtype=torch.uint8)
    features = PixelFeatures()(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, torch.tensor([[-1.0, 1.0, -0.6, 0.6], [1.0, -1.0, -1.0, -1.0]]))


def test_pixels_say_what_they_are_comparable_to() -> None:
    extractor = get_features("pixels")
    assert isinstance(extractor, FeatureExtractor)
    assert extractor.name == "pixels"
    assert "not comparable with Inception FID" in extractor.comparable_to


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4).byte()]
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected non-empty uint8 images"):
        PixelFeatures()(images)
