"""Data sets of latents: encoded once by a codec, stored in a cache folder and read back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..contracts import Codec
from ..data import ImageData, to_float
from ..data.rows import ArrayRows, LabelledRows, Rows, ScaledRows, View, as_rows, batches, chunks, stay_in_memory
from ..errors import NotFiniteError, UserError
from ..files import cache_folder
from ..progress import Progress
from .latent_files import FLOAT32, read_latents, write_latents

PIXELS_AT_ONCE = 1 << 18  # pixels per batch: 256 images of 32x32, 4 of 256x256


class LatentData(LabelledRows):
    """A data set in the form that networks are trained on: latents times a scale, float32, read by index.

    Args:
        latents: a tensor (N, c, h, w) on the CPU, or any other `Rows` of float32 latents.
        mirrored: latents of the horizontally mirrored images (not equal to mirrored latents), or None.
        labels: class numbers from 0, int64 (N,), or None.
        name: the source of the images; starts every error message.
        class_names: one name per class.

    Attributes:
        mirrored: the rows of `mirrored`, or None.
    """

    def __init__(
        self,
        latents: Rows | Tensor,
        mirrored: Rows | Tensor | None,
        labels: npt.NDArray[np.int64] | None,
        name: str,
        class_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(as_rows(latents), labels, name, class_names)
        self.mirrored = None if mirrored is None else as_rows(mirrored)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> LatentData:
        """Return a view of the latents at the given indices, in that order."""
        index = self._index(indices)
        mirrored = None if self.mirrored is None else View(self.mirrored, index)
        labels = None if self.labels is None else self.labels[index]
        return LatentData(View(self.storage, index), mirrored, labels, self.name, self.class_names)


def encode_images(
    codec: Codec,
    images: Tensor | Rows,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    mirrored: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Encode images; arguments and errors as for `encoded`.

    Returns:
        Unscaled latents, float32 (N, c, h, w), on the CPU.
    """
    parts = encoded(codec, images, batch=batch, device=device, mirrored=mirrored, progress=progress)
    latents = torch.empty(len(images), *codec.latent_shape(tuple(map(int, images.shape[-3:]))))  # type: ignore[arg-type]
    start = 0
    for part in parts:
        latents[start : start + len(part)] = part
        start += len(part)
    return latents


def encoded(
    codec: Codec,
    images: Tensor | Rows,
    *,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    mirrored: bool = False,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Encode images, a batch at a time.

    Args:
        codec: on `device`.
        images: uint8 (N, C, H, W), N > 0, a tensor on any device or rows that are read batch by batch.
        batch: images per batch; None: PIXELS_AT_ONCE pixels per batch.
        device: device of the codec.
        mirrored: encode the horizontally mirrored images instead.
        progress: called with (images done, N).

    Yields:
        Unscaled latents, float32 (n, c, h, w), on the CPU.

    Raises:
        NotFiniteError: if a latent is not finite.
    """
    count, (height, width) = len(images), images.shape[-2:]
    batch = batch or max(1, PIXELS_AT_ONCE // (height * width))
    for start, pixels in zip(range(0, count, batch), batches(images, batch), strict=True):
        x = to_float(pixels.to(device))
        part = codec.encode(x.flip(-1) if mirrored else x)
        if not part.isfinite().all():
            raise NotFiniteError(f"the codec's latents of images {start} to {start + len(x) - 1} are not finite")
        yield part.float().cpu()
        if progress:
            progress(start + len(x), count)


def cached_latents(
    codec: Codec,
    data: ImageData,
    *,
    scale: float | None,
    mirrored: bool = False,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[LatentData, float]:
    """Return a data set's latents; encode them only if they are not in the cache.

    A cache file holds the unscaled latents of one data set, mirrored or not, for one codec. Damaged files are encoded
    again, with a warning. Latents that take much memory (see `stay_in_memory`) are read from the file when they are drawn.

    Args:
        codec: on `device`.
        data: the images, at least one.
        scale: factor applied to the latents; None: 1 / the standard deviation of all unscaled latents, as in Rombach et
            al. 2022 (section G).
        mirrored: whether to return the latents of the mirrored images, too.
        folder: the cache; default $MSDIFF_CACHE/latents, or ~/.cache/multistage-diffusion/latents.
        device, batch: see `encoded`.
        progress: called with (images encoded, total images) during encoding.

    Returns:
        (latents times the scale, the scale).

    Raises:
        UserError: if the codec does not accept the image shape, or scale is None and all latents are equal.
        NotFiniteError: if a latent is not finite.
    """
    folder = default_cache() if folder is None else folder
    sides = (False, True) if mirrored else (False,)
    paths = {side: folder / f"{_key(codec, data, side)}.safetensors" for side in sides}
    shape = (len(data), *codec.latent_shape(data.shape))
    found = {side: read_latents(path, shape) for side, path in paths.items()}
    missing = [side for side in sides if found[side] is None]

    def told(before: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(before + done, len(missing) * len(data))

    for number, side in enumerate(missing):
        encode = partial(
            encoded, codec, data, batch=batch, device=device, mirrored=side, progress=told(number * len(data))
        )
        found[side] = write_latents(paths[side], shape, encode)
    known = [rows for rows in found.values() if rows is not None]
    scale = _scale(known, data.name) if scale is None else scale
    kept = stay_in_memory(len(known) * math.prod(shape) * FLOAT32.itemsize)
    scaled = [ScaledRows(rows, scale) for rows in known]
    parts: list[Rows] = [ArrayRows(rows.rows(np.arange(len(data)))) if kept else rows for rows in scaled]
    return LatentData(parts[0], parts[1] if mirrored else None, data.labels, data.name, data.class_names), scale


def default_cache() -> Path:
    """Return the default cache folder of latents."""
    return cache_folder("latents")


def _key(codec: Codec, data: ImageData, mirrored: bool) -> str:
    return hashlib.sha256(repr((codec.fingerprint, data.fingerprint, mirrored)).encode()).hexdigest()


def _scale(parts: list[Rows], name: str) -> float:
    """Return 1 / the standard deviation of all values together, computed in float64."""
    count = sum(len(rows) * math.prod(rows.shape) for rows in parts)

    def total(of: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> float:
        return sum(float(of(part.astype(np.float64)).sum()) for rows in parts for part in chunks(rows, 1024))

    mean = total(lambda values: values) / count
    squares = total(lambda values: (values - mean) ** 2)
    if squares == 0:
        raise UserError(f"{name}: all latents are equal, which gives no scale; use other data or another codec")
    return 1.0 / math.sqrt(squares / count)
