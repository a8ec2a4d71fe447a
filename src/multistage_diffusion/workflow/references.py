"""References that samples are compared with: parts of a data set, files of statistics, batches of images."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import torch

from ..config import DataConfig
from ..data import ImageData
from ..data.sources import open_configured
from ..evaluation import FeatureExtractor, Reference, load_reference, make_reference
from ..progress import Progress

_STATISTICS, _IMAGES = ("mu.npy", "sigma.npy"), ("arr_0.npy", "images.npy")


def is_batch(path: Path) -> bool:
    """Return whether a path is an .npz file of images, such as the reference batches published with ADM."""
    names = _members(path)
    return any(name in names for name in _IMAGES)


def _members(path: Path) -> list[str]:
    """Return the names in an .npz file; none of anything else."""
    if path.suffix != ".npz" or not path.is_file():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):  # named by the reader
        return []


def read_reference(
    path: Path, extractor: FeatureExtractor, device: torch.device, progress: Progress | None = None
) -> Reference:
    """Read statistics, or compute those of a batch of images (.npz) that has none; all its features are kept.

    ADM (Dhariwal and Nichol 2021) publishes batches as `arr_0`, uint8 (N, H, W, 3), some with `mu` and `sigma` of its
    own Inception network.

    Raises:
        UserError: naming the file and its fault.
    """
    names = _members(path)
    if not is_batch(path) or any(name in names for name in _STATISTICS):
        return load_reference(path)
    images = open_configured(DataConfig(source=str(path)))
    reference = part_reference(extractor, images, "all", 0.0, len(images), device, progress)
    return dataclasses.replace(reference, source=str(path), fingerprint=None)  # of no run's data


def part_reference(
    extractor: FeatureExtractor,
    data: ImageData,
    part: str,
    held_out: float,
    keep: int,
    device: torch.device,
    progress: Progress | None,
) -> Reference:
    """Compute the statistics of a data set, or of its training or held-out images."""
    images = data if part == "all" else data.split(held_out)[part == "held-out"]
    return make_reference(
        extractor,
        images,
        data=data.name,
        fingerprint=data.fingerprint,
        part=part,
        held_out=None if part == "all" else held_out,
        keep=keep,
        device=device,
        progress=progress,
    )
