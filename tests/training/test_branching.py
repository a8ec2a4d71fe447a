from __future__ import annotations

import copy

import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.serialization import override
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.training import checkpoint as ckpt
from multistage_diffusion.training.branching import (
    load_shared,
    load_shared_states,
    of_first_stage,
    optimizer_states,
    tie,
    tied,
)
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.optimizer import clip, part_norms
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

ALIKE = {"network__decoder_widths": (8, 8, 8), "training__branch_at": 3, "training__steps": 6}


@pytest.fixture(name="trainer")
def fixture_trainer(tmp_path, tiny_config, tiny_data):
    """Make trainers of new runs, or go on with them: trainer(name, key=value, ...)."""

    def make(name: str = "run", **changes: object) -> Trainer:
        run = Run(tmp_path / name)
        if not run.config_file.exists():
            run = Run.create(run.path, tiny_config(**{**ALIKE, "training__flip": False, **changes}))
        return Trainer(run, tiny_data(), device="cpu")

    return make


def decoders(trainer: Trainer, *, average: bool = False) -> list[dict[str, torch.Tensor]]:
    module = trainer.ema.module if average else trainer.denoiser
    return [copy.deepcopy(part.state_dict()) for part in module.network.decoders]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer._iterate()


def test_stages_part_after_the_step_and_not_before(trainer):
    run = trainer()
    assert tied(run.denoiser.network)
    assert tied(run.ema.module.network)
    advance(run, 3)
    first, second, third = decoders(run)
    assert equal(first, second)
    assert equal(first, third)
    advance(run, 1)
    assert not tied(run.denoiser.network)
    assert not tied(run.ema.module.network)
    for average in (False, True):
        first, second, third = decoders(run, average=average)
        assert not equal(first, second)
        assert not equal(second, third)


def test_one_decoder_learns_from_the_rows_of_all_stages(trainer):
    run = trainer(network__dropout=0.0)
    batch = run.passes.source.draw(0, run.allocation.counts)
    objective(stage_losses(run.denoiser, batch), run.allocation.weights, run.allocation.counts).backward()
    # the same network with decoders of their own, equal in value: its gradients add up to the shared one
    apart = build_denoiser(run.config)
    load_shared(apart, run.denoiser.state_dict())
    apart.zero_grad(set_to_none=True)
    objective(stage_losses(apart, batch), run.allocation.weights, run.allocation.counts).backward()
    shared = dict(run.denoiser.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in shared.items()}
    for name, p in apart.named_parameters():
        total[of_first_stage(name)] += p.grad
    for name, p in shared.items():
        assert torch.allclose(p.grad, total[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("separate", [False, True])
def test_every_stage_goes_on_with_the_weights_averages_and_moments_of_all(trainer, separate):
    run = trainer(network__separate=separate)
    advance(run, 3)
    model = copy.deepcopy(dict(run.denoiser.named_parameters()))
    before = {k: v.clone() for k, v in ckpt.optimizer_tensors(run.optimization.optimizer, run.denoiser).items()}
    assert {of_first_stage(name) for name in model} == set(model)  # the first stage's alone
    run._branch()
    after = ckpt.optimizer_tensors(run.optimization.optimizer, run.denoiser)
    names = [name for name, _ in run.denoiser.named_parameters()]
    assert len(names) == len(set(names)) > len(model)
    for name, p in run.denoiser.named_parameters():
        assert torch.equal(p, model[of_first_stage(name)])
        for field in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(after[f"{name}.{field}"], before[f"{of_first_stage(name)}.{field}"])
    # nothing is shared any more: neither weights nor moments
    assert len({p.data_ptr() for p in run.denoiser.parameters()}) == len(names)
    assert len({v.data_ptr() for v in after.values()}) == len(after)
    average = {n: p.clone() for n, p in run.ema.module.named_parameters()}
    advance(run, 1)
    moved = [n for n, p in run.ema.module.named_parameters() if not torch.equal(p, average[n])]
    assert any(".decoders.2." in name for name in moved)


STOPS = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stop", STOPS)
def test_a_run_stopped_before_at_or_after_the_branch_goes_on_as_if_it_had_not_been(trainer, stop):
    whole = trainer("whole")
    whole.fit()
    cut = trainer("cut")
    advance(cut, stop)
    cut.save()
    resumed = trainer("cut")
    assert resumed.step == stop
    assert tied(resumed.denoiser.network) == (stop <= 3)
    resumed.fit()
    for a, b in ((whole.denoiser, resumed.denoiser), (whole.ema.module, resumed.ema.module)):
        assert equal(a.state_dict(), b.state_dict())
    assert equal(
        ckpt.optimizer_tensors(whole.optimization.optimizer, whole.denoiser),
        ckpt.optimizer_tensors(resumed.optimization.optimizer, resumed.denoiser),
    )


def test_a_checkpoint_from_before_the_branch_is_a_whole_network(trainer):
    run = trainer()
    advance(run, 2)
    run.save()
    denoiser = run.run.denoiser("latest", weights="model")
    assert equal(denoiser.state_dict(), run.denoiser.state_dict())
    x, sigma = torch.randn(3, 1, 4, 4), torch.tensor([0.1, 0.4, 3.0])
    assert torch.equal(denoiser(x, sigma), run.denoiser.eval()(x, sigma))


def test_shared_parameters_count_once_in_the_norm(trainer):
    run = trainer(optimizer__clip=1e-3, network__dropout=0.0)
    batch = run.passes.source.draw(0, run.allocation.counts)
    objective(stage_losses(run.denoiser, batch), run.allocation.weights, run.allocation.counts).backward()
    norms = part_norms(run.optimization.parts)
    clip(run.config.optimizer, run.optimization.parts, norms)
    assert set(norms) == {"encoder", "decoder.1"}
    after = torch.sqrt(sum(p.grad.square().sum() for p in run.denoiser.parameters()))
    assert float(after) == pytest.approx(1e-3, rel=1e-2)
    run._branch()
    run.denoiser.zero_grad(set_to_none=True)
    objective(stage_losses(run.denoiser, batch), run.allocation.weights, run.allocation.counts).backward()
    norms = part_norms(run.optimization.parts)
    clip(run.config.optimizer, run.optimization.parts, norms)
    assert set(norms) == {"encoder", "decoder.1", "decoder.2", "decoder.3"}
    after = torch.sqrt(sum(p.grad.square().sum() for p in run.denoiser.parameters()))
    assert float(after) == pytest.approx(1e-3, rel=1e-2)


def test_a_run_of_one_stage_has_nothing_to_share(trainer):
    run = trainer(stages__interior=(), network__decoder_widths=(8,), training__shares="uniform")
    assert not tied(run.denoiser.network)
    advance(run, 4)
    assert run.step == 4


def test_names_of_all_stages(tiny_config):
    config: RunConfig = override(tiny_config(), {"network.decoder_widths": [8, 8, 8]})
    network = build_denoiser(config).network
    names = [name for name, _ in network.named_parameters()]
    tie(network)
    assert {of_first_stage(name) for name in names} == {name for name, _ in network.named_parameters()}
    assert of_first_stage("network.decoders.2.ups.1.conv.weight") == "network.decoders.0.ups.1.conv.weight"


def test_parameters_that_were_never_updated_have_no_state(tiny_config):
    config = tiny_config(network__decoder_widths=(8, 8, 8))
    shared, apart = build_denoiser(config), build_denoiser(config)
    tie(shared.network)
    optimizer = torch.optim.Adam(shared.parameters())
    for parameter in shared.network.decoders[0].parameters():  # the encoder gets no gradient
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other = torch.optim.Adam(apart.parameters())
    load_shared_states(other, apart, optimizer_states(optimizer, shared))
    found = optimizer_states(other, apart)
    assert found.keys() == {name for name, _ in apart.named_parameters() if "decoders" in name}
    assert all(state["step"] == 1 for state in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__decoder_widths": (12, 8, 8)}, r"branch_at=3 needs decoders that are alike, not of .*\[12, 8, 8\]"),
        ({"training__init_from": "runs/one"}, "branch_at=3 and training.init_from='runs/one' both say"),
        ({"training__branch_at": -1}, "training.branch_at=-1 must be >= 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**ALIKE, **changes})


@pytest.mark.parametrize("stop", STOPS)
def test_power_averages_part_with_the_stages_and_hold_what_was_before(trainer, stop):
    path, run = [], trainer(training__ema_profiles=[0.2])
    while run.step < 6:
        if run.step == stop:
            run.save()
            run = trainer()
        run._iterate()
        path.append({name: value.clone() for name, value in run.denoiser.state_dict().items()})
    (average,) = run.profiles
    ends = [(step / 6) ** (average.exponent + 1) for step in range(7)]
    for name, found in average.module.state_dict().items():
        expected = sum((ends[k + 1] - ends[k]) * path[k][name].double() for k in range(6))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    first, second, _ = (part.state_dict() for part in average.module.network.decoders)
    assert not equal(first, second)
