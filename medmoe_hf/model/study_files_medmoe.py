"""Files of studies: which there are, and what their headers say about images; no pixels are read here."""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .dicom_files_medmoe import first_number, header_numbers, header_value, no_quotes, pixel_spacing, read_header
from .errors_medmoe import ImageError, MissingPackageError, PathNotFoundError
from .medical_images_medmoe import kind_of
from .medical_pixels_medmoe import missing_package
from .modalities_medmoe import modality_of_dicom

try:
    import pydicom
except ImportError:  # only DICOM needs it
    pydicom = None

HEATMAP = b"medmoe_hf: heat-map"
"""The description (`descrip`) in the header of a NIfTI file that is a heat-map, and so no image to read."""

_DIRECTORY = "1.2.840.10008.1.3.10"  # the class of a DICOMDIR
_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_STORAGE = "1.2.840.10008.5.1.4.1.1."
# Objects that are no images, or no images of a patient, by the beginnings of their SOP classes after `_STORAGE`.
_NO_IMAGES = {
    "88.67": "a dose report",
    "88.59": "a key object selection",
    "88.": "a structured report",
    "11.": "a presentation state",
    "104.": "an encapsulated document",
    "66": "a registration, segmentation or other raw data",
    "481.2": "a radiotherapy dose",
    "481.3": "a radiotherapy structure set",
    "481.5": "a radiotherapy plan",
    "481.8": "a radiotherapy plan",
    "9.": "a waveform",
    "67": "real world value mapping",
    "4.2": "spectroscopy",
}
_NO_IMAGE_MODALITIES = {
    "SR": "a structured report",
    "KO": "a key object selection",
    "PR": "a presentation state",
    "DOC": "an encapsulated document",
    "SEG": "a registration, segmentation or other raw data",
    "REG": "a registration, segmentation or other raw data",
    "RTSTRUCT": "a radiotherapy structure set",
    "RTPLAN": "a radiotherapy plan",
    "RTDOSE": "a radiotherapy dose",
    "ECG": "a waveform",
}
_LOCALISERS = {"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVEY"}
_SLIDE_LABELS = {"LABEL": "the label of a slide", "OVERVIEW": "the overview of a slide, which shows its label"}
_DOSE_PAGE = re.compile(r"dose\s*(report|info|summary|page)|patient\s*protocol", re.IGNORECASE)
_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",  # for the reports of dose that are saved as screenshots; it is not kept
    "Modality",
    "ImageType",
    "InstanceNumber",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SequenceOfUltrasoundRegions",
    "SliceThickness",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


_MOST_FRAMES = 1_000_000


@dataclass(frozen=True)
class Skipped:
    """A file, or a slice, that is left out.

    Args:
        path: The file. It may contain a name, so that it is not printed.
        reason: Why, without the file's name.
        frame: Index of the frame in the file; None for the whole file.
    """

    path: str = field(repr=False)
    reason: str
    frame: int | None = None


@dataclass(eq=False, repr=False)
class Instance:
    """What the header of a DICOM image says, without anything that describes a patient.

    Args:
        path: The file.
        study: StudyInstanceUID; empty if there is none.
        series: SeriesInstanceUID; empty if there is none.
        uid: SOPInstanceUID; empty if there is none.
        sop_class: SOPClassUID.
        modality: Name of the modality, or None.
        compression: 0 for uncompressed pixels, 1 for lossless compression, 2 for any other.
        numbers: Series number, temporal position, acquisition number and instance number; infinite if missing.
        size: Rows and columns as stored.
        frames: Number of frames.
        spacing: Millimetres between rows and between columns as stored, or None.
        thickness: Millimetres, or None.
        orientations: ImageOrientationPatient of each frame, (frames, 6), NaN if missing; (1, 6) if all are equal.
        origins: ImagePositionPatient of each frame, (frames, 3), NaN if missing.
        copies: Other files with the same SOPInstanceUID.
    """

    path: str
    study: str
    series: str
    uid: str
    sop_class: str
    modality: str | None
    compression: int
    numbers: tuple[float, float, float, float]
    size: tuple[int, int]
    frames: int
    spacing: tuple[float, float] | None
    thickness: float | None
    orientations: np.ndarray
    origins: np.ndarray
    copies: list[str] = field(default_factory=list)

    @property
    def tiled(self) -> bool:
        return self.sop_class == _SLIDE and self.frames > 1


def identifier(path: str) -> str:
    """Returns a short name for a file that does not reveal its path."""
    return hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_files(paths: Iterable[Any]) -> Iterator[str]:
    """Finds files.

    Args:
        paths: Files, folders, which are searched with all folders in them, or DICOMDIRs, which name files.

    Yields:
        Each file once. Hidden files of folders are left out; links to folders are followed.

    Raises:
        FileNotFoundError: A path does not exist.
    """
    seen: set[str] = set()
    for path in paths:
        name = os.fsdecode(path)
        if not os.path.exists(name):
            raise PathNotFoundError(f"{name!r}: there is no such file or folder")
        for found in _files_below(name) if os.path.isdir(name) else [name]:
            real = os.path.realpath(found)
            if real not in seen:
                seen.add(real)
                yield found


def _files_below(folder: str) -> Iterator[str]:
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(files):
            if not name.startswith((".", "Thumbs.db", "desktop.ini")):
                yield os.path.join(parent, name)


def read_file(path: str, max_pixels: int) -> Instance | list[str] | tuple[str, str] | str:
    """Reads what a file is.

    Args:
        path: The file.
        max_pixels: As for `read_medical_image`.

    Returns:
        An `Instance` of DICOM; the paths that a DICOMDIR names; `("nifti", "")` or `("picture", note)`; or a string:
        the reason why the file is left out.

    Raises:
        ImportError: DICOM without pydicom.
    """
    try:
        kind = kind_of(path)
        if kind == "nifti":
            return "it is a heat-map of a prediction" if _is_heatmap(path) else ("nifti", "")
        if kind != "dicom":
            return _picture(path)
        if pydicom is None:
            raise MissingPackageError(missing_package("DICOM", "pydicom"))
        with no_quotes():
            return _dicom(path, max_pixels)
    except ImportError:
        raise
    except MemoryError:  # mostly a damaged length, which is reserved before it is read
        return "it needs more memory than there is: damaged, or too large"
    except ImageError as error:
        return reason_of(error, path)
    except Exception as error:  # parsers raise many types, and their messages quote the header
        return f"it cannot be read ({type(error).__name__}): damaged, cut off or not accessible"


def _is_heatmap(path: str) -> bool:
    """Whether a NIfTI file is a heat-map that was written beside a prediction."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
            return file.read(228)[148:].rstrip(b"\0") == HEATMAP
    except (OSError, EOFError, zlib.error):
        return False  # whoever decodes it says why


def reason_of(error: Exception, path: str) -> str:
    """Returns an error's message with `the file` for its name, which may contain a patient's."""
    return str(error).replace(repr(path), "the file").replace(path, "the file")


def _picture(path: str) -> tuple[str, str] | str:
    if not os.path.isfile(path):
        return "it is a device, pipe or socket"
    try:
        with Image.open(path) as image:
            pages = getattr(image, "n_frames", 1)
            return "picture", f"the first of {pages} pages" if pages > 1 else ""
    except Image.DecompressionBombError:
        return "picture", ""  # which is refused when it is decoded
    except Exception:
        return "it is neither DICOM nor NIfTI nor a picture"


def _dicom(path: str, max_pixels: int) -> Instance | list[str] | str:
    header, pixel_bytes = read_header(path, repr(path), max_pixels, _KEYWORDS)
    meta = getattr(header, "file_meta", None) or {}
    sop_class = str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if sop_class == _DIRECTORY:
        return _listed(path)
    reason = _no_image(header, sop_class)
    if not reason and not pixel_bytes:
        reason = "it holds no pixels: it is no image, or cut off"
    if reason:
        return reason

    frames = max(int(first_number(header_numbers(header, "NumberOfFrames", 0)) or 1), 1)
    if frames > pixel_bytes:  # a list of so many frames might not fit into memory
        return "it states more frames than it has bytes: it is damaged or cut off"
    if frames > _MOST_FRAMES:
        return f"it states {frames} frames, and at most {_MOST_FRAMES} are listed"
    syntax = meta.get("TransferSyntaxUID")
    compression = 0
    if syntax and syntax.is_encapsulated:
        compression = 1 if "Lossless" in syntax.name or "RLE" in syntax.name else 2
    many = range(frames) if sop_class != _SLIDE and "PerFrameFunctionalGroupsSequence" in header else range(1)
    thickness = first_number(header_numbers(header, "SliceThickness", 0))
    return Instance(
        path=path,
        study=str(header.get("StudyInstanceUID") or ""),
        series=str(header.get("SeriesInstanceUID") or ""),
        uid=str(header.get("SOPInstanceUID") or ""),
        sop_class=sop_class,
        modality=modality_of_dicom(header.get("Modality")),
        compression=compression,
        numbers=(
            _number(header, "SeriesNumber"),
            _number(header, "TemporalPositionIdentifier"),
            _number(header, "AcquisitionNumber"),
            _number(header, "InstanceNumber"),
        ),
        size=(int(header.get("Rows") or 0), int(header.get("Columns") or 0)),
        frames=frames,
        spacing=pixel_spacing(header, 0),
        thickness=thickness if thickness and thickness > 0 else None,
        orientations=_vectors(header, "ImageOrientationPatient", 6, many),
        origins=_vectors(header, "ImagePositionPatient", 3, many),
    )


def _number(header: Any, keyword: str) -> float:
    number = first_number(header_numbers(header, keyword, 0))
    return float("inf") if number is None else number


def _vectors(header: Any, keyword: str, length: int, frames: range) -> np.ndarray:
    result = np.full((len(frames), length), np.nan)
    own = len(header.get("PerFrameFunctionalGroupsSequence") or ())
    for frame in frames[: own + 1]:
        numbers = header_numbers(header, keyword, frame)
        if len(numbers) == length and np.isfinite(numbers).all():
            result[frame] = numbers
    # The frames without groups of their own are all alike.
    result[own + 1 :] = result[own : own + 1]
    return result


def _no_image(header: Any, sop_class: str) -> str:
    """Returns why a DICOM object is left out; empty for images."""
    if sop_class.startswith(_STORAGE):
        for beginning, reason in _NO_IMAGES.items():
            rest = sop_class[len(_STORAGE) :]
            if rest.startswith(beginning) if beginning.endswith(".") else _is_below(rest, beginning):
                return reason
    reason = _NO_IMAGE_MODALITIES.get(str(header.get("Modality") or "").strip().upper(), "")
    if reason:
        return reason
    if not header.get("Rows") or not header.get("Columns"):
        return "it holds no image: neither rows nor columns"
    kinds = header_value(header, "ImageType", 0) or ()
    words = {str(kind).strip().upper() for kind in ([kinds] if isinstance(kinds, str) else kinds)}
    if sop_class == _SLIDE:
        return next((reason for word, reason in _SLIDE_LABELS.items() if word in words), "")
    if words & _LOCALISERS:
        return "a localiser"
    if _DOSE_PAGE.search(str(header.get("SeriesDescription") or "")) or any(word.endswith(" PROT") for word in words):
        return "a dose report"
    return "a screenshot" if "SCREEN SAVE" in words else ""


def _is_below(uid: str, root: str) -> bool:
    return uid == root or uid.startswith(root + ".")


@no_quotes()
def _listed(path: str) -> list[str]:
    """Returns the files that a DICOMDIR names; names that lead out of its folder are left out."""
    directory = pydicom.dcmread(path, force=True)
    folder, found = os.path.dirname(path), []
    for record in directory.get("DirectoryRecordSequence") or ():
        parts = record.get("ReferencedFileID")
        if not parts:
            continue
        parts = [str(part) for part in ([parts] if isinstance(parts, str) else parts)]
        if any(part in ("", ".", "..") or "/" in part or "\\" in part or os.sep in part for part in parts):
            continue
        # Discs list names in upper case, and copies of them are often in lower case.
        choices = [os.path.join(folder, *parts), os.path.join(folder, *(part.lower() for part in parts))]
        found.append(next(filter(os.path.isfile, choices), choices[0]))
    return found


def read_files(
    paths: Iterable[Any], max_pixels: int, skip: Callable[[Skipped, str], None]
) -> tuple[list[Instance], list[tuple[str, str, str]]]:
    """Reads the headers of all files.

    Args:
        paths: As for `find_files`.
        max_pixels: As for `read_medical_image`.
        skip: Called with what is left out, and the study to which it belongs (empty if that is unknown).

    Returns:
        The DICOM images, each SOPInstanceUID once; and path, kind (`"nifti"`, `"picture"`) and note of other files.
    """
    instances: dict[Any, Instance] = {}
    others: list[tuple[str, str, str]] = []
    waiting, seen = list(find_files(paths)), set()
    for path in waiting:  # which grows while it is read
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if not os.path.exists(path):
            link = os.path.islink(path)
            reason = "it is a link to nothing" if link else "a DICOMDIR names this file, which does not exist"
            skip(Skipped(path, reason), "")
            continue
        found = read_file(path, max_pixels)
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            skip(Skipped(path, found), _study_of(path, max_pixels))
        elif isinstance(found, tuple):
            others.append((path, *found))
        else:
            # Software that removes identifiers may give all slices the same UID, but they are elsewhere.
            place = (*found.numbers, found.frames, found.size, found.origins.tobytes())
            key = (found.study, found.series, found.uid, place) if found.uid else path
            known = instances.setdefault(key, found)
            if known is not found:
                first, second = sorted((known, found), key=lambda one: (one.compression, one.path))
                first.copies = [*known.copies, *found.copies, second.path]
                instances[key] = first
                skip(Skipped(second.path, "a copy of an image that is there already"), first.study)
    return list(instances.values()), others


def _study_of(path: str, max_pixels: int) -> str:
    try:
        if pydicom is not None and kind_of(path) == "dicom":
            with no_quotes():
                header, _ = read_header(path, repr(path), max_pixels, ["StudyInstanceUID"])
                return str(header.get("StudyInstanceUID") or "")
    except Exception:
        return ""
    return ""
