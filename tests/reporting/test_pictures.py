import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data.sources import open_data
from multistage_diffusion.reporting.pictures import data_uri, folder_of_images, grid, save_npz, save_png

RAMP = torch.arange(3 * 2 * 2, dtype=torch.uint8).view(3, 1, 2, 2)


def test_grid_is_pixel_exact() -> None:
    image = grid(RAMP, columns=2, scale=2, pad=1)
    g = 128
    expected = [
        [g] * 11,
        [g, 0, 0, 1, 1, g, 4, 4, 5, 5, g],
        [g, 0, 0, 1, 1, g, 4, 4, 5, 5, g],
        [g, 2, 2, 3, 3, g, 6, 6, 7, 7, g],
        [g, 2, 2, 3, 3, g, 6, 6, 7, 7, g],
        [g] * 11,
        [g, 8, 8, 9, 9, g, g, g, g, g, g],
        [g, 8, 8, 9, 9, g, g, g, g, g, g],
        [g, 10, 10, 11, 11, g, g, g, g, g, g],
        [g, 10, 10, 11, 11, g, g, g, g, g, g],
        [g] * 11,
    ]
    assert image.mode == "L"
    assert np.asarray(image).tolist() == expected


def test_colour_grid_without_lines_keeps_the_channels() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    array = np.asarray(grid(images, columns=2, scale=1, pad=0))
    assert array.shape == (10, 12, 3)
    assert np.array_equal(array[5:, :6], images[2].permute(1, 2, 0).numpy())


def test_default_layout_makes_small_images_visible() -> None:
    assert grid(torch.zeros(10, 1, 8, 8).byte(), pad=2).size == (4 * 66 + 2, 3 * 66 + 2)
    assert grid(torch.zeros(1, 1, 30, 8).byte(), pad=0).size == (16, 60)
    assert grid(torch.zeros(1, 3, 100, 80).byte(), pad=0).size == (80, 100)


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"scale": 0}, {"pad": -1}])
def test_grid_refuses_layouts(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.* must be at least"):
        grid(RAMP, **arguments)


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (4, 4), (0, 1, 4, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="C = 1 or 3"):
        grid(torch.zeros(shape, dtype=torch.uint8))


def test_png_round_trip(tmp_path: Path) -> None:
    image = grid(RAMP)
    save_png(image, tmp_path / "new" / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), np.asarray(image))
    head, _, payload = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(payload)))), np.asarray(image))


def test_a_folder_of_images_appears_whole(tmp_path: Path) -> None:
    with folder_of_images(tmp_path / "new" / "samples") as write:
        write(0, RAMP[:2])
        write(2, RAMP[2:])
        assert not (tmp_path / "new" / "samples").exists()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["samples"]
    for i, image in enumerate(RAMP):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"new/samples/{i:06d}.png")), image[0].numpy())


def test_a_folder_of_images_takes_the_place_of_one_of_images_alone(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with folder_of_images(folder) as write:
        write(1, 255 - RAMP)
    with pytest.raises(ValueError, match="exists"), folder_of_images(folder) as write:  # another process's, not ours
        write(0, RAMP[:2])
    with folder_of_images(folder, replace=True) as write:
        write(0, RAMP[:2])
        assert len(list(folder.iterdir())) == 3  # the old one is whole until the new one is
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["000000.png", "000001.png", "samples"]
    assert np.array_equal(np.asarray(Image.open(folder / "000001.png")), RAMP[1, 0].numpy())
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"samples: holds 'mine.txt', which is no sample"), folder_of_images(folder):
        pass
    assert len(list(folder.iterdir())) == 3


def test_a_folder_of_images_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with folder_of_images(tmp_path / "samples") as write:
            write(0, RAMP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_captions_stand_below_their_images() -> None:
    plain = np.asarray(grid(RAMP, columns=2, scale=32, pad=1))
    image = np.asarray(grid(RAMP, columns=2, scale=32, pad=1, captions=["cats", "dogs", "cats"]))
    below = image.shape[0] - plain.shape[0]
    assert (below % 2, image.shape[1]) == (0, plain.shape[1])
    strip = below // 2
    rows = [r for top in (0, 65 + strip) for r in range(top, top + 65)]
    assert np.array_equal(image[[*rows, -1]], plain)  # the images and the lines are as without captions
    first, second, third = image[65 : 65 + strip, 1:65], image[65 : 65 + strip, 66:130], image[-strip - 1 : -1, 1:65]
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)
    assert first.max() > 200 > 60 > np.median(first)  # light text on a dark strip
    colour = grid(RAMP.expand(-1, 3, -1, -1), columns=2, scale=32, pad=1, captions=["cats", "dogs", "cats"])
    assert np.array_equal(np.asarray(colour.convert("L")), image)
    with pytest.raises(ValueError, match="captions: 2 for 3 images"):
        grid(RAMP, captions=["a", "b"])


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_folder_of_classes_names_its_files_and_classes(tmp_path: Path, kind: str) -> None:
    images = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)[:4]
    names = ["sea/ lions", "cats", "..", "cats"]
    with folder_of_images(tmp_path / "s", torch.tensor([3, 0, 1, 0]), names, kind=kind) as write:
        write(0, images)
    files = ["000000-sea_lions", "000001-cats", "000002-_", "000003-cats"]
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [*(f"{f}.{kind}" for f in files), "dataset.json"]
    for file, image in zip(files, images, strict=True):
        with Image.open(tmp_path / "s" / f"{file}.{kind}") as found:
            assert found.format == {"jpg": "JPEG"}.get(kind, kind.upper())
            off = np.asarray(found).astype(int) - image.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(off).max() <= (1 if kind == "jpg" else 0)
    data = open_data(tmp_path / "s")
    assert (data.labels.tolist(), data.class_names) == ([3, 0, 1, 0], ("cats", "..", "2", "sea/ lions"))
    with folder_of_images(
        tmp_path / "s", torch.tensor([1, 0]), replace=True
    ) as write:  # takes the place of its own kind
        write(0, images[:2])
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["000000-1.png", "000001-0.png", "dataset.json"]
    assert open_data(tmp_path / "s").class_names == ("0", "1")


def test_npz_round_trip(tmp_path: Path) -> None:
    save_npz(RAMP, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert list(archive) == ["images"]
        assert np.array_equal(archive["images"], RAMP.numpy())
