"""The noise of imported transformers: what a file, a folder or the user says, else that of the layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_transformers import folder_of, golden, heads, written

from multistage_diffusion import cli
from multistage_diffusion.config.presets import preset
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.export import export_published
from multistage_diffusion.workflow.import_run import import_published

HEADS = heads(golden("dit")[0])


def checkpoint(folder: Path, **args: Any) -> Path:
    """Write a checkpoint as the trainings of DiT and SiT do, with the options of the command in a namespace."""
    weights = golden("dit")[1]
    return written(folder, "0400000", {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(**args)})


def noise(run: Run) -> tuple[str, str]:
    diffusion = run.config().diffusion
    return diffusion.precondition, diffusion.schedule.kind


DDPM, SIT = ("vp-eps", "discrete"), ("velocity-sit", "rectified-flow")


def test_options_of_a_training_tell_sit_from_dit(tmp_path: Path) -> None:
    sit = checkpoint(tmp_path, model="SiT-S/2", path_type="Linear", prediction="velocity", loss_weight=None)
    assert noise(import_published(sit, tmp_path / "sit", head_channels=HEADS)) == SIT
    with pytest.raises(UserError, match="noise='ddpm': the file says that its network was trained with 'sit'"):
        import_published(sit, tmp_path / "run", head_channels=HEADS, noise="ddpm")
    for name, value in (("prediction", "score"), ("path_type", "GVP")):
        other = checkpoint(tmp_path, **{"path_type": "Linear", "prediction": "velocity", name: value})
        with pytest.raises(UserError, match=rf"args: {name}='{value}': of SiT's networks only those of {name}="):
            import_published(other, tmp_path / "run", head_channels=HEADS)
    dit = checkpoint(tmp_path, model="DiT-S/2", num_classes=6)
    assert noise(import_published(dit, tmp_path / "dit", head_channels=HEADS)) == DDPM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SiT-XL-2-256", "sit_b2", "my-SiT-S"])
def test_a_name_of_sit_alone_asks_for_the_noise(name: str, tmp_path: Path) -> None:
    file = written(tmp_path, name, golden("dit")[1])
    with pytest.raises(UserError, match=r"has the name of a SiT.*give --noise sit, or --noise ddpm if it is none"):
        import_published(file, tmp_path / "run", head_channels=HEADS)
    for asked, expected in (("sit", SIT), ("ddpm", DDPM)):
        assert noise(import_published(file, tmp_path / asked, head_channels=HEADS, noise=asked)) == expected


def test_where_nothing_tells_it_is_ddpms_or_what_the_command_says(tmp_path: Path) -> None:
    file = written(tmp_path, "transit-large", golden("dit")[1])
    assert noise(import_published(file, tmp_path / "ddpm", head_channels=HEADS)) == DDPM
    command = ["import", str(file), "--head-channels", str(HEADS), "--out", str(tmp_path / "sit"), "--noise", "sit"]
    assert cli.main(command) == 0
    assert noise(Run.open(tmp_path / "sit")) == SIT
    with pytest.raises(UserError, match="noise='edm' is unknown; choose one of ddpm"):
        import_published(file, tmp_path / "run", head_channels=HEADS, noise="edm")


def test_a_sit_denoises_as_its_code_says_and_comes_back_from_an_export(tmp_path: Path) -> None:
    """Its code: x_t = t y + (1 - t) n, the network is told t and returns y - n, so y = x_t + (1 - t) F."""
    weights, case = golden("dit")[1:]
    file = written(tmp_path, "dit", weights)
    run = import_published(file, tmp_path / "run", head_channels=HEADS, noise="sit")
    denoiser, t = run.denoiser(), torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    mixed, told = case["x"], Conditioning(labels=torch.tensor([0, 2, -1]))
    with torch.no_grad():
        flow = denoiser.network(mixed, t.float(), [3], told)
        found = denoiser((mixed / t.float().reshape(3, 1, 1, 1)), (1 - t) / t, told)
    torch.testing.assert_close(found, mixed + (1 - t).float().reshape(3, 1, 1, 1) * flow, rtol=1e-4, atol=1e-4)
    again = import_published(export_published(run, tmp_path / "again.pt"), tmp_path / "again")
    assert again.config().diffusion == run.config().diffusion
    with pytest.raises(UserError, match="noise='ddpm': the file says"):
        import_published(tmp_path / "again.pt", tmp_path / "other", noise="ddpm")


def test_a_preset_gives_no_other_noise(tmp_path: Path) -> None:
    file = written(tmp_path, "uvit", golden("uvit")[1])
    base = preset("digits-uvit")
    config = import_published(file, tmp_path / "run", head_channels=heads(golden("uvit")[0]), base=base).config()
    assert base.diffusion.precondition == "edm"
    assert (config.diffusion.precondition, config.diffusion.schedule.kind) == ("vp-eps", "vp")
    assert config.optimizer == base.optimizer


@pytest.mark.parametrize("part", ["", "transformer"])
def test_a_scheduler_of_flow_matching_is_refused(part: str, tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path / "published")
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    with pytest.raises(UserError, match="_class_name='FlowMatchEulerDiscreteScheduler': its noise is not that"):
        import_published(folder / part, tmp_path / "run")
    assert not (tmp_path / "run").exists()
