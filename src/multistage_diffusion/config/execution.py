"""How a network is to be computed: settings of speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .network import require

Choice = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a network is computed in training: what it computes is the same but for rounding.

    "auto" is what a short trial at the start of a run finds faster on its device (performance/autotune.py), and off in a run
    too short to earn it back.

    Attributes:
        channels_last: lay feature maps out pixel by pixel rather than channel by channel.
        compile: compile residual blocks (torch.compile); takes minutes at every start. "auto" tries it on CUDA in runs of hours.
        cuda_graphs: record the forward and the backward pass once and replay them, so that the CPU need not launch every kernel;
            on CUDA, in one process.
        shards: parts of a batch that are computed at once, each by its share of PyTorch's threads; on a CPU, in one process. A
            part drops units of its own: dropout is another draw then.
        recompute: run residual blocks again in the backward pass instead of keeping all that is inside them: less memory for
            another forward pass (gradient checkpointing; Chen et al. 2016).
    """

    channels_last: Choice = "auto"
    compile: Choice = "auto"
    cuda_graphs: Choice = "auto"
    shards: int | Literal["auto"] = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require(
            self.shards == "auto" or self.shards >= 1, f"execution.shards={self.shards} must be at least 1, or auto"
        )
        for name in ("recompute", "compile"):
            require(
                not (getattr(self, name) is True and self.shards not in ("auto", 1)),
                f"execution.{name}=True and execution.shards={self.shards}: that is done by one thread at a time; "
                "set execution.shards to 1",
            )
        require(
            not (self.recompute and self.cuda_graphs is True),
            "execution.recompute=True and execution.cuda_graphs=True: what dropout has drawn cannot be drawn again in a graph; "
            "set one of them to False",
        )
