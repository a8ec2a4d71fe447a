from __future__ import annotations

import itertools

import pytest

from multistage_diffusion.distributed import World
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.training.strategies.memory import Memory, assign_stages

SHAPE = (1, 4, 4)


def most(costs, holders, size):
    """Return what the busiest process has to do; a stage's holders share it evenly."""
    load = [0.0] * size
    for cost, ranks in zip(costs, holders, strict=True):
        for rank in ranks:
            load[rank] += cost / len(ranks)
    return max(load)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (6.0, 3.0, 1.0), (1.0, 8.0, 2.5, 2.0), (0.0, 4.0), (5.0,)])
def test_no_other_assignment_of_more_processes_is_faster(costs):
    for size in range(len(costs), len(costs) + 5):
        holders = assign_stages(costs, size)
        assert [r for ranks in holders for r in ranks] == list(range(size))
        numbers = itertools.product(range(1, size + 1), repeat=len(costs))
        best = min(max(c / n for c, n in zip(costs, ns, strict=True)) for ns in numbers if sum(ns) == size)
        assert most(costs, holders, size) == pytest.approx(best)


@pytest.mark.parametrize("costs", [(5.0, 1.0, 5.0), (3.0, 5.0, 3.0), (1.0, 1.0, 1.0, 1.0, 1.0), (7.0, 0.0, 0.0)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_processes_hold_several_stages_each(costs, size):
    if size >= len(costs):
        pytest.skip("as many processes as stages")
    holders = assign_stages(costs, size)
    assert all(len(ranks) == 1 for ranks in holders)
    best = min(
        most(costs, [(r,) for r in chosen], size) for chosen in itertools.product(range(size), repeat=len(costs))
    )
    assert most(costs, holders, size) <= 4 / 3 * best + 1e-9


def test_processes_follow_rows_times_cost(tiny_config):
    config = tiny_config(training__shares=(0.6, 0.3, 0.1), training__batch=30)
    flops = [stage.true_flops for stage in network_cost(config.network, 4, 4).stages]
    costs = [n * f for n, f in zip((18, 9, 3), flops, strict=True)]
    for size in range(1, 8):
        expected = assign_stages(costs, size) if size > 1 else [(0,)] * 3
        assert Memory(config, SHAPE, World(0, size)).holders == tuple(expected)
    one_stage = tiny_config(training__shares=(0.6, 0.3, 0.1), training__batch=30, training__update_mode="one-stage")
    assert Memory(one_stage, SHAPE, World(0, 4)).holders == Memory(config, SHAPE, World(0, 4)).holders


def test_what_cannot_be_shared_out_is_refused(tiny_config):
    config = tiny_config(
        training__shares=(0.05, 0.05, 0.9), network__encoder_width=16, network__decoder_widths=(128, 16, 16)
    )
    with pytest.raises(UserError, match=r"strategy='memory': 2 of 4 processes would share the 1 rows of stage"):
        Memory(config, SHAPE, World(0, 4))
    assert [len(ranks) for ranks in Memory(config, SHAPE, World(0, 3)).holders] == [1, 1, 1]
    fp16 = tiny_config(network__separate=True, training__precision="fp16")
    with pytest.raises(UserError, match=r"training\.precision='fp16' with network\.separate and strategy 'memory'"):
        Memory(fp16, SHAPE, World(1, 2))
    Memory(fp16, SHAPE, World(0, 1))
