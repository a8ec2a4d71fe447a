"""Memory, communication and time of a training step on several processes: exact bytes, modelled seconds.

The encoder has P_0 parameters, decoder k has P_k. A process holds 20 bytes per parameter of its parts: 4 for the
weight, 4 for the gradient, 8 for Adam's moments, 4 for the EMA (and 4 for each of training.ema_profiles). Gradients of
a part with P parameters on n processes take 4 P bytes on each process. In a ring, an all_gather or a reduce_scatter
sends (n - 1) / n times these bytes, an all_reduce twice as many (Patarasuk & Yuan 2009):
ring(n, P) = 2 (n - 1) / n 4 P. W is the number of processes, n_k the number of processes with decoder k. Per strategy:

    time:   20 (P_0 + sum_k P_k) bytes held,     ring(W, P_0 + sum_k P_k) sent
    memory: 20 (P_0 + P_k) bytes held,           ring(W, P_0) + ring(n_k, P_k) sent
    fsdp:   20 / W (P_0 + sum_k P_k) bytes held, ring(W, P_0) + 3/2 ring(W, sum_k P_k) sent

fsdp also holds the parts in use, gathered: 4 P_0 + 4 P_k bytes. A frozen encoder has weights and EMA only (8 bytes).

The time of a step is a model, not a measurement: rows times FLOPs per row divided by the device's rate, plus the part
of the all_reduce that does not overlap with the backward pass. The backward pass is two thirds of the compute time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ..config import RunConfig
from ..distributed import World
from ..nets.cost import BACKWARD, network_cost
from ..shares import row_counts, stage_shares
from .flops import training_flops
from .strategies import make_strategy

WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4  # bytes per parameter in fp32, also with bf16 autocast


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speed of a device and its network connection.

    Attributes:
        flops: floating-point operations per second in training.
        bandwidth: bytes per second that a process sends in an all_reduce.
        latency: seconds per hop of the ring.
    """

    flops: float
    bandwidth: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Cost of a step on one process.

    Attributes:
        held: bytes of weights, gradients, moments and EMA, without activations.
        reduced: bytes of gradients that are summed over processes.
        sent: bytes that this process sends, in rings.
        flops: floating-point operations for its rows.
        seconds: modelled time; None without a machine.
    """

    held: float
    reduced: int
    sent: float
    flops: float
    seconds: float | None


def step_costs(
    config: RunConfig, shape: tuple[int, ...], strategy: str, size: int, machine: Machine | None = None
) -> list[StepCost]:
    """Return the cost of a "mixed" step for each of `size` processes.

    Args:
        config: of a run; its batch is the total over all processes.
        shape: (C, H, W) of the network's input.
        strategy: determines which parts a process holds.
        size: number of processes.
        machine: speeds for the time model; None: no times.

    Raises:
        UserError: if the batch cannot be assigned to `size` processes, see `make_strategy`.
    """
    counts = row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
    cost = network_cost(config.network, *shape[1:])
    shared = cost.shared_parameters
    decoders = {f"decoder.{k}": stage.parameters - shared for k, stage in enumerate(cost.stages, start=1)}
    parameters = {"encoder": shared, **decoders}
    frozen = ["encoder"] if config.training.freeze == "encoder" else []
    averages = AVERAGE * (1 + len(config.training.ema_profiles))
    found, plan = [], make_strategy(strategy, config, shape, World(0, size))
    for rank in range(size):
        placed = copy.copy(plan)
        placed.world = World(rank, size)
        shares = [(share, parameters[n], n not in frozen) for n, share in placed.part_shares(parameters).items()]
        exchanged = [(share, GRADIENT * p) for share, p, learns in shares if share.processes > 1 and learns]
        sent = sum(s.transfers * (s.processes - 1) / s.processes * bytes_ for s, bytes_ in exchanged)
        rows = placed.rows(counts)
        flops = training_flops(config, cost, [len(r) for r in rows])
        seconds = None
        if machine is not None:
            computing = flops / machine.flops
            exchange = sent / machine.bandwidth + machine.latency * sum(
                s.transfers * (s.processes - 1) for s, _ in exchanged
            )
            seconds = computing + max(0.0, exchange - computing * BACKWARD / (1 + BACKWARD))
        found.append(
            StepCost(
                held=sum(
                    (WEIGHT + averages + (GRADIENT + MOMENTS) * learns) * share.held * p for share, p, learns in shares
                ),
                reduced=sum(bytes_ for _, bytes_ in exchanged),
                sent=sent,
                flops=flops,
                seconds=seconds,
            )
        )
    return found
