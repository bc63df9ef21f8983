"""DICOM files: decoding, contrast, colours and orientation of one frame.

Warnings and errors name the file and never quote its header, which holds names and dates of patients.
"""

import math
from typing import Any

import numpy as np

from .dicom_files_medmoe import (
    PIXEL_KEYWORDS,
    DicomFrames,
    directions_of,
    first_number,
    header_numbers,
    header_value,
    pixel_spacing,
    read_dataset,
    with_syntax,
)
from .errors_medmoe import ImageError, MedicalImageError, MissingPackageError
from .medical_pixels_medmoe import (
    BYTES_PER_PIXEL,
    WINDOWS,
    MedicalImage,
    Windows,
    apply_percentiles,
    apply_windows,
    check_size,
    choose_frame,
    missing_package,
    to_float32,
    to_uint8_or_float32,
    too_many_bytes,
    turn_upright,
)
from .modalities_medmoe import modality_of_dicom

try:
    import pydicom
    import pydicom.pixels
except ImportError:  # only DICOM needs it
    pydicom = None

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and, with a dot and a number, its multi-frame forms


def is_dicom_dataset(source: Any) -> bool:
    """Returns whether this is a `pydicom` dataset or a `DicomFrames`; False without the package."""
    return pydicom is not None and isinstance(source, (pydicom.Dataset, DicomFrames))


def read_dicom(
    source: Any, name: str, frame: int | None, windows: Windows, named: bool, max_pixels: int
) -> MedicalImage:
    """Reads one frame; see `read_medical_image`.

    Args:
        source: A path, the bytes of a file, a `pydicom` dataset, or a `DicomFrames`.
        name: How error messages name the source.
        frame: Index of the frame; None for the middle one.
        windows: No windows, one, or three.
        named: Whether there is a window of `WINDOWS` among them, which are for Hounsfield units only.
        max_pixels: Limit of the pixels of a frame.

    Returns:
        The image, upright.
    """
    if pydicom is None:
        raise MissingPackageError(missing_package("DICOM", "pydicom"))
    by_frame = source if isinstance(source, DicomFrames) else None
    dataset = by_frame.header(max_pixels) if by_frame else source
    if not isinstance(dataset, pydicom.Dataset):
        dataset = read_dataset(source, name, max_pixels)
    if by_frame is None and not any(key in dataset for key in PIXEL_KEYWORDS):
        raise MedicalImageError(
            f"{name} holds no pixel data: it is a report or a plan, or no DICOM file, or cut off; "
            "choose an image of the series, or export it again"
        )
    dataset = with_syntax(dataset)
    frames = int(first_number(header_numbers(dataset, "NumberOfFrames", 0)) or 1)
    chosen = choose_frame(frame, frames, name)
    modality = modality_of_dicom(dataset.get("Modality"))
    photometric = _photometric(dataset)
    pixels_of, index = (dataset, chosen) if by_frame is None else by_frame.frame(chosen)
    stored = _stored(with_syntax(pixels_of), name, index, photometric, max_pixels)

    if photometric == "PALETTE COLOR":
        pixels = _palette(dataset, stored)
    elif stored.ndim == 3:
        colours = stored[..., :3]
        white = 2 ** _bits_stored(dataset) - 1
        if white == 2**16 - 1 and colours.max() < 2**12:  # 12 bits that are declared as 16, nearly black as such
            white = 2**12 - 1
        pixels = to_uint8_or_float32(colours, white)
    else:
        rescale = _rescale(dataset, chosen, name)
        hounsfield = modality == "ct" and _holds_hounsfield_units(dataset, rescale)
        if named and not hounsfield:
            windows = []
        pixels = _gray(dataset, stored, chosen, windows, rescale, hounsfield, modality == "mri", photometric)
    spacing = pixel_spacing(dataset, chosen)
    directions = directions_of(dataset, chosen)
    if directions is not None:
        pixels, turned = turn_upright(pixels, *directions)
        pixels = np.ascontiguousarray(pixels)
        spacing = spacing[::-1] if spacing and turned else spacing
    return MedicalImage(pixels, modality, spacing, chosen, frames)


def _photometric(dataset: Any) -> str:
    photometric = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
    if photometric:
        return photometric
    if int(dataset.get("SamplesPerPixel") or 1) == 1:
        return "MONOCHROME2"
    uids = pydicom.uid
    return "YBR_FULL_422" if dataset.file_meta.TransferSyntaxUID in uids.JPEGTransferSyntaxes[:2] else "RGB"


def _bits_stored(dataset: Any) -> int:
    return int(dataset.get("BitsStored") or dataset.get("BitsAllocated") or 16)


def _stored(dataset: Any, name: str, frame: int, photometric: str, max_pixels: int) -> np.ndarray:
    """Decodes the stored pixels of one frame: (H, W), or (H, W, 3) in RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        raise MedicalImageError(
            f"{name} is stored as {syntax.name}, which pydicom cannot decode; export it as another transfer syntax"
        ) from None
    if not available:
        raise MissingPackageError(f"{name} is stored as {syntax.name}; {missing_package('that', 'pylibjpeg')}")
    check_size(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), name, max_pixels)
    # Decoder options that replace missing or misspelt values of the header.
    options: dict[str, Any] = {
        "samples_per_pixel": int(dataset.get("SamplesPerPixel") or 1),
        "photometric_interpretation": photometric,
        "planar_configuration": int(dataset.get("PlanarConfiguration") or 0),
        "pixel_representation": int(dataset.get("PixelRepresentation") or 0),
        "bits_stored": _bits_stored(dataset),
    }
    # In old files the pixels occupy the upper of the allocated bits.
    above = 0
    if "PixelData" in dataset and (not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless):
        above = int(dataset.get("HighBit") or 0) + 1 - options["bits_stored"]
        above = above if 0 < above <= int(dataset.get("BitsAllocated") or 0) - options["bits_stored"] else 0
    try:
        if syntax.is_encapsulated:
            _check_compressed(dataset, name, frame, max_pixels)
        stored: np.ndarray = pydicom.pixels.pixel_array(
            dataset, index=frame, **{**options, "bits_stored": options["bits_stored"] + above}
        )
    except ImageError:
        raise
    except Exception as error:  # here the message is about the pixels' format alone
        raise MedicalImageError(
            f"{name} is damaged or cut off; export or copy it again. "
            f"Its pixels ({syntax.name}) cannot be decoded: {error}"
        ) from error
    if above:
        low, high = _stored_range(dataset)
        # Some headers say so wrongly: then the lower bits are in use, and the upper ones are not.
        if (stored & (2**above - 1)).any() and low <= stored.min() and stored.max() <= high:
            return stored
        return stored >> above
    return stored


def _stored_range(dataset: Any) -> tuple[int, int]:
    bits = _bits_stored(dataset)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.get("PixelRepresentation") else (0, 2**bits - 1)


def _check_compressed(dataset: Any, name: str, frame: int, max_pixels: int) -> None:
    """Rejects a frame whose codestream declares too large a size: decoders allocate by it, not by the header."""
    offsets = [dataset.get(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    content = pydicom.encaps.get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(first_number(header_numbers(dataset, "NumberOfFrames", 0)) or 1),
        extended_offsets=tuple(offsets) if all(offsets) else None,  # type: ignore[arg-type, unused-ignore]
    )
    if dataset.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        limit = max_pixels * BYTES_PER_PIXEL
        # Two bytes decode to 128 at most. Larger frames are counted, which takes as long as decoding them.
        if 64 * len(content) > limit and _run_lengths(content) > limit:
            raise too_many_bytes(name, limit)
    else:
        check_size(*_codestream_size(content), name, max_pixels)


def _codestream_size(content: bytes) -> tuple[int, int]:
    """Returns the width and height that JPEG, JPEG-LS or JPEG 2000 data declare; (0, 0) if they are not found."""
    start = content.find(b"\xff\x4f\xff\x51")  # JPEG 2000: start of codestream, size
    if start >= 0:
        right, bottom, left, top = (
            int.from_bytes(content[start + at : start + at + 4], "big") for at in (8, 12, 16, 20)
        )
        return max(right - left, 0), max(bottom - top, 0)
    at = 2
    while content[:2] == b"\xff\xd8" and at + 9 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF:
            break
        # A frame header: of JPEG, but for tables (C4), an extension (C8) and arithmetic conditions (CC); of JPEG-LS.
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return int.from_bytes(content[at + 7 : at + 9], "big"), int.from_bytes(content[at + 5 : at + 7], "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return 0, 0


def _run_lengths(content: bytes) -> int:
    """Returns the decoded size in bytes of a run-length encoded frame (PS3.5 annex G)."""
    total, at = 0, 64
    while at < len(content):
        count = content[at]
        if count < 128:
            total, at = total + count + 1, at + count + 2
        else:
            total, at = total + (257 - count if count > 128 else 0), at + (2 if count > 128 else 1)
    return total


def _rescale(dataset: Any, frame: int, name: str) -> tuple[float, float] | None:
    """Returns slope and intercept; None where there are none, or the slope is 0, which would erase the image."""
    found = []
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        numbers = header_numbers(dataset, keyword, frame)
        found.append(first_number(numbers))
        if numbers and found[-1] is None and str(header_value(dataset, keyword, frame)).strip("\\[]', "):
            raise MedicalImageError(f"{name} cannot be read as DICOM (ValueError): its {keyword} is not a number")
    slope, intercept = found
    if slope == 0 or (slope is None and intercept is None):
        return None
    return 1.0 if slope is None else slope, intercept or 0.0


def _holds_hounsfield_units(dataset: Any, rescale: tuple[float, float] | None) -> bool:
    """Returns whether the values of a CT, after its modality LUT, are Hounsfield units; not so in screenshots."""
    if rescale is not None or dataset.get("ModalityLUTSequence"):
        return True
    if first_number(header_numbers(dataset, "RescaleSlope", 0)) == 0:
        return False
    kinds = dataset.get("ImageType") or ()
    captured = str(dataset.get("SOPClassUID", "")).startswith(_SECONDARY_CAPTURE) and (
        dataset.get("ConversionType") or "SECONDARY" in ([kinds] if isinstance(kinds, str) else kinds)
    )
    return not captured and _bits_stored(dataset) > 8


def _gray(
    dataset: Any,
    stored: np.ndarray,
    frame: int,
    windows: Windows,
    rescale: tuple[float, float] | None,
    hounsfield: bool,
    by_percentiles: bool,
    photometric: str,
) -> np.ndarray:
    padding = _padding(dataset, stored)
    if dataset.get("ModalityLUTSequence"):
        item = dataset.ModalityLUTSequence[0]
        values, changed = _look_up(stored, *_table(item.LUTDescriptor, item.LUTData, dataset)), True
        integers = True
    else:
        slope, intercept = rescale or (1.0, 0.0)
        values, changed = stored.astype(np.float64) * slope + intercept, (slope, intercept) != (1, 0)
        integers = slope == int(slope)
    bits = _bits_stored(dataset)
    display_lut = None if windows or by_percentiles else _display_lut(dataset, frame)
    window = _window_of_file(dataset, frame)
    if windows:
        image = apply_windows(values, windows)
    elif by_percentiles:
        image = apply_percentiles(values, ~padding)
    elif display_lut is not None:
        table, first, white = display_lut
        image = (_look_up(values, table, first) / white).clip(0, 1)
    elif window is not None:
        function = str(header_value(dataset, "VOILUTFunction", frame) or "LINEAR").strip().upper()
        image = _apply_own_window(values, *window, function, integers)
    elif hounsfield:
        image = apply_windows(values, [WINDOWS["mediastinum"]])
    elif bits <= 8 and not changed and values.min() >= 0:
        image = (values / (2**bits - 1)).clip(0, 1)
    else:
        image = apply_percentiles(values, ~padding)
    image = 1 - image if photometric == "MONOCHROME1" else image
    image[padding] = 0
    return to_float32(image)


def _window_of_file(dataset: Any, frame: int) -> tuple[float, float] | None:
    """Returns the first valid centre and width."""
    pairs = zip(
        header_numbers(dataset, "WindowCenter", frame), header_numbers(dataset, "WindowWidth", frame), strict=False
    )
    return next((pair for pair in pairs if math.isfinite(sum(pair)) and pair[1] > 0), None)


def _display_lut(dataset: Any, frame: int) -> tuple[np.ndarray, int, int] | None:
    """Returns the first VOI LUT with data: its entries, the input value of the first entry, and the white level."""
    for item in header_value(dataset, "VOILUTSequence", frame) or ():
        descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
        if not descriptor or data is None or not len(data):
            continue
        table, first = _table(descriptor, data, dataset)
        used = max(int(table.max()).bit_length(), 1)
        declared = int(descriptor[2])
        # If entries do not use the upper bits of their declared range, the image would be nearly black.
        return table, first, 2 ** (declared if used <= declared <= used + 1 else used) - 1
    return None


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """Returns an (H, W) bool mask of pixels without a measurement, such as those outside a CT's circle."""
    prefix = {"f4": "Float", "f8": "DoubleFloat"}.get(stored.dtype.str[1:], "")
    ends = []
    for keyword in (f"{prefix}PixelPaddingValue", f"{prefix}PixelPaddingRangeLimit"):
        value = dataset.get(keyword)
        if not isinstance(value, (int, float)):
            break
        ends.append(stored.dtype.type(value) if prefix else _as_stored(int(value), dataset))
    if not ends:
        return np.zeros(stored.shape, dtype=bool)
    return (stored >= min(ends)) & (stored <= max(ends))


def _as_stored(value: int, dataset: Any) -> int:
    """Returns a padding value in the pixels' type: some writers store it with the other signedness."""
    low, high = _stored_range(dataset)
    for period in (2**16, 2 ** _bits_stored(dataset)):
        wrapped = (value - low) % period + low
        if not low <= value <= high and low <= wrapped <= high:
            return wrapped
    return value


def _table(descriptor: Any, data: Any, dataset: Any) -> tuple[np.ndarray, int]:
    """Returns the entries of a LUT and the input value of the first one."""
    count, first = (int(value) for value in descriptor[:2])
    count = count or 2**16
    if isinstance(data, bytes):
        wide = ">u2" if dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRBigEndian else "<u2"
        data = np.frombuffer(data, dtype=wide if len(data) >= 2 * count else "u1")
    return np.asarray(data).reshape(-1)[:count], first


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Applies a LUT to values, as float64; values beyond its ends get the first or last entry.

    pydicom's own functions index with the type of the entries, so that 8-bit tables with more than 256 of them wrap.
    """
    if first > values.max():  # a negative start, read as unsigned because the stored pixels are
        first -= 2**16
    entries: np.ndarray = table[(np.rint(values).astype(np.int64) - first).clip(0, len(table) - 1)]
    return entries.astype(np.float64)


def _apply_own_window(values: np.ndarray, centre: float, width: float, function: str, integers: bool) -> np.ndarray:
    """Applies the file's window by PS3.3 C.11.2.1.2 and C.11.2.1.3; returns values in 0..1."""
    if function == "SIGMOID":
        sigmoid: np.ndarray = 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
        return sigmoid
    # The standard's linear function is for integers and has no width below 1.
    if function == "LINEAR_EXACT" or width < 1 or (width == 1 and not integers):
        return apply_windows(values, [(centre, width)])
    if width == 1:
        return (values > centre - 0.5).astype(np.float64)
    return apply_windows(values, [(centre - 0.5, width - 1)])


def _palette(dataset: Any, stored: np.ndarray) -> np.ndarray:
    if "RedPaletteColorLookupTableData" not in dataset:  # segmented tables
        colours = pydicom.pixels.apply_color_lut(stored, dataset)[..., :3]
        return to_uint8_or_float32(colours, int(np.iinfo(colours.dtype).max))
    tables = [
        _table(
            getattr(dataset, f"{colour}PaletteColorLookupTableDescriptor"),
            getattr(dataset, f"{colour}PaletteColorLookupTableData"),
            dataset,
        )
        for colour in ("Red", "Green", "Blue")
    ]
    colours = np.stack([_look_up(stored, *table) for table in tables], axis=-1)
    # Some writers store 8-bit colours in 16-bit tables.
    return to_uint8_or_float32(colours, 255 if max(table.max() for table, _ in tables) <= 255 else 2**16 - 1)
