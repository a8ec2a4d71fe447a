from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.evaluation.inception_score import inception_score

pytest.importorskip("torch_fidelity")


def test_the_score_of_rows_that_are_sure_and_varied_is_the_number_of_classes() -> None:
    logits = 100.0 * torch.eye(4).repeat(500, 1)
    mean, _ = inception_score(logits)
    assert mean == pytest.approx(4.0, rel=0.02)  # parts of 200 hold the classes almost evenly
    assert inception_score(torch.zeros(50, 4))[0] == pytest.approx(1.0)
    shares = torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert inception_score(shares.log().repeat(20, 1))[0] == pytest.approx(1.0)
    assert math.isfinite(inception_score(logits[:10])[0])
    with pytest.raises(ValueError, match="9 images cannot be divided into 10 parts"):
        inception_score(logits[:9])
