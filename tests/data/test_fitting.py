import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data.fitting import fit_image, fit_rows, padded_content, reachable
from multistage_diffusion.data.rows import ArrayRows
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError


def pixels(*shape):
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (6, 7), (2, 7), (6, 2)])
@pytest.mark.parametrize("colour", [False, True])
def test_padding_centres_the_untouched_image_in_black(shape, colour):
    image = pixels(*shape, 3) if colour else pixels(*shape)
    padded = np.asarray(fit_image(Image.fromarray(image), (6, 7), "pad"))
    top, left = (6 - shape[0]) // 2, (7 - shape[1]) // 2
    np.testing.assert_array_equal(padded[top : top + shape[0], left : left + shape[1]], image)
    assert padded.astype(int).sum() == image.astype(int).sum()  # black everywhere else


def test_arrays_are_padded_alike():
    images = pixels(5, 3, 3, 4)
    padded = fit_rows(ArrayRows(images), (6, 7), "pad", "x")
    assert padded.shape == (5, 3, 6, 7)
    np.testing.assert_array_equal(padded[:, :, 1:4, 1:5], images)
    assert padded.astype(int).sum() == images.astype(int).sum()


@pytest.mark.parametrize("shape", [(7, 7), (6, 8), (9, 2)])
def test_larger_images_are_refused_never_scaled(shape):
    message = (
        rf"x: its images: height x width {shape[0]}x{shape[1]} is larger than data\.size=6x7, and .*'pad' never scales"
    )
    with pytest.raises(ValueError, match=message):
        fit_rows(ArrayRows(pixels(2, 1, *shape)), (6, 7), "pad", "x")


@pytest.mark.parametrize(
    ("found", "reached"),
    [((6, 7), ("exact", "crop", "resize", "pad")), ((5, 7), ("crop", "resize", "pad")), ((7, 6), ("crop", "resize"))],
)
def test_which_fit_reaches_a_size(found, reached):
    assert tuple(fit for fit in ("exact", "crop", "resize", "pad") if reachable(found, (6, 7), fit)) == reached


def test_content_is_known_where_all_had_one_size_and_were_padded():
    assert padded_content([(3, 4)], (6, 7), "pad") == (3, 4)
    assert padded_content([(3, 4), (3, 3)], (6, 7), "pad") is None
    assert padded_content([(6, 7)], (6, 7), "pad") is None
    assert padded_content([(3, 4)], (6, 7), "crop") is None
    assert padded_content([(3, 4)], None, "exact") is None


def test_arrays_opened_with_padding_tell_their_content(tmp_path):
    np.save(tmp_path / "a.npy", pixels(20, 3, 4))
    data = open_data(tmp_path / "a.npy", size=(6, 7), fit="pad")
    assert (data.shape, data.content) == ((1, 6, 7), (3, 4))
    assert open_data(tmp_path / "a.npy").content is None
    assert open_data(tmp_path / "a.npy", size=(3, 4), fit="pad").content is None


@pytest.mark.parametrize("fit", ["exact", "pad"])
def test_a_wrong_size_is_an_error_that_a_user_can_mend(fit):
    with pytest.raises(UserError, match=r"set: its images: height x width 4x5(, not| is larger)"):
        fit_rows(ArrayRows(np.zeros((1, 1, 4, 5), np.uint8)), (2, 2), fit, "set")
