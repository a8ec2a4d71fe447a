"""The scripts that made what ships with the package still run."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import load
from safetensors.torch import load_file

from multistage_diffusion.evaluation.classifier import FashionClassifier

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_fashion_classifier.py"


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.slow
def test_the_classifier_is_trained_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 512), ("t10k", 500)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 30, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), labels * 2 + 3, 4:24] = 255  # a bar whose height is the class
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    script = load(SCRIPT, "train_fashion_classifier")
    out = tmp_path / "weights.safetensors"
    script.main(["--data", str(tmp_path), "--epochs", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    assert "accuracy on 500 test images: 0." in printed
    tensors = load_file(out)
    FashionClassifier().load_state_dict({name: value.float() for name, value in tensors.items()})
    assert {value.dtype for value in tensors.values()} == {torch.float16}
