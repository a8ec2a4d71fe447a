"""One trainer on many processes: the same run whatever the strategy and their number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_data

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import kept_indexes
from multistage_diffusion.data.index import make_index
from multistage_diffusion.distributed import ALONE, World
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.stage_finding import StageSettings
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.checkpoint import list_checkpoints, load_tensors, read_state
from multistage_diffusion.training.cost_model import step_costs
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.sample import sample
from multistage_diffusion.workflow.stages import find_stages
from multistage_diffusion.workflow.train import train

UNEVEN = (0.6, 0.3, 0.1)
LEARNED = {"training__loss_weighting": "learned", "training__reference_rows": 7}
TRANSFORMER = {"network__encoder_depth": 2, "network__decoder_depths": (2, 1, 3), "network__head_channels": 4}


def config(**changes: object) -> RunConfig:
    """Return a run in float64 without dropout: what differs between two ways of training it is rounding."""
    exact = {"network__dropout": 0.0, "training__precision": "fp64", "training__steps": 20, "training__shares": UNEVEN}
    exact |= {"training__ema_profiles": (0.05, 0.1), "training__ema_snapshot_every": 6}
    return tiny_config(**{**exact, "training__held_out_every": 20, "training__held_out_rows": 5, **changes})


def fit(world: World, path: Path, settings: RunConfig, strategy: str, *callbacks: Callback) -> Trainer:
    """Train a run that is there to its end, or begin it."""
    with world.synchronize_errors():
        if world.is_main_process and not (path / "config.json").exists():
            Run.create(path, settings)
    trainer = Trainer(
        Run(path),
        tiny_data(),
        tiny_data(10, seed=3),
        config=settings,
        device="cpu",
        callbacks=callbacks,
        world=world,
        strategy=strategy,
    )
    trainer.fit()
    return trainer


def trained(world: World, path: Path, settings: RunConfig, strategy: str) -> int:
    return fit(world, path, settings, strategy).step


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return weights, averages and moments of a run's last checkpoint, and the averages of its snapshots."""
    places = [list_checkpoints(path / "checkpoints")[-1], *list_checkpoints(path / "ema")]
    files = [file for place in places for file in place.glob("*.safetensors")]
    return {
        f"{file.parent.name}/{file.stem}/{name}": tensor
        for file in files
        for name, tensor in load_tensors(file.parent, file.stem).items()
    }


def require_same(a: Path, b: Path, tolerance: float = 1e-10) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        off = (x.double() - other[name].double()).abs().max()
        assert off <= tolerance * max(1.0, float(x.abs().max())), f"{name}: {float(off)}"
    scores = [read_state(list_checkpoints(p / "checkpoints")[-1])["score"] for p in (a, b)]
    assert scores[0] == (None if scores[1] is None else pytest.approx(scores[1], rel=1e-9))
    logs = [[r["loss"] for r in Run(p).records()] for p in (a, b)]
    np.testing.assert_allclose(*(np.array(log, dtype=float) for log in logs), rtol=1e-5)


# -- the same objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "strategy", "changes"),
    [
        (2, "time", {}),
        pytest.param(3, "memory", {}, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", {}, marks=pytest.mark.slow),
        pytest.param(
            *(3, "fsdp", {"training__accumulate": 3, "training__update_mode": "one-stage"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *(3, "fsdp", {"optimizer__clip_scope": "part", "training__update_mode": "sequential"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, "fsdp", {"network__decoder_widths": [8, 8, 8], "training__branch_at": 7, "network__separate": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(3, "fsdp", {"network__decoder_widths": [8, 8, 8], "training__branch_at": 7}), marks=pytest.mark.slow
        ),
        pytest.param(*(2, "fsdp", {"training__branch_at": 7, "optimizer__clip_scope": "part"}), marks=pytest.mark.slow),
        pytest.param(
            *(3, "memory", {"training__branch_at": 7, "training__update_mode": "one-stage"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *(2, "memory", {"training__branch_at": 7, "network__decoder_widths": [8, 12, 12]}), marks=pytest.mark.slow
        ),
        pytest.param(*(2, "time", {"training__branch_at": 7, "training__accumulate": 3}), marks=pytest.mark.slow),
        pytest.param(
            *(2, "fsdp", {"network__augment_dim": 9, "optimizer__kind": "adamw", "optimizer__weight_decay": 0.1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(2, "fsdp", {"execution__recompute": True}), marks=pytest.mark.slow),
        pytest.param(4, "memory", {}, marks=pytest.mark.slow),
        pytest.param(
            *(2, "memory", {"optimizer__clip_scope": "part", "training__update_mode": "sequential"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(3, "time", {"training__accumulate": 3, "training__update_mode": "one-stage"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(3, "memory", {"network__decoder_widths": [8, 8, 8], "training__branch_at": 7, "network__separate": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(3, "memory", {"training__update_mode": "one-stage", "network__separate": True}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(2, "memory", {"network__augment_dim": 9, "optimizer__kind": "adamw", "optimizer__weight_decay": 0.1}),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(3, "memory", TRANSFORMER | {"network__family": "dit"}), marks=pytest.mark.slow),
        pytest.param(*(2, "fsdp", TRANSFORMER | {"network__family": "uvit"}), marks=pytest.mark.slow),
        pytest.param(
            *(2, "fsdp", TRANSFORMER | {"network__family": "dit", "execution__recompute": True}), marks=pytest.mark.slow
        ),
        pytest.param(*(2, "time", LEARNED | {"training__accumulate": 3}), marks=pytest.mark.slow),
        pytest.param(*(3, "memory", LEARNED | {"training__update_mode": "one-stage"}), marks=pytest.mark.slow),
        pytest.param(*(3, "memory", LEARNED | {"network__separate": True}), marks=pytest.mark.slow),
        pytest.param(*(3, "fsdp", LEARNED | {"training__accumulate": 3}), marks=pytest.mark.slow),
        pytest.param(
            *(2, "time", {"network__decoder_widths": (8, 8, 8), "training__soft_sharing": 2}), marks=pytest.mark.slow
        ),
    ],
    ids=[
        *("2 time", "3 memory", "2 fsdp", "fsdp one-stage", "fsdp sequential", "fsdp separate branch", "fsdp branch"),
        *("fsdp slices", "memory one-stage slices", "memory slices", "time slices"),
        *("fsdp weight decay", "fsdp recompute"),
        *(
            "4 memory",
            "sequential",
            "one-stage",
            "branch",
            "no rows",
            "weight decay",
            "dit memory",
            "uvit fsdp",
            "dit fsdp",
            "learned weights time",
            "learned weights memory",
            "learned weights separate",
            "learned weights fsdp",
            "soft sharing",
        ),
    ],
)
def test_twenty_steps_are_the_same_on_any_number_of_processes(tmp_path, size, strategy, changes):
    settings = config(optimizer__clip=0.05, **changes)  # so low that every step is clipped
    trained(ALONE, tmp_path / "one", settings, "time")
    assert processes.run(size, trained, tmp_path / "many", settings, strategy) == [20] * size
    require_same(tmp_path / "one", tmp_path / "many", tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "strategy"), [(2, "time"), (3, "memory"), (2, "fsdp")])
def test_a_frozen_encoder_is_left_alone_on_any_number_of_processes(tmp_path, size, strategy):
    trained(ALONE, tmp_path / "start", config(training__steps=2, training__precision="fp32"), "time")
    settings = config(training__init_from=str(tmp_path / "start"), training__freeze="encoder")
    trained(ALONE, tmp_path / "one", settings, "time")
    assert processes.run(size, trained, tmp_path / "many", settings, strategy) == [20] * size
    require_same(tmp_path / "one", tmp_path / "many", tolerance=1e-12)
    start, end = tensors(tmp_path / "start"), tensors(tmp_path / "many")
    assert all(torch.equal(end[f"model.{n}"], start[f"ema.{n}"].double()) for n in encoder_names(end))
    assert not any(name.startswith("optimizer.") and ".encoders." in name for name in end)


def encoder_names(found: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix("model.") for name in found if name.startswith("model.") and ".encoders." in name]


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes_under_another_strategy(tmp_path):
    def until(steps: int) -> RunConfig:
        return config(training__steps=steps, training__held_out_every=0)

    trained(ALONE, tmp_path / "one", until(15), "time")
    path = tmp_path / "many"
    trained(ALONE, path, until(5), "time")
    processes.run(3, trained, path, until(10), "memory")
    processes.run(2, trained, path, until(12), "fsdp")
    processes.run(2, trained, path, until(15), "time")
    require_same(tmp_path / "one", path)


# -- memory -----------------------------------------------------------------------------------------------------------


def held(world: World, path: Path, settings: RunConfig, strategy: str) -> dict[str, int]:
    """Return the bytes that a process holds after training, and those of gradients sent in the last step."""
    trainer = fit(world, path, settings, strategy)
    moments = (t for state in trainer.optimization.optimizer.state.values() for k, t in state.items() if k != "step")
    return {
        "weights": sum(p.nbytes for p in trainer.denoiser.parameters()),
        "gradients": sum(p.grad.nbytes for p in trainer.denoiser.parameters()),
        "average": sum(p.nbytes for p in trainer.ema.module.parameters()),
        "moments": sum(t.nbytes for t in moments),
        "sent": trainer.strategy.reducer.bytes,
    }


def held_slices(world: World, path: Path, settings: RunConfig) -> list[int]:
    """Return the bytes of weights, gradients, averages and moments that a process holds after training."""
    trainer = fit(world, path, settings, "fsdp")
    weights = list(trainer.denoiser.parameters())
    moments = [t for state in trainer.optimization.optimizer.state.values() for k, t in state.items() if k != "step"]
    kinds = (weights, [p.grad for p in weights], list(trainer.ema.module.parameters()), moments)
    return [sum(t.to_local().nbytes for t in tensors) for tensors in kinds]


@pytest.mark.slow
def test_fsdp_holds_everything_once(tmp_path):
    settings = tiny_config(training__steps=2)
    cost = network_cost(settings.network, 4, 4)
    parameters = cost.shared_parameters + sum(stage.parameters - cost.shared_parameters for stage in cost.stages)
    found = processes.run(2, held_slices, tmp_path / "run", settings)
    assert [sum(sizes) for sizes in zip(*found, strict=True)] == [4 * parameters] * 3 + [8 * parameters]
    formula = step_costs(settings, (1, 4, 4), "fsdp", 2)[0].held
    assert all(sum(sizes) == pytest.approx(formula, rel=0.1) for sizes in found)  # first dimensions may be odd


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["time", "memory"])
def test_a_process_holds_the_shared_encoder_and_its_own_decoder(tmp_path, strategy):
    settings = tiny_config(training__steps=3)
    cost = network_cost(settings.network, 4, 4)
    decoders = [stage.parameters - cost.shared_parameters for stage in cost.stages]
    formula = step_costs(settings, (1, 4, 4), strategy, 3)
    found = processes.run(3, held, tmp_path / "run", settings, strategy)
    for rank, sizes in enumerate(found):
        own = decoders[rank] if strategy == "memory" else sum(decoders)
        parameters = 4 * (cost.shared_parameters + own)
        assert (sizes["weights"], sizes["gradients"], sizes["average"]) == (parameters,) * 3
        assert sizes["moments"] == 2 * parameters
        # nobody else holds a decoder: only the encoder's gradients travel
        sent = 4 * cost.shared_parameters if strategy == "memory" else parameters
        assert sizes["sent"] == 3 * sent
        assert (5 * parameters, sent) == (formula[rank].held, formula[rank].reduced)


# -- what goes wrong --------------------------------------------------------------------------------------------------


class Diverges(Callback):
    everywhere = True

    def stepped(self, trainer: Trainer) -> None:
        if trainer.world.rank == 1:
            next(iter(trainer.denoiser.network.decoders[1].parameters())).data.fill_(torch.nan)


def diverged(world: World, path: Path, strategy: str) -> str:
    try:
        fit(world, path, tiny_config(), strategy, Diverges())
    except FloatingPointError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memory", "fsdp"])
def test_what_is_not_finite_on_one_process_stops_all_of_them(tmp_path, strategy):
    for told in processes.run(3, diverged, tmp_path / "run", strategy):
        assert "the loss of stage 2 is not finite at step 2" in told


class Stops(Callback):
    everywhere = True

    def stepped(self, trainer: Trainer) -> None:
        if trainer.world.rank == 1 and trainer.step == 2:
            trainer.stop()


def stopped(world: World, path: Path, strategy: str) -> tuple[int, bool]:
    trainer = fit(world, path, tiny_config(training__steps=9), strategy, Stops())
    return trainer.step, trainer.stopped


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["time", "fsdp"])
def test_one_process_that_is_asked_to_stop_stops_all_with_a_checkpoint(tmp_path, strategy):
    assert processes.run(2, stopped, tmp_path / "run", strategy) == [(3, True), (3, True)]
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000003"]


class Dies(Callback):
    """Kills its process while the backward pass of a step is under way."""

    everywhere = True

    def started(self, trainer: Trainer) -> None:
        if trainer.world.rank == 1:
            first = next(iter(trainer.denoiser.network.encoders[0].parameters()))
            first.register_post_accumulate_grad_hook(
                lambda _: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 7 else None
            )


def dying(world: World, path: Path, strategy: str) -> int:
    return fit(world, path, exactly(), strategy, Dies()).step


def exactly() -> RunConfig:
    return config(training__steps=12, training__checkpoint_every=2, training__held_out_every=0)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["memory", "fsdp"])
def test_a_process_killed_in_mid_step_costs_no_more_than_the_steps_since_the_checkpoint(tmp_path, strategy):
    processes.run(3, trained, tmp_path / "whole", exactly(), strategy)
    path = tmp_path / "killed"
    world = processes.Processes(3, dying, path, strategy, patience=3.0)
    start = time.monotonic()
    first, second, third = world.results(60.0)
    assert time.monotonic() - start < 60.0
    assert second is None
    told = [str(error) for error in (first, third) if error is not None] + world.errors()
    assert sum(f"rank 1 (process {world.processes[1].pid}" in line for line in told) == 2
    assert list_checkpoints(path / "checkpoints")[-1].name == "step_00000006"
    processes.run(3, trained, path, exactly(), strategy)
    require_same(tmp_path / "whole", path, tolerance=0.0)


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, TESTS)
from tiny import tiny_config
from multistage_diffusion.distributed import is_main_process
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.workflow.train import train

torch.set_num_threads(1)

class Dies(Callback):
    everywhere = True

    def stepped(self, trainer):
        if trainer.world.rank == 1 and trainer.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

config = tiny_config(data__source=DATA, data__shape=(), training__steps=8, training__checkpoint_every=2)
run = train(config, OUT, device="cpu", strategy="memory", callbacks=[Dies()] if DIES else [])
"""


@pytest.mark.slow
def test_torchrun_starts_again_what_has_died(tmp_path):
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    for dies in (False, True):
        names = {"TESTS": Path(__file__).parents[1], "DATA": tmp_path / "data.npy", "OUT": tmp_path / f"dies-{dies}"}
        given = "".join(f"{name} = {str(value)!r}\n" for name, value in names.items()) + f"DIES = {dies}\n"
        (tmp_path / "work.py").write_text(given + DIES_ONCE)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launch, "--max-restarts", "1", str(tmp_path / "work.py")], check=True, timeout=200)
    require_same(tmp_path / "dies-False", tmp_path / "dies-True", tolerance=0.0)
    assert len((tmp_path / "dies-True" / "launches.jsonl").read_text().splitlines()) == 2


# -- sampling and evaluation ------------------------------------------------------------------------------------------


def judged(world: World, out: Path, data: Path) -> tuple[list[float], list[list[int]]]:
    settings = tiny_config(
        data__source=str(data),
        data__shape=(),
        training__steps=2,
        training__sample_every=2,
        training__sample_count=5,
        evaluation__every=1,
        evaluation__count=7,
    )
    run = train(settings, out, device="cpu", strategy="memory")
    drawn = sample(run, 5, seed=3, device="cpu", checkpoint="latest")
    return [r["frechet"] for r in run.records() if r["kind"] == "quality"], drawn.flatten(1).tolist()


@pytest.mark.slow
def test_samples_and_evaluations_are_shared_out_and_the_same(tmp_path):
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    one = judged(ALONE, tmp_path / "one", tmp_path / "data.npy")
    many = processes.run(2, judged, tmp_path / "many", tmp_path / "data.npy")
    assert many[0] == many[1]
    assert many[0][0] == pytest.approx(one[0], rel=0.02)
    assert np.abs(np.array(many[0][1]) - np.array(one[1])).max() <= 1  # of 255: what rounding may do
    assert (tmp_path / "many" / "samples" / "step_00000002.png").exists()
    assert not (tmp_path / "many" / "samples" / "step_00000001.png").exists()


# -- starting ---------------------------------------------------------------------------------------------------------


def took_turns(world: World, folder: Path) -> bool:
    """Return whether rank 0's preparation was over when this process's began."""

    def prepare() -> bool:
        done = (folder / "cache").exists()
        if world.is_main_process:
            time.sleep(0.5)
            (folder / "cache").touch()
        return done

    return world.main_first(prepare)


def test_one_process_prepares_before_the_others(tmp_path):
    assert processes.run(2, took_turns, tmp_path) == [False, True]


def indexes_made(world: World, folder: Path) -> list[int]:
    """Find stages and train on a folder of images; return how many indexes this process had made after each."""
    made = []

    def counted(*arguments):
        made.append(arguments)
        return make_index(*arguments)

    kept_indexes.WORTH, kept_indexes.SETTLED, kept_indexes.make_index = 0.0, 0, counted
    os.environ["MSDIFF_CACHE"] = str(folder / "cache")
    config = tiny_config(data__source=str(folder / "images"), training__steps=1)
    find_stages(config.data, StageSettings(samples=100, times=8, grid=1000))
    after_stages = len(made)
    train(config, folder / "run", device="cpu")
    return [after_stages, len(made)]


@pytest.mark.slow
def test_one_process_reads_the_images_of_a_folder_for_all(tmp_path):
    (tmp_path / "images").mkdir()
    for number, image in enumerate(tiny_data(24).array()):
        Image.fromarray(image[0]).save(tmp_path / "images" / f"{number}.png")
    assert processes.run(2, indexes_made, tmp_path) == [[1, 1], [0, 0]]


def test_a_single_process_that_torchrun_starts_again_goes_on(tmp_path, monkeypatch):
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    settings = tiny_config(data__source=str(tmp_path / "data.npy"), data__shape=(), training__steps=2)
    train(settings, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="exists; resume it"):
        train(settings, tmp_path / "run", device="cpu")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(settings, tmp_path / "run", device="cpu", replace=True).path == tmp_path / "run"
    assert not list(tmp_path.glob("run.replaced*"))
    other = tiny_config(data__source=settings.data.source, data__shape=(), training__steps=2, optimizer__lr=0.5)
    with pytest.raises(ValueError, match="exists; resume it"):
        train(other, tmp_path / "run", device="cpu")


def begun(world: World, out: Path, data: Path, changes: dict[str, object]) -> str:
    """Train; rank 1 with changes. Return the error."""
    given = {"data__source": str(data), "data__shape": (), "training__steps": 2}
    try:
        train(tiny_config(**{**given, **(changes if world.rank == 1 else {})}), out, device="cpu")
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_processes_that_do_not_agree_are_refused_on_all(tmp_path):
    np.save(tmp_path / "data.npy", tiny_data(40).array())
    np.save(tmp_path / "other.npy", tiny_data(40, seed=1).array())
    out, data = tmp_path / "run", tmp_path / "data.npy"
    for told in processes.run(2, begun, out, data, {"optimizer__lr": 0.5}):
        assert "rank 1 has optimizer.lr 0.5, rank 0 0.001" in told
    for told in processes.run(2, begun, out, data, {"data__source": str(tmp_path / "other.npy")}):
        assert "rank 1 has data.fingerprint" in told
    one, other = processes.run(2, begun, out, data, {"data__source": str(tmp_path / "absent.npy")})
    assert one.startswith("rank 1: ")
    assert "absent.npy" in one
    assert "absent.npy" in other
    assert not out.exists()
    assert processes.run(2, begun, out, data, {}) == ["", ""]
    before = (out / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
    assert processes.run(2, begun, out, data, {}) == ["", ""]  # the same command again: nothing is left to do
    assert (out / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes() == before
    assert len((out / "launches.jsonl").read_text().splitlines()) == 2
