import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import similarity
from multistage_diffusion.stage_finding.posterior import TiledImages
from multistage_diffusion.stage_finding.similarity import (
    agreement,
    draw,
    limit_similarities,
    outside_pairs,
    pair_similarities,
    sample_similarities,
)

ETA = 2 / 256
EPS = {"eta": ETA, "space": "eps", "measure": VP()}
NODES = torch.tensor([0.05, 0.2, 0.3, 0.7], dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> TiledImages:
    return TiledImages(torch.tensor(load_digits().images / 16, dtype=torch.float32), (0.0, 1.0))


@pytest.fixture(scope="module")
def few() -> TiledImages:
    return TiledImages(torch.tensor(load_digits().images[:30] / 16, dtype=torch.float32), (0.0, 1.0))


def exact_mean(data: TiledImages, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the posterior mean of centred x (B, D) at sigma (B,) in float64, from squared distances."""
    images = data.rows(torch.arange(len(data))).double()
    weights = torch.softmax(-0.5 * (x[:, None] - images).square().sum(-1) / sigma[:, None] ** 2, dim=1)
    return weights @ images


def test_golden_similarities(digits):
    golden = load_file(Path(__file__).parents[1] / "golden" / "optimal_denoiser_digits.safetensors")
    noise, sigma = golden["noise"].flatten(1), VP().sigma(golden["t"])
    found = limit_similarities(digits, golden["index"], noise, sigma[None], eta=ETA, space="eps")
    for values, name in zip(found, ("similarity_to_t0", "similarity_to_t1"), strict=True):
        assert float((values[0] - golden[name]).abs().max()) < 1e-2 * float(golden[name].max())


@pytest.mark.parametrize(("space", "scale"), [("x0", 1.0), ("eps", 0.5)])
def test_x0_space_does_not_divide_by_sigma(space, scale):
    # y = 0 of {0, 1} at x = 0 and sigma = 2: m = 1 / (1 + exp(1/8)), |m - y| = m, |m - mean image| = 1/2 - m
    data, sigma = TiledImages(torch.tensor([[0.0], [1.0]]), (0.0, 1.0)), torch.tensor([[2.0]], dtype=torch.float64)
    mean = 1 / (1 + math.exp(1 / 8))
    for slack, expected in ((1.01, 1.0), (0.99, 0.0)):
        for which, distance in enumerate((mean, 0.5 - mean)):
            both = limit_similarities(
                data, torch.tensor([0]), torch.zeros(1, 1), sigma, eta=scale * distance * slack, space=space
            )
            assert float(both[which]) == expected


def test_agreement_counts_coordinates_within_the_threshold():
    difference = torch.tensor([[[0.1, -0.2, 0.3, -0.4], [0.0, 0.0, 0.5, 0.5]], [[0.1] * 4, [0.2] * 4]])
    threshold = torch.tensor([[[0.25], [0.5]], [[0.05], [0.3]]])
    found = agreement(difference, threshold)
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.5, 1.0], [0.0, 1.0]]


@pytest.mark.parametrize("times", [1, 2, 32])
def test_times_are_spread_evenly_from_a_uniform_start(few, times):
    measure = VP(t_min=0.2, t_max=0.6)
    curves = sample_similarities(few, range(2000), times=times, seed=3, **{**EPS, "measure": measure})
    assert {values.shape for values in curves} == {(2000, times)}
    assert {values.dtype for values in curves} == {torch.float64}
    torch.testing.assert_close(
        curves.t.diff(dim=1), torch.full((2000, times - 1), 0.4 / times, dtype=torch.float64), rtol=0, atol=1e-12
    )
    # every time fills its own share of the domain, uniformly (Kolmogorov and Smirnov's statistic, 1 in 1000)
    for place in (0, times - 1):
        share = ((curves.t[:, place] - 0.2) / 0.4 * times - place).sort().values
        steps = torch.arange(2001, dtype=torch.float64) / 2000
        assert float(torch.maximum(steps[1:] - share, share - steps[:-1]).max()) < 1.95 / math.sqrt(2000)


def test_one_time_per_sample_is_the_published_estimator(few):
    curves = sample_similarities(few, range(300), times=1, seed=7, **EPS)
    u = rng.uniform((7, "similarity-t"), torch.arange(300), 1)
    torch.testing.assert_close(curves.t, 1e-3 + (1 - 1e-3) * u, rtol=0, atol=1e-12)
    own, noise = draw(few, torch.arange(300), 7)
    sigma = VP().sigma(curves.t[:, 0])
    y = few.rows(own).double()
    x = y + sigma[:, None] * noise.double()
    mean = exact_mean(few, x, sigma)
    s0 = (((x - mean) / sigma[:, None] - noise.double()).abs() <= ETA).double().mean(1)
    s1 = ((x / sigma[:, None] - (x - mean) / sigma[:, None]).abs() <= ETA).double().mean(1)
    for found, expected in ((curves.s0, s0), (curves.s1, s1)):
        torch.testing.assert_close(found[:, 0], expected, rtol=0, atol=1.01 / 64)  # one coordinate on the threshold
        assert float((found[:, 0] != expected).double().mean()) < 0.02


@pytest.mark.parametrize("times", [1, 5])
def test_a_sample_is_the_same_whatever_the_others_and_the_chunks(few, monkeypatch, times):
    whole = sample_similarities(few, range(150), times=times, seed=3, **EPS)
    assert not torch.equal(whole.t, sample_similarities(few, range(150), times=times, seed=4, **EPS).t)
    monkeypatch.setattr(similarity, "_ROWS", 17)
    done: list[tuple[int, int]] = []
    part = sample_similarities(
        few, range(100, 150), times=times, seed=3, progress=lambda *count: done.append(count), **EPS
    )
    assert done == [(17, 50), (34, 50), (50, 50)]
    strided = sample_similarities(few, range(150)[1::3], times=times, seed=3, **EPS)
    for values, some, every_third in zip(whole, part, strided, strict=True):
        torch.testing.assert_close(some, values[100:], rtol=0, atol=1.01 / 64)  # a coordinate on the threshold may flip
        torch.testing.assert_close(every_third, values[1::3], rtol=0, atol=1.01 / 64)
    assert torch.equal(part.t, whole.t[100:])


def test_rows_of_a_chunk_make_room_for_the_sums_of_all_times(few, monkeypatch):
    monkeypatch.setattr(similarity, "_NUMBERS", 3 * 5 * 64)
    done: list[int] = []
    sample_similarities(few, range(7), times=5, progress=lambda count, _: done.append(count), **EPS)
    assert done == [3, 6, 7]
    monkeypatch.setattr(similarity, "_NUMBERS", 1)
    sample_similarities(few, range(2), times=5, progress=lambda count, _: done.append(count), **EPS)
    assert done[3:] == [1, 2]


def test_no_samples_are_an_empty_share(few):
    assert {values.shape for values in sample_similarities(few, range(0), times=5, **EPS)} == {(0, 5)}
    assert pair_similarities(few, NODES, range(0), **EPS).shape == (0, 4, 4)


def test_several_times_per_sample_have_the_mean_of_one(digits):
    one = sample_similarities(digits, range(6000), times=1, seed=1, **EPS)
    many = sample_similarities(digits, range(600), times=32, seed=2, **EPS)
    for name in ("s0", "s1"):
        means, errors = [], []
        for curves in (one, many):
            per_sample = getattr(curves, name).mean(1)
            means.append(float(per_sample.mean()))
            errors.append(float(per_sample.std()) / math.sqrt(len(per_sample)))
        assert abs(means[0] - means[1]) < 3 * math.hypot(*errors)
        assert errors[0] < 0.01
        assert errors[1] < 0.01


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_pairs_equal_the_pairwise_definition(few, space, monkeypatch):
    monkeypatch.setattr(similarity, "_ROWS", 7)
    done: list[tuple[int, int]] = []
    options = {"eta": ETA, "space": space, "measure": VP(), "seed": 5}
    found = pair_similarities(few, NODES, range(20), progress=lambda *count: done.append(count), **options)
    assert done == [(7, 20), (14, 20), (20, 20)]
    assert found.shape == (20, 4, 4)
    own, noise = draw(few, torch.arange(20), 5)
    outputs = []
    for sigma in VP().sigma(NODES):
        x = few.rows(own).double() + sigma * noise.double()
        mean = exact_mean(few, x, sigma.expand(20))
        outputs.append(mean if space == "x0" else (x - mean) / sigma)
    expected = torch.stack([torch.stack([((a - b).abs() <= ETA).double().mean(1) for a in outputs]) for b in outputs])
    torch.testing.assert_close(found.double(), expected.permute(2, 0, 1), rtol=0, atol=1.01 / 64)
    assert float((found.double() - expected.permute(2, 0, 1)).abs().mean()) < 1e-3
    assert torch.equal(found, found.mT)
    assert bool((found.diagonal(dim1=1, dim2=2) == 1).all())
    assert 0.1 < float(found[:, 0, 1].mean()) < 1
    torch.testing.assert_close(
        pair_similarities(few, NODES, range(10, 20), **options), found[10:], rtol=0, atol=1.01 / 64
    )


@pytest.mark.parametrize("space", ["x0", "eps"])
@pytest.mark.parametrize("rows", [1024, 3])
def test_images_of_the_data_have_the_same_pairs_from_outside(few, space, rows, monkeypatch):
    monkeypatch.setattr(similarity, "_ROWS", rows)
    options = {"eta": ETA, "space": space, "measure": VP(), "seed": 5}
    inside = pair_similarities(few, NODES, range(8), **options)
    own, _ = draw(few, torch.arange(8), 5)
    for dtype in (torch.float32, torch.float64):
        numbered = outside_pairs(few, few.rows(own).to(dtype), NODES, 8, numbered=True, **options)
        drawn = outside_pairs(few, few.rows(torch.arange(30)).to(dtype), NODES, 8, **options)
        assert numbered.dtype == dtype
        torch.testing.assert_close(numbered, drawn, rtol=0, atol=1e-12)
        torch.testing.assert_close(numbered.to(inside), inside, rtol=0, atol=1.01 / 64)


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_pairs_of_images_outside_the_data_equal_the_definition(few, space):
    others = torch.tensor(load_digits().images[500:600] / 16).flatten(1) - few.mean_image
    found = outside_pairs(few, others, NODES, 12, eta=ETA, space=space, measure=VP(), seed=2)
    rows = torch.arange(12)
    y = others[(rng.uniform((2, "similarity-y"), rows, 1)[:, 0] * 100).long()]
    noise = rng.normal((2, "similarity-noise"), rows, (64,)).double()
    outputs = []
    for sigma in VP().sigma(NODES):
        mean = exact_mean(few, y + sigma * noise, sigma.expand(12))
        outputs.append(mean if space == "x0" else (y + sigma * noise - mean) / sigma)
    expected = torch.stack([torch.stack([((a - b).abs() <= ETA).double().mean(1) for a in outputs]) for b in outputs])
    torch.testing.assert_close(found, expected.permute(2, 0, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("space", "scaled_eta"), [("eps", ETA), ("x0", 2 * ETA)])
def test_eps_space_is_blind_to_a_common_scale_and_x0_space_has_the_units_of_the_data(digits, space, scaled_eta):
    double = TiledImages(2 * torch.tensor(load_digits().images / 16, dtype=torch.float32), (0.0, 2.0))
    own, noise = draw(digits, torch.arange(20), 0)
    sigma = VP().sigma(torch.linspace(0.01, 1, 8, dtype=torch.float64))[:, None].expand(-1, 20)
    one = limit_similarities(digits, own, noise, sigma, eta=ETA, space=space)
    two = limit_similarities(double, own, noise, 2 * sigma, eta=scaled_eta, space=space)
    other = limit_similarities(double, own, noise, 2 * sigma, eta=2 * ETA if space == "eps" else ETA, space=space)
    for values, same, not_same in zip(one, two, other, strict=True):
        torch.testing.assert_close(values, same, rtol=0, atol=1.01 / 64)
        assert float((values - not_same).abs().mean()) > 0.005
