"""Commands about the paper's networks: the list of presets, and the counts of the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..config.presets import PRESETS, summary
from ..files import write_atomic
from ..reporting.paper_tables import paper_tables, tables_text
from .options import check_out, option, print_json, say


@dataclass(kw_only=True)
class Presets:
    """List the presets, one line each.

    Examples
      msdiff presets
      msdiff presets --json
    """

    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.json:
            print_json([{"name": name, "summary": summary(name)} for name in PRESETS])
            return
        width = max(map(len, PRESETS))
        for name in PRESETS:
            say(f"{name:<{width}}  {summary(name)}")


@dataclass(kw_only=True)
class Tables:
    """Count the networks of the paper's tables and print them beside its figures.

    Nothing is trained: parameters and multiply-adds are counted from networks without weights, in about half a minute.
    Known slips of the paper are named; anything else that differs is marked "differs".

    Examples
      msdiff tables
      msdiff tables --out tables.md
      msdiff tables --json
    """

    out: Annotated[Path | None, option("FILE.md")] = None
    """Write the tables as Markdown, too."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.out is not None:
            check_out(self.out, self.overwrite)
        lines = paper_tables()
        if self.out is not None:
            write_atomic(self.out, (tables_text(lines, markdown=True) + "\n").encode())
        if self.json:
            print_json([line.to_dict() for line in lines])
            return
        say(tables_text(lines))
        if self.out is not None:
            say(f"written: {self.out}")
