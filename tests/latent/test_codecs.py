"""Codecs: the identity, and diffusers' autoencoders from folders and from the hub's cache."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multistage_diffusion.config import CodecConfig
from multistage_diffusion.contracts import Codec
from multistage_diffusion.errors import UserError
from multistage_diffusion.latent.codecs import (
    CONFIG,
    WEIGHTS,
    DiffusersCodec,
    IdentityCodec,
    declared_scale,
    open_codec,
)

diffusers = pytest.importorskip("diffusers")
hub = pytest.importorskip("huggingface_hub")

TINY: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def kl(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**(TINY | {"latent_channels": 2} | changes)).eval()


def vq(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = TINY | {"latent_channels": 3, "num_vq_embeddings": 5} | changes
    return diffusers.VQModel(**settings).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kl().save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def opened(source: Path | str, **settings: Any) -> Codec:
    return open_codec(CodecConfig(source=str(source), **settings))


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# -- scale and shift --------------------------------------------------------------------------------------------------


def test_an_autoencoder_declares_its_scale_and_shift(tmp_path: Path) -> None:
    kl(scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(tmp_path / "vae" / "sub")
    assert declared_scale(CodecConfig(source=str(tmp_path / "vae"), subfolder="sub")) == (0.3611, 0.1159)
    kl(scaling_factor=0.5).save_pretrained(tmp_path / "plain")
    assert declared_scale(CodecConfig(source=str(tmp_path / "plain"))) == (0.5, 0.0)


def test_scales_that_are_not_declared_are_named(tmp_path: Path) -> None:
    config = CodecConfig(source=str(tmp_path / "vae"))
    kl(latents_mean=[0.0, 1.0]).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="declares latents_mean of each channel, which is not supported"):
        declared_scale(config)
    kl().save_pretrained(tmp_path / "vae")
    settings = json.loads((tmp_path / "vae" / "config.json").read_text())
    del settings["scaling_factor"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"declares scaling_factor=None; give codec.scale a number"):
        declared_scale(config)
    with pytest.raises(UserError, match="the identity declares none"):
        declared_scale(CodecConfig(source="identity"))


def test_a_shift_is_taken_off_and_put_back(folder: Path) -> None:
    plain, shifted = opened(folder), opened(folder, shift=0.25)
    images = pixels(2, 1, 4, 6)
    latents = plain.encode(images)
    assert torch.equal(shifted.encode(images), latents - 0.25)
    assert torch.allclose(shifted.decode(latents - 0.25), plain.decode(latents), atol=1e-6)
    assert shifted.fingerprint != plain.fingerprint  # other latents: not those in the cache
    assert shifted.fingerprint == opened(folder, shift=0.25).fingerprint


# -- what codecs do ---------------------------------------------------------------------------------------------------


def test_the_identity_is_a_codec_whose_latents_are_the_pixels() -> None:
    codec = open_codec(CodecConfig(source="identity"))
    assert isinstance(codec, IdentityCodec)
    assert isinstance(codec, Codec)
    x = pixels(2, 3, 4, 6)
    assert torch.equal(codec.encode(x), x)
    assert torch.equal(codec.decode(x), x)
    assert codec.latent_shape((3, 4, 6)) == (3, 4, 6)
    assert codec.encode(x.double()).dtype == torch.float32


def test_a_kl_codec_encodes_to_the_mean_and_decodes_it(folder: Path) -> None:
    codec, model, x = opened(folder), kl(), pixels(3, 1, 8, 12)
    assert isinstance(codec, Codec)
    with torch.no_grad():
        moments = model.quant_conv(model.encoder(x))
        mean = moments[:, :2]  # the other half are log-variances
        image = model.decoder(model.post_quant_conv(mean))
    latents = codec.encode(x)
    torch.testing.assert_close(latents, mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents), image, rtol=0, atol=1e-5)
    assert torch.equal(latents, codec.encode(x))
    assert not latents.requires_grad
    assert not codec.decode(latents.requires_grad_()).requires_grad


def test_a_vq_codec_encodes_before_quantisation_and_decodes_after_it(tmp_path: Path) -> None:
    model, x = vq(), pixels(2, 1, 8, 8)
    with torch.no_grad():
        raw = model.quant_conv(model.encoder(x))
    model.quantize.embedding.weight.data = raw[0, :, 0, :].T.repeat(2, 1)[:5] + 0.01 * pixels(5, 3)
    model.save_pretrained(tmp_path)
    codec = opened(tmp_path)
    latents = codec.encode(x)
    torch.testing.assert_close(latents, raw, rtol=0, atol=1e-6)
    book = model.quantize.embedding.weight.detach()
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = torch.stack([min(book, key=lambda entry: float((row - entry).square().sum())) for row in flat])
    assert len(nearest.unique(dim=0)) > 1
    quantised = nearest.reshape(2, 4, 4, 3).permute(0, 3, 1, 2)
    assert not torch.allclose(quantised, latents)
    with torch.no_grad():
        image = model.decoder(model.post_quant_conv(quantised))
    torch.testing.assert_close(codec.decode(latents), image, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (kl, (1, 8, 12)),
        (lambda: kl(in_channels=3, out_channels=3, latent_channels=5), (3, 6, 4)),
        (vq, (1, 4, 10)),
        (lambda: vq(vq_embed_dim=2), (1, 8, 8)),
        (
            lambda: kl(
                block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
            ),
            (1, 8, 4),
        ),
    ],
)
def test_the_latent_shape_is_that_of_a_latent_and_decodes_to_the_image_shape(
    model: Any, shape: tuple[int, int, int]
) -> None:
    codec = DiffusersCodec(model())
    latents = codec.encode(pixels(2, *shape))
    assert latents.shape == (2, *codec.latent_shape(shape))
    assert codec.decode(latents).shape == (2, *shape)


def test_images_of_other_channels_or_sizes_are_refused(folder: Path) -> None:
    codec = opened(folder)
    with pytest.raises(ValueError, match=r"codec: takes images of 1 channels, not of 3; use a codec"):
        codec.latent_shape((3, 8, 8))
    with pytest.raises(ValueError, match="1 channels, not of 3"):
        codec.encode(pixels(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"multiples of 2, not 7x8; add --size 8 8 --fit pad"):
        codec.latent_shape((1, 7, 8))


# -- fingerprints -----------------------------------------------------------------------------------------------------


def rewrite_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_fingerprint_is_of_configuration_and_weights_alone(folder: Path, tmp_path: Path) -> None:
    own = opened(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    rewrite_config(tmp_path / "copy", _diffusers_version="0.30.0")
    assert opened(tmp_path / "copy", fingerprint=own).fingerprint == own
    rewrite_config(tmp_path / "copy", act_fn="relu")
    assert opened(tmp_path / "copy").fingerprint != own
    tensors = load_file(folder / WEIGHTS)
    tensors["quant_conv.bias"][0] += 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"codec.fingerprint={own} is recorded, but .*codec now has"):
        opened(folder, fingerprint=own)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_class_is_refused_by_name(folder: Path) -> None:
    rewrite_config(folder, _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match="_class_name='AutoencoderTiny'; a codec is one of AutoencoderKL or VQModel"):
        opened(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match="_class_name=None"):
        opened(folder)


def test_only_safetensors_are_read(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"holds no {WEIGHTS}; only safetensors are read"):
        opened(folder)


def test_a_missing_folder_or_configuration_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.source='nowhere': no folder nowhere; give a folder"):
        opened("nowhere")
    with pytest.raises(ValueError, match=r"holds no config.json.*did you mean codec\.subfolder='codec'\?"):
        opened(tmp_path)
    assert opened(tmp_path, subfolder="codec").fingerprint == opened(folder).fingerprint


def test_weights_that_do_not_fit_or_are_damaged_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in tensors.items() if k != "quant_conv.bias"}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder}: .*quant_conv\.bias"):
        opened(folder)
    save_file(tensors | {"quant_conv.bias": torch.zeros(7)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder}: .*quant_conv\.bias"):
        opened(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"^{folder}: cannot be opened as AutoencoderKL \(.*\)$"):
        opened(folder)


@pytest.mark.parametrize(("module", "source"), [("diffusers", ""), ("huggingface_hub", "hf:someone/something")])
def test_a_missing_library_names_the_extra(
    module: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'multistage-diffusion\[hub\]'"):
        opened(source or folder)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library, which is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_codec_in_the_hubs_cache_opens_without_the_network(cache: Path, folder: Path) -> None:
    repository = cache / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40) / "vqvae")
    codec = opened("hf:someone/something", subfolder="vqvae")
    assert codec.fingerprint == opened(folder).fingerprint


def test_a_codec_that_is_not_cached_is_one_clear_line_offline(cache: Path) -> None:
    with pytest.raises(
        ValueError, match=r"codec\.source='hf:someone/something': the Hugging Face hub cannot be reached"
    ):
        opened("hf:someone/something")
    with pytest.raises(ValueError, match=r"codec\.source='hf:no such name': .*Repo id"):
        opened("hf:no such name")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("RepositoryNotFoundError", "no such repository"),
        ("EntryNotFoundError", f"there is no vae/{WEIGHTS} in it; only safetensors are read"),
        ("HfHubHTTPError", "HfHubHTTPError"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    error: str, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(hub.utils, error)

    def download(repository: str, file: str, *, subfolder: str | None, local_files_only: bool = False) -> str:
        assert (repository, subfolder) == ("someone/something", "vae")
        if local_files_only:
            raise hub.utils.LocalEntryNotFoundError("not cached")
        if error == "EntryNotFoundError" and file == CONFIG:
            return str(cache / file)
        raise kind.__new__(kind, f"404: {file}")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(ValueError, match=f"^codec.source='hf:someone/something': .*{said}"):
        opened("hf:someone/something", subfolder="vae")
