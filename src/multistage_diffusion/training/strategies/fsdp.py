"""Strategy "fsdp": every process holds a slice of every parameter, by PyTorch's FSDP2 (`fully_shard`).

The encoder and each decoder are sharded on their own. A part is gathered while it runs, in the forward and in the
backward pass; its gradients are summed by reduce_scatter. All processes must therefore call the same parts in the same
order: one without rows of a stage computes a row of another process, which counts nothing (`MicroBatch.counted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...config import RunConfig
from ...denoisers import MultiStageDenoiser
from ...distributed import World
from ...errors import UserError
from ...nets import MultiDecoderNetwork
from ..optimizer import Parts, part_gradients
from . import STRATEGIES, MicroBatch, PartShare, Strategy, divided, stage_rows

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@STRATEGIES.add("fsdp")
class FullySharded(Strategy):
    """Every process holds 1 / W of the weights, gradients, moments and averages of the whole network.

    Raises:
        UserError: for execution.compile=True on several processes.
    """

    def __init__(self, config: RunConfig, shape: tuple[int, ...], world: World) -> None:
        super().__init__(config, shape, world)
        if world.size > 1 and config.execution.compile is True:
            raise UserError(
                "execution.compile=True with strategy 'fsdp': compiled blocks of gathered parts are not supported; set it to "
                "False, or use strategy 'time'"
            )

    def rows(self, counts: Sequence[int]) -> tuple[range, ...]:
        """Return this process's share of the rows of each stage."""
        everybody = range(self.world.size)
        return tuple(stage_rows(k, count, self.world.rank, everybody) for k, count in enumerate(counts))

    def micro_batches(self, counts: Sequence[int], accumulate: int) -> list[MicroBatch]:
        """Divide the rows into the same number of micro-batches on all processes, with a row of every stage in use."""
        most = max(-(-count // self.world.size) for count in counts)
        found = []
        for own in divided(self.rows(counts), min(accumulate, most)):
            rows = [range(1) if count and not part else part for part, count in zip(own, counts, strict=True)]
            found.append(MicroBatch(rows=tuple(rows), counted=tuple(map(bool, own))))
        return found

    # -- network -------------------------------------------------------------------------------------------------------

    def place(self, network: MultiDecoderNetwork, device: torch.device, dtype: torch.dtype) -> None:
        """Shard the parameters of each part; a single process keeps the network as it is."""
        if self.world.size == 1:
            network.to(device, dtype)
            return
        # imported here, as below: the import takes seconds, and other strategies do not need it
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        network.to(dtype=dtype)
        mesh = init_device_mesh(device.type, (self.world.size,))
        for parts in (network.encoders, network.decoders):
            for part in dict.fromkeys(parts):  # stages may share a decoder
                # an encoder stays gathered: its backward pass is the last, and its input needs no gradient
                _sum_gradients(fully_shard(part, mesh=mesh, reshard_after_forward=parts is network.decoders))
        fully_shard(network, mesh=mesh)  # coordinates the parts; it has no parameters of its own

    def local(self, full: Tensor, like: Tensor) -> Tensor:
        """Return this process's slice of a tensor."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return full
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    def whole(self, held: Tensor) -> Tensor:
        """Gather a tensor's slices."""
        return _full(held)

    def gather_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather one tensor after the other."""
        found = {}
        with self.world.translate_errors():
            for name, tensor in tensors.items():
                full = _full(tensor)
                if self.world.is_main_process:
                    found[name] = full.detach().cpu()
        return found

    def gather_model(self, module: MultiStageDenoiser, build: Callable[[], MultiStageDenoiser]) -> MultiStageDenoiser:
        """Gather every tensor on every process."""
        if self.world.size == 1:
            return module
        own, whole = module.state_dict(), build()
        with self.world.translate_errors():
            for name, tensor in whole.state_dict().items():
                tensor.copy_(_full(own[name]))
        return whole.eval().requires_grad_(False)

    def part_shares(self, names: Iterable[str]) -> dict[str, PartShare]:
        """Return a slice of every part; a decoder is gathered twice in a step, an encoder once."""
        size = self.world.size
        return {
            name: PartShare(held=1 / size, processes=size, transfers=2 if name.startswith("encoder") else 3)
            for name in names
        }

    # -- gradients -----------------------------------------------------------------------------------------------------

    def norm_terms(self, parts: Parts) -> dict[str, Tensor]:
        """Return the squared norms of the slices."""
        slices = {name: [_slice(g) for g in grads] for name, grads in part_gradients(parts).items()}
        return {name: nn.utils.get_total_norm(grads).double().square() for name, grads in slices.items()}

    def norm_of_sum(self, total: Tensor) -> Tensor:
        """Return the root of a sum of squares."""
        return total.sqrt()


def _sum_gradients(part: FSDPModule) -> None:
    """Make FSDP sum gradients over processes instead of taking their mean."""
    part.set_gradient_divide_factor(1.0)
    part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _full(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _slice(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
