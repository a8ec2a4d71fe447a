from __future__ import annotations

import pytest
import torch

from multistage_diffusion.evaluation import get_features
from multistage_diffusion.evaluation.thumbnails import ThumbnailFeatures


def test_features_are_means_of_cells_and_differences_of_neighbours() -> None:
    images = torch.randint(0, 256, (3, 2, 16, 24), generator=torch.Generator().manual_seed(1)).byte()
    found = ThumbnailFeatures()(images[:, :1])
    assert found.shape == (3, 73)
    x = images[:, 0].double() / 127.5 - 1
    for row in range(8):
        for column in range(8):
            cell = x[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3].mean((1, 2))
            torch.testing.assert_close(found[:, 8 * row + column].double(), cell, atol=1e-6, rtol=0)
    contrasts = [
        4 * (x[:, down:, across:] - x[:, : 16 - down, : 24 - across]).abs().mean((1, 2))
        for s in (1, 2, 4)
        for down, across in ((0, s), (s, 0), (s, s))
    ]
    torch.testing.assert_close(found[:, 64:].double(), torch.stack(contrasts, 1), atol=1e-5, rtol=0)


def test_colour_images_have_the_features_of_each_channel() -> None:
    images = torch.randint(0, 256, (2, 3, 9, 9), generator=torch.Generator().manual_seed(2)).byte()
    found = ThumbnailFeatures()(images)
    assert found.shape == (2, 219)
    alone = ThumbnailFeatures()(images[:, 1:2])
    torch.testing.assert_close(found[:, 64:128], alone[:, :64])
    torch.testing.assert_close(found[:, 193::3], alone[:, 64:])


def test_differences_that_do_not_fit_are_zero() -> None:
    found = ThumbnailFeatures()(torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4))
    assert bool((found[0, 64:70] > 0).all())
    assert found[0, 70:].tolist() == [0.0, 0.0, 0.0]


def test_a_blurred_image_is_further_than_another_crop() -> None:
    """Thumbnails alone would not see a blur."""
    images = torch.randint(0, 256, (64, 1, 16, 16), generator=torch.Generator().manual_seed(3)).byte()
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1).byte()
    extract = ThumbnailFeatures()
    assert (extract(blurred) - extract(images))[:, 64:].abs().mean() > 0.5


def test_they_are_registered() -> None:
    assert get_features("thumbnails").name == "thumbnails"


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="expected non-empty uint8 images"):
        ThumbnailFeatures()(torch.zeros(2, 1, 4, 4))
