"""The one path by which images are decoded: no value lost, upright, limited, and nothing opened that is no file."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medmoe_hf.model import ImageError, ImageTooLargeError, load_image
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil
from medmoe_hf.model.medical_images_medmoe import MAX_PIXELS, MedicalImage

CASES = Path(__file__).parents[1] / "fixtures" / "cases"
BACKENDS = (MedMoEImageProcessor, MedMoEImageProcessorPil)


def png_of_16_bits(pixels, colour_type, size=None, chunks=()):
    """A PNG file, written by the specification: no filter, one IDAT."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *(size or (width, height)), 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(pixels, photometric, order="<", **tags):
    """An uncompressed TIFF file of one strip; `tags` by number, as `t338=1`."""
    height, width = pixels.shape[:2]
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = {256: width, 257: height, 258: [pixels.itemsize * 8] * samples, 259: 1, 262: photometric, 273: 0}
    entries |= {277: samples, 278: height, 279: pixels.nbytes, 339: [kinds[pixels.dtype.kind]] * samples}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    extra, directory = b"", b""
    start = 8 + 2 + 12 * len(entries) + 4
    for number, value in sorted(entries.items()):
        values = value if isinstance(value, list) else [value]
        if number == 273:
            values = [start + 64]
        form, code = ("I", 4) if number in (273, 279) else ("H", 3)
        content = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(content) > 4:
            extra += content.ljust(16, b"\0")
            content = struct.pack(f"{order}I", start + len(extra) - 16)
        directory += struct.pack(f"{order}HHI", number, code, len(values)) + content.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(f"{order}IH", 8, len(entries)) + directory + b"\0\0\0\0"
    return head + extra.ljust(64, b"\0") + pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()


def draw(*shape, dtype="u2"):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def eight_bit_png(picture, **options):
    file = io.BytesIO()
    picture.save(file, "png", **options)
    return file.getvalue()


# --- values


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize(("samples", "colour_type"), [(3, 2), (4, 6), (2, 4)])
def test_png_colours_of_16_bits(tmp_path, samples, colour_type, as_path):
    pixels = draw(9, 7, samples)
    content = png_of_16_bits(pixels, colour_type)
    (tmp_path / "a.png").write_bytes(content)
    image, modality = load_image(tmp_path / "a.png" if as_path else content)
    assert (image.dtype, modality) == (np.uint16, None)
    np.testing.assert_array_equal(image, pixels if samples > 2 else pixels[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_colours_of_16_bits(order):
    colours = draw(9, 7, 3)
    np.testing.assert_array_equal(load_image(tiff(colours, 2, order))[0], colours)
    with_alpha = draw(9, 7, 4)
    np.testing.assert_array_equal(load_image(tiff(with_alpha, 2, order, t338=2))[0], with_alpha)
    # Alpha that is multiplied in already is laid on black already.
    np.testing.assert_array_equal(load_image(tiff(with_alpha, 2, order, t338=1))[0], with_alpha[..., :3])
    with pytest.raises(ImageError, match="16-bit colours in separate planes"):
        load_image(tiff(colours, 2, order, t284=2, t273=[8, 8, 8], t279=[126, 126, 126]))


def test_images_of_pillow_that_are_not_decoded_yet():
    colours = draw(9, 7, 3)
    for content in (png_of_16_bits(colours, 2), tiff(colours, 2)):
        np.testing.assert_array_equal(load_image(Image.open(io.BytesIO(content)))[0], colours)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u2", "u4", "i2", "i4", "f4"])
def test_wide_gray_tiff(order, dtype):
    if (order, dtype) == (">", "u4"):
        with pytest.raises(ImageError, match="in a format that Pillow reads"):
            load_image(tiff(draw(9, 7, dtype="u4"), 1, order))
        return
    pixels = draw(9, 7, dtype="u4").astype(dtype)
    np.testing.assert_array_equal(np.asarray(load_image(tiff(pixels, 1, order))[0]), pixels)


def test_white_is_zero():
    """Negatives of film digitisers: white is the smallest value."""
    pixels = np.arange(63, dtype=np.uint16).reshape(9, 7) * 1000
    assert (load_image(tiff(pixels, 0))[0] == 65535 - pixels).all()
    eight_bits = (pixels // 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(tiff(eight_bits, 0))[0]), 255 - eight_bits)
    for backend in BACKENDS:
        options = {"do_resize": False, "do_normalize": False, "rescale_factor": 1.0, "return_tensors": "np"}
        gray = backend()(tiff(pixels, 0), **options).pixel_values[0, 0]
        np.testing.assert_allclose(gray, 255 - pixels / 62000 * 255, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        "09-tiff-16-bit-white-is-zero/a.tif",
        "10-colour-of-16-bits-holding-12/rgb.png",
        "23-tiff-of-32-unsigned-bits/a.tif",
    ],
)
def test_files_from_bug_reports(backend, name):
    expected = np.load((CASES / name).with_name("expected.npy"))
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, axis=-1)
    options = {"do_resize": False, "do_normalize": False, "do_rescale": False, "return_tensors": "np"}
    pixels = backend()(CASES / name, **options).pixel_values[0].transpose(1, 2, 0)
    assert np.abs(pixels - expected).max() <= 1


def test_a_transparent_colour_of_16_bits():
    colours = draw(9, 7, 3)
    key = colours[4, 5]
    content = png_of_16_bits(colours, 2, chunks=[(b"tRNS", key.astype(">u2").tobytes())])
    image = load_image(content)[0]
    np.testing.assert_array_equal(image[..., :3], colours)
    assert image[4, 5, 3] == 0
    assert image[..., 3].sum() == 65535 * 62


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Against the table of the EXIF specification: where the first row and the first column of the file are seen."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = eight_bit_png(Image.fromarray(stored), exif=exif)
    for source in (content, Image.open(io.BytesIO(content))):
        image = load_image(source)[0]
        np.testing.assert_array_equal(np.asarray(image), upright)
        np.testing.assert_array_equal(np.asarray(load_image(image)[0]), upright)  # once only
    wide = draw(2, 3, 3)
    content = png_of_16_bits(wide, 2, chunks=[(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])
    turned = {1: wide, 3: wide[::-1, ::-1], 6: np.rot90(wide, -1), 8: np.rot90(wide, 1)}
    if orientation in turned:
        np.testing.assert_array_equal(load_image(content)[0], turned[orientation])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_header_is_no_orientation():
    picture = Image.fromarray(draw(4, 5, dtype="u1"))
    content = eight_bit_png(picture, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    np.testing.assert_array_equal(np.asarray(load_image(content)[0]), np.asarray(picture))


def test_draft_is_no_smaller_than_asked_for():
    file = io.BytesIO()
    Image.fromarray(draw(800, 600, 3, dtype="u1")).save(file, "jpeg")
    assert load_image(file.getvalue())[0].size == (600, 800)
    assert load_image(file.getvalue(), draft=100)[0].size == (150, 200)


def test_what_is_read_already():
    medical = MedicalImage(np.zeros((2, 3), np.float32), "ct", None, 0, 1)
    image, modality = load_image(medical)
    assert image is medical.pixels
    assert modality == "ct"
    with pytest.raises(TypeError, match="got dict"):
        load_image({})


# --- limits


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_pixels(tmp_path, backend):
    """144 megapixels in some hundred bytes."""
    bomb = png_of_16_bits(draw(2, 2), 0, size=(12_000, 12_000))
    (tmp_path / "bomb.png").write_bytes(bomb)
    for source in (bomb, tmp_path / "bomb.png", str(tmp_path / "bomb.png")):
        with pytest.raises(ImageTooLargeError, match=f"12000 x 12000 pixels, more than `max_pixels` {MAX_PIXELS}"):
            load_image(source)
        with pytest.raises(ImageTooLargeError, match=r"image 1 of the batch: .*12000 x 12000"):
            backend()([draw(2, 2), source])
    (tmp_path / "bomb.png").write_bytes(png_of_16_bits(draw(2, 2), 0, size=(60_000, 60_000)))
    with pytest.raises(ImageTooLargeError, match=r"bomb\.png.*Pillow's own limit"):
        load_image(tmp_path / "bomb.png", max_pixels=10**11)
    small = eight_bit_png(Image.fromarray(draw(40, 50, dtype="u1")))
    assert load_image(small, max_pixels=2000)[0].size == (50, 40)
    with pytest.raises(ImageTooLargeError):
        load_image(small, max_pixels=1999)
    assert backend(max_pixels=2000)(small, return_tensors="np").pixel_values.shape == (1, 3, 224, 224)
    for arguments in ({"max_pixels": 1999}, {}):
        with pytest.raises(ImageTooLargeError):
            backend(**({} if arguments else {"max_pixels": 1999}))(small, **arguments)


def test_tiles_larger_than_their_image():
    content = tiff(draw(4, 4, dtype="u1"), 1, t322=60_000, t323=60_000, t324=8, t325=16)
    with pytest.raises(ImageTooLargeError, match="60000 x 60000"):
        load_image(content)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_regular_file(tmp_path, backend):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path, what in (
        ("/dev/zero", "device"),
        (tmp_path / "pipe.png", "pipe"),
        (tmp_path / "folder.png", "a folder"),
    ):
        for source in (path, str(path)):
            with pytest.raises(ImageError, match=f"cannot read the image .*{what}"):
                load_image(source)
            with pytest.raises(ImageError, match=f"image 0 of the batch: .*{what}"):
                backend()(source)
            with pytest.raises(ImageError, match=f"cannot read the image .*{what}"):
                backend().fetch_images(source)
    (tmp_path / "link.png").symlink_to("pipe.png")
    with pytest.raises(ImageError, match="pipe"):
        load_image(tmp_path / "link.png")


def test_addresses_are_off_by_default():
    with pytest.raises(ImageError, match=r"not fetched: http.s. addresses are not allowed here"):
        load_image("http://example.org/a.png")
    with pytest.raises(ImageError, match="not allowed"):
        MedMoEImageProcessor(allow_urls=False).fetch_images("https://example.org/a.png")


def test_unreadable_bytes_say_why():
    with pytest.raises(
        ImageError, match="cannot read the image given as bytes: it is not DICOM, NIfTI or an image file"
    ):
        load_image(b"no picture")
    whole = eight_bit_png(Image.fromarray(draw(40, 50, dtype="u1")))
    with pytest.raises(ImageError, match=r"cannot read the image given as bytes: .*truncated"):
        load_image(whole[: len(whole) // 2])
