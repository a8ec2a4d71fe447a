from __future__ import annotations

import pytest
import torch

from multistage_diffusion.evaluation.checks import check_features, check_images, check_sets

IMAGES = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)


def test_images_and_features_that_fit_pass() -> None:
    check_images("samples", IMAGES)
    check_sets(IMAGES, IMAGES[:1], IMAGES[:2])
    check_features(torch.zeros(2, 3), torch.zeros(5, 3), rows=2)


def test_others_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"samples: expected non-empty uint8 images .*, got torch.float32 \(3, 1, 4, 4\)"
    ):
        check_images("samples", IMAGES.float())
    with pytest.raises(ValueError, match=r"held_out: images of shape \(1, 4, 3\), training \(1, 4, 4\)"):
        check_sets(IMAGES, IMAGES, IMAGES[..., :3])
    for a, b, message in (
        (torch.zeros(1, 3), torch.zeros(5, 3), r"expected \(N, D\) with N >= 2, got \(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "3 and 4 dimensions"),
        (torch.zeros(5, 3), torch.full((5, 3), torch.inf), "5 of 5 rows hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            check_features(a, b, rows=2)
