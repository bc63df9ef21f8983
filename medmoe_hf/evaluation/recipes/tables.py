"""CSV files whose rows are images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any, get_args

from medmoe_hf.data.tables import read_table
from medmoe_hf.errors import ShardError
from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL, Split
from medmoe_hf.evaluation.recipes.copies import (
    LocalCopy,
    Row,
    expert_id,
    find_missing_images,
    find_subjects,
    first_few,
)
from medmoe_hf.evaluation.recipes.schema import Reading, Recipe, TableLayout

_SPLIT_NAMES = {"val": "validation"}
_CELLS = {"1": "positive", "1.0": "positive", "True": "positive", "0": "negative", "0.0": "negative"}
_CELLS |= {"False": "negative", "-1": "uncertain", "-1.0": "uncertain", "": "empty"}
_LABEL_OF: dict[Reading, int] = {"positive": 1, "negative": 0, "unknown": UNKNOWN_LABEL}


def read_tables(recipe: Recipe, layout: TableLayout, folder: Path, copy: LocalCopy) -> None:
    """Reads the splits of a table layout into `copy`."""
    reports: dict[str, dict[str, Any]] = {}
    header: dict[str, Any] = {}
    shared = {layout.join.on} if layout.join is not None else set()
    if layout.join is not None:
        added, problems = table_rows(folder / layout.join.table, shared)
        if problems:
            copy.problems += problems
            return
        reports, header = {row[layout.join.on]: row for row in added}, added[0]
    for split, name in layout.tables.items():
        path = folder / name
        rows, problems = table_rows(path, shared)
        if not problems:
            problems = _missing_columns(path, header | rows[0], _columns(recipe, layout))
        if problems:
            copy.add(split, [], problems)
            continue
        if layout.join is not None:
            rows = [reports.get(row[layout.join.on], {}) | row for row in rows]
        for column, values in layout.where.items():
            rows = [row for row in rows if row.get(column) in values]
        parts: dict[Split, list[dict[str, Any]]] = {split: rows}
        if layout.split_column is not None:
            names = [_SPLIT_NAMES.get(row[layout.split_column], row[layout.split_column]) for row in rows]
            unknown = sorted(str(value) for value in set(names) - set(get_args(Split)))
            if unknown:
                copy.problems.append(
                    f'{path}: `{layout.split_column}` contains "{unknown[0]}"; it must be train, validation or test. '
                    "Rename it."
                )
                return
            parts = {
                part: [row for row, name in zip(rows, names, strict=True) if name == part] for part in get_args(Split)
            }
        for part, chosen in parts.items():
            copy.add(part, *_rows_of_split(recipe, layout, folder, path, part, chosen, copy.warnings))


def table_rows(path: Path, needed: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads a CSV: its rows, and its problems."""
    try:
        rows = read_table(str(path))
    except ShardError as error:
        return [], [f"{error} Put it there."]
    if not rows:
        return [], [f"{path} has no rows. Download it again."]
    return rows, _missing_columns(path, rows[0], needed)


def _missing_columns(path: Path, row: Mapping[str, Any], needed: Iterable[str]) -> list[str]:
    # A row with more cells than the header has them under None.
    there = [name for name in row if name is not None]
    problems = []
    for column in sorted(set(needed) - set(there)):
        near = get_close_matches(column, there, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        problems.append(
            f'{path} has no column "{column}", but {", ".join(there)}{guess}. Rename the column, or copy the recipe '
            "to a YAML file of your own and name your column there."
        )
    return problems


def _fields(template: str | None) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template or "") if name}


def _columns(recipe: Recipe, layout: TableLayout) -> set[str]:
    columns = _fields(layout.image) | _fields(layout.caption) | set(layout.where) | set(layout.groups)
    columns |= set(recipe.classes) if layout.one_hot else set()
    return columns | {column for column in (layout.label, layout.split_column) if column is not None}


def _rows_of_split(
    recipe: Recipe,
    layout: TableLayout,
    folder: Path,
    path: Path,
    split: Split,
    entries: Sequence[Mapping[str, Any]],
    warnings: list[str],
) -> tuple[list[Row], list[str]]:
    """Reads the images of one split, and their problems."""
    images = folder / layout.images
    class_of = {value: name for name in recipe.classes for value in layout.values.get(name, [name])}
    rows: list[Row] = []
    unlabelled: Counter[str] = Counter()
    without_text = 0
    for entry in entries:
        row = Row(str(images / _filled(layout.image, entry)), split, caption=_filled(layout.caption, entry))
        if layout.caption is not None and not row.caption:
            without_text += 1
            continue
        if recipe.labels == "multi":
            row.findings = [_finding(entry[name], layout) for name in recipe.classes]
            unlabelled.update(f'"{entry[name]}" in {name}' for name in recipe.classes if _cell(entry[name]) is None)
        elif layout.one_hot:
            ones = [name for name in recipe.classes if _is_one(entry[name])]
            row.label = ones[0] if len(ones) == 1 else None
            if row.label is None:
                unlabelled["1 in " + (" and ".join(ones) or "none of the classes' columns")] += 1
        elif layout.label is not None:
            value = str(entry[layout.label]).strip()
            row.label = class_of.get(value)
            if row.label is None:
                unlabelled[f'"{value}"'] += 1
        row.modality = expert_id(recipe.modality, row.caption)
        row.subject = _filled(layout.subject, entry) or None
        row.groups = {column: str(entry.get(column) or "").strip() for column in layout.groups}
        rows.append(row)
    if without_text:
        warnings.append(f"{path}: {without_text} rows have no text and are left out.")
    problems = []
    if unlabelled:
        column = f"`{layout.label}`" if layout.label is not None else "the columns of the classes"
        expected = "a single 1" if layout.one_hot else ", ".join(class_of)
        if recipe.labels == "multi":
            expected = "1, 0, -1 or nothing"
        cannot = "labels cannot be read" if recipe.labels == "multi" else "rows cannot be labelled"
        remedy = "" if layout.one_hot else ", or name the values under `values` of a recipe of your own"
        problems.append(
            f"{path}: {unlabelled.total()} {cannot}: {column} should contain {expected}, but contain "
            f"{first_few(unlabelled)}. Correct these rows{remedy}."
        )
    problems += find_missing_images(rows, images)
    if layout.subject is not None:
        find_subjects(rows, layout.subject_pattern, warnings)
    return rows, problems


def _filled(template: str | None, entry: Mapping[str, Any]) -> str:
    """Fills a template with the columns of a row; columns that are empty or missing leave nothing."""
    columns = {name: str(entry.get(name) or "").strip() for name in _fields(template)}
    return (template or "").format_map(columns).strip()


def _cell(value: Any) -> str | None:
    """Kind of a one-hot cell: positive, negative, uncertain or empty; None for anything else."""
    return _CELLS.get("" if value is None else str(value).strip())


def _is_one(value: Any) -> bool:
    return _cell(value) == "positive"


def _finding(value: Any, layout: TableLayout) -> int:
    """Label of one cell of a multi-label table: 1, 0 or `UNKNOWN_LABEL`."""
    kind = _cell(value)
    if kind == "uncertain":
        return _LABEL_OF[layout.uncertain]
    if kind == "empty":
        return _LABEL_OF[layout.empty]
    return int(kind == "positive")
