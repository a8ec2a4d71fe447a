"""How images are read: their size, and what happens to files that are unreadable or too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..config.run import MAX_PIXELS
from ..errors import UserError, require_size
from ..progress import Progress

Fit = Literal["exact", "crop", "resize", "pad"]


class SizesDifferError(UserError):
    """Images have several sizes, and no size was given to which they are brought."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `open_data`, with which every source is opened.

    Attributes:
        size: (height, width) that the images must have or are converted to; None: their own.
        fit: "exact" (raise if an image has another size), "crop" (scale, then keep the centre), "resize", or "pad"
            (unscaled on black).
        skip_bad: skip unreadable image files with one warning instead of raising.
        max_pixels: images with more pixels count as unreadable.
        progress: called with (files read, total files) while image files are decoded; None: shown as the program does.

    Raises:
        UserError: if size or fit is invalid, or fit is given without size.
    """

    size: tuple[int, int] | None = None
    fit: Fit = "exact"
    skip_bad: bool = False
    max_pixels: int = MAX_PIXELS
    progress: Progress | None = None

    def __post_init__(self) -> None:
        require_size("data.size", self.size)
        if self.size is not None and self.size[0] * self.size[1] > self.max_pixels:
            raise UserError(
                f"data.size={self.size[0]}x{self.size[1]} has more pixels than data.max_pixels={self.max_pixels}; give a smaller "
                "--size"
            )
        if self.fit not in get_args(Fit):
            raise UserError(f"data.fit={self.fit!r} must be one of {', '.join(get_args(Fit))}")
        if self.size is None and self.fit != "exact":
            raise UserError(f"data.fit={self.fit!r} needs data.size; add --size H W")
