"""Data sets of latents: encoded once by a codec, stored in a cache folder and read back."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..contracts import Codec
from ..data import ImageData, to_float
from ..data.rows import LabelledRows, Rows, View, as_rows, batches
from ..errors import NotFiniteError, UserError
from ..files import cache_folder, write_atomic
from ..progress import Progress

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
    """Encode images.

    Args:
        codec: on `device`.
        images: uint8 (N, C, H, W), N > 0, a tensor on any device or rows that are read batch by batch.
        batch: images per batch; None: PIXELS_AT_ONCE pixels per batch.
        device: device of the codec.
        mirrored: encode the horizontally mirrored images instead.
        progress: called with (images done, N).

    Returns:
        Unscaled latents, float32 (N, c, h, w), on the CPU.

    Raises:
        NotFiniteError: if a latent is not finite.
    """
    count = len(images)
    channels, height, width = images.shape[-3:]
    batch = batch or max(1, PIXELS_AT_ONCE // (height * width))
    latents = torch.empty(count, *codec.latent_shape((channels, height, width)))
    for start, pixels in zip(range(0, count, batch), batches(images, batch), strict=True):
        x = to_float(pixels.to(device))
        part = codec.encode(x.flip(-1) if mirrored else x)
        if not part.isfinite().all():
            raise NotFiniteError(f"the codec's latents of images {start} to {start + len(x) - 1} are not finite")
        latents[start : start + batch] = part.cpu()
        if progress:
            progress(start + len(x), count)
    return latents


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
    again, with a warning.

    Args:
        codec: on `device`.
        data: the images, at least one.
        scale: factor applied to the latents; None: 1 / the standard deviation of all unscaled latents, as in Rombach et
            al. 2022 (section G).
        mirrored: whether to return the latents of the mirrored images, too.
        folder: the cache; default $MSDIFF_CACHE/latents, or ~/.cache/multistage-diffusion/latents.
        device, batch: see `encode_images`.
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
    found = {side: _read(path, shape) for side, path in paths.items()}
    missing = [side for side in sides if found[side] is None]

    def told(before: int) -> Progress | None:
        return None if progress is None else lambda done, _: progress(before + done, len(missing) * len(data))

    for number, side in enumerate(missing):
        news = told(number * len(data))
        made = encode_images(codec, data, batch=batch, device=device, mirrored=side, progress=news)
        _write(paths[side], made)
        found[side] = made
    tensors = [latents for latents in found.values() if latents is not None]
    scale = _scale(tensors, data.name) if scale is None else scale
    scaled = [*(latents * scale for latents in tensors), None]
    assert scaled[0] is not None
    return LatentData(scaled[0], scaled[1], data.labels, data.name, data.class_names), scale


def default_cache() -> Path:
    """Return the default cache folder of latents."""
    return cache_folder("latents")


def _key(codec: Codec, data: ImageData, mirrored: bool) -> str:
    return hashlib.sha256(repr((codec.fingerprint, data.fingerprint, mirrored)).encode()).hexdigest()


def _scale(tensors: list[Tensor], name: str) -> float:
    """Return 1 / the standard deviation of all values together, computed in float64."""
    count = sum(latents.numel() for latents in tensors)
    mean = sum(float(latents.sum(dtype=torch.float64)) for latents in tensors) / count
    squares = 0.0
    for latents in tensors:
        for rows in torch.split(latents, 1024):  # limits the memory of the float64 copies
            squares += float((rows.to(torch.float64) - mean).square().sum())
    if squares == 0:
        raise UserError(f"{name}: all latents are equal, which gives no scale; use other data or another codec")
    return 1.0 / math.sqrt(squares / count)


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().data).hexdigest()


def _write(path: Path, latents: Tensor) -> None:
    """Store latents in the cache; if that fails, only warn, because they can be encoded again."""
    try:
        write_atomic(path, save({"latents": latents}, metadata={"sha256": _digest(latents)}))
    except OSError as error:
        warnings.warn(
            f"{path}: latents cannot be kept ({error.strerror or error}) and will be made again; set MSDIFF_CACHE to a "
            "folder with room",
            stacklevel=3,
        )


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """Return cached latents; None if the file is missing or, with a warning, damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            latents: Tensor = file.get_tensor("latents")
            told = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        fault = str(error)
    else:
        if latents.dtype == torch.float32 and tuple(latents.shape) == shape and told == _digest(latents):
            return latents
        fault = "its content is not what was written"
    warnings.warn(f"{path}: damaged ({fault}); its latents are made again", stacklevel=3)
    return None
