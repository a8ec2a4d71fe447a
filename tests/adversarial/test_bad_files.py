"""Split files, reference statistics, checkpoints of others and feature extractors that cannot be used."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from adversary import (
    DEEP,
    TINY,
    Case,
    both,
    cases,
    cut,
    drop,
    edited,
    fifo,
    file,
    folder_in_place,
    npy,
    npz,
    pixels,
    put,
)

HOSTILE = b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."
NOTHING = {"empty": b"", "text": b"hello", "binary": bytes(range(256)), "zeros": bytes(500)}
TRAIN = ("train", "--preset", "digits", "--data", "data.npz", "--out", "new", *TINY)
STAGED = (*TRAIN[:7], "--stages", "stages.json", *TINY)
AGAINST = ("evaluate", "run", "--count", "8", "--against", "reference.npz")

DAMAGED: dict[str, Callable[[Path], Any]] = {
    **{name: file("stages.json", content) for name, content in NOTHING.items()},
    "deep": file("stages.json", DEEP),
    "a list": file("stages.json", "[]"),
    "an object": file("stages.json", "{}"),
    "a pipe": fifo("stages.json"),
    "a folder": folder_in_place("stages.json"),
    "cut": cut("stages.json", 0.5),
    "without edges": edited("stages.json", drop("edges_t")),
    "of text edges": edited("stages.json", put("edges_sigma", value=["1", "2"])),
    "of falling edges": edited("stages.json", put("edges_sigma", value=[2.0, 1.0])),
    "of one edge": edited("stages.json", put("edges_sigma", value=[1.0])),
    "of NaN": edited("stages.json", put("edges_sigma", 0, value=float("nan"))),
    "of null settings": edited("stages.json", put("settings", value=None)),
    "of no curves": edited("stages.json", put("curves", value={})),
    "of text curves": edited("stages.json", put("curves", "t", value="x")),
    "of ragged curves": edited("stages.json", put("curves", "s0", value=[[1.0], 2.0])),
    "of a later format": edited("stages.json", put("format_version", value=99)),
    "of another rule": edited("stages.json", put("rule", value="pointwise")),
    "of a strip that is no picture": edited("stages.json", put("strip", value="aGVsbG8=")),
    "of a strip that is no base64": edited("stages.json", put("strip", value="\u202e")),
}
MEAN, COVARIANCE = np.zeros(64), np.eye(64)
REFERENCES: dict[str, Callable[[Path], Any]] = {
    **{name: file("reference.npz", content) for name, content in NOTHING.items()},
    "a pipe": fifo("reference.npz"),
    "a folder": folder_in_place("reference.npz"),
    "cut": cut("reference.npz", 0.5),
    **{
        name: file("reference.npz", npz(**arrays))
        for name, arrays in {
            "without mu": {"sigma": COVARIANCE},
            "without sigma": {"mu": MEAN},
            "of text": {"mu": np.array(["a"]), "sigma": COVARIANCE},
            "of objects": {"mu": np.array([None], dtype=object), "sigma": COVARIANCE},
            "of NaN": {"mu": MEAN * np.nan, "sigma": COVARIANCE},
            "of other lengths": {"mu": MEAN, "sigma": np.eye(3)},
            "of other dimensions": {"mu": np.zeros(3), "sigma": np.eye(3)},
            "of complex numbers": {"mu": MEAN + 0j, "sigma": COVARIANCE},
            "about a list": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array("[]")},
            "about nothing": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array("hello")},
            "about depths": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array(DEEP)},
            "of a text count": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array('{"count": "9"}')},
            "of a text shape": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array('{"shape": "9"}')},
            "of a later format": {"mu": MEAN, "sigma": COVARIANCE, "msdiff": np.array('{"format_version": 9}')},
            "of a negative covariance": {"mu": MEAN, "sigma": -COVARIANCE},
            "of a covariance that is not symmetric": {"mu": MEAN, "sigma": COVARIANCE + np.eye(64, k=3)},
            "of a covariance of a negative eigenvalue": {"mu": MEAN, "sigma": COVARIANCE - np.full((64, 64), 0.1)},
            "of flat features": {"mu": MEAN, "sigma": COVARIANCE, "features": np.zeros(5)},
        }.items()
    },
}
FOREIGN = {f"{name}{suffix}": content for name, content in NOTHING.items() for suffix in (".pth", ".pkl", ".ckpt")}
FOREIGN |= {f"hostile{suffix}": HOSTILE for suffix in (".pth", ".pkl", ".ckpt", ".safetensors")}
FOREIGN |= {"archive.pth": npz(x=MEAN), "header.safetensors": (2**60).to_bytes(8, "little") + b"{}"}
FOREIGN |= {"zeros.safetensors": bytes(500), "empty.safetensors": b""}


@cases([Case(f"stages {name}", STAGED, make, needs=("stages.json", "data.npz")) for name, make in DAMAGED.items()])
def test_splits(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([Case(f"reference {name}", AGAINST, make, needs=("run", "reference.npz")) for name, make in REFERENCES.items()])
def test_references(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([Case(f"import {name}", ("import", name, "--out", "new"), file(name, data)) for name, data in FOREIGN.items()])
def test_foreign_checkpoints(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(
    [
        Case(f"features {name}", ("evaluate", "run", "--features", "f.pt"), file("f.pt", data), needs=("run",))
        for name, data in (NOTHING | {"hostile": HOSTILE, "archive": npz(x=MEAN)}).items()
    ]
    + [Case("features that are a pipe", ("evaluate", "run", "--features", "f.pt"), fifo("f.pt"), needs=("run",))]
)
def test_features(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


def saved(arrays: dict[str, Any], *more: str) -> bytes:
    """Return an .npz file that holds some members twice."""
    buffer = io.BytesIO(npz(**arrays))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        for name in more:
            archive.writestr(name, npy(pixels()))
    return buffer.getvalue()


@cases(
    [
        Case(f"array {name}", ("stats", path, "--out", "r.npz"), file(path, data), says)
        for name, path, data, says in (
            ("twice", "x.npz", saved({"images": pixels()}, "images.npy"), "two arrays are named images"),
            ("with and without suffix", "x.npz", saved({"images": pixels()}, "images"), "two arrays are named images"),
            ("with more behind", "x.npy", npy(pixels()) + b"more", "more data follow the first array"),
            ("longer than its shape", "x.npz", saved({}, "images.npy").replace(b"(40, 8, 8)", b"(39, 8, 8)"), "x.npz"),
        )
    ]
)
def test_arrays(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


def autoencoder(**changes: Any) -> Callable[[Path], None]:
    """Return what writes a codec's folder with numbers that no autoencoder has."""
    config = {"_class_name": "AutoencoderKL", "in_channels": 1, "block_out_channels": [8], "layers_per_block": 1}
    return both(
        file("cod/config.json", json.dumps(config | changes)), file("cod/diffusion_pytorch_model.safetensors", b"x")
    )


@cases(
    [
        Case(f"codec of {changes}", (*TRAIN, "--codec", "cod"), autoencoder(**changes), "more than any", ("data.npz",))
        for changes in ({"layers_per_block": 10**7}, {"block_out_channels": [8] * 100}, {"latent_channels": 10**9})
    ]
)
def test_codecs(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)
