"""Stage finding from data to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.config import DiffusionConfig
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.errors import UserError
from multistage_diffusion.stage_finding import NoMiddleStageError, StageResult, StageSettings, gaussian_stages
from multistage_diffusion.workflow.stages import find_stages

OVERLAP = StageSettings(alpha=0.66, samples=200)


def test_stages_that_overlap_leave_their_curves_and_say_what_leaves_a_middle_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leave no middle one; the smallest alpha that leaves one is 0\.6") as error:
        find_stages("digits", OVERLAP, out=tmp_path / "stages.json")
    assert str(tmp_path / "stages-curves.json") in str(error.value)
    assert "denoiser gaussian" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stages-curves.json", "stages.png"]
    curves = read_json(tmp_path / "stages-curves.json")["curves"]
    assert len(curves["t"]) == len(curves["s0"]) == len(curves["s1"]) > 50
    assert np.asarray(Image.open(tmp_path / "stages.png")).std() > 1
    alpha = float(str(error.value).split("leaves one is ")[1].split(";")[0])
    t1, t2 = find_stages("digits", StageSettings(alpha=alpha, samples=200)).edges_t
    assert t1 < t2
    with pytest.raises(NoMiddleStageError):  # 0.001 less is too little
        find_stages("digits", StageSettings(alpha=alpha - 0.001, samples=200))


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoMiddleStageError) as error:
        find_stages("digits", OVERLAP)
    assert error.value.settings.alpha == 0.66
    assert not list(tmp_path.iterdir())


def test_the_wiener_denoiser_s_stages_are_of_the_density_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_stages, "RESAMPLES", 5)
    settings = StageSettings(algorithm=2, denoiser="gaussian", stages=2)
    result = find_stages("digits", settings, diffusion=DiffusionConfig(), out=tmp_path / "stages.json")
    assert StageResult.load(tmp_path / "stages.json") == result
    assert result.diffusion == DiffusionConfig()
    assert result.samples < 1797  # held-out images are left out
