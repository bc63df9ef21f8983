"""The data set that every protocol takes: images and what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from medmoe_hf.errors import ArgumentError

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original image; right and bottom are the first pixels outside."""

Split = Literal["train", "validation", "test"]

UNKNOWN_LABEL = -100
"""Label of a finding that was not assessed (multi-label sets)."""


@dataclass
class EvaluationSet:
    """Images and what is known of each; every list and array has one entry per image.

    For grounding, an image appears once per phrase.

    Attributes:
        name: Name of the recipe, followed by `/` and the modality where a recipe yields several sets.
        images: N paths or PIL images; the encoders read paths.
        captions: Text of each image (retrieval).
        labels: (N,) int64 indices into `classes`; or, for a multi-label set, (N, C) int64 with 1 where a finding is
            present, 0 where it is absent and -100 where it is unknown.
        classes: C class names, or findings, in order.
        prompts: Class -> sentences that describe it.
        negative_prompts: Finding -> sentences that describe its absence (multi-label sets); empty without.
        modalities: (N,) int64 expert ids, -100 where unknown.
        splits: (N,) "train", "validation" or "test"; None if all images are for testing.
        subjects: Subject of each image, for splits and intervals by subject.
        groups: Column, such as `sex` -> value of each image, "" where it is unknown (robustness).
        paraphrases: Class -> other sentences, as many for each class (robustness); empty for those of `prompts`.
        negation: Class -> words of the finding in the negation test (robustness); empty for the classes' names.
        boxes: Boxes around the phrase's finding, zero or more per image (grounding).
        phrases: Phrase to localize in each image; "" where there is nothing to find.
        references: Sentences of the same modality that report no finding, against which a phrase is compared.
        facts: The recipe's `title`, `tasks`, `metric`, `count`, `source`, `license`, `overlaps` and `notes`.

    Example:
        >>> import numpy as np
        >>> data = EvaluationSet("toy", ["a.png", "b.png"], labels=np.array([0, 1]), classes=["normal", "effusion"])
        >>> len(data.split("test"))
        2
    """

    name: str
    images: list[Any]
    captions: list[str] | None = None
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    negative_prompts: dict[str, list[str]] = field(default_factory=dict)
    modalities: np.ndarray | None = None
    splits: np.ndarray | None = None
    subjects: list[str] | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)
    paraphrases: dict[str, list[str]] = field(default_factory=dict)
    negation: dict[str, str] = field(default_factory=dict)
    boxes: list[list[Box]] | None = None
    phrases: list[str] | None = None
    references: list[list[str]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several of the classes: `labels` is (N, C)."""
        return self.labels is not None and self.labels.ndim == 2

    def split(self, name: Split) -> "EvaluationSet":
        """Selects one split.

        Args:
            name: "train", "validation" or "test".

        Returns:
            A set with the images of that split. Without `splits`, "test" has all images and the others have none.
        """
        rows = [index for index, split in enumerate(self._split_names()) if split == name]
        columns = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if column.name in _PER_IMAGE and value is not None:
                value = value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]
            columns[column.name] = value
        columns["groups"] = {name: [cells[row] for row in rows] for name, cells in self.groups.items()}
        return EvaluationSet(**columns)

    def _split_names(self) -> Sequence[str]:
        return ["test"] * len(self) if self.splits is None else self.splits.tolist()


_PER_IMAGE = frozenset(
    {"images", "captions", "labels", "modalities", "splits", "subjects", "boxes", "phrases", "references"}
)

_BY_CLASS = ("classes", "prompts", "negative_prompts", "paraphrases", "negation")


def joined(sets: Sequence[EvaluationSet], name: str) -> EvaluationSet:
    """Concatenates sets, for protocols that run on all images at once: retrieval, routing, grounding.

    A column that one of the sets lacks is dropped; so are labels, classes and prompts, unless all sets have the same
    classes.

    Args:
        sets: At least one set.
        name: Name of the result.

    Returns:
        One set with the images of all.
    """
    first = sets[0]
    columns: dict[str, Any] = {}
    for column in _PER_IMAGE:
        parts = [getattr(one, column) for one in sets]
        if any(part is None for part in parts):
            continue
        arrays = isinstance(parts[0], np.ndarray)
        columns[column] = np.concatenate(parts) if arrays else [entry for part in parts for entry in part]
    columns["groups"] = {
        name: [cell for one in sets for cell in one.groups[name]]
        for name in first.groups
        if all(name in one.groups for one in sets)
    }
    if all(one.classes == first.classes for one in sets):
        columns |= {name: getattr(first, name) for name in _BY_CLASS}
    else:
        columns["labels"] = None
    return EvaluationSet(name=name, facts=first.facts, **columns)


def test_split(data: EvaluationSet) -> EvaluationSet:
    """Selects the test split.

    Args:
        data: A set.

    Returns:
        The images of `data` that are for testing.

    Raises:
        ValueError: If there are none.
    """
    part = data.split("test")
    if not len(part):
        raise ArgumentError(f"{data.name}: none of the {len(data)} images is in the test split.")
    return part


# Not a test, though pytest would collect it by its name from a module that imports it.
test_split.__test__ = False  # type: ignore[attr-defined]
