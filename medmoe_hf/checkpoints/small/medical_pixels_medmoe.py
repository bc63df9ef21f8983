"""What the readers of DICOM and NIfTI have in common: windows, limits, orientation, and the image that they return."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors_medmoe import ImageTooLargeError, MedicalImageError

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
"""Default limit of the pixels of an image; a larger one is treated as a decompression bomb.

It also limits the inflated size of a compressed file: 16 bytes per pixel, thus 1.6 GB."""

BYTES_PER_PIXEL = 16  # the widest that any format stores: complex numbers of two float64

_PERCENTILES = (1, 99)
HEAD_BYTES = 1024  # bytes that tell the format; NIfTI's last mark ends at 348, also after decompression of this many
CHUNK_BYTES = 2**20
Windows = list[tuple[float, float]]


@dataclass(eq=False)
class MedicalImage:
    """One image of a medical file.

    Args:
        pixels: Gray `(H, W)` float32 in 0..1; `(H, W, 3)` float32 in 0..1 for three windows and for colours of more
            than 8 bits; `(H, W, 3)` uint8 RGB for colours of 8 bits. Upright: rows and columns may be swapped or
            flipped relative to the file, and heat maps of the image match these pixels. Black is 0, also for
            MONOCHROME1.
        modality: `"xray"`, `"ct"`, `"mri"`, `"ultrasound"`, `"histopathology"` or `"fundus"`, from the header's
            Modality; None where that is another one or missing, and for NIfTI, which has none.
        spacing: Millimetres per pixel between rows and between columns; None where the file does not specify it. For
            projection images without a calibration it is that of the detector.
        frame: Index of this frame (NIfTI: of the axial slice, counted from the feet), from 0.
        frames: Number of frames in the file.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.model import MedicalImage
        >>> image = MedicalImage(np.zeros((512, 512), np.float32), "ct", (0.7, 0.7), frame=0, frames=1)
        >>> image.modality, image.pixels.shape
        ('ct', (512, 512))
    """

    pixels: np.ndarray
    modality: str | None
    spacing: tuple[float, float] | None
    frame: int
    frames: int


def check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Checks the size of an image before it is decoded.

    Args:
        width: In pixels.
        height: In pixels.
        name: How the error message names the image.
        max_pixels: Maximum of width times height.

    Raises:
        ImageTooLargeError: The image has more pixels.
    """
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width} x {height} pixels, more than `max_pixels` {max_pixels} allows; "
            "reduce it, or allow more"
        )


def too_many_bytes(name: str, limit: int) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name} inflates to more than {limit} bytes, {BYTES_PER_PIXEL} for each pixel that `max_pixels` allows; "
        "store it uncompressed or in parts, or allow more"
    )


def missing_package(what: str, package: str) -> str:
    return f'reading {what} needs the package {package}: pip install "medmoe_hf[dicom]"'


def choose_frame(frame: int | None, frames: int, name: str) -> int:
    if frame is None:
        return frames // 2
    if not 0 <= frame < frames:
        raise MedicalImageError(f"{name} has no frame {frame}: it has {frames}, and they count from 0")
    return frame


def apply_windows(values: np.ndarray, windows: Windows) -> np.ndarray:
    """Applies windows to values (H, W); returns (H, W), or (H, W, 3) for three windows, in 0..1."""
    channels = [((values - centre) / width + 0.5).clip(0, 1) for centre, width in windows]
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)


def apply_percentiles(values: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Scales values (H, W) to 0..1 between percentiles 1 and 99 of the finite values to keep; constant values to 0."""
    counted = np.isfinite(values) if keep is None else np.isfinite(values) & keep
    if not counted.any():
        return np.zeros_like(values)
    low, high = np.percentile(values[counted], _PERCENTILES)
    if low == high:  # a small mark on a plain background
        low, high = values[counted].min(), values[counted].max()
    return np.zeros_like(values) if low == high else ((values - low) / (high - low)).clip(0, 1)


def turn_upright(plane: np.ndarray, axes: Sequence[int], signs: Sequence[float]) -> tuple[np.ndarray, bool]:
    """Turns an image to the orientation in which radiologists view it.

    Args:
        plane: `(H, W, ...)`.
        axes: Axes of the patient along which rows and columns increase: 0 for right, 1 for front, 2 for head.
        signs: Positive where they increase towards that side, negative where towards the other.

    Returns:
        The image, and whether rows and columns have been swapped.
    """
    turned, flipped = upright_turns(axes, signs)
    if turned:
        plane = plane.swapaxes(0, 1)
    return np.flip(plane, tuple(axis for axis in range(2) if flipped[axis])), turned


def upright_turns(axes: Sequence[int], signs: Sequence[float]) -> tuple[bool, tuple[bool, bool]]:
    """Returns whether `turn_upright` swaps rows and columns, and whether it then reverses rows and columns."""
    turned = axes[0] < axes[1]
    first, second = signs[::-1] if turned else signs
    return turned, (first > 0, second > 0)


def to_float32(image: np.ndarray) -> np.ndarray:
    # NIfTI writers mark what lies outside the body with NaN.
    return np.ascontiguousarray(np.nan_to_num(image, nan=0.0), dtype=np.float32)


def to_uint8_or_float32(colours: np.ndarray, white: int) -> np.ndarray:
    if white == 255:
        return np.ascontiguousarray(colours.clip(0, 255), dtype=np.uint8)
    return to_float32((colours.astype(np.float64) / white).clip(0, 1))
