"""Hooks of mkdocs: reference pages made from the code, and pages and results that lie outside docs/.

A page with the line `<!-- generated: commands -->` or `<!-- generated: settings -->` gets that text. Links are written so that
they lead somewhere in the repository; here they are turned into links of the site.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import inspect
import io
import json
import os
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from multistage_diffusion.cli import SUMMARIES, parse
from multistage_diffusion.config import NetworkConfig, RunConfig
from multistage_diffusion.config.network import FAMILIES
from multistage_diffusion.schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {
    "docs": "",
    "benchmarks/results": "results/",
    "examples": "examples/",
}  # folder of the repository: of the site
WIDE = "2000"  # columns: no line of a help text is broken
CHOICES: dict[type, Any] = {NoiseSchedule: SCHEDULES, SigmaPrior: PRIORS}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the results that lie outside docs/."""
    from mkdocs.structure.files import File

    found = {ROOT / name: uri for name, uri in OUTSIDE.items()}
    for folder, prefix in FOLDERS.items():
        if prefix:
            found |= {path: prefix + path.name for path in sorted((ROOT / folder).iterdir()) if path.is_file()}
    for path, uri in found.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Fill in what is generated and turn the repository's links into the site's."""
    for name, make in GENERATED.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    folder = Path(page.file.abs_src_path).parent

    def turned(match: re.Match[str]) -> str:
        target = site_path(folder, match[1])
        return (
            match[0]
            if target is None
            else f"]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}"
        )

    return re.sub(r"\]\(([^)#\s]+)", turned, markdown)


def site_path(folder: Path, target: str) -> str | None:
    """Return where the site has the target of a link in a file of a folder; None if it is not in the repository."""
    path = (folder / target).resolve()
    if "://" in target or not path.is_relative_to(ROOT):
        return None
    name = path.relative_to(ROOT).as_posix()
    for inside, prefix in FOLDERS.items():
        if name.startswith(inside + "/"):
            return prefix + name.removeprefix(inside + "/")
    return OUTSIDE.get(name)


def commands() -> str:
    """Return a section of Markdown for every command, from its help."""
    return "\n\n".join(command_section(name, help_text(name)) for name in SUMMARIES)


def help_text(name: str) -> str:
    """Return what `msdiff NAME --help` prints, lines unbroken."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # an encoding: boxes are drawn
    with (
        mock.patch.dict(os.environ, {"COLUMNS": WIDE}),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),
    ):
        parse(name, ["--help"])
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def command_section(name: str, text: str) -> str:
    """Return a help text as Markdown: description, examples, a list of options."""
    above, _, boxes = text.partition("╭")
    usage, _, description = above.strip().partition("\n")
    description, _, examples = description.partition("\nExamples\n")
    parts = [f"## {name}", escaped(description.strip())]
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    parts.append("\n".join(["```text", usage.removeprefix("usage: "), *(["", *lines] if lines else []), "```"]))
    options: list[list[str]] = []
    for line in boxes.splitlines():
        if not line.startswith("│"):
            continue
        inside = line.strip("│").removeprefix(" ").rstrip()
        if inside.startswith("   "):  # text of the option in the line before
            options[-1].append(inside.strip())
        else:
            options.append(re.split(r"\s{2,}", inside.strip(), maxsplit=1))
    for option, *told in options:
        if not option.startswith("-h"):
            text = re.sub(r" \(default: (False|None|'')\)$", "", " ".join(told))
            parts.append(f"`{option}`\n:   {escaped(text)}")
    return "\n\n".join(parts)


def settings() -> str:
    """Return a section of Markdown for every section of a configuration, from docstrings and defaults."""
    parts, alone, default = [], [], RunConfig()
    for name, hint in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            text = (inspect.getdoc(hint) or "").partition("\n")[0]
            parts.append(f"## {name}\n\n{escaped(text)}\n\n{entries(hint, getattr(default, name), f'{name}.')}")
            if hint is NetworkConfig:
                parts.append(own_entries(hint, FAMILIES, f"{name}."))
        else:
            alone.append(entry(name, hint, getattr(default, name), attributes(RunConfig)[name]))
    return "\n\n".join(["## The file", *alone, *parts])


def entries(cls: type, default: Any, prefix: str) -> str:
    """Return a Markdown list of a dataclass's fields: key, meaning, type, default."""
    told, hints = attributes(cls), typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    return "\n\n".join(entry(prefix + f, hints[f], getattr(default, f), told[f]) for f in fields)


def entry(key: str, hint: Any, default: Any, text: str) -> str:
    """Return one setting: its key, and its meaning, type and default."""
    if hint in CHOICES:
        return "\n\n".join(
            [f"`{key}.kind`\n:   {escaped(text)}  \n    Default: `{default.kind}`", kinds(CHOICES[hint])]
        )
    return f"`{key}`\n:   {escaped(text)}  \n    {capital(type_text(hint))}. Default: `{plain(default)}`"


def own_entries(base: type, known: Any, prefix: str) -> str:
    """Return a Markdown list of the fields that only some concrete classes of a section have."""
    common = {f.name for f in dataclasses.fields(base)}
    owners: dict[tuple[str, str], list[str]] = {}  # by what is written; a setting of one name may mean different things
    for name in known:
        for key, text in _own(known[name], prefix, common):
            owners.setdefault((key, text), []).append(name)
    parts = []
    for (_, text), names in owners.items():
        everywhere = len(names) == len(tuple(known))
        parts.append(text + ("" if everywhere else f" Families: {', '.join(f'`{n}`' for n in names)}."))
    return "\n\n".join(parts)


def _own(cls: type, prefix: str, common: set[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of the fields of a concrete class."""
    hints = typing.get_type_hints(cls)
    told = {n: text for c in reversed(cls.__mro__) if c.__doc__ for n, text in attributes(c).items()}
    for f in dataclasses.fields(cls):
        if f.name not in common:
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
            yield f.name, entry(prefix + f.name, hints[f.name], default, told[f.name])


def kinds(known: Any) -> str:
    """Return a table of the kinds of a schedule or density and their numbers."""
    rows = ["| kind | meaning | numbers and their defaults |", "|---|---|---|"]
    for kind in known:
        cls = known[kind]
        numbers = [f"`{f.name}={plain(f.default)}`" for f in dataclasses.fields(cls) if not _is_kind(f.default)]
        rows.append(
            f"| `{kind}` | {escaped((inspect.getdoc(cls) or '').partition(chr(10))[0])} | {', '.join(numbers)} |"
        )
    return "\n".join(rows)


def _is_kind(value: object) -> bool:
    return isinstance(value, tuple(CHOICES))


def attributes(cls: type) -> dict[str, str]:
    """Return the text of every attribute in a Google-style docstring; "a, b: text" is of both."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, listed = inspect.getdoc(cls).partition("Attributes:\n")  # type: ignore[union-attr]
    for line in listed.splitlines():
        if line and not line.startswith(" "):  # another section
            break
        start = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}".rstrip() for name in names}
    return {name: re.sub(r"\bNone\b", "null", capital(text)) for name, text in found.items()}


def type_text(hint: Any) -> str:
    """Return an annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(arg) for arg in args)
    if origin is typing.Literal:
        return ", ".join(f"`{arg}`" for arg in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} values ({type_text(args[0])})"
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    names = {float: "number", int: "integer", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, "mapping")


def capital(text: str) -> str:
    """Return text with a capital first letter."""
    return text[:1].upper() + text[1:]


def plain(value: Any) -> str:
    """Return a default as JSON, text without quotes."""
    return value if isinstance(value, str) and value else json.dumps(value)


def escaped(text: str) -> str:
    """Return plain text as Markdown."""
    return re.sub(r"([*|`])", r"\\\1", html.escape(text, quote=False))


GENERATED = {"commands": commands, "settings": settings}
