"""What a training step holds, sends and takes on many processes: bytes exactly, seconds by a model.

With P_0 parameters of the encoder and P_k of decoder k, a process holds 20 bytes for each parameter of its own: 4 of the
weight, 4 of its gradient, 8 of Adam's moments, 4 of the average. Gradients of a part with P parameters held by n processes
take 4 P bytes on each, of which a ring all-reduce sends 2 (n - 1) / n times as many (Patarasuk & Yuan 2009).

    time:   20 (P_0 + sum_k P_k) bytes held, ring(W, P_0 + sum_k P_k) sent
    memory: 20 (P_0 + P_k) bytes held,      ring(W, P_0) + ring(n_k, P_k) sent

The time of a step is a model, not a measurement: rows times FLOPs over the rate that the device reaches, plus what of the
exchange the backward pass, two thirds of the computing, does not hide.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RunConfig
from ..nets.cost import BACKWARD, network_cost
from ..training.batches import row_counts, stage_shares
from ..training.strategies import Strategy, make_layout

WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4  # bytes per parameter in fp32 (bf16 autocast keeps them so)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device and its connection reach.

    Attributes:
        flops: floating-point operations per second in training.
        bandwidth: bytes per second that a process sends in an all-reduce.
        latency: seconds of one hop of the ring.
    """

    flops: float
    bandwidth: float
    latency: float


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A step of one process.

    Attributes:
        held: bytes of weights, gradients, moments and averages; activations come on top.
        reduced: bytes of gradients handed to all-reduce.
        sent: bytes that a ring sends for them.
        flops: floating-point operations of its rows.
        seconds: by the model; None without a machine.
    """

    held: int
    reduced: int
    sent: float
    flops: float
    seconds: float | None


def step_costs(
    config: RunConfig, shape: tuple[int, ...], strategy: Strategy, size: int, machine: Machine | None = None
) -> list[StepCost]:
    """Return the cost of a "mixed" step for each of `size` processes.

    Args:
        config: of a run; its batch is that of all processes together.
        shape: (C, H, W) of what the network sees.
        strategy: what a process holds.
        size: number of processes.
        machine: of the model of time.

    Raises:
        UserError: if the batch cannot be dealt to so many.
    """
    layout = make_layout(strategy, config, shape, size)
    counts = row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
    cost = network_cost(config.network, *shape[1:])
    shared = cost.shared_parameters
    own = [stage.parameters - shared for stage in cost.stages]
    found = []
    for rank in range(size):
        held = layout.held(rank)
        parts = [(size, shared)] + [(len(layout.holders[k]), own[k]) for k in held]
        exchanged = [(n, GRADIENT * p) for n, p in parts if n > 1]
        sent = sum(2 * (n - 1) / n * bytes_ for n, bytes_ in exchanged)
        rows = layout.rows(rank, counts)
        flops = (1 + BACKWARD) * sum(len(r) * s.true_flops for r, s in zip(rows, cost.stages, strict=True))
        seconds = None
        if machine is not None:
            computing = flops / machine.flops
            exchange = sent / machine.bandwidth + sum(2 * (n - 1) * machine.latency for n, _ in exchanged)
            seconds = computing + max(0.0, exchange - computing * BACKWARD / (1 + BACKWARD))
        found.append(
            StepCost(
                held=(WEIGHT + GRADIENT + MOMENTS + AVERAGE) * sum(p for _, p in parts),
                reduced=sum(bytes_ for _, bytes_ in exchanged),
                sent=sent,
                flops=flops,
                seconds=seconds,
            )
        )
    return found
