from __future__ import annotations

import dataclasses

from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.stages import Stages
from multistage_diffusion.workflow.differences import CHANGEABLE, PLACES, differences, dotted


def test_what_may_change_exists() -> None:
    config = preset("digits")
    for key in CHANGEABLE:
        part, name = key.split(".")
        value = getattr(getattr(config, part), name)
        changed = (
            (2 if name == "thread_parallel" else True)
            if value == "auto"
            else not value
            if isinstance(value, bool)
            else None
        )
        if changed is None:
            changed = ["x"] if isinstance(value, tuple) else "x" if isinstance(value, str) else value + 1
        assert differences(config, override(config, {key: changed})) == [key]


def test_differences_are_named_by_their_keys() -> None:
    config = preset("digits")
    assert differences(config, config) == []
    other = override(config, {"optimizer.lr": 0.5, "diffusion.prior.kind": "uniform-time", "network.separate": True})
    found = differences(config, other)
    assert {"optimizer.lr", "diffusion.prior.kind", "network.separate"} <= set(found)
    origin = dataclasses.replace(config, stages=Stages(config.stages.interior, {"data": "elsewhere"}))
    assert differences(config, origin) == []


def test_what_may_differ_between_machines_exists() -> None:
    assert set(PLACES) <= set(dotted(preset("digits")))


def test_a_configuration_is_one_mapping_of_dotted_keys() -> None:
    config = preset("digits")
    keys = dotted(config)
    assert keys["optimizer.lr"] == config.optimizer.lr
    assert keys["diffusion.prior.kind"] == "log-normal"
    assert keys["network.decoder_widths"] == list(config.network.decoder_widths)
    assert not [key for key in keys if key.startswith("stages.origin")]
    assert override(config, keys) == config
