"""The whole of a run in one frozen, validated value: what is trained, on what, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .schedules import VP, NoiseSchedule, SigmaPrior, UniformTime
from .stages import Stages

FORMAT_VERSION = 1
LDM_GROUPS = 32  # of every GroupNorm of the LDM U-Net


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on. `fingerprint` and `shape` are filled in when a run starts and checked at resume."""

    source: str = "digits"
    held_out: float = 0.1
    size: tuple[int, int] | None = None
    fit: Literal["exact", "crop", "resize"] = "exact"
    skip_bad: bool = False
    fingerprint: str = ""
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(0 <= self.held_out < 1, f"data.held_out={self.held_out} must be in [0, 1)")
        if self.size is not None:
            _require(min(self.size) > 0, f"data.size={self.size} must be positive")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Widths and depth of a multi-decoder U-Net.

    Attributes:
        family: "ncsnpp" (score_sde's NCSN++), "ddpmpp" (EDM's DDPM++) or "ldm" (latent diffusion's U-Net).
        channels: image channels.
        encoder_width: width of the shared encoder; the embedding is 4 times as wide.
        decoder_widths: one width per stage, lowest noise first.
        channel_mult: width factor per level; each level halves the resolution of the one before.
        blocks_per_level: residual blocks per encoder level (a decoder has one more).
        attention_factors: downsample factors at which blocks attend (1 is full resolution).
        dropout: probability inside residual blocks.
        separate: no sharing: stage k is an ordinary network of width decoder_widths[k], encoder included.
        num_classes: 0 for unconditional.
        augment_dim: length of the augmentation label, 0 for none.
        head_channels: channels of an attention head ("ldm" only; the others have one head).
        decoder_attention: per stage, whether its decoder attends ("ldm" only); None: all do.
    """

    family: Literal["ncsnpp", "ddpmpp", "ldm"] = "ncsnpp"
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

    def __post_init__(self) -> None:
        _require(self.channels > 0, f"network.channels={self.channels} must be positive")
        _require(len(self.decoder_widths) > 0, "network.decoder_widths must name at least one decoder")
        _require(len(self.channel_mult) > 0, "network.channel_mult must name at least one level")
        _require(self.blocks_per_level > 0, f"network.blocks_per_level={self.blocks_per_level} must be positive")
        _require(0 <= self.dropout < 1, f"network.dropout={self.dropout} must be in [0, 1)")
        for name in ("num_classes", "augment_dim"):
            _require(getattr(self, name) >= 0, f"network.{name}={getattr(self, name)} must be >= 0")
        for factor in self.attention_factors:
            _require(
                factor in [2**i for i in range(len(self.channel_mult))],
                f"network.attention_factors={list(self.attention_factors)}: {factor} is not a level's downsample "
                f"factor ({', '.join(str(2**i) for i in range(len(self.channel_mult)))})",
            )
        _require(min(self.channel_mult) > 0, f"network.channel_mult={list(self.channel_mult)} must be positive")
        self._check_widths()
        if self.family == "ldm":
            self._check_heads()
        else:
            for name, default in (("head_channels", 32), ("decoder_attention", None)):
                _require(
                    getattr(self, name) == default,
                    f"network.{name}={_plain(getattr(self, name))} is a setting of network.family=ldm only; leave it out",
                )

    def _check_widths(self) -> None:
        """Every GroupNorm must divide its channels."""
        encoders = self.decoder_widths if self.separate else (self.encoder_width,)
        for width in {*self.decoder_widths, *encoders}:
            _require(width >= 4 and width % 2 == 0, f"network: width {width} must be even and at least 4")
            # The input convolution hands an encoder's first block its bare width.
            for mult in (*((1,) if width in encoders else ()), *self.channel_mult):
                channels, groups = width * mult, self._groups(width * mult)
                multiple = LDM_GROUPS if self.family == "ldm" else 4 if channels < 64 else 16
                _require(
                    channels % groups == 0,
                    f"network: width {width} x {mult} = {channels} channels is not divisible into {groups} groups for "
                    f"GroupNorm; use a multiple of {multiple}",
                )
        for decoder in self.decoder_widths:
            encoder = decoder if self.separate else self.encoder_width
            for channels in self._joined_channels(encoder, decoder):
                _require(
                    channels % self._groups(channels) == 0,
                    f"network: encoder width {encoder} and decoder width {decoder} meet in {channels} channels, not "
                    f"divisible into {self._groups(channels)} groups for GroupNorm; use multiples of 16",
                )

    def _groups(self, channels: int) -> int:
        return LDM_GROUPS if self.family == "ldm" else group_count(channels)

    def _check_heads(self) -> None:
        """Every attention of an LDM U-Net must have whole heads."""
        _require(self.head_channels > 0, f"network.head_channels={self.head_channels} must be positive")
        stages, attention = len(self.decoder_widths), self.decoder_attention
        _require(
            attention is None or len(attention) == stages,
            f"network.decoder_attention={_plain(attention)} needs true or false for each of the {stages} stages",
        )
        mults = [mult for i, mult in enumerate(self.channel_mult) if 2**i in self.attention_factors]
        encoders = self.decoder_widths if self.separate else (self.encoder_width,)
        # An encoder's middle attends in any case.
        attended = [width * mult for width in encoders for mult in (*mults, self.channel_mult[-1])]
        for width, attends in zip(self.decoder_widths, attention or [True] * stages, strict=True):
            attended += [width * mult for mult in mults if attends]
        for channels in attended:
            _require(
                channels % self.head_channels == 0,
                f"network.head_channels={self.head_channels} does not divide {channels} channels that attend; use 32",
            )

    def _joined_channels(self, encoder: int, decoder: int) -> list[int]:
        """Channels of [h, skip] at the head of a decoder's blocks; h enters the bottom at the encoder's width."""
        joined = [2 * encoder * self.channel_mult[-1]]
        for mult, mult_before in zip(self.channel_mult, (1, *self.channel_mult), strict=False):
            joined.append(decoder * mult + encoder * mult_before)  # skip of the down block or input convolution
            if self.blocks_per_level > 1:
                joined.append(decoder * mult + encoder * mult)
        return joined


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def group_count(channels: int) -> int:
    """GroupNorm groups of both pixel families: min(channels // 4, 16)."""
    return min(channels // 4, 16)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """How a network becomes a denoiser, and which noise it is trained on.

    Attributes:
        precondition: "vp-eps", "edm" or "velocity".
        sigma_data: standard deviation of the data, for "edm".
        schedule: the kernel in whose time the embedding, edges and sampling times are spoken.
        prior: density of training noise.
    """

    precondition: Literal["vp-eps", "edm", "velocity"] = "vp-eps"
    sigma_data: float = 0.5
    schedule: NoiseSchedule = field(default_factory=VP)
    prior: SigmaPrior = field(default_factory=UniformTime)

    def __post_init__(self) -> None:
        _require(0 < self.sigma_data < math.inf, f"diffusion.sigma_data={self.sigma_data} must be positive and finite")
        _require(
            self.precondition != "vp-eps" or self.schedule.kind in ("vp", "discrete"),
            f"diffusion.schedule={self.schedule.kind!r}: precondition 'vp-eps' needs the time of 'vp' or 'discrete'; "
            "use precondition 'edm' or 'velocity' for the others",
        )
        own = getattr(self.prior, "schedule", self.schedule)
        _require(
            self.precondition != "vp-eps" or own == self.schedule,
            "diffusion.prior.schedule differs from diffusion.schedule, in whose time the network is told its noise; set both",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam(W), warm-up and clipping. `clip` bounds the gradient norm of the whole model or of each part."""

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 5000
    clip: float | None = 1.0
    clip_scope: Literal["model", "part"] = "model"

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"optimizer.{name}={value} must be positive and finite")
        _require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas={self.betas} must be in [0, 1)")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be >= 0")
        _require(
            0 <= self.weight_decay < math.inf, f"optimizer.weight_decay={self.weight_decay} must be >= 0 and finite"
        )
        _require(
            self.clip is None or 0 < self.clip < math.inf,
            f"optimizer.clip={self.clip} must be positive and finite, or null for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batches, objective, EMA and what is written when.

    Attributes:
        steps: optimiser iterations in all.
        batch: images per iteration (all stages and accumulation rounds together).
        accumulate: rounds into which an iteration's rows are divided to save memory.
        update_mode: "mixed" (all stages in one pass), "one-stage" (a stage drawn per step), "sequential" (a step after
            each stage).
        shares: share of rows (or of steps) per stage: "uniform", "prior" (the prior's mass) or numbers; variance only.
        weights: the objective's lambda_k: "prior" (the ordinary loss), "shares" or numbers.
        ema_halflife: images after which an old weight counts half.
        ema_rampup: the half-life is at most this share of the images seen so far; 0 turns the ramp off.
        flip: random horizontal flips.
        label_dropout: probability of hiding a class label.
        precision: "auto" (bf16 on CUDA, else fp32), "fp32", "bf16" or "fp16" (with loss scaling).
        keep_last, keep_every: checkpoints kept: the newest ones, and every so many steps (0: none).
        held_out_rows: held-out images per stage in each held-out loss (noise fixed).
    """

    steps: int = 250_000
    batch: int = 128
    accumulate: int = 1
    update_mode: Literal["mixed", "one-stage", "sequential"] = "mixed"
    shares: Literal["uniform", "prior"] | tuple[float, ...] = "uniform"
    weights: Literal["prior", "shares"] | tuple[float, ...] = "prior"
    ema_halflife: float = 500_000.0
    ema_rampup: float = 0.05
    flip: bool = True
    label_dropout: float = 0.1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    log_every: int = 50
    held_out_every: int = 1000
    held_out_rows: int = 256
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    sample_every: int = 0
    sample_count: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "checkpoint_every", "keep_last", "held_out_rows"):
            _require(getattr(self, name) > 0, f"training.{name}={getattr(self, name)} must be positive")
        _require(
            self.accumulate <= self.batch,
            f"training.accumulate={self.accumulate} must not exceed training.batch={self.batch}",
        )
        for name in ("held_out_every", "keep_every", "sample_every", "sample_count", "ema_rampup", "seed"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"training.{name}={value} must be >= 0 and finite")
        _require(
            0 < self.ema_halflife < math.inf, f"training.ema_halflife={self.ema_halflife} must be positive and finite"
        )
        _require(0 <= self.label_dropout <= 1, f"training.label_dropout={self.label_dropout} must be in [0, 1]")
        for name in ("shares", "weights"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                _require(
                    all(v >= 0 and math.isfinite(v) for v in value) and sum(value) > 0,
                    f"training.{name}={list(value)} must be >= 0, finite and not all zero",
                )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The sampler a run uses unless told otherwise.

    Attributes:
        solver: "dpm" (DPM-Solver), "dpm++", "ddim" or "heun".
        method: "singlestep" or "multistep" (DPM-Solver families).
        order: 1 to 3 (DPM-Solver families).
        calls: denoiser calls per image.
        spacing: "log-snr", "time" (of the run's schedule) or "edm" (rho).
        sigma_min, sigma_max: where trajectories end and start; None: the schedule's own range.
        rho: for EDM spacing.
        churn: S_churn of Heun (Karras et al. 2022, Algorithm 2); 0 is deterministic.
        eta: stochasticity of DDIM.
    """

    solver: Literal["dpm", "dpm++", "ddim", "heun"] = "dpm"
    method: Literal["singlestep", "multistep"] = "singlestep"
    order: int = 3
    calls: int = 20
    spacing: Literal["log-snr", "time", "edm"] = "log-snr"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    churn: float = 0.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        _require(self.order in (1, 2, 3), f"sampling.order={self.order} must be 1, 2 or 3")
        _require(self.calls > 0, f"sampling.calls={self.calls} must be positive")
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, f"sampling.{name}={value} must be positive and finite")
        _require(
            self.sigma_min is None or self.sigma_max is None or self.sigma_min < self.sigma_max,
            f"sampling.sigma_min={self.sigma_min} must be below sampling.sigma_max={self.sigma_max}",
        )
        _require(0 < self.rho < math.inf, f"sampling.rho={self.rho} must be positive and finite")
        _require(0 <= self.churn < math.inf, f"sampling.churn={self.churn} must be >= 0 and finite")
        _require(0 <= self.eta <= 1, f"sampling.eta={self.eta} must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run; written beside each checkpoint.

    Raises:
        ValueError: if the number of stages and of decoders differ, or a share or weight is missing.
    """

    format_version: int = FORMAT_VERSION
    name: str = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    stages: Stages = field(default_factory=Stages)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(
            self.format_version == FORMAT_VERSION,
            f"format_version={self.format_version}: this release reads format {FORMAT_VERSION}",
        )
        decoders = len(self.network.decoder_widths)
        _require(
            len(self.stages) == decoders,
            f"stages: {len(self.stages)} intervals but network.decoder_widths={list(self.network.decoder_widths)} has "
            f"{decoders}; give one width per stage",
        )
        for name in ("shares", "weights"):
            value = getattr(self.training, name)
            if isinstance(value, tuple):
                _require(
                    len(value) == decoders,
                    f"training.{name}={list(value)} needs one number for each of the {decoders} stages, or a word: "
                    f"training.{name}={'uniform' if name == 'shares' else 'prior'}",
                )
        shares, weights = self.training.shares, self.training.weights
        for stage in range(decoders):
            _require(
                not isinstance(shares, tuple)
                or shares[stage] > 0
                or weights == "shares"
                or (isinstance(weights, tuple) and weights[stage] == 0),
                f"training.shares={list(shares)}: stage {stage + 1} gets no rows but counts in the objective; give it a "
                "share, or training.weights with 0 for it",
            )
            low, high = self.stages.interval(stage)
            _require(
                self.diffusion.prior.mass(low, high) > 0,
                f"stages: [{low:.6g}, {high:.6g}) holds no mass of the {self.diffusion.prior.kind} prior; move it",
            )
