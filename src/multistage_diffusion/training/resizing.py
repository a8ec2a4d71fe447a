"""A decoder of one width from a trained decoder of another: the warm start of decoders tailored to their stages.

A narrower decoder starts as a slice of the trained one: its first channels, as in slimmable networks (Yu et al. 2019,
"Slimmable neural networks"). A wider one has the trained channels first; its new channels start with random weights, but
no trained channel reads them, so that their effect starts at zero (as in Net2Net, Chen et al. 2016). It computes exactly
what the trained one does if every GroupNorm keeps its channels per group: in NCSN++ and DDPM++ if no more than
4 x norm_groups channels enter one, those of skips included.

Decoders that are trained as slices of one (`slices`, see branching) have the same channels in common, but as they are: queries
are not scaled, because each decoder learns with its own scale of attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nets.blocks import Attention
from ..nets.ldm import HeadedAttention, LDMBlock

QUERIES = 3  # vectors of an attention head: queries, keys and values

Range = tuple[int, int, int]  # the same channels: their start in the new and in the trained decoder, their number
Block = tuple[tuple[slice, ...], tuple[slice, ...]]  # the same weights: their place in the narrow and the wide tensor


class _Unequal(Exception):
    """Raised where two decoders differ in more than their widths."""


def resized(given: nn.Module, fresh: nn.Module, before: int, after: int) -> dict[str, Tensor] | None:
    """Return the weights of a decoder of width `after` that starts from a trained one of width `before`.

    Args:
        given: the trained decoder.
        fresh: the new decoder with initial weights; it is left as it is.
        before, after: values of network.decoder_widths.

    Returns:
        A tensor for each name in the new decoder's state; None if the decoders differ in more than their widths, or if a
        block has lost its projection because its inputs are as many as its outputs at the new width.
    """
    theirs = dict(given.state_dict())
    stacked = _stacked(given, fresh)
    found = {}
    try:
        for name, new in fresh.state_dict().items():
            old = theirs.pop(name, None)
            if old is None:
                old = _identity(name, given)
            found[name] = _placed(old, new, before, after, stacked.get(name.rpartition(".")[0], 1))
    except _Unequal:
        return None
    return None if theirs else found


def slices(wide: nn.Module, narrow: nn.Module, before: int, after: int) -> dict[str, list[Block]] | None:
    """Return where the parameters of a narrow decoder stand in those of a wide one.

    Args:
        wide, narrow: the decoders; only names and shapes of their parameters matter.
        before, after: their widths.

    Returns:
        The blocks that make up each parameter of the narrow decoder, by name; None if the decoders differ in more than
        their widths, or if a block has a projection at one of the widths only.
    """
    theirs, ours = (dict(part.named_parameters()) for part in (wide, narrow))
    if theirs.keys() != ours.keys():
        return None
    stacked, found = _stacked(wide, narrow), {}
    try:
        for name, own in ours.items():
            found[name] = _blocks(theirs[name].shape, own.shape, before, after, stacked.get(name.rpartition(".")[0], 1))
    except _Unequal:
        return None
    return found


def _blocks(old: Sequence[int], new: Sequence[int], before: int, after: int, stacked: int) -> list[Block]:
    """Return where a tensor of the new shape stands in one of the old shape, see `_placed`."""
    if old == new:
        return [((), ())]
    if len(old) != len(new) or old[2:] != new[2:]:
        raise _Unequal
    sides = [_ranges(old[0], new[0], before, after, stacked)]
    if len(old) > 1:
        sides.append(_ranges(old[1], new[1], before, after))
    return [
        (tuple(slice(a, a + n) for a, _, n in block), tuple(slice(b, b + n) for _, b, n in block))
        for block in itertools.product(*sides)
    ]


def _stacked(given: nn.Module, fresh: nn.Module) -> dict[str, int]:
    """Return the layers whose output is several vectors of a block's channels one after the other, and how many.

    They are queries, keys and values of one head (3), and scale and shift (2). Of several heads, the heads follow one another.
    """
    trained, found = dict(given.named_modules()), {}
    for name, module in fresh.named_modules():
        other = trained.get(name)
        one_head = isinstance(module, HeadedAttention) and isinstance(other, HeadedAttention)
        if isinstance(module, Attention) or (one_head and module.head_channels != other.head_channels):  # type: ignore[union-attr]
            found[f"{name}.qkv"] = QUERIES
        if isinstance(module, LDMBlock) and module.scale_shift:
            found[f"{name}.affine"] = 2
    return found


def _identity(name: str, given: nn.Module) -> Tensor:
    """Return what the projection of a trained block would be that has none, because it has equal inputs and outputs.

    Raises:
        _Unequal: if another layer is missing.
    """
    path, _, kind = name.rpartition(".")
    block, _, layer = path.rpartition(".")
    norm = given.state_dict().get(f"{block}.norm1.weight")
    if layer != "skip" or norm is None:
        raise _Unequal
    return torch.eye(len(norm))[:, :, None, None] if kind == "weight" else torch.zeros(len(norm))


def _placed(old: Tensor, new: Tensor, before: int, after: int, stacked: int) -> Tensor:
    """Return a new tensor that holds an old one: rows are the outputs of a layer, columns its inputs.

    Args:
        old, new: tensors of the same layer in the trained and in the new decoder.
        before, after: widths of the decoders.
        stacked: number of vectors that follow one another in the rows, see `_stacked`.
    """
    if old.shape == new.shape:
        return old.clone()
    if old.ndim != new.ndim or old.shape[2:] != new.shape[2:]:
        raise _Unequal
    value = new.clone()
    kept, taken = _places(len(old), len(new), before, after, chunks=stacked)
    old_rows = old[taken].to(new.dtype)
    if (
        stacked == QUERIES
    ):  # the scale is channels^-1/2, so the old queries grow with the channels; new ones add nothing
        third = len(new) // 3
        value[:third] = 0.0
        old_rows[: len(taken) // 3] *= math.sqrt(len(new) / len(old))
    if old.ndim == 1:
        value[kept] = old_rows
        return value
    columns, taken_columns = _places(old.shape[1], new.shape[1], before, after)
    rows = torch.zeros_like(value[kept])  # trained channels do not read new ones
    rows[:, columns] = old_rows[:, taken_columns]
    value[kept] = rows
    return value


def _ranges(old: int, new: int, before: int, after: int, chunks: int = 1) -> list[Range]:
    """Return where the channels that two layers share stand in each.

    A layer has m w + b channels: m for each of the decoder's w, and then b of the encoder, which do not depend on w.

    Raises:
        _Unequal: if there are no such numbers.
    """
    own, rest = divmod(new - old, chunks * (after - before))
    fixed = old // chunks - own * before
    if rest or old % chunks or own < 0 or fixed < 0:
        raise _Unequal
    shared, there, here = own * min(before, after), own * before, own * after
    starts = [(chunk * (here + fixed), chunk * (there + fixed)) for chunk in range(chunks)]
    found = [r for a, b in starts for r in ((a, b, shared), (a + here, b + there, fixed))]
    return [r for r in found if r[2]]


def _places(old: int, new: int, before: int, after: int, chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Return the channels of `_ranges` in the new and in the trained decoder, int64 (n,) each."""
    found = _ranges(old, new, before, after, chunks)
    kept, taken = (torch.cat([torch.arange(r[2]) + r[side] for r in found]) for side in (0, 1))
    return kept, taken
