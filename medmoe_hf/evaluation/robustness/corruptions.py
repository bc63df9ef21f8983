"""Corruptions of 8-bit images, as acquisition, storage and export leave them: for robustness reports.

Each has five severities. What a corruption draws depends on the seed, its name and the number of the image only, so
that severities differ in strength and not in pattern. Lengths are shares of the shorter side, since models see all
images at one size.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, overload
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.batching import read_picture

SEVERITIES = (1, 2, 3, 4, 5)
_FINEST = 256  # cells of noise along the shorter side: finer noise would vanish when the image is reduced
_WORDS = ("L", "R", "ID 4271", "12:45", "SERIES 2", "ROOM 5", "COPY", "IMG 3")

Corruption = Callable[[Image.Image, int, np.random.Generator], Image.Image]


def _noise(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian noise, as at a low dose or a high gain."""
    pixels = np.asarray(image, dtype=np.float64)
    return _clipped(pixels + 255 * (0.04, 0.08, 0.13, 0.2, 0.3)[level] * _draw_noise(pixels, generator))


def _speckle(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Noise that grows with the brightness, as in ultrasound."""
    pixels = np.asarray(image, dtype=np.float64)
    return _clipped(pixels * (1 + (0.1, 0.2, 0.35, 0.5, 0.7)[level] * _draw_noise(pixels, generator)))


def _blur(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Gaussian blur, as out of focus."""
    return image.filter(ImageFilter.GaussianBlur((0.005, 0.01, 0.015, 0.025, 0.04)[level] * min(image.size)))


def _contrast(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Less contrast around the mean brightness."""
    pixels = np.asarray(image, dtype=np.float64)
    return _clipped(pixels.mean() + (0.75, 0.6, 0.45, 0.3, 0.15)[level] * (pixels - pixels.mean()))


def _brightness(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """All pixels brighter or darker by the same amount."""
    shift = 255 * (0.1, 0.2, 0.3, 0.4, 0.5)[level] * generator.choice((-1, 1))
    return _clipped(np.asarray(image, dtype=np.float64) + shift)


def _gamma(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Another gray curve, as of another display or post-processing: dark or bright parts lose their contrast."""
    exponent = (1.3, 1.6, 2.0, 2.6, 3.5)[level] ** generator.choice((-1, 1))
    return _clipped(255 * (np.asarray(image, dtype=np.float64) / 255) ** exponent)


def _jpeg(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """JPEG compression of low quality."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=(40, 25, 15, 10, 5)[level])
    buffer.seek(0)
    with Image.open(buffer) as stored:
        return stored.convert("RGB")


def _downscale(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Few pixels along the shorter side, enlarged again; smaller images stay as they are."""
    side = (128, 96, 64, 48, 32)[level]
    if min(image.size) <= side:
        return image
    small = [max(1, round(length * side / min(image.size))) for length in image.size]
    reduced = image.resize((small[0], small[1]), Image.Resampling.BOX)
    return reduced.resize(image.size, Image.Resampling.BILINEAR)


def _rotation(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """A turn by some degrees in either direction; the corners become black."""
    angle = (5, 10, 15, 20, 30)[level] * int(generator.choice((-1, 1)))
    return image.rotate(angle, Image.Resampling.BILINEAR)


def _text(image: Image.Image, level: int, generator: np.random.Generator) -> Image.Image:
    """Burnt-in white words that say nothing about the image."""
    marked = image.copy()
    draw = ImageDraw.Draw(marked)
    font = ImageFont.load_default(max(6.0, (0.05, 0.06, 0.07, 0.085, 0.1)[level] * min(image.size)))
    for _ in range((1, 2, 3, 5, 8)[level]):
        word, (x, y) = _WORDS[generator.integers(len(_WORDS))], generator.random(2)
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        place = (x * max(0, image.width - right + left) - left, y * max(0, image.height - bottom + top) - top)
        draw.text(place, word, fill=(255, 255, 255), font=font)
    return marked


def _draw_noise(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Standard normal noise (H, W, 3), equal in the three channels of a gray image."""
    height, width = pixels.shape[:2]
    cell = max(1, min(height, width) // _FINEST)
    gray = (pixels == pixels[..., :1]).all()
    size = (-(-height // cell), -(-width // cell), 1 if gray else 3)
    coarse = generator.standard_normal(size)
    return coarse.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]


def _clipped(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


CORRUPTIONS: dict[str, Corruption] = {
    "noise": _noise,
    "speckle": _speckle,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "gamma": _gamma,
    "jpeg": _jpeg,
    "downscale": _downscale,
    "rotation": _rotation,
    "text": _text,
}
"""Name -> function of an RGB image, the severity minus 1, and a generator."""


def check_corruptions(names: Sequence[str], severities: Sequence[int]) -> None:
    """Raises for what does not exist.

    Args:
        names: Names of corruptions.
        severities: Severities.

    Raises:
        ArgumentError: For an unknown name, or a severity that is none of 1 to 5.
    """
    for name in names:
        if name not in CORRUPTIONS:
            raise ArgumentError(f'There is no corruption "{name}"; known: {", ".join(CORRUPTIONS)}.')
    for severity in severities:
        if severity not in SEVERITIES:
            raise ArgumentError(f"The severity of a corruption must be 1, 2, 3, 4 or 5, got {severity}.")


def corrupt(image: Any, name: str, severity: int, seed: int = 0, sample: int = 0) -> Image.Image:
    """Corrupts one image.

    Args:
        image: A path (DICOM and NIfTI too), a PIL image or an array; it is read as 8-bit RGB.
        name: A key of `CORRUPTIONS`.
        severity: 1 (hardly visible) to 5.
        seed: Seed, at least 0.
        sample: Number of the image, at least 0: images of different numbers get different noise.

    Returns:
        An RGB image of the same size. The same arguments return the same pixels, as far as one version of Pillow
        compresses and writes text the same way.

    Raises:
        ArgumentError: For an unknown name or severity.

    Example:
        >>> import numpy as np
        >>> image = np.full((64, 64), 128, dtype=np.uint8)
        >>> noisy = corrupt(image, "noise", 3, seed=1)
        >>> noisy.size, noisy == corrupt(image, "noise", 3, seed=1)
        ((64, 64), True)
    """
    check_corruptions([name], [severity])
    return _corrupted(read_picture(image), name, severity, seed, sample)


def _corrupted(picture: Image.Image, name: str, severity: int, seed: int, sample: int) -> Image.Image:
    generator = np.random.default_rng([seed, sample, crc32(name.encode())])
    return CORRUPTIONS[name](picture, severity - 1, generator)


class CorruptedImages(Sequence[Image.Image]):
    """All corruptions of some images, made when they are read: entry `i * V + v` is version v of image i.

    Args:
        images: N paths, PIL images or arrays.
        versions: V pairs of a corruption's name and a severity.
        seed: Seed, at least 0.

    Example:
        >>> import numpy as np
        >>> images = CorruptedImages([np.zeros((8, 8), dtype=np.uint8)], [("noise", 1), ("blur", 5)])
        >>> len(images), images[1].size
        (2, (8, 8))
    """

    def __init__(self, images: Sequence[Any], versions: Sequence[tuple[str, int]], seed: int = 0) -> None:
        check_corruptions([name for name, _ in versions], [severity for _, severity in versions])
        self.images, self.versions, self.seed = images, list(versions), seed
        self._last: tuple[int, Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.images) * len(self.versions)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        sample, version = divmod(index % len(self), len(self.versions))
        if self._last is None or self._last[0] != sample:
            # Its versions follow each other: it is read once.
            self._last = (sample, read_picture(self.images[sample]))
        return _corrupted(self._last[1], *self.versions[version], self.seed, sample)
