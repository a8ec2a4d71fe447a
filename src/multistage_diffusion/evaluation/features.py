"""Feature extractors by name: those of the registry, and a user's TorchScript files."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .registry import FEATURES, FeatureExtractor
from .script import ScriptFeatures
from .trust import is_script


def get_features(name: str, weights: Path | None = None, *, named: bool = True) -> FeatureExtractor:
    """Return a feature extractor.

    Args:
        name: a name in FEATURES, or a TorchScript file (.pt, .pth, .ts).
        weights: a file of its weights; None: its own default, for published networks a download at the first use.
        named: True if the user chose the name in this call; False if a configuration did. If False, a TorchScript file,
            which is code, is loaded only if the user has named it before on this machine (see `trust.agree`).

    Raises:
        UserError: for an unknown name (listing the known ones), or if weights or a required package are missing.
    """
    script = is_script(name)
    if not script and name not in FEATURES:
        raise UserError(
            f"features={name!r} is unknown; choose one of {', '.join(FEATURES)}, or a TorchScript file (.pt)"
        )
    if weights is not None and (script or not FEATURES[name].takes_weights):
        takers = " or ".join(known for known in FEATURES if FEATURES[known].takes_weights)
        raise UserError(f"features={name!r} takes no file of weights; {weights} is for {takers}; leave it out")
    if script:
        return ScriptFeatures(Path(name).expanduser(), named=named)
    return FEATURES[name].build(weights)


def features_help() -> str:
    """Return the choices of features as text for the help of a command."""
    names = [f"{name} (extra: {FEATURES[name].extra})" if FEATURES[name].extra else name for name in FEATURES]
    return f"{', '.join(names)}, or a TorchScript file, which is code: name only one that you trust."
