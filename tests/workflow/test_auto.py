"""The choice of a configuration for one's own images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crops import make_crops
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from multistage_diffusion import find_stages, train
from multistage_diffusion.config import DataConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.shares import stage_training
from multistage_diffusion.stage_finding import StageSettings
from multistage_diffusion.workflow import auto
from multistage_diffusion.workflow.auto import auto_config

PIXELS = (load_digits().images[:300] * 255 / 16).astype(np.uint8)
SMALL = {
    "network.encoder_width": 16,
    "network.decoder_widths": [16, 16, 16],
    "training.steps": 3,
    "training.batch": 12,
    "training.sample_every": 0,
    "evaluation.every": 0,
}


def folder_of(tmp_path: Path, *sizes: tuple[int, int]) -> Path:
    """Write the digits as images of these sizes, in turn."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(PIXELS):
        Image.fromarray(image).resize(sizes[number % len(sizes)][::-1]).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("auto"), (44, 60), (70, 37), (90, 90))


def test_large_images_of_several_sizes_are_cropped_to_what_the_device_can_train(photos: Path) -> None:
    found = auto_config(str(photos), device="cpu")
    config = found.config
    assert config.data.size == (32, 32)
    assert config.data.fit == "crop"
    assert config.data.shape == config.input_shape == (1, 32, 32)
    assert config.name == "images-32-cpu"
    assert config.network.channels == 1
    reasons = {reason.setting: reason for reason in found.reasons}
    assert reasons["data.size"].value == "32x32"
    assert "37x70" in reasons["data.size"].reason or "70x37" in reasons["data.size"].reason
    assert all(reason.setting in found.table() and reason.reason in found.table() for reason in found.reasons)


def centres(folder: Path) -> list[np.ndarray]:
    """Return the centres of a folder's images at 32x32, by Pillow alone."""
    found = []
    for path in sorted(folder.rglob("*.*")):
        with Image.open(path) as image:
            found.append(np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1))
    return found


def deviation(images: list[np.ndarray]) -> float:
    """Return the standard deviation about the mean image, in the network's range."""
    values = np.stack(images) / 127.5 - 1
    return float(np.sqrt(np.square(values - values.mean(0)).mean()))


def test_sigma_data_is_that_of_the_images_and_no_stage_starves(crops: Path) -> None:
    config = auto_config(str(crops), {"data.held_out": 0.0}, device="cpu").config
    assert config.data.shape == config.input_shape == (3, 32, 32)
    assert config.diffusion.sigma_data == pytest.approx(deviation(centres(crops)), abs=1e-4)
    assert config.stages.interior == pytest.approx((1.469, 9.596), rel=1e-3)  # even in VP time
    shares = [share for _, share, _ in stage_training(config.training, config.stages, config.diffusion.prior)]
    assert min(shares) > 0.03


def test_photographs_that_are_decoded_smaller_have_the_deviation_of_the_whole_ones(tmp_path: Path) -> None:
    folder = make_crops(tmp_path / "large", 12, (300, 427))
    whole = centres(folder)
    config = auto_config(str(folder), {"data.held_out": 0.0}, device="cpu").config
    assert config.diffusion.sigma_data == pytest.approx(deviation(whole), rel=0.005)
    read = open_data(str(folder), size=(32, 32), fit="crop").array()
    apart = [np.abs(row - other.astype(float)).mean() for row, other in zip(read, whole, strict=True)]
    jpeg = [path.suffix == ".jpg" for path in sorted(folder.rglob("*.*"))]
    assert [value > 0 for value in apart] == jpeg  # PNG images are decoded whole
    assert max(apart) < 1.5


def test_stages_of_the_gaussian_denoiser_are_those_of_real_images(crops: Path, tmp_path: Path) -> None:
    def found(source: Path) -> tuple[float, ...]:
        data = DataConfig(source=str(source), size=(16, 16), fit="crop", held_out=0.0)
        return find_stages(data, StageSettings(algorithm=2, denoiser="gaussian", stages=3)).edges_sigma

    pixels = open_data(str(crops), size=(16, 16), fit="crop").array()
    mixed = np.random.default_rng(0).permuted(pixels.reshape(len(pixels), 3, -1), axis=2).reshape(pixels.shape)
    np.save(tmp_path / "mixed.npy", mixed)  # the same colours without a picture
    real, none = found(crops), found(tmp_path / "mixed.npy")
    assert real[0] < 0.9 * none[0]  # detail of pictures is faint
    assert real[1] < none[1]
    result = find_stages(
        DataConfig(source=str(crops), size=(32, 32), fit="crop"),
        StageSettings(algorithm=2, denoiser="gaussian", stages=3),
    )
    config = auto_config(str(crops), result=result, device="cpu").config
    assert config.stages.interior == result.edges_sigma
    shares = [share for _, share, _ in stage_training(config.training, config.stages, config.diffusion.prior)]
    assert min(shares) > 0.2


def test_images_smaller_than_a_preset_keep_their_size_and_get_fewer_levels(tmp_path: Path) -> None:
    config = auto_config(str(folder_of(tmp_path, (8, 8))), device="cpu").config
    assert config.data.size == (8, 8)
    assert config.network.channel_mult == (1, 2)
    assert config.network.attention_factors == (2,)


@pytest.mark.slow
def test_small_images_of_several_sizes_get_the_largest_common_multiple_of_eight(tmp_path: Path) -> None:
    assert auto_config(str(folder_of(tmp_path, (21, 30), (26, 19))), device="cpu").config.data.size == (16, 16)


def test_images_of_several_sizes_in_another_source_are_cropped_to_what_the_device_can_train(tmp_path: Path) -> None:
    folder_of(tmp_path, (44, 60), (70, 37))
    archive = shutil.make_archive(str(tmp_path / "photos"), "tar", tmp_path / "photos")
    found = auto_config(archive, device="cpu")
    assert (found.config.data.size, found.config.data.fit) == ((32, 32), "crop")
    assert "images of several sizes" in found.table()


def test_processes_share_the_memory_of_cpus_and_agree_on_the_smallest() -> None:
    class Four:
        size = 4

        def all_gather_object(self, own: int) -> list[int]:
            return [own, 8000, 4000, 6000]

    assert auto._memory_of_each(Four(), torch.device("cpu")) == 1000  # type: ignore[arg-type]


def test_keys_that_are_given_are_not_chosen(photos: Path) -> None:
    given = {
        "data.size": [16, 24],
        "data.held_out": 0.3,
        "diffusion.sigma_data": 0.4,
        "diffusion.prior.p_mean": -0.5,
        "training.accumulate": 4,
        **SMALL,
    }
    found = auto_config(str(photos), given, device="cpu")
    config = found.config
    assert config.data.size == (16, 24)
    assert config.data.held_out == 0.3
    assert config.diffusion.sigma_data == 0.4
    assert config.training.accumulate == 4
    assert config.training.steps == 3
    why = {reason.setting: reason.reason for reason in found.reasons}
    assert why["network"] == "as given"
    assert why["training.steps"].startswith("as given;")
    assert config.diffusion.prior.p_mean == -0.5


@pytest.mark.slow
def test_stages_that_are_given_are_kept(photos: Path) -> None:
    config = auto_config(str(photos), {"stages.interior": [0.3, 2.0]}, device="cpu").config
    assert config.stages.interior == (0.3, 2.0)
    other = find_stages(DataConfig(source=str(photos), size=(32, 32), fit="crop"), StageSettings(algorithm="snr"))
    found = auto_config(str(photos), result=other, device="cpu")
    assert found.config.stages.interior == other.edges_sigma
    assert found.result is other


def test_stages_of_other_images_are_refused_before_the_choice(photos: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (80, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "others.npy", images)
    settings = StageSettings(algorithm=2, denoiser="gaussian")
    other = find_stages(DataConfig(source=str(tmp_path / "others.npy")), settings)
    with pytest.raises(UserError, match="found on other images"):
        auto_config(str(photos), result=other, device="cpu")
    assert auto_config(str(photos), result=other, borrow=True, device="cpu").result is other


@pytest.mark.slow
def test_arrays_of_one_size_are_opened_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", PIXELS)
    assert auto_config(str(tmp_path / "small.npy"), device="cpu").config.data.size == (8, 8)
    np.save(tmp_path / "large.npy", PIXELS.repeat(6, 1).repeat(6, 2))
    found = auto_config(str(tmp_path / "large.npy"), device="cpu").config.data
    assert (found.size, found.fit) == ((32, 32), "crop")


def test_data_with_a_preset_of_their_own_get_it() -> None:
    found = auto_config("digits", {"training.steps": 7}, device="cpu")
    assert found.config.name == "digits"
    assert found.config.training.steps == 7
    assert found.config.stages == preset("digits").stages


def test_a_batch_that_does_not_fit_is_divided(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = auto_config(str(photos), device="cpu").config
    assert whole.training.accumulate == 1
    monkeypatch.setattr(auto, "free_memory", lambda _: int(0.3 * 2**30 / auto.SHARE))
    divided = auto_config(str(photos), device="cpu")
    parts = divided.config.training.accumulate
    assert parts > 1
    rows = -(-whole.training.batch // parts)
    assert auto.training_memory(whole, rows) <= 0.3 * 2**30 < auto.training_memory(whole, 2 * rows)
    assert any(f"in {parts} parts" in reason.value for reason in divided.reasons)


def test_images_above_the_largest_pixel_preset_need_a_codec(photos: Path) -> None:
    with pytest.raises(UserError, match="trained on latents; give --codec"):
        auto_config(DataConfig(source=str(photos), size=(160, 160), fit="crop"), device="cpu")


def test_classes_and_few_images_are_pointed_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "classes.npz", images=PIXELS, labels=load_digits().target[:300])
    words = auto_config(str(tmp_path / "classes.npz"), device="cpu").table()
    assert "network.num_classes=10 learns the 10 classes" in words
    assert "300 images are few" in words


def test_a_folder_without_images_is_refused_as_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no images"):
        auto_config(str(tmp_path), device="cpu")


def test_unknown_keys_are_told_before_images_are_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.step: unknown key; did you mean 'steps'\?"):
        auto_config(str(tmp_path / "nothing"), {"training.step": 20}, device="cpu")


def test_the_choice_trains(photos: Path, tmp_path: Path) -> None:
    chosen = auto_config(str(photos), {**SMALL, "data.size": [8, 8]}, device="cpu")
    run = train(chosen.config, tmp_path / "run", result=chosen.result, device="cpu")
    assert (tmp_path / "run" / "stages.json").exists()
    assert [record["step"] for record in run.records() if record["kind"] == "train"][-1] == 3


def test_a_short_training_has_its_intervals_in_proportion(photos: Path) -> None:
    base = preset("images-32-cpu")
    config = auto_config(str(photos), {"training.steps": 500, "training.held_out_every": 77}, device="cpu").config
    share = 500 / base.training.steps
    assert config.optimizer.warmup_steps == round(base.optimizer.warmup_steps * share)
    assert config.optimizer.decay_after == round(base.optimizer.decay_after * share)
    assert config.training.checkpoint_every == round(base.training.checkpoint_every * share)
    assert config.training.sample_every == max(50, round(base.training.sample_every * share))
    assert config.evaluation.every == max(200, round(base.evaluation.every * share))
    assert config.training.held_out_every == 77
    least = auto_config(str(photos), {"training.steps": 60}, device="cpu").config
    assert (least.training.held_out_every, least.training.checkpoint_every) == (20, 20)
    assert (least.training.sample_every, least.evaluation.every) == (50, 200)
    told = {r.setting: r.value for r in auto_config(str(photos), {"training.steps": 60}, device="cpu").reasons}
    assert told["evaluation"] == "at the end"
    longer = auto_config(str(photos), {"training.steps": 2 * base.training.steps}, device="cpu").config
    assert (longer.optimizer, longer.evaluation.every) == (base.optimizer, base.evaluation.every)
    assert auto_config(str(photos), {"training.steps": 1}, device="cpu").config.optimizer.warmup_steps == 1


def test_widths_are_as_given_only_where_they_are(photos: Path) -> None:
    def why(**changes: object) -> str:
        found = auto_config(str(photos), {f"network.{key}": value for key, value in changes.items()}, device="cpu")
        return next(reason.reason for reason in found.reasons if reason.setting == "network")

    assert why(dropout=0.1) == "of the preset"
    assert why(encoder_width=32) == "as given"


def test_what_the_images_contradict_is_told_at_once(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "photos" / str(number)).mkdir(parents=True)
        for name in range(4):
            Image.fromarray(PIXELS[4 * number + name]).save(tmp_path / "photos" / str(number) / f"{name}.png")
    source = str(tmp_path / "photos")
    with pytest.raises(UserError, match=r"network\.num_classes=2: .* has 3 classes; give --set network\.num_classes=3"):
        auto_config(source, {"network.num_classes": 2}, device="cpu")
    with pytest.raises(UserError, match=r"network\.channels=3: the images \(or latents\) have 1 channels"):
        auto_config(source, {"network.channels": 3}, device="cpu")
    with pytest.raises(UserError, match=r"network\.channels=3: the images"):
        auto_config(source, {"network": {"channels": 3}}, device="cpu")
    with pytest.raises(UserError, match=r"data\.size=100000x100000 has more pixels than data\.max_pixels=178956970"):
        auto_config(source, {"data.size": (100_000, 100_000)}, device="cpu")
    config = auto_config(source, {**SMALL, "network.channels": 1}, device="cpu").config
    with pytest.raises(UserError, match=r"network\.channels=3: the images"):
        train(config, tmp_path / "run", {"network.channels": 3}, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["training.steps", "network.num_classes", "network.channels"])
@pytest.mark.parametrize("value", ["many", None, 1.5])
def test_values_of_another_type_are_errors_of_the_user(photos: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        auto_config(str(photos), {key: value}, device="cpu")


def test_learning_rate_and_average_follow_batch_and_length(photos: Path) -> None:
    base = preset("images-32-cpu")
    found = auto_config(str(photos), {"training.batch": 4 * base.training.batch, "training.steps": 500}, device="cpu")
    share = 4 * 500 / base.training.steps
    assert found.config.optimizer.lr == pytest.approx(2 * base.optimizer.lr)
    assert found.config.training.ema_halflife == pytest.approx(share * base.training.ema_halflife)
    kept = {"training.batch": 8, "optimizer.lr": 1e-3, "training.ema_halflife": 77.0}
    config = auto_config(str(photos), kept, device="cpu").config
    assert (config.optimizer.lr, config.training.ema_halflife) == (1e-3, 77.0)


def test_what_is_given_is_said_to_be(photos: Path) -> None:
    def reasons(**changes: object) -> dict[str, auto.Reason]:
        given = {key.replace("__", "."): value for key, value in changes.items()}
        return {reason.setting: reason for reason in auto_config(str(photos), given, device="cpu").reasons}

    own = reasons()
    assert own["diffusion.prior"][1:] == (
        "ln sigma -1.2 ± 1.2",
        "EDM's; msdiff stages DATA --denoiser gaussian proposes one",
    )
    assert own["sampling"].reason == "of the preset"
    given = reasons(diffusion__prior__p_mean=-0.5, sampling__calls=10, evaluation__every=0)
    assert given["diffusion.prior"][1:] == ("ln sigma -0.5 ± 1.2", "as given")
    assert (given["sampling"].value.split(", ")[1], given["sampling"].reason) == ("10 calls", "as given")
    assert given["evaluation"][1:] == ("off", "as given")
    found = auto_config(str(photos), device="cpu")
    assert found.table(without=("stages",)).count("\n") == found.table().count("\n") - 1
