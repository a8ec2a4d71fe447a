"""Files of transformers that would be read as another network are refused, and networks that would be written as another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_transformers import folder_of, golden, heads, written

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets.layouts import require_published
from multistage_diffusion.workflow.import_run import import_published


@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_decoders_with_other_heads_than_the_encoder_are_not_exported(family: str) -> None:
    settings: dict[str, Any] = {"encoder_width": 32, "decoder_widths": (32,), "head_channels": 16}
    require_published(NetworkConfig.of(family, **settings, decoder_head_channels=(16,)))
    with pytest.raises(
        UserError, match=r"decoder_head_channels=\(8,\): the published code has the heads of the encoder"
    ):
        require_published(NetworkConfig.of(family, **settings, decoder_head_channels=(8,)))


def test_learnt_positions_belong_to_a_grid() -> None:
    def settings(size: tuple[int, int]) -> dict[str, object]:
        return NetworkConfig.of(
            "uvit", encoder_width=16, decoder_widths=(16,), head_channels=4, size=size
        ).functional_settings()

    assert settings((8, 8)) == settings((7, 8))  # padded to the same patches
    assert settings((8, 8)) != settings((4, 16))


def test_other_positions_and_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    config, weights, _ = golden("dit")
    other = {**weights, "pos_embed": torch.randn(weights["pos_embed"].shape)}
    with pytest.raises(UserError, match="pos_embed holds other positions"):
        import_published(written(tmp_path, "dit", other), tmp_path / "run", head_channels=heads(config))
    name = next(name for name in weights if name.endswith("qkv.weight"))
    whole = {**weights, name: weights[name].to(torch.int64)}
    with pytest.raises(UserError, match=r"is of torch\.int64: only weights of float16, bfloat16, float32, float64"):
        import_published(written(tmp_path, "dit", whole), tmp_path / "run", head_channels=heads(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": None}, "norm_eps=None must be a number"),
        ({"norm_eps": "small"}, "norm_eps='small' must be a number"),
        ({"patch_size": 4}, "patch_size=4, but the weights have 2"),
        ({"num_attention_heads": 7}, "num_attention_heads=7, but the weights have "),
        ({"in_channels": 3}, "in_channels=3, but the weights have 4"),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_its_weights_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = folder_of(tmp_path / "published", rescale_betas_zero_snr=False, trained_betas=None)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError) as error:
        import_published(folder, tmp_path / "run")
    assert message in str(error.value)


def test_options_of_users_in_a_foreign_configuration_are_no_options(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published", rescale_betas_zero_snr=False, trained_betas=None)
    plain = import_published(folder, tmp_path / "plain").config()
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "encoder_depth": "x", "drop_sigma": True}))
    assert import_published(folder, tmp_path / "run").config().network == plain.network


def test_patches_that_do_not_fill_the_images_are_counted_as_diffusers_counts_them(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published", rescale_betas_zero_snr=False, trained_betas=None)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": 9}))
    theirs = pytest.importorskip("diffusers").DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    run, x = import_published(folder, tmp_path / "run"), torch.randn(2, 4, 8, 8)
    steps, labels = torch.tensor([3.0, 700.0]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = theirs(x, timestep=steps, class_labels=labels).sample[:, :4]
        found = run.denoiser().network(x, steps, [2], Conditioning(labels=labels))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
