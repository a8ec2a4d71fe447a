from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from multistage_diffusion import cli
from multistage_diffusion.commands import tables as tables_module
from multistage_diffusion.config.presets import PRESETS, preset, summary
from multistage_diffusion.reporting.paper_tables import (
    DIFFERS,
    PAPER_ROWS,
    PaperRow,
    TableRow,
    agrees,
    compare,
    paper_tables,
    tables_text,
    verdict,
)

# What PAPER_ROWS names as the paper's own slips: (table, row, stage).
SLIPS = {(7, "4", "total"), (9, "n=2", "1"), (9, "n=2", "2"), (9, "n=2", "total"), (9, "n=3", "total")}


@pytest.fixture(scope="module")
def lines() -> list[TableRow]:
    return paper_tables()


@pytest.fixture
def msdiff(
    lines: list[TableRow], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in an empty folder, the tables counted before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables_module, "paper_tables", lambda: lines)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return (code, *capsys.readouterr())

    return call


def row_of(table: int, row: str) -> PaperRow:
    (found,) = (paper for paper in PAPER_ROWS if (paper.table, paper.row) == (table, row))
    return found


@pytest.mark.slow
def test_everything_agrees_but_the_papers_slips(lines: list[TableRow]) -> None:
    assert {(x.table, x.row, x.stage) for x in lines if x.flag} == SLIPS
    assert not any(DIFFERS in x.flag for x in lines)
    assert all(abs(x.gflops / x.paper_gflops - 1) < 0.005 for x in lines if not x.flag)
    assert {x.table for x in lines} == {7, 8, 9}
    assert sum(x.stage == "total" for x in lines) == 4 + 4 + 4


@pytest.mark.slow
def test_every_named_slip_is_one(lines: list[TableRow]) -> None:
    named = {(p.table, p.row, stage): why for p in PAPER_ROWS for (stage, _), why in p.slips.items()}
    assert named == {(x.table, x.row, x.stage): x.flag for x in lines if x.flag}


def test_the_printed_stages_make_the_printed_totals() -> None:
    for printed in PAPER_ROWS:
        # The encoder counts once. Left out: the GFLOPs that row 4 of Table 7 copies from row 3.
        if printed.shared is not None and printed.total is not None:
            shared = float(printed.shared[0])
            total = shared + sum(float(params) - shared for params, _ in printed.stages)
            assert total == pytest.approx(float(printed.total[0]), abs=2)
        if printed.total is not None and (printed.table, printed.row) != (7, "4"):
            mean = sum(w * float(g) for w, (_, g) in zip(printed.weights, printed.stages, strict=True))
            assert mean / sum(printed.weights) == pytest.approx(float(printed.total[1]), abs=0.02)


@pytest.mark.slow
def test_one_altered_width_fails_its_row() -> None:
    printed = row_of(9, "n=5")
    network = preset(printed.preset).network
    altered = dataclasses.replace(network, decoder_widths=(224, 160, 160, 64, 32))
    flags = {line.stage: line.flag for line in compare(printed, altered)}
    assert flags == {
        "1": "",
        "2": "",
        "3": "",
        "4": "",
        "5": "differs: params; differs: gflops",
        "total": flags["total"],
    }
    assert flags["total"].startswith("differs: params")


@pytest.mark.slow
def test_a_slip_excuses_its_own_figure_only() -> None:
    printed = row_of(9, "n=3")
    network = dataclasses.replace(preset(printed.preset).network, decoder_widths=(176, 128, 16))
    found = {line.stage: line.flag for line in compare(printed, network)}
    assert found["1"] == "differs: params; differs: gflops"
    assert found["total"].endswith("; differs: gflops")


@pytest.mark.parametrize(
    ("counted", "printed", "expected"),
    [
        (47.49, "47", True),  # half a last digit
        (47.51, "47", False),
        (200.9, "200", True),  # 0.5 %
        (201.1, "200", False),
        (6.31 * 1.0049, "6.31", True),
        (6.31 * 1.0051, "6.31", False),
        (13.74, "13.7", True),
        (1.005, "1.0", True),
        (1.06, "1.0", False),
    ],
)
def test_agreement(counted: float, printed: str, expected: bool) -> None:
    assert agrees(counted, printed) is expected


@pytest.mark.slow
def test_totals_by_the_samplers_calls(lines: list[TableRow]) -> None:
    stages = {x.stage: x.gflops for x in lines if (x.table, x.row) == (7, "1")}
    (total,) = (x for x in lines if (x.table, x.row, x.stage) == (7, "1", "total"))
    assert (total.weights, total.calls) == ((0.426, 0.2, 0.374), (12, 2, 6))
    assert total.gflops_by_calls == pytest.approx((12 * stages["1"] + 2 * stages["2"] + 6 * stages["3"]) / 20)
    assert total.gflops == pytest.approx(0.426 * stages["1"] + 0.2 * stages["2"] + 0.374 * stages["3"])
    assert all((x.calls is None) == (x.stage != "total") for x in lines)


@pytest.mark.slow
def test_the_text_has_every_line_and_the_verdict(lines: list[TableRow]) -> None:
    text, markdown = tables_text(lines), tables_text(lines, markdown=True)
    for page in (text, markdown):
        assert "Table 8" in page
        assert "+3.12 %" in page  # 237 beside the misprinted 230
        assert "18.63 by the paper's weights 0.426/0.2/0.374; 21.60 by 20 calls 12/2/6 of dpm in even log-snr" in page
        assert page.endswith(verdict(lines))
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == len(lines) + 2 * 3
    wrong = dataclasses.replace(lines[0], flag="differs: params")
    assert verdict([wrong, *lines[1:]]).endswith("5 differ by the paper's own slips; 1 differ otherwise")


@pytest.mark.slow
def test_tables_on_the_command_line(msdiff: Callable[..., tuple[int, str, str]], lines: list[TableRow]) -> None:
    code, out, err = msdiff("tables", "--out", "tables.md")
    assert (code, err) == (0, "")
    assert out == f"{tables_text(lines)}\nwritten: tables.md\n"
    assert Path("tables.md").read_text() == tables_text(lines, markdown=True) + "\n"
    Path("tables.md").write_text("mine")
    code, out, err = msdiff("tables", "--out", "tables.md")
    assert (code, out) == (2, "")
    assert "--out tables.md: exists" in err
    assert Path("tables.md").read_text() == "mine"
    assert msdiff("tables", "--out", "tables.md", "--overwrite")[0] == 0
    assert Path("tables.md").read_text().startswith("# ")


@pytest.mark.slow
def test_tables_as_json(msdiff: Callable[..., tuple[int, str, str]], lines: list[TableRow]) -> None:
    code, out, err = msdiff("tables", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    keys = {"table", "row", "stage", "params_m", "paper_params_m", "gflops", "paper_gflops", "flag"}
    assert all(keys <= set(row) for row in rows)
    assert [row["params_m"] for row in rows] == [line.params_m for line in lines]
    assert {row["stage"] for row in rows} == {"1", "2", "3", "4", "5", "shared", "total"}


@pytest.mark.slow
def test_presets_on_the_command_line(msdiff: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = msdiff("presets")
    assert (code, err) == (0, "")
    found = [line.split(maxsplit=1) for line in out.splitlines()]
    assert found == [[name, summary(name)] for name in PRESETS]
    assert all(len(text) > 20 and text.endswith(".") for _, text in found)
    assert len({text for _, text in found}) == len(PRESETS)
    code, out, err = msdiff("presets", "--json")
    assert [(x["name"], x["summary"]) for x in json.loads(out)] == [(name, summary(name)) for name in PRESETS]
