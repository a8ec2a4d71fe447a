"""Stage look-up, exact at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from multistage_diffusion.stages import Stages

INF = math.inf
PAPER = Stages((2.5103, 7.6577))


def test_intervals_cover_the_line_once() -> None:
    assert PAPER.edges == (0.0, 2.5103, 7.6577, INF)
    assert [PAPER.interval(k) for k in range(len(PAPER))] == [(0.0, 2.5103), (2.5103, 7.6577), (7.6577, INF)]
    assert Stages().edges == (0.0, INF)
    assert len(Stages()) == 1


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_that_does_not_exist_has_no_interval(stage: int) -> None:
    with pytest.raises(ValueError, match=rf"stage index {stage} must be in 0\.\.2"):
        PAPER.interval(stage)


@pytest.mark.parametrize("interior", [(1.0,), (2.5103, 7.6577), (1e-300, 0.1, 1e300), (1.0, math.nextafter(1.0, 2.0))])
def test_edges_belong_to_the_stage_above(interior: tuple[float, ...]) -> None:
    stages = Stages(interior)
    for k, edge in enumerate(interior):
        around = [math.nextafter(edge, 0.0), edge, math.nextafter(edge, INF)]
        got = stages.index(torch.tensor(around, dtype=torch.float64)).tolist()
        expected = [sum(e <= v for e in interior) for v in around]
        assert got == expected == [stages.index_of(v) for v in around]
        assert got[:2] == [k, k + 1]
    ends = torch.tensor([0.0, 5e-324, INF], dtype=torch.float64)
    assert stages.index(ends).tolist() == [0, 0, len(stages) - 1]


def test_index_equals_index_of_and_the_interval_test() -> None:
    stages = Stages((0.01, 0.3, 2.0, 50.0))
    sigma = torch.exp(torch.linspace(-9, 6, 501, dtype=torch.float64))
    index = stages.index(sigma)
    assert index.dtype == torch.int64
    assert set(index.tolist()) == {0, 1, 2, 3, 4}
    for value, k in zip(sigma.tolist(), index.tolist(), strict=True):
        low, high = stages.interval(k)
        assert low <= value < high
        assert stages.index_of(value) == k


def test_float32_and_half_are_compared_in_float64() -> None:
    edge = 2.5103
    rounded = float(np.float32(edge))
    below, above = (float(np.nextafter(np.float32(edge), np.float32(v))) for v in (0, 10))
    sigma = torch.tensor([below, rounded, above], dtype=torch.float32)
    assert Stages((edge,)).index(sigma).tolist() == [int(v >= edge) for v in (below, rounded, above)]
    assert rounded != edge  # so a comparison in float32 would call them equal
    assert Stages((rounded,)).index(sigma).tolist() == [0, 1, 1]
    assert Stages((math.nextafter(rounded, INF),)).index(sigma).tolist() == [0, 0, 1]
    assert Stages((1.0001,)).index(torch.tensor([1.0], dtype=torch.bfloat16)).tolist() == [0]


def test_empty_batch_and_shape() -> None:
    assert PAPER.index(torch.empty(0)).tolist() == []
    assert PAPER.index(torch.tensor([[0.1, 3.0], [9.0, 2.0]])).tolist() == [[0, 1], [2, 0]]
    assert Stages().index(torch.tensor([0.0, INF])).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, -1e-9, -INF])
def test_nan_and_negative_noise_raise(bad: float) -> None:
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="sigma must be >= 0 and not NaN"):
            PAPER.index(torch.tensor([1.0, bad, 3.0], dtype=dtype))
    with pytest.raises(ValueError, match="must be >= 0 and not NaN"):
        PAPER.index_of(bad)


@pytest.mark.parametrize(
    "interior", [(0.0,), (-1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (math.nan,), (1.0, math.nan), (INF,), (1.0, INF)]
)
def test_bad_edges_are_refused_and_shown(interior: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive, finite and strictly ascending") as error:
        Stages(interior)
    assert str(list(interior)) in str(error.value)


def test_the_origin_does_not_decide_equality() -> None:
    assert Stages((1.0,), origin={"rule": "x"}) == Stages((1.0,))
    assert hash(Stages((1.0,), origin={"rule": "x"})) == hash(Stages((1.0,)))
    assert Stages((1,)).interior == (1.0,)
    assert isinstance(Stages((1,)).interior[0], float)
