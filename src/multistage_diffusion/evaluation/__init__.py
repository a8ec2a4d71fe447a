"""Evaluation metrics on image features."""

from .comparison import ComparisonResult, check_count, compare_samples
from .consent import agree
from .features import FEATURES, ClassifierFeatures, PixelFeatures, extract, get_features
from .metrics import (
    EvaluationResult,
    Memorisation,
    evaluate_samples,
    frechet_distance,
    memorisation,
    nearest,
    nearest_image,
    precision_recall,
)
from .reference import Reference, load_reference, make_reference, save_reference
from .sharded import sharded
from .statistics import Moments, frechet_between, image_moments, moments, require_features

__all__ = [
    "FEATURES",
    "ClassifierFeatures",
    "ComparisonResult",
    "EvaluationResult",
    "Memorisation",
    "Moments",
    "PixelFeatures",
    "Reference",
    "agree",
    "check_count",
    "compare_samples",
    "evaluate_samples",
    "extract",
    "frechet_between",
    "frechet_distance",
    "get_features",
    "image_moments",
    "load_reference",
    "make_reference",
    "memorisation",
    "moments",
    "nearest",
    "nearest_image",
    "precision_recall",
    "require_features",
    "save_reference",
    "sharded",
]
