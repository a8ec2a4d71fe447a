from __future__ import annotations

import json

import pytest

from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.report import _found


def test_the_result_of_the_stages_is_read_unless_it_is_of_another_release(tmp_path, tiny_config, tiny_data):
    run = Run.create(tmp_path / "run", tiny_config())
    assert _found(run) is None
    result = compute_stages(tiny_data(), StageSettings(algorithm="snr"))
    result.save(run.path / "stages.json")
    assert _found(run) == result
    (run.path / "stages.json").write_text(json.dumps({**result.to_dict(), "format_version": 1}))
    with pytest.warns(UserWarning, match=r"format_version=1.*; the report shows stages\.png instead"):
        assert _found(run) is None
