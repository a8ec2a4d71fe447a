"""The report in a browser: nothing overflows on a phone or a desktop, and axe-core finds nothing to mend.

Needs Chromium and axe-core (`npm install --no-save axe-core`, or MSDIFF_AXE=PATH/axe.min.js).
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion.config import DataConfig, NetworkConfig, RunConfig
from multistage_diffusion.evaluation import PixelFeatures, evaluate_samples
from multistage_diffusion.files import write_json
from multistage_diffusion.reporting.describe import architecture_rows, describe
from multistage_diffusion.reporting.network_drawing import draw_network
from multistage_diffusion.reporting.pictures import grid, save_png
from multistage_diffusion.reporting.report import Neighbours, write_report
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stages import Stages

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WIDTHS = (390, 1280)
ALONE = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# what sticks out of the page, without what lies in a box that scrolls by itself; and what is white on the dark page
LOOK = """
const out = [];
const inBox = e => { for (let p = e; p; p = p.parentElement) if (p.classList.contains("scroll")) return true; return false; };
for (const e of document.body.querySelectorAll("*")) {
  const box = e.getBoundingClientRect();
  if (box.width && !inBox(e) && (box.right > innerWidth + 0.5 || box.left < -0.5)) out.push(e.tagName + " " + box.right);
}
const white = [...document.querySelectorAll("body *")].filter(e => {
  const style = getComputedStyle(e);
  return [style.backgroundColor, style.fill].includes("rgb(255, 255, 255)") && e.getBoundingClientRect().width > 20;
}).map(e => e.tagName);
const texts = [...document.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().width);
const sizes = texts.map(e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b));
const tell = found => {
  const all = document.documentElement;
  const result = {width: innerWidth, over: all.scrollWidth - all.clientWidth, out, white, found,
                  dark: matchMedia("(prefers-color-scheme: dark)").matches, smallest: Math.min(...sizes)};
  document.body.textContent = ""; document.head.textContent = "";
  const pre = document.createElement("pre"); pre.id = "result"; pre.textContent = JSON.stringify(result);
  document.body.append(pre);
};
"""
AXE = """axe.run({resultTypes: ["violations"]}).then(r => tell(r.violations.map(v =>
  v.id + ": " + v.nodes.slice(0, 3).map(n => n.html.slice(0, 200)).join(" | "))), e => tell(["axe failed: " + e]));"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on the path (Debian: apt-get install chromium)")
    return found


def axe() -> str:
    path = Path(os.environ.get("MSDIFF_AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
    if not path.exists():
        pytest.skip(f"no axe-core at {path} (npm install --no-save axe-core, or MSDIFF_AXE=PATH/axe.min.js)")
    return path.read_text()


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def log(folder: Path, stages: int) -> None:
    """Write what a training and its evaluations log."""
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        record = {"step": step, "images": 128 * step, "loss": [1.0 / (step + k) for k in range(stages)], "seconds": 2.0}
        norms = {"encoder": 0.5, **{f"decoder.{k + 1}": 0.1 for k in range(stages)}}
        lines.append({"kind": "train", **record, "grad_norm": norms, "lr": 1e-4, "images_per_s": 64.0})
        if step % 10 == 0:
            measured = {"extractor": "pixels", "count": 2000, "reference": "training images", "frechet": 90.0 / step}
            kept = {"petaflops": 0.25 * step, "seconds": 1.0, "metrics": {"recall": step / 50}}
            lines += [
                {"kind": "held_out", **record},
                {"kind": "quality", "step": step, "images": step, **measured, **kept},
            ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launch = {"time": "2025-01-05T10:00:00+0000", "version": "0.1.0", "torch": "2.14.0", "device": "CPU, 2 threads"}
    command = "msdiff train --data /a/very/long/path/without/any/space/that/a/browser/could/break --out run"
    (folder / "launches.jsonl").write_text(json.dumps({**launch, "command": command}) + "\n")


@pytest.fixture(scope="module", params=[1, 2, "gaussian", "snr"], ids=str)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a report with all that it may show, for stages found in each way."""
    folder = tmp_path_factory.mktemp("run")
    from sklearn.datasets import load_digits

    digits = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:300, None]
    found = compute_stages(digits, settings(request.param))
    widths = (24, 16, 16)[: len(found.edges_sigma) + 1]
    config = RunConfig(
        name="a run",
        data=DataConfig(source="/a/folder", shape=(1, 8, 8), class_names=("cats", "dogs", "a class of a long name")),
        network=NetworkConfig.of(channels=1, encoder_width=16, decoder_widths=widths, num_classes=3),
        stages=Stages(found.edges_sigma),
    )
    log(folder, len(widths))
    samples, real = pictures(16, 1), pictures(40, 3)
    for step in (10, 20, 30):
        save_png(grid(pictures(16, step), captions=["cats"] * 16), folder / "samples" / f"step_{step:08d}.png")
    write_json(
        folder / "evaluation.json",
        [evaluate_samples(pictures(30, 5), real, pictures(30, 6), PixelFeatures(), splits=1)],
    )
    described = describe(config)
    write_report(
        folder,
        config=config,
        architecture=architecture_rows(described),
        samples=samples,
        real=real,
        sample_classes=["cats", "dogs"] * 8,
        neighbours=Neighbours(samples=samples[:4], nearest=real[:4], distances=[1.0, 2.0, 3.0, 4.0]),
        found=found,
        network_svg=draw_network(config.network, described, "svg").decode(),
    )
    return (folder / "report.html").read_text()


def settings(way: Any) -> StageSettings:
    if way == "gaussian":
        return StageSettings(algorithm=2, denoiser="gaussian")
    found = StageSettings(samples=200) if way != "snr" else StageSettings(algorithm="snr")
    return replace(found, algorithm=2, stages=3) if way == 2 else found


@cache
def seen(page: str, width: int, dark: bool, script: str, folder: Path) -> dict[str, Any]:
    """Return what a script tells of a page in a window of this width."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it forbids scripts
    page = page.replace("<details>", "<details open>")
    inner = page.replace("</body>", f"<script>{script}</script></body>")
    # a window is at least 500 pixels wide; a frame is not
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(inner)}"></iframe>'
    (folder / "page.html").write_text(
        f'<!DOCTYPE html><html lang="en"><body style="margin:0">{frame}{COPY}</body></html>'
    )
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    own = (f"--user-data-dir={folder / 'profile'}", scheme, "--window-size=1400,1000", "--virtual-time-budget=60000")
    command = [browser(), *ALONE, *own, "--dump-dom", (folder / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    told = re.search(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    assert told, dom[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(told[1]))
    return result


COPY = """<script>
const wait = setInterval(() => {
  const pre = document.getElementById("f").contentDocument.getElementById("result");
  if (pre) { clearInterval(wait); const told = document.createElement("pre"); told.id = "told";
             told.textContent = pre.textContent; document.body.append(told); document.getElementById("f").remove(); }
}, 100);
</script>"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_all_is_legible(report: str, width: int, dark: bool, tmp_path: Path) -> None:
    found = seen(report, width, dark, f'{LOOK} addEventListener("load", () => tell([]));', tmp_path)
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["over"] == 0
    assert found["out"] == []
    assert found["smallest"] >= 8  # pixels
    if dark:
        assert found["white"] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_axe_finds_nothing(report: str, width: int, dark: bool, tmp_path: Path) -> None:
    found = seen(report, width, dark, f"{axe()}</script><script>{LOOK}{AXE}", tmp_path)
    assert found["found"] == []


def test_a_fault_is_seen(tmp_path: Path) -> None:
    bad = '<!DOCTYPE html><html><head><title>t</title></head><body><div style="width:500px">.</div><img src=""></body></html>'
    found = seen(bad, 390, False, f"{axe()}</script><script>{LOOK}{AXE}", tmp_path)
    assert found["over"] == 118
    assert found["out"] == ["DIV 508"]
    assert {fault.split(":")[0] for fault in found["found"]} >= {"image-alt", "html-has-lang"}
