import io
import warnings

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import ImageData, rows
from multistage_diffusion.data.image_files import ImageFiles
from multistage_diffusion.data.index import make_index
from multistage_diffusion.data.options import Options
from multistage_diffusion.data.sources import open_data


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def files_of(arrays):
    files = [array if isinstance(array, bytes) else png(array) for array in arrays]
    return ImageFiles("set", [f"file {i}" for i in range(len(files))], files.__getitem__)


class Run:
    """An index with its warnings given, and the images."""

    def __init__(self, arrays, labels=None, **options):
        self.index, self.images = make_index(files_of(arrays), labels, Options(**options))
        self.index.warn()
        self.kept, self.content, self.skipped = self.index.kept, self.index.padded, self.index.skipped


run = Run


def test_bad_files_are_left_out_by_number():
    with pytest.warns(UserWarning, match=r"set: skipped 2 of 4 images: file 0 \("):
        decoded = run([b"", pixels(1, 2, 3), b"x", pixels(3, 2, 3)], skip_bad=True)
    assert decoded.kept.tolist() == [1, 3]
    np.testing.assert_array_equal(decoded.images[:, 0], [pixels(1, 2, 3), pixels(3, 2, 3)])


def test_of_many_bad_files_the_first_are_named():
    with pytest.warns(
        UserWarning, match=r"skipped 7 of 8 images: file 0 \(.*\), file 1 .* file 4 \([^)]*\) and 2 more$"
    ):
        run([b""] * 7 + [pixels(1, 2, 3)], skip_bad=True)


def test_only_images_that_take_little_memory_are_kept(monkeypatch):
    monkeypatch.setattr(rows, "IN_MEMORY", 2 * 2 * 5)
    assert len(run([pixels(i, 2, 5) for i in range(2)]).images) == 2
    assert run([pixels(i, 2, 5) for i in range(3)]).images is None
    assert run([pixels(0, 2, 5), pixels(1, 2, 5, 3)]).images is None  # colour takes three times as much


def test_only_a_quarter_of_the_free_memory_is_used(monkeypatch):
    monkeypatch.setattr(rows, "available_memory", lambda: 4 * 3 * 2 * 5 - 1)
    assert run([pixels(i, 2, 5) for i in range(3)]).images is None
    assert len(run([pixels(i, 2, 5) for i in range(2)]).images) == 2


GREY, COLOUR = [pixels(i, 2, 3) for i in range(3)], [pixels(i, 2, 3, 3) for i in range(3, 6)]
SETS = {
    "grey": GREY,
    "colour": COLOUR,
    "grey, then colour": [*GREY, *COLOUR],
    "colour, then grey": [*COLOUR, *GREY],
    "one is bad": [*GREY, b"x", COLOUR[0]],
    "one of colour is bad": [COLOUR[0], b"x", COLOUR[1]],
    "the first is bad": [b"x", *COLOUR],
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("ignore:set. skipped")
def test_the_content_is_that_of_the_images_as_an_array(name, in_memory, monkeypatch):
    monkeypatch.setattr(rows, "IN_MEMORY", 1 << 20 if in_memory else 0)
    labels = np.arange(len(SETS[name])) % 2
    found = run(SETS[name], labels, skip_bad=True)
    good = [array for array in SETS[name] if not isinstance(array, bytes)]
    channels = max(array.ndim for array in good) * 2 - 3
    expected = np.stack([np.repeat(a[None], channels, 0) if a.ndim == 2 else a.transpose(2, 0, 1) for a in good])
    whole = ImageData(expected, labels[found.kept], "set")
    assert found.index.shape == whole.shape
    assert found.index.content.fingerprint == whole.fingerprint
    assert found.index.content.positions.tolist() == whole._positions.tolist()
    assert (found.images is not None) == in_memory
    if in_memory:
        np.testing.assert_array_equal(found.images, expected)


def test_progress_is_told_sparsely_and_at_the_end():
    told = []
    run([pixels(0, 2, 3)] * 50, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (50, 50)
    assert len(told) < 50
    assert told == sorted(set(told))


def test_one_padded_size_is_the_content():
    decoded = run([pixels(i, 2, 3) for i in range(3)], size=(4, 6), fit="pad")
    assert decoded.content == (2, 3)
    np.testing.assert_array_equal(decoded.images[:, 0, 1:3, 1:4], [pixels(i, 2, 3) for i in range(3)])
    assert decoded.images.shape == (3, 1, 4, 6)


def test_several_padded_sizes_have_no_common_content():
    decoded = run([pixels(0, 2, 3), pixels(1, 4, 2)], size=(4, 6), fit="pad")
    assert decoded.content is None
    np.testing.assert_array_equal(decoded.images[1, 0, :, 2:4], pixels(1, 4, 2))


def test_an_image_too_large_to_pad_is_refused_even_when_bad_ones_are_skipped():
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"set: file 1: height x width 5x2 is larger than"):
        run([pixels(0, 2, 3), pixels(1, 5, 2)], size=(4, 6), fit="pad", skip_bad=True)


def test_unequal_sizes_name_every_mend():
    with pytest.raises(
        ValueError, match=r"file 0 is 2x3 but file 1 is 4x2 .*--fit crop \(or --fit resize, or --fit pad\)"
    ):
        run([pixels(0, 2, 3), pixels(1, 4, 2)])


def test_resized_and_cropped_images_may_have_had_any_size():
    for fit in ("crop", "resize"):
        decoded = run([pixels(0, 2, 3), pixels(1, 4, 2)], size=(3, 3), fit=fit)
        assert (decoded.images.shape, decoded.content) == ((2, 1, 3, 3), None)


def test_folders_tell_their_content(tmp_path):
    for i in range(3):
        Image.fromarray(pixels(i, 2, 3)).save(tmp_path / f"{i}.png")
    assert open_data(tmp_path, size=(4, 4), fit="pad").content == (2, 3)
    assert open_data(tmp_path).content is None


def test_values_of_fewer_bits_in_sixteen_are_warned_about():
    """A 12-bit scan stored in 16-bit files ends at 15 of 255."""
    twelve = (pixels(0, 4, 5).astype(np.uint16) << 4) + 15
    twelve[0, 0] = 4095
    with pytest.warns(
        UserWarning,
        match=r"set: no value of its 2 16-bit images is above 4095, which is 15 of 255 in 8 bits; .* by 16$",
    ):
        run([twelve, twelve // 2])
    with pytest.warns(UserWarning, match=r"if they hold 14-bit data, multiply them by 4$"):
        run([twelve * 4])


@pytest.mark.parametrize("largest", [16384, 65535])
def test_one_bright_image_shows_that_the_bits_are_used(largest):
    dark = np.full((4, 5), 100, np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([dark, np.full((4, 5), largest, np.uint16)])
        run([np.zeros((4, 5), np.uint8)])


def test_animations_are_counted_in_one_warning():
    frames = [Image.fromarray(pixels(i, 2, 3)) for i in range(2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "tiff", save_all=True, append_images=frames[1:])
    with pytest.warns(
        UserWarning, match=r"set: several images \(frames or pages\) in 2 files;.*; the first such file is file 1"
    ):
        decoded = run([pixels(5, 2, 3), buffer.getvalue(), buffer.getvalue()])
    np.testing.assert_array_equal(decoded.images[1, 0], pixels(0, 2, 3))


def test_files_left_out_are_counted():
    with pytest.warns(UserWarning, match="skipped 2"):
        assert run([b"", pixels(1, 2, 3), b"x"], skip_bad=True).skipped == {"unreadable": 2}
    assert run([pixels(1, 2, 3)]).skipped == {}


def test_too_many_pixels_are_a_matter_of_the_option():
    with pytest.raises(ValueError, match=r"file 0 cannot be read \(it has 6 pixels.*--max-pixels 6\)"):
        run([pixels(0, 2, 3)], max_pixels=5)
    assert run([pixels(0, 2, 3)], max_pixels=6).images.shape == (1, 1, 2, 3)
