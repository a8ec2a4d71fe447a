"""The transformer preset beside the U-Net's: sample quality and training time of `digits-uvit` and `digits`.

    OMP_NUM_THREADS=1 python benchmarks/digits_uvit.py [--seeds 0 1 2] [--folder runs/digits-uvit]
    python benchmarks/digits_uvit.py --report

For each seed both presets are trained, one after the other (8x8 handwritten digits, minutes each). 1,797 samples at the preset's
own sampler are compared with the training digits: Fréchet distance in pixels, precision and recall; and with the held-out ones.
The time is the CPU time of the training. Results are kept in benchmarks/results/digits_uvit.json after each run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from multistage_diffusion import compare, evaluate, override, preset, train
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.files import write_json
from multistage_diffusion.training.run import Run

RESULT = Path(__file__).parent / "results" / "digits_uvit.json"
PRESETS = ("digits", "digits-uvit")
COUNT = 1797
QUIET = {"training.sample_every": 0, "evaluation.every": 0}


def trained(name: str, seed: int, out: Path, changes: dict[str, Any]) -> float:
    """Train a preset; return the CPU seconds that it took."""
    start = time.process_time()
    train(override(preset(name), {**QUIET, "training.seed": seed, **changes}), out)
    return time.process_time() - start


def measured(out: Path, count: int) -> dict[str, Any]:
    """Return how near a run's samples are to training and held-out digits."""
    ours = compare(out, count=count, checkpoint="latest").metrics
    held_out = evaluate(out, count=count, checkpoint="latest").metrics["frechet"]
    return {
        "frechet": ours["frechet"].value,
        **{name: ours[name].value for name in ("precision", "recall") if name in ours},
        "held_out": {"frechet": held_out.value, "real": held_out.real},
    }


def report(known: dict[str, Any]) -> None:
    """Print every run, and the means of the transformer's over those of the U-Net's."""
    for name, seeds in known.items():
        for seed, run in seeds.items():
            print(f"{name:12} seed {seed}: distance {run['frechet']:.3f}, {run['cpu_seconds']:.0f} s of CPU time")
    if all(name in known for name in PRESETS):
        seeds = sorted(set.intersection(*(set(known[name]) for name in PRESETS)))
        for field in ("frechet", "cpu_seconds"):
            base, other = (fmean(known[name][seed][field] for seed in seeds) for name in PRESETS)
            print(f"{field} of {PRESETS[1]}, mean of {len(seeds)} seeds, relative to {PRESETS[0]}: {other / base:.3f}")


def main(arguments: Sequence[str] | None = None, changes: dict[str, Any] | None = None) -> None:
    """Train what is not known yet; `changes` are of both presets, for tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=COUNT, help="samples")
    parser.add_argument("--folder", type=Path, default=Path("runs/digits-uvit"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(arguments)
    known: dict[str, Any] = read_json(args.out) if args.out.exists() else {}
    for seed in [] if args.report else args.seeds:
        for name in PRESETS:
            runs, out = known.setdefault(name, {}), args.folder / f"{name}-{seed}"
            if str(seed) in runs:
                continue
            Run.require_room(out, replace=False)
            seconds = trained(name, seed, out, changes or {})
            runs[str(seed)] = {**measured(out, args.count), "cpu_seconds": seconds}
            write_json(args.out, known)
    report(known)


if __name__ == "__main__":
    main()
