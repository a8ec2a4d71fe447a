"""Differences between two configurations, and the keys that may differ: between machines, and when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import RunConfig
from ..config.serialization import to_dict

# Keys that may differ between machines: paths, and the last digits of measured values.
PLACES = ("data.source", "codec.source", "codec.scale", "training.init_from", "evaluation.reference")


# Keys that may change when a run is resumed: its length, output intervals, how steps are computed; never the results.
CHANGEABLE = (
    "data.source",
    "data.class_names",
    "codec.source",
    "codec.subfolder",
    "training.steps",
    "training.log_every",
    "training.held_out_every",
    "training.ema_snapshot_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.sample_every",
    "training.sample_count",
    "evaluation.every",
    "evaluation.metrics",
    "evaluation.patience",
    "execution.channels_last",
    "execution.compile",
    "execution.cuda_graphs",
    "execution.thread_parallel",
    "execution.recompute",
)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ, except the origin of the stages."""
    one, other = dotted(a), dotted(b)
    return [key for key in one | other if one.get(key) != other.get(key)]


def dotted(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as one mapping of dotted keys, without the origin of the stages."""
    return {key: value for key, value in _flat(to_dict(config)).items() if not key.startswith("stages.origin.")}


def _flat(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat
