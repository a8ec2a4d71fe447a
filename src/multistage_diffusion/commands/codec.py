"""The command that trains a latent codec."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from ..console import Bar
from ..errors import UserError
from ..latent.codec_training import CodecSettings
from ..workflow.codec import train_codec
from .options import DataOptions, Device, data_option, option, print_json, say

_DEFAULTS = CodecSettings()


@dataclass(kw_only=True)
class TrainCodec(DataOptions):
    """Train a small autoencoder (a latent codec) on a data set, for runs on its latents.

    Writes the codec to OUT in the layout of diffusers' AutoencoderKL, with training.json (settings and held-out PSNR) and
    reconstructions.png (held-out images above their reconstructions).

    Examples
      msdiff train-codec fashion-mnist --size 32 32 --fit pad --out codecs/fashion
      msdiff train-codec photos/ --size 128 128 --fit crop --factor 8 --width 64 --out codecs/photos
      msdiff train-codec photos/ --size 128 128 --fit crop --factor 8 --width 64 --out codecs/photos --resume
    """

    data: Annotated[Positional[str], data_option()]
    out: Annotated[Path, option("FOLDER")]
    """The codec's folder."""
    latent_channels: int = _DEFAULTS.latent_channels
    """Channels of a latent."""
    factor: int = _DEFAULTS.factor
    """Height and width of an image divided by those of its latent: a power of 2."""
    width: int = _DEFAULTS.width
    """Channels of the networks at the latents' size; halved at each doubling of the size, but not below 16."""
    steps: int = _DEFAULTS.steps
    """Optimiser iterations."""
    batch: int = _DEFAULTS.batch
    """Images per iteration."""
    lr: float = _DEFAULTS.lr
    """Learning rate."""
    kl: float = _DEFAULTS.kl
    """Weight of the KL divergence of the latents from N(0, 1); more gives simpler latents and blurrier images."""
    seed: int = _DEFAULTS.seed
    """Seed of all random numbers."""
    resume: bool = False
    """Continue the training in OUT, with the same options or more --steps."""
    replace: bool = False
    """Move existing files at OUT aside."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    json: bool = False
    """Print training.json."""

    def run(self) -> None:
        """Run the command."""
        if self.resume and self.replace:
            raise UserError(
                "--resume and --replace exclude each other; give --resume to continue the training, or --replace to start anew"
            )
        settings = CodecSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CodecSettings)})
        with Bar("training", "steps") as bar:
            record = train_codec(
                self.described(self.data),
                self.out,
                settings,
                resume=self.resume,
                replace=self.replace,
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(record)
            return
        held_out = record["held_out"]
        content = held_out["content_psnr"]
        padded = "" if content is None else f", {content:.2f} dB without the padding"
        fidelity = "exact" if held_out["psnr"] is None else f"PSNR {held_out['psnr']:.2f} dB{padded}"
        shape = "x".join(map(str, record["latent_shape"]))
        say(f"{held_out['images']} held-out images: {fidelity}; latents {shape}")
        say(
            f"written: {self.out} (next: msdiff train --preset NAME --codec {self.out}; see {self.out}/reconstructions.png)"
        )
