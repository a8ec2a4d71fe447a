"""Communication between the processes that train one run; a single process communicates nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..denoisers import MultiStageDenoiser
from ..distributed import World
from ..distributed.reducer import Reducer
from ..errors import UserError
from . import branching
from . import checkpoint as ckpt
from .run import Run
from .strategies import Layout, stage_of_part


class GradientSync:
    """Sums gradients and metrics over the processes of a trainer, and gathers the whole network.

    Args:
        world: all processes.
        layout: assignment of stages to processes.
        double: whether gradients are float64.
    """

    def __init__(self, world: World, layout: Layout, *, double: bool = False) -> None:
        self.world, self.layout, self.double = world, layout, double
        self.everybody = world.group(range(world.size))
        self.groups = [world.group(ranks) for ranks in layout.holders]
        self.reducer: Reducer | None = None
        self._stages: dict[str, int | None] = {}  # stage of each part held here; None: used by all stages
        self.stopping = False  # whether any process has requested a stop, as of the last step

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.world.size == 1

    def latest(self, run: Run) -> Path | None:
        """Return the checkpoint from which all processes resume: the latest on rank 0; None if there is none.

        Raises:
            UserError: if a process cannot see it.
        """
        found = ckpt.list_checkpoints(run.checkpoints)
        name = self.world.broadcast_object(found[-1].name if found else None)
        with self.world.synchronize_errors():
            if name is not None and name not in [path.name for path in found]:
                raise UserError(
                    f"{run.checkpoints}: {name} is not there, which rank 0 goes on from; all processes need the run's "
                    "folder on a file system that they share"
                )
        return None if name is None else run.checkpoints / name

    def rows(self, counts: Sequence[int]) -> tuple[range, ...]:
        """Return this process's rows of each stage."""
        return self.layout.rows(self.world.rank, counts)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def equip(self, parts: Mapping[str, Sequence[nn.Parameter]], *, shared: bool) -> None:
        """Register the parameters whose gradients are summed; called again after branching.

        Args:
            parts: parameters held by this process, by part.
            shared: whether all stages share one decoder.
        """
        if self.alone:
            return
        if self.reducer is not None:
            self.reducer.close()
        self._stages = {name: None if shared else stage_of_part(name) for name in parts}
        groups = {name: self.everybody if k is None else self.groups[k] for name, k in self._stages.items()}
        self.reducer = Reducer(parts, groups)

    def expect(self, counts: Sequence[int]) -> None:
        """Prepare to sum gradients over processes during the next backward pass, the last one of the step.

        Args:
            counts: rows of each stage in the whole step.
        """
        if self.reducer is not None:
            own = [len(rows) for rows in self.rows(counts)]
            self.reducer.start(self._passed(counts), self._passed(own))

    def _passed(self, counts: Sequence[int]) -> list[str]:
        """Return the parts held here that are used, given the number of rows of each stage."""
        return [name for name, k in self._stages.items() if (any(counts) if k is None else counts[k])]

    def sum_gradients(self) -> None:
        """Wait until the gradients are summed over all processes."""
        if self.reducer is not None:
            self.reducer.finish()

    def sync_overflow(self, grads: Sequence[Tensor]) -> None:
        """Propagate a gradient overflow on one process to all, so that either all skip the step or none."""
        if self.alone:
            return
        overflowed = (~torch.isfinite(nn.utils.get_total_norm(grads))).to(grads[0].device, torch.float32)
        if float(self.world.all_reduce(overflowed)):
            grads[0].fill_(math.inf)

    def reduce_metrics(
        self, totals: Tensor, norms: dict[str, Tensor], parts: Sequence[str], *, stopping: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sums over all processes and the gradient norms of all parts, each part counted once.

        Args:
            totals: summed loss of each stage over this process's rows.
            norms: scalar gradient norms of the parts held here that have a gradient.
            parts: names of all parts of the whole network.
            stopping: whether this process has requested a stop.
        """
        if self.alone:
            return totals, norms
        stages, values = len(totals), torch.zeros(len(parts), 2, dtype=torch.float64, device=totals.device)
        for i, name in enumerate(parts):
            if name in norms and self.layout.owner(stage_of_part(name)) == self.world.rank:
                values[i, 0], values[i, 1] = norms[name], 1.0
        flag = values.new_tensor([float(stopping)])
        told = self.world.all_reduce(torch.cat([totals.to(values.dtype), values.flatten(), flag]))
        found, values = told.tolist(), told[stages:-1].reshape(len(parts), 2)
        self.stopping = found[-1] > 0
        # norms of fp32 gradients are fp32, so the cast is exact
        dtype = torch.float64 if self.double else torch.float32
        known = {name: values[i, 0].to(dtype) for i, name in enumerate(parts) if found[stages + 2 * i + 1]}
        return told[:stages].to(totals.dtype), known

    # -- tensors of the whole network ----------------------------------------------------------------------------------

    def gather_state(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the named tensors of the whole network on rank 0, each from its owner (`Layout.owner`)."""
        owner = {name: self.layout.owner(self.layout.stage_of(name)) for name in tensors}
        return self.world.gather_named({n: value for n, value in tensors.items() if owner[n] == self.world.rank})

    def gather_model(self, module: MultiStageDenoiser, build: Callable[[], MultiStageDenoiser]) -> MultiStageDenoiser:
        """Return a denoiser of the whole network on every process; all processes call it.

        Args:
            module: the parts of this process; returned as is if every process holds the whole network.
            build: builds a denoiser of the whole network, whose weights are then overwritten.
        """
        if branching.tied(module.network) or self.layout.everywhere(self.world.size):
            return module
        mine, whole = module.state_dict(), build()
        for name, tensor in whole.state_dict().items():
            if name in mine:
                tensor.copy_(mine[name])
            self.world.broadcast(tensor, self.layout.owner(self.layout.stage_of(name)))
        return whole.eval().requires_grad_(False)
