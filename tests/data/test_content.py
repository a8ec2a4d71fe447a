import hashlib

import numpy as np

from multistage_diffusion.data import ImageData
from multistage_diffusion.data.content import Content, content_of, position


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_the_content_of_parts_is_that_of_the_whole():
    images, labels = pixels(10, 3, 4, 5), np.arange(10)
    found = content_of([images[:3], images[3:4], images[4:]], 10, (3, 4, 5), labels)
    data = ImageData(images, labels, "set")
    assert found.fingerprint == data.fingerprint
    assert found.positions.tolist() == data._positions.tolist()
    # as recorded in runs
    text = b"(10, 3, 4, 5)" + images.tobytes() + labels.astype("<i8").tobytes()
    assert found.fingerprint == hashlib.sha256(text).hexdigest()


def test_a_position_depends_on_pixels_and_shape():
    image = pixels(3, 4, 5)
    word = int.from_bytes(hashlib.blake2b(b"(3, 4, 5)" + image.tobytes(), digest_size=8).digest(), "big")
    assert position(image) == (word >> 11) / 2**53
    assert position(image.reshape(5, 4, 3)) != position(image)


def test_known_content_is_not_computed_again():
    known = Content("abc", np.array([0.05, 0.5, 0.01]))
    data = ImageData(pixels(3, 1, 2, 2), None, "set", known=known)
    assert data.fingerprint == "abc"
    training, held_out = data.split(0.1)
    assert (training.storage.index.tolist(), held_out.storage.index.tolist()) == ([1], [0, 2])
    assert training.fingerprint != "abc"
