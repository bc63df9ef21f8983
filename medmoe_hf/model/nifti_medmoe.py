"""NIfTI files: orientation, windows and one axial slice, without reading the rest of the volume."""

import contextlib
import io
import math
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .errors_medmoe import MedicalImageError, MissingPackageError
from .medical_pixels_medmoe import (
    BYTES_PER_PIXEL,
    CHUNK_BYTES,
    HEAD_BYTES,
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

try:
    import nibabel
    import nibabel.affines
    import nibabel.spatialimages
except ImportError:  # only NIfTI needs it
    nibabel = None  # type: ignore[assignment, unused-ignore]

_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}
_CIFTI = range(3000, 3100)  # NIfTI's intent codes for data on surfaces


def is_nifti_image(source: Any) -> bool:
    """Returns whether this is a `nibabel` image; False without the package."""
    return nibabel is not None and isinstance(source, nibabel.spatialimages.SpatialImage)


def read_nifti(source: Any, name: str, frame: int | None, windows: Windows, max_pixels: int) -> MedicalImage:
    """Reads one axial slice; see `read_medical_image`.

    Args:
        source: A path, the bytes of a file, or a `nibabel` image.
        name: How error messages name the source.
        frame: Index of the slice, counted from the feet; None for the middle one.
        windows: No windows, one, or three.
        max_pixels: Limit of the pixels of a slice.

    Returns:
        The image, upright.
    """
    if nibabel is None:
        raise MissingPackageError(missing_package("NIfTI", "nibabel"))
    with _open_nifti(source, name, max_pixels * BYTES_PER_PIXEL) as image:
        shape = (*image.shape[:3], 1, 1)[:3]
        if 0 in image.shape:
            raise MedicalImageError(f"{name} holds no voxels")
        # For each stored axis the axis of the patient (0 right, 1 front, 2 head), and -1 where it is reversed. Only
        # the slice is read, so the volume itself is not turned.
        axes, signs = nibabel.io_orientation(image.affine).T
        if not np.isfinite(axes).all():
            raise MedicalImageError(f"{name} has no valid orientation: its affine matrix is singular; mend the header")
        single = [axis for axis in range(3) if shape[axis] == 1]
        across = single[0] if len(single) == 1 else int(np.flatnonzero(axes == 2)[0])
        frames = shape[across]
        chosen = choose_frame(frame, frames, name)
        within = [axis for axis in range(3) if axis != across]
        check_size(shape[within[0]], shape[within[1]], name, max_pixels)

        index: list[Any] = [slice(None)] * min(3, image.ndim) + [0] * (image.ndim - 3)
        if across < image.ndim:
            index[across] = chosen if signs[across] > 0 else frames - 1 - chosen
        plane = np.asanyarray(image.dataobj[tuple(index)])
    plane = plane.reshape([shape[axis] for axis in within])
    plane, turned = turn_upright(plane, axes[within].tolist(), signs[within].tolist())

    sizes = nibabel.affines.voxel_sizes(image.affine) * _MILLIMETRES.get(_unit(image), 1.0)
    rows, columns = (float(sizes[axis]) for axis in (within[::-1] if turned else within))
    spacing = (rows, columns) if min(rows, columns) > 0 else None
    if plane.dtype.names:
        pixels = to_uint8_or_float32(np.stack([plane[colour] for colour in "RGB"], axis=-1), 255)
        return MedicalImage(pixels, None, spacing, chosen, frames)
    if plane.dtype.kind not in "buif":
        raise MedicalImageError(f"{name} holds numbers of type {plane.dtype}, which are not gray values")
    values = plane.astype(np.float64)
    header: Any = image.header if isinstance(image, nibabel.Nifti1Pair) else {}  # other formats have no such range
    low, high = (float(header.get(key, 0)) for key in ("cal_min", "cal_max"))
    if not windows and high > low and math.isfinite(high - low):
        windows = [((low + high) / 2, high - low)]
    image = apply_windows(values, windows) if windows else apply_percentiles(values)
    return MedicalImage(to_float32(image), None, spacing, chosen, frames)


def _unit(image: Any) -> str:
    return image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"


@contextlib.contextmanager
def _open_nifti(source: Any, name: str, limit: int) -> Iterator[Any]:
    """Opens a `nibabel` image whose voxels are read from the file when they are accessed.

    A compressed file is inflated once and in parts, to its end, where its checksum is.
    """
    if isinstance(source, nibabel.spatialimages.SpatialImage):
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
        kind: Any = nibabel.Nifti2Image if head[4:8] == b"n+2\0" else nibabel.Nifti1Image
        header = kind.header_class(head[: kind.header_class.template_dtype.itemsize], check=False)
        if int(header["intent_code"]) in _CIFTI:
            raise MedicalImageError(f"{name} is a CIFTI file: values on a surface, not an image")
        voxels = math.prod(int(size) for size in header.get_data_shape()) * header.get_data_dtype().itemsize
        if compressed and header.get_data_offset() + voxels > limit:
            raise too_many_bytes(name, limit)
        file.seek(0)
        yield kind.from_stream(file)
        if compressed:
            file.finish()


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
