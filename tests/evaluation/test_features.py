import hashlib
import warnings
from pathlib import Path

import pytest
import torch

from multistage_diffusion.contracts import FeatureExtractor
from multistage_diffusion.evaluation.classifier import prepare
from multistage_diffusion.evaluation.features import (
    EXTRACT_BATCH,
    ClassifierFeatures,
    PixelFeatures,
    extract,
    get_features,
)


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


def test_extraction_tells_how_far_it_is() -> None:
    images = torch.zeros(EXTRACT_BATCH + 3, 1, 2, 2, dtype=torch.uint8)
    calls: list[tuple[int, int]] = []
    extract(PixelFeatures(), images, device="cpu", progress=lambda *call: calls.append(call))
    assert calls == [(EXTRACT_BATCH, EXTRACT_BATCH + 3), (EXTRACT_BATCH + 3, EXTRACT_BATCH + 3)]


def test_unknown_features_list_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"features='incepton' is unknown; choose one of pixels.*inception, .*TorchScript"
    ):
        get_features("incepton")
    with pytest.raises(ValueError, match=r"features='pixels' takes no weights; w\.pth is for inception or vgg16"):
        get_features("pixels", Path("w.pth"))


def test_the_classifier_s_logits_are_of_its_features() -> None:
    extractor = get_features("fashion-classifier")
    assert isinstance(extractor, ClassifierFeatures)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(extractor.logits(extractor(images)), extractor.model(prepare(images)))


class Means(torch.nn.Module):
    """Mean and largest value of an image, or an answer that is wrong in one way."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fault == "raises" or images.dtype != torch.uint8:
            raise RuntimeError("of no use")
        x = images.float().flatten(1)
        out = torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1)
        if self.fault == "rows":
            return out[1:]
        if self.fault == "integers":
            return out.long()
        if self.fault == "nan":
            return out / 0.0 * 0.0
        return out


def scripted(path: Path, fault: str = "") -> FeatureExtractor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Means(fault)).save(str(path))
    return get_features(str(path))


def test_a_torchscript_file_is_a_feature_function(tmp_path: Path) -> None:
    extractor = scripted(tmp_path / "means.pt")
    images = torch.randint(0, 256, (EXTRACT_BATCH + 1, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(extract(extractor, images), Means()(images))
    digest = hashlib.sha256((tmp_path / "means.pt").read_bytes()).hexdigest()[:12]
    assert extractor.name == f"torchscript means.pt ({digest})"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", r"refuses uint8 images \(2, 1, 4, 4\): .*of no use"),
        ("rows", r"answers 2 images with \(1, 2\), not with \(2, D\)"),
        ("integers", "its features are torch.int64"),
        ("nan", "or not all finite"),
    ],
)
def test_a_torchscript_file_that_answers_wrongly_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    extractor = scripted(tmp_path / "faulty.pt", fault)
    with pytest.raises(ValueError, match=f"torchscript faulty.pt .*{message}") as caught:
        extractor(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_torchscript_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features='.*none.pt': No such file"):
        get_features(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match=r"text.pt': not a TorchScript file"):
        get_features(str(tmp_path / "text.pt"))


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, 4, 4).byte()]
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected non-empty uint8 images"):
        PixelFeatures()(images)
