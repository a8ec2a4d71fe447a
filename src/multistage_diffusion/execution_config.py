"""How a network is to be computed: settings of speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .network_config import require

Choice = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a network is computed in training: what it computes is the same but for rounding.

    "auto" is what a short trial at the start of a run finds faster on its device (training/trial.py), and off in a run too short
    to earn it back.

    Attributes:
        channels_last: lay feature maps out pixel by pixel rather than channel by channel.
        compile: compile residual blocks (torch.compile); takes minutes at every start. "auto" tries it on CUDA in runs of hours.
        cuda_graphs: record the forward and the backward pass once and replay them, so that the CPU need not launch every kernel;
            on CUDA, in one process.
        recompute: run residual blocks again in the backward pass instead of keeping all that is inside them: less memory for
            another forward pass (gradient checkpointing; Chen et al. 2016).
    """

    channels_last: Choice = "auto"
    compile: Choice = "auto"
    cuda_graphs: Choice = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require(
            not (self.recompute and self.cuda_graphs is True),
            "execution.recompute=True and execution.cuda_graphs=True: what dropout has drawn cannot be drawn again in a graph; "
            "set one of them to False",
        )
