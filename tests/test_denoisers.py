from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multistage_diffusion.contracts import Conditioning, Denoiser
from multistage_diffusion.denoisers import MultiStageDenoiser, build_denoiser
from multistage_diffusion.preconditioning.edm import EDMPreconditioning
from multistage_diffusion.preconditioning.velocity import Velocity
from multistage_diffusion.preconditioning.vp_eps import VPEps
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stages import Stages

SIGMAS = torch.tensor([0.002, 0.03, 0.4, 1.0, 7.0, 80.0], dtype=torch.float64)
ALL = [VPEps(VP()), VPEps(Discrete()), EDMPreconditioning(0.5), EDMPreconditioning(1.3), Velocity()]
NAMES = ["vp-eps", "discrete-eps", "edm", "edm-1.3", "velocity"]
preconditionings = pytest.mark.parametrize("precondition", ALL, ids=NAMES)


def column(v: torch.Tensor) -> torch.Tensor:
    return v[:, None, None, None]


def noisy_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    y, noise = (torch.randn(len(SIGMAS), 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return y, noise, y + column(SIGMAS) * noise


# -- analytic networks ------------------------------------------------------------------------------------------------


class GaussianNetwork(nn.Module):
    """Returns the optimal F for data N(mean, variance), from what a network is given only: c_in x and c_noise."""

    def __init__(self, precondition, mean: float, variance: float) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.precondition, self.mean, self.variance = precondition, mean, variance

    def sigma_of(self, noise: torch.Tensor) -> torch.Tensor:
        if isinstance(self.precondition, EDMPreconditioning):
            return torch.exp(4 * noise)
        if isinstance(self.precondition, Velocity):
            return (noise / 999) / (1 - noise / 999)
        schedule = self.precondition.schedule
        return schedule.sigma(noise if schedule.kind == "discrete" else noise / 999)

    def forward(self, scaled, noise, counts, cond=None):
        sigma = self.sigma_of(noise)
        c = self.precondition.coefficients(sigma)
        x = scaled / column(c.input)
        wiener = (self.variance * x + column(sigma**2) * self.mean) / (self.variance + column(sigma**2))
        return (wiener - column(c.skip) * x) / column(c.out)


@preconditionings
def test_optimal_f_of_gaussian_data_makes_the_wiener_filter(precondition):
    sigma = torch.tensor([0.05, 0.4, 1.0, 7.0, 80.0, 0.4], dtype=torch.float64)
    y, noise, _ = noisy_rows()
    x = y + column(sigma) * noise
    denoiser = MultiStageDenoiser(GaussianNetwork(precondition, 0.3, 0.6), Stages((0.5,)), precondition)
    expected = (0.6 * x + column(sigma**2) * 0.3) / (0.6 + column(sigma**2))
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-8, atol=1e-8)


class StageNetwork(nn.Module):
    """F is the decoder's number."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, noise, counts, cond=None):
        stage = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).double()
        return column(stage).expand_as(x)


def decoders_used(sigmas: list[float]) -> list[int]:
    denoiser = MultiStageDenoiser(StageNetwork(), Stages((0.5, 2.0)), VPEps(VP()))
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    d = denoiser(torch.zeros(len(sigmas), 1, 1, 1, dtype=torch.float64), sigma)  # D = -sigma F
    return [round(v) for v in (-d.flatten() / sigma).tolist()]


def test_decoder_is_chosen_row_by_row_and_an_edge_belongs_above():
    below = math.nextafter(0.5, 0)
    assert decoders_used([3.0, 0.5, 1.0, below, 2.0, 0.1]) == [2, 1, 1, 0, 2, 0]
    assert decoders_used([0.5]) == [1]
    assert decoders_used([below]) == [0]


@pytest.mark.slow
def test_a_compiled_denoiser_is_called_like_any_other():
    """In two stages, at more noise levels than dynamo compiles graphs for."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    plain = MultiStageDenoiser(GaussianNetwork(Velocity(), 0.3, 0.6), Stages((0.5,)), Velocity())
    compiled = torch.compile(plain, backend=backend)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 1, 2, 2)
    with torch.no_grad():
        for sigma in [0.02 * 1.5**i for i in range(15)]:
            torch.testing.assert_close(compiled(x, sigma), plain(x, sigma), rtol=1e-14, atol=1e-14)
    assert graphs


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_impossible_sigma_is_refused(tiny_config, bad):
    denoiser = build_denoiser(tiny_config())
    with pytest.raises(ValueError, match="sigma"):
        denoiser(torch.zeros(2, 1, 4, 4), torch.tensor([0.1, bad]))
    with pytest.raises(ValueError, match="sigma"):
        denoiser(torch.zeros(2, 1, 4, 4), bad)


# -- the real network -------------------------------------------------------------------------------------------------


@pytest.fixture
def denoiser(tiny_config):
    """A float64 three-decoder denoiser with labels, its near-zero last layers filled, so that every path matters."""
    torch.manual_seed(0)
    config = tiny_config(network__num_classes=3, network__channel_mult=(1, 2), network__attention_factors=(2,))
    made = build_denoiser(config).double().eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made


@pytest.fixture
def mixed():
    g = torch.Generator().manual_seed(3)
    sigma = torch.tensor([5.0, 0.1, 0.3, 0.05, 0.9, 0.2, 0.6], dtype=torch.float64)
    x = torch.randn(7, 1, 4, 4, generator=g, dtype=torch.float64) * column(1 + sigma)
    return x, sigma, Conditioning(labels=torch.tensor([0, -1, 2, 1, 1, 0, 2]))


def test_mixed_batch_equals_row_by_row_with_gradients(denoiser, mixed):
    x, sigma, cond = mixed

    def run(by_row: bool):
        denoiser.zero_grad()
        inputs = x.clone().requires_grad_()
        if by_row:
            rows = [slice(i, i + 1) for i in range(len(x))]
            out = torch.cat([denoiser(inputs[r], sigma[r], cond.rows(r)) for r in rows])
        else:
            out = denoiser(inputs, sigma, cond)
        (out * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        grads = {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}
        return out.detach(), inputs.grad, grads

    (out, dx, grads), (out_rows, dx_rows, grads_rows) = run(False), run(True)
    torch.testing.assert_close(out, out_rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, dx_rows, rtol=1e-9, atol=1e-9)
    assert grads.keys() == grads_rows.keys() == {n for n, _ in denoiser.named_parameters()}
    for name in grads:
        torch.testing.assert_close(grads[name], grads_rows[name], rtol=1e-8, atol=1e-8)


def test_counts_of_sorted_rows_give_the_same_as_looking_up_the_stage(denoiser, mixed):
    x, sigma, cond = mixed
    order = torch.argsort(sigma)
    x, sigma, cond = x[order], sigma[order], cond.rows(order)
    with torch.no_grad():
        by_counts = denoiser(x, sigma, cond, counts=(2, 2, 3))
        assert torch.equal(by_counts, denoiser(x, sigma, cond))
        c = denoiser.preconditioning.coefficients(sigma)
        by_hand = column(c.skip) * x + column(c.out) * denoiser.output(x, sigma, (2, 2, 3), cond)
    torch.testing.assert_close(by_counts, by_hand)


def test_one_sigma_as_a_number_gives_the_same_as_in_every_row(denoiser, mixed):
    x, _, cond = mixed
    with torch.no_grad():
        for sigma in (0.05, math.nextafter(0.2, 0), 0.2, 0.3, 0.6, 5.0):  # 0.2 and 0.6 are edges
            expected = denoiser(x, torch.full((7,), sigma, dtype=torch.float64), cond)
            assert torch.equal(denoiser(x, sigma, cond), expected)


def test_only_the_decoders_with_rows_get_a_gradient(denoiser, mixed):
    x, _, cond = mixed
    denoiser(x, torch.full((7,), 0.3, dtype=torch.float64), cond).sum().backward()
    with_gradient = {
        name for name, part in denoiser.network.parts().items() if any(p.grad is not None for p in part.parameters())
    }
    assert with_gradient == {"encoder", "decoder.2"}


@pytest.mark.parametrize("precondition", ["vp-eps", "edm", "velocity"])
def test_denoiser_keeps_the_dtype_and_is_the_identity_without_noise(tiny_config, precondition):
    denoiser = build_denoiser(tiny_config(diffusion__precondition=precondition)).eval()
    assert isinstance(denoiser, Denoiser)
    x = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        out = denoiser(x, torch.tensor([0.0, 0.3, 2.0]))
        assert denoiser(x.double(), torch.tensor([0.0, 0.3, 2.0])).dtype == torch.float64
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out[0], x[0])
