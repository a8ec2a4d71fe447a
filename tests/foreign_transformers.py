"""Files of transformers as other code writes them: golden files of the original code, and folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return settings, weights and case of a file that the original code made."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["config"])
    parts = ({k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("weights.", "case."))
    return settings, *parts


def heads(settings: dict[str, Any]) -> int:
    return int((settings.get("hidden_size") or settings["embed_dim"]) // settings["num_heads"])


def written(folder: Path, name: str, content: Any = None) -> Path:
    path = folder / f"{name}.pt"
    torch.save(golden(name)[1] if content is None else content, path)
    return path


def folder_of(path: Path, **changes: Any) -> tuple[Path, Any]:
    """Save a DiT of diffusers with random weights as a pipeline's folder; return it and the model."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(path / "transformer")
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, **changes).save_pretrained(path / "scheduler")
    return path, model
