"""What a training step on several processes sends and holds: strategies `time` and `memory` beside plain DDP.

Run it as: python benchmarks/distributed.py [--preset NAME] [--processes N] [--batch N] [--steps N] [--out [FILE]]
       or: python benchmarks/distributed.py --model     # the model of 1 to 1024 GPUs in docs/distributed.md

Every process is a real one (torchrun, gloo) with the real trainer on random images. Bytes are counted where gradients are
handed to all-reduce: by the trainer's reducer, and by DDP's communication hook; beside them stands the formula of
training/cost_model.py. DDP is torch's, around the whole network, with the same rows, objective and optimiser. Processes of one
machine share its cores, so that seconds say little about a cluster: they are printed for the ratio only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from multistage_diffusion import override, preset
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import ImageData
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.distributed import World, join
from multistage_diffusion.files import write_json
from multistage_diffusion.shares import row_counts, stage_shares, stage_weights
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.cost_model import Machine, step_costs
from multistage_diffusion.training.ema import EMA
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.optimizer_state import make_optimizer
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.strategies import make_strategy
from multistage_diffusion.training.strategies.replicated import ReplicatedParts
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "distributed.json"
# Assumed, not measured: 100 TFLOP/s reached in training, 40 GB/s sent by a process, 20 microseconds a hop.
GPU = Machine(flops=1e14, bandwidth=4e10, latency=2e-5)
PER_GPU = 128  # rows of a step, whatever the number of GPUs
SIZES = (1, 3, 8, 64, 1024)
MODELLED = {"T7-1 (cifar10-dpm)": "cifar10-dpm", "T8-4 (celebahq-ldm)": "celebahq-ldm"}


def images(shape: tuple[int, ...]) -> ImageData:
    return ImageData(np.random.default_rng(0).integers(0, 256, (256, *shape), dtype=np.uint8), None, "random")


def configuration(name: str, batch: int, steps: int) -> RunConfig:
    base = preset(name)
    shape = base.data.shape or (1, 8, 8)
    changes = {"data": dataclasses.replace(base.data, shape=shape), "network.channels": shape[0]}
    quiet = {"training.held_out_every": 0, "training.sample_every": 0, "training.update_mode": "mixed"}
    return override(base, {**changes, **quiet, "training.batch": batch, "training.steps": steps})


# -- one process --------------------------------------------------------------------------------------------------------


class Clock(Callback):
    """Times the steps after the first, in which buckets are made; no checkpoint is written."""

    everywhere = True

    def __init__(self) -> None:
        self.seconds, self.last = [], 0.0

    def started(self, trainer: Trainer) -> None:
        self.last = time.perf_counter()

    def stepped(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def with_trainer(world: World, config: RunConfig, strategy: str, folder: Path) -> dict[str, Any]:
    with world.synchronize_errors():
        if world.is_main_process:
            Run.create(folder / strategy, config)
    clock = Clock()
    data = images(config.input_shape)
    trainer = Trainer(Run(folder / strategy), data, device="cpu", callbacks=[clock], world=world, strategy=strategy)
    trainer.save = lambda *_: None  # type: ignore[method-assign]
    trainer.fit()
    assert isinstance(trainer.strategy, ReplicatedParts)
    reduced = 0 if trainer.strategy.reducer is None else trainer.strategy.reducer.bytes
    return measured(trainer.denoiser, trainer.ema.module, trainer.optimization.optimizer, reduced, clock.seconds)


def with_ddp(world: World, config: RunConfig) -> dict[str, Any]:
    """The ordinary way: the whole network in DistributedDataParallel, means of gradients over processes."""
    torch.manual_seed(0)
    denoiser = build_denoiser(config).train()
    ema = EMA(denoiser, config.training.ema_halflife, config.training.ema_rampup)
    optimizer = make_optimizer(config.optimizer, denoiser)
    loss = Loss(denoiser, config, world)
    # a process without rows of a stage leaves its decoder unused
    wrapped = DistributedDataParallel(loss, find_unused_parameters=min(loss.counts) < world.size)
    sent = [0]

    def count(_, bucket):  # DDP looks at annotations, and refuses those that are strings
        sent[0] += bucket.buffer().nbytes
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / world.size)

    wrapped.register_comm_hook(None, count)
    seconds = []
    for step in range(config.training.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        wrapped(step).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.optimizer.clip or 1e9)
        optimizer.step()
        ema.update(config.training.batch, step * config.training.batch)
        seconds.append(time.perf_counter() - start)
    return measured(denoiser, ema.module, optimizer, sent[0], seconds)


class Loss(torch.nn.Module):
    """The objective on this process's rows, times the number of processes: DDP takes means."""

    def __init__(self, denoiser: torch.nn.Module, config: RunConfig, world: World) -> None:
        super().__init__()
        self.denoiser, self.world = denoiser, world
        self.source = BatchSource(config, images(config.input_shape), torch.device("cpu"))
        training, prior = config.training, config.diffusion.prior
        self.counts = row_counts(training, stage_shares(training, config.stages, prior))
        self.weights = stage_weights(training, config.stages, prior)
        self.rows = make_strategy("time", config, config.input_shape, world).rows(self.counts)

    def forward(self, step: int) -> torch.Tensor:
        sums = stage_losses(self.denoiser, self.source.draw(step, self.counts, self.rows))
        return self.world.size * objective(sums, self.weights, self.counts)


def measured(
    denoiser: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    reduced: int,
    seconds: list[float],
) -> dict[str, Any]:
    moments = sum(t.nbytes for state in optimizer.state.values() for k, t in state.items() if k != "step")
    weights = sum(p.nbytes for p in denoiser.parameters())
    gradients = sum(p.grad.nbytes for p in denoiser.parameters() if p.grad is not None)
    held = weights + gradients + moments + sum(p.nbytes for p in average.parameters())
    return {"held": held, "reduced": reduced / len(seconds), "seconds": sorted(seconds[1:])[len(seconds) // 2 - 1]}


def worker(config: RunConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    world = join(torch.device("cpu"))
    with world.report_failures():
        found = {
            strategy: world.all_gather_object(with_trainer(world, config, strategy, folder))
            for strategy in ("time", "memory")
        }
        found["ddp"] = world.all_gather_object(with_ddp(world, config))
        if world.is_main_process:
            write_json(folder / "result.json", found)


# -- all of them --------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    config = configuration(args.preset, args.batch, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(args.processes),
        ]
        chosen = ["--preset", args.preset, "--batch", str(args.batch), "--steps", str(args.steps), "--worker", folder]
        subprocess.run([*launch, __file__, *chosen], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads((Path(folder) / "result.json").read_text())
    formula = {s: step_costs(config, config.input_shape, s, args.processes) for s in ("time", "memory")}
    for strategy, costs in formula.items():
        for entry, cost in zip(found[strategy], costs, strict=True):
            entry |= {"held_by_formula": cost.held, "reduced_by_formula": cost.reduced, "sent_by_formula": cost.sent}
    return {
        "preset": args.preset,
        "processes": args.processes,
        "batch": args.batch,
        "steps": args.steps,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "strategies": found,
    }


def report(result: dict[str, Any]) -> None:
    print(
        f"{result['preset']}, {result['processes']} processes, batch {result['batch']}, gloo on {result['cores']} cores"
    )
    print(f"{'':8}{'rank':>5}{'held MB':>10}{'formula':>10}{'reduced MB/step':>17}{'formula':>10}{'s/step':>9}")
    for strategy, ranks in result["strategies"].items():
        for rank, r in enumerate(ranks):
            held, sent = r.get("held_by_formula"), r.get("reduced_by_formula")
            print(
                f"{strategy:8}{rank:5}{r['held'] / 1e6:10.3f}{'' if held is None else f'{held / 1e6:.3f}':>10}"
                f"{r['reduced'] / 1e6:17.4f}{'' if sent is None else f'{sent / 1e6:.4f}':>10}{r['seconds']:9.3f}"
            )


def model() -> str:
    """Return the table of docs/distributed.md: a model, not a measurement."""
    lines = [
        "| network | strategy | GPUs | batch | held, GB | sent, MB/step | step, s | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, name in MODELLED.items():
        base = preset(name)
        shape = base.input_shape or ((3, 64, 64) if name.startswith("celeba") else (3, 32, 32))
        for strategy in ("time", "memory"):
            for size in SIZES:
                batch = PER_GPU * size
                config = override(base, {"training.batch": batch, "training.update_mode": "mixed"})
                costs = step_costs(config, shape, strategy, size, GPU)
                held, sent = max(c.held for c in costs), max(c.sent for c in costs)
                seconds = max(c.seconds or 0.0 for c in costs)
                lines.append(
                    f"| {title} | {strategy} | {size} | {batch} | {held / 1e9:.2f} | {sent / 1e6:.0f} | {seconds:.3f} | "
                    f"{batch / seconds:.0f} |"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULT, default=None)
    parser.add_argument("--model", action="store_true", help="print the model of 1 to 1024 GPUs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.model:
        print(model())
        return
    if args.steps < 3:
        parser.error("--steps must be at least 3: the first step is not timed")
    if args.worker is not None:
        worker(configuration(args.preset, args.batch, args.steps), args.worker)
        return
    result = measure(args)
    report(result)
    if args.out is not None:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
