"""The configuration of a run in one frozen, validated value: what is trained, on which data, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import require
from ..registry import Registry
from ..schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior, UniformTime
from ..schedules.vp import VP
from ..stages import Stages
from .execution import ExecutionConfig
from .network import NetworkConfig as NetworkConfig
from .sampling import EvaluationConfig, SamplingConfig

FORMAT_VERSION = 1

PRECONDITIONINGS: Registry[Any] = Registry("diffusion.precondition", "multistage_diffusion.preconditioning")

WIDEST_PROFILE = 12**-0.5  # sigma_rel of the mean of all steps
MAX_PIXELS = 178_956_970  # pixels of an image; the default, and Pillow's own limit against decompression bombs


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data.

    Attributes:
        source: where the images are: a name such as "digits", a folder, an archive or an array.
        held_out: share of the images never trained on, chosen by a hash of their content.
        size: (height, width) to bring images to; None: their own, which must be equal.
        fit: how images of another size are brought to it: "exact" refuses them, "crop", "resize" or "pad".
        skip_bad: leave out images that cannot be read instead of stopping.
        max_pixels: images of more pixels count as unreadable; the default is Pillow's limit.
        fingerprint: hash of the images, recorded when a run starts and checked when it is resumed.
        shape: (channels, height, width) of an image, recorded and checked in the same way.
        class_counts: training images of each class, recorded when a class-conditional run starts; samples for
            evaluation have these frequencies.
        class_names: names of the classes, recorded when a class-conditional run starts on data that name them, or given for
            data that only number them. () or too few: classes have their numbers as names.
    """

    source: str = "digits"
    held_out: float = 0.1
    size: tuple[int, int] | None = None
    fit: Literal["exact", "crop", "resize", "pad"] = "exact"
    skip_bad: bool = False
    max_pixels: int = MAX_PIXELS
    fingerprint: str = ""
    shape: tuple[int, ...] = ()
    class_counts: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(0 <= self.held_out < 1, f"data.held_out={self.held_out} must be in [0, 1)")
        if self.size is not None:
            require(min(self.size) > 0, f"data.size={self.size} must be positive")
        require(self.max_pixels > 0, f"data.max_pixels={self.max_pixels} must be positive")
        require(
            not self.class_counts or (min(self.class_counts) >= 0 and sum(self.class_counts) > 0),
            f"data.class_counts={list(self.class_counts)} must be >= 0 and not all zero",
        )


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The autoencoder of a run on latents; with neither source nor shape, the run is on pixels.

    Attributes:
        source: a folder with a diffusers AutoencoderKL or VQModel (such as msdiff train-codec writes), or hf:NAME.
        subfolder: subfolder of the autoencoder ("vae" in a whole pipeline).
        scale: factor of the latents in the network's input; None: 1 / their standard deviation; "config": the
            autoencoder's own scaling_factor, with its shift_factor. The number is recorded when a run starts.
        shift: number that is subtracted from the latents before they are multiplied by the scale.
        shape: (channels, height, width) of a latent, recorded when a run starts.
        fingerprint: hash of the autoencoder's weights, recorded when a run starts and checked at every use.
    """

    source: str = ""
    subfolder: str = ""
    scale: float | Literal["config"] | None = None
    shift: float = 0.0
    shape: tuple[int, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        known = self.scale == "config" or self.factor is None or 0 < self.factor < math.inf
        require(
            known and self.scale in ("config", self.factor),
            f"codec.scale={self.scale} must be positive and finite, or 'config'",
        )
        require(math.isfinite(self.shift), f"codec.shift={self.shift} must be finite")
        require(
            not self.shape or (len(self.shape) == 3 and min(self.shape) > 0),
            f"codec.shape={list(self.shape)} must be [channels, height, width]",
        )

    @property
    def factor(self) -> float | None:
        """The scale as a number; None while it is open, or to be read from the autoencoder."""
        return None if isinstance(self.scale, str) else self.scale

    @property
    def used(self) -> bool:
        """Whether the run is trained on latents."""
        return bool(self.source or self.shape)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Preconditioning, noise schedule and training noise of a denoiser.

    Attributes:
        precondition: "vp-eps" (noise prediction), "vp-sample", "vp-v", "edm", "velocity" or another of PRECONDITIONINGS.
        sigma_data: standard deviation of the images in [-1, 1], for "edm".
        schedule: the kernel whose time defines the embedding, edges and sampling times: its kind and numbers.
        prior: density of training noise: its kind and numbers.
    """

    precondition: str = "vp-eps"
    sigma_data: float = 0.5
    schedule: NoiseSchedule = field(default_factory=VP)
    prior: SigmaPrior = field(default_factory=UniformTime)

    def __post_init__(self) -> None:
        require(
            1e-6 <= self.sigma_data <= 1e6,
            f"diffusion.sigma_data={self.sigma_data} must be in [1e-6, 1e6]; scale the data",
        )
        for name, known, registry in (("schedule", SCHEDULES, "SCHEDULES"), ("prior", PRIORS, "PRIORS")):
            value = getattr(self, name)
            kind: str = getattr(value, "kind", "")  # the name by which a run is stored
            require(
                kind in known and known[kind] is type(value),
                f"diffusion.{name}={type(value).__name__}: this class is not registered; add it with @{registry}.add(NAME)",
            )
        PRECONDITIONINGS[self.precondition].check(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam(W), warm-up and clipping.

    Attributes:
        kind: "adam" or "adamw".
        lr: learning rate.
        betas: decay rates of Adam's two moments.
        eps: Adam's epsilon.
        weight_decay: Adam's weight decay.
        warmup_steps: steps in which the learning rate rises from 0 to `lr`.
        decay_after: steps after which the learning rate is lr sqrt(decay_after / step) (Karras et al. 2024, Analyzing
            and improving the training dynamics of diffusion models, equation 67); 0: no decay.
        clip: bound of the gradient norm; None: no clipping.
        clip_scope: what `clip` bounds: the gradient norm of the whole "model" or of each "part" (encoder, decoders).
    """

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 5000
    decay_after: int = 0
    clip: float | None = 1.0
    clip_scope: Literal["model", "part"] = "model"

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer.{name}={value} must be positive and finite")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas={self.betas} must be in [0, 1)")
        for name in ("warmup_steps", "decay_after"):
            require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must be >= 0")
        require(
            0 <= self.weight_decay < math.inf, f"optimizer.weight_decay={self.weight_decay} must be >= 0 and finite"
        )
        require(
            self.clip is None or 0 < self.clip < math.inf,
            f"optimizer.clip={self.clip} must be positive and finite, or null for no clipping",
        )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batches, objective, EMA and output intervals.

    Attributes:
        steps: optimiser iterations in total.
        batch: images per iteration (all stages and micro-batches together).
        accumulate: gradient accumulation: micro-batches into which an iteration's rows are divided to save memory.
        update_mode: "mixed" (all stages in one pass), "one-stage" (a stage drawn per step), "sequential" (a step after
            each stage).
        shares: share of rows (or of steps) per stage: "uniform", "prior" (the prior's mass) or numbers. Unless weights
            is "shares", they affect only the gradients' variance.
        floor_share: least share of a stage whose share is not 0, so that no decoder is left without training; the others
            give way in proportion.
        weights: the objective's lambda_k: "prior" (the ordinary loss), "shares" or numbers.
        loss_weighting: "fixed" (losses as they are) or "learned" (loss / exp(u(sigma)) + u(sigma), with u learned beside
            the network and then discarded, so that all noise levels weigh about the same; Karras et al. 2024). Gradients
            then grow as losses fall, so that optimizer.clip cuts more of them.
        ema_halflife: half-life of the EMA in images.
        ema_rampup: the half-life is at most this share of the images seen so far; 0: no limit.
        ema_profiles: widths sigma_rel of further averages with power-function profiles (Karras et al. 2024), such as [0.05,
            0.1]; the average of another width can be computed from their snapshots after training. []: none.
        ema_snapshot_every: steps between snapshots of these averages.
        flip: random horizontal flips.
        label_dropout: probability of hiding a class label.
        augment: probability of each transformation of EDM's augmentation (non-leaky: the network receives its label);
            needs network.augment_dim=9.
        reference_rows: images, drawn anew in each step, over which a row's target is averaged with its own, by their posterior
            probability (Xu et al. 2023): less variance at medium noise; 0: its own image alone. Not with augment.
        soft_intervals: probability that a row of a stage draws its noise from the whole prior instead of the stage's
            own interval (MEME's soft assignment): one number, or one for each stage.
        overlap: distance in ln sigma by which a stage's noise range extends beyond its inner edges, so that its decoder
            learns both sides of its edges.
        branch_at: steps in which all stages train one common decoder; afterwards each stage continues with its own copy
            (0: own decoders from the start). Narrower decoders are slices of the widest: their first channels. That needs
            the families "ncsnpp", "ddpmpp" or "ldm" and a shared encoder; else decoders must be alike.
        soft_sharing: bases, decoders whose learned mixtures the stages' decoders are (Fang et al. 2024, Mixing diffusion
            transformers for multi-expert denoising), at most one for each stage; needs decoders that are alike and a shared
            encoder; 0: none, decoders are trained themselves.
        init_from: a trained run from whose encoder and fitting decoders the network starts; empty: from scratch.
        freeze: "encoder" keeps the shared encoder as init_from gives it, so that only decoders are trained; "nothing".
        precision: "auto" (on CUDA bf16 if supported, else fp16; on the CPU fp32), "fp32", "bf16", "fp16" (with loss
            scaling) or "fp64" (slow; for checking that two ways of training are the same).
        seed: seed of all random numbers.
        log_every: steps between log lines.
        held_out_every: steps between held-out losses; 0: none.
        held_out_rows: held-out images per stage in each held-out loss (noise fixed).
        checkpoint_every: steps between checkpoints.
        keep_last, keep_every: checkpoints kept: the newest ones, and one every so many steps (0: none). The best is
            always kept: lowest Fréchet distance or, without evaluations, lowest held-out loss.
        sample_every: steps between sample grids; 0: none.
        sample_count: samples in each grid.
    """

    steps: int = 250_000
    batch: int = 128
    accumulate: int = 1
    update_mode: Literal["mixed", "one-stage", "sequential"] = "mixed"
    shares: Literal["uniform", "prior"] | tuple[float, ...] = "uniform"
    floor_share: float = 0.0
    weights: Literal["prior", "shares"] | tuple[float, ...] = "prior"
    loss_weighting: Literal["fixed", "learned"] = "fixed"
    ema_halflife: float = 500_000.0
    ema_rampup: float = 0.05
    ema_profiles: tuple[float, ...] = ()
    ema_snapshot_every: int = 1000
    flip: bool = True
    label_dropout: float = 0.1
    augment: float = 0.0
    reference_rows: int = 0
    soft_intervals: float | tuple[float, ...] = 0.0
    overlap: float = 0.0
    branch_at: int = 0
    soft_sharing: int = 0
    init_from: str = ""
    freeze: Literal["nothing", "encoder"] = "nothing"
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
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
        intervals = ("log_every", "checkpoint_every", "ema_snapshot_every")
        for name in ("steps", "batch", "accumulate", *intervals, "keep_last", "held_out_rows"):
            require(getattr(self, name) > 0, f"training.{name}={getattr(self, name)} must be positive")
        require(
            self.accumulate <= self.batch,
            f"training.accumulate={self.accumulate} must not exceed training.batch={self.batch}",
        )
        counts = ("held_out_every", "keep_every", "sample_every", "sample_count", "seed", "branch_at", "soft_sharing")
        for name in (*counts, "reference_rows", "ema_rampup", "overlap"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}={value} must be >= 0 and finite")
        require(self.overlap <= 20, f"training.overlap={self.overlap} must be at most 20 (in ln sigma)")
        require(
            self.sample_count > 0 or not self.sample_every,
            f"training.sample_count={self.sample_count} must be positive, or training.sample_every 0",
        )
        require(
            0 < self.ema_halflife < math.inf, f"training.ema_halflife={self.ema_halflife} must be positive and finite"
        )
        widths = self.ema_profiles
        require(
            all(0 < width < WIDEST_PROFILE for width in widths) and len(set(widths)) == len(widths),
            f"training.ema_profiles={list(widths)} must be different numbers above 0 and below {WIDEST_PROFILE:.4f}",
        )
        for name in ("label_dropout", "augment", "floor_share"):
            require(0 <= getattr(self, name) <= 1, f"training.{name}={getattr(self, name)} must be in [0, 1]")
        require(
            not (self.reference_rows and self.augment),
            f"training.reference_rows={self.reference_rows}: targets are averaged over images that are not augmented; set it or "
            f"training.augment={self.augment} to 0",
        )
        soft = self.soft_intervals
        require(
            all(0 <= share <= 1 for share in (soft if isinstance(soft, tuple) else (soft,))),
            f"training.soft_intervals={list(soft) if isinstance(soft, tuple) else soft} must be in [0, 1]",
        )
        for name in ("shares", "weights"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                require(
                    all(v >= 0 for v in value) and 0 < sum(value) < math.inf,
                    f"training.{name}={list(value)} must be >= 0, finite (their sum, too) and not all zero",
                )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete configuration of a run; written beside each checkpoint.

    Attributes:
        format_version: version of the file format.
        name: name of the run; the name of its folder once it exists.
        data: see DataConfig; likewise the other sections.

    Raises:
        UserError: if the numbers of stages and decoders differ, or settings do not fit each other.
    """

    format_version: int = FORMAT_VERSION
    name: str = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig.of)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    stages: Stages = field(default_factory=Stages)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of the network's input: a latent, or else an image; () if not yet known."""
        return self.codec.shape if self.codec.used else self.data.shape

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            f"format_version={self.format_version}: this release reads format {FORMAT_VERSION}",
        )
        decoders = len(self.network.decoder_widths)
        require(
            len(self.stages) == decoders,
            f"stages: {len(self.stages)} intervals but network.decoder_widths={list(self.network.decoder_widths)} has "
            f"{decoders}; give one width per stage",
        )
        for name, else_one in (("shares", "uniform"), ("weights", "prior"), ("soft_intervals", "0.5")):
            value = getattr(self.training, name)
            if isinstance(value, tuple):
                require(
                    len(value) == decoders,
                    f"training.{name}={list(value)} needs one number for each of the {decoders} stages, or one value for "
                    f"all, such as training.{name}={else_one}",
                )
        require(
            not self.training.augment or not self.codec.used,
            f"training.augment={self.training.augment}: EDM's augmentation is of pixels, not of latents; set it to 0",
        )
        require(
            self.sampling.threshold is None or not self.codec.used,
            f"sampling.threshold={self.sampling.threshold}: dynamic thresholding is of pixels, not of latents; set it to null",
        )
        require(
            self.network.feature_maps or self.execution.channels_last is not True,
            f"execution.channels_last=True: network.family={self.network.family!r} computes tokens, not feature maps; set it "
            "to auto or false",
        )
        require(
            self.sampling.clip is None or not self.codec.used,
            f"sampling.clip={self.sampling.clip}: clipping is of pixels, not of latents; set it to null",
        )
        if self.training.branch_at:
            unshared = self.network.unshared or ""
            require(
                not unshared,
                f"training.branch_at={self.training.branch_at} needs decoders that are slices of one, which those of "
                f"network.family={self.network.family} with network.{unshared}={list(getattr(self.network, unshared, ()))} are "
                "not; make its values equal, or set branch_at to 0",
            )
        if self.training.soft_sharing:
            name, bases = f"training.soft_sharing={self.training.soft_sharing}", self.training.soft_sharing
            require(1 < bases <= decoders, f"{name}: {decoders} stages can share 2 to {decoders} bases; 0 shares none")
            alike = all(len(set(getattr(self.network, n) or (0,))) == 1 for n in self.network.per_stage)
            require(
                alike and not self.network.separate,
                f"{name} mixes the weights of decoders that are alike, on one encoder: give network.decoder_widths (and "
                "what else is set for each stage) equal values, or set it to 0",
            )
            require(not self.training.branch_at, f"{name} does not go with training.branch_at; set one of them to 0")
        if self.training.freeze != "nothing":
            require(
                bool(self.training.init_from) and not self.network.separate,
                f"training.freeze={self.training.freeze!r} needs training.init_from, a run whose encoder is kept, and an "
                "encoder that all stages share (network.separate=false); set it to nothing",
            )
        shares, weights = self.training.shares, self.training.weights
        for stage in range(decoders):
            require(
                not isinstance(shares, tuple)
                or shares[stage] > 0
                or weights == "shares"
                or (isinstance(weights, tuple) and weights[stage] == 0),
                f"training.shares={list(shares)}: stage {stage + 1} gets no rows but counts in the objective; give it a "
                "share, or training.weights with 0 for it",
            )
            low, high = self.stages.interval(stage)
            require(
                self.diffusion.prior.mass(low, high) > 0,
                f"stages: [{low:.6g}, {high:.6g}) holds no mass of the {self.diffusion.prior.kind} prior; move it",
            )


def require_config(given: object) -> None:
    """Raise UserError unless an argument is a RunConfig: a preset's name or a path is a likely mistake.

    Raises:
        UserError: saying how to get a configuration.
    """
    require(
        isinstance(given, RunConfig),
        f"config={given!r:.80} must be a RunConfig: preset(NAME), or Run.open(FOLDER).config()",
    )
