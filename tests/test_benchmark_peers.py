"""What the benchmark of tools makes of a training time and of its results; the tools themselves are not installed here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from loading import load

from multistage_diffusion import preset
from multistage_diffusion.nets.cost import network_cost

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", name="peers")
def fixture_peers() -> ModuleType:
    return load(BENCHMARKS / "peers.py", "peers")


def test_a_tool_trains_for_its_time(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    numbers = []

    def step(number: int) -> int:
        numbers.append(number)
        now[0] += 3.0
        return 16

    assert peers.timed(step, 10.0) == 4 * 16  # begun at 0, 3, 6 and 9 s
    assert numbers == [0, 1, 2, 3]


def test_our_time_begins_with_the_choice_of_execution(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, stops = [100.0], []
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(images=96, stop=lambda: stops.append(now[0]))
    clock = peers.StopAfter(10.0)
    clock.started(trainer)
    now[0] = 108.0  # eight seconds of trying executions
    clock.chosen(trainer)
    for now[0] in (109.0, 110.0):
        clock.stepped(trainer)
    assert stops == [110.0]
    assert (clock.images, clock.over) == (96, True)


def test_every_image_comes_once_a_round_in_minus_one_to_one(peers: ModuleType) -> None:
    images = (torch.arange(12, dtype=torch.uint8) * 23)[:, None, None, None].expand(12, 1, 2, 2)
    source = peers.batches(images, 4)
    for _ in range(2):
        drawn = torch.cat([next(source) for _ in range(3)])
        assert torch.equal(drawn[:, 0, 0, 0].sort().values, images[:, 0, 0, 0].float() / 127.5 - 1)


def test_the_table_has_the_mean_over_the_seeds(peers: ModuleType) -> None:
    def run(distance: float) -> dict[str, object]:
        return {"images": 5000, "parameters": 1_640_000, "20": {"frechet": distance}, "50": {"frechet": distance / 2}}

    found = peers.table({"results": {"ours, 20": {"1": run(0.5), "2": run(0.7)}, "diffusers, 20": {"1": run(2.0)}}})
    assert found.splitlines()[2:] == [
        "| ours | 20 | 5,000 | 1.64 M | 0.600 | 0.300 | 2 |",
        "| diffusers | 20 | 5,000 | 1.64 M | 2.000 | 1.000 | 1 |",
    ]


def test_what_was_not_measured_is_a_dash_and_every_tool_has_its_row(peers: ModuleType, tmp_path: Path) -> None:
    known = {
        "results": {
            "ours, 20": {"1": {"images": 5, "parameters": 1, "20": {"frechet": 0.5}}},
            "diffusers, 20": {"1": {"images": 5, "parameters": 1, "20": {"frechet": 2.0}, "50": {"frechet": 1.0}}},
        }
    }
    assert [line.split(" | ")[4:6] for line in peers.table(known).splitlines()[2:]] == [
        ["0.500", "-"],
        ["2.000", "1.000"],
    ]
    for name in ("ours", "diffusers"):
        peers.save_png(peers.grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8)), tmp_path / f"peers-{name}.png")
    titles = [axes.get_title("left") for axes in peers.picture(known, tmp_path).axes]
    assert titles == ["ours: 20 minutes, Fréchet distance 0.500", "diffusers: 20 minutes, Fréchet distance 2.000"]


@pytest.mark.slow
def test_our_own_training_ends_in_time_and_is_judged(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(peers.PRESETS, "fashion-mnist", "digits")
    tool = peers.Ours(1, 8)
    seen, size = tool.fit(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 2.0)
    assert seen > 0
    assert seen % 96 == 0
    assert size == network_cost(preset("digits").network, 8, 8).total_parameters
    drawn = tool.draw(3, 4)
    assert drawn.shape == (3, 1, 8, 8)
    assert 0 <= drawn.min() <= drawn.max() <= 1
