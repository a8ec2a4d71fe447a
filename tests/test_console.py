from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from multistage_diffusion import console as module
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.console import Bar, TrainingProgress
from multistage_diffusion.performance.execution import Execution


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(module, "console", Console(file=text, force_terminal=True, width=150))
    return text


def test_plain_lines_tell_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    clock.now += 500.0  # the work may start long after the program
    with Bar("sampling", "calls", every=10.0) as bar:
        bar(100, 1000)  # goes on where an earlier part ended
        clock.now += 9.0
        bar(145, 1000)
        clock.now += 1.0
        bar(150, 1000)
        clock.now += 5.0
        bar(175, 1000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sampling: 150/1000, 5.0 calls/s, 3 min left\n"


def test_a_short_job_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("sampling") as bar:
        bar(1, 2)
        bar(2, 2)
    assert capsys.readouterr() == ("", "")


def test_nothing_done_yet_gives_no_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("reading", "files", every=1.0)
    clock.now += 2.0
    bar(0, 10)
    assert capsys.readouterr().err == "reading: 0/10\n"


def test_a_terminal_shows_a_bar_and_takes_it_away(clock: Clock, terminal: io.StringIO) -> None:
    with Bar("finding stages", "samples") as bar:
        bar(0, 50)
        clock.now += 2.0
        bar.note = "so far"
        bar(10, 50)
    text = terminal.getvalue()
    assert "finding stages" in text
    assert "10/50" in text
    assert "5.0 samples/s" in text
    assert "so far" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor was hidden, and came back


def trainer(step: int) -> Any:
    config = override(preset("digits"), {"training.steps": 100})
    return SimpleNamespace(
        config=config,
        device="cpu",
        step=step,
        allocation=SimpleNamespace(counts=(64, 45, 19)),
        warm_start=None,
        ended="",
        run=SimpleNamespace(records=lambda: []),
    )


def test_training_shows_steps_and_losses(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    clock.now += 60.0  # opening the data is no part of the rate
    progress.started(trainer(20))
    shown = capsys.readouterr().err.splitlines()
    assert shown[1].split() == ["training", "sigma", "noise", "rows", "steps", "compute"]
    assert [line[:7] for line in shown[2:]] == ["stage 1", "stage 2", "stage 3"]
    progress.logged(trainer(30), {"kind": "train", "loss": [0.5, None, 0.25]})
    clock.now += 20.0
    progress.stepped(trainer(40))
    progress.logged(trainer(50), {"kind": "held_out", "loss": [1.0, 2.0, 3.0]})
    clock.now += 20.0
    progress.stepped(trainer(60))
    progress.finished(trainer(100))
    assert shown[0] == "training digits on cpu: steps 20 to 100, encoder 16, decoders 32/16/16, rows per stage 64/45/19"
    assert capsys.readouterr().err.splitlines() == [
        "training: 40/100, 1.0 steps/s, 60 s left, loss per stage 0.5000 - 0.2500",
        "training: 60/100, 1.0 steps/s, 40 s left, held-out loss per stage 1.0000 2.0000 3.0000",
    ]


def test_the_time_left_counts_the_evaluations_to_come(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def at(step: int, *seconds: float) -> Any:
        made = trainer(step)
        made.config = override(made.config, {"evaluation.every": 30})
        made.run = SimpleNamespace(records=lambda: [{"kind": "quality", "seconds": each} for each in seconds])
        return made

    evaluation = {"frechet": 1.0, "extractor": "pixels", "count": 10, "petaflops": 1.0, "metrics": {}}
    progress = TrainingProgress()
    progress.started(at(20))
    clock.now += 20.0
    progress.stepped(at(25))
    progress.logged(at(30), {"kind": "quality", "step": 30, "seconds": 50.0, **evaluation})
    clock.now += 20.0
    progress.stepped(at(30))  # then those of steps 60, 90 and 100
    progress.finished(at(30))
    lines = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert lines == [
        "training: 25/100, 0.250 steps/s, 5 min left without evaluations",
        f"training: 30/100, 0.250 steps/s, {round((70 / 0.25 + 150) / 60)} min left",
    ]
    resumed = TrainingProgress()
    resumed.started(at(60, 40.0, 80.0))  # those of steps 90 and 100
    clock.now += 20.0
    resumed.stepped(at(80))
    assert f"80/100, 1.0 steps/s, {round((20 + 2 * 60) / 60)} min left" in capsys.readouterr().err


def test_an_evaluation_is_a_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    record = {"kind": "quality", "step": 500, "frechet": 12.3456, "extractor": "pixels", "count": 1000, "seconds": 2.0}
    progress.logged(trainer(500), {**record, "petaflops": 0.12345})
    progress.logged(trainer(500), {**record, "petaflops": 2000.0, "frechet": None})
    assert capsys.readouterr().err.splitlines() == [
        "step 500: Fréchet distance 12.35 (pixels, 1000 samples, 0.123 PFLOPs)",
        "step 500: Fréchet distance not measured (pixels, 1000 samples, 2e+03 PFLOPs)",
    ]


def test_an_early_end_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    progress, ended = TrainingProgress(), trainer(50)
    ended.ended = "runs/x: ended by patience"
    progress.started(ended)  # a resumed run that has ended: nothing is going to happen
    progress.finished(ended)
    assert capsys.readouterr().err == "runs/x: ended by patience\n"


def test_the_bar_goes_away_after_an_error(terminal: io.StringIO) -> None:
    def train() -> None:
        with TrainingProgress() as progress:
            progress.started(trainer(0))
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (7000, "117 min"), (7200, "2 h"), (1e7, "116 days")],
)
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert module.duration(seconds) == words


def test_a_warm_start_says_what_was_cloned(capsys: pytest.CaptureFixture[str]) -> None:
    new = trainer(0)
    new.warm_start = SimpleNamespace(cloned=("encoder", "decoder.2"), resized=("decoder.3",), fresh=("decoder.1",))
    new.config = override(new.config, {"training.init_from": "runs/one"})
    with TrainingProgress() as progress:
        progress.started(new)
    told = "initial weights from runs/one: encoder, decoder.2; of another width: decoder.3; random: decoder.1"
    assert told in " ".join(capsys.readouterr().err.split())


def test_autotuning_tells_what_it_has_found(capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(0)
    made.autotuned = {"plain": 0.5, "channels last": 0.25}
    made.passes = SimpleNamespace(execution=Execution(channels_last=True))
    TrainingProgress().chosen(made)
    assert "execution: channels last (a step took: plain 0.5 s, channels last 0.25 s)" in capsys.readouterr().err
    made.autotuned = {}
    TrainingProgress().chosen(made)
    assert capsys.readouterr().err == ""


def test_other_work_is_shown_and_does_not_count(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("training", "steps", every=10.0)
    bar(0, 100)
    clock.now += 5.0
    bar(10, 100)
    bar.meanwhile("evaluating", 0, 50)
    clock.now += 100.0
    bar.meanwhile("evaluating", 10, 50)
    clock.now += 100.0
    bar(10, 100)
    clock.now += 5.0
    bar(20, 100)
    clock.now += 4.0
    bar.meanwhile("drawing samples", 0, 3)  # short: no line of its own, although the last line is 12 seconds old
    clock.now += 3.0
    bar.meanwhile("drawing samples", 1, 3)
    bar(30, 100)
    assert capsys.readouterr().err.splitlines() == [
        "training: 10/100, evaluating 20%",
        "training: 10/100, 2.0 steps/s, 45 s left",
        "training: 30/100, 2.1 steps/s, 33 s left",
    ]


def test_the_rate_is_that_of_the_last_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("training", "steps", every=1.0)
    for step in range(100):  # 1 step per second, then 10
        bar(step, 10_000)
        clock.now += 1.0
    for step in range(100, 1000):
        bar(step, 10_000)
        clock.now += 0.1
    assert capsys.readouterr().err.splitlines()[-1].endswith("/10000, 10.0 steps/s, 15 min left")


def test_a_terminal_shows_other_work_beside_the_steps(clock: Clock, terminal: io.StringIO) -> None:
    with Bar("training", "steps") as bar:
        bar(3, 50)
        bar.meanwhile("drawing samples", 1, 4)
    assert "drawing samples 25% (3/50)" in terminal.getvalue()
