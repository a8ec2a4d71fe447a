import pytest
import torch
import torch.nn.functional as F

from multistage_diffusion.data.sources.fashion_mnist import DEBIAN_FOLDER, read_idx
from multistage_diffusion.evaluation.classifier import (
    CLASSES,
    SIZE,
    ClassifierFeatures,
    FashionClassifier,
    prepare,
    pretrained,
)
from multistage_diffusion.evaluation.features import get_features


def images(count: int, channels: int, size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=g, dtype=torch.uint8)


def test_images_of_its_own_size_are_only_scaled() -> None:
    grey = images(2, 1, SIZE)
    assert torch.allclose(prepare(grey), grey.float() / 127.5 - 1.0, atol=1e-6)
    assert torch.allclose(prepare(grey.expand(-1, 3, -1, -1)), prepare(grey), atol=1e-6)


def test_other_sizes_are_resampled_with_antialiasing() -> None:
    flat = torch.full((1, 1, 56, 56), 200, dtype=torch.uint8)
    assert torch.allclose(prepare(flat), torch.full((1, 1, SIZE, SIZE), 200 / 127.5 - 1.0), atol=1e-5)
    board = (torch.arange(56)[:, None] + torch.arange(56)) % 2 * 255  # the finest checkerboard is grey from afar
    assert float(prepare(board.to(torch.uint8)[None, None])[..., 2:-2, 2:-2].abs().max()) < 0.01


def test_the_shipped_weights_are_small_and_named() -> None:
    model, digest = pretrained()
    assert not model.training
    assert all(not p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) * 2 < 1_000_000  # bytes in half precision
    features = get_features("fashion-classifier")
    assert features.name == f"fashion-classifier ({digest})"
    assert "not comparable with Inception FID" in features.comparable_to
    assert len(digest) == 12


def test_features_are_what_the_last_layer_reads() -> None:
    model, _ = pretrained()
    x = prepare(images(3, 1, 20))
    assert torch.equal(F.linear(model.features(x), model.head.weight, model.head.bias), model(x))
    assert model.features(x).shape == (3, FashionClassifier.widths[-1])
    assert model(x).shape == (3, CLASSES)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_it_finds_the_class_of_at_least_92_of_100_test_images() -> None:
    pixels = torch.from_numpy(read_idx(DEBIAN_FOLDER / "t10k-images-idx3-ubyte.gz", 3)[:3000].copy())[:, None]
    labels = torch.from_numpy(read_idx(DEBIAN_FOLDER / "t10k-labels-idx1-ubyte.gz", 1)[:3000].copy())
    model, _ = pretrained()
    found = torch.cat([model(prepare(part)).argmax(dim=1) for part in pixels.split(500)])
    assert float((found == labels).float().mean()) >= 0.92


def test_the_classifier_s_logits_are_of_its_features() -> None:
    extractor = get_features("fashion-classifier")
    assert isinstance(extractor, ClassifierFeatures)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(extractor.logits(extractor(images)), extractor.model(prepare(images)))
