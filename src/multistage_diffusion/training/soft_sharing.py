"""Soft sharing: each stage's decoder is a learned mixture of a few common ones, the bases.

decoder k = sum_j softmax(a_k)_j basis_j, weight by weight, with bases and logits a learned together (Fang et al. 2024, Mixing
diffusion transformers for multi-expert denoising; here of decoders of any kind). So a row of one stage trains the weights
that others use, too, as far as their mixtures agree. The network's decoders hold the mixtures: gradients are computed in
them and passed on to bases and logits, whose own optimiser makes the step; then they are mixed anew, once per step.
Sampling, averages and exports see ordinary decoders. Bases and logits serve training only: they are in checkpoints, with the
optimiser's state, and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..errors import UserError
from ..nets import MultiDecoderNetwork
from . import checkpoint as ckpt
from .optimizer_state import make_optimizer, state_of

_NAME = "soft_sharing"
_OWN = 1.0  # initial logit of a stage's own basis; of the others 0


def require_whole_network(strategy: str, *, scaling: bool) -> None:
    """Refuse what soft sharing cannot be trained with.

    Args:
        strategy: name of the strategy.
        scaling: whether losses are scaled, for fp16.

    Raises:
        UserError: if a process holds a part of the network, or losses are scaled.
    """
    if strategy != "time":
        raise UserError(
            f"training.soft_sharing mixes whole decoders, but --strategy {strategy} gives a process parts of them; use "
            "--strategy time"
        )
    if scaling:
        raise UserError("training.soft_sharing does not go with training.precision=fp16; use bf16 or fp32")


class SoftSharing(nn.Module):
    """Bases and logits; and their optimiser, the network's without weight decay of logits.

    The decoders of the network start alike: as the first one.

    Args:
        config: of the run; decoders are alike, and training.soft_sharing is the number of bases.
        network: whole, with weights, on its device.

    Attributes:
        bases: decoders.
        logits: (stages, bases).
        optimizer: over both.
    """

    def __init__(self, config: RunConfig, network: MultiDecoderNetwork) -> None:
        super().__init__()
        count, stages = config.training.soft_sharing, len(network.decoders)
        for decoder in network.decoders:
            decoder.load_state_dict(network.decoders[0].state_dict())
        self.bases = nn.ModuleList(copy.deepcopy(network.decoders[0]) for _ in range(count))
        first = next(network.decoders.parameters())
        own = torch.arange(stages) * count // stages  # neighbouring stages share one, if there are fewer bases
        logits = _OWN * torch.nn.functional.one_hot(own, count)
        self.logits = nn.Parameter(logits.to(first.device, first.dtype))
        self._decoders = tuple(dict(decoder.named_parameters()) for decoder in network.decoders)
        self.optimizer = make_optimizer(config.optimizer, self)
        self.optimizer.param_groups[0]["params"] = list(self.bases.parameters())
        self.optimizer.add_param_group({"params": [self.logits], "weight_decay": 0.0})
        self.mix()

    @property
    def names(self) -> set[str]:
        """Names of what is stored in a checkpoint, see `checkpoint.load_tensors`."""
        own = self._named().state_dict()
        return {*own, *map(state_of, own)}

    @property
    def weights(self) -> Tensor:
        """The share of each basis in each decoder, (stages, bases); rows sum to 1."""
        return self.logits.softmax(1)

    @torch.no_grad()
    def mix(self) -> None:
        """Give the network's decoders the mixtures."""
        weights = self.weights
        for name, parameters in self._parameters_of_bases().items():
            mixtures = torch.tensordot(weights, torch.stack(list(parameters)), 1)
            for decoder, mixed in zip(self._decoders, mixtures, strict=True):
                decoder[name].copy_(mixed)

    @torch.no_grad()
    def take_decoders(self) -> None:
        """Set the bases to those whose mixtures are nearest to the network's decoders, and mix them."""
        inverse = torch.linalg.pinv(self.weights.double())
        for name, parameters in self._parameters_of_bases().items():
            given = torch.stack([decoder[name].double() for decoder in self._decoders])
            for parameter, found in zip(parameters, torch.tensordot(inverse, given, 1), strict=True):
                parameter.copy_(found)
        self.mix()

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the gradients of the network's decoders to bases and logits."""
        weights, slopes = self.weights, torch.zeros_like(self.logits)
        for name, parameters in self._parameters_of_bases().items():
            own = [decoder[name] for decoder in self._decoders]
            gradients = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in own])
            for parameter, gradient in zip(parameters, torch.tensordot(weights.T, gradients, 1), strict=True):
                parameter.grad = gradient
            slopes += gradients.flatten(1) @ torch.stack(list(parameters)).flatten(1).T
            for p in own:
                p.grad = None
        self.logits.grad = weights * (slopes - (weights * slopes).sum(1, keepdim=True))

    def _parameters_of_bases(self) -> dict[str, Sequence[nn.Parameter]]:
        """Return the parameters of the bases by their name in a decoder."""
        named = [dict(basis.named_parameters()) for basis in self.bases]
        return {name: [basis[name] for basis in named] for name in named[0]}

    def tensors(self) -> dict[str, Tensor]:
        """Return bases, logits and their optimiser's state, for the "optimizer" file of a checkpoint."""
        named = self._named()
        return {**named.state_dict(), **ckpt.optimizer_tensors(self.optimizer, named)}

    def restore(self, path: Path, whole: Collection[str]) -> None:
        """Load what `tensors` returned from the checkpoint in folder `path`; see `LearnedWeighting.restore`."""
        named = self._named()
        ckpt.restore_module(named, path, "optimizer", whole)
        ckpt.restore_moments(self.optimizer, named, path, whole)

    def _named(self) -> nn.Module:
        return nn.ModuleDict({_NAME: self})
