"""Features of a user's TorchScript file."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, out_of_memory
from ..reading import require_file
from .checks import check_images
from .registry import FeatureExtractor
from .trust import agreed


class ScriptFeatures(FeatureExtractor):
    """A user's TorchScript module that maps uint8 images (N, C, H, W) to features (N, D).

    Args:
        file: the module; it is code, which may read and write files.
        named: True if the user named the file in this call; False if a configuration, perhaps another user's, names it.

    Raises:
        UserError: if it is not a TorchScript file, or `named` is False and the user has not named it on this machine.
    """

    comparable_to = "other figures of the same file only"
    preprocessing = "the file's own"

    def __init__(self, file: Path, *, named: bool = True) -> None:
        if file.exists():
            require_file(file)
        try:
            data = file.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if not named and not agreed(digest):
                raise UserError(
                    f"features={str(file)!r}: is code that the configuration names; if you trust the file, name it "
                    f"yourself once: --set evaluation.features={file}"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated format, but it needs no Python class
                self._module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except OSError as error:
            raise UserError(f"features={str(file)!r}: {error.strerror or error}; name a TorchScript file") from None
        except RuntimeError:
            raise UserError(
                f"features={str(file)!r}: not a TorchScript file; write one with torch.jit.script(module).save(...)"
            ) from None
        self.title, self.digest = f"torchscript {file.name}", digest[:12]

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to features (N, D).

        Raises:
            UserError: if the module raises, or returns anything but finite floats (N, D).
        """
        check_images("images", images)
        try:
            with torch.no_grad():
                features = self._module.to(images.device)(images)
        except (RuntimeError, torch.jit.Error) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{self.name}: failed on uint8 images {tuple(images.shape)}: {reason}; use other images or features"
            ) from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"{self.name}: returned {shape} for {len(images)} images; it must return ({len(images)}, D)"
            )
        if not features.is_floating_point() or not bool(torch.isfinite(features).all()):
            raise UserError(
                f"{self.name}: returned {features.dtype}, or values that are not finite; it must return finite floats"
            )
        return features
