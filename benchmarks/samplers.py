"""Errors of every sampler beside the exact flow, for denoisers that are known exactly.

Run it as: python benchmarks/samplers.py [--data NAME ...] [--calls N ...] [--trajectories N] [--out [FILE]] | --tables

For a Gaussian mixture in the plane and for 180 of the digits (the optimal denoiser of both is known in closed form) all solvers,
methods, orders, spacings and schedules draw the same trajectories in 5 to 50 calls, in float64. The error is the root mean square
distance, per coordinate, to the end of the same trajectory in 800 calls or more. DPM solvers and DDIM end at sigma_min.
Heun ends at 0, so it is set beside DDIM with a last denoiser call, of as many calls in all, and the flow to 0.

--tables prints, from the file, the settings that are worse than DDIM at the same calls by more than a tenth (Heun: from 20
calls), and those whose error grows by more than a tenth from n to 2n calls. docs/sampling.md holds that.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.contracts import Denoiser
from multistage_diffusion.data import to_float
from multistage_diffusion.data.mixture import GaussianMixture
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.files import write_json
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.schedules import SCHEDULES, NoiseSchedule
from multistage_diffusion.schedules.edm import EDM

RESULT = Path(__file__).parent / "results" / "samplers.json"
CALLS = (5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 50)
SPACINGS = ("log-snr", "time", "edm")
RULES = ("always", "published")
TOLERANCE = 1.1
FEW_FOR_HEUN = 20


def mixture() -> tuple[Denoiser, tuple[int, ...]]:
    """Return the exact denoiser of five Gaussians of unequal weights and widths in the plane, and the shape of a point."""
    generator = torch.Generator().manual_seed(16)
    means = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.1, 0.15, 0.2, 0.25, 0.3], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.tensor([0.05, 0.1, 0.15, 0.2, 0.3], dtype=torch.float64)), (2,)


def digits() -> tuple[Denoiser, tuple[int, ...]]:
    """Return the optimal denoiser of every tenth digit, and the shape of an image."""
    images = to_float(open_data("digits").array())[::10].double()
    return OptimalDenoiser(images, dtype=torch.float64), tuple(images.shape[1:])


DATA = {"mixture": mixture, "digits": digits}


def settings(rule: str) -> Iterator[tuple[str, SamplingConfig]]:
    """Yield every solver, method and order beside DDIM, by name; "ddim, ending at 0" is what Heun is set beside."""
    if rule == "always":
        yield "ddim", SamplingConfig(solver="ddim", denoise_last="never")
        yield "ddim to 0", SamplingConfig(solver="ddim", denoise_last="always")
    lower: Any = rule
    for solver in ("dpm", "dpm++"):
        for method in ("singlestep", "multistep"):
            for order in (2, 3):
                base: Any = {"solver": solver, "method": method, "order": order}
                yield f"{solver} {method} {order}", SamplingConfig(**base, lower_final=lower, denoise_last="never")
    yield "heun", SamplingConfig(solver="heun", lower_final=lower)


def errors(
    name: str, schedules: Sequence[NoiseSchedule], calls: Sequence[int], trajectories: int, rules: Sequence[str] = RULES
) -> dict[str, dict[str, float]]:
    """Return the error of every setting, "schedule / spacing / setting / rule", at every number of calls."""
    denoiser, shape = DATA[name]()
    found: dict[str, dict[str, float]] = {}
    width = make_plan(SamplingConfig(sigma_min=0.1, sigma_max=1.0), EDM())
    unit = start_noise(0, torch.arange(trajectories), shape, width, torch.float64)

    def end(config: SamplingConfig, schedule: NoiseSchedule) -> Tensor:
        plan = make_plan(config, schedule)
        return sample(denoiser, plan.initial_noise_std * unit, plan)

    for schedule in schedules:
        fine = SamplingConfig(solver="dpm++", method="multistep", calls=800, denoise_last="never")
        exact = {False: end(fine, schedule), True: end(SamplingConfig(solver="heun", calls=1001), schedule)}
        for rule in rules:
            for setting, config in settings(rule):
                for spacing in SPACINGS:
                    row = found.setdefault(f"{schedule.kind} / {spacing} / {setting} / {rule}", {})
                    for n in calls:
                        made: Any = {"spacing": spacing, "calls": n}
                        off = end(dataclasses.replace(config, **made), schedule)
                        off = off - exact[setting in ("heun", "ddim to 0")]
                        row[str(n)] = float(f"{float(off.square().mean().sqrt()):.4g}")
        print(f"{name}: {schedule.kind} done", file=sys.stderr, flush=True)
    return found


def beside_ddim(rows: dict[str, dict[str, float]], rule: str) -> dict[str, dict[int, float]]:
    """Return, by setting and calls, the error over that of DDIM where it exceeds TOLERANCE."""
    worse: dict[str, dict[int, float]] = {}
    for key, row in rows.items():
        schedule, spacing, setting, of = key.split(" / ")
        if of != rule or setting.startswith("ddim"):
            continue
        other = rows[f"{schedule} / {spacing} / {'ddim to 0' if setting == 'heun' else 'ddim'} / always"]
        ratios = {int(n): error / other[n] for n, error in row.items() if setting != "heun" or int(n) >= FEW_FOR_HEUN}
        if bad := {n: ratio for n, ratio in ratios.items() if ratio > TOLERANCE}:
            worse[f"{schedule} / {spacing} / {setting}"] = bad
    return worse


def growing(rows: dict[str, dict[str, float]], rule: str) -> dict[str, dict[int, float]]:
    """Return, by setting and calls n, the error at 2n calls over that at n where it exceeds TOLERANCE."""
    found: dict[str, dict[int, float]] = {}
    for key, row in rows.items():
        *setting, of = key.split(" / ")
        pairs = {
            int(n): row[str(2 * int(n))] / error for n, error in row.items() if str(2 * int(n)) in row and error > 0
        }
        if of == rule and (bad := {n: ratio for n, ratio in pairs.items() if ratio > TOLERANCE}):
            found[" / ".join(setting)] = bad
    return found


def tables(results: dict[str, dict[str, dict[str, float]]], rule: str = "always") -> str:
    """Return the settings that miss a mark, as Markdown; of "published" how many do, by solver."""
    lines = ["| data | schedule / spacing / setting | calls: error over DDIM's |", "| --- | --- | --- |"]
    for data, rows in results.items():
        for name, bad in beside_ddim(rows, rule).items():
            lines.append(f"| {data} | {name} | {', '.join(f'{n}: {ratio:.2f}' for n, ratio in bad.items())} |")
    lines += [
        "",
        "| data | schedule / spacing / setting | calls n: error at 2n over that at n |",
        "| --- | --- | --- |",
    ]
    for data, rows in results.items():
        for name, bad in growing(rows, rule).items():
            lines.append(f"| {data} | {name} | {', '.join(f'{n}: {ratio:.2f}' for n, ratio in bad.items())} |")
    return "\n".join(lines)


def counts(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return how many settings and calls are worse than DDIM, by solver and rule, as Markdown."""
    names = dict.fromkeys(k.split(" / ")[2] for rows in results.values() for k in rows if "ddim" not in k)
    lines = ["| solver | `published`: worse than DDIM | largest ratio | `always`: worse than DDIM | largest ratio |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name in names:
        cells = []
        for rule in ("published", "always"):
            least = FEW_FOR_HEUN if name == "heun" else 0
            keys = [(r, k) for r in results.values() for k in r if k.endswith(f" / {name} / {rule}")]
            of = sum(int(n) >= least for rows, key in keys for n in rows[key])
            bad = [
                x
                for r in results.values()
                for k, v in beside_ddim(r, rule).items()
                if k.endswith(name)
                for x in v.values()
            ]
            cells += [f"{len(bad)} of {of}", f"{max(bad):.3g}" if bad else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--trajectories", type=int, default=1000)
    parser.add_argument("--out", type=Path, nargs="?", const=RESULT)
    parser.add_argument("--tables", action="store_true", help="print the tables of the file")
    chosen = parser.parse_args(arguments)
    if chosen.tables:
        results = read_json(chosen.out or RESULT)["errors"]
        print(f"{counts(results)}\n\n{tables(results)}")
        return
    torch.set_num_threads(1)  # of small matrices
    results: dict[str, dict[str, dict[str, float]]] = {}
    if chosen.out and chosen.out.exists():
        results = read_json(chosen.out)["errors"]
    for name in chosen.data:
        for kind in chosen.schedules:
            found = errors(name, [SCHEDULES[kind]()], chosen.calls, chosen.trajectories, chosen.rules)
            results[name] = {**results.get(name, {}), **found}
            if chosen.out:
                write_json(chosen.out, {"trajectories": chosen.trajectories, "errors": results})
    print(f"{counts(results)}\n\n{tables(results)}")


if __name__ == "__main__":
    main()
