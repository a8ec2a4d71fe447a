"""Warm start: copies the encoder and decoders of a trained run into a new multi-decoder network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..config import RunConfig
from ..denoisers import MultiStageDenoiser, build_denoiser
from ..errors import UserError
from ..preconditioning import make_preconditioning
from .optimizer_state import Local, whole_tensor
from .resizing import resized as resized_decoder
from .run import Run

_LABELS = ("embedding.label.", "embedding.augment.")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Result of a warm start.

    Attributes:
        tensors: {name in the new denoiser: trained tensor}.
        cloned: names of the parts copied from the trained run.
        resized: names of the decoders that start from a decoder of another width, see `resizing`.
        fresh: names of the parts that start from scratch.
    """

    tensors: dict[str, Tensor]
    cloned: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]

    def give(self, module: nn.Module, local: Local = whole_tensor) -> None:
        """Load the tensors into a new denoiser.

        Args:
            module: the denoiser, as far as this process holds it.
            local: see Strategy; by default, this process holds whole tensors.
        """
        own, given = module.state_dict(), self.tensors
        module.load_state_dict({n: local(given[n], t) if n in given else t for n, t in own.items()})


def warm_start(path: Path | str, config: RunConfig) -> WarmStart:
    """Load the averaged weights of a trained run's best checkpoint for a new network.

    The shared encoder is copied as a whole. A decoder of the new network is copied from the run's only decoder, or from
    the decoder of the same stage if both have the same number of stages. A decoder of another width starts from it, see
    `resizing`. Other parts with different shapes start from scratch.

    Args:
        path: the trained run.
        config: configuration of the new run.

    Raises:
        UserError: if there is no such run, its network output has another meaning, the shared encoders differ, no part
            fits, a frozen encoder would have to learn labels, or it has several decoders where stages share one at first.
    """
    run = Run.open(path)
    own, trained = _meanings(config), _meanings(run.config())
    for key, value in own.items():
        if trained.get(key, value) != value:
            raise UserError(
                f"training.init_from={path}: was trained with {key}={trained[key]}, the new run has {value}"
            )
    with torch.device("meta"):
        target = build_denoiser(config)
    source = run.denoiser("best")
    if config.training.branch_at and len(source.stages) > 1:
        raise UserError(
            f"training.init_from={path}: has {len(source.stages)} decoders, but with training.branch_at="
            f"{config.training.branch_at} all stages start with one; give a run of one decoder, or set branch_at to 0"
        )
    for name in ("num_classes", "augment_dim") if config.training.freeze == "encoder" else ():
        had, wanted = (getattr(network, name) for network in (source.network.config, config.network))
        if wanted and wanted != had:
            raise UserError(
                f"training.freeze='encoder': the encoder of {path} has network.{name}={had}, so that {wanted} could not be "
                "learnt; set training.freeze to nothing"
            )
    return _matched(path, source, target, config.training.seed)


def _meanings(config: RunConfig) -> dict[str, object]:
    """Return the settings that must be equal for weights to have the same meaning."""
    diffusion = config.diffusion
    meanings = {**config.network.functional_settings(), "diffusion.precondition": diffusion.precondition}
    preconditioning: Any = make_preconditioning(diffusion)
    for field in dataclasses.fields(preconditioning):  # of EDM sigma_data; of noise prediction the schedule of its time
        meanings[f"diffusion.{field.name}"] = getattr(preconditioning, field.name)
    return meanings


def _matched(path: Path | str, source: MultiStageDenoiser, target: MultiStageDenoiser, seed: int) -> WarmStart:
    pairs: dict[str, Tensor] = {}
    cloned, resized, fresh = [], [], []
    prefixes = {module: prefix for prefix, module in target.named_modules()}
    for name, part in target.network.parts().items():
        known = _counterpart(name, source, target)
        given = None if known is None else source.network.parts()[known]
        if given is not None and _fits(given, part):
            pairs |= _tensors(given, prefixes[part], part)
            cloned.append(name)
        elif name == "encoder":
            raise UserError(f"training.init_from={path}: {_difference(given, part)}; the encoders must be alike")
        elif known is not None and (tensors := _resized(source, known, target, name, seed)) is not None:
            pairs |= {f"{prefixes[part]}.{key}": value for key, value in tensors.items()}
            resized.append(name)
        else:
            fresh.append(name)
    if not cloned:
        raise UserError(f"training.init_from={path}: no part of its network fits the new one; nothing would be cloned")
    return WarmStart(tensors=pairs, cloned=tuple(cloned), resized=tuple(resized), fresh=tuple(fresh))


def _counterpart(name: str, source: MultiStageDenoiser, target: MultiStageDenoiser) -> str | None:
    """Return the name of the trained part from which a new part can be copied, or None."""
    kind, _, stage = name.partition(".")
    trained = [key for key in source.network.parts() if key.partition(".")[0] == kind]
    if len(trained) == 1:
        return trained[0]
    return trained[int(stage) - 1] if stage and len(source.stages) == len(target.stages) else None


def _resized(
    source: MultiStageDenoiser, known: str, target: MultiStageDenoiser, name: str, seed: int
) -> dict[str, Tensor] | None:
    """Return the weights of a new decoder that starts from a trained one of another width; None if it cannot."""
    trained, config = source.network.config, target.network.config
    if not config.resizable or config.separate or trained.separate:
        return None
    before, stage = (int(key.partition(".")[2]) - 1 for key in (known, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.fold((seed, "resized decoder", stage)) >> 1)
        fresh = config.decoder(stage, config.encoder_width)
    widths = trained.decoder_widths[before], config.decoder_widths[stage]
    return resized_decoder(source.network.parts()[known], fresh, *widths)


def _fits(given: nn.Module, part: nn.Module) -> bool:
    return _shapes(given) == _shapes(part) and _heads(given) == _heads(part)


def _heads(part: nn.Module) -> list[Any]:
    """Return the channels of a head of each attention, which shapes do not show."""
    return [module.head_channels for module in part.modules() if hasattr(module, "head_channels")]


def _shapes(part: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a part's tensors, without label layers, which not every network has."""
    return {key: value.shape for key, value in part.state_dict().items() if not key.startswith(_LABELS)}


def _tensors(given: nn.Module, prefix: str, part: nn.Module) -> dict[str, Tensor]:
    """Return a part's tensors; label layers that the trained network lacks are zero, so labels start without effect."""
    theirs = given.state_dict()
    return {
        f"{prefix}.{key}": theirs[key].clone()
        if key in theirs and theirs[key].shape == value.shape
        else torch.zeros(value.shape)
        for key, value in part.state_dict().items()
    }


def _difference(given: nn.Module | None, part: nn.Module) -> str:
    """Describe the first tensor in which two encoders differ."""
    if given is None:
        return "it has an encoder for every stage"
    theirs, ours = _shapes(given), _shapes(part)
    key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
    had, needed = (list(shapes[key]) if key in shapes else "nothing" for shapes in (theirs, ours))
    return f"its encoder has {had} for {key}, the new one {needed}"
