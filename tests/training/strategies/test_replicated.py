"""Parts held whole, each against a process that has everything."""

from __future__ import annotations

import math

import processes
import pytest
import torch
from tiny import tiny_config

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.distributed import World
from multistage_diffusion.training import branching
from multistage_diffusion.training.strategies import stage_of
from multistage_diffusion.training.strategies.memory import Memory
from multistage_diffusion.training.strategies.replicated import Absent
from multistage_diffusion.training.strategies.time import Time

SHAPE = (1, 4, 4)
CPU = torch.device("cpu")


@pytest.mark.parametrize("separate", [False, True])
def test_a_process_keeps_its_own_decoders_only(separate):
    config = tiny_config(network__separate=separate)
    found = [Memory(config, SHAPE, World(rank, 2)) for rank in range(2)]
    assert sorted(found[0].stages + found[1].stages) == [0, 1, 2]
    whole = build_denoiser(config)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in whole.network.parts().items()}
    for rank, strategy in enumerate(found):
        denoiser = build_denoiser(config)
        strategy.place(denoiser.network, CPU, torch.float64)
        assert {p.dtype for p in denoiser.parameters()} == {torch.float64}
        held = strategy.stages
        kept = {"encoder"} if not separate else {f"encoder.{k + 1}" for k in held}
        kept |= {f"decoder.{k + 1}" for k in held}
        assert sum(p.numel() for p in denoiser.parameters()) == sum(sizes[name] for name in kept)
        assert all(isinstance(denoiser.network.decoders[k], Absent) != (k in held) for k in range(3))
        names = set(denoiser.state_dict())
        assert names < set(whole.state_dict())
        owned = {n for n in whole.state_dict() if strategy.owner(stage_of(n, separate=separate)) == rank}
        assert owned <= names


def test_tensors_of_all_stages_are_rank_0s():
    strategy = Memory(tiny_config(), SHAPE, World(0, 3))
    assert (strategy.owner(None), strategy.owner(2)) == (0, 2)
    assert Time(tiny_config(), SHAPE, World(0, 3)).owner(2) == 0


def test_nothing_is_dropped_while_stages_share_one_decoder():
    config = tiny_config(network__decoder_widths=(8, 8, 8))
    denoiser, strategy = build_denoiser(config), Memory(config, SHAPE, World(1, 3))
    branching.tie(denoiser.network)
    strategy.place(denoiser.network, CPU, torch.float32)
    assert denoiser.network.tied
    apart = build_denoiser(config)
    strategy.place(apart.network, CPU, torch.float32)
    assert [isinstance(d, Absent) for d in apart.network.decoders] == [True, False, True]


def together(world: World) -> tuple[list[float], list[float], dict[str, float]]:
    """Return a gradient after one process's overflow, one after none, and one number of every tensor of the whole."""
    config = tiny_config()
    strategy = Memory(config, SHAPE, world)
    spoiled = torch.full((2,), math.inf if world.rank == 1 else 1.0)
    fit = torch.ones(2)
    strategy.sync_overflow([spoiled])
    strategy.sync_overflow([fit])
    module = build_denoiser(config)
    strategy.place(module.network, CPU, torch.float32)
    for name, parameter in module.named_parameters():  # each process marks what it is the owner of
        parameter.data.fill_(100.0 if stage_of(name, separate=False) is None else 1.0 + world.rank)
    whole = strategy.gather_model(module, lambda: build_denoiser(config))
    return spoiled.tolist(), fit.tolist(), {n: float(p.double().mean()) for n, p in whole.named_parameters()}


@pytest.mark.slow
def test_three_processes_agree_on_an_overflow_and_make_a_whole_of_their_parts():
    strategy = Memory(tiny_config(), SHAPE, World(0, 3))
    for spoiled, fit, whole in processes.run(3, together):
        assert not all(map(math.isfinite, spoiled))
        assert fit == [1.0, 1.0]
        assert len({stage_of(name, separate=False) for name in whole}) == 4  # all stages and what they share
        for name, value in whole.items():
            stage = stage_of(name, separate=False)
            assert value == (100.0 if stage is None else 1.0 + strategy.owner(stage))
