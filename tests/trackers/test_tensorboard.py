from __future__ import annotations

import builtins
import json
import shutil
import sys

import pytest

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.trackers.tensorboard import TensorBoard
from multistage_diffusion.training.callbacks import Callback, Evaluated
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.sample_grid import SampleGrid
from multistage_diffusion.training.tracking import Tracking
from multistage_diffusion.training.trainer import Trainer


def test_tensorboard_holds_every_logged_number(tmp_path, tiny_config, tiny_data):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = {"training__log_every": 2, "training__held_out_every": 2}
    sampled = {"training__sample_every": 4, "training__sample_count": 4}
    run = Run.create(tmp_path / "run", tiny_config(training__steps=4, **logged, **sampled))
    tracking = Tracking([TensorBoard()])
    callbacks = [tracking, SampleGrid((1, 4, 4), show=tracking.images)]
    Trainer(run, tiny_data(), tiny_data(6, seed=1), device="cpu", callbacks=callbacks).fit()
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
    assert events.Tags()["tensors"] == ["configuration/text_summary"]
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text) == to_dict(run.config())
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    kept = plugin.HParamsPluginData.FromString(settings).session_start_info.hparams
    assert kept["optimizer.lr"].number_value == run.config().optimizer.lr
    assert kept["network.decoder_widths"].string_value == "[12, 8, 4]"
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (4, 2 * 65 + 1, 2 * 65 + 1)
    assert len(expected) == 2 * (3 + 3 + 4 + 2)  # losses of two kinds, norms of four parts, rate and learning rate


def evaluated(trainer: Trainer, frechet: float | None) -> Evaluated:
    """Return an evaluation: a step is 7.3 TFLOPs."""
    record = {"kind": "quality", "step": trainer.step, "images": trainer.images, "frechet": frechet, "seconds": 0.0}
    more = {"petaflops": 0.0073 * trainer.step, "extractor": "pixels", "count": 9, "reference": "x"}
    return Evaluated(record={**record, **more}, quality=frechet)


@pytest.mark.slow
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
    run, evaluations = Run.create(tmp_path / "run", config), Evaluates()
    with pytest.raises(InterruptedError):
        Trainer(run, tiny_data(), device="cpu", callbacks=[evaluations, Tracking([TensorBoard()]), Kills()]).fit()
    shutil.rmtree(run.checkpoint("latest"))  # of step 4: what step 2 is followed by is hidden and made again
    resumed = Trainer(run, tiny_data(), device="cpu", callbacks=[evaluations, Tracking([TensorBoard()])])
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
