from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from multistage_diffusion.distributed import ALONE, World
from multistage_diffusion.performance import autotune
from multistage_diffusion.performance.autotune import LEAST_STEPS, candidates, choose
from multistage_diffusion.performance.execution import Execution, check_execution, settled
from multistage_diffusion.training.run import Run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN, LAST = Execution(), Execution(channels_last=True)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be one thread, so that there is nothing to be done side by side."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def words(config, device: torch.device, **settings: bool) -> list[str]:
    return [e.words() for e in candidates(config, device, **{"alone": True, **settings})]


def test_settings_that_leave_nothing_open_are_what_is_done(tiny_config) -> None:
    config = tiny_config(
        execution__channels_last=True, execution__compile=False, execution__cuda_graphs=False, execution__recompute=True
    )
    assert list(candidates(config, CUDA, alone=True)) == [Execution(channels_last=True, recompute=True)]
    assert list(candidates(config, CUDA, alone=True, compiling=True)) == []
    assert settled(config.execution) == Execution(channels_last=True, recompute=True)
    assert settled(tiny_config().execution) == PLAIN


def test_candidates(tiny_config) -> None:
    open_, graphs = ["plain", "channels last"], ["cuda graphs", "channels last, cuda graphs"]
    assert words(tiny_config(), CPU) == open_
    assert words(tiny_config(), CPU, compiling=True) == []
    assert words(tiny_config(), CUDA) == open_ + graphs
    compiled = ["compile", "channels last, compile", "compile, cuda graphs", "channels last, compile, cuda graphs"]
    assert words(tiny_config(), CUDA, compiling=True) == compiled
    # graphs are of fixed rows, of one process, and cannot draw dropout again
    for alone, changes in (
        (False, {}),
        (True, {"training__update_mode": "sequential"}),
        (True, {"training__accumulate": 2}),
        (True, {"execution__recompute": True}),
        (True, {"execution__cuda_graphs": False}),
    ):
        found = words(tiny_config(**changes), CUDA, alone=alone)
        assert len(found) == 2
        assert not any("graphs" in each for each in found)
    assert words(tiny_config(execution__cuda_graphs=True), CUDA) == graphs
    assert words(tiny_config(execution__compile=True), CPU) == ["compile", "channels last, compile"]
    assert words(tiny_config(execution__compile=True), CUDA, compiling=True) == []


def test_parallel_threads_are_tried_on_a_cpu(tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    every = ["plain", "channels last", "6 threads", "channels last, 6 threads"]
    assert words(tiny_config(), CPU) == every
    assert words(tiny_config(training__accumulate=2, training__update_mode="sequential"), CPU) == every
    assert words(tiny_config(), CPU, compiling=True) == []
    assert not any("threads" in way for way in words(tiny_config(), CUDA))
    assert words(tiny_config(), CPU, alone=False) == every[:2]  # gradients are summed over processes on the way
    assert words(tiny_config(execution__recompute=True), CPU) == ["recompute", "channels last, recompute"]
    assert words(tiny_config(execution__compile=True), CPU) == ["compile", "channels last, compile"]
    assert words(tiny_config(execution__thread_parallel=1), CPU) == every[:2]
    assert words(tiny_config(execution__thread_parallel=3), CPU) == ["3 threads", "channels last, 3 threads"]
    assert settled(tiny_config(execution__thread_parallel=3).execution) == Execution(thread_parallel=3)
    # gradients of so many threads take a quarter of the memory at most
    monkeypatch.setattr(autotune, "free_memory", lambda _: 1000)
    assert words(tiny_config(), CPU, weights=60)[2] == "4 threads"
    assert words(tiny_config(), CPU, weights=200) == every[:2]


@pytest.mark.parametrize(
    ("asked", "device", "processes", "message"),
    [
        (Execution(cuda_graphs=True), CPU, 1, "cuda_graphs=True needs one process on a CUDA device, not 1 on cpu"),
        (Execution(cuda_graphs=True), CUDA, 2, "cuda_graphs=True needs one process on a CUDA device, not 2 on cuda"),
        (Execution(thread_parallel=2), CUDA, 1, "thread_parallel=2 needs one process on a CPU device, not 1 on cuda"),
        (Execution(thread_parallel=2), CPU, 2, "thread_parallel=2 needs one process on a CPU device, not 2 on cpu"),
    ],
)
def test_what_a_device_does_not_have_is_refused(asked, device, processes, message) -> None:
    with pytest.raises(ValueError, match=rf"execution\.{message}; set it to auto"):
        check_execution(asked, device, processes)
    check_execution(Execution(), device, processes)
    check_execution(Execution(cuda_graphs=True), CUDA, 1)
    check_execution(Execution(thread_parallel=2), CPU, 1)


class Trial:
    """A run whose steps take as long as is said."""

    def __init__(self, folder: Path, config, monkeypatch: pytest.MonkeyPatch, seconds: dict[Execution, float]) -> None:
        self.run, self.config, self.seconds = Run.create(folder, config), config, seconds
        self.now, self.computed, self.world = 0.0, [], ALONE
        monkeypatch.setattr(autotune, "clock", lambda _: self.now)
        monkeypatch.setattr(autotune, "device_name", lambda device: f"a {device.type}")

    def passes(self) -> None:
        taken = self.seconds[self.computed[-1]]
        if taken < 0:
            raise torch.OutOfMemoryError
        self.now += taken

    def choose(self, steps: int = LEAST_STEPS, device: torch.device = CPU) -> tuple[Execution, dict[str, float]]:
        found = choose(self.run, self.config, self.world, device, 1, steps, self.computed.append, self.passes)
        return self.computed[-1], found


def test_the_fastest_is_taken_and_remembered(tmp_path, tiny_config, monkeypatch) -> None:
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 2.0, LAST: 1.0})
    best, seconds = tried.choose()
    assert best == LAST
    assert seconds == pytest.approx({"plain": 2.0, "channels last": 1.0})
    kept = json.loads(tried.run.execution_file.read_text())
    assert kept["device"] == "a cpu"
    chosen = {"channels_last": True, "compile": False, "cuda_graphs": False, "thread_parallel": 1, "recompute": False}
    assert kept["execution"] == chosen
    tried.computed.clear()
    assert tried.choose() == (LAST, {})  # not tried again
    assert tried.computed == [LAST]


def test_candidates_take_turns_since_a_machine_changes_its_pace(tmp_path, tiny_config, monkeypatch) -> None:
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 1.0, LAST: 0.9})
    passes, made = tried.passes, []

    def counted() -> None:
        passes()
        made.append(tried.computed[-1])
        tried.now += 0.2 * (len(made) > 2 * (autotune.WARM[0] + autotune.TIMED))  # slower from the second round on

    tried.passes = counted
    best, seconds = tried.choose()
    assert (best, seconds) == (LAST, pytest.approx({"plain": 1.1, "channels last": 1.0}))
    assert tried.computed == [PLAIN, LAST, PLAIN, LAST, LAST]
    assert made.count(PLAIN) == made.count(LAST) == sum(autotune.WARM) + 2 * autotune.TIMED


class TwoProcesses(World):
    """A world of which the other process takes other times."""

    def __init__(self, others: list[float]) -> None:
        super().__init__(0, 2)
        self.others = others  # seconds of each candidate, in order

    def all_gather_object(self, value: object) -> list[object]:
        return [value, value]

    def all_reduce(self, values: torch.Tensor, how: str = "sum") -> torch.Tensor:
        other = torch.tensor(self.others, dtype=values.dtype)
        return torch.maximum(values, other) if how == "max" else values + other


def test_the_slowest_process_sets_the_pace(tmp_path, tiny_config, monkeypatch) -> None:
    # on the sum of both processes channels-last would win (3.2 against 3.5)
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 1.5, LAST: 0.2})
    tried.world = TwoProcesses([2.0, 3.0])
    assert tried.choose() == (PLAIN, pytest.approx({"plain": 2.0, "channels last": 3.0}))


def test_another_device_and_other_settings_are_tried_anew(tmp_path, tiny_config, monkeypatch) -> None:
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 2.0, LAST: 1.0})
    tried.choose()
    tried.seconds[LAST] = 3.0
    monkeypatch.setattr(autotune, "device_name", lambda _: "another")
    assert tried.choose()[0] == PLAIN
    tried.config = tiny_config(execution__cuda_graphs=False)
    tried.seconds[LAST] = 1.0
    assert tried.choose()[0] == LAST


def test_what_is_hardly_faster_is_left_alone(tmp_path, tiny_config, monkeypatch) -> None:
    assert Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 1.0, LAST: 0.98}).choose()[0] == PLAIN


def test_one_slow_pass_decides_nothing(tmp_path, tiny_config, monkeypatch) -> None:
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 1.0, LAST: 0.9})
    passes, counts = tried.passes, {PLAIN: 0, LAST: 0}

    def interrupted() -> None:
        passes()
        counts[tried.computed[-1]] += 1
        if counts[tried.computed[-1]] == autotune.WARM[0] + 1:
            tried.now += 5.0  # another process had the machine

    tried.passes = interrupted
    best, seconds = tried.choose()
    assert (best, seconds) == (LAST, pytest.approx({"plain": 1.0, "channels last": 0.9}))


def test_a_short_run_is_not_tried(tmp_path, tiny_config, monkeypatch) -> None:
    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {})
    assert tried.choose(LEAST_STEPS - 1) == (PLAIN, {})
    assert not tried.run.execution_file.exists()


def test_what_cannot_be_done_is_passed_over_but_the_plain_way_must_work(tmp_path, tiny_config, monkeypatch) -> None:
    best, seconds = Trial(tmp_path / "one", tiny_config(), monkeypatch, {PLAIN: 1.0, LAST: -1.0}).choose()
    assert (best, list(seconds)) == (PLAIN, ["plain"])
    with pytest.raises(torch.OutOfMemoryError):
        Trial(tmp_path / "two", tiny_config(), monkeypatch, {PLAIN: -1.0, LAST: 1.0}).choose()


@pytest.mark.parametrize("kind", [Exception, BaseException])  # the latter: a step that is given up
def test_what_ends_the_trial_leaves_the_plain_way(tmp_path, tiny_config, monkeypatch, kind) -> None:
    class Ends(kind):
        pass

    tried = Trial(tmp_path / "run", tiny_config(), monkeypatch, {PLAIN: 2.0, LAST: 1.0})

    def ends() -> None:
        if tried.computed[-1] == LAST:
            raise Ends

    monkeypatch.setattr(tried, "passes", ends)
    with pytest.raises(Ends):
        tried.choose()
    assert tried.computed[-2:] == [LAST, PLAIN]


def test_compiling_is_tried_where_it_can_pay(tmp_path, tiny_config, monkeypatch) -> None:
    config = tiny_config()
    every = [*candidates(config, CUDA, alone=True), *candidates(config, CUDA, alone=True, compiling=True)]
    monkeypatch.setattr(
        autotune.torch, "tensor", lambda values, **_: torch.Tensor(values)
    )  # there is no such device here
    seconds = {execution: 0.1 if execution.compile else 0.5 for execution in every}
    tried = Trial(tmp_path / "run", config, monkeypatch, seconds)
    assert not tried.choose(LEAST_STEPS, CUDA)[0].compile
    tried.run.execution_file.unlink()
    assert tried.choose(10_000, CUDA)[0].compile
