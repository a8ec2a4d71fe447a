"""The choice of a whole configuration for one's own images: what `msdiff train DATA` uses without a preset.

Everything is chosen from the images and the device, with a reason for each choice. Keys that the user gives stay as given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..config import DataConfig, RunConfig, TrainingConfig
from ..config.image_presets import IMAGE_SIZES, fitting_preset, preset_name
from ..config.presets import PRESETS, preset
from ..config.serialization import changed, override
from ..data import ImageData
from ..data.options import SizesDifferError
from ..data.peek import image_sizes
from ..data.sources import is_folder_or_zip, open_data, to_path
from ..distributed import World
from ..errors import UserError
from ..performance.devices import joined
from ..performance.offload import SHARE, free_memory, training_memory
from ..progress import Progress
from ..schedules import LogNormal
from ..shares import prior_masses
from ..stage_finding import StageResult, StageSettings
from .checks import require_same_images, sample_std
from .resolve import require_channels
from .stages import find_stages

SIDES = {"cpu": 32, "gpu": 64}  # pixels to which larger images are reduced, unless a size is given
LEAST_SIDE = 8  # of images in a folder
COARSEST = 4  # least side of a network's coarsest feature maps
FEW_IMAGES = 1000
WIDTHS = ("network.family", "network.encoder_width", "network.decoder_widths")
SCALED = {  # with the steps, where these are fewer than the preset's: the least, in steps
    "optimizer.warmup_steps": 1,
    "optimizer.decay_after": 1,
    "training.held_out_every": 20,
    "training.checkpoint_every": 20,
    "training.sample_every": 50,
    "evaluation.every": 200,  # an evaluation takes longer than that many steps of a small network
}


class Reason(NamedTuple):
    """One choice: the setting, its value as text, and why it was chosen."""

    setting: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """A configuration chosen for a data set.

    Attributes:
        config: of the run, for `train`.
        result: of the stage finding, for `train`; None if the user gives the stages.
        reasons: why, setting by setting.
    """

    config: RunConfig
    result: StageResult | None
    reasons: tuple[Reason, ...]

    def table(self, without: Collection[str] = ()) -> str:
        """Return the choices as text, but for some settings: setting, value and reason, a line each."""
        shown = [reason for reason in self.reasons if reason.setting not in without]
        widths = [max(len(reason[column]) for reason in shown) for column in (0, 1)]
        return "\n".join(f"{setting:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for setting, value, reason in shown)


def auto_config(
    data: str | DataConfig,
    changes: Mapping[str, Any] | None = None,
    *,
    result: StageResult | None = None,
    borrow: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> AutoConfig:
    """Choose the configuration of a run on one's own images.

    Args:
        data: the source, or how it is read.
        changes: dotted keys that the user gives, see `override`; they are not chosen.
        result: stages that the user gives; None: even in the time of the VP kernel.
        borrow: accept stages that were found on other images.
        device: default CUDA when there is one.
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if the data cannot be read, or a key or the stages do not fit.
    """
    given, (world, where) = dict(changes or {}), joined(device, "auto")
    kind = "gpu" if where.type == "cuda" else "cpu"
    changed(preset(preset_name(IMAGE_SIZES[0], kind)), given)  # unknown keys are told before the images are read
    source, reasons = DataConfig(source=data) if isinstance(data, str) else data, list[Reason]()
    if source.source in PRESETS and result is None:
        reasons.append(Reason("preset", source.source, "made for these data"))
        known = override(preset(source.source), given)
        return AutoConfig(config=known, result=None, reasons=tuple(reasons))
    source = _sized(source, given, kind, reasons)
    images = open_data(source)
    if not given.get("codec.source"):
        require_channels(given, images.shape[0])
    name = fitting_preset(max(images.shape[1:]), kind)
    config = _based(preset(name), source, images, given)
    if 0 < config.network.num_classes < images.num_classes:  # told before the choice is printed
        raise UserError(
            f"network.num_classes={config.network.num_classes}: {images.name} has {images.num_classes} classes; give --set "
            f"network.num_classes={images.num_classes}"
        )
    reasons.append(Reason("preset", name, f"for images of {images.shape[1]}x{images.shape[2]} on this device"))
    training = images.split(source.held_out)[0]
    if result is not None and not borrow:  # told before the choice is printed
        require_same_images(result, images, training)
    if result is None and not any(key.startswith("stages.") for key in given):
        result = find_stages(
            training,
            StageSettings(algorithm="timestep", stages=len(config.network.decoder_widths)),
            codec=config.codec if config.codec.used else None,
            device=device,
            progress=progress,
        )
    config = _with_sigma_data(config, training, given, reasons)
    config = _with_stages(config, result, given, reasons)
    config = _fitting_memory(config, given, _memory_of_each(world, where), world.size, reasons)
    reasons += _about(config, images, given, result)
    return AutoConfig(config=config, result=result, reasons=tuple(reasons))


def _sized(data: DataConfig, given: Mapping[str, Any], kind: str, reasons: list[Reason]) -> DataConfig:
    """Return how the data are read: in the size that the user gives, else in one that suits device and images."""
    known = {key.removeprefix("data."): value for key, value in given.items() if key.startswith("data.")}
    data = override(data, known) if known else data
    if data.size is not None:
        fit = "crop" if data.fit == "exact" and "fit" not in known else data.fit
        reasons.append(Reason("data.size", _by(data.size), "as given"))
        return dataclasses.replace(data, fit=fit)
    sizes, most = _sizes(data), SIDES[kind]
    if len(sizes) == 1 and max(sizes[0]) <= most:
        reasons.append(Reason("data.size", _by(sizes[0]), "the images' own"))
        return dataclasses.replace(data, size=sizes[0], fit="crop")
    least = min((min(size) for size in sizes), default=most)
    side = min(most, max(LEAST_SIDE, least - least % 8))
    reasons.append(
        Reason(
            "data.size",
            _by((side, side)),
            f"images of {_range(sizes)}, reduced and cut to the centre; --size H W for another",
        )
    )
    return dataclasses.replace(data, size=(side, side), fit="crop")


def _sizes(data: DataConfig) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of the images, smallest area first; [] if they differ and are not known.

    Of a folder or zip file some are looked at; what is opened otherwise mostly has one size.
    """
    if is_folder_or_zip(data.source) and (found := image_sizes(to_path(data.source))):
        return sorted(set(found), key=lambda size: size[0] * size[1])
    try:
        height, width = open_data(data).shape[1:]
    except SizesDifferError:
        return []
    return [(height, width)]


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def _range(sizes: list[tuple[int, int]]) -> str:
    """Return the smallest and the largest of several sizes as text."""
    if not sizes:
        return "several sizes"
    return _by(sizes[0]) if len(sizes) == 1 else f"{_by(sizes[0])} to {_by(sizes[-1])}"


def _based(base: RunConfig, source: DataConfig, images: ImageData, given: Mapping[str, Any]) -> RunConfig:
    """Return the preset with the user's data and keys, and a network that suits the size of the images."""
    if base.codec.used and not given.get("codec.source"):
        raise UserError(
            f"data.size={_by(images.shape[1:])}: images above {IMAGE_SIZES[-2]} pixels are trained on latents; give --codec "
            f"(of msdiff train-codec, or hf:NAME), or a smaller --size"
        )
    keys: dict[str, Any] = {
        "data": dataclasses.replace(source, shape=images.shape),
        "network.channels": images.shape[0],
    }
    if base.codec.used:
        keys |= {"codec.shape": (), "network.channels": base.network.channels}
    else:
        multiples = tuple(base.network.channel_mult)  # type: ignore[attr-defined]
        while len(multiples) > 1 and max(images.shape[1:]) < COARSEST * 2 ** (len(multiples) - 1):
            multiples = multiples[:-1]
        if multiples != base.network.channel_mult:  # type: ignore[attr-defined]
            keys |= {"network.channel_mult": multiples, "network.attention_factors": (2 ** (len(multiples) - 1),)}
    own = {key: value for key, value in given.items() if not key.startswith("data.")}
    found = override(base, {**{k: v for k, v in keys.items() if k not in own}, **own})
    return override(found, {k: v for k, v in _in_proportion(base, found.training).items() if k not in own})


def _in_proportion(base: RunConfig, training: TrainingConfig) -> dict[str, Any]:
    """Return what follows from a training of another length or batch than the preset's.

    The EMA's half-life is a share of the images seen; the learning rate goes with the square root of the batch, as suits
    Adam. Warm-up, decay and intervals follow fewer steps, but not more, and not below what pays.
    """
    share, batch = training.steps / base.training.steps, training.batch / base.training.batch
    found: dict[str, Any] = {
        "training.ema_halflife": base.training.ema_halflife * share * batch,
        "optimizer.lr": base.optimizer.lr * batch**0.5,
    }
    if share < 1:
        there = {key: getattr(getattr(base, part), name) for key in SCALED for part, _, name in [key.partition(".")]}
        found |= {key: min(value, max(SCALED[key], round(value * share))) for key, value in there.items() if value}
    return found


def _with_sigma_data(
    config: RunConfig, images: ImageData, given: Mapping[str, Any], reasons: list[Reason]
) -> RunConfig:
    """Return the configuration with sigma_data: of the images about their mean image; 1 for latents, scaled to that."""
    if "diffusion.sigma_data" in given:
        return config
    if config.codec.used:
        reasons.append(Reason("diffusion.sigma_data", "1", "the scale of the latents"))
        return override(config, {"diffusion.sigma_data": 1.0})
    found = round(sample_std(images), 4)
    reasons.append(Reason("diffusion.sigma_data", f"{found:g}", "standard deviation about the mean image"))
    return override(config, {"diffusion.sigma_data": found})


def _with_stages(
    config: RunConfig, result: StageResult | None, given: Mapping[str, Any], reasons: list[Reason]
) -> RunConfig:
    """Return the configuration with the stages of a result; None: those that it has."""
    if result is None:
        return config
    edges = ", ".join(f"{sigma:.3g}" for sigma in result.edges_sigma)
    shares = "/".join(f"{share:.0%}" for share in prior_masses(result.stages(), config.diffusion.prior))
    how = "even in VP time" if result.settings.algorithm == "timestep" else "as given"
    if result.settings.denoiser == "gaussian":
        how += ", at low noise, which costs quality in short trainings"
    reasons.append(Reason("stages", f"sigma {edges}", f"{how}; {shares} of the training noise"))
    return config if "stages.interior" in given else override(config, {"stages": result.stages()})


def _memory_of_each(world: World, where: torch.device) -> int:
    """Return the bytes that the process with the least of them may use; processes on CPUs are taken to share theirs."""
    least: int = min(world.all_gather_object(free_memory(where)))
    return least // (world.size if where.type == "cpu" else 1)


def _fitting_memory(
    config: RunConfig, given: Mapping[str, Any], there: int, processes: int, reasons: list[Reason]
) -> RunConfig:
    """Return the configuration with a batch in as many parts as the memory of each process requires."""
    batch = config.training.batch
    if config.codec.used or "training.accumulate" in given:
        return config

    def needed(parts: int) -> float:
        return training_memory(config, -(-batch // (parts * processes)))

    parts = next((parts for parts in _halvings(batch) if needed(parts) <= SHARE * there), batch)
    why = f"about {max(needed(parts) / 2**30, 0.1):.1f} GiB of the {there / 2**30:.1f} GiB free"
    reasons.append(Reason("training.batch", f"{batch}" if parts == 1 else f"{batch} in {parts} parts", why))
    return override(config, {"training.accumulate": parts})


def _halvings(batch: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... up to the batch."""
    parts = 1
    while parts <= batch:
        yield parts
        parts *= 2


def _about(config: RunConfig, images: ImageData, given: Mapping[str, Any], result: StageResult | None) -> list[Reason]:
    """Return what a user should know of the choices that do not depend on the images."""
    network, training, prior = config.network, config.training, config.diffusion.prior

    def source(*names: str, default: str = "of the preset") -> str:
        asked = any(key == name or key.startswith(f"{name}.") for key in given for name in names)
        return "as given" if asked else default

    proposal = "EDM's; msdiff stages DATA --denoiser gaussian proposes one"
    if result is not None and result.curves.get("proposed_density"):
        mean, std = result.curves["proposed_density"]
        proposal = (
            f"EDM's; the stages' file proposes --set diffusion.prior.p_mean={mean:g} diffusion.prior.p_std={std:g}"
        )
    density = f"ln sigma {prior.p_mean:g} ± {prior.p_std:g}" if isinstance(prior, LogNormal) else prior.kind
    quality = f"Fréchet distance of {config.evaluation.count} samples on {config.evaluation.features}"
    times = "off"
    if config.evaluation.every:
        times = f"every {config.evaluation.every} steps" if config.evaluation.every < training.steps else "at the end"
    widths = "/".join(map(str, network.decoder_widths))
    found = [
        Reason("network", f"{network.family} {network.encoder_width}, decoders {widths}", source(*WIDTHS)),
        Reason(
            "training.steps",
            str(training.steps),
            f"{source('training.steps')}; stop with Ctrl-C and resume at any time",
        ),
        Reason(
            "optimizer.lr",
            f"{config.optimizer.lr:.3g}",
            source("optimizer.lr", default="of the preset; with the square root of the batch"),
        ),
        Reason(
            "training.ema_halflife",
            f"{training.ema_halflife:.6g} images",
            source("training.ema_halflife", default="of the preset; in proportion to the images seen in training"),
        ),
        Reason("diffusion.prior", density, source("diffusion.prior", default=proposal)),
        Reason("sampling", f"{config.sampling.solver}, {config.sampling.calls} calls", source("sampling")),
        Reason("evaluation", times, quality if config.evaluation.every else "as given"),
        Reason("training.flip", str(training.flip).lower(), "true doubles the images, if mirrored ones are right"),
    ]
    if images.labels is not None and not network.num_classes:
        count = images.num_classes
        found.append(
            Reason("network.num_classes", "0", f"--set network.num_classes={count} learns the {count} classes")
        )
    if len(images) < FEW_IMAGES and not training.augment:
        found.append(
            Reason(
                "training.augment",
                "0",
                f"{len(images)} images are few: --set network.augment_dim=9 training.augment=0.12",
            )
        )
    return found
