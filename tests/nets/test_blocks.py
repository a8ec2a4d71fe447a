import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.nets.blocks import (
    Attention,
    BoxDown,
    BoxUp,
    FIRDown,
    FIRUp,
    NoiseEmbedding,
    ResidualBlock,
    conv,
    group_count,
    group_norm,
    sinusoids,
)


def fir_by_hand(x: Tensor, *, up: int = 1, down: int = 1, pad: tuple[int, int]) -> Tensor:
    """Zero-stuff, pad, correlate with [1,3,3,1] x [1,3,3,1] (sum up^2), keep every down-th pixel: explicit loops."""
    taps = [1.0, 3.0, 3.0, 1.0]
    rows, channels, height, width = x.shape
    stuffed = x.new_zeros(rows, channels, height * up, width * up)
    stuffed[..., ::up, ::up] = x
    padded = F.pad(stuffed, (*pad, *pad))
    out_h, out_w = padded.shape[2] - 3, padded.shape[3] - 3
    out = x.new_zeros(rows, channels, out_h, out_w)
    for i in range(4):
        for j in range(4):
            out += taps[i] * taps[j] / 64 * up**2 * padded[..., i : i + out_h, j : j + out_w]
    return out[..., ::down, ::down]


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_fir_up_equals_zero_stuffing(image: Tensor) -> None:
    torch.testing.assert_close(FIRUp(3).double()(image), fir_by_hand(image, up=2, pad=(2, 1)))


def test_fir_down_equals_filter_then_decimate(image: Tensor) -> None:
    torch.testing.assert_close(FIRDown(3).double()(image), fir_by_hand(image, down=2, pad=(1, 1)))


def test_fir_of_the_pyramid_only_filters(image: Tensor) -> None:
    result = FIRDown(3, stride=1, padding=2).double()(image)
    assert result.shape == (2, 3, 7, 9)
    torch.testing.assert_close(result, fir_by_hand(image, pad=(2, 2)))


def test_box_resampling_averages_and_repeats(image: Tensor) -> None:
    mean = (image[..., ::2, ::2] + image[..., 1::2, ::2] + image[..., ::2, 1::2] + image[..., 1::2, 1::2]) / 4
    torch.testing.assert_close(BoxDown(3)(image), mean)
    repeated = image.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(BoxUp(3)(image), repeated)


def test_attention_equals_explicit_softmax(image: Tensor) -> None:
    torch.manual_seed(0)
    x = image.repeat(1, 4, 1, 1)[:, :8] + torch.randn(2, 8, 6, 8, dtype=torch.float64)
    layer = Attention(8).double()
    torch.nn.init.normal_(layer.proj.weight)
    q, k, v = layer.qkv(layer.norm(x).permute(0, 2, 3, 1).reshape(2, 48, 8)).split(8, dim=-1)
    weights = torch.softmax(torch.einsum("bic,bjc->bij", q, k) / math.sqrt(8), dim=-1)
    h = layer.proj(torch.einsum("bij,bjc->bic", weights, v)).reshape(2, 6, 8, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), (x + h) / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalised_maps_keep_their_type_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm, x = group_norm(32), (100 + 3 * torch.randn(4, 32, 16, 16)).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.autocast("cpu", dtype):
        y = norm(x)
        assert y.dtype == dtype
        assert norm(x.float()).dtype == torch.float32
    seen = []

    def spy(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        seen.append((weight.dtype, bias.dtype, torch.is_autocast_enabled("cpu")))
        return x

    with monkeypatch.context() as patched, torch.autocast("cpu", dtype):
        patched.setattr(F, "group_norm", spy)
        norm(x)
    assert seen == [(dtype, dtype, False)]  # on CUDA autocast would make it float32
    exact = norm(x.float())
    scale = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11  # a unit in the last place: statistics are float32
    assert float((y.float() - exact).abs().max()) < 4 * scale * float(exact.abs().max())
    y.float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (60, 15), (64, 16), (68, 16), (256, 16)])
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def test_sinusoids_by_hand() -> None:
    result = sinusoids(torch.tensor([0.0, 2.5], dtype=torch.float64), 8)
    for row, noise in enumerate([0.0, 2.5]):
        angles = [noise * 10000 ** (-i / 3) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert result[row].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_initialisation_is_xavier_uniform_times_gain(gain: float) -> None:
    torch.manual_seed(0)
    layer = conv(32, 64, gain=gain)
    weight = layer.weight.detach()
    bound = gain * math.sqrt(6 / (9 * (32 + 64)))
    assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-2)
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=2e-2)
    assert layer.bias is not None
    assert not layer.bias.any()


def test_attention_bounds_equal_three_separate_maps_of_scale_a_tenth() -> None:
    torch.manual_seed(0)
    weight = Attention(64).qkv.weight.detach()
    assert float(weight.abs().max()) == pytest.approx(math.sqrt(0.1 * 6 / (64 + 64)), rel=1e-2)


class TestNoiseEmbedding:
    noise = torch.tensor([0.3, -1.0, 0.7])

    def embedding(self) -> NoiseEmbedding:
        torch.manual_seed(0)
        embedding = NoiseEmbedding(8, num_classes=5, augment_dim=2)
        torch.nn.init.normal_(embedding.label.bias)  # type: ignore[union-attr, arg-type]
        return embedding

    def test_by_hand(self) -> None:
        net = self.embedding()
        labels, augment = torch.tensor([4, -1, 0]), torch.randn(3, 2)
        hot = torch.zeros(3, 5)
        hot[0, 4] = hot[2, 0] = math.sqrt(5)
        emb = sinusoids(self.noise, 8) + net.label(hot) + augment @ net.augment.weight.t()  # type: ignore
        expected = F.silu(net.linear1(F.silu(net.linear0(emb))))
        torch.testing.assert_close(net(self.noise, Conditioning(labels=labels, augment=augment)), expected)

    def test_no_conditioning_equals_labels_minus_one_and_zero_augmentation(self) -> None:
        net = self.embedding()
        explicit = Conditioning(labels=torch.full((3,), -1), augment=torch.zeros(3, 2))
        torch.testing.assert_close(net(self.noise, Conditioning()), net(self.noise, explicit), rtol=0, atol=0)

    def test_full_precision_under_autocast(self) -> None:
        net = self.embedding()
        expected = net(self.noise, Conditioning())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = net(self.noise, Conditioning())
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("cond", "message"),
        [
            (Conditioning(labels=torch.tensor([0, 5, 1])), "num_classes=5"),
            (Conditioning(labels=torch.tensor([0, -2, 1])), "-2 to 1"),
            (Conditioning(labels=torch.tensor([0, 1])), "labels has shape"),
            (Conditioning(augment=torch.zeros(3, 4)), "augment has shape"),
        ],
    )
    def test_bad_labels(self, cond: Conditioning, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.embedding()(self.noise, cond)

    @pytest.mark.parametrize("field", ["labels", "augment"])
    def test_labels_without_an_input(self, field: str) -> None:
        cond = Conditioning(**{field: torch.zeros(3, 2) if field == "augment" else torch.zeros(3, dtype=torch.int64)})
        with pytest.raises(ValueError, match="leave"):
            NoiseEmbedding(8)(self.noise, cond)


def test_a_block_computed_again_has_the_same_gradients_from_less_memory(image: Tensor) -> None:
    def passed(recompute: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        block = ResidualBlock(4, 8, 5, 0.5, attention=True).double()
        block.recompute = recompute
        kept: dict[int, int] = {}
        x = torch.cat([image, image[:, :1]], dim=1).requires_grad_()
        emb = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = block(x, emb)
        found = torch.autograd.grad(out.square().sum(), [x, emb, *block.parameters()])
        return [out, *found], sum(kept.values())

    (plain, much), (again, little) = passed(False), passed(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert little < much / 5
