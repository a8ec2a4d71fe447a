from __future__ import annotations

import pytest

from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.training.cost_model import Machine, step_costs

SHAPE = (1, 4, 4)
MACHINE = Machine(flops=1e6, bandwidth=1e5, latency=1e-3)


def parameters(config):
    cost = network_cost(config.network, 4, 4)
    return cost.shared_parameters, [stage.parameters - cost.shared_parameters for stage in cost.stages]


def test_one_process_holds_everything_and_sends_nothing(tiny_config):
    config = tiny_config()
    shared, own = parameters(config)
    flops = 3 * sum(4 * stage.true_flops for stage in network_cost(config.network, 4, 4).stages)
    for strategy in ("time", "memory"):
        (cost,) = step_costs(config, SHAPE, strategy, 1, MACHINE)
        assert (cost.held, cost.reduced, cost.sent) == (20 * (shared + sum(own)), 0, 0.0)
        assert (cost.flops, cost.seconds) == (flops, flops / 1e6)


def test_time_sends_the_whole_network_in_a_ring(tiny_config):
    shared, own = parameters(tiny_config())
    for cost in step_costs(tiny_config(), SHAPE, "time", 4):
        whole = shared + sum(own)
        assert (cost.held, cost.reduced) == (20 * whole, 4 * whole)
        assert cost.sent == pytest.approx(2 * 3 / 4 * 4 * whole)
        assert cost.seconds is None


def test_memory_sends_the_encoder_to_all_and_a_decoder_to_its_holders(tiny_config):
    config = tiny_config(training__shares=(0.6, 0.3, 0.1))  # so that two of four hold the first decoder
    shared, own = parameters(config)
    costs = step_costs(config, SHAPE, "memory", 4)
    stages, holders = (0, 0, 1, 2), (2, 2, 1, 1)
    for cost, stage, n in zip(costs, stages, holders, strict=True):
        assert cost.held == 20 * (shared + own[stage])
        assert cost.reduced == 4 * (shared + (own[stage] if n > 1 else 0))
        assert cost.sent == pytest.approx(4 * (2 * 3 / 4 * shared + 2 * (n - 1) / n * own[stage]))
    assert sum(c.flops for c in costs) == pytest.approx(step_costs(config, SHAPE, "time", 1)[0].flops)


def test_an_exchange_costs_what_the_backward_pass_does_not_hide(tiny_config):
    config = tiny_config()
    slow = Machine(flops=1e6, bandwidth=1e3, latency=1e-3)
    fast = Machine(flops=1e6, bandwidth=1e12, latency=0.0)
    (hidden, *_), (open_, *_) = (step_costs(config, SHAPE, "time", 2, machine) for machine in (fast, slow))
    assert hidden.seconds == pytest.approx(hidden.flops / 1e6)
    exchange = open_.sent / 1e3 + 2 * 1e-3 + 3 * 2 * 1e-3  # the encoder's and three decoders' rings of two
    assert open_.seconds == pytest.approx(open_.flops / 1e6 / 3 + exchange)


def test_separate_networks_share_nothing(tiny_config):
    config = tiny_config(network__separate=True)
    cost = network_cost(config.network, 4, 4)
    for rank, found in enumerate(step_costs(config, SHAPE, "memory", 3)):
        assert (found.held, found.reduced) == (20 * cost.stages[rank].parameters, 0)


@pytest.mark.parametrize("strategy", ["time", "memory", "fsdp"])
def test_a_frozen_encoder_takes_weights_and_averages_and_is_not_sent(tiny_config, strategy) -> None:
    learning = tiny_config(training__init_from="runs/one")
    frozen = tiny_config(training__init_from="runs/one", training__freeze="encoder")
    shared = network_cost(frozen.network, 4, 4)
    for one, other in zip(*(step_costs(c, (1, 4, 4), strategy, 3) for c in (learning, frozen)), strict=True):
        share = 1 / 3 if strategy == "fsdp" else 1
        assert one.held - other.held == pytest.approx((4 + 8) * share * shared.shared_parameters)
        assert one.reduced - other.reduced == 4 * shared.shared_parameters
        assert other.flops < one.flops


@pytest.mark.parametrize("strategy", ["time", "memory", "fsdp"])
def test_every_further_average_takes_four_bytes(tiny_config, strategy) -> None:
    configs = tiny_config(), tiny_config(training__ema_profiles=[0.05, 0.1])
    for one, other in zip(*(step_costs(config, SHAPE, strategy, 3) for config in configs), strict=True):
        assert other.held == pytest.approx(one.held * 28 / 20)
