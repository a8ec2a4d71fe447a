from __future__ import annotations

import pytest
import torch

from multistage_diffusion.evaluation.image_sets import ImageSet
from multistage_diffusion.evaluation.moments import moments


def test_everything_is_computed_at_its_first_use_and_once() -> None:
    calls: list[str] = []

    def source(name: str, value: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return value

    x = torch.randn(9, 3)
    found = ImageSet(9, features=lambda: source("features", x), images=lambda: source("images", x))
    assert calls == []
    own = moments(x)
    for _ in range(2):
        assert torch.equal(found.moments.covariance, own.covariance)
        assert torch.equal(found.features, x)
    assert calls == ["features"]
    assert [found.once("key", lambda: calls.append("once")) for _ in range(2)] == [None, None]
    assert calls == ["features", "once"]


def test_given_moments_need_no_features() -> None:
    given = moments(torch.randn(5, 2))
    assert ImageSet(5, moments=lambda: given).moments is given


def test_what_is_not_known_is_an_error_of_the_metric() -> None:
    with pytest.raises(LookupError, match="labels of this set are not known; a metric that reads them lists them"):
        _ = ImageSet(5).labels
    with pytest.raises(LookupError, match="features of this set"):
        _ = ImageSet(5).moments
