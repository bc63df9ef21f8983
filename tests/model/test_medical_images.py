"""DICOM and NIfTI: files written here, whose pictures are known, and the real ones that come with pydicom-data."""

import copy
import functools
import gzip
import io
import itertools
import json
import logging
import struct
import traceback
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from clean_process import run_clean
from PIL import Image

from medmoe_hf.errors import ImageTooLargeError, MedicalImageError
from medmoe_hf.model import dicom_medmoe, nifti_medmoe
from medmoe_hf.model.configuration_medmoe import MedMoEVisionConfig
from medmoe_hf.model.image_files_medmoe import load_image
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil, resize_heatmaps
from medmoe_hf.model.medical_images_medmoe import WINDOWS, is_medical_image, read_medical_image
from medmoe_hf.model.processing_medmoe import MedMoEProcessor
from medmoe_hf.model.tokenization_medmoe import MedMoETokenizer

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

try:
    import data_store

    REAL = Path(data_store.__file__).parent / "data"
except ImportError:
    REAL = None

BACKENDS = {"torchvision": MedMoEImageProcessor, "pil": MedMoEImageProcessorPil}
RAMP = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)  # 2000 gray levels


@pytest.fixture(params=BACKENDS, scope="module")
def processor(request):
    return BACKENDS[request.param]()


def dicom(stored, modality="OT", syntax=ExplicitVRLittleEndian, **tags):
    """A dataset as a device would write it, of pixels (H, W), or (N, H, W) or (H, W, 3) where the tags say so."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3.4"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Secret^Name", "SECRET-ID", "19010203"
    dataset.Modality = modality
    bits = stored.dtype.itemsize * 8
    values = {
        "Rows": stored.shape[1 if "NumberOfFrames" in tags else 0],
        "Columns": stored.shape[2 if "NumberOfFrames" in tags else 1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        **tags,
    }
    values["HighBit"] = values["BitsStored"] - 1
    if values["SamplesPerPixel"] == 3:
        values["PlanarConfiguration"] = 0
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    return dataset


def written(dataset):
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def item(**tags):
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def lut(first, bits, table):
    result = item(LUTDescriptor=[len(table), first, bits])
    result.add_new("LUTData", "OW", np.asarray(table, "<u2").tobytes())
    return result


def shown(source, **kwargs):
    """The picture of a medical file, checked for what holds for all of them."""
    pixels = read_medical_image(source, **kwargs).pixels
    assert pixels.flags.c_contiguous
    assert pixels.dtype == np.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    return pixels


def between(values, low, high):
    return np.clip((np.asarray(values, dtype=float) - low) / (high - low), 0, 1)


def by_percentiles(values):
    return between(values, *np.percentile(values, (1, 99)))


# --- gray values


def test_16_bits_are_not_saturated():
    stored = RAMP * 30
    pixels = shown(dicom(stored, "DX"))
    np.testing.assert_allclose(pixels, by_percentiles(stored), atol=1e-6)
    assert len(np.unique(pixels)) > 1900


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["u", "i"])
def test_rescale_and_the_usual_window_of_ct(bits, kind):
    dtype = np.dtype(f"{kind}{1 if bits == 8 else 2}")
    low, high = (0, 2**bits - 1) if kind == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stored = np.linspace(low, high, 300).astype(dtype).reshape(15, 20)
    dataset = dicom(stored, "CT", BitsStored=bits, RescaleSlope="2", RescaleIntercept="-300")
    np.testing.assert_allclose(shown(dataset), between(stored * 2.0 - 300, -160, 240), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("lung", -1350, 150),
        ("mediastinum", -160, 240),
        ("abdomen", -150, 250),
        ("liver", -20, 140),
        ("bone", -500, 1300),
        ("Brain", 0, 80),
        ("subdural", -20, 180),
        ("stroke", 20, 60),
    ],
)
def test_windows_by_name(name, low, high):
    hounsfield = RAMP.astype(np.int16) - 1000
    dataset = dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=300, WindowWidth=7)
    np.testing.assert_allclose(shown(dataset, window=name), between(hounsfield, low, high), atol=1e-6)
    centre, width = WINDOWS[name.lower()]
    for numbers in ((centre, width), [centre, width]):
        np.testing.assert_array_equal(shown(dataset, window=numbers), shown(dataset, window=name))


def test_every_window_is_tested():
    (names,) = (mark.args[1] for mark in test_windows_by_name.pytestmark)
    assert {name.lower() for name, _, _ in names} == set(WINDOWS)


def test_three_windows_are_three_channels():
    dataset = dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000, PhotometricInterpretation="MONOCHROME1")
    pixels = shown(dataset, window=["lung", (40, 400), "bone"])
    assert pixels.shape == (40, 50, 3)
    for channel, window in enumerate(("lung", "mediastinum", "bone")):
        np.testing.assert_array_equal(pixels[..., channel], shown(dataset, window=window))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(700, 900), (2000, 4096), (1000, 1)])
def test_the_files_own_window(function, centre, width):
    if width == 1 and function in ("LINEAR_EXACT", "SIGMOID"):
        pytest.skip("pydicom divides by zero or less there")
    for modality in ("CR", "CT"):
        dataset = dicom(RAMP, modality, BitsStored=12, WindowCenter=[centre, 5], WindowWidth=[width, 5])
        if function:
            dataset.VOILUTFunction = function
        expected = pydicom.pixels.apply_windowing(RAMP, dataset) / 4095
        np.testing.assert_allclose(shown(dataset), expected, atol=1e-6)


def test_a_window_without_width_is_none():
    dataset = dicom(RAMP, "CR", WindowCenter=40, WindowWidth=0)
    np.testing.assert_allclose(shown(dataset), by_percentiles(RAMP), atol=1e-6)


@pytest.mark.parametrize("first", [0, 500, -200])
def test_voi_lut(first):
    table = (np.arange(1000) ** 2 // 1000).astype(np.uint16)
    intercept = -200
    dataset = dicom(RAMP, "CR", RescaleSlope=1, RescaleIntercept=intercept, WindowCenter=1, WindowWidth=2)
    # As files have it: the start is unsigned where the stored pixels are.
    dataset.VOILUTSequence = [lut(first % 2**16, 10, table)]
    entry = np.clip(RAMP.astype(int) + intercept - first, 0, 999)
    np.testing.assert_allclose(shown(written(dataset)), table[entry] / 1023, atol=1e-6)
    np.testing.assert_allclose(shown(dataset, window=(100, 50)), between(RAMP - 200.0, 75, 125), atol=1e-6)


def test_modality_lut():
    table = np.arange(3000, 1000, -1).astype(np.uint16)
    dataset = dicom(RAMP, "CR", WindowCenter=2000.5, WindowWidth=2001)
    dataset.ModalityLUTSequence = [lut(0, 16, table)]
    np.testing.assert_allclose(shown(written(dataset)), between(table[RAMP], 1000, 3000), atol=1e-6)


def test_monochrome1_is_inverted():
    for tags in ({}, {"WindowCenter": 500, "WindowWidth": 900}, {"BitsStored": 12}):
        positive = shown(dicom(RAMP, "CR", **tags))
        negative = shown(dicom(RAMP, "CR", PhotometricInterpretation="MONOCHROME1", **tags))
        np.testing.assert_allclose(negative, 1 - positive, atol=1e-6)
        assert negative[0, 0] == 1
        assert negative[-1, -1] == 0


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(photometric):
    stored = RAMP.astype(np.int16)
    stored[:, 30:] = -2000
    stored[:, 40:] = -1900
    tags = {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1900}
    pixels = shown(written(dicom(stored, "DX", PhotometricInterpretation=photometric, **tags)))
    expected = by_percentiles(stored[:, :30])
    np.testing.assert_allclose(pixels[:, :30], expected if photometric[-1] == "2" else 1 - expected, atol=1e-6)
    assert not pixels[:, 30:].any()


def test_mr_goes_by_percentiles():
    dataset = dicom(RAMP, "MR", WindowCenter=600, WindowWidth=1600)
    np.testing.assert_allclose(shown(dataset), by_percentiles(RAMP), atol=1e-6)
    # Hounsfield units mean nothing here, numbers do.
    np.testing.assert_array_equal(shown(dataset, window="lung"), shown(dataset))
    np.testing.assert_allclose(shown(dataset, window=(600, 1000)), between(RAMP, 100, 1100), atol=1e-6)


def test_8_bits_without_a_window_stay_as_they_are():
    stored = np.arange(30, 60, dtype=np.uint8).reshape(5, 6)
    np.testing.assert_allclose(shown(dicom(stored, "US")), stored / 255, atol=1e-6)
    np.testing.assert_allclose(shown(dicom(stored, "MR")), by_percentiles(stored), atol=1e-6)


def test_plain_and_nearly_plain_pictures():
    stored = np.full((40, 40), 700, np.uint16)
    assert not shown(dicom(stored, "CR")).any()
    stored[3, 4] = 900
    pixels = shown(dicom(stored, "CR"))
    assert pixels[3, 4] == 1
    assert pixels.sum() == 1


def test_float_pixels_with_holes():
    dataset = dicom(RAMP, "OT")
    values = RAMP.astype(np.float32) / 7
    values[0, :3] = np.nan, np.inf, -np.inf
    del dataset.PixelData, dataset.BitsStored
    dataset.BitsAllocated, dataset.FloatPixelData = 32, values.tobytes()
    expected = between(values, *np.percentile(values[np.isfinite(values)], (1, 99)))
    np.testing.assert_allclose(shown(dataset), np.nan_to_num(expected, nan=0), atol=1e-5)


# --- headers that contradict the standard, or themselves


@pytest.mark.parametrize(
    "name",
    [
        "01-voi-lut-12-bits-in-16",
        "02-window-width-below-1",
        "03-high-bit-15-of-12-stored",
        "04-padding-us-63536-signed-pixels",
        "05-float-pixel-padding-value",
        "06-decimal-comma",
        "07-window-of-empty-values",
        "08-ct-secondary-capture",
        "22-voi-lut-item-without-data",
    ],
)
def test_files_from_bug_reports(name):
    folder = Path(__file__).parents[1] / "fixtures" / "cases" / name
    files = sorted(folder.glob("*.dcm"))
    assert files
    for file in files:
        expected = folder / ("expected.npy" if file.name == "a.dcm" else "b.dcm.expected.npy")
        np.testing.assert_allclose(shown(file), np.load(expected), atol=5e-3)


@pytest.mark.parametrize(
    ("declared", "last", "white"),
    [
        (16, 4095, 4095),
        (16, 16383, 16383),
        (16, 16384, 65535),
        (16, 65535, 65535),
        (12, 1023, 1023),
        (12, 2047, 4095),
        (12, 4095, 4095),
        (8, 255, 255),
        (8, 4095, 4095),
        (10, 600, 1023),
    ],
)
def test_range_of_a_voi_lut(declared, last, white):
    """White is what the descriptor declares, unless the entries use less than a quarter of that, or more than all."""
    table = np.linspace(0, last, 2000).astype(np.uint16)
    dataset = dicom(RAMP, "CR")
    dataset.VOILUTSequence = [item(LUTExplanation="empty"), lut(0, declared, table)]
    np.testing.assert_allclose(shown(written(dataset)), table[RAMP] / white, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "slope", "low", "high"),
    [
        ("0.5", "0.001", 0.75, 1.25),
        ("1", "0.001", 0.5, 1.5),
        ("0.5", "1", 0.75, 1.25),
        ("1.5", "0.001", 0.25, 0.75),  # the standard's: centre - 0.5, width - 1
    ],
)
def test_narrow_windows(width, slope, low, high):
    dataset = dicom(RAMP, "OT", RescaleSlope=slope, RescaleIntercept="0", WindowCenter="1", WindowWidth=width)
    np.testing.assert_allclose(shown(dataset), between(RAMP * float(slope), low, high), atol=1e-6)


def test_a_window_of_one_whole_number_is_a_threshold():
    dataset = dicom(RAMP, "OT", WindowCenter=1000, WindowWidth=1)
    np.testing.assert_array_equal(shown(dataset), RAMP >= 1000)


@pytest.mark.parametrize(
    ("centre", "width", "low", "high"),
    [
        (["", "40"], ["", "400"], -160, 240),
        (["40", "300"], ["", "1000"], -200, 800),
        (["40"], ["400", "1000"], -160, 240),
        ("40", "", None, None),
        ("", "400", None, None),
        (["", ""], ["", ""], None, None),
    ],
)
def test_empty_and_half_windows(centre, width, low, high):
    dataset = dicom(RAMP, "CR", RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=centre, WindowWidth=width)
    dataset.VOILUTFunction = "LINEAR_EXACT"
    expected = by_percentiles(RAMP) if low is None else between(RAMP - 1000.0, low, high)
    np.testing.assert_allclose(shown(written(dataset)), expected, atol=1e-6)


def with_text(dataset, keyword, text):
    """The file of a dataset, with a decimal string that no library would write."""
    setattr(dataset, keyword, "1" * len(text))
    return written(dataset).replace(b"DS" + struct.pack("<H", len(text)) + b"1" * len(text), encoded(text), 1)


def encoded(text):
    return b"DS" + struct.pack("<H", len(text)) + text.encode()


def test_numbers_that_are_none():
    for text, intercept in (("-100,5", -100.5), ("-100.5", -100.5)):
        file = with_text(dicom(RAMP, "CT", RescaleSlope=1), "RescaleIntercept", text)
        assert encoded(text) in file
        np.testing.assert_allclose(shown(file), between(RAMP + intercept, -160, 240), atol=1e-6)
    for text, spacing in (("0.5,0.25", (0.5, 0.25)), ("0,5\\0,25", (0.5, 0.25)), ("none", None), ("0.5 ", None)):
        assert read_medical_image(with_text(dicom(RAMP, "CT"), "PixelSpacing", text)).spacing == spacing
    with pytest.raises(MedicalImageError, match="its RescaleSlope is not a number"):
        read_medical_image(with_text(dicom(RAMP, "CT"), "RescaleSlope", "none"))
    np.testing.assert_allclose(
        shown(with_text(dicom(RAMP, "CR"), "WindowWidth", "none")), by_percentiles(RAMP), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["u", "i"])
@pytest.mark.parametrize(("bits", "high"), [(12, 15), (12, 13), (10, 14)])
def test_pixels_in_the_upper_bits(bits, high, kind):
    values = np.linspace(0, 2**bits - 1, 2000).astype(np.uint16).reshape(RAMP.shape)
    signed = ((values.astype(np.int32) ^ 2 ** (bits - 1)) - 2 ** (bits - 1)) if kind == "i" else values
    dataset = dicom((values << (high + 1 - bits)).astype(f"{kind}2"), "CR", BitsStored=bits)
    dataset.HighBit = high
    np.testing.assert_allclose(shown(dataset, window=(100, 2**bits)), shown_by(signed, 100, 2**bits), atol=1e-6)


def shown_by(values, centre, width):
    return between(values, centre - width / 2, centre + width / 2)


def test_a_high_bit_that_is_wrong():
    """Values in the lower 12 bits, though the header says the upper ones."""
    dataset = dicom(RAMP, "CR", BitsStored=12)
    dataset.HighBit = 15
    np.testing.assert_allclose(shown(dataset), by_percentiles(RAMP), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "bits", "stored", "written_as"),
    [
        ("i2", 16, -2000, 63536),
        ("i2", 12, -2000, 63536),
        ("i2", 12, -2000, 2096),
        ("u2", 16, 63536, 63536),
        ("i2", 16, -2000, -2000),
        ("i1", 8, -100, 65436),
    ],
)
def test_padding_in_another_sign(dtype, bits, stored, written_as):
    pixels = (RAMP % 100 + 10).astype(dtype)
    pixels[:, 30:] = stored
    dataset = dicom(pixels, "MR", BitsStored=bits)
    dataset.add_new("PixelPaddingValue", "US" if written_as >= 0 else "SS", written_as)
    picture = shown(dataset)
    assert not picture[:, 30:].any()
    np.testing.assert_allclose(picture[:, :30], by_percentiles(pixels[:, :30]), atol=1e-6)


@pytest.mark.parametrize(("prefix", "dtype"), [("Float", "f4"), ("DoubleFloat", "f8")])
def test_padding_of_float_pixels(prefix, dtype):
    values = RAMP.astype(dtype) / 7
    values[:, 30:], values[:, 40:] = -9999.1, -8888.8
    dataset = dicom(RAMP, "OT")
    del dataset.PixelData, dataset.BitsStored
    dataset.BitsAllocated = values.itemsize * 8
    for keyword, value in (
        ("PixelData", values.tobytes()),
        ("PixelPaddingValue", -9999.1),
        ("PixelPaddingRangeLimit", -8888.8),
    ):
        setattr(dataset, prefix + keyword, value)
    picture = shown(written(dataset))
    assert not picture[:, 30:].any()
    np.testing.assert_allclose(picture[:, :30], by_percentiles(values[:, :30]), atol=1e-5)


def test_screenshots_of_ct_hold_no_hounsfield_units():
    eight_bits = (RAMP // 8).astype(np.uint8)
    plain = {"ConversionType": "WSD"}
    derived = {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}
    for window in (None, "lung", ("lung", "bone", "brain")):
        for tags in (plain, derived):
            np.testing.assert_allclose(
                shown(dicom(RAMP, "CT", **tags), window=window), by_percentiles(RAMP), atol=1e-6
            )
        np.testing.assert_allclose(shown(dicom(eight_bits, "CT"), window=window), eight_bits / 255, atol=1e-6)
    # Numbers are in the file's own units, and a rescale makes Hounsfield units of it.
    np.testing.assert_allclose(shown(dicom(RAMP, "CT", **plain), window=(100, 50)), between(RAMP, 75, 125), atol=1e-6)
    rescaled = dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000, **plain)
    np.testing.assert_allclose(shown(rescaled), between(RAMP - 1000.0, -160, 240), atol=1e-6)
    # An axial slice that a workstation derived is no screenshot.
    slices = dicom(RAMP, "CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2", **derived)
    np.testing.assert_allclose(shown(slices), between(RAMP, -160, 240), atol=1e-6)


def test_a_slope_of_zero_is_no_rescale():
    for modality in ("CR", "CT"):
        dataset = dicom(RAMP, modality, RescaleSlope=0, RescaleIntercept=-1000)
        for window in (None, "lung"):
            np.testing.assert_allclose(shown(dataset, window=window), by_percentiles(RAMP), atol=1e-6)


@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE"])
def test_only_the_photometric_interpretation_inverts(shape):
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        dataset = dicom(RAMP, "DX", PhotometricInterpretation=photometric)
        expected = shown(dataset)
        dataset.PresentationLUTShape = shape
        np.testing.assert_array_equal(shown(dataset), expected)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_without_photometric_interpretation():
    gray = dicom(RAMP, "CR")
    del gray.PhotometricInterpretation, gray.SamplesPerPixel
    np.testing.assert_allclose(shown(written(gray)), by_percentiles(RAMP), atol=1e-6)
    colours = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = dicom(colours, "US", SamplesPerPixel=3)
    del picture.PhotometricInterpretation, picture.PlanarConfiguration
    np.testing.assert_array_equal(read_medical_image(written(picture)).pixels, colours)
    assert "PhotometricInterpretation" not in picture
    # JPEG files hold YCbCr; pylibjpeg and Pillow give them as they are.
    colours[:] = (200, 60, 20)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "jpeg", quality=95)
    picture = compressed(dicom(colours, "US", SamplesPerPixel=3), JPEGBaseline8Bit, file.getvalue())
    del picture.PhotometricInterpretation
    assert np.abs(read_medical_image(picture).pixels.astype(int) - colours).max() < 6
    lower_case = dicom(RAMP, "CR")
    lower_case.PhotometricInterpretation = "monochrome1"
    np.testing.assert_allclose(shown(lower_case), 1 - by_percentiles(RAMP), atol=1e-6)


# --- limits


def compressed(dataset, syntax, *frames):
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = pydicom.encaps.encapsulate(list(frames))
    dataset["PixelData"].VR = "OB"
    return dataset


def deflated(dataset, filling=b""):
    """A file by PS3.5 A.5, with what `filling` adds to its pixels."""
    dataset.PixelData += filling
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    return written(dataset)


def traced(call):
    """What a call raises, and how many bytes it held at most."""
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLargeError) as caught:
            call()
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_too_many_pixels_in_a_header():
    wide = dicom(RAMP, "CR")
    wide.Rows = wide.Columns = 16384
    for dataset in (wide, compressed(copy.deepcopy(wide), RLELossless, b"\0" * 64)):
        message, held = traced(lambda dataset=dataset: read_medical_image(dataset))
        assert "the dataset has 16384 x 16384 pixels, more than `max_pixels` 100000000 allows" in message
        assert held < 10e6
    assert read_medical_image(dicom(RAMP), max_pixels=2000).pixels.shape == (40, 50)
    with pytest.raises(ImageTooLargeError, match="50 x 40 pixels"):
        read_medical_image(dicom(RAMP), max_pixels=1999)


def test_frames_that_a_file_does_not_have():
    dataset = dicom(RAMP, "US")
    dataset.NumberOfFrames = 2_000_000_000
    with pytest.raises(MedicalImageError, match="damaged or cut off"):
        read_medical_image(dataset)


def test_deflated_files(tmp_path):
    whole = deflated(dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000))
    (tmp_path / "a.dcm").write_bytes(whole)
    for source in (whole, tmp_path / "a.dcm"):
        np.testing.assert_allclose(shown(source), between(RAMP - 1000.0, -160, 240), atol=1e-6)
    bomb = deflated(dicom(RAMP, "CT"), bytes(40_000_000))
    assert len(bomb) < 50_000
    (tmp_path / "bomb.dcm").write_bytes(bomb)
    for source in (bomb, tmp_path / "bomb.dcm"):
        message, held = traced(lambda source=source: read_medical_image(source, max_pixels=10_000))
        assert "inflates to more than 160000 bytes" in message
        assert held < 10e6
    with pytest.raises(MedicalImageError, match="cannot be read as DICOM"):
        read_medical_image(whole[:-200])


def test_run_lengths():
    pixels = np.repeat(np.arange(40, dtype=np.uint8)[:, None], 50, axis=1)
    plain = dicom(pixels, "US")
    encoded = dicom(pixels, "US")
    encoded.compress(RLELossless)
    np.testing.assert_array_equal(shown(encoded), shown(plain))
    # One segment of runs of 128 zeros, two bytes each.
    segment = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 200_000
    bomb = compressed(dicom(pixels, "US"), RLELossless, segment)
    message, held = traced(lambda: read_medical_image(bomb, max_pixels=10_000))
    assert "inflates to more than 160000 bytes" in message
    assert held < 10e6


@pytest.mark.parametrize("form", ["JPEG", "JPEG2000"])
def test_compressed_frames_larger_than_their_header(form):
    """The decoders allocate by what the compressed data say."""
    file = io.BytesIO()
    Image.new("L", (600, 500)).save(file, form, **({"no_jp2": True} if form == "JPEG2000" else {}))
    syntax = JPEGBaseline8Bit if form == "JPEG" else JPEG2000Lossless
    dataset = compressed(dicom(np.zeros((4, 4), np.uint8), "US"), syntax, file.getvalue())
    with pytest.raises(ImageTooLargeError, match="the dataset has 600 x 500 pixels"):
        read_medical_image(dataset, max_pixels=10_000)
    dataset.Rows, dataset.Columns = 500, 600
    pytest.importorskip("pylibjpeg")
    assert read_medical_image(dataset).pixels.shape == (500, 600)


# --- frames


def test_frames():
    stored = np.stack([RAMP + 500 * frame for frame in range(5)])
    dataset = dicom(stored, "US", NumberOfFrames=5)
    for frame, chosen in ((None, 2), (0, 0), (4, 4)):
        image = read_medical_image(dataset, frame, window=(2000, 4000))
        assert (image.frame, image.frames) == (chosen, 5)
        np.testing.assert_allclose(image.pixels, between(stored[chosen], 0, 4000), atol=1e-6)
    for frame in (5, -1):
        with pytest.raises(ValueError, match=f"the dataset has no frame {frame}: it has 5, and they count from 0"):
            read_medical_image(dataset, frame)
    one = read_medical_image(dicom(RAMP))
    assert (one.frame, one.frames) == (0, 1)


def test_enhanced_files_have_values_for_each_frame():
    dataset = dicom(np.stack([RAMP, RAMP]), "CT", NumberOfFrames=2, RescaleSlope=9, PixelSpacing=[9, 9])
    dataset.SharedFunctionalGroupsSequence = [item(PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25])])]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=intercept)],
            FrameVOILUTSequence=[item(WindowCenter=100.5, WindowWidth=width)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=[side, 0, 0, 0, 1, 0])],
        )
        for intercept, width, side in ((-1000, 201, 1), (-500, 401, -1))
    ]
    image = read_medical_image(written(dataset), frame=0)
    np.testing.assert_allclose(image.pixels, between(RAMP - 1000.0, 0, 200), atol=1e-6)
    assert image.spacing == (0.5, 0.25)
    np.testing.assert_allclose(shown(dataset, frame=1), between(RAMP - 500.0, -100, 300)[:, ::-1], atol=1e-6)


# --- colours


def test_rgb():
    colours = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}
    image = read_medical_image(dicom(colours, "SM", **tags), window="lung")
    assert image.pixels.dtype == np.uint8
    np.testing.assert_array_equal(image.pixels, colours)
    # 12 bits that are declared as 16 would be nearly black.
    narrow = dicom(colours.astype(np.uint16) * 16, "OP", BitsStored=16, **tags)
    np.testing.assert_allclose(shown(narrow), colours * 16.0 / 4095, atol=1e-6)
    bright = colours.astype(np.uint16) * 200
    np.testing.assert_allclose(shown(dicom(bright, "OP", **tags)), bright / 65535, atol=1e-6)
    wide = colours.astype(np.uint16) * 16
    np.testing.assert_allclose(shown(dicom(wide, "OP", BitsStored=12, **tags)), colours * 16.0 / 4095, atol=1e-6)
    frames = dicom(np.stack([colours, 255 - colours]), "US", NumberOfFrames=2, **tags)
    np.testing.assert_array_equal(read_medical_image(frames, 0).pixels, colours)


def test_ybr():
    colours = np.random.default_rng(0).integers(40, 200, (7, 9, 3), dtype=np.uint8)
    stored = np.asarray(Image.fromarray(colours).convert("YCbCr"))
    image = read_medical_image(dicom(stored, "US", SamplesPerPixel=3, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(image.pixels.astype(int) - colours).max() <= 2  # YCbCr in 8 bits rounds


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("form", ["16 bits", "8 bits in 16", "8 bits"])
def test_palette(syntax, form):
    draw = np.random.default_rng(0)
    table = draw.integers(0, 256, (3, 200)) * (257 if form == "16 bits" else 1)
    stored = draw.integers(0, 256, (12, 13)).astype(np.uint8)
    dataset = dicom(stored, "US", syntax, PhotometricInterpretation="PALETTE COLOR")
    dtype = "u1" if form == "8 bits" else ">u2" if syntax == ExplicitVRBigEndian else "<u2"
    for colour, entries in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(dataset, f"{colour}PaletteColorLookupTableDescriptor", [200, 10, 8 if form == "8 bits" else 16])
        dataset.add_new(f"{colour}PaletteColorLookupTableData", "OW", entries.astype(dtype).tobytes())
    pixels = read_medical_image(written(dataset) if syntax == ExplicitVRLittleEndian else dataset).pixels
    expected = table[:, np.clip(stored.astype(int) - 10, 0, 199)].transpose(1, 2, 0)
    if form == "16 bits":
        np.testing.assert_allclose(pixels, expected / 65535, atol=1e-6)
    else:
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)


# --- what the header tells


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("CR", "xray"),
        ("DX", "xray"),
        ("MG", "xray"),
        ("CT", "ct"),
        ("MR", "mri"),
        ("US", "ultrasound"),
        ("SM", "histopathology"),
        ("OP", "fundus"),
        ("NM", None),
        ("OT", None),
        ("IVUS", "ultrasound"),
        ("", None),
    ],
)
def test_modality(code, name):
    assert read_medical_image(dicom(RAMP, code)).modality == name


def test_spacing():
    assert read_medical_image(dicom(RAMP)).spacing is None
    both = dicom(RAMP, PixelSpacing=[0.7, 0.5], ImagerPixelSpacing=[0.2, 0.1])
    assert read_medical_image(both).spacing == (0.7, 0.5)
    both.PixelSpacing = [0, 0]
    assert read_medical_image(both).spacing == (0.2, 0.1)
    regions = [
        item(PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=0.05, PhysicalDeltaY=0.02),
        item(PhysicalUnitsXDirection=4, PhysicalUnitsYDirection=0, PhysicalDeltaX=1.0, PhysicalDeltaY=1.0),
    ]
    echo = dicom(RAMP, "US", SequenceOfUltrasoundRegions=regions)
    assert read_medical_image(echo).spacing == pytest.approx((0.2, 0.5))
    regions[1].PhysicalUnitsXDirection = regions[1].PhysicalUnitsYDirection = 3
    assert read_medical_image(echo).spacing is None


@pytest.mark.parametrize(
    ("rows_run_to", "columns_run_to", "turned"),
    [
        ("P", "L", lambda a: a),
        ("A", "L", lambda a: a[::-1]),
        ("P", "R", lambda a: a[:, ::-1]),
        ("A", "R", lambda a: a[::-1, ::-1]),
        ("L", "P", lambda a: a.T),
        ("F", "L", lambda a: a),
        ("H", "R", lambda a: a[::-1, ::-1]),
        ("F", "P", lambda a: a),
        ("A", "H", lambda a: a.T[::-1, ::-1]),
    ],
)
def test_slices_are_turned_upright(rows_run_to, columns_run_to, turned):
    """The words are those of PS3.3 C.7.6.2.1.1: x grows to the left, y to the back, z to the head."""
    steps = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}
    cosines = [*steps[columns_run_to], *steps[rows_run_to]]
    image = read_medical_image(dicom(RAMP, "MR", ImageOrientationPatient=cosines, PixelSpacing=[2, 3]))
    np.testing.assert_allclose(image.pixels, turned(by_percentiles(RAMP)), atol=1e-6)
    assert image.spacing == ((2, 3) if image.pixels.shape == RAMP.shape else (3, 2))


def test_oblique_slices_go_by_the_nearest_axes():
    oblique = dicom(RAMP, "MR", ImageOrientationPatient=[-0.8, 0.6, 0, 0, 0, -1])
    np.testing.assert_allclose(shown(oblique), by_percentiles(RAMP)[:, ::-1], atol=1e-6)
    between_axes = dicom(RAMP, "MR", ImageOrientationPatient=[-0.9, 0.1, 0.42, -0.8, 0.2, -0.56])
    np.testing.assert_allclose(shown(between_axes), by_percentiles(RAMP), atol=1e-6)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (["L", "F"], lambda a: a),
        (["R", "F"], lambda a: a[:, ::-1]),
        (["LF", "HR"], lambda a: a[::-1]),
        (["A", "R"], lambda a: a),  # a mammogram
        (["A", "F"], lambda a: a),
        ("", lambda a: a),
    ],
)
def test_frontal_radiographs_are_turned_upright(orientation, turned):
    dataset = dicom(RAMP, "CR", PatientOrientation=orientation)
    np.testing.assert_allclose(shown(dataset), turned(by_percentiles(RAMP)), atol=1e-6)


# --- sources


def test_sources_of_dicom(tmp_path):
    dataset = dicom(RAMP, "CT")
    whole = written(dataset)
    before = dataset.to_json()
    for name in ("slice.dcm", "IM000001", "picture.png"):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "OLD.DCM").write_bytes(whole[132:])  # without the mark
    dataset_alone = dicom(RAMP, "CT")
    del dataset_alone.file_meta
    sources = [dataset, dataset_alone, whole, bytearray(whole), memoryview(whole), str(tmp_path / "slice.dcm")]
    sources += [tmp_path / name for name in ("slice.dcm", "IM000001", "picture.png", "OLD.DCM")]
    for source in sources:
        assert is_medical_image(source)
        np.testing.assert_array_equal(shown(source), shown(dataset))
    assert dataset.to_json() == before
    assert not hasattr(dataset_alone, "file_meta")


def test_what_is_no_medical_image(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text"))
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8bno gzip")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("a.png", "a.gz", "broken.gz", "empty", "absent.dcm"):
        assert not is_medical_image(tmp_path / name)
        assert not is_medical_image(str(tmp_path / name))
    for other in (b"", b"abc", RAMP, torch.zeros(3, 4), Image.new("L", (3, 3)), None, 5, [written(dicom(RAMP))]):
        assert not is_medical_image(other)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_medical_image(tmp_path / "absent.dcm")
    with pytest.raises(MedicalImageError, match=r"a\.png' is neither DICOM nor NIfTI"):
        read_medical_image(tmp_path / "a.png")
    with pytest.raises(MedicalImageError, match="the file given as bytes is neither"):
        read_medical_image(b"abc")


# --- NIfTI


def volume(shape=(5, 6, 7), axes="RAS", **kwargs):
    """An image whose stored axes run to the sides named; voxels of 1, 2, 3 mm along the patient's axes."""
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, side in enumerate(axes):
        axis = next(index for index, pair in enumerate(("LR", "PA", "IS")) if side in pair)
        affine[axis, column] = (axis + 1) * (1 if side in "RAS" else -1)
    return nibabel.Nifti1Image(data, affine, **kwargs)


EVERY_ORIENTATION = [
    "".join(signs) for order in itertools.permutations(("LR", "PA", "IS")) for signs in itertools.product(*order)
]


@pytest.mark.parametrize("axes", EVERY_ORIENTATION)
def test_nifti_is_upright_whatever_way_it_is_stored(axes):
    image = volume(axes=axes)
    turned = nibabel.as_closest_canonical(image).get_fdata()
    depth = turned.shape[2]
    for frame in (None, 0, depth - 1):
        found = read_medical_image(image, frame, window=(105, 210))
        assert (found.frame, found.frames) == (depth // 2 if frame is None else frame, depth)
        # Rows run from front to back, columns from the patient's right to the left.
        expected = [[turned[x, y, found.frame] for x in reversed(range(turned.shape[0]))]
                    for y in reversed(range(turned.shape[1]))]  # fmt: skip
        np.testing.assert_allclose(found.pixels, between(expected, 0, 210), atol=1e-6)
        assert found.spacing == (2, 1)
        assert found.modality is None


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ASL"])
def test_a_mark_in_a_nifti_lands_where_it_belongs(axes):
    """A lesion far to the patient's right, in front, near the head: top left of a high slice."""
    lesion = np.zeros((20, 21, 22), np.uint8)
    lesion[15, 16, 17] = 200
    patient = nibabel.Nifti1Image(lesion, np.eye(4))
    stored = patient.as_reoriented(
        nibabel.orientations.ornt_transform(
            nibabel.io_orientation(patient.affine), nibabel.orientations.axcodes2ornt(axes)
        )
    )
    assert nibabel.aff2axcodes(stored.affine) == tuple(axes)
    for frame in range(22):
        marks = np.argwhere(shown(stored, frame=frame))
        assert marks.tolist() == ([[20 - 16, 19 - 15]] if frame == 17 else [])


@pytest.mark.parametrize("form", ["a.nii", "a.nii.gz", "bytes", "gzipped bytes", "bare", "second"])
def test_sources_of_nifti(tmp_path, form):
    image = volume(axes="LPS")
    expected = shown(image)
    if form == "second":
        image = nibabel.Nifti2Image(image.dataobj, image.affine)
        form = "bytes"
    if form.startswith("a."):
        source = tmp_path / form
        nibabel.save(image, source)
    else:
        source = image.to_bytes()
        source = gzip.compress(source) if "gzipped" in form else source
        if form == "bare":
            (tmp_path / "volume").write_bytes(source)
            source = str(tmp_path / "volume")
    assert is_medical_image(source)
    np.testing.assert_array_equal(shown(source), expected)


def test_contrast_of_nifti():
    image = volume((20, 30, 3))
    middle = image.get_fdata()[::-1, ::-1, 1].T
    np.testing.assert_allclose(shown(image), by_percentiles(middle), atol=1e-6)
    np.testing.assert_allclose(shown(image, window="lung"), between(middle, -1350, 150), atol=1e-6)
    image.header["cal_min"], image.header["cal_max"] = 100, 700
    np.testing.assert_allclose(shown(image), between(middle, 100, 700), atol=1e-5)
    np.testing.assert_allclose(shown(image, window=(500, 200)), between(middle, 400, 600), atol=1e-6)
    scaled = volume((20, 30, 3))
    scaled.header.set_slope_inter(0.5, -100)
    scaled = nibabel.Nifti1Image.from_bytes(scaled.to_bytes())
    np.testing.assert_allclose(
        shown(scaled, window=(50, 300)), between(scaled.get_fdata()[::-1, ::-1, 1].T, -100, 200), atol=1e-5
    )
    holes = image.get_fdata()
    holes[0] = np.nan
    pixels = shown(nibabel.Nifti1Image(holes, image.affine))
    assert not pixels[:, -1].any()
    np.testing.assert_allclose(pixels[:, :-1], by_percentiles(middle[:, :-1]), atol=1e-6)


def test_shapes_and_units_of_nifti():
    series = np.stack([volume().get_fdata(), np.zeros((5, 6, 7))], axis=-1)
    np.testing.assert_array_equal(shown(nibabel.Nifti1Image(series, volume().affine)), shown(volume()))
    flat = volume((5, 6), axes="RAS")
    assert read_medical_image(flat).pixels.shape == (6, 5)
    coronal = read_medical_image(volume((5, 1, 7)))
    assert coronal.pixels.shape == (7, 5)
    assert coronal.spacing == (3, 1)
    assert coronal.frames == 1
    sagittal = read_medical_image(volume((6, 7, 1), axes="PIR"), window=(21, 42))
    np.testing.assert_allclose(sagittal.pixels, between(np.arange(42).reshape(6, 7).T, 0, 42), atol=1e-6)
    assert sagittal.spacing == (3, 2)
    microns = volume()
    microns.header.set_xyzt_units("micron")
    assert read_medical_image(microns).spacing == pytest.approx((0.002, 0.001))
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 1, 3), dtype=np.uint8)
    rgb = colours.copy().view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    np.testing.assert_array_equal(
        read_medical_image(nibabel.Nifti1Image(rgb, np.eye(4))).pixels, colours[::-1, ::-1, 0].transpose(1, 0, 2)
    )


@pytest.mark.parametrize("damage", ["flipped", "cut", "checksum"])
def test_damaged_gzip(tmp_path, damage):
    """The checksum stands at the end, behind the slice that is shown."""
    noise = np.random.default_rng(0).integers(0, 2000, (20, 30, 40)).astype(np.int16)
    whole = bytearray(gzip.compress(nibabel.Nifti1Image(noise, np.eye(4)).to_bytes()))
    if damage == "flipped":
        whole[len(whole) * 3 // 4] ^= 16
    elif damage == "cut":
        whole = whole[:-2000]
    else:
        whole[-6] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(whole)
    for source in (bytes(whole), tmp_path / "a.nii.gz", nibabel.load(tmp_path / "a.nii.gz")):
        with pytest.raises(MedicalImageError, match="damaged or cut off"):
            read_medical_image(source, frame=2)


@pytest.mark.parametrize("axes", ["RAS", "SPR", "ASL"])
def test_gzip_in_parts(tmp_path, axes):
    """Several members in one file, filled up with zeros, and slices that lie scattered over it."""
    whole = volume((60, 50, 70), axes).to_bytes()
    parts = b"".join(gzip.compress(whole[start : start + 100_000]) for start in range(0, len(whole), 100_000))
    (tmp_path / "a.nii.gz").write_bytes(parts + bytes(300))
    for frame in (0, 33, 49):
        expected = shown(whole, frame=frame)
        np.testing.assert_array_equal(shown(tmp_path / "a.nii.gz", frame=frame), expected)
        np.testing.assert_array_equal(shown(parts, frame=frame), expected)


def test_damaged_gzip_from_a_bug_report():
    folder = Path(__file__).parents[1] / "fixtures" / "cases" / "19-nii-gz-with-a-flipped-bit"
    with pytest.raises(MedicalImageError, match=r"a\.nii\.gz' cannot be read as NIfTI"):
        read_medical_image(folder / "a.nii.gz")


def test_nifti_that_inflates_without_end(tmp_path):
    small = volume((20, 30, 4))
    endless = gzip.compress(small.to_bytes() + bytes(40_000_000))
    large = small.to_bytes()[:40] + struct.pack("<8h", 3, 2000, 1000, 1000, 1, 1, 1, 1) + small.to_bytes()[56:]
    for content, source in ((endless, "endless.nii.gz"), (gzip.compress(large), "large.nii.gz")):
        (tmp_path / source).write_bytes(content)
        given = [content, tmp_path / source]
        if source == "endless.nii.gz":
            given.append(nibabel.load(tmp_path / source))
        for one in given:
            message, held = traced(lambda one=one: read_medical_image(one, max_pixels=10_000))
            assert "inflates to more than 160000 bytes" in message
            assert held < 10e6
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(small.to_bytes()))
    assert read_medical_image(tmp_path / "a.nii.gz", max_pixels=1000).pixels.shape == (30, 20)
    with pytest.raises(ImageTooLargeError, match="20 x 30 pixels"):
        read_medical_image(small, max_pixels=500)


def test_volumes_of_datasets(processor, tmp_path):
    """What a `Nifti` column of `datasets` gives: a wrapper of a nibabel image."""
    datasets = pytest.importorskip("datasets")
    nibabel.save(volume((20, 30, 4)), tmp_path / "a.nii.gz")
    column = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.nii.gz")]}, datasets.Features(image=datasets.Nifti())
    )
    given = column[0]["image"]
    assert isinstance(given, nibabel.spatialimages.SpatialImage)
    expected = processor(tmp_path / "a.nii.gz", return_tensors="pt").pixel_values
    assert torch.equal(processor(given, return_tensors="pt").pixel_values, expected)
    image, modality = load_image(given)
    np.testing.assert_array_equal(image, shown(tmp_path / "a.nii.gz"))
    assert modality is None


def test_surfaces_are_no_pictures():
    surface = nibabel.Nifti2Image(np.zeros((1, 1, 1, 1, 4, 5), np.float32), np.eye(4))
    surface.header["intent_code"] = 3002
    with pytest.raises(MedicalImageError, match="is a CIFTI file"):
        read_medical_image(surface.to_bytes())


def test_errors_of_nifti(tmp_path):
    with pytest.raises(MedicalImageError, match="the dataset has no frame 7: it has 7"):
        read_medical_image(volume(), frame=7)
    nibabel.save(volume((50, 60, 70)), tmp_path / "cut.nii.gz")
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.nii").write_text("no volume")
    for name in ("cut.nii.gz", "text.nii"):
        with pytest.raises(MedicalImageError, match=f"{name}' cannot be read as NIfTI .*damaged or cut off"):
            read_medical_image(tmp_path / name)
    with pytest.raises(MedicalImageError, match="complex128, which are not gray values"):
        read_medical_image(nibabel.Nifti1Image(np.ones((3, 3, 3), complex), np.eye(4)))
    with pytest.raises(MedicalImageError, match="affine matrix is singular"):
        read_medical_image(nibabel.spatialimages.SpatialImage(np.ones((3, 3, 3)), np.diag([1.0, 0, 1, 1])))
    plain = nibabel.spatialimages.SpatialImage(volume().get_fdata(), volume().affine)
    np.testing.assert_array_equal(shown(plain), shown(volume()))


# --- errors


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ("lungs", "there is no window 'lungs'; known are lung, mediastinum, "),
        (["lung", "bone"], r"one window or three .* got \['lung', 'bone'\]"),
        (["lung"], "one window or three"),
        (("lung", 5, "bone"), r"a name or \(centre, width\), got 5"),
        ((40, 0), "a width above 0"),
        ((float("nan"), 10), "a finite centre"),
        (40, r"a name or \(centre, width\), got 40"),
    ],
)
def test_wrong_windows(processor, window, message):
    with pytest.raises(ValueError, match=message):
        read_medical_image(dicom(RAMP, "MR"), window=window)
    if not isinstance(window, int):
        with pytest.raises(ValueError, match=f"image 1 of the batch: .*{message}"):
            processor([RAMP, dicom(RAMP, "MR")], window=window)


def test_damaged_files_say_so_and_quote_no_patient(tmp_path, caplog):
    whole = written(dicom(RAMP, "CT", RescaleSlope="1", RescaleIntercept="0"))
    header = whole.index(RAMP.astype("<u2").tobytes())
    assert b"DS\x02\x001 " in whole
    unreadable = whole.replace(b"DS\x02\x001 ", b"DS\x02\x00xy", 1)
    cases = {
        "cut_pixels": (whole[:-100], "damaged or cut off.*Explicit VR Little Endian"),
        "cut_header": (whole[: header - 30], "holds no pixel data"),
        "cut_start": (whole[:200], "holds no pixel data|cannot be read as DICOM"),
        "no_number": (unreadable, r"cannot be read as DICOM \(ValueError\)"),
        "text": (b"no DICOM at all" * 40, "holds no pixel data|cannot be read as DICOM"),
        "empty": (b"", "holds no pixel data|cannot be read as DICOM"),
    }
    report = dicom(RAMP, "SR")
    del report.PixelData
    cases["report"] = (written(report), "holds no pixel data")
    caplog.set_level(logging.DEBUG)
    for name, (content, message) in cases.items():
        (tmp_path / f"{name}.dcm").write_bytes(content)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(MedicalImageError, match=rf"{name}\.dcm' .*({message})") as caught:
                read_medical_image(tmp_path / f"{name}.dcm")
        told = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(map(str, warned))
        assert "ecret" not in told.lower()
        assert "19010203" not in told


def test_unknown_compression():
    unknown = dicom(RAMP)
    unknown.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.4.102")  # MPEG-4 video
    with pytest.raises(MedicalImageError, match=r"MPEG-4.* which pydicom cannot decode"):
        read_medical_image(unknown)


def test_missing_packages_name_the_extra(processor, monkeypatch, tmp_path):
    (tmp_path / "a.dcm").write_bytes(written(dicom(RAMP)))
    nibabel.save(volume(), tmp_path / "a.nii.gz")
    monkeypatch.setattr(dicom_medmoe, "pydicom", None)
    monkeypatch.setattr(nifti_medmoe, "nibabel", None)
    for name, package in (("a.dcm", "pydicom"), ("a.nii.gz", "nibabel")):
        assert is_medical_image(tmp_path / name)
        for call in (read_medical_image, processor):
            with pytest.raises(ImportError, match=rf'needs the package {package}: pip install "medmoe_hf\[dicom\]"'):
                call(tmp_path / name)
    assert processor(RAMP, return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


def test_missing_codec_names_the_extra(monkeypatch):
    class Decoder:
        is_available = False

    compressed = dicom(RAMP)
    compressed.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: Decoder())
    with pytest.raises(ImportError, match=r'JPEG Lossless.*pylibjpeg: pip install "medmoe_hf\[dicom\]"'):
        read_medical_image(compressed)


# --- in the image processors


def test_a_mixed_batch(processor, tmp_path):
    ct = dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000)
    (tmp_path / "IM1").write_bytes(written(ct))
    nibabel.save(volume((20, 30, 4)), tmp_path / "a.nii.gz")
    png = io.BytesIO()
    Image.fromarray((RAMP // 8).astype(np.uint8)).save(png, "png")
    (tmp_path / "a.png").write_bytes(png.getvalue())
    images = [
        tmp_path / "IM1",
        [RAMP, written(ct), ct],
        str(tmp_path / "a.nii.gz"),
        volume((20, 30, 4, 1)),
        png.getvalue(),
        tmp_path / "a.png",
        read_medical_image(ct, window="lung"),
        dicom(RAMP[:3], "MR"),
    ]
    batch = processor(images, size=40, window="bone", input_data_format="channels_first", return_tensors="np")
    bone, nifti = between(RAMP - 1000.0, -500, 1300), between(volume((20, 30, 4)).get_fdata()[..., 2], -500, 1300)
    arrays = [bone, RAMP, bone, bone, nifti[::-1, ::-1].T, nifti[::-1, ::-1].T]
    arrays += [(RAMP // 8).astype(np.uint8)] * 2 + [between(RAMP - 1000.0, -1350, 150), by_percentiles(RAMP[:3])]
    expected = processor(arrays, size=40, return_tensors="np").pixel_values
    np.testing.assert_allclose(batch.pixel_values, expected, atol=1e-4)
    assert list(batch) == ["pixel_values"]


def test_three_windows_and_narrow_pictures(processor):
    """Three rows of three channels must not be taken for a picture with its channels first."""
    ct = dicom(RAMP[:3], "CT")
    pixels = processor(
        ct, window=("lung", "bone", (40, 400)), do_resize=False, do_normalize=False, return_tensors="np"
    ).pixel_values[0]
    assert pixels.shape == (3, 3, 50)
    for channel, (low, high) in enumerate([(-1350, 150), (-500, 1300), (-160, 240)]):
        np.testing.assert_allclose(pixels[channel], between(RAMP[:3], low, high), atol=1e-6)


def test_no_gray_level_is_lost(processor):
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    pixels = processor(dicom(RAMP, "CR", WindowCenter=1000.5, WindowWidth=2001), **options).pixel_values[0]
    np.testing.assert_allclose(pixels, np.stack([RAMP / 2000 * 255] * 3), atol=1e-4)


def test_backends_agree_on_medical_files():
    files = [
        dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000),
        dicom(RAMP, "CR", PhotometricInterpretation="MONOCHROME1"),
        dicom((RAMP % 251).astype(np.uint8), "US"),
        volume((30, 40, 3)),
    ]
    for arguments in ({}, {"pad_to_square": True}, {"window": ["lung", "mediastinum", "bone"]}):
        ours, theirs = (
            backend()(files, return_tensors="pt", return_modality=True, **arguments) for backend in BACKENDS.values()
        )
        assert (ours.pixel_values - theirs.pixel_values).abs().max() < 1e-5
        assert ours["modality"] == theirs["modality"] == ["ct", "xray", "ultrasound", None]


def test_modality_goes_to_the_model(processor):
    files = [RAMP, dicom(RAMP, "MR"), dicom(RAMP, "NM"), read_medical_image(dicom(RAMP, "DX"))]
    for tensors in (None, "pt", "np"):
        batch = processor(files, return_modality=True, return_tensors=tensors)
        assert batch["modality"] == [None, "mri", None, "xray"]
        assert MedMoEVisionConfig().modality_ids(batch["modality"], 4) == [-100, 2, -100, 0]
    assert batch.keys() == {"pixel_values", "modality"}
    assert list(processor([RAMP, dicom(RAMP, "NM")], return_modality=True)) == ["pixel_values"]
    assert list(processor(files)) == ["pixel_values"]


def test_frame_of_the_call(processor):
    stored = np.stack([RAMP, RAMP[::-1], RAMP])
    files = [dicom(stored, "US", NumberOfFrames=3), RAMP]
    frames = [processor(files, frame=frame, return_tensors="pt").pixel_values for frame in (None, 0, 1)]
    assert torch.equal(frames[0], frames[2])
    assert torch.equal(frames[1][1], frames[2][1])
    assert not torch.equal(frames[1][0], frames[2][0])
    with pytest.raises(ValueError, match="image 0 of the batch: the dataset has no frame 3"):
        processor(files, frame=3)


def test_settings_are_saved(processor, tmp_path):
    plain = json.loads(json.dumps(type(processor)().to_dict()))
    assert plain["pad_to_square"] is False
    assert plain["return_modality"] is False
    changed = type(processor)(window=("lung", (40, 400), "bone"), pad_to_square=True, return_modality=True, size=48)
    changed.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    ct = dicom(RAMP, "CT")
    expected = processor(
        ct, window=["lung", "mediastinum", "bone"], pad_to_square=True, size=48, return_tensors="pt"
    ).pixel_values
    for one in (changed, loaded):
        batch = one(ct, return_tensors="pt")
        assert torch.equal(batch.pixel_values, expected)
        assert batch["modality"] == ["ct"]
    assert not torch.equal(loaded(ct, pad_to_square=False, return_tensors="pt").pixel_values, expected)
    assert {"image_processing_medmoe.py", "medical_images_medmoe.py"} <= {path.name for path in tmp_path.iterdir()}


def test_the_whole_processor_takes_medical_files(processor, tmp_path):
    (tmp_path / "a.dcm").write_bytes(written(dicom(RAMP, "CT")))
    whole = MedMoEProcessor(type(processor)(size=32), MedMoETokenizer.from_words(["lung"], max_length=8))
    files = [RAMP, tmp_path / "a.dcm"]
    batch = whole(images=files, text=["lung"], window="lung", return_modality=True, return_tensors="pt")
    assert batch["modality"] == [None, "ct"]
    expected = whole.image_processor([RAMP, between(RAMP, -1350, 150)], return_tensors="pt").pixel_values
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-4)
    nested = whole(images=files, images_kwargs={"window": (-600, 1500)}, return_tensors="pt")
    assert torch.equal(nested["pixel_values"], batch["pixel_values"])


# --- padding


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (1, 4)])
def test_padding_is_central_and_black(processor, shape):
    picture = np.random.default_rng(0).integers(1, 256, (*shape, 3), dtype=np.uint8)
    side = max(shape)
    expected = np.zeros((side, side, 3))
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    expected[top : top + shape[0], left : left + shape[1]] = picture
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    for image in (picture, picture.astype(np.float32)):
        pixels = processor(image, pad_to_square=True, input_data_format="channels_last", **options).pixel_values[0]
        np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))
    resized = processor(picture, pad_to_square=True, input_data_format="channels_last", size=24, return_tensors="np")
    same = processor(expected.astype(np.uint8), input_data_format="channels_last", size=24, return_tensors="np")
    np.testing.assert_array_equal(resized.pixel_values, same.pixel_values)


@pytest.mark.parametrize("shape", [(300, 91), (90, 301), (120, 120)])
def test_heatmaps_come_back_through_the_padding(processor, shape):
    """A bright blob is its own heat-map: sent through the image processor and back, it must lie where it was."""
    height, width = shape
    picture = np.zeros(shape, np.uint8)
    picture[height // 4 : height // 4 + 20, width // 5 : width // 5 + 20] = 255
    options = {"do_normalize": False, "return_tensors": "pt", "size": 100}
    maps = processor(picture, pad_to_square=True, **options).pixel_values[:, :1]
    whole = MedMoEProcessor(type(processor)(), MedMoETokenizer.from_words(["lung"], max_length=8))
    back = whole.post_process_grounding(maps, [shape], pad_to_square=True)[0][0]
    assert back.shape == shape
    blob = (back > 0.5).nonzero().float()
    centre = torch.tensor([height // 4 + 9.5, width // 5 + 9.5])
    assert (blob.mean(0) - centre).abs().max() < 1
    assert len(blob) == pytest.approx(400, rel=0.15)
    # The setting of the image processor is the default, and without sizes nothing is cut off.
    padding = MedMoEProcessor(type(processor)(pad_to_square=True), whole.tokenizer)
    assert torch.equal(padding.post_process_grounding(maps, [shape])[0][0], back)
    stretched = resize_heatmaps(maps[0], shape)
    assert torch.equal(padding.post_process_grounding(maps, [shape], pad_to_square=False)[0], stretched)
    assert torch.equal(whole.post_process_grounding(maps, [shape])[0], stretched)
    assert torch.equal(padding.post_process_grounding(maps)[0], resize_heatmaps(maps[0], (224, 224)))
    assert resize_heatmaps(maps[:, :0], shape, pad_to_square=True).shape == (1, 0, *shape)


# --- from the Hub


CLEAN_PROCESS = """
import sys
import numpy as np
if sys.argv[1] == "without":
    sys.modules["pydicom"] = sys.modules["nibabel"] = None
from transformers import AutoImageProcessor
from transformers.dynamic_module_utils import check_imports
for name in ("medical_images", "dicom", "nifti"):
    check_imports(f"saved/{name}_medmoe.py")
for backend in ("torchvision", "pil"):
    processor = AutoImageProcessor.from_pretrained("saved", trust_remote_code=True, backend=backend)
    assert type(processor).__module__.startswith("transformers_modules.")
    if sys.argv[1] == "without":
        assert processor("a.png", return_tensors="np").pixel_values.shape == (1, 3, 48, 48)
        try:
            processor("a.dcm")
        except ImportError as error:
            assert 'pip install "medmoe_hf[dicom]"' in str(error), error
        else:
            raise AssertionError
    else:
        batch = processor(["a.dcm", "a.png", "a.nii.gz"], window="lung", return_modality=True, return_tensors="np")
        assert batch["modality"] == ["ct", None, None]
        np.save(backend + ".npy", batch["pixel_values"])
"""


@pytest.mark.parametrize("packages", ["with", "without"])
def test_from_the_hub(tmp_path, monkeypatch, packages):
    processor = MedMoEImageProcessor(size=48, pad_to_square=True)
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "a.dcm").write_bytes(written(dicom(RAMP, "CT", RescaleSlope=1, RescaleIntercept=-1000)))
    Image.fromarray((RAMP // 8).astype(np.uint8)).save(tmp_path / "a.png")
    nibabel.save(volume((20, 30, 4)), tmp_path / "a.nii.gz")
    run_clean(CLEAN_PROCESS, packages, folder=tmp_path, HF_HOME=tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    if packages == "with":
        expected = processor(["a.dcm", "a.png", "a.nii.gz"], window="lung", return_tensors="np").pixel_values
        for backend in BACKENDS:
            np.testing.assert_allclose(np.load(f"{backend}.npy"), expected, atol=1e-5)


# --- real files


def real(name):
    if REAL is None:
        pytest.skip("the package pydicom-data is missing")
    pytest.importorskip("pylibjpeg")
    return REAL / name


@pytest.mark.parametrize(
    ("name", "modality", "shape", "frames"),
    [
        ("RG1_J2KR.dcm", "xray", (1955, 1841), 1),
        ("RG3_J2KR.dcm", "xray", (1760, 1760), 1),
        ("693_J2KR.dcm", "ct", (512, 512), 1),
        ("explicit_VR-UN.dcm", "ct", (512, 512), 1),
        ("bad_sequence.dcm", "ct", (512, 512), 1),
        ("MR2_J2KR.dcm", "mri", (1024, 1024), 1),
        ("MR-SIEMENS-DICOM-WithOverlays.dcm", "mri", (484, 484), 1),
        ("JPGLosslessP14SV1_1s_1f_8b.dcm", "ultrasound", (768, 1024), 1),
        ("color3d_jpeg_baseline.dcm", "ultrasound", (480, 640, 3), 120),
        ("US1_J2KR.dcm", "ultrasound", (480, 640, 3), 1),
        ("gdcm-US-ALOKA-16.dcm", "ultrasound", (480, 640, 3), 1),
        ("color-px.dcm", "ultrasound", (120, 256, 3), 1),
        ("JPEG-LL.dcm", None, (1024, 256), 1),
    ],
)
def test_real_files(name, modality, shape, frames):
    image = read_medical_image(real(name))
    assert (image.modality, image.pixels.shape, image.frames) == (modality, shape, frames)
    assert image.frame == frames // 2
    picture = image.pixels / (255 if image.pixels.dtype == np.uint8 else 1)
    assert picture.std() > 0.03
    assert len(np.unique(image.pixels)) >= 30


@functools.cache
def pixels_of(name):
    return read_medical_image(real(name)).pixels


def region(name, rows, columns):
    """Mean of a part of a picture, its edges given in fractions of height and width."""
    pixels = pixels_of(name)
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels
    height, width = pixels.shape[:2]
    part = pixels[int(rows[0] * height) : int(rows[1] * height), int(columns[0] * width) : int(columns[1] * width)]
    return float(part.mean())


def test_the_chest_is_upright_and_positive():
    lungs = region("RG1_J2KR.dcm", (0.22, 0.32), (0.22, 0.32)), region("RG1_J2KR.dcm", (0.22, 0.32), (0.62, 0.7))
    mediastinum = region("RG1_J2KR.dcm", (0.5, 0.7), (0.48, 0.55))
    below_the_diaphragm = region("RG1_J2KR.dcm", (0.8, 0.95), (0.15, 0.35))
    assert max(lungs) + 0.1 < min(mediastinum, below_the_diaphragm)
    # The heart lies on the patient's left, which is the right of the picture.
    assert region("RG1_J2KR.dcm", (0.62, 0.7), (0.6, 0.68)) > region("RG1_J2KR.dcm", (0.62, 0.7), (0.36, 0.39)) + 0.02


def test_the_legs_letter_can_be_read():
    """The plate was read from behind: stored, the R is mirrored; its upright stroke belongs on the left."""
    image = read_medical_image(real("RG3_J2KR.dcm"))
    columns = np.flatnonzero((image.pixels[1400:1480, 540:640] > 0.4).sum(axis=0) > 45)
    inked = np.flatnonzero((image.pixels[1400:1480, 540:640] > 0.4).any(axis=0))
    assert len(columns)
    assert columns.mean() < inked.mean()


@pytest.mark.parametrize("name", ["693_J2KR.dcm", "explicit_VR-UN.dcm", "bad_sequence.dcm"])
def test_patients_lie_on_their_backs(name):
    """The bone next to the table, or the table itself, is below; the second file is stored upside down."""
    hard = read_medical_image(real(name), window="bone").pixels > 0.45
    rows = np.flatnonzero(hard.any(axis=1))
    assert rows.mean() > 0.4 * len(hard)
    if name != "bad_sequence.dcm":
        assert rows.max() > 0.7 * len(hard)


def test_the_heads_skull_is_white_and_its_air_black():
    pixels = read_medical_image(real("693_J2KR.dcm")).pixels
    assert pixels[:40].max() == 0
    assert (pixels == 1).mean() > 0.03
    brain = pixels[200:300, 200:300]
    assert 0.15 < brain.mean() < 0.7
    assert brain.std() < 0.2


def test_pictures_do_not_depend_on_the_compression():
    for one, other in (("RG3_J2KR.dcm", "RG3_UNCR.dcm"), ("693_J2KR.dcm", "693_UNCR.dcm")):
        np.testing.assert_array_equal(read_medical_image(real(one)).pixels, read_medical_image(real(other)).pixels)
    lossless, original = (read_medical_image(real(f"US1_{form}.dcm")).pixels for form in ("J2KR", "UNCR"))
    np.testing.assert_array_equal(lossless, original)
    lossy = read_medical_image(real("US1_J2KI.dcm")).pixels
    assert np.abs(lossy.astype(int) - original).mean() < 3
    big, little = (read_medical_image(real(f"gdcm-US-ALOKA-16{end}.dcm")).pixels for end in ("_big", ""))
    np.testing.assert_array_equal(big, little)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm"])
def test_files_that_come_with_pydicom(processor, name):
    path = pydicom.data.get_testdata_file(name, download=False)
    batch = processor(path, return_modality=True, return_tensors="pt")
    assert batch["modality"] == [name[:2].lower().replace("mr", "mri")]
    assert batch["pixel_values"].std() > 0.3
    with pytest.raises(MedicalImageError, match=r"MR_truncated\.dcm' is damaged or cut off"):
        read_medical_image(pydicom.data.get_testdata_file("MR_truncated.dcm", download=False))
