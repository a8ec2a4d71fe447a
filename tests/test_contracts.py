"""The protocols and the helpers beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multistage_diffusion.contracts import Codec, Conditioning, Denoiser, as_float64, sigma_rows


class Halves:
    fingerprint = "halves"

    def encode(self, images: Tensor) -> Tensor:
        return images / 2

    def decode(self, latents: Tensor) -> Tensor:
        return latents * 2

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape


def shrink(x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
    return x / (1 + sigma_rows(x, sigma)[:, None] ** 2)


def test_rows_select_from_every_part() -> None:
    cond = Conditioning(labels=torch.tensor([3, -1, 5, 7]), augment=torch.arange(8.0).reshape(4, 2))
    picked = cond.rows(torch.tensor([2, 0, 2]))
    assert picked.labels is not None
    assert picked.augment is not None
    assert picked.labels.tolist() == [5, 3, 5]
    assert picked.augment.tolist() == [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]
    tail = cond.rows(slice(3, None))
    assert tail.labels is not None
    assert tail.labels.tolist() == [7]


def test_rows_of_nothing_are_nothing() -> None:
    assert Conditioning().rows(slice(0, 2)) == Conditioning()
    only = Conditioning(augment=torch.ones(2, 3)).rows(torch.tensor([1]))
    assert only.labels is None
    assert only.augment is not None
    assert only.augment.shape == (1, 3)


def test_protocols_recognise_what_has_their_parts() -> None:
    denoiser: Denoiser = shrink
    codec: Codec = Halves()
    assert isinstance(denoiser, Denoiser)
    assert isinstance(codec, Codec)
    assert not isinstance(shrink, Codec)
    assert not isinstance(3, Denoiser)


def test_as_float64() -> None:
    for value in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        assert as_float64(value).dtype == torch.float64
        assert float(as_float64(value)) == 0.1
    assert as_float64(torch.tensor([1, 2])).dtype == torch.float64
    assert as_float64(torch.tensor([0.5], dtype=torch.float16)).tolist() == [0.5]
    double = torch.ones(3, dtype=torch.float64)
    assert as_float64(double) is double
    assert as_float64(1.0, "meta").device.type == "meta"
    assert as_float64(torch.ones(1), "meta").device.type == "meta"


def test_sigma_of_every_row_is_in_float64() -> None:
    x = torch.zeros(3, 2, dtype=torch.float16)
    for given, expected in ((0.1, [0.1] * 3), (2, [2.0] * 3), (torch.tensor([1, 2, 3]), [1.0, 2.0, 3.0])):
        rows = sigma_rows(x, given)
        assert rows.dtype == torch.float64
        assert rows.tolist() == expected
    double = torch.ones(3, dtype=torch.float64)
    assert sigma_rows(x, double) is double
    assert sigma_rows(x.to("meta"), 0.1).device.type == "meta"
    assert sigma_rows(x.to("meta"), double).device.type == "meta"
    assert sigma_rows(x[:0], 0.1).shape == (0,)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1)])
def test_one_sigma_per_row_is_asked_for(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"sigma\.shape=.* must be \(3,\), one per row of x"):
        sigma_rows(torch.zeros(3, 2), torch.ones(shape))
