"""NIfTI files: orientation, windows and one slice, without reading the rest of the volume."""

import contextlib
import io
import math
import os
import shutil
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors_medmoe import MedicalImageError, MissingPackageError
from .medical_pixels_medmoe import (
    BYTES_PER_PIXEL,
    CHUNK_BYTES,
    HEAD_BYTES,
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
    upright_turns,
)

try:
    import nibabel
    import nibabel.affines
    import nibabel.spatialimages
except ImportError:  # only NIfTI needs it
    nibabel = None  # type: ignore[assignment, unused-ignore]

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Name -> axis of the patient across the slices: right, front, head."""

_OPEN_VOLUMES = 2  # compressed volumes whose inflated content is kept; each needs a file descriptor, and disk
_AIR = 0.05  # least share of air in a CT
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_CIFTI = range(3000, 3100)  # NIfTI's intent codes for data on surfaces


def is_nifti_image(source: Any) -> bool:
    """Returns whether this is a `nibabel` image or a `NiftiVolume`; False without the package."""
    return nibabel is not None and isinstance(source, (nibabel.spatialimages.SpatialImage, NiftiVolume))


def read_nifti(
    source: Any,
    name: str,
    frame: int | None,
    windows: Windows,
    max_pixels: int,
    plane: str | None = None,
    volume: int = 0,
) -> MedicalImage:
    """Reads one slice; see `read_medical_image`.

    Args:
        source: A path, the bytes of a file, or a `nibabel` image.
        name: How error messages name the source.
        frame: Index of the slice, counted from the feet, the left or the back; None for the middle one.
        windows: No windows, one, or three.
        max_pixels: Limit of the pixels of a slice.
        plane: One of `PLANES`; None for axial slices, or the only slice of a volume that has one.
        volume: Index of the volume in a series of them.

    Returns:
        The image, upright.
    """
    if nibabel is None:
        raise MissingPackageError(missing_package("NIfTI", "nibabel"))
    with _open_nifti(source, name, max_pixels * BYTES_PER_PIXEL) as image:
        slices = _Slices(image, name, plane)
        chosen = choose_frame(frame, slices.count, name)
        check_size(*slices.stored_size, name, max_pixels)
        pixels = slices.stored(image, chosen, volume)
    pixels, _ = turn_upright(pixels, *slices.directions)
    if pixels.dtype.names:
        colours = to_uint8_or_float32(np.stack([pixels[colour] for colour in "RGB"], axis=-1), 255)
        return MedicalImage(colours, None, slices.spacing, chosen, slices.count)
    if pixels.dtype.kind not in "buif":
        raise MedicalImageError(f"{name} holds numbers of type {pixels.dtype}, which are not gray values")
    values = pixels.astype(np.float64)
    header: Any = image.header if isinstance(image, nibabel.Nifti1Pair) else {}  # other formats have no such range
    low, high = (float(header.get(key, 0)) for key in ("cal_min", "cal_max"))
    if not windows and high > low and math.isfinite(high - low):
        windows = [((low + high) / 2, high - low)]
    shown = apply_windows(values, windows) if windows else apply_percentiles(values)
    return MedicalImage(to_float32(shown), None, slices.spacing, chosen, slices.count)


class _Slices:
    """Where the slices of a plane lie in a `nibabel` image. Only a slice is read, so the volume is never turned."""

    def __init__(self, image: Any, name: str, plane: str | None) -> None:
        shape = (*image.shape[:3], 1, 1)[:3]
        if min(image.shape, default=0) < 1:
            raise MedicalImageError(f"{name} holds no voxels: its header states the shape {image.shape}")
        # For each stored axis the axis of the patient (0 right, 1 front, 2 head), and -1 where it is reversed.
        axes, signs = nibabel.io_orientation(image.affine).T
        if not np.isfinite(axes).all():
            raise MedicalImageError(f"{name} has no valid orientation: its affine matrix is singular; mend the header")
        single = [axis for axis in range(3) if shape[axis] == 1]
        wanted = PLANES[plane or "axial"]
        across = single[0] if plane is None and len(single) == 1 else int(np.flatnonzero(axes == wanted)[0])
        within = [axis for axis in range(3) if axis != across]
        self.count, self._shape, self._across, self._within = shape[across], shape, across, within
        self._ascending = bool(signs[across] > 0)
        self.stored_size = shape[within[0]], shape[within[1]]
        self.directions = axes[within].tolist(), signs[within].tolist()
        turned, flipped = upright_turns(*self.directions)
        rows_and_columns = within[::-1] if turned else within

        # To millimetres, from row, column and slice of what is shown.
        scale = _MILLIMETRES.get(_unit(image), 1.0)
        columns = image.affine[:3, :3] * scale
        steps = [columns[:, axis] for axis in (*rows_and_columns, across)]
        sizes = [shape[axis] for axis in (*rows_and_columns, across)]
        affine = np.eye(4)
        affine[:3, 3] = image.affine[:3, 3] * scale
        for axis, backwards in enumerate((*flipped, not self._ascending)):
            affine[:3, axis] = -steps[axis] if backwards else steps[axis]
            affine[:3, 3] += (sizes[axis] - 1) * steps[axis] if backwards else 0
        self.affine, self.size = affine, (sizes[0], sizes[1])
        lengths = nibabel.affines.voxel_sizes(affine).tolist()
        self.spacing = (lengths[0], lengths[1]) if min(lengths[:2]) > 0 else None
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        length = np.linalg.norm(normal)
        toward = affine[:3, :3] @ np.array([0, 0, 1.0])
        normal = normal / length * np.sign(normal @ toward) if length > 0 else toward
        self.first_position, self.step = float(affine[:3, 3] @ normal), float(toward @ normal)

    def stored(self, image: Any, slice_index: int, volume: int) -> np.ndarray:
        """Reads a slice as it is stored, (H, W)."""
        index: list[Any] = [slice(None)] * min(3, image.ndim) + [volume, 0, 0, 0][: max(image.ndim - 3, 0)]
        if self._across < image.ndim:
            index[self._across] = slice_index if self._ascending else self.count - 1 - slice_index
        plane: np.ndarray = np.asanyarray(image.dataobj[tuple(index)])
        return plane.reshape([self._shape[axis] for axis in self._within])


class NiftiVolume:
    """The slices of a file, one at a time; the header alone is read at first.

    A compressed file is inflated into a temporary file without a name, because it cannot be read from the middle. The
    files of the last volumes that were read are kept; others are inflated again when they are needed.

    Args:
        path: The file.
        name: How error messages name it.
        max_pixels: As for `read_medical_image`.
        plane: One of `PLANES`; None for axial slices, or the only slice of a volume that has one.
        volume: Index of the volume in a series of them.

    Raises:
        MedicalImageError: The header is damaged, or there is no such volume.
    """

    def __init__(
        self, path: str | os.PathLike[str], name: str, max_pixels: int, plane: str | None = None, volume: int = 0
    ) -> None:
        if nibabel is None:
            raise MissingPackageError(missing_package("NIfTI", "nibabel"))
        self._path, self.name, self._max_pixels, self._plane, self._volume = path, name, max_pixels, plane, volume
        self._limit = max_pixels * BYTES_PER_PIXEL
        with _open_nifti(path, name, self._limit, verified=False) as image:
            slices = _Slices(image, name, plane)
            self.volumes = image.shape[3] if image.ndim > 3 else 1
        if not 0 <= volume < self.volumes:
            raise MedicalImageError(f"{name} has no volume {volume}: it has {self.volumes}, and they count from 0")
        self.count, self.affine, self.spacing = slices.count, slices.affine, slices.spacing
        self.size, self._first_position, self._step = slices.size, slices.first_position, slices.step
        self._inflated: Any = None
        self._hounsfield: bool | None = None

    @property
    def positions(self) -> np.ndarray:
        """(count,) millimetres along the normal of the slices."""
        return self._first_position + np.arange(self.count) * self._step

    def read(self, frame: int, windows: Windows) -> MedicalImage:
        """Reads one slice.

        Args:
            frame: Index of the slice.
            windows: No windows, one, or three. Without windows, a volume that has no display range and whose values
                are like Hounsfield units is shown as a CT without a window: by `"mediastinum"`.

        Returns:
            The image, upright.
        """
        source = self._source()
        if not windows and self.holds_hounsfield_units():
            windows = [WINDOWS["mediastinum"]]
        return read_nifti(source, self.name, frame, windows, self._max_pixels, self._plane, self._volume)

    def holds_hounsfield_units(self) -> bool:
        """Returns whether three slices look like a CT: whole numbers, many of them near the -1000 of air."""
        if self._hounsfield is None:
            with _open_nifti(self._source(), self.name, self._limit, verified=False) as image:
                header: Any = image.header
                slices = _Slices(image, self.name, self._plane)
                check_size(*slices.stored_size, self.name, self._max_pixels)
                if header["cal_max"] > header["cal_min"] or image.get_data_dtype().names:
                    self._hounsfield = False
                    return False
                air = counted = 0
                lowest = highest = 0.0
                for frame in {self.count // 4, self.count // 2, 3 * self.count // 4}:
                    values = slices.stored(image, frame, self._volume).astype(np.float64)
                    values = values[np.isfinite(values)]
                    if not values.size or (values != np.rint(values)).any():
                        continue
                    counted += values.size
                    air += int((np.abs(values + 1000) <= 100).sum())
                    lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
            self._hounsfield = counted > 0 and air >= _AIR * counted and lowest > -4097 and -200 < highest < 32768
        return self._hounsfield

    def _source(self) -> Any:
        """Returns what slices are read from: the file, or an image whose voxels are in a temporary file."""
        inflated = self._inflated
        if inflated is None:
            with open(self._path, "rb") as file:
                if file.read(2) != b"\x1f\x8b":
                    return self._path
                file.seek(0)
                temporary = tempfile.TemporaryFile()  # noqa: SIM115 (closed when nothing refers to it)
                reader: Any = _GzipReader(file, self.name, self._limit)
                shutil.copyfileobj(reader, temporary, CHUNK_BYTES)
            temporary.seek(0)
            head = temporary.read(HEAD_BYTES)
            temporary.seek(0)
            inflated = self._inflated = _kind_of(head).from_stream(temporary)
        _keep_open(self)
        return inflated


_opened: list["weakref.ref[NiftiVolume]"] = []  # the last one read at the end
_opened_lock = threading.Lock()


def _keep_open(volume: NiftiVolume) -> None:
    """Lets go of the inflated content of all volumes but the last ones; who reads one at the moment still has it."""
    with _opened_lock:
        others = [one for one in _opened if one() is not None and one() is not volume]
        for one in others[: len(others) + 1 - _OPEN_VOLUMES]:
            old = one()
            if old is not None:
                old._inflated = None
        _opened[:] = [*others[max(len(others) + 1 - _OPEN_VOLUMES, 0) :], weakref.ref(volume)]


def _unit(image: Any) -> str:
    return image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"


@contextlib.contextmanager
def _open_nifti(source: Any, name: str, limit: int, verified: bool = True) -> Iterator[Any]:
    """Opens a `nibabel` image whose voxels are read from the file when they are accessed.

    A compressed file is inflated once and in parts, to its end, where its checksum is, unless `verified` is False.
    """
    if isinstance(source, nibabel.spatialimages.SpatialImage):
        if verified:
            _check_gzip_file(source, name, limit)
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
            file = _GzipReader(file, name, limit)
        head = file.read(HEAD_BYTES)
        kind = _kind_of(head)
        header = kind.header_class(head[: kind.header_class.template_dtype.itemsize], check=False)
        if int(header["intent_code"]) in _CIFTI:
            raise MedicalImageError(f"{name} is a CIFTI file: values on a surface, not an image")
        voxels = math.prod(int(size) for size in header.get_data_shape()) * header.get_data_dtype().itemsize
        if compressed and header.get_data_offset() + voxels > limit:
            raise too_many_bytes(name, limit)
        file.seek(0)
        yield kind.from_stream(file)
        if compressed and verified:
            file.finish()


def _kind_of(head: bytes) -> Any:
    return nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image


def _check_gzip_file(image: Any, name: str, limit: int) -> None:
    """Checks the compressed file of an image whose voxels have not been read yet."""
    path = getattr(image.file_map.get("image"), "filename", None)
    if path is None or not nibabel.is_proxy(image.dataobj) or not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            _GzipReader(file, name, limit).finish()


class _GzipReader(io.IOBase):
    """The content of a gzip file, read forwards with little memory, up to a limit and with its checksums verified.

    `gzip.GzipFile` inflates a few kilobytes at a time, which takes a sixth longer.
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
        """Inflates the next part; returns False at the end."""
        while True:
            if self._inflater.eof:  # one of several members, or zero padding
                self._compressed = self._inflater.unused_data.lstrip(b"\0")
                while not self._compressed:
                    part = self._file.read(CHUNK_BYTES)
                    if not part:
                        return False
                    self._compressed = part.lstrip(b"\0")
                self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            part = self._compressed or self._file.read(CHUNK_BYTES >> 3)
            if not part:
                raise EOFError
            inflated = self._inflater.decompress(part, CHUNK_BYTES)
            self._compressed = self._inflater.unconsumed_tail
            if inflated:
                self._inflated += len(inflated)
                if self._inflated > self._limit:
                    raise too_many_bytes(self._name, self._limit)
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
            raise ValueError("only positions from the beginning are supported")
        if position < self.tell():
            self._restart()
        while position > self._inflated and self._inflate():
            pass
        self._ready = self._ready[max(position - self.tell(), 0) :]
        return self.tell()

    def finish(self) -> None:
        """Inflates the rest, to verify the checksum at the end."""
        while self._inflate():
            pass
