"""How fast a folder of JPEG images is opened and drawn, beside a bare Pillow loop and torchvision, in one run.

Every measurement is a process of its own, so that imports and memory of one do not help another. They take turns for some
rounds; a ratio is the median over the rounds.

- bare: a pool of processes, one per core, decodes every image with Pillow and forgets it.
- first: `open_data` without an index in the cache, to the held-out split and the fingerprint.
- second: the same with the index.
- drawn: rows per second at training speed: batches in random order, each decoded while the one before is used.
- torchvision: the same batches by ImageFolder and DataLoader, one worker per core.

python benchmarks/data.py --out
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

RESULT = Path(__file__).parent / "results" / "data.json"
CLASSES = 10
SETTLES = 2.5  # seconds after which the index of new files is kept


def make_images(folder: Path, count: int, size: int) -> None:
    """Write JPEG images of CLASSES classes: smooth colours and a little noise, about 8 KB at 128 pixels."""
    for number in range(min(count, CLASSES)):
        (folder / f"class-{number}").mkdir(parents=True)
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(partial(_make, folder, size), range(count), chunksize=64))


def _make(folder: Path, size: int, number: int) -> None:
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((size, size), 3)
    pixels = np.asarray(coarse).astype(np.int16) + draws.integers(-12, 13, (size, size, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(folder / f"class-{number % CLASSES}" / f"{number:06d}.jpg", quality=90)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- what is measured, each in a process of its own -------------------------------------------------------------------


def bare(folder: Path, _: int) -> dict[str, float]:
    files = sorted(str(path) for path in folder.rglob("*.jpg"))
    parts = [files[start : start + 64] for start in range(0, len(files), 64)]
    start = time.perf_counter()
    with ProcessPoolExecutor(cores()) as pool:
        count = sum(pool.map(_decode, parts))
    assert count == len(files)
    return {"seconds": time.perf_counter() - start}


def _decode(files: Sequence[str]) -> int:
    for file in files:
        with Image.open(file) as image:
            np.asarray(image.convert("RGB"))
    return len(files)


def opened(folder: Path, _: int) -> dict[str, float]:
    from multistage_diffusion.data.sources import open_data

    before, start = _peak(), time.perf_counter()
    data = open_data(folder)
    training, held_out = data.split(0.1)
    assert len(training) + len(held_out) == len(data)
    assert data.fingerprint
    return {"seconds": time.perf_counter() - start, "peak_mib": _peak() - before}


def drawn(folder: Path, batch: int, *, in_memory: bool = False) -> dict[str, float]:
    from multistage_diffusion.data import rows
    from multistage_diffusion.data.sources import open_data

    rows.IN_MEMORY = (1 << 40) if in_memory else 0
    before, data = _peak(), open_data(folder)
    order = np.random.default_rng(0).permutation(len(data))
    parts = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
    data.rows(parts[0])  # its processes have started
    data.prefetch(parts[1])
    start = time.perf_counter()
    for part, after in zip(parts[1:], [*parts[2:], order[:0]], strict=True):
        data.prefetch(after)
        assert len(data.rows(part)) == batch
    rate = batch * (len(parts) - 1) / (time.perf_counter() - start)
    return {"rows_per_second": rate, "peak_mib": _peak() - before}


def torchvision(folder: Path, batch: int) -> dict[str, float]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import PILToTensor

    data = ImageFolder(str(folder), PILToTensor())
    loader = DataLoader(data, batch, shuffle=True, num_workers=cores(), drop_last=True, persistent_workers=True)
    batches = iter(loader)
    next(batches)  # its workers have started
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return {"rows_per_second": count / (time.perf_counter() - start)}


MEASURES: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "bare": bare,
    "first": opened,
    "second": opened,
    "drawn": drawn,
    "torchvision": torchvision,
}


def _peak() -> float:
    """Return the largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- the whole run ----------------------------------------------------------------------------------------------------


def measured(name: str, folder: Path, cache: Path, batch: int) -> dict[str, float]:
    """Return what a process of its own has measured."""
    environment = {**os.environ, "MSDIFF_CACHE": str(cache)}
    command = [sys.executable, __file__, "--measure", name, str(folder), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def has_torchvision() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def run(count: int, size: int, rounds: int, batch: int) -> dict[str, Any]:
    """Return all figures: medians over the rounds, and ratios of a round's figures."""
    names = [name for name in MEASURES if name != "torchvision" or has_torchvision()]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        make_images(folder, count, size)
        time.sleep(SETTLES)
        for number in range(rounds):
            for name in names:  # "second" and "drawn" read the index of "first"
                found[name].append(measured(name, folder, Path(scratch, f"cache-{number}"), batch))
    return {"images": count, "size": size, "batch": batch, "rounds": rounds, **summary(found)}


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the medians of each measure, and the medians of ratios between measures of one round."""

    def ratio(name: str, other: str, key: str) -> float | None:
        pairs = zip(found.get(name, []), found.get(other, []), strict=False)
        ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
        return median(ratios) if ratios else None

    medians = {name: {key: median(one[key] for one in all_) for key in all_[0]} for name, all_ in found.items()}
    return {
        "measures": medians,
        "first_to_bare": ratio("first", "bare", "seconds"),
        "drawn_to_torchvision": ratio("drawn", "torchvision", "rows_per_second"),
    }


def report(result: dict[str, Any]) -> str:
    """Return the figures as lines of text."""
    lines = [f"{result['images']} JPEG images of {result['size']} pixels, {result['rounds']} rounds"]
    for name, figures in result["measures"].items():
        lines.append(
            f"{name:<12}" + ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in figures.items())
        )
    lines.append(f"first opening / bare loop: {result['first_to_bare']:.2f}")
    beside = result["drawn_to_torchvision"]
    lines.append("torchvision is not installed" if beside is None else f"rows drawn / torchvision's: {beside:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--count", type=int, default=20_000)
    found.add_argument("--size", type=int, default=128)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--batch", type=int, default=256)
    found.add_argument("--out", type=Path, nargs="?", const=RESULT, default=None)
    found.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = found.parse_args(arguments)
    if given.measure is not None:
        print(json.dumps(MEASURES[given.measure[0]](Path(given.measure[1]), given.batch)))
        return
    result = run(given.count, given.size, given.rounds, given.batch)
    print(report(result))
    if given.out is not None:
        import PIL

        from multistage_diffusion.files import write_json

        machine = {"cores": cores(), "pillow": PIL.__version__, "python": sys.version.split()[0]}
        write_json(given.out, {"machine": machine, **result})


if __name__ == "__main__":
    main()
