"""How a run is trained: the optimiser, the training itself, and how a network is computed in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import require

Choice = bool | Literal["auto"]

WIDEST_PROFILE = 12**-0.5  # sigma_rel of the mean of all steps


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
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas={list(self.betas)} must be in [0, 1)")
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
class ExecutionConfig:
    """How a network is computed in training; its results are the same up to rounding.

    "auto" is decided by autotuning at the start of a run, which measures what is faster on its device
    (performance/autotune.py). It is off in a run too short for autotuning to pay off.

    Attributes:
        channels_last: store feature maps pixel by pixel (channels_last) rather than channel by channel.
        compile: compile residual blocks (torch.compile), which takes minutes at every start. "auto" tries it on CUDA,
            in one process, if more than half an hour of training is left.
        cuda_graphs: record the forward and the backward pass once and replay them, which saves the CPU's kernel
            launches; on CUDA, in one process.
        thread_parallel: parts of a batch that are computed in parallel, each on its share of PyTorch's threads; on a
            CPU, in one process. Each part draws its own dropout, so dropout differs from that of an undivided batch.
        recompute: gradient checkpointing (Chen et al. 2016): compute residual blocks again in the backward pass instead
            of storing their activations. This costs another forward pass and saves memory.
    """

    channels_last: Choice = "auto"
    compile: Choice = "auto"
    cuda_graphs: Choice = "auto"
    thread_parallel: int | Literal["auto"] = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require(
            self.thread_parallel == "auto" or self.thread_parallel >= 1,
            f"execution.thread_parallel={self.thread_parallel} must be at least 1, or auto",
        )
        for name in ("recompute", "compile"):
            require(
                not (getattr(self, name) is True and self.thread_parallel not in ("auto", 1)),
                f"execution.{name}=True and execution.thread_parallel={self.thread_parallel}: that is done by one thread at "
                "a time; set execution.thread_parallel to 1",
            )
        require(
            not (self.recompute and self.cuda_graphs is True),
            "execution.recompute=True and execution.cuda_graphs=True: what dropout has drawn cannot be drawn again in a graph; "
            "set one of them to False",
        )
