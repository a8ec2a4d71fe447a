from __future__ import annotations

import pytest
import torch

from multistage_diffusion import memory
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.extraction import EXTRACT_BATCH, extract, image_moments, require_features
from multistage_diffusion.evaluation.moments import moments
from multistage_diffusion.evaluation.pixels import PixelFeatures


def test_batched_extraction_equals_one_call() -> None:
    images = torch.arange((EXTRACT_BATCH + 3) * 4, dtype=torch.int64).remainder(256).to(torch.uint8).view(-1, 1, 2, 2)
    assert torch.equal(extract(PixelFeatures(), images), PixelFeatures()(images))


def test_extraction_tells_how_far_it_is() -> None:
    images = torch.zeros(EXTRACT_BATCH + 3, 1, 2, 2, dtype=torch.uint8)
    calls: list[tuple[int, int]] = []
    extract(PixelFeatures(), images, device="cpu", progress=lambda *call: calls.append(call))
    assert calls == [(EXTRACT_BATCH, EXTRACT_BATCH + 3), (EXTRACT_BATCH + 3, EXTRACT_BATCH + 3)]


@pytest.mark.parametrize("count", [2, EXTRACT_BATCH, 2 * EXTRACT_BATCH + 3])
def test_moments_by_batches_equal_those_of_all(count: int) -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(90, 110, (count, 1, 3, 2), generator=g, dtype=torch.uint8)  # a mean far from 0
    one, many = moments(PixelFeatures()(images)), image_moments(PixelFeatures(), images)
    assert torch.allclose(many.mean, one.mean, rtol=1e-12)
    assert torch.allclose(many.covariance, one.covariance, rtol=1e-9, atol=1e-15)
    assert many.count == one.count == count


def test_features_of_too_many_dimensions_are_refused() -> None:
    require_features("features='pixels'", PixelFeatures(), (1, 64, 64), 10)
    with pytest.raises(
        UserError, match=r"features='pixels': 4160 dimensions of images of 1 x 64 x 65 exceed 4096; .*thumbnails"
    ):
        require_features("features='pixels'", PixelFeatures(), (1, 64, 65), 10)


def test_features_that_memory_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * 1000 * 16 + 40 * 16 * 16)
    require_features("features='pixels'", PixelFeatures(), (1, 4, 4), 1000)
    with pytest.raises(UserError, match=r"count=1001, features='pixels' of 16 dimensions, needs at least .* smaller"):
        require_features("features='pixels'", PixelFeatures(), (1, 4, 4), 1001)


def test_the_network_s_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(PixelFeatures):
        activation_bytes = 1000

    features = 20 * 1000 * 16 + 40 * 16 * 16
    monkeypatch.setattr(memory, "available_memory", lambda: features + EXTRACT_BATCH * 1000)
    require_features("features='large'", Large(), (1, 4, 4), 1000)
    monkeypatch.setattr(memory, "available_memory", lambda: features + EXTRACT_BATCH * 1000 - 1)
    with pytest.raises(UserError, match=r"features='large' of 16 dimensions, needs at least"):
        require_features("features='large'", Large(), (1, 4, 4), 1000)
