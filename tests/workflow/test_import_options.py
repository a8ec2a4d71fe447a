"""Options of an import that have no effect, or whose value is impossible, are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_files import golden, one_stage, write_score_sde
from foreign_transformers import folder_of, written

from multistage_diffusion.errors import UserError
from multistage_diffusion.workflow.export import export_published
from multistage_diffusion.workflow.import_run import import_published

VALUES: dict[str, Any] = {
    "size": (8, 8),
    "stages": object(),
    "edges": (1.0,),
    "norm_groups": 8,
    "head_channels": 16,
    "encoder_depth": 2,
    "classes": 6,
    "drop_sigma": True,
    "noise": "sit",
}
PARAMETERS = {"stages": "result"}  # by option, where the function has another name
# options that a network in a layout has use for
USED = {
    "dit": {"head_channels", "encoder_depth", "drop_sigma", "noise"},
    "uvit": {"head_channels", "encoder_depth"},
    "uvit_classes": {"head_channels", "encoder_depth", "classes"},
    "folder": {"encoder_depth", "drop_sigma"},
    "unet": {"norm_groups", "size", "edges", "stages"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("files")
    found = {name: written(place, name) for name in ("dit", "uvit", "uvit_classes")}
    weights = one_stage("ncsnpp", golden("ncsnpp")[1])
    return {
        **found,
        "folder": folder_of(place / "folder")[0],
        "unet": write_score_sde(place / "x.pth", weights, weights),
    }


@pytest.mark.parametrize("name", USED)
def test_an_option_without_effect_is_refused_by_name(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    for option in VALUES.keys() - USED[name]:
        with pytest.raises(UserError) as error:
            import_published(files[name], tmp_path / "run", **{PARAMETERS.get(option, option): VALUES[option]})
        message = str(error.value).removeprefix(f"{files[name]}: ")
        assert message.startswith((f"{option}=", f"{option}: ")), message
        assert "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", USED)
def test_a_value_that_is_not_positive_is_refused_of_every_file(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    for option in ("head_channels", "norm_groups", "encoder_depth", "classes"):
        for value in (0, -4, True):
            with pytest.raises(UserError, match=rf"{option}={value} must be a positive whole number"):
                import_published(files[name], tmp_path / "run", **{option: value})
    with pytest.raises(UserError, match="size=8x0: height and width must be positive"):
        import_published(files[name], tmp_path / "run", size=(8, 0))


def test_the_reason_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    for name, option, reason in (
        ("dit", "classes", "it has none, or its file tells it; leave it out"),
        ("dit", "norm_groups", "norm_groups=8: has no meaning for a network of DiT (.pt): it has no GroupNorm; leave"),
        ("folder", "head_channels", "head_channels=16: has no meaning for a network of diffusers' DiT (a folder)"),
        ("uvit", "classes", "classes=6: has no class table (label_emb.weight); leave it out"),
        ("uvit", "edges", "edges=[1.0]: has no meaning for a network of U-ViT (.pth): it has one stage"),
    ):
        with pytest.raises(UserError) as error:
            import_published(files[name], tmp_path / "run", **{option: VALUES[option]})
        assert reason in str(error.value)


def test_outputs_that_are_not_there_cannot_be_dropped(files: dict[str, Path], tmp_path: Path) -> None:
    run = import_published(files["dit"], tmp_path / "run", head_channels=16, drop_sigma=True)
    exported = export_published(run, tmp_path / "small.pt")
    with pytest.raises(UserError, match="drop_sigma: has no effect: the network has no outputs for a learnt variance"):
        import_published(exported, tmp_path / "again", drop_sigma=True)
