"""FSDP2 against a process that has everything; what a run trained with it comes to is in test_many_processes.py."""

from __future__ import annotations

import math

import processes
import pytest
import torch
from tiny import tiny_config

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.distributed import World
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.loss_weighting import LearnedWeighting
from multistage_diffusion.training.optimizer import Optimization, parameters_by_part, part_norms
from multistage_diffusion.training.strategies.fsdp import FullySharded

SHAPE = (1, 4, 4)
CPU = torch.device("cpu")
Found = dict[str, float]


def sharded(world: World) -> tuple[int, Found, Found, list[float], list[bool]]:
    """Return the numbers held, what is gathered of them, norms of parts, loss sums, and what other processes asked."""
    config = tiny_config(training__precision="fp64")
    strategy = FullySharded(config, SHAPE, world)
    torch.manual_seed(0)
    denoiser, whole = build_denoiser(config), build_denoiser(config)
    strategy.place(denoiser.network, CPU, torch.float64)
    own, full = denoiser.state_dict(), whole.double().state_dict()
    denoiser.load_state_dict({name: strategy.local(full[name], value) for name, value in own.items()})
    gathered = strategy.gather_state({f"{n}.step" if n.endswith("bias") else n: p for n, p in own.items()})
    gathered["count"] = torch.tensor(3.0)
    averaged = strategy.gather_model(denoiser, lambda: build_denoiser(config).double())
    for name, value in averaged.state_dict().items():
        assert torch.equal(value, full[name])
    for parameter in denoiser.parameters():
        parameter.grad = parameter.detach().clone()
    parts = parameters_by_part(denoiser.network)
    totals, norms = strategy.reduce_metrics(
        torch.full((3,), 1.0 + world.rank), parts, list(whole.network.parts()), stopping=world.rank == 1
    )
    held = sum(p.to_local().numel() for p in denoiser.parameters())
    sums = {name: float(value.double().sum()) for name, value in gathered.items()}
    return held, sums, {n: float(v) for n, v in norms.items()}, totals.tolist(), [strategy.stop_requested]


@pytest.mark.slow
def test_every_process_holds_a_slice_of_the_whole():
    found = processes.run(3, sharded)
    torch.manual_seed(0)
    build_denoiser(tiny_config())
    whole = build_denoiser(tiny_config()).double()
    assert sum(held for held, *_ in found) == sum(p.numel() for p in whole.parameters())
    for parameter in whole.parameters():
        parameter.grad = parameter.detach().clone()
    norms = part_norms(parameters_by_part(whole.network))
    for rank, (_, sums, own, totals, asked) in enumerate(found):
        assert own.keys() == norms.keys()
        assert all(math.isclose(own[name], float(norm), rel_tol=1e-12) for name, norm in norms.items())
        assert totals == [6.0] * 3
        assert asked == [True]
        if rank == 0:
            for name, parameter in whole.named_parameters():
                key = f"{name}.step" if name.endswith("bias") else name
                assert math.isclose(sums[key], float(parameter.detach().sum()), rel_tol=1e-12, abs_tol=1e-12)
        else:
            assert sums == {"count": 3.0}


def overflows(world: World, loss_weighting: str) -> list[tuple[float, bool]]:
    """Return (loss scale, whether weights have changed) after a step that overflows on one process, and one that does not."""
    config = tiny_config(training__precision="fp16", training__loss_weighting=loss_weighting)
    strategy, denoiser = FullySharded(config, SHAPE, world), build_denoiser(config)
    strategy.place(denoiser.network, CPU, torch.float32)
    weighting = LearnedWeighting(config, CPU) if loss_weighting == "learned" else None
    optimization = Optimization(config.optimizer, CPU, scaling=True, weighting=weighting)
    optimization.watch(denoiser.network)
    optimization.scaler.scale(torch.ones(()))  # makes the scale
    found = []
    for step, spoils in enumerate((True, False)):
        before = [p.to_local().clone() for p in denoiser.parameters()]
        for parameter in optimization.parameters:
            parameter.grad = torch.ones_like(parameter)
        if spoils and world.rank == 1:
            next(g for g in optimization.gradients if g.to_local().numel()).to_local().fill_(math.inf)
        strategy.sync_overflow(optimization.gradients)
        optimization.unscale()
        optimization.update(step)
        pairs = zip(before, denoiser.parameters(), strict=True)
        found.append((optimization.scaler.get_scale(), any(not torch.equal(a, p.to_local()) for a, p in pairs)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("loss_weighting", ["fixed", "learned"])
def test_an_overflow_on_one_process_skips_the_step_on_all(loss_weighting):
    assert processes.run(2, overflows, loss_weighting) == [[(2.0**15, False), (2.0**15, True)]] * 2


def test_what_was_not_run_with_it_is_refused():
    compiled = tiny_config(execution__compile=True)
    with pytest.raises(UserError, match=r"execution\.compile=True with strategy 'fsdp': .*; set it to False, or use"):
        FullySharded(compiled, SHAPE, World(0, 2))
    FullySharded(compiled, SHAPE, World())


def test_one_process_holds_the_network_as_it_is():
    config = tiny_config()
    strategy, denoiser = FullySharded(config, SHAPE, World()), build_denoiser(config)
    strategy.place(denoiser.network, CPU, torch.float64)
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float64 for p in denoiser.parameters())
    assert strategy.gather_model(denoiser, lambda: build_denoiser(config)) is denoiser
    weight = next(denoiser.parameters())
    assert strategy.local(weight, weight) is weight
    assert strategy.rows((3, 0, 2)) == (range(3), range(0), range(2))
    assert all(share.processes == 1 for share in strategy.part_shares(denoiser.network.parts()).values())
