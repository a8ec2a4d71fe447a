import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multistage_diffusion
from multistage_diffusion import cli
from multistage_diffusion.config import DataConfig
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.data import sources
from multistage_diffusion.data.sources import SOURCES, forms, located, open_configured, open_data
from multistage_diffusion.errors import UserError


@pytest.fixture
def digits():
    pytest.importorskip("sklearn")
    return open_data("digits")


def test_digits_are_scaled_from_sixteen_levels(digits):
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert digits.array().shape == (1797, 1, 8, 8)
    assert np.abs(digits.array()[:, 0] / 255 - raw.images / 16).max() <= 0.5 / 255 + 1e-12
    np.testing.assert_array_equal(digits.labels, raw.target)
    assert digits.class_names == tuple("0123456789")
    train, held_out = digits.split(0.1)
    assert abs(len(held_out) - 180) < 40
    assert train.num_classes == held_out.num_classes == 10


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"data\.source='digits' needs scikit-learn: pip install .*\[demo\]"):
        open_data("digits")


def test_digits_can_be_resized(digits):
    assert open_data("digits", size=(12, 6), fit="resize").array().shape == (1797, 1, 12, 6)
    with pytest.raises(ValueError, match=r"digits: its images: height x width 8x8, not data\.size=16x16"):
        open_data("digits", size=(16, 16))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "digit",
            r"data\.source='digit': .*did you mean 'digits'\? known: cifar10:FOLDER, digits, fashion-mnist\[:FOLDER\]",
        ),
        ("Fashion_MNIST", "did you mean 'fashion-mnist'"),
        (
            "cifar-10",
            r"did you mean 'cifar10'\? known: .*, hf:NAME\[:SPLIT\], webdataset:FOLDER, \.npy or \.npz, a folder or \.zip of "
            r"images, \.parquet, a \.tar of images$",
        ),
        ("no/such/folder", r"data\.source='no/such/folder': no file, folder or data set of this name; known: cifar10"),
        ("missing.zip", r"data\.source='missing\.zip': no file"),
        ("missing.npy", r"data\.source='missing\.npy': no file"),
    ],
)
def test_unknown_sources(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_data(source)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt': not a data set; known: cifar10"):
        open_data(tmp_path / "a.txt")


def test_one_image_or_a_configuration_says_what_was_meant(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "cat.JPG")
    with pytest.raises(
        ValueError, match=rf"cat\.JPG': is one image; give the folder of all images, such as {tmp_path}$"
    ):
        open_data(tmp_path / "cat.JPG")
    (tmp_path / "mine.yaml").write_text("name: mine")
    with pytest.raises(ValueError, match=r"mine\.yaml': holds no images; .* msdiff train --config .*mine\.yaml$"):
        open_data(tmp_path / "mine.yaml")


def test_a_word_is_the_data_set_and_a_path_the_folder(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "digits" / "0.png")
    assert open_data("digits").fingerprint == digits.fingerprint
    assert open_data("./digits").shape == (1, 2, 3)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
    assert len(open_data("~/a.npy")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "crop"}, r"data\.fit='crop' needs data\.size"),
        ({"fit": "squeeze", "size": (4, 4)}, r"data\.fit='squeeze' must be one of exact, crop, resize, pad"),
        ({"size": (0, 4)}, r"data\.size=0x4: height and width must be positive"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        open_data("digits", **options)


def test_paths_are_made_absolute_whatever_word_stands_before_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "digits").mkdir()
    for given, absolute in {
        "set": f"{tmp_path}/set",
        "./digits": f"{tmp_path}/digits",
        "~/set": f"{tmp_path}/set",
        "cifar10:set": f"cifar10:{tmp_path}/set",
        "fashion-mnist:~/set": f"fashion-mnist:{tmp_path}/set",
        "hf:set": f"hf:{tmp_path}/set",
        "hf:./set:train[:10]": f"hf:{tmp_path}/set:train[:10]",
    }.items():
        assert located(given) == absolute
    for kept in (
        "digits",
        "fashion-mnist",
        "cifar10",
        "cifar10:",
        "hf:owner/name",
        "hf:owner/name:test",
        "hf:",
        "gone",
    ):
        assert located(kept) == kept


def test_configured_data_are_checked_against_the_record(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 4, 4), np.uint8))
    plain = open_configured(DataConfig(source=str(path), size=(2, 2), fit="resize"))
    assert plain.shape == (1, 2, 2)
    record = DataConfig(source=str(path), fingerprint=open_data(path).fingerprint, shape=(1, 4, 4))
    assert open_configured(record).fingerprint == record.fingerprint
    np.save(path, np.ones((2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match=rf"data\.fingerprint={record.fingerprint} is recorded"):
        open_configured(record)
    np.save(path, np.zeros((2, 5, 4), np.uint8))
    with pytest.raises(ValueError, match=r"data\.shape=\[1, 4, 4\] is recorded, but .* shape \[1, 5, 4\]"):
        open_configured(record)


def test_configured_data_may_skip_bad_files(tmp_path):
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1\.png"):
        assert len(open_configured(DataConfig(source=str(tmp_path), skip_bad=True))) == 1


@pytest.mark.parametrize("suffix", ["", ".zip", ".npy", ".npz"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(UserError, match=rf"pipe{suffix}': cannot be read \(it is a named pipe, not a file\)"):
        open_data(tmp_path / f"pipe{suffix}")


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-of-this-name/set", "a\0b"])
def test_names_that_are_no_paths_are_one_line(source):
    with pytest.raises(UserError, match=r"not a valid path \(.*\); known|no file, folder or data set"):
        open_data(source)


def test_what_is_opened_is_logged_and_never_printed(tmp_path, caplog, capsys):
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 5, 3), np.uint8))
    with caplog.at_level("INFO", "multistage_diffusion.data"):
        open_configured(DataConfig(source=str(tmp_path / "a.npy")))
    assert caplog.messages == [f"{tmp_path / 'a.npy'}: 3 images, no labels, 2 x 5, colour"]
    assert capsys.readouterr() == ("", "")


def test_configured_data_have_a_limit_of_pixels(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    assert len(open_configured(DataConfig(source=str(tmp_path), max_pixels=20))) == 1
    with pytest.raises(
        UserError, match=r"it has 20 pixels, more than data\.max_pixels=19; allow it with --max-pixels 20"
    ):
        open_configured(DataConfig(source=str(tmp_path), max_pixels=19))
    with pytest.raises(UserError, match=r"data\.max_pixels=0 must be positive"):
        DataConfig(max_pixels=0)


# -- one file adds one ------------------------------------------------------------------------------------------------

TOY = '''"""Squares of one grey level each, by their number."""

import numpy as np

from multistage_diffusion.data import ImageData
from multistage_diffusion.data.sources import SOURCES, Named


class Squares:
    shape = (1, 8, 8)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def rows(self, indices):
        return np.repeat((indices * 7 % 256).astype(np.uint8), 64).reshape(len(indices), *self.shape)


def open_toy(rest, options):
    count = int(rest or 40)
    return ImageData(Squares(count), np.arange(count) % 2, f"toy:{count}", ("even", "odd"))


SOURCES.add("toy")(Named("toy[:COUNT]", open_toy))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Put a file beside the package's own modules; the registry looks again at its next lookup."""
    SOURCES.names()  # imports all others, which add themselves once only
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path / "more")])
    monkeypatch.setattr(SOURCES, "_known", dict(SOURCES._known))
    monkeypatch.setattr(SOURCES, "_complete", False)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop(f"{sources.__name__}.toy", None)


def test_one_file_adds_a_source(toy):
    data = open_data("toy:100")
    assert data.describe() == "toy:100: 100 images, 2 classes, 8 x 8, grey"
    assert open_data("toy", size=(12, 10), fit="pad").shape == (1, 12, 10)
    assert located("toy:100") == "toy:100"
    assert "toy[:COUNT]" in forms()
    with pytest.raises(UserError, match=r"did you mean 'toy'\? known: .*toy\[:COUNT\], webdataset:FOLDER, \.npy"):
        open_data("toys")
    with pytest.raises(UserError, match=r"data\.source='toy:': nothing follows the colon; write toy\[:COUNT\]"):
        open_data("toy:")


@pytest.mark.slow
def test_the_commands_know_a_source_that_one_file_adds(toy, capsys):
    settings = [
        "network.encoder_width=8",
        "network.decoder_widths=[8,8,8]",
        "network.blocks_per_level=1",
        "network.num_classes=2",
        "training.steps=2",
        "training.batch=6",
        "training.held_out_rows=4",
        "sampling.calls=6",
    ]
    assert cli.main(["train", "--preset", "digits", "--data", "toy:60", "--out", "run", "--set", *settings]) == 0
    assert "toy:60: 60 images, 2 classes, 8 x 8, grey" in capsys.readouterr().err
    assert read_json(Path("run/config.json"))["data"]["fingerprint"] == open_data("toy:60").fingerprint
    assert cli.main(["describe", "run"]) == 0
    assert "8 x 8" in capsys.readouterr().out
    assert cli.main(["sample", "run", "--count", "4", "--out", "grid.png"]) == 0
    assert Image.open("grid.png").size[0] > 8
    assert cli.main(["report", "run", "--count", "4"]) == 0
    assert "toy:60" in Path("run/report.html").read_text()
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert not left.value.code
    assert "toy[:COUNT]" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trainer_loads_no_sources():
    script = (
        "import sys, multistage_diffusion.training.trainer\n"
        "print([name for name in sys.modules if name.startswith('multistage_diffusion.data.')])\n"
        "from multistage_diffusion.data.sources import open_data\n"
        "try: open_data('nowhere')\n"
        "except ValueError as error: print(error)"
    )
    path = str(Path(multistage_diffusion.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    loaded, message = done.stdout.splitlines()
    names = {name.strip(" '").removeprefix("multistage_diffusion.data.") for name in loaded.strip("[]").split(",")}
    assert names == {"content", "dataset", "rows"}
    assert message.endswith(
        "known: cifar10:FOLDER, digits, fashion-mnist[:FOLDER], hf:NAME[:SPLIT], webdataset:FOLDER, .npy or .npz, "
        "a folder or .zip of images, .parquet, a .tar of images"
    )


def test_a_configuration_is_opened_with_its_options() -> None:
    data = open_data(DataConfig(source="digits", size=(4, 6), fit="resize"))
    assert data.shape == (1, 4, 6)
