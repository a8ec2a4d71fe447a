"""How a network is computed in training: settings of speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import require

Choice = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a network is computed in training; its results are the same up to rounding.

    "auto" is decided by autotuning at the start of a run, which measures what is faster on its device
    (performance/autotune.py). It is off in a run too short for autotuning to pay off.

    Attributes:
        channels_last: store feature maps pixel by pixel (channels_last) rather than channel by channel.
        compile: compile residual blocks (torch.compile), which takes minutes at every start. "auto" tries it on CUDA,
            in one process, if more than half an hour of training is left.
        cuda_graphs: record the forward and the backward pass once and replay them, which saves the CPU's kernel
            launches; on CUDA, in one process.
        thread_parallel: parts of a batch that are computed in parallel, each on its share of PyTorch's threads; on a
            CPU, in one process. Each part draws its own dropout, so dropout differs from that of an undivided batch.
        recompute: gradient checkpointing (Chen et al. 2016): compute residual blocks again in the backward pass instead
            of storing their activations. This costs another forward pass and saves memory.
    """

    channels_last: Choice = "auto"
    compile: Choice = "auto"
    cuda_graphs: Choice = "auto"
    thread_parallel: int | Literal["auto"] = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require(
            self.thread_parallel == "auto" or self.thread_parallel >= 1,
            f"execution.thread_parallel={self.thread_parallel} must be at least 1, or auto",
        )
        for name in ("recompute", "compile"):
            require(
                not (getattr(self, name) is True and self.thread_parallel not in ("auto", 1)),
                f"execution.{name}=True and execution.thread_parallel={self.thread_parallel}: that is done by one thread at "
                "a time; set execution.thread_parallel to 1",
            )
        require(
            not (self.recompute and self.cuda_graphs is True),
            "execution.recompute=True and execution.cuda_graphs=True: what dropout has drawn cannot be drawn again in a graph; "
            "set one of them to False",
        )
