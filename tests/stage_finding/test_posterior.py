import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from multistage_diffusion.data.rows import ArrayRows
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import posterior
from multistage_diffusion.stage_finding.posterior import NEGLIGIBLE, TiledImages, posterior_means, posterior_means_of

SIGMAS = torch.logspace(-3, 3, 13, dtype=torch.float64)


def exact(data: TiledImages, own: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return E[y | y_k + sigma eps] - y_k from squared distances to all images, float64 (G, B, D)."""
    images = data.rows(torch.arange(len(data))).double()
    y = images[own]
    x = y + sigmas[:, :, None] * noise.double()
    distances = (x[:, :, None] - images).square().sum(-1)
    weights = torch.softmax(-0.5 * distances / sigmas[:, :, None] ** 2, dim=-1)
    return (weights[..., None] * (images - y[None, :, None])).sum(2)  # differences: exact where they cancel


def gaussian(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def pixels(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dim, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def every_row(sigmas: Tensor, rows: int) -> Tensor:
    return sigmas[:, None].expand(-1, rows)


IMAGES = {
    "apart": pixels(50, 12),
    "in clusters": (pixels(5, 12)[:, None] + 0.02 * pixels(60, 12, 1).view(5, 12, 12)).flatten(0, 1).clamp(-1, 1),
    "duplicates": pixels(9, 12).repeat(4, 1),
    "one": pixels(1, 12),
    "two": pixels(2, 12),
    "constant": torch.full((7, 12), 0.3),
    "one level apart": (0.25 + torch.eye(12).repeat(2, 1) / 128),
}


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("together", [True, False], ids=["many sigmas", "one sigma"])
def test_means_equal_the_float64_softmax_over_all_images(images, together):
    data = TiledImages(images)
    own = torch.arange(40) % len(images)
    noise = gaussian(40, 12, seed=2)
    sigmas = every_row(SIGMAS, 40)
    if together:
        means = posterior_means(data, own, noise, sigmas)
    else:
        means = torch.cat([posterior_means(data, own, noise, s[None]) for s in sigmas])
    assert means.dtype == torch.float32
    error = (means - exact(data, own, noise, sigmas)).abs().amax((1, 2))
    # scores are rounded: at small sigma, weights of images hardly further apart than sigma come out a little off
    assert bool((error < torch.where(SIGMAS > 0.1, 2e-6, 5e-5)).all()), error


def test_golden_posterior_means():
    golden = load_file(Path(__file__).parents[1] / "golden" / "optimal_denoiser_digits.safetensors")
    data = TiledImages(torch.tensor(load_digits().images / 16, dtype=torch.float32), (0.0, 1.0))
    own, expected = golden["index"], golden["posterior_mean"].flatten(1)
    means = posterior_means(data, own, golden["noise"].flatten(1), VP().sigma(golden["t"])[None])[0]
    error = means + data.rows(own) + data.mean_image - expected
    assert float(error.abs().max()) < 1e-4 * float(expected.abs().max())


def test_rows_may_have_sigmas_of_their_own():
    data, own, noise = TiledImages(IMAGES["apart"]), torch.arange(26) % 50, gaussian(26, 12)
    sigmas = torch.stack((SIGMAS.repeat(2), SIGMAS.flip(0).repeat(2)))
    for some in (sigmas, sigmas[:1]):
        assert float((posterior_means(data, own, noise, some) - exact(data, own, noise, some)).abs().max()) < 2e-5


def test_ties_are_shared_equally():
    image, other = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])
    data = TiledImages(torch.stack((image, image, image, other)))
    means = posterior_means(data, torch.tensor([0, 3]), torch.zeros(2, 2), every_row(SIGMAS[-1:] * 1e3, 2))
    assert torch.allclose(means[0] + data.rows(torch.tensor([0, 3])), torch.zeros(2, 2), atol=1e-6)
    near = posterior_means(data, torch.arange(4), torch.zeros(4, 2), every_row(SIGMAS[:1], 4))
    assert float(near.abs().max()) < 1e-6


@pytest.fixture
def branches(monkeypatch) -> dict[str, int]:
    """Count how every tile is added: "skipped", "few", "picked" rows, or the "whole" product."""
    seen = dict.fromkeys(("skipped", "few", "picked", "whole"), 0)
    add, add_few = posterior._Sums.add, posterior._Sums._add_few

    def counted_few(self, rows, weights, large, tile):
        seen["few"] += len(rows)
        add_few(self, rows, weights, large, tile)

    def counted(self, weights, tile, span):
        here = (self.own >= span.start) & (self.own < span.stop)
        others = weights.clone()
        others[here, self.own[here] - span.start] = 0
        rows = int((others.sum(1) > NEGLIGIBLE * len(tile) / len(self.data)).sum())
        before = seen["few"]
        add(self, weights, tile, span)
        seen["skipped"] += len(weights) - rows
        whole = rows > posterior._MOST * len(weights)
        seen["whole" if whole else "picked"] += rows - (seen["few"] - before)

    monkeypatch.setattr(posterior._Sums, "_add_few", counted_few)
    monkeypatch.setattr(posterior._Sums, "add", counted)
    return seen


@pytest.mark.parametrize(
    ("tile", "few", "most"), [(7, 3, 0.75), (7, 0, 0.75), (7, 3, 1.0), (1, 32, 0.75), (64, 2, 0.5)]
)
def test_every_way_to_add_a_tile_gives_the_same(branches, monkeypatch, tile, few, most):
    monkeypatch.setattr(posterior, "_TILE", tile)
    monkeypatch.setattr(posterior, "_FEW", few)
    monkeypatch.setattr(posterior, "_MOST", most)
    # a crowd beside lone images: at one sigma some rows have many neighbours, some few, some none
    images = torch.cat((pixels(20, 12), 0.5 + 0.1 * pixels(30, 12, 1), pixels(13, 12, 2)))
    data = TiledImages(images)
    own, noise = torch.arange(63), gaussian(63, 12, seed=3)
    sigmas = every_row(torch.logspace(-2, 1, 12, dtype=torch.float64), 63)
    means = posterior_means(data, own, noise, sigmas)
    assert float((means - exact(data, own, noise, sigmas)).abs().max()) < 1e-5
    wanted = {"skipped", "whole"} | ({"few"} if few else set()) | ({"picked"} if tile > few else set())
    if most == 1.0:
        wanted.discard("whole")
    assert {name for name, count in branches.items() if count} == wanted


def test_every_branch_is_taken_by_default_on_many_images(branches):
    images = torch.cat((pixels(4500, 8) * 0.02 + 0.4, pixels(4500, 8, 1)))
    data, own = TiledImages(images), torch.arange(0, 9000, 300)
    noise, sigmas = gaussian(30, 8), every_row(torch.tensor([0.01, 0.1, 0.3, 3.0], dtype=torch.float64), 30)
    means = posterior_means(data, own, noise, sigmas)
    assert float((means - exact(data, own, noise, sigmas)).abs().max()) < 2e-5
    assert all(branches.values()), branches


@pytest.mark.parametrize("distance", [1.0, 30.0], ids=["finite weights", "overflow"])
@pytest.mark.parametrize("together", [True, False])
def test_noise_that_points_at_another_image_is_answered_exactly(monkeypatch, distance, together):
    fallbacks = []
    monkeypatch.setattr(
        posterior, "posterior_means_of", lambda data, x, s: fallbacks.append(len(x)) or posterior_means_of(data, x, s)
    )
    data = TiledImages(pixels(40, 12))
    own, aim = torch.arange(40), torch.arange(40).roll(1)
    size = (data.rows(aim) - data.rows(own)).norm(dim=1).double()
    sigmas = torch.stack((size / distance, size.flip(0)))[: 2 if together else 1]
    noise = ((data.rows(aim) - data.rows(own)) / sigmas[0].float()[:, None]).contiguous()
    means = posterior_means(data, own, noise, sigmas)
    assert float((means - exact(data, own, noise, sigmas)).abs().max()) < 2e-5
    assert float((means[0] - (data.rows(aim) - data.rows(own))).abs().max() < 1e-5) == (distance > 20)
    assert bool(fallbacks) == (distance > 20)


@pytest.mark.parametrize("few", [0, 32])
def test_what_is_left_out_moves_a_mean_by_at_most_its_share_of_the_range(monkeypatch, few):
    assert posterior.NEGLIGIBLE == 1e-6
    share = 1e-3  # far above float32's own rounding
    monkeypatch.setattr(posterior, "NEGLIGIBLE", share)
    monkeypatch.setattr(posterior, "_TILE", 50)
    monkeypatch.setattr(posterior, "_FEW", few)
    images = pixels(600, 3) * 0.1
    images[:2] = torch.tensor([[1.0], [-1.0]])
    data, own = TiledImages(images), torch.arange(0, 600, 75)
    own[1] = 1
    noise, sigmas = 0.3 * gaussian(len(own), 3), every_row(torch.linspace(0.1, 0.6, 60, dtype=torch.float64), len(own))
    error = (posterior_means(data, own, noise, sigmas) - exact(data, own, noise, sigmas)).abs().amax((1, 2))
    assert 0.1 * share < float(error.max()) <= share * 2


@pytest.fixture
def levels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, 3, 4, 4), dtype=np.uint8)


@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (-0.5, 2.0)])
def test_levels_are_mapped_onto_the_range(levels, data_range):
    data = TiledImages(levels, data_range)
    low, high = data_range
    floats = low + (high - low) * torch.from_numpy(levels).flatten(1).double() / 255
    torch.testing.assert_close(data.mean_image.double(), floats.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(data.rows(torch.arange(300)).double(), floats - floats.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        data.half_square.double(), (floats - floats.mean(0)).square().sum(1) / 2, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(data.tile(slice(5, 9)), data.rows(torch.arange(5, 9)), rtol=0, atol=0)
    others = torch.from_numpy(levels)[:3]
    torch.testing.assert_close(data.as_rows(others), data.rows(torch.arange(3)), rtol=0, atol=0)
    torch.testing.assert_close(data.as_rows(floats[:3].view(3, 3, 4, 4)), data.rows(torch.arange(3)), rtol=0, atol=1e-6)


def test_a_memory_map_larger_than_the_budget_gives_the_same_bit_for_bit(levels, tmp_path, monkeypatch):
    monkeypatch.setattr(posterior, "_TILE", 64)
    np.save(tmp_path / "images.npy", levels)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read, held = TiledImages(mapped, budget=2 * levels.size), TiledImages(levels)
    assert read._held is None
    assert held._held is not None
    assert read._images.array is mapped  # no copy
    own, noise = torch.tensor([3, 3, 299, 64]), gaussian(4, 48)
    sigmas = every_row(SIGMAS, 4)
    assert torch.equal(posterior_means(read, own, noise, sigmas), posterior_means(held, own, noise, sigmas))
    assert torch.equal(read.half_square, held.half_square)
    read.rows(own)[:] = 0  # a copy
    assert np.array_equal(mapped, levels)


def test_a_data_set_read_by_index_gives_the_same_bit_for_bit(levels, tmp_path, monkeypatch):
    monkeypatch.setattr(posterior, "_TILE", 64)
    source, most = ArrayRows(levels), []

    class Watched:
        shape = source.shape

        def __len__(self):
            return len(source)

        def rows(self, indices):
            most.append(len(indices))
            return source.rows(indices)

    read, held = TiledImages(Watched(), budget=0), TiledImages(levels)
    own, noise = torch.tensor([3, 3, 299, 64]), gaussian(4, 48)
    sigmas = every_row(SIGMAS, 4)
    assert torch.equal(posterior_means(read, own, noise, sigmas), posterior_means(held, own, noise, sigmas))
    assert read.vary()
    assert max(most) == 64


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_are_left_as_they_were(kind, dtype):
    images = pixels(20, 12).to(dtype)
    before = images.clone()
    data = TiledImages(images if kind == "torch" else images.numpy())
    noise = gaussian(20, 12)
    kept = noise.clone()
    posterior_means(data, torch.arange(20), noise, every_row(SIGMAS, 20))
    posterior_means_of(data, noise, SIGMAS[:1].expand(20))
    assert torch.equal(images, before)
    assert torch.equal(noise, kept)
    assert data.mean_image.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(bad):
    images = pixels(20, 12)
    images[7, 3] = bad
    with pytest.raises(ValueError, match="stages: images hold NaN or infinite"):
        TiledImages(images)
    images[8, 3] = -bad
    with pytest.raises(ValueError, match="stages: images hold NaN or infinite"):
        TiledImages(images)


def test_a_difference_anywhere_is_seen(monkeypatch):
    monkeypatch.setattr(posterior, "_TILE", 4)
    images = torch.zeros(13, 2, 2, dtype=torch.uint8)
    assert not TiledImages(images).vary()
    assert not TiledImages(images[:1]).vary()
    images[10, 1, 1] = 1
    assert TiledImages(images).vary()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [4096, 7])
def test_points_outside_the_data_have_means_too(monkeypatch, dtype, tile):
    monkeypatch.setattr(posterior, "_TILE", tile)
    data = TiledImages(IMAGES["in clusters"])
    images = data.rows(torch.arange(60)).double()
    y = pixels(30, 12, seed=5).double() * 1.5  # some far outside
    x = (y + gaussian(30, 12).double() * 0.3).to(dtype)
    for sigma in SIGMAS:
        weights = torch.softmax(-0.5 * (x.double()[:, None] - images).square().sum(-1) / sigma**2, dim=1)
        means = posterior_means_of(data, x, sigma.expand(30))
        assert means.dtype == dtype
        # float32's scores are too coarse for the smallest sigmas between images of one cluster, which are alike
        error = float((means - weights @ images).abs().max())
        assert error < (1e-9 if dtype == torch.float64 else 2e-5 if sigma > 0.1 else 0.05), sigma


def test_rows_outside_may_have_sigmas_of_their_own():
    data = TiledImages(IMAGES["apart"])
    x = pixels(13, 12, seed=5).double()
    means = posterior_means_of(data, x, SIGMAS)
    for row, sigma in enumerate(SIGMAS):
        torch.testing.assert_close(
            means[row : row + 1], posterior_means_of(data, x[row : row + 1], sigma[None]), rtol=0, atol=1e-12
        )


def in_shares(images: Tensor, count: int, compute: Callable[[TiledImages], Tensor]) -> list[Tensor]:
    """Compute over shares of the images, a thread each, that wait for one another where they add up."""
    barrier = threading.Barrier(count, timeout=60)
    given: list[Tensor] = [torch.empty(0)] * count

    def work(index: int) -> Tensor:
        def reduce(values: Tensor, how: str) -> None:
            given[index] = values.clone()
            barrier.wait()
            stacked = torch.stack(given)
            barrier.wait()
            values.copy_(stacked.sum(0) if how == "sum" else stacked.amax(0))

        return compute(TiledImages(images, shard=(index, count), reduce=reduce))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("size", [5, 50])  # fewer images than shares, too
def test_shares_of_the_images_add_up(monkeypatch, count, size):
    monkeypatch.setattr(posterior, "_TILE", 8)
    images, own, noise = pixels(size, 12), torch.arange(20) % size, gaussian(20, 12)
    sigmas = every_row(SIGMAS[::3], 20)
    noise[:5] += (images[0] - images[own[:5]]) / 0.01  # overflows at small sigmas: the largest weight is asked for
    x = gaussian(20, 12)
    for compute in (
        lambda data: posterior_means(data, own, noise, sigmas),
        lambda data: posterior_means(data, own, noise, sigmas[:1]),
        lambda data: posterior_means_of(data, x, torch.full((20,), 0.05, dtype=torch.float64)),
    ):
        whole = compute(TiledImages(images))
        for share in in_shares(images, count, compute):
            torch.testing.assert_close(share, whole, rtol=0, atol=2e-6)
    covered = [span for i in range(count) for span in TiledImages(images, shard=(i, count)).spans()]
    assert sorted(n for span in covered for n in range(span.start, span.stop)) == list(range(size))
