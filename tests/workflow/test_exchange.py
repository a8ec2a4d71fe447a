"""Published checkpoints become runs that sample and train on, and runs become published checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_files import (
    FAMILIES,
    Weights,
    averaged,
    compvis_weights,
    golden,
    one_stage,
    write_edm,
    write_ldm,
    write_score_sde,
)
from torch import Tensor, nn

from multistage_diffusion import files
from multistage_diffusion.commands.export import Export
from multistage_diffusion.commands.import_run import Import
from multistage_diffusion.config import NetworkConfig, RunConfig, SamplingConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, to_dict
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.data import ImageData
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.shapes import published_state
from multistage_diffusion.nets import build_network
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.training.checkpoint import Checkpoint, list_checkpoints, load_tensors, save_checkpoint
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.export import export_published
from multistage_diffusion.workflow.import_run import import_published
from multistage_diffusion.workflow.resume import resume
from multistage_diffusion.workflow.sample import sample

SIZES = {"ncsnpp": (16, 16), "edm": (16, 16), "ldm": (8, 8)}
SUFFIX = {"ncsnpp": "pth", "edm": "safetensors", "ldm": "ckpt"}
PAPER = {"ncsnpp": preset("cifar10-dpm"), "edm": preset("cifar10-edm"), "ldm": preset("celebahq-ldm")}
FEW = SamplingConfig(calls=3, sigma_min=0.1, sigma_max=20.0)


def write(name: str, folder: Path, weights: Weights) -> Path:
    """Write a file whose average is the golden network; where there is a model, it is another one."""
    if name == "ncsnpp":
        # score_sde's own one-stage networks have more groups than the golden ones
        return write_score_sde(folder / "checkpoint_26.pth", averaged(weights), weights, arguments={"norm_groups": 16})
    if name == "ldm":
        return write_ldm(folder / "model.ckpt", averaged(weights), weights)
    return write_edm(folder / "edm.pkl", weights)


def imported(name: str, folder: Path, stage: int | None = None, **changes: object) -> Run:
    """Import a golden network, or the one-stage network that has one of its decoders."""
    weights = golden(name)[1]
    file = write(name, folder, weights if stage is None else one_stage(name, weights, stage))
    arguments = {"ncsnpp": {"size": (16, 16)}, "edm": {}, "ldm": {"size": (8, 8), "head_channels": 16}}[name]
    return import_published(file, folder / "run", **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return imported runs that tests only read; each is imported once."""
    return functools.cache(lambda name, stage: imported(name, tmp_path_factory.mktemp("shared"), stage))


def noise_of(name: str, config: RunConfig, case: Weights) -> Tensor:
    if name == "edm":
        return case["sigma"].double()
    return config.diffusion.schedule.sigma(case["t" if name == "ncsnpp" else "timestep"].double())


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stage", [None, 1])
def test_an_imported_run_computes_what_was_published(name: str, stage: int | None, shared: Callable[..., Run]) -> None:
    run = shared(name, stage)
    config, denoiser = run.config(), run.denoiser()
    published, seen = PAPER[name], set()
    for case in golden(name)[2].values():
        sigma = noise_of(name, config, case)
        index = published.stages.index(sigma)
        if stage is not None and set(index.tolist()) != {stage}:
            continue
        seen |= set(index.tolist())
        if name == "edm":
            x, cond = case["x"], Conditioning(augment=case["augment_labels"])
            assert relative(denoiser(x, sigma, cond), case["denoised"]) <= 1e-5
        else:
            x = case["x"] / config.diffusion.schedule.scale(sigma).float().view(-1, 1, 1, 1)
            counts = torch.bincount(denoiser.stages.index(sigma), minlength=len(denoiser.stages)).tolist()
            assert relative(denoiser.output(x, sigma, counts), case["eps"]) <= 1e-5
    assert seen == ({0, 1, 2} if stage is None else {stage})
    assert config.stages == (published.stages if stage is None else config.stages)
    assert len(config.stages) == (3 if stage is None else 1)
    assert config.data.source == ""
    assert config.input_shape == (3, *SIZES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_run_trains_on_and_keeps_its_average(name: str, tmp_path: Path) -> None:
    short = {"steps": 2, "batch": 6, "held_out_every": 0, "sample_every": 0, "precision": "fp32", "ema_rampup": 0.05}
    run = imported(name, tmp_path, base=override(PAPER[name], {f"training.{key}": v for key, v in short.items()}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, *SIZES[name]), dtype=np.uint8)
    trainer = Trainer(run, ImageData(pixels, None, "random"), device="cpu")
    weights = {k: v.clone() for k, v in trainer.denoiser.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.ema.module.state_dict().items()}
    distinct = name != "edm"  # EDM's files hold the average only: training goes on from it
    assert any(not torch.equal(weights[k], average[k]) for k in weights) is distinct
    trainer.fit()
    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step_00000000", "step_00000002"]
    assert any(not torch.equal(weights[k], v) for k, v in trainer.denoiser.state_dict().items())
    # an average that ramped up anew would be the model's weights after the first step
    for key, value in trainer.ema.module.state_dict().items():
        assert torch.allclose(value, average[key], rtol=1e-2, atol=1e-3), key


def test_an_imported_run_samples_and_is_resumed_with_data(tmp_path: Path) -> None:
    run = imported("edm", tmp_path, stage=1, base=override(preset("digits"), {"training.batch": 4}))
    assert run.config().training.shares == "uniform"  # those of digits are for three stages
    images = sample(run, 3, sampling=FEW, device="cpu")
    assert images.shape == (3, 3, 16, 16)
    np.save(tmp_path / "photos.npy", np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8))
    resume(run.path, {"data.source": str(tmp_path / "photos.npy"), "training.steps": 1}, device="cpu")
    config = run.config()
    assert config.data.fingerprint
    assert config.training.precision == "fp32"
    assert run.checkpoint("latest").name == "step_00000001"
    recorded = run.config()
    resume(run.path, {"training.steps": 2}, device="cpu")
    assert run.config() == override(recorded, {"training.steps": 2})


def tensors(run: Run, part: str) -> Weights:
    return load_tensors(run.checkpoint("latest"), part)


def same(a: Run, b: Run) -> bool:
    pairs = [(tensors(a, part), tensors(b, part)) for part in ("model", "ema")]
    return all(set(x) == set(y) and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stage", [None, 1])
def test_import_export_import_is_exact(
    name: str, stage: int | None, shared: Callable[..., Run], tmp_path: Path
) -> None:
    run = shared(name, stage)
    file = export_published(run, tmp_path / f"again.{SUFFIX[name]}")
    again = import_published(file, tmp_path / "again", size=None if name == "edm" else SIZES[name])
    assert same(run, again)
    assert again.config() == dataclasses.replace(run.config(), name="again")
    if name == "ldm":  # the golden heads are not the usual ones
        assert again.config().network.head_channels == 16


@pytest.mark.parametrize("precondition", ["vp-eps", "edm"])
def test_a_run_of_ours_comes_back_with_its_own_stages(
    precondition: str, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    if precondition == "edm":
        config = tiny_config(diffusion__sigma_data=0.75, network__num_classes=4, network__dropout=0.25)
    else:
        config = dataclasses.replace(tiny_config(network__family="ncsnpp"), diffusion=preset("cifar10-dpm").diffusion)
    run = Run.create(tmp_path / "run", config)
    state = {name: torch.randn_like(value) for name, value in build_denoiser(config).state_dict().items()}
    average = {name: value / 3 for name, value in state.items()}
    saved = {"step": 5, "score": None, "config": config}
    save_checkpoint(run.checkpoints, Checkpoint(model=state, ema=average, optimizer={}, state=saved))
    file = export_published(run, tmp_path / ("x.safetensors" if precondition == "edm" else "x.pth"))
    again = import_published(file, tmp_path / "again", size=None if precondition == "edm" else (4, 4))
    assert same(run, again)
    for section in ("network", "stages"):
        assert getattr(again.config(), section) == getattr(config, section)
    assert again.config().diffusion.sigma_data == (0.75 if precondition == "edm" else 0.5)
    assert again.config().data.shape == (1, 4, 4)


def test_a_run_is_not_imported(tmp_path: Path) -> None:
    run = import_published(write_edm(tmp_path / "edm.pkl", golden("edm")[1]), tmp_path / "run")
    with pytest.raises(UserError, match=r"run: is a run already; .* msdiff train --init-from"):
        import_published(run.path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_network_that_is_not_told_of_augmentation_is_trained_without(tmp_path: Path) -> None:
    weights = {name: value for name, value in golden("edm")[1].items() if "map_augment" not in name}
    run = import_published(write_edm(tmp_path / "edm.pkl", weights), tmp_path / "run")
    assert PAPER["edm"].training.augment > 0
    assert (run.config().network.augment_dim, run.config().training.augment) == (0, 0.0)


def refusal(file: Path, out: Path, **arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        import_published(file, out, **arguments)  # type: ignore[arg-type]
    assert not out.exists()
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert "\n" not in text
    return text.removeprefix(f"{file}: ")


def test_two_decoders_need_their_stages(tmp_path: Path) -> None:
    weights = {k: v for k, v in golden("edm")[1].items() if "decs.2." not in k}
    file, out = write_edm(tmp_path / "edm.pkl", weights, intervals=None), tmp_path / "run"
    assert refusal(file, out).startswith(
        "holds 2 decoders, but the stages are 3; give the stages that the decoders were trained on"
    )
    config = preset("digits")
    base = dataclasses.replace(
        config,
        network=dataclasses.replace(config.network, decoder_widths=(16, 16)),
        stages=dataclasses.replace(config.stages, interior=(1.5,)),
        training=dataclasses.replace(config.training, shares=(0.9, 0.1)),
    )
    assert import_published(file, out, base=base).config().stages.interior == (1.5,)


EDGES = (0.5, 3.0)


def warnings_of(recorded: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in recorded]


def test_the_edges_of_an_edm_pickle_are_the_run_s(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    weights = golden("edm")[1]
    own = [[[0, 0.5]], [[0.5, 3.0]], [[3.0, float("inf")]]]
    run = import_published(write_edm(tmp_path / "edm.pkl", weights, intervals=own), tmp_path / "run")
    assert run.config().stages.interior == EDGES
    assert warnings_of(recwarn) == []
    # sigma = 1 is of the second decoder there, and of the first between the published edges
    case = golden("edm")[2]["case0"]
    at = torch.full((len(case["x"]),), 1.0, dtype=torch.float64)
    other = import_published(write_edm(tmp_path / "edm.pkl", weights), tmp_path / "other").denoiser()
    cond = Conditioning(augment=case["augment_labels"])
    with torch.no_grad():
        assert relative(run.denoiser()(case["x"], at, cond), other(case["x"], at, cond)) > 0.05
    again = import_published(export_published(run, tmp_path / "x.safetensors"), tmp_path / "again")
    assert again.config().stages.interior == EDGES


@pytest.mark.parametrize("name", FAMILIES)
def test_assumed_edges_are_warned_of_and_given_ones_are_not(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    weights = golden(name)[1]
    edm = name == "edm"
    file = write_edm(tmp_path / "x.pkl", weights, intervals=None) if edm else write(name, tmp_path, weights)
    heads = {"head_channels": 16} if name == "ldm" else {}
    assert import_published(file, tmp_path / "a", **heads).config().stages.interior == PAPER[name].stages.interior
    (said,) = warnings_of(recwarn)
    assert said.startswith(
        f"{file}: does not tell at which noise its 3 decoders change; the edges of preset {PAPER[name].name}"
    )
    assert "(sigma = 2." in said
    assert said.endswith("import it again with --edges")
    recwarn.clear()
    assert import_published(file, tmp_path / "b", edges=EDGES, **heads).config().stages.interior == EDGES
    assert warnings_of(recwarn) == []
    import_published(file, tmp_path / "c", base=PAPER[name], **heads)  # a preset is named for other reasons, too
    assert len(warnings_of(recwarn)) == 1


def test_edges_are_given_for_any_number_of_decoders(tmp_path: Path) -> None:
    weights = {k: v for k, v in golden("edm")[1].items() if "decs.2." not in k}
    file = write_edm(tmp_path / "edm.pkl", weights, intervals=None)
    assert import_published(file, tmp_path / "two", edges=[1.5]).config().stages.interior == (1.5,)
    Import(file=file, out=tmp_path / "command", edges=(1.5,)).run()
    assert Run.open(tmp_path / "command").config().stages.interior == (1.5,)
    assert refusal(file, tmp_path / "x", edges=EDGES).startswith("holds 2 decoders, but the stages are 3; give")
    assert refusal(file, tmp_path / "x", edges=[-1.0]).startswith("stages: edges [-1.0] must be positive")
    fourth = {k.replace("decs.1.", "decs.3."): v for k, v in golden("edm")[1].items() if "decs.1." in k}
    file = write_edm(tmp_path / "edm.pkl", golden("edm")[1] | fourth, intervals=None)
    assert len(import_published(file, tmp_path / "four", edges=[0.5, 1, 2]).config().stages) == 4


def wide_ncsnpp(folder: Path) -> Path:
    """Write a network of the multi-stage code in which 16 and 32 groups differ."""
    config = NetworkConfig.of(
        "ncsnpp", encoder_width=64, decoder_widths=(64, 64), channel_mult=(2,), blocks_per_level=1, attention_factors=()
    )
    torch.manual_seed(0)
    weights = published_state(build_network(config).state_dict(), config, (8, 8))
    return write_score_sde(folder / "wide.pth", weights, weights)


def test_assumed_groups_are_warned_of_and_given_ones_are_not(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = wide_ncsnpp(tmp_path)
    edges = {"edges": (1.0,), "size": (8, 8)}
    run = import_published(file, tmp_path / "a", **edges)  # type: ignore[arg-type]
    (said,) = warnings_of(recwarn)
    assert "does not tell the groups of its GroupNorms; up to 16 are assumed" in said
    assert said.endswith("import it again with --norm-groups")
    recwarn.clear()
    other = import_published(file, tmp_path / "b", norm_groups=32, **edges)  # type: ignore[arg-type]
    assert warnings_of(recwarn) == []
    assert (run.config().network.norm_groups, other.config().network.norm_groups) == (16, 32)  # type: ignore[attr-defined]
    again = import_published(export_published(other, tmp_path / "x.pth"), tmp_path / "again", size=(8, 8))
    assert again.config().network == other.config().network
    Import(file=file, out=tmp_path / "c", norm_groups=32, edges=(1.0,), size=(8, 8)).run()
    assert Run.open(tmp_path / "c").config().network == dataclasses.replace(other.config().network)
    assert warnings_of(recwarn) == []


def test_groups_that_cannot_be_given_are_refused(tmp_path: Path) -> None:
    file = write_edm(tmp_path / "edm.pkl", golden("edm")[1])
    assert refusal(file, tmp_path / "x", norm_groups=32) == "norm_groups=32: the file says 16; leave it out"
    file = write_ldm(tmp_path / "x.ckpt", golden("ldm")[1], None)
    assert refusal(file, tmp_path / "x", norm_groups=16, head_channels=16).startswith(
        "norm_groups=16: an LDM U-Net always"
    )


def made_run(folder: Path, config: RunConfig) -> Run:
    """Write a run of random weights."""
    run = Run.create(folder, config)
    state = dict(build_denoiser(config).state_dict())
    save_checkpoint(
        run.checkpoints,
        Checkpoint(model=state, ema=state, optimizer={}, state={"step": 5, "score": None, "config": config}),
    )
    return run


def test_an_imported_run_keeps_its_sampler_through_export(tmp_path: Path) -> None:
    run = imported("edm", tmp_path)
    own = SamplingConfig(solver="dpm++", order=2, calls=12, spacing="edm", sigma_min=0.01, guidance_interval=(0.1, 1.0))
    run = made_run(tmp_path / "changed", dataclasses.replace(run.config(), sampling=own))
    again = import_published(export_published(run, tmp_path / "x.safetensors"), tmp_path / "again")
    assert again.config().sampling == own
    run = made_run(
        tmp_path / "vp", dataclasses.replace(imported("ncsnpp", tmp_path, replace=True).config(), sampling=own)
    )
    again = import_published(export_published(run, tmp_path / "x.pth"), tmp_path / "vp-again", size=(16, 16))
    assert again.config().sampling == own


def test_a_sampler_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    weights = golden("ncsnpp")[1]
    arguments = {"sigma_edges": [1.0, 2.0], "norm_groups": 16, "sampling": {"solver": "of-a-later-release"}}
    file = write_score_sde(tmp_path / "x.pth", weights, weights, arguments=arguments)
    with pytest.warns(UserWarning, match=r"the sampling settings of the file are left out: .*of-a-later-release"):
        run = import_published(file, tmp_path / "run", size=(16, 16))
    assert run.config().sampling == PAPER["ncsnpp"].sampling


def test_what_does_not_go_together_is_named(tmp_path: Path) -> None:
    out, weights = tmp_path / "run", golden("edm")[1]
    file = write_edm(tmp_path / "edm.pkl", weights)
    assert refusal(file, out, base=preset("cifar10-dpm")).startswith(
        "holds a network of family 'ddpmpp' with its published preconditioning, but the preset 'cifar10-dpm' is for family"
    )
    assert refusal(file, out, base=preset("cifar10-edm-separate")).startswith("holds a network of family 'ddpmpp'")
    assert refusal(file, out, size=(32, 32)).startswith("size=(32, 32): the tensor names give 16 x 16")
    assert refusal(file, out, head_channels=16).startswith(
        "head_channels=16: a network of family 'ddpmpp' has one head"
    )
    file = write_score_sde(tmp_path / "x.pth", golden("ncsnpp")[1], None)
    assert refusal(file, out, size=(0, 16)).startswith("size=0x16: height and width must be positive")
    file = write_ldm(tmp_path / "x.ckpt", golden("ldm")[1], None)
    assert "head_channels=48 does not divide" in refusal(file, out, head_channels=48)
    file = write_ldm(tmp_path / "x.ckpt", golden("ldm")[1] | {"label_emb.weight": torch.zeros(10, 128)}, None)
    assert "is class-conditional (num_classes), see label_emb.weight" in refusal(file, out, head_channels=16)


@pytest.mark.parametrize("name", ["ncsnpp", "edm"])
def test_the_groups_of_the_original_code_are_kept(name: str, tmp_path: Path) -> None:
    if name == "ncsnpp":  # its own one-stage code
        file = write_score_sde(tmp_path / "x.pth", one_stage("ncsnpp", golden("ncsnpp")[1]), golden_average("ncsnpp"))
    else:  # widths at which the groups differ
        config = NetworkConfig.of(
            family="ddpmpp",
            encoder_width=32,
            decoder_widths=(32,),
            channel_mult=(4,),
            blocks_per_level=1,
            attention_factors=(),
            norm_groups=32,
        )
        weights = published_state(build_network(config).state_dict(), config, (16, 16))
        file = write_edm(tmp_path / "x.pkl", weights, groups=32)
    run = import_published(file, tmp_path / "run", size=(16, 16))
    norms = [module for module in run.denoiser().modules() if isinstance(module, nn.GroupNorm)]
    assert all(norm.num_groups == min(norm.num_channels // 4, 32) for norm in norms)
    assert any(norm.num_groups > 16 for norm in norms)
    file = export_published(run, tmp_path / f"again.{SUFFIX[name]}")
    again = import_published(file, tmp_path / "again", size=(16, 16))
    assert again.config().network == run.config().network
    assert run.config().network.norm_groups == 32


def golden_average(name: str) -> Weights:
    return one_stage(name, averaged(golden(name)[1]))


def test_an_existing_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    run = imported("edm", tmp_path, 1)
    with pytest.raises(ValueError, match=r"exists; .*--replace"):
        imported("edm", tmp_path, 1)
    assert imported("edm", tmp_path, 1, replace=True).path == run.path


@pytest.mark.parametrize("replace", [False, True])
def test_an_import_that_failed_leaves_what_was_there(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = imported("edm", tmp_path, 1) if replace else None
    kept = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync_tree", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
            imported("edm", tmp_path, 1, replace=replace)
    found = sorted(tmp_path.rglob("*"))
    assert found == kept if replace else [p.is_dir() for p in found] == [False]  # the published file alone
    assert before is None or before.checkpoint("latest").name == "step_00000000"


def test_an_imported_run_without_its_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    run = imported("edm", tmp_path, 1)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(UserError, match="was imported, but has no checkpoint; import it again"):
        resume(run.path, {"data.source": "digits", "training.steps": 1}, device="cpu")


@pytest.mark.parametrize("name", ["ncsnpp", "ldm"])
def test_without_an_average_the_model_stands_for_it(name: str, tmp_path: Path) -> None:
    weights = golden(name)[1]
    write_file = write_score_sde if name == "ncsnpp" else write_ldm
    file = write_file(tmp_path / "file", weights, None)
    with pytest.warns(UserWarning, match="holds no EMA weights; the EMA starts from the model's weights"):
        run = import_published(file, tmp_path / "run", size=SIZES[name], head_channels=16 if name == "ldm" else None)
    model, average = tensors(run, "model"), tensors(run, "ema")
    assert all(torch.equal(model[key], average[key]) for key in model)


# --- latents


def vq() -> tuple[object, Weights]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        num_vq_embeddings=16,
        norm_num_groups=32,
    ).eval()
    return model, {f"first_stage_model.{name}": value for name, value in compvis_weights(model).items()}


def test_a_first_stage_becomes_the_run_s_codec(tmp_path: Path) -> None:
    model, state = vq()
    weights = golden("ldm")[1]
    file = write_ldm(tmp_path / "model.ckpt", weights, weights, state=state | {"scale_factor": torch.tensor(0.25)})
    run = import_published(file, tmp_path / "run", size=(8, 8), head_channels=16)
    config = run.config()
    assert config.codec.source == str((tmp_path / "run" / "codec").resolve())
    assert (config.codec.scale, config.codec.shape, config.data.shape) == (0.25, (3, 8, 8), (3, 16, 16))
    assert not any("first_stage" in key for key in tensors(run, "model"))
    from multistage_diffusion.latent.codecs import open_codec

    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(latents).sample  # type: ignore[attr-defined]
    assert torch.equal(open_codec(config.codec).decode(latents), expected)
    images = sample(run, 2, sampling=FEW, device="cpu")
    assert images.shape == (2, 3, 16, 16)
    again = import_published(export_published(run, tmp_path / "x.ckpt"), tmp_path / "again", size=(8, 8))
    assert again.config().codec.scale == 0.25


def test_a_codec_that_cannot_be_used_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = vq()
    weights = golden("ldm")[1]
    file = write_ldm(tmp_path / "model.ckpt", weights, weights, state=state)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.warns(UserWarning, match=r"the codec is left out: a latent codec needs diffusers: pip install"):
        run = import_published(file, tmp_path / "run", size=(8, 8), head_channels=16)
    assert not (run.path / "codec").exists()
    assert run.config().codec.source == ""  # not another codec of as many channels
    assert (run.config().codec.shape, run.config().data.shape) == ((3, 8, 8), (3, 16, 16))  # the file's, of two levels
    assert import_published(file, tmp_path / "b", base=PAPER["ldm"], head_channels=16).config().codec.source == ""


def test_a_codec_is_named_by_the_file_or_by_the_user_alone(tmp_path: Path) -> None:
    weights = golden("ldm")[1]
    file = write_ldm(tmp_path / "model.ckpt", weights, weights)
    codec = import_published(file, tmp_path / "a", head_channels=16).config().codec
    assert (codec.source, codec.shape, codec.scale) == ("", (3, 64, 64), 1.0)
    assert (
        import_published(file, tmp_path / "b", base=PAPER["ldm"], head_channels=16).config().codec == PAPER["ldm"].codec
    )
    with pytest.raises(UserError, match=r"codec.source is empty: name an autoencoder \(--codec"):
        sample(tmp_path / "a", 1, sampling=FEW, device="cpu")


def test_a_kl_first_stage_becomes_the_run_s_codec(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=3,
        norm_num_groups=32,
    ).eval()
    state = {f"first_stage_model.{name}": value for name, value in compvis_weights(model).items()}
    weights = golden("ldm")[1]
    file = write_ldm(tmp_path / "model.ckpt", weights, weights, state=state | {"scale_factor": torch.tensor(0.25)})
    run = import_published(file, tmp_path / "run", size=(8, 8), head_channels=16)
    from multistage_diffusion.latent.codecs import open_codec

    config = run.config()
    assert (config.codec.scale, config.codec.shape, config.data.shape) == (0.25, (3, 8, 8), (3, 16, 16))
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(open_codec(config.codec).decode(latents), model.decode(latents).sample)
    assert json.loads((run.path / "codec" / "config.json").read_text())["scaling_factor"] == 0.25


def test_tensors_of_other_networks_are_warned_of(tmp_path: Path) -> None:
    weights = golden("ldm")[1]
    state = {"cond_stage_model.embedding.weight": torch.zeros(3), "cond_stage_model.bias": torch.zeros(3)}
    file = write_ldm(tmp_path / "model.ckpt", weights, weights, state=state)
    with pytest.warns(
        UserWarning, match=r"2 tensors of other networks are left out \(cond_stage_model.embedding.weight"
    ):
        import_published(file, tmp_path / "run", size=(8, 8), head_channels=16)


@pytest.mark.parametrize(("start", "end", "power"), [(0.0015, 0.0195, 2), (0.0015, 0.0155, 2), (0.0001, 0.02, 1)])
def test_betas_decide_the_schedule_and_stages_stay_at_their_steps(
    start: float, end: float, power: int, tmp_path: Path
) -> None:
    weights = golden("ldm")[1]
    betas = torch.linspace(start ** (1 / power), end ** (1 / power), 1000, dtype=torch.float64) ** power
    file = write_ldm(tmp_path / "model.ckpt", weights, weights, state={"betas": betas.float()})
    diffusion = (config := import_published(file, tmp_path / "run", size=(8, 8), head_channels=16).config()).diffusion
    spacing = "sqrt" if power == 2 else "linear"
    assert diffusion.schedule == Discrete(beta_start=start, beta_end=end, spacing=spacing)
    assert [diffusion.schedule.edge_time(edge) for edge in config.stages.interior] == [442, 631]
    assert to_dict(diffusion.prior)["schedule"] == to_dict(diffusion.schedule)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    weights, ldm = golden("ldm")[1], {"size": (8, 8), "head_channels": 16}
    file, out = tmp_path / "x.ckpt", tmp_path / "run"
    for state, words in (
        ({"betas": torch.tensor(0.1)}, "betas has shape []; a schedule has a number for every step"),
        ({"scale_factor": torch.ones(2)}, "scale_factor has shape [2], not one number"),
        ({"scale_factor": torch.tensor(-1.0)}, "scale_factor=-1.0 must be positive and finite, or 'config'"),
    ):
        assert refusal(write_ldm(file, weights, weights, state=state), out, **ldm) == words
    for name in ("head_channels", "norm_groups", "encoder_depth", "classes"):
        assert refusal(file, out, **{name: 0}).startswith(f"{name}=0 must be a positive whole number")
    assert (
        refusal(file, out, size=(8, 8), head_channels=5)
        == "head_channels=5 does not divide 32 channels that attend; use 32"
    )
    for settings, words in (
        ({"num_head_channels": 8.5}, "num_head_channels=8.5 must be a positive whole number"),
        ({"num_head_channels": float("nan")}, "num_head_channels=nan must be a positive whole number"),
        ({"num_head_channels": 5}, "num_head_channels=5 does not divide 32 channels that attend; use 32"),
        ({"num_head_channels": 16, "sigma_edges": "x"}, "sigma_edges='x' must be a list"),
    ):
        file = write_ldm(tmp_path / "y.ckpt", weights, weights, hyper_parameters=settings)
        assert refusal(file, out, size=(8, 8)) == words
    for settings, words in (
        ({"dropout": 2.0}, "dropout=2.0 must be in [0, 1)"),
        ({"sigma_data": -1}, "sigma_data=-1 must be in [1e-6, 1e6]; scale the data"),
    ):
        file = write_edm(tmp_path / "x.pkl", golden("edm")[1], kwargs=settings)
        assert refusal(file, out) == words
    file = write_edm(tmp_path / "x.pkl", golden("edm")[1], kwargs={"dropout": "much"})
    assert refusal(file, out) == "dropout='much' must be a number"


def test_other_betas_are_refused(tmp_path: Path) -> None:
    weights = golden("ldm")[1]
    file = write_ldm(tmp_path / "x.ckpt", weights, weights, state={"betas": torch.rand(1000) / 100 + 1e-4})
    assert "betas" in refusal(file, tmp_path / "run", size=(8, 8), head_channels=16)


# --- export


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network.separate": True}, "it cannot be exported"),
        ({"codec.source": "identity"}, "it cannot be exported"),
        ({"diffusion.precondition": "velocity", "network.family": "ncsnpp"}, "with precondition 'velocity'"),
    ],
)
def test_a_run_without_a_published_layout_is_not_exported(
    changes: dict[str, object], words: str, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = override(tiny_config(), changes)
    run = Run.create(tmp_path / "run", config)
    saved = {"step": 0, "score": None, "config": config}
    save_checkpoint(run.checkpoints, Checkpoint(model={}, ema={}, optimizer={}, state=saved))
    with pytest.raises(ValueError, match=words):
        export_published(run, tmp_path / "x.safetensors")


def test_a_checkpoint_that_is_not_of_its_run_s_network_is_not_exported(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config()
    run = Run.create(tmp_path / "run", config)
    state = build_denoiser(config).state_dict()
    other = tiny_config(network__blocks_per_level=2)
    for saved_with, words in ((other, "network was edited since step 0"), (config, "model.safetensors")):
        saved = {"step": 0, "score": None, "config": saved_with}
        damaged = {name: value for name, value in state.items() if "conv_in" not in name}
        save_checkpoint(run.checkpoints, Checkpoint(model=damaged, ema=damaged, optimizer={}, state=saved))
        with pytest.raises(UserError, match=words):
            export_published(run, tmp_path / "x.safetensors")


def test_files_are_named_after_their_layout_and_kept(shared: Callable[..., Run], tmp_path: Path) -> None:
    run = shared("edm", 1)
    with pytest.raises(ValueError, match=r"x.pth: family 'ddpmpp' is written as .safetensors; give that suffix"):
        export_published(run, tmp_path / "x.pth")
    file = export_published(run, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: exists; .*--overwrite"):
        export_published(run, file)
    assert export_published(run, file, overwrite=True) == file


# --- commands


def test_the_commands_import_and_export(
    shared: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shared("ncsnpp", None)
    Export(run_folder=run.path, out=tmp_path / "x.pth").run()
    written, groups, intervals = capsys.readouterr().out.splitlines()
    assert written == f"written: {tmp_path / 'x.pth'}"
    assert groups.endswith("model.group = 16")
    assert intervals.endswith("model.stage_interval = [[[0.0, 0.442]], [[0.442, 0.631]], [[0.631, 1.0]]]")
    again = Import(file=tmp_path / "x.pth", out=tmp_path / "again", preset="cifar10-dpm-table7-2", size=(16, 16))
    again.run()
    printed = capsys.readouterr().out
    assert "again (ncsnpp, encoder 16, decoders 24, 16, 8)\nstage 1 | 2: sigma = 2.51" in printed
    assert same(run, Run.open(tmp_path / "again"))
    dataclasses.replace(again, replace=True, json=True).run()
    assert json.loads(capsys.readouterr().out)["decoder_widths"] == [24, 16, 8]
