"""Networks that speed is measured on, and their peers: a diffusers UNet2DModel that costs as much."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from multistage_diffusion import override, preset
from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.files import write_json
from multistage_diffusion.performance.devices import device_name
from multistage_diffusion.performance.roofline import Roofline

PRESETS = {"digits": "digits", "t7-1": "cifar10-dpm", "edm": "cifar10-edm", "t8-4": "celebahq-ldm"}
NETWORKS = ("ncsnpp-32", *PRESETS)
SHAPES = {"digits": (1, 8, 8), "t8-4": (3, 64, 64)}


def configuration(name: str, device: torch.device) -> RunConfig:
    """Return a network's run on images that are its input, every step mixed; with a small batch on a CPU."""
    if name == "ncsnpp-32":
        base = preset("cifar10-dpm")
        changes: dict[str, Any] = {
            "network.encoder_width": 32,
            "network.decoder_widths": [48, 32, 16],
            "network.blocks_per_level": 2,
            "training.batch": 48,
        }
    else:
        base, changes = preset(PRESETS[name]), {}
        if device.type == "cpu" and name != "digits":
            changes["training.batch"] = 4 if name == "t8-4" else 12
    shape = SHAPES.get(name, (3, 32, 32))
    quiet = {"training.held_out_every": 0, "training.sample_every": 0, "training.checkpoint_every": 10**9}
    mixed = {"training.update_mode": "mixed", "training.log_every": 10**9, "training.precision": "auto"}
    data = dataclasses.replace(base.data, source="", shape=shape)
    codec = dataclasses.replace(base.codec, source="", shape=())
    return override(base, {"data": data, "codec": codec, "network.channels": shape[0], **quiet, **mixed, **changes})


def peer(shape: Sequence[int], width: int) -> Any:
    """Return a UNet2DModel: attention at 16x16, twice the width below full resolution."""
    from diffusers import UNet2DModel

    levels = 4 if shape[1] >= 32 else 2
    attentive = [shape[1] >> i == 16 for i in range(levels)]
    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=2,
        block_out_channels=[width, *[2 * width] * (levels - 1)],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attentive],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attentive)],
        norm_num_groups=8,
        attention_head_dim=None,
    )


def peer_adds(shape: Sequence[int], width: int) -> float:
    """Return a peer's multiply-adds per image, as torch counts them."""
    with torch.device("meta"), torch.no_grad():
        model, image = peer(shape, width), torch.empty(1, *shape)
        with FlopCounterMode(display=False) as counter:
            model(image, torch.zeros(1))
    return counter.get_total_flops() / 2


def fitting_width(shape: Sequence[int], adds: float) -> tuple[int, float]:
    """Return the width at which a peer's multiply-adds are nearest to `adds`, and what they are."""
    width = 8  # they grow with its square, almost
    for _ in range(6):
        width = max(8, 8 * round(width * (adds / peer_adds(shape, width)) ** 0.5 / 8))
    counts = {w: peer_adds(shape, w) for w in (width - 8, width, width + 8) if w > 0}
    return min(counts.items(), key=lambda item: abs(item[1] - adds))


def median_roofline(found: Sequence[Roofline]) -> Roofline:
    """Return a roofline measured several times, at its median rates."""
    conv, matrix = (median_low(getattr(c, name) for c in found) for name in ("convolution_rate", "matrix_rate"))
    return dataclasses.replace(found[0], convolution_rate=conv, matrix_rate=matrix)


def keep(path: Path, device: torch.device, found: Mapping[str, Any]) -> None:
    """Write what was measured, by network, beside what the file has of other networks from the same machine."""
    machine = {"device": device_name(device), "cores": os.cpu_count(), "torch": torch.__version__}
    before = read_json(path) if path.exists() else {}
    known = before["networks"] if before.get("machine") == machine else {}
    write_json(path, {"machine": machine, "networks": {**known, **found}})


def parser(description: str | None, rounds: int, out: Path) -> argparse.ArgumentParser:
    """Return the options that all benchmarks of speed have.

    Args:
        description: of the benchmark.
        rounds: by default.
        out: where --out without a name writes.
    """
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--networks", nargs="+", choices=NETWORKS, default=["ncsnpp-32", "digits"])
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--device")
    found.add_argument("--compile", action="store_true", help="compile the network, which takes minutes")
    found.add_argument("--out", type=Path, nargs="?", const=out, default=None)
    return found
