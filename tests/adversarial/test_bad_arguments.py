"""Command lines that no input could make right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adversary import TINY, Case, cases, fifo, file, folder_in_place, nothing, npz, pixels

RUN, DATA = ("run",), ("data.npz",)
HERE = file("taken", "mine")
TRAIN = ("train", "--preset", "digits", "--data", "data.npz", "--out", "new")


def _values(option: str, *values: str, command: tuple[str, ...] = ("sample", "run", "--out", "x.npz")) -> list[Case]:
    return [Case(f"{command[0]} {option} {value}", (*command, option, value), needs=RUN) for value in values]


def _train(option: str, *values: str) -> list[Case]:
    return [Case(f"train {option} {value}", (*TRAIN, option, *value.split(), *TINY), needs=DATA) for value in values]


def _split(option: str, *values: str) -> list[Case]:
    return [
        Case(f"stages {option} {value}", ("stages", "data.npz", option, *value.split()), needs=DATA) for value in values
    ]


COMMANDS = [
    Case("no such command", ("trian",), says="train"),
    Case("empty command", ("",)),
    Case("command of control characters", ("\x1b[2J\u202e",), says=r"\\x1b"),
    Case("command of markup", ("[bold]",)),
    Case("command in capitals", ("TRAIN",)),
    *(
        Case(f"{name} without arguments", (name,))
        for name in (
            "train",
            "train-codec",
            "sample",
            "evaluate",
            "stats",
            "pack",
            "plan",
            "describe",
            "report",
            "import",
            "export",
        )
    ),
    *(
        Case(f"{name} of a folder that is missing", (name, "absent", *more))
        for name, *more in (
            ("sample",),
            ("evaluate",),
            ("report",),
            ("describe",),
            ("export", "--out", "x.pth"),
            ("push", "me/x", "--dry-run", "x"),
            ("import", "--out", "x"),
            ("stages",),
            ("stats", "--out", "x.npz"),
            ("pack", "--out", "x.zip"),
            ("plan", "--preset", "digits"),
            ("train-codec", "--out", "x"),
        )
    ),
    *(
        Case(f"{name} --nonsense", (name, "run", "--nonsense"), says="nonsense")
        for name in ("sample", "report", "demo")
    ),
    Case("sample of an empty name", ("sample", "")),
    Case("sample of a name too long", ("sample", "x" * 5000)),
    Case("sample of a file", ("sample", "taken"), HERE),
    Case("report of a folder that is no run", ("report", "taken"), folder_in_place("taken")),
    Case("describe of control characters", ("describe", "\x1b]0;x\x07"), says=r"\\x1b"),
    Case("describe of markup", ("describe", "[red]x[/red]"), says=r"\[red\]"),
    Case("describe of an unclosed tag", ("describe", "x[/]"), says=r"x\[/\]"),
    Case("describe drawn as text", ("describe", "digits", "--out", "x.txt"), says="png"),
    Case(
        "describe over a file",
        ("describe", "digits", "--out", "taken.png"),
        file("taken.png", "mine"),
        says="overwrite",
    ),
]

SAMPLE = [
    *_values("--count", "0", "-1", "1e9", "x", "9999999999999999999999", "1.5"),
    *_values("--seed", "x", "1.5"),
    *_values("--calls", "0", "-3", "x", "99999999999999999999"),
    *_values("--order", "0", "4", "x"),
    *_values("--solver", "euler", ""),
    *_values("--spacing", "linear"),
    *_values("--method", "both"),
    *_values("--churn", "-1", "nan", "inf", "x"),
    *_values("--eta", "-0.1", "2", "nan"),
    *_values("--guidance", "-1", "nan", "inf"),
    *_values("--threshold", "0", "2", "nan"),
    *_values("--checkpoint", "7", "-1", "best2", "../x", "", "\x1b[1m", "999999999999999999999999", "²"),
    *_values("--batch", "0", "-5", "x"),
    *_values("--device", "gpu", "cuda:99", "meta", "", "cpu:x", "tpu"),
    *_values("--precision", "fp8"),
    *_values("--label", "1", "-1", "99999999999999999999"),
    *_values("--guidance-interval", "1", command=("sample", "run", "--out", "x.npz")),
    Case("sample guided where high is low", ("sample", "run", "--guidance-interval", "2", "1"), needs=RUN),
    Case("sample a grid of 1e9", ("sample", "run", "--count", "1000000000", "--out", "x.png"), needs=RUN),
    Case("sample an array of 1e12", ("sample", "run", "--count", "1000000000000", "--out", "x.npz"), needs=RUN),
    Case("sample over a file", ("sample", "run", "--out", "taken"), HERE, "overwrite", RUN),
    Case(
        "sample over a folder",
        ("sample", "run", "--out", "taken.png", "--overwrite"),
        folder_in_place("taken.png"),
        "",
        RUN,
    ),
    Case("sample over the run", ("sample", "run", "--out", "run"), needs=RUN),
    Case("sample over the run, overwriting", ("sample", "run", "--out", "run", "--overwrite"), needs=RUN),
    Case("sample below a file", ("sample", "run", "--out", "taken/x.png"), HERE, "taken", RUN),
    Case("sample into a system folder", ("sample", "run", "--out", "/proc/x.png"), needs=RUN),
    Case("sample into a name too long", ("sample", "run", "--out", "y" * 300 + ".png"), needs=RUN),
    Case(
        "sample over a folder with a stranger's file",
        ("sample", "run", "--out", "kept", "--overwrite"),
        file("kept/diary.txt", "mine"),
        "kept",
        RUN,
    ),
]

TRAINING = [
    Case("train from two bases", (*TRAIN, "--config", "x.json"), needs=DATA),
    Case("train without a base", ("train", "--out", "new")),
    Case("train without --out", ("train", "--preset", "digits"), says="--out"),
    Case("train of an unknown preset", ("train", "--preset", "digit", "--out", "new"), says="digits"),
    Case("train over a file", ("train", "--preset", "digits", "--out", "taken"), HERE),
    Case("train over a run", ("train", "--preset", "digits", "--out", "run"), says="resume", needs=RUN),
    Case("train below a file", ("train", "--preset", "digits", "--out", "taken/new", *TINY), HERE, "taken"),
    Case("train into a system folder", ("train", "--preset", "digits", "--out", "/proc/new", *TINY), says="/proc"),
    Case("resume with a preset", ("train", "--resume", "run", "--preset", "digits"), needs=RUN),
    Case("resume with --out", ("train", "--resume", "run", "--out", "new"), needs=RUN),
    Case("resume what is missing", ("train", "--resume", "absent")),
    Case(
        "resume with other widths",
        ("train", "--resume", "run", "--set", "network.encoder_width=16"),
        says="encoder_width",
        needs=RUN,
    ),
    Case("resume with fewer steps", ("train", "--resume", "run", "--set", "training.steps=1"), needs=RUN),
    Case(
        "resume on other data",
        ("train", "--resume", "run", "--data", "o.npz"),
        file("o.npz", npz(images=pixels(9))),
        needs=RUN,
    ),
    Case("train from stages that are missing", (*TRAIN, "--stages", "absent.json"), says="absent", needs=DATA),
    Case("train from a run that is missing", (*TRAIN, "--init-from", "absent", *TINY), says="absent", needs=DATA),
    Case("train through a codec that is missing", (*TRAIN, "--codec", "absent", *TINY), says="absent", needs=DATA),
    *_train("--held-out", "1", "-0.1", "nan", "inf", "x", "0.999"),
    *_train("--size", "0 0", "-1 8", "16 16", "99999999 99999999", "8 x"),
    *_train("--fit", "stretch"),
    *_train("--max-pixels", "0", "-1", "x"),
    *_train("--device", "gpu", "cuda:99"),
    *_train("--strategy", "fast"),
]

OTHERS = [
    *_split("--algorithm", "3", "gradient", "x"),
    *_split("--samples", "0", "-1", "x", "99999999999999999"),
    *_split("--times", "0", "-1", "99999999999999"),
    *_split("--precision", "0", "-1", "nan", "1e-300"),
    *_split("--eta", "0", "-1", "nan", "inf"),
    *_split("--alpha", "0", "1.5", "nan"),
    *_split("--stages", "0", "-1"),
    *_split("--data-range", "1 0", "0 0", "nan 1", "0 inf", "0"),
    *_split("--memory", "0", "-1", "nan"),
    *_split("--image-shards", "0", "2", "-1"),
    *_split("--seed", "x"),
    *_split("--schedule", "cosine"),
    *_split("--codec", "absent", "hf:", "https://x.invalid/y"),
    *_split("--out", "x.png", "absent.json/x.json/../", "/proc/x.json"),
    Case(
        "split into more stages than can be",
        ("stages", "data.npz", "--algorithm", "2", "--stages", "100000"),
        needs=DATA,
    ),
    Case("split over a file", ("stages", "data.npz", "--out", "s.json"), file("s.json", "mine"), "overwrite", DATA),
    Case("split over a picture", ("stages", "data.npz", "--out", "s.json"), file("s.png", "mine"), "overwrite", DATA),
    Case(
        "split of data and a run",
        ("stages", "data.npz", "--algorithm", "gradient", "--run", "run"),
        needs=("run", "data.npz"),
    ),
    *_values("--count", "0", "1", "-1", "x", "1000000000000", command=("evaluate", "run")),
    *_values("--against", "absent.npz", "", "run", command=("evaluate", "run")),
    *_values("--features", "pixel", "", "absent.pt", "../../x.ts", command=("evaluate", "run")),
    *_values("--inception-weights", "absent.pth", command=("evaluate", "run")),
    *_values("--size", "8", command=("evaluate", "run")),
    *_values("--held-out", "0.5", command=("evaluate", "run")),
    *_values("--data", "absent", command=("evaluate", "run")),
    *_values("--count", "0", "-1", "100000000", command=("report", "run")),
    *_values("--checkpoint", "9", command=("report", "run")),
    *_values("--out", "x.txt", "x", "x.ckpt", command=("export", "run")),
    Case("export over a file", ("export", "run", "--out", "taken.pth"), file("taken.pth", "mine"), "overwrite", RUN),
    Case("stats not into .npz", ("stats", "data.npz", "--out", "x.json"), says="npz", needs=DATA),
    Case("stats keeping less than none", ("stats", "data.npz", "--out", "x.npz", "--keep", "-1"), needs=DATA),
    Case("stats over a file", ("stats", "data.npz", "--out", "x.npz"), file("x.npz", "mine"), "overwrite", DATA),
    Case("stats of an unknown part", ("stats", "data.npz", "--out", "x.npz", "--part", "half"), needs=DATA),
    Case("plan not into JSON", ("plan", "data.npz", "--preset", "digits", "--out", "x.yaml"), says="json", needs=DATA),
    Case("plan of nothing", ("plan", "nothing.npz"), says="no file, folder or data set of this name", needs=DATA),
    *(
        Case(f"plan {option} {value}", ("plan", "data.npz", "--preset", "digits", option, value, *TINY), needs=DATA)
        for option, value in (
            ("--budget", "0"),
            ("--budget", "nan"),
            ("--budget", "-1"),
            ("--budget", "1e-9"),
            ("--stages", "0"),
            ("--probe-steps", "0"),
            ("--stages", "absent.json"),
        )
    ),
    *(
        Case(f"train-codec {option} {value}", ("train-codec", "data.npz", "--out", "c", option, value), needs=DATA)
        for option, value in (
            ("--factor", "3"),
            ("--factor", "0"),
            ("--factor", "64"),
            ("--width", "0"),
            ("--steps", "0"),
            ("--batch", "0"),
            ("--lr", "nan"),
            ("--lr", "-1"),
            ("--kl", "-1"),
            ("--kl", "inf"),
            ("--latent-channels", "0"),
            ("--seed", "-1"),
        )
    ),
    Case("train-codec over a folder", ("train-codec", "data.npz", "--out", "kept"), file("kept/x", "mine"), needs=DATA),
    Case("train-codec goes on with nothing", ("train-codec", "data.npz", "--out", "c", "--resume"), needs=DATA),
    Case("demo with a foreign run", ("demo", "--out", "run"), needs=RUN),
    Case("demo over a file", ("demo", "--out", "taken"), HERE),
    Case("demo with an unknown key", ("demo", "--out", "new", "--set", "training.step=1"), says="steps"),
    Case("presets of a word", ("presets", "digits")),
    Case("tables of a word", ("tables", "nonsense")),
]


@cases(COMMANDS)
def test_commands(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(SAMPLE)
def test_sampling(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(TRAINING)
def test_training(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([case for case in OTHERS if case.needs])
def test_other_commands(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([case for case in OTHERS if not case.needs])
def test_other_commands_alone(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


def linked(target: str, name: str = "link") -> Callable[[Path], None]:
    """Return what makes a link."""
    return lambda folder: (folder / name).symlink_to(target)


def filled_and_linked(folder: Path) -> None:
    (folder / "kept").mkdir()
    (folder / "kept/x").write_text("mine")
    (folder / "link").symlink_to("kept")


ODD_RUN = "x\udcff"  # a name that is not valid UTF-8


def _into(place: str, make: Callable[[Path], object] = nothing, says: str = "", *more: str) -> list[Case]:
    """Return commands that make a folder there."""
    commands = {
        "train": ("train", "--preset", "digits", "--data", "data.npz", *TINY),
        "import": ("import", "exported.safetensors", "--preset", "digits", "--size", "8", "8"),
        "demo": ("demo",),
        "train-codec": ("train-codec", "data.npz"),
    }
    needs = ("data.npz", "exported.safetensors")
    return [
        Case(f"{name} into {place} {says} {more}", (*command, "--out", place, *more), make, says, needs)
        for name, command in commands.items()
        if not (name == "demo" and more)
    ]


PLACES = [
    *(case for place in (".", "/", "..", "x/..") for case in _into(place, says="names no file or folder")),
    *(case for place in (".", "/", "x/..") for case in _into(place, nothing, "names no file or folder", "--replace")),
    *_into("link", linked("link"), "link"),
    *_into("link", linked("absent"), "leads nowhere"),
    *_into("link/new", linked("absent"), "link"),
    *_into("link", filled_and_linked, "kept", "--replace"),
    *_into(ODD_RUN, says="UTF-8"),
    *(
        Case(f"{name} of {out} below a link to nothing", (name, *words, "--out", f"link/{out}"), linked("absent"), "link", needs)
        for name, words, out, needs in (
            ("sample", ("run",), "x.png", RUN),
            ("sample", ("run",), "x", RUN),
            ("stages", ("data.npz",), "x.json", DATA),
            ("stats", ("data.npz",), "x.npz", DATA),
            ("describe", ("digits",), "x.png", ()),
            ("export", ("run",), "x.pth", RUN),
        )
    ),
    Case("stats over its data", ("stats", "data.npz", "--out", "data.npz", "--overwrite"), says="DATA", needs=DATA),
    *(
        Case(
            f"stages over a run's {name}",
            ("stages", "data.npz", "--out", f"run/{name}", "--overwrite"),
            file(f"run/{name}", "{}"),
            "file of a run",
            ("run", "data.npz"),
        )
        for name in ("config.json", "execution.json", "evaluation.json", "likelihood.json")
    ),
    Case(
        "export over a checkpoint",
        ("export", "run", "--out", "run/checkpoints/step_00000002/ema.safetensors", "--overwrite"),
        says="file of a run",
        needs=RUN,
    ),
    *(
        Case(f"likelihood with {' '.join(words)}", ("evaluate", "run", "--likelihood", *words), needs=RUN)
        for words in (
            ("--solver", "heun"),
            ("--calls", "7"),
            ("--features", "fashion-classifier"),
            ("--size", "3", "3"),
            ("--count", "0"),
            ("--count", "-5"),
        )
    ),
    Case("order of ddim", ("sample", "run", "--out", "x.npz", "--solver", "ddim", "--order", "3"), needs=RUN),
    Case("method of heun", ("sample", "run", "--out", "x.npz", "--solver", "heun", "--method", "multistep"), needs=RUN),
    Case("interval unguided", ("sample", "run", "--out", "x.npz", "--guidance-interval", "0.1", "2"), needs=RUN),
    Case("codec of much divergence", ("train-codec", "data.npz", "--out", "c", "--kl", "1e300"), needs=DATA),
    Case("codec that diverges", ("train-codec", "data.npz", "--out", "c", "--lr", "1e30"), says="lower lr", needs=DATA),
    Case(
        "codec over a pipe", ("train-codec", "data.npz", "--out", "c", "--resume"), fifo("c/training.json"), "c", DATA
    ),
    Case("sizes beyond memory", ("stats", "data.npz", "--out", "x.npz", "--fit", "pad", "--size", "60000", "60000"),
         says="data.size=60000x60000", needs=DATA),
]  # fmt: skip


@cases(PLACES)
def test_places(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)
