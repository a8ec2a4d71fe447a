"""Published transformers become runs and come back: golden files of the original code, and folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_transformers import folder_of, golden, heads, written
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from multistage_diffusion import cli
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.latent.codecs import open_codec
from multistage_diffusion.stage_finding import StageResult
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.auto_from import config_from_run
from multistage_diffusion.workflow.export import export_published
from multistage_diffusion.workflow.import_run import import_published

FAMILIES = {"dit": "dit", "uvit": "uvit", "uvit_classes": "uvit"}  # golden file: family


def output(run: Run, case: dict[str, Tensor]) -> Tensor:
    network = run.denoiser().network
    classes, labels = network.config.num_classes, case.get("y")
    told = Conditioning(labels=None if labels is None else labels.where(labels < classes, -1))
    with torch.no_grad():
        return network(case["x"], case["t"], [3], told)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_published_file_is_a_run_that_computes_the_same(name: str, tmp_path: Path) -> None:
    settings, _, case = golden(name)
    run = import_published(written(tmp_path, name), tmp_path / "run", head_channels=heads(settings))
    config = run.config()
    assert config.network.family == FAMILIES[name]
    assert config.network.num_classes == {"dit": 6, "uvit": 0, "uvit_classes": 6}[name]
    assert config.input_shape == case["x"].shape[1:]
    assert config.codec.used == (name != "uvit")  # four channels: latents of Stable Diffusion's autoencoder
    torch.testing.assert_close(output(run, case), case["out"][:, : case["x"].shape[1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_weights_are_those_of_the_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings, weights, _ = golden(name)
    run = import_published(written(tmp_path, name), tmp_path / "run", head_channels=heads(settings))
    out = tmp_path / f"again{'.pt' if name == 'dit' else '.pth'}"
    assert cli.main(["export", str(run.path), "--out", str(out)]) == 0
    content = torch.load(out, weights_only=True)
    found = content["ema"] if name == "dit" else content
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items() if key != "pos_embed" or name != "dit")
    torch.testing.assert_close(found["pos_embed"], weights["pos_embed"], rtol=0, atol=1e-6)
    again = import_published(out, tmp_path / "again", head_channels=heads(settings))
    ours, theirs = (r.denoiser().state_dict() for r in (again, run))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_of_a_training_has_model_and_average(tmp_path: Path) -> None:
    settings, weights, _ = golden("dit")
    average = {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}
    average["pos_embed"] = weights["pos_embed"]
    file = written(tmp_path, "dit", {"model": weights, "ema": average, "opt": {}, "args": None})
    run = import_published(file, tmp_path / "run", head_channels=heads(settings), encoder_depth=2)
    assert (run.config().network.encoder_depth, run.config().network.decoder_depths) == (2, (1,))
    model, ema = (run.denoiser("best", part).state_dict() for part in ("model", "ema"))
    assert all(torch.equal(ema[key], value + 1) for key, value in model.items())


def test_outputs_for_a_learnt_variance_are_dropped_on_request(tmp_path: Path) -> None:
    settings, _, case = golden("dit")
    file = written(tmp_path, "dit")
    run = import_published(file, tmp_path / "run", head_channels=heads(settings), drop_sigma=True)
    assert not run.config().network.learned_sigma
    torch.testing.assert_close(output(run, case), case["out"][:, :4], rtol=0, atol=1e-5)


def photos(place: Path, size: tuple[int, int], classes: int) -> Path:
    """Write a folder of noise images, four of each class."""
    generator = np.random.default_rng(0)
    for i in range(4 * classes):
        folder = place / "photos" / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return place / "photos"


def autoencoder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random autoencoder with the shapes of Stable Diffusion's latents: 4 channels, sides divided by 8."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        **changes,
    ).save_pretrained(folder)
    return folder


FEW = ["training.steps=2", "training.batch=6", "training.held_out_rows=4", "training.held_out_every=0"]
FEW += ["training.sample_every=0", "training.precision=fp32", "optimizer.lr=1e-6", "optimizer.warmup_steps=0"]


def require_trained_on_the_trunk(run: Run, imported: Run, case: dict[str, Tensor], copies: int) -> None:
    """Check that the first decoders still compute what the file does, although trained a little, and the trunk's bits."""
    ours, theirs = run.denoiser("latest", "model").network, imported.denoiser().network
    trunk = theirs.encoders.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in ours.encoders.state_dict().items())
    decoder = theirs.decoders[0].state_dict()
    classes, labels = ours.config.num_classes, case.get("y")
    told = Conditioning(labels=None if labels is None else labels.where(labels < classes, -1))
    expected = case["out"][:, : case["x"].shape[1]]
    for stage in range(copies):
        own = ours.decoders[stage].state_dict()
        assert any(not torch.equal(value, decoder[key]) for key, value in own.items())
        rows = [0] * len(ours.decoders)
        rows[stage] = len(case["x"])
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(case["x"], case["t"], rows, told), expected, rtol=0, atol=1e-3)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_two_commands_give_a_published_trunk_on_latents_decoders_of_its_own(tmp_path: Path) -> None:
    """Import, and train three decoders on the frozen encoder: one of another width."""
    settings, _, case = golden("dit")
    codec, images = autoencoder(tmp_path / "codec"), photos(tmp_path, (70, 64), 6)
    imported, out = tmp_path / "imported", tmp_path / "three"
    file, heads_ = written(tmp_path, "dit"), ["--head-channels", str(heads(settings))]
    assert cli.main(["import", str(file), "--out", str(imported), "--encoder-depth", "2", *heads_]) == 0
    train = ["train", str(images), "--init-from", str(imported), "--codec", str(codec), "--out", str(out)]
    widths = "network.decoder_widths=[32,32,16]"
    assert cli.main([*train, "--set", "training.freeze=encoder", widths, *FEW]) == 0
    config = Run.open(out).config()
    assert (config.codec.scale, config.codec.shape, config.codec.source) == (0.18215, (4, 8, 8), str(codec))
    assert (len(config.stages), config.network.decoder_depths, config.data.shape) == (3, (1, 1, 1), (3, 64, 64))
    require_trained_on_the_trunk(Run.open(out), Run.open(imported), case, copies=2)


@pytest.mark.usefixtures("own_cache")
def test_stages_of_the_latents_that_a_published_network_knows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings, _, case = golden("dit")
    codec, images = autoencoder(tmp_path / "codec"), photos(tmp_path, (70, 64), 6)
    imported, out = tmp_path / "imported", tmp_path / "two"
    import_published(written(tmp_path, "dit"), imported, head_channels=heads(settings), encoder_depth=2)
    even = ["--algorithm", "timestep", "--stages", "2", "--codec", str(codec)]
    own, ours = tmp_path / "own.json", tmp_path / "stages.json"
    train = ["train", str(images), "--init-from", str(imported), "--codec", str(codec), "--out", str(out)]
    train += ["--set", "training.freeze=encoder", *FEW]

    assert cli.main(["stages", str(images), *even, "--size", "64", "64", "--out", str(own)]) == 0
    assert abs(StageResult.load(own).scale / 0.18215 - 1) > 0.01
    capsys.readouterr()
    assert cli.main([*train, "--stages", str(own)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"so run msdiff stages DATA --run {imported} --codec {codec}" in said

    assert cli.main(["stages", str(images), "--run", str(imported), *even, "--out", str(ours)]) == 0
    assert StageResult.load(ours).scale == 0.18215
    assert cli.main([*train, "--stages", str(ours)]) == 0
    config = Run.open(out).config()
    assert config.stages.interior == StageResult.load(ours).edges_sigma
    assert config.codec.scale == 0.18215
    require_trained_on_the_trunk(Run.open(out), Run.open(imported), case, copies=2)


def test_commands_give_a_published_trunk_on_pixels_decoders_of_its_own(tmp_path: Path, capsys) -> None:
    settings, _, case = golden("uvit")
    images, imported, out = photos(tmp_path, (8, 10), 1), tmp_path / "imported", tmp_path / "two"
    file, heads_ = written(tmp_path, "uvit"), ["--head-channels", str(heads(settings))]
    assert cli.main(["import", str(file), "--out", str(imported), *heads_]) == 0
    stages = ["stages", str(images), "--run", str(imported), "--algorithm", "timestep", "--stages", "2"]
    assert cli.main([*stages, "--out", str(tmp_path / "stages.json")]) == 0
    train = ["train", str(images), "--init-from", str(imported), "--stages", str(tmp_path / "stages.json")]
    assert cli.main([*train, "--out", str(out), "--set", "training.freeze=encoder", *FEW]) == 0
    assert Run.open(out).config().stages.interior == StageResult.load(tmp_path / "stages.json").edges_sigma
    require_trained_on_the_trunk(Run.open(out), Run.open(imported), case, copies=2)
    assert cli.main([*stages, "--codec", "codec", "--out", str(tmp_path / "other.json")]) == 2
    assert "is on pixels; leave it out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("transformer/config.json", '{"_class_name": ["DiTTransformer2DModel"]}', "no config.json of a U-Net"),
        ("scheduler/scheduler_config.json", "[1]", "is no mapping"),
        ("vae/config.json", "[1]", "is no mapping"),
        ("vae/config.json", '{"scaling_factor": true}', "scaling_factor=True must be a positive number"),
        ("vae/config.json", '{"shift_factor": "0.1"}', "shift_factor='0.1' must be a finite number"),
        ("vae/config.json", '{"latent_channels": 16}', "latent_channels=16, but the network has 4 channels"),
        ("vae/config.json", '{"block_out_channels": 8}', "block_out_channels=8 must be a list of widths"),
        ("vae/config.json", '{"shift_factor": NaN}', "shift_factor=nan must be a finite number"),
        ("scheduler/scheduler_config.json", '{"rescale_betas_zero_snr": true}', "rescale_betas_zero_snr=True: changes"),
        ("scheduler/scheduler_config.json", '{"trained_betas": [0.1, 0.2]}', r"trained_betas=\[0.1, 0.2\]: changes"),
    ],
)
def test_a_damaged_file_of_a_folder_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        import_published(folder, tmp_path / "run")


@pytest.mark.parametrize("name", ["num_layers", "num_embeds_ada_norm", "in_channels", "num_attention_heads"])
def test_a_config_that_contradicts_the_weights_is_refused(name: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: 7}))
    with pytest.raises(UserError, match=f"config.json: {name}=7, but the weights have"):
        import_published(folder, tmp_path / "run")


def test_the_levels_of_an_autoencoder_give_the_size_of_images(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text('{"latent_channels": 4, "block_out_channels": [8, 8, 8]}')
    assert import_published(folder, tmp_path / "run").config().data.shape == (3, 32, 32)


@pytest.mark.slow
def test_a_folder_of_diffusers_is_a_run_that_computes_the_same(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "published")
    run = import_published(folder, tmp_path / "run", encoder_depth=2)
    network = run.config().network
    assert (network.freq_shift, network.norm_eps, network.size, network.head_channels) == (1.0, 1e-5, (8, 8), 16)
    x, steps, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
    with torch.no_grad():
        expected = model(x, timestep=steps, class_labels=labels).sample[:, :4]
    found = output(run, {"x": x, "t": steps.float(), "y": labels})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"network.freq_shift=1.0: the published code has 0.0 only"):
        export_published(run, tmp_path / "x.pt")


def as_published(folder: Path, **changes: Any) -> None:
    """Rewrite a folder's transformer as facebook/DiT-XL-2-256 has it: the class's former name, an archive of torch."""
    config, weights = (folder / "transformer" / f for f in ("config.json", "diffusion_pytorch_model.safetensors"))
    told = json.loads(config.read_text()) | {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    config.write_text(json.dumps(told | changes))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_folder_as_it_was_published_is_read_like_todays(part: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    today = import_published(folder / part, tmp_path / "today")
    as_published(folder)
    run = import_published(folder / part, tmp_path / "run")
    assert run.config().network == today.config().network
    ours, theirs = (r.denoiser().state_dict() for r in (run, today))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_autoencoder_in_an_archive_of_torch_is_kept_in_the_run(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    vae = autoencoder(folder / "vae")
    today = import_published(folder, tmp_path / "today").config()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = open_codec(today.codec).encode(images)
    weights = vae / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    codec = import_published(folder, tmp_path / "run").config().codec
    assert (codec.source, codec.subfolder, codec.scale) == (str(tmp_path / "run" / "codec"), "", today.codec.scale)
    assert torch.equal(open_codec(codec).encode(images), expected)
    weights.with_suffix(".bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model.bin: "):
        import_published(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_transformers_and_missing_weights_are_named(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    as_published(folder, norm_type="ada_norm_single")
    with pytest.raises(UserError, match=r"_class_name='Transformer2DModel' with norm_type='ada_norm_single': of trans"):
        import_published(folder, tmp_path / "run")
    config = folder / "transformer" / "config.json"
    config.write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(UserError, match="_class_name='SD3Transformer2DModel': of transformers only"):
        import_published(folder, tmp_path / "run")
    config.write_text('{"_class_name": "DiTTransformer2DModel"}')
    (config.parent / "diffusion_pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin: "):
        import_published(folder, tmp_path / "run")
    (config.parent / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds none of diffusion_pytorch_model.safetensors, "):
        import_published(folder, tmp_path / "run")


@pytest.mark.parametrize(("said", "shift"), [({"scaling_factor": 0.5, "shift_factor": 0.25}, 0.25), ({}, 0.0)])
def test_the_autoencoder_of_a_folder_gives_scale_and_shift_and_another_keeps_them(
    said: dict[str, float], shift: float, tmp_path: Path
) -> None:
    folder, _ = folder_of(tmp_path / "published", rescale_betas_zero_snr=False, trained_betas=None)
    vae, other = autoencoder(folder / "vae", **said), autoencoder(tmp_path / "other", seed=1)
    run = import_published(folder, tmp_path / "run")
    codec, scale = run.config().codec, said.get("scaling_factor", 0.18215)
    assert (codec.source, codec.subfolder, codec.scale, codec.shift) == (str(folder), "vae", scale, shift)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(vae).encode(x).latent_dist.mean
    torch.testing.assert_close(open_codec(codec).encode(x), expected - shift)

    changes = {"stages.interior": (0.5,), "network.decoder_widths": (32, 32)}
    same, new = (
        config_from_run(str(run.path), "photos", {**changes, "codec.source": str(source)}).config.codec
        for source in (folder, other)
    )
    assert (same.source, same.subfolder, same.scale, same.shift) == (str(folder), "vae", scale, shift)
    assert (new.source, new.subfolder, new.scale, new.shift) == (str(other), "", scale, shift)


@pytest.mark.slow
def test_unequal_embedders_and_other_noise_are_refused(tmp_path: Path) -> None:
    folder, model = folder_of(tmp_path / "published")
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[3, 4] += 1
    model.save_pretrained(folder / "transformer")
    with pytest.raises(UserError, match=r"transformer_blocks.2.norm1.emb.* is not that of block 0"):
        import_published(folder, tmp_path / "run")
    other, _ = folder_of(tmp_path / "other", prediction_type="v_prediction")
    with pytest.raises(UserError, match="prediction_type='v_prediction': only 'epsilon' is imported"):
        import_published(other, tmp_path / "run")
    (other / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.safetensors: is truncated or damaged"):
        import_published(other, tmp_path / "run")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    settings, weights, _ = golden("dit")
    lacking = {key: value for key, value in weights.items() if key != "blocks.1.attn.proj.bias"}
    file = written(tmp_path, "dit", lacking)
    with pytest.raises(UserError, match=r"1 missing \(blocks.1.attn.proj.bias\)"):
        import_published(file, tmp_path / "run", head_channels=heads(settings))
    file = written(tmp_path, "dit")
    with pytest.raises(
        UserError, match=r"head_channels=5 does not divide the width 32 .*; give another --head-channels"
    ):
        import_published(file, tmp_path / "run", head_channels=5)
    with pytest.raises(UserError, match=r"head_channels=64 \(assumed\) does not divide the width 32"):
        import_published(file, tmp_path / "run")
    with pytest.raises(UserError, match="encoder_depth=3 of 3 blocks must leave some"):
        import_published(file, tmp_path / "run", head_channels=heads(settings), encoder_depth=3)
    settings, weights, _ = golden("uvit_classes")
    weights["label_emb.weight"] = torch.zeros(10, 32)
    file = written(tmp_path, "uvit_classes", weights)
    with pytest.raises(UserError, match=r"has 10 rows; give --classes 9 if the last of them stands for no label"):
        import_published(file, tmp_path / "run", head_channels=heads(settings))
    run = import_published(file, tmp_path / "run", head_channels=heads(settings), classes=9)
    assert run.config().network.num_classes == 9
    with pytest.raises(UserError, match="encoder_depth=2: a U-ViT is divided at its middle, after 1 blocks"):
        import_published(file, tmp_path / "other", head_channels=heads(settings), classes=9, encoder_depth=2)
    with pytest.raises(
        UserError, match=r"size=\(8, 8\): has no meaning for .* U-ViT \(\.pth\): its file tells its size"
    ):
        import_published(file, tmp_path / "other", size=(8, 8))
    weights["patch_embed.proj.weight"] = torch.zeros(1152, 4, 2, 2)
    file = written(tmp_path, "uvit_classes", weights)
    with pytest.raises(UserError, match=r"is U-ViT-H for latents \(width 1152\): .* not imported"):
        import_published(file, tmp_path / "other", classes=9)
    assert not (tmp_path / "other").exists()


def test_what_the_published_code_cannot_read_is_not_exported(tmp_path: Path, tiny_config, tiny_data) -> None:
    changes = {"network__head_channels": 4, "network__family": "uvit", "network__encoder_depth": 1}
    changes |= {"network__size": (4, 4)}
    several = Run.create(tmp_path / "three", tiny_config(**changes))
    Trainer(several, tiny_data(), device="cpu").save()
    with pytest.raises(UserError, match=r"is written as \.pth; give that suffix"):
        export_published(several, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"diffusion.precondition=edm: networks in the layout of U-ViT"):
        export_published(several, tmp_path / "x.pth")
    prior = {"kind": "uniform-time", "schedule": {"kind": "vp"}}
    changes |= {"diffusion": {"precondition": "vp-eps", "schedule": {"kind": "vp"}, "prior": prior}}
    several = Run.create(tmp_path / "vp", tiny_config(**changes))
    Trainer(several, tiny_data(), device="cpu").save()
    with pytest.raises(UserError, match=r"published with one stage .* not with decoder widths \[12, 8, 4\]"):
        export_published(several, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_options_of_transformers_are_refused_elsewhere(tmp_path: Path) -> None:
    save_file({"net.model.enc.x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="encoder_depth=2: has no meaning for what is not a transformer"):
        import_published(tmp_path / "x.safetensors", tmp_path / "run", encoder_depth=2)
