import io

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data.content import position
from multistage_diffusion.data.decoding import coloured, load, planes
from multistage_diffusion.data.options import Options


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_planes_are_the_channels_first(shape):
    array = pixels(0, *shape)
    found = planes(Image.fromarray(array))
    np.testing.assert_array_equal(found, array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    assert found.flags.c_contiguous


def test_grey_is_repeated_and_colour_stays():
    grey, colour = pixels(0, 1, 2, 3), pixels(1, 3, 2, 3)
    np.testing.assert_array_equal(coloured(grey, 3), np.concatenate([grey] * 3))
    assert coloured(grey, 1) is grey
    assert coloured(colour, 3) is colour


def test_an_image_comes_at_the_size_with_what_is_known_of_its_file():
    found = load(png(pixels(0, 6, 4, 3)), Options(size=(2, 2), fit="crop"))
    assert found.pixels.shape == (3, 2, 2)
    assert (found.found, found.several, found.brightest) == ((6, 4), False, None)
    assert found.position == position(found.pixels)


def test_an_image_that_cannot_reach_the_size_keeps_its_own():
    assert load(png(pixels(0, 6, 4)), Options(size=(5, 5), fit="pad")).pixels.shape == (1, 6, 4)
