"""Metrics on feature functions."""

from .features import FEATURES, PixelFeatures, get_features
from .metrics import (
    EvaluationResult,
    Memorisation,
    evaluate_samples,
    frechet_distance,
    memorisation,
    nearest,
    precision_recall,
)

__all__ = [
    "FEATURES",
    "EvaluationResult",
    "Memorisation",
    "PixelFeatures",
    "evaluate_samples",
    "frechet_distance",
    "get_features",
    "memorisation",
    "nearest",
    "precision_recall",
]
