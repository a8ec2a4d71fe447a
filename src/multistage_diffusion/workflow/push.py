"""Pushing a run to the Hugging Face hub: a pipeline of diffusers with a model card."""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation import read_result
from ..files import write_atomic
from ..progress import Progress
from ..records import read_evaluations, read_launches
from ..reporting.model_card import model_card, require_licence
from ..reporting.pictures import grid
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .export_diffusers import export_diffusers
from .sample import opened_run, sample

CARD, SAMPLES = "README.md", "samples.png"
_NEEDS = "msdiff push needs huggingface-hub: pip install 'multistage-diffusion[hub]'"


def push(
    run: Run | Path | str,
    name: str,
    *,
    licence: str = "unknown",
    private: bool = False,
    checkpoint: str = "best",
    count: int = 16,
    dry_run: Path | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Push a run to the Hugging Face hub, as `export_diffusers` writes it, with a model card and a grid of samples.

    Args:
        run: a run, or its folder.
        name: OWNER/NAME of the repository; it is made if it does not exist.
        licence: of the weights: an identifier of the hub.
        private: whether a new repository is private.
        checkpoint: "best", "latest" or a step.
        count: samples in the grid.
        dry_run: a new folder that gets what would be pushed; nothing is pushed then, and no network is needed.
        device: of the samples; default CUDA when there is one.
        progress: called with (done, total) while samples are drawn.

    Returns:
        The address of the repository, or the folder.

    Raises:
        UserError: if the name or licence is not valid, the hub refuses, or cannot be reached.
    """
    run, hub = opened_run(run), _hub()
    require_licence(licence)
    try:
        hub.utils.validate_repo_id(name)
    except hub.utils.HFValidationError as error:
        raise UserError(f"NAME={name!r}: {_short(error)}") from None
    if name.count("/") != 1:
        raise UserError(f"NAME={name!r}: give OWNER/NAME")
    if dry_run is not None:
        return str(_filled(run, Path(dry_run), name, licence, checkpoint, count, device, progress))
    with tempfile.TemporaryDirectory(prefix="msdiff-push-") as place:
        folder = _filled(run, Path(place) / "repository", name, licence, checkpoint, count, device, progress)
        try:
            api = hub.HfApi()
            api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=name, folder_path=folder, commit_message="Upload of a run by multistage-diffusion"
            )
        except (OSError, hub.utils.HfHubHTTPError) as error:
            raise UserError(
                f"{name}: the hub refused or cannot be reached ({_short(error)}); log in with hf auth login"
            ) from None
    return f"https://huggingface.co/{name}"


def _filled(
    run: Run,
    folder: Path,
    name: str,
    licence: str,
    checkpoint: str,
    count: int,
    device: str | None,
    progress: Progress | None,
) -> Path:
    """Write all that the repository holds."""
    step = checkpoint_step(run.checkpoint(checkpoint))
    results = [read_result(record) for record in read_evaluations(run.path / "evaluation.json") if _is_result(record)]
    images = sample(run, count, checkpoint=str(step), in_turn=True, device=device, progress=progress)
    export_diffusers(run, folder, checkpoint=str(step))
    grid(images).save(folder / SAMPLES)
    card = model_card(
        run.config(),
        name=name,
        step=step,
        licence=licence,
        results=results,
        launches=read_launches(run.path / "launches.jsonl"),
        samples=SAMPLES,
    )
    write_atomic(folder / CARD, card.encode())
    return folder


def _is_result(record: dict[str, Any]) -> bool:
    return "metrics" in record


def _hub() -> Any:
    """Import and return huggingface_hub."""
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise UserError(_NEEDS) from None
    return huggingface_hub


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240)
