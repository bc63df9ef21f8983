"""Recipes: what a public data set looks like on a user's disk, and how it is scored.

A recipe is a YAML file in `recipe_files/`, or one of the user's own. It says which files are expected, what their
columns mean, which classes there are, which sentences stand for them, where the data come from and what they share
with the training data. No recipe downloads anything: `check_recipe` says what a copy lacks, `open_recipe` reads one.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib import resources
from io import BytesIO
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medmoe_hf.common.console import progress
from medmoe_hf.common.yaml_files import in_words, read_yaml
from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.shards import TarShard, read_table
from medmoe_hf.errors import ArgumentError, RecipeError, ShardError
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY, modality_id

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the original image; right and bottom are the first pixels outside."""

Task = Literal["zero-shot", "linear-probe", "retrieval", "grounding", "routing"]
Split = Literal["train", "val", "test"]
Metric = Literal["accuracy", "macro_auroc", "image_to_text_r1", "text_to_image_r1", "contrast_to_noise", "pointing"]


@dataclass
class EvaluationSet:
    """Images and what is known of them; every list and array has one entry an image.

    For grounding an image stands there once for each phrase.

    Attributes:
        name: of the recipe, with `/` and the modality where a recipe makes several sets.
        images: paths, read by the encoders, or PIL images.
        captions: the text of each image (retrieval).
        labels: (N,) positions in `classes`.
        classes: names, in order.
        prompts: class -> sentences that stand for it.
        modalities: (N,) expert ids, -100 where unknown.
        splits: (N,) "train", "val" or "test"; None: all is for testing.
        subjects: whose image it is, for splits and intervals by subject.
        boxes: where the phrase is, several boxes or none an image (grounding).
        phrases: what to look for; "" where there is nothing to find.
        references: sentences of the same modality that find nothing, against which a phrase is compared.
        facts: the recipe's `title`, `tasks`, `metric`, `source`, `licence`, `overlaps` and `notes`.
    """

    name: str
    images: list[Any]
    captions: list[str] | None = None
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    modalities: np.ndarray | None = None
    splits: np.ndarray | None = None
    subjects: list[str] | None = None
    boxes: list[list[Box]] | None = None
    phrases: list[str] | None = None
    references: list[list[str]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def split(self, name: Split) -> "EvaluationSet":
        """The part of one split; without `splits`, everything for "test" and nothing for the others."""
        rows = [index for index, split in enumerate(self._split_names()) if split == name]
        columns = {}
        for column in fields(self):
            value = getattr(self, column.name)
            if column.name in _PER_IMAGE and value is not None:
                value = value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]
            columns[column.name] = value
        return EvaluationSet(**columns)

    def _split_names(self) -> Sequence[str]:
        return ["test"] * len(self) if self.splits is None else self.splits.tolist()


_PER_IMAGE = frozenset(
    {"images", "captions", "labels", "modalities", "splits", "subjects", "boxes", "phrases", "references"}
)


def joined(sets: Sequence[EvaluationSet], name: str) -> EvaluationSet:
    """Several sets as one, for what is asked of all of them at once: retrieval, routing, grounding.

    A column that one of them lacks is dropped; so are labels, classes and prompts, unless all have the same classes.
    """
    first = sets[0]
    columns: dict[str, Any] = {}
    for column in _PER_IMAGE:
        parts = [getattr(one, column) for one in sets]
        if any(part is None for part in parts):
            continue
        arrays = isinstance(parts[0], np.ndarray)
        columns[column] = np.concatenate(parts) if arrays else [entry for part in parts for entry in part]
    if all(one.classes == first.classes for one in sets):
        columns |= {"classes": first.classes, "prompts": first.prompts}
    else:
        columns["labels"] = None
    return EvaluationSet(name=name, facts=first.facts, **columns)


class _Layout(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JoinedTable(_Layout):
    """A second CSV whose columns are added to the first's rows.

    Attributes:
        table: its path.
        on: the column that both share.
    """

    table: str
    on: str


class TableLayout(_Layout):
    """CSV files whose rows are images. All paths are relative to the data folder.

    Templates are text with columns in braces: `"{ID}.jpg"`.

    Attributes:
        tables: split -> CSV. With `split_column`, one CSV under `test`.
        split_column: column that says "train", "val" or "test".
        images: folder that image paths start from.
        image: template of an image's path.
        label: column of the class; None with `one_hot` or without classes.
        one_hot: whether each class is a column, 1 where it holds.
        values: class -> what the label column says for it; for the others, the class's own name.
        where: column -> the values of rows that are used; others are left out.
        join: a second table.
        caption: template of an image's text; rows without one are left out.
        subject: template of whose image it is.
        subject_pattern: regular expression; the part of `subject` that fits it is taken.
    """

    kind: Literal["table"]
    tables: dict[Split, str] = Field(min_length=1)
    split_column: str | None = None
    images: str = "."
    image: str
    label: str | None = None
    one_hot: bool = False
    values: dict[str, list[str]] = {}
    where: dict[str, list[str]] = {}
    join: JoinedTable | None = None
    caption: str | None = None
    subject: str | None = None
    subject_pattern: str | None = None


class FolderLayout(_Layout):
    """Images in a folder for each class.

    Attributes:
        splits: split -> folder that holds the classes' folders; `.` is the data folder itself.
        folders: class -> folders of its images; for the others, the class's own name.
        without: files whose name contains one of these are no images of the set (masks).
    """

    kind: Literal["folder"]
    splits: dict[Split, str] = {"test": "."}
    folders: dict[str, list[str]] = {}
    without: list[str] = []


class BoxesLayout(_Layout):
    """Phrases with boxes on images: COCO JSON, or a CSV with one box a row, both with the field names of MS-CXR.

    Attributes:
        annotations: files, any one of which is enough; the first that is there is read.
        images: folder that image paths start from.
        subject_pattern: regular expression; the part of an image's path that fits it is its subject.
    """

    kind: Literal["boxes"]
    annotations: list[str] = Field(min_length=1)
    images: str = "."
    subject_pattern: str | None = None


class PhantomLayout(_Layout):
    """What `examples/quickstart.py` leaves: tar shards of phantoms and the prompts of their findings.

    Attributes:
        shards: pattern of the shards.
        prompts: JSON file, modality -> finding -> sentences.
    """

    kind: Literal["phantom"]
    shards: str = "unseen/*.tar"
    prompts: str = "prompts.json"


LAYOUTS = (TableLayout, FolderLayout, BoxesLayout, PhantomLayout)
Layout = Annotated[TableLayout | FolderLayout | BoxesLayout | PhantomLayout, Field(discriminator="kind")]


class Recipe(BaseModel):
    """How a data set lies on disk and how it is scored.

    Attributes:
        name: of the file, without `.yaml`.
        title: what people call the set.
        tasks: protocols it is made for.
        modality: of all images; `caption`: from the words of each; `unknown`; or, for phantoms, as each says.
        layout: where things are.
        expected: the folder in words, shown to a user whose copy lacks something.
        classes: in order.
        prompts: class -> sentences that stand for it.
        references: sentences that find nothing, for grounding.
        metric: the one to quote; all are computed.
        count: images of the test split, as published.
        source, licence: where the data come from and on which terms.
        overlaps: what the set shares with data that such models are trained on.
        notes: what a reader of its numbers must know.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    tasks: list[Task] = Field(min_length=1)
    modality: str
    layout: Layout
    expected: str
    classes: list[str] = []
    prompts: dict[str, list[str]] = {}
    references: list[str] = []
    metric: Metric
    count: int | None = Field(default=None, ge=1)
    source: str
    licence: str
    overlaps: list[str]
    notes: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.modality not in (*MODALITIES, "caption", "unknown", "phantom"):
            try:
                self.modality = MODALITIES[modality_id(self.modality)]
            except (ValueError, IndexError):
                raise ValueError(
                    f"`modality` must be {', '.join(MODALITIES)} (or an alias), caption, unknown or phantom"
                ) from None
        if self.modality == "phantom" and self.layout.kind != "phantom":
            raise ValueError("`modality: phantom` goes with `layout: {kind: phantom}` alone")
        if self.layout.kind == "phantom":
            return self
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("`classes` names one twice")
        if {"zero-shot", "linear-probe"} & set(self.tasks) and len(self.classes) < 2:
            raise ValueError("`classes` must name two or more for zero-shot and linear-probe")
        if "zero-shot" in self.tasks and (list(self.prompts) != self.classes or not all(self.prompts.values())):
            raise ValueError("`prompts` must hold sentences for each of `classes`, in their order")
        sentences = Counter(sentence for texts in self.prompts.values() for sentence in texts)
        twice = [sentence for sentence, times in sentences.items() if times > 1]
        if twice:
            raise ValueError(f"`prompts` holds {twice[0]!r} twice")
        if isinstance(self.layout, TableLayout):
            self._consistent_table(self.layout)
        try:
            re.compile(getattr(self.layout, "subject_pattern", None) or "")
        except re.error as error:
            raise ValueError(f"`subject_pattern` is no regular expression: {error}") from error
        for key in ("values", "folders"):
            unknown = set(getattr(self.layout, key, {})) - set(self.classes)
            if unknown:
                raise ValueError(f"`{key}` of `layout` names {sorted(unknown)[0]!r}, which is none of `classes`")
        return self

    def _consistent_table(self, layout: TableLayout) -> None:
        if bool(self.classes) != (layout.one_hot or layout.label is not None):
            raise ArgumentError("`classes` go with `label` or `one_hot` of `layout`")
        if layout.one_hot and layout.label is not None:
            raise ArgumentError("`layout` has a `label` column or `one_hot` columns, not both")
        if layout.split_column is not None and list(layout.tables) != ["test"]:
            raise ArgumentError("with `split_column`, `tables` must hold one file under `test`")
        if layout.subject_pattern is not None and layout.subject is None:
            raise ArgumentError("`subject_pattern` takes a part of `subject`, which is missing")
        if "retrieval" in self.tasks and layout.caption is None:
            raise ArgumentError("retrieval needs `caption` in `layout`")


_SECTIONS = {
    "": list(Recipe.model_fields),
    "join": list(JoinedTable.model_fields),
    **{get_args(layout.model_fields["kind"].annotation)[0]: list(layout.model_fields) for layout in LAYOUTS},
}
_FOLDER = resources.files("medmoe_hf.evaluation") / "recipe_files"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(Path(entry.name).stem for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe of the package by its name, or a user's own by the path of its YAML file.

    Raises:
        RecipeError: for an unknown name, a missing file, broken YAML, unknown keys or wrong values.
    """
    name = str(name_or_path)
    if not name.endswith((".yaml", ".yml")):
        if name not in recipe_names():
            near = get_close_matches(name, recipe_names(), n=1)
            guess = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(recipe_names())
            raise RecipeError(f'There is no recipe "{name}".{guess} Known: {known}; or give the path of a .yaml file.')
        with resources.as_file(_FOLDER / f"{name}.yaml") as path:
            return _parsed(path)
    return _parsed(Path(name))


def _parsed(path: Path) -> Recipe:
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold the keys of a recipe, each with its value.")
    try:
        return Recipe(**content)
    except ValidationError as error:
        raise RecipeError(f"{path} cannot be used:\n{in_words(error, _SECTIONS)}") from error


WARNING = "warning: "
"""How `check_recipe` begins what does not keep `open_recipe` from opening a copy."""


def check_recipe(recipe: Recipe, data_dir: str | Path) -> list[str]:
    """What is wrong with a user's copy of a data set.

    Every image is looked for; those that boxes are drawn on are opened as far as their size.

    Args:
        recipe: what to expect.
        data_dir: the folder that the recipe's paths start from.

    Returns:
        problems in words, each with the way to mend it; empty for a copy that is as it should be. What begins with
        `WARNING` is to be known but stops nothing.
    """
    return _found(recipe, _read(recipe, Path(data_dir)))


def _found(recipe: Recipe, copy: "_Copy") -> list[str]:
    problems = list(copy.problems)
    if problems:
        expected = "\n".join(f"    {line}" for line in recipe.expected.strip().splitlines())
        problems.append(f"The folder should hold:\n{expected}\n  The data come from {recipe.source}")
    return problems + [WARNING + text for text in copy.warnings]


def open_recipe(recipe: Recipe, data_dir: str | Path) -> list[EvaluationSet]:
    """Reads a user's copy of a data set; images themselves stay on disk.

    Returns:
        one set; for phantoms one a modality, since the findings of one are the classes there. `joined` makes them one.

    Raises:
        RecipeError: with everything that `check_recipe` finds, if any of it is more than a warning.
    """
    copy = _read(recipe, Path(data_dir))
    if copy.problems:
        problems = "\n".join(f"  {problem}" for problem in _found(recipe, copy))
        raise RecipeError(f"{data_dir} is no copy of {recipe.title} that can be used:\n{problems}")
    if isinstance(recipe.layout, PhantomLayout):
        modalities = sorted({row.modality for row in copy.rows})
        return [_phantom_set(recipe, copy, modality) for modality in modalities]
    return [_set_of(recipe, recipe.name, copy.rows, recipe.classes, recipe.prompts)]


def prompts_from_constants(path: str | Path, name: str) -> dict[str, list[str]]:
    """The prompts that a Python file assigns to a name, such as one of UniMed-CLIP's `constants.py`.

    Its prompts are for non-commercial use and no part of this package; a user's own copy is read as text, never run.

    Args:
        path: the file.
        name: the variable: a dictionary of class -> sentences (or one sentence).

    Raises:
        RecipeError: if the file cannot be read or parsed, or the variable is missing or holds anything else.
    """
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"Cannot read {path}: {error.strerror}.") from error
    except (SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} is no Python file: {error}") from error
    assigned: dict[str, ast.expr] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            assigned |= {target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)}
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            assigned[statement.target.id] = statement.value
    if name not in assigned:
        raise RecipeError(f"{path} assigns nothing to `{name}`, but to {', '.join(assigned) or 'no name at all'}.")
    try:
        found = ast.literal_eval(assigned[name])
    except ValueError as error:
        raise RecipeError(f"`{name}` of {path} is computed, not written out; it is not run, so not read.") from error
    wanted = f"`{name}` of {path} must be a dictionary of class -> sentences"
    if not isinstance(found, dict):
        raise RecipeError(f"{wanted}, got a {type(found).__name__}.")
    prompts: dict[str, list[str]] = {}
    for key, value in found.items():
        sentences = [value] if isinstance(value, str) else value
        if not isinstance(sentences, (list, tuple)) or not sentences:
            raise RecipeError(f"{wanted}; for {key!r} it holds a {type(value).__name__}.")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise RecipeError(f"{wanted}; for {key!r} it holds something other than sentences.")
        prompts[str(key)] = list(sentences)
    return prompts


@dataclass
class _Row:
    """One image of a copy and what its table says of it."""

    image: Any
    split: Split = "test"
    label: str | None = None
    caption: str | None = None
    subject: str | None = None
    modality: int = UNKNOWN_MODALITY
    phrase: str | None = None
    boxes: list[Box] | None = None


@dataclass
class _Copy:
    """What was read of a user's copy, what keeps it from being used, and what is only to be known."""

    rows: list[_Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def add(self, split: Split, rows: list[_Row], problems: list[str]) -> None:
        """Takes a split, or says why not: nothing can be measured without `test`, much without the others."""
        if not problems:
            self.rows += rows
        elif split == "test":
            self.problems += problems
        else:
            self.warnings.append(f"the {split} split is left out. {' '.join(problems)}")


def _read(recipe: Recipe, folder: Path) -> _Copy:
    copy = _Copy()
    if not folder.is_dir():
        copy.problems.append(f"There is no folder {folder}; name the one that holds {recipe.title}.")
        return copy
    if isinstance(recipe.layout, TableLayout):
        _read_tables(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, FolderLayout):
        _read_folders(recipe, recipe.layout, folder, copy)
    elif isinstance(recipe.layout, BoxesLayout):
        _read_boxes(recipe, recipe.layout, folder, copy)
    else:
        _read_phantoms(recipe.layout, folder, copy)
    if copy.problems:
        return copy
    tested = sum(row.split == "test" for row in copy.rows)
    if not tested:
        copy.problems.append(f"{folder} holds no image to test on.")
    elif recipe.count is not None and tested != recipe.count:
        copy.warnings.append(
            f"the test split has N = {tested}, the published one {recipe.count}; numbers of another N "
            "cannot be compared with the paper's."
        )
    seen = {split: {row.subject for row in copy.rows if row.split == split} - {None} for split in get_args(Split)}
    shared = seen["train"] & seen["test"]
    if shared:
        copy.warnings.append(f"{len(shared)} subjects have images in both train and test; a probe can know them.")
    return copy


def _read_tables(recipe: Recipe, layout: TableLayout, folder: Path, copy: _Copy) -> None:
    reports: dict[str, dict[str, Any]] = {}
    header: dict[str, Any] = {}
    shared = {layout.join.on} if layout.join is not None else set()
    if layout.join is not None:
        added, problems = _table(folder / layout.join.table, shared)
        if problems:
            copy.problems += problems
            return
        reports, header = {row[layout.join.on]: row for row in added}, added[0]
    for split, name in layout.tables.items():
        path = folder / name
        rows, problems = _table(path, shared)
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
            said = Counter(row[layout.split_column] for row in rows)
            unknown = sorted(str(value) for value in set(said) - set(get_args(Split)))
            if unknown:
                copy.problems.append(
                    f'{path}: `{layout.split_column}` says "{unknown[0]}"; it must say train, val or test. Rename it.'
                )
                return
            parts = {part: [row for row in rows if row[layout.split_column] == part] for part in get_args(Split)}
        for part, chosen in parts.items():
            copy.add(part, *_table_rows(recipe, layout, folder, path, part, chosen, copy.warnings))


def _table(path: Path, needed: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a CSV, or what is wrong with it."""
    try:
        rows = read_table(str(path))
    except ShardError as error:
        return [], [f"{error} Put it there."]
    if not rows:
        return [], [f"{path} has no rows. Get it again."]
    return rows, _missing_columns(path, rows[0], needed)


def _missing_columns(path: Path, row: Mapping[str, Any], needed: Iterable[str]) -> list[str]:
    # A row with more cells than the header has them under None.
    there = [name for name in row if name is not None]
    problems = []
    for column in sorted(set(needed) - set(there)):
        near = get_close_matches(column, there, n=1)
        guess = f" (perhaps {near[0]} is it)" if near else ""
        problems.append(
            f'{path} has no column "{column}", but {", ".join(there)}{guess}. Rename the column, or copy the recipe '
            "to a YAML file of your own and name yours there."
        )
    return problems


def _number(cell: Any) -> float:
    """A cell as a number; spreadsheets of many countries write 9,5 for 9.5."""
    return float(cell.replace(",", ".") if isinstance(cell, str) else cell)


def _fields(template: str | None) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template or "") if name}


def _columns(recipe: Recipe, layout: TableLayout) -> set[str]:
    columns = _fields(layout.image) | _fields(layout.caption) | set(layout.where)
    columns |= set(recipe.classes) if layout.one_hot else set()
    return columns | {column for column in (layout.label, layout.split_column) if column is not None}


def _table_rows(
    recipe: Recipe,
    layout: TableLayout,
    folder: Path,
    path: Path,
    split: Split,
    entries: Sequence[Mapping[str, Any]],
    warnings: list[str],
) -> tuple[list[_Row], list[str]]:
    """The images of one split, and what is wrong with them."""
    images = folder / layout.images
    class_of = {value: name for name in recipe.classes for value in layout.values.get(name, [name])}
    rows: list[_Row] = []
    unlabelled: Counter[str] = Counter()
    silent = 0
    for entry in entries:
        row = _Row(str(images / _filled(layout.image, entry)), split, caption=_filled(layout.caption, entry))
        if layout.caption is not None and not row.caption:
            silent += 1
            continue
        if layout.one_hot:
            ones = [name for name in recipe.classes if _is_one(entry[name])]
            row.label = ones[0] if len(ones) == 1 else None
            if row.label is None:
                unlabelled["1 in " + (" and ".join(ones) or "none of the classes' columns")] += 1
        elif layout.label is not None:
            value = str(entry[layout.label]).strip()
            row.label = class_of.get(value)
            if row.label is None:
                unlabelled[f'"{value}"'] += 1
        row.modality = _modality_id(recipe.modality, row.caption)
        row.subject = _filled(layout.subject, entry) or None
        rows.append(row)
    if silent:
        warnings.append(f"{path}: {silent} rows have no text and are left out.")
    problems = []
    if unlabelled:
        where = f"`{layout.label}`" if layout.label is not None else "the columns of the classes"
        expected = "a single 1" if layout.one_hot else ", ".join(class_of)
        problems.append(
            f"{path}: {unlabelled.total()} rows cannot be labelled: {where} should hold {expected}, but hold "
            f"{_first(unlabelled)}. Correct these rows, or name the values under `values` of a recipe of your own."
        )
    problems += _missing_images(rows, images)
    if layout.subject is not None:
        _find_subjects(rows, layout.subject_pattern, warnings)
    return rows, problems


def _filled(template: str | None, entry: Mapping[str, Any]) -> str:
    """A template with the columns of a row in it; columns that are empty or not there leave nothing."""
    columns = {name: str(entry.get(name) or "").strip() for name in _fields(template)}
    return (template or "").format_map(columns).strip()


def _is_one(value: Any) -> bool:
    return str(value).strip() in ("1", "1.0", "True")


def _first(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _missing_images(rows: Sequence[_Row], folder: Path) -> list[str]:
    looked_for = progress(rows, f"looking for images in {folder.name}", unit="image")
    missing = [row.image for row in looked_for if not Path(row.image).is_file()]
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(rows)} images are not there: {_first(missing)}. Put them into {folder}, "
        "or copy the recipe to a YAML file of your own and say under `images` where they are."
    ]


def _find_subjects(rows: Sequence[_Row], pattern: str | None, warnings: list[str]) -> None:
    """Takes of each subject the part that fits the pattern; an image that tells none is a subject of its own."""
    untold = 0
    for row in rows:
        found = re.search(pattern or ".+", row.subject or "")
        untold += found is None
        row.subject = row.image if found is None else found.group()
    if untold:
        warnings.append(
            f"{untold} images do not tell whose they are; each counts as a subject of its own, and intervals may be "
            "too narrow. Give the columns of `subject`, or a `subject_pattern` that fits, in a recipe of your own."
        )


def _modality_id(modality: str, caption: str | None) -> int:
    named = modality_from_text(caption or "") if modality == "caption" else modality
    return MODALITIES.index(named) if named in MODALITIES else UNKNOWN_MODALITY


def _read_folders(recipe: Recipe, layout: FolderLayout, folder: Path, copy: _Copy) -> None:
    for split, root in layout.splits.items():
        rows: list[_Row] = []
        problems: list[str] = []
        for name in recipe.classes:
            for place in (folder / root / inner for inner in layout.folders.get(name, [name])):
                if not place.is_dir():
                    there = sorted(path.name for path in place.parent.glob("*") if path.is_dir())
                    problems.append(
                        f'There is no folder {place} for images of "{name}" (beside it: {_first(there) or "none"}). '
                        "Rename yours, or name it under `folders` of a recipe of your own."
                    )
                    continue
                rows += [
                    _Row(str(path), split, name, modality=_modality_id(recipe.modality, None))
                    for path in sorted(place.iterdir())
                    if path.is_file()
                    and not path.name.startswith(".")
                    and not any(part in path.name for part in layout.without)
                ]
        copy.add(split, rows, problems)


_BOX_COLUMNS = ("path", "category_name", "label_text", "x", "y", "w", "h", "image_width", "image_height")


def _read_boxes(recipe: Recipe, layout: BoxesLayout, folder: Path, copy: _Copy) -> None:
    path = next((folder / name for name in layout.annotations if (folder / name).is_file()), None)
    if path is None:
        names = " or ".join(layout.annotations)
        copy.problems.append(f"{folder} holds none of {names}. Put one of them there.")
        return
    entries, problems = _coco_entries(path) if path.suffix == ".json" else _table(path, _BOX_COLUMNS)
    if problems:
        copy.problems += problems
        return
    # A phrase may have several boxes, one an entry.
    rows: dict[tuple[str, str, str], _Row] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for number, entry in enumerate(entries):
        try:
            left, top, width, height = (_number(entry[name]) for name in ("x", "y", "w", "h"))
            size = int(_number(entry["image_width"])), int(_number(entry["image_height"]))
        except (TypeError, ValueError):
            copy.problems.append(f"{path}: box {number} is made of something other than numbers. Get the file again.")
            return
        image, category, phrase = (str(entry[name]).strip() for name in ("path", "category_name", "label_text"))
        row = rows.setdefault(
            (image, category, phrase),
            _Row(
                str(folder / layout.images / image),
                label=category if category in recipe.classes else None,
                subject=image,
                modality=_modality_id(recipe.modality, None),
                phrase=phrase,
                boxes=[],
            ),
        )
        assert row.boxes is not None
        row.boxes.append((left, top, left + width, top + height))
        sizes[row.image] = size
    found = list(rows.values())
    strange = Counter(category for image, category, phrase in rows if category not in recipe.classes)
    if strange:
        problems.append(
            f"{path}: {strange.total()} phrases are of {_first(strange)}, not of {', '.join(recipe.classes)}. "
            "Name these under `classes` of a recipe of your own."
        )
    problems += _missing_images([_Row(image) for image in sizes], folder / layout.images)
    if not problems:
        problems += _resized(sizes)
    _find_subjects(found, layout.subject_pattern, copy.warnings)
    copy.add("test", found, problems)


def _coco_entries(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """COCO's annotations with the columns of a CSV, or what is wrong with the file."""
    broken = f"{path} is no COCO file as MS-CXR's: "
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [], [f"{broken}{error}. Get it again."]
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
    """Boxes count pixels of the originals: on images of another size they lie elsewhere."""
    other = []
    for path, size in progress(sizes.items(), "sizes of images", unit="image", total=len(sizes)):
        try:
            with Image.open(path) as image:
                if image.size != size:
                    other.append(f"{path} ({image.width} x {image.height} in place of {size[0]} x {size[1]})")
        except OSError:
            other.append(f"{path} (no image that can be read)")
    if not other:
        return []
    return [
        f"{len(other)} of {len(sizes)} images are not the ones that were annotated: {_first(other, 1)}. Boxes count "
        "pixels of the originals, so use these."
    ]


def _read_phantoms(layout: PhantomLayout, folder: Path, copy: _Copy) -> None:
    prompts = folder / layout.prompts
    try:
        copy.prompts = json.loads(prompts.read_text(encoding="utf-8"))
    except OSError:
        copy.problems.append(f"{prompts} is missing. Run examples/quickstart.py; it writes it.")
    except ValueError as error:
        copy.problems.append(f"{prompts} is no JSON: {error}. Run examples/quickstart.py again.")
    shards = sorted(folder.glob(layout.shards))
    if not shards:
        copy.problems.append(f"No file fits {folder / layout.shards}. Run examples/quickstart.py; it writes shards.")
    for path in shards:
        try:
            copy.rows += _phantom_rows(path, copy.prompts)
        except (ShardError, RecipeError) as error:
            copy.problems.append(f"{error} Run examples/quickstart.py again.")


def _phantom_rows(path: Path, prompts: Mapping[str, Mapping[str, list[str]]]) -> Iterator[_Row]:
    shard = TarShard(str(path))
    for number in range(len(shard)):
        sample = shard.read(shard.locate(number))
        try:
            facts = json.loads(sample["json"])
            modality, finding, box = int(sample["cls"]), facts["finding"], facts["box"]
            row = _Row(
                Image.open(BytesIO(sample["png"])),
                label=finding,
                caption=sample["txt"].decode(),
                subject=facts["id"],
                modality=modality,
                phrase=facts["finding_word"],
                boxes=[(box[0], box[1], box[2], box[3])] if box else [],
            )
        except (KeyError, ValueError, IndexError, OSError) as error:
            lacks = "as the quickstart's shards have: png, txt, cls, json (id, finding, finding_word, box)"
            raise RecipeError(f"{path}: sample {sample['__key__']} is not {lacks}; {error!r}.") from error
        name = MODALITIES[modality] if modality in range(len(MODALITIES)) else None
        if prompts and finding not in prompts.get(name or "", {}):
            raise RecipeError(f"{path}: sample {sample['__key__']} is {name} {finding}, which has no prompts.")
        yield row
    if shard.cut_off:
        raise RecipeError(f"{path} ends too early.")


def _phantom_set(recipe: Recipe, copy: _Copy, modality: int) -> EvaluationSet:
    name = MODALITIES[modality]
    rows = [row for row in copy.rows if row.modality == modality]
    prompts = copy.prompts[name]
    result = _set_of(recipe, f"{recipe.name}/{name}", rows, list(prompts), prompts)
    result.references = [prompts["normal"]] * len(rows) if "normal" in prompts else None
    return result


def _set_of(
    recipe: Recipe, name: str, rows: Sequence[_Row], classes: list[str], prompts: dict[str, list[str]]
) -> EvaluationSet:
    def column(values: list[Any]) -> list[Any] | None:
        return None if any(value is None for value in values) else values

    labels = column([row.label for row in rows])
    return EvaluationSet(
        name=name,
        images=[row.image for row in rows],
        captions=column([row.caption or None for row in rows]),
        labels=None if labels is None else np.array([classes.index(label) for label in labels], dtype=np.int64),
        classes=classes,
        prompts=prompts,
        modalities=np.array([row.modality for row in rows], dtype=np.int64),
        splits=np.array([row.split for row in rows]),
        subjects=column([row.subject for row in rows]),
        boxes=column([row.boxes for row in rows]),
        phrases=column([row.phrase for row in rows]),
        references=[recipe.references] * len(rows) if recipe.references else None,
        facts=recipe.model_dump(include=_FACTS),
    )


_FACTS = {"title", "tasks", "metric", "count", "source", "licence", "overlaps", "notes"}
