"""Images of phantoms: simple geometry rendered with the look of a modality.

Shapes are drawn in coordinates `u` (to the right of the image) and `v` (down), both from -1 to 1 across the image.
`px` is one pixel in these units, the width over which edges are blended.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medmoe_hf.data.phantom.reports import Scene

Field = NDArray[np.floating[Any]]  # always float32, but numpy's stubs widen sums with a Python float
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _frame(
    rng: np.random.Generator, size: int, shift: float = 0.08, turn: float = 0.07, zoom: float = 0.06
) -> tuple[Field, Field, float]:
    """Returns coordinates u and v of every pixel, randomly shifted, rotated and scaled, and the size of a pixel."""
    x, y = _grid(size)
    dx, dy = rng.uniform(-shift, shift), rng.uniform(-shift, shift)
    angle, scale = rng.uniform(-turn, turn), rng.uniform(1 - zoom, 1 + zoom)
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    return c * x + s * y - (c * dx + s * dy), c * y - s * x - (c * dy - s * dx), 2.0 / (size * scale)


def _ramp(distance: Field, edge: float) -> Field:
    """Returns the coverage of the region where `distance` is positive, blended over `edge`."""
    cover = distance * (1.0 / edge)
    cover += 0.5
    return np.clip(cover, 0.0, 1.0, out=cover)


def _disc(
    u: Field,
    v: Field,
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    edge: float,
    *,
    tilt: float = 0.0,
    warp: Field | float = 0.0,
) -> Field:
    """Returns the coverage of an ellipse. `warp` is added to its squared radius to make the outline irregular."""
    p, q = u - cx, v - cy
    if tilt:
        c, s = math.cos(tilt), math.sin(tilt)
        p, q = c * p + s * q, c * q - s * p
    p *= 1.0 / rx
    q *= 1.0 / ry
    p *= p
    q *= q
    p += q
    p += warp
    # The squared radius falls off twice as fast at the outline as the distance does.
    slope = min(rx, ry) / (2.0 * edge)
    p *= -slope
    p += slope + 0.5
    return np.clip(p, 0.0, 1.0, out=p)


def _paint(canvas: Field, cover: Field, value: float | Field) -> None:
    canvas += cover * (value - canvas)


def _smooth(rng: np.random.Generator, cells: int, size: int) -> Field:
    """Returns smooth noise of about unit variance, with `cells` blobs across the image."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32) * 1.3)
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _bytes(intensity: Field) -> Pixels:
    pixels: Pixels = np.clip(intensity * 255.0, 0.0, 255.0).astype(np.uint8)
    return pixels


def _interleave(channels: Field) -> Pixels:
    """Converts color planes (3, size, size) in 0..1 to an image (size, size, 3)."""
    return np.ascontiguousarray(np.moveaxis(_bytes(channels), 0, -1))


def _between(extent: float, low: float, high: float) -> float:
    return low + (high - low) * extent


def _draw_xray(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws a frontal chest radiograph: attenuation adds up along the beam, so that shadows overlap."""
    u, v, px = _frame(rng, size, shift=0.1)
    soft, fold = px + 0.03, np.abs(u)
    wide, dome = rng.uniform(0.92, 1.04), rng.uniform(0.34, 0.46)
    across, along = np.square(u * (1 / (0.97 * wide))), np.square((v - 0.8) * (1 / 1.62))
    torso = 1.0 - np.square(across) - np.square(along)
    density = 0.55 * np.maximum(_ramp(torso, 0.25), _disc(u, v, 0.0, -0.95, 0.27, 0.5, 0.05))
    halves = [_disc(u, v, s * 0.41 * wide, -0.08, 0.33 * wide, 0.68, soft, tilt=s * -0.12) for s in (-1, 1)]
    # The right dome of the diaphragm (on the left of the image) is higher, pushed up by the liver.
    floor = dome - 0.05 * _ramp(-u, 0.1) + 1.4 * (fold - 0.38) ** 2
    air = _ramp(floor - v, soft)
    lungs = np.maximum(halves[0], halves[1]) * air
    density -= lungs * (0.40 + rng.uniform(-0.03, 0.03) + 0.025 * _smooth(rng, 22, size))
    density += 0.12 * _ramp(v - floor, 0.15) * _ramp(0.75 - fold, 0.3)
    ribs = np.cos((v * rng.uniform(4.6, 5.4) + 1.3 * u * u - 0.5 * fold + rng.random()) * (2 * math.pi))
    density += 0.085 * np.clip(ribs * 2.2 - 0.9, 0.0, 1.0) * _disc(u, v, 0.0, -0.05, 0.85 * wide, 0.85, 0.05)
    density += _ramp(0.075 - fold, soft) * (0.13 + 0.035 * np.cos(v * 22.0))
    density += 0.10 * _disc(u, v, 0.02, -0.35, 0.16, 0.5, 0.06)
    collar = np.abs(v + 0.58 + 0.16 * fold)
    density += 0.14 * _ramp(0.03 - collar, soft) * _ramp(fold - 0.08, 0.05) * _ramp(0.72 * wide - fold, 0.05)
    big = scene.finding == "cardiomegaly"
    half = _between(scene.extent, 0.43, 0.60) if big else rng.uniform(0.24, 0.30)
    tall = 0.23 + 0.45 * (half - 0.25)
    heart = _disc(u, v, 0.12, dome - 0.06 - 0.75 * tall, half, tall, soft, tilt=0.45)
    density += heart * (0.06 + 0.27 * lungs)
    mask = heart > 0.5 if big else np.zeros((size, size), dtype=bool)
    half_lung = halves[(scene.side + 1) // 2]
    if scene.finding == "effusion":
        level = dome - _between(scene.extent, 0.10, 0.65)
        fluid = half_lung * _ramp(v - level + 0.9 * (fold - 0.2) ** 2 - 0.1, soft)
        _paint(density, fluid, 0.86 + 0.05 * v)
        mask = fluid > 0.5
    elif scene.finding == "consolidation":
        radius = _between(scene.extent, 0.22, 0.36)
        cx, cy = scene.side * wide * rng.uniform(0.38, 0.46), rng.uniform(-0.08, 0.08) + (-0.42, 0.02)[scene.level > 0]
        blob = _disc(u, v, cx, cy, radius, radius * 1.05, 0.06, warp=0.3 * _smooth(rng, 7, size)) * half_lung * lungs
        density += blob * (1.0 - 0.6 * heart) * (0.36 + 0.06 * _smooth(rng, 18, size))
        mask = blob > 0.5
    density += 0.02 * _smooth(rng, 5, size)
    grain = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0.015, 0.035)
    return _bytes(density * rng.uniform(1.0, 1.18) + rng.uniform(0.0, 0.06) + grain), mask


def _draw_ct(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws an axial slice of the upper abdomen in Hounsfield units, through a soft-tissue window of width 400."""
    u, v, px = _frame(rng, size, shift=0.1, turn=0.1)
    soft = px + 0.01
    wide, tall, fat = rng.uniform(0.86, 0.92), rng.uniform(0.64, 0.72), rng.uniform(0.03, 0.10)
    hu: Field = np.full((size, size), -1000.0, dtype=np.float32)
    _paint(hu, _ramp(0.035 - np.abs(v - 0.86 + 0.12 * u * u), px), 60.0)
    for inset, value in ((0.0, 30.0), (0.02, -105.0), (fat, 55.0), (fat + 0.07, -85.0)):
        _paint(hu, _disc(u, v, 0.0, 0.0, wide - inset, tall - inset, soft), value)
    inner_w, inner_h = wide - fat - 0.075, tall - fat - 0.075
    cavity = _disc(u, v, 0.0, 0.0, inner_w, inner_h, soft)
    bones = _disc(u, v, 0.0, 0.0, inner_w + 0.05, inner_h + 0.05, soft) * (1.0 - cavity)
    spokes = np.cos(np.arctan2(v, u) * 13.0 + rng.uniform(0.0, 6.28))
    _paint(hu, bones * np.clip(spokes * 3.0 - 1.2, 0.0, 1.0), 420.0)
    liver_hu = rng.uniform(95.0, 120.0)
    organs = (
        (0.30 + rng.uniform(-0.05, 0.05), -0.30, 0.24, 0.16, 0.2, 15.0),
        (0.59, 0.06, 0.17, 0.27, 0.25, liver_hu + 12.0),
        (-0.08, -0.30, 0.34, 0.15, -0.1, liver_hu),
        (-0.36, -0.10, 0.42, 0.44, 0.3, liver_hu),
    )
    for cx, cy, rx, ry, tilt, value in organs:
        _paint(hu, cavity * _disc(u, v, cx, cy, rx, ry, soft, tilt=tilt), value)
    _paint(hu, _disc(u, v, 0.30, -0.33, 0.17, 0.10, soft) * _ramp(-0.33 - v, soft), -800.0)
    mask = np.zeros((size, size), dtype=bool)
    for side in (-1, 1):
        mask |= _ct_kidney(rng, u, v, soft, hu, side, scene)
    for cx, cy, rx, ry, value in (
        (0.0, 0.52, 0.24, 0.035, 260.0),
        (0.0, 0.60, 0.035, 0.09, 330.0),
        (0.0, 0.36, 0.15, 0.12, 420.0),
        (0.0, 0.36, 0.12, 0.09, 190.0),
        (0.0, 0.51, 0.06, 0.05, 20.0),
        (-0.13, 0.15, 0.075, 0.05, 130.0),
    ):
        _paint(hu, _disc(u, v, cx, cy, rx, ry, soft), value)
    mask |= _ct_aorta(rng, u, v, soft, hu, scene)
    if scene.finding == "metastasis":
        radius = _between(scene.extent, 0.18, 0.30)
        cx, cy = rng.uniform(-0.48, -0.34), (-0.28, 0.10)[scene.level > 0] + rng.uniform(-0.04, 0.04)
        tumour = _disc(u, v, cx, cy, radius, radius * rng.uniform(0.85, 1.0), 0.03, warp=0.12 * _smooth(rng, 9, size))
        tumour = tumour * cavity
        _paint(hu, tumour, 210.0)
        core = _disc(u, v, cx, cy, radius - 0.07, radius - 0.09, 0.03) * tumour
        _paint(hu, core, rng.uniform(10.0, 30.0))
        mask |= tumour > 0.5
    hu += rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(10.0, 22.0)
    level = rng.uniform(35.0, 65.0)
    return _bytes((hu - (level - 200.0)) * (1.0 / 400.0)), mask


def _ct_kidney(rng: np.random.Generator, u: Field, v: Field, soft: float, hu: Field, side: int, scene: Scene) -> Mask:
    """Draws the kidney on one side; returns its mask if it is the hydronephrotic one, else an empty mask."""
    cx, cy, value = side * rng.uniform(0.35, 0.40), rng.uniform(0.24, 0.30), rng.uniform(165.0, 200.0)
    if scene.finding != "hydronephrosis" or side != scene.side:
        _paint(hu, _disc(u, v, cx, cy, 0.13, 0.17, soft, tilt=side * -0.3), value)
        _paint(hu, _disc(u, v, cx - side * 0.05, cy, 0.05, 0.06, soft), -40.0)
        return np.zeros(u.shape, dtype=bool)
    radius = _between(scene.extent, 0.15, 0.225)
    # A swollen kidney extends forward, since the muscles of the back are behind it.
    cy -= 1.2 * (radius - 0.15)
    kidney = _disc(u, v, cx, cy, radius + 0.055, radius + 0.085, soft, tilt=side * -0.3)
    _paint(hu, kidney, value + 60.0)
    pelvis = np.maximum(
        _disc(u, v, cx - side * 0.1 * radius, cy, radius * 0.92, radius * 0.7, soft, tilt=side * -0.3),
        _disc(u, v, cx + side * 0.1 * radius, cy, radius * 0.5, radius * 1.1, soft, tilt=side * -0.3),
    )
    _paint(hu, pelvis, rng.uniform(0.0, 10.0))
    return kidney > 0.5


def _ct_aorta(rng: np.random.Generator, u: Field, v: Field, soft: float, hu: Field, scene: Scene) -> Mask:
    """Draws the contrast-filled aorta in front of the spine; returns its mask if it is an aneurysm."""
    lumen = rng.uniform(215.0, 245.0)
    if scene.finding != "aneurysm":
        _paint(hu, _disc(u, v, 0.04, 0.16, 0.06, 0.06, soft), lumen)
        return np.zeros(u.shape, dtype=bool)
    radius = _between(scene.extent, 0.17, 0.27)
    cx, cy = 0.04 + rng.uniform(-0.05, 0.08), 0.24 - radius
    wall = _disc(u, v, cx, cy, radius, radius * 0.95, soft)
    # A calcified wall, an unenhanced thrombus, and the remaining lumen.
    _paint(hu, wall, 420.0)
    _paint(hu, _disc(u, v, cx, cy, radius - 0.045, radius * 0.95 - 0.045, soft), -30.0)
    _paint(hu, _disc(u, v, cx + 0.2 * radius, cy + 0.15 * radius, radius * 0.66, radius * 0.6, soft), lumen)
    return wall > 0.5


# Relative signal of scalp fat, cerebrospinal fluid, gray matter, white matter and a meningioma.
_MRI_SIGNAL = {
    "t1": (0.92, 0.10, 0.40, 0.58, 0.92),
    "t2": (0.70, 0.88, 0.52, 0.34, 0.72),
    "flair": (0.62, 0.07, 0.52, 0.40, 0.78),
}


def _draw_mri(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws an axial slice of the head at the lateral ventricles, in one of three weightings, with a bias field."""
    u, v, px = _frame(rng, size, shift=0.08, turn=0.12)
    soft = px + 0.01
    fat, csf, grey, white, dural = _MRI_SIGNAL[scene.protocol]
    rx, ry = rng.uniform(0.68, 0.76), rng.uniform(0.84, 0.90)
    signal: Field = np.zeros((size, size), dtype=np.float32)
    for inset, value in ((0.0, fat), (0.06, 0.04), (0.11, csf)):
        _paint(signal, _disc(u, v, 0.0, 0.0, rx - inset, ry - inset, soft), value)
    bx, by = rx - 0.14, ry - 0.14
    folds = _smooth(rng, 20, size)
    brain = _disc(u, v, 0.0, 0.0, bx, by, soft, warp=0.05 * folds)
    _paint(signal, brain, grey)
    cortex = brain * (1.0 - _disc(u, v, 0.0, 0.0, 0.78 * bx, 0.78 * by, 0.1))
    _paint(signal, cortex * np.clip(1.0 - 4.0 * np.abs(folds), 0.0, 1.0), csf)
    _paint(signal, _disc(u, v, 0.0, 0.0, 0.82 * bx, 0.82 * by, soft, warp=0.22 * folds), white)
    fissure = _ramp(0.012 - np.abs(u), px) * brain * _ramp(np.abs(v) - 0.32, 0.05)
    _paint(signal, fissure, csf)
    open_by = rng.uniform(0.8, 1.25)
    for side in (-1, 1):
        _paint(signal, _disc(u, v, side * 0.25, 0.02, 0.08, 0.17, soft, tilt=side * 0.2), grey)
        _paint(signal, _disc(u, v, side * 0.10, -0.16, 0.055 * open_by, 0.20, soft, tilt=side * 0.3), csf)
        _paint(signal, _disc(u, v, side * 0.14, 0.22, 0.055 * open_by, 0.18, soft, tilt=side * -0.35), csf)
    mask = np.zeros((size, size), dtype=bool)
    if scene.finding in ("plaque", "hematoma"):
        radius = _between(scene.extent, 0.16, 0.25)
        cx, cy = scene.side * rng.uniform(0.24, 0.38), (-0.36, 0.38)[scene.level > 0] + rng.uniform(-0.08, 0.08)
        tilt, flat, warp = rng.uniform(-0.8, 0.8), rng.uniform(0.8, 1.0), 0.15 * _smooth(rng, 12, size)
        focus = _disc(u, v, cx, cy, radius, radius * flat, soft, tilt=tilt, warp=warp)
        if scene.finding == "hematoma":
            rim = _disc(u, v, cx, cy, radius + 0.06, radius * flat + 0.06, soft, tilt=tilt, warp=warp)
            _paint(signal, rim * brain, 0.9)
        _paint(signal, focus, 1.0)
        if scene.finding == "hematoma":
            # The patient is supine: blood cells settle at the bottom, plasma stays on top.
            _paint(signal, focus * _ramp(v - cy, px), 0.02)
        mask = focus > 0.5
    elif scene.finding == "meningioma":
        radius = _between(scene.extent, 0.26, 0.37)
        angle = math.atan2(scene.level, scene.side) + rng.uniform(-0.35, 0.35)
        cx, cy = 0.96 * (rx - 0.11) * math.cos(angle), 0.96 * (ry - 0.11) * math.sin(angle)
        inner = _disc(u, v, 0.0, 0.0, rx - 0.10, ry - 0.10, soft)
        _paint(signal, inner * _disc(u, v, cx, cy, radius + 0.04, radius + 0.04, soft), 0.04)
        tumour = inner * _disc(u, v, cx, cy, radius, radius, soft)
        # The rim enhances; the calcified core has no signal.
        _paint(signal, tumour, dural)
        _paint(signal, inner * _disc(u, v, cx, cy, radius - 0.03, radius - 0.03, soft), 0.02)
        mask = tumour > 0.5
    bias = 1.0 + rng.uniform(-0.14, 0.14) * u + rng.uniform(-0.14, 0.14) * v
    sigma = rng.uniform(0.02, 0.045)
    noise = rng.standard_normal((2, size, size), dtype=np.float32) * sigma
    return _bytes(0.92 * np.sqrt((signal * bias + noise[0]) ** 2 + noise[1] ** 2)), mask


def _draw_ultrasound(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws a sector image: echo strength times speckle, fine along the beam and coarse across it, log-compressed."""
    u, v, px = _frame(rng, size, shift=0.04, turn=0.04, zoom=0.04)
    apex, near, far, half = -1.12, 0.22, 2.0, rng.uniform(0.46, 0.52)
    depth, beam = np.sqrt(u * u + np.square(v - apex)), np.arctan2(u, v - apex)
    fan = _ramp(half - np.abs(beam), 0.02) * _ramp(far - depth, px) * _ramp(depth - near, px)
    echo = 0.42 + 0.05 * _smooth(rng, 6, size)
    wave = depth + 0.03 * np.sin(u * 4.0 + rng.uniform(0.0, 6.28))
    for position, width, gain in ((0.28, 0.03, 0.8), (0.40, 0.02, 0.5), (rng.uniform(0.5, 0.58), 0.02, 0.9)):
        echo += gain * np.clip(1.0 - np.abs(wave - position) * (1.0 / width), 0.0, 1.0)
    rear = rng.uniform(1.72, 1.85) + 0.1 * u * rng.uniform(-1.0, 1.0)
    echo += 1.1 * np.clip(1.0 - np.abs(wave - rear) * 30.0, 0.0, 1.0)
    mask = np.zeros((size, size), dtype=bool)
    if scene.finding != "normal":
        mask = _ultrasound_focus(rng, u, v, px, echo, depth, beam, apex, scene)
    loss = 1.0 / (1.0 + np.exp((depth - rng.uniform(1.8, 2.3)) * 3.0))
    speckle = _speckle(rng, size, depth, beam, near, far, half)
    loud = echo * loss * speckle * rng.uniform(0.9, 1.15)
    return _bytes(fan * (0.30 * np.log(loud * 12.0 + 1.0) - 0.03)), mask & (fan > 0.5)


def _ultrasound_focus(
    rng: np.random.Generator,
    u: Field,
    v: Field,
    px: float,
    echo: Field,
    depth: Field,
    beam: Field,
    apex: float,
    scene: Scene,
) -> Mask:
    """Draws the finding into `echo`, in place, with its shadow or enhancement behind it; returns its mask."""
    cy = rng.uniform(-0.12, 0.02) if scene.level < 0 else rng.uniform(0.32, 0.46)
    cx = scene.side * (rng.uniform(0.17, 0.24) if scene.level < 0 else rng.uniform(0.24, 0.42))
    distance, angle = math.hypot(cx, cy - apex), math.atan2(cx, cy - apex)

    def behind(width: float) -> Field:
        return _ramp(width / distance - np.abs(beam - angle), 0.04) * _ramp(depth - distance, px)

    if scene.finding == "cyst":
        radius = _between(scene.extent, 0.20, 0.31)
        tail = behind(radius * 0.9)
        echo *= 1.0 + 1.2 * tail
        focus = _disc(u, v, cx, cy, radius, radius * 0.94, px)
        _paint(echo, focus, 3.0)
        echo *= 1.0 - 0.99 * _disc(u, v, cx, cy, radius * 0.74, radius * 0.68, px)
    elif scene.finding == "nodule":
        radius = _between(scene.extent, 0.22, 0.34)
        focus = _disc(u, v, cx, cy, radius, radius * 0.85, px, warp=0.35 * _smooth(rng, 11, u.shape[0]))
        echo *= 1.0 + 3.2 * focus
    else:
        radius = _between(scene.extent, 0.20, 0.32)
        echo *= 1.0 - 0.5 * behind(radius * 0.9)
        focus = _disc(u, v, cx, cy, radius, radius * 0.75, px, tilt=angle * -1.0)
        _paint(echo, focus, 5.0)
    return focus > 0.5


def _speckle(
    rng: np.random.Generator, size: int, depth: Field, beam: Field, near: float, far: float, half: float
) -> Field:
    """Returns Rayleigh-distributed speckle of mean about 1, sampled from a polar lattice."""
    lattice = rng.standard_normal((2, 110, 46), dtype=np.float32)
    rows = max(110, size)
    waves = [np.asarray(Image.fromarray(part).resize((rows, rows), Image.Resampling.BICUBIC)) for part in lattice]
    amplitude: Field = np.sqrt(np.square(waves[0]) + np.square(waves[1]))
    i = np.clip((depth - near) * (rows / (far - near)), 0, rows - 1).astype(np.intp)
    j = np.clip((beam + half) * (rows / (2 * half)), 0, rows - 1).astype(np.intp)
    speckle: Field = amplitude.ravel().take(i * rows + j)
    return speckle


def _nuclei(
    rng: np.random.Generator,
    u: Field,
    v: Field,
    px: float,
    cells: int,
    radius: tuple[float, float],
    present: float,
    stretch: float,
) -> Field:
    """Returns the coverage by nuclei, at most one in each cell of a rotated, bent and jittered lattice.

    A lattice costs the same for ten nuclei as for a thousand.

    Args:
        rng: Random generator.
        u: Horizontal coordinates of the pixels.
        v: Vertical coordinates of the pixels.
        px: Size of a pixel.
        cells: Number of cells across the image.
        radius: Range of radii, in cells.
        present: Share of the cells with a nucleus.
        stretch: Range of elongations.
    """
    angle, bend, phase = rng.uniform(0.0, math.pi), rng.uniform(0.4, 0.7), rng.uniform(0.0, 6.28)
    c, s, half = math.cos(angle) * cells / 2, math.sin(angle) * cells / 2, 0.95 * cells
    gx = c * u + s * v + half
    gy = c * v - s * u + half + bend * np.sin(gx * 0.9 + phase)
    side = 2 * int(half) + 4
    iy = np.clip(gy, 0, side - 1).astype(np.intp)
    gx += rng.random(side, dtype=np.float32).take(iy)
    ix = np.clip(gx, 0, side - 1).astype(np.intp)
    draws = rng.random((5, side * side), dtype=np.float32)
    size = radius[0] + (radius[1] - radius[0]) * draws[2]
    slack = np.maximum(1.0 - 2.0 * size, 0.0)
    grow = 1.0 + stretch * (draws[3] - 0.5)
    weight = np.where(draws[4] < present, 1.0, -9.0).astype(np.float32)
    gx -= ix
    gy -= iy
    cell = iy * side + ix
    gx -= (0.5 + slack * (draws[0] - 0.5)).take(cell)
    gx *= (1.0 / (size * grow)).take(cell)
    gy -= (0.5 + slack * (draws[1] - 0.5)).take(cell)
    gy *= (grow / size).take(cell)
    mean = 0.5 * (radius[0] + radius[1])
    return _ramp(weight.take(cell) - gx * gx - gy * gy, max(0.35, px * cells / mean))


# Optical density in red, green and blue per unit of stain, for hematoxylin (blue) and eosin (pink).
_HEMATOXYLIN = (0.84, 0.97, 0.41)
_EOSIN = (0.11, 0.74, 0.30)


def _draw_histopathology(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws a stained section: amounts of the two stains absorb light by their optical density."""
    u, v, px = _frame(rng, size, shift=0.05, turn=0.3, zoom=0.1)
    cloud, detail = _smooth(rng, 5, size), _smooth(rng, 26, size)
    run = rng.uniform(0.0, math.pi)
    along = (math.cos(run) * u + math.sin(run) * v) * rng.uniform(16.0, 24.0)
    eosin = 0.62 + 0.09 * cloud + 0.10 * np.sin(along + 1.6 * cloud) + 0.06 * detail
    nuclei = _nuclei(rng, u, v, px, 13, (0.15, 0.24), 0.55, stretch=1.2)
    blue = 0.07 + 0.02 * cloud
    x, y = _grid(size)
    mask = np.zeros((size, size), dtype=bool)
    if scene.finding != "normal":
        radius = _between(scene.extent, 0.32, 0.50)
        cx, cy = scene.side * rng.uniform(0.34, 0.46), scene.level * rng.uniform(0.34, 0.46)
        stretch = rng.uniform(0.88, 1.0)
        region = _disc(x, y, cx, cy, radius, radius * stretch, 0.03, warp=0.16 * _smooth(rng, 8, size))
        mask = region > 0.5
        nuclei = nuclei * (1.0 - region)
        if scene.finding == "carcinoma":
            crowd = _nuclei(rng, u, v, px, 12, (0.34, 0.50), 0.95, stretch=0.6)
            nuclei = nuclei + region * crowd * (1.15 + 0.25 * detail)
            blue = blue + 0.22 * region
        elif scene.finding == "inflammation":
            dots = np.maximum(*(_nuclei(rng, u, v, px, 27, (0.26, 0.34), 0.8, stretch=0.1) for _ in range(2)))
            nuclei = nuclei + 1.5 * region * dots
        else:
            _paint(eosin, region, 0.27 + 0.06 * detail)
            blue = blue * (1.0 - 0.6 * region) + 0.05 * region * np.maximum(_smooth(rng, 48, size), 0.0)
    blue = np.maximum(blue + nuclei * rng.uniform(0.85, 1.1), 0.0)
    eosin = np.maximum(eosin, 0.05) * rng.uniform(0.85, 1.15)
    light: Field = np.stack([eosin * -e - blue * h for e, h in zip(_EOSIN, _HEMATOXYLIN, strict=True)])
    np.exp(light, out=light)
    light *= 0.98
    light += rng.standard_normal((size, size), dtype=np.float32) * 0.016
    return _interleave(light), mask


def _draw_fundus(rng: np.random.Generator, size: int, scene: Scene) -> tuple[Pixels, Mask]:
    """Draws a color photograph of the retina: round field, optic disc with cup, vascular arcades, dark macula."""
    x, y = _grid(size)
    px = 2.0 / size
    rim = _disc(x, y, rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), 0.94, 0.94, px + 0.01)
    eye = scene.side
    ox, oy = eye * rng.uniform(0.34, 0.50), rng.uniform(-0.14, 0.14)
    mx, my = ox - eye * rng.uniform(0.62, 0.72), oy + rng.uniform(0.02, 0.12)
    radius = rng.uniform(0.20, 0.24)
    shade = 1.0 - 0.28 * (x * x + y * y) + 0.04 * _smooth(rng, 5, size)
    macula = np.exp(((x - mx) ** 2 + (y - my) ** 2) * -22.0)
    vessels = _vessels(rng, size, ox, oy, eye)
    red = shade * (0.86 - 0.16 * macula) * (1.0 - 0.30 * vessels)
    green = shade * (0.44 - 0.16 * macula + 0.015 * _smooth(rng, 14, size)) * (1.0 - 0.62 * vessels)
    blue = shade * (0.17 - 0.05 * macula) * (1.0 - 0.5 * vessels)
    channels = (red, green, blue)

    def tint(cover: Field, color: tuple[float, float, float]) -> None:
        for channel, value in zip(channels, color, strict=True):
            _paint(channel, cover, value)

    ratio = _between(scene.extent, 0.66, 0.92) if scene.finding == "cupping" else rng.uniform(0.25, 0.40)
    disc = _disc(x, y, ox, oy, radius * 0.92, radius, px + 0.02)
    tint(disc * (1.0 - 0.4 * vessels), (0.98, 0.68, 0.34))
    cup = _disc(x, y, ox, oy, radius * ratio * 0.92, radius * ratio, px + 0.01)
    tint(cup * (1.0 - 0.5 * vessels), (1.0, 0.95, 0.72))
    mask = cup > 0.5 if scene.finding == "cupping" else np.zeros((size, size), dtype=bool)
    if scene.finding in ("hemorrhages", "exudates"):
        spread = _between(scene.extent, 0.24, 0.38)
        cx, cy = scene.side * rng.uniform(0.32, 0.42), scene.level * rng.uniform(0.36, 0.46)
        spots = _spots(rng, x, y, px, cx, cy, spread, scene.finding == "exudates") * rim
        tint(spots, (1.0, 0.93, 0.45) if scene.finding == "exudates" else (0.36, 0.03, 0.03))
        mask = spots > 0.5
    light: Field = np.stack(channels) * (rim * rng.uniform(0.88, 1.08))
    light += rng.standard_normal((size, size), dtype=np.float32) * 0.015
    return _interleave(light), mask


def _spots(
    rng: np.random.Generator, x: Field, y: Field, px: float, cx: float, cy: float, spread: float, fine: bool
) -> Field:
    """Returns the coverage by a cluster of round spots within `spread` of a center, `fine`: small and many."""
    count = int(spread * (44 if fine else 26))
    low, high = (0.035, 0.055) if fine else (0.045, 0.085)
    cover: Field = np.zeros_like(x)
    for k in range(count):
        # A sunflower layout fills the cluster evenly, so that the spread determines its box.
        turn, reach = 2.4 * k + rng.uniform(-0.5, 0.5), spread * math.sqrt((k + 0.5) / count) * rng.uniform(0.85, 1.1)
        radius, sx, sy = rng.uniform(low, high), cx + reach * math.cos(turn), cy + reach * math.sin(turn)
        rows, columns = (
            slice(max(0, int((c - radius + 1.0) / px) - 1), max(0, int((c + radius + 1.0) / px) + 2)) for c in (sy, sx)
        )
        spot = _disc(x[rows, columns], y[rows, columns], sx, sy, radius, radius, px)
        np.maximum(cover[rows, columns], spot, out=cover[rows, columns])
    return cover


def _vessels(rng: np.random.Generator, size: int, ox: float, oy: float, eye: int) -> Field:
    """Returns the coverage by retinal vessels: four arcades of an artery and a vein, from the optic disc."""
    # Per vessel: above or below the disc, vein or artery, toward the macula or away from it.
    vertical = np.array([-1, -1, -1, -1, 1, 1, 1, 1])
    bow = np.array([1.0, 1.0, 0.8, 0.8] * 2)
    reach, rise = np.array([-1.25, 0.45] * 4), np.array([0.5, 0.75] * 4)
    start = np.array([ox, oy])
    bend = start + np.stack([eye * reach * 0.15, vertical * bow * rng.uniform(0.75, 0.95, 8) * (rise + 0.35)], 1)
    end = start + np.stack([eye * reach + rng.uniform(-0.1, 0.1, 8), vertical * rise * bow], 1)
    t = np.linspace(0.0, 1.0, 9)[:, None]
    trunks = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend[:, None] + t**2 * end[:, None]
    roots = trunks[:, (3, 5)]
    lean = np.stack([eye * rng.uniform(-0.5, 0.2, (8, 2)), vertical[:, None] * rng.uniform(-0.25, 0.35, (8, 2))], -1)
    branches = np.stack([roots, roots + 0.5 * lean + rng.uniform(-0.06, 0.06, (8, 2, 2)), roots + lean], 2)
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)

    def stroke(points: NDArray[np.float64], width: float, tone: int) -> None:
        pen.line(((points + 1.0) * size).ravel().tolist(), fill=tone, width=max(1, round(width * size)))

    for k in range(8):
        width, tone = (0.05, 255) if bow[k] == 1.0 else (0.036, 180)
        stroke(trunks[k, :5], width, tone)
        stroke(trunks[k, 4:], 0.65 * width, tone)
        for branch in branches[k]:
            stroke(branch, 0.45 * width, tone)
    return np.asarray(canvas.reduce(2), dtype=np.float32) * (1.0 / 255.0)


DRAW: dict[str, Callable[[np.random.Generator, int, Scene], tuple[Pixels, Mask]]] = {
    "xray": _draw_xray,
    "ct": _draw_ct,
    "mri": _draw_mri,
    "ultrasound": _draw_ultrasound,
    "histopathology": _draw_histopathology,
    "fundus": _draw_fundus,
}
