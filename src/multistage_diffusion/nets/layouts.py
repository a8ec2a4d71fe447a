"""Published layouts of one-stage networks that a family's file brings along; `interop` holds those of the U-Nets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config.network import NetworkConfig
from ..errors import UserError, require
from ..registry import Registry

Tensors = dict[str, Tensor]
Pairs = Iterable[tuple[str, str]]  # (published name, ours), without .weight and .bias

PATCHES = "encoders.0.patches.linear.weight"
SIZES = {1152: 72}  # channels of an attention head by width, where published networks have others than 64


class PublishedLayout(ABC):
    """Names and shapes of the weights of a published network with one stage, and what its files do not tell.

    A layout stands in the file of its family:

        @LAYOUTS.add("mine")
        class Mine(PublishedLayout): ...

    Attributes:
        family: of the network.
        code: whose code writes it, for messages.
        suffix: of a file that holds it; empty: it is read only.
        class_name: `_class_name` in the config.json of a folder of diffusers; empty: it is a file.
        diffusion: the keys of a run's `diffusion` with which its networks are trained.
        options: what the user may tell of its networks because files do not: of head_channels, encoder_depth, classes,
            drop_sigma and noise.
        averaged: whether a file holds the averages alone, as a state dict.
        marks: names of tensors by which the layout is recognised.
    """

    family: ClassVar[str]
    code: ClassVar[str]
    suffix: ClassVar[str] = ""
    class_name: ClassVar[str] = ""
    diffusion: ClassVar[dict[str, Any]]
    options: ClassVar[frozenset[str]] = frozenset()
    averaged: ClassVar[bool] = False
    marks: ClassVar[frozenset[str]]

    @classmethod
    def reads(cls, told: Mapping[str, Any]) -> bool:
        """Return whether a config.json of a folder of diffusers is that of such a network."""
        return cls.class_name != "" and told.get("_class_name") == cls.class_name

    @classmethod
    @abstractmethod
    def settings(cls, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the network's settings, without `family`.

        Args:
            tensors: by published name.
            told: what shapes do not show: keys of config.json of a folder, and head_channels, encoder_depth, classes and
                drop_sigma of the user.

        Raises:
            UserError: naming a tensor that is missing or has an impossible shape.
        """

    @classmethod
    @abstractmethod
    def ours(cls, tensors: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return our state dict, given all the tensors of `theirs`.

        Raises:
            UserError: if the weights cannot be those of such a network.
        """

    @classmethod
    @abstractmethod
    def theirs(cls, state: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return the published tensors of our state dict, also on the meta device.

        Raises:
            UserError: if the layout has no place for such a network.
        """


LAYOUTS: Registry[type[PublishedLayout]] = Registry("layout", "multistage_diffusion.nets")


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """Return a tensor's shape.

    Raises:
        UserError: if it is missing, empty, or has another number of dimensions.
    """
    if name not in tensors:
        raise UserError(f"has no {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise UserError(f"{name} has shape {list(shape)}, not {dims} dimensions")
    return shape


def counted_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many blocks there are: one more than the largest number after the prefix."""
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix))
    return 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 6), default=-1)


def square_side(patches: int, name: str) -> int:
    """Return the patches on a side of a square image.

    Raises:
        UserError: if their number is no square.
    """
    side = math.isqrt(patches)
    require(side * side == patches, f"{name} holds {patches} positions of patches, which are no square")
    return side


def head_channels(width: int, told: Mapping[str, Any]) -> int:
    """Return the channels of an attention head: told, or those of the published network of this width.

    Raises:
        UserError: if they do not divide the width.
    """
    said = told.get("head_channels")
    head = SIZES.get(width, 64) if said is None else int(said)
    assumed = " (assumed)" if said is None else ""
    require(
        width % head == 0,
        f"head_channels={head}{assumed} does not divide the width {width} of the network; give another --head-channels",
    )
    return head


def transformer_settings(
    tensors: Mapping[str, Tensor], told: Mapping[str, Any], *, patches: str, hidden: str, depths: tuple[int, int]
) -> dict[str, Any]:
    """Return the settings that all families of transformers have.

    Args:
        tensors: by published name.
        told: see `PublishedLayout.settings`.
        patches, hidden: names of the weights of the patches' convolution and of the first layer of an MLP.
        depths: blocks of encoder and decoder.

    Raises:
        UserError: if a tensor is missing or has an impossible shape, or heads do not divide the width.
    """
    width, channels, patch, _ = shape_of(tensors, patches, 4)
    return {
        "channels": channels,
        "patch": patch,
        "encoder_width": width,
        "decoder_widths": (width,),
        "encoder_depth": depths[0],
        "decoder_depths": (depths[1],),
        "head_channels": head_channels(width, told),
        "mlp_ratio": shape_of(tensors, hidden, 2)[0] / width,
    }


def require_published(config: NetworkConfig, **settings: object) -> None:
    """Raise UserError unless a network has one stage of its encoder's width, no augmentation, and these settings."""
    alike = (config.decoder_widths, config.separate, config.augment_dim) == ((config.encoder_width,), False, 0)
    require(
        alike,
        f"family {config.family!r} is published with one stage of the encoder's width, without augmentation labels, not with "
        f"decoder widths {list(config.decoder_widths)}; this run cannot be exported",
    )
    heads = getattr(config, "decoder_head_channels", None)
    require(
        heads in (None, (getattr(config, "head_channels", None),)),
        f"network.decoder_head_channels={heads!r}: the published code has the heads of the encoder in all blocks; this run "
        "cannot be exported",
    )
    for name, value in settings.items():
        found = getattr(config, name)
        require(
            found == value,
            f"network.{name}={found!r}: the published code has {value!r} only; this run cannot be exported",
        )


def with_kinds(pairs: Pairs, names: Collection[str], place: int) -> Iterator[tuple[str, str]]:
    """Yield pairs with .weight and .bias, those whose name at `place` (0: theirs, 1: ours) is among the names."""
    for pair in pairs:
        for kind in ("weight", "bias"):
            full = (f"{pair[0]}.{kind}", f"{pair[1]}.{kind}")
            if full[place] in names:
                yield full


def renamed(tensors: Mapping[str, Tensor], pairs: Pairs) -> Tensors:
    """Return tensors by our names, of those that are there; the convolution of patches as a linear layer on their pixels."""
    found = {ours: tensors[theirs] for theirs, ours in with_kinds(pairs, tensors.keys(), 0)}
    return {name: tensor.flatten(1) if name == PATCHES else tensor for name, tensor in found.items()}


def named_back(state: Mapping[str, Tensor], pairs: Pairs, patch: int) -> Tensors:
    """Return tensors by published names, of those that are there; the linear layer of patches as a convolution."""
    found = {}
    for theirs, ours in with_kinds(pairs, state.keys(), 1):
        found[theirs] = state[ours].unflatten(1, (-1, patch, patch)) if ours == PATCHES else state[ours]  # type: ignore[no-untyped-call]
    return found


def positive_number(value: object, name: str) -> int:
    """Return a positive whole number of a config.json.

    Raises:
        UserError: if it is none.
    """
    if type(value) is not int or not 0 < value < 10**6:
        raise UserError(f"config.json: {name}={value!r} must be a positive whole number")
    return value


def chunks(tensor: Tensor, names: Iterable[str]) -> Tensors:
    """Return consecutive equal parts of a tensor by name."""
    listed = list(names)
    return dict(zip(listed, torch.chunk(tensor, len(listed)), strict=True))
