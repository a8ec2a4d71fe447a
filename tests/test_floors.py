"""The lowest versions that pyproject.toml allows do work: installed beside the torch that is here, they do the main job."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def floors() -> list[str]:
    """Return the core dependencies, each at the lowest version allowed; torch is left out."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pairs = [re.fullmatch(r"([a-z]+)>=([\d.]+)", line) for line in required]
    assert all(pairs), required
    return [f"{pair[1]}=={pair[2]}" for pair in pairs if pair and pair[1] != "torch"]


def torch_distributions() -> list[importlib.metadata.Distribution]:
    """Return torch and what it needs, as installed here."""
    waiting, found = ["torch"], {}
    while waiting:
        name = waiting.pop()
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on other machines
        for line in found[name].requires or ():
            needed = re.match(r"[\w.-]+", line)
            if needed and "extra ==" not in line and needed[0] not in found:
                waiting.append(needed[0])
    return list(found.values())


def link_torch(folder: Path) -> None:
    """Make a folder that holds torch and what it needs, and nothing else of this environment."""
    folder.mkdir()
    for distribution in torch_distributions():
        tops = {Path(str(file)).parts[0] for file in distribution.files or ()}
        for top in tops - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (folder / top).exists():
                (folder / top).symlink_to(target)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def registry_answers(python: Path) -> bool:
    done = subprocess.run(
        [str(python), "-m", "pip", "index", "versions", "rich"], capture_output=True, timeout=60, check=False
    )
    return done.returncode == 0


def test_every_floor_is_a_plain_version() -> None:
    assert {line.partition("==")[0] for line in floors()} == {
        "numpy",
        "pillow",
        "matplotlib",
        "safetensors",
        "tyro",
        "rich",
        "pyyaml",
    }


def test_the_lowest_allowed_versions_split_train_sample_and_report(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    if not registry_answers(python):
        pytest.skip("no package registry answers here")
    link_torch(tmp_path / "torch")
    [site] = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    (site / "torch.pth").write_text(f"{tmp_path / 'torch'}\n")
    run(python, "-m", "pip", "install", "--quiet", *floors())
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", ROOT)
    listed = run(python, "-m", "pip", "list", "--format", "freeze").lower().splitlines()
    assert set(floors()) <= set(listed)

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    small = ["training.steps=4", "training.batch=8", "training.held_out_rows=2", "network.encoder_width=8"]
    small += ["network.decoder_widths=[8,8]", "training.shares=uniform", "stages.interior=[1.0]"]
    msdiff = [python, "-m", "multistage_diffusion"]
    data, out = tmp_path / "images.npz", tmp_path / "run"
    run(*msdiff, "stages", data, "--algorithm", "timestep", "--stages", "2", "--out", tmp_path / "stages.json")
    run(*msdiff, "train", "--preset", "digits", "--data", data, "--out", out, "--set", *small)
    run(*msdiff, "sample", out, "--count", "4", "--calls", "4", "--out", tmp_path / "grid.png")
    run(*msdiff, "report", out)
    assert (out / "report.html").stat().st_size > 1000
