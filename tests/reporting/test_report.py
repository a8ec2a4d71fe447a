import base64
import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion import palette
from multistage_diffusion.config import DataConfig, NetworkConfig, RunConfig
from multistage_diffusion.config.serialization import override, to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import EvaluationResult, MetricValue, PixelFeatures, evaluate_samples
from multistage_diffusion.files import write_json
from multistage_diffusion.reporting.captions import STRIP
from multistage_diffusion.reporting.describe import describe
from multistage_diffusion.reporting.network_drawing import draw_network
from multistage_diffusion.reporting.pictures import grid, save_png
from multistage_diffusion.reporting.report import ArchitectureRow, Neighbours, write_report
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stages import Stages

VOID = {"meta", "img", "br", "link", "input", "hr"}
SECTIONS = ["stages", "network", "training", "samples", "neighbours", "metrics", "origin"]


class Page(HTMLParser):
    """Checks that tags are nested and collects what a test may ask."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + "\n"

    def images(self) -> list[np.ndarray]:
        sources = [a["src"] or "" for tag, a in self.tags if tag == "img"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(s.split(",")[1])))) for s in sources]


def charts(page: Page) -> int:
    """Return the number of charts; each is in the page for wide and for narrow screens."""
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "svg"]
    assert kinds.count("wide") == kinds.count("narrow") == len(kinds) / 2
    return kinds.count("wide")


def pictures(count: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 8, 8), generator=g, dtype=torch.uint8)


def make_config(stages: int, name: str = "try") -> RunConfig:
    interior = (0.6, 5.3, 20.0)[: stages - 1]
    network = NetworkConfig.of(channels=1, encoder_width=16, decoder_widths=(16,) * stages)
    return RunConfig(name=name, data=DataConfig(source="my digits"), network=network, stages=Stages(interior))


def make_run(folder: Path, stages: int) -> None:
    records: list[dict[str, object]] = []
    for step in range(1, 41):
        losses: list[float | None] = [1.0 / (step + k) for k in range(stages)]
        if step == 3:
            losses[0] = None  # no rows of that stage
        norms = {"encoder": 0.5, **{f"decoder.{k + 1}": 0.1 for k in range(stages)}}
        record = {"step": step, "images": 128 * step, "loss": losses, "seconds": 2.0}
        records.append({"kind": "train", **record, "grad_norm": norms, "lr": 1.25e-4, "images_per_s": 64.0})
        if step % 10 == 0:
            records.append({"kind": "held_out", **record})
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # killed in mid-write
    launch = {"time": "2025-01-05T10:00:00+0000", "version": "0.1.0", "torch": "2.14.0", "device": "some device"}
    command = "msdiff train --data 'a & b' --out run"
    (folder / "launches.jsonl").write_text(json.dumps({**launch, "command": command}) + "\n")


def rows(config: RunConfig) -> list[ArchitectureRow]:
    stages = [
        ArchitectureRow(
            name=f"stage {k + 1}",
            width=width,
            sigma=config.stages.interval(k),
            t=(0.001, 1.0),
            parameters=1_914_000,
            multiply_adds=21_000_000_000,
        )
        for k, width in enumerate(config.network.decoder_widths)
    ]
    return [*stages, ArchitectureRow(name="all", parameters=950)]


def evaluation() -> EvaluationResult:
    return evaluate_samples(pictures(30, 1), pictures(40, 2), pictures(30, 3), PixelFeatures(), splits=1)


def test_curves_that_are_no_png_are_refused_and_start_no_other_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    make_run(tmp_path, 3)
    config, curves = make_config(3), tmp_path / "stages.png"
    curves.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(
        UserError, match=r"stages\.png: is not a readable PNG image \(.*\); remove it, or write it again"
    ):
        write_report(
            tmp_path,
            config=config,
            architecture=rows(config),
            samples=pictures(9, 4),
            real=pictures(9, 6),
            stages_png=curves,
        )
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("stages", [1, 3, 4])
def test_a_full_report_stands_alone(tmp_path: Path, stages: int) -> None:
    make_run(tmp_path, stages)
    config = make_config(stages)
    write_json(tmp_path / "evaluation.json", [evaluation()])
    Image.new("RGB", (40, 30), "red").save(tmp_path / "stages.png")
    samples, near = pictures(9, 4), pictures(9, 5)
    path = write_report(
        tmp_path,
        config=config,
        architecture=rows(config),
        samples=samples,
        real=pictures(9, 6),
        neighbours=Neighbours(samples=samples[:3], nearest=near[:3], distances=[0.5, 1.25, 3.0]),
        stages_png=tmp_path / "stages.png",
    )
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert [a["id"] for tag, a in page.tags if tag == "section"] == SECTIONS
    assert "://" not in page.source
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert "url(" not in page.source.replace("url(#", "")
    assert len(page.images()) == 1 + 2 + 3  # curves, two grids, three pairs
    assert charts(page) == 2
    for words in ("5,120", "1 min 20 s", "some device", "0.000125", "64 images per second"):
        assert words in page.text
    for words in ("my digits", "msdiff train --data 'a & b' --out run", "1.91 M", "21 G", "950", "not comparable"):
        assert words in page.text
    assert f"Stage {stages}" in page.text
    assert f"decoder {stages}" in page.text
    assert "encoder_width: 16" in page.text


def evaluated(step: int, frechet: float | None) -> dict[str, object]:
    measured = {"extractor": "pixel <features>", "count": 2000, "reference": "/a/b/real.npz", "frechet": frechet}
    return {"kind": "quality", "step": step, "images": 128 * step, "petaflops": 0.25 * step, "seconds": 1.0, **measured}


def evaluation_section(folder: Path, distances: list[float | None]) -> Page:
    make_run(folder, 1)
    lines = [json.dumps(evaluated(10 * k, distance)) + "\n" for k, distance in enumerate(distances, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines) + (folder / "metrics.jsonl").read_text())
    images = pictures(1, 0)
    return Page(write_report(folder, config=make_config(1), architecture=[], samples=images, real=images))


def test_distances_during_training_are_drawn_against_compute(tmp_path: Path) -> None:
    page = evaluation_section(tmp_path, [300.0, None, 40.0, 60.0])
    assert charts(page) == 3
    for words in (
        "Fréchet distance: features pixel <features>, 2,000 samples",
        "Fréchet distance of samples during training against real.npz, by training compute",
        "training PFLOPs",
        "best: 40 at step 30",
    ):
        assert words in page.text


def test_further_metrics_are_drawn_in_their_own_charts(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    lines = [
        {**evaluated(10, 50.0), "metrics": {"recall": 0.25, "unknown": -1.0}},
        {**evaluated(20, 40.0), "metrics": {"recall": 0.75}},
        evaluated(30, 30.0),
    ]
    old = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + old)
    images = pictures(1, 0)
    page = Page(write_report(tmp_path, config=make_config(1), architecture=[], samples=images, real=images))
    assert charts(page) == 2 + 3
    for words in ("Recall: features pixel", "best: 0.75 at step 20", "Higher is better", "unknown of samples during"):
        assert words in page.text


def test_distances_that_could_not_be_measured_are_not_drawn(tmp_path: Path) -> None:
    page = evaluation_section(tmp_path, [None])
    assert charts(page) == 2
    assert "No samples could be evaluated during training." in page.text


def test_a_bare_run_makes_a_report(tmp_path: Path) -> None:
    config = make_config(1)
    page = Page(write_report(tmp_path, config=config, architecture=[], samples=pictures(4, 0), real=pictures(4, 1)))
    assert [a["id"] for tag, a in page.tags if tag == "section"] == SECTIONS
    for words in ("No training was logged", "Not evaluated", "Not compared", "No command", "No similarity curves"):
        assert words in page.text
    assert "[0, ∞)" in page.text


def test_bars_and_table_show_the_shares_of_the_training_if_they_are_known(tmp_path: Path) -> None:
    config = make_config(2)
    known = [
        dataclasses.replace(row, noise=noise, rows=0.5, steps=1.0, compute=share)
        for row, noise, share in zip(rows(config), (0.9, 0.1), (0.75, 0.25), strict=False)
    ]
    images = pictures(1, 0)
    page = Page(write_report(tmp_path, config=config, architecture=known, samples=images, real=images))
    for words in ("Share of the noise range (VP time, 0.001 to 1)", "Share of the training's rows", "75%", "25%"):
        assert words in page.text
    styles = [a["style"] or "" for tag, a in page.tags if tag == "div" and "style" in a]
    assert [float(style.split(":")[1].split(";")[0]) for style in styles[2:]] == [0.9, 0.1, 0.5, 0.5, 0.75, 0.25]
    cells = page.text.replace("\n", " ").split()
    assert [cells[i : i + 4] for i, cell in enumerate(cells) if cell in ("90.0%", "10.0%")] == [
        ["90.0%", "50.0%", "100.0%", "75.0%"],
        ["10.0%", "50.0%", "100.0%", "25.0%"],
    ]


@pytest.mark.slow
def test_the_curves_of_the_stages_and_the_network_are_drawn(tmp_path: Path) -> None:
    config = make_config(3)
    found = compute_stages(pictures(200, 3).numpy(), StageSettings(algorithm=2, stages=3, samples=100))
    described = describe(override(config, {"data.shape": [1, 8, 8]}))
    svg = draw_network(config.network, described, "svg").decode()
    images = pictures(1, 0)
    arguments = {"config": config, "architecture": [], "samples": images, "real": images}
    page = Page(write_report(tmp_path, **arguments, found=found, network_svg=svg))  # type: ignore[arg-type]
    assert "://" not in page.source
    assert [a.get("class") for tag, a in page.tags if tag == "svg"] == ["wide", "narrow", ""]
    for words in ("How many stages?", "Shared encoder", "The network, to scale"):
        assert words in page.text
    assert page.text.replace("\n", " ").count("The optimal denoiser changes at σ = ") == 2
    assert palette.INK not in page.source.split("</style>")[1]


def test_samples_over_training_are_cut_from_their_grids(tmp_path: Path) -> None:
    config = override(make_config(1), {"data.shape": [1, 8, 8]})
    drawn = {step: pictures(25, step) for step in range(10, 110, 10)}
    for step, images in drawn.items():
        captions = [str(i) for i in range(25)] if step > 50 else None
        save_png(grid(images, captions=captions), tmp_path / "samples" / f"step_{step:08d}.png")
    images = pictures(1, 0)
    page = Page(write_report(tmp_path, config=config, architecture=[], samples=images, real=images))
    alts = [a["alt"] or "" for tag, a in page.tags if tag == "img"]
    assert len(alts) == len(set(alts))
    shown = [int(alt.split()[-1]) for alt in alts if alt.startswith("samples after step")]
    assert len(shown) == 6
    assert (shown[0], shown[-1]) == (10, 100)
    for step, image in zip(shown, page.images()[2:], strict=True):
        strip = STRIP if step > 50 else 0
        assert image.shape == (3 * (65 + strip) + 1, 3 * 65 + 1)
        down = 65 + strip
        assert np.array_equal(image[1 + down : 65 + down : 8, 66:130:8], drawn[step][6, 0].numpy())  # row 2, column 2


def test_classes_have_their_names(tmp_path: Path) -> None:
    changes = {"network.num_classes": 3, "data.class_names": ["cats", "<dogs>", "eels"]}
    config, images = override(make_config(1), changes), pictures(4, 0)
    classes = ["cats", "<dogs>", "eels", "cats"]
    page = Page(
        write_report(tmp_path, config=config, architecture=[], samples=images, real=images, sample_classes=classes)
    )
    assert "3: cats, <dogs>, eels" in page.text
    made, real = page.images()
    assert made.shape[0] == real.shape[0] + 2 * STRIP


def test_images_arrive_unchanged(tmp_path: Path) -> None:
    samples, real = pictures(4, 7), pictures(1, 8)
    config = make_config(1)
    page = Page(write_report(tmp_path, config=config, architecture=[], samples=samples, real=real))
    grid, single = page.images()
    assert single.shape == (70, 70)
    assert np.array_equal(single[3:-3, 3:-3][::8, ::8], real[0, 0].numpy())  # enlarged 8 times, 3 pixels around
    assert np.array_equal(grid[3 : 3 + 64, 70 : 70 + 64][::8, ::8], samples[1, 0].numpy())


def test_names_cannot_inject_html(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>"
    config = dataclasses.replace(make_config(1, bad), data=DataConfig(source=bad))
    make_run(tmp_path, 1)
    launch = {"time": bad, "version": bad, "torch": bad, "device": bad, "command": bad}
    (tmp_path / "launches.jsonl").write_text(json.dumps(launch) + "\n")
    result = {**to_dict(evaluation()), "extractor": bad, "comparable_to": bad, "preprocessing": bad}
    result["metrics"] = {bad: {"value": 1.0, "settings": {bad: bad}}}
    images = pictures(4, 9)
    architecture = [ArchitectureRow(name=bad, parameters=1)]
    path = write_report(
        tmp_path, config=config, architecture=architecture, samples=images, real=images, evaluation=[result]
    )
    page = Page(path)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.text.count("<script>alert") >= 12


def test_stages_fill_the_schedules_time(tmp_path: Path) -> None:
    config = make_config(3)
    page = Page(write_report(tmp_path, config=config, architecture=[], samples=pictures(1, 0), real=pictures(1, 1)))
    styles = [a["style"] or "" for tag, a in page.tags if tag == "div" and "style" in a]
    shares = [float(style.split(":")[1].split(";")[0]) for style in styles]
    vp = config.diffusion.schedule
    low, high = float(vp.time(0.6)), float(vp.time(5.3))
    assert shares == pytest.approx([(low - 0.001) / 0.999, (high - low) / 0.999, (1 - high) / 0.999], abs=1e-5)


def test_metrics_are_explained(tmp_path: Path) -> None:
    values = {
        "frechet": MetricValue(value=3.0, real=2.0),
        "memorised": MetricValue(value=0.09, real=0.05, settings={"threshold": 1.25}),
        "of another machine": MetricValue(value=0.5, deviation=0.125),
    }
    result = dataclasses.replace(evaluation(), metrics=values, rank_deficient=True)
    images = pictures(1, 0)
    arguments = {"config": make_config(1), "architecture": [], "samples": images, "real": images}
    text = Page(write_report(tmp_path, **arguments, evaluation=[result])).text  # type: ignore[arg-type]
    for words in ("Fréchet distance", "Lower is better", "not more images than feature dimensions", "9.0%", "5.0%"):
        assert words in text
    for words in ("threshold = 1.25", "of another machine", "0.5 ± 0.12", "Real images"):
        assert words in text
    against = dataclasses.replace(result, against="statistics", metrics={"frechet": MetricValue(value=3.0)})
    text = Page(write_report(tmp_path, **arguments, evaluation=[against])).text  # type: ignore[arg-type]
    assert "\nReal images\n" not in text
    text = Page(write_report(tmp_path, **arguments, evaluation=[{**to_dict(against), "ema": 0.08}])).text  # type: ignore[arg-type]
    assert "Weights: the average of width 0.08." in text
    text = Page(write_report(tmp_path, **arguments, evaluation=[{**to_dict(result), "step": 40}])).text  # type: ignore[arg-type]
    assert "Checkpoint of step 40." in text
    assert "Real images: the same figure for training images in place of the samples." in text
    with pytest.raises(ValueError, match="evaluation: against is missing; evaluate"):
        write_report(tmp_path, **arguments, evaluation=[{"extractor": "x"}])  # type: ignore[arg-type]


def test_broken_files_and_unequal_neighbours_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"\n{"kind": "held_out"}\n')
    images = pictures(2, 0)
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is not JSON"):
        write_report(tmp_path, config=make_config(1), architecture=[], samples=images, real=images)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ValueError, match="their numbers must be equal"):
        Neighbours(samples=images, nearest=images, distances=[1.0])
