"""Every field of a run's records with every wrong type is one line, or reads as before; never anything else."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import EvaluationResult, MetricValue
from multistage_diffusion.records import fields_of, read_evaluations, read_launches, read_metrics
from multistage_diffusion.reporting.report import write_report
from multistage_diffusion.training.run import Run

ODD: list[Any] = [None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "x", [], [[None]], {"a": {}}]
COMMON = {"step": 10, "images": 60}
GOOD: dict[str, list[dict[str, Any]]] = {
    "metrics.jsonl": [
        {"kind": "train", **COMMON, "loss": [0.1, None, 0.3], "grad_norm": {"encoder": 1.0, "decoder.1": 2.0}, "lr": 1e-3}
        | {"images_per_s": 9.5, "seconds": 3.0},
        {"kind": "held_out", **COMMON, "loss": [0.1, 0.2, None], "seconds": 0.1},
        {"kind": "quality", **COMMON, "petaflops": 0.1, "frechet": 3.0, "extractor": "a$b$", "count": 9, "reference": "x"}
        | {"metrics": {"recall": 0.5}},
    ],
    "launches.jsonl": [{"time": "now", "command": "msdiff train", "version": "1", "torch": "2", "device": "cpu"}],
    "evaluation.json": [
        {"against": "held-out", "extractor": "p", "comparable_to": "c", "preprocessing": "n", "reference": "r"}
        | {"reference_count": 9, "training_count": 9, "samples": 9, "count": 9, "splits": 5, "seed": 0, "dims": 4}
        | {"rank_deficient": False}
        | {"metrics": {"frechet": {"value": 1.0, "real": 0.5, "deviation": None, "settings": {"k": 3, "of": "x"}}}},
    ],
}  # fmt: skip


def write(folder: Path, name: str, records: list[Any]) -> None:
    text = json.dumps(records) if name.endswith(".json") else "".join(json.dumps(record) + "\n" for record in records)
    (folder / name).write_text(text)


def changed() -> Iterator[tuple[str, list[Any], str, Any]]:
    """Yield a file, its records with one field changed, that field and its value."""
    for name, records in GOOD.items():
        for number, record in enumerate(records):
            for field, value in itertools.product(record, ODD):
                yield name, put(records, [number, field], value), field, value
    entry = GOOD["evaluation.json"][0]["metrics"]["frechet"]
    for field, value in itertools.product(entry, ODD):
        yield "evaluation.json", put(GOOD["evaluation.json"], [0, "metrics", "frechet", field], value), field, value
    for field, value in itertools.product(entry["settings"], ODD):
        at = [0, "metrics", "frechet", "settings", field]
        yield "evaluation.json", put(GOOD["evaluation.json"], at, value), "settings", value


def put(records: list[Any], at: list[Any], value: Any) -> list[Any]:
    """Return a copy of records with one value replaced."""
    found = copy.deepcopy(records)
    node: Any = found
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return found


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return preset("digits")


def report(folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    pixels = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    return write_report(folder, config=config, architecture=[], samples=pixels, real=pixels).read_text()


def test_records_as_written_are_shown(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, records in GOOD.items():
        write(tmp_path, name, records)
    assert "a$b$" in report(tmp_path, config, monkeypatch)


def test_every_field_with_every_wrong_type(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # charts take a while; what they are given is computed all the same
    monkeypatch.setattr(
        "multistage_diffusion.reporting.report.write_atomic", lambda *_: (tmp_path / "report.html").touch()
    )
    for module in ("report", "training_charts"):
        monkeypatch.setattr(
            f"multistage_diffusion.reporting.{module}.chart", lambda draw, height, caption, narrow=None: caption
        )
    for name, records in GOOD.items():
        write(tmp_path, name, records)
    refused = 0
    for name, records, field, value in changed():
        write(tmp_path, name, records)
        try:
            report(tmp_path, config, monkeypatch)
        except UserError as error:
            line, refused = str(error), refused + 1
            assert "\n" not in line, (name, field, value)
            assert len(line) < 1000, (name, field, value)
            assert field in line or "kind" in line or "is missing" in line, (name, field, value, line)
        write(tmp_path, name, GOOD[name])
    assert refused > 250


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("text", ["null", "1", "[1]", '{"a": 1}', "[[]]", "[" * 10_000, '"x"', "\xff"])
def test_files_of_something_else(
    name: str, text: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(
        f"{text}\n{text}\n".encode("latin-1") if name.endswith("l") else text.encode("latin-1")
    )
    with pytest.raises(UserError, match=name):
        report(tmp_path, config, monkeypatch)


def test_losses_are_one_for_each_stage(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", GOOD["metrics.jsonl"])
    assert len(read_metrics(tmp_path / "metrics.jsonl", 3)) == 3
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1: loss=\[0.1, None, 0.3\] must hold 2 numbers"):
        read_metrics(tmp_path / "metrics.jsonl", 2)
    assert (
        read_metrics(tmp_path / "none") == read_launches(tmp_path / "none") == read_evaluations(tmp_path / "none") == []
    )


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ([], r"expected a mapping, got \[\]"),
        ({"device": "cpu"}, "execution: expected a mapping, got None"),
        (
            {"device": "cpu", "execution": {"thread_parallel": "2"}},
            "execution.thread_parallel='2' must be a whole number",
        ),
        ({"device": "cpu", "execution": {"thread_parallel": 0}}, "execution.thread_parallel=0 must be positive"),
        ({"device": "cpu", "execution": {"fast": True}}, "execution.fast: unknown key"),
    ],
)
def test_the_autotuning_result_is_checked(known: Any, words: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.execution_file.write_text(json.dumps(known))
    with pytest.raises(UserError, match=f"execution.json: {words}.*; delete it, and autotuning runs again"):
        run.known_execution({"device": "cpu"})


def test_fields_of_a_dataclass() -> None:
    needed, more = fields_of(MetricValue, without=("settings",))
    assert (set(needed), set(more)) == ({"value"}, {"real", "deviation"})
    assert more["real"].fits(None)
    assert not needed["value"].fits(None)
    needed, more = fields_of(EvaluationResult, without=("metrics",))
    assert {*needed, "metrics"} == set(GOOD["evaluation.json"][0])
    assert not more
