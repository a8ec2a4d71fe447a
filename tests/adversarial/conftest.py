"""What the bad inputs are made from: a trained run, its data, a split, statistics and an exported checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from adversary import TINY, Case, pixels, refused

from multistage_diffusion import cli


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let nothing that is agreed to here be remembered on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.npz, stages.json, run, reference.npz and exported.safetensors, made once."""
    folder = tmp_path_factory.mktemp("material")
    data, stages, run = folder / "data.npz", folder / "stages.json", folder / "run"
    np.savez(data, images=pixels(), labels=np.arange(40) % 4)
    source = ("--data", str(data), "--held-out", "0.3")
    for command in (
        ("stages", str(data), "--samples", "200", "--out", str(stages)),
        ("train", "--preset", "digits", *source, "--stages", str(stages), "--out", str(run), *TINY),
        ("stats", str(data), "--out", str(folder / "reference.npz")),
        ("evaluate", str(run), "--against", str(folder / "reference.npz"), "--count", "20"),
        ("export", str(run), "--out", str(folder / "exported.safetensors")),
    ):
        assert cli.main(command) == 0, command
    return folder


@pytest.fixture
def refuses(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Case], str]:
    """Run a case in an empty folder and check its refusal."""
    return lambda case: refused(case, tmp_path, material, capsys)
