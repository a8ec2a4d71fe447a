"""Conversion of images to one size: unchanged, centre-cropped, resized or padded with black."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import UserError
from ..memory import require_memory
from .options import Fit
from .rows import Index, Rows, chunks

_AT_ONCE = 64  # images read at a time


def reachable(found: tuple[int, int], size: tuple[int, int], fit: Fit) -> bool:
    """Return whether fit can bring an image of (height, width) = found to size.

    "exact" needs the same size, "pad" an image that is not larger; "crop" and "resize" always work.
    """
    if fit == "exact":
        return found == tuple(size)
    return fit != "pad" or (found[0] <= size[0] and found[1] <= size[1])


def fit_image(
    image: Image.Image, size: tuple[int, int], fit: Fit, extent: tuple[float, float] | None = None
) -> Image.Image:
    """Convert an 8-bit grey or RGB image that is `reachable` to size = (height, width).

    "crop" scales the image (Lanczos) to cover the size and keeps the centre, in one resampling. "resize" scales it
    (Lanczos) and changes the aspect ratio. "pad" centres it unscaled on black; an odd remainder adds one pixel below or
    to the right. "exact" returns the image unchanged.

    `extent` is the (height, width) that the image's content takes, for one whose last row or column is less than a pixel;
    None: all.
    """
    height, width = size
    assert reachable((image.height, image.width), size, fit)
    if image.size == (width, height):
        return image
    down, across = (image.height, image.width) if extent is None else extent
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS, box=(0, 0, across, down))
    if fit == "pad":
        canvas = Image.new(image.mode, (width, height), 0)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    scale = min(across / width, down / height)
    left, top = (across - scale * width) / 2, (down - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], across), min(box[3], down))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit_rows(images: Rows, size: tuple[int, int], fit: Fit, name: str) -> npt.NDArray[np.uint8]:
    """Convert images with C = 1 or 3 to size = (height, width); return a new array (N, C, height, width).

    Raises:
        UserError: if fit is "exact" and the size differs, "pad" and the images are larger, or memory is too small.
    """
    channels, height, width = images.shape
    if not reachable((height, width), size, fit):
        raise wrong_size(name, "its images", (height, width), size, fit)
    require_pixels(len(images), channels, size)
    fitted = np.empty((len(images), channels, *size), np.uint8)
    for start, part in zip(range(0, len(images), _AT_ONCE), chunks(images, _AT_ONCE), strict=True):
        _fit(part, fitted[start : start + len(part)], fit)
    return fitted


def _fit(images: npt.NDArray[np.uint8], fitted: npt.NDArray[np.uint8], fit: Fit) -> None:
    """Convert images (n, C, H, W) to the size of `fitted` (n, C, height, width), which is written."""
    size = (fitted.shape[2], fitted.shape[3])
    for row, image in zip(fitted, images, strict=True):
        for plane, source in zip(row, image, strict=True):
            plane[:] = np.asarray(fit_image(Image.fromarray(source), size, fit))


class FittedRows:
    """Images that are converted to one size when they are drawn.

    Args:
        source: the images, C = 1 or 3.
        size: (height, width).
        fit: how they are converted; their size must be `reachable`.
    """

    def __init__(self, source: Rows, size: tuple[int, int], fit: Fit) -> None:
        self._source, self._size, self._fit = source, size, fit

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return (self._source.shape[0], *self._size)

    def __len__(self) -> int:
        return len(self._source)

    def rows(self, indices: Index) -> npt.NDArray[np.uint8]:
        """Return the rows at `indices`, see `Rows`."""
        fitted = np.empty((len(indices), *self.shape), np.uint8)
        _fit(self._source.rows(indices), fitted, self._fit)
        return fitted


def require_pixels(count: int, channels: int, size: tuple[int, int]) -> None:
    """Refuse more images of a size than memory can hold.

    Raises:
        UserError: naming the size.
    """
    what = f"data.size={size[0]}x{size[1]} for {count} images"
    require_memory(count * channels * size[0] * size[1], what, "give a smaller --size, or fewer images")


def padded_content(
    sizes: Collection[tuple[int, int]], size: tuple[int, int] | None, fit: Fit
) -> tuple[int, int] | None:
    """Return the common (height, width) before padding; None without padding or if the sizes differed."""
    if fit != "pad" or size is None or len(sizes) != 1:
        return None
    (found,) = sizes
    return None if found == tuple(size) else found


def wrong_size(name: str, what: str, found: tuple[int, int], size: tuple[int, int], fit: Fit) -> UserError:
    """Return the error for images that cannot be converted to the requested size."""
    sizes = f"{name}: {what}: height x width {found[0]}x{found[1]}"
    if fit == "pad":
        return UserError(
            f"{sizes} is larger than data.size={size[0]}x{size[1]}, and data.fit='pad' never scales; give a larger "
            f"--size, or --fit crop or --fit resize"
        )
    return UserError(
        f"{sizes}, not data.size={size[0]}x{size[1]}; add --fit crop, --fit resize or (smaller images) --fit pad"
    )
