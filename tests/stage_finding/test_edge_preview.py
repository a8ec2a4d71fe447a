"""The strip shows images and the optimal denoiser's answers to them, in their places."""

import base64

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.errors import UserError
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding.edge_preview import SIDE, decode_png, edge_strip
from multistage_diffusion.stage_finding.posterior import TiledImages

IMAGES = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:200, None]
CUTS = (0.2, 0.6)


def tiles(images: np.ndarray, cuts: tuple[float, ...], data_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """Return the strip's pictures, (rows, columns, height, width[, 3]), without the gaps."""
    shape = images.shape[1:]
    sheet = decode_png(edge_strip(TiledImages(images, data_range), shape, cuts, VP(), 3))
    columns = 2 + 3 * len(cuts)
    height, width = sheet.shape[0] // 3, sheet.shape[1] // columns
    cut = sheet.reshape(3, height, columns, width, *sheet.shape[2:]).swapaxes(1, 2)
    return cut[:, :, 2:-2, 2:-2]


def test_clean_images_stand_first_and_the_mean_image_last() -> None:
    found = tiles(IMAGES, CUTS)
    assert found.shape == (3, 8, 8, 8)
    known = {image.tobytes() for image in IMAGES[:, 0]}
    assert all(row[0].tobytes() in known for row in found)
    assert np.abs(found[:, -1] - IMAGES[:, 0].mean(0)).max() <= 1


def test_answers_are_those_of_the_optimal_denoiser_before_and_after_an_edge() -> None:
    """The noise is that of the noisy picture, where that is not clipped; at low noise it hardly is."""
    cut = 0.06
    found = tiles(IMAGES // 2 + 64, (cut,)).astype(np.float64) / 127.5 - 1
    data = torch.from_numpy((IMAGES // 2 + 64) / 127.5 - 1)
    noise = (found[:, 1] - found[:, 0]) / float(VP().sigma(torch.tensor(cut)))
    optimal = OptimalDenoiser(data, dtype=torch.float64)
    for column, t in ((2, VP().t_min if cut < SIDE else cut - SIDE), (3, cut + SIDE)):
        sigma = VP().sigma(torch.full((3,), t, dtype=torch.float64))
        x = torch.from_numpy(found[:, 0]) + sigma[:, None, None] * torch.from_numpy(noise)
        answer = optimal(x[:, None], sigma)[:, 0].numpy()
        assert np.abs(answer - found[:, column]).max() < 0.15
    assert np.abs(found[:, 2] - found[:, 0]).max() < 0.02  # hardly any noise: the image itself


def test_colour_and_large_images_are_shown_small() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 130, 40), dtype=np.uint8)
    found = tiles(images, (0.5,))
    assert found.shape == (3, 5, 44, 14, 3)  # every third pixel


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", b"", b"GIF89a"]
)
def test_a_strip_that_is_no_png_is_refused_and_starts_no_other_program(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    with pytest.raises(UserError, match=r"^strip: is not a readable PNG image \(.*\); find the stages again"):
        decode_png(base64.b64encode(content).decode())
    with pytest.raises(UserError, match=r"^strip: is not in base64; find the stages again"):
        decode_png("a")
