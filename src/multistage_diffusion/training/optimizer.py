"""The optimiser, its learning rate, gradient norms and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..nets import MultiDecoderNetwork


def make_optimizer(settings: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Return Adam or AdamW over all parameters; parameters without a gradient are skipped (no update or decay)."""
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
    """Return the learning rate of a step (from 0): linear warm-up, then constant, then decay as 1 / sqrt(step)."""
    rise = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    fall = math.sqrt(settings.decay_after / max(step + 1, settings.decay_after)) if settings.decay_after else 1.0
    return settings.lr * rise * fall


Parts = Mapping[str, Sequence[nn.Parameter]]


def parameters_by_part(network: MultiDecoderNetwork) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of each part of a network, each parameter once."""
    seen: set[int] = set()
    parts = {}
    for name, part in network.parts().items():
        own = [p for p in part.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            parts[name] = own
    return parts


def part_norms(parts: Parts) -> dict[str, Tensor]:
    """Return the gradient norm of each part, a scalar; parts without a gradient are left out."""
    return {name: nn.utils.get_total_norm(grads) for name, grads in _gradients(parts).items()}


def clip(settings: OptimizerConfig, parts: Parts, norms: Mapping[str, Tensor]) -> None:
    """Clip gradients by the norm of the whole model, or each part by its own norm.

    Args:
        settings: `clip` and `clip_scope`.
        parts: parameters whose gradients are clipped.
        norms: gradient norms of all parts of the model, not only of `parts`, each counted once.
    """
    if settings.clip is None:
        return
    whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    for name, grads in _gradients(parts).items():
        norm = norms[name] if settings.clip_scope == "part" else whole
        torch._foreach_mul_(grads, (settings.clip / (norm + 1e-6)).clamp(max=1.0))


def _gradients(parts: Parts) -> dict[str, list[Tensor]]:
    found = {name: [p.grad for p in part if p.grad is not None] for name, part in parts.items()}
    return {name: grads for name, grads in found.items() if grads}
