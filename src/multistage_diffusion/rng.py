"""Counter-based random numbers: each draw depends only on its key and row.

Every draw is a pure function of a key (seed, step, purpose, ...) and a row number. It is the same in any batch size, on
any number of ranks and on any device (normals up to the rounding of log and cos). The generator is Philox 4x32-10
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), written with integer tensor operations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Key = Sequence[int | str]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def fold(key: Key) -> int:
    """Hash a key of integers and strings to 64 bits."""
    text = json.dumps(list(key))  # unambiguous; refuses objects without a stable representation
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Apply Philox 4x32-10 to counters of four 32-bit words, each an int64 tensor holding a value in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but masking the shifted halves recovers all 64 bits
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(key: Key, rows: Tensor, count: int) -> Tensor:
    """Draw uniforms in the open interval (0, 1).

    Args:
        key: purpose of the numbers.
        rows: int64 (R,), global row numbers; their device is that of the result.
        count: numbers per row.

    Returns:
        float64 (R, count); row i depends on (key, rows[i]) alone.
    """
    folded, rows = fold(key), rows.to(torch.int64)
    blocks = torch.arange((count + 3) // 4, device=rows.device)
    low = (rows & _MASK)[:, None].expand(-1, len(blocks))
    high = ((rows >> 32) & _MASK)[:, None].expand(-1, len(blocks))
    words = philox(
        (low, high, blocks[None].expand(len(rows), -1), torch.zeros_like(low)), (folded & _MASK, folded >> 32)
    )
    bits = torch.stack(words, dim=-1).reshape(len(rows), 4 * len(blocks))[:, :count]
    return (bits.to(torch.float64) + 0.5) * 2.0**-32


def normal(key: Key, rows: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normals (Box-Muller in float64).

    Returns:
        (R, *shape) of the given dtype; row i depends on (key, rows[i]) alone.
    """
    count = math.prod(shape)
    even = 2 * ((count + 1) // 2)
    u = uniform(key, rows, even)
    radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0::2])), 2.0 * math.pi * u[:, 1::2]
    z = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return z.reshape(len(rows), even)[:, :count].reshape(len(rows), *shape).to(dtype)


def generator(key: Key) -> torch.Generator:
    """Return a CPU generator seeded by the key (for permutations)."""
    return torch.Generator().manual_seed(fold(key) & 0x7FFFFFFFFFFFFFFF)
