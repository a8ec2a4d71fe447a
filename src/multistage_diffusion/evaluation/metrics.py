"""Comparison of samples with real images: Fréchet distance, precision and recall, memorisation, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from ..data.rows import Rows, batches, taken
from ..errors import UserError
from ..rng import generator
from .features import PixelFeatures, extract
from .image_check import check_images, image_shape
from .statistics import frechet_between, moments

PERCENTILE = 5.0  # of held-out images counted as "near a training image"
CHUNK = 256  # rows compared at a time: their distances to thousands of others fit into the CPU cache
_ROUGH = 1e-5  # bound of the relative error of |b|² - 2 a·b in float32, valid for thousands of dimensions
_PAIRS = 1 << 16  # pairs of rows compared at a time in float64
_ROUNDING = 1e-12  # bound of the relative error of |a|² + |b|² - 2 a·b in float64, valid for thousands of dimensions


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets (Dowson & Landau 1982; FID, Heusel et al. 2017).

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.

    Returns:
        The distance (a squared length), >= 0, in squared units of the features.

    Raises:
        UserError: for unequal D, D > 4096, fewer than 2 rows, or values that are not finite.
    """
    _check_pair(a, b, rows=2)
    return frechet_between(moments(a), moments(b))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = CHUNK) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 1 and 2).

    The manifold of a set is the union of closed balls around its points. The radius of a ball is the distance to the
    point's k-th nearest other point. Precision is the share of fake features in the real manifold. Recall is the share
    of real features in the fake manifold.

    Args:
        real: features (N, D), N > k.
        fake: features (M, D), M > k.
        k: number of neighbours.
        chunk: rows compared at a time; bounds the memory.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        UserError: for unequal D, k < 1, k >= N or M, or values that are not finite.
    """
    if k < 1 or k >= min(len(real), len(fake)):
        raise UserError(
            f"k={k} must be at least 1 and below the number of features ({len(real)} real, {len(fake)} fake)"
        )
    _check_pair(real, fake, rows=2)
    return _covered(real, fake, _reach(real, k, chunk), _reach(fake, k, chunk), chunk)


def nearest(a: Tensor, b: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Find the nearest row of b (Euclidean) for every row of a; ties give the first row.

    Args:
        a: features (N, D).
        b: features (M, D), M >= 1.
        chunk: rows of a compared at a time with 16 * chunk rows of b; bounds the memory.

    Returns:
        (distance, index): float64 (N,) and int64 (N,).

    Raises:
        UserError: for unequal D, no rows, or values that are not finite.
    """
    _check_pair(a, b, rows=1)
    return _nearest_in(a, torch.split(b, 16 * chunk), chunk)


def nearest_image(images: Tensor | Rows, among: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Find the nearest image of `among` (Euclidean distance of pixels in [-1, 1]) for every image; ties give the first.

    Args:
        images: uint8 (N, C, H, W), N >= 1.
        among: uint8 (M, C, H, W), M >= 1. Parts of both are read at a time.

    Returns:
        (distance, index): float64 (N,) and int64 (N,).

    Raises:
        UserError: for images of another type, or none.
    """
    for name, given in (("images", images), ("among", among)):
        check_images(name, given)
    pixels, rows = PixelFeatures(), 16 * CHUNK
    found = [_nearest_in(pixels(part), map(pixels, batches(among, rows)), CHUNK) for part in batches(images, rows)]
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _nearest_in(a: Tensor, parts: Iterable[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """Return what `nearest` does; `parts` are consecutive rows of b."""
    best = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    start = 0
    for part in parts:
        for row in range(0, len(a), chunk):
            rows = slice(row, row + chunk)
            squared, at = _nearest_of(a[rows], part)
            nearer = squared < best[rows]
            best[rows] = torch.where(nearer, squared, best[rows])
            index[rows] = torch.where(nearer, at + start, index[rows])
        start += len(part)
    return best.sqrt(), index


def _nearest_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every row of a the smallest squared distance to b, float64, and the first row of b that has it.

    Float32 products select the candidate rows within rounding error. Only the candidates are compared in float64.
    """
    norms_a, norms_b = (x.to(torch.float32).square().sum(dim=1) for x in (a, b))
    rough = torch.addmm(norms_b[None], a.to(torch.float32), b.to(torch.float32).T, alpha=-2)
    slack = _ROUGH * (norms_a + norms_b.max())
    least = rough.min(dim=1).values
    row, column = (rough <= (least + slack)[:, None]).nonzero(as_tuple=True)
    exact = torch.cat(
        [
            (a[r].to(torch.float64) - b[c].to(torch.float64)).square().sum(dim=1)
            for r, c in zip(torch.split(row, _PAIRS), torch.split(column, _PAIRS), strict=True)
        ]
    )
    squared = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    squared = squared.scatter_reduce(0, row, exact, "amin")
    ties = exact == squared[row]
    at = torch.full((len(a),), len(b), dtype=torch.int64, device=a.device)
    return squared, at.scatter_reduce(0, row[ties], column[ties], "amin")


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """The share of samples that are close to a training image.

    Attributes:
        share: share of samples within `threshold` of a training image, in [0, 1].
        held_out_share: the same for held-out images; about 0.05 by definition of the threshold.
        threshold: 5th percentile of the held-out images' distances to their nearest training images.
        distance: distance of each sample to its nearest training image, float64 (N,); Euclidean, pixels in [-1, 1].
        index: index of that training image, int64 (N,).
    """

    share: float
    held_out_share: float
    threshold: float
    distance: Tensor
    index: Tensor


def memorisation(samples: Tensor, train: Tensor | Rows, held_out: Tensor | Rows) -> Memorisation:
    """Compare the pixel distances of samples to training images with those of held-out images.

    Args:
        samples: uint8 (N, C, H, W).
        train: uint8 (M, C, H, W), the images trained on.
        held_out: uint8 (K, C, H, W), real images not trained on.

    Raises:
        UserError: for images of another type or of unequal shapes.
    """
    _check_sets(samples, train, held_out)
    distance, index = nearest_image(samples, train)
    own, _ = nearest_image(held_out, train)
    threshold = torch.quantile(own, PERCENTILE / 100)
    return Memorisation(
        share=float((distance <= threshold).double().mean()),
        held_out_share=float((own <= threshold).double().mean()),
        threshold=float(threshold),
        distance=distance,
        index=index,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Metrics of one evaluation, with the settings needed to interpret them.

    `*_real` is the value for real images: training images replace the samples, at the same count.

    Attributes:
        extractor, comparable_to: features of the Fréchet distance, precision and recall.
        preprocessing: processing of the images before the extractor.
        samples, train, held_out: number of images given.
        count: images per set for the Fréchet distance, precision and recall.
        splits: number of random draws of `count` images over which these are averaged.
        dims: feature dimensions.
        rank_deficient: count <= dims, so covariances are singular; interpret `frechet` only beside `frechet_real`.
        k: neighbours of precision and recall.
        memorised, memorised_held_out, memorised_threshold: see `Memorisation`.
        frechet_reconstructed: Fréchet distance between held-out images passed through a latent run's codec and training
            images, the best that its samples could reach; None for a run on pixels.
    """

    extractor: str
    comparable_to: str
    preprocessing: str
    samples: int
    train: int
    held_out: int
    count: int
    splits: int
    seed: int
    dims: int
    rank_deficient: bool
    k: int
    frechet: float
    frechet_real: float
    precision: float
    precision_real: float
    recall: float
    recall_real: float
    memorised: float
    memorised_held_out: float
    memorised_threshold: float
    frechet_reconstructed: float | None = None


def evaluate_samples(
    samples: Tensor,
    train: Tensor | Rows,
    held_out: Tensor | Rows,
    extractor: FeatureExtractor,
    *,
    k: int = 3,
    count: int | None = None,
    splits: int = 5,
    seed: int = 0,
    reconstructed: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> EvaluationResult:
    """Compare samples with held-out images, and training images with held-out images in the same way.

    The Fréchet distance decreases with the number of images, so each split draws the same number from all three sets.
    The training and held-out draws are disjoint sets of real images; their values are those of a perfect model.

    Args:
        samples: uint8 (N, C, H, W).
        train: uint8 (M, C, H, W), the images trained on.
        held_out: uint8 (K, C, H, W), real images not trained on.
        extractor: feature function.
        k: neighbours of precision and recall.
        count: images drawn from each set; default: the size of the smallest set.
        splits: number of draws to average over.
        seed: seed of the draws.
        reconstructed: uint8 (K, C, H, W), the held-out images encoded and decoded by the samples' codec, if any.
        device: where features are computed.

    Raises:
        UserError: for unequal shapes, too few images, or features that the metrics do not accept.
    """
    _check_sets(samples, train, held_out)
    smallest = min(len(samples), len(train), len(held_out))
    count = smallest if count is None else count
    if not k < count <= smallest:
        raise UserError(
            f"count={count} must be above k={k} and at most {smallest}, the smallest of {len(samples)} samples, "
            f"{len(train)} training and {len(held_out)} held-out images"
        )
    if splits < 1:
        raise UserError(f"splits={splits} must be at least 1")
    sets = (samples, train, held_out)
    draws = [_drawn([len(images) for images in sets], count, seed, split) for split in range(splits)]
    features = [
        _extract_drawn(extractor, *pair, device=device) for pair in zip(sets, zip(*draws, strict=True), strict=True)
    ]
    scored = [_scores(fake, real, reference, k) for fake, real, reference in zip(*features, strict=True)]
    scores = torch.tensor(scored, dtype=torch.float64)
    frechet, frechet_real, precision, recall, precision_real, recall_real = scores.mean(dim=0).tolist()
    through_codec = None
    if reconstructed is not None:
        _check_sets(reconstructed, train, held_out)
        sizes = [len(reconstructed), len(train), len(held_out)]
        fakes = [_drawn(sizes, count, seed, split)[0] for split in range(splits)]
        coded = _extract_drawn(extractor, reconstructed, fakes, device=device)
        through_codec = sum(map(frechet_distance, coded, features[1])) / splits
    copies = memorisation(samples, train, held_out)
    dims = features[0][0].shape[1]
    return EvaluationResult(
        extractor=extractor.name,
        comparable_to=extractor.comparable_to,
        preprocessing=f"uint8 images of {' x '.join(map(str, samples.shape[1:]))} (C x H x W): {extractor.preprocessing}",
        samples=len(samples),
        train=len(train),
        held_out=len(held_out),
        count=count,
        splits=splits,
        seed=seed,
        dims=dims,
        rank_deficient=count <= dims,
        k=k,
        frechet=frechet,
        frechet_real=frechet_real,
        precision=precision,
        precision_real=precision_real,
        recall=recall,
        recall_real=recall_real,
        memorised=copies.share,
        memorised_held_out=copies.held_out_share,
        memorised_threshold=copies.threshold,
        frechet_reconstructed=through_codec,
    )


def _scores(fake: Tensor, real: Tensor, reference: Tensor, k: int) -> tuple[float, ...]:
    """Score one draw: Fréchet distances of fake and real, then precision and recall of fake, then of real."""
    for drawn in (fake, real):
        _check_pair(drawn, reference, rows=2)
    known = moments(reference)
    reach = _reach(reference, k, CHUNK)
    return (
        frechet_between(moments(fake), known),
        frechet_between(moments(real), known),
        *_covered(reference, fake, reach, _reach(fake, k, CHUNK), CHUNK),
        *_covered(reference, real, reach, _reach(real, k, CHUNK), CHUNK),
    )


def _drawn(sizes: Sequence[int], count: int, seed: int, split: int) -> list[Tensor]:
    """Draw the indices of `count` samples, training images and held-out images each."""
    order = [generator((seed, "evaluation", split, which)) for which in ("samples", "train", "held-out")]
    return [torch.randperm(size, generator=g)[:count] for size, g in zip(sizes, order, strict=True)]


def _extract_drawn(
    extractor: FeatureExtractor, images: Tensor | Rows, draws: Sequence[Tensor], *, device: torch.device | str
) -> list[Tensor]:
    """Return the features of every draw, on the CPU; each drawn image is processed once, others never."""
    used, where = torch.unique(torch.cat(list(draws)), return_inverse=True)
    features = extract(extractor, taken(images, used), device=device).cpu()
    return [features[rows] for rows in where.split([len(draw) for draw in draws])]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|², float64 (N, M), exactly 0 for rows that are equal up to rounding."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    squared = norms - 2 * (a @ b.T)
    return torch.where(squared > _ROUNDING * norms, squared, 0.0)


def _reach(centres: Tensor, k: int, chunk: int) -> Tensor:
    """Return the squared distance of every row to its k-th nearest other row, float64 (N,)."""
    # k + 1 because every centre is its own nearest row
    radii = [
        _squared_distances(c, centres).topk(k + 1, largest=False).values[:, -1] for c in torch.split(centres, chunk)
    ]
    return torch.cat(radii) * (1 + 1e-9)  # balls are closed: rounding must not exclude boundary points


def _covered(real: Tensor, fake: Tensor, reach_real: Tensor, reach_fake: Tensor, chunk: int) -> tuple[float, float]:
    """Return the share of fake features in a ball of a real one, and of real features in a ball of a fake one."""
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = []
    for rows, reach in zip(torch.split(real, chunk), torch.split(reach_real, chunk), strict=True):
        squared = _squared_distances(rows, fake)
        precise |= (squared <= reach[:, None]).any(dim=0)
        recalled.append((squared <= reach_fake).any(dim=1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _check_pair(a: Tensor, b: Tensor, rows: int) -> None:
    for features in (a, b):
        if features.ndim != 2 or len(features) < rows:
            raise UserError(f"features: expected (N, D) with N >= {rows}, got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            raise UserError(f"features: {bad} of {len(features)} rows hold NaN or infinity")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features: {a.shape[1]} and {b.shape[1]} dimensions; both sets need the same")


def _check_sets(samples: Tensor, train: Tensor | Rows, held_out: Tensor | Rows) -> None:
    for name, images in (("samples", samples), ("train", train), ("held_out", held_out)):
        check_images(name, images)
        if image_shape(images) != image_shape(train):
            raise UserError(f"{name}: images of shape {image_shape(images)}, training {image_shape(train)}")
