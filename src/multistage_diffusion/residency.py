"""What a sampler keeps in memory: one stage's parts on the device (offloading), and as many images at once as fit."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import NetworkConfig
from .nets.unet import MultiDecoderUNet

MOST = {"cpu": 256, "cuda": 1024}  # images at once, beyond which nothing gets faster
SHARE = 0.6  # of the free memory that a call may take: allocators need room
MEMINFO = Path("/proc/meminfo")
NOISE = 40 * 8  # bytes per number of drawing normals in float64, which a trajectory starts with


class OneStageAtATime:
    """Keeps on a device what all stages share and the parts of one stage: a sampler goes through the stages one by one.

    A stage's parts come when they are called, and those of the stage before are left; their weights stay on the CPU.

    Args:
        network: on the CPU, not to be trained.
        device: where it is to be computed.

    Attributes:
        stage: whose parts are there, None at first.
    """

    def __init__(self, network: MultiDecoderUNet, device: torch.device) -> None:
        self.device = device
        self.stage: int | None = None
        self._parts: list[list[nn.Module]] = []
        for k, decoder in enumerate(network.decoders):
            self._parts.append([network.encoders[k], decoder] if network.config.separate else [decoder])
        shared = nn.ModuleList() if network.config.separate else network.encoders
        shared.to(device)
        self._at_home: dict[Tensor, Tensor] = {}
        for k, parts in enumerate(self._parts):
            for tensor in _tensors(parts):
                self._at_home[tensor] = tensor.data.pin_memory() if device.type == "cuda" else tensor.data
            for part in parts:
                part.register_forward_pre_hook(lambda *_, k=k: self.bring(k))

    def bring(self, stage: int) -> None:
        """Let a stage's parts be on the device, and no others."""
        if stage == self.stage:
            return
        if self.stage is not None:
            for tensor in _tensors(self._parts[self.stage]):
                tensor.data = self._at_home[tensor]
        for tensor in _tensors(self._parts[stage]):
            tensor.data = self._at_home[tensor].to(self.device, non_blocking=True, copy=True)
        self.stage = stage


def _tensors(parts: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def images_at_once(
    network: NetworkConfig, shape: Sequence[int], count: int, device: torch.device, rows: int = 1
) -> int:
    """Return how many images to sample at once: as many as fit into free memory, in batches of about one size.

    Args:
        network: its configuration.
        shape: (C, H, W) of what it makes.
        count: images wanted.
        device: where.
        rows: of the network for each image (2 with guidance).
    """
    each = rows * call_memory(network, shape) + NOISE * torch.Size(shape).numel()
    most = max(1, min(MOST.get(device.type, 256), int(SHARE * free_memory(device) / each), count))
    batches = max(1, -(-count // most))
    return max(1, -(-count // batches))


def call_memory(network: NetworkConfig, shape: Sequence[int]) -> int:
    """Return about the bytes of feature maps that a float32 call without gradients holds at most, for one image of any stage.

    Those are the encoder's maps, all of which wait for a decoder, and what a block works on: its input, here and there a second
    one joined to it, and a few maps of its own.
    """
    mults, most = network.channel_mult, 0.0
    areas = [shape[1] * shape[2] / 4**level for level in range(len(mults))]
    for stage, decoder in enumerate(network.decoder_widths):
        encoder = network.decoder_widths[stage] if network.separate else network.encoder_width
        waiting = sum((network.blocks_per_level + 1) * encoder * m * area for m, area in zip(mults, areas, strict=True))
        before = [*mults[1:], mults[-1]]  # a level's first block has the width below it
        works = max(
            area * (2 * (max(decoder * b, encoder) + encoder * m) + 4 * decoder * max(m, b))
            for m, b, area in zip(mults, before, areas, strict=True)
        )
        most = max(most, waiting + works)
    return int(4 * most)


def free_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if MEMINFO.exists():  # what the system keeps of files is given up when memory is asked for
        return 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
