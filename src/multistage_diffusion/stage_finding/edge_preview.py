"""A small picture of a denoiser's outputs for some images on both sides of every edge."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .. import rng
from ..contracts import Denoiser
from ..data.opening import load_png
from ..errors import UserError
from ..schedules.vp import VP
from .posterior import TiledImages, posterior_means

SIDE = 0.05  # distance from an edge, in t
ROWS, GAP = 3, 2
_WIDEST = 1 << 14  # maximum side of a strip, in pixels
_LARGEST = 64  # maximum side of a displayed image, in pixels


def edge_strip(
    data: TiledImages,
    shape: tuple[int, int, int],
    cuts: tuple[float, ...],
    measure: VP,
    seed: int,
    denoiser: Denoiser | None = None,
) -> str:
    """Return a base64 PNG with one row per image.

    Columns: the clean image; for every edge the noisy image and E[y | x] before and after the edge; the mean image.

    Args:
        data: the images.
        shape: (C, H, W) of an image, C = 1 or 3.
        cuts: edges in the time of `measure`.
        measure: the kernel of the edges.
        seed: determines images and noise.
        denoiser: gives E[y | x]; None: the optimal denoiser of the images.
    """
    rows = torch.arange(ROWS, device=data.device)
    own = (rng.uniform((seed, "strip-y"), rows, 1)[:, 0] * len(data)).long()
    noise = rng.normal((seed, "strip-noise"), rows, (data.dim,))
    clean = data.rows(own)
    columns = [clean]
    for cut in cuts:
        times = torch.tensor([cut - SIDE, cut + SIDE], dtype=torch.float64, device=data.device)
        sigmas = measure.sigma(times.clamp(measure.t_min, measure.t_max))
        if denoiser is None:
            means = posterior_means(data, own, noise, sigmas[:, None].expand(-1, ROWS)) + clean
        else:
            image = clean + data.mean_image
            means = torch.stack([denoiser(image + float(s) * noise, float(s)) for s in sigmas]) - data.mean_image
        sigma = float(measure.sigma(torch.tensor(cut, dtype=torch.float64)))
        columns += [torch.add(clean, noise, alpha=sigma), *means]
    columns.append(torch.zeros_like(clean))
    tiles = torch.stack(columns, dim=1) + data.mean_image  # (rows, columns, D)
    low, high = data.data_range
    pixels = tiles.sub(low).mul(255 / (high - low)).round().clamp(0, 255).to(torch.uint8).cpu()
    return _png(pixels.reshape(ROWS, len(columns), *shape))


def _png(tiles: Tensor) -> str:
    """Return tiles (R, K, C, H, W) as one base64 PNG with white gaps."""
    rows, columns, channels, height, width = tiles.shape
    step = -(-max(height, width) // _LARGEST)
    tiles = tiles[..., ::step, ::step]
    tiles = torch.nn.functional.pad(tiles, (GAP, GAP, GAP, GAP), value=255)
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * tiles.shape[3], columns * tiles.shape[4], channels).numpy()
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_png(text: str) -> npt.NDArray[np.uint8]:
    """Return the pixels of a base64 PNG, (H, W) or (H, W, 3).

    Raises:
        UserError: if the text is no base64 PNG, or the picture is larger than this package creates.
    """
    mend = "find the stages again with msdiff stages"
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError(f"strip: is not in base64; {mend}") from None
    image = load_png(content, "strip", mend)
    if max(image.size) > _WIDEST:
        raise UserError(f"strip: a picture of {image.width} x {image.height} pixels was not made here; {mend}")
    pixels: npt.NDArray[np.uint8] = np.asarray(image)
    return pixels
