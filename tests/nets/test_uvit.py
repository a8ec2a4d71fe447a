"""What sets U-ViT apart: agreement with published outputs, counts, and how decoders of other depths take the skips."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.nets.uvit import UViTDecoder

GOLDEN = Path(__file__).parents[1] / "golden"


def published(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and tensors of a file made by the published code: random weights, inputs and outputs."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def configured(settings: dict[str, Any]) -> NetworkConfig:
    classes = max(settings.get("num_classes", 0) - 1, 0)  # the last one stands for no label
    return NetworkConfig.of(
        "uvit",
        channels=settings["in_chans"],
        patch=settings["patch_size"],
        encoder_width=settings["embed_dim"],
        decoder_widths=(settings["embed_dim"],),
        encoder_depth=settings["depth"] // 2,
        head_channels=settings["embed_dim"] // settings["num_heads"],
        size=(settings["img_size"],) * 2,
        num_classes=classes,
        qkv_bias=settings.get("qkv_bias", False),
        time_mlp=settings.get("mlp_time_embed", False),
        final_conv=settings.get("conv", True),
    )


def our_name(name: str) -> str:
    """Return our name of a published tensor, but for the positions."""
    for theirs, ours in (
        ("patch_embed.proj", "encoders.0.patches.linear"),
        ("time_embed", "encoders.0.embedding.mlp"),
        ("label_emb", "encoders.0.embedding.label.table"),
        ("in_blocks", "encoders.0.blocks"),
        ("mid_block", "encoders.0.middle"),
        ("out_blocks", "decoders.0.blocks"),
        ("decoder_pred", "decoders.0.linear"),
        ("final_layer", "decoders.0.conv"),
    ):
        if name.startswith(f"{theirs}."):
            rest = name.removeprefix(theirs)
            for part, own in (
                (".attn.", ".attention."),
                (".norm1.", ".norm0."),
                (".norm2.", ".norm1."),
                (".mlp.fc1.", ".mlp.linear0."),
                (".mlp.fc2.", ".mlp.linear1."),
                (".skip_linear.", ".skip."),
            ):
                if part in rest:
                    rest = rest.replace(part, own)
                    break
            return ours + rest
    assert name.startswith("norm."), name
    return f"decoders.0.{name}"


@pytest.mark.parametrize("name", ["uvit", "uvit_classes"])
def test_one_stage_is_the_published_network(name: str) -> None:
    settings, tensors = published(name)
    config = configured(settings)
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    positions = weights.pop("pos_embed")
    state = {our_name(key): value for key, value in weights.items()}
    state["encoders.0.patches.linear.weight"] = state["encoders.0.patches.linear.weight"].flatten(1)
    if config.num_classes:
        state["encoders.0.embedding.label.position"], positions = positions[:, :1], positions[:, 1:]
    state |= {"encoders.0.embedding.position": positions[:, :1], "encoders.0.positions": positions[:, 1:]}
    network = build_network(config).eval()
    network.load_state_dict(state)
    labels = tensors.get("case.y")
    cond = Conditioning(labels=None if labels is None else labels.where(labels < config.num_classes, -1))
    with torch.no_grad():
        out = network(tensors["case.x"], tensors["case.t"], [3], cond)
    torch.testing.assert_close(out, tensors["case.out"], rtol=0, atol=1e-5)
    assert float(out.std()) > 0.02


@pytest.mark.parametrize(
    ("settings", "millions"),
    [
        ({"channels": 3, "encoder_width": 512, "decoder_widths": (512,), "encoder_depth": 6}, 44.26),
        (
            {"channels": 4, "encoder_width": 768, "decoder_widths": (768,), "encoder_depth": 8, "num_classes": 1000},
            130.9,
        ),
        (
            {"channels": 4, "encoder_width": 1024, "decoder_widths": (1024,), "encoder_depth": 10, "num_classes": 1000},
            286.8,
        ),
    ],
)
def test_parameters_as_published(settings: dict[str, Any], millions: float) -> None:
    """S/2 on CIFAR-10; M/2 and L/2 on 4x32x32 latents with 1001 classes, of which one stands for none."""
    counted = network_cost(NetworkConfig.of("uvit", **settings), 32, 32).total_parameters / 1e6
    assert round(counted, 2 if millions < 100 else 1) == millions


@pytest.mark.parametrize(
    ("shared", "depth", "taken"),
    [
        (4, 4, (0, 1, 2, 3)),
        (4, 2, (0, 2)),
        (4, 3, (0, 1, 2)),
        (6, 4, (0, 1, 3, 4)),
        (2, 5, (0, 0, 0, 1, 1)),
        (3, 1, (0,)),
    ],
)
def test_skips_are_shared_out_evenly(shared: int, depth: int, taken: tuple[int, ...]) -> None:
    """Block j of L takes skip floor(j n / L), counted from the deepest: changing that skip alone changes its input."""
    config = NetworkConfig.of(
        "uvit",
        channels=2,
        encoder_width=8,
        decoder_widths=(8,),
        encoder_depth=shared,
        decoder_depths=(depth,),
        head_channels=4,
        size=(4, 4),
    )
    network = build_network(config).eval()
    decoder = network.decoders[0]
    assert isinstance(decoder, UViTDecoder)
    with torch.no_grad():
        encoded = network.encoders[0](torch.randn(1, 2, 4, 4), torch.tensor([1.0]), Conditioning())
        assert len(encoded.skips) == shared
        seen: list[Tensor] = []
        for block in decoder.blocks:
            block.skip.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 8:]))  # type: ignore[union-attr, operator]
        decoder(encoded)
    assert all(torch.equal(skip, encoded.skips[-1 - i]) for skip, i in zip(seen, taken, strict=True))


def test_equal_widths_have_no_map_and_others_one() -> None:
    config = NetworkConfig.of("uvit", encoder_width=64, decoder_widths=(64, 128), encoder_depth=1)
    same, wider = build_network(config).decoders
    assert not any(name.startswith("map") for name in same.state_dict())
    assert wider.map.weight.shape == (128, 64)  # type: ignore[union-attr]
    skips = [decoder.blocks[0].skip.weight.shape for decoder in (same, wider)]  # type: ignore[union-attr, index]
    assert skips == [(64, 128), (128, 192)]


def test_each_decoder_has_its_own_end() -> None:
    config = NetworkConfig.of("uvit", encoder_width=64, decoder_widths=(64, 64), encoder_depth=1)
    for decoder in build_network(config).decoders:
        assert [type(end) for end in (decoder.norm, decoder.linear, decoder.conv)] == [
            nn.LayerNorm,
            nn.Linear,
            nn.Conv2d,
        ]


def test_augmentation_changes_the_token_of_noise() -> None:
    config = NetworkConfig.of("uvit", encoder_width=64, decoder_widths=(64,), encoder_depth=1, augment_dim=2)
    embedding = build_network(config).encoders[0].embedding
    plain, told = (embedding(torch.zeros(1), Conditioning(augment=torch.tensor([[x, 0.0]]))) for x in (0.0, 1.0))  # type: ignore[operator]
    torch.testing.assert_close(told - plain, embedding.augment.weight[:, 0].expand(1, 1, -1))  # type: ignore[union-attr, operator, index]
