"""Feature functions of the metrics. Every result records the name of its feature function."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from ..data.rows import Rows, batches
from ..errors import UserError, out_of_memory
from ..progress import Progress
from ..reading import require_file
from .classifier import SIZE, prepare, pretrained
from .consent import agreed, is_script
from .image_check import check_images

EXTRACT_BATCH = 256  # images per extractor call; bounds the memory of a network's activations


class PixelFeatures:
    """The pixels as features: no download, but sensitive only to brightness at fixed positions."""

    name: str = "pixels"
    comparable_to: str = "pixel distances of the same data set only; not comparable with Inception FID"
    preprocessing: str = "images at their own size, in [-1, 1]"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float32 (N, C*H*W) in [-1, 1].

        Raises:
            UserError: if the images are not uint8 (N, C, H, W).
        """
        check_images("images", images)
        return images.flatten(1).to(torch.float32) / 127.5 - 1.0


class ClassifierFeatures:
    """Features before the last layer of a small Fashion-MNIST classifier that ships with the package."""

    comparable_to: str = "other figures of these features; not comparable with Inception FID"
    preprocessing: str = f"grey in [-1, 1], scaled to {SIZE}x{SIZE} (bilinear, antialiased)"

    def __init__(self) -> None:
        self.model, digest = pretrained()
        self.name = f"fashion-classifier ({digest})"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to float32 (N, 128), >= 0."""
        check_images("images", images)
        self.model.to(images.device)
        return self.model.features(prepare(images))

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 128) to the logits of the ten classes, float32 (N, 10)."""
        logits: Tensor = self.model.head(features)
        return logits


class ScriptFeatures:
    """A user's TorchScript module that maps uint8 images (N, C, H, W) to features (N, D).

    Args:
        file: the module; it is code, which may read and write files.
        named: True if the user named the file in this call; False if a configuration, perhaps another user's, names it.

    Raises:
        UserError: if it is not a TorchScript file, or `named` is False and the user has not named it on this machine.
    """

    comparable_to: str = "other figures of the same file only"
    preprocessing: str = "the file's own"

    def __init__(self, file: Path, *, named: bool = True) -> None:
        if file.exists():
            require_file(file)
        try:
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if not named and not agreed(digest):
                raise UserError(
                    f"features={str(file)!r}: is code that the configuration names; if you trust the file, name it "
                    f"yourself once: --set evaluation.features={file}"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated format, but it needs no Python class
                self._module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except OSError as error:
            raise UserError(f"features={str(file)!r}: {error.strerror or error}; name a TorchScript file") from None
        except RuntimeError:
            raise UserError(
                f"features={str(file)!r}: not a TorchScript file; write one with torch.jit.script(module).save(...)"
            ) from None
        self.name = f"torchscript {file.name} ({digest[:12]})"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to features (N, D).

        Raises:
            UserError: if the module raises, or returns anything but finite floats (N, D).
        """
        check_images("images", images)
        try:
            with torch.no_grad():
                features = self._module.to(images.device)(images)
        except (RuntimeError, torch.jit.Error) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{self.name}: refuses uint8 images {tuple(images.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{self.name}: answers {len(images)} images with {shape}, not with ({len(images)}, D)")
        if not features.is_floating_point() or not bool(torch.isfinite(features).all()):
            raise UserError(
                f"{self.name}: its features are {features.dtype}, or not all finite; they must be finite floats"
            )
        return features


# Features that need no download; published networks are in fidelity.py.
FEATURES: dict[str, Callable[[], FeatureExtractor]] = {
    "pixels": PixelFeatures,
    "fashion-classifier": ClassifierFeatures,
}
PUBLISHED = ("inception", "vgg16", "dinov2")


def get_features(name: str, weights: Path | None = None, *, named: bool = True) -> FeatureExtractor:
    """Return a feature extractor.

    Args:
        name: "pixels", "fashion-classifier", "inception", "vgg16", "dinov2", or a TorchScript file (.pt, .pth, .ts).
        weights: a file with weights of "inception" or "vgg16"; None: downloaded at the first use.
        named: True if the user chose the name in this call; False if a configuration did. If False, a TorchScript file,
            which is code, is loaded only if the user has named it before on this machine (see `consent.agree`).

    Raises:
        UserError: for an unknown name (listing the known ones), or if weights or a required package are missing.
    """
    if name in PUBLISHED:
        from .fidelity import FidelityFeatures

        return FidelityFeatures(name, weights)
    if weights is not None:
        raise UserError(f"features={name!r} takes no weights; {weights} is for inception or vgg16")
    if is_script(name):
        return ScriptFeatures(Path(name).expanduser(), named=named)
    if name not in FEATURES:
        raise UserError(
            f"features={name!r} is unknown; choose one of {', '.join((*FEATURES, *PUBLISHED))}, or a TorchScript file (.pt)"
        )
    return FEATURES[name]()


def extract(
    extractor: FeatureExtractor,
    images: Tensor | Rows,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Map uint8 images (N, C, H, W) to features (N, D), batch by batch.

    Args:
        extractor: feature function.
        images: a tensor on any device, or the rows of a data set, read batch by batch.
        device: device of the computation and the result; None: the images' device.
        progress: called with (images done, N).
    """
    features = []
    for batch in batches(images, EXTRACT_BATCH):
        features.append(extractor(batch if device is None else batch.to(device)))
        if progress is not None:
            progress(sum(map(len, features)), len(images))
    return torch.cat(features)
