"""Command lines as the dataclasses of `commands`, and one line for what does not parse."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

from .errors import UserError

SUMMARIES = {
    "quickstart": "Run all steps on your own images: stages, train, sample, evaluate, report.",
    "stages": "Find the noise ranges (stages) of a data set from the data themselves.",
    "boundary": "Print a boundary between experts, given in one convention, in all others.",
    "train": "Train a multi-decoder model, or resume a run.",
    "train-codec": "Train a small autoencoder (a latent codec) on a data set, for runs on its latents.",
    "sample": "Draw samples of a run: a grid (.png), a folder of images, or an array (.npz).",
    "evaluate": "Compare samples of a run with real images: Fréchet distance, precision and recall, memorisation.",
    "compare": "Compare runs on the same held-out images and noise; the first one is the base.",
    "stats": "Write the statistics of a data set's features, for reuse in many evaluations.",
    "pack": "Write all images of a data set, at one size and without loss, into one file that is read faster.",
    "plan": "Plan a model for a data set and a budget: stages from the data, decoder widths from two short probes.",
    "describe": "Show a run's (or preset's) stages, widths, parameters and multiply-adds; draw its network.",
    "report": "Write RUN/report.html: one file with stages, network, losses, samples, neighbours, metrics and configuration.",
    "demo": "Run all steps on real handwritten digits in a few minutes: stages, train, sample, evaluate, report.",
    "import": "Create a run from a published checkpoint (score_sde, EDM, latent diffusion) or a folder of diffusers.",
    "export": "Write a run for other code: a pipeline of diffusers, or the published layout of its family.",
    "push": "Push a run to the Hugging Face hub, with its code, a model card and samples.",
    "presets": "List the presets, one line each.",
    "tables": "Count the networks of the paper's tables and print them beside its figures.",
}

_ALONE = {"--captions": "on"}  # options that may stand without a value, and what they mean then


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Parse a command's arguments into its dataclass; --help prints and exits.

    Raises:
        UserError: with one line that names the fault.
    """
    if name not in SUMMARIES:
        near = difflib.get_close_matches(name, SUMMARIES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SUMMARIES)}"
        raise UserError(f"command {name!r} is unknown; {hint}")
    import tyro

    from .commands import COMMANDS

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                COMMANDS[name],
                prog=f"msdiff {name}",
                args=_gathered(_numbers_last(_filled(arguments))),
                description=_help(COMMANDS[name]),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text, dashed = _one_line(errors.getvalue()), _dashed(arguments)
        hint = (
            f"; a value that begins with - is given as {dashed}" if text.startswith("Missing value") and dashed else ""
        )
        raise UserError(f"{text}{hint}; for help, run msdiff {name} --help") from None


def _filled(arguments: Sequence[str]) -> list[str]:
    """Give options that stand alone the value that this means."""
    found = list[str]()
    for argument, after in itertools.pairwise([*arguments, "--"]):
        found += [argument, *([_ALONE[argument]] if argument in _ALONE and after.startswith("-") else [])]
    return found


def _numbers_last(arguments: Sequence[str]) -> list[str]:
    """Move --size and --edges with their numbers to the end, where tyro cannot count DATA or FILE among these.

    A --size of one number is that of a square.
    """
    others, last, name = list[str](), dict[str, list[str]](), ""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--size=") else [a])]
    for argument, after in itertools.pairwise([*arguments, ""]):
        if argument in ("--size", "--edges") and _is_number(after):
            name, last[argument] = argument, []
        elif name and _is_number(argument) and len(last[name]) < (2 if name == "--size" else len(arguments)):
            last[name].append(argument)
        else:
            others.append(argument)
            name = ""
    if len(last.get("--size", ())) == 1:
        last["--size"] *= 2
    return [*others, *(text for option, numbers in last.items() for text in (option, *numbers))]


def _dashed(arguments: Sequence[str]) -> str:
    """Return the first option whose value begins with a hyphen, as OPTION=VALUE; "" without one."""
    pairs = itertools.pairwise(arguments)
    return next((f"{a}={b}" for a, b in pairs if a.startswith("--") and b.startswith("-") and b[1:2] != "-"), "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gathered(arguments: Sequence[str]) -> list[str]:
    """Collect the values of all --set options into one, because tyro keeps only those of the last."""
    others, values, inside = [], [], False
    for argument in arguments:
        if argument.startswith("--set="):
            values.append(argument.removeprefix("--set="))
        elif argument.startswith("-"):
            inside = argument == "--set"
            others += [] if inside else [argument]
        else:
            (values if inside else others).append(argument)
    return [*others, "--set", *values] if values else others


def _help(command: type[Any]) -> str:
    return "\n".join(line.removeprefix("    ") for line in (command.__doc__ or "").splitlines())


def _one_line(box: str) -> str:
    """Flatten tyro's boxed error into one line, without the title (repeated inside) and the help text that follows."""
    inside = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:])
    text = re.sub(r"[\u2500-\u257f]+|-{4,}", " ", inside)  # terminals without box characters get hyphens
    text = re.split(r"Got errors:|Argument helptext:|For full helptext", " ".join(text.split()))[0]
    text = re.sub(r" Perhaps you meant: (--[\w-]+).*", r"; did you mean \1", text)
    text = re.sub(r"no type matching \{None\}\|(.+) could be instantiated from (.+)\.", r"\2 is not \1", text)
    return text.replace("'None', ", "").replace(", 'None'", "").strip(" .")
