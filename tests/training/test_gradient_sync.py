"""What the processes of a trainer do together, each against what one that has everything does."""

from __future__ import annotations

import math
from pathlib import Path

import processes
import torch
from tiny import tiny_config, tiny_data

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.distributed import World
from multistage_diffusion.training.gradient_sync import GradientSync
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.strategies import make_layout
from multistage_diffusion.training.trainer import Trainer

SHAPE = (1, 4, 4)


def together(world: World) -> tuple[list[float], list[float], dict[str, float]]:
    """Return a gradient after one process's overflow, one after none, and one number of every tensor of the whole."""
    config = tiny_config()
    gradient_sync = GradientSync(world, make_layout("memory", config, SHAPE, world.size))
    spoiled = torch.full((2,), math.inf if world.rank == 1 else 1.0)
    fit = torch.ones(2)
    gradient_sync.sync_overflow([spoiled])
    gradient_sync.sync_overflow([fit])
    module = build_denoiser(config)
    gradient_sync.layout.drop(module.network, world.rank)
    for name, parameter in module.named_parameters():  # each process marks what it answers for
        parameter.data.fill_(100.0 if gradient_sync.layout.stage_of(name) is None else 1.0 + world.rank)
    whole = gradient_sync.gather_model(module, lambda: build_denoiser(config))
    return spoiled.tolist(), fit.tolist(), {n: float(p.double().mean()) for n, p in whole.named_parameters()}


def test_three_processes_agree_on_an_overflow_and_make_a_whole_of_their_parts():
    config = tiny_config()
    layout = make_layout("memory", config, SHAPE, 3)
    for spoiled, fit, whole in processes.run(3, together):
        assert not all(map(math.isfinite, spoiled))
        assert fit == [1.0, 1.0]
        assert len({layout.stage_of(name) for name in whole}) == 4  # all stages and what they share
        for name, value in whole.items():
            stage = layout.stage_of(name)
            assert value == (100.0 if stage is None else 1.0 + layout.owner(stage))


def dropout_keys(world: World, path: Path) -> tuple[list[object], list[object]]:
    """Return a process's keys of dropout, as computed by itself and as the generator's seed of a step."""
    with world.synchronize_errors():
        if world.is_main_process:
            Run.create(path, tiny_config())
    trainer = Trainer(Run(path), tiny_data(), None, config=tiny_config(), device="cpu", world=world)
    trainer.fit()
    return list(trainer._dropout_key()), [torch.initial_seed()]


def test_processes_drop_different_units(tmp_path):
    (one, first), (other, second) = processes.run(2, dropout_keys, tmp_path / "run")
    assert one != other
    assert first != second
