"""Weights & Biases: which calls it gets, on a module that records them; and, where it is installed, what it writes offline."""

from __future__ import annotations

import builtins
import sys
import types

import pytest
from PIL import Image

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.trackers.registry import recall, tracked
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid
from multistage_diffusion.training.tracking import Tracking, numbers
from multistage_diffusion.training.trainer import Trainer


class Module(types.ModuleType):
    """Stands in for wandb: keeps what it is asked for."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.axes, self.logged, self.config, self.ended, self.fault = [], {}, [], {}, 0, None
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Settings = lambda **settings: settings
        self.Image = lambda image: ("image", image.size)

    def init(self, **settings):
        if self.fault:
            raise self.errors.Error(self.fault)
        self.inits.append(settings)
        run = types.SimpleNamespace(id=settings["id"] or "new-id", log=self.logged.append, finish=self._finish)
        run.define_metric = lambda name, step_metric=None: self.axes.__setitem__(name, step_metric)
        run.config = types.SimpleNamespace(update=lambda config, allow_val_change: self.config.update(config))
        return run

    def _finish(self):
        self.ended += 1


@pytest.fixture(name="module")
def fixture_module(monkeypatch):
    module = Module()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_training_sends_settings_numbers_and_samples(module, tmp_path, tiny_config, tiny_data):
    config = tiny_config(training__steps=2, training__sample_every=2)
    run = Run.create(tmp_path / "run", config)
    tracking = Tracking.of(["wandb", "wandb"])
    grids = SampleGrid((1, 4, 4), show=tracking.images)
    Trainer(run, tiny_data(), device="cpu", callbacks=[tracking, grids]).fit()
    (settings,) = module.inits
    assert (settings["name"], settings["id"], settings["resume"], settings["dir"]) == ("run", None, None, str(run.path))
    assert module.config == to_dict(config)
    assert module.axes == {"step": None, "*": "step", "petaflops": None, "by compute/*": "petaflops"}
    numbers_of = [{"step": record["step"], **numbers(record)} for record in run.records()]
    assert [entry for entry in module.logged if "samples" not in entry] == numbers_of
    assert [entry for entry in module.logged if "samples" in entry] == [{"step": 2, "samples": ("image", (521, 521))}]
    assert module.ended == 1
    assert tracked(run.path) == ("wandb",)
    assert recall(run.path, "wandb") == {"id": "new-id"}


def test_a_resumed_run_goes_on_there(module, tmp_path, tiny_config):
    (tracker,) = Tracking.of(["wandb"]).trackers
    tracker.open(tmp_path, 0)
    (again,) = Tracking.of(["wandb"]).trackers
    again.open(tmp_path, 4)
    assert [(settings["id"], settings["resume"]) for settings in module.inits] == [(None, None), ("new-id", "allow")]


def test_evaluations_are_drawn_by_step_and_by_compute(module, tmp_path):
    tracking = Tracking.of(["wandb"])
    tracking.trackers[0].open(tmp_path, 0)
    record = {"kind": "quality", "step": 3, "frechet": 1.5, "petaflops": 2.0, "metrics": {"recall": 0.5}}
    tracking.logged(None, record)
    values = {"quality/frechet": 1.5, "quality/recall": 0.5}
    assert module.logged == [
        {"step": 3, "petaflops": 2.0, **values, **{f"by compute/{name}": value for name, value in values.items()}}
    ]


def test_what_keeps_it_from_starting_is_one_line(module, tmp_path):
    module.fault = "No API key\nconfigured."
    (tracker,) = Tracking.of(["wandb"]).trackers
    with pytest.raises(
        UserError, match=r"track=wandb: No API key configured\.; log in \(wandb login\), set WANDB_MODE"
    ):
        tracker.open(tmp_path, 0)
    tracker.close()


def test_wandb_that_is_not_installed_is_explained(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        UserError, match=r"pip install 'multistage-diffusion\[wandb\]'; or leave it out \(--track none\)"
    ):
        Tracking.of(["wandb"])


@pytest.mark.slow
def test_offline_everything_is_written_to_the_runs_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 2):  # started, and resumed
        tracking = Tracking.of(["wandb"])
        (tracker,) = tracking.trackers
        tracker.open(tmp_path, step)
        tracker.config({"optimizer": {"lr": 0.25}})
        tracker.scalars(step + 1, {"loss/train/stage 1": 0.5})
        tracker.evaluation(step + 2, 0.125, {"quality/frechet": 3.0})
        tracker.images(step + 2, Image.new("L", (4, 4)))
        tracker.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert len({file.name for file in files}) == 1  # the same run
    written = b"".join(file.read_bytes() for file in files)
    for name in (
        "loss/train/stage 1",
        "quality/frechet",
        "by compute/quality/frechet",
        "petaflops",
        "optimizer",
        "samples",
    ):
        assert name.encode() in written, name
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
