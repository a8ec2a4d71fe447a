"""A GPU's work on the device of elsewhere.py: python rehearsal.py NAME FOLDER, with a copy of the package that knows it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import elsewhere
import numpy as np
from tiny import tiny_config, tiny_data

from multistage_diffusion.cli import main
from multistage_diffusion.performance import autotune, roofline
from multistage_diffusion.performance.autotune import LEAST_STEPS
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

CLASSES = {"network__num_classes": 3, "training__label_dropout": 0.2}
AUGMENTED = {"training__augment": 0.5, "network__augment_dim": 9, "training__flip": True}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"training__precision": "fp32"},
    "sequential": {"training__update_mode": "sequential"},
    "one stage": {"training__update_mode": "one-stage"},
    "bf16": {"training__precision": "bf16"},
    "fp16": {"training__precision": "fp16"},
    "mixed": {},
    "classes, augmented": {**CLASSES, **AUGMENTED},
    "soft intervals": {"training__soft_intervals": 0.5, "training__overlap": 0.3},
    "accumulated, attention": {"training__accumulate": 2, "network__attention_factors": (1,)},
    "branched": {"network__decoder_widths": (8, 8, 8), "training__branch_at": 2},
    "recomputed": {"execution__recompute": True},
    "graphs": {"execution__cuda_graphs": True},
    "tried": {"training__steps": LEAST_STEPS},
}


class Stop(Callback):
    """Ends a run after a few steps."""

    def stepped(self, trainer: Trainer) -> None:
        if trainer.step == 4:
            trainer.stop()


@contextlib.contextmanager
def at(device: str) -> Iterator[None]:
    elsewhere.waits.clear()
    with elsewhere.Mode() if device == elsewhere.NAME else contextlib.nullcontext():
        yield


def training(folder: Path) -> dict[str, Any]:
    """Return losses here and there, waits of a step there, and what autotuning there has tried, of each way of training."""
    found: dict[str, Any] = {}
    autotune.COMPILING_PAYS = math.inf  # it depends on the machine's speed
    for name, changes in CASES.items():
        data, losses, waits = tiny_data(classes=3), [], set()
        for device, budget in (("cpu", 0), (elsewhere.NAME, 1 << 30), (elsewhere.NAME, 0)):
            BatchSource.device_budget = budget
            plain = {"execution__cuda_graphs": False, "training__steps": 4} if device == "cpu" else {}
            exact = {"network__dropout": 0.0, "training__precision": "fp64", "training__held_out_every": 2}
            config = tiny_config(**(exact | changes | plain))
            run = Run.create(folder / f"{name} {device} {budget}", config)
            with at(device):
                trainer = Trainer(run, data, tiny_data(8, classes=3, seed=1), device=device, callbacks=[Stop()])
                trainer.fit()
                losses.append([record["loss"] for record in run.records()])
                elsewhere.waits.clear()
                trainer._iterate()
                waits.update(elsewhere.waits)
        found[name] = {"losses": losses, "waits": sorted(waits), "tried": list(trainer.autotuned)}
    return found


def commands(folder: Path) -> dict[str, Any]:
    """Run every command that computes; return exit codes, messages and waits, and how samples drawn here and there differ."""
    found: dict[str, Any] = {}

    def msdiff(*args: object, device: str = elsewhere.NAME) -> None:
        words, said = [*map(str, args), "--device", device], io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), at(device):
            code = main(words)
            found[" ".join(words)] = (code, said.getvalue(), sorted(set(elsewhere.waits)))

    roofline.MATRIX[elsewhere.NAME] = 256  # what fills a GPU takes half an hour here
    sizes = ["network.encoder_width=8", "network.decoder_widths=[16,8,8]", "network.num_classes=10"]
    every = ["training.held_out_every=3", "training.checkpoint_every=3", "training.log_every=2"]
    small = [*sizes, *every, "training.batch=12"]
    evaluated = ["evaluation.every=3", "evaluation.count=20"]
    run, digits = folder / "run", ("--preset", "digits", "--data", "digits")
    msdiff("train", *digits, "--out", run, "--set", *small, *evaluated, "training.steps=6")
    msdiff("train", "--resume", run, "--set", "training.steps=20", "training.precision=bf16", "--profile")
    images = {}
    solvers = (["dpm"], ["dpm++", "--method", "multistep"], ["ddim", "--eta", 1], ["heun", "--churn", 5])
    for solver in [*solvers, ["heun", "--guidance", 2], ["dpm", "--label", 3]]:
        for device in ("cpu", elsewhere.NAME):
            path = folder / f"{'-'.join(map(str, solver))}-{device}.npz"
            plain = ("--count", 5, "--batch", 3, "--calls", 7, "--precision", "fp32")
            msdiff("sample", run, *plain, "--solver", *solver, "--out", path, device=device)
            images[path] = np.load(path)["images"].astype(int)
    msdiff("sample", run, "--count", 5, "--calls", 7, "--precision", "bf16", "--out", folder / "bf16")
    msdiff("evaluate", run, "--count", 40, "--calls", 4)
    msdiff("stats", "digits", "--out", folder / "stats.npz")
    msdiff("evaluate", run, "--count", 40, "--calls", 4, "--against", folder / "stats.npz")
    msdiff("report", run)
    split = folder / "stages.json"
    msdiff("stages", "digits", "--out", split, "--samples", 100, "--times", 3)
    msdiff("stages", "digits", "--out", folder / "two.json", "--algorithm", 2, "--samples", 100)
    msdiff("stages", "--run", run, "--out", folder / "gradient.json", "--algorithm", "gradient", "--samples", 100)
    planned = ("--preset", "digits", "--budget", 4, "--stages", split, "--probe-steps", 4)
    msdiff("plan", "digits", *planned, "--out", folder / "plan.json")
    few = ["training.steps=3", "training.batch=6", "training.held_out_every=3", "training.held_out_rows=4"]
    apart = ["network.separate=true", "network.decoder_widths=[16,8,8]"]
    msdiff("train", *digits, "--out", folder / "separate", "--set", *few, *apart)
    msdiff("sample", folder / "separate", "--count", 3, "--calls", 4, "--out", folder / "separate.png")
    one = ["stages.interior=[]", "training.shares=uniform", "network.decoder_widths=[16]", "network.encoder_width=16"]
    msdiff("train", *digits, "--out", folder / "one", "--set", *few, *one)
    begun = ["network.decoder_widths=[16,16,16]", "network.encoder_width=16"]
    msdiff("train", *digits, "--out", folder / "begun", "--init-from", folder / "one", "--set", *few, *begun)
    larger, codec, latent = folder / "larger.npz", folder / "codec", folder / "latent"
    np.savez(larger, images=np.random.default_rng(0).integers(0, 256, (60, 32, 32, 1), dtype=np.uint8))
    narrow = ["network.encoder_width=32", "network.decoder_widths=[32,32,32]"]
    of_latents = ("--preset", "fashion-mnist-latent", "--data", larger, "--codec", codec)
    msdiff("train-codec", larger, "--out", codec, "--steps", 3)
    msdiff("train", *of_latents, "--out", latent, "--set", *few, *narrow)
    msdiff("evaluate", latent, "--count", 20, "--calls", 3)
    msdiff("report", latent)
    msdiff("stages", larger, "--codec", codec, "--out", folder / "latent.json", "--samples", 100, "--times", 2)
    pairs = zip(list(images.values())[::2], list(images.values())[1::2], strict=True)
    return {"commands": found, "differences": [float(abs(here - there).mean()) for here, there in pairs]}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps({"training": training, "commands": commands}[name](folder)))
