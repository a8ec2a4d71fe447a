"""Speed of a training step: our trainer, beside an ordinary diffusers loop over a network of equal multiply-adds.

Run it as: python benchmarks/train_step.py [--networks NAME ...] [--steps N] [--device DEVICE] [--compile] [--out [FILE]]

Networks: `ncsnpp-32` (NCSN++, encoder 32, decoders 48/32/16, 2 blocks per level, 32x32, batch 48 over three stages),
`digits`, `t7-1`, `edm`, `t8-4` (the presets, batch cut to 12, or 4, on a CPU). Each is trained by the real trainer on random
images; in the same process its peer, a diffusers UNet2DModel whose width is chosen so that a training image costs as many
multiply-adds (as torch counts them), is trained by an ordinary loop: scheduler, mse_loss, AdamW, EMAModel. Rounds of both and of
the roofline's layers alternate, the median of each counts. How our step is computed is found by the trainer's autotuning; it
compiles only with --compile.

Reported: images/s, the ratio of multiply-adds per second to the peer's, and the share of the roofline: the rate, forward and
backward, of the network's largest convolution in its better memory format, and of torch.mm. FLOPs are 2 per multiply-add, 3
times forward. Memory is what the allocator (CUDA) or the process (CPU, with the peer's weights) has in use at most.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import configuration, fitting_width, keep, median_roofline, parser, peer

from multistage_diffusion import override
from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.data import ImageData
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.performance.devices import clock, keep_memory, peak_memory, resolve_device
from multistage_diffusion.performance.roofline import Roofline, measure_roofline
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "train_step.json"


class Rounds(Callback):
    """Calls the peer and measures the roofline between rounds of our steps, and times ours."""

    def __init__(self, steps: int, rounds: int, peer: Callable[[int], float], roofline: Callable[[], Roofline]) -> None:
        self.steps, self.rounds, self.peer, self.roofline = steps, rounds, peer, roofline
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.rooflines: list[Roofline] = []
        self.parts: list[dict[str, float]] = []
        self.memory = 0

    def started(self, trainer: Trainer) -> None:
        self.count = -2  # steps that are not timed

    def stepped(self, trainer: Trainer) -> None:
        self.count += 1
        if self.count == 0 or self.count == self.steps:
            if self.count:
                self.ours.append((clock(trainer.device) - self.start) / self.steps)
                found = trainer.passes.timer.seconds()
                self.parts.append({name: seconds / self.steps for name, seconds in found.items()})
                self.memory = self.memory or peak_memory(trainer.device)
                self.theirs.append(self.peer(self.steps))
                self.rooflines.append(self.roofline())
                self.count = 0
            if len(self.ours) == self.rounds:
                trainer.stop()
                return
            trainer.passes.timer.running = True
            trainer.passes.timer.seconds()
            self.start = clock(trainer.device)


def measure(name: str, device: torch.device, steps: int, rounds: int, compile: bool = False) -> dict[str, Any]:
    config = override(configuration(name, device), {"execution.compile": "auto" if compile else False})
    shape, batch = config.data.shape, config.training.batch
    cost = network_cost(config.network, *shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", override(config, {"training.steps": 10**6}))
        pixels = np.random.default_rng(0).integers(0, 256, (512, *shape), dtype=np.uint8)
        trainer = Trainer(run, ImageData(pixels, None, "random"), device=device)
        flops = sum(n * s.true_flops for n, s in zip(trainer.allocation.counts, cost.stages, strict=True)) / batch
        width, their_adds = fitting_width(shape, flops / 2)
        train_peer = make_peer(shape, width, batch, device, trainer.passes.autocast)
        dtype = trainer.passes.autocast or torch.float32
        clock = Rounds(
            steps,
            rounds,
            train_peer,
            lambda: measure_roofline(config.network, shape, trainer.allocation.counts, device, dtype),
        )
        trainer.callbacks.append(clock)
        trainer.save = lambda *_: None  # type: ignore[method-assign]
        trainer.fit()
    ours, theirs = median_low(clock.ours), median_low(clock.theirs)
    typical = clock.parts[clock.ours.index(ours)]
    roofline = median_roofline(clock.rooflines)
    rate = 3 * flops * batch / ours
    return {
        "batch": batch,
        "rows": list(trainer.allocation.counts),
        "execution": trainer.passes.execution,
        "autotuned": trainer.autotuned,
        "memory_mib": clock.memory / 2**20,
        "multiply_adds_per_image": flops / 2,
        "images_per_s": batch / ours,
        "seconds": ours,
        "parts": typical,
        "share_of_convolution": rate / roofline.convolution_rate,
        "share_of_matrix": rate / roofline.matrix_rate,
        "gflops_per_s": rate / 1e9,
        "roofline": to_dict(roofline),
        "peer": {
            "width": width,
            "multiply_adds_per_image": their_adds,
            "images_per_s": batch / theirs,
            "seconds": theirs,
        },
        "ratio_per_multiply_add": (flops / 2 / ours) / (their_adds / theirs),
    }


def make_peer(
    shape: Sequence[int], width: int, batch: int, device: torch.device, autocast: torch.dtype | None
) -> Callable[[int], float]:
    """Return what trains a peer as diffusers' own examples do: steps -> seconds of a step."""
    return ordinary_loop(peer(shape, width), shape, batch, device, autocast)


def ordinary_loop(
    model: Any, shape: Sequence[int], batch: int, device: torch.device, autocast: torch.dtype | None, **inputs: Any
) -> Callable[[int], float]:
    """Return what trains a model of diffusers as its own examples do: steps -> seconds of a step.

    Args:
        model: called with noisy images and times.
        shape: of an image.
        batch: images of a step.
        device: where it is trained.
        autocast: dtype; None for float32.
        **inputs: other inputs of the model, the same in every step.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    model.to(device)
    scheduler, ema = DDPMScheduler(1000), EMAModel(model.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-6, eps=1e-8)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(512, *shape, generator=generator) * 2 - 1

    def step() -> None:
        rows = torch.randint(0, len(images), (batch,))
        clean = images[rows].to(device)
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            predicted = model(scheduler.add_noise(clean, noise, times), timestep=times, **inputs).sample
            loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    ready = [False]

    def train(steps: int) -> float:
        for _ in range(0 if ready[0] else 2):
            step()
        ready[0], start = True, clock(device)
        for _ in range(steps):
            step()
        return (clock(device) - start) / steps

    return train


def report(name: str, r: dict[str, Any]) -> None:
    parts = ", ".join(f"{part} {seconds / r['seconds']:.1%}" for part, seconds in r["parts"].items())
    peer = r["peer"]
    print(
        f"{name}: {r['images_per_s']:.1f} images/s at {r['multiply_adds_per_image'] / 1e6:.0f} M multiply-adds, "
        f"{r['gflops_per_s']:.1f} GFLOP/s: {r['share_of_convolution']:.0%} of the largest convolution, "
        f"{r['share_of_matrix']:.0%} of torch.mm, {r['memory_mib']:.0f} MiB, computed {r['execution'].words()}\n  {parts}\n"
        f"  {r['ratio_per_multiply_add']:.2f} times diffusers per multiply-add (width {peer['width']}, "
        f"{peer['images_per_s']:.1f} images/s at {peer['multiply_adds_per_image'] / 1e6:.0f} M)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, 6, RESULT)
    options.add_argument("--steps", type=int, default=2, help="steps of a round")
    args = options.parse_args(arguments)
    device = resolve_device(args.device)
    keep_memory(device)  # as the command line does
    found = {}
    for name in args.networks:
        found[name] = measure(name, device, args.steps, args.rounds, args.compile)
        report(name, found[name])
    if args.out is not None:
        keep(args.out, device, found)


if __name__ == "__main__":
    main()
