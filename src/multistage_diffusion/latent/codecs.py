"""Latent codecs: autoencoders between images and the smaller latents that a run is trained on."""

from __future__ import annotations

import hashlib
import json
import logging
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig
from ..config.serialization import read_json
from ..contracts import Codec
from ..errors import UserError
from ..reading import brief

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # file names of diffusers' save_pretrained
CLASSES = ("AutoencoderKL", "VQModel")
MOST_LAYERS, MOST_CHANNELS = 64, 1 << 20  # of a codec's config.json; larger numbers are damage


class IdentityCodec:
    """A codec whose latents are the pixels."""

    fingerprint = "identity"

    def encode(self, images: Tensor) -> Tensor:
        """Return images unchanged, as float32."""
        return images.to(torch.float32)

    def decode(self, latents: Tensor) -> Tensor:
        """Return latents unchanged, as float32."""
        return latents.to(torch.float32)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the same shape."""
        return shape


class DiffusersCodec:
    """An AutoencoderKL or VQModel of diffusers (the first stages of Rombach et al. 2022, section 3.1).

    A latent is the posterior mean (KL) or the encoder output before quantisation (VQ). A VQModel quantises in `decode`.

    Args:
        module: float32; changed in place to evaluation mode without gradients.
        fingerprint: of its configuration and weights (`codec_fingerprint`).
        name: its source; starts every error message.
        shift: number that `encode` subtracts from the latents and `decode` adds; it is part of the fingerprint.
    """

    def __init__(self, module: Any, fingerprint: str = "", name: str = "codec", shift: float = 0.0) -> None:
        self.module = module.eval().requires_grad_(False)
        self.name, self.shift = name, shift
        self.fingerprint = _shifted(fingerprint, shift)
        self._quantised = hasattr(module, "quantize")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to unscaled latents, float32 (B, c, h, w).

        Raises:
            UserError: if the codec does not accept images of this shape.
        """
        channels, height, width = images.shape[1:]
        self.latent_shape((channels, height, width))
        encoded = self.module.encode(images.to(torch.float32))
        latents: Tensor = encoded.latents if self._quantised else encoded.latent_dist.mean
        return latents - self.shift if self.shift else latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Map unscaled latents (B, c, h, w) to images, float32 (B, C, H, W); a VQModel first quantises them."""
        latents = latents.to(torch.float32)
        images: Tensor = self.module.decode(latents + self.shift if self.shift else latents).sample
        return images

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (c, h, w) for images of shape (C, H, W) without running the network.

        Raises:
            UserError: if the number of channels differs from the codec's, or height or width is not a multiple of its
                factor.
        """
        channels, height, width = shape
        config = self.module.config
        if channels != config.in_channels:
            raise UserError(
                f"{self.name}: takes images of {config.in_channels} channels, not of {channels}; use a codec trained on "
                "such images (msdiff train-codec), or convert the images"
            )
        factor = 2 ** (len(config.block_out_channels) - 1)
        if height % factor or width % factor:
            up = [-(-side // factor) * factor for side in (height, width)]
            raise UserError(
                f"{self.name}: takes images whose sides are multiples of {factor}, not {height}x{width}; add --size "
                f"{up[0]} {up[1]} --fit pad (data.size, data.fit)"
            )
        wide = self._quantised and config.vq_embed_dim is not None
        return config.vq_embed_dim if wide else config.latent_channels, height // factor, width // factor


def open_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """Open the codec of a configuration.

    Args:
        config: its source is a folder in the layout of diffusers' save_pretrained, hf:OWNER/NAME, or "identity"
            (IdentityCodec).
        device: where it runs.

    Raises:
        UserError: if the codec is missing, damaged or of another class, diffusers is missing, or a recorded fingerprint
            differs.
    """
    if not config.source:
        raise UserError(
            "codec.source is empty: name an autoencoder (--codec FOLDER or hf:NAME); msdiff train-codec makes one"
        )
    codec: Codec = IdentityCodec() if config.source == "identity" else _open_diffusers(config, device)
    _require_recorded(config, codec.fingerprint)
    return codec


def _require_recorded(config: CodecConfig, fingerprint: str) -> None:
    if config.fingerprint and config.fingerprint != fingerprint:
        raise UserError(
            f"codec.fingerprint={config.fingerprint} is recorded, but {config.source} now has {fingerprint}; "
            "restore that codec or start a new run"
        )


def located_folder(config: CodecConfig) -> Path:
    """Return the local folder of an autoencoder, for hf:OWNER/NAME in the hub's cache, to which it may be downloaded.

    Raises:
        UserError: if it is missing, damaged, of another class, none, or a recorded fingerprint differs.
    """
    if config.source == "identity":
        raise UserError("codec.source='identity': is no autoencoder; name one, or train on pixels")
    folder = _folder(config)
    autoencoder_settings(folder, config.source)
    _require_recorded(config, _shifted(codec_fingerprint(folder), config.shift))
    return folder


def declared_scale(config: CodecConfig) -> tuple[float, float]:
    """Return (scale, shift) that an autoencoder's own config.json declares: scaling_factor and shift_factor.

    Args:
        config: names the autoencoder.

    Raises:
        UserError: if it declares no scale, or statistics of each channel, which are not supported.
    """
    if config.source == "identity":
        raise UserError("codec.scale='config': the identity declares none; give a number")
    settings = read_json(_folder(config) / CONFIG)
    found = settings if isinstance(settings, Mapping) else {}
    for name in ("latents_mean", "latents_std"):
        if found.get(name) is not None:
            raise UserError(
                f"codec.scale='config': {config.source} declares {name} of each channel, which is not supported; give a number"
            )
    numbers = []
    for name, value in (
        ("scaling_factor", found.get("scaling_factor")),
        ("shift_factor", found.get("shift_factor") or 0),
    ):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(
                f"codec.scale='config': {config.source} declares {name}={brief(value)}; give codec.scale a number"
            )
        numbers.append(float(value))
    return numbers[0], numbers[1]


def codec_fingerprint(folder: Path) -> str:
    """Return the SHA-256, in hex, of a codec's configuration and weights, without the diffusers version."""
    config = read_json(folder / CONFIG)
    told = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    with (folder / WEIGHTS).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{json.dumps(told, sort_keys=True)} {weights}".encode()).hexdigest()


def _shifted(fingerprint: str, shift: float) -> str:
    """Return the fingerprint of a codec with a shift of its latents."""
    return hashlib.sha256(f"{fingerprint} {shift!r}".encode()).hexdigest() if shift else fingerprint


def _open_diffusers(config: CodecConfig, device: torch.device | str) -> DiffusersCodec:
    folder = _folder(config)
    name = "/".join(part for part in (config.source, config.subfolder) if part)
    kind = autoencoder_settings(folder, name)["_class_name"]
    diffusers = import_diffusers()
    try:
        # low_cpu_mem_usage=False avoids a message about an optional package; local_files_only: no download here
        module, info = getattr(diffusers, kind).from_pretrained(
            folder,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many exception types on a foreign configuration or file
        raise UserError(f"{name}: cannot be opened as {kind} ({_short(error)})") from None
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    if lacking:
        raise UserError(f"{name}: {WEIGHTS} lacks {len(lacking)} of the tensors of its config.json ({lacking[0]})")
    return DiffusersCodec(module.to(device), codec_fingerprint(folder), name, config.shift)


def _folder(config: CodecConfig) -> Path:
    return _fetched(config) if config.source.startswith("hf:") else _local(config)


def autoencoder_settings(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the config.json of an autoencoder.

    Args:
        folder: of the autoencoder.
        name: for messages.

    Raises:
        UserError: if it is of another class than `CLASSES`, or has sizes that no autoencoder has.
    """
    found = read_json(folder / CONFIG)
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    kind = settings.get("_class_name")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise UserError(f"{name}: config.json names _class_name={kind!r}; a codec is one of {' or '.join(CLASSES)}")
    _require_sizes(settings, name)
    return settings


def _require_sizes(settings: Mapping[str, Any], name: str) -> None:
    """Refuse sizes in a config.json that no autoencoder has: building it would take hours and all memory."""
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        largest = max((number for number in values if isinstance(number, int)), default=0)
        if len(values) > MOST_LAYERS or largest > (MOST_LAYERS if key == "layers_per_block" else MOST_CHANNELS):
            raise UserError(f"{name}: {CONFIG} has {key}={brief(value)}, more than any autoencoder; is it damaged?")


def _local(config: CodecConfig) -> Path:
    folder = Path(config.source).expanduser() / config.subfolder
    if not folder.is_dir():
        raise UserError(
            f"codec.source='{config.source}': no folder {folder}; give a folder that msdiff train-codec or diffusers wrote, "
            "or hf:OWNER/NAME"
        )
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: holds no {file}; {_lack(file)}{_below(folder)}")
    return folder


def _lack(file: str) -> str:
    return "only safetensors are read" if file == WEIGHTS else "it is no autoencoder of diffusers"


def _below(folder: Path) -> str:
    """Return a hint if a sub-folder holds a codec."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}") if (path.parent / WEIGHTS).is_file())
    return f"; did you mean codec.subfolder={found[0]!r}?" if found else ""


def _fetched(config: CodecConfig) -> Path:
    """Return the local folder of a codec of the Hugging Face hub; download it if it is not in the hub's cache."""
    try:
        import huggingface_hub
        from huggingface_hub import utils as errors
    except ImportError:
        raise UserError(_needs("huggingface-hub")) from None

    def fetch(**options: bool) -> Path:
        found = [
            huggingface_hub.hf_hub_download(
                config.source.removeprefix("hf:"), file, subfolder=config.subfolder or None, **options
            )
            for file in (CONFIG, WEIGHTS)
        ]
        return Path(found[0]).parent

    try:
        return fetch(local_files_only=True)  # a cached copy is good enough: runs check the fingerprint
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError as error:
        raise UserError(f"codec.source='{config.source}': {_short(error)}") from None
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # offline, it logs every retry
    try:
        return fetch()
    except errors.LocalEntryNotFoundError:
        reason = "the Hugging Face hub cannot be reached, and it is not in the local cache; connect, or give a folder"
    except errors.EntryNotFoundError as error:
        file = WEIGHTS if WEIGHTS in str(error) else CONFIG
        reason = f"there is no {'/'.join(part for part in (config.subfolder, file) if part)} in it; {_lack(file)}"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository on the Hugging Face hub, or it is not open to you"
    except OSError as error:
        reason = _short(error)
    finally:
        logger.setLevel(level)
    raise UserError(f"codec.source='{config.source}': {reason}")


def import_diffusers() -> Any:
    """Import and return diffusers.

    Raises:
        UserError: naming the extra to install, if it is missing.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError(_needs("diffusers")) from None
    return diffusers


def _needs(package: str) -> str:
    return f"a latent codec needs {package}: pip install 'multistage-diffusion[hub]'"


def _short(error: Exception) -> str:
    """Return an exception's type and message as one line of at most 240 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240)
