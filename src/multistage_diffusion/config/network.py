"""Settings of a network: those that every family has, and what a family brings; a file in nets/ adds a family."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..errors import require
from ..registry import Registry

S = TypeVar("S")


class Families(Registry["type[NetworkConfig]"]):
    """A registry of families that gives each class its name as attribute `family`; configurations are written with it."""

    def add(self, name: str) -> Callable[[S], S]:
        """Return a decorator that adds a class under a name; see Registry.add."""
        register = super().add(name)

        def added(cls: S) -> S:
            cls.family = name  # type: ignore[attr-defined]
            return register(cls)

        return added


FAMILIES = Families("network.family", "multistage_diffusion.nets")
DEFAULT_FAMILY = "ncsnpp"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ABC):
    """The settings that every network has, and what a family of networks brings.

    A family is a frozen dataclass in a file of nets/, with its own settings, added to FAMILIES. It defines `encoder` and
    `decoder`, the parts of a `nets.network.MultiDecoderNetwork`. All else has a default that holds for any network; a
    family replaces what it knows better:

    - settings: `__post_init__` checks them; `per_stage` and `in_shapes` say what they decide; `advice` are warnings.
    - sizes: `multiple`, to which inputs are padded.
    - counting: `counted_layers`, if its publications do not count all multiply-adds; `elements`, if there is a formula.
    - drawing: `title`, `boxes` and `notes`.
    - planning: `largest_decoders` and `decoder_choices`, if more than widths differ between decoders.

    Its blocks are `nets.network.Block`s, on which execution.recompute and execution.compile act, and its convolutions of
    images `nets.blocks.ImageConv`s, on which execution.channels_last acts (or `feature_maps` is false). It runs on the meta
    device, where it is counted.

    Attributes:
        family: name of the family, in nets/: "ncsnpp" (score_sde's NCSN++), "ddpmpp" (EDM's DDPM++), "ldm" (latent
            diffusion's U-Net), "meme" (the iU-Net of MEME's experts) or another of FAMILIES. It decides which settings
            there are besides these.
        channels: image channels.
        encoder_width: width of the shared encoder.
        decoder_widths: one width per stage, lowest noise first.
        dropout: probability inside blocks.
        separate: share nothing: stage k is an ordinary network of width decoder_widths[k], encoder included.
        num_classes: 0 for unconditional.
        augment_dim: length of the augmentation label, 0 for none.
        title: name of the family in a drawing; empty: that of the setting.
        per_stage: settings with one value for each stage; None stands for no values.
        in_shapes: settings that decide shapes or names of weights, so that weights of other settings do not fit.
        resizable: whether a decoder can be the first channels of a wider one, see training.resizing.
        feature_maps: whether it computes feature maps, whose memory format execution.channels_last decides.
    """

    family: str = field(init=False, default="")
    channels: int = 3
    encoder_width: int = 128
    decoder_widths: tuple[int, ...] = (128,)
    dropout: float = 0.1
    separate: bool = False
    num_classes: int = 0
    augment_dim: int = 0

    title: ClassVar[str] = ""
    per_stage: ClassVar[tuple[str, ...]] = ("decoder_widths",)
    in_shapes: ClassVar[tuple[str, ...]] = ()
    resizable: ClassVar[bool] = False
    feature_maps: ClassVar[bool] = True

    @staticmethod
    def of(family: str = DEFAULT_FAMILY, **settings: Any) -> NetworkConfig:
        """Return the settings of a family by name; settings that are not given have the family's defaults.

        Raises:
            UserError: if there is no such family, or a setting is refused.
        """
        return FAMILIES[family](**settings)

    def __post_init__(self) -> None:
        require(self.channels > 0, f"network.channels={self.channels} must be positive")
        require(len(self.decoder_widths) > 0, "network.decoder_widths must name at least one decoder")
        require(0 <= self.dropout < 1, f"network.dropout={self.dropout} must be in [0, 1)")
        for name in ("num_classes", "augment_dim"):
            require(getattr(self, name) >= 0, f"network.{name}={getattr(self, name)} must be >= 0")
        for name in self.per_stage:
            value, stages = getattr(self, name), len(self.decoder_widths)
            require(
                value is None or len(value) == stages,
                f"network.{name}={list(value or ())} needs one value for each of the {stages} stages"
                + (f", such as {[value[0]] * stages}" if value and stages <= 10 else ""),
            )
        for name, width in self.named_widths():
            require(width > 0, f"{name} must be positive, such as 64")
        self.require_buildable(
            ("channels", self.channels, 10_000),
            ("decoder_widths: stages", len(self.decoder_widths), 1000),
            ("encoder_width or decoder_widths: width", max(self.widths), 100_000),
            ("num_classes", self.num_classes, 10**7),
            ("augment_dim", self.augment_dim, 10**6),
        )

    @staticmethod
    def require_buildable(*sizes: tuple[str, int, int]) -> None:
        """Refuse (name, size, most) of sizes that no machine can hold, before anything is counted or built."""
        for name, found, most in sizes:
            require(found <= most, f"network.{name} {found} is more than {most}, the most that is built")

    def named_widths(self) -> Iterator[tuple[str, int]]:
        """Yield each width after the words that name its setting and value: the encoder's if it counts, then the decoders'."""
        if not self.separate:
            yield f"network.encoder_width: width {self.encoder_width}", self.encoder_width
        for width in self.decoder_widths:
            yield f"network.decoder_widths={list(self.decoder_widths)}: width {width}", width

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of all decoders and encoders."""
        return (*self.decoder_widths, *self.encoder_widths)

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """The width of the shared encoder, or of each stage's."""
        return self.decoder_widths if self.separate else (self.encoder_width,)

    @abstractmethod
    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build an encoder: called with (x, noise, cond), it returns what a decoder takes.

        x is (B, C, H, W) with sides that are multiples of `multiple`, noise (B,). cond is a Conditioning, with labels if
        num_classes > 0 and augmentation labels if augment_dim > 0 (`nets.blocks.NoiseEmbedding` embeds all three). The
        result is a tensor, an `Encoded`, or another object whose `split(counts)` returns consecutive groups of rows.

        Args:
            stage: index, 0 for the lowest noise; a shared encoder gets 0.
            width: of this encoder.
        """

    @abstractmethod
    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage: it maps rows of its encoder's result to (B, C, H, W).

        Args:
            stage: index, 0 for the lowest noise; its width is decoder_widths[stage].
            encoder_width: width of its encoder.
        """

    @property
    def multiple(self) -> int:
        """The number of which the sides of an encoder's input are multiples; the network pads to it."""
        return 1

    def require_size(self, height: int, width: int) -> None:
        """Raise UserError if inputs are so small that half of what is computed, or more, would be padding."""
        side = max(height, width)
        require(
            self.multiple < 2 * side,
            f"network.family={self.family}: these settings need sides that are multiples of {self.multiple}, far more "
            f"than sides of {side}; change them",
        )

    def counted_layers(self, part: nn.Module) -> Iterable[nn.Module] | None:
        """Return the layers of an encoder or decoder that multiply-adds count; None: all arithmetic counts.

        A layer's output element takes one multiply-add for each weight of its output channel.
        """
        return None

    def elements(self, height: int, width: int) -> int | None:
        """Estimate the most elements of features held at a time in a call without gradients, per image; None: unknown."""
        return None

    def boxes(self, part: nn.Module) -> Sequence[Sequence[nn.Module]] | None:
        """Return the modules in each box of a drawing of an encoder or decoder; None: blocks of one size share a box."""
        return None

    def notes(self, stage: int) -> list[str]:
        """Return lines that a drawing writes at a stage."""
        return []

    def advice(self) -> list[str]:
        """Return warnings about settings that can be built but are likely to be mistakes."""
        return []

    @property
    def unshared(self) -> str | None:
        """The first setting by which decoders differ so that they are no slices of one; None: all may be."""
        for name in self.per_stage:
            value = getattr(self, name)
            sliced = name == "decoder_widths" and self.resizable and not self.separate
            if value is not None and len(set(value)) > 1 and not sliced:
                return name
        return None

    def single_stage(self, stage: int, width: int, **others: object) -> NetworkConfig:
        """Return the settings of a network with one stage's decoder alone, at another width.

        Args:
            stage: index, 0 for the lowest noise.
            width: of the decoder.
            **others: other settings per stage that the decoder gets instead of its own.

        Raises:
            UserError: if that is not valid there.
        """
        given = {name: value for name in self.per_stage if (value := getattr(self, name)) is not None}
        own: dict[str, Any] = {name: (value[stage],) for name, value in given.items()}
        asked = {name: (value,) for name, value in others.items()}
        return dataclasses.replace(self, **{**own, **asked, "decoder_widths": (width,)})

    def largest_decoders(self, stages: int) -> dict[str, Any]:
        """Return settings of so many decoders, all as large as the largest: from which a plan's probes are made."""
        return {"decoder_widths": (max(self.decoder_widths),) * stages}

    def decoder_choices(self, width: int) -> Sequence[dict[str, Any]]:
        """Return what else than its width a plan may set of a stage's decoder of this width, a value for each name."""
        return [{}]

    def functional_settings(self) -> dict[str, object]:
        """Return the settings, by key, that must be equal for the same weights to compute the same."""
        common = {f.name for f in dataclasses.fields(NetworkConfig)}
        others = common | {*self.per_stage, *self.in_shapes}
        names = ("family", *(f.name for f in dataclasses.fields(self) if f.name not in others))
        return {f"network.{name}": getattr(self, name) for name in names}
