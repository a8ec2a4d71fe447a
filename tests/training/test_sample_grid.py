from __future__ import annotations

import builtins
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.reporting.pictures import grid
from multistage_diffusion.samplers.sampling import sample_images
from multistage_diffusion.training.callbacks import Callback, Evaluated
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid, TensorBoard
from multistage_diffusion.training.trainer import Trainer


@pytest.mark.parametrize("classes", [0, 3])
def test_grids_come_in_time_and_show_the_averaged_weights(tmp_path, tiny_config, tiny_data, classes):
    # weights that run ahead of their average: the two draw different pictures
    settings = {"optimizer__lr": 0.05, "training__ema_rampup": 0.0, "training__ema_halflife": 1000.0}
    sampling = {"training__sample_every": 2, "training__sample_count": 4, "network__num_classes": classes}
    config = tiny_config(training__steps=5, **settings, **sampling)
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(run, tiny_data(classes=classes), device="cpu", callbacks=[SampleGrid((1, 4, 4))])
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
    assert sorted(p.name for p in (run.path / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    with Image.open(run.path / "samples" / "step_00000004.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(grid(averaged["4"])))


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


def test_tensorboard_holds_every_logged_number(tmp_path, tiny_config, tiny_data):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run.create(
        tmp_path / "run", tiny_config(training__steps=4, training__log_every=2, training__held_out_every=2)
    )
    Trainer(run, tiny_data(), tiny_data(6, seed=1), device="cpu", callbacks=[TensorBoard()]).fit()
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    expected = {}
    for record in run.records():
        for stage, loss in enumerate(record["loss"], start=1):
            expected[f"loss/{record['kind']}/stage {stage}", record["step"]] = loss
        for name, norm in record.get("grad_norm", {}).items():
            expected[f"gradient norm/{name}", record["step"]] = norm
        for name in ("lr", "images_per_s"):
            if name in record:
                expected[name, record["step"]] = record[name]
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(expected) == 2 * (3 + 3 + 4 + 2)  # losses of two kinds, norms of four parts, rate and learning rate


def evaluated(trainer: Trainer, frechet: float | None) -> Evaluated:
    """Return an evaluation: a step is 7.3 TFLOPs."""
    record = {"kind": "quality", "step": trainer.step, "images": trainer.images, "frechet": frechet, "seconds": 0.0}
    more = {"petaflops": 0.0073 * trainer.step, "extractor": "pixels", "count": 9, "reference": "x"}
    return Evaluated(record={**record, **more}, quality=frechet)


def test_tensorboard_holds_distances_by_step_and_by_compute(tmp_path, tiny_config, tiny_data):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Evaluates(Callback):
        def stepped(self, trainer):
            return None if trainer.step == 3 else evaluated(trainer, None if trainer.step == 1 else 10.0 / trainer.step)

    class Kills(Callback):
        def stepped(self, trainer):
            if trainer.step == 5:
                raise InterruptedError

    config = tiny_config(training__steps=6, training__log_every=6)
    run = Run.create(tmp_path / "run", config)
    with pytest.raises(InterruptedError):
        Trainer(run, tiny_data(), device="cpu", callbacks=[Evaluates(), TensorBoard(), Kills()]).fit()
    shutil.rmtree(run.checkpoint("latest"))  # of step 4: what step 2 is followed by is hidden and made again
    resumed = Trainer(run, tiny_data(), device="cpu", callbacks=[Evaluates(), TensorBoard()])
    assert resumed.step == 2
    resumed.fit()

    def scalars(folder, tag):
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        return [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]

    folder = run.path / "tensorboard"
    assert scalars(folder, "quality/frechet") == [(2, 5.0), (4, 2.5), (5, 2.0), (6, 10 / 6)]
    by_flops = scalars(folder / "by-flops", "quality/frechet against tera-FLOPs")
    assert by_flops == [(15, 5.0), (29, 2.5), (36, 2.0), (44, 10 / 6)]


def test_tensorboard_that_is_not_installed_is_explained(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install 'multistage-diffusion\[track\]'"):
        TensorBoard()
