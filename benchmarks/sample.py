"""Speed of sampling: our sampler, beside an ordinary diffusers loop over a network of equal multiply-adds.

Run it as: python benchmarks/sample.py [--networks NAME ...] [--images N] [--calls N] [--device DEVICE] [--compile] [--out [FILE]]

Networks are those of train_step.py, freshly initialised: time does not depend on the weights. Each draws `--images` images with
DPM-Solver++ (multistep, order 2) and `--calls` calls, as `msdiff sample` does, in the batch that it chooses; in the same process
its peer, a diffusers UNet2DModel that costs as many multiply-adds per image, draws as many with DPMSolverMultistepScheduler in
the same batch and precision. Rounds of both and of the roofline's layers alternate, the median of each counts.

Reported: images/s, seconds for 50,000 images (projected), the ratio of multiply-adds per second to the peer's, and the share of
the roofline: the forward rate of the network's largest convolution in its better memory format, and of torch.mm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from common import configuration, fitting_width, keep, median_roofline, parser, peer

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.performance.devices import autocast_dtype, clock, keep_memory, peak_memory, resolve_device
from multistage_diffusion.performance.offload import images_at_once
from multistage_diffusion.performance.roofline import measure_roofline
from multistage_diffusion.samplers import make_plan
from multistage_diffusion.samplers.sampling import sample_images
from multistage_diffusion.workflow.sample import equip

RESULT = Path(__file__).parent / "results" / "sample.json"
PROJECTED = 50_000


def measure(
    name: str, device: torch.device, images: int, calls: int, rounds: int, compile: bool = False
) -> dict[str, Any]:
    config = configuration(name, device)
    shape, autocast = config.data.shape, autocast_dtype("auto", device)
    settings = SamplingConfig(solver="dpm++", method="multistep", order=2, calls=calls)
    keep_memory(device)
    torch.manual_seed(0)
    denoiser = build_denoiser(config).to(device).eval().requires_grad_(False)
    equip(denoiser, device, compile=compile)
    batch = images_at_once(config.network, shape, images, device)
    costs = network_cost(config.network, *shape[1:]).stages
    plan = make_plan(settings, config.diffusion.schedule)
    per_call = [costs[int(config.stages.index(torch.tensor([sigma]).double()))].true_flops for sigma in plan.calls]
    flops = float(sum(per_call))
    width, their_adds = fitting_width(shape, flops / 2 / len(per_call))
    draw_peer = make_peer(shape, width, batch, calls, device, autocast)

    def draw(count: int) -> float:
        start = clock(device)
        sample_images(
            denoiser,
            shape,
            count,
            config=settings,
            schedule=config.diffusion.schedule,
            batch=batch,
            device=device,
            autocast=autocast,
        )
        return clock(device) - start

    counts = [0] * len(costs)
    counts[int(config.stages.index(torch.tensor([plan.calls[0]]).double()))] = batch
    for warm in (draw, draw_peer):
        warm(batch)
    memory = 0
    ours, theirs, rooflines = [], [], []
    for _ in range(rounds):
        ours.append(draw(images))
        memory = memory or peak_memory(device)
        theirs.append(draw_peer(images))
        rooflines.append(
            measure_roofline(config.network, shape, counts, device, autocast or torch.float32, backward=False)
        )
    seconds, their_seconds, roofline = median_low(ours), median_low(theirs), median_roofline(rooflines)
    rate = flops * images / seconds
    return {
        "batch": batch,
        "images": images,
        "calls": len(plan.calls),
        "multiply_adds_per_image": flops / 2,
        "images_per_s": images / seconds,
        "seconds": seconds,
        "seconds_of_50000": PROJECTED * seconds / images,
        "share_of_convolution": rate / roofline.convolution_rate,
        "share_of_matrix": rate / roofline.matrix_rate,
        "gflops_per_s": rate / 1e9,
        "memory_mib": memory / 2**20,
        "roofline": to_dict(roofline),
        "peer": {
            "width": width,
            "multiply_adds_per_image": their_adds * len(plan.calls),
            "images_per_s": images / their_seconds,
            "seconds": their_seconds,
        },
        "ratio_per_multiply_add": (flops / 2 / seconds) / (their_adds * len(plan.calls) / their_seconds),
    }


def make_peer(
    shape: Sequence[int], width: int, batch: int, calls: int, device: torch.device, autocast: torch.dtype | None
) -> Callable[[int], float]:
    """Return what draws a peer's images as diffusers' pipelines do: images -> seconds."""
    from diffusers import DPMSolverMultistepScheduler

    model = peer(shape, width).to(device).eval()

    @torch.no_grad()
    def draw(count: int) -> float:
        start = clock(device)
        for first in range(0, count, batch):
            scheduler = DPMSolverMultistepScheduler(1000)
            scheduler.set_timesteps(calls, device=device)
            x = torch.randn(min(batch, count - first), *shape, device=device)
            for time in scheduler.timesteps:
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    predicted = model(x, time).sample
                x = scheduler.step(predicted.float(), time, x).prev_sample
            ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        return clock(device) - start

    return draw


def report(name: str, r: dict[str, Any]) -> None:
    theirs = r["peer"]
    print(
        f"{name}: {r['images_per_s']:.2f} images/s at {r['calls']} calls, {r['multiply_adds_per_image'] / 1e9:.2f} G "
        f"multiply-adds ({r['seconds_of_50000'] / 60:.1f} min for 50,000), batch {r['batch']}, {r['memory_mib']:.0f} MiB\n"
        f"  {r['gflops_per_s']:.1f} GFLOP/s: {r['share_of_convolution']:.0%} of the largest convolution, "
        f"{r['share_of_matrix']:.0%} of torch.mm\n"
        f"  {r['ratio_per_multiply_add']:.2f} times diffusers per multiply-add (width {theirs['width']}, "
        f"{theirs['images_per_s']:.2f} images/s at {theirs['multiply_adds_per_image'] / 1e9:.2f} G)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, 2, RESULT)
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--calls", type=int, default=20)
    args = options.parse_args(arguments)
    device = resolve_device(args.device)
    found = {}
    for name in args.networks:
        found[name] = measure(name, device, args.images, args.calls, args.rounds, args.compile)
        report(name, found[name])
    if args.out is not None:
        keep(args.out, device, found)


if __name__ == "__main__":
    main()
