"""Random changes to training images: geometry, intensity, and what cameras, scanners and file formats do to a picture.

They run in the readers, on 8-bit pictures, before the image processor. Every choice is drawn from the generator of the
sample's position in the epoch, so that an interrupted run sees the same pictures again, whoever reads them.
"""

import io
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field

from medmoe_hf.model.image_processing_medmoe import to_rgb

_SIDES = re.compile(r"(?i:\b(?:left|right|(?:sinistr|dextr)\w*)\b)|\b(?:L|R|OD|OS)\b")
_BLACK = 8  # Grey levels below are padding, or air around a body.
_MARGIN = 1.25  # of the model's side: what a zoom may still use


class Augmentation(BaseModel):
    """How far the images of one modality may change. A range of 0 and a probability of 0 switch a change off.

    Attributes:
        rotation: largest angle in degrees, either way.
        shift: largest shift as a share of the width and height.
        zoom: the image is scaled by a factor from 1 / (1 + zoom) to 1 + zoom; above 1 it is a crop.
        stretch: the same for width against height.
        shear: largest shear, as the tangent of its angle.
        flip_horizontal: probability of swapping left and right. Captions that name a side are never flipped.
        flip_vertical: probability of swapping top and bottom.
        quarter_turns: whether the image is also turned by a random multiple of 90 degrees.
        brightness: largest shift of the grey values, as a share of their range.
        contrast: contrast is scaled by a factor from 1 / (1 + contrast) to 1 + contrast.
        gamma: the exponent of the grey values lies between 1 / (1 + gamma) and 1 + gamma.
        equalize: probability that the histogram is equalized, by a random share: 0 leaves the image, 1 gives all grey
            levels the same frequency. It hides how a scan was exposed, windowed or post-processed.
        color: each channel is scaled by its own factor from 1 / (1 + color) to 1 + color; grey images stay grey.
        blur: probability of a Gaussian blur of up to 1 % of the side, or of a loss of resolution.
        sharpen: probability of an unsharp mask.
        noise: probability of Gaussian noise with a standard deviation of up to 6 % of the range.
        jpeg: probability of JPEG compression at a quality of 30 to 90.
        gray: probability that a colour image loses its colours.
        erase: probability that a rectangle of up to a tenth of the area becomes grey.
    """

    model_config = ConfigDict(extra="forbid")

    rotation: float = Field(default=10.0, ge=0, le=180)
    shift: float = Field(default=0.08, ge=0, le=0.5)
    zoom: float = Field(default=0.2, ge=0, le=2)
    stretch: float = Field(default=0.08, ge=0, le=1)
    shear: float = Field(default=0.05, ge=0, le=0.5)
    flip_horizontal: float = Field(default=0.0, ge=0, le=1)
    flip_vertical: float = Field(default=0.0, ge=0, le=1)
    quarter_turns: bool = False
    brightness: float = Field(default=0.12, ge=0, le=1)
    contrast: float = Field(default=0.35, ge=0, le=3)
    gamma: float = Field(default=0.4, ge=0, le=3)
    equalize: float = Field(default=0.0, ge=0, le=1)
    color: float = Field(default=0.0, ge=0, le=1)
    blur: float = Field(default=0.2, ge=0, le=1)
    sharpen: float = Field(default=0.1, ge=0, le=1)
    noise: float = Field(default=0.2, ge=0, le=1)
    jpeg: float = Field(default=0.15, ge=0, le=1)
    gray: float = Field(default=0.0, ge=0, le=1)
    erase: float = Field(default=0.0, ge=0, le=1)


OFF = Augmentation.model_validate(dict.fromkeys(Augmentation.model_fields, 0))
"""Changes nothing."""

# Left and right of a body are not exchangeable in X-ray, CT and MRI, nor are up and down in ultrasound. A tissue
# section has no upper side; a retina seen in a mirror is one of the other eye.
STANDARD: dict[str, Augmentation] = {
    "xray": Augmentation(),
    "ct": Augmentation(),
    "mri": Augmentation(),
    "ultrasound": Augmentation(rotation=8.0),
    "histopathology": Augmentation(
        flip_horizontal=0.5, flip_vertical=0.5, quarter_turns=True, rotation=15.0, color=0.15, gray=0.05
    ),
    "fundus": Augmentation(flip_horizontal=0.5, rotation=15.0, color=0.15, gray=0.05),
}
"""The standard augmentation of each modality."""

UNKNOWN_LIKE = "xray"
"""Images of unknown modality are augmented like those of this one, which are never flipped."""


def standard_augmentation(changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Augmentation]:
    """The standard augmentation of each modality with changes to it.

    Args:
        changes: modality, or `all`, to the fields of `Augmentation` that differ; a modality's own win over `all`.

    Returns:
        Modality to its augmentation.

    Raises:
        ValueError: for an unknown modality, field or value.
    """
    changes = changes or {}
    unknown = set(changes) - {"all", *STANDARD}
    if unknown:
        raise ValueError(f"augmentation: there is no modality {sorted(unknown)[0]!r}, but all, {', '.join(STANDARD)}")
    return {
        name: Augmentation.model_validate({**standard.model_dump(), **changes.get("all", {}), **changes.get(name, {})})
        for name, standard in STANDARD.items()
    }


def augment(
    image: Image.Image, augmentation: Augmentation, rng: random.Random, caption: str = "", side: int = 0
) -> Image.Image:
    """A changed copy of a training image.

    Args:
        image: of any mode; other modes than L and RGB are first brought to 8-bit RGB, as the image processor does.
        augmentation: what may change, and how far.
        rng: where every choice comes from.
        caption: if it names a side, the image is not flipped horizontally.
        side: of the images that the model reads, in pixels; larger images are first reduced to what that needs. 0
            leaves the size.

    Returns:
        The image, of mode L or RGB.
    """
    if image.mode not in ("L", "RGB"):
        image = Image.fromarray(to_rgb(image).permute(1, 2, 0).numpy().round().astype(np.uint8))
    # All draws are made whether they are needed or not, so that no choice depends on the ones before it.
    a = augmentation
    geometry = _geometry(a, rng, flips=not _SIDES.search(caption))
    table = _intensity_table(a, rng, channels=len(image.getbands()))
    draws = [rng.random() for _ in range(6)]
    seeds = [rng.getrandbits(32) for _ in range(6)]
    equalized, share = rng.random() < a.equalize, rng.random()
    if side:
        # Image.thumbnail would decode anew; a box filter by whole factors is the cheapest there is.
        factor = int(min(image.size) / (_MARGIN * side))
        if factor > 1:
            image = image.reduce(factor)
    image = _warp(image, geometry)
    if equalized:
        image = _equalize(image, share)
    if table is not None:
        image = image.point(table)
    steps: tuple[tuple[float, Callable[[Image.Image, random.Random], Image.Image]], ...] = (
        (a.gray if image.mode == "RGB" else 0.0, lambda picture, _: picture.convert("L").convert("RGB")),
        (a.blur, _blur),
        (a.sharpen, _sharpen),
        (a.erase, _erase),
        (a.noise, _noise),
        (a.jpeg, _jpeg),
    )
    for (probability, change), draw, seed in zip(steps, draws, seeds, strict=True):
        if draw < probability:
            image = change(image, random.Random(seed))
    return image


def _between(rng: random.Random, spread: float) -> float:
    """A factor from 1 / (1 + spread) to 1 + spread, as often below 1 as above."""
    return math.exp(rng.uniform(-1, 1) * math.log1p(spread))


def _geometry(a: Augmentation, rng: random.Random, flips: bool) -> tuple[np.ndarray, tuple[float, float], int]:
    """A 2x2 matrix from output to input around the centre, a shift as shares of the size, and quarter turns."""
    angle = math.radians(rng.uniform(-a.rotation, a.rotation))
    zoom, stretch = _between(rng, a.zoom), _between(rng, a.stretch)
    shear = rng.uniform(-a.shear, a.shear)
    horizontal, vertical = rng.random() < a.flip_horizontal, rng.random() < a.flip_vertical
    turns = rng.randrange(4)
    shift = rng.uniform(-a.shift, a.shift), rng.uniform(-a.shift, a.shift)
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = matrix @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([stretch / zoom, 1 / (stretch * zoom)])
    matrix = matrix @ np.diag([-1.0 if horizontal and flips else 1.0, -1.0 if vertical else 1.0])
    return matrix, shift, turns if a.quarter_turns else 0


def _warp(image: Image.Image, geometry: tuple[np.ndarray, tuple[float, float], int]) -> Image.Image:
    matrix, shift, turns = geometry
    if turns:
        image = image.transpose(
            (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns - 1]
        )
    if np.array_equal(matrix, np.eye(2)) and shift == (0.0, 0.0):
        return image
    centre = np.array(image.size) / 2
    offset = centre - matrix @ centre + np.array(shift) * image.size
    (a, b), (d, e) = matrix.tolist()
    numbers = (a, b, offset[0], d, e, offset[1])
    return image.transform(
        image.size, Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR, fillcolor=_border(image)
    )


def _border(image: Image.Image) -> Any:
    """The median of the outermost pixels: black around a retina, tissue around tissue."""
    pixels = np.asarray(image)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    median = np.median(edges, axis=0)
    return int(median) if image.mode == "L" else tuple(int(value) for value in median)


def _intensity_table(a: Augmentation, rng: random.Random, channels: int) -> list[int] | None:
    """Gamma, contrast about the middle, brightness and a factor for each channel, in one table of 256 values each."""
    gamma, contrast = _between(rng, a.gamma), _between(rng, a.contrast)
    brightness = rng.uniform(-a.brightness, a.brightness)
    factors = [_between(rng, a.color) for _ in range(3)]
    if not (a.gamma or a.contrast or a.brightness or (a.color and channels == 3)):
        return None
    plain = (np.arange(256) / 255) ** gamma
    # What is black stays black: the padding of an image and the air around a body have no brightness to change.
    share = np.clip(np.arange(256) / 32, 0, 1)
    values = plain + share * ((plain - 0.5) * (contrast - 1) + brightness)
    tables = [values * factor for factor in factors] if channels == 3 else [values]
    return [int(value) for table in tables for value in np.clip(255 * table + 0.5, 0, 255)]


def _equalize(image: Image.Image, share: float) -> Image.Image:
    """Moves each gray level towards its quantile among the pixels that are not black, equally in all channels."""
    counts = np.asarray(image.convert("L").histogram(), dtype=np.float64)
    counts[:_BLACK] = 0  # Otherwise padding and the air around a body would determine the result.
    if not counts.any():
        return image
    levels = np.arange(256)
    quantiles = _BLACK + (255 - _BLACK) * (np.cumsum(counts) - counts / 2) / counts.sum()
    quantiles[:_BLACK] = levels[:_BLACK]
    table = np.clip(levels + share * (quantiles - levels) + 0.5, 0, 255).astype(int).tolist()
    return image.point(table * len(image.getbands()))


def _blur(image: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.01 * min(image.size) + 0.2)))
    share = rng.uniform(0.35, 0.8)
    small = max(1, int(share * image.width)), max(1, int(share * image.height))
    return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


def _sharpen(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(
        ImageFilter.UnsharpMask(radius=rng.uniform(0.8, 2.0), percent=int(rng.uniform(40, 140)), threshold=0)
    )


def _erase(image: Image.Image, rng: random.Random) -> Image.Image:
    area, ratio = rng.uniform(0.02, 0.1), math.exp(rng.uniform(-0.7, 0.7))
    width = max(1, int(image.width * math.sqrt(area * ratio)))
    height = max(1, int(image.height * math.sqrt(area / ratio)))
    x, y = rng.randrange(max(1, image.width - width)), rng.randrange(max(1, image.height - height))
    image = image.copy()
    gray = rng.randrange(256)
    image.paste(gray if image.mode == "L" else (gray, gray, gray), (x, y, x + width, y + height))
    return image


def _noise(image: Image.Image, rng: random.Random) -> Image.Image:
    generator = np.random.default_rng(rng.getrandbits(64))
    scale = 255 * rng.uniform(0.0, 0.06)
    pixels = np.asarray(image).astype(np.float32)
    # One value per pixel: the noise of a detector, not of its colours.
    noise = generator.standard_normal(pixels.shape[:2], dtype=np.float32) * scale
    pixels += noise if pixels.ndim == 2 else noise[..., None]
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(30, 90))
    compressed = Image.open(io.BytesIO(buffer.getvalue()))
    compressed.load()
    return compressed
