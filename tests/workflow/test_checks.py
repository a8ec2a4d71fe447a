"""Checks and warnings before a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.data.rows import ArrayRows
from multistage_diffusion.workflow.checks import SAMPLED, sample_std


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_standard_deviation_is_that_of_the_pixels(tiny_data: Any, count: int) -> None:
    data = tiny_data(count)
    assert sample_std(data) == pytest.approx(float(to_float(data.tensor()).double().std(correction=0)), rel=1e-6)


def test_of_many_images_some_are_read_from_all_over() -> None:
    class Watched(ArrayRows):
        read: list[int] = []  # noqa: RUF012

        def rows(self, indices: Any) -> Any:
            self.read.extend(indices.tolist())
            return super().rows(indices)

    dark_then_bright = np.repeat(np.array([0, 255], np.uint8), 2 * SAMPLED)[:, None, None, None]
    assert sample_std(ImageData(Watched(dark_then_bright), None, "sorted")) == pytest.approx(1.0, abs=1e-3)
    assert len(set(Watched.read)) == len(Watched.read) == SAMPLED
    assert (min(Watched.read), max(Watched.read)) == (0, 4 * SAMPLED - 1)
