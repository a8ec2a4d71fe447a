"""The noise on which a network in a family's own layout was trained: what its file or folder tells, else what the user says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import DiffusionConfig
from ..config.serialization import from_dict, to_dict
from ..errors import UserError, require
from ..interop.noise_config import SCHEDULERS
from ..interop.published import Record
from ..nets.layouts import PublishedLayout
from ..reading import brief

OWN, SIT = "ddpm", "sit"  # names of the noise: the layout's, and SiT's, whose tensors have the same names
NOISE = "noise"  # that name in the arguments of an export; without it, it is the layout's
_SIT_DIFFUSION: dict[str, Any] = {"precondition": "velocity-sit", "schedule": {"kind": "rectified-flow"}}
_SIT_NAME = re.compile(r"(?<![a-z])sit[-_]?(xl|l|b|s)(?![a-z])", re.IGNORECASE)
_SIT_TRAINING = {"path_type": "Linear", "prediction": "velocity"}  # options of SiT's training, as published


@dataclass(frozen=True, kw_only=True)
class NoiseClues:
    """What tells on which noise a network was trained.

    Attributes:
        file: name of the file or folder.
        training: options of its training that a checkpoint keeps under `args`.
        remembered: the noise that an export names.
        schedule: scheduler_config.json of a folder; None: there is none.
    """

    file: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    remembered: object = None
    schedule: Mapping[str, Any] | None = None


def training_options(args: object) -> dict[str, Any]:
    """Return the options of a training, which a checkpoint holds as a namespace or a mapping; {} of anything else."""
    held = args.state if isinstance(args, Record) else args
    return {name: value for name, value in held.items() if isinstance(name, str)} if isinstance(held, dict) else {}


def diffusion_of(layout: type[PublishedLayout], clues: NoiseClues, asked: str | None = None) -> dict[str, Any]:
    """Return the keys of a run's `diffusion` for a network of a layout.

    Args:
        layout: of the network.
        clues: what its file or folder tells; what is neither the layout's noise nor SiT's is refused.
        asked: the noise that the user names; None: what the clues tell, else the layout's.

    Raises:
        UserError: naming the key, or asking for the noise of a file whose name alone is SiT's.
    """
    require(
        asked in (None, OWN, SIT),
        f"noise={asked!r} is unknown; choose one of {OWN} (that of DDPM's steps), {SIT} (the velocity of SiT)",
    )
    _check_scheduler(layout.diffusion["schedule"], clues.schedule or {})
    found = _named(clues) if NOISE in layout.options else OWN
    if found is not None and asked not in (None, found):
        raise UserError(f"noise={asked!r}: the file says that its network was trained with {found!r}; leave it out")
    if found is None and asked is None and _SIT_NAME.search(clues.file):
        raise UserError(
            "has the name of a SiT, which predicts a velocity, but whose tensors are named as those of a network that predicts "
            f"the noise: give --noise {SIT}, or --noise {OWN} if it is none"
        )
    diffusion = _SIT_DIFFUSION if SIT in (asked, found) else layout.diffusion
    schedule = diffusion["schedule"]
    kind = "uniform-steps" if schedule["kind"] == "discrete" else "uniform-time"
    return {**diffusion, "prior": {"kind": kind, "schedule": schedule}}


def _named(clues: NoiseClues) -> str | None:
    """Return the noise that a file names; None if it names none."""
    if clues.remembered is not None:
        known = clues.remembered in (OWN, SIT)
        require(known, f"arguments: {NOISE}={brief(clues.remembered)} must be one of {OWN}, {SIT}")
        return str(clues.remembered)
    said = {name: clues.training[name] for name in _SIT_TRAINING if name in clues.training}
    for name, value in said.items():
        wanted = _SIT_TRAINING[name]
        require(
            value == wanted,
            f"args: {name}={brief(value)}: of SiT's networks only those of {name}={wanted!r} are imported",
        )
    return SIT if said else None


def _check_scheduler(schedule: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuse a scheduler_config.json of another noise than a layout's schedule."""
    kind = said.get("_class_name", "DDIMScheduler")
    require(
        kind in SCHEDULERS,
        f"scheduler_config.json: _class_name={brief(kind)}: its noise is not that of a network of this layout; of schedulers "
        f"only {', '.join(SCHEDULERS)} fit",
    )
    known = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "steps"}
    wanted = {theirs: schedule[ours] for theirs, ours in known.items() if ours in schedule}
    for name, value in {**wanted, "beta_schedule": "linear", "prediction_type": "epsilon"}.items():
        require(
            said.get(name, value) == value,
            f"scheduler_config.json: {name}={said.get(name)!r}: only {value!r} is imported for such a network",
        )
    for name in ("rescale_betas_zero_snr", "trained_betas", "use_flow_sigmas"):
        require(
            not said.get(name),
            f"scheduler_config.json: {name}={brief(said.get(name))}: changes the betas; a network of this layout is imported "
            "with its published ones only",
        )


def name_of(diffusion: DiffusionConfig, layout: type[PublishedLayout]) -> str:
    """Return the name of a run's noise, with which a layout can hold its network.

    Raises:
        UserError: naming the key that no network of the layout has.
    """
    said, own = to_dict(diffusion), _complete(diffusion_of(layout, NoiseClues()))
    if NOISE in layout.options and said["precondition"] == _SIT_DIFFUSION["precondition"]:
        return SIT
    for key in ("precondition", "schedule"):
        require(
            said[key] == own[key],
            f"diffusion.{key}={said[key]}: networks in the layout of {layout.code} are trained with {own[key]}; this run "
            "cannot be exported",
        )
    return OWN


def _complete(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = to_dict(from_dict(DiffusionConfig, diffusion))
    return found
