"""What a sampler keeps in memory: one stage's parts on the device (offloading), and as many images at once as fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import NetworkConfig, RunConfig
from ..memory import available_memory, require_memory
from ..nets.unet import MultiDecoderUNet

MOST = {"cpu": 256, "cuda": 1024}  # images at once, beyond which nothing gets faster
SHARE = 0.6  # of the free memory that a call may take: allocators need room
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


def require_sampling_memory(
    network: NetworkConfig, shape: Sequence[int], count: int, batch: int | None, device: torch.device, rows: int = 1
) -> None:
    """Refuse, before anything is drawn, samples or a batch of them that memory cannot hold.

    Args:
        network, shape, count, device, rows: see `images_at_once`.
        batch: images at once; None: as many as fit.

    Raises:
        UserError: naming what is too many.
    """
    numel = torch.Size(shape).numel()
    # all images are held, as bytes, and once more when they are joined
    require_memory(2 * count * numel, f"count={count}", "draw fewer, with other seeds for more")
    if batch is not None:
        # call_memory is the most of any stage, and not all of it at once
        each = rows * call_memory(network, shape) // 2 + NOISE * numel
        there = free_memory(device)
        require_memory(min(batch, count) * each, f"batch={batch}", "take a smaller batch, or leave it out", there)


def require_training_memory(config: RunConfig, parameters: int, device: torch.device, processes: int) -> None:
    """Refuse, before anything is trained, what memory cannot hold.

    Args:
        config: of the run, with the shape of its images or latents.
        parameters: of the whole network.
        device: of one of the processes.
        processes: that share the rows, and perhaps the decoders.

    Raises:
        UserError: naming what is too large.
    """
    network, training, there = config.network, config.training, free_memory(device)
    widths = "/".join(map(str, network.decoder_widths))
    require_memory(
        4 * 4 * parameters / processes,  # float32: weights, gradients and two moments; averages may lie elsewhere
        f"a network of {parameters:,} parameters (encoder {network.encoder_width}, decoders {widths})",
        "take smaller network.encoder_width and network.decoder_widths",
        there,
    )
    require_memory(
        training.batch / training.accumulate / processes * call_memory(network, config.input_shape) / 2,
        f"training.batch={training.batch}",
        "take a smaller training.batch, or a larger training.accumulate",
        there,
    )
    numel, judged = torch.Size(config.input_shape).numel(), config.evaluation
    for name, count, size in (
        ("training.held_out_rows", training.held_out_rows, 8 * numel),  # images and noise
        ("training.sample_count", training.sample_count if training.sample_every else 0, 2 * numel),
        ("evaluation.count", judged.count if judged.every else 0, 2 * numel),
    ):
        require_memory(count * size, f"{name}={count}", f"take a smaller {name}")


def free_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_memory()
