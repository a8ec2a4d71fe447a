"""model_index.json of a pipeline of diffusers: its class, and which component is its network, scheduler, autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.serialization import read_json
from ..errors import UserError
from ..reading import brief

INDEX = "model_index.json"
READ = "DDPMPipeline, DDIMPipeline, PNDMPipeline, LDMPipeline and the pipeline of a class-conditional transformer"
CODECS = ("vae", "vqvae", "movq")  # usual names of the folder of an autoencoder
_CONFIG = "config.json"
_TRANSFORMER = "Transformer2DModel"

# Pipelines whose components alone do not show that they are no run.
_OTHERS = {
    "ConsistencyModelPipeline": "its network maps noise to an image at once, which no preconditioning here describes",
    "KarrasVePipeline": "its network was trained on the noise of KarrasVeScheduler, which no schedule here describes",
    "LDMSuperResolutionPipeline": "its network is told of a small image",
    "MultistagePipeline": "it was exported from one; go on from that run (msdiff train --init-from RUN)",
    "ScoreSdeVePipeline": "its network was trained on the variance exploding noise of ScoreSdeVeScheduler",
}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a pipeline.

    Attributes:
        name: under which the index has it; also the name of its folder.
        kind: its class.
        role: "network", "scheduler" or "codec"; empty for another.
        folder: where its files are; the pipeline's own folder in old files.
    """

    name: str
    kind: str
    role: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class PipelineIndex:
    """What model_index.json says.

    Attributes:
        file: its path.
        pipeline: class of the pipeline; empty if it does not say.
        network, scheduler, codec: the components; None: there is none.
    """

    file: Path
    pipeline: str
    network: Component
    scheduler: Component | None
    codec: Component | None

    @property
    def codec_folder(self) -> Path | None:
        """The folder of the autoencoder; None: there is none."""
        return None if self.codec is None else self.codec.folder


def read_index(folder: Path) -> PipelineIndex | None:
    """Return what a folder's model_index.json says; None if it has none.

    Raises:
        UserError: naming pipeline and component: a run has no place for one, or the folders are others.
    """
    file = folder / INDEX
    if not file.is_file():
        return None
    said = read_json(file)
    if not isinstance(said, dict):
        raise UserError(f"{file}: is no mapping")
    pipeline = _name_of(said.get("_class_name"))
    if pipeline in _OTHERS:
        raise UserError(f"{file}: {pipeline} is not imported: {_OTHERS[pipeline]}; {READ} are imported")
    parts = _components(file, said)
    networks, schedulers, codecs = ([p for p in parts if p.role == role] for role in ("network", "scheduler", "codec"))
    _refuse_others(file, pipeline, [p for p in parts if not p.role])
    for role, found in (("network", networks), ("scheduler", schedulers), ("autoencoder", codecs)):
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise UserError(
                f"{file}: {pipeline} has more than one {role} ({names}); a run has one; {READ} are imported"
            )
    if not networks:
        raise UserError(f"{file}: names no network (a UNet2DModel or a transformer); give the folder of a pipeline")
    index = PipelineIndex(
        file=file,
        pipeline=pipeline,
        network=networks[0],
        scheduler=schedulers[0] if schedulers else None,
        codec=codecs[0] if codecs else None,
    )
    _check_codec(folder, index)
    return index


def _role(library: str, kind: str) -> str:
    """Return the role of a component of a class: "network", "scheduler" or "codec"; empty for another."""
    if library == "transformers":  # its parts read text or see images, whatever they are called
        return ""
    if kind.endswith("Scheduler"):
        return "scheduler"
    if kind.startswith("Autoencoder") or kind == "VQModel":
        return "codec"
    return "network" if "UNet" in kind or "Transformer" in kind else ""


def _name_of(value: Any) -> str:
    """Return the name of a class, which code of its own gives as [module, class]."""
    name = value[-1] if isinstance(value, list) and value else value
    return name if isinstance(name, str) else ""


def _components(file: Path, said: Mapping[str, Any]) -> list[Component]:
    """Return the components: {name: [library, class]}; [null, null] is one that is left out."""
    found = []
    for name, value in said.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        if not all(isinstance(word, str) for word in value) or Path(name).name != name:
            raise UserError(
                f"{file}: {brief(name)}: {brief(value)} is no component [library, class] in a folder of that name"
            )
        own = file.parent / name
        library, kind = value
        found.append(
            Component(name=name, kind=kind, role=_role(library, kind), folder=own if own.is_dir() else file.parent)
        )
    return found


def _refuse_others(file: Path, pipeline: str, others: list[Component]) -> None:
    if others:
        names = ", ".join(f"{p.name} ({p.kind})" for p in others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"{file}: {pipeline} has {names}: a run has a network, a scheduler and an autoencoder only, and its network is told "
            f"of classes at most; {READ} are imported"
        )


def _check_codec(folder: Path, index: PipelineIndex) -> None:
    """Compare the autoencoder of an index with the folders that there are."""
    codec = index.codec
    if codec is not None and codec.folder == folder:
        raise UserError(
            f"{index.file}: names {codec.name} ({codec.kind}), but there is no folder {codec.name}; copy it there"
        )
    stranger = next((name for name in CODECS if (folder / name / _CONFIG).is_file() and codec is None), None)
    if stranger is not None:
        kind = said_class(folder / stranger)
        raise UserError(
            f"{index.file}: names no autoencoder, but there is a folder {stranger}; if the network is of its latents, add "
            f'"{stranger}": ["diffusers", "{kind or "AutoencoderKL"}"], else remove the folder'
        )
    if codec is not None:
        require_class(index, codec)


def said_class(folder: Path) -> str:
    """Return the class that a component's config.json names; empty if it names none."""
    said = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
    return _name_of(said.get("_class_name")) if isinstance(said, dict) else ""


def require_class(index: PipelineIndex, part: Component) -> None:
    """Check that a component's config.json is of the class that the index names; transformers had one common name before.

    Raises:
        UserError: if it is of another.
    """
    said = said_class(part.folder)
    former = _TRANSFORMER in (said, part.kind) and said.endswith(_TRANSFORMER) and part.kind.endswith(_TRANSFORMER)
    if said and said != part.kind and not former:
        raise UserError(
            f"{part.folder / _CONFIG}: _class_name={brief(said)}, but {INDEX} says {part.name} is {brief(part.kind)}; put the "
            "files of the same pipeline together"
        )
