import pytest
import torch

from multistage_diffusion import memory
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.features import EXTRACT_BATCH, PixelFeatures
from multistage_diffusion.evaluation.metrics import frechet_distance
from multistage_diffusion.evaluation.statistics import (
    Moments,
    frechet_between,
    image_moments,
    moments,
    require_features,
)


def features(rows: int, dims: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dims, generator=g, dtype=torch.float64)
    return x @ torch.randn(dims, dims, generator=g, dtype=torch.float64) + 5.0


def test_moments_are_mean_and_unbiased_covariance() -> None:
    x = features(50, 4, 0)
    found = moments(x)
    assert torch.allclose(found.mean, x.mean(dim=0))
    assert torch.allclose(found.covariance, torch.cov(x.T), rtol=1e-12)
    assert found.count == 50


@pytest.mark.parametrize("count", [2, EXTRACT_BATCH, 2 * EXTRACT_BATCH + 3])
def test_moments_by_batches_equal_those_of_all(count: int) -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(90, 110, (count, 1, 3, 2), generator=g, dtype=torch.uint8)  # a mean far from 0
    one, many = moments(PixelFeatures()(images)), image_moments(PixelFeatures(), images)
    assert torch.allclose(many.mean, one.mean, rtol=1e-12)
    assert torch.allclose(many.covariance, one.covariance, rtol=1e-9, atol=1e-15)
    assert many.count == one.count == count


def test_the_distance_of_moments_is_that_of_their_features() -> None:
    a, b = features(40, 3, 2), features(60, 3, 3)
    assert frechet_between(moments(a), moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    shifted = Moments(mean=moments(a).mean + 2.0, covariance=moments(a).covariance, count=40)
    assert frechet_between(moments(a), shifted) == pytest.approx(3 * 2.0**2, rel=1e-9)


def test_moments_that_do_not_fit_are_refused() -> None:
    a, b = moments(features(9, 3, 4)), moments(features(9, 2, 5))
    with pytest.raises(ValueError, match="3 and 2 feature dimensions; use the same features"):
        frechet_between(a, b)
    broken = Moments(mean=a.mean, covariance=a.covariance * torch.nan, count=9)
    with pytest.raises(ValueError, match="not all finite"):
        frechet_between(a, broken)


def test_features_of_too_many_dimensions_are_refused() -> None:
    require_features("features='pixels'", PixelFeatures(), (1, 64, 64), 10)
    with pytest.raises(UserError, match=r"features='pixels': 4160 dimensions of images of 1 x 64 x 65 exceed 4096"):
        require_features("features='pixels'", PixelFeatures(), (1, 64, 65), 10)


def test_features_that_memory_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * 1000 * 16 + 40 * 16 * 16)
    require_features("features='pixels'", PixelFeatures(), (1, 4, 4), 1000)
    with pytest.raises(UserError, match=r"count=1001, features='pixels' of 16 dimensions, needs at least .* smaller"):
        require_features("features='pixels'", PixelFeatures(), (1, 4, 4), 1001)
