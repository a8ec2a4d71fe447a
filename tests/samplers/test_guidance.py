from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from densities import log_density

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.contracts import Conditioning, Denoiser, sigma_rows
from multistage_diffusion.data.mixture import GaussianMixture
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.samplers.guidance import Guided, Thresholded
from multistage_diffusion.schedules.edm import EDM

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
        sigma = sigma_rows(x, sigma)
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
            assert torch.equal(guided(rows, 0.3, known), expected)
    with pytest.raises(ValueError, match="guidance"):
        Guided(network, 2.0)(x, 0.3)


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
        conditional = torch.stack([log_density(classes.of(int(k)), x, sigma)[i] for i, k in enumerate(labels)])
        guided_density = (1 - weight) * log_density(classes.mixture, x, sigma) + weight * conditional
        score = torch.autograd.grad(guided_density.sum(), x)[0]
        guided = Guided(classes, weight)(x, sigma, Conditioning(labels=labels))
        torch.testing.assert_close((guided - x) / sigma[:, None] ** 2, score, rtol=1e-9, atol=1e-9)


def test_guided_samples_of_equally_wide_gaussians_follow_the_closed_form():
    """With N(0, s²) without and N(m, s²) with its label, the guided flow is that of N(w m, s²)."""
    m, s = torch.tensor([1.0, -2.0], dtype=F64), 0.5

    def denoiser(x, sigma, cond=None):
        mean = torch.where(cond.labels[:, None] < 0, 0.0, m)
        gain = s**2 / (s**2 + sigma**2)
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


# --- guidance in an interval ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outside_the_interval_the_labelled_answer_stands(network):
    x, sigma, cond = batch()  # sigmas 0.9, 0.05, 0.3, 5.0, 0.1, 0.59
    plain, strong = network(x, sigma, cond), Guided(network, 4.0)(x, sigma, cond)
    found = Guided(network, 4.0, (0.1, 0.9))(x, sigma, cond)
    inside = torch.tensor([True, False, True, False, False, True])  # low < sigma <= high
    torch.testing.assert_close(found[inside], strong[inside], rtol=0, atol=0)
    torch.testing.assert_close(found[~inside], plain[~inside], rtol=0, atol=0)
    for row, within in enumerate(inside.tolist()):
        alone = Guided(network, 4.0, (0.1, 0.9))(x, float(sigma[row]), cond)[row]
        torch.testing.assert_close(alone, (strong if within else plain)[row], rtol=1e-12, atol=1e-12)


def test_outside_the_interval_rows_are_not_doubled():
    seen = []

    def denoiser(x, sigma, cond):
        seen.append(len(x))
        return x

    x, _, cond = batch()
    guided = Guided(denoiser, 3.0, (0.1, 0.9))
    for sigma in (0.1, 0.11, 0.9, 0.91):
        guided(x, sigma, cond)
    assert seen == [6, 12, 12, 6]


def test_an_interval_asks_for_labels_at_every_sigma(classes):
    x, _, _ = batch()
    for sigma in (0.01, 0.5):
        with pytest.raises(ValueError, match=r"sampling\.guidance=3\.0: there are no class labels"):
            Guided(classes, 3.0, (0.1, 0.9))(x.flatten(1)[:, :2], sigma)


def test_an_interval_that_holds_every_sigma_changes_nothing(network):
    plan = make_plan(SamplingConfig(solver="heun", calls=5, spacing="edm", sigma_min=0.05, sigma_max=10.0), EDM())
    start, cond = start_noise(0, torch.arange(3), (1, 4, 4), plan, F64), Conditioning(labels=torch.tensor([0, 1, 2]))
    ends = [
        sample(Guided(network, 2.0, at), start, plan, cond) for at in (None, (0.0, 11.0), (11.0, 12.0), (0.05, 1.0))
    ]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], sample(network, start, plan, cond))
    assert float((ends[3] - ends[0]).abs().max()) > 1e-3
    assert float((ends[3] - ends[2]).abs().max()) > 1e-3


# --- dynamic thresholding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.5, 0.8, 0.995, 1.0])
def test_thresholding_is_the_papers(quantile):
    """Saharia et al. 2022, appendix E: s = max(percentile(|x0|, p), 1); clip(x0, -s, s) / s."""
    x = torch.randn(5, 3, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [0.2, 0.9, 1.5, 3.0, 30.0], dtype=F64
    ).view(5, 1, 1, 1)
    found = Thresholded(lambda x, sigma, cond: x, quantile)(x, torch.ones(5))
    for image, made in zip(x.numpy(), found.numpy(), strict=True):
        s = max(np.quantile(np.abs(image), quantile), 1.0)
        np.testing.assert_allclose(made, np.clip(image, -s, s) / s, rtol=1e-13)
    assert float(found.abs().max()) <= 1.0
    uniform = Thresholded(lambda x, sigma, cond: x, quantile)(x, 0.3)
    assert torch.equal(uniform, found)


def test_images_in_range_are_left_alone_whatever_the_quantile():
    x = torch.rand(3, 1, 4, 4, dtype=F64) * 2 - 1
    assert torch.equal(Thresholded(lambda x, sigma, cond: x, 0.5)(x, torch.ones(3)), x)


def test_thresholding_takes_images_of_any_size_and_one_number():
    big = torch.full((1, 17 * 2**20), 2.0)  # beyond what torch.quantile takes
    assert torch.equal(Thresholded(lambda x, sigma, cond: x, 0.9)(big, torch.ones(1)), torch.ones_like(big))
    one = torch.tensor([[-3.0]])
    assert torch.equal(Thresholded(lambda x, sigma, cond: x, 0.9)(one, torch.ones(1)), -torch.ones(1, 1))


class Halves:
    """Exact for N(-0.5, 0.3²) and N(0.5, 0.3²) in every pixel by class, N(0, 0.3²) without: flows have a closed form."""

    def __call__(self, x, sigma, cond=None):
        mean = torch.where(cond.labels < 0, 0.0, cond.labels - 0.5).view(-1, 1, 1, 1).to(x.dtype)
        return mean + 0.09 / (0.09 + sigma**2) * (x - mean)


def halves(denoiser_of, calls=30):
    """Return start and end of four trajectories, two of each class."""
    config = SamplingConfig(solver="dpm++", method="multistep", order=2, calls=calls, sigma_min=0.01, sigma_max=20.0)
    plan = make_plan(replace(config, denoise_last="never"), EDM())
    cond = Conditioning(labels=torch.tensor([0, 1, 0, 1]))
    start = start_noise(0, torch.arange(4), (1, 4, 4), plan, F64)
    return start, sample(denoiser_of(Halves()), start, plan, cond)


def test_guidance_in_an_interval_follows_the_closed_form():
    """From 20 to 2 towards the class's mean, from 2 to 0.2 towards 16 times it, from there on towards the mean again."""
    start, end = halves(lambda denoiser: Guided(denoiser, 16.0, (0.2, 2.0)), calls=600)
    mean, x = torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=F64).view(4, 1, 1, 1), start
    for weight, high, low in ((1.0, 20.0, 2.0), (16.0, 2.0, 0.2), (1.0, 0.2, 0.01)):
        x = weight * mean + (x - weight * mean) * ((0.09 + low**2) / (0.09 + high**2)) ** 0.5
    torch.testing.assert_close(end, x, rtol=0, atol=0.1)
    assert float((halves(lambda denoiser: Guided(denoiser, 16.0))[1] - x).abs().min()) > 1.0


def test_thresholding_keeps_high_guidance_from_saturating():
    saturated = float((halves(lambda denoiser: Guided(denoiser, 16.0))[1].abs() > 1.01).double().mean())
    assert saturated == 1.0  # the guided mean is at 8
    _, end = halves(lambda denoiser: Thresholded(Guided(denoiser, 16.0), 0.9))
    assert float(end.abs().max()) < 1.05  # noise of 0.01 is left
    assert len(end.unique()) > 10  # not all at the edge
