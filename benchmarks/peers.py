"""What a user would pick instead: sample quality after equally many minutes of training on the same images and cores.

    pip install diffusers denoising-diffusion-pytorch smalldiffusion accelerate torch-ema
    python benchmarks/peers.py [--data fashion-mnist] [--minutes 20] [--tools ours diffusers ...] [--seeds 1 2]
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/peers.py --calls 20 --default never   # on one core, and shorter
    python benchmarks/peers.py --report

Each tool trains as its README or its training example says: optimiser, learning rate, batch, average of the weights, noise
schedule. Its own U-Net has 32 channels at full size, and 64 below. `ours` is `msdiff train` with the preset of the data.
The clock runs while a tool trains, not while it samples. Samples of all are judged alike: 2,000 of them, Fréchet and kernel
distance to the training images on the features of the classifier that ships with this package, at 20 and 50 calls of the tool's
own fast sampler; and 200 at its default of 1000 steps, if it has one, which say little.

Every result is kept in benchmarks/results/peers.json as soon as it is known, the first samples in peers-TOOL.png; a tool that is
there is not trained again. --report draws peers.png.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from multistage_diffusion import override, preset, sample, train
from multistage_diffusion.config import DataConfig
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.data import ImageData
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.evaluation import Reference, compare_samples, get_features, make_reference
from multistage_diffusion.files import write_json
from multistage_diffusion.performance.devices import device_name
from multistage_diffusion.reporting.pictures import grid, save_png
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "peers.json"
CALLS = (20, 50)  # of the network per sample
SAMPLES, FEW = 2000, 200
DEFAULT_STEPS = 1000
AT_ONCE = 100  # samples drawn at a time
SHOWN = 32  # samples in a picture
PRESETS = {"fashion-mnist": "fashion-mnist"}
FEATURES = {"fashion-mnist": "fashion-classifier"}


class Tool(Protocol):
    """A tool, as its README uses it.

    Attributes:
        default_steps: calls of its default sampler, if that differs from its fast one.
    """

    default_steps: int | None

    def fit(self, images: Tensor, seconds: float) -> tuple[int, int]:
        """Train on images in [0, 255], uint8 (N, C, H, W), for some seconds; return images seen and parameters."""

    def draw(self, count: int, calls: int) -> Tensor:
        """Return samples in [0, 1], (count, C, H, W)."""


def batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Yield batches in [-1, 1], the images in a new order every time, without end."""
    while True:
        for rows in torch.randperm(len(images)).split(size):
            if len(rows) == size:
                yield images[rows].float() / 127.5 - 1.0


def timed(step: Callable[[int], int], seconds: float) -> int:
    """Call step(number of steps before) until the time is over; return the sum of what it returns."""
    start, seen, number = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        seen, number = seen + step(number), number + 1
    return seen


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Diffusers:
    """examples/unconditional_image_generation: AdamW, cosine learning rate after 500 steps, EMAModel, 1000 DDPM steps."""

    default_steps = DEFAULT_STEPS

    def __init__(self, channels: int, side: int) -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        self.shape = (channels, side, side)
        self.model = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            norm_num_groups=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def fit(self, images: Tensor, seconds: float) -> tuple[int, int]:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        average = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        source, clock = batches(images, 16), time.perf_counter()
        rates: Any = None

        def step(number: int) -> int:
            nonlocal rates
            if number == 20:  # the example knows its number of steps; here it follows from the rate
                steps = int(20 * seconds / (time.perf_counter() - clock))
                rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=max(steps, 501))
            y = next(source)
            noise, when = torch.randn_like(y), torch.randint(0, 1000, (len(y),))
            noisy = self.scheduler.add_noise(y, noise, when)
            loss = nn.functional.mse_loss(self.model(noisy, when).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            if rates is not None:
                rates.step()
            average.step(self.model.parameters())
            return len(y)

        seen = timed(step, seconds)
        average.copy_to(self.model.parameters())
        return seen, parameters(self.model)

    @torch.no_grad()
    def draw(self, count: int, calls: int) -> Tensor:
        from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

        fast = calls != DEFAULT_STEPS
        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config) if fast else self.scheduler
        pipeline = DDPMPipeline(unet=self.model, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        drawn = [pipeline(len(part), num_inference_steps=calls, output_type="np").images for part in parts(count)]
        return torch.cat([torch.from_numpy(part) for part in drawn]).permute(0, 3, 1, 2)


class DenoisingDiffusion:
    """denoising-diffusion-pytorch's Trainer: Adam, EMA of 0.995 every 10 steps, sigmoid schedule, v-prediction, DDIM."""

    default_steps = DEFAULT_STEPS

    def __init__(self, channels: int, side: int) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        # sides that are no multiples of 8 do not fit its three halvings
        self.side, padded = side, 8 * math.ceil(side / 8)
        self.pad = padded - side
        model = Unet(dim=32, dim_mults=(1, 2, 2, 2), channels=channels)
        self.diffusion = GaussianDiffusion(model, image_size=padded, timesteps=1000, sampling_timesteps=50)
        self.average: Any = None

    def fit(self, images: Tensor, seconds: float) -> tuple[int, int]:
        from ema_pytorch import EMA

        before = self.pad // 2
        images = nn.functional.pad(images, (before, self.pad - before) * 2)
        optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)
        source = batches(images, 32)

        def step(number: int) -> int:
            y = next(source) / 2 + 0.5
            loss = self.diffusion(y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.average.update()
            return len(y)

        return timed(step, seconds), parameters(self.diffusion.model)

    @torch.no_grad()
    def draw(self, count: int, calls: int) -> Tensor:
        model = self.average.ema_model
        model.sampling_timesteps, model.is_ddim_sampling = calls, calls < DEFAULT_STEPS
        drawn = torch.cat([model.sample(batch_size=len(part)) for part in parts(count)])
        before = self.pad // 2
        return drawn[..., before : before + self.side, before : before + self.side]


class SmallDiffusion:
    """examples/fashion_mnist_unet.py: AdamW at 7e-4, batches of 1024, EMA of 0.99, DDPM schedule, gam = 1.6."""

    default_steps = None

    def __init__(self, channels: int, side: int) -> None:
        from smalldiffusion import Scaled, ScheduleDDPM, Unet

        self.model = Scaled(Unet)(side, channels, channels, ch=32, ch_mult=(1, 2, 2), attn_resolutions=(side // 2,))
        self.schedule = ScheduleDDPM(N=1000)

    def fit(self, images: Tensor, seconds: float) -> tuple[int, int]:
        from smalldiffusion.diffusion import generate_train_sample
        from torch_ema import ExponentialMovingAverage

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=7e-4)
        average = ExponentialMovingAverage(self.model.parameters(), decay=0.99)
        source = batches(images, 1024)

        def step(number: int) -> int:
            self.model.train()
            optimizer.zero_grad()
            y, sigma, noise, cond = generate_train_sample(next(source), self.schedule, False)
            type(self.model).get_loss(self.model, y, sigma, noise, cond=cond).backward()
            optimizer.step()
            average.update()
            return len(y)

        seen = timed(step, seconds)
        average.copy_to()
        return seen, parameters(self.model)

    @torch.no_grad()
    def draw(self, count: int, calls: int) -> Tensor:
        from smalldiffusion import samples

        sigmas, found = self.schedule.sample_sigmas(calls), []
        for part in parts(count):
            *_, last = samples(self.model, sigmas, gam=1.6, batchsize=len(part))
            found.append(last)
        return torch.cat(found) / 2 + 0.5


class StopAfter(Callback[Trainer]):
    """Ends the training after some seconds, counted from its start: the choice of execution takes part of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start, self.images, self.over = seconds, math.inf, 0, False

    def started(self, trainer: Trainer) -> None:
        self.start = time.perf_counter()

    def stepped(self, trainer: Trainer) -> None:
        self.images = trainer.images
        if time.perf_counter() - self.start >= self.seconds:
            self.over = True
            trainer.stop()


class Ours:
    """msdiff train with the preset of the data; the time includes held-out losses, checkpoints and the choice of execution."""

    default_steps = None

    def __init__(self, channels: int, side: int, data: str = "fashion-mnist", seed: int = 0) -> None:
        self.data, self.seed, self.folder = data, seed, tempfile.TemporaryDirectory()
        self.run: Any = None

    def fit(self, images: Tensor, seconds: float) -> tuple[int, int]:
        clock = StopAfter(seconds)
        config = override(preset(PRESETS[self.data]), {"training.seed": self.seed, "training.sample_every": 0})
        path = Path(self.folder.name) / "run"
        try:
            train(config, path, callbacks=[clock])
        except KeyboardInterrupt:  # how a training ends that is told to stop
            if not clock.over:
                raise
        self.run = Run.open(path)
        return clock.images, parameters(self.run.denoiser("latest").network)

    def draw(self, count: int, calls: int) -> Tensor:
        sampling = override(self.run.config(), {"sampling.calls": calls}).sampling
        return sample(self.run, count, sampling=sampling, checkpoint="latest") / 255.0


TOOLS: dict[str, Callable[[int, int], Tool]] = {
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": DenoisingDiffusion,
    "smalldiffusion": SmallDiffusion,
    "ours": Ours,
}


def machine() -> dict[str, Any]:
    cpu = torch.device("cpu")
    return {"device": device_name(cpu), "threads": torch.get_num_threads(), "torch": torch.__version__}


def parts(count: int) -> list[range]:
    """Split a number of samples into batches."""
    return [range(start, min(start + AT_ONCE, count)) for start in range(0, count, AT_ONCE)]


def as_bytes(images: Tensor) -> Tensor:
    """Return samples in [0, 1] as uint8."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def judge(images: Tensor, reference: Reference, data: str) -> dict[str, float]:
    """Return the distances of samples in [0, 1] to the training images."""
    metrics = ("frechet", "kid") if len(images) > FEW else ("frechet",)
    found = compare_samples(as_bytes(images), reference, get_features(FEATURES[data]), metrics=metrics)
    return {name: found.metrics[name].value for name in metrics}


def measured(
    name: str, data: ImageData, reference: Reference, seed: int, seconds: float, calls: Sequence[int], *, default: bool
) -> tuple[dict[str, Any], Tensor]:
    """Train a tool and judge its samples; return the figures and samples, uint8 (SHOWN, C, H, W), of the fewest calls."""
    torch.manual_seed(seed)
    channels, side, _ = data.shape
    tool = TOOLS[name](channels, side)
    if isinstance(tool, Ours):
        tool.data, tool.seed = data.name, seed
    seen, size = tool.fit(torch.from_numpy(data.array().copy()), seconds)
    result: dict[str, Any] = {
        "images": seen,
        "parameters": size,
        "samples": SAMPLES,
        "threads": torch.get_num_threads(),
    }
    shown = torch.empty(0)
    for number in sorted(calls):
        torch.manual_seed(seed)
        drawn = tool.draw(SAMPLES, number)
        shown = shown if len(shown) else drawn[:SHOWN]
        result[str(number)] = judge(drawn, reference, data.name)
    if default and tool.default_steps:
        result["default"] = {"calls": tool.default_steps, "samples": FEW} | judge(
            tool.draw(FEW, tool.default_steps), reference, data.name
        )
    return result, as_bytes(shown)


def table(known: dict[str, Any]) -> str:
    """Return the results as Markdown: mean over the seeds."""
    calls = sorted(
        {int(key) for runs in known["results"].values() for run in runs.values() for key in run if key.isdigit()}
    )
    lines = [
        f"| tool | minutes | images seen | parameters | {' | '.join(f'Fréchet distance at {c} calls' for c in calls)} | seeds |",
        "|---" * (5 + len(calls)) + "|",
    ]
    for key, runs in known["results"].items():
        name, minutes = key.rsplit(", ", 1)
        seen = sum(run["images"] for run in runs.values()) / len(runs)
        size = next(iter(runs.values()))["parameters"]
        numbers = " | ".join(distance(runs, count) for count in calls)
        lines.append(f"| {name} | {minutes} | {seen:,.0f} | {size / 1e6:.2f} M | {numbers} | {len(runs)} |")
    return "\n".join(lines)


def distance(runs: dict[str, Any], calls: int) -> str:
    """Return the mean Fréchet distance over the seeds as text; a dash if it was not measured."""
    found = [run[str(calls)]["frechet"] for run in runs.values() if str(calls) in run]
    return f"{sum(found) / len(found):.3f}" if found else "-"


def picture(known: dict[str, Any], folder: Path) -> Figure:
    """Return the first samples of each tool, one below the other, with its distance."""
    rows = [(key, folder / f"peers-{key.rsplit(', ', 1)[0]}.png") for key in known["results"]]
    rows = [row for row in rows if row[1].exists()]
    figure = Figure(figsize=(9, 1.5 * len(rows)), layout="constrained")
    for number, (key, path) in enumerate(rows):
        name, minutes = key.rsplit(", ", 1)
        calls = min(int(k) for run in known["results"][key].values() for k in run if k.isdigit())
        axes = figure.add_subplot(len(rows), 1, number + 1)
        axes.imshow(np.asarray(Image.open(path)), cmap="gray", vmin=0, vmax=255)
        axes.set_title(
            f"{name}: {minutes} minutes, Fréchet distance {distance(known['results'][key], calls)}",
            fontsize=9,
            loc="left",
        )
        axes.axis("off")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=PRESETS, default="fashion-mnist")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each tool and seed")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS), help="of the fast samplers")
    parser.add_argument("--default", choices=("first", "never"), default="first", help="seed of the default samplers")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    known = read_json(args.out) if args.out.exists() else {"machine": machine(), "results": {}}
    if not args.report:
        train_all(args, known)
    FigureCanvasAgg(figure := picture(known, args.out.parent))
    figure.savefig(args.out.with_suffix(".png"), dpi=120)
    print(table(known))


def train_all(args: argparse.Namespace, known: dict[str, Any]) -> None:
    """Train and judge the tools that are not known yet."""
    os.environ["TQDM_DISABLE"] = "1"  # before the tools are imported
    source = DataConfig(source=args.data)
    data, _ = open_data(source.source).split(source.held_out)
    reference = make_reference(
        get_features(FEATURES[args.data]), data, data=data.name, fingerprint=data.fingerprint, keep=10_000
    )
    for seed in args.seeds:
        for name in args.tools:
            runs = known["results"].setdefault(f"{name}, {args.minutes:g}", {})
            if str(seed) in runs:
                continue
            default = args.default == "first" and seed == args.seeds[0]
            result, shown = measured(name, data, reference, seed, 60 * args.minutes, args.calls, default=default)
            runs[str(seed)] = copy.deepcopy(result)
            write_json(args.out, known)
            if seed == args.seeds[0]:
                save_png(grid(shown, columns=SHOWN // 2, scale=1), args.out.with_name(f"peers-{name}.png"))


if __name__ == "__main__":
    main()
