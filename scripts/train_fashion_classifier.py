"""Train the classifier whose features ship with the package (multistage_diffusion/evaluation/weights).

    python scripts/train_fashion_classifier.py [--data FOLDER] [--epochs 9] [--out FILE]

A quarter of the images is seen through a coarser grid (16 to 27 pixels), so that features of small samples mean something;
all are shifted by up to two pixels, half of them mirrored. Prints the accuracy on the 10,000 test images, as they are and
through 16x16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

import multistage_diffusion
from multistage_diffusion.data.sources.fashion_mnist import DEBIAN_FOLDER, read_idx
from multistage_diffusion.evaluation.classifier import SIZE, FashionClassifier, prepare
from multistage_diffusion.files import write_atomic

BATCH, LEARNING_RATE, SMOOTHING = 128, 4e-3, 0.05


def read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, 1, 28, 28) and labels of "train" or "t10k"."""
    images = torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3).copy())
    labels = torch.from_numpy(read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).copy())
    return images[:, None], labels.long()


def coarse(x: Tensor, size: int) -> Tensor:
    """Scale (B, 1, 28, 28) down to size and up again."""
    small = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, (SIZE, SIZE), mode="bilinear", antialias=True)


def augmented(x: Tensor, random: torch.Generator) -> Tensor:
    """Shift a batch, mirror every other row, look at every fourth through a coarser grid (rows come shuffled)."""
    dy, dx = torch.randint(0, 5, (2,), generator=random).tolist()
    x = F.pad(x, (2, 2, 2, 2), value=-1.0)[:, :, dy : dy + SIZE, dx : dx + SIZE].clone()
    x[::2] = x[::2].flip(-1)
    x[::4] = coarse(x[::4], int(torch.randint(16, SIZE, (1,), generator=random)))
    return x


@torch.no_grad()
def accuracy(model: FashionClassifier, images: Tensor, labels: Tensor, size: int = SIZE) -> float:
    """Return the share of images whose class is found, seen at a size."""
    model.eval()
    right = 0
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        seen = prepare(x) if size == SIZE else coarse(prepare(x), size)
        right += int((model(seen).argmax(dim=1) == y).sum())
    return right / len(images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--epochs", type=int, default=9)
    package = Path(multistage_diffusion.__file__).parent
    parser.add_argument("--out", type=Path, default=package / "evaluation/weights/fashion_classifier.safetensors")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    images, labels = read(args.data, "train")
    model = FashionClassifier().to(memory_format=torch.channels_last)
    steps = args.epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        for pick in torch.randperm(len(images), generator=random).split(BATCH)[: len(images) // BATCH]:
            x = augmented(prepare(images[pick]), random).to(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[pick], label_smoothing=SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{args.epochs}, {time.perf_counter() - start:.0f} s, loss {loss.item():.3f}", flush=True
        )
    # half precision halves the file; what is measured is what is shipped
    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.to(torch.float32) for name, value in weights.items()})
    test_images, test_labels = read(args.data, "t10k")
    figures = {str(size): accuracy(model, test_images, test_labels, size) for size in (28, 16)}
    print(f"accuracy on {len(test_images)} test images: {figures['28']:.4f}; through 16x16: {figures['16']:.4f}")
    write_atomic(
        args.out, save(weights, metadata={f"accuracy_{size}": f"{value:.4f}" for size, value in figures.items()})
    )
    print(f"written: {args.out} ({args.out.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
