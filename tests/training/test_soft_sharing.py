"""Decoders that are mixtures of bases: their gradients and steps against autograd, checkpoints, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_data
from torch import Tensor
from torch.func import functional_call

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.serialization import override
from multistage_diffusion.denoisers import MultiStageDenoiser, build_denoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets.network import build_network
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.checkpoint import load_tensors
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.soft_sharing import SoftSharing
from multistage_diffusion.training.trainer import Trainer

CPU = torch.device("cpu")
LIKE = {"network__decoder_widths": (8, 8, 8), "network__dropout": 0.0}


def config(bases: int = 3, **changes: object) -> RunConfig:
    return tiny_config(**{**LIKE, "training__soft_sharing": bases, **changes})


def drawn(made: SoftSharing, seed: int = 0) -> SoftSharing:
    """Give bases and logits random values, and mix them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    made.mix()
    return made


def mixtures(made: SoftSharing, logits: Tensor, bases: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the decoders' parameters as autograd's functions of logits and bases, written out."""
    found = {}
    for k, row in enumerate(logits):
        shares = [value.exp() / sum(other.exp() for other in row) for value in row]
        for name in bases[0]:
            terms = [share * basis[name] for share, basis in zip(shares, bases, strict=True)]
            found[f"network.decoders.{k}.{name}"] = sum(terms[1:], terms[0])
    return found


def trained(path: Path, **changes: object) -> Trainer:
    """Train a run that is there to its end, or a new one."""
    made = config(**changes)
    trainer = Trainer(Run(path) if path.exists() else Run.create(path, made), tiny_data(), config=made, device=CPU)
    trainer.fit()
    return trainer


# -- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bases", "own"), [(3, [0, 1, 2]), (2, [0, 0, 1])])
def test_decoders_start_alike_each_with_a_basis_of_its_own(bases: int, own: list[int]) -> None:
    network = build_network(config().network)
    first = {name: value.clone() for name, value in network.decoders[0].state_dict().items()}
    made = SoftSharing(config(bases), network)
    assert made.logits.argmax(1).tolist() == own
    assert made.logits.sum(1).tolist() == [1.0] * 3
    for decoder in network.decoders:
        for name, value in decoder.state_dict().items():
            torch.testing.assert_close(value, first[name])


@pytest.mark.parametrize("bases", [2, 3])
def test_gradients_of_bases_and_logits_are_autograd_s(bases: int) -> None:
    made_config, counts, lambdas = config(bases), (3, 4, 5), (0.5, 0.3, 0.2)
    denoiser: MultiStageDenoiser = build_denoiser(made_config).double()
    made = drawn(SoftSharing(made_config, denoiser.network))
    batch = BatchSource(made_config, tiny_data(), CPU).draw(0, counts)
    logits = made.logits.detach().clone().requires_grad_()
    leaves = [{n: p.detach().clone().requires_grad_() for n, p in b.named_parameters()} for b in made.bases]
    mixed = mixtures(made, logits, leaves)
    for name, value in mixed.items():
        torch.testing.assert_close(dict(denoiser.named_parameters())[name], value)

    class Losses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self) -> Tensor:
            return objective(stage_losses(self.denoiser, batch), lambdas, counts)

    whole: Tensor = functional_call(Losses(), {f"denoiser.{name}": value for name, value in mixed.items()}, ())
    whole.backward()
    objective(stage_losses(denoiser, batch), lambdas, counts).backward()
    made.take_gradients()
    torch.testing.assert_close(made.logits.grad, logits.grad)
    assert made.logits.grad is not None
    assert made.logits.grad.abs().max() > 1e-6
    for basis, leaf in zip(made.bases, leaves, strict=True):
        for name, parameter in basis.named_parameters():
            torch.testing.assert_close(parameter.grad, leaf[name].grad)
    assert all(parameter.grad is None for parameter in denoiser.network.decoders.parameters())


def test_a_stage_without_rows_moves_with_the_others(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", training__update_mode="one-stage", training__steps=1)
    before = Trainer(Run.create(tmp_path / "new", config()), tiny_data(), device=CPU).denoiser.network.decoders
    for old, new in zip(before, trainer.denoiser.network.decoders, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))


@pytest.mark.parametrize("bases", [2, 3])
def test_bases_taken_from_decoders_mix_to_them_as_far_as_they_can(bases: int) -> None:
    network = build_network(config().network).double()
    made = SoftSharing(config(bases), network)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.decoders.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    wanted = [{n: p.detach().clone() for n, p in decoder.named_parameters()} for decoder in network.decoders]
    made.take_decoders()
    name = next(n for n, p in made.bases[0].named_parameters() if p.ndim == 4)
    given = torch.stack([decoder[name].flatten() for decoder in wanted])
    nearest = made.weights @ torch.linalg.lstsq(made.weights.detach(), given).solution
    found = torch.stack([dict(decoder.named_parameters())[name].flatten() for decoder in network.decoders])
    torch.testing.assert_close(found, nearest)
    assert torch.allclose(found, given) == (bases == 3)


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_step_is_adam_s_on_bases_and_logits(tmp_path: Path) -> None:
    changes = {"training__precision": "fp64", "optimizer__clip": None, "training__steps": 1, "optimizer__kind": "adamw"}
    made = config(**changes, optimizer__weight_decay=0.3)
    before = Trainer(Run.create(tmp_path / "before", made), tiny_data(), device=CPU)
    logits, bases = before.optimization.sharing.logits, before.optimization.sharing.bases  # type: ignore[union-attr]
    logits, bases = logits.detach().clone(), [{n: p.detach().clone() for n, p in b.named_parameters()} for b in bases]
    after = trained(tmp_path / "after", **changes, optimizer__weight_decay=0.3)
    sharing = after.optimization.sharing
    assert sharing is not None
    lr, decay, largest = made.optimizer.lr, 0.3, 0.0
    # Adam's first step is lr times the sign of the gradient, where that is far above eps; the decay is of bases alone
    for basis, old in zip(sharing.bases, bases, strict=True):
        for name, parameter in basis.named_parameters():
            moved = (parameter.detach() - old[name] * (1 - lr * decay)).abs()
            assert moved.max() < lr * (1 + 1e-9)
            largest = max(largest, float(moved.max()))
    assert largest == pytest.approx(lr, rel=1e-3)
    assert (sharing.logits.detach() - logits).abs().max() <= lr * (1 + 1e-9)
    assert [group["weight_decay"] for group in sharing.optimizer.param_groups] == [decay, 0.0]
    shares = sharing.logits.softmax(1)
    for k, decoder in enumerate(after.denoiser.network.decoders):
        for name, parameter in decoder.named_parameters():
            parts = [shares[k, j] * dict(basis.named_parameters())[name] for j, basis in enumerate(sharing.bases)]
            torch.testing.assert_close(parameter, sum(parts[1:], parts[0]))


@pytest.mark.parametrize("mode", ["mixed", "one-stage", "sequential"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, mode: str) -> None:
    changes = {"training__update_mode": mode, "training__ema_profiles": (0.1,), "training__loss_weighting": "learned"}
    whole = trained(tmp_path / "whole", **changes)
    trained(tmp_path / "parts", **changes, training__steps=2)
    parts = trained(tmp_path / "parts", **changes)
    for name in ("model", "ema", "optimizer"):
        one, two = (load_tensors(t.run.checkpoint("latest"), name) for t in (whole, parts))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert "soft_sharing.logits.exp_avg" in load_tensors(whole.run.checkpoint("latest"), "optimizer")


def test_networks_hold_ordinary_decoders(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", bases=2)
    plain = build_denoiser(tiny_config(**LIKE)).state_dict()
    for name in ("model", "ema"):
        assert load_tensors(trainer.run.checkpoint("latest"), name).keys() == plain.keys()
    assert trainer.run.denoiser("latest") is not None


def test_it_starts_from_a_trained_run(tmp_path: Path) -> None:
    one = tiny_config(**{**LIKE, "network__decoder_widths": (8,), "stages.interior": (), "training__steps": 2})
    first = Trainer(Run.create(tmp_path / "one", one), tiny_data(), device=CPU)
    first.fit()
    made = override(config(), {"training.init_from": str(tmp_path / "one")})
    trainer = Trainer(Run.create(tmp_path / "three", made), tiny_data(), device=CPU)
    assert trainer.optimization.sharing is not None
    trainer.optimization.sharing.mix()  # as after a step: the bases have the weights, too
    given = load_tensors(first.run.checkpoint("best"), "ema")
    for module in (trainer.denoiser, trainer.ema.module):
        for k, decoder in enumerate(module.network.decoders):
            for name, value in decoder.state_dict().items():
                torch.testing.assert_close(value, given[f"network.decoders.0.{name}"], msg=f"{k} {name}")


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__decoder_widths": (12, 8, 4)}, r"soft_sharing=3 mixes .* network.decoder_widths"),
        ({"network__separate": True}, "alike, on one encoder"),
        ({"training__branch_at": 2}, r"does not go with training\.branch_at"),
        ({"training__soft_sharing": 1}, "3 stages can share 2 to 3 bases"),
        ({"training__soft_sharing": 4}, "3 stages can share 2 to 3 bases"),
        ({"training__soft_sharing": -1}, r"training\.soft_sharing=-1 must be >= 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_parts_of_decoders_and_scaled_losses_are_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config())
    with pytest.raises(UserError, match="soft_sharing mixes whole decoders, but --strategy memory"):
        Trainer(run, tiny_data(), device=CPU, strategy="memory")
    half = config(training__precision="fp16")
    with pytest.raises(UserError, match="fp16; use bf16 or fp32"):
        Trainer(run, tiny_data(), config=half, device=CPU)


def test_a_run_without_it_does_not_go_on_with_it(tmp_path: Path) -> None:
    made = tiny_config(**LIKE, training__steps=2)
    Trainer(Run.create(tmp_path / "run", made), tiny_data(), device=CPU).fit()
    with pytest.raises(UserError, match=r"optimizer\.safetensors: soft_sharing\.\S+ is missing"):
        trained(tmp_path / "run")
