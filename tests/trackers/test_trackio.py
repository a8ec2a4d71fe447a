"""Trackio: which calls it gets, on a module that records them; and, where it is installed, what it stores."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from PIL import Image

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.trackers.registry import recall
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid
from multistage_diffusion.training.tracking import Tracking, numbers
from multistage_diffusion.training.trainer import Trainer


class Module(types.ModuleType):
    """Stands in for trackio: keeps what it is asked for."""

    def __init__(self):
        super().__init__("trackio")
        self.inits, self.logged, self.ended = [], [], 0
        self.Image = lambda image, caption: ("image", image.size, caption)
        self.current = None

    def init(self, **settings):
        print("a greeting")
        self.inits.append(settings)
        self.current = types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)))
        return self.current

    def finish(self):
        print("a farewell")
        self.current = None
        self.ended += 1


@pytest.fixture(name="module")
def fixture_module(monkeypatch):
    module = Module()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_training_sends_settings_numbers_and_samples(module, tmp_path, tiny_config, tiny_data, capsys):
    config = tiny_config(training__steps=2, training__sample_every=2)
    run = Run.create(tmp_path / "run", config)
    tracking = Tracking.of(["trackio"])
    grids = SampleGrid((1, 4, 4), show=tracking.images)
    Trainer(run, tiny_data(), device="cpu", callbacks=[tracking, grids]).fit()
    assert capsys.readouterr().out == ""
    (settings,) = module.inits
    assert settings["name"].startswith("run-")
    assert (settings["config"], settings["resume"]) == (to_dict(config), "allow")
    assert [entry for entry in module.logged if "samples" not in entry[1]] == [
        (record["step"], numbers(record)) for record in run.records()
    ]
    assert [entry for entry in module.logged if "samples" in entry[1]] == [
        (2, {"samples": ("image", (521, 521), "step 2")})
    ]
    assert (module.ended, module.current) == (1, None)
    assert recall(run.path, "trackio") == {"name": settings["name"]}


def test_a_resumed_run_goes_on_there_and_another_of_its_name_does_not(module, tmp_path):
    for folder in ("a/run", "b/run", "a/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tracker,) = Tracking.of(["trackio"]).trackers
        tracker.open(tmp_path / folder, 0)
        tracker.config({})
    first, other, again = [settings["name"] for settings in module.inits]
    assert first == again != other


def test_evaluations_carry_their_compute(module, tmp_path):
    tracking = Tracking.of(["trackio"])
    tracking.trackers[0].open(tmp_path, 0)
    tracking.trackers[0].config({})
    tracking.logged(None, {"kind": "quality", "step": 3, "frechet": 1.5, "petaflops": 2.0, "metrics": {}})
    assert module.logged == [(3, {"quality/frechet": 1.5, "petaflops": 2.0})]


@pytest.mark.slow
def test_at_exit_nothing_is_written_to_standard_output(tmp_path):
    pytest.importorskip("trackio")
    script = (
        "from pathlib import Path; from multistage_diffusion.training.tracking import Tracking\n"
        "(tracker,) = Tracking.of(['trackio']).trackers\n"
        "tracker.open(Path('run'), 0); tracker.config({}); tracker.scalars(1, {'loss': 0.5}); tracker.close()\n"
    )
    (tmp_path / "run").mkdir()
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr.count("Run finished") == 1


@pytest.mark.slow
def test_everything_is_in_the_local_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    (tmp_path / "run").mkdir()
    for step in (0, 2):  # started, and resumed
        (tracker,) = Tracking.of(["trackio"]).trackers
        tracker.open(tmp_path / "run", step)
        tracker.config({"optimizer": {"lr": 0.25}})
        tracker.scalars(step + 1, {"loss/train/stage 1": 0.5})
        tracker.evaluation(step + 2, 0.125, {"quality/frechet": 3.0})
        tracker.images(step + 2, Image.new("L", (4, 4)))
        tracker.close()
    (run,) = trackio.Api().runs("multistage-diffusion")
    assert run.config["optimizer"] == {"lr": 0.25}
    found = trackio.SQLiteStorage.get_logs("multistage-diffusion", run.name)
    assert [log["step"] for log in found if "loss/train/stage 1" in log] == [1, 3]
    assert [(log["step"], log["petaflops"]) for log in found if "quality/frechet" in log] == [(2, 0.125), (4, 0.125)]
    assert sum("samples" in log for log in found) == 2
