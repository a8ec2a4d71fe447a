"""Philox against its published answers; draws that depend on key and row alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from multistage_diffusion import rng

# Random123 (Salmon et al. 2011), kat_vectors, philox4x32 with 10 rounds: counter, key, answer
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of(counter: list[list[int]], key: list[int]) -> list[list[int]]:
    columns = torch.tensor(counter).T
    answer = rng.philox((columns[0], columns[1], columns[2], columns[3]), (key[0], key[1]))
    rows: list[list[int]] = torch.stack(answer, 1).tolist()
    return rows


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    assert philox_of([words(counter)], words(key)) == [words(answer)]


def test_philox_equals_big_integer_arithmetic() -> None:
    def reference(c: list[int], k: list[int]) -> list[int]:
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (50, 4)).tolist()
    key = rng.integers(0, 2**32, 2).tolist()
    assert philox_of(counters, key) == [reference(c, key) for c in counters]


def test_uniform_is_philox_of_row_and_block() -> None:
    row = (5 << 32) + 7
    folded = rng.fold(("noise", 3))
    key = [folded & 0xFFFFFFFF, folded >> 32]
    bits = [word for block in range(2) for word in philox_of([[7, 5, block, 0]], key)[0]]
    got = rng.uniform(("noise", 3), torch.tensor([row]), 7)
    assert got.tolist() == [[(b + 0.5) / 2**32 for b in bits[:7]]]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5, 3), (64,)])
def test_a_row_does_not_see_its_batch(shape: tuple[int, ...]) -> None:
    rows = torch.tensor([11, 3, 2**40, 3, 0, 999, 2**32, 12, 13, 14])
    whole = rng.normal(("noise", 1), rows, shape, torch.float64)
    assert whole.shape == (10, *shape)
    for i in range(10):
        assert torch.equal(rng.normal(("noise", 1), rows[i : i + 1], shape, torch.float64)[0], whole[i])
    assert torch.equal(rng.normal(("noise", 1), rows.flip(0), shape, torch.float64), whole.flip(0))
    assert torch.equal(whole[1], whole[3])
    many = rng.normal(("noise", 1), torch.arange(2000), shape, torch.float64)
    assert torch.equal(many[[11, 3]], whole[:2])


def test_more_numbers_begin_with_the_same() -> None:
    rows = torch.arange(4)
    assert torch.equal(rng.uniform(("a",), rows, 9)[:, :6], rng.uniform(("a",), rows, 6))
    assert torch.equal(rng.normal(("a",), rows, (9,))[:, :6], rng.normal(("a",), rows, (6,)))


def test_empty_requests() -> None:
    assert rng.uniform(("a",), torch.arange(0), 3).shape == (0, 3)
    assert rng.uniform(("a",), torch.arange(3), 0).shape == (3, 0)
    assert rng.normal(("a",), torch.arange(0), (1, 8, 8)).shape == (0, 1, 8, 8)


def test_rows_beyond_32_bits_and_narrow_row_numbers() -> None:
    rows = torch.tensor([1, 2**32 + 1, 2**33 + 1, 2**62 + 1])
    draws = rng.uniform(("a",), rows, 4)
    assert len(set(draws.flatten().tolist())) == 16
    narrow = torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32)
    assert torch.equal(rng.uniform(("a",), narrow, 4), rng.uniform(("a",), narrow.long(), 4))


KEYS: list[list[int | str]] = [
    [], [0], [1], ["0"], ["a"], ["b"], [0, 1], [1, 0], [10], ["a", "b"], ["ab"], ["a/b"], ["a/str:b"], ["a", 0],
    ["a/int:0"], ['a", "b'], [-1], [2**70],
]  # fmt: skip


def test_different_keys_give_different_numbers() -> None:
    assert len({rng.fold(key) for key in KEYS}) == len(KEYS)
    firsts = {float(rng.uniform(key, torch.tensor([0]), 1)) for key in KEYS}
    assert len(firsts) == len(KEYS)
    assert all(0 <= rng.fold(key) < 2**64 for key in KEYS)


def test_fold_is_the_same_in_every_release() -> None:
    # a changed hash would change every resumed run: pinned
    assert rng.fold(("noise", 3, 7)) == 0x721B3BA00F86DD29


def test_a_key_of_another_type_is_refused() -> None:
    # numpy's 3 would be another key than 3 if it were printed
    with pytest.raises(TypeError):
        rng.fold([np.int64(3)])  # type: ignore[list-item]


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    order = sample.argsort()
    ranks = torch.arange(1, len(sample) + 1, dtype=torch.float64) / len(sample)
    return float(torch.maximum((cdf[order] - ranks).abs(), (cdf[order] - ranks + 1 / len(sample)).abs()).max())


@pytest.mark.parametrize("layout", [(40_000, 1), (1, 40_000), (200, 200)])
def test_uniform_is_uniform(layout: tuple[int, int]) -> None:
    u = rng.uniform(("ks",), torch.arange(layout[0]), layout[1])
    assert u.dtype == torch.float64
    assert float(u.min()) > 0.0
    assert float(u.max()) < 1.0
    u = u.flatten()
    assert kolmogorov_smirnov(u, u) < 1.95 / math.sqrt(len(u))
    lag = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(float(lag)) < 4 / math.sqrt(len(u))


def test_uniform_never_reaches_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in ((0, 2.0**-33), (0xFFFFFFFF, 1 - 2.0**-33)):
        monkeypatch.setattr(rng, "philox", lambda counter, key, word=word: (torch.full_like(counter[0], word),) * 4)
        assert rng.uniform(("a",), torch.arange(1), 2).tolist() == [[expected, expected]]
        assert bool(torch.isfinite(rng.normal(("a",), torch.arange(1), (2,))).all())


@pytest.mark.parametrize("layout", [(20_001, (1,)), (1, (20_001,)), (67, (3, 10, 10))])
def test_normal_is_standard_normal(layout: tuple[int, tuple[int, ...]]) -> None:
    z = rng.normal(("ks",), torch.arange(layout[0]), layout[1], torch.float64).flatten()
    n = len(z)
    assert kolmogorov_smirnov(z, 0.5 * torch.erfc(-z / math.sqrt(2))) < 1.95 / math.sqrt(n)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / n)
    # the two numbers of a Box-Muller pair, and their squares, are uncorrelated
    for values in (z, z**2):
        pairs = values[: 2 * (n // 2)].reshape(-1, 2).T
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 4 / math.sqrt(n / 2)


def test_normal_dtype() -> None:
    double = rng.normal(("a",), torch.arange(5), (3,), torch.float64)
    assert rng.normal(("a",), torch.arange(5), (3,)).dtype == torch.float32
    assert torch.equal(rng.normal(("a",), torch.arange(5), (3,)), double.float())


def test_generator_is_decided_by_its_key() -> None:
    def order(*key: int | str) -> list[int]:
        permutation: list[int] = torch.randperm(50, generator=rng.generator(key)).tolist()
        return permutation

    assert order("epoch", 1) == order("epoch", 1)
    assert order("epoch", 1) != order("epoch", 2)
