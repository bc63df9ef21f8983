"""The rows of a user's copy of a data set, and checks that all layouts share."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmoe_hf.common.console import progress
from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.evaluation.dataset import Box, Split
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY


@dataclass
class Row:
    """One image of a copy and what its table contains about it.

    Attributes:
        findings: Labels of a multi-label set, one per class: 1, 0 or `UNKNOWN_LABEL`.
        groups: Column -> value, for the columns whose groups are compared; "" where it is empty.
        part: Part of the copy that is a set of its own; None if the copy is one set.
    """

    image: Any
    split: Split = "test"
    label: str | None = None
    findings: list[int] | None = None
    caption: str | None = None
    subject: str | None = None
    modality: int = UNKNOWN_MODALITY
    phrase: str | None = None
    boxes: list[Box] | None = None
    groups: dict[str, str] = field(default_factory=dict)
    part: str | None = None


@dataclass
class LocalCopy:
    """The rows of a user's copy, problems that keep it from being used, and warnings."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    class_prompts: dict[str, list[str]] = field(default_factory=dict)

    def add(self, split: Split, rows: list[Row], problems: list[str]) -> None:
        """Adds the rows of a split. Its problems are errors for `test`, and warnings for the others."""
        if not problems:
            self.rows += rows
        elif split == "test":
            self.problems += problems
        else:
            self.warnings.append(f"the {split} split is left out. {' '.join(problems)}")


def first_few(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def find_missing_images(rows: Sequence[Row], folder: Path) -> list[str]:
    looked_for = progress(rows, f"looking for images in {folder.name}", unit="image")
    missing = [row.image for row in looked_for if not Path(row.image).is_file()]
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(rows)} images are missing: {first_few(missing)}. Put them into {folder}, "
        "or copy the recipe to a YAML file of your own and set `images` to their folder."
    ]


def find_subjects(rows: Sequence[Row], pattern: str | None, warnings: list[str]) -> None:
    """Reduces each subject to the part that matches the pattern; an image without one is a subject of its own."""
    without = 0
    for row in rows:
        found = re.search(pattern or ".+", row.subject or "")
        without += found is None
        row.subject = row.image if found is None else found.group()
    if without:
        warnings.append(
            f"{without} images have no subject; each counts as a subject of its own, and intervals may be too narrow. "
            "Set `subject`, or a `subject_pattern` that matches, in a recipe of your own."
        )


def expert_id(modality: str, caption: str | None) -> int:
    named = modality_from_text(caption or "") if modality == "caption" else modality
    return MODALITIES.index(named) if named in MODALITIES else UNKNOWN_MODALITY
