"""The optimiser: its learning rate, loss scaling, gradient norms and clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig, RunConfig
from ..nets import MultiDecoderNetwork
from ..performance.devices import autocast_dtype
from .optimizer_state import make_optimizer

if TYPE_CHECKING:
    from .loss_weighting import LearnedWeighting
    from .soft_sharing import SoftSharing


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
    return {name: nn.utils.get_total_norm(grads) for name, grads in part_gradients(parts).items()}


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
    for name, grads in part_gradients(parts).items():
        norm = norms[name] if settings.clip_scope == "part" else whole
        torch._foreach_mul_(grads, (settings.clip / (norm + 1e-6)).clamp(max=1.0))


def part_gradients(parts: Parts) -> dict[str, list[Tensor]]:
    """Return the gradients of each part; parts without a gradient are left out."""
    found = {name: [p.grad for p in part if p.grad is not None] for name, part in parts.items()}
    return {name: grads for name, grads in found.items() if grads}


def match_layouts(parameters: Iterable[nn.Parameter]) -> None:
    """Store each gradient in the memory layout of its parameter.

    On the CPU, fused Adam reads parameter, gradient and moments in the order in which they lie in memory, whatever their
    strides: a convolution's gradient in channels-last layout would update the wrong weights. Tensor.backward() keeps to
    the parameter's layout, but torch.autograd.grad() does not.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


class Optimization:
    """Updates the parameters of a network from their gradients.

    Args:
        settings: of the optimiser.
        device: of the parameters.
        scaling: whether to scale the loss, for fp16; steps whose gradients overflow are skipped.
        weighting: learned weights of the loss, with their own optimiser; None: there are none.
        sharing: bases whose mixtures the decoders are, with their own optimiser; None: decoders are trained themselves.

    Attributes:
        optimizer: over all parameters of the network; made by `watch`.
        parts: trainable parameters of the network by part.
        scaler: scales the loss; does nothing without `scaling`.
    """

    optimizer: torch.optim.Optimizer
    parts: dict[str, list[nn.Parameter]]

    def __init__(
        self,
        settings: OptimizerConfig,
        device: torch.device,
        *,
        scaling: bool,
        weighting: LearnedWeighting | None = None,
        sharing: SoftSharing | None = None,
    ) -> None:
        self.settings, self.weighting, self.sharing = settings, weighting, sharing
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaling)

    @classmethod
    def of(cls, config: RunConfig, network: MultiDecoderNetwork, device: torch.device, strategy: str) -> Optimization:
        """Return the optimisation of a run; most runs train nothing beside the network.

        Args:
            config: of the run.
            network: as far as this process holds it; with training.soft_sharing its decoders become alike.
            device: of the parameters.
            strategy: name of the strategy.

        Raises:
            UserError: if training.soft_sharing does not suit the strategy or the precision.
        """
        scaling = autocast_dtype(config.training.precision, device) == torch.float16
        weighting = sharing = None
        if config.training.loss_weighting == "learned":
            from .loss_weighting import LearnedWeighting

            weighting = LearnedWeighting(config, device)
        if config.training.soft_sharing:
            from .soft_sharing import SoftSharing, require_whole_network

            require_whole_network(strategy, scaling=scaling)
            sharing = SoftSharing(config, network)
        return cls(config.optimizer, device, scaling=scaling, weighting=weighting, sharing=sharing)

    def watch(self, network: MultiDecoderNetwork) -> None:
        """Make a new optimiser over the parameters of a network."""
        self.optimizer = make_optimizer(self.settings, network)
        self.parts = parameters_by_part(network)

    @property
    def beside(self) -> list[LearnedWeighting | SoftSharing]:
        """What is trained beside the network, with an optimiser of its own."""
        return [module for module in (self.weighting, self.sharing) if module is not None]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The network's optimiser, and those of what is trained beside it."""
        return [self.optimizer, *(module.optimizer for module in self.beside)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the network, and of what is trained beside it."""
        own = [parameter for part in self.parts.values() for parameter in part]
        return [*own, *(parameter for module in self.beside for parameter in module.parameters())]

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients of the network."""
        return [gradient for part in part_gradients(self.parts).values() for gradient in part]

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def unscale(self) -> None:
        """Undo the loss scale in the gradients of the network; `update` does it for the others."""
        self.scaler.unscale_(self.optimizer)

    def clip(self, norms: Mapping[str, Tensor]) -> None:
        """Clip the gradients of the network, see `clip`."""
        clip(self.settings, self.parts, norms)

    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Update the parameters.

        Args:
            step: iteration, from 0; determines the learning rate.
            skip: a float32 scalar on the device: 1 to leave the parameters as they are, else 0. None: 0.
        """
        if self.sharing is not None:
            self.sharing.take_gradients()
        match_layouts(self.parameters)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.settings, step)
            if skip is not None:
                optimizer.found_inf = skip  # type: ignore[attr-defined]
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.sharing is not None:
            self.sharing.mix()
