from __future__ import annotations

import errno
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

import multistage_diffusion as msd
from multistage_diffusion import cli
from multistage_diffusion.commands import COMMANDS
from multistage_diffusion.commands import quickstart as quickstart_command
from multistage_diffusion.commands.options import load_config, parse_changes
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, read_json, to_dict
from multistage_diffusion.console import Bar, TrainingProgress
from multistage_diffusion.errors import UserError
from multistage_diffusion.escaping import shown
from multistage_diffusion.files import write_json
from multistage_diffusion.performance import devices
from multistage_diffusion.progress import shown_reading
from multistage_diffusion.schedules import UniformTime
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.shares import prior_masses
from multistage_diffusion.stage_finding import StageSettings, gaussian_stages
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.metrics import TrainingDiverged
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import demo

TINY = [
    "--set",
    "network.encoder_width=8",
    "network.decoder_widths=[8,8,8]",
    "network.blocks_per_level=1",
    "training.shares=uniform",
    "training.batch=6",
    "training.steps=2",
    "training.held_out_rows=4",
    "training.sample_every=0",
    "sampling.calls=6",
]

Call = Callable[..., tuple[int, str, str]]

DIGITS = "digits: 1797 images, 10 classes, 8 x 8, grey\n"
OPENED = re.compile(r".+: \d+ images, (no labels|\d+ classes), \d+ x \d+, (grey|colour)\b")


@pytest.fixture
def msdiff(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command line in an empty folder; return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a split, the run trained with it, and images."""
    folder = tmp_path_factory.mktemp("made")
    assert cli.main(["stages", "digits", "--samples", "200", "--out", str(folder / "stages.json")]) == 0
    train = ["train", "--preset", "digits", "--stages", str(folder / "stages.json"), "--out", str(folder / "run")]
    assert cli.main([*train, *TINY]) == 0
    write_pictures(folder / "photos", 60, (12, 20, 3))
    return folder


def write_pictures(folder: Path, count: int, shape: tuple[int, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(shape)).integers(0, 256, (count, *shape), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def refused(result: tuple[int, str, str], *words: str, code: int = 2) -> None:
    """Assert one clear line on standard error, beside those on data opened before; nothing on standard output."""
    found, out, err = result
    err = "".join(line for line in err.splitlines(keepends=True) if not OPENED.match(line))
    assert (found, out) == (code, "")
    assert err.startswith("msdiff: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for word in words:
        assert word in err
    assert "Traceback" not in err


# -- help and arguments -----------------------------------------------------------------------------------------------


def test_the_overview_names_every_command(msdiff: Call) -> None:
    assert list(cli.SUMMARIES) == list(COMMANDS)
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = msdiff(*arguments)
        assert (code, err) == (0, "")
        assert all(f"  {name} " in out and summary in out for name, summary in cli.SUMMARIES.items())
        assert max(map(len, out.splitlines())) <= 130


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_shell_completes_commands_options_and_values(msdiff: Call, tmp_path: Path) -> None:
    code, script, err = msdiff("--print-completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "msdiff.bash").write_text(script)
    asked = {"s": "sample stages stats", "sample --capt": "--captions", "sample --format w": "webp"}
    ask = """source msdiff.bash
function=$(complete -p msdiff | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while IFS= read -r line; do
  COMP_WORDS=(msdiff $line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  $function msdiff "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo "${COMPREPLY[*]}"
done
"""
    lines = "".join(f"{line}\n" for line in asked)
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, input=lines, capture_output=True, text=True, check=True)
    assert [" ".join(sorted(line.split())) for line in done.stdout.splitlines()] == list(asked.values())


def test_completion_is_printed_for_known_shells(msdiff: Call) -> None:
    assert "#compdef msdiff" in msdiff("--print-completion", "zsh")[1]
    refused(msdiff("--print-completion"), "name one shell, bash or zsh")
    refused(msdiff("--print-completion", "cmd"), "--print-completion cmd: name one shell, bash or zsh")


def test_what_it_says_is_said_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=said.append, flush=lambda: None))
    assert cli.main(["describe", "nowhere"]) == 2
    (line,) = said  # several processes may speak at once
    assert line.startswith("msdiff: ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert out.splitlines()[2] == cli.SUMMARIES[name]
    assert "{None}" not in out
    examples = [line.strip() for line in out.splitlines() if line.startswith("  msdiff ")]
    assert examples
    for example in examples:
        program, command, *arguments = example.split()
        assert (program, command) == ("msdiff", name)
        assert isinstance(cli.parse(command, arguments), COMMANDS[name])


def test_the_version(msdiff: Call) -> None:
    assert msdiff("--version") == (0, f"msdiff {msd.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["command 'trian' is unknown; did you mean 'train'?"]),
        (["x"], ["choose one of quickstart, stages, boundary, train, train-codec, sample"]),
        (["stages"], ["Missing from msdiff stages: DATA"]),
        (["stages", "digits", "--algorithm", "3"], ["invalid choice '3' for argument '--algorithm'"]),
        (
            ["stages", "digits", "--size", "big"],
            ["Error parsing --size: ['big'] is not {INT INT}; for help, run msdiff stages"],
        ),
        (["stages", "digits", "--fit", "stretch"], ["'stretch' for argument '--fit'", "'crop'"]),
        (
            ["sample", "run", "--seed", "one"],
            ["Error parsing --seed: invalid literal for int() with base 10: 'one'; for"],
        ),
        (["sample", "run", "--sizes", "3"], ["msdiff: Unrecognized options: --sizes, 3; for help"]),
        (["sample", "run", "--cout", "3"], ["msdiff: Unrecognized options: --cout, 3; did you mean --count; for help"]),
        (["stages", "digits", "--eta"], ["Missing value for argument '--eta'"]),
        (
            ["sample", "run", "--label", "-a"],
            ["--label'", "; a value that begins with - is given as --label=-a; for help"],
        ),
    ],
)
def test_wrong_arguments(msdiff: Call, arguments: list[str], words: list[str]) -> None:
    result = msdiff(*arguments)
    refused(result, *words)
    assert "None" not in result[2]
    assert "--- " not in result[2]


def test_negative_numbers_are_values(msdiff: Call) -> None:
    command = cli.parse("stages", ["digits", "--data-range", "-1", "0.5", "--seed", "-3"])
    assert (command.data_range, command.seed) == ((-1.0, 0.5), -3)


def test_every_set_counts() -> None:
    arguments = ["--set", "a=1", "b=2", "--preset", "digits", "--set", "c=-3", "--set=d=4", "--replace"]
    command = cli.parse("train", arguments)
    assert command.set == ("a=1", "b=2", "c=-3", "d=4")
    assert (command.preset, command.replace) == ("digits", True)


def test_settings_are_yaml_values() -> None:
    changes = parse_changes(["a=1e-4", "b=[1, 2e3, 0.5]", "c=null", "d=crop", "e=true", "f={x: 1e2}", "g=a=b"])
    assert changes == {
        "a": 1e-4,
        "b": [1, 2e3, 0.5],
        "c": None,
        "d": "crop",
        "e": True,
        "f": {"x": 100.0},
        "g": "a=b",
    }
    assert list(parse_changes(["a.b=1", "a={}", "a.b=2"]).items()) == [("a", {}), ("a.b", 2)]  # the last one wins


def test_a_configuration_file_may_be_yaml(tmp_path: Path) -> None:
    config = preset("digits")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    write_json(tmp_path / "c.json", config)
    assert load_config(tmp_path / "c.yaml") == load_config(tmp_path / "c.json") == config


# -- every command ----------------------------------------------------------------------------------------------------


def test_split_prints_and_writes(msdiff: Call, tmp_path: Path) -> None:
    arguments = ("stages", "digits", "--samples", "200", "--data-range", "0", "1", "--out", "s.json")
    code, out, err = msdiff(*arguments)
    assert (code, err) == (0, DIGITS)
    saved = read_json(tmp_path / "s.json")
    first, second, written = out.splitlines()
    for k, line in enumerate((first, second)):
        (low, high), t = saved["intervals_t"][k], saved["edges_t"][k]
        assert low <= t <= high
        assert line.startswith(
            f"stage {k + 1} | {k + 2}: t = {t:.4f}, sigma = {saved['edges_sigma'][k]:.4f} (95 %: t {low:.4f}"
        )
    assert written == "written: s.json, s.png"
    assert (tmp_path / "s.png").exists()
    assert saved["data_range"] == [0.0, 1.0]
    code, out, err = msdiff(*arguments, "--json", "--overwrite")
    assert (code, err) == (0, DIGITS)
    assert json.loads(out) == saved
    assert {"edges_t", "edges_sigma", "schedule", "data_range", "settings"} <= set(saved)


@pytest.mark.slow
def test_split_prints_the_table_of_all_numbers_of_stages(msdiff: Call, tmp_path: Path) -> None:
    code, out, _ = msdiff("stages", "digits", "--algorithm", "2", "--stages", "2", "--samples", "100")
    table = read_json(tmp_path / "stages.json")["curves"]["table"]
    assert code == 0
    edge, head, *lines, training, _, first, second, written = out.splitlines()
    assert edge.startswith("stage 1 | 2: t = 0.")
    assert "boundary_ratio" not in edge  # --shift prints it
    assert head.startswith("stages  mean distance within a stage")
    assert [line.split()[:3] for line in lines] == [
        [str(row["stages"]), f"{row['distance']:.4f}", f"({row['distance_held_out']:.4f})"] for row in table
    ]
    assert training == "training with preset digits:"
    assert first.split()[0:2] + second.split()[0:2] == ["stage", "1", "stage", "2"]
    shares = [[float(cell.rstrip("%")) for cell in line.split()[4:]] for line in (first, second)]
    masses = prior_masses(
        Stages(tuple(read_json(tmp_path / "stages.json")["edges_sigma"])), preset("digits").diffusion.prior
    )
    assert [share[0] for share in shares] == pytest.approx([100 * mass for mass in masses], abs=0.1)  # noise
    assert shares[0][2] == shares[1][2] == 100.0  # steps
    assert shares[0][3] + shares[1][3] == pytest.approx(100.0, abs=0.2)  # compute
    assert written == "written: stages.json, stages.png"


def test_stages_are_printed_in_the_conventions_of_a_shift(
    msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_stages, "RESAMPLES", 5)
    find = ("stages", "digits", "--denoiser", "gaussian", "--samples", "300", "--stages", "2", "--shift", "5")
    code, out, _ = msdiff(*find)
    (sigma,) = read_json(tmp_path / "stages.json")["edges_sigma"]
    assert code == 0
    assert "stage 1 | 2 in other conventions:" in out
    assert f"t-flow          {sigma / (5 + sigma):<12.6g} " in out
    assert "boundaries" not in read_json(tmp_path / "stages.json")
    assert msdiff("stages", "digits", "--shift", "0")[0] == 2


@pytest.mark.slow
def test_stages_in_the_conventions_of_a_shift_as_json(msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_stages, "RESAMPLES", 5)
    code, out, _ = msdiff("stages", "digits", "--denoiser", "gaussian", "--stages", "2", "--shift", "5", "--json")
    found = json.loads(out)
    (sigma,), (boundary,) = found["edges_sigma"], found["boundaries"]
    assert (code, boundary["index"]) == (0, pytest.approx(5 / (5 + sigma)))


def test_stages_of_the_wiener_denoiser_say_their_shares(
    msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_stages, "RESAMPLES", 5)
    code, out, _ = msdiff("stages", "digits", "--denoiser", "gaussian", "--samples", "300")
    assert code == 0
    saved = read_json(tmp_path / "stages.json")
    assert saved["settings"]["algorithm"] == 2
    _, _, density, half, head, *lines, training, _, _, _, _, written = out.splitlines()
    assert training == "training with preset digits:"
    mean, std = saved["curves"]["proposed_density"]
    assert f"train --set diffusion.prior.p_mean={mean:g} diffusion.prior.p_std={std:g}" in density
    assert half == "measured on 300 images that are not held out; as a check, half of them give sigma = " + ", ".join(
        f"{sigma:.4f}" for sigma in saved["curves"]["half_edges_sigma"]
    )
    assert head.startswith("stages  mean squared distance within a stage   ")
    assert len(lines) == 8
    assert written == "written: stages.json, stages.png"
    code, out, _ = msdiff(
        *(
            "stages",
            "digits",
            "--denoiser",
            "gaussian",
            "--samples",
            "300",
            "--preset",
            "digits",
            "--overwrite",
            "--json",
        )
    )
    assert code == 0
    assert json.loads(out)["diffusion"]["prior"] == to_dict(preset("digits").diffusion.prior)


def test_stages_for_a_run_are_told_in_its_own_density(
    msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_stages, "RESAMPLES", 5)
    vp = {"precondition": "vp-eps", "schedule": VP(), "prior": UniformTime()}
    changes = {"diffusion": vp, "data.source": "digits", "data.shape": (1, 8, 8)}
    Run.create(tmp_path / "vp", override(preset("digits"), changes))
    find = ("stages", "digits", "--run", "vp", "--stages", "2")
    code, out, _ = msdiff(*find, "--algorithm", "timestep")
    assert code == 0
    assert "share of the run's training noise in each stage: 49.9%, 50.1%\n" in out  # uniform on [0.001, 1], cut at 0.5
    wiener = ("--denoiser", "gaussian", "--samples", "300", "--overwrite")
    assert msdiff(*find, *wiener)[0] == 0
    assert read_json(tmp_path / "stages.json")["diffusion"]["prior"] == to_dict(UniformTime())
    assert msdiff(*find, *wiener, "--preset", "digits")[0] == 0
    assert read_json(tmp_path / "stages.json")["diffusion"]["prior"]["kind"] == "log-normal"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "digits"], "--preset: only denoiser gaussian uses a training density"),
        (["--denoiser", "gaussian", "--algorithm", "1"], "algorithm=1: denoiser gaussian needs algorithm 2"),
        (["--denoiser", "gaussian", "--preset", "none"], "none"),
    ],
)
def test_options_of_the_wiener_denoiser_that_do_not_apply(msdiff: Call, arguments: list[str], words: str) -> None:
    code, out, err = msdiff("stages", "digits", *arguments)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.slow
def test_split_reads_folders_and_schedules(msdiff: Call, made: Path) -> None:
    code, out, _ = msdiff(
        *("stages", made / "photos", "--size", "6", "8", "--fit", "crop", "--held-out", "0.2"),
        *("--algorithm", "2", "--stages", "4", "--samples", "100", "--schedule", "edm", "--json"),
    )
    result = json.loads(out)
    assert code == 0
    assert result["schedule"]["kind"] == "edm"
    assert result["edges_t"] == pytest.approx(result["edges_sigma"])
    assert len(result["edges_t"]) == 3


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["digits", "--size", "8"], (8, 8)),
        (["--size", "8", "digits"], (8, 8)),
        (["--size", "8", "--fit", "crop", "digits"], (8, 8)),
        (["digits", "--size", "8", "6"], (8, 6)),
        (["--size", "8", "6", "digits"], (8, 6)),
        (["--size=8", "digits"], (8, 8)),
        (["--size", "8", "6", "--fit", "crop", "digits"], (8, 6)),
    ],
)
def test_one_number_as_size_is_a_square(arguments: list[str], size: tuple[int, int]) -> None:
    command = cli.parse("stages", arguments)
    assert (command.data, command.size) == ("digits", size)


def test_edges_may_stand_before_the_file() -> None:
    command = cli.parse("import", ["--edges", "0.5", "3", "model.pth", "--out", "run", "--size", "8"])
    assert (command.edges, command.size, command.file) == ((0.5, 3.0), (8, 8), Path("model.pth"))


def test_train_says_what_comes_next(made: Path, msdiff: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    code, out, err = msdiff("train", "--resume", "run", "--set", "training.steps=3")
    assert code == 0
    assert out == "trained: run (next: msdiff sample run, msdiff evaluate run, msdiff report run)\n"
    first, told, *shares = err.removeprefix(DIGITS).splitlines()
    assert first == "run: resuming with training.steps=3 (was 2)"
    assert told == "training run on cpu: steps 2 to 3, encoder 8, decoders 8/8/8, rows per stage 2/2/2"
    assert [line.split()[0] for line in shares] == ["training", "stage", "stage", "stage"]
    assert read_json(run / "config.json")["stages"]["interior"] == read_json(made / "stages.json")["edges_sigma"]


@pytest.mark.parametrize("kind", ["folder", *(pytest.param(k, marks=pytest.mark.slow) for k in ("zip", "npz"))])
def test_train_and_sample_small_colour_images(kind: str, made: Path, msdiff: Call, tmp_path: Path) -> None:
    source = made / "photos"
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for file in source.iterdir():
                archive.write(file, file.name)
        source = tmp_path / "photos.zip"
    elif kind == "npz":
        pixels = [np.asarray(Image.open(file)) for file in sorted(source.iterdir())]
        np.savez(tmp_path / "photos.npz", images=np.stack(pixels))
        source = tmp_path / "photos.npz"
    assert msdiff("train", "--preset", "digits", "--data", source, "--held-out", "0.2", "--out", "run", *TINY)[0] == 0
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["network"]["channels"], config["data"]["shape"]) == (3, [3, 12, 20])
    assert config["data"]["held_out"] == 0.2
    assert msdiff("sample", "run", "--count", "3", "--out", "made")[:2] == (
        0,
        "written: made (3 samples, dpm, 6 calls)\n",
    )
    files = sorted((tmp_path / "made").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((20, 12), "RGB")


def test_train_reads_images_as_told(made: Path, msdiff: Call, tmp_path: Path) -> None:
    shutil.copytree(made / "photos", tmp_path / "photos")
    write_pictures(tmp_path / "photos" / "more", 3, (9, 9))
    (tmp_path / "photos" / "000-torn.png").write_bytes((made / "photos" / "000.png").read_bytes()[:300])
    train = ("train", "--preset", "digits", "--data", "photos", "--out", "run", *TINY)
    refused(msdiff(*train), "000-torn.png")
    refused(msdiff(*train, "--skip-bad"), "more/000.png is 9x9", "--fit crop")
    refused(msdiff(*train, "--skip-bad", "--fit", "crop"), "needs data.size; add --size H W")
    assert not (tmp_path / "run").exists()
    code, _, err = msdiff(*train, "--skip-bad", "--size", "8", "6", "--fit", "crop")
    assert code == 0
    assert err.startswith("msdiff: warning: ")
    assert "000-torn.png" in err
    count = len(list((made / "photos").iterdir())) + 3
    assert f"\nphotos: {count} images, no labels, 8 x 6, colour, 1 file skipped (1 unreadable)\n" in err
    data = read_json(tmp_path / "run" / "config.json")["data"]
    assert (data["shape"], data["fit"], data["skip_bad"], data["held_out"]) == ([3, 8, 6], "crop", True, 0.1)


@pytest.mark.slow
def test_a_limit_of_pixels_is_an_option(made: Path, msdiff: Call, tmp_path: Path) -> None:
    split = ("stages", made / "photos", "--samples", "100", "--out", "s.json")
    refused(msdiff(*split, "--max-pixels", "200"), "has 240 pixels, more than data.max_pixels=200; allow it with --max")
    code, _, err = msdiff(*split, "--max-pixels", "240")
    assert code == 0
    assert err.startswith(f"{made / 'photos'}: 60 images, no labels, 12 x 20, colour\n")


@pytest.mark.slow
def test_train_with_more_stages(made: Path, msdiff: Call, tmp_path: Path) -> None:
    assert msdiff("stages", "digits", "--algorithm", "2", "--stages", "4", "--samples", "100")[0] == 0
    train = ("train", "--preset", "digits", "--stages", "stages.json", "--out", "run", *TINY)
    refused(msdiff(*train), "4 intervals but network.decoder_widths=[8, 8, 8]")
    assert msdiff(*train, "network.decoder_widths=[8,8,8,8]")[0] == 0
    assert len(read_json(tmp_path / "run" / "config.json")["stages"]["interior"]) == 3


@pytest.mark.slow
def test_train_from_another_runs_configuration(made: Path, msdiff: Call, tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey", 40, (6, 6))
    code, _, _ = msdiff("train", "--config", made / "run" / "config.json", "--data", "grey", "--out", "run")
    assert code == 0
    assert read_json(tmp_path / "run" / "config.json")["data"]["shape"] == [1, 6, 6]


def test_train_writes_tensorboard_or_names_the_extra(
    made: Path, msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(
        msdiff("train", "--preset", "digits", "--out", "run", "--track", "tensorboard"), "multistage-diffusion[track]"
    )
    graphs = ("--device", "cpu", "--set", "execution.cuda_graphs=true")
    refused(
        msdiff("train", "--preset", "digits", "--out", "run", *graphs), "execution.cuda_graphs=True needs one process"
    )
    assert not (tmp_path / "run").exists()


def test_a_way_of_computing_that_is_not_there_is_refused_before_anything_is_written(
    msdiff: Call, tmp_path: Path
) -> None:
    graphs = ("--device", "cpu", "--set", "execution.cuda_graphs=true")
    refused(
        msdiff("train", "--preset", "digits", "--out", "run", *graphs), "execution.cuda_graphs=True needs one process"
    )
    assert not (tmp_path / "run").exists()


def test_sample_warns_of_a_sampler_that_ddim_may_beat(made: Path, msdiff: Call) -> None:
    run = made / "run"
    for options in (["--solver", "heun", "--calls", "5"], ["--lower-final", "published", "--spacing", "time"]):
        code, _, err = msdiff("sample", run, "--count", "2", *options, "--overwrite")
        assert code == 0
        assert "ddim may be better" in err
        assert "docs/sampling.md" in err
    code, _, err = msdiff("sample", run, "--count", "2", "--denoise-last", "always", "--overwrite")
    assert (code, err) == (0, "")


def test_sample_writes_grids_and_arrays(made: Path, msdiff: Call, tmp_path: Path) -> None:
    code, out, err = msdiff("sample", made / "run", "--count", "4", "--solver", "ddim", "--calls", "3", "--json")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert (done["out"], done["count"], done["seed"]) == ("samples.png", 4, 0)
    assert (done["sampling"]["solver"], done["sampling"]["calls"]) == ("ddim", 3)
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (2 * 65 + 1, 2 * 65 + 1)
    assert msdiff("sample", made / "run", "--count", "4", "--out", "a.npz")[0] == 0
    array = np.load(tmp_path / "a.npz")["images"]
    assert array.shape == (4, 1, 8, 8)
    for name, options in {"one": (), "two": ("--offload", "--batch", "3")}.items():
        assert msdiff("sample", made / "run", "--count", "4", "--out", name, *options)[0] == 0
        found = [np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")) for i in range(4)]
        assert int(np.abs(np.stack(found).astype(int) - array[:, 0].astype(int)).max()) <= 1
    assert msdiff("sample", made / "run", "--count", "4", "--out", "bf16.npz", "--precision", "bf16")[0] == 0


@pytest.fixture(name="pets", scope="module")
def fixture_pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with three classes, two of them named."""
    names = {"data__class_names": ("cats", "dogs"), "data__class_counts": (5, 4, 3)}
    config = tiny.tiny_config(training__steps=1, network__num_classes=3, **names)
    run = Run.create(tmp_path_factory.mktemp("pets") / "run", config)
    Trainer(run, tiny.tiny_data(12, classes=3), device="cpu").fit()
    return run.path


def test_classes_are_asked_for_and_shown_by_name(pets: Path, msdiff: Call, tmp_path: Path) -> None:
    code, out, _ = msdiff("sample", pets, "--count", "2", "--label", "dogs", "--out", "dogs")
    assert (code, out) == (0, "written: dogs (2 samples of class dogs, dpm, 4 calls)\n")
    assert sorted(p.name for p in (tmp_path / "dogs").iterdir()) == [
        "000000-dogs.png",
        "000001-dogs.png",
        "dataset.json",
    ]
    for name, options in {"by-number": ("--label", "1"), "jpgs": ("--label", "dogs", "--format", "jpg")}.items():
        assert msdiff("sample", pets, "--count", "2", *options, "--out", name)[0] == 0
    first = [next((tmp_path / name).glob("000000*")).read_bytes() for name in ("dogs", "by-number", "jpgs")]
    assert first[0] == first[1]
    assert first[2].startswith(b"\xff\xd8")
    heights = {}
    for captions in ("auto", "off", "on", ""):  # "": --captions alone
        for label in ((), ("--label", "2")):
            options = ("--count", "4", *filter(None, ("--captions", captions)), *label, "--out", "g.png", "--overwrite")
            assert msdiff("sample", pets, *options)[0] == 0
            with Image.open(tmp_path / "g.png") as image:
                heights[captions, len(label)] = image.size[1] - 131
    assert {key for key, value in heights.items() if value} == {("auto", 0), ("on", 0), ("on", 2), ("", 0), ("", 2)}


def test_classes_captions_and_formats_that_are_not_there_are_refused(pets: Path, made: Path, msdiff: Call) -> None:
    refused(msdiff("sample", pets, "--label", "eels"), "label=eels: it must be in 0..2, or one of cats, dogs")
    refused(msdiff("sample", pets, "--label", "cat"), "did you mean 'cats'?")
    refused(msdiff("sample", pets, "--captions", "on", "--out", "a.npz"), "only a .png grid has captions")
    refused(msdiff("sample", made / "run", "--captions"), "the run is unconditional")
    refused(
        msdiff("sample", pets, "--format", "jpg", "--out", "a.npz"), "--format jpg: images in a folder have a format"
    )


def test_what_is_there_is_not_replaced_unasked(made: Path, msdiff: Call, tmp_path: Path) -> None:
    mine = {"grid.png": "a picture", "a.npz": "an array", "stages.json": "a split", "samples/000001.png": "mine"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for out in ("grid.png", "a.npz", "samples"):
        refused(msdiff("sample", made / "run", "--out", out), f"--out {out}: exists", "--overwrite")
    refused(msdiff("stages", "digits"), "--out stages.json: exists")
    refused(msdiff("stages", "digits", "--out", "grid.json"), "--out grid.png: exists")
    refused(msdiff("train", "--preset", "digits", "--out", "samples", *TINY), "samples: exists", "--replace")
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    assert len(list(tmp_path.rglob("*"))) == 5
    (tmp_path / "folder.png").mkdir()
    refused(msdiff("sample", made / "run", "--out", "folder.png", "--overwrite"), "folder.png: is a folder")
    assert msdiff("sample", made / "run", "--count", "2", "--out", "samples", "--overwrite")[0] == 0
    assert (tmp_path / "samples" / "000001.png").read_bytes().startswith(b"\x89PNG")


def test_results_need_a_place(made: Path, msdiff: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(msdiff("sample", made / "run", "--out", "file/grid.png"), "nothing can be written in", "file")
    refused(msdiff("stages", "digits", "--out", "stages.png"), "the result is JSON; name it stages.json")


def test_evaluate_prints_words_or_json(made: Path, msdiff: Call, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    code, out, err = msdiff("evaluate", "run", "--count", "30", "--json")
    result = json.loads(out)
    assert (code, err) == (0, DIGITS)
    assert (result["samples"], result["extractor"]) == (30, "pixels")
    code, out, _ = msdiff("evaluate", "run", "--count", "30", "--data", "digits")
    distance = result["metrics"]["frechet"]
    words = out.split()
    at = words.index("Fréchet")
    assert words[at : at + 5] == ["Fréchet", "distance", f"{distance['value']:.4g}", "(real", "images:"]
    assert words[at + 5] == f"{distance['real']:.4g})"
    assert "not comparable" in out or result["comparable_to"] in out
    assert len(read_json(tmp_path / "run" / "evaluation.json")) == 2


@pytest.mark.slow
def test_statistics_are_made_once_and_compared_with(made: Path, msdiff: Call, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    code, out, err = msdiff("stats", "digits", "--out", "digits.npz", "--keep", "40")
    assert (code, err) == (0, DIGITS)
    assert out == "written: digits.npz (1617 images, 64 dimensions of pixels, features of 40 kept)\n"
    refused(msdiff("stats", "digits", "--out", "digits.npz"), "--out digits.npz: exists")
    assert msdiff("stats", "digits", "--out", "digits.npz", "--overwrite")[0] == 0
    code, out, err = msdiff("evaluate", "run", "--against", "digits.npz", "--count", "30", "--json")
    assert (code, err) == (0, DIGITS)
    from_file = json.loads(out)
    code, out, _ = msdiff("evaluate", "run", "--against", "train", "--count", "30")
    assert code == 0
    values = {name: value["value"] for name, value in from_file["metrics"].items()}
    assert re.search(rf"^Fréchet distance +{values['frechet']:.4g}$", out, re.MULTILINE)
    assert "30 samples against 1617 images: train of digits. There are not more images than feature dimensions" in out
    for name in ("precision", "recall"):
        assert re.search(rf"^{name.title()} +{values[name]:.1%} +\(k = 3, images = 30\)$", out, re.MULTILINE)
    assert msdiff("report", "run", "--count", "2")[0] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "30 samples against 1617 images: digits.npz" in page


@pytest.mark.slow
def test_evaluate_reads_other_data_as_the_run_did(made: Path, msdiff: Call, tmp_path: Path) -> None:
    train = ("train", "--preset", "digits", "--data", made / "photos", "--size", "6", "6", "--fit", "resize")
    assert msdiff(*train, "--held-out", "0.3", "--out", "run", *TINY)[0] == 0
    write_pictures(tmp_path / "others", 40, (9, 9, 3))
    assert msdiff("evaluate", "run", "--data", "others", "--count", "8")[0] == 0
    refused(msdiff("evaluate", "run", "--held-out", "0.4"), "--held-out needs --data")
    refused(
        msdiff("evaluate", "run", "--data", made / "photos", "--held-out", "0.4"), "was trained on these data with 0.3"
    )


def test_describe_knows_runs_and_presets(made: Path, msdiff: Call, tmp_path: Path) -> None:
    code, out, err = msdiff("describe", made / "run")
    assert (code, err) == (0, "")
    assert "stage 3" in out
    (tmp_path / "digits").mkdir()  # a folder of images, say
    code, out, err = msdiff("describe", "digits", "--json", "--calls", "9")
    assert (code, err) == (0, "")
    described = json.loads(out)
    assert tuple(s["decoder_width"] for s in described["stages"]) == preset("digits").network.decoder_widths
    assert sum(s["calls"] for s in described["stages"]) == 9


def test_report_names_the_page(made: Path, msdiff: Call) -> None:
    page = made / "run" / "report.html"
    assert msdiff("report", made / "run", "--count", "4") == (0, f"written: {page}\n", DIGITS)
    assert "<html" in page.read_text()


@pytest.mark.slow
def test_the_demo_does_everything_and_goes_on(msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(demo.find_stages, settings=StageSettings(samples=200))
    monkeypatch.setattr(demo, "find_stages", quick)
    code, out, _ = msdiff("demo", "--out", "demo", *TINY)
    assert code == 0
    names = [line.split("  (")[0] for line in out.splitlines() if line.startswith("demo")]
    assert names == ["demo/samples.png", "demo/stages.png", "demo/report.html"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)
    assert "Fréchet distance" in out
    trained = (tmp_path / "demo" / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
    assert msdiff("demo", "--out", "demo", *TINY)[0] == 0
    assert (tmp_path / "demo" / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes() == trained
    assert len(read_json(tmp_path / "demo" / "evaluation.json")) == 1  # what is complete is not evaluated again


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("stages nowhere", "'nowhere': no file, folder or data set of this name"),
        ("stages empty", "empty: contains no images"),
        ("stages digits --samples 5", "samples=5 must be at least 100"),
        ("stages digits --stages 4", "algorithm 1 finds three stages"),
        ("stages digits --data-range 1 -1", "must be finite and ascending"),
        ("stages digits --device cuda:77", "device='cuda:77'"),
        ("stages nan.npy", "nan.npy: images are float32, not uint8"),
        ("train --out new", "DATA is missing: name the images (or give --preset NAME, --config FILE or --resume RUN)"),
        ("train digits --data digits --out new", "both name the images"),
        ("train digits", "--out is missing"),
        ("train --preset digits --config c.yaml --out new", "both give the settings"),
        ("train --preset digits", "--out is missing"),
        ("train --preset digit --out new", "preset 'digit' is unknown; did you mean 'digits'?"),
        ("train --preset digits --out new --data nowhere", "nowhere"),
        ("train --preset digits --out new --data empty", "empty: contains no images"),
        (
            "train --preset digits --out new --set network.width=3",
            "network.width: unknown key; known: channels",
        ),
        (
            "train --preset digits --out new --set network.encoder_width=37",
            "network.encoder_width: width 37 must be even and at least 4, such as 38",
        ),
        (
            "train --preset digits --out new --set network.encoder_width=68",
            "network.encoder_width: width 68 x 1 = 68 channels is not",
        ),
        ("train --preset digits --out new --set stages.interior=[2,1]", "strictly ascending"),
        ("train --preset digits --out new --set optimizer.lr", "--set optimizer.lr: must be KEY=VALUE"),
        ("train --preset digits --out new --set optimizer.lr=[1", "'[1' is not a YAML value"),
        ("train --preset digits --out new --set optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
        ("train --preset digits --out new --set training.batch=2", "training.batch=2 is too small for 3 stages"),
        (
            "train --preset digits --out new --data digits --set data.source=x",
            "--set data.source: an option gives it, too",
        ),
        ("plan digits --held-out 0.2 --set data.held_out=0.1", "--set data.held_out: an option gives it, too"),
        ("train --preset digits --out new --set name=mine", "name='mine': a run has the name of its folder"),
        ("train --preset digits --out new --stages falling.json", "falling.json: stages: edges [5.0, 1.0]"),
        ("train --preset digits --out new --stages nowhere.json", "nowhere.json: no such file"),
        ("train --preset digits --out new --stages c.yaml", "c.yaml: not valid JSON"),
        ("train --preset digits --out new --device cuda:77", "device='cuda:77'"),
        ("train --config nowhere.yaml --out new", "nowhere.yaml: no such file"),
        ("train --config c.yaml --out new", "c.yaml: not valid YAML"),
        ("train --config empty.yml --out new", "empty.yml: RunConfig: expected a mapping, got None"),
        ("train --config latin.yml --out new", "latin.yml: not valid YAML"),
        ("train --resume empty", "empty: not a run"),
        ("train --resume RUN --preset digits", "--preset does not go with --resume"),
        ("train --resume RUN --replace", "--replace does not go with --resume"),
        ("train --resume RUN --set optimizer.lr=1", "optimizer.lr: may not change when a run is resumed"),
        ("train --resume RUN --held-out 0.5", "data.held_out: may not change when a run is resumed"),
        ("train --resume RUN --data nan.npy", "nan.npy"),
        ("sample nowhere", "nowhere: not a run"),
        ("sample BARE", "has no checkpoint yet; continue it with msdiff train --resume"),
        ("sample RUN --checkpoint 7", "checkpoint '7': not kept"),
        ("sample RUN --count 0", "count=0"),
        ("sample RUN --batch 0", "batch=0"),
        ("sample RUN --label 3", "label=3: the run is unconditional"),
        ("sample RUN --calls 2", "sampling.calls=2 is too few for sampling.order=3; give at least 3"),
        ("sample RUN --churn 4", "sampling.churn=4.0 has no meaning for solver 'dpm'"),
        ("sample RUN --device gpu", "device='gpu' is unknown"),
        ("evaluate RUN --features incepton", "features='incepton' is unknown"),
        ("evaluate RUN --against absent.npz", "absent.npz: no such file"),
        ("evaluate RUN --against train --count 3", "count=3: metric 'precision-recall' needs at least 4 images"),
        ("evaluate RUN --inception-weights w.pth", "features='pixels' takes no file of weights"),
        ("stats digits --out new.json", "--out new.json: must end in .npz; name it new.npz"),
        ("stats digits --features incepton --out new.npz", "features='incepton' is unknown"),
        ("stats digits --keep -1 --out new.npz", "keep=-1 must be >= 0"),
        ("evaluate RUN --count 0", "count=0 must be positive"),
        ("evaluate RUN --data PHOTOS", "images of 3 x 12 x 20"),
        ("describe nowhere", "nowhere: neither a run's folder nor a preset (msdiff presets"),
        ("describe digits --order 2 --calls 1", "sampling.calls=1 is too few for sampling.order=2"),
        ("report RUN --count 0", "count=0"),
        ("report empty", "empty: not a run"),
        ("demo --out new --set network.x=1", "network.x: unknown key"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: str, words: str, made: Path, msdiff: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.yaml").write_text("{a: [")
    (tmp_path / "empty.yml").write_text("")
    (tmp_path / "latin.yml").write_bytes(b"name: caf\xe9")
    np.save(tmp_path / "nan.npy", np.full((20, 8, 8), np.nan, np.float32))
    split = read_json(made / "stages.json")
    write_json(tmp_path / "falling.json", {**split, "edges_t": [0.7, 0.2], "edges_sigma": [5.0, 1.0]})
    (tmp_path / "bare").mkdir()
    shutil.copy(made / "run" / "config.json", tmp_path / "bare")
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} | {p for p in made.rglob("*")}
    places = {"RUN": made / "run", "BARE": "bare", "PHOTOS": made / "photos"}
    refused(msdiff(*(places.get(a, a) for a in arguments.split())), words)
    after = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} | {p for p in made.rglob("*")}
    assert after - before == set()


def test_a_missing_extra_is_named(msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(msdiff("stages", "digits"), "pip install 'multistage-diffusion[demo]'")


def raises(error: BaseException) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("run: cannot be read\n(mend it?)"), "run: cannot be read (mend it?)"),
        (UserError("a=[bold]1[/bold]"), "a=[bold]1[/bold]"),
        (UserError("caf\u00e9 \x1b[31m\u202egnp.exe"), r"café \x1b[31m\u202egnp.exe"),
        (TrainingDiverged("the loss is not finite"), "the loss is not finite"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.png"), "x.png: No such file; check the name"),
        (PermissionError(errno.EACCES, "Denied", Path("runs/a")), "runs/a: Denied; check its permissions, or"),
        (OSError(errno.ENOSPC, "No space left on device", "a.npz"), "a.npz: No space left on device; free some space"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "refused"),
        (MemoryError(), "memory ran out (no details); take a smaller batch"),
        (MemoryError("Unable to allocate 9 EiB"), "memory ran out (Unable to allocate 9 EiB); take"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out (CUDA out of memory); take"),
        (
            RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: you"),
            "memory ran out ([x] DefaultCPUAllocator",
        ),
        (KeyboardInterrupt(), "interrupted"),
        (KeyboardInterrupt("run: stopped"), "run: stopped"),
    ],
)
def test_what_stops_a_command(error: BaseException, line: str, msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMMANDS["describe"], "run", raises(error))
    result = msdiff("describe", "digits")
    refused(result, line)
    assert result[2].startswith(f"msdiff: {line}")
    for debug in ([], ["--debug"]):
        monkeypatch.setenv("MSDIFF_DEBUG", "" if debug else "1")
        code, _, err = msdiff("describe", "digits", *debug)
        assert code == 2
        assert "Traceback (most recent call last)" in err
        assert err.splitlines()[-1] == result[2].rstrip()
        assert "\x1b" not in err


def unequal(*_: object, **__: object) -> None:
    list(zip([1], [1, 2], strict=True))


@pytest.mark.parametrize(
    "bug",
    [
        unequal,  # a ValueError
        lambda *_: int("a"),
        lambda *_: {}["a"],  # type: ignore[index]
        raises(RuntimeError("a fault of ours")),
        raises(FloatingPointError("overflow")),
        raises(OSError("no number")),
        raises(OSError(errno.EINVAL, "Invalid argument")),
        raises(FileNotFoundError(errno.ENOENT, "No such file", str(Path(cli.__file__).with_name("weights")))),
        raises(BrokenPipeError(errno.EPIPE, "Broken pipe", "worker")),
    ],
)
def test_a_bug_is_not_shown_as_a_mistake(bug: Any, msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMMANDS["describe"], "run", bug)
    code, out, err = msdiff("describe", "digits")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("msdiff: this is a bug, please report it")


def test_a_bug_deep_inside_a_command_is_a_bug(made: Path, msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multistage_diffusion.workflow.sample.sample_images", unequal)
    code, _, err = msdiff("sample", made / "run", "--out", "x.png")
    assert code == 1
    assert "ValueError: zip() argument 2 is longer" in err


PROGRAM = [sys.executable, "-m", "multistage_diffusion"]


@pytest.mark.parametrize("arguments", [pytest.param("presets", marks=pytest.mark.slow), "--help"])
def test_a_closed_pipe_ends_quietly(arguments: str) -> None:
    program = subprocess.Popen([*PROGRAM, *arguments.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait() in (141, 0)


@pytest.mark.parametrize(
    ("arguments", "streams", "code"),
    [
        pytest.param("presets", ">&-", 0, marks=pytest.mark.slow),
        pytest.param("presets", ">&- 2>&-", 0, marks=pytest.mark.slow),
        pytest.param("nonsense", "2>&-", 2, marks=pytest.mark.slow),
        ("nonsense", "2>/dev/full", 2),
        pytest.param("presets", ">/dev/full", 2, marks=pytest.mark.slow),
    ],
)
def test_streams_that_cannot_be_written_change_no_exit_code(arguments: str, streams: str, code: int) -> None:
    command = f"{shlex.join(map(str, PROGRAM))} {arguments} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.count("\n") <= 1
    if "/dev/full" in streams and code == 2 and "2>" not in streams:
        assert done.stderr.startswith("msdiff: standard output: cannot be written (No space left on device)")


def test_the_same_warning_from_two_places_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        warnings.warn("beware", stacklevel=1)
        warnings.warn("beware", stacklevel=2)
        warnings.warn("beware of more", stacklevel=2)

    monkeypatch.setattr(COMMANDS["presets"], "run", run)
    assert cli.main(["presets"]) == 0
    assert capsys.readouterr().err == "msdiff: warning: beware\nmsdiff: warning: beware of more\n"


@pytest.mark.slow
def test_no_output_is_lost_to_a_terminal_of_few_characters(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "COLUMNS": "120"}
    done = subprocess.run(
        [*PROGRAM, "describe", "caf\u00e9 \u2603"], cwd=tmp_path, capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.isascii()
    assert done.stderr.startswith(b"msdiff: caf\\")


def test_results_are_escaped_where_the_encoding_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(COMMANDS["presets"], "run", lambda _: print("Fr\u00e9chet"))
    assert cli.main(["presets"]) == 0
    assert stream.buffer.getvalue() == b"Fr\\xe9chet\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("code", "taken_down"), [(0, True), (1, True), (2, False)])
def test_after_an_error_of_the_user_the_interpreter_is_not_taken_down(code: int, taken_down: bool) -> None:
    script = (
        "import atexit, sys; from multistage_diffusion import cli\n"
        "class Last:\n"
        "    def __del__(self, write=sys.stdout.write, flush=sys.stdout.flush): write('taken down'); flush()\n"
        "last = Last()\n"
        "atexit.register(print, 'tidied', end=' ')\n"
        f"cli.main = lambda: {code}\n"
        "cli.entry()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "tidied " + "taken down" * taken_down)


def test_ctrl_c_during_imports_is_no_bug() -> None:
    script = (
        "import os, signal, sys, time; from multistage_diffusion import cli\n"
        "def parse(*_):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT), time.sleep(60)\n"  # another thread may get the signal first
        "    except BaseException: raise ValueError('too many values to unpack')\n"
        "cli.parse = parse\n"
        "sys.exit(cli.main(['presets']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "msdiff: interrupted\n")


def test_a_terminated_command_leaves_no_temporary_file(
    msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "grey", 40, (6, 6))
    names: set[str] = set()

    def terminated(done: int, total: int) -> None:
        names.update(path.name for path in tmp_path.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Bar, "__call__", lambda _, done, total: terminated(done, total))
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = msdiff("pack", "grey", "--out", "grey.zip")
    assert (code, out, err.splitlines()[-1]) == (2, "", "msdiff: terminated")
    assert len(names) == 2  # the temporary file was there
    assert [path.name for path in tmp_path.iterdir()] == ["grey"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_training_can_go_on(msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "grey", 40, (6, 6))
    monkeypatch.setattr(TrainingProgress, "stepped", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = msdiff("train", "--preset", "digits", "--data", "grey", "--out", "run", *TINY)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "msdiff: run: stopped at step 1 with a checkpoint; go on with msdiff train --resume run"
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert msdiff("train", "--resume", "run")[0] == 0


def test_warnings_are_one_line_and_do_not_change_the_process(msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = warnings.showwarning
    monkeypatch.setattr(
        COMMANDS["describe"], "run", lambda *_: warnings.warn("edges [a, b]\nmay not suit", stacklevel=2)
    )
    assert msdiff("describe", "digits") == (0, "", "msdiff: warning: edges [a, b] may not suit\n")
    assert warnings.showwarning is shown


# -- as a program and as a library ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_answers_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from multistage_diffusion import cli; assert cli.main(['--help']) == 0; "
        "heavy = {'torch', 'matplotlib', 'tyro'} & set(sys.modules); assert not heavy, heavy; "
        "sys.exit(cli.main(['train', '--preset', 'x', '--out', 'r']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("usage: msdiff COMMAND")
    assert done.stderr.startswith("msdiff: preset 'x' is unknown; ")


def test_the_package_offers_its_names() -> None:
    for name in msd.__all__:
        assert not isinstance(getattr(msd, name), types.ModuleType)
    assert set(msd.__all__) <= set(dir(msd))
    assert msd.preset("digits") == preset("digits")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _: Any = msd.nothing


def test_resuming_on_other_data_is_refused(msdiff: Call, tmp_path: Path) -> None:
    write_pictures(tmp_path / "grey", 40, (6, 6))
    assert msdiff("train", "--preset", "digits", "--data", "grey", "--out", "run", *TINY)[0] == 0
    write_pictures(tmp_path / "other", 41, (6, 6))
    before = tree(tmp_path / "run")
    refused(msdiff("train", "--resume", "run", "--data", "other"), "fingerprint")
    (tmp_path / "grey").rename(tmp_path / "gone")
    refused(msdiff("train", "--resume", "run"), "grey")
    assert tree(tmp_path / "run") == before


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_other_image_formats_are_refused(made: Path, msdiff: Call, tmp_path: Path) -> None:
    refused(msdiff("sample", made / "run", "--out", tmp_path / "grid.JPG"), "a .png grid, an .npz array or a folder")
    assert not (tmp_path / "grid.JPG").exists()


def test_stages_come_from_one_place(made: Path, msdiff: Call) -> None:
    both = ("--stages", "stages.json", "--set", "stages.interior=[0.5,2.0]")
    refused(msdiff("train", "--preset", "digits", "--out", "run", *both), "give one of them")


def test_what_memory_cannot_hold_is_refused_before_the_work(
    made: Path, msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made / "run"
    monkeypatch.setattr("multistage_diffusion.workflow.sample.sample_images", raises(AssertionError("began")))
    refused(msdiff("sample", run, "--count", 10**9, "--out", "a.png"), "--count 1000000000: a grid holds at most 10000")
    refused(msdiff("sample", run, "--count", 10**15, "--out", "a.npz"), "count=1000000000000000 needs at least", "GiB")
    refused(msdiff("sample", run, "--count", 10**40, "--out", "a.npz"), "count=1")
    refused(
        msdiff("sample", run, "--count", 10**7, "--batch", 10**7, "--out", "a.npz"), "batch=10000000 needs at least"
    )
    refused(msdiff("sample", run, "--calls", 10**12, "--out", "a.npz"), "sampling.calls=1000000000000 must be")
    refused(
        msdiff("evaluate", run, "--count", 10**15), "count=1000000000000000, features='pixels' of 64 dimensions, needs"
    )
    refused(msdiff("report", run, "--count", 10**15), "count=1000000000000000 must be between 1 and 10000")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.batch=1000000000000", "training.batch=1000000000000 needs at least"),
        ("training.held_out_rows=1000000000000", "training.held_out_rows=1000000000000 needs at least"),
        ("training.sample_every=1 training.sample_count=100000000000000", "training.sample_count=1"),
        ("network.encoder_width=99968 network.decoder_widths=[99968,99968,99968]", "a network of"),
        ("network.encoder_width=1000000000", "width 1000000000 is more than 100000"),
        ("network.blocks_per_level=1000000000", "network.blocks_per_level 1000000000 is more than 1000"),
        ("network.num_classes=1000000000000000", "network.num_classes 1000000000000000 is more than"),
        ("sampling.calls=1000000000000", "sampling.calls=1000000000000 must be"),
    ],
)
def test_training_that_memory_cannot_hold_is_refused(change: str, words: str, msdiff: Call, tmp_path: Path) -> None:
    refused(msdiff("train", "--preset", "digits", "--out", "run", *TINY, "--set", *change.split()), words)
    assert not list(tmp_path.iterdir())


def test_splits_that_memory_cannot_hold_are_refused(msdiff: Call, tmp_path: Path) -> None:
    for option, value in (("--samples", 10**15), ("--times", 10**12), ("--stages", 10**9)):
        refused(msdiff("stages", "digits", option, value, "--out", "s.json"), f"{option[2:]}={value}")
    refused(msdiff("stages", "digits", "--algorithm", "2", "--samples", 10**12), "samples=1000000000000 needs")
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_written_is_refused_before_the_work(
    made: Path, msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(made / "run", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("multistage_diffusion.workflow.sample.sample_images", raises(AssertionError("began")))
        patch.setattr(os, "access", lambda *_, **__: False)  # root may write everywhere
        for command in ("evaluate", "report"):
            refused(msdiff(command, run), "run: ", "cannot be written in it; check its permissions")
        patch.undo()
    with monkeypatch.context() as patch:
        patch.setattr("multistage_diffusion.workflow.sample.sample_images", raises(AssertionError("began")))
        (run / "evaluation.json").write_text("{}")
        refused(msdiff("evaluate", run), "evaluation.json: expected a list of results, got {}")
        (run / "evaluation.json").unlink()
        (run / "report.html").unlink(missing_ok=True)
        (run / "report.html").mkdir()
        refused(msdiff("report", run), "report.html: is a folder")


def test_a_result_that_cannot_be_saved_is_printed(made: Path, msdiff: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    full = raises(OSError(errno.ENOSPC, "No space left on device", "evaluation.json"))
    monkeypatch.setattr("multistage_diffusion.workflow.evaluate.write_json", full)
    code, out, err = msdiff("evaluate", made / "run", "--count", 20, "--json")
    assert code == 2
    assert json.loads(out)["metrics"]["frechet"]["value"] > 0
    assert err.splitlines()[-1] == (
        "msdiff: the result was not saved: evaluation.json: No space left on device; free some space"
    )


def test_names_that_hold_markup_or_control_characters(msdiff: Call, tmp_path: Path) -> None:
    for name in ("[/red]", "a\x1b[31m\u202eb"):
        write_pictures(tmp_path / name, 40, (6, 6))
        code, out, err = msdiff("train", "--preset", "digits", "--data", name, "--out", f"run-{name}", *TINY)
        assert code == 0, err
        assert "\x1b" not in out + err
        assert "\u202e" not in out + err
        assert f"run-{shown(name)}" in out


def test_where_a_run_cannot_be_made_is_said_before_the_work(
    made: Path, msdiff: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multistage_diffusion.workflow.train.resolve_run", raises(AssertionError("began")))
    train = ("train", "--preset", "digits", "--out")
    refused(msdiff(*train, made / "run"), "run: exists; resume it")
    (tmp_path / "file").write_text("")
    refused(msdiff(*train, tmp_path / "file"), "file: exists")
    refused(msdiff(*train, tmp_path / "file" / "run"), "nothing can be written in", "file; choose another place")


@pytest.mark.parametrize(("name", "computes"), [("report", True), ("presets", False)])
def test_commands_that_compute_keep_the_memory_of_the_process(
    name: str, computes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[torch.device] = []
    monkeypatch.setattr(devices, "keep_memory", kept.append)
    monkeypatch.setattr(COMMANDS[name], "run", lambda _: None)
    assert cli.main([name, *(["r", "--device", "cpu"] if computes else [])]) == 0
    assert kept == [torch.device("cpu")] * computes


def test_ctrl_c_in_the_import_of_a_module_in_c_is_no_bug(monkeypatch: pytest.MonkeyPatch, msdiff: Call) -> None:
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'dtype'")  # noqa: B904 - as numpy's import does

    monkeypatch.setattr(COMMANDS["describe"], "run", interrupted)
    assert msdiff("describe", "digits") == (2, "", "msdiff: interrupted\n")


def test_the_reading_of_images_is_shown_by_a_bar_during_a_command() -> None:
    assert shown_reading.get() is None
    with cli._messages_printed():
        shown = shown_reading.get()
        assert shown is not None
        with shown() as bar:
            assert isinstance(bar, Bar)
            assert (bar.title, bar.unit) == ("reading", "images")
    assert shown_reading.get() is None


def test_a_data_set_is_packed_into_one_file(msdiff: Call, made: Path) -> None:
    size = ["--size", "8", "8", "--fit", "crop"]
    code, out, _ = msdiff("pack", made / "photos", *size, "--out", "photos.zip", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["out"], told["images"], told["shape"], told["classes"]) == ("photos.zip", 60, [3, 8, 8], [])
    assert msd.open_data("photos.zip").fingerprint == told["fingerprint"]
    refused(msdiff("pack", made / "photos", *size, "--out", "photos.zip"), "exists", "--overwrite")
    refused(msdiff("pack", "photos.zip", "--out", "photos.zip", "--overwrite"), "is DATA")
    refused(msdiff("pack", "photos.zip", "--out", "a.npy", "--held-out", "0.1"), "--held-out 0.1", "leave it out")
    assert msdiff("pack", "photos.zip", "--out", "photos.npy")[1].startswith("written: photos.npy (60 images")


def test_another_codec_than_the_preset_s_has_neither_its_subfolder_nor_its_scale(msdiff: Call, tmp_path: Path) -> None:
    base = ("train", "--preset", "celebahq-ldm", "--data", "digits", "--print-config", "--codec")

    def codec(*given: str) -> dict[str, object]:
        code, out, _ = msdiff(*base, *given)
        assert code == 0
        return dict(yaml.safe_load(out)["codec"])

    own = codec("codecs/own")
    assert (own["source"], own["subfolder"], own["scale"], own["shape"]) == ("codecs/own", "", None, [])
    same = codec("hf:CompVis/ldm-celebahq-256")
    assert (same["subfolder"], same["scale"]) == ("vqvae", 1.0)
    chosen = codec("codecs/own", "--set", "codec.subfolder=vae", "codec.scale=config")
    assert (chosen["subfolder"], chosen["scale"]) == ("vae", "config")
    code, _, err = msdiff(*base, "codecs/own", "--set", "codec.scale=-1")
    assert (code, err.split(";")[0]) == (2, "msdiff: codec.scale=-1.0 must be positive and finite, or 'config'\n")


def test_quickstart_names_a_path_that_is_not_there(msdiff: Call) -> None:
    refused(msdiff("quickstart", "no/such/photos"), "data.source='no/such/photos': no file, folder or data set")


@pytest.mark.parametrize("scored", [True, False])
def test_the_results_of_a_quickstart_name_the_checkpoint(
    scored: bool, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart_command, "result_text", lambda _: "the scores")
    result: Any = object() if scored else None
    quickstart_command.show_results(made / "run" / "report.html", result, json=False)
    first, *rest = capsys.readouterr().out.splitlines()
    told = "best checkpoint: step 2 of 2; its samples are drawn"
    assert first == told + " and compared with held-out images" * scored
    assert (rest[0] == "the scores") == scored
