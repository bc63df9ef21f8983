"""What `predict` returns, and how it is written as JSON and CSV.

Indices of slices count from 0. Numbers of studies and series count from 1, in the order of the files: they take the
place of names and UIDs, which may identify a person.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from medmoe_hf import __version__
from medmoe_hf.model import Task

SCHEMA = 1
"""Version of the format of prediction.json. It grows when a key changes its meaning or is removed."""

DISCLAIMER = (
    "Research software, not a medical device: not validated for diagnosis or for any decision about a patient."
)
LIMITS = (
    "A probability compares the given labels with each other; it is no probability of a disease. A label that is not "
    "asked for cannot be the answer.",
    "A heat-map shows which places speak for a label. There is always a warmest place, also where there is nothing to "
    "find.",
    "Every image is sent to one of the experts, also images of a modality that none of them knows. A model with a "
    "rejector refuses those that are unlike what it knows; it misses some, and refuses some that it could read.",
    "Slices are read one by one; what is only visible across slices is not seen.",
    "Pictures may show names that are burned into their pixels, and faces: look before you share them.",
)

_DIGITS = 6

CSV_COLUMNS = (
    "study",
    "label",
    "probability",
    "score",
    "key_series",
    "key_slice_index",
    "expert",
    "series",
    "slices",
    "model",
    "ood_score",
    "accepted",
    "selected",
    "in_set",
)
"""Columns of prediction.csv, which has a row per study and label."""

IDENTIFYING_COLUMNS = ("uid", "file")
"""Further columns where identifiers are kept: the UID of the study, and the file of the key slice."""


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), _DIGITS)


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in np.asarray(values, dtype=np.float64).tolist()]


@dataclass(eq=False)
class LabelPrediction:
    """A label of a series.

    Attributes:
        label: Its name.
        probability: In 0..1; over all labels a softmax of `score`, or a sigmoid where labels have negative sentences.
        score: The pooled logit: cosine times the model's scale, minus that of the negative sentences if there are any.
        key_slices: Indices of the slices with the highest probability that are not neighbours, the highest first.
        slice_scores: (N,) logits; NaN where a slice could not be read.
        slice_probabilities: (N,) likewise.
        selected: Whether the calibration of the task selects the label, by its threshold. None without a calibration,
            and for more than one slice: calibrations are fitted on single images.
        in_set: Whether the label is in the prediction set of the image; None likewise.
    """

    label: str
    probability: float
    score: float
    key_slices: list[int]
    slice_scores: np.ndarray
    slice_probabilities: np.ndarray
    selected: bool | None = None
    in_set: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of prediction.json."""
        return {
            "label": self.label,
            "probability": _number(self.probability),
            "score": _number(self.score),
            "selected": self.selected,
            "in_set": self.in_set,
            "key_slices": list(self.key_slices),
            "slice_scores": _numbers(self.slice_scores),
            "slice_probabilities": _numbers(self.slice_probabilities),
        }


@dataclass(eq=False)
class TextPrediction:
    """A phrase that was looked for.

    Attributes:
        text: The phrase.
        score: Pooled cosine of slices and phrase, in -1..1; only comparable between slices and studies.
        key_slices: As in `LabelPrediction`, by cosine.
        slice_scores: (N,) cosines; NaN where a slice could not be read.
    """

    text: str
    score: float
    key_slices: list[int]
    slice_scores: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of prediction.json."""
        return {
            "text": self.text,
            "score": _number(self.score),
            "key_slices": list(self.key_slices),
            "slice_scores": _numbers(self.slice_scores),
        }


@dataclass(eq=False)
class SeriesPrediction:
    """A series: its routing, its labels, and access to its pictures and heat-maps.

    Attributes:
        number: From 1, within the study.
        kind: `slices`, `frames`, `tiles`, `volume` or `image`.
        count: N, the number of slices or frames.
        spacing: Millimetres as the reader states them; None if unknown.
        positions: N positions of the slices along their normal, in millimetres; None if unknown.
        header_modality: Modality that the header states; None if none.
        expert: Modality of the expert that read the series.
        expert_reason: Why it was this one, as a sentence.
        routing: Modality -> probability, from the votes of all slices and the header.
        ood_scores: (N,), how far each slice is from the images that the model knows, relative to the limit: above 1 it
            is refused. NaN where a slice could not be read; None for a model without a rejector.
        pooling: How the scores of slices were pooled.
        labels: The labels, the most probable first.
        texts: The phrases.
        uid: The series' UID; written with `keep_identifiers` only.
        sources: For each key slice what it was read from; written with `keep_identifiers` only.
        paths: For each key slice the file, where `sources` names an address instead.
        notes: What a reader should know, such as missing slices.
        affine: (4, 4), from (row, column, slot, 1) of the pictures to millimetres (right, front, head); or None.
        slots: N positions of the slices along the third axis of `affine`; None as 0..N-1.
        task: The labels and their sentences; None if nothing was asked.
        picture: Function of a slice's index that returns (H, W, 3) uint8.
        heatmaps: Function of a label or text and of indices that yields the index and the (H, W) float32 heat-map of
            each slice, in the pixels of its picture, or with sides of at most `size` if that is given.
        foreign_task: Whether the task is for images of another modality than that of the expert.
        ask: Function of another `Question` that returns its answer at once: slices are not encoded again, unless its
            task scores regions, and the expert stays.
    """

    number: int
    kind: str
    count: int
    spacing: Sequence[float] | None
    positions: Sequence[float] | None
    header_modality: str | None
    expert: str
    expert_reason: str
    routing: dict[str, float]
    pooling: str
    labels: list[LabelPrediction]
    texts: list[TextPrediction] = field(default_factory=list)
    uid: str = ""
    sources: dict[int, dict[str, Any]] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    affine: np.ndarray | None = None
    slots: list[int] | None = None
    task: Task | None = field(default=None, repr=False)
    picture: Callable[[int], np.ndarray] | None = field(default=None, repr=False)
    heatmaps: Callable[..., Iterator[tuple[int, np.ndarray]]] | None = field(default=None, repr=False)
    ask: "Callable[[Any], SeriesPrediction] | None" = field(default=None, repr=False)
    ood_scores: np.ndarray | None = None
    foreign_task: bool = False

    @property
    def ood_score(self) -> float | None:
        """The median of the slices' scores; None without a rejector."""
        return None if self.ood_scores is None else float(np.nanmedian(self.ood_scores))

    @property
    def accepted(self) -> bool | None:
        """Whether at least half of the slices are like the images that the model knows; None without a rejector."""
        return None if self.ood_score is None else self.ood_score <= 1

    @property
    def acceptance(self) -> str:
        """What `accepted` means for a reader, as a sentence."""
        if self.ood_scores is None:
            return "It was not checked whether these images are of a kind that the model knows: it has no rejector."
        refused, count = int((self.ood_scores > 1).sum()), int((~np.isnan(self.ood_scores)).sum())
        if self.accepted:
            return f"Like the images that the model knows ({count - refused} of {count} accepted)."
        # Images of an expert without any to compare with are infinitely far, in effect.
        median = float(np.nanmedian(self.ood_scores))
        score = "above 1000" if median > 1000 else f"{max(median, 1.01):.2f}"  # not "1.00, accepted up to 1"
        return (
            f"Unlike the images that the model knows ({refused} of {count} refused; score {score}, "
            "accepted up to 1): what is said about them cannot be relied on."
        )

    @property
    def decision(self) -> str:
        """What the calibration of the task decides, as a sentence; empty without one, and for several slices."""
        calibration = self.task and self.task.calibration
        if not calibration or any(label.in_set is None for label in self.labels):
            return ""
        selected = [label.label for label in self.labels if label.selected]
        members = [label.label for label in self.labels if label.in_set]
        return (
            f"Selected by threshold: {', '.join(selected) or 'none'}. "
            f"{calibration.coverage:.0%} prediction set: {', '.join(members) or 'empty, no label fits well enough'}."
        )

    @property
    def task_warning(self) -> str:
        """What `foreign_task` means for a reader, as a sentence; empty if the task suits the images."""
        if not self.foreign_task or self.task is None:
            return ""
        return (
            f"The task is for images of the modality {self.task.modality}, but these were read as {self.expert}: "
            "unless that is wrong, the probabilities mean nothing."
        )

    def to_dict(self, keep_identifiers: bool = False) -> dict[str, Any]:
        """Returns the entry of prediction.json.

        Args:
            keep_identifiers: Include the UID of the series, and the files of its key slices.
        """
        found: dict[str, Any] = {
            "series": self.number,
            "kind": self.kind,
            "slices": self.count,
            "spacing": None if self.spacing is None else _numbers(self.spacing),
            "positions": None if self.positions is None else _numbers(self.positions),
            "header_modality": self.header_modality,
            "expert": self.expert,
            "expert_reason": self.expert_reason,
            "routing": {name: _number(value) for name, value in self.routing.items()},
            "ood_score": None if self.ood_score is None else _number(self.ood_score),
            "accepted": self.accepted,
            "slice_ood_scores": None if self.ood_scores is None else _numbers(self.ood_scores),
            "pooling": self.pooling,
            "independent": self.task is not None and self.task.kind == "multi-label",
            "notes": [*filter(None, [self.task_warning]), *self.notes],
            "labels": [label.to_dict() for label in self.labels],
            "texts": [text.to_dict() for text in self.texts],
        }
        if keep_identifiers:
            found["uid"] = self.uid
            found["sources"] = {str(index): source for index, source in sorted(self.sources.items())}
        return found


@dataclass(eq=False)
class StudyLabel:
    """A label of a study: the mean over the series that were asked for it.

    Attributes:
        label: Its name.
        probability: In 0..1, from `score` as in `LabelPrediction`.
        score: Mean of the scores of the series.
        series: Number of the series with the highest score.
        key_slice: Index of that series' first key slice.
        slices: Number of slices of all series that were asked.
        asked: Numbers of these series.
        selected: As in `LabelPrediction`, for a study of one image.
        in_set: Likewise.
    """

    label: str
    probability: float
    score: float
    series: int
    key_slice: int
    slices: int
    asked: list[int]
    selected: bool | None = None
    in_set: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of prediction.json."""
        return {
            "label": self.label,
            "probability": _number(self.probability),
            "score": _number(self.score),
            "selected": self.selected,
            "in_set": self.in_set,
            "series": self.series,
            "key_slice": self.key_slice,
            "asked": list(self.asked),
        }


@dataclass(frozen=True)
class SkippedFile:
    """A file, or a slice, that is not part of the answer.

    Attributes:
        path: Its path; written with `keep_identifiers` only.
        reason: Why, in words that contain no path.
    """

    path: str
    reason: str

    def to_dict(self, keep_identifiers: bool = False) -> dict[str, Any]:
        """Returns the entry of prediction.json.

        Args:
            keep_identifiers: Include the name of the file.
        """
        return {"reason": self.reason} | ({"file": PurePath(self.path).name} if keep_identifiers else {})


@dataclass(eq=False)
class StudyPrediction:
    """A study.

    Attributes:
        number: From 1, in the order of reading.
        series: Its series.
        labels: Labels of the study, the most probable first.
        skipped: Files and slices that were left out, and why.
        model: Name of the model.
        uid: The study's UID; written with `keep_identifiers` only.

    Example:
        ```python
        import medmoe_hf

        for study in medmoe_hf.predict(["exports/patient"], labels=["no finding", "pneumonia"]):
            print(study.number, study.labels[0].label, study.labels[0].probability)
        ```
    """

    number: int
    series: list[SeriesPrediction]
    labels: list[StudyLabel]
    skipped: list[SkippedFile]
    model: str
    uid: str = ""

    def to_dict(self, keep_identifiers: bool = False) -> dict[str, Any]:
        """Returns the study's entry of prediction.json.

        Args:
            keep_identifiers: Include UIDs and names of files, which may identify a person.
        """
        found: dict[str, Any] = {
            "study": self.number,
            "labels": [label.to_dict() for label in self.labels],
            "series": [series.to_dict(keep_identifiers) for series in self.series],
            "skipped": [skipped.to_dict(keep_identifiers) for skipped in self.skipped],
        }
        return found | ({"uid": self.uid} if keep_identifiers else {})


class StudyPredictions(list[StudyPrediction]):
    """A list of predictions; `skipped` lists the files that belong to no study."""

    on_close: Callable[[], None] | None = None

    def __init__(self, studies: Iterable[StudyPrediction], skipped: Iterable[SkippedFile] = ()) -> None:
        super().__init__(studies)
        self.skipped = list(skipped)

    def close(self) -> None:
        """Deletes what was downloaded from addresses: pictures and heat-maps cannot be drawn any more."""
        if self.on_close is not None:
            self.on_close()


def skipped_of(studies: Sequence[StudyPrediction]) -> list[SkippedFile]:
    """Returns the files that belong to none of the studies."""
    return list(getattr(studies, "skipped", ()))


def predictions_dict(studies: Sequence[StudyPrediction], keep_identifiers: bool = False) -> dict[str, Any]:
    """Returns the content of prediction.json, which prediction.schema.json describes.

    Args:
        studies: What `predict` returned.
        keep_identifiers: Include UIDs and names of files, which may identify a person.
    """
    return {
        "schema": SCHEMA,
        "created_by": f"medmoe_hf {__version__}",
        "model": studies[0].model if studies else "",
        "disclaimer": DISCLAIMER,
        "limits": list(LIMITS),
        "studies": [study.to_dict(keep_identifiers) for study in studies],
        "skipped": [skipped.to_dict(keep_identifiers) for skipped in skipped_of(studies)],
    }


def csv_rows(studies: Sequence[StudyPrediction], keep_identifiers: bool = False) -> list[dict[str, Any]]:
    """Returns the rows of prediction.csv: one per study and label, in the order of the study's labels.

    Args:
        studies: What `predict` returned.
        keep_identifiers: Include `IDENTIFYING_COLUMNS`.
    """
    rows = []
    for study in studies:
        by_number = {series.number: series for series in study.series}
        for label in study.labels:
            key = by_number[label.series]
            values = (
                study.number,
                label.label,
                _number(label.probability),
                _number(label.score),
                label.series,
                label.key_slice,
                key.expert,
                len(label.asked),
                label.slices,
                study.model,
                None if key.ood_score is None else _number(key.ood_score),
                key.accepted,
                label.selected,
                label.in_set,
            )
            rows.append(dict(zip(CSV_COLUMNS, values, strict=True)))
            if keep_identifiers:
                own = (study.uid, key.sources.get(label.key_slice, {}).get("file"))
                rows[-1] |= dict(zip(IDENTIFYING_COLUMNS, own, strict=True))
    return rows
