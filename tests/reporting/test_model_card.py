"""The model card says what the run is, and takes nothing foreign for markup."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from tiny import tiny_config

from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import EvaluationResult
from multistage_diffusion.evaluation.registry import MetricValue
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.reporting.model_card import model_card, require_licence

RESULT = EvaluationResult(
    against="held-out",
    extractor="pixels",
    comparable_to="",
    preprocessing="",
    reference="digits",
    reference_count=10,
    training_count=10,
    samples=1234,
    count=10,
    splits=1,
    seed=0,
    dims=3,
    rank_deficient=False,
    metrics={"frechet": MetricValue(value=1.2345, real=0.5)},
)


def test_stages_metrics_and_commands_are_named() -> None:
    launches = [{"command": "msdiff train --out runs/x"}]
    card = model_card(
        tiny_config(), name="me/x", step=7, licence="mit", results=[RESULT], launches=launches, samples="s.png"
    )
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    assert "trained for 7 steps" in body
    assert "![Samples](s.png)" in body
    parameters = network_cost(tiny_config().network, 4, 4).stages[1].parameters
    assert f"| 2 | 0.2 | 0.6 | 8 | {parameters:,} |" in body
    assert "| frechet | 1.234 | 0.5 | pixels | 1234 | held-out: digits |" in body
    assert "    msdiff train --out runs/x" in body
    assert 'from_pretrained(\'me/x\', trust_remote_code=True)' in body  # fmt: skip


def test_without_evaluations_there_is_no_table_and_foreign_text_is_no_markup() -> None:
    config = tiny_config(data__source="<script>|`x`\u202e")
    card = model_card(config, name="me/x", step=7, licence="mit")
    assert "## Metrics" not in card
    assert "\\<script\\>\\|\\`x\\`\\\\u202e" in card


def test_folders_of_this_machine_are_not_published() -> None:
    result = dataclasses.replace(RESULT, against="reference", reference="/home/me/secret/reference.npz")
    config = tiny_config(data__source="/home/me/secret/photos", training__init_from="/home/me/secret/runs/one")
    card = model_card(config, name="me/x", step=7, licence="mit", results=[result])
    assert "secret" not in card
    assert "Data: photos. " in card
    assert "Started from one." in card
    assert "reference: reference.npz |" in card
    assert "Data: hf:me/photos. " in model_card(
        tiny_config(data__source="hf:me/photos"), name="me/x", step=7, licence="mit"
    )


@pytest.mark.parametrize("licence", ["", "MIT", "my own", "a\nb"])
def test_licences_that_the_hub_does_not_know_are_refused(licence: str) -> None:
    with pytest.raises(UserError, match="--license"):
        require_licence(licence)
