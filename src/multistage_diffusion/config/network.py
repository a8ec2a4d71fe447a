"""Widths and depth of a network, validated: GroupNorm groups and attention heads must fit the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import require

LDM_GROUPS = 32  # groups of every GroupNorm of the LDM U-Net
GROUPS = 16  # most groups of a GroupNorm of the other families, unless norm_groups is set
# Settings of one family only: (family, name, default).
OWN_SETTINGS = (("ldm", "head_channels", 32), ("ldm", "decoder_attention", None), ("meme", "attention_shares", None))


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Widths and depth of a multi-decoder U-Net.

    Attributes:
        family: "ncsnpp" (score_sde's NCSN++), "ddpmpp" (EDM's DDPM++), "ldm" (latent diffusion's U-Net) or "meme" (the
            iU-Net of MEME's experts).
        channels: image channels.
        encoder_width: width of the shared encoder; the embedding is 4 times as wide.
        decoder_widths: one width per stage, lowest noise first.
        channel_mult: width factor per level; each level halves the resolution of the one before.
        blocks_per_level: residual blocks per encoder level (a decoder has one more).
        attention_factors: downsample factors of blocks with attention, or mixers with "meme" (1 is full resolution).
        dropout: probability inside residual blocks.
        separate: share nothing: stage k is an ordinary network of width decoder_widths[k], encoder included.
        num_classes: 0 for unconditional.
        augment_dim: length of the augmentation label, 0 for none.
        head_channels: channels of an attention head ("ldm" only; the others have one head).
        decoder_attention: per stage, whether its decoder has attention ("ldm" only); None: all have.
        attention_shares: per stage, the share of a mixer's channels that attention mixes; convolution mixes the others
            ("meme" only, which needs it).
        norm_groups: a GroupNorm has min(channels // 4, norm_groups) groups ("ncsnpp" and "ddpmpp" only): 16 in the
            published multi-stage networks, 32 in those of score_sde and EDM.
    """

    family: Literal["ncsnpp", "ddpmpp", "ldm", "meme"] = "ncsnpp"
    channels: int = 3
    encoder_width: int = 128
    decoder_widths: tuple[int, ...] = (128,)
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 4
    attention_factors: tuple[int, ...] = (2,)
    dropout: float = 0.1
    separate: bool = False
    num_classes: int = 0
    augment_dim: int = 0
    head_channels: int = 32
    decoder_attention: tuple[bool, ...] | None = None
    attention_shares: tuple[float, ...] | None = None
    norm_groups: int = GROUPS

    def __post_init__(self) -> None:
        require(self.channels > 0, f"network.channels={self.channels} must be positive")
        require(len(self.decoder_widths) > 0, "network.decoder_widths must name at least one decoder")
        require(len(self.channel_mult) > 0, "network.channel_mult must name at least one level")
        require(self.blocks_per_level > 0, f"network.blocks_per_level={self.blocks_per_level} must be positive")
        require(0 <= self.dropout < 1, f"network.dropout={self.dropout} must be in [0, 1)")
        for name in ("num_classes", "augment_dim"):
            require(getattr(self, name) >= 0, f"network.{name}={getattr(self, name)} must be >= 0")
        for factor in self.attention_factors:
            require(
                factor in [2**i for i in range(len(self.channel_mult))],
                f"network.attention_factors={list(self.attention_factors)}: {factor} is not a level's downsample "
                f"factor ({', '.join(str(2**i) for i in range(len(self.channel_mult)))})",
            )
        require(min(self.channel_mult) > 0, f"network.channel_mult={list(self.channel_mult)} must be positive")
        require(self.norm_groups > 0, f"network.norm_groups={self.norm_groups} must be positive")
        require(
            self.family in ("ncsnpp", "ddpmpp") or self.norm_groups == GROUPS,
            f"network.norm_groups={self.norm_groups} is a setting of network.family=ncsnpp and ddpmpp only; leave it out",
        )
        self._check_size()
        self._check_widths()
        for family, name, default in OWN_SETTINGS:
            require(
                self.family == family or getattr(self, name) == default,
                f"network.{name}={_plain(getattr(self, name))} is a setting of network.family={family} only; leave it out",
            )
        if self.family == "ldm":
            self._check_heads()
        if self.family == "meme":
            self._check_experts()

    def _check_size(self) -> None:
        """Refuse sizes that no machine can hold, before anything is counted or built."""
        encoders = () if self.separate else (self.encoder_width,)
        for name, found, most in (
            ("network.channels", self.channels, 10_000),
            ("network: width", max((*self.decoder_widths, *encoders)), 100_000),
            ("network.channel_mult: factor", max(self.channel_mult), 1000),
            ("network.channel_mult: levels", len(self.channel_mult), 16),
            ("network.blocks_per_level", self.blocks_per_level, 1000),
            ("network.decoder_widths: stages", len(self.decoder_widths), 1000),
            ("network.num_classes", self.num_classes, 10**7),
            ("network.augment_dim", self.augment_dim, 10**6),
        ):
            require(found <= most, f"{name} {found} is more than {most}, the most that is built")

    def _check_widths(self) -> None:
        """Check that the groups of every GroupNorm divide its channels."""
        encoders = self.decoder_widths if self.separate else (self.encoder_width,)
        for width in {*self.decoder_widths, *encoders}:
            require(width >= 4 and width % 2 == 0, f"network: width {width} must be even and at least 4")
            # The first block of an encoder gets the bare width from the input convolution.
            for mult in (*((1,) if width in encoders else ()), *self.channel_mult):
                channels, groups = width * mult, self._groups(width * mult)
                multiple = 4 if self.family != "ldm" and channels < 4 * self.norm_groups else self._groups(channels)
                require(
                    channels % groups == 0,
                    f"network: width {width} x {mult} = {channels} channels is not divisible into {groups} groups for "
                    f"GroupNorm; use a multiple of {multiple}",
                )
        most = LDM_GROUPS if self.family == "ldm" else self.norm_groups
        for decoder in self.decoder_widths:
            encoder = decoder if self.separate else self.encoder_width
            for channels in self._joined_channels(encoder, decoder):
                require(
                    channels % self._groups(channels) == 0,
                    f"network: encoder width {encoder} and decoder width {decoder} meet in {channels} channels, not "
                    f"divisible into {self._groups(channels)} groups for GroupNorm; use multiples of {most}",
                )

    def _groups(self, channels: int) -> int:
        return LDM_GROUPS if self.family == "ldm" else group_count(channels, self.norm_groups)

    def _check_heads(self) -> None:
        """Check that the heads of every LDM attention divide its channels."""
        require(self.head_channels > 0, f"network.head_channels={self.head_channels} must be positive")
        stages, attention = len(self.decoder_widths), self.decoder_attention
        require(
            attention is None or len(attention) == stages,
            f"network.decoder_attention={_plain(attention)} needs true or false for each of the {stages} stages",
        )
        mults = [mult for i, mult in enumerate(self.channel_mult) if 2**i in self.attention_factors]
        encoders = self.decoder_widths if self.separate else (self.encoder_width,)
        # The middle of an encoder always has attention.
        attended = [width * mult for width in encoders for mult in (*mults, self.channel_mult[-1])]
        for width, attends in zip(self.decoder_widths, attention or [True] * stages, strict=True):
            attended += [width * mult for mult in mults if attends]
        for channels in attended:
            require(
                channels % self.head_channels == 0,
                f"network.head_channels={self.head_channels} does not divide {channels} channels that attend; use 32",
            )

    def _check_experts(self) -> None:
        """Check that MEME's experts share nothing, and that each has a share of attention."""
        stages, shares = len(self.decoder_widths), self.attention_shares
        require(
            self.separate or stages == 1,
            f"network.separate={self.separate}: the {stages} experts of network.family=meme share nothing; set it to true",
        )
        require(
            shares is not None and len(shares) == stages and all(0 <= share <= 1 for share in shares),
            f"network.attention_shares={_plain(shares)} needs a number in [0, 1] for each of the {stages} stages: the "
            "share of channels that attend",
        )

    def _joined_channels(self, encoder: int, decoder: int) -> list[int]:
        """Return the channels of [h, skip] at the start of a decoder's blocks; the lowest h has the encoder's width."""
        joined = [2 * encoder * self.channel_mult[-1]]
        for mult, mult_before in zip(self.channel_mult, (1, *self.channel_mult), strict=False):
            joined.append(decoder * mult + encoder * mult_before)  # skip of the down block or input convolution
            if self.blocks_per_level > 1:
                joined.append(decoder * mult + encoder * mult)
        return joined


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def group_count(channels: int, most: int = GROUPS) -> int:
    """Return the GroupNorm groups of both pixel families: min(channels // 4, most)."""
    return min(channels // 4, most)
