"""Synthetic image-report pairs for six modalities, drawn on the fly and endless by seed.

Every sample is a drawing, not a patient: simple geometry pushed through the look of a modality (projection, Hounsfield
window, relaxation weighting, speckle, stain, colour photograph) and a sentence or two written by a small grammar. The
pairs exist so that pipelines, demos and tests run without a download and a tiny model can be trained in minutes.
**Numbers measured on them are not clinical evidence**, they only say that the machinery learns what was drawn.

Conventions
-----------
* Sides: for ``xray``, ``ct`` and ``mri`` reports use the radiological convention, the patient's left is on the image's
  right. For ``ultrasound``, ``histopathology`` and ``fundus`` left and right are sides of the image.
* Size words (small, moderate, large or mild, moderate, marked) are the thirds of the range that a finding is drawn in.
* Boxes are ``[x0, y0, x1, y1]`` in pixels with exclusive ends: ``mask[y0:y1, x0:x1]`` holds the whole mask, tightly.
* Sample ``i`` is a function of ``(seed, i, image_size, modalities)`` alone. Anatomy is drawn in normalised
  coordinates, so another ``image_size`` gives the same scene with another noise grain.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import ArgumentError, PathExistsError
from medmoe_hf.model.modalities_medmoe import MODALITIES, modality_id

Field = NDArray[np.floating[Any]]  # float32 all along, but numpy's stubs widen sums with a Python float
Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]

MIN_IMAGE_SIZE = 48
NORMAL_SHARE = 0.25


class FindingPhrases(NamedTuple):
    """How reports speak of one finding.

    ``word`` is the key noun that every phrase contains; ``sizes`` the words for the lower, middle and upper third of
    its drawn extent; ``plain`` and ``sized`` are noun phrases without and with a ``{size}`` slot; ``where`` follows
    them and may have the slots ``{side}`` and ``{level}``; ``levels`` are the words for the upper (or anterior, or
    near) and the lower place, empty where the place is fixed.
    """

    word: str
    sizes: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    sized: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()


class _Style(NamedTuple):
    """The sentences of one modality: ``views`` per protocol, templates, normal reports, neutral second sentences."""

    views: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]
    normal: tuple[str, ...]
    extras: tuple[str, ...]


_AMOUNT = ("small", "moderate", "large")
_DEGREE = ("mild", "moderate", "marked")
_QUADRANT = ("upper", "lower")

PHRASES: dict[str, dict[str, FindingPhrases]] = {
    "xray": {
        "normal": FindingPhrases(""),
        "cardiomegaly": FindingPhrases(
            "cardiomegaly",
            _DEGREE,
            ("cardiomegaly", "an enlarged heart consistent with cardiomegaly", "global cardiomegaly"),
            ("{size} cardiomegaly", "{size} cardiac enlargement in keeping with cardiomegaly"),
            ("with a widened heart shadow", "with an increased cardiothoracic ratio"),
        ),
        "effusion": FindingPhrases(
            "effusion",
            _AMOUNT,
            ("a pleural effusion", "a basal pleural effusion", "an effusion with a meniscus"),
            ("a {size} pleural effusion", "a {size} basal effusion", "a {size} effusion with a meniscus"),
            ("on the {side}", "in the {side} hemithorax", "at the {side} lung base"),
        ),
        "consolidation": FindingPhrases(
            "consolidation",
            _AMOUNT,
            ("airspace consolidation", "a patchy consolidation", "a focal consolidation"),
            ("a {size} consolidation", "a {size} patchy consolidation", "a {size} area of airspace consolidation"),
            ("in the {side} {level} zone", "of the {side} {level} lung"),
            ("upper", "middle"),
        ),
    },
    "ct": {
        "normal": FindingPhrases(""),
        "metastasis": FindingPhrases(
            "metastasis",
            _AMOUNT,
            ("a liver metastasis", "a ring enhancing hepatic metastasis", "a metastasis of the liver"),
            ("a {size} liver metastasis", "a {size} ring enhancing metastasis"),
            ("in the {level} {side} lobe", "in the {level} part of the {side} lobe"),
            ("anterior", "posterior"),
        ),
        "aneurysm": FindingPhrases(
            "aneurysm",
            _AMOUNT,
            ("an aortic aneurysm", "an abdominal aortic aneurysm", "an aneurysm of the abdominal aorta"),
            ("a {size} aortic aneurysm", "a {size} aneurysm of the abdominal aorta"),
            ("with mural thrombus", "in front of the spine"),
        ),
        "hydronephrosis": FindingPhrases(
            "hydronephrosis",
            _DEGREE,
            ("hydronephrosis", "hydronephrosis with a dilated renal pelvis", "obstructive hydronephrosis"),
            ("{size} hydronephrosis", "{size} hydronephrosis with a dilated collecting system"),
            ("of the {side} kidney", "on the {side}"),
        ),
    },
    "mri": {
        "normal": FindingPhrases(""),
        "plaque": FindingPhrases(
            "plaque",
            _AMOUNT,
            ("a bright plaque", "a demyelinating plaque", "a focal white matter plaque"),
            ("a {size} bright plaque", "a {size} demyelinating plaque"),
            ("in the {side} {level} lobe", "in the {level} white matter on the {side}"),
            ("frontal", "occipital"),
        ),
        "hematoma": FindingPhrases(
            "hematoma",
            _AMOUNT,
            ("a layered hematoma", "an intracerebral hematoma", "a hematoma with a fluid level"),
            ("a {size} layered hematoma", "a {size} intracerebral hematoma"),
            ("in the {side} {level} lobe", "in the {level} region on the {side}"),
            ("frontal", "occipital"),
        ),
        "meningioma": FindingPhrases(
            "meningioma",
            _AMOUNT,
            ("a meningioma", "a dural based meningioma", "an extra axial meningioma"),
            ("a {size} meningioma", "a {size} dural based meningioma"),
            ("along the {side} {level} convexity", "over the {side} {level} lobe"),
            ("frontal", "occipital"),
        ),
    },
    "ultrasound": {
        "normal": FindingPhrases(""),
        "cyst": FindingPhrases(
            "cyst",
            _AMOUNT,
            ("an anechoic cyst", "a thick walled cyst", "an anechoic cyst with posterior enhancement"),
            ("a {size} anechoic cyst", "a {size} thick walled cyst"),
            ("in the {level} field on the {side}", "at the {side} of the {level} field"),
            ("near", "far"),
        ),
        "nodule": FindingPhrases(
            "nodule",
            _AMOUNT,
            ("an echogenic nodule", "a solid nodule", "an irregular solid nodule"),
            ("a {size} echogenic nodule", "a {size} solid nodule"),
            ("in the {level} field on the {side}", "at the {side} of the {level} field"),
            ("near", "far"),
        ),
        "calcification": FindingPhrases(
            "calcification",
            _AMOUNT,
            ("a bright calcification", "a calcification with acoustic shadowing", "a dense calcification"),
            ("a {size} calcification with acoustic shadowing", "a {size} dense calcification"),
            ("in the {level} field on the {side}", "at the {side} of the {level} field"),
            ("near", "far"),
        ),
    },
    "histopathology": {
        "normal": FindingPhrases(""),
        "carcinoma": FindingPhrases(
            "carcinoma",
            _AMOUNT,
            ("invasive carcinoma", "a nest of carcinoma", "carcinoma with crowded atypical nuclei"),
            ("a {size} focus of invasive carcinoma", "a {size} nest of carcinoma"),
            ("in the {level} {side} quadrant", "at the {level} {side} of the field"),
            _QUADRANT,
        ),
        "inflammation": FindingPhrases(
            "inflammation",
            _AMOUNT,
            ("dense inflammation", "lymphocytic inflammation", "inflammation with many small lymphocytes"),
            ("a {size} focus of lymphocytic inflammation", "a {size} area of dense inflammation"),
            ("in the {level} {side} quadrant", "at the {level} {side} of the field"),
            _QUADRANT,
        ),
        "necrosis": FindingPhrases(
            "necrosis",
            _AMOUNT,
            ("pale necrosis", "coagulative necrosis", "necrosis with ghost outlines"),
            ("a {size} area of necrosis", "a {size} zone of coagulative necrosis"),
            ("in the {level} {side} quadrant", "at the {level} {side} of the field"),
            _QUADRANT,
        ),
    },
    "fundus": {
        "normal": FindingPhrases(""),
        "hemorrhages": FindingPhrases(
            "hemorrhages",
            _AMOUNT,
            ("retinal hemorrhages", "dot and blot hemorrhages", "dark red hemorrhages"),
            ("a {size} group of dot hemorrhages", "a {size} cluster of retinal hemorrhages"),
            ("in the {level} {side} quadrant", "at the {level} {side} of the image"),
            _QUADRANT,
        ),
        "exudates": FindingPhrases(
            "exudates",
            _AMOUNT,
            ("hard exudates", "yellow exudates", "retinal exudates"),
            ("a {size} group of hard exudates", "a {size} cluster of yellow exudates"),
            ("in the {level} {side} quadrant", "at the {level} {side} of the image"),
            _QUADRANT,
        ),
        "cupping": FindingPhrases(
            "cupping",
            _DEGREE,
            ("optic disc cupping", "glaucomatous cupping", "cupping with a widened pale cup"),
            ("{size} optic disc cupping", "{size} glaucomatous cupping"),
            ("at the {side} of the image", "on the {side} side of the image"),
        ),
    },
}
"""Modality -> finding -> :class:`FindingPhrases`; ``PHRASES[m][f].word`` is the one noun that names it in reports."""

FINDINGS: dict[str, tuple[str, ...]] = {modality: tuple(table) for modality, table in PHRASES.items()}
"""Modality -> names of what can be drawn: ``"normal"``, then three abnormal findings (each named by its key noun)."""

_STYLES: dict[str, _Style] = {
    "xray": _Style(
        {"": ("frontal chest radiograph", "frontal chest x-ray", "portable chest x-ray", "upright chest film")},
        (
            "{view} shows {finding}.",
            "{view} demonstrates {finding}.",
            "Evidence of {finding} on this {view}.",
            "{finding} on the {view}.",
            "Impression: {finding} on {view}.",
            "{view} with {finding}.",
            "{view}. Findings: {finding}.",
        ),
        (
            "{view} shows no abnormality of heart or lungs.",
            "Unremarkable {view} with clear lungs and normal heart size.",
            "Normal {view}, both lungs are clear.",
            "No abnormality on this {view}, heart size is normal.",
            "{view} is within normal limits.",
            "Impression: normal heart and clear lungs on {view}.",
        ),
        ("No acute fracture.", "The trachea is midline.", "The bony thorax is intact.", "No free air is seen."),
    ),
    "ct": _Style(
        {"": ("axial abdominal CT", "axial CT of the abdomen", "contrast enhanced abdominal CT", "axial CT slice")},
        (
            "{view} shows {finding}.",
            "{view} reveals {finding}.",
            "Evidence of {finding} on {view}.",
            "{finding} on the {view}.",
            "Impression: {finding} on {view}.",
            "{view} with {finding}.",
            "{view}. Findings: {finding}.",
        ),
        (
            "{view} shows no abnormality of the solid organs.",
            "Unremarkable {view} with normal liver and kidneys.",
            "Normal {view}, the solid organs are unremarkable.",
            "No abnormality on this {view}, normal liver and aorta.",
            "{view} is within normal limits throughout.",
            "Impression: unremarkable abdominal organs on {view}.",
        ),
        ("No free air.", "The bowel is not dilated.", "No acute fracture.", "The vertebral body is intact."),
    ),
    "mri": _Style(
        {
            # Not every report says which weighting it is about.
            "t1": ("axial T1-weighted MRI of the brain", "axial brain MRI", "MRI of the brain"),
            "t2": ("axial T2-weighted MRI of the brain", "axial brain MRI", "MRI of the brain"),
            "flair": ("axial FLAIR MRI of the brain", "axial brain MRI", "MRI of the brain"),
        },
        (
            "{view} shows {finding}.",
            "{view} reveals {finding}.",
            "Evidence of {finding} on {view}.",
            "{finding} on the {view}.",
            "Impression: {finding} on {view}.",
            "{view} with {finding}.",
            "{view}. Findings: {finding}.",
        ),
        (
            "{view} shows no abnormality of the brain.",
            "Unremarkable {view} with normal gray and white matter.",
            "Normal {view}, brain parenchyma is unremarkable.",
            "No abnormality on this {view}, normal parenchyma.",
            "{view} is within normal limits for age.",
            "Impression: normal brain parenchyma on {view}.",
        ),
        ("No midline shift.", "Ventricles are normal in size.", "No restricted diffusion.", "The skull is intact."),
    ),
    "ultrasound": _Style(
        {"": ("grayscale sonogram", "b-mode ultrasound", "abdominal ultrasound image", "ultrasound scan")},
        (
            "{view} shows {finding}.",
            "{view} demonstrates {finding}.",
            "Evidence of {finding} on {view}.",
            "{finding} on this {view}.",
            "Impression: {finding} on {view}.",
            "{view} with {finding}.",
            "{view}. Findings: {finding}.",
        ),
        (
            "{view} shows no abnormality of the parenchyma.",
            "Unremarkable {view} with homogeneous echotexture of the organ.",
            "Normal {view} with an even echo pattern.",
            "No abnormality on this {view}, homogeneous echotexture.",
            "{view} is within normal limits, homogeneous parenchyma.",
            "Impression: unremarkable parenchyma on {view} of the organ.",
        ),
        ("No free fluid.", "Gain and depth are adequate.", "The capsule is smooth.", "The acoustic window is good."),
    ),
    "histopathology": _Style(
        {"": ("H&E stained section", "H&E histology slide", "hematoxylin eosin section", "histopathology image")},
        (
            "{view} shows {finding}.",
            "{view} demonstrates {finding}.",
            "Evidence of {finding} on {view}.",
            "{finding} on this {view}.",
            "Diagnosis: {finding} on {view}.",
            "{view} with {finding}.",
            "Microscopy of the {view}: {finding}.",
        ),
        (
            "{view} shows no abnormality of the tissue.",
            "Unremarkable {view} with regular nuclei and eosinophilic stroma.",
            "Normal {view} with regular fibrous stroma.",
            "No abnormality on this {view}, the stroma is regular.",
            "{view} is within normal limits, regular stroma.",
            "Diagnosis: normal tissue with bland nuclei on {view}.",
        ),
        ("The stain is even.", "No folding artifact.", "Section thickness is adequate.", "The tissue is well fixed."),
    ),
    "fundus": _Style(
        {"": ("color fundus photograph", "fundus photograph", "retinal fundus image", "fundus photo of the eye")},
        (
            "{view} shows {finding}.",
            "{view} demonstrates {finding}.",
            "Evidence of {finding} on {view}.",
            "{finding} on this {view}.",
            "Impression: {finding} on {view}.",
            "{view} with {finding}.",
            "{view}. Findings: {finding}.",
        ),
        (
            "{view} shows no abnormality of the retina.",
            "Unremarkable {view} with a healthy disc and macula.",
            "Normal {view} with a healthy pink optic nerve.",
            "No abnormality on this {view}, the retina is healthy.",
            "{view} is within normal limits, healthy retina.",
            "Impression: healthy retina and optic nerve on {view}.",
        ),
        ("The macula is flat.", "The media are clear.", "Vessels have a normal course.", "The retina is attached."),
    ),
}

# Index 0 is the word for the image's left side: radiological images are read facing the patient.
_SIDE_WORDS = {
    modality: ("right", "left") if modality in ("xray", "ct", "mri") else ("left", "right") for modality in MODALITIES
}
_FIXED_SIDE = {("ct", "metastasis"): -1}
_MAX_REPORT_WORDS = 25


@dataclass(frozen=True)
class _Plan:
    """What to draw: ``side`` -1 image left, +1 image right; ``level`` -1 upper, +1 lower; ``extent`` in [0, 1]."""

    modality: str
    finding: str
    side: int
    level: int
    extent: float
    protocol: str


def _plan(rng: np.random.Generator, modalities: Sequence[str]) -> _Plan:
    modality = modalities[int(rng.integers(len(modalities)))]
    abnormal = FINDINGS[modality][1:]
    choice, normal = int(rng.integers(len(abnormal))), rng.random() < NORMAL_SHARE
    finding = "normal" if normal else abnormal[choice]
    side, level = (1 if rng.random() < 0.5 else -1 for _ in range(2))
    extent = rng.random()
    protocols = tuple(_STYLES[modality].views)
    protocol = protocols[int(rng.integers(len(protocols)))]
    return _Plan(modality, finding, _FIXED_SIDE.get((modality, finding), side), level, extent, protocol)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _sentence(template: str, **slots: str) -> str:
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def _report(rng: np.random.Generator, plan: _Plan) -> tuple[str, str]:
    """One report and the word in it that names the finding (``""`` for normal)."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    style, phrases = _STYLES[plan.modality], PHRASES[plan.modality][plan.finding]
    view = pick(style.views[plan.protocol])
    if plan.finding == "normal":
        text = _sentence(pick(style.normal), view=view)
    else:
        size = phrases.sizes[min(int(plan.extent * 3), 2)]
        noun = pick(phrases.sized if rng.random() < 0.7 else phrases.plain).format(size=size)
        side = _SIDE_WORDS[plan.modality][(plan.side + 1) // 2]
        level = phrases.levels[(plan.level + 1) // 2] if phrases.levels else ""
        place = pick(phrases.where).format(side=side, level=level)
        text = _sentence(pick(style.templates), view=view, finding=f"{noun} {place}")
    extra = pick(style.extras)
    if rng.random() < 0.5 and len(_words(f"{text} {extra}")) <= _MAX_REPORT_WORDS:
        text = f"{text} {extra}"
    start = text.lower().find(phrases.word)
    return text, text[start : start + len(phrases.word)]


def zero_shot_prompts(modality: str) -> dict[str, list[str]]:
    """Prompt sentences for classifying one modality's findings without training a head.

    They are written like the reports of :func:`phantom_sample`. A finding's prompts go through its sizes and places,
    as the prompt ensembles of GLoRIA do: averaged, they leave what they have in common, the finding.

    Args:
        modality: one of :data:`MODALITIES`.

    Returns:
        Finding -> its prompts (six or more), in the order of ``FINDINGS[modality]``. No prompt contains another
        finding's key noun.

    Raises:
        ValueError: if ``modality`` is not known.
    """
    if modality not in MODALITIES:
        raise ArgumentError(f"modality must be one of {MODALITIES}, got {modality!r}")
    style = _STYLES[modality]
    views = [view for group in zip(*style.views.values(), strict=True) for view in group]
    prompts: dict[str, list[str]] = {}
    for finding, phrases in PHRASES[modality].items():
        if finding == "normal":
            prompts[finding] = [_sentence(text, view=view) for text in style.normal for view in views[:3]]
            continue
        nouns = [noun.format(size=size) for size in phrases.sizes for noun in phrases.sized] + list(phrases.plain)
        places = [
            place.format(side=side, level=level)
            for place in phrases.where
            for side in _SIDE_WORDS[modality]
            for level in phrases.levels or ("",)
        ]
        # Lists of different lengths, walked in step until each has been gone through.
        prompts[finding] = [
            _sentence(
                style.templates[k % len(style.templates)],
                view=views[k % len(views)],
                finding=f"{nouns[k % len(nouns)]} {places[k % len(places)]}",
            )
            for k in range(max(len(nouns), len(places), len(style.templates)))
        ]
    return prompts


def phantom_vocabulary() -> list[str]:
    """All words that a report or prompt can contain, for building a WordPiece vocabulary.

    Computed from the grammar, not by sampling. Split as BERT's pre-tokenizer does on lower-cased text: at white space,
    and every punctuation character is a word of its own.

    Returns:
        Sorted lower-case words and punctuation marks, without duplicates.
    """
    texts: list[str] = [word for pair in _SIDE_WORDS.values() for word in pair]
    for style in _STYLES.values():
        texts += [view for group in style.views.values() for view in group]
        texts += [*style.templates, *style.normal, *style.extras]
    for table in PHRASES.values():
        for phrases in table.values():
            texts += [*phrases.sizes, *phrases.plain, *phrases.sized, *phrases.where, *phrases.levels]
    return sorted({word for text in texts for word in _words(re.sub(r"\{\w+\}", " ", text).lower())})


# Drawing. All shapes live in coordinates u (to the image's right) and v (down), both -1 to 1 across the image; ``px``
# is one pixel in these units, the width over which edges are blended.


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _frame(
    rng: np.random.Generator, size: int, shift: float = 0.08, turn: float = 0.07, zoom: float = 0.06
) -> tuple[Field, Field, float]:
    """Coordinates u, v of every pixel in a slightly shifted, turned and scaled patient, and one pixel in them."""
    x, y = _grid(size)
    dx, dy = rng.uniform(-shift, shift), rng.uniform(-shift, shift)
    angle, scale = rng.uniform(-turn, turn), rng.uniform(1 - zoom, 1 + zoom)
    c, s = math.cos(angle) / scale, math.sin(angle) / scale
    return c * x + s * y - (c * dx + s * dy), c * y - s * x - (c * dy - s * dx), 2.0 / (size * scale)


def _ramp(distance: Field, edge: float) -> Field:
    """Coverage of the half where ``distance`` is positive, blended over ``edge``."""
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
    """Coverage of an ellipse; ``warp`` is added to its squared radius to make the outline irregular."""
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
    """Smooth noise of about unit variance with ``cells`` blobs across the image."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32) * 1.3)
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _bytes(intensity: Field) -> Pixels:
    return np.clip(intensity * 255.0, 0.0, 255.0).astype(np.uint8)


def _interleave(channels: Field) -> Pixels:
    """Colour planes (3, size, size) in 0 to 1 to an image (size, size, 3)."""
    return np.ascontiguousarray(np.moveaxis(_bytes(channels), 0, -1))


def _between(extent: float, low: float, high: float) -> float:
    return low + (high - low) * extent


def _draw_xray(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Frontal chest film: attenuation along the beam is summed, so shadows overlap instead of hiding each other."""
    u, v, px = _frame(rng, size, shift=0.1)
    soft, fold = px + 0.03, np.abs(u)
    wide, dome = rng.uniform(0.92, 1.04), rng.uniform(0.34, 0.46)
    across, along = np.square(u * (1 / (0.97 * wide))), np.square((v - 0.8) * (1 / 1.62))
    torso = 1.0 - np.square(across) - np.square(along)
    density = 0.55 * np.maximum(_ramp(torso, 0.25), _disc(u, v, 0.0, -0.95, 0.27, 0.5, 0.05))
    halves = [_disc(u, v, s * 0.41 * wide, -0.08, 0.33 * wide, 0.68, soft, tilt=s * -0.12) for s in (-1, 1)]
    # The right dome of the diaphragm (the image's left) stands higher, pushed up by the liver.
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
    big = plan.finding == "cardiomegaly"
    half = _between(plan.extent, 0.43, 0.60) if big else rng.uniform(0.24, 0.30)
    tall = 0.23 + 0.45 * (half - 0.25)
    heart = _disc(u, v, 0.12, dome - 0.06 - 0.75 * tall, half, tall, soft, tilt=0.45)
    density += heart * (0.06 + 0.27 * lungs)
    mask = heart > 0.5 if big else np.zeros((size, size), dtype=bool)
    half_lung = halves[(plan.side + 1) // 2]
    if plan.finding == "effusion":
        level = dome - _between(plan.extent, 0.10, 0.65)
        fluid = half_lung * _ramp(v - level + 0.9 * (fold - 0.2) ** 2 - 0.1, soft)
        _paint(density, fluid, 0.86 + 0.05 * v)
        mask = fluid > 0.5
    elif plan.finding == "consolidation":
        radius = _between(plan.extent, 0.22, 0.36)
        cx, cy = plan.side * wide * rng.uniform(0.38, 0.46), rng.uniform(-0.08, 0.08) + (-0.42, 0.02)[plan.level > 0]
        blob = _disc(u, v, cx, cy, radius, radius * 1.05, 0.06, warp=0.3 * _smooth(rng, 7, size)) * half_lung * lungs
        density += blob * (1.0 - 0.6 * heart) * (0.36 + 0.06 * _smooth(rng, 18, size))
        mask = blob > 0.5
    density += 0.02 * _smooth(rng, 5, size)
    grain = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0.015, 0.035)
    return _bytes(density * rng.uniform(1.0, 1.18) + rng.uniform(0.0, 0.06) + grain), mask


def _draw_ct(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Axial slice of the upper abdomen in Hounsfield units, seen through a soft tissue window (width 400)."""
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
        mask |= _ct_kidney(rng, u, v, soft, hu, side, plan)
    for cx, cy, rx, ry, value in (
        (0.0, 0.52, 0.24, 0.035, 260.0),
        (0.0, 0.60, 0.035, 0.09, 330.0),
        (0.0, 0.36, 0.15, 0.12, 420.0),
        (0.0, 0.36, 0.12, 0.09, 190.0),
        (0.0, 0.51, 0.06, 0.05, 20.0),
        (-0.13, 0.15, 0.075, 0.05, 130.0),
    ):
        _paint(hu, _disc(u, v, cx, cy, rx, ry, soft), value)
    mask |= _ct_aorta(rng, u, v, soft, hu, plan)
    if plan.finding == "metastasis":
        radius = _between(plan.extent, 0.18, 0.30)
        cx, cy = rng.uniform(-0.48, -0.34), (-0.28, 0.10)[plan.level > 0] + rng.uniform(-0.04, 0.04)
        tumour = _disc(u, v, cx, cy, radius, radius * rng.uniform(0.85, 1.0), 0.03, warp=0.12 * _smooth(rng, 9, size))
        tumour = tumour * cavity
        _paint(hu, tumour, 210.0)
        core = _disc(u, v, cx, cy, radius - 0.07, radius - 0.09, 0.03) * tumour
        _paint(hu, core, rng.uniform(10.0, 30.0))
        mask |= tumour > 0.5
    hu += rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(10.0, 22.0)
    level = rng.uniform(35.0, 65.0)
    return _bytes((hu - (level - 200.0)) * (1.0 / 400.0)), mask


def _ct_kidney(rng: np.random.Generator, u: Field, v: Field, soft: float, hu: Field, side: int, plan: _Plan) -> Mask:
    """Paint the kidney on one side and return the swollen one (empty unless the plan asks for it)."""
    cx, cy, value = side * rng.uniform(0.35, 0.40), rng.uniform(0.24, 0.30), rng.uniform(165.0, 200.0)
    if plan.finding != "hydronephrosis" or side != plan.side:
        _paint(hu, _disc(u, v, cx, cy, 0.13, 0.17, soft, tilt=side * -0.3), value)
        _paint(hu, _disc(u, v, cx - side * 0.05, cy, 0.05, 0.06, soft), -40.0)
        return np.zeros(u.shape, dtype=bool)
    radius = _between(plan.extent, 0.15, 0.225)
    # A swollen kidney grows forwards, the muscles of the back are in its way.
    cy -= 1.2 * (radius - 0.15)
    kidney = _disc(u, v, cx, cy, radius + 0.055, radius + 0.085, soft, tilt=side * -0.3)
    _paint(hu, kidney, value + 60.0)
    pelvis = np.maximum(
        _disc(u, v, cx - side * 0.1 * radius, cy, radius * 0.92, radius * 0.7, soft, tilt=side * -0.3),
        _disc(u, v, cx + side * 0.1 * radius, cy, radius * 0.5, radius * 1.1, soft, tilt=side * -0.3),
    )
    _paint(hu, pelvis, rng.uniform(0.0, 10.0))
    return kidney > 0.5


def _ct_aorta(rng: np.random.Generator, u: Field, v: Field, soft: float, hu: Field, plan: _Plan) -> Mask:
    """Paint the contrast-filled aorta in front of the spine and return it where it is an aneurysm."""
    lumen = rng.uniform(215.0, 245.0)
    if plan.finding != "aneurysm":
        _paint(hu, _disc(u, v, 0.04, 0.16, 0.06, 0.06, soft), lumen)
        return np.zeros(u.shape, dtype=bool)
    radius = _between(plan.extent, 0.17, 0.27)
    cx, cy = 0.04 + rng.uniform(-0.05, 0.08), 0.24 - radius
    wall = _disc(u, v, cx, cy, radius, radius * 0.95, soft)
    # Chalk in the wall, an unenhanced thrombus, and what is left of the lumen.
    _paint(hu, wall, 420.0)
    _paint(hu, _disc(u, v, cx, cy, radius - 0.045, radius * 0.95 - 0.045, soft), -30.0)
    _paint(hu, _disc(u, v, cx + 0.2 * radius, cy + 0.15 * radius, radius * 0.66, radius * 0.6, soft), lumen)
    return wall > 0.5


# Relative signal of scalp fat, cerebrospinal fluid, grey matter and white matter, and of a meningioma.
_MRI_SIGNAL = {
    "t1": (0.92, 0.10, 0.40, 0.58, 0.92),
    "t2": (0.70, 0.88, 0.52, 0.34, 0.72),
    "flair": (0.62, 0.07, 0.52, 0.40, 0.78),
}


def _draw_mri(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Axial head slice at the level of the lateral ventricles, in one of three weightings, with coil shading."""
    u, v, px = _frame(rng, size, shift=0.08, turn=0.12)
    soft = px + 0.01
    fat, csf, grey, white, dural = _MRI_SIGNAL[plan.protocol]
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
    if plan.finding in ("plaque", "hematoma"):
        radius = _between(plan.extent, 0.16, 0.25)
        cx, cy = plan.side * rng.uniform(0.24, 0.38), (-0.36, 0.38)[plan.level > 0] + rng.uniform(-0.08, 0.08)
        tilt, flat, warp = rng.uniform(-0.8, 0.8), rng.uniform(0.8, 1.0), 0.15 * _smooth(rng, 12, size)
        focus = _disc(u, v, cx, cy, radius, radius * flat, soft, tilt=tilt, warp=warp)
        if plan.finding == "hematoma":
            rim = _disc(u, v, cx, cy, radius + 0.06, radius * flat + 0.06, soft, tilt=tilt, warp=warp)
            _paint(signal, rim * brain, 0.9)
        _paint(signal, focus, 1.0)
        if plan.finding == "hematoma":
            # The patient lies on the back: cells settle below, plasma stays above.
            _paint(signal, focus * _ramp(v - cy, px), 0.02)
        mask = focus > 0.5
    elif plan.finding == "meningioma":
        radius = _between(plan.extent, 0.26, 0.37)
        angle = math.atan2(plan.level, plan.side) + rng.uniform(-0.35, 0.35)
        cx, cy = 0.96 * (rx - 0.11) * math.cos(angle), 0.96 * (ry - 0.11) * math.sin(angle)
        inner = _disc(u, v, 0.0, 0.0, rx - 0.10, ry - 0.10, soft)
        _paint(signal, inner * _disc(u, v, cx, cy, radius + 0.04, radius + 0.04, soft), 0.04)
        tumour = inner * _disc(u, v, cx, cy, radius, radius, soft)
        # It enhances at its rim; the calcified core gives no signal.
        _paint(signal, tumour, dural)
        _paint(signal, inner * _disc(u, v, cx, cy, radius - 0.03, radius - 0.03, soft), 0.02)
        mask = tumour > 0.5
    bias = 1.0 + rng.uniform(-0.14, 0.14) * u + rng.uniform(-0.14, 0.14) * v
    sigma = rng.uniform(0.02, 0.045)
    noise = rng.standard_normal((2, size, size), dtype=np.float32) * sigma
    return _bytes(0.92 * np.sqrt((signal * bias + noise[0]) ** 2 + noise[1] ** 2)), mask


def _draw_ultrasound(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Sector image: echo strength times speckle that is fine along the beam and coarse across it, log-compressed."""
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
    if plan.finding != "normal":
        mask = _ultrasound_focus(rng, u, v, px, echo, depth, beam, apex, plan)
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
    plan: _Plan,
) -> Mask:
    """Change ``echo`` in place by the planned focus and by what it does to the beam behind it; return its outline."""
    cy = rng.uniform(-0.12, 0.02) if plan.level < 0 else rng.uniform(0.32, 0.46)
    cx = plan.side * (rng.uniform(0.17, 0.24) if plan.level < 0 else rng.uniform(0.24, 0.42))
    distance, angle = math.hypot(cx, cy - apex), math.atan2(cx, cy - apex)

    def behind(width: float) -> Field:
        return _ramp(width / distance - np.abs(beam - angle), 0.04) * _ramp(depth - distance, px)

    if plan.finding == "cyst":
        radius = _between(plan.extent, 0.20, 0.31)
        tail = behind(radius * 0.9)
        echo *= 1.0 + 1.2 * tail
        focus = _disc(u, v, cx, cy, radius, radius * 0.94, px)
        _paint(echo, focus, 3.0)
        echo *= 1.0 - 0.99 * _disc(u, v, cx, cy, radius * 0.74, radius * 0.68, px)
    elif plan.finding == "nodule":
        radius = _between(plan.extent, 0.22, 0.34)
        focus = _disc(u, v, cx, cy, radius, radius * 0.85, px, warp=0.35 * _smooth(rng, 11, u.shape[0]))
        echo *= 1.0 + 3.2 * focus
    else:
        radius = _between(plan.extent, 0.20, 0.32)
        echo *= 1.0 - 0.5 * behind(radius * 0.9)
        focus = _disc(u, v, cx, cy, radius, radius * 0.75, px, tilt=angle * -1.0)
        _paint(echo, focus, 5.0)
    return focus > 0.5


def _speckle(
    rng: np.random.Generator, size: int, depth: Field, beam: Field, near: float, far: float, half: float
) -> Field:
    """Rayleigh-distributed speckle on a polar lattice, looked up per pixel (mean about 1)."""
    lattice = rng.standard_normal((2, 110, 46), dtype=np.float32)
    rows = max(110, size)
    waves = [np.asarray(Image.fromarray(part).resize((rows, rows), Image.Resampling.BICUBIC)) for part in lattice]
    amplitude = np.sqrt(np.square(waves[0]) + np.square(waves[1]))
    i = np.clip((depth - near) * (rows / (far - near)), 0, rows - 1).astype(np.intp)
    j = np.clip((beam + half) * (rows / (2 * half)), 0, rows - 1).astype(np.intp)
    return amplitude.ravel().take(i * rows + j)


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
    """Coverage by one nucleus at most in each cell of a turned, bent and jittered lattice, ``cells`` of them across.

    ``radius`` is the range in cells, ``present`` the share of cells that hold a nucleus. A lattice costs the same for
    ten nuclei as for a thousand.
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


# Optical density of red, green and blue per unit of stain, in the manner of haematoxylin (blue) and eosin (pink).
_HAEMATOXYLIN = (0.84, 0.97, 0.41)
_EOSIN = (0.11, 0.74, 0.30)


def _draw_histopathology(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Stained section: amounts of the two stains are drawn, and light is absorbed by their optical density."""
    u, v, px = _frame(rng, size, shift=0.05, turn=0.3, zoom=0.1)
    cloud, detail = _smooth(rng, 5, size), _smooth(rng, 26, size)
    run = rng.uniform(0.0, math.pi)
    along = (math.cos(run) * u + math.sin(run) * v) * rng.uniform(16.0, 24.0)
    eosin = 0.62 + 0.09 * cloud + 0.10 * np.sin(along + 1.6 * cloud) + 0.06 * detail
    nuclei = _nuclei(rng, u, v, px, 13, (0.15, 0.24), 0.55, stretch=1.2)
    blue = 0.07 + 0.02 * cloud
    x, y = _grid(size)
    mask = np.zeros((size, size), dtype=bool)
    if plan.finding != "normal":
        radius = _between(plan.extent, 0.32, 0.50)
        cx, cy = plan.side * rng.uniform(0.34, 0.46), plan.level * rng.uniform(0.34, 0.46)
        stretch = rng.uniform(0.88, 1.0)
        region = _disc(x, y, cx, cy, radius, radius * stretch, 0.03, warp=0.16 * _smooth(rng, 8, size))
        mask = region > 0.5
        nuclei = nuclei * (1.0 - region)
        if plan.finding == "carcinoma":
            crowd = _nuclei(rng, u, v, px, 12, (0.34, 0.50), 0.95, stretch=0.6)
            nuclei = nuclei + region * crowd * (1.15 + 0.25 * detail)
            blue = blue + 0.22 * region
        elif plan.finding == "inflammation":
            dots = np.maximum(*(_nuclei(rng, u, v, px, 27, (0.26, 0.34), 0.8, stretch=0.1) for _ in range(2)))
            nuclei = nuclei + 1.5 * region * dots
        else:
            _paint(eosin, region, 0.27 + 0.06 * detail)
            blue = blue * (1.0 - 0.6 * region) + 0.05 * region * np.maximum(_smooth(rng, 48, size), 0.0)
    blue = np.maximum(blue + nuclei * rng.uniform(0.85, 1.1), 0.0)
    eosin = np.maximum(eosin, 0.05) * rng.uniform(0.85, 1.15)
    light: Field = np.stack([eosin * -e - blue * h for e, h in zip(_EOSIN, _HAEMATOXYLIN, strict=True)])
    np.exp(light, out=light)
    light *= 0.98
    light += rng.standard_normal((size, size), dtype=np.float32) * 0.016
    return _interleave(light), mask


def _draw_fundus(rng: np.random.Generator, size: int, plan: _Plan) -> tuple[Pixels, Mask]:
    """Colour photograph of the retina: round field, optic disc with cup, arcades of vessels, dark macula."""
    x, y = _grid(size)
    px = 2.0 / size
    rim = _disc(x, y, rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), 0.94, 0.94, px + 0.01)
    eye = plan.side
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

    def tint(cover: Field, colour: tuple[float, float, float]) -> None:
        for channel, value in zip(channels, colour, strict=True):
            _paint(channel, cover, value)

    ratio = _between(plan.extent, 0.66, 0.92) if plan.finding == "cupping" else rng.uniform(0.25, 0.40)
    disc = _disc(x, y, ox, oy, radius * 0.92, radius, px + 0.02)
    tint(disc * (1.0 - 0.4 * vessels), (0.98, 0.68, 0.34))
    cup = _disc(x, y, ox, oy, radius * ratio * 0.92, radius * ratio, px + 0.01)
    tint(cup * (1.0 - 0.5 * vessels), (1.0, 0.95, 0.72))
    mask = cup > 0.5 if plan.finding == "cupping" else np.zeros((size, size), dtype=bool)
    if plan.finding in ("hemorrhages", "exudates"):
        spread = _between(plan.extent, 0.24, 0.38)
        cx, cy = plan.side * rng.uniform(0.32, 0.42), plan.level * rng.uniform(0.36, 0.46)
        spots = _spots(rng, x, y, px, cx, cy, spread, plan.finding == "exudates") * rim
        tint(spots, (1.0, 0.93, 0.45) if plan.finding == "exudates" else (0.36, 0.03, 0.03))
        mask = spots > 0.5
    light: Field = np.stack(channels) * (rim * rng.uniform(0.88, 1.08))
    light += rng.standard_normal((size, size), dtype=np.float32) * 0.015
    return _interleave(light), mask


def _spots(
    rng: np.random.Generator, x: Field, y: Field, px: float, cx: float, cy: float, spread: float, fine: bool
) -> Field:
    """A cluster of round spots within ``spread`` of a centre, the more the wider; ``fine`` ones are small and many."""
    count = int(spread * (44 if fine else 26))
    low, high = (0.035, 0.055) if fine else (0.045, 0.085)
    cover: Field = np.zeros_like(x)
    for k in range(count):
        # A sunflower layout fills the cluster evenly, so that its box follows from the spread.
        turn, reach = 2.4 * k + rng.uniform(-0.5, 0.5), spread * math.sqrt((k + 0.5) / count) * rng.uniform(0.85, 1.1)
        radius, sx, sy = rng.uniform(low, high), cx + reach * math.cos(turn), cy + reach * math.sin(turn)
        rows, columns = (
            slice(max(0, int((c - radius + 1.0) / px) - 1), max(0, int((c + radius + 1.0) / px) + 2)) for c in (sy, sx)
        )
        spot = _disc(x[rows, columns], y[rows, columns], sx, sy, radius, radius, px)
        np.maximum(cover[rows, columns], spot, out=cover[rows, columns])
    return cover


def _vessels(rng: np.random.Generator, size: int, ox: float, oy: float, eye: int) -> Field:
    """Coverage by the retinal vessels: four arcades of an artery and a vein each that leave the optic disc."""
    # One row per vessel: above or below, vein or artery, towards the macula or away from it.
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


_DRAW: dict[str, Callable[[np.random.Generator, int, _Plan], tuple[Pixels, Mask]]] = {
    "xray": _draw_xray,
    "ct": _draw_ct,
    "mri": _draw_mri,
    "ultrasound": _draw_ultrasound,
    "histopathology": _draw_histopathology,
    "fundus": _draw_fundus,
}


def _check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    given = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    try:
        chosen = tuple(MODALITIES[modality_id(name)] for name in given)
    except (ValueError, IndexError):
        chosen = ()
    if not chosen or len(set(chosen)) < len(chosen):
        raise ArgumentError(f"modalities must be one or more distinct names out of {MODALITIES}, got {given}")
    return chosen


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value}")


def _box(mask: Mask) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def phantom_sample(
    seed: int, index: int, *, image_size: int = 224, modalities: Sequence[str] = MODALITIES
) -> dict[str, Any]:
    """Draw one synthetic image-report pair. It shows no patient and is no clinical evidence.

    Args:
        seed: which endless stream, 0 or more.
        index: position in the stream, 0 or more; samples of one stream are independent of each other.
        image_size: side of the square image in pixels, 48 or more.
        modalities: the modalities to choose from, uniformly; distinct names out of :data:`MODALITIES`.

    Returns:
        A dictionary with the fields

        * ``id``: ``"phantom-<seed>-<index>"``;
        * ``image``: PIL image, ``image_size`` x ``image_size``, mode ``"L"`` for xray, ct, mri and ultrasound and
          ``"RGB"`` for histopathology and fundus;
        * ``caption``: the report, 8 to 25 words (as BERT splits) in one or two sentences;
        * ``modality``: id 0 to 5, the position in :data:`MODALITIES` (whatever ``modalities`` is);
        * ``finding``: one of ``FINDINGS[MODALITIES[modality]]``, a quarter of the samples is ``"normal"``;
        * ``finding_word``: the word that names the finding, as it stands in the caption, ``""`` for normal;
        * ``box``: ``[x0, y0, x1, y1]`` in pixels, ends exclusive, tight around the mask; ``[]`` for normal;
        * ``mask``: PIL image of mode ``"L"``, 255 where the finding is drawn and 0 elsewhere.

    Raises:
        ValueError: if ``seed`` or ``index`` is negative, ``image_size`` is below 48, or ``modalities`` is empty, has
            an unknown name or names one twice.
    """
    chosen = _check_modalities(modalities)
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    _check_at_least("seed", seed, 0)
    _check_at_least("index", index, 0)
    # Drawing has a random stream of its own, so that a change to it leaves plans and reports as they were.
    rng = np.random.default_rng([seed, index, 0])
    plan = _plan(rng, chosen)
    caption, word = _report(rng, plan)
    pixels, mask = _DRAW[plan.modality](np.random.default_rng([seed, index, 1]), image_size, plan)
    return {
        "id": f"phantom-{seed}-{index}",
        "image": Image.fromarray(pixels),
        "caption": caption,
        "modality": MODALITIES.index(plan.modality),
        "finding": plan.finding,
        "finding_word": word,
        "box": _box(mask),
        "mask": Image.fromarray(mask.astype(np.uint8) * np.uint8(255)),
    }


def phantom_features() -> datasets.Features:
    """The declared types of the fields that :func:`phantom_stream` yields."""
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "modality": datasets.ClassLabel(names=list(MODALITIES)),
            "finding": datasets.Value("string"),
            "finding_word": datasets.Value("string"),
            "box": datasets.List(datasets.Value("float32")),
            "mask": datasets.Image(),
        }
    )


def _encode(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def _indices(shards: list[tuple[int, int]], length: int | None) -> Iterator[dict[str, int]]:
    for start, step in shards:
        index = start
        while length is None or index < length:
            yield {"index": index}
            index += step


def _stream_sample(index: int, seed: int, image_size: int, modalities: tuple[str, ...]) -> dict[str, Any]:
    sample = phantom_sample(seed, index, image_size=image_size, modalities=modalities)
    # datasets would encode the images as PNG, which takes longer than drawing them; BMP is lossless and costs little.
    images = {name: {"bytes": _encode(sample[name], "BMP"), "path": None} for name in ("image", "mask")}
    # An empty list has no type in Arrow, and the first normal sample would break a table.
    return {**sample, **images, "box": sample["box"] or np.zeros(0)}


def phantom_stream(
    seed: int = 0,
    *,
    image_size: int = 224,
    modalities: Sequence[str] = MODALITIES,
    length: int | None = None,
    num_shards: int = 1,
) -> datasets.IterableDataset:
    """Stream synthetic samples, endlessly or a given number. Nothing is downloaded and no sample is cached on disk
    (``datasets`` itself leaves an empty lock file in its cache folder).

    Shard ``s`` of ``num_shards`` holds the indices that leave the remainder ``s``, so data loader workers and ranks
    (``datasets.distributed.split_dataset_by_node``) read disjoint samples. An endless shard never ends: give
    ``num_shards`` the number of readers (workers times ranks), a reader with two of them would only see the first.

    ``state_dict()`` and ``load_state_dict()`` resume exactly, at once however far the stream had come: the position
    counts indices, and skipped samples are not drawn.

    Args:
        seed: which endless stream, 0 or more.
        image_size: side of the square images in pixels, 48 or more.
        modalities: see :func:`phantom_sample`.
        length: number of samples over all shards (indices 0 to ``length - 1``, each once), ``None`` for endless.
        num_shards: number of shards, 1 or more.

    Returns:
        An ``IterableDataset`` with the features of :func:`phantom_features`; the fields are those of
        :func:`phantom_sample`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    chosen = _check_modalities(modalities)
    _check_at_least("seed", seed, 0)
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    _check_at_least("num_shards", num_shards, 1)
    if length is not None:
        _check_at_least("length", length, 0)
    # Only indices are generated, drawing is mapped over them: datasets resumes a stream by running its generator up to
    # the position, and runs of integers cost nothing.
    indices = datasets.IterableDataset.from_generator(
        _indices,
        gen_kwargs={"shards": [(start, num_shards) for start in range(num_shards)], "length": length},
        features=datasets.Features({"index": datasets.Value("int64")}),
    )
    drawn = indices.map(
        _stream_sample,
        input_columns="index",
        remove_columns=["index"],
        fn_kwargs={"seed": seed, "image_size": image_size, "modalities": chosen},
    )
    # As an argument of map the features would be taken on trust; a cast applies them (so images come out decoded).
    return drawn.cast(phantom_features())


def write_webdataset(
    out: Path,
    *,
    shards: int,
    samples_per_shard: int = 1000,
    seed: int = 0,
    image_size: int = 224,
    modalities: Sequence[str] = MODALITIES,
) -> list[Path]:
    """Write synthetic samples as WebDataset shards ``phantom-000000.tar``, ``phantom-000001.tar``, ...

    Sample ``i`` (of :func:`phantom_sample`) is the files ``<i>.png`` (image), ``<i>.mask.png``, ``<i>.txt`` (caption),
    ``<i>.cls`` (modality id) and ``<i>.json`` (``id``, ``finding``, ``finding_word``, ``box``), with ``i`` in nine
    digits; shard ``k`` holds the samples from ``k * samples_per_shard``. Equal arguments give equal bytes. A shard
    appears under its name only when it is complete.

    Args:
        out: folder to write into, made if missing.
        shards: number of shards, 1 or more.
        samples_per_shard: samples in each shard, 1 or more.
        seed: which endless stream, 0 or more.
        image_size: side of the square images in pixels, 48 or more.
        modalities: see :func:`phantom_sample`.

    Returns:
        The paths of the shards, in order.

    Raises:
        ValueError: if an argument is out of its range.
        FileExistsError: if ``out`` already holds such shards (nothing is overwritten).
    """
    chosen = _check_modalities(modalities)
    _check_at_least("shards", shards, 1)
    _check_at_least("samples_per_shard", samples_per_shard, 1)
    _check_at_least("seed", seed, 0)
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    out = Path(out)
    present = sorted(out.glob("phantom-*.tar"))
    if present:
        raise PathExistsError(f"out must not hold phantom shards yet, but {present[0]} exists; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"phantom-{shard:06d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with atomic_write(path) as draft, tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(shard * samples_per_shard, (shard + 1) * samples_per_shard):
                sample = phantom_sample(seed, index, image_size=image_size, modalities=chosen)
                _add_to_archive(archive, f"{index:09d}", sample)
    return paths


def _add_to_archive(archive: tarfile.TarFile, key: str, sample: dict[str, Any]) -> None:
    details = {name: sample[name] for name in ("id", "finding", "finding_word", "box")}
    members = {
        "png": _encode(sample["image"], "PNG"),
        "mask.png": _encode(sample["mask"], "PNG"),
        "txt": sample["caption"].encode(),
        "cls": str(sample["modality"]).encode(),
        "json": json.dumps(details).encode(),
    }
    for extension, content in members.items():
        # A fresh TarInfo has time, owner and mode fixed, so that the archive's bytes depend on the samples alone.
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
