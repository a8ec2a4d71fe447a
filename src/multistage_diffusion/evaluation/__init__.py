"""Metrics on feature functions."""

from .features import FEATURES, ClassifierFeatures, PixelFeatures, extract, get_features
from .metrics import (
    EvaluationResult,
    Memorisation,
    evaluate_samples,
    frechet_distance,
    memorisation,
    nearest,
    precision_recall,
)
from .statistics import Moments, frechet_between, image_moments, moments

__all__ = [
    "FEATURES",
    "ClassifierFeatures",
    "EvaluationResult",
    "Memorisation",
    "Moments",
    "PixelFeatures",
    "evaluate_samples",
    "extract",
    "frechet_between",
    "frechet_distance",
    "get_features",
    "image_moments",
    "memorisation",
    "moments",
    "nearest",
    "precision_recall",
]
