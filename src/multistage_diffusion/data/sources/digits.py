"""The digits of scikit-learn: 1797 scans of 8x8 pixels."""

from __future__ import annotations

import numpy as np

from ...errors import UserError
from ..dataset import ImageData
from ..options import Options
from . import SOURCES, Named


def open_digits(rest: str, options: Options) -> ImageData:
    """Open the digits, scaled from 0..16 to 0..255.

    Raises:
        UserError: if scikit-learn is missing, or something follows the name.
    """
    if rest:
        raise UserError(
            f"data.source='digits:{rest}': digits is the whole name; write digits, or ./digits:... for a path"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source='digits' needs scikit-learn: pip install 'multistage-diffusion[demo]'") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return ImageData(images[:, None], bunch.target.astype(np.int64), "digits", tuple("0123456789"))


SOURCES.add("digits")(Named("digits", open_digits))
