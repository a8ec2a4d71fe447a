import dataclasses
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.schedules import NoiseSchedule
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import StageResult, StageSettings, compute_stages
from multistage_diffusion.stage_finding.baselines import baseline_partition
from multistage_diffusion.stage_finding.edges import grid_times
from multistage_diffusion.stage_finding.intervals import half_width
from multistage_diffusion.stage_finding.posterior import TiledImages
from multistage_diffusion.stage_finding.similarity import pair_similarities, sample_similarities

DIGITS = load_digits().images / 16
DIGITS_UINT8 = np.round(DIGITS * 255).astype(np.uint8)[:, None]
SOME = DIGITS_UINT8[:200]
FEW = StageSettings(samples=100, times=8, grid=1000)
PAIRS = StageSettings(algorithm=2, samples=100)
BOTH = [FEW, PAIRS]


@pytest.fixture(scope="module")
def result() -> StageResult:
    return compute_stages(SOME, FEW)


@pytest.fixture(scope="module")
def clustered() -> StageResult:
    return compute_stages(SOME, dataclasses.replace(PAIRS, stages=4), held_out=DIGITS_UINT8[200:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("data_range", "expected"), [((0.0, 1.0), (0.0945, 0.441)), ((-1.0, 1.0), (0.188, 0.577))])
def test_algorithm_1_on_digits(data_range, expected, seed):
    low, high = data_range
    images = low + (high - low) * torch.tensor(DIGITS, dtype=torch.float32)[:, None]
    found = compute_stages(images, StageSettings(samples=500, data_range=data_range, seed=seed))
    assert found.edges_t == pytest.approx(expected, abs=0.01)
    assert found.edges_sigma == pytest.approx([float(VP().sigma(t)) for t in found.edges_t])
    assert found.float64_difference < 0.02


@pytest.mark.parametrize(("data_range", "expected"), [((0.0, 1.0), (0.0945, 0.441)), ((-1.0, 1.0), (0.188, 0.577))])
def test_uint8_images_at_one_time_each_as_published(data_range, expected):
    found = compute_stages(DIGITS_UINT8, StageSettings(samples=12_000, times=1, data_range=data_range))
    assert found.edges_t == pytest.approx(expected, abs=0.01)
    for (low, high), edge in zip(found.intervals_t, expected, strict=True):
        assert low < edge < high
        assert high - low < 0.02


@pytest.mark.slow
def test_eps_space_is_blind_to_a_common_scale():
    one = compute_stages(DIGITS_UINT8, StageSettings(samples=500, data_range=(0.0, 1.0)))
    two = compute_stages(DIGITS_UINT8, StageSettings(samples=500))
    for half, whole in zip(one.edges_sigma, two.edges_sigma, strict=True):
        assert whole / half == pytest.approx(2, rel=0.12)  # t runs over other sigmas of the same curve


def test_latents_are_taken_as_they_are():
    latents = np.random.default_rng(0).uniform(-3, 3, (100, 4, 4, 4)).astype(np.float32)
    free = compute_stages(latents, dataclasses.replace(FEW, data_range=None))
    ranged = compute_stages(latents, dataclasses.replace(FEW, data_range=(-3.0, 3.0)))
    assert (free.edges_t, free.curves) == (ranged.edges_t, ranged.curves)
    assert free.strip == ""
    assert ranged.data_range == (-3.0, 3.0)


@pytest.mark.parametrize("schedule", [VE(), EDM(), Discrete(), RectifiedFlow()], ids=lambda s: s.kind)
def test_edges_are_printed_in_the_kernel_asked_for(result, schedule):
    found = compute_stages(SOME, FEW, schedule=schedule)
    assert (found.schedule, found.time_measure) == (schedule, VP())
    assert found.curves == result.curves
    tolerance = 0.02 if schedule.kind == "discrete" else 1e-9  # a discrete edge is a whole step
    assert found.edges_sigma == pytest.approx(result.edges_sigma, rel=tolerance)
    assert found.intervals_sigma == result.intervals_sigma
    assert found.edges_t == tuple(schedule.edge_time(s) for s in result.edges_sigma)
    assert found.intervals_t == tuple(
        tuple(schedule.edge_time(s) for s in interval) for interval in result.intervals_sigma
    )


def test_another_vp_measures_time_itself():
    schedule = VP(beta_d=9.0, t_min=0.01, t_max=2.0)
    found = compute_stages(SOME, dataclasses.replace(FEW, seed=3), schedule=schedule)
    assert (found.schedule, found.time_measure) == (schedule, schedule)
    assert found.edges_sigma == pytest.approx([float(schedule.sigma(t)) for t in found.edges_t])
    t, s0, s1 = sample_similarities(
        TiledImages(SOME), range(100), times=8, eta=2 / 256, space="eps", measure=schedule, seed=3
    )
    taus = [k / 500 for k in range(6, 1000)]
    assert found.edges_t[0] == max(tau for tau in taus if float(s0[t < tau].mean()) >= 0.9)
    assert found.edges_t[1] == min(tau for tau in taus if float(s1[t >= tau].mean()) >= 0.9)


@pytest.mark.parametrize("settings", BOTH)
def test_the_seed_decides_the_samples(settings):
    one, two = (compute_stages(SOME, dataclasses.replace(settings, seed=seed)) for seed in (1, 2))
    assert one.curves != two.curves
    assert one == compute_stages(SOME, dataclasses.replace(settings, seed=1))


@pytest.mark.parametrize("settings", BOTH)
def test_a_schedule_without_the_edges_is_refused(settings):
    schedule = Discrete(steps=3)
    with pytest.raises(ValueError, match=r"stages: edges at sigma = .*: the discrete schedule has steps on one side"):
        compute_stages(SOME, settings, schedule=schedule)


def test_the_table_leaves_out_what_a_schedule_does_not_have():
    schedule = Discrete(steps=800)  # its noise ends below the last edge of many stages
    found = compute_stages(SOME, PAIRS, schedule=schedule)
    whole = compute_stages(SOME, PAIRS, schedule=EDM())
    reached = [
        line["stages"] for line in whole.curves["table"] if max(line["edges_t"], default=0) < schedule.sigmas[-1]
    ]
    assert [line["stages"] for line in found.curves["table"]] == reached
    assert len(reached) < 8


def test_edges_and_curves_come_from_the_samples_of_the_settings(result):
    data = TiledImages(SOME)
    t, s0, s1 = sample_similarities(data, range(100), times=8, eta=2 / 256, space="eps", measure=VP())
    bins = ((t - 1e-3) / 0.999 * 100).long()
    assert result.curves["t"] == pytest.approx(1e-3 + 0.999 * (np.arange(100) + 0.5) / 100, abs=1e-6)
    for name, values in (("s0", s0), ("s1", s1)):
        means = [float(values[bins == b].mean()) for b in range(100)]
        assert result.curves[name] == pytest.approx(means, abs=1e-6)
    taus = [k / 1000 for k in range(2, 1000)]
    assert result.edges_t[0] == max(tau for tau in taus if float(s0[t < tau].mean()) >= 0.9)
    assert result.edges_t[1] == min(tau for tau in taus if float(s1[t >= tau].mean()) >= 0.9)
    for edge, (low, high) in zip(result.edges_t, result.intervals_t, strict=True):
        assert low <= edge <= high
        assert 0 < high - low < 0.1


def test_the_curves_errors_are_those_of_independent_samples():
    # one time each: the standard error of the mean of a bin, as if its number of samples were given
    one = compute_stages(SOME, dataclasses.replace(FEW, samples=3000, times=1))
    data = TiledImages(SOME)
    t, s0, _ = sample_similarities(data, range(3000), times=1, eta=2 / 256, space="eps", measure=VP())
    bins = ((t - 1e-3) / 0.999 * 100).long()
    expected = [float(s0[bins == b].std(correction=0)) / math.sqrt(int((bins == b).sum())) for b in range(100)]
    assert one.curves["s0_error"] == pytest.approx(expected, abs=1e-6)


def test_the_curves_errors_count_the_times_of_a_sample_as_one():
    # 200 times fall two by two into the bins: the mean of the two is one number, whose spread is the error
    found = compute_stages(SOME, dataclasses.replace(FEW, samples=100, times=200))
    data = TiledImages(SOME)
    _, s0, _ = sample_similarities(data, range(100), times=200, eta=2 / 256, space="eps", measure=VP())
    expected = s0.view(100, 100, 2).mean(2).std(0, correction=0) / 10
    assert found.curves["s0_error"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_bins_without_samples_are_left_out():
    found = compute_stages(SOME, dataclasses.replace(FEW, samples=100, times=1, alpha=0.8))
    assert 50 < len(found.curves["t"]) < 100


def test_algorithm_2_records_its_grid_and_settings(clustered):
    t = clustered.curves["t"]
    assert t == pytest.approx([*(0.001 + 0.025 * np.arange(40)), 1.0], abs=1e-12)
    assert set(clustered.edges_t) <= set(t)
    assert (clustered.rule, clustered.settings.space, clustered.samples) == ("total-distance", "x0", 100)
    similarity = np.array(clustered.curves["similarity"])
    data, measure = TiledImages(SOME), VP()
    pairs = pair_similarities(data, grid_times(measure), range(100), eta=2 / 256, space="x0", measure=measure)
    assert similarity == pytest.approx(pairs.double().mean(0).numpy(), abs=2e-6)
    cuts = [0, *(t.index(edge) for edge in clustered.edges_t), 41]
    total = sum((1 - similarity[a:b, a:b]).sum() for a, b in itertools.pairwise(cuts))
    assert clustered.curves["objective_value"] == pytest.approx(total, abs=1e-3)
    assert clustered.float64_difference < 0.02
    for edge, (low, high) in zip(clustered.edges_t, clustered.intervals_t, strict=True):
        assert low <= edge <= high


def test_algorithm_2_has_the_published_grid_when_asked():
    found = compute_stages(SOME, dataclasses.replace(PAIRS, nodes=21))
    assert found.curves["t"] == pytest.approx([*(0.001 + 0.05 * np.arange(20)), 1.0], abs=1e-12)
    assert np.array(found.curves["similarity"]).shape == (21, 21)
    assert set(found.edges_t) <= set(found.curves["t"])
    assert found.settings.nodes == 21
    assert grid_times(VP(t_min=0.2), 11).tolist() == pytest.approx([0.2, *np.arange(0.3, 1.0, 0.1), 1.0])


def test_one_stage_has_no_edges():
    one = compute_stages(SOME, dataclasses.replace(PAIRS, stages=1))
    assert (one.edges_t, one.edges_sigma, one.intervals_t, len(one.stages())) == ((), (), (), 1)


def test_the_table_helps_to_choose_a_number_of_stages(clustered):
    table = clustered.curves["table"]
    assert [line["stages"] for line in table] == list(range(1, 9))
    assert tuple(table[3]["edges_t"]) == clustered.edges_t
    assert tuple(table[3]["edges_sigma"]) == clustered.edges_sigma
    similarity, t = np.array(clustered.curves["similarity"]), clustered.curves["t"]
    for line in table:
        group = np.searchsorted([t.index(edge) for edge in line["edges_t"]], np.arange(41), side="right")
        same = group[:, None] == group
        assert line["distance"] == pytest.approx((1 - similarity[same]).mean(), abs=2e-6)
    for name in ("distance", "distance_held_out"):
        distances = [line[name] for line in table]
        assert all(a > b > 0 for a, b in itertools.pairwise(distances))
    # the optimal denoiser has never seen held-out images: it is less sure of them
    assert all(line["distance_held_out"] > line["distance"] for line in table)


@pytest.mark.parametrize("kind", ["torch uint8", "floats", "one image", "none"])
def test_held_out_images_may_be_of_any_kind(clustered, kind):
    others = {
        "torch uint8": torch.tensor(DIGITS_UINT8[200:]),
        "floats": DIGITS_UINT8[200:] / 127.5 - 1,
        "one image": DIGITS_UINT8[200:201],
        "none": DIGITS_UINT8[:0],
    }[kind]
    found = compute_stages(SOME, dataclasses.replace(PAIRS, stages=4), held_out=others)
    distances = [line["distance_held_out"] for line in found.curves["table"]]
    if kind == "none":
        assert distances == [None] * 8
    elif kind == "one image":
        assert all(0 < distance < 1 for distance in distances)
    else:
        assert distances == pytest.approx([line["distance_held_out"] for line in clustered.curves["table"]], abs=1e-3)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (SOME[:, :, :4], r"held_out.shape=\(200, 1, 4, 8\) must be that of the images, \(M, 1, 8, 8\)"),
        (SOME.astype(np.int64), "held_out.dtype=int64 must be uint8 or floating point"),
        (SOME / 1.0, r"held_out have values from 0 to 255, outside data_range=\(-1, 1\)"),
        (np.full((3, 1, 8, 8), np.nan), "held_out have values from nan"),
    ],
)
def test_unusable_held_out_images_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        compute_stages(SOME, PAIRS, held_out=others)


def test_held_out_latents_must_be_finite():
    latents = np.random.default_rng(0).standard_normal((50, 4, 2, 2))
    others = latents.copy()
    others[7, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="held_out images hold NaN or infinite values"):
        compute_stages(latents, dataclasses.replace(PAIRS, data_range=None), held_out=others)


@pytest.mark.parametrize("settings", BOTH, ids=["first", "second"])
def test_memory_does_not_change_what_is_found(settings, tmp_path):
    np.save(tmp_path / "images.npy", SOME)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    one, two = compute_stages(SOME, settings), compute_stages(mapped, settings, memory=1)
    assert one == two
    assert np.array_equal(mapped, SOME)


@pytest.mark.parametrize("settings", BOTH, ids=["first", "second"])
def test_progress_counts_samples(settings):
    done: list[tuple[int, int]] = []
    compute_stages(SOME, dataclasses.replace(settings, samples=1500), progress=lambda *count: done.append(count))
    assert done[-1] == (1500, 1500)
    assert all(a[0] < b[0] for a, b in itertools.pairwise(done))
    assert {total for _, total in done} == {1500}


def test_sampling_stops_at_the_precision_asked_for():
    first = half_width(list(compute_stages(SOME, dataclasses.replace(FEW, samples=200)).intervals_t))
    done: list[tuple[int, int]] = []
    asked = dataclasses.replace(FEW, samples=None, precision=first / 1.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_stages(SOME, asked, progress=lambda *count: done.append(count))
    assert half_width(list(found.intervals_t)) <= first / 1.6
    assert 200 * 1.6**2 / 2 < found.samples < 200 * 1.6**2 * 2
    assert done[-1][0] == found.samples
    assert all(a[0] < b[0] for a, b in itertools.pairwise(done))  # no sample is drawn twice
    straight = compute_stages(SOME, dataclasses.replace(FEW, samples=found.samples))
    assert found.edges_t == pytest.approx(
        straight.edges_t, abs=1e-3
    )  # one coordinate may flip, by one step of the grid
    for name, values in straight.curves.items():
        assert found.curves[name] == pytest.approx(values, abs=1e-3)


def test_a_precision_out_of_reach_is_told():
    asked = dataclasses.replace(FEW, precision=1e-4, samples=350)
    with pytest.warns(UserWarning, match=r"edges are known to ±0\.0\d+ only after 350 samples, not to ±0.0001; raise"):
        found = compute_stages(SOME, asked)
    assert found.samples == 350
    easy = compute_stages(SOME, dataclasses.replace(FEW, samples=None, precision=0.5))
    assert easy.samples == 200


@pytest.mark.parametrize("settings", BOTH, ids=["first", "second"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((5, 1, 4, 4), 7, np.uint8), "all 5 images are the same"),
        (torch.full((5, 1, 4, 4), 0.5), "all 5 images are the same"),
        (DIGITS_UINT8[:1], "there is only one image"),
        (np.zeros((0, 1, 4, 4), np.uint8), "not empty"),
        (np.zeros((5, 1, 0, 4), np.uint8), "not empty"),
        (DIGITS_UINT8[:, 0, 0, 0], r"images.shape=\(1797,\) must be \(N, C, H, W\)"),
        (DIGITS_UINT8.astype(np.int64), "images.dtype=int64 must be uint8 or floating point"),
        (torch.zeros(5, 1, 4, 4, dtype=torch.int32), "images.dtype=torch.int32 must be uint8 or floating point"),
        (DIGITS_UINT8 > 0, "images.dtype=bool must be uint8 or floating point"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.5]]), "images hold NaN"),
        (DIGITS * 16, r"images have values from 0 to 16, outside data_range=\(-1, 1\)"),
        (DIGITS - 1.5, r"images have values from -1.5 to -0.5, outside data_range=\(-1, 1\)"),
    ],
)
def test_unusable_images_are_refused(images, message, settings):
    with pytest.raises(ValueError, match=message):
        compute_stages(images, settings)


def test_levels_need_a_range():
    with pytest.raises(ValueError, match="data_range=None is for floats; uint8 pixels need a range"):
        compute_stages(SOME, dataclasses.replace(FEW, data_range=None))


def test_two_images_part_where_the_noise_hides_their_difference():
    images = torch.zeros(2, 1, 4, 4)
    images[1] = 1.0
    eta = 0.15
    settings = dataclasses.replace(FEW, samples=4000, data_range=(0.0, 1.0), space="x0", eta=eta, alpha=0.95)
    found = compute_stages(images, settings)
    # the other image weighs 1 / (1 + exp(z)) with z ~ N(r²/2, r²), r = |y_1 - y_2| / sigma
    t = torch.linspace(1e-3, 1, 20_001, dtype=torch.float64)
    r = 4 / VP().sigma(t)

    def below(weight):
        return 1 - torch.special.ndtr((math.log(1 / weight - 1) - r**2 / 2) / r)

    s0, s1 = below(eta), below(0.5 + eta) - below(0.5 - eta)
    count = torch.arange(1, 20_002)
    t1 = float(t[s0.cumsum(0) / count >= 0.95].max())
    t2 = float(t[s1.flip(0).cumsum(0).div(count).flip(0) >= 0.95].min())
    assert found.edges_t == pytest.approx((t1, t2), abs=half_width(list(found.intervals_t)) + 1e-3)
    assert half_width(list(found.intervals_t)) < 8e-3


def test_duplicates_count_as_often_as_they_are_there():
    # every image thrice: the posterior, and so every similarity, is that of the images once
    tripled = DIGITS_UINT8[:60].repeat(3, 0)
    once, thrice = (
        compute_stages(images, dataclasses.replace(FEW, samples=400)) for images in (DIGITS_UINT8[:60], tripled)
    )
    assert thrice.curves["s0"] == pytest.approx(once.curves["s0"], abs=3e-3)
    assert thrice.edges_t == pytest.approx(once.edges_t, abs=1e-3)


def test_unreachable_alpha_prints_the_range_of_the_curve():
    near = np.random.default_rng(0).integers(127, 129, (50, 1, 4, 4)).astype(np.uint8)  # told apart at no noise level
    with pytest.raises(ValueError, match=r"falls short of alpha=1.0 .*it runs from 0\.\d+ to 0\.\d+.*lower alpha"):
        compute_stages(near, StageSettings(samples=500, times=1, alpha=1.0, space="eps", eta=1e-4))


def test_too_many_stages_for_the_grid():
    with pytest.raises(ValueError, match="stages=42 is more than the 41 times"):
        compute_stages(SOME, StageSettings(algorithm=2, stages=42))


def test_algorithm_2_needs_noise_at_every_time():
    with pytest.raises(ValueError, match="t_min=0: algorithm 2 compares"):
        compute_stages(SOME, PAIRS, schedule=VP(t_min=0.0))
    assert compute_stages(SOME, FEW, schedule=VP(t_min=0.0)).float64_difference < 0.02


def test_the_check_in_float64_sees_a_wrong_similarity(monkeypatch):
    from multistage_diffusion.stage_finding import similarity

    right = similarity.posterior_means
    monkeypatch.setattr(similarity, "posterior_means", lambda *args: 1.05 * right(*args))
    for settings in BOTH:
        assert compute_stages(SOME, settings).float64_difference > 0.03  # two coordinates of 64


@pytest.mark.parametrize("algorithm", ["timestep", "snr"])
@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=lambda s: s.kind)
def test_even_baselines_need_no_samples(algorithm, schedule):
    found = compute_stages(SOME, StageSettings(algorithm=algorithm, stages=4), schedule=schedule)
    times, curves = baseline_partition(algorithm, 4, measure=VP())
    assert found.edges_sigma == pytest.approx([float(VP().sigma(t)) for t in times])
    assert (found.curves, found.rule) == (curves, algorithm)
    assert (found.samples, found.intervals_t, found.intervals_sigma, found.float64_difference) == (0, (), (), 0.0)


def test_gradients_are_not_of_images():
    with pytest.raises(ValueError, match=r"algorithm=gradient reads a trained run; see workflow\.clustering"):
        compute_stages(SOME, StageSettings(algorithm="gradient"))


def test_what_the_caller_says_is_kept():
    schedule: NoiseSchedule = EDM()
    found = compute_stages(SOME, FEW, schedule=schedule, fingerprint="abc", codec="def")
    assert (found.fingerprint, found.codec, found.settings) == ("abc", "def", FEW.resolved())
    assert found.strip
