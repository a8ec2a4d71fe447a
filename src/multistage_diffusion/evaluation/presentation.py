"""Results of evaluations as rows and sentences, for the console and the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .measuring import displays
from .registry import Display, MetricValue
from .result import EvaluationResult


@dataclass(frozen=True, kw_only=True)
class Row:
    """A value as text.

    Attributes:
        label: name of the value.
        value: the number, with its deviation.
        real: the number of real images; empty if not measured.
        settings: what the value depends on, for example "k = 3, images = 500"; may be empty.
        words: explanation, and what the value may be compared with.
    """

    label: str
    value: str
    real: str
    settings: str
    words: str


def rows(result: EvaluationResult) -> list[Row]:
    """Return the values of a result; a value of a metric that is not installed is shown under its name."""
    known = displays()
    return [_row(known.get(name, Display(name=name, label=name)), value) for name, value in result.metrics.items()]


def _row(display: Display, value: MetricValue) -> Row:
    number = _number(value.value, display.unit)
    deviation = "" if value.deviation is None else f" ± {_number(value.deviation, display.unit, digits=2)}"
    better = f"{display.better.title()} is better." if display.better else ""
    comparable = f"Comparable to {display.comparable_to}." if display.comparable_to else ""
    return Row(
        label=display.label,
        value=number + deviation,
        real="" if value.real is None else _number(value.real, display.unit),
        settings=", ".join(f"{name} = {_setting(x)}" for name, x in value.settings.items()),
        words=" ".join(part for part in (better, display.words, comparable) if part),
    )


def _number(value: float, unit: str, digits: int = 4) -> str:
    if unit == "%":
        return f"{value:.1%}"
    return f"{value:.{digits}g} {unit}".strip()


def _setting(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def features_sentence(result: EvaluationResult) -> str:
    """Return which features were used and what their values may be compared with."""
    return f"Features: {result.extractor} (comparable to: {result.comparable_to})."


def counts_sentence(result: EvaluationResult) -> str:
    """Return what was compared with what, and how many images."""
    if result.against == "statistics":
        source = Path(result.reference).name
        images = f"{result.reference_count} images: {source}" if result.reference_count else source
        text = f"{result.samples} samples against {images}."
    else:
        text = (
            f"{result.samples} samples, {result.training_count} training and {result.reference_count} held-out images; "
            f"mean of {result.splits} draws of {result.count} images from each."
        )
    if result.rank_deficient:
        text += " There are not more images than feature dimensions: compare only figures of equal counts."
    return text


def result_text(result: EvaluationResult) -> str:
    """Return a result as lines of text."""
    found = rows(result)
    label, value = (max((len(getattr(row, name)) for row in found), default=0) for name in ("label", "value"))
    lines = []
    if any(row.real for row in found):
        lines.append("In brackets, real images: the same figure for training images in place of the samples.")
    for row in found:
        notes = [f"real images: {row.real}" if row.real else "", row.settings]
        note = "; ".join(part for part in notes if part)
        lines.append(f"{row.label:<{label}}  {row.value:<{value}}  {f'({note})' if note else ''}".rstrip())
    return "\n".join([features_sentence(result), counts_sentence(result), *lines])
