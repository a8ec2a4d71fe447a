import io

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import decoding
from multistage_diffusion.data.content import position
from multistage_diffusion.data.decoding import Decoder, coloured, load, planes
from multistage_diffusion.data.image_files import ImageFiles
from multistage_diffusion.data.options import Options
from multistage_diffusion.data.processes import available


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
    assert load(png(pixels(0, 6, 4, 3)), Options(), positions=False).position == 0.0


def test_an_image_that_cannot_reach_the_size_keeps_its_own():
    assert load(png(pixels(0, 6, 4)), Options(size=(5, 5), fit="pad")).pixels.shape == (1, 6, 4)


def files(count, bad=()):
    contents = [
        b"bad" if i in bad else png(pixels(i, 3 + i % 2, 5, 3) if i % 3 else pixels(i, 4, 5)) for i in range(count)
    ]
    return ImageFiles("set", [f"file {i}" for i in range(count)], contents.__getitem__)


@pytest.mark.skipif(not available(), reason="this system does not fork")
def test_many_files_are_decoded_in_processes_to_the_same(monkeypatch):
    numbers = [7, 2, 11, 5, 7]
    few = Decoder(files(12, bad=(5,)), Options()).load(numbers)
    monkeypatch.setattr(decoding, "MANY", 12)
    decoder = Decoder(files(12, bad=(5,)), Options())
    many = decoder.load(numbers)
    assert decoder._processes is not None
    for own, other in zip(few, many, strict=True):
        if isinstance(own, str):
            assert own == other
            continue
        np.testing.assert_array_equal(own.pixels, other.pixels)
        assert (own.found, own.several, own.brightest, own.position) == (
            other.found,
            other.several,
            other.brightest,
            other.position,
        )
    assert isinstance(many[3], str)


@pytest.mark.parametrize("many", [1, 1000])
def test_memory_that_runs_out_is_told(monkeypatch, many):
    def full(_):
        raise MemoryError

    monkeypatch.setattr(decoding, "MANY", many)
    with pytest.raises(MemoryError):
        Decoder(ImageFiles("set", ["a"], full), Options()).load([0])
