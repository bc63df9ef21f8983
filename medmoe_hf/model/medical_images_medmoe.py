"""DICOM and NIfTI files: one picture ready for the image processor, and what the header says about it.

Warnings and errors name the file and never quote its header, which holds names and dates of patients.
"""

import contextlib
import copy
import io
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors_medmoe import ImageError, ImageTooLargeError, MedicalImageError, MissingPackageError, PathNotFoundError
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
"""Pixels of the largest image that is decoded by default; a larger one is taken for a decompression bomb.

It also limits what a compressed file may inflate to: 16 bytes for each of these pixels, thus 1.6 GB."""

_BYTES_PER_PIXEL = 16  # the widest that any format stores: complex numbers of two float64

_PERCENTILES = (1, 99)
_HEAD = 1024  # bytes that tell the format; NIfTI's last mark ends at 348, also after decompression of this many
_DICOM_NAMES = (".dcm", ".dicom")
_NIFTI_NAMES = (".nii", ".nii.gz")
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_CENTIMETRES = 3  # of the ultrasound regions' PhysicalUnits (PS3.3 C.8.5.5.1.15)
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and, with a dot and a number, its multi-frame forms
_DEFLATED, _NOT_DEFLATED = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # equally long
_DICOM_HEAD = 2**16  # bytes that hold the file meta information
_LONG_LENGTHS = (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL", b"OV", b"SV", b"UV")
_CHUNK = 2**20
_CIFTI = range(3000, 3100)  # NIfTI's intent codes for data on surfaces
_Windows = list[tuple[float, float]]


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
    percentiles; others by the file's own VOI LUT or window (the first usable one); CT without one by `"mediastinum"`;
    pictures of 8 bits or less as they are; the rest by percentiles. Percentiles are the 1st and 99th of the frame,
    padding left out. MONOCHROME1 is inverted after that, and padding is black. Palettes and YBR become RGB, and no
    window changes colours.

    Where headers contradict the standard or themselves:

    - Screenshots and scanned films with Modality CT (Secondary Capture or 8 bits, without rescale) hold no Hounsfield
      units: they are shown like any other picture, and windows by name do not apply.
    - RescaleSlope 0 would make every pixel equal: slope and intercept are ignored, and windows by name do not apply.
    - PhotometricInterpretation alone decides whether a picture is inverted. A PresentationLUTShape that contradicts it
      (INVERSE with MONOCHROME2) is ignored: the standard allows no such pair, and it is mostly left behind by software
      that inverted the pixels.
    - Without PhotometricInterpretation, one sample per pixel is MONOCHROME2 and three are RGB (YBR_FULL_422 in JPEG).
    - A linear window narrower than 1 spreads from centre - width/2 to centre + width/2, and so does one of width 1
      with a fractional RescaleSlope; the standard's formula, meant for integers, would make it a threshold.
    - A VOI LUT whose entries use less than a quarter of their declared range is shown by the range that they use.
    - Empty and unreadable numbers are taken for missing, and a decimal comma is read as a point.

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
        max_pixels: a picture with more pixels is refused before it is decoded, and so is a compressed file (.nii.gz,
            deflated or run-length encoded DICOM) that inflates to more than 16 bytes for each of them.

    Raises:
        ImportError: the package that reads the format, or this file's compression, is missing.
        OSError: the file is missing or may not be read.
        ImageTooLargeError: the picture or what its file inflates to exceeds `max_pixels`.
        MedicalImageError: a file that is neither DICOM nor NIfTI, damaged, cut off or without pixels, or a frame that
            it does not have.
        ValueError: an unknown window.
    """
    windows, named = _windows(window)
    name = _name(source)
    kind = _kind(source)
    if kind is None:
        if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
            if os.path.exists(source):
                raise MedicalImageError(f"{name} is a folder, device or pipe and not a file")
            raise PathNotFoundError(f"{name}: there is no such file")
        raise MedicalImageError(f"{name} is neither DICOM nor NIfTI")
    if kind == "dicom" and pydicom is None:
        raise MissingPackageError(_missing("DICOM", "pydicom"))
    if kind == "nifti" and nibabel is None:
        raise MissingPackageError(_missing("NIfTI", "nibabel"))
    try:
        if kind == "nifti":
            return _read_nifti(source, name, frame, windows, max_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote the header
            return _read_dicom(source, name, frame, windows, named, max_pixels)
    except (ImageError, ImportError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # parsers raise a dozen types, and their messages quote the header: so no `from error`
        raise MedicalImageError(
            f"{name} cannot be read as {'DICOM' if kind == 'dicom' else 'NIfTI'} ({type(error).__name__}): "
            "it is damaged or cut off; export or copy it again"
        ) from None


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raises `ImageTooLargeError` for an image with more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} pixels, more than `max_pixels` {max_pixels} allows; "
            "reduce it, or allow more"
        )


def _too_many_bytes(name: str, limit: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name} inflates to more than {limit} bytes, {_BYTES_PER_PIXEL} for each pixel that `max_pixels` allows; "
        "store it uncompressed or in parts, or allow more"
    )


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


def _read_dicom(
    source: Any, name: str, frame: int | None, windows: _Windows, named: bool, max_pixels: int
) -> MedicalImage:
    dataset = source if isinstance(source, pydicom.Dataset) else _dataset(source, name, max_pixels)
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise MedicalImageError(
            f"{name} holds no pixel data: it is a report or a plan, or no DICOM file, or cut off; "
            "choose an image of the series, or export it again"
        )
    dataset = _with_syntax(dataset)
    frames = int(_first(_numbers(dataset, "NumberOfFrames", 0)) or 1)
    chosen = _chosen(frame, frames, name)
    modality = modality_of_dicom(dataset.get("Modality"))
    photometric = _photometric(dataset)
    stored = _stored(dataset, name, chosen, photometric, max_pixels)

    if photometric == "PALETTE COLOR":
        pixels = _palette(dataset, stored)
    elif stored.ndim == 3:
        colours = stored[..., :3]
        white = 2 ** _bits_stored(dataset) - 1
        if white == 2**16 - 1 and colours.max() < 2**12:  # 12 bits that are declared as 16, nearly black as such
            white = 2**12 - 1
        pixels = _eight_bits_or_floats(colours, white)
    else:
        rescale = _rescale(dataset, chosen, name)
        hounsfield = modality == "ct" and _holds_hounsfield_units(dataset, rescale)
        if named and not hounsfield:
            windows = []
        pixels = _gray(dataset, stored, chosen, windows, rescale, hounsfield, modality == "mri", photometric)
    spacing = _spacing(dataset, chosen)
    directions = _directions(dataset, chosen)
    if directions is not None:
        pixels, turned = _upright(pixels, *directions)
        pixels = np.ascontiguousarray(pixels)
        spacing = spacing[::-1] if spacing and turned else spacing
    return MedicalImage(pixels, modality, spacing, chosen, frames)


def _dataset(source: Any, name: str, max_pixels: int) -> Any:
    """pydicom's dataset of a file; a deflated one is inflated here, since pydicom would do it without a limit."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file: Any = io.BytesIO(source)
        else:
            file = stack.enter_context(open(source, "rb"))
        head = file.read(_DICOM_HEAD)
        start = _start_of_deflated(head)
        if start is not None:
            file.seek(start)
            inflated = io.BytesIO()
            inflated.write(head[:start].replace(_DEFLATED, _NOT_DEFLATED))
            limit = max_pixels * _BYTES_PER_PIXEL
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            while not inflater.eof:
                chunk = inflater.unconsumed_tail or file.read(_CHUNK)
                if not chunk:
                    raise EOFError
                inflated.write(inflater.decompress(chunk, _CHUNK))
                if inflated.tell() > limit:
                    raise _too_many_bytes(name, limit)
            file = inflated
        file.seek(0)
        # Without `force` files of older devices, which lack the mark, would be refused.
        return pydicom.dcmread(file, force=True)


def _start_of_deflated(head: bytes) -> int | None:
    """Where the deflated part of a DICOM file begins: behind the file meta information. None for other files."""
    start = 132 if head[128:132] == b"DICM" else 0
    deflated = False
    while head[start : start + 2] == b"\x02\0":
        # Group, element, type of value, length (of 2 bytes, or of 4 behind 2 reserved ones), value.
        if head[start + 4 : start + 6] in _LONG_LENGTHS:
            behind = start + 12
            length = int.from_bytes(head[behind - 4 : behind], "little")
        else:
            behind = start + 8
            length = int.from_bytes(head[behind - 2 : behind], "little")
        if head[start + 2 : start + 4] == b"\x10\0":
            deflated = head[behind : behind + length] == _DEFLATED
        start = behind + length
    return start if deflated else None


def _directions(dataset: Any, frame: int) -> tuple[list[int], list[float]] | None:
    """Where growing rows and columns run to, as `_upright` takes it; None where that is unknown or in between."""
    cosines = _numbers(dataset, "ImageOrientationPatient", frame)
    if len(cosines) == 6 and math.isfinite(sum(cosines)):
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
    """Pixels of one frame as stored: (H, W), or (H, W, 3) in RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        available = pydicom.pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        raise MedicalImageError(
            f"{name} is stored as {syntax.name}, which pydicom cannot decode; export it as another transfer syntax"
        ) from None
    if not available:
        raise MissingPackageError(f"{name} is stored as {syntax.name}; {_missing('that', 'pylibjpeg')}")
    check_size(int(dataset.get("Columns") or 0), int(dataset.get("Rows") or 0), name, max_pixels)
    # What the decoder is told in place of what the header lacks, or says in another spelling.
    told: dict[str, Any] = {
        "samples_per_pixel": int(dataset.get("SamplesPerPixel") or 1),
        "photometric_interpretation": photometric,
        "planar_configuration": int(dataset.get("PlanarConfiguration") or 0),
        "pixel_representation": int(dataset.get("PixelRepresentation") or 0),
        "bits_stored": _bits_stored(dataset),
    }
    # In old files the pixels are the upper of the allocated bits.
    above = 0
    if "PixelData" in dataset and (not syntax.is_encapsulated or syntax == pydicom.uid.RLELossless):
        above = int(dataset.get("HighBit") or 0) + 1 - told["bits_stored"]
        above = above if 0 < above <= int(dataset.get("BitsAllocated") or 0) - told["bits_stored"] else 0
    try:
        if syntax.is_encapsulated:
            _check_compressed(dataset, name, frame, max_pixels)
        stored = pydicom.pixels.pixel_array(
            dataset, index=frame, **{**told, "bits_stored": told["bits_stored"] + above}
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
        # Some headers only say so: then the lower bits are in use, and the upper ones are not.
        if (stored & (2**above - 1)).any() and low <= stored.min() and stored.max() <= high:
            return stored
        return stored >> above
    return stored


def _stored_range(dataset: Any) -> tuple[int, int]:
    bits = _bits_stored(dataset)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.get("PixelRepresentation") else (0, 2**bits - 1)


def _check_compressed(dataset: Any, name: str, frame: int, max_pixels: int) -> None:
    """Refuses a frame that is larger in its own words than in the header's: decoders allocate by the former."""
    offsets = [dataset.get(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    content = pydicom.encaps.get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(_first(_numbers(dataset, "NumberOfFrames", 0)) or 1),
        extended_offsets=tuple(offsets) if all(offsets) else None,  # type: ignore[arg-type, unused-ignore]
    )
    if dataset.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        limit = max_pixels * _BYTES_PER_PIXEL
        # Two bytes give 128 at most. Larger frames are counted, which takes as long as decoding them.
        if 64 * len(content) > limit and _run_lengths(content) > limit:
            raise _too_many_bytes(name, limit)
    else:
        check_size(*_codestream_size(content), name, max_pixels)


def _codestream_size(content: bytes) -> tuple[int, int]:
    """Width and height that JPEG, JPEG-LS or JPEG 2000 data say; (0, 0) where they are not found."""
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
    """How many bytes a frame of DICOM's run-length encoding (PS3.5 annex G) decodes to."""
    total, at = 0, 64
    while at < len(content):
        count = content[at]
        if count < 128:
            total, at = total + count + 1, at + count + 2
        else:
            total, at = total + (257 - count if count > 128 else 0), at + (2 if count > 128 else 1)
    return total


def _read(dataset: Any, keyword: str) -> Any:
    """A value of a header; where pydicom cannot convert it, the text that stands there."""
    try:
        return dataset.get(keyword)
    except Exception:
        raw = dataset.get_item(keyword)
        return bytes(raw.value or b"").decode("ascii", "replace")


def _tag(dataset: Any, keyword: str, frame: int) -> Any:
    """A value of the header: this frame's own in enhanced multi-frame files, else that of all frames, or None."""
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence) or []
        for element in groups[index] if index < len(groups) else ():
            if element.VR == "SQ" and element.value and keyword in element.value[0]:
                return _read(element.value[0], keyword)
    return _read(dataset, keyword)


def _numbers(dataset: Any, keyword: str, frame: int) -> list[float]:
    """The values of a tag, NaN for those that are empty or no numbers."""
    value = _tag(dataset, keyword, frame)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        # Some writers separate values by a comma; in between points it is no decimal comma.
        value = value.split("," if "," in value and "." in value and "\\" not in value else "\\")
    return [_number(one) for one in ([value] if isinstance(value, (int, float)) else value)]


def _number(value: Any) -> float:
    text = str(value).strip("\0 ") if isinstance(value, str) else value
    try:
        return float(text.replace(",", ".") if isinstance(text, str) else text)
    except (TypeError, ValueError):
        return math.nan


def _first(numbers: Sequence[float]) -> float | None:
    return next((number for number in numbers if math.isfinite(number)), None)


def _rescale(dataset: Any, frame: int, name: str) -> tuple[float, float] | None:
    """Slope and intercept; None where there are none, or a slope of 0, which would leave nothing of the picture."""
    found = []
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        numbers = _numbers(dataset, keyword, frame)
        found.append(_first(numbers))
        if numbers and found[-1] is None and str(_tag(dataset, keyword, frame)).strip("\\[]', "):
            raise MedicalImageError(f"{name} cannot be read as DICOM (ValueError): its {keyword} is no number")
    slope, intercept = found
    if slope == 0 or (slope is None and intercept is None):
        return None
    return 1.0 if slope is None else slope, intercept or 0.0


def _holds_hounsfield_units(dataset: Any, rescale: tuple[float, float] | None) -> bool:
    """Whether the values of a CT, after its modality LUT, are Hounsfield units: those of screenshots are not."""
    if rescale is not None or dataset.get("ModalityLUTSequence"):
        return True
    if _first(_numbers(dataset, "RescaleSlope", 0)) == 0:
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
    windows: _Windows,
    rescale: tuple[float, float] | None,
    hounsfield: bool,
    by_percentiles: bool,
    photometric: str,
) -> np.ndarray:
    padding = _padding(dataset, stored)
    if dataset.get("ModalityLUTSequence"):
        item = dataset.ModalityLUTSequence[0]
        values, changed = _looked_up(stored, *_table(item.LUTDescriptor, item.LUTData, dataset)), True
        whole_numbers = True
    else:
        slope, intercept = rescale or (1.0, 0.0)
        values, changed = stored.astype(np.float64) * slope + intercept, (slope, intercept) != (1, 0)
        whole_numbers = slope == int(slope)
    bits = _bits_stored(dataset)
    display_lut = None if windows or by_percentiles else _display_lut(dataset, frame)
    window = _window_of_file(dataset, frame)
    if windows:
        picture = _through(values, windows)
    elif by_percentiles:
        picture = _by_percentiles(values, ~padding)
    elif display_lut is not None:
        table, first, white = display_lut
        picture = (_looked_up(values, table, first) / white).clip(0, 1)
    elif window is not None:
        function = str(_tag(dataset, "VOILUTFunction", frame) or "LINEAR").strip().upper()
        picture = _own_window(values, *window, function, whole_numbers)
    elif hounsfield:
        picture = _through(values, [WINDOWS["mediastinum"]])
    elif bits <= 8 and not changed and values.min() >= 0:
        picture = (values / (2**bits - 1)).clip(0, 1)
    else:
        picture = _by_percentiles(values, ~padding)
    picture = 1 - picture if photometric == "MONOCHROME1" else picture
    picture[padding] = 0
    return _finished(picture)


def _window_of_file(dataset: Any, frame: int) -> tuple[float, float] | None:
    """The first centre and width that are numbers."""
    pairs = zip(_numbers(dataset, "WindowCenter", frame), _numbers(dataset, "WindowWidth", frame), strict=False)
    return next((pair for pair in pairs if math.isfinite(sum(pair)) and pair[1] > 0), None)


def _display_lut(dataset: Any, frame: int) -> tuple[np.ndarray, int, int] | None:
    """The first VOI LUT that holds data: its entries, the value that the first stands for, and what is white."""
    for item in _tag(dataset, "VOILUTSequence", frame) or ():
        descriptor, data = item.get("LUTDescriptor"), item.get("LUTData")
        if not descriptor or data is None or not len(data):
            continue
        table, first = _table(descriptor, data, dataset)
        used = max(int(table.max()).bit_length(), 1)
        declared = int(descriptor[2])
        # Entries that leave the upper bits of their declared range unused would give a picture that is nearly black.
        return table, first, 2 ** (declared if used <= declared <= used + 1 else used) - 1
    return None


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that hold no measurement, such as those outside a CT's circle."""
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
    """A padding value as pixels have it: some writers give it signed where they are unsigned, or the other way."""
    low, high = _stored_range(dataset)
    for period in (2**16, 2 ** _bits_stored(dataset)):
        wrapped = (value - low) % period + low
        if not low <= value <= high and low <= wrapped <= high:
            return wrapped
    return value


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


def _own_window(values: np.ndarray, centre: float, width: float, function: str, whole_numbers: bool) -> np.ndarray:
    """The file's window by PS3.3 C.11.2.1.2 and C.11.2.1.3, in 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700)))
    # The standard's linear function counts whole numbers, and knows no width below 1.
    if function == "LINEAR_EXACT" or width < 1 or (width == 1 and not whole_numbers):
        return _through(values, [(centre, width)])
    if width == 1:
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


def _read_nifti(source: Any, name: str, frame: int | None, windows: _Windows, max_pixels: int) -> MedicalImage:
    with _opened_nifti(source, name, max_pixels * _BYTES_PER_PIXEL) as image:
        shape = (*image.shape[:3], 1, 1)[:3]
        if 0 in image.shape:
            raise MedicalImageError(f"{name} holds no voxels")
        # For each stored axis the axis of the patient that it runs along (0 to the right, 1 to the front, 2 to the
        # head), and -1 where it runs the other way. Only the slice is read, so the volume is not turned as a whole.
        axes, signs = nibabel.io_orientation(image.affine).T
        if not np.isfinite(axes).all():
            raise MedicalImageError(f"{name} has no valid orientation: its affine matrix is singular; mend the header")
        single = [axis for axis in range(3) if shape[axis] == 1]
        across = single[0] if len(single) == 1 else int(np.flatnonzero(axes == 2)[0])
        frames = shape[across]
        chosen = _chosen(frame, frames, name)
        within = [axis for axis in range(3) if axis != across]
        check_size(shape[within[0]], shape[within[1]], name, max_pixels)

        index: list[Any] = [slice(None)] * min(3, image.ndim) + [0] * (image.ndim - 3)
        if across < image.ndim:
            index[across] = chosen if signs[across] > 0 else frames - 1 - chosen
        plane = np.asanyarray(image.dataobj[tuple(index)])
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
    if not windows and high > low and math.isfinite(high - low):
        windows = [((low + high) / 2, high - low)]
    picture = _through(values, windows) if windows else _by_percentiles(values)
    return MedicalImage(_finished(picture), None, spacing, chosen, frames)


def _unit(image: Any) -> str:
    return image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"


@contextlib.contextmanager
def _opened_nifti(source: Any, name: str, limit: int) -> Iterator[Any]:
    """A `nibabel` image whose voxels are read from the file when they are asked for.

    A compressed file is inflated once and in parts, to its end, where its checksum is.
    """
    if isinstance(source, nibabel.spatialimages.SpatialImage):
        _check_gzip_behind(source, name, limit)
        yield source
        return
    with contextlib.ExitStack() as stack:
        if isinstance(source, (bytes, bytearray, memoryview)):
            file: Any = io.BytesIO(source)
        else:
            file = stack.enter_context(open(source, "rb"))
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if compressed:
            file = _Gunzipped(file, name, limit)
        head = file.read(_HEAD)
        kind: Any = nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image
        header = kind.header_class(head[: kind.header_class.template_dtype.itemsize], check=False)
        if int(header["intent_code"]) in _CIFTI:
            raise MedicalImageError(f"{name} is a CIFTI file: values on a surface, which are no picture")
        voxels = math.prod(int(size) for size in header.get_data_shape()) * header.get_data_dtype().itemsize
        if compressed and header.get_data_offset() + voxels > limit:
            raise _too_many_bytes(name, limit)
        file.seek(0)
        yield kind.from_stream(file)
        if compressed:
            file.finish()


def _check_gzip_behind(image: Any, name: str, limit: int) -> None:
    """Checks the compressed file of an image whose voxels are not read yet."""
    path = getattr(image.file_map.get("image"), "filename", None)
    if path is None or not nibabel.is_proxy(image.dataobj) or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            _Gunzipped(file, name, limit).finish()


class _Gunzipped(io.IOBase):
    """What a gzip file inflates to, read forwards in little memory, up to a limit and with its checksums checked.

    `gzip.GzipFile` inflates by a few kilobytes, which costs a sixth more time.
    """

    def __init__(self, file: Any, name: str, limit: int) -> None:
        self._file, self._name, self._limit = file, name, limit
        self._restart()

    def _restart(self) -> None:
        self._file.seek(0)
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._compressed = b""
        self._ready = memoryview(b"")  # inflated and not read yet
        self._inflated = 0

    def _inflate(self) -> bool:
        """Makes the next part ready; False at the end."""
        while True:
            if self._inflater.eof:  # one of several members, or zeros that fill a block
                self._compressed = self._inflater.unused_data.lstrip(b"\0")
                while not self._compressed:
                    part = self._file.read(_CHUNK)
                    if not part:
                        return False
                    self._compressed = part.lstrip(b"\0")
                self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            part = self._compressed or self._file.read(_CHUNK >> 3)
            if not part:
                raise EOFError
            inflated = self._inflater.decompress(part, _CHUNK)
            self._compressed = self._inflater.unconsumed_tail
            if inflated:
                self._inflated += len(inflated)
                if self._inflated > self._limit:
                    raise _too_many_bytes(self._name, self._limit)
                self._ready = memoryview(inflated)
                return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (self._ready or self._inflate()):
            parts.append(self._ready[:size])
            self._ready = self._ready[size:]
            size -= len(parts[-1])
        return b"".join(parts)

    def tell(self) -> int:
        return self._inflated - len(self._ready)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence:
            raise ValueError("only positions from the beginning are known")
        if position < self.tell():
            self._restart()
        while position > self._inflated and self._inflate():
            pass
        self._ready = self._ready[max(position - self.tell(), 0) :]
        return self.tell()

    def finish(self) -> None:
        """Inflates what is left, for the checksum at the end."""
        while self._inflate():
            pass
