"""The model card of a run: the README.md of its repository on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..escaping import shown
from ..evaluation import EvaluationResult
from ..nets.cost import network_cost
from ..version import __version__

TAGS = ("diffusers", "multistage-diffusion", "unconditional-image-generation")


def model_card(
    config: RunConfig,
    *,
    name: str,
    step: int,
    licence: str,
    results: Sequence[EvaluationResult] = (),
    launches: Sequence[Mapping[str, Any]] = (),
    samples: str = "",
) -> str:
    """Return the model card of a run.

    Args:
        config: the run's.
        name: of the repository, OWNER/NAME.
        step: of the checkpoint.
        licence: of the weights; an identifier of the hub, such as "apache-2.0".
        results: evaluations of the run.
        launches: records of the commands that trained it.
        samples: name of a picture of samples beside the card.
    """
    front = [
        "---",
        f"license: {json.dumps(licence)}",
        "library_name: diffusers",
        "tags:",
        *(f"- {t}" for t in TAGS),
        "---",
    ]
    title = _plain(name.rpartition("/")[2])
    parts = [
        "\n".join(front),
        f"# {title}",
        f"![Samples]({samples})" if samples else "",
        _about(config, step),
        _use(config, name),
        "## Stages\n\nA decoder for each range of the noise level sigma, after one encoder"
        f"{' each' if config.network.separate else ''}.\n\n{_stages(config)}",
        _metrics(results),
        _training(config, launches),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: object) -> str:
    """Return foreign text in one line, without characters that Markdown or HTML would take for markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in shown(text))


def _about(config: RunConfig, step: int) -> str:
    kind = f"{config.network.num_classes} classes" if config.network.num_classes else "no classes"
    channels, height, width = config.data.shape
    on = f", on latents of {'x'.join(map(str, config.codec.shape))}" if config.codec.used else ""
    return (
        f"A diffusion model of images of {height}x{width} pixels ({channels} channels, {kind}{on}), trained for {step} steps "
        f"by multistage-diffusion {__version__}. The weights are averages over training."
    )


def _use(config: RunConfig, name: str) -> str:
    labels = "class_labels=0, " if config.network.num_classes else ""
    return (
        "## Use\n\nIt needs diffusers only. The network's code is in this repository, so it is loaded with "
        "`trust_remote_code=True`.\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)\n"
        f'images = pipe({labels}batch_size=4).images\nimages[0].save("image.png")\n```'
    )


def _stages(config: RunConfig) -> str:
    costs = network_cost(config.network, *config.input_shape[1:])
    rows = ["| stage | sigma from | to | decoder width | parameters with encoder |", "|---|---|---|---|---|"]
    for k, (cost, width) in enumerate(zip(costs.stages, config.network.decoder_widths, strict=True)):
        low, high = config.stages.interval(k)
        rows.append(f"| {k + 1} | {low:.4g} | {high:.4g} | {width} | {cost.parameters:,} |")
    return "\n".join(rows)


def _metrics(results: Sequence[EvaluationResult]) -> str:
    """Return the metrics, each with its features, reference and number of samples: without them it says nothing."""
    if not results:
        return ""
    rows = ["| metric | value | real images | features | samples | compared with |", "|---|---|---|---|---|---|"]
    for result in results:
        for name, value in result.metrics.items():
            real = "" if value.real is None else f"{value.real:.4g}"
            rows.append(
                f"| {_plain(name)} | {value.value:.4g} | {real} | {_plain(result.extractor)} | {result.samples} | "
                f"{_plain(result.against)}: {_place(result.reference)} |"
            )
    return "## Metrics\n\nOnly values of the same features and numbers of samples compare.\n\n" + "\n".join(rows)


def _training(config: RunConfig, launches: Sequence[Mapping[str, Any]]) -> str:
    training = config.training
    facts = [
        f"Data: {_place(config.data.source or 'unknown')}. Batch {training.batch}, learning rate {config.optimizer.lr:g}, "
        f"{_plain(config.diffusion.precondition)}, sampler {_plain(config.sampling.solver)} with {config.sampling.calls} calls."
    ]
    if training.init_from:
        facts.append(f"Started from {_place(training.init_from)}.")
    lines = [f"    {' '.join(shown(launch['command']).split())}" for launch in launches]
    return "## Training\n\n" + "\n".join(facts) + ("\n\n" + "\n".join(lines) if lines else "")


def _place(source: str) -> str:
    """Return what data, weights or a reference are, without the folders of this machine that an absolute path names."""
    path = PurePath(source)
    return _plain(path.name if path.is_absolute() else source)


def require_licence(licence: str) -> None:
    """Raise UserError unless a licence is an identifier of the hub: small letters, digits, dots and hyphens."""
    if not licence or not all(c.isascii() and (c.islower() or c.isdigit() or c in ".-") for c in licence):
        raise UserError(f"--license {licence!r}: give an identifier of the hub, such as apache-2.0, mit or cc-by-4.0")
