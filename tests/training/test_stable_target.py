"""Targets averaged over reference images: beside the optimal denoiser, and what they leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.errors import UserError
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.stable_target import averaged

CPU = torch.device("cpu")


def drawn(rows: int, references: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images, noise, noise levels from 0.05 to 20, and reference images, all in float64."""
    g = torch.Generator().manual_seed(seed)
    y, noise, others = (torch.randn(n, 2, 3, 3, generator=g, dtype=torch.float64) for n in (rows, rows, references))
    return y, noise, torch.logspace(math.log10(0.05), math.log10(20), rows, dtype=torch.float64), others


def test_over_all_images_it_is_the_optimal_denoiser() -> None:
    y, noise, sigma, others = drawn(12, 40)
    x = y + sigma[:, None, None, None] * noise
    mean, moved = averaged(y, noise, sigma, others, torch.ones(12, 40, dtype=torch.bool))
    for row in range(12):
        data = torch.cat([y[row : row + 1], others])
        best = OptimalDenoiser(data, dtype=torch.float64)(x[row : row + 1], sigma[row : row + 1])
        torch.testing.assert_close(mean[row : row + 1], best, rtol=0, atol=1e-11)
    torch.testing.assert_close(mean + sigma[:, None, None, None] * moved, x, rtol=0, atol=1e-13)


def test_images_that_are_no_references_do_not_count() -> None:
    y, noise, sigma, others = drawn(6, 10)
    used = torch.rand(6, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    found = averaged(y, noise, sigma, others, used)
    for row in range(6):
        one = slice(row, row + 1)
        alone = averaged(y[one], noise[one], sigma[one], others[used[row]], torch.ones(1, int(used[row].sum())) > 0)
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[one], b, rtol=0, atol=1e-12)
    nothing = averaged(y, noise, sigma, others, torch.zeros(6, 10, dtype=torch.bool))
    assert torch.equal(nothing[0], y)
    assert torch.equal(nothing[1], noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_low_noise_an_image_is_its_own_target(dtype: torch.dtype) -> None:
    y, noise, _, others = (part.to(dtype) for part in drawn(5, 30))
    for sigma in (1e-8, 0.002, 0.02):
        mean, moved = averaged(y, noise, torch.full((5,), sigma, dtype=torch.float64), others, torch.ones(5, 30) > 0)
        assert torch.equal(mean, y)
        assert torch.equal(moved, noise)
        assert mean.dtype == moved.dtype == dtype


def test_targets_scatter_less_at_medium_noise() -> None:
    """Of 16 well separated images and x between them, the mean target scatters less than the images do."""
    g = torch.Generator().manual_seed(3)
    images = torch.randn(16, 1, 2, 2, generator=g, dtype=torch.float64)
    y, noise = images.repeat(50, 1, 1, 1), torch.randn(800, 1, 2, 2, generator=g, dtype=torch.float64)
    sigma = torch.full((800,), 3.0, dtype=torch.float64)
    used = torch.arange(16)[None] != torch.arange(800)[:, None] % 16
    mean, _ = averaged(y, noise, sigma, images, used)
    best = OptimalDenoiser(images, dtype=torch.float64)(y + 3.0 * noise, sigma)
    torch.testing.assert_close(mean, best, rtol=0, atol=1e-11)
    assert (mean - best).square().mean() < 1e-3 * (y - best).square().mean()


# -- in training batches --------------------------------------------------------------------------------------------------


@pytest.fixture(name="images")
def images_fixture() -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 256, (17, 1, 4, 4), dtype=np.uint8)
    return ImageData(pixels, np.arange(17) % 3, "random")


def test_a_batch_has_the_same_noisy_images_with_and_without(tiny_config, images: ImageData) -> None:
    keys = {"network__num_classes": 3, "training__label_dropout": 0.5, "training__flip": True}
    plain, with_references = (
        BatchSource(tiny_config(**keys, training__reference_rows=n), images, CPU).draw(3, (4, 5, 3)) for n in (0, 40)
    )
    torch.testing.assert_close(plain.noisy, with_references.noisy, rtol=0, atol=1e-5)
    assert torch.equal(plain.sigma, with_references.sigma)
    assert torch.equal(plain.cond.labels, with_references.cond.labels)
    assert torch.equal(plain.y[:2], with_references.y[:2])  # low noise
    assert not torch.equal(plain.y[9:], with_references.y[9:])  # high noise


def test_references_are_of_the_row_s_class_unless_the_label_is_hidden(tiny_config, images: ImageData) -> None:
    """17 references are each image once; at high noise their mean is that of the class, or of all."""
    config = tiny_config(
        network__num_classes=3, training__label_dropout=0.5, training__flip=False, training__reference_rows=17
    )
    batch = BatchSource(config, images, CPU).draw(0, (0, 0, 60))
    assert batch.cond is not None
    data, labels = to_float(images.tensor()).double(), torch.from_numpy(images.labels)
    for y, sigma, x, label in zip(batch.y, batch.sigma, batch.noisy, batch.cond.labels, strict=True):
        mine = data if label < 0 else data[labels == label]
        best = OptimalDenoiser(mine, dtype=torch.float64)(x[None].double(), sigma[None])
        torch.testing.assert_close(y[None].double(), best, rtol=0, atol=1e-4)
    assert (batch.cond.labels < 0).any()
    assert (batch.cond.labels >= 0).any()


def test_parts_of_a_step_have_the_rows_of_the_whole(tiny_config, images: ImageData) -> None:
    config = tiny_config(training__reference_rows=9, training__flip=True)
    whole = BatchSource(config, images, CPU).draw(5, (2, 4, 4))
    source = BatchSource(config, images, CPU)
    source.draw(4, (2, 4, 4))  # another step's references
    parts = [
        source.draw(5, (2, 4, 4), (range(r, r + 1), range(2 * r, 2 * r + 2), range(2 * r, 2 * r + 2))) for r in (0, 1)
    ]
    at = ([0, 2, 3, 6, 7], [1, 4, 5, 8, 9])
    for part, rows in zip(parts, at, strict=True):
        torch.testing.assert_close(part.y, whole.y[rows], rtol=0, atol=1e-6)
        torch.testing.assert_close(part.noise, whole.noise[rows], rtol=0, atol=1e-6)


def test_references_are_every_image_in_turn_and_half_of_them_mirrored(tiny_config, images: ImageData) -> None:
    source = BatchSource(tiny_config(training__reference_rows=17, training__flip=True), images, CPU)
    data, mirrored = to_float(images.tensor()), 0
    for step in range(4):
        source.draw(step, (1, 1, 1))
        assert source._references is not None
        _, indices, found = source._references
        assert indices.sort().values.tolist() == list(range(17))
        flipped = torch.tensor([not torch.equal(a, b) for a, b in zip(found, data[indices], strict=True)])
        assert torch.equal(found, torch.where(flipped[:, None, None, None], data[indices].flip(-1), data[indices]))
        mirrored += int(flipped.sum())
    assert 20 < mirrored < 48  # of 68
    source = BatchSource(tiny_config(training__reference_rows=5), images, CPU)
    assert len(torch.cat([source._reference_pick(step) for step in range(3)]).unique()) == 15


def test_augmented_images_have_no_references(tiny_config) -> None:
    with pytest.raises(UserError, match=r"reference_rows=4: .* not augmented; set it or training\.augment=0\.1 to 0"):
        tiny_config(training__reference_rows=4, training__augment=0.1)
    with pytest.raises(UserError, match=r"training\.reference_rows=-1 must be >= 0"):
        tiny_config(training__reference_rows=-1)
