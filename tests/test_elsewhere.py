"""What runs on CUDA runs on a device that refuses what CUDA refuses (elsewhere.py), and computes the same there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.utils.backend_registration

import multistage_diffusion

SOURCE = Path(multistage_diffusion.__file__).parent
NAME = "elsewhere"  # its module cannot be imported here: that would register the device
WAITS = (
    "in denoiser of run.py",
    "in sample of trajectories.py",
    "in sample_images of sampling.py",
)  # loading, once a batch

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


def rehearsed(name: str, folder: Path) -> dict[str, Any]:
    """Return what a rehearsal has found, with a copy of the package that takes the device for CUDA."""
    shutil.copytree(SOURCE, folder / SOURCE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / SOURCE.name).rglob("*.py"):
        text = path.read_text().replace("torch.cuda.", f"torch.{NAME}.")
        path.write_text(text.replace('"cuda"', f'"{NAME}"').replace('"cuda:', f'"{NAME}:'))
    script = [sys.executable, Path(__file__).with_name("rehearsal.py"), name, folder]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_training_is_the_same_elsewhere_and_no_step_waits(tmp_path: Path) -> None:
    for name, found in rehearsed("training", tmp_path).items():
        here, *there = (np.array(losses, dtype=float) for losses in found["losses"])
        for losses in there:  # images on the device, images sent
            rtol = 1e-3 if name in ("fp32", "bf16", "fp16") else 1e-9
            np.testing.assert_allclose(losses, here, rtol=rtol, err_msg=name)
        # the scaler of fp16 gradients decides on the host
        assert bool(found["waits"]) == (name == "fp16"), (name, found["waits"])
        assert len(found["tried"]) == (4 if name == "tried" else 0)  # with graphs and without, in both layouts


@pytest.mark.slow
def test_commands_do_the_same_elsewhere(tmp_path: Path) -> None:
    found = rehearsed("commands", tmp_path)
    for command, (code, said, waits) in found["commands"].items():
        assert code == 0, f"{command}: {said}"
        if command.startswith("sample"):
            assert not [wait for wait in waits if not wait.endswith(WAITS)], command
            assert bool(waits) == command.endswith(NAME)
    assert len(found["differences"]) == 6
    assert max(found["differences"]) < 0.01  # of 255: hardly a pixel
