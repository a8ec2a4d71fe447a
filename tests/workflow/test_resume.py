from __future__ import annotations

from typing import Any

import pytest

from multistage_diffusion.cli import main
from multistage_diffusion.trackers.registry import track
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.resume import resume


@pytest.fixture(name="launched")
def fixture_launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trackers of each training that would have been launched."""
    found: list[Any] = []

    def launch(*_: object, trackers: Any, **__: object) -> Any:
        found.append(trackers)
        return Run("run")  # type: ignore[arg-type]

    monkeypatch.setattr("multistage_diffusion.workflow.resume.launch", launch)
    return found


def test_a_resumed_run_has_its_trackers_unless_others_are_named(
    launched: list[Any], tmp_path: Any, tiny_config: Any
) -> None:
    run = Run.create(tmp_path / "run", tiny_config())
    resume(run.path)
    track(run.path, ("wandb", "trackio"))
    resume(run.path)
    resume(run.path, trackers=())
    for options in ((), ("--track", "tensorboard"), ("--track", "none")):
        assert main(["train", "--resume", str(run.path), *options]) == 0
    assert launched == [(), ("wandb", "trackio"), (), ("wandb", "trackio"), ("tensorboard",), ()]
