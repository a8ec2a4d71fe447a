"""Image output: grids, PNG files, npz archives."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..errors import UserError
from ..files import new_folder, write_atomic, write_file
from .captions import STRIP as STRIP
from .captions import draw_caption

CELL = 64  # default side of a grid's cells in pixels; small images are enlarged up to it
LINE = 128  # grey of the lines between cells, visible beside black and white images

MOST_IN_GRID = 10_000  # most images in a picture for viewing

# what images are written as; webp without loss
KINDS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "optimize": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True},
}
_OWN = re.compile(rf"\d{{6,}}(-[^/]+)?\.({'|'.join(KINDS)})|dataset\.json")  # names that folder_of_images gives
_LONGEST = 60  # characters of a class in a file name


def grid(
    images: Tensor,
    columns: int | None = None,
    scale: int | None = None,
    pad: int = 1,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Lay images out row by row, each enlarged by repeating its pixels, with grey lines around them.

    Args:
        images: uint8 (N, C, H, W), C = 1 (grey) or 3 (RGB), N >= 1.
        columns: images per row; default: as square as possible.
        scale: whole enlargement factor; default: the largest that keeps an image's longer side within 64 pixels.
        pad: width of the lines in pixels of the result.
        captions: a text below each image, such as its class; shortened to the image's width.

    Returns:
        An image of mode "L" or "RGB"; unused cells at the end are line grey.

    Raises:
        UserError: for another type or shape, columns or scale below 1, pad below 0, or another number of captions.
    """
    _check(images)
    if captions is not None and len(captions) != len(images):
        raise UserError(f"captions: {len(captions)} for {len(images)} images; give one per image")
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = cell(height, width)[0] // width if scale is None else scale
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("pad", pad, 0)):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")
    rows = math.ceil(count / columns)
    below = 0 if captions is None else STRIP
    step_y, step_x = height * scale + below + pad, width * scale + pad
    canvas = torch.full((channels, rows * step_y + pad, columns * step_x + pad), LINE, dtype=torch.uint8)
    large = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for i, image in enumerate(large):
        top, left = pad + i // columns * step_y, pad + i % columns * step_x
        canvas[:, top : top + height * scale, left : left + width * scale] = image
    picture = to_pil(canvas)
    for i, caption in enumerate(captions or ()):
        corner = (pad + i % columns * step_x, pad + i // columns * step_y + height * scale)
        draw_caption(picture, corner, width * scale, caption)
    return picture


def cell(height: int, width: int) -> tuple[int, int]:
    """Return (width, height), in pixels, of an image of this size in a grid of the default scale, without lines."""
    scale = max(1, CELL // max(height, width))
    return scale * width, scale * height


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with text by key that image.info holds when it is opened."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    write_atomic(path, _encoded(image, "png", pnginfo=info))


@contextmanager
def folder_of_images(
    folder: Path,
    labels: Tensor | None = None,
    names: Sequence[str] | None = None,
    *,
    kind: str = "png",
    replace: bool = False,
) -> Iterator[Callable[[int, Tensor], object]]:
    """Yield a function that writes images as 000000.png, 000001.png, ..., given (number of the first, images).

    Images of classes are named 000000-CLASS.png; characters that are awkward in file names become "_".

    The folder appears complete at the end. After an error nothing is changed.

    Args:
        folder: the folder to write.
        labels: class of every image, int64 (N,), written to dataset.json as EDM's tools do; None: no dataset.json.
        names: name of the class of every image; None: the number.
        kind: one of KINDS.
        replace: replace an existing folder of such images.

    Raises:
        UserError: if a folder exists that must not be replaced, or holds anything else.
    """
    if folder.is_dir():
        others = [p.name for p in sorted(folder.iterdir()) if not _OWN.fullmatch(p.name) or p.is_dir()]
        if others:
            raise UserError(
                f"{folder}: holds {others[0]!r}, which is no sample; it is not replaced; choose another folder"
            )
    classes = None if labels is None else labels.tolist()
    texts = list(map(str, classes)) if names is None and classes is not None else names

    def name(i: int) -> str:
        return f"{i:06d}{'' if texts is None else f'-{_plain(texts[i])}'}.{kind}"

    with new_folder(folder, replace=replace) as temporary:

        def write(first: int, images: Tensor) -> None:
            _check(images)
            for i, image in enumerate(images.cpu()):
                write_file(temporary / name(first + i), _encoded(to_pil(image), kind))

        yield write
        if classes is not None:
            listing: dict[str, Any] = {"labels": [[name(i), label] for i, label in enumerate(classes)]}
            if texts != list(map(str, classes)):
                known = dict(zip(classes, texts or (), strict=True))
                listing["class_names"] = [known.get(i, str(i)) for i in range(max(classes) + 1)]
            write_file(temporary / "dataset.json", json.dumps(listing).encode())


def save_npz(images: Tensor, path: Path, labels: Tensor | None = None) -> None:
    """Write images, uint8 (N, C, H, W), as the array `images` of a compressed .npz archive, atomically.

    If there are labels, int64 (N,), they are its array `labels`.
    """
    _check(images)
    arrays: dict[str, Any] = {"images": images.cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.cpu().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def data_uri(image: Image.Image) -> str:
    """Return a PNG as a data: URL, for self-contained HTML."""
    return "data:image/png;base64," + base64.b64encode(as_png(image)).decode("ascii")


def as_png(image: Image.Image) -> bytes:
    """Return an image as the content of a PNG file."""
    return _encoded(image, "png")


def _encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **KINDS[kind], **more)
    return buffer.getvalue()


def _plain(name: str) -> str:
    """Return a name as a part of a file name: letters, digits, "-", "_" and "." stay, but not a "." in front."""
    return re.sub(r"[^\w.-]+", "_", name)[:_LONGEST].lstrip(".") or "_"


def to_pil(image: Tensor) -> Image.Image:
    """Convert uint8 (C, H, W) on the CPU, C = 1 or 3, to a PIL image."""
    array = image.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0 or images.shape[1] not in (1, 3):
        raise UserError(
            f"images: expected uint8 (N, C, H, W) with C = 1 or 3, got {images.dtype} {tuple(images.shape)}"
        )
