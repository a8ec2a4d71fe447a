from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from multistage_diffusion.training import augment as module
from multistage_diffusion.training.augment import LABELS, Transformations, augment, draw, transform

F64 = torch.float64
KEY = (0, "augment", 5)
NAMES = ("flip_x", "flip_y", "scale", "rotation", "stretch", "direction", "shift_x", "shift_y")


def known(count: int = 1, **values: float) -> Transformations:
    return Transformations(**{n: torch.full((count,), float(values.get(n, 0.0)), dtype=F64) for n in NAMES})


def waves(x, y):
    """An image as a function of pixels right and down of the centre, too slow for the filters to change much."""
    return 0.5 * torch.sin(0.35 * x + 0.2 * y + 0.4) + 0.3 * torch.cos(0.15 * x - 0.3 * y)


def places(height, width):
    y, x = torch.meshgrid(torch.arange(height, dtype=F64), torch.arange(width, dtype=F64), indexing="ij")
    return x - (width - 1) / 2, y - (height - 1) / 2


def forward(done: Transformations, height: int, width: int):
    """Table 6 of Karras et al. as a product of 3 x 3 matrices, (x, y) right and down of the centre."""
    v = {n: float(getattr(done, n)) for n in NAMES}

    def scaled(x, y):
        return torch.diag(torch.tensor([x, y, 1.0], dtype=F64))

    def rotated(a):  # as printed there; clockwise as seen, because y points down
        c, s = math.cos(a), math.sin(a)
        return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=F64)

    shifted = torch.eye(3, dtype=F64)
    shifted[0, 2], shifted[1, 2] = v["shift_x"] / 8 * width, v["shift_y"] / 8 * height
    stretched = scaled(2 ** (0.2 * v["stretch"]), 2 ** (-0.2 * v["stretch"]))
    along = rotated(-v["direction"]) @ stretched @ rotated(v["direction"])
    whole = 2 ** (0.2 * v["scale"])
    mirrored = scaled(1 - 2 * v["flip_x"], 1 - 2 * v["flip_y"])
    return shifted @ along @ rotated(-v["rotation"]) @ scaled(whole, whole) @ mirrored


# -- known transformations --------------------------------------------------------------------------------------------


def test_flips_are_exact():
    images = torch.rand(3, 2, 5, 7)
    assert torch.equal(transform(images, known(3, flip_x=1)), images.flip(-1))
    assert torch.equal(transform(images, known(3, flip_y=1)), images.flip(-2))
    assert torch.equal(transform(images, known(3)), images)


@pytest.mark.parametrize("quarters", [1, -1, 2])
def test_rotation_by_quarter_turns_is_counter_clockwise_rot90(quarters):
    images = waves(*places(16, 16))[None, None]
    turned = transform(images, known(rotation=quarters * math.pi / 2))
    torch.testing.assert_close(turned, torch.rot90(images, quarters, (2, 3)), rtol=0, atol=0.01)


def test_whole_shifts_go_right_and_down_and_mirror_the_border():
    images = torch.rand(1, 3, 16, 24, dtype=F64)
    images = F.avg_pool2d(images, 3, 1, 1)  # without the highest frequencies
    right = transform(images, known(shift_x=2 * 8 / 24))
    torch.testing.assert_close(right, F.pad(images, (2, 0, 0, 0), "reflect")[..., :24], rtol=0, atol=0.02)
    down = transform(images, known(shift_y=3 * 8 / 16))
    torch.testing.assert_close(down, F.pad(images, (0, 0, 3, 0), "reflect")[..., :16, :], rtol=0, atol=0.02)


def test_scale_5_doubles_about_the_centre():
    x, y = places(20, 14)
    doubled = transform(waves(x, y)[None, None], known(scale=5))
    torch.testing.assert_close(doubled[0, 0], waves(x / 2, y / 2), rtol=0, atol=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_any_transformation_moves_a_smooth_image_as_table_6_says(seed):
    v = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=F64).tolist()
    done = known(
        flip_x=seed % 2,
        flip_y=seed // 2 % 2,
        scale=v[0],
        rotation=2 * v[1],
        stretch=v[2],
        direction=2 * v[3],
        shift_x=0.5 * v[4],
        shift_y=0.3 * v[0] - 0.2,
    )
    height, width = 24, 32
    x, y = places(height, width)
    matrix = torch.linalg.inv(forward(done, height, width))
    old_x, old_y = (matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] for i in (0, 1))
    inside = (old_x.abs() < width / 2 - 3) & (old_y.abs() < height / 2 - 3)
    assert float(inside.double().mean()) > 0.2
    found = transform(waves(x, y)[None, None], done)[0, 0]
    torch.testing.assert_close(found[inside], waves(old_x, old_y)[inside], rtol=0, atol=0.02)


def mirrored(place: float, last: int) -> float:
    """Reflect a place into [0, last], as often as it takes."""
    while not 0 <= place <= last:
        place = -place if place < 0 else 2 * last - place
    return place


def test_every_pixel_equals_the_definition_written_out():
    """Low-pass on the twice finer lattice, bilinear between its points, low-pass again; mirrored at the borders."""
    height, width = 4, 5
    image = torch.rand(height, width, dtype=F64, generator=torch.Generator().manual_seed(0))
    done = known(scale=-1.5, rotation=0.7, stretch=1.2, direction=-0.5, shift_x=1.1, shift_y=-2.0)
    matrix = torch.linalg.inv(forward(done, height, width))
    taps, reach = module._TAPS, module._REACH

    def near(place):  # pixels and weights of a finer point, place in half-pixels
        return [(int((place + k) / 2), taps[k + reach]) for k in range(-reach, reach + 1) if (place + k) % 2 == 0]

    def finer(i, j):
        rows, columns = near(i), near(j)
        return sum(
            u * v * float(image[int(mirrored(r, height - 1)), int(mirrored(c, width - 1))])
            for r, u in rows
            for c, v in columns
        )

    lattice = [[finer(i, j) for j in range(2 * width - 1)] for i in range(2 * height - 1)]

    def between(i, j):
        i, j = mirrored(i, 2 * height - 2), mirrored(j, 2 * width - 2)
        top, left = min(int(i), 2 * height - 3), min(int(j), 2 * width - 3)
        a, b = i - top, j - left
        upper = (1 - b) * lattice[top][left] + b * lattice[top][left + 1]
        return (1 - a) * upper + a * ((1 - b) * lattice[top + 1][left] + b * lattice[top + 1][left + 1])

    expected = torch.zeros(height, width, dtype=F64)
    for i in range(height):
        for j in range(width):
            for k in range(-reach, reach + 1):
                for m in range(-reach, reach + 1):
                    new = [j + m / 2 - (width - 1) / 2, i + k / 2 - (height - 1) / 2, 1]
                    x, y = (matrix[:2] @ torch.tensor(new, dtype=F64)).tolist()
                    old = between(2 * (y + (height - 1) / 2), 2 * (x + (width - 1) / 2))
                    expected[i, j] += 0.25 * taps[k + reach] * taps[m + reach] * old
    found = transform(image[None, None], done)[0, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_constant_stays_and_noise_keeps_its_detail():
    done = draw(1.0, KEY, torch.arange(50))
    flat = torch.full((50, 1, 9, 12), -0.7)
    torch.testing.assert_close(transform(flat, done), flat, rtol=0, atol=1e-5)
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    unmoved = module._warp(noise, known(4))
    assert float((unmoved - noise).std()) < 0.02  # every frequency within 2 %, as the filter's docstring says


def test_a_single_row_of_pixels_is_like_the_middle_of_many_equal_ones():
    done = dataclasses.replace(draw(1.0, KEY, torch.arange(20)), shift_y=torch.zeros(20, dtype=F64))
    row = torch.rand(20, 1, 1, 6)
    tall = transform(row.expand(20, 1, 5, 6), done)
    torch.testing.assert_close(transform(row, done), tall[:, :, 2:3], rtol=0, atol=1e-5)
    dot = torch.rand(20, 1, 1, 1)
    torch.testing.assert_close(transform(dot, draw(1.0, KEY, torch.arange(20))), dot, rtol=0, atol=1e-5)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_table_6_in_order():
    done = known(flip_x=1, flip_y=1, scale=0.3, rotation=2.0, stretch=-1.5, direction=0.4, shift_x=0.7, shift_y=-0.2)
    expected = [
        1.0,
        1.0,
        0.3,
        math.cos(2.0) - 1.0,
        math.sin(2.0),
        -1.5 * math.cos(0.4),
        -1.5 * math.sin(0.4),
        0.7,
        -0.2,
    ]
    assert done.labels.shape == (1, LABELS)
    assert done.labels.dtype == torch.float32
    assert done.labels[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(known(2).labels, torch.zeros(2, LABELS))


@pytest.mark.parametrize("p", [0.0, 0.12, 1.0])
def test_each_transformation_comes_with_its_probability(p):
    count = 20_000
    done = draw(p, KEY, torch.arange(count))
    rates = {n: float(getattr(done, n).ne(0).double().mean()) for n in NAMES}
    assert rates.pop("flip_x") == pytest.approx(0.5, abs=0.015)  # whatever p
    assert rates.pop("flip_y") == pytest.approx(p / 2, abs=0.015)
    assert all(rate == pytest.approx(p, abs=0.015) for rate in rates.values())
    for pair in (("stretch", "direction"), ("shift_x", "shift_y")):  # on together
        assert torch.equal(*(getattr(done, n).ne(0) for n in pair))
    both = (done.scale.ne(0) & done.rotation.ne(0)).double().mean()
    assert float(both) == pytest.approx(p**2, abs=0.015)  # others on their own


def test_parameters_have_their_distributions():
    done = draw(1.0, KEY, torch.arange(40_000))
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        values = getattr(done, name)
        assert float(values.mean()) == pytest.approx(0, abs=0.02)
        assert float(values.std()) == pytest.approx(1, abs=0.02)
    for name in ("rotation", "direction"):
        values = getattr(done, name).sort().values / math.pi
        torch.testing.assert_close(values, torch.linspace(-1, 1, 40_000, dtype=F64), rtol=0, atol=0.02)
    together = torch.corrcoef(torch.stack([getattr(done, n) for n in NAMES]))
    assert float((together - torch.eye(8, dtype=F64)).abs().max()) < 0.025


# -- whole batches ----------------------------------------------------------------------------------------------------


def test_rows_that_are_not_resampled_are_exact():
    images = torch.rand(300, 1, 6, 8) * 2 - 1
    moved, labels = augment(images, 0.1, KEY, torch.arange(300))
    assert moved.dtype == torch.float32
    still = labels[:, 2:].eq(0).all(1)
    assert 100 < int(still.sum()) < 290
    expected = torch.where(labels[:, 0, None, None, None] == 1, images.flip(-1), images)
    expected = torch.where(labels[:, 1, None, None, None] == 1, expected.flip(-2), expected)
    assert torch.equal(moved[still], expected[still])
    assert bool((moved[~still] != expected[~still]).flatten(1).any(1).all())
    untouched = labels.eq(0).all(1)
    assert bool(untouched.any())
    assert torch.equal(moved[untouched], images[untouched])


def test_without_flips_and_probability_nothing_happens():
    images = torch.rand(50, 1, 6, 8)
    moved, labels = augment(images, 0.0, KEY, torch.arange(50), flip=False)
    assert torch.equal(moved, images)
    assert torch.equal(labels, torch.zeros(50, LABELS))
    assert not bool(augment(images, 0.9, KEY, torch.arange(50), flip=False)[1][:, 0].any())


def test_a_row_depends_on_its_key_and_number_alone():
    images = torch.rand(30, 3, 8, 8)
    rows = torch.arange(30) + (2 << 32)
    moved, labels = augment(images, 0.5, KEY, rows)
    for part in (slice(0, 1), slice(7, 20), slice(20, 30)):
        alone, told = augment(images[part], 0.5, KEY, rows[part])
        assert torch.equal(alone, moved[part])
        assert torch.equal(told, labels[part])
    for other in (augment(images, 1.0, (0, "augment", 6), rows), augment(images, 1.0, KEY, rows + 30)):
        assert not torch.isin(other[1][:, 2:], augment(images, 1.0, KEY, rows)[1][:, 2:]).any()
