"""The page report.html: key slices with heat-maps, probabilities, routing and limits, in one file without requests."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from medmoe_hf import __version__
from medmoe_hf.errors import MedMoEError
from medmoe_hf.inference.studies.predictions import (
    DISCLAIMER,
    LIMITS,
    SeriesPrediction,
    SkippedFile,
    StudyPrediction,
    skipped_of,
)

_PICTURE_SIDE = 480  # pixels; figures are at most some 350 wide
_HEAT_SIDE = 96  # the maps of a model have 20 to 56 cells on a side
_LABELS_SHOWN = 6  # labels of a series with curves and pictures, the most probable ones
_CURVE_HEIGHT = 44

_PLACES = {
    "frames": ("Frame", "frames"),
    "tiles": ("Tile", "tiles"),
    "image": ("Image", "images"),
}
_TITLES = {"frames": "a loop", "tiles": "tiles of a slide", "image": "a picture", "volume": "a volume"}


def report_html(studies: Sequence[StudyPrediction], keep_identifiers: bool = False) -> str:
    """Renders the page.

    Args:
        studies: What `predict` returned; their files are read again, for the pictures of key slices.
        keep_identifiers: Show the names of files: those that are left out, and those that are a study of their own.

    Returns:
        The HTML.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.globals |= {"percent": percent, "counted": counted}
    return environment.get_template("report.html.jinja").render(
        disclaimer=DISCLAIMER,
        limits=LIMITS,
        model=studies[0].model if studies else "",
        created_by=f"medmoe_hf {__version__}",
        keep_identifiers=keep_identifiers,
        studies=[_study(study, keep_identifiers) for study in studies],
        skipped=_reasons(skipped_of(studies), keep_identifiers),
    )


def percent(probability: float) -> str:
    """Formats a probability; none is shown as 0 or 100 % unless it is."""
    if 0 < probability < 0.001:
        return "< 0.1 %"
    if 0.999 < probability < 1:
        return "> 99.9 %"
    return f"{100 * probability:.1f} %"


def counted(number: int, one: str, several: str) -> str:
    """Formats a number with its noun."""
    return f"{number} {one if number == 1 else several}"


def place_names(kind: str) -> tuple[str, str]:
    """Returns what the slices of a series of some kind are called: one of them, and several."""
    return _PLACES.get(kind, ("Slice", "slices"))


def series_title(series: SeriesPrediction) -> str:
    """Describes a series by what is counted in it."""
    one, several = place_names(series.kind)
    if series.kind == "image":
        return _TITLES["image"]
    number = counted(series.count, one.lower(), several)
    return f"{_TITLES[series.kind]} of {number}" if series.kind in ("frames", "volume") else number


def data_uri(pixels: np.ndarray, kind: str) -> str:
    """Encodes pixels (H, W, 3) or (H, W, 4) uint8 as a data URI.

    Args:
        pixels: The picture.
        kind: `JPEG` or `PNG`.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_colours(heatmap: np.ndarray) -> np.ndarray:
    """Colours of a heat-map (H, W) from its least to its greatest value: transparent, red, yellow, white.

    Opacity is the square of the share of the range: maps vary slowly, and would cover the anatomy otherwise.

    Returns:
        (H, W, 4) uint8; all transparent for a constant map.
    """
    low, high = float(heatmap.min()), float(heatmap.max())
    share = (heatmap - low) / (high - low) if high > low else np.zeros_like(heatmap)
    colours = np.stack([np.clip(3 * share - shift, 0, 1) for shift in range(3)] + [share**2], axis=-1)
    return np.asarray((colours * 255).round().astype(np.uint8))


def edges(affine: np.ndarray | None) -> tuple[str, str]:
    """Names the sides of the patient at the left and the upper edge of slices, as scanners do.

    Args:
        affine: As in `SeriesPrediction`.

    Returns:
        Two of R, L, A, P, H (head) and F (feet), or two empty texts without an affine.

    Example:
        >>> edges(np.array([[0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
        ('R', 'A')
    """
    if affine is None:
        return "", ""
    letters = []
    for axis in (1, 0):  # columns run to the right of a picture, rows down: the edges are where they come from
        direction = -np.asarray(affine)[:3, axis]
        largest = int(np.abs(direction).argmax())
        letters.append(("RL", "AP", "HF")[largest][int(direction[largest] < 0)])
    return letters[0], letters[1]


def _study(study: StudyPrediction, keep_identifiers: bool) -> dict[str, Any]:
    return {
        "number": study.number,
        "file": _file_name(study) if keep_identifiers else "",
        "labels": [(label.label, label.probability) for label in study.labels],
        "several": len(study.series) > 1,
        "series": [_series(series) for series in study.series],
        "skipped": _reasons(study.skipped, keep_identifiers),
    }


def _file_name(study: StudyPrediction) -> str:
    """The name of the file that a study was read from; empty if there are several."""
    names = {source["file"] for series in study.series for source in series.sources.values()}
    return PurePath(names.pop()).name if len(names) == 1 else ""


def _series(series: SeriesPrediction) -> dict[str, Any]:
    place, places = place_names(series.kind)
    facts = []
    if series.spacing is not None:
        facts.append(f"Pixels of {' × '.join(f'{value:.3g}' for value in series.spacing)} mm.")
    if series.affine is not None and series.count > 1:
        facts.append(f"Slices every {np.linalg.norm(np.asarray(series.affine)[:3, 2]):.3g} mm.")
    if series.header_modality is not None:
        facts.append(f"The header states {series.header_modality}.")
    shown = series.labels[:_LABELS_SHOWN]
    return {
        "number": series.number,
        "title": series_title(series),
        "facts": " ".join(facts),
        "notes": [*filter(None, [series.task_warning]), *series.notes],
        "labels": [(label.label, label.probability) for label in series.labels],
        "texts": [(text.text, text.score) for text in series.texts],
        "explained": explained(series),
        "decision": series.decision,
        "routing": sorted(series.routing.items(), key=lambda entry: -entry[1]),
        "expert": series.expert,
        "accepted": series.accepted,
        "acceptance": series.acceptance,
        "reason": series.expert_reason,
        "place": place,
        "places": places,
        "count": series.count,
        "curves": []
        if series.count < 3
        else [curve(label.label, label.slice_probabilities, label.key_slices, place) for label in shown]
        + [curve(f"“{text.text}”", text.slice_scores, text.key_slices, place) for text in series.texts],
        "pictures": _pictures(series),
    }


def explained(series: SeriesPrediction) -> str:
    """Says what the probabilities of a series mean."""
    independent = series.task is not None and series.task.kind == "multi-label"
    text = (
        "Each label has a probability of its own."
        if independent
        else "The probabilities of all labels sum to 100 %: they compare the labels with each other."
    )
    if series.count > 1:
        pooled = {
            "top-k": "the tenth of them with the highest scores, for each label",
            "mean": "all of them",
            "attention": "all of them, weighted by their scores",
        }[series.pooling]
        text += f" Scores of {place_names(series.kind)[1]} are averaged over {pooled}."
    return text


def curve(name: str, values: np.ndarray, keys: Sequence[int], place: str) -> dict[str, Any]:
    """Describes a curve through the slices as SVG, 44 high and N - 1 wide.

    Args:
        name: What is drawn.
        values: (N,) numbers; NaN leaves a gap.
        keys: Indices of the slices to mark.
        place: What a slice is called.

    Returns:
        `name`, `width`, `lines` (points of polylines), `marked` and `described`.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin, height = 4, _CURVE_HEIGHT
    lines: list[list[str]] = [[]]
    for index, value in enumerate(values.tolist()):
        if np.isnan(value):
            lines.append([])  # a gap where a slice could not be read
            continue
        share = (value - low) / (high - low) if high > low else 0.5
        lines[-1].append(f"{index},{height - margin - share * (height - 2 * margin):.1f}")
    return {
        "name": name,
        "range": f"{low:.3f} to {high:.3f}",
        "width": max(1, len(values) - 1),
        "lines": [" ".join(points) for points in lines if points],
        "marked": list(keys),
        "described": f"{name} runs from {low:.3f} to {high:.3f} and is highest in "
        f"{place.lower()} {keys[0] + 1 if keys else 1}.",
    }


def _pictures(series: SeriesPrediction) -> list[dict[str, str]]:
    if series.picture is None or series.heatmaps is None:
        return []
    place, _ = place_names(series.kind)
    wanted: list[tuple[str, str, int]] = []
    for rank, label in enumerate(series.labels[:_LABELS_SHOWN]):
        for index in label.key_slices[: 3 if rank == 0 else 1]:
            wanted.append((label.label, f"{label.label}, {percent(label.slice_probabilities[index])}", index))
    for text in series.texts:
        for index in text.key_slices:
            wanted.append((text.text, f"“{text.text}”, similarity {text.slice_scores[index]:.3f}", index))
    heats: dict[tuple[str, int], np.ndarray] = {}
    for phrase in dict.fromkeys(phrase for phrase, _, _ in wanted):
        indices = [index for other, _, index in wanted if other == phrase]
        heats |= {(phrase, index): heat for index, heat in series.heatmaps(phrase, indices, size=_HEAT_SIDE)}
    images: dict[int, str] = {}
    left, top = edges(series.affine)
    found = []
    for phrase, caption, index in wanted:
        if index not in images:
            try:
                picture = Image.fromarray(series.picture(index))
            except (MedMoEError, OSError, ValueError):  # the file is gone or has changed
                continue
            picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
            images[index] = data_uri(np.asarray(picture), "JPEG")
        where = "" if series.count == 1 else f"{place} {index + 1} of {series.count}: "
        caption = caption.replace(" %", "\u00a0%")
        heat = heats.get((phrase, index))
        found.append(
            {
                "image": images[index],
                "heat": "" if heat is None else data_uri(heat_colours(heat), "PNG"),
                "alt": f"{place} {index + 1} of series {series.number}",
                "caption": f"{where}{caption}",
                "left": left,
                "top": top,
            }
        )
    return found


def _reasons(skipped: Sequence[SkippedFile], keep_identifiers: bool) -> list[tuple[str, int]]:
    told = [
        f"{PurePath(one.path).name}: {one.reason}" if keep_identifiers and one.path else one.reason for one in skipped
    ]
    return Counter(told).most_common()
