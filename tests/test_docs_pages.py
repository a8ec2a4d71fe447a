"""The site: reference pages are made from the code, links lead somewhere, and mkdocs builds it without a warning."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from loading import load

import multistage_diffusion as msd
from multistage_diffusion.cli import SUMMARIES
from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.network import FAMILIES
from multistage_diffusion.config.serialization import to_dict

ROOT = Path(__file__).parents[1]
CONFIG = to_dict(RunConfig())
KEYS = [f"{section}.{key}" for section, value in CONFIG.items() if isinstance(value, dict) for key in value]
OTHERS = {
    "--build-arg",
    "--gpus",
    "--index-url",
    "--rm",
    "--logdir",
    "--no-deps",
    "--parts",
    "--max-restarts",
    "--model",
    "--setting",
}  # options of other programs that pages name


@pytest.fixture(name="pages", scope="module")
def fixture_pages() -> ModuleType:
    return load(ROOT / "scripts" / "docs_pages.py", "docs_pages")


@pytest.fixture(name="commands", scope="module")
def fixture_commands(pages: ModuleType) -> str:
    return pages.commands()


def test_every_setting_is_explained(pages: ModuleType) -> None:
    text = pages.settings()
    own = {f"network.{f.name}" for family in FAMILIES for f in dataclasses.fields(FAMILIES[family])}
    assert "network.attention_shares" in own
    for key in [*KEYS, *own - {*KEYS}, "name", "format_version"]:
        kind = ".kind" if isinstance(_value(key), dict) and "kind" in _value(key) else ""
        found = re.search(rf"^`{re.escape(key + kind)}`\n:   (.+?)  \n    (.+)$", text, re.MULTILINE)
        assert found, key
        assert len(found[1].split()) > 1, key
        assert "Default: `" in found[2], key


def _value(key: str) -> Any:
    value: Any = CONFIG
    for part in key.split("."):
        value = value.get(part)
    return value


def test_kinds_of_schedules_and_priors_are_listed_with_their_numbers(pages: ModuleType) -> None:
    text = pages.settings()
    assert "| `rectified-flow` |" in text
    assert "`beta_min=0.1`" in text
    assert "`p_mean=-1.2`" in text


def test_a_setting_shows_its_type_and_default(pages: ModuleType) -> None:
    @dataclasses.dataclass
    class Example:
        """One line.

        Attributes:
            first, second: text of both,
                on two lines; None: nothing.
            third: "x" or "y".

        Raises:
            UserError: never.
        """

        first: tuple[float, ...] = (0.5, 1.0)
        second: int | None = None
        third: str = "x"

    told = pages.attributes(Example)
    assert told == {
        "first": "Text of both, on two lines; null: nothing.",
        "second": "Text of both, on two lines; null: nothing.",
        "third": '"x" or "y".',
    }
    assert pages.entry("a.b", tuple[float, ...], (0.5, 1.0), "Text.") == (
        "`a.b`\n:   Text.  \n    List of number. Default: `[0.5, 1.0]`"
    )
    assert pages.type_text(int | None) == "integer or null"


def test_every_command_and_option_has_its_text(pages: ModuleType, commands: str) -> None:
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", commands, re.DOTALL | re.MULTILINE))
    assert list(sections) == list(SUMMARIES)
    for name, section in sections.items():
        assert f"msdiff {name}" in section
        options = set(re.findall(r"(?<=│ )--[a-z-]+", pages.help_text(name)))
        told = dict(re.findall(r"^`(--[a-z-]+)[^`]*`\n:   (.+)$", section, re.MULTILINE))
        assert set(told) == options, name
        assert all(len(text.split()) > 1 for text in told.values()), name
    assert "(default: 0.9)" in sections["stages"]
    assert "LOW &lt; sigma &lt;= HIGH" in sections["sample"]


def prose() -> dict[str, str]:
    """Return the inline code of every page, joined."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {file.name: " ".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", file.read_text())) for file in files}


def test_pages_name_settings_that_exist() -> None:
    sections = [name for name, value in CONFIG.items() if isinstance(value, dict)]
    known = {*KEYS, *(f"network.{f.name}" for family in FAMILIES for f in dataclasses.fields(FAMILIES[family]))}
    for page, code in prose().items():
        for key in re.findall(rf"(?<![\w./])((?:{'|'.join(sections)})\.[a-z_]+)\b(?!\.py|\.png|/)", code):
            assert key in known or key.endswith((".json", ".png", ".npz", ".jsonl")), f"{page}: {key}"


def test_pages_name_options_that_exist(commands: str) -> None:
    known = {
        *re.findall(r"^`(--[a-z-]+)", commands, re.MULTILINE),
        "--help",
        "--version",
        "--debug",
        "--print-completion",
    } | OTHERS
    for page, code in prose().items():
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code))
        assert found <= known, f"{page}: {sorted(found - known)}"


def test_the_api_page_names_everything_that_is_public() -> None:
    named = re.findall(r"^::: multistage_diffusion\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == set(msd.__all__) - {"__version__"}


@pytest.mark.parametrize(
    ("folder", "target", "site"),
    [
        ("docs", "sampling.md", "sampling.md"),
        ("docs", "../benchmarks/results/sample.json", "results/sample.json"),
        ("docs", "../CONTRIBUTING.md", "contributing.md"),
        (".", "docs/design.md", "design.md"),
        ("benchmarks/results", "../../docs/efficiency.md", "efficiency.md"),
        ("docs", "https://example.org/x.md", None),
        ("docs", "../src/x.py", None),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(
    pages: ModuleType, folder: str, target: str, site: str | None
) -> None:
    assert pages.site_path(ROOT / folder, target) == site


class _Targets(HTMLParser):
    """The addresses that a page of the site names, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name == "id" and value:
                self.ids.add(value)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path, commands: str) -> None:
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[docs]'")
    site = tmp_path / "site"
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for page in site.rglob("*.html"):
        found[page] = _Targets()
        found[page].feed(page.read_text())
    for page, parser in found.items():
        for target in parser.targets:
            address, _, anchor = target.partition("#")
            if "://" in target or target.startswith(("data:", "mailto:", "javascript:")):
                assert not re.match(r"https?://(fonts|unpkg|cdn)", target), f"{page}: {target} is loaded from elsewhere"
            elif page.name != "404.html":
                path = (page.parent / address).resolve() if address else page
                assert path.exists(), f"{page.name}: {target}"
                assert not anchor or path not in found or anchor in found[path].ids, f"{page.name}: {target}"
    shown = html.unescape((site / "settings.html").read_text())
    for key in KEYS:
        assert f"<code>{key}" in shown, key
    shown = html.unescape((site / "commands.html").read_text())
    for name in SUMMARIES:
        assert f'<h2 id="{name}">' in shown, name
    for option in re.findall(r"^`(--[^`]+)`", commands, re.MULTILINE):
        assert f"<code>{option}</code>" in shown, option
    shown = (site / "api.html").read_text()
    for name in msd.__all__:
        assert name == "__version__" or f'id="multistage_diffusion.{name}"' in shown, name


def test_the_drawing_shows_the_preset_that_its_page_names() -> None:
    drawing = ElementTree.parse(ROOT / "docs" / "concepts.svg").getroot()
    names = {name: f"{{http://www.w3.org/2000/svg}}{name}" for name in ("title", "desc", "text")}
    assert drawing.get("role") == "img"
    described = [drawing.find(names[name]) for name in ("title", "desc")]
    assert [found.get("id") for found in described if found is not None] == (
        drawing.get("aria-labelledby") or ""
    ).split()
    words = [text.text for text in drawing.iter(names["text"])]
    config = msd.preset("images-32-gpu")
    assert [f"{edge:.2g}" for edge in config.stages.interior] == words[words.index("0") + 1 : words.index("∞")]
    assert [word for word in words if word and word.startswith("width")] == [
        f"width {width}" for width in config.network.decoder_widths
    ]
    assert f"σ = 2: stage {config.stages.index_of(2.0) + 1}" in words
