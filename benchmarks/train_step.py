"""Speed of a training step: our trainer, beside an ordinary diffusers loop over a network of equal multiply-adds.

Run it as: python benchmarks/train_step.py [--networks NAME ...] [--steps N] [--device DEVICE] [--out [FILE]]

Networks: `ncsnpp-32` (NCSN++, encoder 32, decoders 48/32/16, 2 blocks per level, 32x32, batch 48 over three stages),
`digits`, `t7-1`, `edm`, `t8-4` (the presets, batch cut to 12 on a CPU). Each is trained by the real trainer on random images;
in the same process its peer, a diffusers UNet2DModel whose width is chosen so that a training image costs as many
multiply-adds, is trained by an ordinary loop: scheduler, mse_loss, AdamW, EMAModel. Rounds of both alternate, the best counts.

Reported: images/s, the ratio of multiply-adds per second to the peer's, and the share of the ceiling: the rate, forward and
backward, of the network's largest convolution in its better memory format, and of torch.mm. FLOPs are 2 per multiply-add, 3
times forward.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from multistage_diffusion import override, preset
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import ImageData
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.serialization import to_dict, write_json
from multistage_diffusion.training.ceiling import measure_ceiling
from multistage_diffusion.training.devices import clock, device_name, resolve_device
from multistage_diffusion.training.events import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "train_step.json"
PRESETS = {"digits": "digits", "t7-1": "cifar10-dpm", "edm": "cifar10-edm", "t8-4": "celebahq-ldm"}
SHAPES = {"digits": (1, 8, 8), "t8-4": (3, 64, 64)}


def configuration(name: str, device: torch.device) -> RunConfig:
    if name == "ncsnpp-32":
        base = preset("cifar10-dpm")
        changes: dict[str, Any] = {
            "network.encoder_width": 32,
            "network.decoder_widths": [48, 32, 16],
            "network.blocks_per_level": 2,
            "training.batch": 48,
        }
    else:
        base, changes = preset(PRESETS[name]), {}
        if device.type == "cpu" and name != "digits":
            changes["training.batch"] = 12
    shape = SHAPES.get(name, (3, 32, 32))
    quiet = {"training.held_out_every": 0, "training.sample_every": 0, "training.checkpoint_every": 10**9}
    mixed = {"training.update_mode": "mixed", "training.log_every": 10**9, "training.precision": "auto"}
    data = dataclasses.replace(base.data, source="", shape=shape)
    codec = dataclasses.replace(base.codec, source="", shape=())
    return override(base, {"data": data, "codec": codec, "network.channels": shape[0], **quiet, **mixed, **changes})


class Rounds(Callback):
    """Calls the peer between rounds of our steps, and times ours."""

    def __init__(self, steps: int, rounds: int, peer: Callable[[int], float]) -> None:
        self.steps, self.rounds, self.peer = steps, rounds, peer
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.parts: list[dict[str, float]] = []

    def started(self, trainer: Trainer) -> None:
        self.count = -2  # steps that are not timed

    def stepped(self, trainer: Trainer) -> None:
        self.count += 1
        if self.count == 0 or self.count == self.steps:
            if self.count:
                self.ours.append((clock(trainer.device) - self.start) / self.steps)
                found = trainer.timer.seconds()
                self.parts.append({name: seconds / self.steps for name, seconds in found.items()})
                self.theirs.append(self.peer(self.steps))
                self.count = 0
            if len(self.ours) == self.rounds:
                trainer.end("measured")
                return
            trainer.timer.running = True
            trainer.timer.seconds()
            self.start = clock(trainer.device)


def measure(name: str, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    config = configuration(name, device)
    shape, batch = config.data.shape, config.training.batch
    cost = network_cost(config.network, *shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", override(config, {"training.steps": 10**6}))
        pixels = np.random.default_rng(0).integers(0, 256, (512, *shape), dtype=np.uint8)
        trainer = Trainer(run, ImageData(pixels, None, "random"), device=device)
        adds = sum(n * s.multiply_adds for n, s in zip(trainer.counts, cost.stages, strict=True)) / batch
        flops = sum(n * s.true_flops for n, s in zip(trainer.counts, cost.stages, strict=True)) / batch
        width, peer_adds, peer = make_peer(adds, shape, batch, device, trainer.autocast)
        dtype = trainer.autocast or torch.float32
        ceiling = measure_ceiling(config.network, shape, trainer.counts, device, dtype)
        clock = Rounds(steps, rounds, peer)
        trainer.callbacks.append(clock)
        trainer.save = lambda *_: None  # type: ignore[method-assign]
        trainer.fit()
    ours, theirs = min(clock.ours), min(clock.theirs)
    best = clock.parts[clock.ours.index(ours)]
    rate = 3 * flops * batch / ours
    return {
        "batch": batch,
        "rows": list(trainer.counts),
        "multiply_adds_per_image": adds,
        "images_per_s": batch / ours,
        "seconds": ours,
        "parts": best,
        "share_of_convolution": rate / ceiling.convolution_rate,
        "share_of_matrix": rate / ceiling.matrix_rate,
        "gflops_per_s": rate / 1e9,
        "ceiling": to_dict(ceiling),
        "peer": {
            "width": width,
            "multiply_adds_per_image": peer_adds,
            "images_per_s": batch / theirs,
            "seconds": theirs,
        },
        "ratio_per_multiply_add": (batch / ours * adds) / (batch / theirs * peer_adds),
    }


def make_peer(
    adds: float, shape: Sequence[int], batch: int, device: torch.device, autocast: torch.dtype | None
) -> tuple[int, float, Callable[[int], float]]:
    """Return the peer's width, its multiply-adds per image, and what trains it: steps -> seconds of a step."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    def built(width: int) -> Any:
        levels = 4 if shape[1] >= 32 else 2
        attentive = [shape[1] >> i == 16 for i in range(levels)]
        return UNet2DModel(
            sample_size=shape[1],
            in_channels=shape[0],
            out_channels=shape[0],
            layers_per_block=2,
            block_out_channels=[width, *[2 * width] * (levels - 1)],
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attentive],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attentive)],
            norm_num_groups=8,
            attention_head_dim=None,
        )

    def count(width: int) -> float:
        found = [0]
        with torch.device("meta"):
            model = built(width)
            for layer in model.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.register_forward_hook(
                        lambda layer, _, out: found.__setitem__(0, found[0] + out.numel() * layer.weight[0].numel())
                    )
            with torch.no_grad():
                model(torch.empty(1, *shape), torch.zeros(1))
        return found[0]

    counts = {width: count(width) for width in range(8, 257, 8)}
    width = min(counts, key=lambda w: abs(counts[w] - adds))
    model = built(width).to(device)
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
            predicted = model(scheduler.add_noise(clean, noise, times), times).sample
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

    return width, counts[width], train


def report(name: str, r: dict[str, Any]) -> None:
    parts = ", ".join(f"{part} {seconds / r['seconds']:.1%}" for part, seconds in r["parts"].items())
    peer = r["peer"]
    print(
        f"{name}: {r['images_per_s']:.1f} images/s at {r['multiply_adds_per_image'] / 1e6:.0f} M multiply-adds, "
        f"{r['gflops_per_s']:.1f} GFLOP/s: {r['share_of_convolution']:.0%} of the largest convolution, "
        f"{r['share_of_matrix']:.0%} of torch.mm\n  {parts}\n"
        f"  {r['ratio_per_multiply_add']:.2f} times diffusers per multiply-add (width {peer['width']}, "
        f"{peer['images_per_s']:.1f} images/s at {peer['multiply_adds_per_image'] / 1e6:.0f} M)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    names = ["ncsnpp-32", *PRESETS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=names, default=["ncsnpp-32", "digits"])
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, nargs="?", const=RESULT, default=None)
    args = parser.parse_args(arguments)
    device = resolve_device(args.device)
    found = {}
    for name in args.networks:
        found[name] = measure(name, device, args.steps, args.rounds)
        report(name, found[name])
    if args.out is not None:
        machine = {"device": device_name(device), "cores": os.cpu_count(), "torch": torch.__version__}
        write_json(args.out, {"machine": machine, "networks": found})


if __name__ == "__main__":
    main()
