"""The network of a run as a model of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from ...config.network import NetworkConfig
from ...contracts import Conditioning
from ...nets.network import MultiDecoderNetwork
from ...performance.offload import OneStageAtATime


@dataclass
class MultistageUNetOutput(BaseOutput):  # type: ignore[misc]
    """Result of MultistageUNet.

    Attributes:
        sample: the raw output of the network, (B, C, H, W).
    """

    sample: Tensor


class MultistageUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A shared encoder with a decoder for each noise range; the timestep of a row picks its decoder.

    Args:
        settings: of the network.
        time: what timesteps are: the "network"'s own noise level (ln(sigma) / 4, 999 t or a step), or "flow": 1000 t of
            rectified flow, t = sigma / (1 + sigma).
        edges: timesteps between stages, ascending; a timestep at an edge is of the noisier stage.
        sample_size: (height, width) of the input.
        in_channels: channels of the input.
    """

    _supports_gradient_checkpointing = False
    settings_class: Callable[..., NetworkConfig]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        settings: dict[str, Any],
        time: str = "network",
        edges: tuple[float, ...] = (),
        sample_size: tuple[int, int] = (32, 32),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        given = {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in settings.items()}
        self.network = MultiDecoderNetwork(self.settings_class(**given))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> MultistageUNetOutput | tuple[Tensor]:
        """Return the raw output of the network.

        Args:
            sample: (B, C, H, W), scaled by the scheduler's scale_model_input.
            timestep: one for all rows or one for each, (B,).
            class_labels: int64 (B,), -1 for none; None: none for all rows.
            return_dict: whether to return a MultistageUNetOutput instead of a tuple.
        """
        dtype = next(self.network.parameters()).dtype
        rows = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device).reshape(-1).expand(len(sample))
        stage, one = self._stages(timestep, rows)
        order = None if one else torch.argsort(stage, stable=True)
        counts = self._counts(stage, one, len(sample))
        noise = rows * (999.0 / 1000.0) if self.config.time == "flow" else rows
        noise = noise.to(torch.promote_types(dtype, torch.float32))
        cond = None if class_labels is None else Conditioning(labels=class_labels.to(sample.device))
        if order is None:
            out: Tensor = self.network(sample.to(dtype), noise, counts, cond)
        else:
            mixed = self.network(
                sample[order].to(dtype), noise[order], counts, None if cond is None else cond.rows(order)
            )
            out = torch.empty_like(mixed).index_copy(0, order, mixed)
        return MultistageUNetOutput(sample=out) if return_dict else (out,)

    def keep_one_stage(self, device: torch.device | str) -> None:
        """Keep on the device the shared encoder and the decoder that is called; the other decoders wait on the CPU.

        Args:
            device: of the computation. The network must still be on the CPU, and stays where this puts it.
        """
        OneStageAtATime(self.network, torch.device(device))

    def _stages(self, timestep: Tensor | float | int, rows: Tensor) -> tuple[Tensor, bool]:
        """Return the stage of each row, and whether it is one for all rows."""
        edges = torch.tensor(list(self.config.edges), dtype=torch.float64, device=rows.device)
        one = not isinstance(timestep, Tensor) or timestep.numel() == 1
        return torch.bucketize(rows[:1] if one else rows, edges, right=True), one

    def _counts(self, stage: Tensor, one: bool, rows: int) -> list[int]:
        stages = len(self.config.edges) + 1
        counts: list[int] = torch.bincount(stage, minlength=stages).tolist()
        return [rows * count for count in counts] if one else counts
