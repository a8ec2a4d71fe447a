"""A trained run gets a decoder for each stage: its network and noise, and stages of the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_pipelines import pipeline, trained, unet
from PIL import Image

from multistage_diffusion import cli
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.auto_from import config_from_run
from multistage_diffusion.workflow.import_run import import_published


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """An imported run with one stage, and 40 images of other sizes than its own."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 12, 9, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    folder = pipeline(tmp_path / "theirs", *trained(unet(), 3))
    return import_published(folder, tmp_path / "one").path


def chosen(one: Path, changes: dict[str, Any] | None = None) -> Any:
    return config_from_run(str(one), str(one.parent / "photos"), changes)


def test_network_and_noise_are_those_of_the_run_and_decoders_are_as_wide(one: Path) -> None:
    base, auto = Run.open(one).config(), chosen(one)
    config = auto.config
    assert len(config.stages) == 3
    assert config.network.decoder_widths == (16, 16, 16)
    assert (config.diffusion, config.sampling) == (base.diffusion, base.sampling)
    assert config.network.single_stage(0, 16) == base.network
    assert (config.data.size, config.data.fit) == ((8, 8), "crop")
    assert config.training.init_from == str(one)
    assert "even in VP time" in auto.table()


def test_what_the_user_gives_is_kept(one: Path) -> None:
    config = chosen(one, {"stages.interior": (0.4,), "network.decoder_widths": (32, 16)}).config
    assert config.stages.interior == (0.4,)
    assert config.network.decoder_widths == (32, 16)
    config = chosen(one, {"network.decoder_widths": (16, 16), "training.freeze": "encoder"}).config
    assert len(config.stages) == 2
    assert config.training.freeze == "encoder"
    assert len(chosen(one, {"network.decoder_widths": (16,)}).config.stages) == 1
    with pytest.raises(UserError, match="not a run"):
        chosen(one.parent)


def test_two_commands_give_a_model_three_decoders(one: Path) -> None:
    place = one.parent
    few = ["training.steps=2", "training.batch=6", "training.held_out_rows=4", "training.held_out_every=0"]
    arguments = ["train", str(place / "photos"), "--init-from", str(one), "--out", str(place / "three")]
    assert cli.main([*arguments, "--set", "training.freeze=encoder", "optimizer.warmup_steps=0", *few]) == 0
    before, after = Run.open(one).denoiser().network, Run.open(place / "three").denoiser("latest", "model").network
    kept = before.encoders.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in after.encoders.state_dict().items())
    trained_once, trained_now = (n.decoders[0].state_dict()["conv_out.weight"] for n in (before, after))
    assert not torch.equal(trained_once, trained_now)
    assert len({str(decoder.state_dict()["conv_out.weight"]) for decoder in after.decoders}) == 3
    assert (
        cli.main(["sample", str(place / "three"), "--count", "2", "--calls", "3", "--out", str(place / "x.png")]) == 0
    )
