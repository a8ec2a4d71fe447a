from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.contracts import Conditioning, Denoiser
from multistage_diffusion.data import GaussianMixture
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.guidance import Guided
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.schedules import EDM

F64 = torch.float64
WIDE = {
    "network__encoder_width": 64,
    "network__decoder_widths": (64, 64, 64),
}  # GroupNorm(32, 32) would drop the embedding
FAMILIES = {
    "ncsnpp": {"diffusion__precondition": "vp-eps"},
    "ddpmpp": {},
    "ldm": {"diffusion__precondition": "velocity", **WIDE},
}


@pytest.fixture(params=FAMILIES)
def network(request, tiny_config):
    """A class-conditional three-stage denoiser in float64 with an input for augmentation labels, no weight near zero."""
    changes = FAMILIES[request.param]
    config = tiny_config(network__family=request.param, network__num_classes=3, network__augment_dim=9, **changes)
    torch.manual_seed(0)
    denoiser = build_denoiser(config).to(F64).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser


class Classes:
    """The exact class-conditional denoiser of a Gaussian mixture whose components are the classes."""

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = mixture

    def of(self, label: int) -> GaussianMixture:
        """The mixture of one class, or of all for -1."""
        rows = slice(None) if label < 0 else slice(label, label + 1)
        return GaussianMixture(self.mixture.weights[rows], self.mixture.means[rows], self.mixture.stds[rows])

    def __call__(self, x, sigma, cond=None):
        labels = torch.full((len(x),), -1) if cond is None else cond.labels
        rows = [self.of(int(k))(x[i : i + 1], sigma[i : i + 1]) for i, k in enumerate(labels)]
        return torch.cat(rows)


@pytest.fixture
def classes():
    means = torch.tensor([[-1.0, 0.5], [0.2, -0.3], [0.9, 0.8]], dtype=F64)
    return Classes(GaussianMixture(torch.tensor([0.5, 0.2, 0.3]), means, torch.tensor([0.4, 0.2, 0.3])))


def batch(rows=6):
    """Noisy images of all stages in no order, labels with one hidden, augmentation labels."""
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.9, 0.05, 0.3, 5.0, 0.1, 0.59], dtype=F64)[:rows]
    cond = Conditioning(
        labels=torch.tensor([2, 0, 1, 1, -1, 0])[:rows], augment=torch.randn(rows, 9, dtype=F64, generator=g)
    )
    return torch.randn(rows, 1, 4, 4, dtype=F64, generator=g), sigma, cond


def test_is_a_denoiser(classes):
    assert isinstance(Guided(classes, 2.0), Denoiser)


@torch.no_grad()
def test_one_call_of_both_halves_equals_two_calls(network):
    x, sigma, cond = batch()
    labelled = network(x, sigma, cond)
    free = network(x, sigma, replace(cond, labels=torch.full((6,), -1)))
    assert float((labelled - free).abs().amax(dim=(1, 2, 3)).sort()[0][1]) > 1e-3  # all but the hidden label matter
    for weight in (0.3, 1.5, 4.0):
        found = Guided(network, weight)(x, sigma, cond)
        torch.testing.assert_close(found, free + weight * (labelled - free), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_one_sigma_as_a_number_gives_the_same_as_in_every_row(network, classes):
    x, _, cond = batch()
    for weight in (0.0, 1.0, 2.5):
        for denoiser, rows, known in (
            (network, x, cond),
            (classes, x.flatten(1)[:, :2], Conditioning(labels=cond.labels)),
        ):
            guided = Guided(denoiser, weight)
            expected = guided(rows, torch.full((6,), 0.3, dtype=F64), known)
            assert torch.equal(guided.uniform(rows, 0.3, known), expected)
    with pytest.raises(ValueError, match="guidance"):
        Guided(network, 2.0).uniform(x, 0.3)


@pytest.mark.parametrize("solver", ["dpm", "heun"])
def test_trajectories_at_0_are_unconditional_and_at_1_conditional(network, solver):
    config = SamplingConfig(solver=solver, calls=5, spacing="edm", sigma_min=0.05, sigma_max=10.0)
    plan = make_plan(config, EDM())  # through all three stages
    start = start_noise(0, torch.arange(3), (1, 4, 4), plan, F64)
    cond = Conditioning(labels=torch.tensor([0, 1, 2]))
    ends = {weight: sample(Guided(network, weight), start, plan, cond) for weight in (0.0, 1e-9, 1.0, 1.0 + 1e-9, 2.0)}
    free, labelled = sample(network, start, plan), sample(network, start, plan, cond)
    near = {"rtol": 1e-6, "atol": 1e-6}
    for weight, expected in [(0.0, free), (1e-9, free), (1.0, labelled), (1.0 + 1e-9, labelled)]:
        torch.testing.assert_close(ends[weight], expected, **near)
    for other in (free, labelled):
        assert float((ends[2.0] - other).abs().max()) > 1e-3
    assert float((free - labelled).abs().max()) > 1e-3


def test_the_score_is_that_of_the_guided_density(classes):
    labels = torch.tensor([0, 1, 2, 2])
    x = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma = torch.tensor([0.1, 0.4, 1.0, 3.0], dtype=F64)
    for weight in (0.5, 2.0, 7.5):
        conditional = torch.stack([classes.of(int(k)).log_density(x, sigma)[i] for i, k in enumerate(labels)])
        log_density = (1 - weight) * classes.mixture.log_density(x, sigma) + weight * conditional
        score = torch.autograd.grad(log_density.sum(), x)[0]
        guided = Guided(classes, weight)(x, sigma, Conditioning(labels=labels))
        torch.testing.assert_close((guided - x) / sigma[:, None] ** 2, score, rtol=1e-9, atol=1e-9)


def test_guided_samples_of_equally_wide_gaussians_follow_the_closed_form():
    """With N(0, s²) without and N(m, s²) with its label, the guided flow is that of N(w m, s²)."""
    m, s = torch.tensor([1.0, -2.0], dtype=F64), 0.5

    def denoiser(x, sigma, cond=None):
        mean = torch.where(cond.labels[:, None] < 0, 0.0, m)
        gain = s**2 / (s**2 + sigma[:, None] ** 2)
        return mean + gain * (x - mean)

    config = SamplingConfig(solver="dpm++", calls=60, order=3, sigma_min=0.01, sigma_max=20.0, denoise_last="never")
    plan = make_plan(config, EDM())
    start = start_noise(0, torch.arange(5), (2,), plan, F64)
    cond = Conditioning(labels=torch.zeros(5, dtype=torch.int64))
    for weight in (0.5, 3.0):
        mean = weight * m
        expected = mean + (start - mean) * ((s**2 + 0.01**2) / (s**2 + 20.0**2)) ** 0.5
        torch.testing.assert_close(sample(Guided(denoiser, weight), start, plan, cond), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("weight", "rows"), [(0.0, 6), (1.0, 6), (0.5, 12), (3.0, 12)])
def test_other_weights_than_0_and_1_double_the_rows_of_one_call(weight, rows):
    seen = []

    def denoiser(x, sigma, cond):
        seen.append((len(x), len(sigma), len(cond.labels), len(cond.augment)))
        return x

    Guided(denoiser, weight)(*batch())
    assert seen == [(rows,) * 4]


@pytest.mark.parametrize("cond", [None, Conditioning(), Conditioning(augment=torch.zeros(6, 9))])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_guidance_without_labels_is_refused(classes, weight, cond):
    x, sigma, _ = batch()
    with pytest.raises(
        ValueError, match=rf"sampling\.guidance={weight}: .* set it to 1, or .*network\.num_classes > 0"
    ):
        Guided(classes, weight)(x, sigma, cond)


def test_a_weight_of_1_needs_no_labels(classes):
    x, sigma = torch.zeros(2, 2, dtype=F64), torch.ones(2, dtype=F64)
    assert torch.equal(Guided(classes, 1.0)(x, sigma), classes(x, sigma))
