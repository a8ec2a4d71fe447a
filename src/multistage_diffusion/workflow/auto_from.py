"""The choice of a configuration that starts from a trained run: what `msdiff train DATA --init-from RUN` uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import DataConfig, RunConfig
from ..config.serialization import override
from ..data.sources import open_data
from ..progress import Progress
from ..stage_finding import StageResult, StageSettings
from ..training.run import Run
from .auto import AutoConfig, Reason
from .checks import require_same_images
from .latent import codec_like
from .stages import find_stages

STAGES = 3  # unless stages or decoders are given


def config_from_run(
    path: str,
    data: str,
    changes: Mapping[str, Any] | None = None,
    *,
    result: StageResult | None = None,
    borrow: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> AutoConfig:
    """Choose the configuration of a run that starts from a trained one: its network, with a decoder for each stage.

    Noise, sampling, training and image size are those of the trained run. A run with one stage becomes one with three,
    even in the time of the VP kernel, unless stages or decoder widths are given; a run with more keeps its stages.

    Args:
        path: the trained run.
        data: the source of the images.
        changes: dotted keys that the user gives, see `override`; they are not chosen.
        result: stages that the user gives.
        borrow: accept stages that were found on other images.
        device: default CUDA when there is one.
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if there is no such run, the data cannot be read, or a key or the stages do not fit.
    """
    given = {**dict(changes or {}), "training.init_from": path}
    base, reasons = Run.open(path).config(), list[Reason]()
    base = dataclasses.replace(
        base, data=data_like(base.data, data), codec=codec_like(base.codec, given.get("codec.source"))
    )
    base = override(base, {key: value for key, value in given.items() if key.startswith("codec.")})
    reasons.append(Reason("network, noise, sampling", base.network.family, f"those of {path}"))
    count = len(given.get("network.decoder_widths") or ()) or STAGES
    named = any(key.startswith("stages.") for key in given)
    source = override(base.data, {k.removeprefix("data."): v for k, v in given.items() if k.startswith("data.")})
    if result is not None and not borrow:
        images = open_data(source)
        require_same_images(result, images, images.split(source.held_out)[0])
    if result is None and not named and len(base.stages) == 1 and count > 1:
        result = find_stages(
            open_data(source).split(source.held_out)[0],
            StageSettings(algorithm="timestep", stages=count),
            codec=base.codec if base.codec.used else None,
            device=device,
            progress=progress,
        )
        reasons.append(Reason("stages", f"sigma {_listed(result.edges_sigma)}", "even in VP time; --stages for others"))
    elif result is not None:
        reasons.append(Reason("stages", f"sigma {_listed(result.edges_sigma)}", "as given"))
    config = override(_with_decoders(base, result, given), given)
    widths = "/".join(map(str, config.network.decoder_widths))
    reasons.append(Reason("network.decoder_widths", widths, "as wide as the trained decoder"))
    frozen = config.training.freeze
    reasons.append(Reason("training.freeze", frozen, "--set training.freeze=encoder trains the decoders alone"))
    reasons.append(Reason("training.steps", str(config.training.steps), "stop with Ctrl-C and resume at any time"))
    return AutoConfig(config=config, result=result, reasons=tuple(reasons))


def data_like(trained: DataConfig, source: str) -> DataConfig:
    """Return how new images are read for a run that starts from a trained one: in the size of its images."""
    return DataConfig(source=source, size=trained.shape[1:] if len(trained.shape) == 3 else None, fit="crop")


def _listed(edges: tuple[float, ...]) -> str:
    return ", ".join(f"{sigma:.3g}" for sigma in edges)


def _with_decoders(base: RunConfig, result: StageResult | None, given: Mapping[str, Any]) -> RunConfig:
    """Return the configuration with the stages of a result, or those given, and a decoder like the trained one for each."""
    keys: dict[str, Any] = {key: value for key, value in given.items() if key.startswith("stages.")}
    if result is not None:
        keys["stages"] = result.stages()
    if not keys:
        return base
    count = len(result.stages() if result is not None else given.get("stages.interior", ())) + (result is None)
    if count != len(base.network.decoder_widths):
        for name in base.network.per_stage:
            value = getattr(base.network, name)
            if value is not None:
                keys[f"network.{name}"] = (value[0],) * count
        keys |= {"training.shares": "uniform", "training.weights": "prior", "training.soft_intervals": 0.0}
    own = {key: value for key, value in given.items() if key.startswith(("network.", "training."))}
    return override(base, {**keys, **own})
