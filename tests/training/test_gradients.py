from __future__ import annotations

import dataclasses
import itertools
import weakref

import pytest
import torch
from torch import nn

from multistage_diffusion import rng
from multistage_diffusion.config import RunConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.data import to_float
from multistage_diffusion.denoisers import MultiStageDenoiser, build_denoiser
from multistage_diffusion.files import write_json
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from multistage_diffusion.training.gradients import (
    Affinity,
    BinGradients,
    Rows,
    common_borders,
    cosines,
    gradient_affinity,
    inner_products,
    shared_parameters,
)
from multistage_diffusion.training.run import Run

ONE_STAGE = {"network__decoder_widths": [8], "stages__interior": []}
BINS, COUNT = 5, 7


def random_denoiser(config: RunConfig, seed: int) -> MultiStageDenoiser:
    denoiser = build_denoiser(config)
    torch.manual_seed(seed)
    for p in denoiser.parameters():
        nn.init.normal_(p, std=0.2)
    return denoiser


def save(run: Run, step: int) -> None:
    """Save random weights, named by the step, and other averaged ones."""
    model, ema = (random_denoiser(run.config(), seed).state_dict() for seed in (step, step + 1))
    save_checkpoint(run.checkpoints, Checkpoint(model, ema, {}, {"step": step, "config": run.config()}))


@pytest.fixture
def make_run(tmp_path, tiny_config):
    def make(*steps: int, **changes: object) -> Run:
        run = Run.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", tiny_config(**changes))
        for step in steps:
            save(run, step)
        return run

    return make


@pytest.fixture
def y(tiny_data):
    return to_float(tiny_data(COUNT).tensor())


def affinity(run: Run, y: torch.Tensor, labels: torch.Tensor | None = None, **how: object) -> Affinity:
    return gradient_affinity(run, y, labels, **{"measure": VP(), "bins": BINS, **how})


def brute_force(
    config: RunConfig, seed: int, y: torch.Tensor, labels: torch.Tensor | None, *, noise_seed: int = 0
) -> torch.Tensor:
    """Cosines in float64, from denoising errors weighted by 1/c_out², a row at a time."""
    denoiser = random_denoiser(config, seed).double().eval()
    module = denoiser.network if len(config.stages) == 1 else denoiser.network.encoders[0]
    rows = torch.arange(len(y))
    noise = rng.normal((noise_seed, "gradient-noise"), rows, y.shape[1:]).double()
    place = (rows + rng.uniform((noise_seed, "gradient-time"), rows, 1)[:, 0]) / len(y)
    found = []
    for low, high in itertools.pairwise([0.001 + 0.999 * k / BINS for k in range(BINS + 1)]):
        denoiser.zero_grad()
        for i in range(len(y)):
            sigma = VP().sigma(low + (high - low) * place[i])[None]
            cond = None if labels is None else Conditioning(labels=labels[i : i + 1])
            clean = y[i : i + 1].double()
            error = denoiser(clean + sigma * noise[i], sigma, cond) - clean
            loss = (error / denoiser.preconditioning.coefficients(sigma).out).square().mean() / len(y)
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    return torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in found]) for a in found])


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("stages", [1, 3])
def test_affinity_equals_brute_force(make_run, y, stages, classes):
    own = ONE_STAGE if stages == 1 else {"stages__interior": [0.5, 3.0]}  # inside the first and the third bin
    run = make_run(10, network__num_classes=classes, **own)
    labels = torch.arange(COUNT) % 3 if classes else None
    found = affinity(run, y, labels)
    assert found.steps == (10,)
    assert found.borders == pytest.approx([0.001 + 0.999 * k / BINS for k in range(BINS + 1)])
    expected = brute_force(run.config(), 10, y, labels)
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=2e-5)
    assert found.matrix.min() < 0.9  # there is something to compare


@pytest.mark.parametrize("precondition", ["vp-eps", "velocity"])
def test_every_parameterisation_has_its_own_loss(make_run, y, precondition):
    run = make_run(3, diffusion__precondition=precondition, **ONE_STAGE)
    expected = brute_force(run.config(), 3, y, None, noise_seed=5)
    torch.testing.assert_close(affinity(run, y, seed=5).matrix, expected, rtol=0, atol=2e-5)


def test_checkpoints_are_averaged(make_run, y):
    found = affinity(make_run(10, 20, 35, **ONE_STAGE), y)
    alone = [affinity(make_run(step, **ONE_STAGE), y).matrix for step in (10, 20, 35)]
    assert found.steps == (10, 20, 35)
    torch.testing.assert_close(found.matrix, sum(alone) / 3, rtol=0, atol=1e-12)
    assert (alone[0] - alone[1]).abs().max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "made"), [(0, 15), (2, 9), (4, 6), (100, 5)])
def test_little_memory_costs_time_alone(make_run, y, fit, made):
    run = make_run(10, 20)
    size = sum(p.numel() for p in shared_parameters(run.denoiser()))
    told: list[tuple[int, int]] = []
    found = affinity(run, y, memory=4 * size * fit, progress=lambda done, total: told.append((done, total)))
    torch.testing.assert_close(found.matrix, affinity(run, y).matrix, rtol=0, atol=1e-12)
    assert told == [(i, 2 * made) for i in range(1, 2 * made + 1)]


@pytest.mark.parametrize("fit", [1, 3])
def test_no_more_gradients_are_kept_than_fit(fit):
    alive: list[weakref.ref[torch.Tensor]] = []

    def vector(k: int) -> torch.Tensor:
        assert sum(ref() is not None for ref in alive) <= fit
        made = torch.ones(4)
        alive.append(weakref.ref(made))
        return made

    assert torch.equal(inner_products(vector, 7, fit, lambda *_: None), torch.full((7, 7), 4.0, dtype=torch.float64))


def test_long_gradients_are_summed_in_pieces(monkeypatch):
    monkeypatch.setattr("multistage_diffusion.training.gradients._NUMBERS", 10)
    vectors = torch.randn(4, 37, generator=torch.Generator().manual_seed(0))
    products = inner_products(lambda k: vectors[k], 4, 3, lambda *_: None)
    torch.testing.assert_close(products, vectors.double() @ vectors.double().T)


def test_rows_at_once_do_not_matter(make_run, y):
    run = make_run(10)
    found = affinity(run, y).matrix
    for batch in (1, 3, COUNT):
        torch.testing.assert_close(affinity(run, y, batch=batch).matrix, found, rtol=0, atol=2e-6)


def test_the_seed_decides_the_noise(make_run, y):
    run = make_run(10, network__dropout=0.5)
    found = affinity(run, y).matrix
    torch.rand(3)  # the global generator has no part in it, nor has dropout
    assert torch.equal(affinity(run, y).matrix, found)
    assert (affinity(run, y, seed=1).matrix - found).abs().max() > 1e-3


def test_the_loss_may_have_another_scale_in_every_bin():
    vectors = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = vectors * torch.tensor([1e-6, 3.0, 1e6, 1.0, 0.1, 20.0], dtype=torch.float64)[:, None]
    for fit in (2, 6):
        found = [cosines(inner_products(lambda k, v=v: v[k], 6, fit, lambda *_: None)) for v in (vectors, scaled)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_cosines_of_known_vectors():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-4.0, 0.0], [1e-3, 0.0]], dtype=torch.float64)
    found = cosines(vectors @ vectors.T)
    half = 0.5**0.5
    expected = [1.0, 0.0, half, -1.0, 1.0], [0.0, 1.0, half, 0.0, 0.0], [half, half, 1.0, -half, half]
    torch.testing.assert_close(found[:3], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(found.diagonal(), torch.ones(5, dtype=torch.float64))


def test_images_and_noise_are_common_to_all_bins(tiny_config, y):
    denoiser, rows = build_denoiser(tiny_config()), Rows(y, torch.arange(COUNT), seed=0)
    low, high = (list(rows.batches(denoiser, *borders, VP(), 4)) for borders in ((0.001, 0.5), (0.5, 1.0)))
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.cond.labels, b.cond.labels)
    assert [len(batch.y) for batch in low] == [4, 3]
    assert torch.equal(torch.cat([batch.cond.labels for batch in low]), torch.arange(COUNT))
    for batches, (start, end) in ((low, (0.001, 0.5)), (high, (0.5, 1.0))):
        times = VP().time(torch.cat([batch.sigma for batch in batches]))
        places = (times - start) / (end - start) * COUNT
        assert torch.equal(places.floor(), torch.arange(float(COUNT), dtype=torch.float64))  # one in each seventh
        for batch in batches:
            index = denoiser.stages.index(batch.sigma)
            assert tuple(int((index == k).sum()) for k in range(3)) == batch.counts


def test_only_what_all_noise_levels_share_is_compared(tiny_config):
    one, three = build_denoiser(tiny_config(**ONE_STAGE)), build_denoiser(tiny_config())
    assert {id(p) for p in shared_parameters(one)} == {id(p) for p in one.parameters()}
    assert {id(p) for p in shared_parameters(three)} == {id(p) for p in three.network.encoders[0].parameters()}
    alone = build_denoiser(tiny_config(network__separate=True, **ONE_STAGE))
    assert len(shared_parameters(alone)) == len(list(alone.parameters()))
    with pytest.raises(ValueError, match="separate=True: the stages share no parameters"):
        shared_parameters(build_denoiser(tiny_config(network__separate=True)))


def test_a_gradient_is_that_of_the_mean_loss(tiny_config, y):
    denoiser = random_denoiser(tiny_config(), 0).double().eval()
    double = BinGradients(denoiser, Rows(y.double(), None, 0), (0.001, 0.4, 1.0), VP(), 3)
    vector = double(0)
    # twice the rows of the same kind: a mean does not grow
    rows = Rows(y.double(), None, 0)
    rows.y, rows.noise, rows.place = (torch.repeat_interleave(v, 2, 0) for v in (rows.y, rows.noise, rows.place))
    torch.testing.assert_close(BinGradients(denoiser, rows, (0.001, 0.4, 1.0), VP(), 5)(0), vector)


def test_bins_divide_the_noise_that_kernel_and_run_have_in_common():
    assert common_borders(VP(), VP(), 4) == pytest.approx((0.001, 0.25075, 0.5005, 0.75025, 1.0))
    assert common_borders(VP(), VP(), 1) == (0.001, 1.0)
    assert common_borders(VP(), RectifiedFlow(), 1) == (0.001, 1.0)
    low, high = common_borders(VP(), Discrete(), 1)
    assert VP().sigma(torch.tensor([low, high])) == pytest.approx(Discrete().sigmas[[0, -1]], rel=1e-6)
    low, high = common_borders(VP(), EDM(), 1)
    assert (low, float(VP().sigma(high))) == (0.001, pytest.approx(80.0, rel=1e-6))
    with pytest.raises(ValueError, match="schedule='ve': has no noise between"):
        common_borders(VP(), VE(sigma_min=200.0, sigma_max=1000.0), 4)


def test_what_cannot_be_compared_is_refused(make_run, y):
    empty = make_run()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        affinity(empty, y)
    run = make_run(10)
    with pytest.raises(ValueError, match="bins=0 must be at least 1"):
        affinity(run, y, bins=0)


def test_a_gradient_without_direction_is_refused(make_run, y):
    run = make_run(10)
    still = {k: torch.zeros_like(v) for k, v in build_denoiser(run.config()).state_dict().items()}
    save_checkpoint(run.checkpoints, Checkpoint(still, still, {}, {"step": 20, "config": run.config()}))
    with pytest.raises(ValueError, match="step 20: the gradient of bin 1 of 5 is zero or not finite"):
        affinity(run, y)
    with pytest.raises(ValueError, match="bin 2 of 3 is zero or not finite"):
        cosines(torch.diag(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)))


def test_an_edited_run_is_not_compared(make_run, y):
    run = make_run(10)
    config = dataclasses.replace(run.config(), stages=dataclasses.replace(run.config().stages, interior=(0.2, 0.7)))
    write_json(run.config_file, config)
    with pytest.raises(ValueError, match="stages was edited since step 10"):
        affinity(run, y)
