"""How fast a folder of JPEG images is opened and drawn, how much memory a training on it takes, how fast a photo is reduced.

Part open, on 20,000 images of 128 pixels, beside a bare Pillow loop and torchvision. Every measurement is a process of its
own, so that imports and memory of one do not help another. They take turns for some rounds; a ratio is the median over the
rounds.

- bare: a pool of processes, one per core, decodes every image with Pillow and forgets it.
- first: `open_data` without an index in the cache, to the held-out split and the fingerprint.
- second: the same with the index.
- drawn: rows per second at training speed: batches in random order, each decoded while the one before is used.
- torchvision: the same batches by ImageFolder and DataLoader, one worker per core.

Part memory: a training on 100,000 images of 256 pixels, first opening included, beside one on 200 of them.

Part draft: a photo of 10 megapixels comes to 64x64 by crop, decoded to a fraction of its size (as data are) and whole.

python benchmarks/data.py --out
python benchmarks/data.py --parts memory draft --out
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

RESULT = Path(__file__).parent / "results" / "data.json"
CLASSES = 10
SETTLES = 2.5  # seconds after which the index of new files is kept
OPEN = ("bare", "first", "second", "drawn", "torchvision")  # measures of part open
FEW, BATCH = 200, 8  # part memory: images of the small folder, batch of both trainings
PHOTO, TARGET, REPEATS = (2592, 3888), (64, 64), 9  # part draft: (height, width) of the photo and the result


def make_images(folder: Path, count: int, size: int) -> None:
    """Write JPEG images of CLASSES classes: smooth colours and a little noise, about 8 KB at 128 pixels."""
    for number in range(min(count, CLASSES)):
        (folder / f"class-{number}").mkdir(parents=True)
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(partial(_make, folder, size), range(count), chunksize=64))


def _make(folder: Path, size: int, number: int) -> None:
    _picture(number, (size, size)).save(folder / f"class-{number % CLASSES}" / f"{number:06d}.jpg", quality=90)


def _picture(number: int, size: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(size[::-1], 3)) + _noise(size)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def _noise(size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.random.default_rng(0).integers(-12, 13, (*size, 3), dtype=np.int16)


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


def trained(folder: Path, steps: int) -> dict[str, float]:
    """Open the images without an index, then train a few steps on them in their own size."""
    from multistage_diffusion import override, preset, train
    from multistage_diffusion.data.sources import open_data

    with Image.open(next(folder.rglob("*.jpg"))) as image:
        size = (image.height, image.width)
    start = time.perf_counter()
    data = open_data(folder, size=size, fit="crop")
    data.split(0.1)
    assert data.fingerprint
    seconds, count = time.perf_counter() - start, len(data)
    del data
    config = override(
        preset("images-32-cpu"),
        {"data.source": str(folder), "data.size": size, "data.shape": (3, *size), "training.batch": BATCH}
        | {"training.steps": steps, "training.sample_every": 0, "training.held_out_rows": BATCH, "evaluation.every": 0},
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = train(config, Path(scratch, "run"), device="cpu")
        assert run.records()[-1]["step"] == steps
    return {"images": count, "opened_per_second": count / seconds, "process_mib": _peak()}


def drafted(_: Path, __: int) -> dict[str, float]:
    """Bring one photo to the size of the data with and without the reduced decoding of JPEG, in turn."""
    from multistage_diffusion.config.run import MAX_PIXELS
    from multistage_diffusion.data.decoding import load, planes
    from multistage_diffusion.data.fitting import fit_image
    from multistage_diffusion.data.opening import decode
    from multistage_diffusion.data.options import Options

    file = io.BytesIO()
    _picture(0, PHOTO).save(file, "JPEG", quality=90)
    content, options = file.getvalue(), Options(size=TARGET, fit="crop")

    def reduced() -> Any:
        return load(content, options, positions=False).pixels

    def whole() -> Any:
        return planes(fit_image(decode(content, MAX_PIXELS).image, TARGET, "crop"))

    seconds: dict[str, list[float]] = {"reduced": [], "whole": []}
    for _number in range(REPEATS):
        for name, read in (("reduced", reduced), ("whole", whole)):
            start = time.process_time()  # less disturbed by other programs; one thread
            read()
            seconds[name].append(time.process_time() - start)
    return {
        "megapixels": PHOTO[0] * PHOTO[1] / 1e6,
        "reduced_ms": 1000 * median(seconds["reduced"]),
        "whole_ms": 1000 * median(seconds["whole"]),
        "whole_to_reduced": median(w / r for w, r in zip(seconds["whole"], seconds["reduced"], strict=True)),
        "grey_levels_apart": float(np.abs(reduced().astype(int) - whole().astype(int)).mean()),
    }


MEASURES: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "bare": bare,
    "first": opened,
    "second": opened,
    "drawn": drawn,
    "torchvision": torchvision,
    "trained": trained,
    "drafted": drafted,
}


def _peak() -> float:
    """Return the largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Watch(threading.Thread):
    """Keeps the largest memory of a process and of all below it, in MiB: theirs is what they do not share (Linux)."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.most, self._process, self._ended = 0.0, process, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1):
            first, *others = _below(self._process)
            own = sum(_pages(other, "Private_Clean:", "Private_Dirty:") for other in others)
            self.most = max(self.most, _pages(first, "Rss:") + own)

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.most


def _below(process: int) -> list[int]:
    """Return a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def _pages(process: int, *kinds: str) -> float:
    """Return the memory of these kinds that a process has, in MiB; 0 if it has ended."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()]
        return sum(int(line[1]) for line in lines if line[0] in kinds) / 1024
    return 0.0


# -- the whole run ----------------------------------------------------------------------------------------------------


def measured(name: str, folder: Path, cache: Path, number: int) -> dict[str, float]:
    """Return what a process of its own has measured."""
    environment = {**os.environ, "MSDIFF_CACHE": str(cache)}
    command = [sys.executable, __file__, "--measure", name, str(folder), "--batch", str(number)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        watch = Watch(process.pid) if name == "trained" else None
        if watch is not None:
            watch.start()
        out, error = process.communicate()
        most = None if watch is None else watch.end()
    if process.returncode:
        raise RuntimeError(f"{name}: {error}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found if most is None else {**found, "all_processes_mib": most}


def has_torchvision() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


def run(count: int, size: int, rounds: int, batch: int) -> dict[str, Any]:
    """Return all figures: medians over the rounds, and ratios of a round's figures."""
    names = [name for name in OPEN if name != "torchvision" or has_torchvision()]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        make_images(folder, count, size)
        time.sleep(SETTLES)
        for number in range(rounds):
            for name in names:  # "second" and "drawn" read the index of "first"
                found[name].append(measured(name, folder, Path(scratch, f"cache-{number}"), batch))
    return {"images": count, "size": size, "batch": batch, "rounds": rounds, **summary(found)}


def memory(count: int, size: int, steps: int, scratch: Path) -> dict[str, Any]:
    """Return the memory of trainings on few and on many images."""
    found = {}
    for name, number in (("few", min(FEW, count)), ("many", count)):
        make_images(scratch / name, number, size)
        time.sleep(SETTLES)
        found[name] = measured("trained", scratch / name, scratch / f"cache-{name}", steps)
    return {"size": size, "steps": steps, "batch": BATCH, **found}


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


def told(part: str, figures: dict[str, Any]) -> str:
    """Return the figures of part memory or draft as lines of text."""
    nested = [(name, value) for name, value in figures.items() if isinstance(value, dict) and name != "machine"]
    return "\n".join(
        f"{part:<8}"
        + (f"{name:<6}" if name else "")
        + ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in values.items())
        for name, values in nested or [("", {key: value for key, value in figures.items() if key != "machine"})]
    )


def machine() -> dict[str, Any]:
    import PIL

    return {"cores": cores(), "pillow": PIL.__version__, "python": sys.version.split()[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--parts", nargs="+", choices=("open", "memory", "draft"), default=("open", "memory", "draft"))
    found.add_argument("--count", type=int, help="images; default 20,000 (open) and 100,000 (memory)")
    found.add_argument("--size", type=int, help="pixels a side; default 128 (open) and 256 (memory)")
    found.add_argument("--steps", type=int, default=20, help="of the trainings of part memory")
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--batch", type=int, default=256, help="of part open")
    found.add_argument(
        "--out", type=Path, nargs="?", const=RESULT, help="the parts that are not run keep their figures"
    )
    found.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = found.parse_args(arguments)
    if given.measure is not None:
        print(json.dumps(MEASURES[given.measure[0]](Path(given.measure[1]), given.batch)))
        return
    result: dict[str, Any] = {}
    if "open" in given.parts:
        opened = run(given.count or 20_000, given.size or 128, given.rounds, given.batch)
        result |= {"machine": machine(), **opened}
        print(report(opened))
    with tempfile.TemporaryDirectory() as scratch:
        if "memory" in given.parts:
            trainings = memory(given.count or 100_000, given.size or 256, given.steps, Path(scratch))
            result["memory"] = {"machine": machine(), **trainings}
            print(told("memory", trainings))
        if "draft" in given.parts:
            photo = measured("drafted", Path(scratch), Path(scratch, "cache"), 1)
            result["draft"] = {"machine": machine(), **photo}
            print(told("draft", photo))
    if given.out is not None:
        from multistage_diffusion.files import write_json

        kept = json.loads(given.out.read_text()) if given.out.exists() else {}
        write_json(given.out, kept | result)


if __name__ == "__main__":
    main()
