"""The protocols and the helpers beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from multistage_diffusion.contracts import Codec, Conditioning, Denoiser, as_float64, denoise_uniform


class Halves:
    fingerprint = "halves"

    def encode(self, images: Tensor) -> Tensor:
        return images / 2

    def decode(self, latents: Tensor) -> Tensor:
        return latents * 2

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape


def shrink(x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
    return x / (1 + sigma[:, None] ** 2)


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


def test_a_denoiser_is_told_one_sigma_as_it_knows_it() -> None:
    class Knows:
        def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
            raise AssertionError

        def uniform(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
            assert cond is known
            return x * sigma

    def plain(x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
        assert cond is known
        assert sigma.dtype == torch.float64
        return (x * sigma[:, None]).to(x.dtype)

    known = Conditioning(labels=torch.zeros(2, dtype=torch.int64))
    for denoiser in (Knows(), plain):
        assert denoise_uniform(denoiser, torch.ones(2, 3), 0.7, known).tolist() == torch.full((2, 3), 0.7).tolist()


def test_a_compiled_denoiser_is_not_gone_past() -> None:
    class Inner(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
            return x * sigma[:, None].float()

        def uniform(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
            return self(x, torch.full((len(x),), sigma), cond)

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(Inner(), backend=backend)
    assert denoise_uniform(compiled, torch.ones(2, 3), 0.5).tolist() == [[0.5] * 3] * 2
    assert len(graphs) == 1
