"""DICOM files: opening them, values of their headers, and single frames of large files.

Warnings and errors name the file and never quote its header, which holds names and dates of patients.
"""

import contextlib
import copy
import io
import logging
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from .errors_medmoe import MedicalImageError
from .medical_pixels_medmoe import BYTES_PER_PIXEL, CHUNK_BYTES, too_many_bytes

try:
    import pydicom
    import pydicom.encaps
except ImportError:  # only DICOM needs it
    pydicom = None

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

_CENTIMETRES = 3  # of the ultrasound regions' PhysicalUnits (PS3.3 C.8.5.5.1.15)
_DEFLATED, _NOT_DEFLATED = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"  # equally long
_DICOM_HEAD = 2**16  # bytes that hold the file meta information
_LONG_LENGTHS = (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL", b"OV", b"SV", b"UV")
_PIXEL_TAGS = {b"\x10\0": "PixelData", b"\x08\0": "FloatPixelData", b"\x09\0": "DoubleFloatPixelData"}
_UNDEFINED_LENGTH = 2**32 - 1
# What decoding needs to know.
_DECODED_BY = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)

_is_quiet: ContextVar[bool] = ContextVar("_is_quiet", default=False)  # of this thread


class _NoQuotes(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_quiet.get()


logging.getLogger("pydicom").addFilter(_NoQuotes())


@contextlib.contextmanager
def no_quotes() -> Iterator[None]:
    """Hides what pydicom says of a file in the block: it quotes the header, both as a warning and in its log."""
    before = _is_quiet.set(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _is_quiet.reset(before)


@contextlib.contextmanager
def _opened(source: Any, name: str, max_pixels: int) -> Iterator[Any]:
    """Opens a file or its bytes; a deflated one is inflated here, because pydicom would not limit its size."""
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
            limit = max_pixels * BYTES_PER_PIXEL
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            while not inflater.eof:
                chunk = inflater.unconsumed_tail or file.read(CHUNK_BYTES)
                if not chunk:
                    raise EOFError
                inflated.write(inflater.decompress(chunk, CHUNK_BYTES))
                if inflated.tell() > limit:
                    raise too_many_bytes(name, limit)
            file = inflated
        file.seek(0)
        yield file


def read_dataset(source: Any, name: str, max_pixels: int) -> Any:
    """Reads pydicom's dataset of a file, with its pixels.

    Args:
        source: A path, or the bytes of a file.
        name: How error messages name the source.
        max_pixels: Limit of the pixels of a frame; deflated files may have 16 bytes per pixel.

    Returns:
        The dataset.
    """
    with _opened(source, name, max_pixels) as file:
        # Without `force` files of older devices, which lack the mark, would be refused.
        return pydicom.dcmread(file, force=True)


def read_header(source: Any, name: str, max_pixels: int, keywords: Sequence[str]) -> tuple[Any, int]:
    """Reads values of a header, and no pixels.

    Args:
        source: A path, or the bytes of a file.
        name: How error messages name the source.
        max_pixels: As for `read_dataset`.
        keywords: The tags to keep; everything else is dropped.

    Returns:
        The dataset, and the number of bytes behind it that hold pixels; 0 if none follow.
    """
    with _opened(source, name, max_pixels) as file:
        header = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=list(keywords))
        start = file.tell()
        has_pixels = file.read(2) in (b"\xe0\x7f", b"\x7f\xe0")
        return header, file.seek(0, 2) - start if has_pixels else 0


class DicomFrames:
    """A file with many frames, which are read one at a time: an input of `read_medical_image`.

    The header is kept, and no file stays open. Deflated files, pixels of one bit, and compressed frames without a
    table of offsets that are in several parts each cannot be read by frame: these files are held as a whole.

    Args:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.name = path, repr(os.fsdecode(path))
        self._header: Any = None
        self._whole = False

    def header(self, max_pixels: int) -> Any:
        """Returns the header; reads it the first time.

        Args:
            max_pixels: As for `read_medical_image`.

        Raises:
            ImageError: The file has no pixels.
        """
        if self._header is None:
            with open(self.path, "rb") as file:
                self._whole = _start_of_deflated(file.read(_DICOM_HEAD)) is not None
                if not self._whole:
                    file.seek(0)
                    header = with_syntax(pydicom.dcmread(file, force=True, stop_before_pixels=True))
                    self._find_pixels(file, header)
            self._header = read_dataset(self.path, self.name, max_pixels) if self._whole else header
        return self._header

    def _find_pixels(self, file: Any, header: Any) -> None:
        implicit, little = header.original_encoding
        start = file.read(12)
        keyword = _PIXEL_TAGS.get(start[2:4] if little else start[3:1:-1])
        if keyword is None:
            raise MedicalImageError(f"{self.name} holds no pixel data: it is cut off; export or copy it again")
        self._keyword, self._vr = keyword, "OW" if implicit else start[4:6].decode("ascii", "replace")
        file.seek(-4 if implicit else 0, 1)
        self._start = file.tell()
        self._offsets: tuple[list[int], list[int]] | None = None
        count = int(first_number(header_numbers(header, "NumberOfFrames", 0)) or 1)
        if not header.file_meta.TransferSyntaxUID.is_encapsulated:
            bits = int(header.get("BitsAllocated") or 0) * int(header.get("SamplesPerPixel") or 1)
            if header.get("PhotometricInterpretation") == "YBR_FULL_422":
                bits = bits * 2 // 3  # two pixels share their colour
            self._bytes = int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * bits // 8
            self._whole = bits < 8
            return
        tables = [header.get(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
        if all(tables):
            offsets, lengths = (np.frombuffer(table, "<u8").tolist() for table in tables)
            self._offsets = offsets, lengths
        elif not pydicom.encaps.parse_basic_offsets(file):
            after_table = file.tell()
            parts, places = pydicom.encaps.parse_fragments(file)
            self._whole = parts != count
            if not self._whole:
                file.seek(0, 2)
                ends = [*places[1:], file.tell()]
                lengths = []
                for place, end in zip(places, ends, strict=True):
                    file.seek(place + 4)
                    lengths.append(min(int.from_bytes(file.read(4), "little"), end - place - 8))
                self._offsets = [place - after_table for place in places], lengths

    def frame(self, index: int) -> tuple[Any, int]:
        """Reads one frame.

        Args:
            index: From 0.

        Returns:
            A dataset with encoded pixels and what decoding them needs, and the index of the frame in it. The header
            must have been read.

        Raises:
            ImageError: The file ends before this frame.
        """
        header = self._header
        if self._whole:
            return header, index
        result = pydicom.Dataset()
        result.file_meta = header.file_meta
        for keyword in _DECODED_BY:
            if keyword in header:
                result[keyword] = header[keyword]
        result.set_original_encoding(*header.original_encoding)
        with open(self.path, "rb") as file:
            file.seek(self._start)
            if header.file_meta.TransferSyntaxUID.is_encapsulated:
                frames = int(first_number(header_numbers(header, "NumberOfFrames", 0)) or 1)
                content = pydicom.encaps.get_frame(
                    file, index, number_of_frames=frames, extended_offsets=self._offsets
                )
                pixels = pydicom.encaps.encapsulate([content], has_bot=False)
            else:
                file.seek(index * self._bytes, 1)
                pixels = file.read(self._bytes)
                if len(pixels) < self._bytes:
                    raise MedicalImageError(f"{self.name} is cut off before the end of frame {index + 1}; copy it")
                pixels += b"\0" * (len(pixels) % 2)
        result.add_new(self._keyword, self._vr if len(self._vr) == 2 and self._vr.isalpha() else "OW", pixels)
        return result, 0


def _start_of_deflated(head: bytes) -> int | None:
    """Returns the offset of a file's deflated part, after the file meta information; None for other files."""
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


def with_syntax(dataset: Any) -> Any:
    """Returns the dataset, or a shallow copy with a transfer syntax, which the decoder needs and old files lack."""
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and meta.get("TransferSyntaxUID"):
        return dataset
    uids = pydicom.uid
    big_endian = dataset.original_encoding[1] is False
    dataset = copy.copy(dataset)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRBigEndian if big_endian else uids.ExplicitVRLittleEndian
    return dataset


def _read(dataset: Any, keyword: str) -> Any:
    """Returns a value of the header, or its raw text where pydicom cannot convert it."""
    try:
        return dataset.get(keyword)
    except Exception:
        raw = dataset.get_item(keyword)
        return bytes(raw.value or b"").decode("ascii", "replace")


def header_value(dataset: Any, keyword: str, frame: int) -> Any:
    """Returns a value of the header: the frame's own in enhanced multi-frame files, else that of all frames."""
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence) or []
        for element in groups[index] if index < len(groups) else ():
            if element.VR == "SQ" and element.value and keyword in element.value[0]:
                return _read(element.value[0], keyword)
    return _read(dataset, keyword)


def header_numbers(dataset: Any, keyword: str, frame: int) -> list[float]:
    """Returns the values of a tag, NaN for those that are empty or not numeric."""
    value = header_value(dataset, keyword, frame)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        # Some writers separate values by commas; together with points they are not decimal commas.
        value = value.split("," if "," in value and "." in value and "\\" not in value else "\\")
    return [_number(one) for one in ([value] if isinstance(value, (int, float)) else value)]


def _number(value: Any) -> float:
    text = str(value).strip("\0 ") if isinstance(value, str) else value
    try:
        return float(text.replace(",", ".") if isinstance(text, str) else text)
    except (TypeError, ValueError):
        return math.nan


def first_number(numbers: Sequence[float]) -> float | None:
    return next((number for number in numbers if math.isfinite(number)), None)


def directions_of(dataset: Any, frame: int) -> tuple[list[int], list[float]] | None:
    """Returns the directions of rows and columns for `turn_upright`; None where they are unknown or oblique."""
    cosines = header_numbers(dataset, "ImageOrientationPatient", frame)
    if len(cosines) == 6 and math.isfinite(sum(cosines)):
        return directions_of_cosines(cosines)
    letters = dataset.get("PatientOrientation") or ""
    if len(letters) == 2 and letters[0][:1] in ("L", "R") and letters[1][:1] in ("F", "H"):
        return [2, 0], [1 if letters[1][0] == "H" else -1, 1 if letters[0][0] == "R" else -1]
    return None


def directions_of_cosines(cosines: Sequence[float]) -> tuple[list[int], list[float]] | None:
    """Returns the directions of rows and columns by ImageOrientationPatient; None where they share their axis."""
    # DICOM counts to the left and to the back; a step to the next row goes along the second triple.
    steps = np.array([cosines[3:], cosines[:3]]) * (-1, -1, 1)
    axes = np.abs(steps).argmax(axis=1)
    return None if axes[0] == axes[1] else (axes.tolist(), steps[(0, 1), axes].tolist())


def pixel_spacing(dataset: Any, frame: int) -> tuple[float, float] | None:
    candidates = [
        header_numbers(dataset, key, frame)
        for key in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    ]
    regions = {
        (float(region.get("PhysicalDeltaY", 0)), float(region.get("PhysicalDeltaX", 0)))
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == _CENTIMETRES
    }
    if len(regions) == 1:  # adjacent images may differ in scale
        candidates += [[abs(delta) * 10 for delta in pair] for pair in regions]
    for pair in candidates:
        if len(pair) == 2 and min(pair) > 0 and math.isfinite(sum(pair)):
            return pair[0], pair[1]
    return None
