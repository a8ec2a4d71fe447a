"""The configuration of a run in one frozen, validated value: what is trained, on which data, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import require, require_size
from ..registry import Registry
from ..schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior, UniformTime
from ..schedules.vp import VP
from ..stages import Stages
from .network import NetworkConfig as NetworkConfig
from .sampling import EvaluationConfig, SamplingConfig
from .training import ExecutionConfig, OptimizerConfig, TrainingConfig

FORMAT_VERSION = 1

PRECONDITIONINGS: Registry[Any] = Registry("diffusion.precondition", "multistage_diffusion.preconditioning")

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
        require_size("data.size", self.size)
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
