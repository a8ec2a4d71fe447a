from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multistage_diffusion.config import OptimizerConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.training import branching
from multistage_diffusion.training.loss_weighting import LearnedWeighting
from multistage_diffusion.training.optimizer import (
    Optimization,
    clip,
    learning_rate,
    parameters_by_part,
    part_norms,
)
from multistage_diffusion.training.optimizer_state import make_optimizer


def test_the_learning_rate_rises_stays_and_falls():
    settings = OptimizerConfig(lr=0.1, warmup_steps=2, decay_after=4)
    found = [learning_rate(settings, step) for step in (0, 1, 3, 4, 15, 399)]
    assert found == pytest.approx([0.05, 0.1, 0.1, 0.1 * math.sqrt(4 / 5), 0.05, 0.01])
    assert learning_rate(OptimizerConfig(lr=0.1, warmup_steps=0), 10**9) == 0.1


@pytest.mark.parametrize(("kind", "made"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_takes_every_parameter_and_every_number(kind, made):
    module = torch.nn.Linear(2, 3)
    settings = OptimizerConfig(kind=kind, lr=0.3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)
    optimizer = make_optimizer(settings, module)
    assert type(optimizer) is made
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.6), 1e-3, 0.2)


@pytest.fixture
def parts():
    """Two parts with gradients of norm 3 and 4, and one without."""
    made = {name: [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))] for name in ("a", "b", "c")}
    for name, norm in (("a", 3.0), ("b", 4.0)):
        made[name][0].grad = torch.tensor([norm, 0.0])
    return made


def norms_of(parts):
    return {name: float(norm) for name, norm in part_norms(parts).items()}


def test_norms_are_of_the_parts_that_have_gradients(parts):
    assert norms_of(parts) == {"a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    ("scope", "limit", "after"),
    [
        ("model", 1.0, {"a": 0.6, "b": 0.8}),
        ("part", 3.5, {"a": 3.0, "b": 3.5}),
        ("model", 6.0, {"a": 3.0, "b": 4.0}),
        ("model", None, {"a": 3.0, "b": 4.0}),
    ],
)
def test_gradients_are_clipped_by_the_norm_of_the_model_or_of_the_part(parts, scope, limit, after):
    clip(OptimizerConfig(clip=limit, clip_scope=scope), parts, part_norms(parts))
    assert norms_of(parts) == pytest.approx(after, rel=1e-5)


def test_norms_of_parts_that_live_elsewhere_count(parts):
    norms = {**part_norms(parts), "elsewhere": torch.tensor(12.0)}
    clip(OptimizerConfig(clip=1.0), parts, norms)
    assert norms_of(parts) == pytest.approx({"a": 3 / 13, "b": 4 / 13}, rel=1e-5)
    assert math.sqrt(3**2 + 4**2 + 12**2) == 13


def test_a_parameter_that_stages_share_is_in_one_part_only(tiny_config):
    network = build_network(tiny_config(network__decoder_widths=(8, 8, 8)).network)
    apart = parameters_by_part(network)
    assert list(apart) == ["encoder", "decoder.1", "decoder.2", "decoder.3"]
    branching.tie(network)
    shared = parameters_by_part(network)
    assert list(shared) == ["encoder", "decoder.1"]
    for found in (apart, shared):
        ids = [id(p) for part in found.values() for p in part]
        assert len(ids) == len(set(ids))
    assert {id(p) for part in shared.values() for p in part} == {id(p) for p in network.parameters()}


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_learned_weights_are_updated_with_the_network_or_skipped_with_it(tiny_config, skip):
    config = tiny_config(training__loss_weighting="learned", optimizer__warmup_steps=10)
    weighting = LearnedWeighting(config, torch.device("cpu"))
    optimization = Optimization(config.optimizer, torch.device("cpu"), scaling=False, weighting=weighting)
    optimization.watch(build_network(config.network))
    assert optimization.parameters[-1] is weighting.weight
    assert not any(parameter is weighting.weight for part in optimization.parts.values() for parameter in part)
    before = [parameter.detach().clone() for parameter in optimization.parameters]
    for parameter in optimization.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimization.update(0, None if skip is None else torch.tensor(skip))
    moved = [not torch.equal(*pair) for pair in zip(before, optimization.parameters, strict=True)]
    assert moved == [skip != 1.0] * len(moved)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimization.optimizers] == [1e-4, 1e-4]
    optimization.zero_grad()
    assert all(parameter.grad is None for parameter in optimization.parameters)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_an_update_is_the_same_whatever_the_layout_of_a_gradient(tiny_config, kind):
    """Fused Adam reads a gradient in the order of memory: one in channels-last layout would update other weights."""
    updated = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = build_network(tiny_config().network)
        optimization = Optimization(OptimizerConfig(kind=kind, lr=0.1), torch.device("cpu"), scaling=False)
        optimization.watch(network)
        for step in range(2):
            for parameter in network.parameters():
                drawn = torch.randn(parameter.shape)
                parameter.grad = drawn.to(memory_format=layout) if drawn.dim() == 4 else drawn
            optimization.update(step)
        updated.append([parameter.detach() for parameter in network.parameters()])
    assert any(parameter.shape[-1] == 3 for parameter in updated[0])
    assert all(torch.equal(*pair) for pair in zip(*updated, strict=True))
