from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multistage_diffusion.evaluation.memorisation import memorisation, nearest
from multistage_diffusion.evaluation.pixels import PixelFeatures


def gauss(rows: int, dims: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=g, dtype=torch.float64)


def images(count: int, seed: int, size: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, size, size), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("chunk", [3, 8, 1024])
def test_nearest_equals_the_loop_and_takes_the_first_of_equals(chunk: int) -> None:
    a, b = gauss(20, 5, 13), gauss(17, 5, 14)
    b[11] = b[4]
    a[0] = b[4]
    distance, index = nearest(a, b, chunk)
    loop = torch.stack([torch.stack([(x - y).norm() for y in b]) for x in a])
    torch.testing.assert_close(distance, loop.min(dim=1).values, rtol=1e-9, atol=1e-9)
    assert torch.equal(index, loop.argmin(dim=1))
    assert (float(distance[0]), int(index[0])) == (0.0, 4)


def test_memorisation_finds_planted_copies() -> None:
    train, held_out, fresh = images(200, 0), images(100, 1), images(30, 2)
    samples = torch.cat([fresh, train[[7, 150, 3]]])
    result = memorisation(samples, train, held_out)
    assert result.index[30:].tolist() == [7, 150, 3]
    assert result.distance[30:].tolist() == [0.0, 0.0, 0.0]
    pixels = PixelFeatures()
    own = torch.cdist(pixels(held_out).double(), pixels(train).double()).min(dim=1).values
    assert result.threshold == pytest.approx(float(torch.quantile(own, 0.05)), rel=1e-9)
    assert result.held_out_share == pytest.approx(0.05)
    assert result.share == pytest.approx((3 + float((result.distance[:30] <= result.threshold).sum())) / 33)
    assert result.share < 0.5


def test_memorisation_of_copies_only_and_of_held_out_images_that_are_copies() -> None:
    train, held_out = images(50, 3), images(40, 4)
    assert memorisation(train[:10], train, held_out).share == 1.0
    duplicated = memorisation(train[:10], train, train)  # threshold 0: a copy is a copy all the same
    assert (duplicated.threshold, duplicated.share, duplicated.held_out_share) == (0.0, 1.0, 1.0)
