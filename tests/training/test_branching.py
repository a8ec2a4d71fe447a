from __future__ import annotations

import copy
import re

import pytest
import torch

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.training import checkpoint as ckpt
from multistage_diffusion.training.branching import Ties, load_states, tie
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.optimizer import clip, part_norms
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

ALIKE = {"network__decoder_widths": (8, 8, 8), "training__branch_at": 3, "training__steps": 6}
WIDTHS = (8, 12, 4)  # the widest is not the first
SLICED = {"network__decoder_widths": WIDTHS}


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


def of_first_stage(name: str) -> str:
    return re.sub(r"(encoders|decoders)\.\d", r"\1.0", name)


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer._iterate()


def test_stages_part_after_the_step_and_not_before(trainer):
    run = trainer()
    assert run.denoiser.network.tied
    assert run.ema.module.network.tied
    advance(run, 3)
    first, second, third = decoders(run)
    assert equal(first, second)
    assert equal(first, third)
    advance(run, 1)
    assert not run.denoiser.network.tied
    assert not run.ema.module.network.tied
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
    apart.load_state_dict(run.denoiser.state_dict())
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


STOPS = [
    *(pytest.param(2, {}, marks=pytest.mark.slow), (3, {}), pytest.param(4, {}, marks=pytest.mark.slow)),
    *((2, SLICED), (3, SLICED), pytest.param(4, SLICED, marks=pytest.mark.slow)),
    pytest.param(
        3, {**SLICED, "training__update_mode": "sequential", "training__accumulate": 2}, marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("stop", "changes"), STOPS)
def test_a_run_stopped_before_at_or_after_the_branch_goes_on_as_if_it_had_not_been(trainer, stop, changes):
    whole = trainer("whole", **changes)
    whole.fit()
    cut = trainer("cut", **changes)
    advance(cut, stop)
    cut.save()
    resumed = trainer("cut")
    assert resumed.step == stop
    assert resumed.denoiser.network.tied == (stop <= 3)
    resumed.fit()
    for a, b in ((whole.denoiser, resumed.denoiser), (whole.ema.module, resumed.ema.module)):
        assert equal(a.state_dict(), b.state_dict())
    assert equal(
        ckpt.optimizer_tensors(whole.optimization.optimizer, whole.denoiser),
        ckpt.optimizer_tensors(resumed.optimization.optimizer, resumed.denoiser),
    )


@pytest.mark.parametrize("changes", [{}, SLICED])
def test_a_checkpoint_from_before_the_branch_is_a_whole_network(trainer, changes):
    run = trainer(**changes)
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
    assert not run.denoiser.network.tied
    advance(run, 4)
    assert run.step == 4


def test_parameters_that_were_never_updated_have_no_state(tiny_config):
    config = tiny_config(network__decoder_widths=(8, 8, 8))
    shared, apart = build_denoiser(config), build_denoiser(config)
    tie(shared.network)
    optimizer = torch.optim.Adam(shared.parameters())
    for parameter in shared.network.decoders[0].parameters():  # the encoder gets no gradient
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other = torch.optim.Adam(apart.parameters())
    load_states(other, apart, Ties(shared.network).states(optimizer, shared))
    found = {name for name, p in apart.named_parameters() if p in other.state}
    assert found == {name for name, _ in apart.named_parameters() if "decoders" in name}
    assert all(state["step"] == 1 for state in other.state.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network__decoder_widths": (12, 8, 8), "network__separate": True},
            r"branch_at=3 needs decoders that are slices of one, which .*network.decoder_widths=\[12, 8, 8\] are not",
        ),
        (
            {"network__family": "dit", "network__head_channels": 4, "network__decoder_widths": (12, 8, 8)},
            r"which those of network.family=dit with network.decoder_widths=\[12, 8, 8\] are not; make its values equal",
        ),
        (
            {"network__family": "uvit", "network__head_channels": 4, "network__decoder_depths": (1, 2, 1)},
            r"network.decoder_depths=\[1, 2, 1\] are not; make its values equal, or set branch_at to 0",
        ),
        ({"training__branch_at": -1}, "training.branch_at=-1 must be >= 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{**ALIKE, **changes})


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
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


# -- decoders of several widths: slices of the widest -----------------------------------------------------------------


def first_channels(value: torch.Tensor, shape: torch.Size, width: int, widest: int = 12) -> torch.Tensor:
    """Return the slice of a tensor without attention: the first channels of the decoder, then all of the encoder's."""
    for axis, (wide, narrow) in enumerate(zip(value.shape, shape, strict=True)):
        if wide != narrow:
            own = (wide - narrow) // (widest - width)
            kept = [*range(own * width), *range(own * widest, wide)]
            value = value.index_select(axis, torch.tensor(kept))
    assert value.shape == shape
    return value


def slices_of_widest(
    named: dict[str, torch.Tensor], like: dict[str, torch.Tensor], widths: tuple[int, ...] = WIDTHS
) -> dict[str, torch.Tensor]:
    """Return tensors by name of all stages from those of the encoder and of the first widest decoder."""
    found, widest = {}, f"decoders.{widths.index(12)}"
    for name, own in like.items():
        stage = re.search(r"decoders\.(\d)", name)
        wide = named[name.replace(stage[0], widest) if stage else name]
        found[name] = first_channels(wide, own.shape, widths[int(stage[1])]) if stage else wide
    return found


def test_after_some_steps_each_decoder_is_a_slice_of_the_widest(trainer):
    run = trainer(**SLICED)
    start = copy.deepcopy(run.denoiser.state_dict())
    advance(run, 3)
    own, average = run.denoiser.state_dict(), run.ema.module.state_dict()
    assert equal(own, slices_of_widest(own, own))
    torch.testing.assert_close(average, slices_of_widest(average, average), rtol=1e-6, atol=1e-9)
    assert not any(torch.equal(value, start[name]) for name, value in run.denoiser.state_dict().items())
    assert not any(
        torch.equal(a, b) for a, b in zip(run.ema.module.parameters(), run.denoiser.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__update_mode": "one-stage", "optimizer__weight_decay": 0.1, "optimizer__kind": "adamw"},
        {"training__update_mode": "sequential", "training__accumulate": 2},
        {"execution__thread_parallel": 2, "execution__channels_last": True, "training__accumulate": 3},
        {"network__decoder_widths": (12, 4, 12), "network__family": "ncsnpp"},
    ],
    ids=["mixed", "one-stage", "sequential", "threads", "ncsnpp"],
)
def test_the_widest_decoder_is_trained_as_if_all_others_were_views_of_it(trainer, changes):
    """By brute force: one optimiser over one decoder, whose slices are computed anew for each pass by autograd."""
    exact = {"network__dropout": 0.0, "training__precision": "fp64", "optimizer__clip": 0.05}
    run = trainer(**{**SLICED, **exact, **changes})
    widths, steps = run.config.network.decoder_widths, 3
    module = copy.deepcopy(run.denoiser)
    like = dict(module.named_parameters(remove_duplicate=False))
    learns = f"encoders|decoders.{widths.index(12)}"
    mine = {n: p.detach().clone().requires_grad_() for n, p in like.items() if re.search(learns, n)}
    settings = run.config.optimizer
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    optimizer = kind(mine.values(), settings.lr, settings.betas, settings.eps, settings.weight_decay)
    compute = Objective(module)
    for step in range(steps):
        for counts, weights in run.allocation.updates(step):
            views = {f"module.{n}": p for n, p in slices_of_widest(mine, like, widths).items()}
            batch = run.passes.source.draw(step, counts)
            loss = torch.func.functional_call(compute, views, (batch, weights, counts), tie_weights=False)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(mine.values(), settings.clip)
            optimizer.step()
    advance(run, steps)
    found = dict(run.denoiser.named_parameters(remove_duplicate=False))
    for name, value in mine.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class Objective(torch.nn.Module):
    """The objective of a batch as a module, so that its parameters can be replaced."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch, weights, counts) -> torch.Tensor:
        return objective(stage_losses(self.module, batch), weights, counts)


def test_nothing_is_lost_when_slices_part(trainer):
    run = trainer(**SLICED)
    advance(run, 3)
    x, sigma = torch.randn(6, 1, 4, 4), torch.tensor([0.1, 0.15, 0.3, 0.5, 3.0, 9.0])  # two of each stage
    moments = {k: v.clone() for k, v in ckpt.optimizer_tensors(run.optimization.optimizer, run.denoiser).items()}
    modules = run.denoiser, run.ema.module
    with torch.no_grad():
        before = [module.eval()(x, sigma) for module in modules]
    run._branch()
    with torch.no_grad():
        after = [module.eval()(x, sigma) for module in modules]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(*before)
    parted = ckpt.optimizer_tensors(run.optimization.optimizer, run.denoiser)
    for field in ("exp_avg", "exp_avg_sq"):
        given, own = ({n: v for n, v in t.items() if n.endswith(f".{field}")} for t in (moments, parted))
        assert len(own) == len(list(run.denoiser.named_parameters()))
        assert equal(own, slices_of_widest(given, own))
    assert {float(v) for name, v in parted.items() if name.endswith(".step")} == {3.0}
    tensors = [*run.denoiser.parameters(), *run.ema.module.parameters(), *parted.values()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    advance(run, 1)
    own = run.denoiser.state_dict()
    assert not equal(own, slices_of_widest(own, own))


def test_decoders_of_one_width_are_one_module_and_nothing_is_copied(tiny_config):
    network = build_denoiser(tiny_config(**{**ALIKE, "network__decoder_widths": (8, 12, 8)})).network
    tie(network)
    assert network.decoders[0] is network.decoders[2]
    assert network.decoders[0] is not network.decoders[1]
    alike = build_denoiser(tiny_config(**ALIKE)).network
    tie(alike)
    assert len({*alike.decoders}) == 1
    before = copy.deepcopy(alike.state_dict())
    ties = Ties(alike)
    for parameter in alike.parameters():
        parameter.grad = torch.ones_like(parameter)
    ties.add_gradients()
    ties.copy_weights()
    assert all(bool((parameter.grad == 1).all()) for parameter in alike.parameters())
    assert equal(before, alike.state_dict())


def test_a_slice_counts_in_the_norm_of_the_widest_decoder(trainer):
    run = trainer(**SLICED)
    advance(run, 1)
    assert set(run.log.sums.norm) == {"encoder", "decoder.2"}
    assert not any(p.grad is not None for k in (0, 2) for p in run.denoiser.network.decoders[k].parameters())


def test_a_decoder_that_is_no_slice_of_the_widest_is_refused(tiny_config):
    # with width 16, the first block has as many outputs as inputs, 8 and 8 of the encoder, and thus no projection
    network = build_denoiser(tiny_config(**{**ALIKE, "network__decoder_widths": (20, 16, 8)})).network
    message = r"network.decoder_widths=\[20, 16, 8\]: the decoder of width 16 is no slice of that of width 20"
    with pytest.raises(UserError, match=message):
        tie(network)
