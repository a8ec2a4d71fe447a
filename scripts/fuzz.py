"""Mutate configurations, run folders and archives at random, and see that every command ends as it should.

A server imports torch and the package once, makes a tiny run, and forks a child for every case. A case is found faulty if
its command ends with another exit code than 0 or 2, prints a traceback, takes more than 10 s, or takes more than 1 GiB
of memory above the server's.

    python scripts/fuzz.py --cases 5000 --seed 0
    python scripts/fuzz.py --seed 0 --only 1234     # one case again, its folder kept
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10, 1 << 30
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *("", "x", "nan", "1", "\0", "\x1b[31m", "\u202e", "[/]", "../..", "~nobody", "/dev/zero", "hf:", "é" * 300),
    *([], {}, [[]], [1, 2], {"kind": "vp"}, {"kind": []}, [None] * 5, [10**9] * 4),
)
TINY = (
    "network.encoder_width=8",
    "network.decoder_widths=[8,8,8]",
    "network.blocks_per_level=1",
    "training.shares=uniform",
    "training.batch=6",
    "training.steps=2",
    "training.log_every=1",
    "training.checkpoint_every=1",
    "training.held_out_every=1",
    "training.held_out_rows=2",
    "training.sample_every=0",
    "sampling.calls=4",
)


@dataclass(frozen=True)
class Case:
    """A command, and what was done to its input."""

    command: tuple[str, ...]
    done: str


# -- mutations --------------------------------------------------------------------------------------------------------


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with some flipped, cut, repeated, removed or put in."""
    changed = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, length = chance.randrange(len(changed) + 1), chance.choice((1, 2, 4, 8, 64))
        kind = chance.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[place : place + length] = chance.randbytes(length)
        elif kind == 2:
            del changed[place : place + length]
        elif kind == 3:
            changed[place:place] = changed[place : place + length]
        elif kind == 4:
            changed[place : place + length] = chance.choice((b"\0", b"\xff", b"9", b"[", b'"')) * length
        else:
            del changed[place:]
    return bytes(changed)


def mutated_json(data: Any, chance: random.Random) -> Any:
    """Return JSON data with one value, somewhere, replaced, removed, renamed or copied elsewhere."""
    data = json.loads(json.dumps(data))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(data))
        if not places:
            return chance.choice(STRANGE)
        holder, key = chance.choice(places)
        kind = chance.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(("x", "", "kind", f"{key}s", "\x1b"))] = holder.pop(key)
        elif kind == 2:
            other, place = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[place])) if _has(other, place) else 0
        elif kind == 3 and type(holder[key]) in (int, float):
            holder[key] = chance.choice(
                (-holder[key], holder[key] * 2, holder[key] + 1, holder[key] / 3, str(holder[key]))
            )
        else:
            holder[key] = chance.choice(STRANGE)
    return data


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(data: Any) -> Any:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield data, key
        yield from _places(value)


def mutated_file(path: Path, chance: random.Random) -> str:
    """Mutate a file by its structure, where it has one, or by its bytes; return what was done."""
    data = path.read_bytes()
    structured = chance.random() < 0.7
    try:
        if structured and path.suffix == ".json":
            path.write_text(json.dumps(mutated_json(json.loads(data), chance)))
            return f"JSON of {path.name}"
        if structured and path.suffix == ".jsonl":
            lines = data.decode().splitlines()
            number = chance.randrange(len(lines))
            lines[number] = json.dumps(mutated_json(json.loads(lines[number]), chance))
            path.write_text("\n".join(lines) + "\n")
            return f"line {number + 1} of {path.name}"
        if structured and path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            header = json.dumps(mutated_json(json.loads(data[8 : 8 + length]), chance)).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
            return f"header of {path.name}"
        if structured and zipfile.is_zipfile(path):
            return _mutated_archive(path, chance)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        pass  # what is not as expected is mutated as bytes
    path.write_bytes(mutated_bytes(data, chance))
    return f"bytes of {path.name}"


def _mutated_archive(path: Path, chance: random.Random) -> str:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(sorted(members))
    content = members.pop(name)
    kind = chance.randrange(4)
    if kind == 0:
        name = chance.choice(("x", "../x.png", "a\\b.png", "\x1b.png", "dataset.json", "images.npy", f"{name}.png"))
    if kind != 1:
        members[name] = content if kind == 0 else mutated_bytes(content[: 1 << 16], chance)
    with zipfile.ZipFile(path, "w", chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return f"member {name!r} of {path.name}"


def case_of(number: int, seed: int, folder: Path) -> Case:
    """Mutate the material in a folder as the case of this number; return its command."""
    chance = random.Random(f"{seed}/{number}")
    kind = chance.choice(("config", "run", "run", "data", "split", "reference", "import", "set"))
    if kind == "config":
        config = json.loads((folder / "run/config.json").read_text())
        (folder / "c.json").write_text(json.dumps(mutated_json(config, chance)))
        done = "the configuration"
        if chance.random() < 0.3:
            done = mutated_file(folder / "c.json", chance)
        return Case(("train", "--config", "c.json", "--data", "data.npz", "--out", "new"), done)
    if kind == "set":
        keys = [".".join(path) for path in _paths(json.loads((folder / "run/config.json").read_text()))]
        setting = f"{chance.choice(keys)}={chance.choice((*map(_text, STRANGE), '[1', '{a: &a [*a]}', '!!set {a}'))}"
        command = ("train", "--preset", "digits", "--data", "data.npz", "--out", "new", "--set", *TINY, setting)
        return Case(tuple(part.replace("\0", "") for part in command), setting)
    if kind == "run":
        files = sorted(p for p in (folder / "run").rglob("*") if p.is_file() and p.name != ".lock")
        done = mutated_file(chance.choice(files), chance)
        commands = (
            ("sample", "run", "--count", "2", "--out", "x.npz"),
            ("train", "--resume", "run", "--set", "training.steps=3"),
            ("report", "run", "--count", "2"),
            ("describe", "run"),
            ("evaluate", "run", "--against", "reference.npz", "--count", "8"),
        )
        return Case(chance.choice(commands), done)
    name, *command = {
        "data": chance.choice(
            (
                ("data.npz", "stats", "data.npz", "--out", "x.npz"),
                ("images.zip", "stats", "images.zip", "--out", "x.npz"),
            )
        ),
        "split": (
            "split.json",
            "train",
            "--preset",
            "digits",
            "--data",
            "data.npz",
            "--out",
            "new",
            "--stages",
            "split.json",
        ),
        "reference": ("reference.npz", "evaluate", "run", "--count", "8", "--against", "reference.npz"),
        "import": ("exported.safetensors", "import", "exported.safetensors", "--preset", "digits", "--out", "new"),
    }[kind]
    done = mutated_file(folder / name, chance)
    more = ("--set", *TINY) if kind == "split" else ()
    return Case((*command, *more), done)


def _paths(data: Any, above: tuple[str, ...] = ()) -> Any:
    for key, value in data.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- running ----------------------------------------------------------------------------------------------------------


def make_material(folder: Path) -> None:
    """Make what is mutated: data, a split, a run, statistics, an exported checkpoint."""
    import numpy as np
    from PIL import Image

    from multistage_diffusion import cli

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(40) % 4)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, image in enumerate(images[:8]):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, ("PNG", "JPEG", "TIFF", "GIF")[number % 4])
            archive.writestr(f"a/{number}.{('png', 'jpg', 'tif', 'gif')[number % 4]}", buffer.getvalue())
        labels = [[f"{n}.{('png', 'jpg', 'tif', 'gif')[n % 4]}", n % 2] for n in range(8)]
        archive.writestr("a/dataset.json", json.dumps({"labels": labels}))
    os.chdir(folder)
    commands = (
        ("split", "data.npz", "--samples", "100", "--out", "split.json"),
        (
            *("train", "--preset", "digits", "--data", "data.npz", "--held-out", "0.3", "--stages", "split.json"),
            *("--out", "run", "--set", *TINY),
        ),
        ("stats", "data.npz", "--out", "reference.npz"),
        ("evaluate", "run", "--against", "reference.npz", "--count", "8"),
        ("export", "run", "--out", "exported.safetensors"),
    )
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cli.main(command)
        if code:
            raise SystemExit(f"the material cannot be made: {errors.getvalue()}")


def run_case(material: Path, number: int, seed: int, folder: Path) -> str | None:
    """Run a case in a child; return what is wrong with how it ended, None if nothing."""
    shutil.copytree(material, folder, dirs_exist_ok=True)
    output = folder / ".output"
    child = os.fork()
    if child == 0:
        _child(number, seed, folder, output)
    end, status = time.monotonic() + SECONDS, None
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else None
        time.sleep(0 if found else 0.005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"still running after {SECONDS} s"
    said = output.read_text(errors="replace") if output.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    if "MemoryError" in said or re.search(r"memory ran out", said):
        return f"memory above {MEMORY >> 20} MiB: {said[-300:]}"
    if "Traceback" in said or code not in (0, 2):
        return f"exit code {code}: {said[-1500:]}"
    return None


def _child(number: int, seed: int, folder: Path, output: Path) -> None:
    """Run a case and end the process."""
    code = 99
    try:
        os.chdir(folder)
        case = case_of(number, seed, folder)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from multistage_diffusion import cli

        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = cli.main(case.command)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        sys.stderr.write(f"Traceback of the case itself: {error!r}\n")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def fuzz(cases: range, seed: int, say: Callable[[str], None], share: tuple[int, int] = (0, 1)) -> list[str]:
    """Run a share (which, of how many) of cases; return what was found, a line or more each."""
    import torch

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as name:
        material, here = Path(name, "material"), Path.cwd()
        material.mkdir()
        make_material(material)
        os.chdir(here)
        start = time.monotonic()
        for done, number in enumerate(cases[share[0] :: share[1]], start=1):
            folder = Path(name, f"case-{number}")
            fault = run_case(material, number, seed, folder)
            if fault is not None:
                found.append(_described(material, number, seed, Path(name, "again"), fault))
                say(found[-1])
            shutil.rmtree(folder, ignore_errors=True)
            if done % 100 == 0:
                say(f"{done} cases, {len(found)} found, {(time.monotonic() - start) / done:.2f} s a case")
    return found


def _described(material: Path, number: int, seed: int, folder: Path, fault: str) -> str:
    shutil.copytree(material, folder, dirs_exist_ok=True)
    case = case_of(number, seed, folder)
    shutil.rmtree(folder)
    again = f"python scripts/fuzz.py --seed {seed} --only {number}"
    return f"case {number} ({case.done}; msdiff {' '.join(map(ascii, case.command))}): {fault}\n  again: {again}"


def again(number: int, seed: int) -> int:
    """Run one case in a folder that is kept; print what it did and said."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{number}-"))
    make_material(folder)
    case = case_of(number, seed, folder)
    print(f"{folder}: {case.done}\nmsdiff {' '.join(map(ascii, case.command))}", flush=True)
    from multistage_diffusion import cli

    code = cli.main(case.command)
    print(f"exit code {code}")
    return code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, at most 2")
    parser.add_argument("--only", type=int, help="run this case alone, in a folder that is kept")
    given = parser.parse_args(arguments)
    if given.only is not None:
        return again(given.only, given.seed)
    workers = max(1, min(given.workers, 2))
    children = []
    for which in range(workers):
        child = os.fork() if workers > 1 else 0  # before torch is imported: it does not survive a fork of its threads
        if child == 0:
            found = fuzz(range(given.cases), given.seed, lambda text: print(text, flush=True), (which, workers))
            print(f"{len(found)} found", flush=True)
            if workers > 1:
                os._exit(int(bool(found)))
            return int(bool(found))
        children.append(child)
    return max([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    sys.exit(main())
