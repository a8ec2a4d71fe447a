"""What sets DiT apart: agreement with published code, counts, conditioning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets import MultiDecoderNetwork, build_network
from multistage_diffusion.nets.cost import network_cost

GOLDEN = Path(__file__).parents[1] / "golden" / "dit.safetensors"


def dit(width: int, depth: int, **changes: Any) -> NetworkConfig:
    settings = {"channels": 4, "encoder_width": width, "decoder_widths": (width,), "encoder_depth": depth // 2}
    return NetworkConfig.of("dit", **settings | {"decoder_depths": (depth - depth // 2,)} | changes)


def place(state: dict[str, Tensor], ours: str, published: dict[str, Tensor], theirs: str) -> None:
    for kind in ("weight", "bias"):
        state[f"{ours}.{kind}"] = published[f"{theirs}.{kind}"]


def block_name(i: int, shared: int) -> str:
    return f"encoders.0.blocks.{i}" if i < shared else f"decoders.0.blocks.{i - shared}"


def of_original(weights: dict[str, Tensor], depth: int, shared: int) -> dict[str, Tensor]:
    """Return our state dict of the original's weights."""
    state: dict[str, Tensor] = {"encoders.0.embedding.label.weight": weights["y_embedder.embedding_table.weight"]}
    place(state, "encoders.0.patches.linear", weights, "x_embedder.proj")
    state["encoders.0.patches.linear.weight"] = state["encoders.0.patches.linear.weight"].flatten(1)
    for i in (0, 1):
        place(state, f"encoders.0.embedding.linear{i}", weights, f"t_embedder.mlp.{2 * i}")
    pairs = {"attention.qkv": "attn.qkv", "attention.proj": "attn.proj", "modulation": "adaLN_modulation.1"}
    for i in range(depth):
        for ours, theirs in (pairs | {"mlp.linear0": "mlp.fc1", "mlp.linear1": "mlp.fc2"}).items():
            place(state, f"{block_name(i, shared)}.{ours}", weights, f"blocks.{i}.{theirs}")
    place(state, "decoders.0.modulation", weights, "final_layer.adaLN_modulation.1")
    place(state, "decoders.0.linear", weights, "final_layer.linear")
    return state


@pytest.mark.parametrize("shared", [1, 2])
def test_one_stage_is_the_published_network(shared: int) -> None:
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    depth = settings["depth"]
    config = dit(
        settings["hidden_size"],
        depth,
        encoder_depth=shared,
        decoder_depths=(depth - shared,),
        head_channels=settings["hidden_size"] // settings["num_heads"],
        num_classes=settings["num_classes"],
        learned_sigma=True,
        size=(settings["input_size"],) * 2,
    )
    network = build_network(config).eval()
    weights = {name.removeprefix("weights."): value for name, value in tensors.items()}
    network.load_state_dict(of_original(weights, depth, shared))
    torch.testing.assert_close(
        network.encoders[0].get_buffer("positions"), tensors["weights.pos_embed"], rtol=0, atol=1e-6
    )
    labels = tensors["case.y"].where(tensors["case.y"] < 6, -1)  # the original's last row stands for no label
    with torch.no_grad():
        out = network(tensors["case.x"], tensors["case.t"], [3], Conditioning(labels=labels))
    torch.testing.assert_close(out, tensors["case.out"][:, :4], rtol=0, atol=1e-5)
    assert float(tensors["case.out"].std()) > 0.1


@pytest.mark.slow
def test_it_agrees_with_diffusers_on_random_weights() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        sample_size=16,
        num_embeds_ada_norm=10,
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:  # DiT has one embedding, and its published files have copies
        block.norm1.emb.load_state_dict(first.state_dict())
    network = build_network(
        dit(64, 5, head_channels=16, num_classes=10, learned_sigma=True, size=(16, 16), freq_shift=1.0, norm_eps=1e-5)
    ).eval()
    network.load_state_dict(of_diffusers(theirs.state_dict(), 5, 2))
    x, steps, labels = torch.randn(3, 4, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])
    with torch.no_grad():
        expected = theirs(x, timestep=steps, class_labels=labels).sample[:, :4]
        told = Conditioning(labels=labels.where(labels < 10, -1))
        out = network(x, steps.float(), [3], told)
        original = build_network(dit(64, 5, head_channels=16, num_classes=10, learned_sigma=True, size=(16, 16))).eval()
        original.load_state_dict(network.state_dict())
        unlike = original(x, steps.float(), [3], told)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert float((unlike - expected).abs().max()) > 1e-4  # other frequencies


def of_diffusers(weights: dict[str, Tensor], depth: int, shared: int) -> dict[str, Tensor]:
    """Return our state dict of the weights of diffusers' DiT."""
    first = "transformer_blocks.0.norm1.emb"
    table = weights[f"{first}.class_embedder.embedding_table.weight"]
    state: dict[str, Tensor] = {"encoders.0.embedding.label.weight": table}
    place(state, "encoders.0.patches.linear", weights, "pos_embed.proj")
    state["encoders.0.patches.linear.weight"] = state["encoders.0.patches.linear.weight"].flatten(1)
    for i in (0, 1):
        place(state, f"encoders.0.embedding.linear{i}", weights, f"{first}.timestep_embedder.linear_{i + 1}")
    pairs = {"attention.proj": "attn1.to_out.0", "mlp.linear0": "ff.net.0.proj", "mlp.linear1": "ff.net.2"}
    for i in range(depth):
        ours, theirs = block_name(i, shared), f"transformer_blocks.{i}"
        for own, other in (pairs | {"modulation": "norm1.linear"}).items():
            place(state, f"{ours}.{own}", weights, f"{theirs}.{other}")
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.attn1.to_{part}.{kind}"] for part in "qkv"]
            state[f"{ours}.attention.qkv.{kind}"] = torch.cat(parts)
    place(state, "decoders.0.modulation", weights, "proj_out_1")
    place(state, "decoders.0.linear", weights, "proj_out_2")
    return state


@pytest.mark.parametrize(
    ("width", "depth", "head", "published"),
    [(384, 12, 64, 33.0), (768, 12, 64, 130.5), (1024, 24, 64, 458.1), (1152, 28, 72, 675.1)],
)
def test_parameters_as_published(width: int, depth: int, head: int, published: float) -> None:
    """The published figures count the fixed positions of 16 x 16 patches, which are no weights here."""
    config = dit(width, depth, head_channels=head, num_classes=1000, learned_sigma=True)
    counted = network_cost(config, 32, 32).total_parameters + 256 * width
    assert round(counted / 1e6, 1) == published


def awake(**changes: Any) -> MultiDecoderNetwork:
    torch.manual_seed(0)
    network = build_network(dit(16, 4, head_channels=8, size=(8, 8), **changes)).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_outputs_for_a_learnt_variance_are_left_out() -> None:
    kept, plain = awake(learned_sigma=True), awake()
    state = kept.state_dict()
    for kind in ("weight", "bias"):
        value = state[f"decoders.0.linear.{kind}"]
        state[f"decoders.0.linear.{kind}"] = value.unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    plain.load_state_dict(state)
    x, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(kept(x, noise, [2]), plain(x, noise, [2]))


def test_a_hidden_label_is_a_row_of_its_own() -> None:
    network = awake(num_classes=3)
    x, noise = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3.0, 700.0], dtype=torch.float64)
    none = network(x, noise, [2])
    torch.testing.assert_close(none, network(x, noise, [2], Conditioning(labels=torch.tensor([-1, -1]))))
    network.encoders[0].embedding.label.weight.data[3] += 1  # type: ignore[union-attr, index, operator]
    assert not torch.allclose(none, network(x, noise, [2]))
    with pytest.raises(UserError, match="use 0 to 2, or -1"):
        network(x, noise, [2], Conditioning(labels=torch.tensor([0, 3])))
    with pytest.raises(UserError, match="num_classes=0"):
        awake()(x, noise, [2], Conditioning(labels=torch.tensor([0, 1])))


def test_every_block_is_the_identity_at_the_start() -> None:
    network = build_network(dit(16, 4, head_channels=8)).eval()
    block, x = network.decoders[0].blocks[0], torch.randn(2, 5, 16)  # type: ignore[union-attr, index]
    assert torch.equal(block(x, torch.randn(2, 16)), x)


@pytest.mark.parametrize(
    ("bad", "message"), [({"freq_shift": 2.0}, "freq_shift=2.0 must be in"), ({"norm_eps": 0.0}, "norm_eps=0.0 must be in")]
)  # fmt: skip
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dit(64, 2, **bad)
