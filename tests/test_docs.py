"""Every command and every Python block of README and docs runs as written, with fewer steps and samples."""

from __future__ import annotations

import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import foreign_pipelines
import numpy as np
import pytest
from PIL import Image

from multistage_diffusion import cli
from multistage_diffusion.data.sources import fashion_mnist

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# pages whose commands take more than ten seconds; README stands for them in quick tests
LONG = (
    "boundaries",
    "classes",
    "diffusers",
    "evaluation",
    "get-started",
    "latent",
    "own-images",
    "performance",
    "planning",
    "stage-finding",
)
TORCHRUN, MODULE = [sys.executable, "-m", "torch.distributed.run"], "-m multistage_diffusion "
MOST = {"sample": 9, "evaluate": 24, "report": 4}  # images; their numbers are not what a page shows
SHORT = ["training.steps=4", "training.batch=12", "training.held_out_rows=4", "training.log_every=2"]


FAST = [
    "training.sample_every=0",
    "network.encoder_width=16",
    "network.decoder_widths=[16,16,16]",
    "sampling.calls=3",
    "evaluation.every=0",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[tuple[list[str], list[str]]]:
    """Return (what starts several processes, if anything; arguments of msdiff) of every command of a page."""
    found = []
    for line in (line for block in blocks(page, "console") for line in block.splitlines()):
        if line.startswith("$ msdiff "):
            found.append(([], shlex.split(line.removeprefix("$ msdiff "))))
        elif line.startswith("$ torchrun "):
            launch, _, command = line.removeprefix("$ torchrun ").partition(MODULE)
            found.append(([*TORCHRUN, *shlex.split(launch), *shlex.split(MODULE)], shlex.split(command)))
    return found


def launched(command: list[str]) -> int:
    """Run a command of several processes, one thread each."""
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.returncode


def shortened(command: list[str]) -> list[str]:
    """Return a command with fewer training steps, samples and denoiser calls."""
    if command[0] == "train-codec":
        return [*command, "--steps", "3", "--width", "16"]
    if "--print-config" in command:
        return command
    if command[0] in ("train", "quickstart"):
        chosen = command[0] == "quickstart" or not {"--preset", "--config", "--resume"} & set(command)
        return [*command, *([] if "--set" in command else ["--set"]), *SHORT, *(FAST if chosen else [])]
    if command[0] not in MOST:
        return command
    if "--count" in command:
        place = command.index("--count") + 1
        command = [*command[:place], str(min(int(command[place]), MOST[command[0]])), *command[place + 1 :]]
    else:
        command = [*command, "--count", str(MOST[command[0]])]
    samples = command[0] == "evaluate" and not {"--calls", "--likelihood"} & set(command)
    return [*command, *(["--calls", "6"] if samples else [])]


def small_fashion_mnist(folder: Path) -> Path:
    """Write 120 noise images in Fashion-MNIST's files: the real ones are not on every machine, and 60,000."""
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 120) + bytes(i % 10 for i in range(120)))
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            p,
            marks=[pytest.mark.slow] if p.stem in LONG or any(launch for launch, _ in commands(p)) else [],
            id=p.stem,
        )
        for p in PAGES
        if blocks(p, "console")
    ],
)
def test_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", small_fashion_mnist(tmp_path / "fashion"))
    (tmp_path / "photos").mkdir()
    shape = (
        (60, 20, 24) if page.stem == "README" else (60, 20, 24, 3)
    )  # grey: Fréchet distances take a second, not eight
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    for block in blocks(page, "yaml"):
        (tmp_path / "photos.yaml").write_text(block)
    if page.stem == "diffusers":
        foreign_pipelines.pipeline(tmp_path / "my-model", *foreign_pipelines.trained(foreign_pipelines.unet(), 5))
    found = commands(page)
    assert found
    for launch, command in found:
        if launch:
            assert launched([*launch, *shortened(command)]) == 0
        else:
            assert cli.main(shortened(command)) == 0, shlex.join(command)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, marks=[pytest.mark.slow] if p.stem in ("own-images", "sampling") else [], id=p.stem)
        for p in PAGES
        if blocks(p, "python")
    ],
)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "py")], ids=lambda p: p.stem)
def test_python_of_several_processes(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "py"):
        (tmp_path / "block.py").write_text(block)
        assert launched([*TORCHRUN, "--standalone", "--nproc-per-node", "2", str(tmp_path / "block.py")]) == 0


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "results" / "notes.md"],
    ids=lambda p: p.stem,
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`([a-z_/.]+(?:\.py|/))`", page.read_text())
    assert len(named) > 5
    places = (ROOT, ROOT / "src" / "multistage_diffusion", ROOT / "src")
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
