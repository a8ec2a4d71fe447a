"""Published feature networks, computed by torch-fidelity (extra `eval`).

torch-fidelity unpickles weight files without restrictions. Each file is therefore first checked here with
torch.load(weights_only=True) before it is passed on. DINOv2's weights are loaded by torch-fidelity itself, unchecked.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..archives import require_intact
from ..errors import UserError
from ..files import make_folder
from ..reading import require_file
from .checks import check_images
from .registry import FEATURES, FeatureExtractor


class FidelityFeatures(FeatureExtractor):
    """One of torch-fidelity's feature networks.

    Attributes:
        kind: its name in FEATURES.
        registered: its name in torch-fidelity.
        layer: layer whose output is the feature.
        size: height and width to which images are scaled.
        url: address of its weights; empty if only torch-fidelity can download them.

    Args:
        weights: a file of its weights; None: downloaded once into torch.hub's checkpoints folder (without `url`: by
            torch-fidelity).

    Raises:
        UserError: if torch-fidelity is not installed, or the weights cannot be obtained or are of another network.
    """

    extra = "eval"
    kind: ClassVar[str]
    registered: ClassVar[str]
    layer: ClassVar[str]
    size: ClassVar[int]
    url: ClassVar[str]

    def __init__(self, weights: Path | None = None) -> None:
        package = torch_fidelity_package()
        file = weights or (_downloaded(self.kind, self.url) if self.url else None)
        if file is not None:
            _check_weights(file)
        self._model = self._load(file)
        version = getattr(package, "__version__", "")
        digest = "" if file is None else f", weights {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
        self.title, self.digest = f"{self.registered} {self.layer}", f"torch-fidelity {version}{digest}"
        self.comparable_to = f"figures of {self.registered} features at equal counts, such as torch-fidelity's own"
        self.preprocessing = f"RGB (grey repeated), scaled to {self.size}x{self.size} as TensorFlow 1 does"

    @classmethod
    def build(cls, weights: Path | None = None) -> FeatureExtractor:
        """Return the extractor with these weights; None: the published ones."""
        return cls(weights)

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to float32 features (N, D)."""
        check_images("images", images)
        self._model.to(images.device)
        with torch.no_grad():
            features: Tensor = self._model(images.expand(-1, 3, -1, -1).contiguous())[0]
        return features

    def _load(self, file: Path | None) -> Any:
        """Return torch-fidelity's network with the weights of a file; None: those that it downloads."""
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        path = None if file is None else os.fspath(file)
        try:
            return FEATURE_EXTRACTORS_REGISTRY[self.registered](
                self.registered, [self.layer], feature_extractor_weights_path=path, verbose=False
            ).eval()
        except RuntimeError as error:  # from load_state_dict
            reason = str(error).splitlines()[-1].strip()
            if file is None:
                raise UserError(
                    f"features={self.kind!r}: its weights cannot be downloaded ({reason}); connect to the network once, or use "
                    "other features"
                ) from None
            raise UserError(f"{file}: not the weights of {self.registered} ({reason}); name another file") from None
        except OSError as error:
            raise UserError(
                f"features={self.kind!r}: its weights cannot be downloaded ({error}); use other features"
            ) from None


@FEATURES.add("inception")
class Inception(FidelityFeatures):
    """The network of published FIDs and Inception scores."""

    takes_weights = True
    kind, registered, layer, size = "inception", "inception-v3-compat", "2048", 299
    url = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    activation_bytes = 13_000_000  # measured on the CPU, as those below
    has_logits = True

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 2048) to the logits of the Inception score, without bias, float32 (N, 1008)."""
        logits: Tensor = features @ self._model.fc.weight.T.to(features.device)
        return logits


@FEATURES.add("vgg16")
class VGG16(FidelityFeatures):
    """The network of published precision and recall."""

    takes_weights = True
    kind, registered, layer, size = "vgg16", "vgg16", "fc2_relu", 224
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"
    activation_bytes = 24_000_000


@FEATURES.add("dinov2")
class DINOv2(FidelityFeatures):
    """A self-supervised network, DINOv2 ViT-L/14."""

    kind, registered, layer, size = "dinov2", "dinov2-vit-l-14", "dinov2", 224
    url = ""
    activation_bytes = 8_000_000


def torch_fidelity_package() -> Any:
    """Return the package torch_fidelity.

    Raises:
        UserError: naming the extra, if it is not installed.
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not match torch
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).splitlines()[0]})"
        raise UserError(
            f"these features and scores need torch-fidelity{reason}: pip install 'multistage-diffusion[eval]'"
        ) from None
    return torch_fidelity


def _downloaded(kind: str, url: str) -> Path:
    """Return the file of published weights; download it at the first use."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rpartition("/")[2]
    if not file.exists():
        make_folder(folder)
        try:
            prefix = file.stem.rpartition("-")[2]  # published names end in a prefix of the SHA-256
            torch.hub.download_url_to_file(url, str(file), hash_prefix=prefix, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"features={kind!r}: its weights cannot be downloaded ({reason}); download {url} on another machine and "
                f"give the file with --inception-weights (weights= in Python), or put it into {folder}"
            ) from None
    return file


def _check_weights(file: Path) -> None:
    """Raise UserError unless the file holds a state dict of tensors only."""
    if file.exists():
        require_file(file)
    try:
        require_intact(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; name a file of weights") from None
    except UserError:
        raise
    except Exception:  # a damaged or hostile file can raise any exception type
        raise UserError(
            f"{file}: not a file of weights alone (torch.save of a state_dict); download it again"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: does not hold a state_dict; download it again")


def why_unavailable() -> str:
    """Return why torch-fidelity cannot be imported; empty if it can."""
    try:
        torch_fidelity_package()
    except UserError as error:
        return str(error)
    return ""
