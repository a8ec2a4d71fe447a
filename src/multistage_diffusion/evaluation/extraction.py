"""Extraction of features batch by batch, and the check that they fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.rows import Rows, batches
from ..errors import UserError
from ..memory import require_memory
from ..progress import Progress
from .checks import check_images
from .moments import MAX_DIMS, Moments
from .registry import FeatureExtractor

EXTRACT_BATCH = 256  # images per extractor call; bounds the memory of a network's activations


def require_features(
    field: str,
    extractor: FeatureExtractor,
    shape: Sequence[int],
    count: int,
    device: torch.device | str = "cpu",
    sets: int = 1,
) -> None:
    """Raise before the computation if features have too many dimensions or do not fit into memory.

    Args:
        field: the setting that chose the features, with its value, for the message.
        extractor: feature function; called with one black image.
        shape: (C, H, W) of the images.
        count: images per set.
        device: where features are computed.
        sets: number of sets whose features are in memory at the same time.

    Raises:
        UserError: if the extractor does not accept the images, D > 4096, or the free memory is too small.
    """
    try:
        dims = dimensions(extractor, shape, device)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    if dims > MAX_DIMS:
        size = " x ".join(map(str, shape))
        raise UserError(
            f"{field}: {dims} dimensions of images of {size} exceed {MAX_DIMS}; use other features, such as thumbnails"
        )
    needed = sets * 20 * count * dims + 5 * 8 * dims * dims  # float32, float64 and centred features; covariances, roots
    if torch.device(device).type == "cpu":
        needed += min(count, EXTRACT_BATCH) * extractor.activation_bytes
    require_memory(needed, f"count={count}, {field} of {dims} dimensions,", "take a smaller count, or other features")


def dimensions(extractor: FeatureExtractor, shape: Sequence[int], device: torch.device | str = "cpu") -> int:
    """Return the number of feature dimensions D for images of a shape (C, H, W), from a call with one black image."""
    return extractor(torch.zeros(1, *shape, dtype=torch.uint8, device=device)).shape[1]


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

    Raises:
        UserError: if features are not finite.
    """
    features = []
    for batch in batches(images, EXTRACT_BATCH):
        features.append(extractor(batch if device is None else batch.to(device)))
        if progress is not None:
            progress(sum(map(len, features)), len(images))
    found = torch.cat(features)
    bad = int((~torch.isfinite(found)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{extractor.name}: the features of {bad} of {len(images)} images hold NaN or infinity; check the images and "
            "the extractor"
        )
    return found


def logits(extractor: FeatureExtractor, features: Tensor, device: torch.device | str) -> Tensor:
    """Map features (N, D) to the logits (N, classes) of the extractor's classifier, on the CPU."""
    return extractor.logits(features.to(device)).cpu()


def image_moments(
    extractor: FeatureExtractor,
    images: Tensor | Rows,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Moments:
    """Return the moments of images' features, accumulated batch by batch without keeping all features in memory.

    Args:
        extractor: feature function.
        images: uint8 (N, C, H, W), N >= 2, a tensor on any device or the rows of a data set, read batch by batch.
        device: where features are computed.
        progress: called with (images done, N).

    Returns:
        Moments on the CPU.
    """
    check_images("images", images)
    shift: Tensor | None = None
    done, count = 0, len(images)
    for batch in batches(images, EXTRACT_BATCH):
        features = extractor(batch.to(device)).to(torch.float64)
        if shift is None:  # subtracting the first batch's mean reduces cancellation
            shift = features.mean(dim=0)
            total, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
        centred = features - shift
        total += centred.sum(dim=0)
        products += centred.T @ centred
        done += len(batch)
        if progress is not None:
            progress(done, count)
    assert shift is not None
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Moments(mean=(mean + shift).cpu(), covariance=covariance.cpu(), count=count)
