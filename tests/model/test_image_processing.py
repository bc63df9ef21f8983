"""What the image processors make of every kind of picture, against arithmetic done here."""

import base64
import contextlib
import io
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from clean_process import run_clean
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import CLIPImageProcessor

from medmoe_hf.errors import ImageError, ImageTooLargeError
from medmoe_hf.model import image_files_medmoe
from medmoe_hf.model.image_processing_medmoe import (
    MedMoEImageProcessor,
    MedMoEImageProcessorPil,
    resize_heatmaps,
    to_rgb,
)

MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)
BACKENDS = {"torchvision": MedMoEImageProcessor, "pil": MedMoEImageProcessorPil}
RAMP = np.array([[0, 100, 255, 256, 3000, 65535], [1, 2, 3, 4, 5, 6]], dtype=np.uint16)
RAMP_8_BIT = RAMP / 65535 * 255


@pytest.fixture(params=BACKENDS, scope="module")
def processor(request):
    return BACKENDS[request.param]()


@pytest.fixture
def photo():
    """Smooth colours with some grain, not square, H and W far from 224: (61, 83, 3) uint8."""
    y, x = np.mgrid[0:61, 0:83]
    planes = [np.sin(x / 7 + c) * 60 + np.cos(y / 11 - c) * 60 + 127 for c in range(3)]
    grain = np.random.default_rng(0).normal(0, 6, (61, 83, 3))
    return (np.stack(planes, -1) + grain).clip(0, 255).astype(np.uint8)


def raw(processor, images, **kwargs):
    """The pixels in 0..255, before geometry and normalisation: (B, 3, H, W)."""
    # By a factor of 1: without rescaling, floats are left on the scale that they have.
    kwargs = {"do_resize": False, "rescale_factor": 1.0, "do_normalize": False, "return_tensors": "pt", **kwargs}
    pixels = processor(images, **kwargs).pixel_values
    assert pixels.dtype == torch.float32
    return pixels.numpy()


def gray(values):
    """(H, W) repeated into the three channels of a batch of one."""
    return np.repeat(np.asarray(values, dtype=np.float64)[None, None], 3, axis=1)


# --- the whole chain


def test_defaults_give_model_input(processor, photo):
    pixels = processor(photo, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels.dtype == torch.float32
    assert isinstance(processor(photo).pixel_values, list)
    assert isinstance(processor(photo, return_tensors="np").pixel_values, np.ndarray)


def test_normalisation_formula(processor):
    picture = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    expected = (picture.transpose(2, 0, 1) / 255 - MEAN) / STD
    np.testing.assert_allclose(processor(picture, return_tensors="np").pixel_values[0], expected, atol=2e-6)


def test_resize_is_antialiased_bicubic(processor, photo):
    large = np.kron(photo, np.ones((8, 8, 1), np.uint8))
    expected = np.asarray(Image.fromarray(large).resize((224, 224), Image.Resampling.BICUBIC))
    pixels = raw(processor, large, do_resize=True)[0].transpose(1, 2, 0)
    # Two 8-bit implementations of one filter: Pillow's and torch's.
    assert np.abs(pixels - expected).max() <= 2
    assert np.abs(pixels - expected).mean() < 0.05


def test_wide_pictures_are_resized_in_floats(processor):
    wide = (np.mgrid[0:300, 0:300][0] * 200).astype(np.uint16)
    scaled = torch.from_numpy(wide / wide.max() * 255)[None, None]
    size = {"size": (224, 224), "mode": "bicubic", "align_corners": False, "antialias": True}
    expected = torch.nn.functional.interpolate(scaled, **size)[0, 0].clamp(0, 255)
    np.testing.assert_allclose(raw(processor, wide, do_resize=True)[0, 1], expected, atol=1e-3)
    # More levels than 8 bits have, and none lost.
    steps = np.arange(1000, dtype=np.uint16).reshape(20, 50)
    assert len(np.unique(raw(processor, steps))) == 1000


def test_overshoot_is_clamped(processor):
    edge = np.zeros((20, 20), np.float32)
    edge[:, 10:] = 255
    for picture in (edge, edge.astype(np.uint8), edge.astype(np.uint16)):
        pixels = raw(processor, picture, do_resize=True, size=90)
        assert pixels.min() == 0
        assert pixels.max() == 255


@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_backends_agree(photo, resample):
    pictures = [
        photo,
        np.tile(photo, (6, 6, 1)),
        photo.astype(np.uint16) * 250,
        photo / 255,
        Image.fromarray(photo).convert("L"),
        photo.astype(np.float32) * 3 - 200,
    ]
    ours, theirs = (backend()(pictures, return_tensors="pt", resample=resample) for backend in BACKENDS.values())
    difference = (ours.pixel_values - theirs.pixel_values).abs()
    if resample in (2, 3):  # one kernel in both
        assert difference.max() < 1e-5
    else:  # Pillow's 8-bit filters against torchvision's: a gray level is 0.0175 after normalisation
        assert difference.max() < 0.036
        assert difference.mean() < 0.008


@pytest.mark.parametrize("size", [{"height": 40, "width": 96}, (40, 96), [40, 96]])
def test_size_per_call(processor, photo, size):
    assert processor(photo, size=size, return_tensors="pt").pixel_values.shape == (1, 3, 40, 96)
    assert processor(photo, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
    assert processor(photo, size=32, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_size_must_be_a_stretch(processor, photo):
    with pytest.raises(ValueError, match=r"height and a width, got .*shortest_edge"):
        processor(photo, size={"shortest_edge": 224})


def test_arguments_are_validated(processor, photo):
    with pytest.raises(StrictDataclassError):
        processor(photo, do_resize="yes")


# --- values


def test_16_bit_ramp(processor):
    for picture in (RAMP, Image.fromarray(RAMP), torch.from_numpy(RAMP), RAMP[..., None], RAMP[None]):
        np.testing.assert_allclose(raw(processor, [picture]), gray(RAMP_8_BIT), atol=2e-5)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">u2", ">i4", "<i2"]
)
def test_integers_are_stretched(processor, dtype):
    values = np.array([[3, 10, 60], [100, 101, 127]], dtype=dtype)
    expected = gray((values.astype(float) - 3) / 124 * 255)
    np.testing.assert_allclose(raw(processor, values), expected, atol=2e-5)
    if np.dtype(dtype).isnative:
        np.testing.assert_allclose(raw(processor, torch.from_numpy(values)), expected, atol=2e-5)


def test_negative_and_large_integers(processor):
    hounsfield = np.array([[-1024, 0, 3071]], dtype=np.int16)
    np.testing.assert_allclose(raw(processor, hounsfield), gray([[0, 1024 / 4095 * 255, 255]]), atol=2e-5)
    offset = np.array([[2**31 - 11, 2**31 - 6, 2**31 - 1]], dtype=np.int32)
    np.testing.assert_allclose(raw(processor, offset), gray([[0, 127.5, 255]]), atol=1e-4)


def test_colour_channels_share_one_range(processor):
    picture = np.array([[[0, 500, 1000], [1000, 250, 750]]] * 2, dtype=np.uint16)
    np.testing.assert_allclose(raw(processor, picture)[0], picture.transpose(2, 0, 1) * 0.255, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 0.25, 1]], [[0, 63.75, 255]]),
        ([[0.5, 0.5, 0.5]], [[127.5, 127.5, 127.5]]),
        ([[0, 1.5, 255]], [[0, 1.5, 255]]),
        ([[-1, 0, 1]], [[0, 127.5, 255]]),
        ([[0, 128, 256]], [[0, 127.5, 255]]),
        ([[-7, -7, -7]], [[0, 0, 0]]),
    ],
)
def test_floats(processor, dtype, values, expected):
    array = np.array(values, dtype=dtype)
    np.testing.assert_allclose(raw(processor, array), gray(expected), atol=2e-5)
    np.testing.assert_allclose(raw(processor, torch.from_numpy(array)), gray(expected), atol=2e-5)
    if dtype == "float32":
        np.testing.assert_allclose(raw(processor, torch.from_numpy(array).bfloat16()), gray(expected), atol=2e-5)


def test_extreme_floats(processor):
    values = np.array([[-3e38, 0, 3e38]], dtype=np.float32)
    np.testing.assert_allclose(raw(processor, values), gray([[0, 127.5, 255]]), atol=2e-5)


def test_bool(processor):
    values = np.array([[True, False], [False, True]])
    for picture in (values, torch.from_numpy(values), Image.fromarray(values)):
        np.testing.assert_array_equal(raw(processor, picture), gray(values * 255))


@pytest.mark.parametrize("value", [0, 77, 65535])
def test_constant_wide_pictures_become_zeros(processor, value):
    constant = np.full((4, 5), value, dtype=np.uint16)
    assert not raw(processor, constant).any()
    assert not raw(processor, Image.fromarray(constant)).any()
    assert not raw(processor, Image.new("F", (5, 4), float(value))).any()


STOCK = CLIPImageProcessor(size={"height": 40, "width": 30}, do_center_crop=False)


def on_range(low, high, dtype):
    """An edge and a slope from one bound to the other: (50, 60, 3)."""
    values = np.linspace(low, high, 50 * 60 * 3).reshape(50, 60, 3)
    values[:, 40:] = low
    values[:10, 45:] = high
    return values.astype(dtype)


@pytest.mark.parametrize("do_rescale", [False, True])
@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [
        *itertools.product(["uint8", "int8", "int32"], [(0, 1), (3, 120)]),
        *itertools.product(["uint8", "uint16"], [(0, 255), (3, 200)]),
        *itertools.product(["int16", "int64"], [(-1, 1), (-1024, 3071)]),
        *itertools.product(
            ["float16", "float32", "float64"],
            [(0, 1), (0.2, 0.9), (0, 255), (3, 200), (-1, 1), (-1024, 3071), (0, 4095)],
        ),
    ],
)
def test_rescaling_is_that_of_other_image_processors(processor, dtype, bounds, do_rescale):
    """What CLIP's makes of the same array, but for what is documented: integers of other than 8 bits, and floats that
    are to be rescaled though they are not in 0..255, are brought to 0..255 first."""
    image = on_range(*bounds, dtype)
    low, high = float(image.min()), float(image.max())
    given = image if dtype == "uint8" else image.astype(np.float32)
    in_range = low >= 0 and high <= 255
    if dtype != "uint8" and (not dtype.startswith("float") or (do_rescale and not in_range)):
        given = ((image.astype(np.float64) - low) / (high - low) * 255).astype(np.float32)
        in_range = True
    elif do_rescale and dtype != "uint8" and high <= 1:
        given = given * 255
    for do_resize, do_normalize in itertools.product([False, True], repeat=2):
        options = {"do_rescale": do_rescale, "do_resize": do_resize, "do_normalize": do_normalize, "resample": 3}
        options |= {"size": {"height": 40, "width": 30}, "image_mean": STOCK.image_mean, "image_std": STOCK.image_std}
        options |= {"input_data_format": "channels_last", "return_tensors": "np"}
        resized = given
        if do_resize and dtype != "uint8" and in_range and given.max() > 1:
            # What overshoots 0..255 is clamped, as in 8 bits.
            resized = STOCK(given, **{**options, "do_rescale": False, "do_normalize": False}).pixel_values[0]
            resized, do_resize = resized.clip(0, 255).transpose(1, 2, 0), False
        expected = STOCK(resized, **{**options, "do_resize": do_resize}).pixel_values
        pixels = processor(image, **options).pixel_values
        assert pixels.dtype == np.float32
        np.testing.assert_allclose(pixels, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def test_floats_that_are_scaled_already(processor):
    """The usual call: tensors of torchvision's ToTensor, normalised and not scaled again."""
    image = np.random.default_rng(0).uniform(0, 1, (224, 224, 3)).astype(np.float32)
    expected = (image.transpose(2, 0, 1) - MEAN) / STD
    for picture in (image, torch.from_numpy(image).permute(2, 0, 1)):
        pixels = processor(picture, do_rescale=False, return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(pixels, expected, atol=1e-5)
    # Files have a scale of their own, 0..255: an 8-bit one and one of 16 bits come out alike.
    for values in ((image * 255).astype(np.uint8), (image * 65535).astype(np.uint16)):
        pixels = raw(processor, png(values[..., 0]), do_rescale=False)
        assert pixels.max() > 250


# --- PIL modes


def test_pil_gray_and_colour(processor, photo):
    picture = Image.fromarray(photo)
    np.testing.assert_array_equal(raw(processor, picture)[0], photo.transpose(2, 0, 1))
    luma = np.asarray(picture.convert("L"))
    np.testing.assert_array_equal(raw(processor, picture.convert("L")), gray(luma))
    np.testing.assert_array_equal(raw(processor, picture.convert("1")), gray(np.asarray(picture.convert("1")) * 255))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_pil_colour_spaces(processor, photo, mode):
    picture = Image.fromarray(photo).convert(mode)
    np.testing.assert_array_equal(raw(processor, picture)[0], np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F"])
def test_pil_wide_modes(processor, mode):
    if mode in ("I;16", "I;16B", "I;16L"):
        data = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        picture = Image.frombytes(mode, (6, 2), data)
    else:
        picture = Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32))
    assert picture.mode == mode
    np.testing.assert_allclose(raw(processor, picture), gray(RAMP_8_BIT), atol=2e-5)


def test_pil_float_is_always_stretched(processor):
    picture = Image.fromarray(np.array([[0, 0.25, 0.5]], dtype=np.float32))
    np.testing.assert_allclose(raw(processor, picture), gray([[0, 127.5, 255]]), atol=2e-5)


def test_transparency_is_laid_on_black(processor):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 128], [200, 100, 50, 0]]] * 2, dtype=np.uint8)
    expected = np.round(rgba[..., :3] * (rgba[..., 3:] / 255)).transpose(2, 0, 1)
    for picture in (Image.fromarray(rgba), rgba, torch.from_numpy(rgba), rgba.transpose(2, 0, 1)):
        np.testing.assert_array_equal(raw(processor, picture)[0], expected)
    luma, alpha = (Image.fromarray(np.array([row], dtype=np.uint8)) for row in ([200, 200, 200], [255, 128, 0]))
    np.testing.assert_array_equal(raw(processor, Image.merge("LA", (luma, alpha))), gray([[200, 100, 0]]))


def test_palettes(processor):
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 110, 120, 130, 210, 220, 230])
    picture.putdata([0, 1, 2])
    expected = np.array([[[10, 110, 210]], [[20, 120, 220]], [[30, 130, 230]]])
    np.testing.assert_array_equal(raw(processor, picture)[0], expected)
    picture.info["transparency"] = 1
    expected[:, :, 1] = 0
    np.testing.assert_array_equal(raw(processor, picture)[0], expected)
    picture.info["transparency"] = bytes([255, 255, 0])
    np.testing.assert_array_equal(raw(processor, picture)[0], [[[10, 110, 0]], [[20, 120, 0]], [[30, 130, 0]]])


def test_colour_key(processor):
    picture = Image.fromarray(np.array([[5, 6, 7]], dtype=np.uint8))
    picture.info["transparency"] = 6
    np.testing.assert_array_equal(raw(processor, picture), gray([[5, 0, 7]]))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[[0, 500, 1000, 65535], [1000, 0, 0, 0]]], np.uint16), [[[0, 0]], [[127.5, 0]], [[255, 0]]]),
        (np.array([[[0, 0.5, 1, 0.5]]], np.float32), [[[0]], [[63.75]], [[127.5]]]),
        (np.array([[[0, 100, 200, 51]]], np.float32), [[[0]], [[20]], [[40]]]),
    ],
)
def test_alpha_of_other_types(processor, array, expected):
    np.testing.assert_allclose(raw(processor, array, input_data_format="channels_last")[0], expected, atol=1e-4)


# --- layouts and batches


def test_one_picture_in_every_shape(processor, photo):
    reference = processor(photo, return_tensors="pt").pixel_values
    first = photo.transpose(2, 0, 1)
    same = [
        Image.fromarray(photo),
        first,
        np.ascontiguousarray(first),
        torch.from_numpy(photo),
        torch.from_numpy(first.copy()),
        photo[None],
        torch.from_numpy(photo)[None],
        [photo],
        [[photo]],
        (Image.fromarray(photo),),
        np.flip(np.flip(photo, 0).copy(), 0),
    ]
    for picture in same:
        assert torch.equal(processor(picture, return_tensors="pt").pixel_values, reference)
    frozen = photo.copy()
    frozen.flags.writeable = False
    assert torch.equal(processor(frozen, return_tensors="pt").pixel_values, reference)
    np.testing.assert_allclose(raw(processor, photo / 255), raw(processor, photo), atol=2e-5)
    difference = (processor(photo / 255, return_tensors="pt").pixel_values - reference).abs()
    assert difference.max() < 2 / 255 / STD.min()  # 8-bit resizing rounds after each of its two passes
    assert difference.mean() < 0.4 / 255 / STD.min()


def test_mixed_list_keeps_order_and_values(processor, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    pictures = [
        photo,
        RAMP,
        Image.fromarray(photo).convert("L"),
        torch.rand(1, 9, 7),
        [np.stack([photo, photo[::-1]]), str(tmp_path / "photo.png")],
        tmp_path / "photo.png",
        photo.astype(np.float32),  # as large as the 8-bit one: neither may change the other
    ]
    alone = [*pictures[:4], photo, photo[::-1].copy(), photo, photo, pictures[-1]]
    expected = [processor(picture, size=40, return_tensors="np").pixel_values[0] for picture in alone]
    for grouping in (None, False, True):
        batch = processor(pictures, size=40, return_tensors="np", disable_grouping=grouping).pixel_values
        assert batch.shape == (9, 3, 40, 40)
        np.testing.assert_allclose(batch, expected, atol=1e-6)


def test_inputs_are_left_alone(processor):
    floats = torch.rand(3, 224, 224) * 300 - 20
    array = np.random.default_rng(0).uniform(0, 255, (224, 224)).astype(np.float32)
    before = floats.clone(), array.copy()
    processor([floats, array], return_tensors="pt")
    assert torch.equal(floats, before[0])
    np.testing.assert_array_equal(array, before[1])


def test_given_layout_wins_over_guessing(processor):
    ambiguous = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    np.testing.assert_array_equal(raw(processor, ambiguous)[0], ambiguous)
    np.testing.assert_array_equal(
        raw(processor, ambiguous, input_data_format="channels_last")[0], ambiguous.transpose(2, 0, 1)
    )
    mixed = [ambiguous, Image.fromarray(ambiguous), ambiguous[0]]
    pixels = processor(mixed, input_data_format="channels_last", do_resize=False, do_normalize=False, do_rescale=False)
    np.testing.assert_array_equal(pixels.pixel_values[1], ambiguous.transpose(2, 0, 1))


def test_no_conversion_refuses(processor, photo):
    assert raw(processor, photo, do_convert_rgb=False).shape == (1, 3, 61, 83)
    with pytest.raises(ValueError, match="has 1 channels, and do_convert_rgb=False"):
        raw(processor, photo[..., 0], do_convert_rgb=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_name_their_position(processor, bad):
    broken = np.zeros((4, 4), np.float32)
    broken[2, 1] = bad
    for picture in (broken, torch.from_numpy(broken), Image.fromarray(broken)):
        with pytest.raises(ValueError, match="image 2 of the batch: the image holds NaN or infinite"):
            processor([np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.float32), picture])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((5, 6, 7))], r"image 0 of the batch: shape \(5, 6, 7\) has no 1, 3 or 4 channels"),
        ([np.zeros((2, 2)), np.zeros((0, 3))], r"image 1 of the batch: shape \(0, 3\) holds no pixels"),
        ([np.zeros((2, 3, 4, 3, 2))], r"image 0 of the batch: shape \(2, 3, 4, 3, 2\) is not an image's"),
        (np.zeros((1, 2, 3, 4), complex), "image 0 of the batch: numpy dtype complex128"),
        (torch.zeros((2, 3, 4), dtype=torch.complex64), "image 0 of the batch: tensor dtype torch.complex64"),
        (np.full((2, 2, 4), 300.0), "image 0 of the batch: the alpha channel spans 300"),
        ([], "no images"),
    ],
)
def test_what_is_no_image(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)
    with pytest.raises(ValueError, match="channels_last, has 5 channels"):
        processor(np.zeros((3, 4, 5)), input_data_format="channels_last")
    with pytest.raises(TypeError, match="got dict"):
        processor([{}])


# --- files


def test_16_bit_files_are_not_saturated(processor, tmp_path):
    for name in ("ramp.png", "ramp.tiff"):
        Image.fromarray(RAMP).save(tmp_path / name)
        np.testing.assert_allclose(raw(processor, str(tmp_path / name)), gray(RAMP_8_BIT), atol=2e-5)


def test_files_are_turned_upright(processor, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to look upright
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(raw(processor, tmp_path / "turned.png")[0].transpose(1, 2, 0), np.rot90(photo, k=-1))


def test_unreadable_files_are_named(processor, photo, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    whole = io.BytesIO()
    Image.fromarray(photo).save(whole, "png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:200])
    for name in ("text.png", "cut.png"):
        with pytest.raises(OSError, match=f"cannot read the image .*{name}"):
            processor([photo, tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"absent\.png' is neither an image file"):
        processor(str(tmp_path / "absent.png"))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def test_base64(processor):
    encoded = base64.b64encode(png(RAMP)).decode()
    for source in (encoded, f"data:image/png;base64,{encoded}"):
        np.testing.assert_allclose(raw(processor, source), gray(RAMP_8_BIT), atol=2e-5)


@pytest.fixture
def server():
    """The address of a server with /ramp.png, /moved.png (which redirects to /ramp.png) and /slow.png."""
    started = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/ramp.png": 200, "/slow.png": 200, "/moved.png": 302}.get(self.path, 404))
            if self.path == "/moved.png":
                self.send_header("Location", f"http://localhost:{self.server.server_port}/ramp.png")
            self.end_headers()
            with contextlib.suppress(OSError):
                while self.path == "/slow.png" and time.monotonic() < started + 20:
                    self.wfile.write(b" ")
                    time.sleep(0.05)
                self.wfile.write(png(RAMP))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(processor, server, monkeypatch):
    monkeypatch.setattr(image_files_medmoe, "_is_public", lambda number: True)
    for name in ("ramp.png", "moved.png"):
        np.testing.assert_allclose(raw(processor, f"{server}/{name}"), gray(RAMP_8_BIT), atol=2e-5)
    with pytest.raises(OSError, match=r"cannot read the image .*absent\.png': HTTP Error 404"):
        processor(f"{server}/absent.png")
    with pytest.raises(ImageError, match=r"image 1 of the batch: .*ramp.png' is not fetched: .* not allowed"):
        processor([RAMP, f"{server}/ramp.png"], allow_urls=False)
    with pytest.raises(ImageTooLargeError, match="it has more than 40 bytes"):
        processor(f"{server}/ramp.png", max_pixels=40)
    monkeypatch.setattr(image_files_medmoe, "_SECONDS_PER_DOWNLOAD", 0.3)
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"it took more than 0\.3 seconds"):
        processor(f"{server}/slow.png")
    assert time.monotonic() - began < 5


def test_addresses_of_private_networks(processor, server, monkeypatch):
    for address in (server, server.replace("127.0.0.1", "localhost")):
        with pytest.raises(ImageError, match="is an address of a private network"):
            processor(f"{address}/ramp.png")
    # A public address may redirect to a private one.
    public = image_files_medmoe._is_public
    resolve = socket.getaddrinfo

    def with_private(host, *args, **kwargs):
        return resolve(host.replace("localhost", "10.0.0.7"), *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", with_private)
    monkeypatch.setattr(image_files_medmoe, "_is_public", lambda number: number == "127.0.0.1" or public(number))
    np.testing.assert_allclose(raw(processor, f"{server}/ramp.png"), gray(RAMP_8_BIT), atol=2e-5)
    with pytest.raises(ImageError, match="localhost is an address of a private network"):
        processor(f"{server}/moved.png")


@pytest.mark.parametrize(
    ("number", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
    ],
)
def test_public_addresses(number, public):
    assert image_files_medmoe._is_public(number) is public


# --- heat-maps


def test_resize_heatmaps_is_bilinear_between_cell_centres():
    maps = torch.tensor([[[0.0, 4.0]]])
    np.testing.assert_allclose(resize_heatmaps(maps, (1, 8))[0, 0], [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4])
    maps = torch.rand(2, 5, 7, 9, dtype=torch.float64)
    resized = resize_heatmaps(maps.half(), (31, 20))
    assert resized.shape == (2, 5, 31, 20)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resize_heatmaps(maps, (7, 9)), maps.float())
    assert resize_heatmaps(maps[:, :0], (31, 20)).shape == (2, 0, 31, 20)


def test_a_blob_keeps_its_place_through_image_and_heatmap(processor):
    """Stretching to the model's grid and back is the identity on positions, also for narrow images."""
    picture = np.zeros((300, 90), np.uint8)
    picture[210:230, 15:25] = 255
    small = raw(processor, picture, do_resize=True, size=56)[0, :1]
    back = resize_heatmaps(torch.from_numpy(small), (300, 90))[0]
    row, column = divmod(int(back.argmax()), 90)
    assert 210 <= row < 230
    assert 15 <= column < 25


# --- settings


def test_round_trip(processor, photo, tmp_path):
    changed = type(processor)(size={"height": 48, "width": 64}, image_mean=[0.1, 0.2, 0.3], do_rescale=False)
    changed.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert loaded.to_dict() == changed.to_dict()
    assert type(processor).from_dict(changed.to_dict()).to_dict() == changed.to_dict()
    assert torch.equal(
        loaded(photo, return_tensors="pt").pixel_values, changed(photo, return_tensors="pt").pixel_values
    )
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"height": 48, "width": 64}
    assert saved["image_processor_type"] == "MedMoEImageProcessor"
    assert saved["auto_map"]["AutoImageProcessor"] == {
        "torchvision": "image_processing_medmoe.MedMoEImageProcessor",
        "pil": "image_processing_medmoe.MedMoEImageProcessorPil",
    }
    assert (tmp_path / "image_processing_medmoe.py").is_file()


def test_to_rgb_alone(photo):
    assert to_rgb(photo).dtype == torch.uint8
    assert to_rgb(RAMP).dtype == torch.float32
    with pytest.raises(ValueError, match="str is not a PIL image"):
        to_rgb("photo.png")


LOAD_WITHOUT_TORCHVISION = """
import sys
for name in list(sys.modules):
    if name.partition(".")[0] == "torchvision":
        sys.modules[name] = None
import numpy as np
from transformers import AutoImageProcessor
folder, arrays, result = sys.argv[1:]
pictures = list(np.load(arrays).values())
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = processor(pictures, return_tensors="np").pixel_values
np.savez(result, pixels=pixels, name=type(processor).__name__)
"""


def test_clean_process_without_torchvision(photo, tmp_path):
    """A machine with neither medmoe_hf nor torchvision gets the PIL backend and the same numbers."""
    MedMoEImageProcessor(size=64).save_pretrained(tmp_path / "saved")
    np.savez(tmp_path / "in.npz", photo, photo.astype(np.uint16) * 200)
    run_clean(LOAD_WITHOUT_TORCHVISION, "saved", "in.npz", "out.npz", folder=tmp_path, HF_HOME=tmp_path / "hf")
    result = np.load(tmp_path / "out.npz")
    assert result["name"] == "MedMoEImageProcessorPil"
    expected = MedMoEImageProcessor(size=64)([photo, photo.astype(np.uint16) * 200], return_tensors="np").pixel_values
    np.testing.assert_allclose(result["pixels"], expected, atol=1e-5)
