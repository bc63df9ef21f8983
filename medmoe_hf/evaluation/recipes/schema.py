"""What a recipe's YAML file may contain, and how it is loaded."""

import re
from collections import Counter
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medmoe_hf.common.yaml_files import explain, read_yaml
from medmoe_hf.errors import RecipeError
from medmoe_hf.evaluation.dataset import Split
from medmoe_hf.evaluation.metrics import CHEXPERT_FINDINGS, CHEXPERT_METRIC, chexpert_findings
from medmoe_hf.evaluation.recipes.medmnist_sets import is_medmnist, medmnist_content
from medmoe_hf.model.modalities_medmoe import MODALITIES, modality_id

Task = Literal["zero-shot", "linear-probe", "retrieval", "grounding", "routing", "robustness"]
Metric = Literal[
    "accuracy",
    "balanced_accuracy",
    "macro_auroc",
    "macro_average_precision",
    "chexpert5_auroc",
    "image_to_text_r1",
    "text_to_image_r1",
    "contrast_to_noise",
    "pointing",
]
Labels = Literal["single", "multi"]
Reading = Literal["positive", "negative", "unknown"]


class _Layout(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, content: Any) -> Any:
        """Accepts `val`, the former name of the validation split."""
        if isinstance(content, dict):
            content = dict(content)
            for key in ("tables", "splits"):
                if isinstance(content.get(key), dict) and "validation" not in content[key]:
                    names = content[key]
                    content[key] = {"validation" if name == "val" else name: value for name, value in names.items()}
        return content


class JoinedTable(_Layout):
    """A second CSV whose columns are added to the rows of the first.

    Attributes:
        table: Path of the CSV.
        on: Column that both tables have.
    """

    table: str
    on: str


class TableLayout(_Layout):
    """CSV files whose rows are images. All paths are relative to the data folder.

    Templates are text with column names in braces: `"{ID}.jpg"`.

    Attributes:
        tables: Split -> CSV. With `split_column`, one CSV under `test`.
        split_column: Column that contains "train", "validation" (or "val") or "test".
        images: Folder that image paths are relative to.
        image: Template of an image's path.
        label: Column of the class; None with `one_hot` or without classes.
        one_hot: Whether each class has a column of its own. With `labels: single` exactly one of them is 1; with
            `labels: multi` each cell is 1 (present), 0 (absent), -1 (uncertain) or empty, as in CheXpert.
        uncertain: How a cell of -1 is read, with `labels: multi`.
        empty: How an empty cell is read, with `labels: multi`.
        values: Class -> values of the label column that mean it; by default, the class's own name.
        where: Column -> values of the rows that are used; other rows are left out.
        join: A second table.
        caption: Template of an image's text; rows without a text are left out.
        subject: Template of the image's subject.
        subject_pattern: Regular expression; the part of `subject` that matches it is used.
        groups: Columns, such as sex, age or site, whose groups `robustness` compares.

    Example:
        >>> layout = TableLayout(kind="table", tables={"test": "test.csv"}, image="{file}", label="finding")
        >>> layout.images
        '.'
    """

    kind: Literal["table"]
    tables: dict[Split, str] = Field(min_length=1)
    split_column: str | None = None
    images: str = "."
    image: str
    label: str | None = None
    one_hot: bool = False
    uncertain: Reading = "unknown"
    empty: Reading = "unknown"
    values: dict[str, list[str]] = {}
    where: dict[str, list[str]] = {}
    join: JoinedTable | None = None
    caption: str | None = None
    subject: str | None = None
    subject_pattern: str | None = None
    groups: list[str] = []


class FolderLayout(_Layout):
    """Images in one folder per class.

    Attributes:
        splits: Split -> folder that contains the classes' folders; `.` is the data folder itself.
        folders: Class -> folders of its images; by default, the class's own name.
        without: Files whose name contains one of these are not images of the set (masks, for example).

    Example:
        >>> FolderLayout(kind="folder", folders={"benign": ["benign", "normal"]}).splits
        {'test': '.'}
    """

    kind: Literal["folder"]
    splits: dict[Split, str] = {"test": "."}
    folders: dict[str, list[str]] = {}
    without: list[str] = []


class BoxesLayout(_Layout):
    """Phrases with boxes on images: COCO JSON, or a CSV with one box per row, both with the field names of MS-CXR.

    Attributes:
        annotations: Candidate files; the first that exists is read.
        images: Folder that image paths are relative to.
        subject_pattern: Regular expression; the part of an image's path that matches it is its subject.

    Example:
        >>> BoxesLayout(kind="boxes", annotations=["boxes.json", "boxes.csv"]).images
        '.'
    """

    kind: Literal["boxes"]
    annotations: list[str] = Field(min_length=1)
    images: str = "."
    subject_pattern: str | None = None


class PhantomLayout(_Layout):
    """The folder that `examples/train_from_scratch.py` writes: shards of phantoms and the prompts of their findings.

    Attributes:
        shards: Glob pattern of the shards.
        prompts: JSON file, modality -> finding -> sentences.

    Example:
        >>> PhantomLayout(kind="phantom").shards
        'unseen/*.tar'
    """

    kind: Literal["phantom"]
    shards: str = "unseen/*.tar"
    prompts: str = "prompts.json"


class MedMNISTLayout(_Layout):
    """The npz files of MedMNIST+, or those of MedMNIST-C.

    Attributes:
        flag: Name of the set, such as `pathmnist`.
        size: Side of the images in pixels: 28, 64, 128 or 224.
        corrupted: Whether the files are those of MedMNIST-C, `FLAG/CORRUPTION.npz` with test images only; each
            corruption is a set of its own, with the five severities of each image.

    Example:
        >>> MedMNISTLayout(kind="medmnist", flag="pathmnist").size
        28
    """

    kind: Literal["medmnist"]
    flag: str
    size: Literal[28, 64, 128, 224] = 28
    corrupted: bool = False


class ClipBenchmarkLayout(_Layout):
    """The webdataset layout of CLIP_benchmark, whose files contain the classes and their sentences.

    Attributes:
        splits: Split -> folder of its tars; folders other than that of `test` may be missing.

    Example:
        >>> ClipBenchmarkLayout(kind="clip_benchmark").splits["validation"]
        'val'
    """

    kind: Literal["clip_benchmark"]
    splits: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}


LAYOUTS = (TableLayout, FolderLayout, BoxesLayout, PhantomLayout, MedMNISTLayout, ClipBenchmarkLayout)
Layout = Annotated[
    TableLayout | FolderLayout | BoxesLayout | PhantomLayout | MedMNISTLayout | ClipBenchmarkLayout,
    Field(discriminator="kind"),
]
_OWN_CLASSES = ("phantom", "clip_benchmark")
"""Layouts whose files contain the classes and prompts."""


class Recipe(BaseModel):
    """How a data set is laid out on disk and how it is scored.

    Attributes:
        name: Name of the file, without `.yaml`.
        title: Full name of the data set.
        tasks: Protocols that the set is made for.
        modality: Modality of all images; `caption` to infer it from each caption; `unknown`; or, for phantoms,
            `phantom`: each sample has its own.
        layout: How the files are arranged.
        expected: Description of the folder, shown to a user whose copy lacks something.
        labels: `single` if each image has one class, `multi` if any number of the classes may be present.
        classes: Class names, or findings, in order.
        prompts: Class -> sentences that describe it.
        negative_prompts: Finding -> sentences that describe its absence, with `labels: multi`. With them, zero-shot
            scores a finding by how much more an image is like its prompts than like these; without them, by similarity
            alone.
        paraphrases: Class -> other sentences, as many for each class: sentence k of each class is one paraphrase of
            the task (robustness). By default single sentences of `prompts`.
        negation: Class -> words of its finding, which fit after "there is no" (robustness). By default the names of
            the classes that do not name an absence, such as `normal`.
        references: Sentences that report no finding, for grounding.
        metric: Metric to quote; all are computed.
        count: Number of images in the published test split.
        source: Where the data come from.
        license: Terms of use of the data.
        overlaps: What the set shares with common training data of such models.
        public_sets: Names of the public sets that the images are from, such as `CheXpert (validation part)`. Results
            warn of those in the training data of published models (`training_sets.yaml`).
        notes: What a reader of the numbers must know.

    Example:
        >>> load_recipe("chexpert_5x200").classes[:2]
        ['Atelectasis', 'Cardiomegaly']
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    tasks: list[Task] = Field(min_length=1)
    modality: str
    layout: Layout
    expected: str
    labels: Labels = "single"
    classes: list[str] = []
    prompts: dict[str, list[str]] = {}
    negative_prompts: dict[str, list[str]] = {}
    paraphrases: dict[str, list[str]] = {}
    negation: dict[str, str] = {}
    references: list[str] = []
    metric: Metric
    count: int | None = Field(default=None, ge=1)
    source: str
    license: str
    overlaps: list[str]
    public_sets: list[str] = []
    notes: str = ""

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, content: Any) -> Any:
        """Accepts `licence`, the former name of `license`."""
        if isinstance(content, dict) and "licence" in content and "license" not in content:
            content = {"license" if key == "licence" else key: value for key, value in content.items()}
        return content

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
            raise ValueError("`modality: phantom` goes with `layout: {kind: phantom}` only")
        self._consistent_labels()
        if self.layout.kind in _OWN_CLASSES:
            return self
        if isinstance(self.layout, TableLayout):
            self._consistent_table(self.layout)
        try:
            re.compile(getattr(self.layout, "subject_pattern", None) or "")
        except re.error as error:
            raise ValueError(f"`subject_pattern` is not a regular expression: {error}") from error
        for key in ("values", "folders"):
            unknown = set(getattr(self.layout, key, {})) - set(self.classes)
            if unknown:
                raise ValueError(f"`{key}` of `layout` names {sorted(unknown)[0]!r}, which is not in `classes`")
        return self

    def _consistent_labels(self) -> None:
        multi = self.labels == "multi"
        one_hot = isinstance(self.layout, TableLayout) and self.layout.one_hot
        if multi and not one_hot and not isinstance(self.layout, MedMNISTLayout):
            raise ValueError("`labels: multi` needs `layout` of kind table with `one_hot: true`")
        by_prompts = {"zero-shot", "robustness"} & set(self.tasks)
        for key in ("paraphrases", "negation"):
            if getattr(self, key) and not by_prompts:
                raise ValueError(f"`{key}` goes with `tasks` of zero-shot or robustness")
        if self.negative_prompts and not multi:
            raise ValueError("`negative_prompts` go with `labels: multi` only")
        if self.metric == CHEXPERT_METRIC and not (multi and chexpert_findings(self.classes)):
            raise ValueError(
                f"`metric: {CHEXPERT_METRIC}` needs `labels: multi` and {', '.join(CHEXPERT_FINDINGS)} in `classes`"
            )
        if self.metric in ("accuracy", "balanced_accuracy") and multi:
            raise ValueError("`metric` must be macro_auroc or macro_average_precision with `labels: multi`")
        if self.layout.kind == "clip_benchmark" and (self.classes or self.prompts):
            raise ValueError("`classes` and `prompts` of `layout: {kind: clip_benchmark}` are in its files")
        if self.layout.kind in _OWN_CLASSES:
            return
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("`classes` contains a name twice")
        if (by_prompts or "linear-probe" in self.tasks) and len(self.classes) < (1 if multi else 2):
            least = "one class" if multi else "two or more"
            raise ValueError(f"`classes` must name {least} for zero-shot and linear-probe")
        if by_prompts:
            for key in ("prompts", "negative_prompts"):
                by_class: dict[str, list[str]] = getattr(self, key)
                if key == "negative_prompts" and not by_class:
                    continue
                if list(by_class) != self.classes or not all(by_class.values()):
                    raise ValueError(f"`{key}` must hold sentences for each of `classes`, in their order")
            numbers = {len(self.paraphrases.get(name, ())) for name in self.classes}
            if self.paraphrases and (set(self.paraphrases) != set(self.classes) or len(numbers) > 1 or 0 in numbers):
                raise ValueError("`paraphrases` must hold as many sentences for each of `classes`")
            if unknown := [name for name in self.negation if name not in self.classes]:
                raise ValueError(f"`negation` names {unknown[0]!r}, which is not in `classes`")
        sentences = Counter(sentence for texts in self.prompts.values() for sentence in texts)
        # The same sentence may deny several findings, but none that also describes one.
        sentences.update({sentence for texts in self.negative_prompts.values() for sentence in texts})
        twice = [sentence for sentence, times in sentences.items() if times > 1]
        if twice:
            raise ValueError(f"`prompts` holds {twice[0]!r} twice")

    def _consistent_table(self, layout: TableLayout) -> None:
        if bool(self.classes) != (layout.one_hot or layout.label is not None):
            raise ValueError("`classes` go with `label` or `one_hot` of `layout`")
        if layout.one_hot and layout.label is not None:
            raise ValueError("`layout` has a `label` column or `one_hot` columns, not both")
        if self.labels == "single" and (layout.uncertain, layout.empty) != ("unknown", "unknown"):
            raise ValueError("`uncertain` and `empty` of `layout` go with `labels: multi` only")
        if layout.split_column is not None and list(layout.tables) != ["test"]:
            raise ValueError("with `split_column`, `tables` must hold one file under `test`")
        if layout.subject_pattern is not None and layout.subject is None:
            raise ValueError("`subject_pattern` takes a part of `subject`, which is missing")
        if "retrieval" in self.tasks and layout.caption is None:
            raise ValueError("retrieval needs `caption` in `layout`")


_SECTIONS = {
    "": list(Recipe.model_fields),
    "join": list(JoinedTable.model_fields),
    **{get_args(layout.model_fields["kind"].annotation)[0]: list(layout.model_fields) for layout in LAYOUTS},
}
_FOLDER = resources.files("medmoe_hf.evaluation") / "recipe_files"


def recipe_names() -> list[str]:
    """Lists the recipes that come with the package.

    Returns:
        Names, sorted.

    Example:
        >>> "rsna_pneumonia" in recipe_names()
        True
    """
    return sorted(Path(entry.name).stem for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Loads a recipe of the package by its name, or your own by the path of its YAML file.

    Args:
        name_or_path: A name of `recipe_names()`; `medmnist:FLAG[_SIZE]` or `medmnist-c:FLAG` for a 2D set of MedMNIST;
            or a path that ends with `.yaml` or `.yml`.

    Returns:
        The recipe.

    Raises:
        RecipeError: For an unknown name, a missing file, broken YAML, unknown keys or wrong values.
        MissingPackageError: For a set of MedMNIST without its package.

    Example:
        >>> load_recipe("rsna_pneumonia").tasks
        ['zero-shot', 'linear-probe']
    """
    name = str(name_or_path)
    if is_medmnist(name):
        return Recipe(**medmnist_content(name))
    if not name.endswith((".yaml", ".yml")):
        if name not in recipe_names():
            near = get_close_matches(name, recipe_names(), n=1)
            guess = f" Did you mean {near[0]}?" if near else ""
            known = ", ".join(recipe_names())
            raise RecipeError(f'There is no recipe "{name}".{guess} Known: {known}; or give the path of a .yaml file.')
        with resources.as_file(_FOLDER / f"{name}.yaml") as path:
            return _parse(path)
    return _parse(Path(name))


def _parse(path: Path) -> Recipe:
    content = read_yaml(path, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must contain the keys of a recipe, each with its value.")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path} cannot be used:\n{explain(error, _SECTIONS)}") from error
