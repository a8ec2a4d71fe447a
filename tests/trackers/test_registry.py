from __future__ import annotations

import pytest

from multistage_diffusion.errors import UserError
from multistage_diffusion.trackers.registry import MEMORY, TRACKERS, not_installed, recall, remember, track, tracked


def test_a_run_keeps_its_trackers_and_what_they_keep(tmp_path):
    assert (tracked(tmp_path), recall(tmp_path, "wandb")) == ((), {})
    track(tmp_path, ())
    assert list(tmp_path.iterdir()) == []  # nothing to keep
    track(tmp_path, ("wandb", "trackio"))
    remember(tmp_path, "wandb", {"id": "abc"})
    remember(tmp_path, "trackio", {"name": "x"})
    track(tmp_path, ("trackio",))
    assert tracked(tmp_path) == ("trackio",)
    assert (recall(tmp_path, "wandb"), recall(tmp_path, "trackio")) == ({"id": "abc"}, {"name": "x"})
    track(tmp_path, ())
    assert tracked(tmp_path) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping"),
        ('{"track": "wandb"}', r"track='wandb' must be a list of names"),
        ('{"track": [1]}', r"track=\[1\] must be a list of names"),
        ('{"kept": 3}', "kept=3 must be mappings by name"),
        ('{"kept": {"wandb": 3}}', "must be mappings by name"),
        ("{", MEMORY),
    ],
)
def test_a_damaged_record_is_named(tmp_path, text, message):
    (tmp_path / MEMORY).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        track(tmp_path, (*tracked(tmp_path), *recall(tmp_path, "wandb")))
    assert MEMORY in str(error.value)


def test_each_tracker_has_an_extra():
    assert set(TRACKERS) >= {"tensorboard", "wandb", "trackio"}
    assert "pip install 'multistage-diffusion[track]'" in str(not_installed("tensorboard"))
    assert "pip install 'multistage-diffusion[wandb]';" in str(not_installed("wandb"))
    both = "pip install 'multistage-diffusion[trackio]' && pip install --no-deps trackio;"
    assert both in str(not_installed("trackio"))
