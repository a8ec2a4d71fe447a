"""Time and memory of a training step of a paper network, through the real trainer on random images.

Run it as: python benchmarks/paper_step.py [--preset NAME] [--batch N] [--steps N] [--device DEVICE] [--out [FILE]]

The network, its objective, optimiser, clipping and EMA are those of the preset; only the batch is small. Where the preset
trains one stage per step (as the paper does) the step shown names it. The first step includes what happens once: memory
is reserved, kernels are chosen; on a GPU ask for some more steps. Memory is what the process (CPU) or the allocator (CUDA)
had in use at most, up to the end of the last step; no checkpoint is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multistage_diffusion import __version__
from multistage_diffusion.config import CodecConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.data import ImageData
from multistage_diffusion.files import write_json
from multistage_diffusion.performance.devices import (
    clock,
    device_name,
    keep_memory,
    peak_memory,
    precision_name,
    resolve_device,
)
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "paper_step.json"
MIB = 2**20


class Measured(Exception):
    """Ends the training once the last step is measured, before it writes a checkpoint of gigabytes."""


class Stopwatch(Callback):
    """Records the seconds and the stages of every step, and the peak of memory."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.peak = 0.0
        self.start = 0.0
        self.rows: list[int] = []

    def started(self, trainer: Trainer) -> None:
        self.rows = list(trainer.log.sums.rows)
        self.start = clock(trainer.device)

    def stepped(self, trainer: Trainer) -> None:
        seconds = clock(trainer.device) - self.start
        trainer.log.reporter.settle()
        rows = trainer.log.sums.rows
        stages = [k for k, (old, new) in enumerate(zip(self.rows, rows, strict=True), start=1) if new > old]
        self.steps.append({"stages": stages, "seconds": seconds})
        if trainer.step == trainer.config.training.steps:
            self.peak = peak_memory(trainer.device) / MIB
            raise Measured
        self.started(trainer)


def configured(name: str, batch: int, steps: int) -> RunConfig:
    """The preset with a small batch, and without anything but training steps; random pixels stand for latents, too."""
    base = preset(name)
    training = dataclasses.replace(
        base.training, batch=batch, accumulate=1, steps=steps, log_every=steps + 1, held_out_every=0, sample_every=0
    )
    data = dataclasses.replace(base.data, shape=base.input_shape)
    return dataclasses.replace(base, data=data, codec=CodecConfig(), training=training)


def random_images(config: RunConfig) -> ImageData:
    generator = np.random.default_rng(0)
    shape = (max(config.training.batch, 16), *config.data.shape)
    classes = config.network.num_classes
    labels = np.arange(shape[0]) % classes if classes else None
    return ImageData(generator.integers(0, 256, shape, dtype=np.uint8), labels, "random")


def measure(name: str, batch: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Train a preset for some steps in a folder that is removed again."""
    config = configured(name, batch, steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before, watch = peak_memory(device) / MIB, Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            Run.create(Path(folder) / "run", config), random_images(config), device=device, callbacks=[watch]
        )
        with contextlib.suppress(Measured):
            trainer.fit()
    return {
        "preset": name,
        "parameters": sum(p.numel() for p in trainer.denoiser.network.parameters()),
        "shape": list(config.data.shape),
        "batch": batch,
        "update_mode": config.training.update_mode,
        "precision": precision_name(config.training.precision, device),
        "steps": watch.steps,
        "memory_mib": {
            "kind": "CUDA allocator" if device.type == "cuda" else "resident set of the process",
            "before": before,
            "peak": watch.peak,
        },
        "machine": {
            "device": device_name(device),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "version": __version__,
    }


def processor() -> str:
    """The CPU's name, where the system tells it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def table(result: dict[str, Any]) -> str:
    """The measurements in words, a line per step."""
    heads = ("preset", "params, M", "batch", "stages", "seconds", "peak, MiB", "before, MiB", "device", "precision")
    memory = result["memory_mib"]
    rows = [
        (
            result["preset"],
            f"{result['parameters'] / 1e6:.4g}",
            str(result["batch"]),
            ", ".join(map(str, step["stages"])),
            f"{step['seconds']:.4g}",
            f"{memory['peak']:.0f}",
            f"{memory['before']:.0f}",
            result["machine"]["device"],
            result["precision"],
        )
        for step in result["steps"]
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)
    )


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar10-dpm", help="default: %(default)s (Table 7, row 1)")
    parser.add_argument("--batch", type=int, default=2, help="images in a step; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1, help="steps measured; default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: CUDA when there is one")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULT, help=f"write JSON; without FILE: {RESULT.name}")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    given = parser.parse_args(args)
    if given.out is not None and given.out.exists() and not given.overwrite:
        parser.error(f"--out {given.out}: exists; choose another name or give --overwrite")
    try:
        device = resolve_device(given.device)
        keep_memory(device)  # as the command line does
        result = measure(given.preset, given.batch, given.steps, device)
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    if given.out is not None:
        write_json(given.out, result)
        print(f"written: {given.out}")


if __name__ == "__main__":
    main()
