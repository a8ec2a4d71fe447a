from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data import ImageData
from multistage_diffusion.data.decoded import DecodedRows
from multistage_diffusion.data.image_files import ImageFiles
from multistage_diffusion.data.options import Options
from multistage_diffusion.performance import autotune, cpu
from multistage_diffusion.performance.cpu import dropout
from multistage_diffusion.performance.devices import autocast_dtype, resolve_device
from multistage_diffusion.performance.execution import Execution
from multistage_diffusion.training import checkpoint as ckpt
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.callbacks import Callback, Evaluated
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.metrics import TrainingDiverged
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

MODES = ("mixed", "one-stage", "sequential")


class Stepped(Callback):
    """Calls a function after every step."""

    def __init__(self, function) -> None:
        self.function = function

    def stepped(self, trainer: Trainer) -> Evaluated | None:
        return self.function(trainer)


@pytest.fixture
def new_trainer(tmp_path, tiny_config, tiny_data):
    """Make trainers of new runs: new_trainer(key=value, ...), without dropout and flips unless they are given."""

    def make(name="run", *, data=None, held_out=None, stepped=None, **changes):
        config = tiny_config(**{"network__dropout": 0.0, "training__flip": False, **changes})
        run = Run.create(tmp_path / name, config)
        callbacks = [Stepped(stepped)] if stepped else []
        return Trainer(run, data or tiny_data(), held_out, device="cpu", callbacks=callbacks)

    return make


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.denoiser.named_parameters()}


def adam(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in ckpt.optimizer_tensors(trainer.optimization.optimizer, trainer.denoiser).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def part_of(name: str) -> str:
    """Return the part a parameter belongs to, as `network.parts()` calls it."""
    _, kind, number, *_ = name.split(".")
    return "encoder" if kind == "encoders" else f"decoder.{int(number) + 1}"


def hand_gradients(trainer: Trainer, counts: tuple[int, ...], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Return the gradient of the objective at the first step, without the trainer."""
    module = copy.deepcopy(trainer.denoiser)
    objective(stage_losses(module, trainer.passes.source.draw(0, counts)), weights, counts).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def norms_by_part(grads: dict[str, torch.Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, g in grads.items():
        squares[part_of(name)] = squares.get(part_of(name), 0.0) + float(g.double().square().sum())
    return {name: math.sqrt(value) for name, value in squares.items()}


# -- resume -----------------------------------------------------------------------------------------------------------


def outcome(run: Run) -> tuple[dict[str, bytes], list[dict]]:
    """Return the latest checkpoint's files and the log without its times."""
    latest = run.checkpoint("latest")
    records = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in run.records()]
    return {p.name: p.read_bytes() for p in sorted(latest.iterdir())}, records


RESUMES = [
    pytest.param("mixed", 12, {"execution.thread_parallel": 2, "training.accumulate": 2}, marks=pytest.mark.slow),
    ("mixed", 20, {"network.num_classes": 3}),
    pytest.param("one-stage", 20, {"optimizer.kind": "adamw", "optimizer.weight_decay": 0.1}, marks=pytest.mark.slow),
    pytest.param("sequential", 20, {"optimizer.clip_scope": "part"}, marks=pytest.mark.slow),
    pytest.param("mixed", 12, {"training.precision": "bf16", "training.accumulate": 2}, marks=pytest.mark.slow),
    pytest.param("mixed", 12, {"training.precision": "fp16"}, marks=pytest.mark.slow),
    ("sequential", 12, {"training.loss_weighting": "learned"}),
    pytest.param(
        *("mixed", 12, {"training.loss_weighting": "learned", "training.precision": "fp16"}), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(
    ("mode", "steps", "extra"),
    RESUMES,
    ids=["threads", "mixed", "one-stage", "sequential", "bf16", "fp16", "learned weights", "learned weights fp16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, tiny_config, tiny_data, mode, steps, extra):
    changes = {
        "network__dropout": 0.2,
        "training__flip": True,
        "training__label_dropout": 0.3,
        "training__update_mode": mode,
        "training__steps": steps,
        "training__log_every": 7,
        "training__held_out_every": 4,
        "training__checkpoint_every": steps // 2,
        "training__held_out_rows": 5,
        **{key.replace(".", "__"): value for key, value in extra.items()},
    }
    data, held_out = tiny_data(26, classes=3), tiny_data(9, classes=3, seed=1)

    def trainer(name: str, stepped=lambda _: None) -> Trainer:
        path = tmp_path / name
        run = Run.open(path) if path.exists() else Run.create(path, tiny_config(**changes))
        return Trainer(run, data, held_out, device="cpu", callbacks=[Stepped(stepped)])

    def killed(trainer: Trainer) -> None:
        if trainer.step == steps // 2 + 3:  # after the checkpoint, with lines logged since
            raise InterruptedError

    whole, broken = trainer("whole"), trainer("broken", killed)
    whole.fit()
    with pytest.raises(InterruptedError):
        broken.fit()
    torch.manual_seed(123)  # another process starts from another state
    resumed = trainer("broken")
    assert resumed.step == steps // 2
    resumed.fit()
    (files, records), (files_again, records_again) = outcome(whole.run), outcome(resumed.run)
    assert files.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert files_again == files
    assert records_again == records
    assert {r["step"] for r in records if r["kind"] == "train"} == {*range(7, steps + 1, 7), steps}
    assert equal(parameters(whole), parameters(resumed))
    assert not equal(parameters(whole), dict(whole.ema.module.named_parameters()))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_power_averages_and_their_snapshots_are_resumed_bit_for_bit(tmp_path, tiny_config, tiny_data):
    changes = {
        "training__ema_profiles": [0.05, 0.1],
        "training__ema_snapshot_every": 4,
        "training__checkpoint_every": 6,
    }

    def trainer(name: str, stepped=lambda _: None) -> Trainer:
        path = tmp_path / name
        run = Run.open(path) if path.exists() else Run.create(path, tiny_config(training__steps=14, **changes))
        return Trainer(run, tiny_data(), device="cpu", callbacks=[Stepped(stepped)])

    def killed(trainer: Trainer) -> None:
        if trainer.step == 9:  # after the snapshot of step 8, which is after the checkpoint
            raise InterruptedError

    whole, broken = trainer("whole"), trainer("broken", killed)
    whole.fit()
    with pytest.raises(InterruptedError):
        broken.fit()
    snapshots = broken.run.snapshots
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(snapshots)] == [4, 8]
    for step in (8, 11):  # of another machine's rounding; of an interval that has been changed since
        ckpt.save_snapshot(snapshots, step, {"ema_0.05": {"a": torch.zeros(1)}})
    resumed = trainer("broken")
    assert resumed.step == 6
    resumed.fit()
    assert files(snapshots) == files(whole.run.snapshots)
    assert files(resumed.run.checkpoint("latest")) == files(whole.run.checkpoint("latest"))
    assert {name.split("/")[0] for name in files(snapshots)} == {"step_00000004", "step_00000008", "step_00000012"}
    for one, other in zip(whole.profiles, resumed.profiles, strict=True):
        assert equal(one.module.state_dict(), other.module.state_dict())


def test_power_averages_leave_the_run_as_it_is_without_them(new_trainer, tiny_data):
    settings = {"training__steps": 5, "training__held_out_every": 2, "network__dropout": 0.2, "training__flip": True}
    plain = new_trainer("plain", held_out=tiny_data(9, seed=1), **settings)
    more = new_trainer("more", held_out=tiny_data(9, seed=1), training__ema_profiles=[0.1], **settings)
    plain.fit()
    more.fit()
    (own, records), (theirs, other) = outcome(plain.run), outcome(more.run)
    assert theirs.keys() - own.keys() == {"ema_0.1.safetensors"}
    assert all(theirs[name] == own[name] for name in own.keys() - {"state.json"})
    assert records == other
    assert not plain.run.snapshots.exists()


def test_a_run_of_step_0_begins_its_power_averages_with_the_first_step(new_trainer, tiny_data):
    trainer = new_trainer(training__ema_profiles=[0.1], training__steps=1)
    start = {name: dict(part) for name, part in (("w", trainer.denoiser.state_dict()), ("o", {}))}
    state = {
        "step": 0,
        "score": None,
        "sums": dataclasses.asdict(trainer.log.sums),
        "scaler": {},
        "config": trainer.config,
    }
    ckpt.save_checkpoint(trainer.run.checkpoints, ckpt.Checkpoint(start["w"], start["w"], start["o"], state))
    again = Trainer(trainer.run, tiny_data(), device="cpu")  # as an imported run
    again.fit()
    assert equal(dict(again.profiles[0].module.named_parameters()), parameters(again))


def test_stop_ends_after_the_step_with_a_checkpoint_to_go_on_from(new_trainer, tiny_data):
    def stop(trainer: Trainer) -> None:
        if trainer.step == 3:
            trainer.stop()

    trainer = new_trainer(training__steps=6, stepped=stop)
    trainer.fit()
    whole = new_trainer("whole", training__steps=6)
    whole.fit()
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == [3]
    resumed = Trainer(trainer.run, tiny_data(), device="cpu")
    resumed.fit()
    assert outcome(resumed.run) == outcome(whole.run)


def test_a_stop_does_not_wait_for_the_trial(new_trainer, monkeypatch):
    def choose(*arguments):
        trainer.stop()
        arguments[-1]()
        raise AssertionError("the trial went on")

    monkeypatch.setattr("multistage_diffusion.performance.autotune.choose", choose)
    trainer = new_trainer(training__steps=6)
    trainer.fit()
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == [1]


def interrupted(trainer: Trainer, step: int, update: int = 0, *, compiled: bool = True) -> None:
    """Train until a signal in the passes of this update of this step, as if these were (not) compiled."""
    computed, updates = trainer.passes.gradients, iter(range(1000))

    def gradients(now: int, *arguments: Any) -> torch.Tensor:
        if now == step and next(updates) == update:
            trainer.interrupt()
        return computed(now, *arguments)

    compute = trainer.passes.compute

    def pretend(execution: Execution) -> None:
        compute(execution)
        trainer.passes.execution = dataclasses.replace(execution, compile=compiled)

    trainer.passes.gradients, trainer.passes.compute = gradients, pretend
    trainer.fit()


@pytest.mark.parametrize(
    ("step", "kept", "changes"),
    [
        (0, [], {}),
        (3, [3], {}),
        (3, [3], {"training__branch_at": 3, "network__decoder_widths": (8, 8, 8)}),
        (4, [4], {"training__loss_weighting": "learned"}),
    ],
)
def test_passes_that_may_be_compiled_are_given_up_without_a_loss(new_trainer, tiny_data, step, kept, changes):
    changes = {"training__steps": 6, "training__log_every": 2, "training__ema_profiles": [0.1], **changes}
    trainer = new_trainer(**changes)
    interrupted(trainer, step)
    assert (trainer.step, trainer.kept, trainer.stopped) == (step, step, True)
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == kept
    Trainer(trainer.run, tiny_data(), device="cpu").fit()
    whole = new_trainer("whole", **changes)
    whole.fit()
    assert outcome(trainer.run) == outcome(whole.run)


@pytest.mark.parametrize(
    ("step", "update", "compiled", "reached", "kept"),
    [
        (3, 0, False, 4, [4]),  # passes that are not compiled are short
        (3, 1, True, 4, [4]),  # half of the step is in the weights
        (0, 1, True, 0, []),  # but the run can begin anew
    ],
)
def test_other_passes_are_completed(new_trainer, step, update, compiled, reached, kept):
    trainer = new_trainer(training__update_mode="sequential", training__steps=6)
    interrupted(trainer, step, update, compiled=compiled)
    assert trainer.step == reached
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == kept


def test_an_interrupted_trial_is_followed_by_no_compiled_step(new_trainer):
    trainer = new_trainer(training__steps=3000, execution__channels_last="auto")
    calls = []
    computed = trainer.passes.gradients

    def gradients(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return computed(*arguments)

    trainer.passes.gradients = gradients
    interrupted(trainer, 0)
    assert (trainer.step, len(calls)) == (0, 0)


def test_a_finished_run_has_nothing_left_to_do(new_trainer, tiny_data):
    trainer = new_trainer(training__steps=2)
    trainer.fit()
    before = outcome(trainer.run)
    Trainer(trainer.run, tiny_data(), device="cpu").fit()
    assert outcome(trainer.run) == before


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
def test_a_decoder_without_rows_is_not_stepped_decayed_or_averaged(new_trainer, separate):
    seen = []

    def check(trainer: Trainer) -> None:
        now, state = parameters(trainer), adam(trainer)
        before, state_before = seen[-1][:2]
        moved = {part_of(n) for n in now if not torch.equal(now[n], before[n])}
        assert len([p for p in moved if p.startswith("decoder")]) == 1
        (stage,) = (p[-1] for p in moved if p.startswith("decoder"))
        for key, value in state.items():
            idle = part_of(key).startswith("decoder") and part_of(key)[-1] != stage
            if idle:
                assert torch.equal(value, state_before[key])
        for name in now:
            if part_of(name) in moved and not separate:
                steps = int(state[f"{name}.step"])
                assert steps == int(state_before.get(f"{name}.step", 0)) + 1
        seen.append((now, state, stage))

    trainer = new_trainer(
        stepped=check,
        training__update_mode="one-stage",
        training__steps=25,
        optimizer__kind="adamw",
        optimizer__weight_decay=0.5,
        network__separate=separate,
    )
    seen.append((parameters(trainer), adam(trainer), None))
    trainer.fit()
    assert {stage for *_, stage in seen[1:]} == {"1", "2", "3"}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_takes_the_steps_it_says(new_trainer, mode):
    trainer = new_trainer(training__update_mode=mode, training__steps=6, training__batch=12)
    trainer.fit()
    steps = {}
    for key, value in adam(trainer).items():
        if key.endswith(".step"):
            steps.setdefault(part_of(key), set()).add(int(value))
    decoders = [steps.get(f"decoder.{k}", {0}) for k in (1, 2, 3)]
    if mode == "mixed":
        assert steps == {"encoder": {6}, "decoder.1": {6}, "decoder.2": {6}, "decoder.3": {6}}
    elif mode == "sequential":
        assert steps == {"encoder": {18}, "decoder.1": {6}, "decoder.2": {6}, "decoder.3": {6}}
    else:
        assert steps["encoder"] == {6}
        assert sum(min(d) for d in decoders) == sum(max(d) for d in decoders) == 6


@pytest.mark.parametrize("accumulate", [1, 3])
def test_first_gradient_is_the_objective_s(new_trainer, accumulate):
    trainer = new_trainer(training__steps=1, training__accumulate=accumulate, optimizer__clip=None)
    expected = hand_gradients(trainer, trainer.allocation.counts, trainer.allocation.weights)
    trainer.fit()
    moments = adam(trainer)
    for name, g in expected.items():
        torch.testing.assert_close(moments[f"{name}.exp_avg"], 0.1 * g, rtol=1e-3, atol=1e-7)
    (record,) = trainer.run.records()
    assert record["grad_norm"] == pytest.approx(norms_by_part(expected), rel=1e-4)


@pytest.mark.parametrize("scope", ["model", "part"])
def test_clipping_scales_the_gradient_of_the_model_or_of_each_part(new_trainer, scope):
    limit = 0.05
    trainer = new_trainer(training__steps=1, optimizer__clip=limit, optimizer__clip_scope=scope)
    grads = hand_gradients(trainer, trainer.allocation.counts, trainer.allocation.weights)
    parts = norms_by_part(grads)
    whole = math.sqrt(sum(v**2 for v in parts.values()))
    assert min(parts.values()) < limit < whole  # so that the two scopes differ
    trainer.fit()
    moments = adam(trainer)
    for name, g in grads.items():
        factor = min(1.0, limit / (whole if scope == "model" else parts[part_of(name)]))
        torch.testing.assert_close(moments[f"{name}.exp_avg"], 0.1 * factor * g, rtol=1e-3, atol=1e-8)
    (record,) = trainer.run.records()
    assert record["grad_norm"] == pytest.approx(parts, rel=1e-4)  # logged as it was before clipping


def test_warm_up_raises_the_learning_rate_in_a_line(new_trainer):
    trainer = new_trainer(training__steps=6, optimizer__lr=0.01, optimizer__warmup_steps=4)
    trainer.fit()
    assert [r["lr"] for r in trainer.run.records()] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    trainer = new_trainer("cold", training__steps=2, optimizer__lr=0.01)
    trainer.fit()
    assert [r["lr"] for r in trainer.run.records()] == [0.01, 0.01]


def test_the_learning_rate_falls_with_the_square_root_of_the_step(new_trainer):
    trainer = new_trainer(training__steps=8, optimizer__lr=0.01, optimizer__warmup_steps=2, optimizer__decay_after=4)
    trainer.fit()
    rise, fall = [0.005, 0.01, 0.01, 0.01], [0.01 * math.sqrt(4 / step) for step in (5, 6, 7, 8)]
    assert [r["lr"] for r in trainer.run.records()] == pytest.approx(rise + fall)


def test_average_follows_the_weights_by_images(new_trainer):
    seen = []
    trainer = new_trainer(
        training__steps=5, training__ema_rampup=0.5, stepped=lambda t: seen.append(parameters(t)), optimizer__lr=0.1
    )
    trainer.fit()
    average = seen[0]
    for step in range(1, 5):
        decay = 0.5 ** (12 / min(100.0, 0.5 * 12 * step))
        average = {n: decay * average[n] + (1 - decay) * p for n, p in seen[step].items()}
    for name, p in trainer.ema.module.named_parameters():
        torch.testing.assert_close(p, average[name])


def test_initial_weights_depend_on_the_seed_alone(new_trainer):
    torch.manual_seed(1)
    a = new_trainer("a")
    torch.manual_seed(2)
    assert equal(parameters(a), parameters(new_trainer("b")))
    assert not equal(parameters(a), parameters(new_trainer("c", training__seed=1)))


# -- logs and losses --------------------------------------------------------------------------------------------------


def test_logged_losses_are_means_over_the_interval(new_trainer):
    every = new_trainer("every", training__steps=7, training__update_mode="one-stage")
    every.fit()
    thirds = new_trainer("thirds", training__steps=7, training__log_every=3, training__update_mode="one-stage")
    thirds.fit()
    single = every.run.records()
    for record, (first, last) in zip(thirds.run.records(), [(0, 3), (3, 6), (6, 7)], strict=True):
        for stage in range(3):
            losses = [r["loss"][stage] for r in single[first:last] if r["loss"][stage] is not None]
            if losses:
                assert record["loss"][stage] == pytest.approx(sum(losses) / len(losses))
            else:
                assert record["loss"][stage] is None
        norms = [r["grad_norm"]["encoder"] for r in single[first:last]]
        assert record["grad_norm"]["encoder"] == pytest.approx(sum(norms) / len(norms))
        assert record["images"] == 12 * record["step"] == 12 * last
        assert record["images_per_s"] == pytest.approx(12 * (last - first) / record["seconds"])


def test_held_out_losses_are_the_averaged_weights_and_repeat_exactly(new_trainer, tiny_data):
    held_out = tiny_data(6, seed=1)
    trainer = new_trainer(
        held_out=held_out,
        training__steps=4,
        training__held_out_every=2,
        training__checkpoint_every=2,
        optimizer__lr=0.02,
    )
    trainer.fit()
    losses = trainer.held_out_losses()
    assert trainer.held_out_losses() == losses
    records = [r for r in trainer.run.records() if r["kind"] == "held_out"]
    assert [r["step"] for r in records] == [2, 4]
    assert records[1]["loss"] == losses
    assert records[0]["loss"] != losses
    # the score that picks the best checkpoint is the ordinary loss
    masses = [trainer.config.diffusion.prior.mass(*trainer.config.stages.interval(k)) for k in range(3)]
    score = ckpt.read_state(trainer.run.checkpoint("latest"))["score"]
    assert score == pytest.approx(sum(m * x for m, x in zip(masses, losses, strict=True)))
    with torch.no_grad():
        for p in trainer.denoiser.parameters():
            p.zero_()
    assert trainer.held_out_losses() == losses


def two_images() -> ImageData:
    pixels = np.zeros((8, 1, 4, 4), np.uint8)
    pixels[::2, :, :2] = 255
    pixels[1::2, :, :, 2:] = 255
    return ImageData(pixels, None, "two")


LEARN = {
    "mixed": (40, {}),
    "one-stage": (70, {"training__update_mode": "one-stage"}),
    "sequential": (40, {"training__update_mode": "sequential"}),
    "separate": (40, {"network__separate": True}),
    "one-decoder": (40, {"network__decoder_widths": (8,), "stages__interior": ()}),
    "ncsnpp-vp": (
        40,
        {
            "network__family": "ncsnpp",
            "diffusion__precondition": "vp-eps",
            "diffusion__prior__kind": "uniform-time",
            "diffusion__prior__schedule": {"kind": "vp"},
        },
    ),
    "velocity": (40, {"diffusion__precondition": "velocity"}),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case != "mixed")) for case in LEARN])
def test_training_learns(new_trainer, case):
    steps, changes = LEARN[case]
    settings = {"training__batch": 24, "optimizer__lr": 5e-3, "diffusion__sigma_data": 1.0, **changes}
    trainer = new_trainer(data=two_images(), held_out=two_images(), training__steps=steps, **settings)
    before = np.dot(trainer.allocation.weights, trainer.held_out_losses())
    trainer.fit()
    assert np.dot(trainer.allocation.weights, trainer.held_out_losses()) < 0.7 * before


# -- divergence -------------------------------------------------------------------------------------------------------


def poison(trainer: Trainer, decoder: int) -> None:
    with torch.no_grad():
        trainer.denoiser.network.decoders[decoder].conv_out.weight[0, 0, 0, 0] = math.nan


@pytest.mark.parametrize("mode", ["mixed", "one-stage"])
def test_a_loss_that_is_not_finite_stops_before_the_step(new_trainer, tiny_data, mode):
    kept = {}

    def spoil(trainer: Trainer) -> None:
        if trainer.step == 3:
            for decoder in range(3) if mode == "one-stage" else (1,):
                poison(trainer, decoder)
            kept.update(
                parameters=parameters(trainer),
                adam=adam(trainer),
                average={n: p.clone() for n, p in trainer.ema.module.named_parameters()},
            )

    trainer = new_trainer(training__steps=9, training__checkpoint_every=2, training__update_mode=mode, stepped=spoil)
    name = "stage 2" if mode == "mixed" else "stage [123]"
    with pytest.raises(
        TrainingDiverged,
        match=rf"the loss of {name} is not finite at step 4; .* checkpoint of step 2 is intact; start a new run",
    ):
        trainer.fit()
    assert trainer.step == 3
    for n, p in parameters(trainer).items():
        assert torch.allclose(p, kept["parameters"][n], rtol=0, atol=0, equal_nan=True)
    assert equal(adam(trainer), kept["adam"])
    assert equal({n: p.clone() for n, p in trainer.ema.module.named_parameters()}, kept["average"])
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == [2]
    again = Trainer(trainer.run, tiny_data(), device="cpu")  # unlocked, and the checkpoint is good
    again.fit()
    assert again.step == 9
    assert all(bool(torch.isfinite(p).all()) for p in parameters(again).values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(new_trainer):
    trainer = new_trainer(training__steps=4, optimizer__clip=None)
    before = parameters(trainer)
    weight = trainer.denoiser.network.decoders[2].conv_out.weight
    weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(
        TrainingDiverged, match=r"the gradient of decoder\.3 is not finite at step 1; .* no checkpoint yet"
    ):
        trainer.fit()
    assert equal(parameters(trainer), before)
    assert adam(trainer) == {}


def test_callbacks_are_told_of_the_end_even_after_an_error(new_trainer):
    told = []

    class Listener(Callback):
        def started(self, trainer):
            told.append("started")

        def logged(self, trainer, record):
            told.append(record["step"])

        def finished(self, trainer):
            told.append("finished")

    def spoil(trainer):
        if trainer.step == 2:
            poison(trainer, 0)

    trainer = new_trainer(stepped=spoil)
    trainer.callbacks.append(Listener())
    with pytest.raises(TrainingDiverged):
        trainer.fit()
    assert told == ["started", 1, 2, "finished"]


def test_what_is_read_late_comes_to_the_same(new_trainer):
    found = []
    for late in (False, True):
        trainer = new_trainer(f"late {late}", training__steps=7, training__log_every=3, training__checkpoint_every=4)
        trainer.log.reporter.late = late
        trainer.fit()
        timed = ("images_per_s", "seconds")
        found.append([{k: v for k, v in r.items() if k not in timed} for r in trainer.run.records()])
        found.append(parameters(trainer))
        found.append(ckpt.load_tensors(trainer.run.checkpoint("4"), "model"))
        found.append(ckpt.read_state(trainer.run.checkpoint("4"))["sums"])
    records, weights, kept, sums = found[:4]
    assert (records, sums) == (found[4], found[7])
    assert equal(weights, found[5])
    assert equal(kept, found[6])


def test_a_gradient_read_late_spoils_no_weights(new_trainer):
    """A GPU goes on while the numbers of its last step are on their way."""
    trainer = new_trainer(training__steps=6, optimizer__clip=None, stepped=lambda t: weights.append(parameters(t)))
    trainer.log.reporter.late, weights = True, []
    weight = trainer.denoiser.network.decoders[2].conv_out.weight
    weight.register_hook(lambda g: g * math.inf if trainer.step == 2 else g)
    with pytest.raises(TrainingDiverged, match=r"the gradient of decoder\.3 is not finite at step 3"):
        trainer.fit()
    assert len(weights) == 3  # the fourth step, in which it was read, was the last
    assert not equal(weights[0], weights[1])
    assert equal(weights[1], weights[2])
    assert ckpt.list_checkpoints(trainer.run.checkpoints) == []


# -- how steps are computed -------------------------------------------------------------------------------------------


def test_the_way_of_computing_changes_no_run(new_trainer):
    runs = {}
    for name, changes in {
        "plain": {},
        "recompute": {"execution__recompute": True},
        "last": {"execution__channels_last": True},
    }.items():
        trainer = new_trainer(name, network__dropout=0.3, network__channel_mult=[1, 2], training__steps=3, **changes)
        trainer.fit()
        runs[name] = parameters(trainer)
    assert equal(runs["plain"], runs["recompute"])
    for name, value in runs["plain"].items():
        torch.testing.assert_close(runs["last"][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp64", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("mode", "accumulate", "threads", "branch_at", "last"),
    [("mixed", 1, 2, 0, True), ("mixed", 2, 3, 0, False), ("sequential", 1, 2, 0, False), ("mixed", 1, 2, 2, True)],
)
def test_threads_change_no_run_but_for_rounding(new_trainer, mode, accumulate, threads, branch_at, last, precision):
    runs = []
    for number in (1, threads):
        trainer = new_trainer(
            f"{number} threads",
            network__dropout=0.0,
            training__update_mode=mode,
            training__accumulate=accumulate,
            training__branch_at=branch_at,
            network__decoder_widths=[16, 16, 16],
            training__precision=precision,
            training__batch=13,  # stages with more rows than threads, and with fewer
            training__shares=[8.0, 4.0, 1.0],
            training__steps=3,
            training__log_every=3,
            execution__thread_parallel=number,
            execution__channels_last=last and number > 1,
        )
        trainer.fit()
        (record,) = [r for r in trainer.run.records() if r["kind"] == "train"]
        runs.append((parameters(trainer), record["loss"], record["grad_norm"]))
    (weights, losses, norms), (others, other_losses, other_norms) = runs
    rough = {"rtol": 0.05, "atol": 5e-3} if precision == "bf16" else {"rtol": 1e-6, "atol": 1e-8}
    assert other_losses == pytest.approx(losses, rel=rough["rtol"])
    assert other_norms == pytest.approx(norms, rel=2 * rough["rtol"])
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, **rough)


def test_every_thread_drops_units_of_its_own_and_the_same_again(new_trainer, monkeypatch):
    drawn: dict[str, list[torch.Tensor]] = {}

    def recorded(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
        drawn[run].append(dropped := dropout(torch.ones_like(x), probability, training).detach())
        return x * dropped

    monkeypatch.setattr(cpu, "dropout", recorded)
    weights = {}
    for run in ("one", "again"):
        drawn[run] = []
        trainer = new_trainer(
            run,
            network__dropout=0.5,
            execution__thread_parallel=2,
            training__batch=12,
            training__shares="uniform",
            training__steps=2,
        )
        trainer.fit()
        weights[run] = parameters(trainer)
    assert equal(weights["one"], weights["again"])
    masks = [[tuple(mask.flatten().tolist()) for mask in found] for found in drawn.values()]
    assert sorted(masks[0]) == sorted(masks[1])
    assert len(set(masks[0])) == len(masks[0])  # neither threads nor steps share any


@pytest.mark.slow
def test_autotuning_changes_no_run_and_runs_once(new_trainer, tiny_data, monkeypatch):
    one = {"network__dropout": 0.3, "execution__thread_parallel": 1}  # dropout is another draw in threads
    plain = new_trainer("plain", execution__channels_last=False, training__steps=6, **one)
    plain.fit()
    assert not plain.run.execution_file.exists()
    monkeypatch.setattr(autotune, "LEAST_STEPS", 1)
    monkeypatch.setattr(autotune, "GAIN", 0.0)  # whatever was faster
    tried = new_trainer("tried", **one, training__steps=6, stepped=lambda t: t.stop() if t.step == 3 else None)
    tried.fit()
    assert tried.autotuned.keys() == {"plain", "channels last"}
    resumed = Trainer(tried.run, tiny_data(), device="cpu")
    resumed.fit()
    assert (resumed.step, resumed.autotuned) == (6, {})
    assert equal(parameters(resumed), parameters(plain))


def test_graphs_are_refused_where_there_are_none(new_trainer):
    with pytest.raises(
        ValueError, match=r"execution\.cuda_graphs=True needs one process on a CUDA device, not 1 on cpu"
    ):
        new_trainer(execution__cuda_graphs=True)


@pytest.mark.slow
def test_autotuning_may_choose_threads(new_trainer, monkeypatch):
    monkeypatch.setattr(autotune, "LEAST_STEPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trainer = new_trainer(training__steps=2)
    trainer.fit()
    assert trainer.autotuned.keys() == {"plain", "channels last", "2 threads", "channels last, 2 threads"}
    assert trainer.step == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_trains_as_the_cpu_does(tmp_path, tiny_config, tiny_data, graphs):
    found = {}
    for device in ("cpu", "cuda"):
        changes = {"network__dropout": 0.0, "training__precision": "fp32", "training__steps": 5}
        config = tiny_config(**changes, execution__cuda_graphs=graphs and device == "cuda")
        trainer = Trainer(Run.create(tmp_path / device, config), tiny_data(), device=device)
        trainer.fit()
        assert trainer.log.reporter.late == (device == "cuda")
        found[device] = [r["loss"] for r in trainer.run.records()]
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("on_device", [False, True])
def test_nobody_waits_for_a_gpu_within_a_step(tmp_path, tiny_config, tiny_data, monkeypatch, on_device):
    monkeypatch.setattr(BatchSource, "device_budget", 1 << 30 if on_device else 0)
    run = Run.create(tmp_path / "run", tiny_config(training__steps=9, training__flip=True))
    trainer = Trainer(run, tiny_data(), device="cuda")
    for _ in range(3):
        trainer._iterate()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- precision and devices --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_near_full_precision(new_trainer, precision):
    losses = {}
    for kind in ("fp32", precision):
        trainer = new_trainer(kind, training__steps=3, training__precision=kind)
        trainer.fit()
        losses[kind] = np.array([r["loss"] for r in trainer.run.records()])
        assert all(p.dtype == torch.float32 for p in trainer.denoiser.parameters())
    assert losses[precision].tolist() != losses["fp32"].tolist()  # it was used
    np.testing.assert_allclose(losses[precision], losses["fp32"], rtol=0.03)


def test_an_fp16_step_that_overflows_is_skipped_and_the_scale_halved(new_trainer):
    trainer = new_trainer(training__steps=1, training__precision="fp16")
    trainer.optimization.scaler.load_state_dict({**trainer.optimization.scaler.state_dict(), "scale": 2.0**120})
    before = parameters(trainer)
    trainer.fit()
    assert equal(parameters(trainer), before)
    assert trainer.optimization.scaler.get_scale() == 2.0**119
    assert ckpt.read_state(trainer.run.checkpoint("latest"))["scaler"]["scale"] == 2.0**119
    assert "Infinity" not in trainer.run.metrics_file.read_text()
    assert "NaN" not in trainer.run.metrics_file.read_text()


def test_precision_of_a_device():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) == torch.bfloat16
    assert autocast_dtype("fp16", cpu) == torch.float16


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device is available; use --device cpu"):
        resolve_device("cuda:1")
    with pytest.raises(ValueError, match="device='gpu' is unknown"):
        resolve_device("gpu")


def test_data_of_another_kind_are_refused(new_trainer, tiny_data):
    with pytest.raises(ValueError, match=r"network\.channels=1 but the images have 3 channels"):
        new_trainer(data=tiny_data(shape=(3, 4, 4)))


def test_every_checkpoint_is_scored_though_held_out_losses_are_logged_elsewhere(new_trainer, tiny_data):
    trainer = new_trainer(
        held_out=tiny_data(),
        training__steps=3,
        training__held_out_every=2,
        training__checkpoint_every=1,
        training__keep_last=3,
    )
    trainer.fit()
    scores = [ckpt.read_state(p)["score"] for p in ckpt.list_checkpoints(trainer.run.checkpoints)]
    assert len(scores) == 3
    assert all(math.isfinite(s) for s in scores)
    assert [r["step"] for r in trainer.run.records() if r["kind"] == "held_out"] == [2, 3]


def test_a_stop_during_scoring_ends_after_the_next_step_with_a_checkpoint(new_trainer, tiny_data):
    class StopsAtScores(Callback):
        def logged(self, trainer, record):
            if record["kind"] == "held_out":
                trainer.stop()

    settings = {"training__steps": 9, "training__held_out_every": 4, "training__checkpoint_every": 6}
    trainer = new_trainer(held_out=tiny_data(), **settings)
    trainer.callbacks.append(StopsAtScores())
    trainer.fit()
    (only,) = ckpt.list_checkpoints(trainer.run.checkpoints)
    assert trainer.step == ckpt.checkpoint_step(only) == 4


def evaluated(trainer: Trainer, frechet: float | None, stop_reason: str = "") -> Evaluated:
    record = {"kind": "quality", "step": trainer.step, "frechet": frechet, "seconds": 5.0}
    return Evaluated(record=record, quality=frechet, stop_reason=stop_reason)


def test_an_evaluation_is_followed_by_a_checkpoint_that_holds_it(new_trainer):
    told = []

    class Evaluates(Callback):
        def stepped(self, trainer):
            return evaluated(trainer, 1.5 if trainer.step == 2 else None) if trainer.step in (2, 3) else None

        def logged(self, trainer, record):
            told.append((record["kind"], record["step"]))

    trainer = new_trainer(training__steps=5, training__log_every=5, training__keep_last=9)
    trainer.callbacks.append(Evaluates())
    start = time.perf_counter()
    trainer.fit()
    taken = time.perf_counter() - start
    found = {ckpt.checkpoint_step(p): ckpt.read_state(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)}
    assert {step: state["quality"] for step, state in found.items()} == {2: 1.5, 3: None, 5: None}
    assert told == [("quality", 2), ("quality", 3), ("train", 5)]
    assert [r["kind"] for r in trainer.run.records()] == ["quality", "quality", "train"]
    # ten seconds of evaluation, which took none, are taken off
    assert trainer.run.records()[-1]["seconds"] < taken - 9.9


def test_an_evaluation_may_end_training_early_which_is_no_interruption(new_trainer, tiny_data):
    def end(trainer: Trainer) -> Evaluated | None:
        return evaluated(trainer, 1.0, "enough") if trainer.step == 2 else None

    trainer = new_trainer(held_out=tiny_data(), training__steps=9, training__log_every=9, stepped=end)
    trainer.fit()
    assert (trainer.step, trainer.ended, trainer.stopping) == (2, "enough", False)
    assert ckpt.checkpoint_step(trainer.run.checkpoint("latest")) == 2
    assert [(r["kind"], r["step"]) for r in trainer.run.records()] == [("quality", 2), ("train", 2)]

    class Ends(Callback):
        def started(self, trainer):
            return "no more"

    again = Trainer(trainer.run, tiny_data(), device="cpu", callbacks=[Ends()])
    before = outcome(trainer.run)
    again.fit()
    assert again.step == 2
    assert outcome(again.run) == before


def test_every_so_many_steps_are_kept_whatever_the_rhythm_of_checkpoints(new_trainer):
    trainer = new_trainer(
        training__steps=8, training__checkpoint_every=4, training__keep_every=3, training__keep_last=1
    )
    trainer.fit()
    assert [ckpt.checkpoint_step(p) for p in ckpt.list_checkpoints(trainer.run.checkpoints)] == [3, 6, 8]


def test_a_trainer_left_behind_by_another_process_refuses_to_go_on(new_trainer, tiny_data):
    ahead = new_trainer(training__steps=2)
    behind = Trainer(ahead.run, tiny_data(), device="cpu")
    ahead.fit()
    with pytest.raises(ValueError, match="another process has trained it to step 2; resume again"):
        behind.fit()


@pytest.mark.slow
def test_the_rate_counts_from_the_resume(new_trainer, tiny_data):
    first = new_trainer(training__steps=20, training__log_every=10, stepped=lambda t: t.stop() if t.step == 9 else None)
    first.fit()
    again = Trainer(first.run, tiny_data(), device="cpu")
    again.fit()
    record = next(r for r in again.run.records() if r["step"] == 10)
    batch = again.config.training.batch
    assert record["images_per_s"] * record["seconds"] == pytest.approx(batch)  # one step, not ten


def test_held_out_losses_that_are_not_finite_are_null_in_the_log(new_trainer, tiny_data, monkeypatch):
    trainer = new_trainer(held_out=tiny_data(), training__steps=1, training__held_out_every=1)
    monkeypatch.setattr(trainer, "held_out_losses", lambda: [1.0, math.nan, math.inf])
    trainer.fit()
    assert trainer.run.records()[-1]["loss"] == [1.0, None, None]
    assert ckpt.read_state(ckpt.list_checkpoints(trainer.run.checkpoints)[-1])["score"] is None


@pytest.mark.parametrize(("device", "message"), [("meta", "not supported"), ("cuda:99", "CUDA"), ("gpu", "unknown")])
def test_devices_that_cannot_train_are_refused(device, message):
    with pytest.raises(ValueError, match=message):
        resolve_device(device)


def drawn_from_files(data: ImageData, read: list[int]) -> ImageData:
    """Return the same images, decoded from PNG files whenever they are drawn; the files read are noted."""
    files = []
    for image in data.array():
        buffer = io.BytesIO()
        Image.fromarray(image[0]).save(buffer, "png")
        files.append(buffer.getvalue())

    def one(number: int) -> bytes:
        read.append(number)
        return files[number]

    found = ImageFiles("set", [str(number) for number in range(len(files))], one)
    return ImageData(DecodedRows(found, np.arange(len(files)), data.shape, Options()), data.labels, data.name)


@pytest.mark.parametrize("mode", MODES)
def test_images_that_are_decoded_when_drawn_train_as_those_of_memory(new_trainer, tiny_data, mode):
    """Losses and weights are the same bits, with several micro-batches and after a stop and a resume."""
    changes = {"training__update_mode": mode, "training__steps": 6, "training__flip": True, "training__accumulate": 2}
    changes["training__held_out_every"] = 3
    expected = new_trainer("memory", data=tiny_data(), held_out=tiny_data(8, seed=1), **changes)
    expected.fit()
    read: list[int] = []
    data, others = drawn_from_files(tiny_data(), read), drawn_from_files(tiny_data(8, seed=1), [])

    def stop(trainer: Trainer) -> None:
        if trainer.step == 3:
            trainer.stop()

    first = new_trainer("files", data=data, held_out=others, stepped=stop, **changes)
    first.fit()
    assert first.step == 3
    again = Trainer(first.run, drawn_from_files(tiny_data(), read), others, device="cpu")
    again.fit()
    assert equal(parameters(again), parameters(expected))
    assert equal(adam(again), adam(expected))
    kept, found = (
        [
            (line["kind"], line["loss"])
            for line in map(json.loads, run.metrics_file.read_text().splitlines())
            if "loss" in line
        ]
        for run in (expected.run, first.run)
    )
    assert kept == found
    assert len(kept) == 8
    assert read


def test_held_out_losses_take_passes_of_the_training_s_size(new_trainer, tiny_data, monkeypatch):
    sizes = []

    def recorded(denoiser, batch):
        sizes.append(len(batch.y))
        return stage_losses(denoiser, batch)

    monkeypatch.setattr("multistage_diffusion.training.passes.stage_losses", recorded)
    settings = {"training__batch": 12, "training__held_out_rows": 10}
    whole = new_trainer("whole", held_out=tiny_data(6, seed=1), **settings)
    parts = new_trainer("parts", held_out=tiny_data(6, seed=1), training__accumulate=4, **settings)
    losses = whole.held_out_losses()
    assert sizes == [10] * 3
    sizes.clear()
    assert parts.held_out_losses() == pytest.approx(losses, rel=1e-5)
    assert sum(sizes) == 30
    assert max(sizes) <= 3


def test_a_stop_ends_a_held_out_loss_which_is_made_up_for(new_trainer, tiny_data, monkeypatch):
    settings = {"training__steps": 4, "training__held_out_every": 2, "training__checkpoint_every": 1}
    whole = new_trainer("whole", held_out=tiny_data(6, seed=1), **settings)
    whole.fit()
    trainer = new_trainer("run", held_out=tiny_data(6, seed=1), **settings)
    passes = []

    def stopped(denoiser, batch):
        passes.append(trainer.step)
        trainer.stop()
        return stage_losses(denoiser, batch)

    with monkeypatch.context() as patch:
        patch.setattr("multistage_diffusion.training.passes.stage_losses", stopped)
        trainer.fit()
    assert len(passes) == 1
    assert not [r for r in trainer.run.records() if r["kind"] == "held_out"]
    again = Trainer(trainer.run, tiny_data(), tiny_data(6, seed=1), device="cpu")
    again.fit()

    def scored(run):
        return [(r["step"], r["loss"]) for r in run.records() if r["kind"] == "held_out"]

    assert scored(again.run) == scored(whole.run)
