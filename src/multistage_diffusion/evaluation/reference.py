"""Reference statistics: feature statistics of a set of real images, saved once and reused for many comparisons."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.rows import Rows, taken
from ..errors import UserError
from ..files import write_atomic
from ..progress import Progress
from ..reading import brief, parse_json, require_file
from ..records import FINITE, TEXT, WHOLE, check, listed, maybe
from ..rng import generator
from .checks import image_shape
from .extraction import dimensions, extract, image_moments
from .moments import Moments
from .registry import FeatureExtractor

FORMAT_VERSION = 1
KEPT = 10_000  # default number of images whose features are kept
_ABOUT = "msdiff"  # name of the array that describes the others, as JSON
_DESCRIPTION = ("extractor", "preprocessing", "data", "part", "fingerprint", "shape", "held_out")
_MEND = "; write one with msdiff stats"
_ABOUT_FIELDS = {
    **dict.fromkeys(("extractor", "preprocessing", "data", "part", "fingerprint"), maybe(TEXT)),
    "shape": maybe(listed(WHOLE)),
    "held_out": maybe(FINITE),
    "count": WHOLE,
}
_WORDS = {"mu": "mean", "sigma": "covariance"}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images.

    Attributes:
        moments: mean and covariance of the features; its count is 0 if the file does not contain it.
        source: the file, or a description of the images.
        extractor, preprocessing: the features; None if the file does not contain them (EDM's).
        data, part, fingerprint, shape: name of the data set, part of it ("all", "train", "held-out"), fingerprint of
            the full data set and (C, H, W) of an image; None if the file does not contain them.
        held_out: held-out share of the data set, if `part` is not "all".
        features: features of some of the images, float32 (M, D), for precision, recall and KID; None if not kept.
    """

    moments: Moments
    source: str
    extractor: str | None = None
    preprocessing: str | None = None
    data: str | None = None
    part: str | None = None
    fingerprint: str | None = None
    shape: tuple[int, ...] | None = None
    held_out: float | None = None
    features: Tensor | None = None

    def require(self, extractor: FeatureExtractor, fingerprint: str, shape: tuple[int, ...]) -> None:
        """Check that samples can be compared with these statistics.

        Values that the file does not contain are not compared. The number of feature dimensions is always compared.

        Args:
            extractor: extractor of the samples' features.
            fingerprint: fingerprint of the full data set that the samples imitate.
            shape: (C, H, W) of the samples.

        Raises:
            UserError: naming the value that differs.
        """
        for name, own, other in (
            ("features", self.extractor, extractor.name),
            ("preprocessing", self.preprocessing, extractor.preprocessing),
            ("image shape (C, H, W)", self.shape, tuple(shape)),
            ("data fingerprint", self.fingerprint, fingerprint),
        ):
            if own is not None and own != other:
                raise UserError(
                    f"{self.source}: computed with {name} {own}, but the samples have {other}; write another with msdiff stats"
                )
        dims = dimensions(extractor, shape)
        if dims != len(self.moments.mean):
            raise UserError(
                f"{self.source}: has {len(self.moments.mean)} feature dimensions, but {extractor.name} has {dims}; write "
                "another with msdiff stats"
            )


def make_reference(
    extractor: FeatureExtractor,
    images: Tensor | Rows,
    *,
    data: str,
    fingerprint: str,
    part: str = "all",
    held_out: float | None = None,
    keep: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Reference:
    """Compute the statistics of real images.

    Args:
        extractor: feature function.
        images: uint8 (N, C, H, W), N >= 2, a tensor or the rows of a data set, read batch by batch.
        data: name of the data set.
        fingerprint: fingerprint of the full data set.
        part: part of the data set that the images are.
        held_out: held-out share of the data set, if the images are a part of it.
        keep: number of images, drawn at random, whose features are kept; at most N.
        device: where features are computed.
        progress: called with (images done, N).

    Raises:
        UserError: for fewer than 2 images, or images that the extractor does not accept.
    """
    if len(images) < 2:
        raise UserError(f"{data}: {len(images)} images have no covariance; statistics need at least 2")
    moments = image_moments(extractor, images, device=device, progress=progress)
    features = None
    if keep:
        chosen = torch.randperm(len(images), generator=generator(("reference", "kept")))[:keep]
        features = extract(extractor, taken(images, chosen), device=device).to("cpu", torch.float32)
    return Reference(
        moments=moments,
        source=f"{part} of {data}",
        extractor=extractor.name,
        preprocessing=extractor.preprocessing,
        data=data,
        part=part,
        fingerprint=fingerprint,
        shape=image_shape(images),
        held_out=held_out,
        features=features,
    )


def save_reference(reference: Reference, path: Path) -> None:
    """Write statistics as .npz: `mu`, `sigma`, optional `features`, and a JSON description.

    `mu` and `sigma` have the same names as in EDM's files, so EDM's scripts can read them.
    """
    about = {name: getattr(reference, name) for name in _DESCRIPTION} | {
        "format_version": FORMAT_VERSION,
        "count": reference.moments.count,
    }
    arrays: dict[str, Any] = {"mu": reference.moments.mean.numpy(), "sigma": reference.moments.covariance.numpy()}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    arrays[_ABOUT] = np.array(json.dumps(about))
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a statistics file: numeric arrays and the JSON description."""
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "features", _ABOUT) if name in file.files}
    except Exception as error:  # a damaged or hostile file can raise any exception type, also by claiming a huge size
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file of statistics"
        raise UserError(f"{path}: {reason}{_MEND}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in ("U" if name == _ABOUT else "iuf"):
            kind = f"{array.dtype} values" if isinstance(array, np.ndarray) else "no array"
            raise UserError(f"{path}: {name} holds {kind}, not {'text' if name == _ABOUT else 'numbers'}{_MEND}")
    return arrays


def _require_covariance(matrix: Tensor, path: Path) -> None:
    """Refuse a matrix that is not symmetric, or has eigenvalues below zero by more than rounding."""
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    symmetric = bool(((matrix - matrix.T).abs() <= 1e-6 * size).all())
    if not symmetric or float(matrix.diagonal().min()) < -1e-6 * size or _least_eigenvalue(matrix) < -1e-4 * size:
        raise UserError(
            f"{path}: sigma is not a covariance: it must be symmetric, without eigenvalues below zero{_MEND}"
        )


def _least_eigenvalue(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def load_reference(path: Path) -> Reference:
    """Read statistics written by `save_reference`, or EDM's (only `mu` and `sigma`).

    Raises:
        UserError: naming the file and its fault.
    """
    arrays = _arrays(path)
    about = (
        parse_json(str(arrays[_ABOUT]), path, f": not an .npz file of statistics; {_ABOUT} is not JSON")
        if _ABOUT in arrays
        else {}
    )
    if not isinstance(about, dict):
        raise UserError(f"{path}: {_ABOUT}: expected a mapping, got {brief(about)}{_MEND}")
    if about.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise UserError(f"{path}: format_version={brief(about['format_version'])}: this release reads {FORMAT_VERSION}")
    check(about, _ABOUT_FIELDS, str(path), optional=True, mend=_MEND)
    for name in ("mu", "sigma"):
        if name not in arrays:
            raise UserError(f"{path}: {name} is missing, the {_WORDS[name]} of features{_MEND}")
    mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    finite = all(bool(torch.isfinite(values).all()) for values in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not finite:
        raise UserError(
            f"{path}: mu of shape {tuple(mean.shape)} and sigma of shape {tuple(covariance.shape)} are not a mean and covariance "
            f"of the same features with finite values{_MEND}"
        )
    _require_covariance(covariance, path)
    features = None
    if "features" in arrays:
        features = torch.from_numpy(arrays["features"].astype(np.float32))
        if features.ndim != 2 or features.shape[1] != len(mean) or not bool(torch.isfinite(features).all()):
            raise UserError(
                f"{path}: features of shape {tuple(features.shape)} are not rows of {len(mean)} finite numbers{_MEND}"
            )
    description: dict[str, Any] = {name: about.get(name) for name in _DESCRIPTION}
    description["shape"] = None if description["shape"] is None else tuple(description["shape"])
    return Reference(
        moments=Moments(mean=mean, covariance=covariance, count=int(about.get("count", 0))),
        source=str(path),
        features=features,
        **description,
    )
