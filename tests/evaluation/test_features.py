import pytest
import torch

from multistage_diffusion.contracts import FeatureExtractor
from multistage_diffusion.evaluation.features import EXTRACT_BATCH, PixelFeatures, extract, get_features


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


def test_batched_extraction_equals_one_call() -> None:
    images = torch.arange((EXTRACT_BATCH + 3) * 4, dtype=torch.int64).remainder(256).to(torch.uint8).view(-1, 1, 2, 2)
    assert torch.equal(extract(PixelFeatures(), images), PixelFeatures()(images))


def test_unknown_features_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"features='inception' is unknown; choose one of pixels"):
        get_features("inception")


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4).byte()]
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected non-empty uint8 images"):
        PixelFeatures()(images)
