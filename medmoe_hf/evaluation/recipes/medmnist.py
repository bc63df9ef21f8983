"""Reads the npz files of MedMNIST+ and MedMNIST-C."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medmoe_hf.errors import RecipeError
from medmoe_hf.evaluation.dataset import Split
from medmoe_hf.evaluation.recipes.copies import LocalCopy, Row, expert_id
from medmoe_hf.evaluation.recipes.medmnist_sets import medmnist_file
from medmoe_hf.evaluation.recipes.schema import MedMNISTLayout, Recipe

SEVERITIES = 5
_SPLITS: Mapping[Split, str] = {"train": "train", "validation": "val", "test": "test"}


def read_medmnist(recipe: Recipe, layout: MedMNISTLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads a set into `copy`: all splits of one file, or the test images of a file per corruption.

    The images are views of the arrays in the file, which are in memory as long as one of them is.
    """
    try:
        if layout.corrupted:
            files = sorted((folder / layout.flag).glob("*.npz"))
            if not files:
                raise RecipeError(f"No file matches {folder / layout.flag / '*.npz'}; there is one per corruption.")
            for path in files:
                copy.rows += _rows(recipe, layout, path, "test", path.stem)
        else:
            path = folder / medmnist_file(layout.flag, layout.size)
            if not path.is_file():
                raise RecipeError(f"{path} is missing. MedMNIST's own download writes it, or take it from the source.")
            # A probe needs all splits, zero-shot the last only.
            splits: tuple[Split, ...] = tuple(_SPLITS) if "linear-probe" in recipe.tasks else ("test",)
            for split in splits:
                copy.rows += _rows(recipe, layout, path, split, None)
    except RecipeError as error:
        copy.problems.append(str(error))


def _rows(recipe: Recipe, layout: MedMNISTLayout, path: Path, split: Split, part: str | None) -> list[Row]:
    key = _SPLITS[split]
    try:
        with np.load(path) as file:
            images, labels = file[f"{key}_images"], file[f"{key}_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RecipeError(f"{path} has no {key}_images and {key}_labels that can be read: {error}") from error
    multi = recipe.labels == "multi"
    width = len(recipe.classes) if multi else 1
    if images.dtype != np.uint8 or images.shape[1:3] != (layout.size, layout.size) or images.ndim not in (3, 4):
        raise RecipeError(
            f"{path}: {key}_images are {images.dtype} {images.shape}; expected are bytes (N, {layout.size}, "
            f"{layout.size}) or (N, {layout.size}, {layout.size}, 3)."
        )
    if labels.shape != (len(images), width):
        raise RecipeError(f"{path}: {key}_labels have the shape {labels.shape}, expected is {(len(images), width)}.")
    labels = labels.astype(np.int64)
    most = 1 if multi else len(recipe.classes) - 1
    if len(labels) and not (labels.min() >= 0 and labels.max() <= most):
        raise RecipeError(f"{path}: {key}_labels are {labels.min()} to {labels.max()}, expected are 0 to {most}.")
    count = len(images) // SEVERITIES
    if part is not None and len(images) != count * SEVERITIES:
        raise RecipeError(f"{path}: {len(images)} images are not {SEVERITIES} severities of each.")
    modality = expert_id(recipe.modality, None)
    return [
        Row(
            image,
            split,
            label=None if multi else recipe.classes[int(label[0])],
            findings=label.tolist() if multi else None,
            # the severities of one image are not independent
            subject=None if part is None else f"image {index % count}",
            modality=modality,
            part=part,
        )
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
