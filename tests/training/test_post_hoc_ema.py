"""Averages of any width from snapshots, against brute-force integrals and sums over recorded weights."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from multistage_diffusion.errors import UserError
from multistage_diffusion.training import checkpoint as ckpt
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.ema import PowerEMA, power_exponent
from multistage_diffusion.training.post_hoc_ema import TOLERANCE, Profile, combination, combinations, inner_products
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

FINE = 2000  # points of a step


def density(profile: Profile, steps: int) -> np.ndarray:
    """Return a profile at FINE points of each of so many steps; 0 after its end."""
    times = (np.arange(steps * FINE) + 0.5) / FINE
    exponent = power_exponent(profile.sigma_rel)
    inside = (exponent + 1) * times**exponent / float(profile.step) ** (exponent + 1)
    return np.where(times < profile.step, inside, 0.0)


def step_weights(profile: Profile, steps: int) -> np.ndarray:
    """Return the weight of each step in an average: the integral of its profile over the step."""
    return density(profile, steps).reshape(steps, FINE).mean(1)


def stored(steps: int, every: int) -> list[Profile]:
    return [Profile(width, step) for step in range(every, steps + 1, every) for width in (0.05, 0.1)]


def test_inner_products_are_the_integrals():
    profiles = [Profile(0.05, 40), Profile(0.1, 40), Profile(0.1, 25), Profile(0.25, 30)]
    values = np.stack([density(profile, 40) for profile in profiles])
    found = inner_products(profiles, profiles[1:]).numpy()
    np.testing.assert_allclose(found, values @ values[1:].T / FINE, rtol=2e-4)


def test_a_stored_profile_is_its_own_combination():
    profiles = stored(60, 10)
    factors, distances = combinations(profiles, profiles)
    torch.testing.assert_close(factors, torch.eye(len(profiles), dtype=torch.float64), rtol=0, atol=1e-9)
    assert distances.max() < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_no_other_combination_whose_factors_sum_to_one_is_nearer(sigma_rel):
    profiles, target = stored(50, 10), Profile(sigma_rel, 50)
    (factors,), (distance,) = (found.numpy() for found in combinations(profiles, [target]))
    values, wanted = np.stack([density(profile, 50) for profile in profiles]), density(target, 50)

    def off(chosen: np.ndarray) -> float:
        return float(np.sqrt(((chosen @ values - wanted) ** 2).mean() / (wanted**2).mean()))

    assert factors.sum() == pytest.approx(1.0, abs=1e-12)
    assert distance == pytest.approx(off(factors), rel=1e-3)
    draw = np.random.default_rng(0)
    for _ in range(50):
        other = draw.normal(size=len(factors))
        other -= other.mean()
        assert off(factors + 0.05 * other) > off(factors)


def test_more_snapshots_come_nearer_to_every_width():
    targets = [Profile(width, 64_000) for width in (0.02, 0.04, 0.07, 0.15, 0.25)]
    far, near = (combinations(stored(64_000, every), targets)[1] for every in (8000, 1000))
    assert (near < far / 5).all()
    assert near.max() < 0.02


@pytest.mark.parametrize(("snapshots", "low", "high"), [(1, 0.037, 0.123), (20, 0.019, 0.264)])
def test_widths_that_are_possible_are_those_of_the_page(snapshots, low, high):
    steps = 1000 * snapshots
    ends = [Profile(width, steps) for width in (low - 0.001, low, high, high + 0.001)]
    _, distances = combinations(stored(steps, 1000), ends)
    assert (distances <= TOLERANCE).tolist() == [False, True, True, False]


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15, 0.2])
def test_an_average_of_another_width_is_that_of_the_recorded_weights(sigma_rel):
    """The error is at most the distance of the step weights times the norm of the weights about their last value."""
    steps, every = 240, 10
    path = torch.from_numpy(np.random.default_rng(1).normal(size=(steps, 8)).cumsum(0) + 100.0)
    weight = torch.nn.Linear(8, 1, bias=False, dtype=torch.float64)
    emas, averages = [PowerEMA(weight, width) for width in (0.05, 0.1)], []
    for step in range(1, steps + 1):
        weight.weight.data = weight.weight.data.copy_(path[step - 1])
        for ema in emas:
            ema.update(1, step - 1)
        if step % every == 0:
            averages += [ema.module.weight.detach().clone() for ema in emas]
    profiles, target = stored(steps, every), Profile(sigma_rel, steps)
    (factors,), (distance,) = combinations(profiles, [target])
    found = (factors @ torch.cat(averages)).numpy()
    wanted = step_weights(target, steps)
    expected = wanted @ path.numpy()
    gap = factors.numpy() @ np.stack([step_weights(profile, steps) for profile in profiles]) - wanted
    spread = np.linalg.norm(path.numpy() - path.numpy()[-1], axis=0)
    assert (np.abs(found - expected) <= np.linalg.norm(gap) * spread + 1e-5).all()
    # profiles within a step are not constant, so the two distances differ a little
    assert np.linalg.norm(gap) == pytest.approx(float(distance) * np.linalg.norm(wanted), rel=0.1)
    assert np.abs(found - expected).max() < 0.05 * np.abs(path.numpy() - expected).mean()


# -- from the files of a run ------------------------------------------------------------------------------------------


class Records(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.path: list[dict[str, torch.Tensor]] = []

    def stepped(self, trainer: Trainer) -> None:
        self.path.append({name: p.detach().clone() for name, p in trainer.denoiser.named_parameters()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config, tiny_data):
    """Return a run with snapshots, and its weights after every step."""
    config = tiny_config(
        training__steps=30,
        training__ema_profiles=[0.05, 0.1],
        training__ema_snapshot_every=4,
        training__checkpoint_every=10,
        training__keep_last=3,
        optimizer__lr=0.01,
    )
    records, run = Records(), Run.create(tmp_path_factory.mktemp("trained") / "run", config)
    Trainer(run, tiny_data(), device="cpu", callbacks=[records]).fit()
    return run, records.path


@pytest.fixture
def copied(trained, tmp_path):
    """Return a copy of the run that a test may spoil."""
    return Run.open(shutil.copytree(trained[0].path, tmp_path / "run"))


@pytest.mark.parametrize("step", [20, 30])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.12])
def test_a_run_s_denoiser_has_the_average_of_the_width(trained, step, sigma_rel):
    run, path = trained
    weights = step_weights(Profile(sigma_rel, step), step)
    kept = [Profile(w, s) for s in sorted({*range(4, step, 4), step}) for w in (0.05, 0.1)]
    (factors,), _ = combinations(kept, [Profile(sigma_rel, step)])
    gap = np.linalg.norm(factors.numpy() @ np.stack([step_weights(p, step) for p in kept]) - weights)
    off = moved = 0.0
    for name, found in run.denoiser(str(step), sigma_rel).named_parameters():
        values = torch.stack([at[name] for at in path[:step]]).double().flatten(1)
        expected = torch.from_numpy(weights) @ values
        bound = gap * (values - values[-1]).norm(dim=0) + 1e-5 * values.abs().max()
        assert ((found.flatten().double() - expected).abs() <= bound).all(), name
        off += float((found.flatten().double() - expected).square().sum())
        moved += float((values[-1] - expected).square().sum())
    assert off < 0.03**2 * moved  # beside the distance of the last weights


def test_a_stored_width_is_read_as_it_is(trained):
    run, _ = trained
    for width in (0.05, 0.1):
        stored = ckpt.load_tensors(run.checkpoint("20"), ckpt.profile_file(width))
        found = run.denoiser("20", width).state_dict()
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[name], stored[name]) for name in found)


def test_snapshots_after_the_checkpoint_are_not_used(trained, copied):
    for path in ckpt.list_checkpoints(copied.snapshots)[5:]:
        shutil.rmtree(path)
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(copied.snapshots)] == [4, 8, 12, 16, 20]
    one, other = (run.denoiser("20", 0.07).state_dict() for run in (trained[0], copied))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 3.0, float("nan")])
def test_widths_that_no_profile_has_are_refused(trained, sigma_rel):
    with pytest.raises(UserError, match=rf"ema={sigma_rel} must be above 0 and below 0\.2887"):
        trained[0].denoiser("latest", sigma_rel)


def test_a_width_that_the_snapshots_do_not_represent_is_refused_with_the_nearest_that_they_do(trained):
    run, _ = trained
    start = r"ema=0\.01: the 16 averages stored up to step 30 give a profile of this width only to within \d\d%; give 0"
    with pytest.raises(UserError, match=start):
        run.denoiser("latest", 0.01)
    for beyond, outwards in ((0.01, -0.001), (0.288, 0.001)):
        with pytest.raises(UserError, match=r"the nearest that they do, .* more snapshots") as error:
            run.denoiser("latest", beyond)
        nearest = float(str(error.value).split("; give ")[1].split(",")[0])
        run.denoiser("latest", nearest)
        with pytest.raises(UserError, match=f"give {nearest}, the nearest"):
            run.denoiser("latest", nearest + outwards)


def test_a_stored_width_is_always_possible():
    with pytest.raises(UserError, match=r"the 1 averages .* give 0\.0004, the nearest"):
        combination([Profile(0.0004, 100)], Profile(0.2, 100))


def test_a_run_without_snapshots_is_refused(tmp_path, tiny_config, tiny_data):
    run = Run.create(tmp_path / "run", tiny_config(training__steps=1))
    Trainer(run, tiny_data(), device="cpu").fit()
    with pytest.raises(UserError, match=r"ema=0\.08: .*step_00000001 holds no averages .*ema_profiles=\[0\.05,0\.1\]"):
        run.denoiser("latest", 0.08)


def test_a_damaged_snapshot_is_named(copied):
    folder = ckpt.list_checkpoints(copied.snapshots)[2]
    file = folder / "ema_0.1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}: .*sha256 differs.* delete {folder}; the other snapshots remain"):
        copied.denoiser("latest", 0.08)
    shutil.rmtree(folder)
    copied.denoiser("latest", 0.08)


@pytest.mark.parametrize("fault", ["is missing", "is not finite", r"is torch.float32 \[1\], not"])
def test_a_snapshot_of_another_network_is_refused(copied, fault):
    folder = ckpt.list_checkpoints(copied.snapshots)[2]
    tensors = {name: ckpt.load_tensors(folder, name) for name in map(ckpt.profile_file, (0.05, 0.1))}
    name = next(iter(dict(copied.denoiser().named_parameters())))
    if fault == "is missing":
        del tensors["ema_0.1"][name]
    else:
        value = tensors["ema_0.1"][name]
        tensors["ema_0.1"][name] = torch.full_like(value, torch.nan) if "finite" in fault else torch.zeros(1)
    ckpt.save_snapshot(copied.snapshots, ckpt.checkpoint_step(folder), tensors)
    with pytest.raises(UserError, match=rf"ema_0\.1\.safetensors: .*{name} {fault}"):
        copied.denoiser("latest", 0.08)
