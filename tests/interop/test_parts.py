"""What the readers of published checkpoints share: weights that can be weights."""

from __future__ import annotations

import pytest
import torch

from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.parts import weight

NUMBERS = torch.tensor([0.5, -2.0, 3.0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_a_copy_in_float32(dtype: torch.dtype) -> None:
    given = NUMBERS.to(dtype)
    found = weight("a.weight", given)
    assert found.dtype == torch.float32
    assert torch.equal(found, NUMBERS)
    assert found.data_ptr() != given.data_ptr()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_other_numbers_are_refused_by_the_name_of_the_weight(dtype: torch.dtype) -> None:
    with pytest.raises(
        UserError, match=rf"a\.weight is of {dtype}: only weights of float16, bfloat16, float32, float64"
    ):
        weight("a.weight", NUMBERS.to(dtype))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_are_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"weights of a\.weight are not finite"):
        weight("a.weight", torch.tensor([1.0, value], dtype=torch.float64))
