"""DICOM and NIfTI files: one image ready for the image processor, and what the header says about it.

Warnings and errors name the file and never quote its header, which holds names and dates of patients.
"""

import math
import os
import zlib
from collections.abc import Sequence
from typing import Any

from .dicom_files_medmoe import DicomFrames, no_quotes
from .dicom_medmoe import is_dicom_dataset, read_dicom
from .errors_medmoe import ArgumentError, ImageError, MedicalImageError, PathNotFoundError
from .medical_pixels_medmoe import HEAD_BYTES, Windows, choose_frame
from .medical_pixels_medmoe import MAX_PIXELS as MAX_PIXELS
from .medical_pixels_medmoe import WINDOWS as WINDOWS
from .medical_pixels_medmoe import MedicalImage as MedicalImage
from .nifti_medmoe import NiftiVolume, is_nifti_image, read_nifti

_DICOM_NAMES = (".dcm", ".dicom")
_NIFTI_NAMES = (".nii", ".nii.gz")


def is_medical_image(source: Any) -> bool:
    """Returns whether this is an input for `read_medical_image`. Reads at most the first kilobyte of a file.

    Args:
        source: A path, bytes, or any object.

    Returns:
        True for existing files that are DICOM or NIfTI by their first bytes or by name (.dcm, .dicom, .nii, .nii.gz),
        for bytes of such files, `pydicom` datasets and `nibabel` images. Files are recognised without either package.
    """
    return kind_of(source) is not None


def read_medical_image(
    source: Any,
    frame: int | None = None,
    window: str | Sequence[Any] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> MedicalImage:
    """Reads one image of a DICOM or NIfTI file, upright, with the contrast that a radiologist would set.

    Gray DICOM goes through the modality LUT (or rescale slope and intercept) and then, without `window`: MR by
    percentiles; others by the file's own VOI LUT or window (the first usable one); CT without one by `"mediastinum"`;
    images of 8 bits or less unchanged; the rest by percentiles. Percentiles are the 1st and 99th of the frame,
    without padding. MONOCHROME1 is inverted after that, and padding is black. Palettes and YBR become RGB, and no
    window changes colours.

    Where headers contradict the standard or themselves:

    - Screenshots and scanned films with Modality CT (Secondary Capture or 8 bits, without rescale) hold no Hounsfield
      units: they are shown like any other image, and windows by name do not apply.
    - RescaleSlope 0 would make every pixel equal: slope and intercept are ignored, and windows by name do not apply.
    - PhotometricInterpretation alone decides whether an image is inverted. A PresentationLUTShape that contradicts it
      (INVERSE with MONOCHROME2) is ignored: the standard forbids this combination, and it mostly remains from software
      that inverted the pixels.
    - Without PhotometricInterpretation, one sample per pixel is MONOCHROME2 and three are RGB (YBR_FULL_422 in JPEG).
    - A linear window narrower than 1 spreads from centre - width/2 to centre + width/2, and so does one of width 1
      with a fractional RescaleSlope; the standard's formula, meant for integers, would make it a threshold.
    - A VOI LUT whose entries use less than a quarter of their declared range is scaled to the range that they use.
    - Empty and unreadable numbers are treated as missing, and a decimal comma is read as a point.

    Slices are turned to the orientation in which radiologists view them, by DICOM's ImageOrientationPatient and the
    affine of NIfTI: head (of axial slices: front) at the top, the patient's right (of sagittal slices: front) on the
    left. So are frontal radiographs, by PatientOrientation. Everything else stays as stored.

    NIfTI: an axial slice, or the only one of a volume of one slice; the first volume of a series. Without `window` by
    the header's display range (`cal_min`, `cal_max`), else by percentiles.

    Args:
        source: A path, the bytes of a file, a `pydicom` dataset or a `nibabel` image; files need no particular name.
        frame: Index of the frame of a multi-frame DICOM file (of a tiled slide: of the tile) or of the axial slice,
            from 0; None for the middle one.
        window: Centre and width, such as `(40, 400)`, in the file's own units (after the modality LUT): values from
            centre - width/2 to centre + width/2 are mapped from black to white. Or a name of `WINDOWS`: these are in
            Hounsfield units and apply to CT and NIfTI, while other DICOM is read as with None. Or three of either, for
            three channels.
        max_pixels: An image with more pixels is rejected before it is decoded, and so is a compressed file (.nii.gz,
            deflated or run-length encoded DICOM) that inflates to more than 16 bytes per allowed pixel.

    Returns:
        The image with its modality and pixel spacing.

    Raises:
        ImportError: The package that reads the format, or this file's compression, is missing.
        OSError: The file is missing or cannot be accessed.
        ImageTooLargeError: The image or the inflated file exceeds `max_pixels`.
        MedicalImageError: The file is neither DICOM nor NIfTI, damaged, truncated or without pixels, or does not have
            this frame.
        ValueError: The window is unknown.

    Example:
        >>> import nibabel, numpy as np
        >>> from medmoe_hf.model import read_medical_image
        >>> volume = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(32, 48, 10)), np.diag([0.7, 0.7, 3, 1]))
        >>> image = read_medical_image(volume, window=(0, 4))
        >>> image.pixels.shape, image.frame
        ((48, 32), 5)
    """
    windows, named = windows_of(window)
    name = _name(source)
    kind = kind_of(source)
    if kind is None:
        if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source):
            if os.path.exists(source):
                raise MedicalImageError(f"{name} is a folder, device or pipe and not a file")
            raise PathNotFoundError(f"{name}: there is no such file")
        raise MedicalImageError(f"{name} is neither DICOM nor NIfTI")
    try:
        if isinstance(source, NiftiVolume):
            return source.read(choose_frame(frame, source.count, name), windows)
        if kind == "nifti":
            return read_nifti(source, name, frame, windows, max_pixels)
        with no_quotes():
            return read_dicom(source, name, frame, windows, named, max_pixels)
    except (ImageError, ImportError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # parsers raise many types, and their messages quote the header: hence no `from error`
        raise MedicalImageError(
            f"{name} cannot be read as {'DICOM' if kind == 'dicom' else 'NIfTI'} ({type(error).__name__}): "
            "it is damaged or cut off; export or copy it again"
        ) from None


def _name(source: Any) -> str:
    if isinstance(source, (DicomFrames, NiftiVolume)):
        return source.name
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fsdecode(source))
    return "the file given as bytes" if isinstance(source, (bytes, bytearray, memoryview)) else "the dataset"


def kind_of(source: Any) -> str | None:
    """Returns `"dicom"` or `"nifti"` for an input of `read_medical_image`, and None for everything else."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _kind_of_bytes(bytes(source[:HEAD_BYTES]))
    if isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            return None
        with open(source, "rb") as file:
            kind = _kind_of_bytes(file.read(HEAD_BYTES))
        name = os.fsdecode(source).lower()
        by_name = "dicom" if name.endswith(_DICOM_NAMES) else "nifti" if name.endswith(_NIFTI_NAMES) else None
        return kind or by_name
    return "dicom" if is_dicom_dataset(source) else "nifti" if is_nifti_image(source) else None


def _kind_of_bytes(head: bytes) -> str | None:
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
        except zlib.error:
            return None
    return "nifti" if head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0" else None


def windows_of(window: Any) -> tuple[Windows, bool]:
    """Returns the requested windows (none, one or three), and whether one of them is given by name."""
    if window is None:
        return [], False
    if not hasattr(window, "__len__"):
        raise ArgumentError(f"a window is a name or (centre, width), got {window!r}")
    if isinstance(window, str) or (len(window) == 2 and not any(isinstance(part, str) for part in window)):
        window = [window]
    elif len(window) != 3:
        raise ArgumentError(f"one window or three are possible, for one channel or three, got {window!r}")
    return [_window(one) for one in window], any(isinstance(one, str) for one in window)


def _window(window: Any) -> tuple[float, float]:
    if isinstance(window, str):
        if window.strip().lower() not in WINDOWS:
            raise ArgumentError(
                f"there is no window {window!r}; known are {', '.join(WINDOWS)}, or give (centre, width)"
            )
        return WINDOWS[window.strip().lower()]
    try:
        centre, width = (float(value) for value in window)
    except (TypeError, ValueError):
        raise ArgumentError(f"a window is a name or (centre, width), got {window!r}") from None
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise ArgumentError(f"a window needs a finite centre and a width above 0, got {window!r}")
    return centre, width
