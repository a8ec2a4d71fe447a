import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from torch import Tensor

from multistage_diffusion import memory
from multistage_diffusion.contracts import Conditioning, Denoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.schedules.vp import VP

GOLDEN = Path(__file__).parent / "golden" / "optimal_denoiser_digits.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
        assert (config["range"], config["eta"]) == ("[0,1]", 2 / 256)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().images / 16, dtype=torch.float32)[:, None]


def brute_force(data: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    data, flat, sigma = data.double().flatten(1), x.double().flatten(1), sigma.double()
    square = (flat[:, None] - data[None]).square().sum(-1)
    weights = torch.softmax(-square / (2 * sigma[:, None] ** 2), dim=1)
    return (weights @ data).reshape(x.shape)


def small(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = 3 + torch.rand(40, 2, 3, 3, generator=generator, dtype=dtype)
    sigma = torch.logspace(-2, 2, 25, dtype=dtype)
    noise = torch.randn(25, 2, 3, 3, generator=generator, dtype=dtype)
    return data, data[:25] + sigma.view(-1, 1, 1, 1) * noise, sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_posterior_means_and_noise_predictions(golden, digits, dtype):
    sigma = VP().sigma(golden["t"])
    column = sigma.float().view(-1, 1, 1, 1)
    x = digits[golden["index"]] + column * golden["noise"]
    mean = OptimalDenoiser(digits, dtype=dtype)(x, sigma)
    assert float((mean - golden["posterior_mean"]).abs().max()) < 1e-4 * float(golden["posterior_mean"].abs().max())
    eps_star = (x - mean) / column
    assert float((eps_star - golden["eps_star"]).abs().max()) < 1e-4 * float(golden["eps_star"].abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_equals_brute_force_for_data_far_from_the_origin(dtype, tolerance):
    data, x, sigma = small(torch.float64)
    mean = OptimalDenoiser(data, dtype=dtype)(x, sigma)
    assert float((mean - brute_force(data, x, sigma)).abs().max()) < tolerance


def test_is_a_denoiser_that_keeps_shape_and_dtype_and_ignores_labels():
    data, x, sigma = small()
    denoiser = OptimalDenoiser(data)
    assert isinstance(denoiser, Denoiser)
    plain = denoiser(x, sigma)
    assert torch.equal(plain, denoiser(x, sigma, Conditioning(labels=torch.zeros(len(x), dtype=torch.int64))))
    for dtype in (torch.bfloat16, torch.float64):
        result = denoiser(x.to(dtype), sigma)
        assert (result.shape, result.dtype) == (x.shape, dtype)
    assert denoiser(x[:0], sigma[:0]).shape == x[:0].shape


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1 / 3, 20.0, float("inf")])
def test_one_sigma_as_a_number_gives_the_same_as_in_every_row(sigma):
    data, x, _ = small(torch.float64)
    denoiser = OptimalDenoiser(data, dtype=torch.float64)
    assert torch.equal(denoiser(x, sigma), denoiser(x, torch.full((len(x),), sigma, dtype=torch.float64)))


def test_autocast_does_not_coarsen_the_result():
    data, x, sigma = small()
    denoiser = OptimalDenoiser(data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = denoiser(x, sigma)
    assert torch.equal(coarse, denoiser(x, sigma))


def test_data_that_memory_cannot_hold_as_floats_are_refused(monkeypatch):
    data = torch.rand(10, 1, 4, 4)
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * 160 * 4)
    OptimalDenoiser(data)
    with pytest.raises(UserError, match=r"optimal denoiser: data of \(10, 1, 4, 4\) in torch.float64 needs at least"):
        OptimalDenoiser(data, dtype=torch.float64)


def test_memory_budget_does_not_change_the_result():
    data, x, sigma = small()
    whole = OptimalDenoiser(data)(x, sigma)
    for rows in (1, 7):
        chunked = OptimalDenoiser(data, memory_budget=rows * 2 * len(data) * 4)
        assert chunked._chunk_rows == rows
        torch.testing.assert_close(chunked(x, sigma), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_sigmas_reach_the_limits(digits, dtype):
    denoiser = OptimalDenoiser(digits, dtype=dtype)
    y = digits[:6]
    for sigma in (0.0, 1e-30, 1e-13, 1e-8, 1e-4):
        torch.testing.assert_close(denoiser(y, torch.full((6,), sigma)), y, rtol=0, atol=1e-6)
    for sigma in (1e6, 1e20, float("inf")):
        x = y + min(sigma, 1e20) * torch.linspace(-1, 1, 64).reshape(8, 8)
        mean = denoiser(x, torch.full((6,), sigma))
        torch.testing.assert_close(mean, digits.mean(0).expand_as(mean), rtol=0, atol=1e-5)


def test_zero_sigma_averages_ties_and_only_ties():
    data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0], [5.0, 5.0], [0.5, 0.6]])
    x = torch.tensor([[0.5, 0.0], [0.5, -0.2], [4.0, 4.0], [0.4, 0.0], [0.50002, 0.0]])
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.0], [5.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(OptimalDenoiser(data)(x, torch.zeros(5)), expected)


def test_duplicates_count_twice():
    data = torch.tensor([[0.0], [0.0], [1.0]])
    mean = OptimalDenoiser(data)(torch.tensor([[0.5]]), torch.tensor([1.0]))
    torch.testing.assert_close(mean, torch.tensor([[1 / 3]]))


def test_one_image_is_its_own_posterior_mean():
    mean = OptimalDenoiser(torch.full((1, 4), 0.3))(torch.randn(3, 4), torch.tensor([0.0, 1.0, 100.0]))
    torch.testing.assert_close(mean, torch.full((3, 4), 0.3))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.uint8), {}, "floating point"),
        (torch.zeros(0, 4), {}, r"shape=\(0, 4\)"),
        (torch.tensor([[0.0, float("nan")]]), {}, "NaN"),
        (torch.zeros(3, 4), {"dtype": torch.float16}, "dtype=torch.float16"),
    ],
)
def test_unusable_data_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        OptimalDenoiser(data, **options)


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (torch.zeros(2, 5), torch.ones(2), "does not fit"),
        (torch.zeros(2, 4), torch.tensor(1.0), "one per row"),
        (torch.zeros(2, 4), torch.tensor([1.0, -1.0]), ">= 0"),
        (torch.zeros(2, 4), torch.tensor([1.0, float("nan")]), "not NaN"),
        (torch.zeros(2, 4), -1.0, ">= 0"),
        (torch.full((2, 4), float("inf")), torch.ones(2), "infinite"),
    ],
)
def test_unusable_calls_are_refused(x, sigma, message):
    with pytest.raises(ValueError, match=message):
        OptimalDenoiser(torch.rand(3, 4))(x, sigma)
