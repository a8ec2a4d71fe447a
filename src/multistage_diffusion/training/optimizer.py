"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import OptimizerConfig


def make_optimizer(settings: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all parameters; those without a gradient are not stepped, decayed or averaged."""
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    return kind(
        module.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def learning_rate(settings: OptimizerConfig, step: int) -> float:
    """Return the learning rate of a step (0 is the first): a linear rise, a plateau, a fall with the step's square root."""
    rise = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    fall = math.sqrt(settings.decay_after / max(step + 1, settings.decay_after)) if settings.decay_after else 1.0
    return settings.lr * rise * fall
