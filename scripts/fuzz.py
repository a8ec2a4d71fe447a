"""Feed msdiff mutated configurations, runs, data, splits, references and checkpoints; report what is not one clear line.

    python scripts/fuzz.py --cases 5000 --seed 0          # about half an hour on two cores
    python scripts/fuzz.py --seed 0 --only 137 --keep bad # one case again, its files kept in the folder `bad`

Each case copies good material, mutates one file and runs a command that reads it. Reported are tracebacks, exit codes other than
0 and 2, hangs (10 s of the processor, or 60 s in all) and memory above 1 GiB beside what the process starts with. A case
depends on the seed and its number alone. The process has imported torch once; every case runs in a fork of it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from multistage_diffusion.cli import main as msdiff
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.files import to_dict

CPU_SECONDS, WALL_SECONDS, MEMORY = 10, 60, 1 << 30
INTERRUPT_SECONDS = 4  # after which a training that has begun is interrupted, as Ctrl-C does

TINY = {
    "data.source": "data.npz",
    "network.encoder_width": 8,
    "network.decoder_widths": [8, 8, 8],
    "network.blocks_per_level": 1,
    "training.shares": "uniform",
    "training.batch": 6,
    "training.steps": 2,
    "training.log_every": 1,
    "training.checkpoint_every": 1,
    "training.held_out_every": 1,
    "training.held_out_rows": 2,
    "training.sample_every": 0,
    "sampling.calls": 4,
}
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 10**30, float("nan"), float("inf"), "", "auto", "x" * 10_000),
    *(
        "\x1b[31m",
        "\u202e",
        "../..",
        "/dev/zero",
        "[bold]",
        "1e-4",
        [],
        {},
        [[]],
        [1, 2, 3],
        {"kind": "vp"},
        {"a": {"b": []}},
    ),
)


@dataclass(frozen=True)
class Target:
    """A file that is mutated, and commands that read it; paths are relative to the case's folder."""

    file: str
    commands: tuple[str, ...]
    kind: str = "bytes"


READ_RUN = (
    "sample run --count 2 --calls 3 --out grid.png",
    "sample run --count 2 --calls 3 --checkpoint latest --out out.npz",
    "describe run",
    "report run --count 2",
    "evaluate run --count 8 --calls 3",
    "train --resume run --set training.steps=3 --device cpu",
    "export run --out weights.safetensors",
)
READ_DATA = ("stages {} --algorithm timestep --stages 2 --out stages2.json", "stats {} --out stats2.npz")
STEP = "run/checkpoints/step_00000002"
TARGETS = (
    *(
        Target(file, ("train --config {} --out new --device cpu",), kind)
        for file, kind in (("c.json", "json"), ("c.yaml", "yaml"))
    ),
    Target("run/config.json", READ_RUN, "json"),
    Target(f"{STEP}/state.json", READ_RUN, "json"),
    *(Target(f"run/{name}.jsonl", READ_RUN, "jsonl") for name in ("metrics", "launches")),
    Target("run/evaluation.json", READ_RUN, "json"),
    *(Target(f"{STEP}/{name}.safetensors", READ_RUN, "safetensors") for name in ("model", "ema", "optimizer")),
    Target("stages.json", ("train --config c.json --stages {} --out new --device cpu",), "json"),
    Target("reference.npz", ("evaluate run --count 8 --calls 3 --against {}",), "npz"),
    Target("exported.safetensors", ("import {} --preset digits --size 8 8 --out imported",), "safetensors"),
    Target("data.npz", READ_DATA, "npz"),
    Target("images.zip", READ_DATA, "zip"),
    Target("folder/0.png", tuple(line.format("folder") for line in READ_DATA)),
    Target("folder/dataset.json", tuple(line.format("folder") for line in READ_DATA), "json"),
)


# -- material ---------------------------------------------------------------------------------------------------------------


def make_material(folder: Path) -> None:
    """Make one good file of every kind."""
    draws = np.random.default_rng(0)
    pixels = draws.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", images=pixels, labels=np.arange(40) % 3)
    (folder / "folder").mkdir()
    for i in range(8):
        Image.fromarray(pixels[i]).save(folder / "folder" / f"{i}.png")
    listing = {"labels": [[f"{i}.png", i % 2] for i in range(8)]}
    (folder / "folder" / "dataset.json").write_text(json.dumps(listing))
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "folder").iterdir()):
            archive.write(path, path.name)
    config = to_dict(override(preset("digits"), TINY))
    (folder / "c.json").write_text(json.dumps(config))
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    run(folder, "train --config c.json --out run --device cpu")
    run(folder, "evaluate run --count 8 --calls 3")
    run(folder, "stages data.npz --algorithm timestep --stages 3 --out stages.json")
    run(folder, "stats data.npz --out reference.npz")
    run(folder, "export run --out exported.safetensors")


def run(folder: Path, line: str) -> None:
    """Run a command that must succeed."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        if msdiff(line.split()) != 0:
            raise SystemExit(f"material: msdiff {line} failed")
    finally:
        os.chdir(here)


# -- mutations --------------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat, insert or overwrite somewhere, one to four times."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 2, 4, 16, 256))
        kind = rng.randrange(6)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at:at] = rng.randbytes(size)
        else:
            found[at : at + size] = bytes([rng.choice((0, 0xFF, 0x7F))]) * size
    return bytes(found)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, add or repeat a value somewhere in JSON-able data, one to three times."""
    holder = {"root": tree}
    for _ in range(rng.randint(1, 3)):
        node: Any = holder
        key: Any = "root"
        while isinstance(node[key], dict | list) and node[key] and (node is holder or rng.random() < 0.75):
            node = node[key]
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        kind = rng.randrange(5)
        if kind == 0 and node is not holder:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(("kind", "x", "steps", "", "\x1b"))] = copy.deepcopy(rng.choice(ODD))
        elif kind == 2 and isinstance(node, list):
            node.append(copy.deepcopy(rng.choice(ODD)))
        elif kind == 3 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] = rng.choice((-1, 0, 2, 1e6, 1e-6)) * node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return holder["root"]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Mutate what JSON says, or now and then its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_tree(json.loads(data), rng)).encode()


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Mutate a line of JSON, drop lines, or tear them."""
    lines = data.splitlines() or [b"{}"]
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(lines[at], rng)
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join(lines) + rng.choice((b"\n", b"", b'{"kind'))


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Mutate what YAML says, or now and then its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    return yaml.safe_dump(mutate_tree(yaml.safe_load(data), rng)).encode()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header, or the bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutate_tree(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_npz(data: bytes, rng: random.Random) -> bytes:
    """Give an array another type or shape, mutate a member, or the whole."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    if rng.random() < 0.4:
        return mutate_zip(data, rng)
    with np.load(io.BytesIO(data)) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    name = rng.choice(list(arrays))
    array = arrays[name]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: array.astype(np.float16) if array.dtype.kind in "biuf" else array,
        lambda: array.reshape(-1)[: rng.randrange(array.size + 1)],
        lambda: array[None],
        lambda: np.full(array.shape, np.nan),
        lambda: np.array("text"),
        lambda: array.astype("S4") if array.dtype.kind != "U" else array,
        lambda: np.zeros((0, *array.shape[1:]), array.dtype),
    )
    arrays[name] = rng.choice(changes)()
    if rng.random() < 0.2:
        arrays[rng.choice(("images", "x", "labels"))] = np.arange(3)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def mutate_zip(data: bytes, rng: random.Random) -> bytes:
    """Rename, drop, repeat or mutate members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    odd = rng.choice(
        (f"../{name}", f"a\\{name}", f"/{name}", "\x1b[31m.png", "x" * 5000, f"deep/{'d/' * 200}{name}", "con")
    )
    members[at : at + 1] = rng.choice(
        (
            [],
            [(odd, content)],
            [(name, content)] * 2,
            [(name, mutate_bytes(content, rng))],
            [(name, mutate_json(content, rng) if name.endswith(".json") else b"")],
        )
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    ) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue() if rng.random() < 0.8 else mutate_bytes(buffer.getvalue(), rng)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": mutate_bytes,
    "json": mutate_json,
    "jsonl": mutate_lines,
    "yaml": mutate_yaml,
    "safetensors": mutate_safetensors,
    "npz": mutate_npz,
    "zip": mutate_zip,
}


# -- cases ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a case; `fault` is empty if all is well."""

    number: int
    command: str
    fault: str
    said: str


def prepare(number: int, seed: int, material: Path, folder: Path) -> str:
    """Copy the material, mutate a file of it, and return the command line."""
    rng = random.Random(f"{seed}-{number}")
    target = rng.choice(TARGETS)
    shutil.copytree(material, folder)
    path = folder / target.file
    with warnings_off():
        path.write_bytes(MUTATIONS[target.kind](path.read_bytes(), rng))
    return rng.choice(target.commands).format(target.file)


@contextlib.contextmanager
def warnings_off() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_child(folder: Path, command: str) -> None:
    """Run a command in this forked process and end it with its exit code."""
    code = 99
    try:
        os.chdir(folder)
        out = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") for fd in (1, 2))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        try:
            code = msdiff(command.split())
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 98
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def memory(pid: int) -> int:
    """Return the bytes of its own that a process has in memory; 0 once it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def said(folder: Path) -> str:
    """Return the end of what a case's command printed."""
    file = folder / "said.txt"
    return file.read_text(encoding="utf-8", errors="replace")[-4000:] if file.exists() else ""


def watch(pid: int, folder: Path) -> str:
    """Wait for a process; return what was wrong with it, apart from what it said."""
    start, base, interrupted = time.monotonic(), memory(pid), False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        passed = time.monotonic() - start
        if memory(pid) > base + MEMORY:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return (
                "" if "training new on" in said(folder) else "memory above 1 GiB"
            )  # a large network that fits is no fault
        if passed > WALL_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"hangs: {WALL_SECONDS} s"
        if passed > INTERRUPT_SECONDS and not interrupted and (folder / "new" / "metrics.jsonl").exists():
            os.kill(pid, signal.SIGINT)  # valid, and long
            interrupted = True
        time.sleep(0.01)
    if os.WIFSIGNALED(status):
        cpu = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return f"hangs: {CPU_SECONDS} s of the processor" if cpu else f"dies of signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    return "" if code in (0, 2) else f"exit code {code}"


def run_case(number: int, seed: int, material: Path, work: Path) -> Outcome:
    """Run one case in a folder of its own, which is removed."""
    folder = work / str(number)
    command = prepare(number, seed, material, folder)
    pid = os.fork()
    if pid == 0:
        in_child(folder, command)
    fault = watch(pid, folder)
    if not fault and "Traceback" in said(folder):
        fault = "traceback"
    return Outcome(number, command, fault, said(folder))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; return 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--only", type=int, default=None, help="run this case alone and print what it says")
    parser.add_argument("--keep", type=Path, default=None, help="a new folder for the files of --only")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork of a process with threads may hang
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        material, work = Path(temporary) / "material", Path(temporary) / "cases"
        material.mkdir()
        work.mkdir()
        maker = os.fork()
        if maker == 0:  # in a process of its own: this one must not have threads
            code = 1
            try:
                make_material(material)
                (Path(temporary) / "modules.txt").write_text("\n".join(sys.modules))
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(maker, 0)[1]:
            raise SystemExit("the material could not be made")
        import_all((Path(temporary) / "modules.txt").read_text().split())
        if args.only is not None:
            outcome = run_case(args.only, args.seed, material, work)
            print(f"msdiff {outcome.command}\n{outcome.said}\n{outcome.fault or 'well'}")
            if args.keep is not None:
                shutil.copytree(work / str(args.only), args.keep)
            return int(bool(outcome.fault))
        return run_all(range(args.first, args.first + args.cases), args.seed, args.jobs, material, work)


def import_all(names: list[str]) -> None:
    """Import what the commands import late, once for all cases: in each case it would take a second."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1


def run_all(numbers: range, seed: int, jobs: int, material: Path, work: Path) -> int:
    """Run cases side by side, telling how it goes; return 1 if anything was found."""
    found: list[Outcome] = []
    kinds: Counter[str] = Counter()
    start = last = time.monotonic()

    def one(number: int) -> Outcome:
        try:
            return run_case(number, seed, material, work)
        finally:
            shutil.rmtree(work / str(number), ignore_errors=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done, outcome in enumerate(pool.map(one, numbers), start=1):
            kinds[outcome.command.split()[0]] += 1
            if outcome.fault:
                found.append(outcome)
                tail = outcome.said.strip().splitlines()[-3:]
                print(
                    f"case {outcome.number}: {outcome.fault}: msdiff {outcome.command}\n  " + "\n  ".join(tail),
                    flush=True,
                )
            now = time.monotonic()
            if now - last > 10:
                last, rate = now, done / (now - start)
                print(
                    f"{done}/{len(numbers)} cases, {rate:.1f}/s, {(len(numbers) - done) / rate:.0f} s left", flush=True
                )
    print(
        f"{len(numbers)} cases ({', '.join(f'{count} {name}' for name, count in sorted(kinds.items()))}), {len(found)} faults"
    )
    for outcome in found:
        print(f"python scripts/fuzz.py --seed {seed} --only {outcome.number}  # {outcome.fault}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
