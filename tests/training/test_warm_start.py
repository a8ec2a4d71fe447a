"""A one-stage network cloned into every stage is the same denoiser; whatever does not fit starts from scratch or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multistage_diffusion.config import NetworkConfig, RunConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.denoisers import MultiStageDenoiser
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.training.flops import flops_per_image
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.training.warm_start import warm_start

ONE = {"stages__interior": [], "network__decoder_widths": [8]}


@pytest.fixture
def trained(tmp_path, tiny_config, tiny_data):
    """Return a function that makes a run with a checkpoint whose averaged weights are random."""

    def make(name: str = "one", **changes: object) -> Run:
        run = Run.create(tmp_path / name, tiny_config(**{**ONE, **changes}))
        classes = run.config().network.num_classes
        trainer = Trainer(run, tiny_data(classes=classes), device="cpu")
        with torch.no_grad():
            for parameter in trainer.ema.module.parameters():
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        trainer.step = 4
        trainer.save()
        return run

    return make


def started(path: Path, config: RunConfig, data) -> Trainer:
    return Trainer(Run.create(path, config), data, device="cpu")


def at_every_stage(denoiser: MultiStageDenoiser, cond: Conditioning | None = None) -> torch.Tensor:
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser.eval()(x, torch.tensor([0.05, 0.1, 0.3, 0.5, 1.0, 5.0], dtype=torch.float64), cond)


def test_clones_in_every_stage_are_the_same_denoiser(trained, tiny_config, tiny_data, tmp_path) -> None:
    run = trained()
    config = tiny_config(network__decoder_widths=[8, 8, 8], training__init_from=str(run.path))
    trainer = started(tmp_path / "three", config, tiny_data())
    expected = at_every_stage(run.denoiser())
    torch.testing.assert_close(at_every_stage(trainer.denoiser), expected)
    torch.testing.assert_close(at_every_stage(trainer.ema.module), expected)


def test_wider_and_narrower_decoders_start_from_the_trained_one(trained, tiny_config, tiny_data, tmp_path) -> None:
    run = trained()
    start = warm_start(run.path, tiny_config())
    assert start.cloned == ("encoder", "decoder.2")
    assert start.resized == ("decoder.1", "decoder.3")
    assert start.fresh == ()
    trainer = started(tmp_path / "three", tiny_config(training__init_from=str(run.path)), tiny_data())
    same = at_every_stage(trainer.denoiser) - at_every_stage(run.denoiser())
    assert same[:4].abs().max() < 1e-5  # 12 channels instead of 8, and the same 8
    assert same[4:].abs().max() > 1e-3  # 4 of the 8
    again = warm_start(run.path, tiny_config())
    assert all(torch.equal(again.tensors[name], value) for name, value in start.tensors.items())


def test_a_decoder_without_the_trained_projection_starts_from_scratch(trained, tiny_config) -> None:
    three = trained("three", stages__interior=[0.2, 0.6], network__decoder_widths=[12, 8, 4])
    config = tiny_config(network__decoder_widths=[16, 8, 8], stages__interior=[0.3, 0.9])
    start = warm_start(three.path, config)
    assert start.resized == ("decoder.3",)
    assert start.fresh == ("decoder.1",)  # 8 + 8 inputs, 16 outputs: a block without projection


def test_as_many_stages_are_cloned_one_by_one(trained, tiny_config) -> None:
    three = trained("three", stages__interior=[0.2, 0.6], network__decoder_widths=[12, 8, 4])
    start = warm_start(three.path, tiny_config(stages__interior=[0.3, 0.9]))
    assert start.cloned == ("encoder", "decoder.1", "decoder.2", "decoder.3")
    trained_weights = three.denoiser().state_dict()
    assert start.tensors.keys() == trained_weights.keys()
    assert all(torch.equal(start.tensors[name], value) for name, value in trained_weights.items())


@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_a_decoder_is_cloned_only_with_its_own_heads(family: str, tiny_config, tiny_data, tmp_path) -> None:
    def config(heads: tuple[int, ...], widths: tuple[int, ...] = (16, 16, 16)) -> RunConfig:
        network = NetworkConfig.of(
            family,
            channels=1,
            encoder_width=16,
            decoder_widths=widths,
            encoder_depth=1,
            head_channels=8,
            decoder_head_channels=heads,
            size=(4, 4),
        )
        return tiny_config(network=network)

    run = Run.create(tmp_path / "run", config((8, 8, 16)))
    Trainer(run, tiny_data(), device="cpu").fit()
    found = warm_start(run.path, config((16, 8, 8)))
    assert found.cloned == ("encoder", "decoder.2")
    assert found.fresh == ("decoder.1", "decoder.3")
    narrow = warm_start(run.path, config((8, 4, 16), (16, 12, 16)))  # a new width may have its own heads
    assert (narrow.cloned, narrow.fresh) == (("encoder", "decoder.1", "decoder.3"), ("decoder.2",))


def test_separate_networks_are_each_a_clone(trained, tiny_config) -> None:
    config = tiny_config(network__decoder_widths=[8, 8, 8], network__separate=True)
    assert len(warm_start(trained().path, config).cloned) == 6


def test_labels_that_were_not_known_start_without_effect(trained, tiny_config, tiny_data, tmp_path) -> None:
    run = trained()
    changes = {"network__decoder_widths": [8, 8, 8], "network__num_classes": 3, "training__init_from": str(run.path)}
    trainer = started(tmp_path / "conditional", tiny_config(**changes), tiny_data(classes=3))
    conditional = at_every_stage(trainer.denoiser, Conditioning(labels=torch.tensor([0, 1, 2, 0, 1, -1])))
    torch.testing.assert_close(conditional, at_every_stage(run.denoiser()))


@pytest.mark.parametrize("widths", [(8, 8, 8), (4, 8, 8), (4, 12, 8)])
def test_a_decoder_that_all_stages_share_at_first_starts_from_the_trained_one(
    trained, tiny_config, tiny_data, tmp_path, widths: tuple[int, ...]
) -> None:
    run = trained()
    common = {"network__decoder_widths": widths, "training__branch_at": 2}
    trainer = started(tmp_path / "three", tiny_config(**common, training__init_from=str(run.path)), tiny_data())
    given = run.denoiser().network.decoders[0].state_dict()
    for module in (trainer.denoiser, trainer.ema.module):
        decoder = module.network.decoders[
            2
        ]  # of the trained width: even as a slice of a wider one, it is the trained one
        assert all(torch.equal(value, given[name]) for name, value in decoder.state_dict().items())
    attending = trained("attending", network__attention_factors=[1])
    common |= {"network__attention_factors": [1]}
    trainer = started(tmp_path / "four", tiny_config(**common, training__init_from=str(attending.path)), tiny_data())
    for module in (trainer.denoiser, trainer.ema.module):  # a slice's queries are not scaled
        for width, decoder in zip(widths, module.network.decoders, strict=True):
            name = "levels.0.blocks.1.attention.qkv.weight"
            own, wide = (part.state_dict()[name] for part in (decoder, module.network.decoders[1]))
            assert torch.equal(own[:width], wide[:width, :width])
    three = trained("its own", stages__interior=[0.2, 0.6], network__decoder_widths=[8, 8, 8])
    with pytest.raises(
        ValueError, match=r"has 3 decoders, but with training.branch_at=2 all stages start with one; give"
    ):
        warm_start(three.path, tiny_config(**common))


def test_a_stopped_run_goes_on_from_its_checkpoint_not_from_its_start(
    trained, tiny_config, tiny_data, tmp_path
) -> None:
    config = tiny_config(network__decoder_widths=[8, 8, 8], training__init_from=str(trained().path))
    trainer = started(tmp_path / "three", config, tiny_data())
    trainer.fit()
    again = Trainer(trainer.run, tiny_data(), device="cpu")
    assert again.step == 4
    assert torch.equal(at_every_stage(again.denoiser), at_every_stage(trainer.denoiser))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"network__encoder_width": 12},
            r"its encoder has \[32, 8\] for embedding.linear0.weight, the new one \[48, 12\]",
        ),
        ({"network__blocks_per_level": 2}, "its encoder has nothing for levels.0.blocks.1"),
        ({"network__norm_groups": 1}, "trained with network.norm_groups=16, the new run has 1"),
        ({"network__family": "ncsnpp"}, "trained with network.family=ddpmpp, the new run has ncsnpp"),
        ({"diffusion__precondition": "velocity"}, "trained with diffusion.precondition=edm"),
        ({"diffusion__sigma_data": 0.7}, "trained with diffusion.sigma_data=0.5, the new run has 0.7"),
    ],
)
def test_what_cannot_be_cloned_is_refused(trained, tiny_config, changes: dict[str, object], message: str) -> None:
    run = trained()
    with pytest.raises(ValueError, match=message):
        warm_start(run.path, tiny_config(**changes))


def test_a_run_that_shares_nothing_is_refused(trained, tiny_config) -> None:
    two = trained("two", stages__interior=[0.5], network__decoder_widths=[8, 8], network__separate=True)
    with pytest.raises(ValueError, match="an encoder for every stage"):
        warm_start(two.path, tiny_config())
    with pytest.raises(ValueError, match="not a run"):
        warm_start(two.path / "none", tiny_config())


def frozen(run: Run, **changes: object) -> dict[str, object]:
    start = {"training__init_from": str(run.path), "training__freeze": "encoder"}
    return {"network__decoder_widths": [8, 8, 8], **start, **changes}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_frozen_encoder_keeps_its_bits_and_decoders_learn(trained, tiny_config, tiny_data, tmp_path, threads) -> None:
    run = trained()
    config = tiny_config(**frozen(run, execution__thread_parallel=threads, network__dropout=0.0))
    trainer = started(tmp_path / "three", config, tiny_data())
    before = {name: value.clone() for name, value in trainer.denoiser.state_dict().items()}
    trainer.fit()
    for module in (trainer.denoiser, trainer.ema.module):
        same = {name: torch.equal(value, before[name]) for name, value in module.state_dict().items()}
        assert all(same[name] for name in same if ".encoders." in name)
        assert not any(same[name] for name in same if ".decoders." in name)
    norms = [record["grad_norm"] for record in trainer.run.records() if record["kind"] == "train"]
    assert all(set(norm) == {"decoder.1", "decoder.2", "decoder.3"} for norm in norms)


def test_a_frozen_run_resumes_to_the_same_bits(trained, tiny_config, tiny_data, tmp_path) -> None:
    run = trained()
    whole = started(tmp_path / "whole", tiny_config(**frozen(run)), tiny_data())
    whole.fit()
    part = started(tmp_path / "part", tiny_config(**frozen(run, training__steps=2)), tiny_data())
    part.fit()
    again = Trainer(part.run, tiny_data(), config=tiny_config(**frozen(run)), device="cpu")
    again.fit()
    ours, theirs = (trainer.denoiser.state_dict() for trainer in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_frozen_encoder_costs_its_forward_pass_only(trained, tiny_config) -> None:
    run = trained()
    learning, kept = (tiny_config(**frozen(run, training__freeze=freeze)) for freeze in ("nothing", "encoder"))
    encoder = network_cost(kept.network, 4, 4).shared_true_flops
    assert flops_per_image(learning) - flops_per_image(kept) == pytest.approx(2 * encoder)


def test_a_frozen_encoder_that_would_have_to_learn_labels_is_refused(trained, tiny_config) -> None:
    run = trained()
    with pytest.raises(ValueError, match=r"training.freeze='encoder': the encoder of .* has network.num_classes=0"):
        warm_start(run.path, tiny_config(**frozen(run, network__num_classes=3)))


@pytest.mark.parametrize("changes", [{"training__init_from": ""}, {"network__separate": True}])
def test_freezing_needs_a_shared_encoder_to_start_from(trained, tiny_config, changes) -> None:
    with pytest.raises(ValueError, match=r"training.freeze='encoder' needs training.init_from"):
        tiny_config(**frozen(trained(), **changes))
