from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.evaluation.precision_recall import precision_recall


def gauss(rows: int, dims: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=g, dtype=torch.float64)


def brute_coverage(points: Tensor, centres: Tensor, k: int) -> float:
    radii = []
    for i, c in enumerate(centres):
        others = sorted(math.dist(c.tolist(), o.tolist()) for j, o in enumerate(centres) if j != i)
        radii.append(others[k - 1])
    inside = [any(math.dist(p.tolist(), c.tolist()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_recall_equal_the_loop(k: int, chunk: int) -> None:
    real, fake = gauss(40, 3, 9), 0.7 * gauss(30, 3, 10) + 0.8
    expected = brute_coverage(fake, real, k), brute_coverage(real, fake, k)
    assert 0 < expected[0] < 1  # otherwise the comparison shows little
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert precision_recall(real, fake, k, chunk) == expected


def test_precision_recall_limits() -> None:
    a = gauss(50, 4, 11)
    assert precision_recall(a, a[torch.randperm(50)]) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    assert precision_recall(a, a[:5]) == (1.0, brute_coverage(a, a[:5], 3))  # collapsed onto five real images


def test_balls_are_closed_and_may_have_no_radius() -> None:
    """Four equal points have balls of radius 0 that hold an equal point; a point on a rim is inside."""
    same = (gauss(1, 50, 12) * 10).expand(4, 50)
    assert precision_recall(same, same.clone()) == (1.0, 1.0)
    line = torch.tensor([[0.0], [0.1], [0.3]], dtype=torch.float64)  # k = 1: radii 0.1, 0.1, 0.2
    fake = torch.tensor([[0.5], [-0.1], [0.51], [9.0]], dtype=torch.float64)
    assert precision_recall(line, fake, 1)[0] == 0.5


@pytest.mark.parametrize("k", [0, 5])
def test_precision_recall_refuses_k(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} must be at least 1 and below .* \(9 real, 5 fake\)"):
        precision_recall(gauss(9, 2, 0), gauss(5, 2, 1), k)
