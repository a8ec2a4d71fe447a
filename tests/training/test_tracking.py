from __future__ import annotations

import pytest
from PIL import Image

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.trackers.registry import Tracker
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid
from multistage_diffusion.training.tracking import Tracking, numbers
from multistage_diffusion.training.trainer import Trainer


class Notes(Tracker):
    """Keeps its calls."""

    def __init__(self):
        self.calls = []

    def open(self, folder, step):
        self.calls.append(("open", folder, step))

    def config(self, config):
        self.calls.append(("config", config))

    def scalars(self, step, values):
        self.calls.append(("scalars", step, values))

    def images(self, step, grid):
        self.calls.append(("images", step, grid))

    def close(self):
        self.calls.append(("close",))


def test_every_tracker_receives_everything_in_order(tmp_path, tiny_config, tiny_data):
    config = tiny_config(training__steps=2, training__held_out_every=2, training__sample_every=2)
    run = Run.create(tmp_path / "run", config)
    one, other = Notes(), Notes()
    tracking = Tracking([one, other])
    grids = SampleGrid((1, 4, 4), show=tracking.images)
    Trainer(run, tiny_data(), tiny_data(6, seed=1), device="cpu", callbacks=[tracking, grids]).fit()
    assert [call[0] for call in one.calls] == ["open", "config", "scalars", "images", "scalars", "scalars", "close"]
    assert one.calls == other.calls
    assert one.calls[0][1:] == (run.path, 0)
    assert one.calls[1][1] == to_dict(config)
    received = [call[1:] for call in one.calls if call[0] == "scalars"]
    assert received == [(record["step"], numbers(record)) for record in run.records()]
    (picture,) = [call[2] for call in one.calls if call[0] == "images"]
    assert isinstance(picture, Image.Image)


def test_trackers_are_closed_after_an_error(tmp_path, tiny_config, tiny_data):
    class Fails(Notes):
        def scalars(self, step, values):
            raise InterruptedError

    run, tracker = Run.create(tmp_path / "run", tiny_config()), Fails()
    with pytest.raises(InterruptedError):
        Trainer(run, tiny_data(), device="cpu", callbacks=[Tracking([tracker])]).fit()
    assert tracker.calls[-1] == ("close",)


def test_numbers_of_records():
    train = {"kind": "train", "step": 3, "images": 9, "loss": [0.5, None], "grad_norm": {"encoder": 2.0}, "lr": 0.1}
    assert numbers({**train, "images_per_s": 7.0, "seconds": 1.0}) == {
        "loss/train/stage 1": 0.5,
        "gradient norm/encoder": 2.0,
        "lr": 0.1,
        "images_per_s": 7.0,
    }
    assert numbers({"kind": "held_out", "step": 3, "loss": [None, 0.25]}) == {"loss/held_out/stage 2": 0.25}
    evaluation = {"kind": "quality", "step": 3, "frechet": 1.5, "petaflops": 2.0, "metrics": {"recall": 0.5}}
    assert numbers(evaluation) == {"quality/frechet": 1.5, "quality/recall": 0.5}
    assert numbers({**evaluation, "frechet": None, "metrics": {}}) == {}


def test_evaluations_are_scalars_unless_a_tracker_wants_the_compute():
    class Compute(Notes):
        def evaluation(self, step, petaflops, values):
            self.calls.append(("evaluation", step, petaflops, values))

    plain, compute = Notes(), Compute()
    record = {"kind": "quality", "step": 3, "frechet": 1.5, "petaflops": 2.0, "metrics": {}}
    tracking = Tracking([plain, compute])
    tracking.logged(None, record)
    tracking.logged(None, {**record, "frechet": None})
    assert plain.calls == [("scalars", 3, {"quality/frechet": 1.5})]
    assert compute.calls == [("evaluation", 3, 2.0, {"quality/frechet": 1.5})]


def test_an_unknown_tracker_is_refused():
    assert [type(tracker).__name__ for tracker in Tracking.of(["tensorboard", "tensorboard"]).trackers] == [
        "TensorBoard"
    ]
    with pytest.raises(UserError, match="track='csv' must be one of tensorboard, trackio, wandb"):
        Tracking.of(["csv"])
