"""Branching: all stages share one decoder until step training.branch_at, then each stage gets its own copy.

Early in training all noise levels need similar features, so a decoder learns faster from the rows of all stages. Later
the stages interfere with one another. Until branching, all decoders of one width are the same module object, so sampling
and saving work unchanged. A narrower decoder is a slice of the widest: its first channels, as in slimmable networks (Yu et
al. 2019, "Slimmable neural networks"), see `resizing.slices`. It is a module with copies of these weights (`Ties`): its
gradients are added to those of the widest, which alone is updated, and the copies follow. So a stage computes the same just
before and just after branching. Averages need no tie: the average of a slice is the slice of the average.

Then the trainer builds a network with a decoder for each stage and loads copies of weights, averages and optimiser state
into it: those of a narrower decoder are slices, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..denoisers import MultiStageDenoiser
from ..errors import UserError
from ..nets import MultiDecoderNetwork
from .ema import EMA
from .optimizer_state import Local, whole_tensor

if TYPE_CHECKING:
    from .resizing import Block


def tie(network: MultiDecoderNetwork) -> None:
    """Make all stages share the widest decoder (and its encoder, if each stage has one); narrower ones are its slices.

    Args:
        network: whole, as it was built.

    Raises:
        UserError: if a decoder is no slice of the widest.
    """
    widths = network.config.decoder_widths
    for parts in (network.encoders, network.decoders):
        for stage in range(1, len(parts)):
            parts[stage] = parts[widths.index(widths[stage])]
    network.tied = len(widths) > 1
    Ties(network).copy_weights()


@dataclass(frozen=True)
class _Tie:
    """A parameter of a narrower decoder, that of the widest, and where the first stands in the second."""

    narrow: nn.Parameter
    wide: nn.Parameter
    blocks: Sequence[Block]


class Ties:
    """Keeps the narrower decoders of a network slices of the widest, until branching.

    Args:
        network: see `tie`. If its stages do not share a decoder, or all have one width, nothing is done.
        whole, local: see Strategy; by default, this process holds whole tensors. If it holds slices of them, each call
            gathers the decoders.

    Raises:
        UserError: if a decoder is no slice of the widest.
    """

    def __init__(
        self,
        network: MultiDecoderNetwork,
        whole: Callable[[Tensor], Tensor] = Tensor.detach,
        local: Local = whole_tensor,
    ) -> None:
        self._whole, self._local = whole, local
        self._ties = list(_ties(network)) if network.tied else []

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Move the gradients of the narrower decoders into that of the widest."""
        for tie in self._ties:
            if tie.narrow.grad is None:  # no rows
                continue
            given = self._whole(tie.narrow.grad)
            total = self._whole(torch.zeros_like(tie.wide) if tie.wide.grad is None else tie.wide.grad)
            for here, there in tie.blocks:
                total[there].add_(given[here])
            tie.wide.grad, tie.narrow.grad = self._local(total, tie.wide), None

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Give the narrower decoders the weights of the widest."""
        for tie in self._ties:
            tie.narrow.copy_(self._slice(tie.wide, tie))

    def states(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the optimiser's state of each parameter of each stage by name, that of a narrower decoder as slices.

        Parameters that were never updated have none.

        Args:
            optimizer: over the module's parameters.
            module: the network, or what holds it.
        """
        ties = {tie.narrow: tie for tie in self._ties}
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            tie = ties.get(parameter)
            state = optimizer.state.get(parameter if tie is None else tie.wide)
            if state is not None and tie is not None:
                state = {key: self._sliced_state(value, tie) for key, value in state.items()}
            if state is not None:
                found[name] = state
        return found

    def _sliced_state(self, value: object, tie: _Tie) -> object:
        return self._slice(value, tie) if isinstance(value, Tensor) and value.shape == tie.wide.shape else value

    def _slice(self, given: Tensor, tie: _Tie) -> Tensor:
        """Return the slice of a tensor with the shape of the widest decoder's parameter."""
        whole = self._whole(given)
        found = whole.new_empty(tie.narrow.shape)
        for here, there in tie.blocks:
            found[here] = whole[there]
        return self._local(found, tie.narrow)


def _ties(network: MultiDecoderNetwork) -> Iterator[_Tie]:
    from .resizing import slices  # most runs have no decoders that are slices

    widths = network.config.decoder_widths
    widest = max(widths)
    wide = network.decoders[widths.index(widest)]
    theirs = dict(wide.named_parameters())
    for width in sorted({*widths} - {widest}):
        narrow = network.decoders[widths.index(width)]
        found = slices(wide, narrow, widest, width)
        if found is None:
            raise UserError(
                f"network.decoder_widths={list(widths)}: the decoder of width {width} is no slice of that of width {widest}, "
                "because a block has a projection at one of these widths only, so that they cannot share one decoder; choose "
                "other widths, or set training.branch_at to 0"
            )
        for name, parameter in narrow.named_parameters():
            yield _Tie(parameter, theirs[name], found[name])


def untie(
    denoiser: MultiStageDenoiser,
    averages: Sequence[EMA[MultiStageDenoiser]],
    build: Callable[[], MultiDecoderNetwork],
) -> None:
    """Give every stage its own copy of the shared weights, in the network and in its averages.

    Args:
        denoiser: its stages share a decoder, see `tie`.
        averages: of it.
        build: returns a new network, a decoder for each stage, as far as this process holds it.
    """
    for module in (denoiser, *(average.module for average in averages)):
        shared, branched = module.network.state_dict(), build()
        branched.load_state_dict({name: shared[name] for name in branched.state_dict()})
        module.network = branched
    for average in averages:
        average.module.eval().requires_grad_(False)
        average.follow(denoiser)


def load_states(optimizer: torch.optim.Optimizer, module: nn.Module, shared: Mapping[str, Mapping[str, Any]]) -> None:
    """Give each parameter a copy of the optimiser's state of the parameter of the same name before branching.

    Args:
        optimizer: optimiser over the module's parameters, in which each stage has its own decoder.
        module: the network; may lack stages.
        shared: see `Ties.states`, from before branching.
    """
    for name, parameter in module.named_parameters():
        state = shared.get(name)
        if state is not None:
            optimizer.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
