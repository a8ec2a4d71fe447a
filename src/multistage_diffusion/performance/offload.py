"""Memory of sampling and training: offloading of stages, the batch size that fits, and checks before the work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import NetworkConfig, RunConfig
from ..memory import available_memory, require_memory
from ..nets import MultiDecoderNetwork
from ..nets.cost import feature_elements, network_cost, saved_bytes
from ..shares import stage_shares

MOST = {"cpu": 256, "cuda": 1024}  # batch size above which sampling gets no faster
SHARE = 0.6  # share of the free memory that a call may use; the rest is headroom for the allocator
WORKSPACE = 1.25  # peak memory of a training step over what autograd keeps, on a CPU (1.10 to 1.22 measured)
NOISE = 40 * 8  # bytes per element for drawing the starting noise in float64


class OneStageAtATime:
    """Offloading: keeps the shared encoder and the parts of one stage on the device.

    A sampler goes through the stages one by one. When a part of a stage is called, its stage is copied to the device
    and the device memory of the previous stage is released. The weights of all stages stay on the CPU.

    Args:
        network: on the CPU, not for training.
        device: of the computation.

    Attributes:
        stage: index of the stage on the device, initially None.
    """

    def __init__(self, network: MultiDecoderNetwork, device: torch.device) -> None:
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
        """Copy the parts of a stage to the device and release those of the previous stage."""
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
    """Return the batch size for sampling: as many images as fit into free memory, in batches of nearly equal size.

    Args:
        network: configuration of the network.
        shape: (C, H, W) of its output.
        count: total number of images.
        device: of the computation.
        rows: network rows per image (2 with guidance).
    """
    each = rows * call_memory(network, shape) + NOISE * torch.Size(shape).numel()
    most = max(1, min(MOST.get(device.type, 256), int(SHARE * free_memory(device) / each), count))
    batches = max(1, -(-count // most))
    return max(1, -(-count // batches))


def call_memory(network: NetworkConfig, shape: Sequence[int]) -> int:
    """Estimate the peak bytes of feature maps per image of a float32 call without gradients, for the largest stage."""
    return 4 * feature_elements(network, *shape[1:])


def require_sampling_memory(
    network: NetworkConfig, shape: Sequence[int], count: int, batch: int | None, device: torch.device, rows: int = 1
) -> None:
    """Raise UserError if memory cannot hold the samples or a batch of them.

    Args:
        network, shape, count, device, rows: see `images_at_once`.
        batch: images per batch; None: as many as fit.

    Raises:
        UserError: naming the value that is too large.
    """
    require_memory_of_samples(shape, count)
    numel = torch.Size(shape).numel()
    if batch is not None:
        # call_memory is an upper estimate over all stages, and not all of it is in use at once
        each = rows * call_memory(network, shape) // 2 + NOISE * numel
        there = free_memory(device)
        require_memory(min(batch, count) * each, f"batch={batch}", "take a smaller batch, or leave it out", there)


def require_memory_of_samples(shape: Sequence[int], count: int) -> None:
    """Raise UserError if memory cannot hold so many samples: uint8, and twice while they are concatenated."""
    require_memory(2 * count * torch.Size(shape).numel(), f"count={count}", "draw fewer, with other seeds for more")


def training_memory(config: RunConfig, rows: int) -> float:
    """Predict the bytes of a float32 training step: weights, gradients, moments and EMA, and what so many rows keep.

    What the rows keep is counted from the network. Half precision and gradient checkpointing need less.

    Args:
        config: of the run, with the shape of its images or latents.
        rows: rows of a micro-batch.
    """
    network, shares = config.network, stage_shares(config.training, config.stages, config.diffusion.prior)
    kept = sum(s * b for s, b in zip(shares, saved_bytes(network, *config.input_shape[1:]), strict=True))
    parameters = network_cost(network, *config.input_shape[1:]).total_parameters
    return (5 + len(config.training.ema_profiles)) * 4 * parameters + WORKSPACE * rows * kept


def require_training_memory(config: RunConfig, parameters: int, device: torch.device, processes: int) -> None:
    """Raise UserError if memory cannot hold the training of a run.

    Args:
        config: of the run, with the shape of its images or latents.
        parameters: number of parameters of the whole network.
        device: of one of the processes.
        processes: number of processes, which share the rows and possibly the decoders.

    Raises:
        UserError: naming the value that is too large.
    """
    network, training, there = config.network, config.training, free_memory(device)
    widths = "/".join(map(str, network.decoder_widths))
    require_memory(
        4 * 4 * parameters / processes,  # float32 weights, gradients and two moments; the EMA may be stored elsewhere
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
    numel, evaluation = torch.Size(config.input_shape).numel(), config.evaluation
    for name, count, size in (
        ("training.held_out_rows", training.held_out_rows, 8 * numel),  # images and noise
        ("training.sample_count", training.sample_count if training.sample_every else 0, 2 * numel),
        ("evaluation.count", evaluation.count if evaluation.every else 0, 2 * numel),
    ):
        require_memory(count * size, f"{name}={count}", f"take a smaller {name}")


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return available_memory()
