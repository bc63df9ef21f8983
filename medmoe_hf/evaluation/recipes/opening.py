"""Checks and opens a user's copy of a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from medmoe_hf.errors import RecipeError
from medmoe_hf.evaluation.dataset import EvaluationSet, Split
from medmoe_hf.evaluation.recipes.boxes import read_boxes
from medmoe_hf.evaluation.recipes.clip_benchmark import read_clip_benchmark
from medmoe_hf.evaluation.recipes.copies import LocalCopy, Row
from medmoe_hf.evaluation.recipes.folders import read_folders, read_phantoms
from medmoe_hf.evaluation.recipes.medmnist import read_medmnist
from medmoe_hf.evaluation.recipes.schema import (
    BoxesLayout,
    ClipBenchmarkLayout,
    FolderLayout,
    MedMNISTLayout,
    PhantomLayout,
    Recipe,
    TableLayout,
)
from medmoe_hf.evaluation.recipes.tables import read_tables
from medmoe_hf.evaluation.training_sets import overlaps_of
from medmoe_hf.model.modalities_medmoe import MODALITIES

WARNING = "warning: "
"""Prefix of problems reported by `check_recipe` that do not keep `open_recipe` from opening a copy."""


def check_recipe(recipe: Recipe, data_dir: str | Path) -> list[str]:
    """Checks your copy of a data set.

    Every image is looked for; the size of images with boxes is read.

    Args:
        recipe: What to expect.
        data_dir: Folder that the recipe's paths are relative to.

    Returns:
        A message per problem, each with the way to fix it; empty for a correct copy. Messages that begin with
        `WARNING` do not keep the copy from being used.

    Example:
        >>> from medmoe_hf.evaluation.recipes import load_recipe
        >>> check_recipe(load_recipe("rsna_pneumonia"), "missing")[0]
        'There is no folder missing; name the one that contains RSNA pneumonia.'
    """
    return _messages(recipe, _read(recipe, Path(data_dir)))


def _messages(recipe: Recipe, copy: LocalCopy) -> list[str]:
    problems = list(copy.problems)
    if problems:
        expected = "\n".join(f"    {line}" for line in recipe.expected.strip().splitlines())
        problems.append(f"The folder should contain:\n{expected}\n  The data come from {recipe.source}")
    return problems + [WARNING + text for text in copy.warnings]


def open_recipe(recipe: Recipe, data_dir: str | Path) -> list[EvaluationSet]:
    """Opens your copy of a data set; the images stay on disk.

    Args:
        recipe: How the set is laid out.
        data_dir: Folder that the recipe's paths are relative to.

    Returns:
        One set; for phantoms one per modality, since each modality has its own classes (`joined` concatenates them),
        and for MedMNIST-C one per corruption.

    Raises:
        RecipeError: With everything that `check_recipe` reports, if any of it is more than a warning.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("rsna_pneumonia"), "rsna")
        print(len(data.split("test")), data.classes)
        ```
    """
    copy = _read(recipe, Path(data_dir))
    if copy.problems:
        problems = "\n".join(f"  {problem}" for problem in _messages(recipe, copy))
        raise RecipeError(f"{data_dir} is not a usable copy of {recipe.title}:\n{problems}")
    if isinstance(recipe.layout, PhantomLayout):
        modalities = sorted({row.modality for row in copy.rows})
        return [_phantom_set(recipe, copy, modality) for modality in modalities]
    parts: dict[str | None, list[Row]] = {}
    for row in copy.rows:
        parts.setdefault(row.part, []).append(row)
    prompts = copy.class_prompts or recipe.prompts
    classes = list(copy.class_prompts) or recipe.classes
    return [
        _set_of(recipe, recipe.name if part is None else f"{recipe.name}/{part}", rows, classes, prompts)
        for part, rows in parts.items()
    ]


def _read(recipe: Recipe, folder: Path) -> LocalCopy:
    copy = LocalCopy()
    if not folder.is_dir():
        copy.problems.append(f"There is no folder {folder}; name the one that contains {recipe.title}.")
        return copy
    if isinstance(recipe.layout, TableLayout):
        read_tables(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, FolderLayout):
        read_folders(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, BoxesLayout):
        read_boxes(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, MedMNISTLayout):
        read_medmnist(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, ClipBenchmarkLayout):
        read_clip_benchmark(recipe, recipe.layout, folder, copy)
    else:
        read_phantoms(recipe.layout, folder, copy)
    if copy.problems:
        return copy
    count = sum(row.split == "test" for row in copy.rows)
    if not count:
        copy.problems.append(f"{folder} contains no test image.")
    elif recipe.count is not None and count != recipe.count:
        copy.warnings.append(
            f"the test split has N = {count}, the published one has {recipe.count}; results on another N "
            "cannot be compared with published ones."
        )
    seen = {split: {row.subject for row in copy.rows if row.split == split} - {None} for split in get_args(Split)}
    shared = seen["train"] & seen["test"]
    if shared:
        copy.warnings.append(
            f"{len(shared)} subjects have images in both train and test; a linear probe has seen them."
        )
    return copy


def _phantom_set(recipe: Recipe, copy: LocalCopy, modality: int) -> EvaluationSet:
    name = MODALITIES[modality]
    rows = [row for row in copy.rows if row.modality == modality]
    prompts = copy.prompts[name]
    result = _set_of(recipe, f"{recipe.name}/{name}", rows, list(prompts), prompts)
    result.references = [prompts["normal"]] * len(rows) if "normal" in prompts else None
    return result


def _set_of(
    recipe: Recipe, name: str, rows: Sequence[Row], classes: list[str], prompts: dict[str, list[str]]
) -> EvaluationSet:
    def column(values: list[Any]) -> list[Any] | None:
        return None if any(value is None for value in values) else values

    names = column([row.label for row in rows])
    findings = column([row.findings for row in rows])
    labels = None
    if findings is not None:
        labels = np.array(findings, dtype=np.int64).reshape(len(rows), len(classes))
    elif names is not None:
        labels = np.array([classes.index(name) for name in names], dtype=np.int64)
    seen = overlaps_of(recipe.public_sets)
    return EvaluationSet(
        name=name,
        images=[row.image for row in rows],
        captions=column([row.caption or None for row in rows]),
        labels=labels,
        classes=classes,
        prompts=prompts,
        negative_prompts=recipe.negative_prompts,
        modalities=np.array([row.modality for row in rows], dtype=np.int64),
        splits=np.array([row.split for row in rows]),
        subjects=column([row.subject for row in rows]),
        groups={name: [row.groups[name] for row in rows] for name in getattr(recipe.layout, "groups", ())},
        paraphrases=recipe.paraphrases,
        negation=recipe.negation,
        boxes=column([row.boxes for row in rows]),
        phrases=column([row.phrase for row in rows]),
        references=[recipe.references] * len(rows) if recipe.references else None,
        facts=recipe.model_dump(include=_FACTS) | ({"trained_on_by": seen} if seen else {}),
    )


_FACTS = {"title", "tasks", "metric", "count", "source", "license", "overlaps", "notes"}
