"""Reports of phantoms: the findings of each modality, the sentences that describe them, and prompts made of both.

A report and its drawing are made from the same `Scene`, so that what a report says is what the image shows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medmoe_hf.errors import ArgumentError
from medmoe_hf.model.modalities_medmoe import MODALITIES

NORMAL_SHARE = 0.25
"""Share of the samples without a finding."""


class FindingPhrases(NamedTuple):
    """The phrases with which reports describe one finding.

    Attributes:
        word: Key noun of the finding; every phrase contains it.
        sizes: Words for the lower, middle and upper third of the finding's size.
        plain: Noun phrases without a size.
        sized: Noun phrases with a `{size}` slot.
        where: Phrases for the location, with the slots `{side}` and `{level}`. They follow the noun phrase.
        levels: Words for the upper (anterior, near) and the lower location; empty where the location is fixed.
    """

    word: str
    sizes: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    sized: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()


class _Style(NamedTuple):
    """The sentences of one modality.

    Attributes:
        views: Names of the examination, by protocol.
        templates: Sentences with the slots `{view}` and `{finding}`.
        normal: Sentences of normal reports, with the slot `{view}`.
        extras: Second sentences that fit every report.
    """

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
"""Phrases by modality and finding. `PHRASES[modality][finding].word` is the noun that names the finding in reports."""

FINDINGS: dict[str, tuple[str, ...]] = {modality: tuple(table) for modality, table in PHRASES.items()}
"""Findings by modality: `"normal"`, then three abnormal findings, each named by its key noun."""

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
            # As in real reports, the weighting is not always named.
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

# Words for the left and the right of the image. Radiological images are read facing the patient.
_SIDE_WORDS = {
    modality: ("right", "left") if modality in ("xray", "ct", "mri") else ("left", "right") for modality in MODALITIES
}
_FIXED_SIDE = {("ct", "metastasis"): -1}
_MAX_REPORT_WORDS = 25


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    Attributes:
        modality: One of `MODALITIES`.
        finding: One of `FINDINGS[modality]`.
        side: -1 for the left of the image, +1 for the right.
        level: -1 for the upper location, +1 for the lower.
        extent: Size of the finding within its range, 0..1.
        protocol: MRI weighting (`t1`, `t2`, `flair`); empty for the other modalities.
    """

    modality: str
    finding: str
    side: int
    level: int
    extent: float
    protocol: str


def random_scene(rng: np.random.Generator, modalities: Sequence[str]) -> Scene:
    """Samples a scene: modality, finding, location and size."""
    modality = modalities[int(rng.integers(len(modalities)))]
    abnormal = FINDINGS[modality][1:]
    choice, normal = int(rng.integers(len(abnormal))), rng.random() < NORMAL_SHARE
    finding = "normal" if normal else abnormal[choice]
    side, level = (1 if rng.random() < 0.5 else -1 for _ in range(2))
    extent = rng.random()
    protocols = tuple(_STYLES[modality].views)
    protocol = protocols[int(rng.integers(len(protocols)))]
    return Scene(modality, finding, _FIXED_SIDE.get((modality, finding), side), level, extent, protocol)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _sentence(template: str, **slots: str) -> str:
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def write_report(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """Returns a report of a scene, and the word in it that names the finding (`""` for normal)."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    style, phrases = _STYLES[scene.modality], PHRASES[scene.modality][scene.finding]
    view = pick(style.views[scene.protocol])
    if scene.finding == "normal":
        text = _sentence(pick(style.normal), view=view)
    else:
        size = phrases.sizes[min(int(scene.extent * 3), 2)]
        noun = pick(phrases.sized if rng.random() < 0.7 else phrases.plain).format(size=size)
        side = _SIDE_WORDS[scene.modality][(scene.side + 1) // 2]
        level = phrases.levels[(scene.level + 1) // 2] if phrases.levels else ""
        location = pick(phrases.where).format(side=side, level=level)
        text = _sentence(pick(style.templates), view=view, finding=f"{noun} {location}")
    extra = pick(style.extras)
    if rng.random() < 0.5 and len(_words(f"{text} {extra}")) <= _MAX_REPORT_WORDS:
        text = f"{text} {extra}"
    start = text.lower().find(phrases.word)
    return text, text[start : start + len(phrases.word)]


def zero_shot_prompts(modality: str) -> dict[str, list[str]]:
    """Returns prompts for zero-shot classification of the findings of one modality.

    Prompts are written like the reports of `phantom_sample`. The prompts of a finding vary its size and location, as
    GLoRIA's prompt ensembles do; what their average embedding keeps is the finding.

    Args:
        modality: One of `MODALITIES`.

    Returns:
        Six or more prompts per finding, by finding, in the order of `FINDINGS[modality]`. No prompt contains the key
        noun of another finding.

    Raises:
        ValueError: If `modality` is unknown.

    Example:
        >>> from medmoe_hf.data import zero_shot_prompts
        >>> list(zero_shot_prompts("ct"))
        ['normal', 'metastasis', 'aneurysm', 'hydronephrosis']
        >>> zero_shot_prompts("ct")["aneurysm"][0]
        'Axial abdominal CT shows a small aortic aneurysm with mural thrombus.'
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
        locations = [
            where.format(side=side, level=level)
            for where in phrases.where
            for side in _SIDE_WORDS[modality]
            for level in phrases.levels or ("",)
        ]
        # The lists have different lengths; together they are cycled through until the longest is exhausted.
        prompts[finding] = [
            _sentence(
                style.templates[k % len(style.templates)],
                view=views[k % len(views)],
                finding=f"{nouns[k % len(nouns)]} {locations[k % len(locations)]}",
            )
            for k in range(max(len(nouns), len(locations), len(style.templates)))
        ]
    return prompts


def phantom_vocabulary() -> list[str]:
    """Returns all words that reports and prompts can contain, to build a WordPiece vocabulary.

    They are taken from the grammar, not sampled. Text is lower-cased and split as by BERT's pre-tokenizer: at white
    space, with every punctuation character a word of its own.

    Returns:
        Lower-case words and punctuation characters, sorted, without duplicates.

    Example:
        >>> from medmoe_hf.data import phantom_vocabulary
        >>> "effusion" in phantom_vocabulary()
        True
    """
    texts: list[str] = [word for pair in _SIDE_WORDS.values() for word in pair]
    for style in _STYLES.values():
        texts += [view for group in style.views.values() for view in group]
        texts += [*style.templates, *style.normal, *style.extras]
    for table in PHRASES.values():
        for phrases in table.values():
            texts += [*phrases.sizes, *phrases.plain, *phrases.sized, *phrases.where, *phrases.levels]
    return sorted({word for text in texts for word in _words(re.sub(r"\{\w+\}", " ", text).lower())})
