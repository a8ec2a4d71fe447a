"""The paper's tables of networks beside our own counts of the same networks.

Source of the printed figures: "Improving Training Efficiency of Diffusion Models via Multi-Stage Framework and Tailored
Multi-Decoder Architecture" (CVPR 2024), Tables 7, 8 and 9 of the supplement (the one-stage LDM beside Table 8 is the
paper's baseline). Figures are kept as printed, since the last digit sets the tolerance of a count. "GFLOPs" are
multiply-adds of one call on one image, in the paper's convention (`nets.cost`). A stage's figures include the shared
encoder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import NetworkConfig
from ..config.presets import preset
from ..nets.cost import NetworkCost, network_cost, weighted_multiply_adds
from .describe import calls_per_stage

Figures = tuple[str, str]  # parameters in millions and GFLOPs, as printed
TOLERANCE = 0.005
DIFFERS = "differs"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One network of a table, as printed.

    Attributes:
        table: the table's number.
        row: name of the row in the table.
        preset: our configuration of it.
        stages: figures of each stage, lowest noise first.
        shared: figures of the encoder, where printed.
        total: figures of the whole network, where printed.
        weights: weights of the stages in the total's mean GFLOPs.
        slips: known misprints, by (stage, "params" or "gflops").
    """

    table: int
    row: str
    preset: str
    stages: tuple[Figures, ...]
    shared: Figures | None = None
    total: Figures | None = None
    weights: tuple[float, ...] = (1.0,)
    slips: Mapping[tuple[str, str], str] = field(default_factory=dict)


def _lengths(*edges: float) -> tuple[float, ...]:
    return tuple(round(b - a, 3) for a, b in itertools.pairwise((0.0, *edges, 1.0)))


# Totals of Tables 7 and 9 weight the stages by the lengths of their intervals in t. For three stages the figures fit
# 0.426 and 0.626, points of Algorithm 2's grid, rather than the printed edges 0.442 and 0.631.
THREE = _lengths(0.426, 0.626)
EIGHT_FOUR_EIGHT = (8, 4, 8)  # calls per stage, of 20, in Table 8

PAPER_ROWS = (
    PaperRow(
        table=7,
        row="1",
        preset="cifar10-dpm",
        stages=(("169", "29.95"), ("108", "17.65"), ("47", "6.31")),
        shared=("43", "5.75"),
        total=("237", "18.65"),
        weights=THREE,
    ),
    PaperRow(
        table=7,
        row="2",
        preset="cifar10-dpm-table7-2",
        stages=(("168", "27.57"), ("138", "21.73"), ("72", "9.65")),
        shared=("68", "8.98"),
        total=("242", "19.7"),
        weights=THREE,
    ),
    PaperRow(
        table=7,
        row="3",
        preset="cifar10-dpm-table7-3",
        stages=(("189", "29.43"), ("160", "23.91"), ("103", "13.7")),
        shared=("98", "12.93"),
        total=("256", "22.45"),
        weights=THREE,
    ),
    PaperRow(
        table=7,
        row="4",
        preset="cifar10-dpm-table7-4",
        stages=(("174", "26.54"), ("126", "17.62"), ("103", "13.7")),
        shared=("98", "12.93"),
        total=("207", "22.45"),
        weights=THREE,
        slips={("total", "gflops"): "slip in print: GFLOPs copied from row 3"},
    ),
    PaperRow(table=8, row="LDM", preset="celebahq-ldm-one-stage", stages=(("274", "88.39"),)),
    PaperRow(
        table=8,
        row="1",
        preset="celebahq-ldm-table8-1",
        stages=(("238", "80.03"), ("189", "64.95"), ("161", "51.87")),
        shared=("79", "16.69"),
        total=("428", "65.75"),
        weights=EIGHT_FOUR_EIGHT,
    ),
    PaperRow(
        table=8,
        row="2",
        preset="celebahq-ldm-table8-2",
        stages=(("206", "72.61"), ("158", "57.85"), ("108", "34.38")),
        shared=("55", "11.6"),
        total=("361", "54.37"),
        weights=EIGHT_FOUR_EIGHT,
    ),
    PaperRow(
        table=8,
        row="3",
        preset="celebahq-ldm-table8-3",
        stages=(("274", "88.39"), ("224", "72.97"), ("170", "48.17")),
        shared=("108", "22.71"),
        total=("452", "69.22"),
        weights=EIGHT_FOUR_EIGHT,
    ),
    PaperRow(
        table=8,
        row="4",
        preset="celebahq-ldm",
        stages=(("316", "105.82"), ("224", "72.97"), ("170", "48.17")),
        shared=("108", "22.71"),
        total=("494", "76.19"),
        weights=EIGHT_FOUR_EIGHT,
    ),
    PaperRow(table=9, row="n=1", preset="cifar10-dpm-one-stage", stages=(("108", "17.65"),)),
    PaperRow(
        table=9,
        row="n=2",
        preset="cifar10-dpm-two-stages",
        stages=(("136", "26.59"), ("95", "16.85")),
        total=("188", "21.49"),
        weights=_lengths(0.476),
        slips={
            ("1", "gflops"): "slip in print: GFLOPs do not fit the parameters",
            ("2", "gflops"): "slip in print: GFLOPs do not fit the parameters",
            ("total", "gflops"): "slip in print: mean of the stages' misprinted GFLOPs",
        },
    ),
    PaperRow(
        table=9,
        row="n=3",
        preset="cifar10-dpm",
        stages=(("169", "29.95"), ("108", "17.65"), ("47", "6.31")),
        total=("230", "18.65"),
        weights=THREE,
        slips={("total", "params"): "slip in print: Table 7 has 237 M for this network"},
    ),
    PaperRow(
        table=9,
        row="n=4",
        preset="cifar10-dpm-four-stages",
        stages=(("159", "29.78"), ("95", "16.85"), ("71", "11.97"), ("32", "4.41")),
        total=("284", "17.33"),
        weights=_lengths(0.376, 0.526, 0.726),
    ),
    PaperRow(
        table=9,
        row="n=5",
        preset="cifar10-dpm-five-stages",
        stages=(("154", "30.38"), ("88", "16.82"), ("88", "16.82"), ("27", "4.42"), ("21", "3.28")),
        total=("336", "17.03"),
        weights=_lengths(0.376, 0.476, 0.626, 0.776),
    ),
)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of a table: our count beside the paper's figure.

    Attributes:
        table, row: as in `PaperRow`.
        stage: "1" .. (lowest noise first), "shared" (the encoder) or "total".
        params_m, paper_params_m: parameters in millions.
        gflops, paper_gflops: multiply-adds of a call in billions; a total's is the mean over stages.
        flag: empty if both figures agree; the misprint if it is known; else "differs".
        weights: weights of the stages in a total.
        sampler: the preset's own sampler as text, for a total.
        calls: calls of each stage by that sampler.
        gflops_by_calls: a total weighted by those calls.
    """

    table: int
    row: str
    stage: str
    params_m: float
    paper_params_m: float
    gflops: float
    paper_gflops: float
    flag: str
    weights: tuple[float, ...] | None = None
    sampler: str | None = None
    calls: tuple[int, ...] | None = None
    gflops_by_calls: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the line as JSON-able data."""
        return asdict(self)


def agrees(counted: float, printed: str) -> bool:
    """Return whether a count is within 0.5 % of a printed figure, or within half its last digit."""
    decimals = len(printed.partition(".")[2])
    return abs(counted - float(printed)) <= max(TOLERANCE * float(printed), 0.5 * 10.0**-decimals)


def paper_tables() -> list[TableRow]:
    """Count every network of the tables on the meta device, and compare it with the paper's figures."""
    return [line for paper in PAPER_ROWS for line in compare(paper)]


def compare(paper: PaperRow, network: NetworkConfig | None = None) -> Iterator[TableRow]:
    """Yield the lines of one network (default: its preset's) beside the paper's figures."""
    config = preset(paper.preset)
    _, height, width = config.input_shape
    cost = _cost(network or config.network, height, width)
    for stage, figures in zip(cost.stages, paper.stages, strict=True):
        yield _line(paper, str(stage.stage), stage.parameters, stage.multiply_adds, figures)
    if paper.shared is not None:
        yield _line(paper, "shared", cost.shared_parameters, cost.shared_multiply_adds, paper.shared)
    if paper.total is not None:
        calls = calls_per_stage(config)
        yield _line(
            paper,
            "total",
            cost.total_parameters,
            weighted_multiply_adds(cost, paper.weights),
            paper.total,
            weights=paper.weights,
            sampler=f"{config.sampling.solver} in even {config.sampling.spacing}",
            calls=tuple(calls),
            gflops_by_calls=weighted_multiply_adds(cost, calls) / 1e9,
        )


@functools.cache
def _cost(network: NetworkConfig, height: int, width: int) -> NetworkCost:
    return network_cost(network, height, width)


def _line(paper: PaperRow, stage: str, parameters: int, adds: float, figures: Figures, **means: Any) -> TableRow:
    counted = {"params": parameters / 1e6, "gflops": adds / 1e9}
    printed = dict(zip(counted, figures, strict=True))
    flags = [
        paper.slips.get((stage, name), f"{DIFFERS}: {name}")
        for name in counted
        if not agrees(counted[name], printed[name])
    ]
    return TableRow(
        table=paper.table,
        row=paper.row,
        stage=stage,
        params_m=counted["params"],
        paper_params_m=float(printed["params"]),
        gflops=counted["gflops"],
        paper_gflops=float(printed["gflops"]),
        flag="; ".join(flags),
        **means,
    )


# -- printing ----------------------------------------------------------------------------------------------------------

HEADINGS = ("row", "stage", "params, M", "paper", "diff", "GFLOPs", "paper", "diff", "flag")
NOTE = """\
A stage's figures include the encoder. GFLOPs are multiply-adds of convolutions for one image and one call, as the paper
counts them; a total's are the mean over the stages, weighted as in the paper. Figures agree if they differ by 0.5 % or
half the last printed digit at most."""


def tables_text(lines: list[TableRow], *, markdown: bool = False) -> str:
    """Return the tables as text, or as Markdown."""
    heading = "## Table {}" if markdown else "Table {}"
    parts = ["# The paper's networks, counted", NOTE] if markdown else [NOTE]
    for table, group in itertools.groupby(lines, key=lambda line: line.table):
        members = list(group)
        cells = [HEADINGS, *(_cells(line) for line in members)]
        parts += [heading.format(table), _markdown(cells) if markdown else _columns(cells)]
        parts.append("\n".join(["Mean GFLOPs of a call:", *([""] if markdown else []), *_means(members)]))
    return "\n\n".join([*parts, verdict(lines)])


def verdict(lines: list[TableRow]) -> str:
    """Return one line with the number of lines that agree."""
    differing = sum(DIFFERS in line.flag for line in lines)
    slips = sum(bool(line.flag) for line in lines) - differing
    agreeing = len(lines) - differing - slips
    return (
        f"{agreeing} of {len(lines)} lines agree; {slips} differ by the paper's own slips; {differing} differ otherwise"
    )


def _cells(line: TableRow) -> tuple[str, ...]:
    return (
        line.row,
        line.stage,
        f"{line.params_m:.2f}",
        f"{line.paper_params_m:g}",
        _difference(line.params_m, line.paper_params_m),
        f"{line.gflops:.2f}",
        f"{line.paper_gflops:g}",
        _difference(line.gflops, line.paper_gflops),
        line.flag,
    )


def _difference(counted: float, printed: float) -> str:
    return f"{100 * (counted / printed - 1):+.2f} %"


def _means(lines: list[TableRow]) -> Iterator[str]:
    """Yield both means of every total: by the paper's weights, and by the calls of the preset's sampler."""
    for line in lines:
        if line.weights is not None and line.calls is not None:
            weights = "/".join(f"{w:g}" for w in line.weights)
            calls = "/".join(map(str, line.calls))
            yield (
                f"- {line.row}: {line.gflops:.2f} by the paper's weights {weights}; "
                f"{line.gflops_by_calls:.2f} by {sum(line.calls)} calls {calls} of {line.sampler}"
            )


def _markdown(cells: list[tuple[str, ...]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(HEADINGS) - 3) + ["---"]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def _columns(cells: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    outer = (0, 1, len(HEADINGS) - 1)
    return "\n".join(
        "  ".join(
            c.ljust(w) if i in outer else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
