"""DICOM and NIfTI files: one picture ready for the image processor, and what the header says about it.

Warnings and errors name the file and never quote its header, which holds names and dates of patients.
"""

import copy
import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .modalities_medmoe import modality_of_dicom

try:
    import pydicom
    import pydicom.pixels
except ImportError:  # only DICOM needs it
    pydicom = None
try:
    import nibabel
    import nibabel.affines
    import nibabel.spatialimages
except ImportError:  # only NIfTI needs it
    nibabel = None  # type: ignore[assignment, unused-ignore]

WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-600, 1500),
    "mediastinum": (40, 400),
    "abdomen": (50, 400),
    "liver": (60, 160),
    "bone": (400, 1800),
    "brain": (40, 80),
    "subdural": (80, 200),
    "stroke": (40, 40),
}
"""Centre and width of the usual CT windows, in Hounsfield units."""

MAX_PIXELS = 100_000_000
"""Pixels of the largest image that is decoded by default; larger ones are taken for decompression bombs. A file may
inflate to 16 bytes for each of them."""

_PERCENTILES = (1, 99)
_HEAD = 1024  # bytes that tell the format; NIfTI's last mark ends at 348, also after decompression of this many
_DICOM_NAMES = (".dcm", ".dicom")
_NIFTI_NAMES = (".nii", ".nii.gz")
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_CENTIMETRES = 3  # of the ultrasound regions' PhysicalUnits (PS3.3 C.8.5.5.1.15)
_Windows = list[tuple[float, float]]


class ImageError(OSError, ValueError):
    """An image that cannot be used; the message names the file, the fault and, where there is one, a way out.

    Readers of files expect an `OSError`, users of image processors a `ValueError`: it is both.
    """


class ImageTooLargeError(ImageError):
    """An image with more pixels, or a file that inflates to more bytes, than allowed."""


class MedicalImageError(ImageError):
    """A DICOM or NIfTI file that gives no picture."""


@dataclass(eq=False)
class MedicalImage:
    """One picture of a medical file.

    Args:
        pixels: gray (H, W) float32 in 0..1; (H, W, 3) float32 in 0..1 for three windows and for colours of more than
            8 bits; (H, W, 3) uint8 RGB for colours of 8 bits. Upright, so rows and columns may be turned against those
            stored: heat-maps of the picture lie on these pixels. Black is 0, also in MONOCHROME1 files.
        modality: `"xray"`, `"ct"`, `"mri"`, `"ultrasound"`, `"histopathology"` or `"fundus"` by the header's Modality;
            None where that is another one or missing, and for NIfTI, which has none.
        spacing: millimetres per pixel, from row to row and from column to column; None where the file does not tell.
            For projection images without a calibration it is that of the detector.
        frame: which frame (NIfTI: axial slice, counted from the feet) this is, from 0.
        frames: how many the file has.
    """

    pixels: np.ndarray
    modality: str | None
    spacing: tuple[float, float] | None
    frame: int
    frames: int


def is_medical_image(source: Any) -> bool:
    """Whether `read_medical_image` is the reader for this. Reads at most the first kilobyte of a file.

    True for existing files that are DICOM or NIfTI by their first bytes or by name (.dcm, .dicom, .nii, .nii.gz), for
    bytes of such files, `pydicom` datasets and `nibabel` images. Neither package is needed to tell.
    """
    return _kind(source) is not None


def read_medical_image(
    source: Any,
    frame: int | None = None,
    window: str | Sequence[Any] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> MedicalImage:
    """Read one picture of a DICOM or NIfTI file, upright, with its contrast as a radiologist would set it.

    Gray DICOM goes through the modality LUT (or rescale slope and intercept) and then, without `window`: MR by
    percentiles; others by the file's own VOI LUT or window (its first); CT without one by `"mediastinum"`; pictures of
    8 bits or less as they are; the rest by percentiles. Percentiles are the 1st and 99th of the frame, padding left
    out. MONOCHROME1 is inverted after that, and padding is black. Palettes and YBR become RGB, and no window changes
    colours.

    Slices are turned as radiologists look at them, by DICOM's ImageOrientationPatient and NIfTI's affine: head (of
    axial slices: front) on top, the patient's right (of sagittal slices: front) on the left. So are frontal
    radiographs, by PatientOrientation. Everything else stays as stored.

    NIfTI: an axial slice, or the only one of a volume of one slice; the first volume of a series. Without `window` by
    the header's display range (`cal_min`, `cal_max`), else by percentiles.

    Args:
        source: a path, the bytes of a file, a `pydicom` dataset or a `nibabel` image; files need no particular name.
        frame: which frame of a multi-frame DICOM file (of a tiled slide: which tile) or which axial slice, from 0;
            None for the middle one.
        window: centre and width, such as `(40, 400)`, in the file's own units (after the modality LUT): values from
            centre - width/2 to centre + width/2 spread from black to white. Or a name of `WINDOWS`: these are in
            Hounsfield units and hold for CT and NIfTI, while other DICOM is read as with None. Or three of either,
            for three channels.

    Raises:
        ImportError: the package that reads the format, or this file's compression, is missing.
        OSError: the file is missing or may not be read.
        ValueError: an unknown window; or (as `MedicalImageError`) a file that is neither DICOM nor NIfTI, damaged, cut
            off or without pixels, or a frame that it does not have.
    """
    windows, named = _windows(window)
    name = _name(source)
    kind = _kind(source)
    if kind is None:
        if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
            raise FileNotFoundError(f"{name}: there is no such file")
        raise MedicalImageError(f"{name} is neither DICOM nor NIfTI")
    if kind == "dicom" and pydicom is None:
        raise ImportError(_missing("DICOM", "pydicom"))
    if kind == "nifti" and nibabel is None:
        raise ImportError(_missing("NIfTI", "nibabel"))
    try:
        if kind == "nifti":
            return _read_nifti(source, name, frame, windows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote the header
            return _read_dicom(source, name, frame, windows, named)
    except (MedicalImageError, ImportError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # parsers raise a dozen types, and their messages quote the header: so no `from error`
        raise MedicalImageError(
            f"{name} cannot be read as {'DICOM' if kind == 'dicom' else 'NIfTI'} ({type(error).__name__}): "
            "it is damaged or cut off; export or copy it again"
        ) from None


def _missing(what: str, package: str) -> str:
    return f'reading {what} needs the package {package}: pip install "medmoe_hf[dicom]"'


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fsdecode(source))
    return "the file given as bytes" if isinstance(source, (bytes, bytearray, memoryview)) else "the dataset"


def _kind(source: Any) -> str | None:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _kind_of_bytes(bytes(source[:_HEAD]))
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            return None
        with open(source, "rb") as file:
            kind = _kind_of_bytes(file.read(_HEAD))
        name = os.fsdecode(source).lower()
        by_name = "dicom" if name.endswith(_DICOM_NAMES) else "nifti" if name.endswith(_NIFTI_NAMES) else None
        return kind or by_name
    if pydicom is not None and isinstance(source, pydicom.Dataset):
        return "dicom"
    if nibabel is not None and isinstance(source, nibabel.spatialimages.SpatialImage):
        return "nifti"
    return None


def _kind_of_bytes(head: bytes) -> str | None:
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD)
        except zlib.error:
            return None
    return "nifti" if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0" else None


def _windows(window: Any) -> tuple[_Windows, bool]:
    """The windows asked for, one or three or none, and whether there is one by name among them."""
    if window is None:
        return [], False
    if not hasattr(window, "__len__"):
        raise ValueError(f"a window is a name or (centre, width), got {window!r}")
    if isinstance(window, str) or (len(window) == 2 and not any(isinstance(part, str) for part in window)):
        window = [window]
    elif len(window) != 3:
        raise ValueError(f"one window or three are possible, for one channel or three, got {window!r}")
    return [_window(one) for one in window], any(isinstance(one, str) for one in window)


def _window(window: Any) -> tuple[float, float]:
    if isinstance(window, str):
        if window.strip().lower() not in WINDOWS:
            raise ValueError(f"there is no window {window!r}; known are {', '.join(WINDOWS)}, or give (centre, width)")
        return WINDOWS[window.strip().lower()]
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError):
        raise ValueError(f"a window is a name or (centre, width), got {window!r}") from None
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise ValueError(f"a window needs a finite centre and a width above 0, got {window!r}")
    return centre, width


def _chosen(frame: int | None, frames: int, name: str) -> int:
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        raise MedicalImageError(f"{name} has no frame {frame}: it has {frames}, and they count from 0")
    return frame


def _through(values: np.ndarray, windows: _Windows) -> np.ndarray:
    """Values (H, W) as (H, W) or, for three windows, (H, W, 3), in 0..1."""
    channels = [((values - centre) / width + 0.5).clip(0, 1) for centre, width in windows]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def _by_percentiles(values: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Values (H, W) in 0..1, from percentile to percentile of the finite ones and those to keep; constant ones: 0."""
    counted = np.isfinite(values) if keep is None else np.isfinite(values) & keep
    if not counted.any():
        return np.zeros_like(values)
    low, high = np.percentile(values[counted], _PERCENTILES)
    if low == high:  # a small mark on a plain ground
        low, high = values[counted].min(), values[counted].max()
    return np.zeros_like(values) if low == high else ((values - low) / (high - low)).clip(0, 1)


def _upright(plane: np.ndarray, axes: Sequence[int], signs: Sequence[float]) -> tuple[np.ndarray, bool]:
    """A picture (H, W, ...) as radiologists look at it, and whether rows became columns for that.

    Args:
        plane: any picture.
        axes: of the patient, that growing rows and growing columns run along: 0 for right, 1 front, 2 head.
        signs: above 0 where they run to that side, below 0 where they run to the other.
    """
    turned = axes[0] < axes[1]
    if turned:
        plane, signs = plane.swapaxes(0, 1), signs[::-1]
    return np.flip(plane, tuple(axis for axis in range(2) if signs[axis] > 0)), turned


def _finished(picture: np.ndarray) -> np.ndarray:
    # NIfTI writers mark what lies outside the body with NaN.
    return np.ascontiguousarray(np.nan_to_num(picture, nan=0.0), dtype=np.float32)


# --- DICOM


def _read_dicom(source: Any, name: str, frame: int | None, windows: _Windows, named: bool) -> MedicalImage:
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    # Without `force` files of older devices, which lack the mark, would be refused.
    dataset = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source, force=True)
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise MedicalImageError(
            f"{name} holds no pixel data: it is a report or a plan, or no DICOM file, or cut off; "
            "choose an image of the series, or export it again"
        )
    dataset = _with_syntax(dataset)
    frames = int(dataset.get("NumberOfFrames") or 1)
    chosen = _chosen(frame, frames, name)
    modality = modality_of_dicom(dataset.get("Modality"))
    stored = _stored(dataset, name, chosen)

    photometric = str(dataset.get("PhotometricInterpretation", "")).strip().upper()
    if photometric == "PALETTE COLOR":
        pixels = _palette(dataset, stored)
    elif stored.ndim == 3:
        pixels = _eight_bits_or_floats(stored[..., :3], 2 ** int(dataset.BitsStored) - 1)
    else:
        if named and modality != "ct":
            windows = []
        pixels = _gray(dataset, stored, chosen, modality, windows, inverted=photometric == "MONOCHROME1")
    spacing = _spacing(dataset, chosen)
    directions = _directions(dataset, chosen)
    if directions is not None:
        pixels, turned = _upright(pixels, *directions)
        pixels = np.ascontiguousarray(pixels)
        spacing = spacing[::-1] if spacing and turned else spacing
    return MedicalImage(pixels, modality, spacing, chosen, frames)


def _directions(dataset: Any, frame: int) -> tuple[list[int], list[float]] | None:
    """Where growing rows and columns run to, as `_upright` takes it; None where that is unknown or in between."""
    cosines = _numbers(dataset, "ImageOrientationPatient", frame)
    if len(cosines) == 6:
        # DICOM counts to the left and to the back; a step to the next row goes along the second triple.
        steps = np.array([cosines[3:], cosines[:3]]) * (-1, -1, 1)
        axes = np.abs(steps).argmax(axis=1)
        return None if axes[0] == axes[1] else (axes.tolist(), steps[(0, 1), axes].tolist())
    letters = dataset.get("PatientOrientation") or ""
    if len(letters) == 2 and letters[0][:1] in ("L", "R") and letters[1][:1] in ("F", "H"):
        return [2, 0], [1 if letters[1][0] == "H" else -1, 1 if letters[0][0] == "R" else -1]
    return None


def _with_syntax(dataset: Any) -> Any:
    """The dataset, or a shallow copy with a transfer syntax: the decoder needs one, and old files have none."""
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and meta.get("TransferSyntaxUID"):
        return dataset
    uids = pydicom.uid
    big_endian = dataset.original_encoding[1] is False
    dataset = copy.copy(dataset)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRBigEndian if big_endian else uids.ExplicitVRLittleEndian
    return dataset


def _stored(dataset: Any, name: str, frame: int) -> np.ndarray:
    """Pixels of one frame as stored: (H, W), or (H, W, 3) in RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        raise MedicalImageError(
            f"{name} is stored as {syntax.name}, which pydicom cannot decode; export it as another transfer syntax"
        ) from None
    if not available:
        raise ImportError(f"{name} is stored as {syntax.name}; {_missing('that', 'pylibjpeg')}")
    try:
        return pydicom.pixels.pixel_array(dataset, index=frame)
    except Exception as error:  # here the message is about the pixels' format alone
        raise MedicalImageError(
            f"{name} is damaged or cut off; export or copy it again. "
            f"Its pixels ({syntax.name}) cannot be decoded: {error}"
        ) from error


def _tag(dataset: Any, keyword: str, frame: int) -> Any:
    """A value of the header: this frame's own in enhanced multi-frame files, else that of all frames, or None."""
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence) or []
        for element in groups[index] if index < len(groups) else ():
            if element.VR == "SQ" and element.value and keyword in element.value[0]:
                return element.value[0][keyword].value
    return dataset.get(keyword)


def _numbers(dataset: Any, keyword: str, frame: int) -> list[float]:
    value = _tag(dataset, keyword, frame)
    if value is None or value == "":
        return []
    return [float(value)] if isinstance(value, (str, int, float)) else [float(one) for one in value]


def _gray(
    dataset: Any, stored: np.ndarray, frame: int, modality: str | None, windows: _Windows, inverted: bool
) -> np.ndarray:
    padding = _padding(dataset, stored)
    values, changed = _in_units(dataset, stored, frame)
    bits = int(dataset.get("BitsStored") or 16)
    display_lut = dataset.get("VOILUTSequence")
    centres, widths = (_numbers(dataset, key, frame)[:1] for key in ("WindowCenter", "WindowWidth"))
    if windows:
        picture = _through(values, windows)
    elif modality == "mri":
        picture = _by_percentiles(values, ~padding)
    elif display_lut:
        item = display_lut[0]
        picture = _looked_up(values, *_table(item.LUTDescriptor, item.LUTData, dataset))
        picture = (picture / (2 ** int(item.LUTDescriptor[2]) - 1)).clip(0, 1)
    elif centres and widths and widths[0] > 0:
        function = str(_tag(dataset, "VOILUTFunction", frame) or "LINEAR").strip().upper()
        picture = _own_window(values, centres[0], widths[0], function)
    elif modality == "ct":
        picture = _through(values, [WINDOWS["mediastinum"]])
    elif bits <= 8 and not changed and values.min() >= 0:
        picture = (values / (2**bits - 1)).clip(0, 1)
    else:
        picture = _by_percentiles(values, ~padding)
    picture = 1 - picture if inverted else picture
    picture[padding] = 0
    return _finished(picture)


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that hold no measurement, such as those outside a CT's circle."""
    bounds = [dataset.get(key) for key in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [int(bound) for bound in bounds if isinstance(bound, int)]
    if not isinstance(bounds[0], int):
        return np.zeros(stored.shape, dtype=bool)
    return (stored >= min(ends)) & (stored <= max(ends))


def _in_units(dataset: Any, stored: np.ndarray, frame: int) -> tuple[np.ndarray, bool]:
    """Pixels (H, W) float64 in the file's units (Hounsfield for CT), and whether those differ from what is stored."""
    if dataset.get("ModalityLUTSequence"):
        item = dataset.ModalityLUTSequence[0]
        return _looked_up(stored, *_table(item.LUTDescriptor, item.LUTData, dataset)), True
    slope = (_numbers(dataset, "RescaleSlope", frame) or [1.0])[0]
    intercept = (_numbers(dataset, "RescaleIntercept", frame) or [0.0])[0]
    return stored.astype(np.float64) * slope + intercept, (slope, intercept) != (1, 0)


def _table(descriptor: Any, data: Any, dataset: Any) -> tuple[np.ndarray, int]:
    """The entries of a LUT, and the value that the first of them stands for."""
    count, first = (int(value) for value in descriptor[:2])
    count = count or 2**16
    if isinstance(data, bytes):
        wide = ">u2" if dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRBigEndian else "<u2"
        data = np.frombuffer(data, dtype=wide if len(data) >= 2 * count else "u1")
    return np.asarray(data).reshape(-1)[:count], first


def _looked_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Values through a LUT, as float64; those beyond its ends get the entries there.

    pydicom's own functions index in the type of the entries, so that tables of 8 bits with more than 256 of them wrap.
    """
    if first > values.max():  # a negative start, read as unsigned because the stored pixels are
        first -= 2**16
    return table[(np.rint(values).astype(np.int64) - first).clip(0, len(table) - 1)].astype(np.float64)


def _own_window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """The file's window by PS3.3 C.11.2.1.2 and C.11.2.1.3, in 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    if function == "LINEAR_EXACT":
        return _through(values, [(centre, width)])
    if width <= 1:
        return (values > centre - 0.5).astype(np.float64)
    return _through(values, [(centre - 0.5, width - 1)])


def _palette(dataset: Any, stored: np.ndarray) -> np.ndarray:
    if "RedPaletteColorLookupTableData" not in dataset:  # segmented tables
        colours = pydicom.pixels.apply_color_lut(stored, dataset)[..., :3]
        return _eight_bits_or_floats(colours, int(np.iinfo(colours.dtype).max))
    tables = [
        _table(
            getattr(dataset, f"{colour}PaletteColorLookupTableDescriptor"),
            getattr(dataset, f"{colour}PaletteColorLookupTableData"),
            dataset,
        )
        for colour in ("Red", "Green", "Blue")
    ]
    colours = np.stack([_looked_up(stored, *table) for table in tables], axis=-1)
    # Some writers put 8-bit colours into tables of 16 bits.
    return _eight_bits_or_floats(colours, 255 if max(table.max() for table, _ in tables) <= 255 else 2**16 - 1)


def _eight_bits_or_floats(colours: np.ndarray, white: int) -> np.ndarray:
    if white == 255:
        return np.ascontiguousarray(colours.clip(0, 255), dtype=np.uint8)
    return _finished((colours.astype(np.float64) / white).clip(0, 1))


def _spacing(dataset: Any, frame: int) -> tuple[float, float] | None:
    candidates = [
        _numbers(dataset, key, frame) for key in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    ]
    regions = {
        (float(region.get("PhysicalDeltaY", 0)), float(region.get("PhysicalDeltaX", 0)))
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRES
    }
    if len(regions) == 1:  # pictures side by side may differ in scale
        candidates += [[abs(delta) * 10 for delta in pair] for pair in regions]
    for pair in candidates:
        if len(pair) == 2 and min(pair) > 0 and math.isfinite(sum(pair)):
            return pair[0], pair[1]
    return None


# --- NIfTI


def _read_nifti(source: Any, name: str, frame: int | None, windows: _Windows) -> MedicalImage:
    image = source if isinstance(source, nibabel.spatialimages.SpatialImage) else _nifti_image(source)
    shape = (*image.shape[:3], 1, 1)[:3]
    if 0 in image.shape:
        raise MedicalImageError(f"{name} holds no voxels")
    # For each stored axis the axis of the patient that it runs along (0 to the right, 1 to the front, 2 to the head),
    # and -1 where it runs the other way. Only the slice is read, so the volume is not turned as a whole.
    axes, signs = nibabel.io_orientation(image.affine).T
    if not np.isfinite(axes).all():
        raise MedicalImageError(f"{name} has no valid orientation: its affine matrix is singular; mend the header")
    single = [axis for axis in range(3) if shape[axis] == 1]
    across = single[0] if len(single) == 1 else int(np.flatnonzero(axes == 2)[0])
    frames = shape[across]
    chosen = _chosen(frame, frames, name)

    index: list[Any] = [slice(None)] * min(3, image.ndim) + [0] * (image.ndim - 3)
    if across < image.ndim:
        index[across] = chosen if signs[across] > 0 else frames - 1 - chosen
    plane = np.asanyarray(image.dataobj[tuple(index)])
    within = [axis for axis in range(3) if axis != across]
    plane = plane.reshape([shape[axis] for axis in within])
    plane, turned = _upright(plane, axes[within].tolist(), signs[within].tolist())

    sizes = nibabel.affines.voxel_sizes(image.affine) * _MILLIMETRES.get(_unit(image), 1.0)
    rows, columns = (float(sizes[axis]) for axis in (within[::-1] if turned else within))
    spacing = (rows, columns) if min(rows, columns) > 0 else None
    if plane.dtype.names:
        pixels = _eight_bits_or_floats(np.stack([plane[colour] for colour in "RGB"], axis=-1), 255)
        return MedicalImage(pixels, None, spacing, chosen, frames)
    if plane.dtype.kind not in "buif":
        raise MedicalImageError(f"{name} holds numbers of type {plane.dtype}, which are no gray values")
    values = plane.astype(np.float64)
    header: Any = image.header if isinstance(image, nibabel.Nifti1Pair) else {}  # other formats have no such range
    low, high = (float(header.get(key, 0)) for key in ("cal_min", "cal_max"))
    if not windows and high > low:
        windows = [((low + high) / 2, high - low)]
    picture = _through(values, windows) if windows else _by_percentiles(values)
    return MedicalImage(_finished(picture), None, spacing, chosen, frames)


def _unit(image: Any) -> str:
    return image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"


def _nifti_image(source: Any) -> Any:
    if isinstance(source, (str, os.PathLike)):
        if os.fsdecode(source).lower().endswith(_NIFTI_NAMES):
            return nibabel.load(source)  # leaves the voxels on the disk
        with open(source, "rb") as file:
            source = file.read()
    data = bytes(source)
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    return (nibabel.Nifti2Image if data[4:8] == b"n+2\0" else nibabel.Nifti1Image).from_bytes(data)
