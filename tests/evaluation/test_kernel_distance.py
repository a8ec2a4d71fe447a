from __future__ import annotations

import pytest
import torch

from multistage_diffusion.evaluation.kernel_distance import kernel_distance

pytest.importorskip("torch_fidelity")


def test_the_kernel_distance_is_the_unbiased_estimate() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, 5, generator=g, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    kernel = {(a, b): (m @ n.T / 5 + 1) ** 3 for a, m in (("x", x), ("y", y)) for b, n in (("x", x), ("y", y))}
    within = [(k.sum() - k.trace()) / (12 * 11) for k in (kernel["x", "x"], kernel["y", "y"])]
    expected = float(sum(within) - 2 * kernel["x", "y"].mean())
    mean, deviation = kernel_distance(x, y, subset=12)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert deviation == pytest.approx(0.0, abs=1e-9)
    for subset in (1, 13):
        with pytest.raises(
            ValueError, match=f"subset={subset} must be at least 2 and at most .*, 12 of samples and 12"
        ):
            kernel_distance(x, y, subset=subset)
