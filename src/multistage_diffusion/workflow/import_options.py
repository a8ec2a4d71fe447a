"""Options of an import: impossible values are refused, and so are options that have no effect on what is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError, require, require_size
from ..interop.parts import HEADS, Published
from ..nets.layouts import PublishedLayout
from ..reading import brief

MOST = 10**6  # of a number that an option gives
# why options of U-Nets say nothing of a network in a family's own layout
_OF_LAYOUTS = {
    "size": "its file tells its size",
    "stages": "it has one stage",
    "edges": "it has one stage",
    "norm_groups": "it has no GroupNorm",
}


def require_positive(size: tuple[int, int] | None, numbers: Mapping[str, int | None]) -> None:
    """Raise UserError unless the numbers that are given are whole and positive."""
    require_size("size", size)
    for name, value in numbers.items():
        valid = value is None or (type(value) is int and 0 < value < MOST)
        require(valid, f"{name}={value} must be a positive whole number below {MOST}; leave it out for its default")


def require_unused(given: Mapping[str, Any], what: str) -> None:
    """Raise UserError if an option is given that has no meaning for what is imported."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{_said(name, value)}: has no meaning for {what}; leave it out")


def require_options_of(layout: type[PublishedLayout], given: Mapping[str, Any]) -> None:
    """Raise UserError if an option is given that says nothing of a network in a layout.

    Args:
        layout: of the network.
        given: values of all options but those that hold for any network; None: not given.
    """
    for name, value in given.items():
        if value is None or name in layout.options:
            continue
        why = _OF_LAYOUTS.get(name, "it has none, or its file tells it")
        raise UserError(f"{_said(name, value)}: has no meaning for a network of {layout.code}: {why}; leave it out")


def _said(name: str, value: object) -> str:
    """Return an option with its value, if that can be written in a word or two."""
    return f"{name}={value}" if isinstance(value, int | float | str | tuple | list) else name


def heads_of(published: Published, given: int | None) -> int:
    """Return the channels of an attention head: the given value, the file's value, or latent diffusion's usual 32."""
    if given is not None and published.family != "ldm":
        raise UserError(f"head_channels={given}: a network of family {published.family!r} has one head; leave it out")
    said = published.arguments.get(HEADS, 32) if given is None else given
    if type(said) is not int or said < 1:
        raise UserError(f"{HEADS}={brief(said)} must be a positive whole number")
    return said


def norm_groups_of(published: Published, given: int | None) -> int:
    """Return the largest number of GroupNorm groups: the given value, or the file's."""
    if given is None:
        return published.norm_groups
    if published.family == "ldm":
        raise UserError(f"norm_groups={given}: an LDM U-Net always has 32; leave it out")
    if published.norm_groups_known and published.norm_groups != given and published.family == "ddpmpp":
        raise UserError(f"norm_groups={given}: the file says {published.norm_groups}; leave it out")
    return given
