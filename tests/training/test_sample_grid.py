from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.reporting.pictures import grid
from multistage_diffusion.samplers.sampling import sample_images
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid
from multistage_diffusion.training.trainer import Trainer


@pytest.mark.parametrize("classes", [0, 3])
def test_grids_come_in_time_and_show_the_averaged_weights(tmp_path, tiny_config, tiny_data, classes):
    # weights that run ahead of their average: the two draw different pictures
    settings = {"optimizer__lr": 0.05, "training__ema_rampup": 0.0, "training__ema_halflife": 1000.0}
    sampling = {"training__sample_every": 2, "training__sample_count": 4, "network__num_classes": classes}
    config = tiny_config(training__steps=5, **settings, **sampling)
    run = Run.create(tmp_path / "run", config)
    shown = {}
    grids = SampleGrid((1, 4, 4), show=shown.__setitem__)
    trainer = Trainer(run, tiny_data(classes=classes), device="cpu", callbacks=[grids])
    averaged = {}

    class Keep(SampleGrid):
        def stepped(self, trainer):
            if trainer.step == 4:
                averaged["4"] = sample_images(
                    trainer.ema.module,
                    (1, 4, 4),
                    4,
                    config=config.sampling,
                    schedule=config.diffusion.schedule,
                    labels=torch.tensor([0, 1, 2, 0]) if classes else None,
                )

    trainer.callbacks.append(Keep((1, 4, 4)))
    trainer.fit()
    captions = ["0", "1", "2", "0"] if classes else None
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    with Image.open(run.path / "samples" / "step_00000004.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid(averaged["4"], captions=captions)))
        assert np.array_equal(np.asarray(picture), np.asarray(shown[4]))
    assert list(shown) == [2, 4]


def test_no_grids_unless_asked_for(tmp_path, tiny_config, tiny_data):
    run = Run.create(tmp_path / "run", tiny_config(training__steps=2))
    Trainer(run, tiny_data(), device="cpu", callbacks=[SampleGrid((1, 4, 4))]).fit()
    assert not (run.path / "samples").exists()


def test_samples_that_are_not_finite_do_not_stop_training(tmp_path, tiny_config, tiny_data, monkeypatch):
    def diverges(*_args, **_settings):
        raise FloatingPointError("4 of 4 samples are not finite")

    monkeypatch.setattr("multistage_diffusion.training.sample_grid.sample_images", diverges)
    run = Run.create(tmp_path / "run", tiny_config(training__steps=2, training__sample_every=2))
    trainer = Trainer(run, tiny_data(), device="cpu", callbacks=[SampleGrid((1, 4, 4))])
    with pytest.warns(UserWarning, match="no sample grid at step 2: 4 of 4"):
        trainer.fit()
    assert trainer.step == 2
    assert not (run.path / "samples").exists()


def test_a_stop_does_not_wait_for_a_grid(tmp_path, tiny_config, tiny_data, monkeypatch):
    run = Run.create(tmp_path / "run", tiny_config(training__steps=4, training__sample_every=2))

    def interrupted(*_, progress, **__):
        trainer.stop()
        progress(1, 4)

    monkeypatch.setattr("multistage_diffusion.training.sample_grid.sample_images", interrupted)
    trainer = Trainer(run, tiny_data(), device="cpu", callbacks=[SampleGrid((1, 4, 4))])
    trainer.fit()
    assert (trainer.step, trainer.stopped) == (2, True)
    assert not (run.path / "samples").exists()
