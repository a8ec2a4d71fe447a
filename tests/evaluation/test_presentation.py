from __future__ import annotations

import dataclasses

from multistage_diffusion.evaluation.presentation import Row, result_text, rows
from multistage_diffusion.evaluation.registry import MetricValue
from multistage_diffusion.evaluation.result import EvaluationResult

RESULT = EvaluationResult(
    against="held-out",
    extractor="pixels",
    comparable_to="pixels only",
    preprocessing="none",
    reference="held-out images",
    reference_count=40,
    training_count=90,
    samples=60,
    count=30,
    splits=5,
    seed=0,
    dims=16,
    rank_deficient=False,
    metrics={
        "frechet": MetricValue(value=12.3456, real=1.5),
        "recall": MetricValue(value=0.5, real=0.625, settings={"k": 3, "images": 30}),
    },
)


def test_text_of_a_comparison_with_held_out_images() -> None:
    assert result_text(RESULT).splitlines() == [
        "Features: pixels (comparable to: pixels only).",
        "60 samples, 90 training and 40 held-out images; mean of 5 draws of 30 images from each.",
        "In brackets, real images: the same figure for training images in place of the samples.",
        "Fréchet distance  12.35  (real images: 1.5)",
        "Recall            50.0%  (real images: 62.5%; k = 3, images = 30)",
    ]


def test_text_of_a_comparison_with_statistics() -> None:
    metrics = {"kid": MetricValue(value=0.1234567, deviation=0.0123), "new": MetricValue(value=3.0)}
    result = dataclasses.replace(
        RESULT, against="statistics", reference="folder/real.npz", rank_deficient=True, metrics=metrics
    )
    assert result_text(result).splitlines()[1:] == [
        "60 samples against 40 images: real.npz. There are not more images than feature dimensions: compare only figures "
        "of equal counts.",
        "Kernel distance (KID)  0.1235 ± 0.012",
        "new                    3",
    ]
    assert "60 samples against real.npz." in result_text(dataclasses.replace(result, reference_count=0))


def test_rows_explain_their_values() -> None:
    copies = {"memorised": MetricValue(value=0.09, real=0.05, settings={"threshold": 1.23456, "of": "pixels"})}
    (row,) = rows(dataclasses.replace(RESULT, metrics=copies))
    assert dataclasses.replace(row, words="") == Row(
        label="Memorised", value="9.0%", real="5.0%", settings="threshold = 1.235, of = pixels", words=""
    )
    assert row.words.startswith("Lower is better. Share as near to a training image")
    assert row.words.endswith(
        "Comparable to samples of runs on the same data, whatever the features: the distances are of pixels."
    )
