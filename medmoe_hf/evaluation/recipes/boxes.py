"""Phrases with boxes on images: COCO JSON or CSV, with the field names of MS-CXR."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from medmoe_hf.common.console import progress
from medmoe_hf.evaluation.recipes.copies import (
    LocalCopy,
    Row,
    expert_id,
    find_missing_images,
    find_subjects,
    first_few,
)
from medmoe_hf.evaluation.recipes.schema import BoxesLayout, Recipe
from medmoe_hf.evaluation.recipes.tables import table_rows


def _number(cell: Any) -> float:
    """Reads a cell as a number; spreadsheets of many countries write 9,5 for 9.5."""
    return float(cell.replace(",", ".") if isinstance(cell, str) else cell)


_BOX_COLUMNS = ("path", "category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height")


def read_boxes(recipe: Recipe, layout: BoxesLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads the phrases and boxes of a boxes layout into `copy`."""
    path = next((folder / name for name in layout.annotations if (folder / name).is_file()), None)
    if path is None:
        names = " or ".join(layout.annotations)
        copy.problems.append(f"{folder} contains none of {names}. Put one of them there.")
        return
    entries, problems = _coco_entries(path) if path.suffix == ".json" else table_rows(path, _BOX_COLUMNS)
    if problems:
        copy.problems += problems
        return
    # A phrase may have several boxes, one per entry.
    rows: dict[tuple[str, str, str], Row] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, entry in enumerate(entries):
        try:
            left, top, width, height = (_number(entry[name]) for name in ("x", "y", "w", "h"))
            size = int(_number(entry["image_width"])), int(_number(entry["image_height"]))
        except (TypeError, ValueError):
            copy.problems.append(f"{path}: box {number} is not numeric. Download the file again.")
            return
        image, category, phrase = (str(entry[name]).strip() for name in ("path", "category_name", "label_text"))
        row = rows.setdefault(
            (image, category, phrase),
            Row(
                str(folder / layout.images / image),
                label=category if category in recipe.classes else None,
                subject=image,
                modality=expert_id(recipe.modality, None),
                phrase=phrase,
                boxes=[],
            ),
        )
        assert row.boxes is not None
        row.boxes.append((left, top, left + width, top + height))
        sizes[row.image] = size
    found = list(rows.values())
    other = Counter(category for image, category, phrase in rows if category not in recipe.classes)
    if other:
        problems.append(
            f"{path}: {other.total()} phrases are of {first_few(other)}, not of {', '.join(recipe.classes)}. "
            "Name these under `classes` of a recipe of your own."
        )
    problems += find_missing_images([Row(image) for image in sizes], folder / layout.images)
    if not problems:
        problems += _resized(sizes)
    find_subjects(found, layout.subject_pattern, copy.warnings)
    copy.add("test", found, problems)


def _coco_entries(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads the annotations of a COCO file as rows with the columns of the CSV, and its problems."""
    broken = f"{path} is not a COCO file like MS-CXR's: "
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [], [f"{broken}{error}. Download it again."]
    entries = []
    try:
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"]: category["name"] for category in content["categories"]}
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            entry = dict(zip(("x", "y", "w", "h"), annotation["bbox"], strict=True))
            entry |= {"path": image["path"], "image_width": image["width"], "image_height": image["height"]}
            entry |= {"category_name": categories[annotation["category_id"]], "label_text": annotation["label_text"]}
            entries.append(entry)
    except (KeyError, TypeError, ValueError) as error:
        return [], [
            f"{broken}{type(error).__name__} {error}. It needs images (id, path, width, height), categories (id, "
            "name) and annotations (image_id, category_id, bbox [x, y, w, h], label_text)."
        ]
    return entries, []


def _resized(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Finds images whose size is not the annotated one: boxes are in pixels of the originals."""
    other = []
    for path, size in progress(sizes.items(), "sizes of images", unit="image", total=len(sizes)):
        try:
            with Image.open(path) as image:
                if image.size != size:
                    other.append(f"{path} ({image.width} x {image.height} instead of {size[0]} x {size[1]})")
        except OSError:
            other.append(f"{path} (not a readable image)")
    if not other:
        return []
    return [
        f"{len(other)} of {len(sizes)} images are not the ones that were annotated: {first_few(other, 1)}. Boxes are "
        "in pixels of the original images; use those."
    ]
