"""What the benchmark of samples per training compute makes of its runs, and that its arms cost the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loading import load

from multistage_diffusion import override, preset, train
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.files import write_json
from multistage_diffusion.nets.network import meta_network
from multistage_diffusion.training import branching

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "efficiency.py"


@pytest.fixture(scope="module", name="bench")
def fixture_bench() -> ModuleType:
    return load(SCRIPT, "efficiency")


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"petaflops": x, "frechet": y} for x, y in points]


def power_law(scale: float) -> list[dict[str, float]]:
    """A distance that falls as 1/sqrt of compute, `scale` times as fast."""
    return curve(*((x, 10 / math.sqrt(scale * x)) for x in (1.0, 2.0, 3.0, 5.0, 8.0)))


def test_a_distance_is_first_reached_between_points_by_their_power_law(bench: ModuleType) -> None:
    for compute in (1.0, 1.7, 2.0, 4.4, 8.0):
        assert bench.first_reach(power_law(1.0), 10 / math.sqrt(compute) * (1 + 1e-12)) == pytest.approx(compute)
    assert bench.first_reach(power_law(1.0), 20.0) == 1.0  # below it from the start
    assert bench.first_reach(power_law(1.0), 1.0) == math.inf
    assert bench.first_reach(curve((1, 4), (2, 1), (3, 4), (4, 0.5)), 1.0) == 2.0  # what comes later does not matter


def test_the_ratio_is_of_the_compute_to_the_other_s_best(bench: ModuleType) -> None:
    assert bench.ratio(power_law(1.0), power_law(1.25)) == (pytest.approx(0.8), True)
    assert bench.ratio(curve((1, 4), (2, 1), (3, 2)), curve((1, 2), (4, 1))) == (4 / 2, True)  # best at 2, not 3
    assert bench.ratio(curve((1, 4), (2, 1), (3, 2)), curve((1, 2), (5, 1.1))) == (5 / 2, False)  # where it ended


def test_the_interval_is_student_s_of_the_logarithms(bench: ModuleType) -> None:
    stats = pytest.importorskip("scipy.stats")
    ratios = [0.7, 0.9, 0.8]
    found = bench.interval(ratios)
    logs = [math.log(r) for r in ratios]
    mean = sum(logs) / 3
    error = math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    low, high = stats.t.interval(0.95, 2, mean, error)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (math.exp(mean), math.exp(low), math.exp(high)), rel=1e-3
    )
    assert bench.words(found) == f"{math.exp(mean):.3f} ({found['low']:.3f} to {found['high']:.3f})"


def test_ratios_that_were_not_reached_are_lower_bounds(bench: ModuleType) -> None:
    known, censored = bench.interval([0.7, 1.1]), bench.interval([0.7, 1.1], [True, False])
    assert (censored["mean"], censored["low"], censored["high"]) == (known["mean"], known["low"], None)
    assert bench.words(censored) == f"at least {known['mean']:.3f} (from {known['low']:.3f}), not reached by 1"


def test_one_seed_has_no_interval(bench: ModuleType) -> None:
    assert bench.words(bench.interval([0.671])) == "0.671 (one seed)"


def test_only_seeds_that_both_have_are_paired(bench: ModuleType) -> None:
    runs = {
        "a": {str(seed): {"curve": power_law(1.0)} for seed in (11, 12, 13)},
        "c": {str(seed): {"curve": power_law(scale)} for seed, scale in ((12, 2.0), (13, 4.0), (14, 9.0))},
    }
    found = bench.summarise(runs)
    assert found.keys() == {"c"}
    assert found["c"]["seeds"] == ["12", "13"]
    assert found["c"]["compute"]["ratios"] == pytest.approx([0.5, 0.25])
    assert found["c"]["distance_at_the_end"]["ratios"] == pytest.approx([1 / math.sqrt(2), 0.5])


def test_runs_start_from_the_run_of_their_seed(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.started_from(bench.Job("V", "c", 0, 7, 4096), tmp_path) is None
    job = bench.Job("B", "c", 0, 7, 4096)
    with pytest.raises(
        SystemExit, match=r"V/a0-seed7: is not there; train it first \(--setting V --arms a --seeds 7\)"
    ):
        bench.started_from(job, tmp_path)
    (tmp_path / "V" / "a0-seed7").mkdir(parents=True)
    (tmp_path / "V" / "a0-seed7" / "config.json").touch()
    assert bench.started_from(job, tmp_path) == tmp_path / "V" / "a0-seed7"


@pytest.mark.slow
def test_all_arms_and_variants_cost_the_same(bench: ModuleType) -> None:
    cuts = bench.Cuts(
        splits={"algorithm 1": (0.8448, 10.275), "algorithm 2": (1.8, 11.9), "gaussian": (0.17, 0.54)},
        even=(1.469, 9.596),
    )
    for name, setting in bench.SETTINGS.items():
        if name == "edges":  # compares variants, and chooses none
            continue
        tried = {arm: setting.variants.get(arm) or setting.variants["c"] for arm in setting.arms}
        if name not in ("V", "B", "T"):  # V: the second variant of (c) is no candidate; T tunes (u) and (v) alone
            assert len({len(variants) for variants in tried.values()}) == 1  # the same tuning for all
        costs = [
            bench.flops_per_image(bench.configuration(name, arm, variant, 11, 400, cuts))
            for arm, variants in tried.items()
            for variant in range(len(variants))
        ]
        assert max(costs) / min(costs) - 1 < bench.TOLERANCE
    config = bench.configuration("16", "b", 0, 11, 400, cuts)
    assert config.network.separate
    assert (config.training.branch_at, config.training.steps, config.training.seed) == (100, 400, 11)
    assert bench.configuration("16", "a", 0, 11, 400, cuts).stages.interior == ()
    assert bench.configuration("16", "d", 0, 11, 400, cuts).stages.interior == cuts.even
    for variant, name in enumerate(bench.SETTINGS["16"].splits):
        c, e = (bench.configuration("16", arm, variant, 11, 400, cuts) for arm in "ce")
        assert c.stages.interior == e.stages.interior == cuts.splits[name]
        assert c.training.shares == e.training.shares
        assert (c.training.branch_at, e.training.branch_at) == (100, 400)  # (e)'s stages never part
    paper, one = (bench.configuration("V", arm, 0, 11, 400, cuts) for arm in "ca")
    assert (paper.network.family, paper.diffusion.precondition) == ("ncsnpp", "vp-eps")
    sliced = bench.configuration("V", "c", 1, 11, 400, cuts)
    assert (sliced.training.branch_at, bench.SETTINGS["V"].chosen["c"]) == (100, 0)
    assert override(sliced, {"training.branch_at": 0}) == paper
    branching.tie(meta_network(sliced.network))  # its decoders are slices of the widest
    assert (paper.network.decoder_widths, one.network.decoder_widths) == ((24, 16, 4), (16,))
    assert paper.sampling == one.sampling
    assert (paper.sampling.order, paper.sampling.calls) == (3, 20)
    assert bench.configuration("V", "e", 0, 11, 400, cuts).training.branch_at == 400
    single, several = (bench.configuration("T", arm, 0, 11, 400, cuts) for arm in "uv")
    assert (single.network.family, single.stages.interior) == (several.network.family, ()) == ("uvit", ())
    assert (several.stages, several.training.shares) == (paper.stages, paper.training.shares)
    assert override(several, {"network": paper.network, "optimizer": paper.optimizer}) == paper  # nothing else differs
    assert [bench.configuration("T", arm, 0, 11, 400, cuts) for arm in "ac"] == [one, paper]


def test_errors_are_those_of_the_same_noise_for_all(bench: ModuleType) -> None:
    images = torch.linspace(-1, 1, 40).reshape(10, 1, 2, 2)
    zero = bench.errors(lambda x, sigma: torch.zeros_like(x), images)
    assert zero == pytest.approx([float(images.square().mean())] * len(bench.SIGMAS))
    same = bench.errors(lambda x, sigma: x, images)  # leaves the noise as it is
    assert same == bench.errors(lambda x, sigma: x, images)
    assert same == pytest.approx([s**2 for s in bench.SIGMAS], rel=0.6)
    assert bench.errors(bench.OptimalDenoiser(images), images)[0] < 1e-6 < same[0]  # it knows each of them apart


def test_unequal_arms_are_refused(bench: ModuleType) -> None:
    cost = {"megaflops_per_image": 100.0, "measured_megaflops_per_image": 99.0}
    bench.check_equal({"a": cost, "c": {**cost, "megaflops_per_image": 102.9}})
    with pytest.raises(SystemExit, match=r"\(c\): megaflops_per_image \+3.1% of the first arm's"):
        bench.check_equal({"a": cost, "c": {**cost, "megaflops_per_image": 103.1}})
    bench.check_equal({"a": cost, "n": {**cost, "megaflops_per_image": 90.0}})  # narrow on purpose
    with pytest.raises(SystemExit, match=r"\(c\): megaflops_per_image -10.0%"):
        bench.check_equal({"a": cost, "c": {**cost, "megaflops_per_image": 90.0}})
    with pytest.raises(SystemExit, match=r"\(n\): megaflops_per_image \+10.0%"):
        bench.check_equal({"a": cost, "n": {**cost, "megaflops_per_image": 110.0}})


def test_what_is_known_is_printed_and_drawn(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {
        arm: {str(seed): {"curve": power_law(scale), "errors": [0.5 / scale, 0.2]} for seed in (11, 12, 13)}
        for arm, scale in (("a", 1.0), ("c", 2.0))
    }
    out = tmp_path / "efficiency-16.json"
    known = {"final": runs, "summary": bench.summarise(runs), "sigmas": [0.1, 1.0], "optimal_errors": [0.1, 0.15]}
    write_json(out, known)
    bench.main(["--report", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "relative to (a): compute to its best distance 0.500 (0.500 to 0.500)" in printed
    assert [line.split() for line in printed.splitlines()[-3:]] == [
        ["sigma", "optimal", "(a)", "(c)"],
        ["0.1", "0.10000", "0.50000", "-50.0%"],
        ["1.0", "0.15000", "0.20000", "+0.0%"],
    ]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert read_json(out)["final"] == runs


def test_the_sampling_ratio_is_of_the_flops_to_the_first_arm_s_best(bench: ModuleType) -> None:
    def points(*pairs: tuple[float, float]) -> dict[str, Any]:
        return {"sampling": [{"calls": 0, "gigaflops": x, "frechet": y} for x, y in pairs]}

    runs = {
        "a": {"1": points((1, 4), (2, 2)), "2": points((1, 4), (2, 2)), "3": {}},
        "c": {"1": points((0.5, 4), (1, 2)), "2": points((0.5, 4), (1, 3)), "3": points((1, 1))},
    }
    found = bench.sampling_summary(runs)["c"]
    assert found["seeds"] == ["1", "2"]
    assert found["ratios"] == pytest.approx([0.5, 0.5])
    assert found["reached"] == [True, False]


@pytest.mark.slow
def test_runs_that_are_done_are_sampled_once(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", data)
    config = override(
        preset("digits"),
        {
            "data.source": str(tmp_path / "noise.npy"),
            "data.shape": [],
            "training.steps": 2,
            "training.batch": 9,
            "evaluation.count": 70,
        },
    )
    train(config, tmp_path / "runs" / "V" / "a0-seed21")
    monkeypatch.setattr(bench, "CALLS", (4, 6))
    out = tmp_path / "V.json"
    write_json(
        out, {"final": {"a": {"21": {"curve": power_law(1.0), "errors": [1.0]}, "22": {"curve": power_law(1.0)}}}}
    )
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: AtOnce())
    bench.sample_all("V", ["c"], tmp_path / "runs", out, 1, 1)
    assert "sampling" not in read_json(out)["final"]["a"]["21"]
    bench.sample_all("V", ["a"], tmp_path / "runs", out, 1, 1)
    found = read_json(out)["final"]["a"]
    assert [point["calls"] for point in found["21"]["sampling"]] == [4, 6]
    assert all(point["frechet"] > 0 for point in found["21"]["sampling"])
    assert "sampling" not in found["22"]  # no run of it is there
    before = out.read_bytes()
    bench.sample_all("V", ["a"], tmp_path / "runs", out, 1, 1)
    assert out.read_bytes() == before


class AtOnce:
    """A pool that works in this process."""

    def Pool(self, *_: Any, **__: Any) -> AtOnce:
        return self

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def starmap(self, work: Any, jobs: Any, chunksize: int) -> list[Any]:
        return [work(*job) for job in jobs]

    def imap_unordered(self, work: Any, jobs: Any) -> Any:
        return map(work, jobs)


def test_what_a_run_found_is_kept_when_it_ends(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is measured once, and again if it is trained again; what is done before an interruption is not lost."""
    curves = {"a0-seed21": [(1.0, 4.0)], "c0-seed21": [(1.0, 2.0)]}
    measured: list[str] = []

    def work(job: Any, folder: Path, **_: Any) -> None:
        if job.seed == 22:
            raise KeyboardInterrupt
        (folder / "V" / job.name).mkdir(parents=True, exist_ok=True)

    def opened(path: Path) -> SimpleNamespace:
        denoiser = lambda _: measured.append(path.name) or path.name  # noqa: E731
        return SimpleNamespace(name=path.name, records=list, denoiser=denoiser)

    monkeypatch.setattr(bench, "work", work)
    monkeypatch.setattr(bench.Run, "open", opened)
    monkeypatch.setattr(bench, "curve", lambda run: curve(*curves[run.name]))
    monkeypatch.setattr(bench, "steps_done", lambda _: 8192)
    monkeypatch.setattr(bench, "errors", lambda denoiser, _: [1.0] * len(bench.SIGMAS))
    monkeypatch.setattr(bench, "held_out_images", lambda _: (torch.zeros(2, 1, 2, 2), None))
    monkeypatch.setattr(bench.Cuts, "of", lambda _: bench.Cuts(splits={}, even=()))
    monkeypatch.setattr(bench, "arm_facts", lambda *_: {})
    monkeypatch.setattr(bench, "check_equal", lambda _: None)
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: AtOnce())
    out, arms = tmp_path / "V.json", ["--setting", "V", "--arms", "a", "c"]
    places = ["--folder", str(tmp_path), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        bench.main([*arms, *places, "--seeds", "21", "22"])
    assert {arm: list(seeds) for arm, seeds in read_json(out)["final"].items()} == {"a": ["21"], "c": ["21"]}
    assert measured == ["a0-seed21", "c0-seed21"]
    curves["c0-seed21"] = [(1.0, 1.5)]
    bench.main([*arms, *places, "--seeds", "21"])
    assert measured == ["a0-seed21", "c0-seed21", "c0-seed21"]
    assert read_json(out)["final"]["c"]["21"]["curve"][0]["frechet"] == 1.5
