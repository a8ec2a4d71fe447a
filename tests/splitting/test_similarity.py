from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.schedules import VP
from multistage_diffusion.splitting import similarity
from multistage_diffusion.splitting.similarity import limit_similarities, sample_similarities, similarity_matrix

ETA = 2 / 256


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().images / 16, dtype=torch.float32)


def test_golden_similarities(digits):
    golden = load_file(Path(__file__).parents[1] / "golden" / "optimal_denoiser_digits.safetensors")
    y, noise = digits[golden["index"]].flatten(1), golden["noise"].flatten(1)
    s0, s1 = limit_similarities(OptimalDenoiser(digits), y, noise, VP().sigma(golden["t"]), eta=ETA, space="eps")
    for found, expected in ((s0, golden["similarity_to_t0"]), (s1, golden["similarity_to_t1"])):
        assert float((found - expected).abs().max()) < 1e-2 * float(expected.max())


def test_x0_space_does_not_divide_by_sigma():
    data = torch.tensor([[0.0], [1.0]])
    denoiser = OptimalDenoiser(data)
    y, sigma = data[:1], torch.tensor([2.0], dtype=torch.float64)
    mean = float(denoiser(y, sigma))  # |m - y| = m and |m - 0.5| = 0.5 - m
    for space, scale in (("x0", 1.0), ("eps", 0.5)):
        for slack, expected in ((1.01, 1.0), (0.99, 0.0)):
            s0, _ = limit_similarities(denoiser, y, torch.zeros(1, 1), sigma, eta=scale * mean * slack, space=space)
            _, s1 = limit_similarities(
                denoiser, y, torch.zeros(1, 1), sigma, eta=scale * (0.5 - mean) * slack, space=space
            )
            assert (float(s0), float(s1)) == (expected, expected)


def test_samples_are_uniform_in_time_and_keyed(digits, monkeypatch):
    denoiser = OptimalDenoiser(digits[:50])
    options = {"eta": ETA, "space": "eps", "measure": VP(t_min=0.2, t_max=0.6)}
    curves = sample_similarities(denoiser, samples=4000, seed=3, **options)
    assert 0.2 < float(curves.t.min()) < 0.201
    assert 0.599 < float(curves.t.max()) < 0.6
    assert float(curves.t.mean()) == pytest.approx(0.4, abs=0.01)
    assert all(float(s.min()) >= 0 and float(s.max()) <= 1 for s in (curves.s0, curves.s1))
    assert not torch.equal(curves.t, sample_similarities(denoiser, samples=4000, seed=4, **options).t)
    monkeypatch.setattr(similarity, "_CURVE_ROWS", 700)
    done = []
    fewer = sample_similarities(denoiser, samples=1500, seed=3, progress=lambda n, of: done.append((n, of)), **options)
    assert done == [(700, 1500), (1400, 1500), (1500, 1500)]
    for values, prefix in zip(curves, fewer, strict=True):
        torch.testing.assert_close(prefix, values[:1500], rtol=0, atol=2 / 64)  # a coordinate on the threshold may flip


@pytest.mark.parametrize("space", ["x0", "eps"])
def test_matrix_equals_the_pairwise_definition(digits, space, monkeypatch):
    monkeypatch.setattr(similarity, "_MATRIX_ROWS", 7)
    data, samples, seed = digits[:30], 20, 5
    denoiser = OptimalDenoiser(data, dtype=torch.float64)
    nodes = torch.tensor([0.05, 0.2, 0.3, 0.7], dtype=torch.float64)
    options = {"samples": samples, "eta": ETA, "space": space, "measure": VP(), "seed": seed}
    matrix = similarity_matrix(denoiser, nodes, **options)
    y, noise = similarity._draw(denoiser, torch.arange(samples), seed)
    outputs = []
    for sigma in VP().sigma(nodes):
        x = y + sigma * noise
        mean = denoiser(x, sigma.expand(samples))
        outputs.append(mean if space == "x0" else (x - mean) / sigma)
    expected = torch.tensor([[((a - b).abs() <= ETA).double().mean() for a in outputs] for b in outputs])
    torch.testing.assert_close(matrix, expected.double(), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert 0.1 < float(matrix[0, 1]) < 1
