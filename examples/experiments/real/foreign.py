"""Pictures that are no medical image: photographs, pages of text, noise, drawings and screenshots.

Photographs are those that scikit-image, scikit-learn and matplotlib ship; everything else is drawn. There are two
halves: what is chosen on one half is reported on the other. The halves share no photograph, no typeface, no kind of
noise and no theme of a screenshot.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from medmoe_hf.data.phantom import phantom_sample, phantom_vocabulary
from medmoe_hf.errors import SourceError

CROPS = 8
"""Pictures that are made of one photograph: the whole, and parts of it. They count as one subject."""
DRAWN = 48
"""Pictures of each other kind, in each half."""

# Those of scikit-image that are no medical images; its two views of a motorcycle are one subject.
_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
_TYPEFACES = (
    ("DejaVuSerif.ttf", "cmr10.ttf", "DejaVuSansMono.ttf"),
    ("DejaVuSans.ttf", "STIXGeneral.ttf", "cmtt10.ttf"),
)
_THEMES = (
    ({"back": "#ffffff", "bar": "#f0f0f0", "ink": "#222222", "mark": "#1f6feb"},
     {"back": "#f6f8fa", "bar": "#24292f", "ink": "#1b1f24", "mark": "#0b7a4b"}),
    ({"back": "#1e1e1e", "bar": "#333333", "ink": "#d4d4d4", "mark": "#c586c0"},
     {"back": "#fdf6e3", "bar": "#eee8d5", "ink": "#586e75", "mark": "#cb4b16"},
     {"back": "#000000", "bar": "#101010", "ink": "#33ff66", "mark": "#ffb000"}),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Foreign:
    """A picture that is no medical image.

    Args:
        kind: `photograph`, `text page`, `noise`, `drawing` or `screenshot`.
        subject: What it was made of; pictures of one subject are not independent.
        image: The picture.
    """

    kind: str
    subject: str
    image: Image.Image


def foreign_images(half: int) -> list[Foreign]:
    """Returns the pictures of a half.

    Args:
        half: 0 to choose on, 1 to report on.

    Raises:
        SourceError: If a package that ships photographs is missing.
    """
    found = photographs(half)
    drawn: tuple[tuple[str, Callable[[int, np.random.Generator], Image.Image]], ...] = (
        ("text page", _page),
        ("noise", _noise),
        ("screenshot", _screenshot),
    )
    for kind, draw in drawn:
        for number in range(DRAWN):
            image = draw(half, np.random.default_rng([half, number, len(kind)]))
            found.append(Foreign(kind, f"{kind} {half}-{number}", image))
    for number in range(DRAWN):
        found.append(Foreign("drawing", f"drawing {half}-{number}", phantom_sample(half, number)["image"]))
    return found


def photographs(half: int) -> list[Foreign]:
    """Returns the photographs of a half, each whole and in parts."""
    paths = sorted([*_files("skimage", "data", _PHOTOGRAPHS), *_files("sklearn", "datasets/images", ("china.jpg",))])
    paths += _files("sklearn", "datasets/images", ("flower.jpg",))
    paths += _files("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",))
    found = []
    for place, path in enumerate(paths):
        if place % 2 != half:
            continue
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        random = np.random.default_rng([7, place])
        for number in range(CROPS):
            part = whole if number == 0 else _part(whole, random)
            # Every other one is gray: color alone would tell most of them from scans.
            found.append(Foreign("photograph", path.stem, part.convert("L") if number % 2 else part))
    return found


def _files(package: str, folder: str, names: tuple[str, ...]) -> list[Path]:
    try:
        root = Path(str(importlib.import_module(package).__file__)).parent / folder
    except ImportError as error:
        raise SourceError(f"The photographs are in a package: pip install {package}") from error
    return [root / name for name in names if (root / name).is_file()]


def _part(whole: Image.Image, random: np.random.Generator) -> Image.Image:
    width, height = (int(side * random.uniform(0.35, 0.9)) for side in whole.size)
    left, top = int(random.integers(whole.width - width + 1)), int(random.integers(whole.height - height + 1))
    return whole.crop((left, top, left + width, top + height))


def _typeface(half: int, random: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = _TYPEFACES[half][random.integers(len(_TYPEFACES[half]))]
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _words(random: np.random.Generator, count: int) -> str:
    words = phantom_vocabulary()
    return " ".join(words[index] for index in random.integers(len(words), size=count))


def _page(half: int, random: np.random.Generator) -> Image.Image:
    """A page with a heading and paragraphs, on paper that is more or less white, sometimes blurred like a scan."""
    size = int(random.integers(14, 30))
    paper = int(random.integers(225, 256))
    page = Image.new("L", (620, int(random.integers(500, 877))), paper)
    pen, text = ImageDraw.Draw(page), _typeface(half, random, size)
    pen.text((50, 40), _words(random, 3).title(), fill=20, font=_typeface(half, random, size + 10))
    top = 60 + 2 * size
    while top < page.height - 60:
        if random.random() < 0.12:
            top += size
            continue
        line = _words(random, 30)
        pen.text(
            (50, top), line[: int(900 / size * random.uniform(0.75, 1))], fill=int(random.integers(70)), font=text
        )
        top += int(1.4 * size)
    if random.random() < 0.5:
        page = page.rotate(random.uniform(-3, 3), fillcolor=paper).filter(ImageFilter.GaussianBlur(0.8))
    return page


def _noise(half: int, random: np.random.Generator) -> Image.Image:
    """Half 0: white noise and white noise that is smoothed; half 1: noise of spectrum 1/f and sparse points."""
    channels, side = int(random.choice([1, 3])), 224
    grid = random.normal(size=(side, side, channels))
    kind = int(random.integers(2))
    if half == 0 and kind:
        radius = random.uniform(1, 6)
        layers = [Image.fromarray(grid[..., layer].astype(np.float32)) for layer in range(channels)]
        scaled = [_bytes(np.asarray(layer)[..., None]) for layer in layers]
        smooth = [Image.fromarray(layer[..., 0]).filter(ImageFilter.GaussianBlur(radius)) for layer in scaled]
        grid = np.stack([np.asarray(layer, dtype=np.float64) for layer in smooth], axis=-1)
    elif half == 1 and kind:
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
        frequency[0, 0] = 1 / side
        spectrum = np.fft.fft2(grid, axes=(0, 1)) / (frequency ** random.uniform(0.7, 1.6))[..., None]
        grid = np.fft.ifft2(spectrum, axes=(0, 1)).real
    elif half == 1:
        grid = (random.random((side, side, channels)) < random.uniform(0.02, 0.3)).astype(np.float64)
    pixels = _bytes(grid)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _bytes(grid: np.ndarray) -> np.ndarray:
    low, high = np.quantile(grid, [0.01, 0.99])
    scaled = (grid - low) / max(high - low, 1e-9)
    return np.asarray((np.clip(scaled, 0, 1) * 255).astype(np.uint8))


def _screenshot(half: int, random: np.random.Generator) -> Image.Image:
    """A window with a title bar, a list at its side, and text, a table, buttons or a chart beside it."""
    theme = _THEMES[half][random.integers(len(_THEMES[half]))]
    width, height = int(random.integers(640, 1280)), int(random.integers(420, 800))
    screen = Image.new("RGB", (width, height), theme["back"])
    pen, text = ImageDraw.Draw(screen), _typeface(half, random, int(random.integers(13, 22)))
    pen.rectangle((0, 0, width, 34), fill=theme["bar"])
    for place in range(3):
        pen.ellipse((12 + 22 * place, 11, 24 + 22 * place, 23), fill=theme["mark"])
    side = int(width * random.uniform(0, 0.3))
    pen.rectangle((0, 34, side, height), fill=theme["bar"])
    for row in range(60, height, 30):
        if side > 90:
            pen.text((14, row), _words(random, 2)[: side // 11], fill=theme["mark"], font=text)
    top = 60
    while top < height - 40:
        kind, left = int(random.integers(4)), side + 24
        if kind == 0:
            for _ in range(5):
                pen.text((left, top), _words(random, 9), fill=theme["ink"], font=text)
                top += 26
        elif kind == 1:
            for row in range(4):
                pen.rectangle((left, top + 26 * row, width - 30, top + 26 * row + 26), outline=theme["ink"])
                pen.text((left + 6, top + 26 * row + 4), _words(random, 3), fill=theme["ink"], font=text)
            for column in np.linspace(left, width - 30, 5)[1:-1]:
                pen.line((column, top, column, top + 104), fill=theme["ink"])
            top += 110
        elif kind == 2:
            for place in range(3):
                box = (left + 150 * place, top, left + 150 * place + 130, top + 34)
                pen.rounded_rectangle(box, radius=8, fill=theme["mark"])
            top += 48
        else:
            heights = random.integers(10, 100, size=12)
            for place, bar in enumerate(heights):
                pen.rectangle(
                    (left + 30 * place, top + 100 - bar, left + 30 * place + 20, top + 100), fill=theme["mark"]
                )
            top += 110
        top += 16
    return screen
