import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from multistage_diffusion.config.run import MAX_PIXELS
from multistage_diffusion.data import opening
from multistage_diffusion.data.decoding import load
from multistage_diffusion.data.image_files import ImageFiles
from multistage_diffusion.data.index import make_index
from multistage_diffusion.data.opening import decode, load_png, one_line, open_image, supported
from multistage_diffusion.data.options import Options
from multistage_diffusion.errors import UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
WMF = struct.pack("<IHhhhhHIH", 0x9AC6CDD7, 0, 0, 0, 8, 8, 1440, 0, 0) + b"\1\0\x09\0" + bytes(40)


def file(image, kind="png", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content):
    return np.asarray(decode(content, MAX_PIXELS).image)


def tiff(values, bits, sample_format=1, photometric=1):
    """A little-endian grey TIFF of one strip."""
    data = values.tobytes() if isinstance(values, np.ndarray) else values
    height, width = 2, 4
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in sorted(tags.items())
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


VALUES = np.array([[0, 1, 300, 65535], [40000, 257, 128, 129]], np.uint16)
ROUNDED = np.rint(VALUES / 257).astype(int)


@pytest.mark.parametrize("content", [EPS, WMF, b"%PDF-1.4\n", b"", b"GIF", bytes(100), b"P9\n1 1\n"])
def test_other_formats_are_never_opened(content, monkeypatch):
    """Pillow hands EPS to Ghostscript, and other formats it knows to other code."""

    def started(*_, **__):
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    with pytest.raises(UserError, match=r"it is not recognised as PNG or JPEG or|it is empty") as caught:
        decode(content, MAX_PIXELS)
    assert "BytesIO" not in str(caught.value)


def test_the_test_of_other_formats_means_something():
    with Image.open(io.BytesIO(EPS)) as image:
        assert image.format == "EPS"


def test_only_the_formats_named_are_opened(tmp_path):
    grey = np.zeros((2, 2), np.uint8)
    with pytest.raises(UserError, match="it is not recognised as PNG"):
        open_image(file(grey, "jpeg"), ("PNG",))
    (tmp_path / "a.jpg").write_bytes(file(grey))
    assert open_image(tmp_path / "a.jpg", ("PNG",)).format == "PNG"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("png", {}),
        ("bmp", {}),
        ("webp", {"lossless": True}),
        ("tiff", {}),
        ("tiff", {"compression": "tiff_lzw"}),
        ("tiff", {"compression": "tiff_adobe_deflate"}),
        ("ppm", {}),
        ("jpeg2000", {"irreversible": False}),
        ("avif", {"quality": 100, "subsampling": "4:4:4"}),
        ("gif", {}),
        ("qoi", {}),
    ],
)
def test_formats_decode_to_what_was_saved(kind, options):
    if kind.upper() not in supported():
        pytest.skip(f"Pillow without {kind}")
    if kind.upper() not in Image.SAVE:
        pytest.skip(f"Pillow does not write {kind}")
    colours = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)  # no more than GIF has
    found = pixels(file(colours, kind, **options))
    assert found.shape == colours.shape
    tolerance = 6 if kind == "avif" else 0
    assert np.abs(found.astype(int) - colours).max() <= tolerance


@pytest.mark.parametrize("kind", ["png", "gif", "tiff"])
def test_a_palette_of_greys_stays_grey(kind):
    values = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(values, mode="P")
    image.putpalette([10, 10, 10, 200, 200, 200, 90, 90, 90])
    assert pixels(file(image, kind)).tolist() == [[10, 200], [90, 200]]
    image.putpalette([10, 10, 10, 200, 200, 200, 90, 90, 91])
    assert pixels(file(image, kind)).shape == (2, 2, 3)
    if kind != "tiff":
        image.putpalette([10, 10, 10, 200, 200, 200, 90, 0, 0])
        assert pixels(file(image, kind, transparency=2)).tolist() == [[10, 200], [255, 200]]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (file(Image.fromarray(np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)), "tiff"), "floating-point"),
        (file(Image.fromarray(np.arange(8, dtype=np.int32).reshape(2, 4)), "tiff"), "32-bit integers"),
        (tiff(np.arange(8, dtype="<i2"), 16, sample_format=2), "signed or 32-bit"),
        (tiff(np.arange(8, dtype="<u4"), 32), "32-bit integers"),
        (b"Pf\n4 2\n-1.0\n" + np.zeros(8, "<f4").tobytes(), "floating-point"),
    ],
)
def test_pixels_of_unknown_range_are_refused(content, kind):
    with pytest.raises(UserError, match=rf"its pixels are .*{kind}.*of unknown range; convert them to 8 bits"):
        decode(content, MAX_PIXELS)


@pytest.mark.parametrize("content", [file(VALUES), file(VALUES, "tiff"), tiff(VALUES, 16)])
def test_sixteen_bits_are_scaled(content):
    assert pixels(content).tolist() == ROUNDED.tolist()
    assert decode(content, MAX_PIXELS).brightest == 65535


def test_sixteen_bits_of_other_formats_are_scaled():
    values = VALUES.astype(">u2").tobytes()
    assert pixels(b"P5\n4 2\n65535\n" + values).tolist() == ROUNDED.tolist()
    twelve = np.array([0, 1, 2048, 4095, 5, 6, 7, 8], ">u2")  # PPM says how many values there are
    found = decode(b"P5\n4 2\n4095\n" + twelve.tobytes(), MAX_PIXELS)
    assert np.abs(np.asarray(found.image).ravel() - np.rint(twelve / 4095 * 255)).max() <= 1
    assert found.brightest == 65535


def test_white_may_be_zero_in_sixteen_bits_as_in_eight():
    assert pixels(tiff(VALUES, 16, photometric=0)).tolist() == (255 - ROUNDED).tolist()
    assert pixels(tiff(bytes(range(8)), 8, photometric=0)).ravel().tolist() == [255 - i for i in range(8)]


def colour_png(values):
    """A PNG of 16-bit RGB values, which Pillow does not write."""
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_how_bright_sixteen_bit_files_are_is_known():
    values = np.full((2, 3, 3), 4095, np.uint16)
    found = decode(colour_png(values), MAX_PIXELS)
    assert 4095 <= found.brightest < 4095 + 256
    assert np.asarray(found.image).max() == 15
    assert decode(file(VALUES // 16), MAX_PIXELS).brightest == 4095
    assert decode(file(np.zeros((2, 2), np.uint8)), MAX_PIXELS).brightest is None
    assert decode(file(np.zeros((2, 2, 3), np.uint8), "tiff"), MAX_PIXELS).brightest is None


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_images_is_used_and_said(kind):
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (250, 0, 100)]
    many = decode(file(frames[0], kind, save_all=True, append_images=frames[1:]), MAX_PIXELS)
    assert many.several
    assert np.abs(np.asarray(many.image).astype(int) - 250).max() <= 2
    assert not decode(file(frames[0], kind), MAX_PIXELS).several


UPRIGHT = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose}
UPRIGHT |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind, orientation):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    found = np.asarray(decode(file(values, kind, exif=exif, **options), MAX_PIXELS).image.convert("L"))
    np.testing.assert_array_equal(found, UPRIGHT[orientation](values))


def with_zero_denominator():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = Fraction(72, 1)
    content = file(np.arange(24, dtype=np.uint8).reshape(4, 6), "png", exif=exif)
    return content


def test_a_photo_is_read_without_its_exif_where_that_is_damaged(monkeypatch):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)

    def broken(*_, **__):
        raise ZeroDivisionError("Fraction(72, 0)")

    # Pillow 11.0 fails here on a fraction n/0 anywhere in EXIF; the orientation itself is readable
    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    np.testing.assert_array_equal(pixels(with_zero_denominator()), np.rot90(values, -1))
    np.testing.assert_array_equal(pixels(file(values, "tiff")), values)
    monkeypatch.setattr(Image.Image, "getexif", broken)
    np.testing.assert_array_equal(pixels(with_zero_denominator()), values)


def test_a_real_zero_denominator_is_read():
    content = with_zero_denominator()
    assert content.count(struct.pack(">II", 72, 1)) + content.count(struct.pack("<II", 72, 1)) == 1
    import zlib

    start = content.index(b"eXIf")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    chunk = content[start : start + 4 + length]
    damaged = chunk.replace(struct.pack(">II", 72, 1), struct.pack(">II", 72, 0))
    damaged = damaged.replace(struct.pack("<II", 72, 1), struct.pack("<II", 72, 0))
    changed = content.replace(
        chunk + content[start + 4 + length :][:4], damaged + struct.pack(">I", zlib.crc32(damaged))
    )
    np.testing.assert_array_equal(pixels(changed), np.rot90(np.arange(24, dtype=np.uint8).reshape(4, 6), -1))


def test_pixels_are_limited_whatever_pillow_has(monkeypatch):
    content = file(np.zeros((10, 20), np.uint8))
    assert pixels(content).shape == (10, 20)
    with pytest.raises(UserError, match=r"it has 200 pixels, more than data\.max_pixels=199; .* --max-pixels 200"):
        decode(content, 199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert decode(content, 200).image.size == (20, 10)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(content))


def test_pillows_limit_is_back_after_many_threads(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    content = file(np.zeros((10, 20), np.uint8))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(content, 1000), range(200)))
    assert Image.MAX_IMAGE_PIXELS == 12345


def test_the_default_limit_is_pillows_own():
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_pictures_of_the_package_are_read_as_png_only():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.asarray(load_png(file(grey), "stages.png", "mend")).tolist() == grey.tolist()
    for content in (EPS, file(grey, "jpeg"), file(grey)[:40]):
        with pytest.raises(UserError, match=r"^stages\.png: is not a readable PNG image \(.*\); find it again$"):
            load_png(content, "stages.png", "find it again")


def test_formats_are_those_of_the_suffixes():
    assert "EPS" not in opening.FORMATS
    assert {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"} <= supported() <= set(opening.FORMATS)
    for suffix, kind in opening.SUFFIXES.items():
        registered = Image.registered_extensions().get(suffix)
        assert registered in (kind, "MPO", None)


def test_what_others_say_is_cut_to_a_line():
    assert one_line(ValueError("a\nb")) == "a"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 100_000)) == "x" * 200 + " ..."


@pytest.mark.slow
def test_pillow_logs_nothing_beside_our_own_line():
    """In a process of its own: here pytest itself listens."""
    content = bytearray(tiff(bytes(8), 8))
    entry = content.index(struct.pack("<HHI", 277, 3, 1))
    content[entry + 8 : entry + 10] = b"\xff\xff"  # samples per pixel
    script = (
        "from multistage_diffusion.data.opening import decode\n"
        f"try: decode({bytes(content)!r}, 100)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("it is not recognised as PNG or")
    assert done.stderr == ""


def png16(kind, samples, *chunks):
    """A PNG of 16 bits a sample, (H, W, channels), of a colour type, with further chunks."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    samples = np.asarray(samples, ">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 16, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def test_sixteen_bit_grey_with_alpha_is_grey():
    values = [[[0, 65535], [0x8000, 65535], [0x8000, 0]]]
    found = decode(png16(4, values), MAX_PIXELS).image
    assert found.mode == "L"
    assert np.asarray(found).tolist() == [[0, 128, 255]]  # what is transparent is white


def test_the_transparent_value_of_sixteen_bit_grey_is_white():
    values = [[[0], [0x8000], [0x8001]]]
    assert pixels(png16(0, values, (b"tRNS", struct.pack(">H", 0x8000)))).tolist() == [[0, 255, 128]]


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    values = [[[0, 0, 0], [0x8000, 0x8000, 0x8000]]]
    assert pixels(png16(2, values)).shape == (1, 2, 3)
    with pytest.raises(UserError, match="16-bit colours with one transparent colour"):
        decode(png16(2, values, (b"tRNS", struct.pack(">HHH", 0x8000, 0x8000, 0x8000))), MAX_PIXELS)


def test_signed_bytes_are_refused():
    values = np.array([[-5, 0, 5, 127], [1, 2, 3, 4]], np.int8)
    with pytest.raises(UserError, match="signed or 32-bit integers"):
        decode(tiff(values, 8, sample_format=2), MAX_PIXELS)
    assert pixels(tiff(values.view(np.uint8), 8)).max() == 251


TWELVE = 4095  # the largest value of 12 bits


@pytest.mark.parametrize(
    ("kind", "colour", "brightest"),
    [
        (4, [TWELVE], TWELVE | 255),  # grey and alpha, of which Pillow keeps the upper bytes
        (6, [100, TWELVE, 50], TWELVE | 255),
    ],
)
def test_transparent_pixels_say_nothing_of_how_bright_an_image_is(kind, colour, brightest):
    """They become white, which no scanner has measured; what lies under them is not shown."""
    shown, under = [*colour, 65535], [65535] * len(colour) + [0]
    found = decode(png16(kind, [[shown, under]]), MAX_PIXELS)
    assert found.brightest == brightest
    assert np.asarray(found.image).max() == 255
    assert decode(png16(kind, [[shown, [*colour, 0]]]), MAX_PIXELS).brightest == brightest
    assert decode(png16(kind, [[under, under]]), MAX_PIXELS).brightest is None
    partly = [*[v // 2 for v in colour], 0x8000]
    assert decode(png16(kind, [[partly, under]]), MAX_PIXELS).brightest == (max(partly[:-1]) | 255)


def test_the_transparent_value_says_nothing_of_how_bright_an_image_is():
    clear = (b"tRNS", struct.pack(">H", 65535))
    found = decode(png16(0, [[[TWELVE], [65535], [7]]], clear), MAX_PIXELS)
    assert found.brightest == TWELVE
    assert np.asarray(found.image).tolist() == [[16, 255, 0]]
    assert decode(png16(0, [[[65535], [65535]]], clear), MAX_PIXELS).brightest is None


def test_a_dark_scan_with_a_transparent_corner_is_warned_about():
    scan = np.full((4, 5, 2), 65535)
    scan[..., 0] = TWELVE
    scan[0, 0] = 0
    with pytest.warns(UserWarning, match=r"no value of its 1 16-bit images is above 4095, which is 15 of 255"):
        make_index(ImageFiles("set", ["scan"], lambda _: png16(4, scan)), None, Options())[0].warn()


# -- JPEG images that are decoded smaller -----------------------------------------------------------------------------


def photo(height, width):
    """A colour image with structure at all scales, weaker at finer ones, as photographs have."""
    draws = np.random.default_rng(3)
    total = np.zeros((height, width, 3))
    for level in range(1, 9):
        coarse = draws.normal(size=(2**level, 2**level, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], -1) * 40 / level
    return (total + 128).clip(0, 255).astype(np.uint8)


def jpeg(image, turned=1):
    exif = Image.Exif()
    exif[0x0112] = turned
    return file(image, "jpeg", quality=95, exif=exif)


@pytest.mark.parametrize(
    ("found", "least", "factor"),
    [
        ((320, 480), (20, 20), 8),
        ((320, 480), (21, 20), 4),
        ((320, 480), (20, 31), 4),
        ((320, 480), (80, 80), 2),
        ((320, 480), (81, 80), 1),
        ((320, 480), (500, 500), 1),
        ((327, 481), (20, 20), 8),
    ],
)
def test_twice_the_pixels_that_are_wanted_are_left(found, least, factor):
    decoded = decode(jpeg(np.zeros((*found, 3), np.uint8)), MAX_PIXELS, least)
    assert (decoded.image.height, decoded.image.width) == tuple(-(-n // factor) for n in found)
    assert decoded.found == found
    assert decoded.extent == (found[0] / factor, found[1] / factor)


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_turned_image_is_decoded_smaller_only_if_its_size_is_divisible(turned):
    lying = turned > 4
    for (height, width), divisible in (((320, 480), True), ((321, 480), False)):
        decoded = decode(jpeg(np.zeros((height, width), np.uint8), turned), MAX_PIXELS, (20, 60) if lying else (20, 20))
        assert decoded.found == ((width, height) if lying else (height, width))
        factor = 1 if turned > 1 and not divisible else 2 if lying else 8
        assert decoded.image.width == -(-decoded.found[1] // factor)


def test_other_formats_and_images_that_keep_their_size_are_decoded_whole():
    image = photo(64, 64)
    for content in (file(image), file(image, "webp")):
        assert decode(content, MAX_PIXELS, (4, 4)).image.size == (64, 64)
    assert decode(jpeg(image), MAX_PIXELS).image.size == (64, 64)


@pytest.mark.parametrize("turned", [1, 3, 6])
@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("shape", [(512, 640), (427, 641), (203, 350)])
def test_decoding_smaller_changes_a_level_of_grey_on_average(shape, fit, turned, monkeypatch):
    content, options = jpeg(photo(*shape), turned), Options(size=(24, 24), fit=fit)
    smaller = load(content, options).pixels.astype(float)
    monkeypatch.setattr(opening, "_DRAFTS", ())
    whole = load(content, options).pixels.astype(float)
    change = smaller - whole
    assert np.abs(change).mean() < 1.1
    assert np.abs(change).max() < 12
    # the change is no shift: its projection on the images' slope is less than a twentieth of a pixel
    for slope in np.gradient(whole, axis=(1, 2)):
        assert abs((change * slope).sum() / (slope**2).sum()) < 0.05
