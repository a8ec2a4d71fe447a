from __future__ import annotations

import itertools

import pytest
import torch

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.training import branching
from multistage_diffusion.training.strategies import Absent, deal, make_layout, stage_of_part

SHAPE = (1, 4, 4)


def layout(config, size, strategy="memory"):
    return make_layout(strategy, config, SHAPE, size)


# -- dealing ----------------------------------------------------------------------------------------------------------


def most(costs, holders, size):
    """Return what the busiest process has to do; a stage's holders share it evenly."""
    load = [0.0] * size
    for cost, ranks in zip(costs, holders, strict=True):
        for rank in ranks:
            load[rank] += cost / len(ranks)
    return max(load)


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (6.0, 3.0, 1.0), (1.0, 8.0, 2.5, 2.0), (0.0, 4.0), (5.0,)])
def test_no_other_dealing_of_more_processes_is_faster(costs):
    for size in range(len(costs), len(costs) + 5):
        holders = deal(costs, size)
        assert [r for ranks in holders for r in ranks] == list(range(size))
        numbers = itertools.product(range(1, size + 1), repeat=len(costs))
        best = min(max(c / n for c, n in zip(costs, ns, strict=True)) for ns in numbers if sum(ns) == size)
        assert most(costs, holders, size) == pytest.approx(best)


@pytest.mark.parametrize("costs", [(5.0, 1.0, 5.0), (3.0, 5.0, 3.0), (1.0, 1.0, 1.0, 1.0, 1.0), (7.0, 0.0, 0.0)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_processes_hold_several_stages_each(costs, size):
    if size >= len(costs):
        pytest.skip("as many processes as stages")
    holders = deal(costs, size)
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
        expected = deal(costs, size) if size > 1 else [(0,)] * 3
        assert layout(config, size).holders == tuple(expected)
    one_stage = tiny_config(training__shares=(0.6, 0.3, 0.1), training__batch=30, training__update_mode="one-stage")
    assert layout(one_stage, 4).holders == layout(config, 4).holders


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["time", "memory"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("counts", [(5, 4, 3), (12, 0, 0), (1, 1, 10), (4, 4, 4)])
def test_every_row_is_trained_once_by_a_holder(tiny_config, strategy, size, counts):
    found = layout(tiny_config(training__shares=(0.4, 0.3, 0.3)), size, strategy)
    for stage, count in enumerate(counts):
        shares = [found.rows(rank, counts)[stage] for rank in range(size)]
        assert sorted(r for share in shares for r in share) == list(range(count))
        assert all(not share or rank in found.holders[stage] for rank, share in enumerate(shares))
        held = [len(shares[rank]) for rank in found.holders[stage]]
        assert max(held) - min(held) <= 1


def test_what_does_not_divide_evenly_is_spread(tiny_config):
    found = layout(tiny_config(), 3, "time")
    assert [sum(map(len, found.rows(rank, (1, 1, 1)))) for rank in range(3)] == [1, 1, 1]


# -- holding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
def test_a_process_keeps_its_own_decoders_only(tiny_config, separate):
    config = tiny_config(network__separate=separate)
    found = layout(config, 2)
    held = [found.held(rank) for rank in range(2)]
    assert sorted(held[0] + held[1]) == [0, 1, 2]
    whole = build_denoiser(config)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in whole.network.parts().items()}
    for rank in range(2):
        denoiser = build_denoiser(config)
        found.drop(denoiser.network, rank)
        kept = {"encoder"} if not separate else {f"encoder.{k + 1}" for k in held[rank]}
        kept |= {f"decoder.{k + 1}" for k in held[rank]}
        assert sum(p.numel() for p in denoiser.parameters()) == sum(sizes[name] for name in kept)
        assert all(isinstance(denoiser.network.decoders[k], Absent) != (k in held[rank]) for k in range(3))
        names = set(denoiser.state_dict())
        assert names < set(whole.state_dict())
        assert {name for name in whole.state_dict() if found.owner(found.stage_of(name)) == rank} <= names


def test_tensors_of_all_stages_are_rank_0s(tiny_config):
    found = layout(tiny_config(), 3)
    assert found.stage_of("network.encoders.0.conv_in.weight") is None
    assert found.stage_of("network.decoders.2.conv_out.weight.exp_avg") == 2
    assert (found.owner(None), found.owner(2)) == (0, 2)
    separate = layout(tiny_config(network__separate=True), 3)
    assert separate.stage_of("network.encoders.1.conv_in.weight") == 1
    assert (stage_of_part("encoder"), stage_of_part("encoder.2"), stage_of_part("decoder.1")) == (None, 1, 0)


def test_nothing_is_dropped_while_stages_share_one_decoder(tiny_config):
    config = tiny_config(network__decoder_widths=(8, 8, 8))
    denoiser = build_denoiser(config)
    branching.tie(denoiser.network)
    layout(config, 3).drop(denoiser.network, 1)
    assert branching.tied(denoiser.network)
    branching.untie(denoiser.network)
    layout(config, 3).drop(denoiser.network, 1)
    assert [isinstance(d, Absent) for d in denoiser.network.decoders] == [True, False, True]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_out_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"strategy='fast' must be one of time, memory"):
        layout(tiny_config(), 2, "fast")
    with pytest.raises(ValueError, match=r"training\.batch=12 has fewer rows than there are processes, 13"):
        layout(tiny_config(), 13, "time")
    config = tiny_config(
        training__shares=(0.05, 0.05, 0.9), network__encoder_width=16, network__decoder_widths=(128, 16, 16)
    )
    with pytest.raises(ValueError, match=r"strategy='memory': 2 of 4 processes would share the 1 rows of stage"):
        layout(config, 4)
    assert torch.tensor([len(h) for h in layout(config, 3).holders]).tolist() == [1, 1, 1]
