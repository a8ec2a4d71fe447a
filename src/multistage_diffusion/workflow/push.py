"""Pushing a run to the Hugging Face hub: a pipeline of diffusers with a model card."""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation import read_result
from ..progress import Progress
from ..records import read_evaluations, read_launches
from ..reporting.model_card import model_card, require_licence
from ..reporting.pictures import as_png, grid
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .export_diffusers import export_diffusers
from .export_unet2d import require_replaceable
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
    overwrite: bool = False,
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
        dry_run: a folder that gets what would be pushed; nothing is pushed then, and no network is needed.
        overwrite: replace what an earlier dry run wrote there.
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
        require_replaceable(Path(dry_run), run, overwrite=overwrite)  # before samples are drawn
    step = checkpoint_step(run.checkpoint(checkpoint))
    images = sample(run, count, checkpoint=str(step), in_turn=True, device=device, progress=progress)
    beside = {
        SAMPLES: as_png(grid(images, captions=images.class_names)),
        CARD: _card(run, name, step, licence).encode(),
    }

    def fill(folder: Path) -> Path:
        return export_diffusers(run, folder, checkpoint=str(step), overwrite=overwrite, beside=beside)

    if dry_run is not None:
        return str(fill(Path(dry_run)))
    with tempfile.TemporaryDirectory(prefix="msdiff-push-") as place:
        folder = fill(Path(place) / "repository")
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


def _card(run: Run, name: str, step: int, licence: str) -> str:
    """Return the model card."""
    results = [read_result(record) for record in read_evaluations(run.path / "evaluation.json") if _is_result(record)]
    return model_card(
        run.config(),
        name=name,
        step=step,
        licence=licence,
        results=results,
        launches=read_launches(run.path / "launches.jsonl"),
        samples=SAMPLES,
    )


def _is_result(record: dict[str, Any]) -> bool:
    return "metrics" in record and "ema" not in record  # of the weights that are pushed


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
