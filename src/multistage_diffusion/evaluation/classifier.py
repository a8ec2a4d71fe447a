"""A small convolutional classifier of Fashion-MNIST, shipped with its weights, for features without a download.

Its features depend on the kind and shape of a garment; pixels depend only on brightness at fixed positions. Its Fréchet
distances compare models of Fashion-MNIST with each other and are not Inception FID.
"""

from __future__ import annotations

import hashlib
from importlib import resources

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from .checks import check_images
from .registry import FEATURES, FeatureExtractor

SIZE = 28  # height and width of the classifier's input
CLASSES = 10
_WEIGHTS = "weights/fashion_classifier.safetensors"


class FashionClassifier(nn.Module):
    """Five 3x3 convolutions (two with stride 2) with BatchNorm and ReLU, spatial average, Linear; 279,000 weights."""

    widths = (32, 64, 64, 128, 128)
    strides = (1, 2, 1, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip((1, *self.widths), self.widths, self.strides, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.widths[-1], CLASSES)

    def features(self, x: Tensor) -> Tensor:
        """Map prepared images (B, 1, 28, 28) to features (B, 128), >= 0."""
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled

    def forward(self, x: Tensor) -> Tensor:
        """Map prepared images (B, 1, 28, 28) to logits (B, 10)."""
        logits: Tensor = self.head(self.features(x))
        return logits


def prepare(images: Tensor) -> Tensor:
    """Map uint8 images (N, 1 or 3, H, W) to the classifier's input: grey in [-1, 1], (N, 1, 28, 28), antialiased."""
    x = images.to(torch.float32).mean(dim=1, keepdim=True) / 127.5 - 1.0
    if x.shape[2:] != (SIZE, SIZE):
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
    return x


def pretrained() -> tuple[FashionClassifier, str]:
    """Return the classifier with its shipped weights, and the first 12 hex digits of their SHA-256."""
    data = resources.files(__package__).joinpath(_WEIGHTS).read_bytes()
    model = FashionClassifier()
    model.load_state_dict({name: value.to(torch.float32) for name, value in load(data).items()})
    return model.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()[:12]


@FEATURES.add("fashion-classifier")
class ClassifierFeatures(FeatureExtractor):
    """Features before the last layer of a small Fashion-MNIST classifier that ships with the package."""

    title = "fashion-classifier"
    comparable_to = "other figures of these features; not comparable with Inception FID"
    preprocessing = f"grey in [-1, 1], scaled to {SIZE}x{SIZE} (bilinear, antialiased)"
    activation_bytes = 250_000  # measured on the CPU
    has_logits = True

    def __init__(self) -> None:
        self.model, self.digest = pretrained()

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to float32 (N, 128), >= 0."""
        check_images("images", images)
        self.model.to(images.device)
        return self.model.features(prepare(images))

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 128) to the logits of the ten classes, float32 (N, 10)."""
        logits: Tensor = self.model.head(features)
        return logits
