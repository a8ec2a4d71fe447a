"""Published feature networks and scores, computed by torch-fidelity (extra `eval`).

torch-fidelity unpickles weight files without restrictions. Each file is therefore first checked here with
torch.load(weights_only=True) before it is passed on. DINOv2's weights are loaded by torch-fidelity itself, unchecked.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import make_folder
from ..reading import require_file
from .image_check import check_images

INCEPTION_SPLITS = 10  # parts of the Inception score, as published
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as published


@dataclass(frozen=True)
class Network:
    """One of torch-fidelity's feature extractors.

    Attributes:
        registered: its name in torch-fidelity.
        layer: layer whose output is the feature.
        size: height and width to which images are scaled.
        url: address of its weights; empty if only torch-fidelity can download them.
    """

    registered: str
    layer: str
    size: int
    url: str


NETWORKS = {
    "inception": Network(
        "inception-v3-compat",
        "2048",
        299,
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "vgg16": Network("vgg16", "fc2_relu", 224, "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "dinov2": Network("dinov2-vit-l-14", "dinov2", 224, ""),
}


class FidelityFeatures:
    """A published feature network: Inception (of the FID), VGG16 (of precision and recall) or DINOv2.

    Args:
        kind: a key of NETWORKS.
        weights: a file of its weights; None: downloaded once into torch.hub's checkpoints folder (DINOv2: by
            torch-fidelity).

    Raises:
        UserError: if torch-fidelity is not installed, or the weights cannot be obtained or are of another network.
    """

    def __init__(self, kind: str, weights: Path | None = None) -> None:
        network = NETWORKS[kind]
        package = _package()
        if weights is not None and not network.url:
            raise UserError(
                f"features={kind!r} takes no file of weights: torch-fidelity loads it by itself; leave it out"
            )
        file = weights or (_downloaded(kind, network.url) if network.url else None)
        if file is not None:
            _check_weights(file)
        self._model = _built(kind, network, package, file)
        self._layer = network.layer
        version = getattr(package, "__version__", "")
        digest = "" if file is None else f", weights {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
        self.name = f"{network.registered} {network.layer} (torch-fidelity {version}{digest})"
        self.comparable_to = f"figures of {network.registered} features at equal counts, such as torch-fidelity's own"
        self.preprocessing = f"RGB (grey repeated), scaled to {network.size}x{network.size} as TensorFlow 1 does"
        if kind == "inception":
            self.logits = self._logits  # compare_samples computes a score only if there are logits

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to float32 features (N, D)."""
        check_images("images", images)
        self._model.to(images.device)
        with torch.no_grad():
            features: Tensor = self._model(images.expand(-1, 3, -1, -1).contiguous())[0]
        return features

    def _logits(self, features: Tensor) -> Tensor:
        """Map features (N, 2048) to the logits of the Inception score, without bias, float32 (N, 1008)."""
        logits: Tensor = features @ self._model.fc.weight.T.to(features.device)
        return logits


def _package() -> Any:
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
                f"features={kind!r}: its weights cannot be downloaded ({reason}); fetch {url} elsewhere and give the file "
                f"with --inception-weights (weights= in Python), or put it into {folder}"
            ) from None
    return file


def _check_weights(file: Path) -> None:
    """Raise UserError unless the file holds a state dict of tensors only."""
    if file.exists():
        require_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; name a file of weights") from None
    except Exception:  # a damaged or hostile file can raise any exception type
        raise UserError(f"{file}: not a file of weights alone (torch.save of a state_dict); fetch it again") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no state_dict; fetch it again")


def _built(kind: str, network: Network, package: Any, file: Path | None) -> Any:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    path = None if file is None else os.fspath(file)
    try:
        return FEATURE_EXTRACTORS_REGISTRY[network.registered](
            network.registered, [network.layer], feature_extractor_weights_path=path, verbose=False
        ).eval()
    except RuntimeError as error:  # from load_state_dict
        if file is None:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"features={kind!r}: its weights cannot be downloaded ({reason}); connect once, or use other features"
            ) from None
        raise UserError(
            f"{file}: not the weights of {network.registered}: {str(error).splitlines()[-1].strip()}"
        ) from None
    except OSError as error:
        raise UserError(f"features={kind!r}: cannot be downloaded ({error}); use other features") from None


def kernel_distance(samples: Tensor, real: Tensor, subset: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Return the kernel distance (KID, Binkowski et al. 2018): mean and standard deviation over 100 random subsets.

    Args:
        samples: features (N, D).
        real: features (M, D).
        subset: features per subset drawn from each set; at least 2, at most N and M.

    Raises:
        UserError: if torch-fidelity is not installed, or a set is smaller than the subset.
    """
    _package()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if not 2 <= subset <= min(len(samples), len(real)):
        raise UserError(
            f"kernel distance: subsets of {subset} need as many features; {len(samples)} of samples and {len(real)} of real "
            "images were given"
        )
    found = kid_features_to_metric(
        samples.cpu().double(), real.cpu().double(), kid_subsets=KID_SUBSETS, kid_subset_size=subset, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Return the Inception score (Salimans et al. 2016): mean and standard deviation over 10 parts.

    Args:
        logits: classifier logits (N, classes), N >= 10.

    Raises:
        UserError: if torch-fidelity is not installed, or there are fewer than 10 rows.
    """
    _package()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < INCEPTION_SPLITS:
        raise UserError(
            f"Inception score: {len(logits)} images cannot be divided into {INCEPTION_SPLITS} parts; draw more"
        )
    found = isc_features_to_metric(logits.cpu(), splits=INCEPTION_SPLITS)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def installed() -> bool:
    """Return whether torch-fidelity can be imported."""
    try:
        _package()
    except UserError:
        return False
    return True
