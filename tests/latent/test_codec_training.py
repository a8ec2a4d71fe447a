"""Training a codec: the loss, reproducibility, what is measured, what is written."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from multistage_diffusion.commands.codec import TrainCodec
from multistage_diffusion.config import CodecConfig, DataConfig
from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.data.sources import open_configured
from multistage_diffusion.errors import UserError
from multistage_diffusion.latent.codec_training import (
    CodecSettings,
    CodecTrainer,
    build_autoencoder,
    codec_loss,
    codec_quality,
    psnr,
    require_codec_memory,
    write_codec,
)
from multistage_diffusion.latent.codecs import CONFIG, WEIGHTS, IdentityCodec, open_codec
from multistage_diffusion.training.checkpoint import list_checkpoints
from multistage_diffusion.training.metrics import TrainingDiverged
from multistage_diffusion.workflow.codec import train_codec

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")


def tiny(**changes: Any) -> CodecSettings:
    return CodecSettings(**({"latent_channels": 2, "factor": 2, "width": 8, "steps": 6, "batch": 4} | changes))


def images(count: int = 40, *, size: int = 8, seed: int = 0) -> ImageData:
    """Return bright bars on black, which a few numbers describe."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((count, 1, size, size), np.uint8)
    for image, row, level in zip(pixels, rng.integers(0, size - 1, count), rng.integers(100, 256, count), strict=True):
        image[0, row : row + 2] = level
    return ImageData(pixels, None, "bars")


def weights(trainer: CodecTrainer) -> dict[str, Tensor]:
    both = {"model": trainer.model, "ema": trainer.ema.module}
    return {f"{part}.{k}": v for part, module in both.items() for k, v in module.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# -- settings, network, loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"factor": 6}, "factor=6 must be a power of 2"),
        ({"lr": math.inf}, "lr=inf must be positive"),
        ({"kl": -1.0}, r"kl=-1.0 must be in \[0, 1e6\]"),
        ({"seed": -1}, "seed=-1 must be >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny(**change)


@pytest.mark.parametrize(
    ("width", "factor", "widths"),
    [(32, 4, (16, 16, 32)), (64, 4, (16, 32, 64)), (8, 2, (8, 8)), (20, 4, (16, 16, 20)), (16, 1, (16,))],
)
def test_the_network_narrows_towards_the_images(width: int, factor: int, widths: tuple[int, ...]) -> None:
    settings = tiny(width=width, factor=factor)
    assert settings.widths == widths
    model = build_autoencoder(settings, (3, 8, 12))
    x = torch.rand(1, 3, 8, 12)
    assert model.encode(x).latent_dist.mean.shape == (1, 2, 8 // factor, 12 // factor)
    assert model(x).sample.shape == x.shape


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": 100_000}, r"width=100000 \(a codec of [\d,]+ parameters\) needs at least .* GiB"),
        ({"batch": 10**8}, r"batch=100000000 needs at least .* GiB .* take a smaller batch"),
    ],
)
def test_what_memory_cannot_hold_is_refused_before_it_is_built(change: dict[str, Any], said: str) -> None:
    require_codec_memory(tiny(), (1, 8, 8), torch.device("cpu"))
    with pytest.raises(UserError, match=said):
        require_codec_memory(tiny(**change), (1, 8, 8), torch.device("cpu"))


def test_images_must_be_multiples_of_the_factor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4, not 8x10"):
        build_autoencoder(tiny(factor=4), (1, 8, 10))


def test_the_loss_is_what_it_says() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 1, 4, 6, dtype=torch.float64)
    mean, logvar = torch.randn(2, 3, 2, 2, 3, dtype=torch.float64)
    posterior = Normal(mean, (logvar / 2).exp())
    divergence = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    expected = (x - y).abs().mean() + 10 * ((x - y) ** 2).mean() + 0.3 * divergence.sum() / (3 * 24)
    torch.testing.assert_close(codec_loss(x, y, mean, logvar, 0.3), expected)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_to_reconstruct(tmp_path: Path) -> None:
    trainer = CodecTrainer(tmp_path, tiny(steps=80, batch=8, width=16), images(), CPU)
    before = codec_quality(trainer.codec(), images(seed=1), CPU).psnr
    trainer.fit()
    after = codec_quality(trainer.codec(), images(seed=1), CPU).psnr
    assert before is not None
    assert after is not None
    assert after > before + 6


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = CodecTrainer(tmp_path / "whole", tiny(), images(), CPU)
    whole.fit()
    stopped = CodecTrainer(tmp_path / "parts", tiny(), images(), CPU)
    stopped.fit(lambda done, total: stopped.stop() if done == 2 else None)
    assert stopped.step == 2
    longer = CodecTrainer(tmp_path / "parts", tiny(steps=4), images(), CPU)
    longer.restore()
    assert_same(weights(longer), weights(stopped))
    longer.fit()
    rest = CodecTrainer(tmp_path / "parts", tiny(), images(), CPU)
    rest.restore()
    told: list[tuple[int, int]] = []
    rest.fit(lambda *news: told.append(news))
    assert told == [(5, 6), (6, 6)]
    assert_same(weights(rest), weights(whole))
    assert len(list_checkpoints(rest.checkpoints)) == 1


def test_the_seed_decides(tmp_path: Path) -> None:
    trainers = [CodecTrainer(tmp_path, tiny(seed=seed, steps=1), images(), CPU) for seed in (0, 0, 1)]
    for trainer in trainers:
        trainer._iterate()
    one, same, other = map(weights, trainers)
    assert_same(one, same)
    assert not torch.equal(one["model.encoder.conv_in.weight"], other["model.encoder.conv_in.weight"])


def test_mirrored_images_are_trained_on_and_steps_see_different_ones(tmp_path: Path) -> None:
    pixels = np.arange(40 * 16, dtype=np.int64).reshape(40, 1, 4, 4) % 251
    data = ImageData(pixels.astype(np.uint8), None, "ramps")
    trainer = CodecTrainer(tmp_path, tiny(batch=16), data, CPU)
    seen: list[Tensor] = []
    encode = trainer.model.encode
    trainer.model.encode = lambda x: (seen.append(x), encode(x))[1]
    for _ in range(3):
        trainer._iterate()
    known = {False: to_float(data.array()), True: to_float(data.array()).flip(-1)}
    sides, numbers = [], []
    for x in torch.cat(seen):
        ((side, number),) = [(s, i) for s, every in known.items() for i in range(40) if torch.equal(every[i], x)]
        sides.append(side)
        numbers.append(number)
    assert 10 < sum(sides) < 38
    assert len(set(numbers)) > 20
    assert numbers[:16] != numbers[16:32]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    trainer = CodecTrainer(tmp_path, tiny(steps=2), images(), CPU)
    trainer.fit()
    longer = CodecTrainer(tmp_path, tiny(steps=4), images(), CPU)
    longer.restore()
    longer.model.decoder.conv_out.bias.data.fill_(torch.nan)
    kept = {name: value.clone() for name, value in longer.ema.module.state_dict().items()}
    with pytest.raises(
        TrainingDiverged, match=r"loss is not finite at step 3; .* checkpoint of step 2 is intact; .* lower lr"
    ):
        longer.fit()
    assert_same(longer.ema.module.state_dict(), kept)
    again = CodecTrainer(tmp_path, tiny(steps=4), images(), CPU)
    again.restore()
    assert_same(weights(again), weights(trainer))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    trainer = CodecTrainer(tmp_path, tiny(), images(), CPU)
    trainer.model.encoder.conv_in.weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(TrainingDiverged, match=r"gradient is not finite at step 1; .* no checkpoint yet"):
        trainer.fit()


@pytest.mark.parametrize(
    ("settings", "data", "said"),
    [
        (tiny(lr=1e-3), images(), r"lr=0\.001, but .* was begun with 0\.004"),
        (tiny(width=16), images(), "width=16, but .* was begun with 8"),
        (tiny(), images(seed=1), "was begun on other images than bars"),
        (tiny(steps=1), images(), "steps=1 is below step 2"),
    ],
)
def test_only_the_same_training_is_taken_up(
    settings: CodecSettings, data: ImageData, said: str, tmp_path: Path
) -> None:
    CodecTrainer(tmp_path, tiny(steps=2), images(), CPU).fit()
    with pytest.raises(ValueError, match=said):
        CodecTrainer(tmp_path, settings, data, CPU).restore()


# -- judging ----------------------------------------------------------------------------------------------------------


class Shifted(IdentityCodec):
    """Is off by 10 levels in the middle 4x4 pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        images = latents.clone()
        images[..., 2:6, 2:6] += torch.where(images[..., 2:6, 2:6] > 0, -10 / 127.5, 10 / 127.5)
        return images


def noise(content: tuple[int, int] | None = None) -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 2, 8, 8), dtype=np.uint8)
    return ImageData(pixels, None, "noise", content=content)


def test_the_psnr_is_that_of_the_mean_squared_error() -> None:
    quality = codec_quality(Shifted(), noise(), CPU)
    assert quality.images == 300
    assert quality.psnr == pytest.approx(10 * math.log10(255**2 / (100 / 4)))  # a quarter of the pixels
    assert quality.content_psnr is None
    assert psnr(255.0**2) == 0
    assert psnr(0.0) is None


@pytest.mark.parametrize(("content", "share"), [((4, 4), 1.0), ((4, 8), 0.5), ((3, 3), 1.0), ((7, 8), 16 / 56)])
def test_what_was_padded_is_left_out_of_the_psnr_of_the_content(content: tuple[int, int], share: float) -> None:
    quality = codec_quality(Shifted(), noise(content), CPU)
    assert quality.psnr == pytest.approx(10 * math.log10(255**2 / 25))
    assert quality.content_psnr == pytest.approx(10 * math.log10(255**2 / (100 * share)))


def test_a_perfect_codec_has_no_psnr_and_latents_have_their_spread() -> None:
    data = noise()
    quality = codec_quality(IdentityCodec(), data, CPU)
    assert quality.psnr is None
    x = data.array().astype(np.float64) / 127.5 - 1
    assert quality.latent_std == pytest.approx(x.std((0, 2, 3)), rel=1e-6)
    assert quality.scale == pytest.approx(1 / x.std(), rel=1e-6)


# -- what is written --------------------------------------------------------------------------------------------------


def test_diffusers_and_open_codec_read_what_is_written(tmp_path: Path) -> None:
    trainer = CodecTrainer(tmp_path, tiny(), images(), CPU)
    write_codec(tmp_path, trainer.codec())
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert_same(model.state_dict(), trainer.ema.module.state_dict())
    x = to_float(images().array())
    codec = open_codec(CodecConfig(source=str(tmp_path)))
    torch.testing.assert_close(codec.encode(x), trainer.codec().encode(x), rtol=0, atol=1e-6)


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    np.save(tmp_path / "bars.npy", images(60).array()[:, 0])
    return DataConfig(source=str(tmp_path / "bars.npy"), size=(10, 10), fit="pad", held_out=0.3)


def at_step(number: int, do: Callable[[], None]) -> Callable[[int, int], None]:
    return lambda done, total: do() if done == number else None


def test_the_workflow_writes_codec_record_and_picture(source: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "codec"
    told: list[tuple[int, int]] = []
    record = train_codec(source, out, tiny(), device="cpu", progress=lambda *news: told.append(news))
    assert told[-1] == (6, 6)
    assert json.loads((out / "training.json").read_text()) == record
    assert record["steps"] == 6
    assert record["latent_shape"] == [2, 5, 5]
    assert record["data"]["fingerprint"]
    held_out = record["held_out"]
    assert 0 < held_out["images"] < 60
    codec = open_codec(CodecConfig(source=str(out)))
    again = codec_quality(codec, open_configured(source).split(source.held_out)[1], CPU)
    assert (held_out["images"], held_out["psnr"]) == (again.images, pytest.approx(again.psnr, rel=1e-4))
    assert held_out["content_psnr"] == pytest.approx(again.content_psnr, rel=1e-4) != held_out["psnr"]
    assert codec.latent_shape((1, 10, 10)) == (2, 5, 5)
    assert json.loads((out / CONFIG).read_text())["scaling_factor"] == held_out["scale"]
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.width == (10 * 6 + 1) * math.ceil(min(held_out["images"], 16) / 2) + 1
        assert picture.height == (10 * 6 + 1) * 4 + 1
        top = np.asarray(picture)[1:61, 1:61][::6, ::6]
    known = [np.pad(image[0], 1) for image in images(60).array()]
    assert any(np.array_equal(top, image) for image in known)


def test_control_c_keeps_the_codec_so_far_and_resuming_ends_where_it_would_have(
    source: DataConfig, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = signal.getsignal(signal.SIGINT)
    train_codec(source, whole, tiny(), device="cpu")
    assert signal.getsignal(signal.SIGINT) is before
    interrupt = at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3; .* --resume"):
        train_codec(source, parts, tiny(), device="cpu", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((parts / "training.json").read_text())["steps"] == 3
    open_codec(CodecConfig(source=str(parts)))
    train_codec(source, parts, tiny(), device="cpu", resume=True)
    assert_same(load_file(parts / WEIGHTS), load_file(whole / WEIGHTS))


def test_a_folder_is_only_used_when_told_how(source: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "codec"
    with pytest.raises(ValueError, match="there is no training of a codec to go on with"):
        train_codec(source, out, tiny(), resume=True)
    train_codec(source, out, tiny(steps=1), device="cpu")
    kept = (out / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"codec: exists; continue its training \(--resume\)"):
        train_codec(source, out, tiny(), device="cpu")
    with pytest.raises(ValueError, match="multiples of 4"):
        train_codec(source, out, tiny(factor=4), replace=True)
    assert (out / WEIGHTS).read_bytes() == kept
    train_codec(source, out, tiny(steps=1, seed=1), device="cpu", replace=True)
    (aside,) = tmp_path.glob("codec.replaced-*")
    assert (aside / WEIGHTS).read_bytes() == kept
    assert (out / WEIGHTS).read_bytes() != kept


def test_a_codec_needs_held_out_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.held_out=0: a codec is measured on held-out images"):
        train_codec(DataConfig(source="digits", held_out=0), tmp_path / "codec")
    assert not (tmp_path / "codec").exists()


def test_the_command_says_what_the_codec_is_worth(
    source: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{source.source} --size 10 10 --fit pad --held-out 0.3 --out {tmp_path / 'codec'} --device cpu"
    small = "--factor 2 --width 8 --latent-channels 1 --batch 2 --steps"
    tyro.cli(TrainCodec, args=f"{words} {small} 1".split()).run()
    said = capsys.readouterr().out
    assert " held-out images: PSNR " in said
    assert " dB without the padding; latents 1x5x5" in said
    tyro.cli(TrainCodec, args=f"{words} {small} 2 --resume --json".split()).run()
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    with pytest.raises(ValueError, match="--resume and --replace exclude each other"):
        tyro.cli(TrainCodec, args=f"{words} --resume --replace".split()).run()
