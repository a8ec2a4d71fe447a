"""Feature extractors and metrics of samples; `registry` holds both by name."""

from .comparison import compare_samples, reference_set, statistics_metrics
from .extraction import EXTRACT_BATCH, extract, image_moments, require_features
from .features import get_features
from .frechet import frechet_between, frechet_distance
from .held_out import evaluate_samples, held_out_metrics
from .memorisation import Memorisation, memorisation, nearest, nearest_image
from .moments import Moments, moments
from .pixels import PixelFeatures
from .precision_recall import precision_recall
from .reference import Reference, load_reference, make_reference, save_reference
from .registry import FEATURES, METRICS, FeatureExtractor, Metric, MetricValue
from .result import EvaluationResult, read_result
from .sharded import sharded
from .trust import agree

__all__ = [
    "EXTRACT_BATCH",
    "FEATURES",
    "METRICS",
    "EvaluationResult",
    "FeatureExtractor",
    "Memorisation",
    "Metric",
    "MetricValue",
    "Moments",
    "PixelFeatures",
    "Reference",
    "agree",
    "compare_samples",
    "evaluate_samples",
    "extract",
    "frechet_between",
    "frechet_distance",
    "get_features",
    "held_out_metrics",
    "image_moments",
    "load_reference",
    "make_reference",
    "memorisation",
    "moments",
    "nearest",
    "nearest_image",
    "precision_recall",
    "read_result",
    "reference_set",
    "require_features",
    "save_reference",
    "sharded",
    "statistics_metrics",
]
