"""Generated files: without this package, a network computes what it computes here."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from loading import load

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.files import to_dict
from multistage_diffusion.interop.self_contained import self_contained
from multistage_diffusion.nets import build_network

pytest.importorskip("diffusers")

UNET = ("multistage_diffusion.interop.hub.multistage_unet", "MultistageUNet")
NETWORKS: dict[str, dict[str, Any]] = {
    "ldm": {"encoder_width": 32, "decoder_widths": (64, 32), "channel_mult": (1, 2), "head_channels": 16},
    "ncsnpp": {"encoder_width": 8, "decoder_widths": (16, 8), "channel_mult": (1, 2)},
    "ddpmpp": {"encoder_width": 8, "decoder_widths": (16, 8), "channel_mult": (1, 2), "num_classes": 3},
    "meme": {
        "decoder_widths": (16, 8),
        "channel_mult": (1, 2),
        "attention_shares": (0.25, 0.75),
        "separate": True,
    },
}


def loaded(source: str, folder: Path, name: str) -> ModuleType:
    """Import a file from outside the package."""
    (folder / f"{name}.py").write_text(source)
    try:
        return load(folder / f"{name}.py")
    finally:
        del sys.modules[name]


def generated(config: NetworkConfig) -> str:
    family = type(config)
    return self_contained(
        [UNET, (family.__module__, family.__qualname__)],
        title="A network.",
        last=[f"MultistageUNet.settings_class = {family.__qualname__}"],
    )


@pytest.mark.parametrize("family", NETWORKS)
def test_a_generated_network_computes_the_same_for_any_mix_of_stages(family: str, tmp_path: Path) -> None:
    config = NetworkConfig.of(family, **NETWORKS[family], blocks_per_level=1, attention_factors=(2,))
    source = generated(config)
    assert not re.search(r"^\s*(from|import) (\.|multistage_diffusion)", source, re.MULTILINE)
    module = loaded(source, tmp_path, f"generated_{family}")
    assert module.MultiDecoderNetwork is not type(build_network(config))
    network = build_network(config).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    settings = {k: v for k, v in to_dict(config).items() if k != "family"}
    unet = module.MultistageUNet(settings=settings, edges=(0.5,), sample_size=(8, 8), in_channels=3).eval()
    unet.load_state_dict({f"network.{name}": value for name, value in network.state_dict().items()})
    x, times = torch.randn(4, 3, 8, 8), torch.tensor([0.7, 0.2, 0.5, 0.1])
    labels = torch.tensor([0, 2, -1, 1]) if config.num_classes else None
    order = torch.tensor([1, 3, 0, 2])  # 0.5 is of the noisier stage
    with torch.no_grad():
        cond = None if labels is None else Conditioning(labels=labels[order])
        expected = torch.empty_like(x)
        expected[order] = network(x[order], times[order], [2, 2], cond)
        assert torch.equal(unet(x, times, class_labels=labels).sample, expected)
        alone = network(x, torch.full((4,), 0.9), [0, 4], None if labels is None else Conditioning(labels=labels))
        assert torch.equal(unet(x, 0.9, class_labels=labels, return_dict=False)[0], alone)
        assert unet.half()(x.half(), 0.9, class_labels=labels).sample.dtype == torch.float16


def test_what_nothing_calls_is_left_out_and_names_that_differ_are_kept_apart() -> None:
    source = generated(NetworkConfig.of("ldm"))
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert "NCSNppConfig" not in classes
    methods = {part.name for part in classes["LDMConfig"].body if isinstance(part, ast.FunctionDef)}
    assert {"encoder", "decoder", "norm"} <= methods
    assert "advice" not in methods
    defined = [
        n.id for node in tree.body if isinstance(node, ast.Assign) for n in node.targets if isinstance(n, ast.Name)
    ]
    assert len(defined) == len(set(defined))
    groups = {name: ast.literal_eval(node.value) for name, node in (
        (n.id, node) for node in tree.body if isinstance(node, ast.Assign) for n in node.targets if isinstance(n, ast.Name)
    ) if name.endswith("GROUPS")}  # fmt: skip
    assert set(groups.values()) == {16, 32}


def test_only_this_package_is_written() -> None:
    with pytest.raises(UserError, match="is no module of multistage_diffusion"):
        self_contained([("torch.nn", "Module")], title="x")
    with pytest.raises(UserError, match="is not defined in multistage_diffusion"):
        self_contained([("multistage_diffusion.nets.ldm", "Tensor")], title="x")
