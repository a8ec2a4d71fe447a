"""Speed of a transformer's training step, beside torch.mm at its own shapes and diffusers' DiT of equal FLOPs.

Run it as: python benchmarks/transformer_step.py [--families NAME ...] [--batch N] [--steps N] [--device DEVICE] [--out [FILE]]

The network: 3x32x32, patch 2, width 256, heads of 64, three stages of equal width (encoder of 4 blocks, decoders of 4, 3
and 2), EDM preconditioning, trained by the real trainer on random images. In the same process its peer, a
DiTTransformer2DModel of width 256 with as many blocks as bring its FLOPs nearest, is trained by an ordinary loop: scheduler,
mse_loss, AdamW, EMAModel. Rounds of both and of torch.mm alternate, the median of each counts.

torch.mm at the network's own shapes: for every linear layer of the step, its product and the two products of its backward
pass, each timed on matrices of these sizes; rate = FLOPs of all of them / their time. The step's rate counts 3 times the
forward FLOPs, attention products included. A quiet machine is needed: the figures are of two cores without other work.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
from common import keep, parser
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import Rounds, ordinary_loop

from multistage_diffusion import override, preset
from multistage_diffusion.config import NetworkConfig, RunConfig
from multistage_diffusion.data import ImageData
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.nets.network import MultiDecoderNetwork, meta_network, meta_run
from multistage_diffusion.performance.devices import keep_memory, resolve_device
from multistage_diffusion.performance.roofline import _seconds
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "transformer_step.json"
SHAPE, WIDTH, HEAD = (3, 32, 32), 256, 64
Product = tuple[int, int, int]  # rows, features in and features out of a linear layer


def configuration(family: str, batch: int) -> RunConfig:
    """Return the run that is measured."""
    network = NetworkConfig.of(
        family,
        encoder_width=WIDTH,
        decoder_widths=(WIDTH,) * 3,
        encoder_depth=4,
        decoder_depths=(4, 3, 2),
        head_channels=HEAD,
        size=SHAPE[1:],
    )
    quiet = {"training.held_out_every": 0, "training.sample_every": 0, "training.checkpoint_every": 10**9}
    settings = {"network": network, "training.batch": batch, "training.log_every": 10**9, "training.steps": 10**6}
    return override(preset("uvit-small-32"), {**quiet, **settings, "training.precision": "auto"})


def linear_products(network: NetworkConfig, counts: Sequence[int]) -> Counter[Product]:
    """Return how often a step's forward pass computes each product of a linear layer, with so many rows of each stage."""
    found: Counter[Product] = Counter()

    def note(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = inputs[0].numel() // layer.in_features
        found[rows, layer.in_features, layer.out_features] += 1

    built: MultiDecoderNetwork = meta_network(network)
    for layer in built.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(note)  # type: ignore[arg-type]
    meta_run(built, *SHAPE[1:], counts)
    return found


def products_rate(products: Counter[Product], device: torch.device, dtype: torch.dtype) -> float:
    """Return torch.mm's FLOPs per second over the products of a step, forward and backward."""
    flops, seconds = 0.0, 0.0
    for (rows, features_in, features_out), times in products.items():
        x, w, g = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((rows, features_in), (features_in, features_out), (rows, features_out))
        )

        def three(x: Tensor = x, w: Tensor = w, g: Tensor = g) -> None:
            torch.mm(x, w), torch.mm(g, w.T), torch.mm(x.T, g)

        flops += times * 6 * rows * features_in * features_out
        seconds += times * _seconds(three, device)
    return flops / seconds


def peer(depth: int) -> Any:
    """Return diffusers' DiT of so many blocks."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=WIDTH // HEAD,
        attention_head_dim=HEAD,
        in_channels=SHAPE[0],
        num_layers=depth,
        sample_size=SHAPE[1],
        num_embeds_ada_norm=1,
    )


def peer_flops(depth: int) -> float:
    """Return a peer's FLOPs of a forward pass of one image, as torch counts them."""
    model, image, zero = peer(depth).eval(), torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.long)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        model(image, timestep=zero, class_labels=zero)
    return float(counter.get_total_flops())


def fitting_depth(flops: float) -> tuple[int, float]:
    """Return the number of blocks whose FLOPs are nearest, and their FLOPs."""
    one, two = peer_flops(1), peer_flops(2)
    depth = max(1, round(1 + (flops - one) / (two - one)))
    return depth, one + (depth - 1) * (two - one)


def measure(family: str, device: torch.device, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return what is kept of one family."""
    config = configuration(family, batch)
    cost = network_cost(config.network, *SHAPE[1:])
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (512, *SHAPE), dtype=np.uint8)
        trainer = Trainer(Run.create(Path(folder) / "run", config), ImageData(pixels, None, "random"), device=device)
        counts = trainer.allocation.counts
        flops = sum(n * s.true_flops for n, s in zip(counts, cost.stages, strict=True)) / batch
        depth, their_flops = fitting_depth(flops)
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        loop = ordinary_loop(peer(depth), SHAPE, batch, device, trainer.passes.autocast, class_labels=labels)
        dtype, products = trainer.passes.autocast or torch.float32, linear_products(config.network, counts)
        mm: Callable[[], Any] = lambda: products_rate(products, device, dtype)  # noqa: E731
        clock_ = Rounds(steps, rounds, loop, mm)
        trainer.callbacks.append(clock_)
        trainer.save = lambda *_: None  # type: ignore[method-assign]
        trainer.fit()
    ours, theirs = median_low(clock_.ours), median_low(clock_.theirs)
    matrix: float = median_low(clock_.rooflines)  # type: ignore[type-var]
    rate, their_rate = 3 * flops * batch / ours, 3 * their_flops * batch / theirs
    return {
        "batch": batch,
        "rows": list(counts),
        "execution": trainer.passes.execution,
        "flops_per_image": flops,
        "images_per_s": batch / ours,
        "gflops_per_s": rate / 1e9,
        "matrix_gflops_per_s": matrix / 1e9,
        "share_of_matrix": rate / matrix,
        "peer": {
            "blocks": depth,
            "flops_per_image": their_flops,
            "images_per_s": batch / theirs,
            "share_of_matrix": their_rate / matrix,
        },
        "ratio_per_flop": rate / their_rate,
    }


def report(family: str, r: dict[str, Any]) -> None:
    """Print what was measured."""
    print(
        f"{family}: {r['images_per_s']:.1f} images/s at {r['flops_per_image'] / 1e6:.0f} MFLOPs, "
        f"{r['gflops_per_s']:.1f} GFLOP/s: {r['share_of_matrix']:.0%} of torch.mm at its own shapes, computed "
        f"{r['execution'].words()}\n  {r['ratio_per_flop']:.2f} times diffusers' DiT per FLOP ({r['peer']['blocks']} blocks, "
        f"{r['peer']['flops_per_image'] / 1e6:.0f} MFLOPs, {r['peer']['share_of_matrix']:.0%} of torch.mm)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    options = parser(__doc__, 6, RESULT)
    options.add_argument("--families", nargs="+", default=["uvit", "dit"])
    options.add_argument("--batch", type=int, default=48)
    options.add_argument("--steps", type=int, default=2, help="steps of a round")
    args = options.parse_args(arguments)
    device = resolve_device(args.device)
    keep_memory(device)  # as the command line does
    found = {}
    for family in args.families:
        found[family] = measure(family, device, args.batch, args.steps, args.rounds)
        report(family, found[family])
    if args.out is not None:
        keep(args.out, device, found)


if __name__ == "__main__":
    main()
