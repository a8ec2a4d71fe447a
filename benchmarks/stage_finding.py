"""How fast stages are found, on all 60,000 Fashion-MNIST images: beside bare matrix products, and beside a plain loop.

    python benchmarks/stage_finding.py [--parts speed loop precision scaling ranks gpu] [--out FILE]

Ratios are of things measured alternately in one run. Every part runs in a process of its own, for its peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.files import write_json
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stage_finding.posterior import TiledImages
from multistage_diffusion.stage_finding.similarity import draw, sample_similarities

RESULTS = Path(__file__).parent / "results" / "stages.json"
HOW: dict[str, Any] = {"eta": 2 / 256, "space": "eps", "measure": VP(), "seed": 0}
ROWS = 1024


def fashion(count: int = 60_000, device: str = "cpu") -> TiledImages:
    return TiledImages(open_data("fashion-mnist").subset(range(count)), device=device)


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def two_products(data: TiledImages, rows: int) -> None:
    """X·Yᵀ and W·Y of a chunk, whole: the least that the posterior means of all rows could take."""
    images, x = data.tile(slice(0, len(data))), torch.randn(rows, data.dim, device=data.device)
    torch.mm(torch.mm(x, images.T), images)


def speed(samples: int = 50_000) -> dict[str, Any]:
    """Algorithm 1 with one time per sample, a chunk of samples and a chunk of bare products in turn."""
    data, ours, bare = fashion(), 0.0, 0.0
    two_products(data, ROWS)  # warm up
    for first in range(0, samples, ROWS):
        chunk = range(first, min(first + ROWS, samples))
        ours += seconds(lambda chunk=chunk: sample_similarities(data, chunk, times=1, **HOW))
        bare += seconds(lambda chunk=chunk: two_products(data, len(chunk)))
    return {
        "images": len(data),
        "samples": samples,
        "seconds": ours,
        "two_products_seconds": bare,
        "ratio": ours / bare,
        "giga_flops_per_second_of_products": 4 * samples * len(data) * data.dim / bare / 1e9,
    }


def plain_similarities(images: torch.Tensor, y: torch.Tensor, noise: torch.Tensor, sigma: float) -> tuple[float, float]:
    """One sample at one time: a pass over the images in batches of 4096, as Proposition 1 is written."""
    x, mean_image = y + sigma * noise, images.mean(0)
    distances = torch.cat([(x - part).square().sum(1) for part in images.split(4096)])
    weights = torch.softmax(-distances / (2 * sigma**2), dim=0)
    mean = sum(w @ part for w, part in zip(weights.split(4096), images.split(4096), strict=True))
    near = (mean - y).abs() / sigma <= HOW["eta"], (mean - mean_image).abs() / sigma <= HOW["eta"]
    return float(near[0].float().mean()), float(near[1].float().mean())


def loop(samples: int = 40) -> dict[str, Any]:
    """The plain loop beside ours on the same samples."""
    data = fashion()
    found = sample_similarities(data, range(samples), times=1, **HOW)
    ours = seconds(lambda: sample_similarities(data, range(ROWS), times=1, **HOW)) / ROWS
    images = data.tile(slice(0, len(data))) + data.mean_image
    own, noise = draw(data, torch.arange(samples), HOW["seed"])
    sigmas = VP().sigma(found.t[:, 0]).tolist()
    plain: list[tuple[float, float]] = []
    spent = seconds(
        lambda: plain.extend(
            plain_similarities(images, images[k], n, s) for k, n, s in zip(own.tolist(), noise, sigmas, strict=True)
        )
    )
    difference = (torch.stack((found.s0, found.s1), 2)[:, 0] - torch.tensor(plain)).abs().max()
    return {
        "samples": samples,
        "milliseconds_per_sample": 1e3 * ours,
        "plain_milliseconds_per_sample": 1e3 * spent / samples,
        "ratio": spent / samples / ours,
        "largest_difference_of_a_similarity": float(difference),
    }


def precision(wanted: float = 0.01) -> dict[str, Any]:
    """Edges to +-0.01 (95 %) by the grid estimator, opening the images included."""
    start = time.perf_counter()
    result = compute_stages(open_data("fashion-mnist"), StageSettings(precision=wanted))
    return {
        "precision": wanted,
        "seconds": time.perf_counter() - start,
        "samples": result.samples,
        "edges_t": result.edges_t,
        "intervals_t": result.intervals_t,
        "float64_difference": result.float64_difference,
    }


def scaling() -> dict[str, Any]:
    """Time and memory while the images, then the samples, double."""
    lines = []
    for images, samples in ((15_000, 2048), (30_000, 2048), (60_000, 2048), (60_000, 4096), (60_000, 8192)):
        data = fashion(images)
        sample_similarities(data, range(256), times=1, **HOW)
        work = partial(sample_similarities, data, range(samples), times=1, **HOW)
        spent = min(seconds(work) for _ in range(2))
        lines.append({"images": images, "samples": samples, "seconds": spent, "peak_gib": peak_gib()})
    return {"lines": lines}


def ranks() -> dict[str, Any]:
    """The same edges from one time per sample, from 32, from two processes, and from two that share the images."""
    ways = {
        "one time, 10,000 samples": (1, ["--times", "1", "--samples", "10000"]),
        "32 times, 1,000 samples": (1, ["--samples", "1000"]),
        "the same on 2 processes": (2, ["--samples", "1000"]),
        "the same, images in 2 shares": (2, ["--samples", "1000", "--image-shards", "2"]),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (processes, options) in ways.items():
            out = str(Path(folder) / "stages.json")
            run = [sys.executable, "-m"]
            if processes > 1:
                run += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
            command = [
                *run,
                "multistage_diffusion.cli",
                "stages",
                "fashion-mnist",
                *options,
                "--overwrite",
                "--out",
                out,
            ]
            spent = seconds(lambda command=command: subprocess.run(command, check=True, capture_output=True))
            result = read_json(Path(out))
            found[name] = {"edges_t": result["edges_t"], "intervals_t": result["intervals_t"], "seconds": spent}
    intervals = [way["intervals_t"] for way in found.values()]
    agree = all(
        max(interval[edge][0] for interval in intervals) <= min(interval[edge][1] for interval in intervals)
        for edge in range(2)
    )
    return {"ways": found, "intervals_overlap": agree}


def gpu(images: int = 50_000, dim: int = 3072, samples: int = 50_000) -> dict[str, Any]:
    """Random images of CIFAR-10's size on a GPU."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU at hand"}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, 32, dim // 96), dtype=torch.uint8, generator=generator)
    data = TiledImages(pixels, device="cuda", budget=16 << 30)
    sample_similarities(data, range(ROWS), times=1, **HOW)
    return {
        "device": torch.cuda.get_device_name(),
        "images": images,
        "samples": samples,
        "seconds": seconds(lambda: sample_similarities(data, range(samples), times=1, **HOW), "cuda"),
        "two_products_seconds": seconds(lambda: [two_products(data, ROWS) for _ in range(samples // ROWS)], "cuda"),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {f.__name__: f for f in (speed, loop, precision, scaling, ranks, gpu)}


def alone(name: str, out: multiprocessing.Queue) -> None:
    out.put({**PARTS[name](), "process_peak_gib": peak_gib()})


def draw_scaling(lines: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, key, label in ((left, "seconds", "seconds"), (right, "peak_gib", "peak memory, GiB")):
        axes.plot([line["images"] * line["samples"] / 1e6 for line in lines], [line[key] for line in lines], marker="o")
        axes.set(xlabel="images x samples, millions", ylabel=label, ylim=(0, None), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    known: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    context = multiprocessing.get_context("spawn")
    for name in args.parts:
        queue: multiprocessing.Queue = context.Queue()
        process = context.Process(target=alone, args=(name, queue))
        process.start()
        known[name] = queue.get()
        process.join()
        known["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        print(name, json.dumps(known[name], indent=2))
        write_json(args.out, known)
    if "scaling" in args.parts:
        draw_scaling(known["scaling"]["lines"], args.out.with_name("stage_finding_scaling.png"))


if __name__ == "__main__":
    main()
