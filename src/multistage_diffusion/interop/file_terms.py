"""Refusals of imported settings in the terms of the file that they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import UserError

_SUBJECT = re.compile(r"[\w.]+( or [\w.]+)?(=(\[[^\]]*\]|[^\s:;]+))?:?\s*")  # "network.dropout=2 ", "network.a or b: "

_VERBS = ("must ", "does ", "is ")  # with which a reason continues the sentence of its subject


@contextmanager
def file_terms(sources: Mapping[str, str]) -> Iterator[None]:
    """Let the refusal of a setting of ours name what it comes from instead.

    Args:
        sources: {a setting of ours: what a file says, with its value}, as {"network.dropout": "dropout=2"}. The first one
            that the message names is the cause; "network" stands for all settings of the network.

    Raises:
        UserError: of what is done inside, in these terms; as it is if it names none of the settings.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for ours, theirs in sources.items():
            if re.search(rf"(?<![\w.]){re.escape(ours)}\b", text):
                reason = _reason(text, ours)
                raise UserError(f"{theirs}{' ' if reason.startswith(_VERBS) else ': '}{reason}") from None
        raise


def _reason(text: str, ours: str) -> str:
    """Return what is wrong with a setting, without its name and value at the beginning of a message."""
    subject = _SUBJECT.match(text) if text.startswith(ours) else None
    return text if subject is None else text[subject.end() :]
