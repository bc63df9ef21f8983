"""Sources of training data: what a YAML says about one, and the shards that it becomes."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from glob import glob, has_magic
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from medmoe_hf.data.captions import CAPTION_RULES
from medmoe_hf.data.shards import (
    DatasetShard,
    ParquetShard,
    PhantomShard,
    Shard,
    TableShard,
    TarShard,
    files_facts,
    read_table,
)
from medmoe_hf.model.medical_images_medmoe import WINDOWS
from medmoe_hf.model.modalities_medmoe import MODALITIES

IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm", "file_name", "path")
CAPTION_FIELDS = ("caption", "txt", "text", "report")


class _Fields(BaseModel):
    """What every source says.

    Attributes:
        name: what reports call it; by default its place.
        weight: how often it is drawn from, against the others.
        image, caption: fields that hold them; None looks for the usual names.
        caption_rule: how a field becomes one caption: `plain`, a tag's rule (see `medmoe_hf.data.captions`), or `auto`
            (the rule whose tag the text contains).
        caption_template: a caption made of fields, `"a chest radiograph with {label}"`, in place of the field.
        modality: a name or alias; `field:NAME` (a name, alias or id); `caption` (from its words); `dicom` (from the
            header); or `unknown`. A list of these is tried in order, until one gives a modality. None: the caption
            rule's, if it has one, else a field `cls` or `modality`, else unknown.
        subject: field that says whose image it is, for the split.
        window: how DICOM and NIfTI are shown: a CT window's name, (centre, width), or three of these for three
            channels; None: as the file says (see `read_medical_image`).
    """

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    weight: float = Field(default=1.0, gt=0)
    image: str | None = None
    caption: str | None = None
    caption_rule: str = "plain"
    caption_template: str | None = None
    modality: str | Annotated[list[str], Field(min_length=1)] | None = None
    subject: str | None = None
    window: str | tuple[float, float] | tuple[str, str, str] | None = None

    @model_validator(mode="after")
    def _known_rule(self) -> "_Fields":
        if self.caption_rule not in (*CAPTION_RULES, "auto"):
            raise ValueError(f"`caption_rule` must be one of {', '.join(CAPTION_RULES)} or auto")
        for name in (self.window,) if isinstance(self.window, str) else self.window or ():
            if isinstance(name, str) and name not in WINDOWS:
                raise ValueError(f"there is no `window` {name}, but {', '.join(WINDOWS)}")
        return self

    def content_facts(self) -> list[Any]:
        """What tells the content of this source from another one, plain for JSON: an entry `[name, size, checksum]`
        for each file, in the order of its shards.

        A name is a file's without its folder, so that data may be moved. Tars and parquet files are told apart by
        their size, beginning and end, tables by all their bytes, and folders of images by names and sizes. A missing
        file has None for both.
        """
        return []


class PhantomSource(_Fields):
    """Synthetic image-report pairs, drawn while training (see `medmoe_hf.data.phantom`).

    Attributes:
        seed: which endless sequence of samples.
        image_size: side in pixels.
        modalities: which of the six to draw; their ids stay the same.
        length: samples before the stream ends; None for an endless one.
    """

    kind: Literal["phantom"]
    seed: int = 0
    image_size: int = Field(default=224, ge=48)
    modalities: list[str] = list(MODALITIES)
    length: int | None = Field(default=None, ge=1)

    def shards(self) -> list[Shard]:
        return [PhantomShard(self.seed, self.image_size, self.modalities, self.length)]


class _FileSource(_Fields):
    files: list[str] = Field(min_length=1)

    def paths(self) -> list[str]:
        """The files, patterns expanded.

        Raises:
            FileNotFoundError: for a pattern that no file fits.
        """
        return [path for pattern in self.files for path in expand(pattern)]

    def content_facts(self) -> list[Any]:
        return files_facts(self.paths())


class WebDatasetSource(_FileSource):
    """Uncompressed tar shards of samples: an image, `txt` (the caption) and, if there is one, `cls` (the modality id).

    Attributes:
        files: paths, or patterns with `*`, `?`, `{000..012}`, `{a,b}` and `::` between several.
    """

    kind: Literal["webdataset"]

    def shards(self) -> list[Shard]:
        return [TarShard(path) for path in self.paths()]


class ParquetSource(_FileSource):
    """Parquet files whose image column holds bytes, `{"bytes", "path"}`, or a path."""

    kind: Literal["parquet"]

    def shards(self) -> list[Shard]:
        return [ParquetShard(path) for path in self.paths()]


class TableSource(_FileSource):
    """CSV or JSONL files with a column of image paths, relative to the file's folder or to `root`.

    Attributes:
        root: folder that image paths start from.
    """

    kind: Literal["csv", "jsonl"]
    root: str | None = None

    def shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for path in self.paths():
            rows = read_table(path)
            key = field_of(rows[0], self.image, IMAGE_FIELDS) if rows else None
            folder = Path(self.root or Path(path).parent)
            if key is not None:
                rows = [{**row, key: str(folder / row[key])} if row.get(key) else row for row in rows]
            shards.append(TableShard(path, rows))
        return shards

    def content_facts(self) -> list[Any]:
        return files_facts(self.paths(), whole=True)


class FolderSource(_Fields):
    """A folder of images, each in the folder of its label (`label` in templates).

    Attributes:
        path: the folder.
    """

    kind: Literal["imagefolder"]
    path: str

    def shards(self) -> list[Shard]:
        root = Path(self.path)
        rows = [
            {"image": str(path), "label": path.parent.name if path.parent != root else ""} for path in self._images()
        ]
        return [TableShard(str(root), rows)]

    def content_facts(self) -> list[Any]:
        root = Path(self.path)
        digest, size = hashlib.blake2b(digest_size=8), 0
        for path in self._images():
            bytes_of_one = path.stat().st_size
            digest.update(f"{path.relative_to(root).as_posix()}\0{bytes_of_one}\0".encode(errors="surrogateescape"))
            size += bytes_of_one
        return [[root.resolve().name, size, digest.hexdigest()]]

    def _images(self) -> list[Path]:
        root = Path(self.path)
        if not root.is_dir():
            raise FileNotFoundError(f'There is no folder "{root}" (`path` of an imagefolder source).')
        return [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]


class DatasetSource(_Fields):
    """A Hub dataset (downloaded once) or one that `save_to_disk` wrote.

    Attributes:
        path: Hub id, or the folder.
        subset, split: of a Hub dataset.
    """

    kind: Literal["hub", "saved"]
    path: str
    subset: str | None = None
    split: str = "train"

    def shards(self) -> list[Shard]:
        return [DatasetShard(self.path, self._load())]

    def content_facts(self) -> list[Any]:
        return files_facts([file["filename"] for file in self._load().cache_files])

    def _load(self) -> datasets.Dataset:
        if self.kind == "hub":
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        if not Path(self.path).is_dir():
            raise FileNotFoundError(f'There is no folder "{self.path}" (`path` of a saved source).')
        found = datasets.load_from_disk(self.path)
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ValueError(f'"{self.path}" has no split "{self.split}", but {", ".join(found)}.')
            found = found[self.split]
        return found


SOURCE_MODELS = (PhantomSource, WebDatasetSource, ParquetSource, TableSource, FolderSource, DatasetSource)
Source = Annotated[
    PhantomSource | WebDatasetSource | ParquetSource | TableSource | FolderSource | DatasetSource,
    Field(discriminator="kind"),
]
_SOURCES: TypeAdapter[list[Any]] = TypeAdapter(list[Source])
SOURCE_KINDS = ("phantom", "webdataset", "parquet", "csv", "jsonl", "imagefolder", "hub", "saved")


def field_of(row: Any, named: str | None, usual: Sequence[str]) -> str | None:
    """The field of a row that a source names, or the first of the usual names that it has; None without one."""
    if named is not None:
        return named if named in row else None
    return next((name for name in usual if name in row), None)


def expand(pattern: str) -> list[str]:
    """Paths behind a pattern.

    `::` separates several, `{000..012}` counts, `{a,b}` chooses, `*` and `?` glob, `$NAME` and `~` stand for the
    environment's value and the home folder.

    Raises:
        FileNotFoundError: if no file fits a pattern with `*` or `?`; other paths are taken as they are, to be missed
            when they are read.
    """
    paths: list[str] = []
    for part in os.path.expanduser(os.path.expandvars(pattern)).split("::"):
        pieces = re.split(r"(\{[^{}]*\})", part)
        for chosen in product(*(_choices(piece) for piece in pieces)):
            path = "".join(chosen)
            if not has_magic(path):
                paths.append(path)
                continue
            found = sorted(glob(path))
            if not found:
                raise FileNotFoundError(f'No file fits "{path}" (`files` of a source).')
            paths += found
    return paths


def _choices(piece: str) -> list[str]:
    if not (piece.startswith("{") and piece.endswith("}")):
        return [piece]
    inside = piece[1:-1]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if counted:
        first, last = counted.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return inside.split(",")


class SourceError(ValueError):
    """A file of sources that cannot be used; the message names the key and how to mend it."""


def read_yaml(path: str | Path, error: type[ValueError]) -> Any:
    """What a YAML file holds.

    Raises:
        error: for a missing file or broken YAML, naming it.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"Cannot read {path}: {problem.strerror}.") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path} is no valid YAML: {problem}") from problem


def load_sources(path: str | Path) -> list[Any]:
    """The sources that a YAML file lists.

    Raises:
        SourceError: for a missing file, broken YAML, unknown keys (the nearest known one is suggested), wrong values.
    """
    content = read_yaml(path, SourceError)
    if not isinstance(content, list) or not content:
        raise SourceError(f"{path} must hold a list of sources, each beginning with `- kind:`.")
    try:
        return _SOURCES.validate_python(content)
    except ValidationError as error:
        known = sorted({name for model in SOURCE_MODELS for name in model.model_fields})
        problems = "\n".join(f"  {explain(problem, known)}" for problem in error.errors())
        raise SourceError(f"{path} cannot be used:\n{problems}") from error


def explain(problem: Any, known_keys: Iterable[str]) -> str:
    """One of pydantic's problems in words: which key, what is wrong, and the nearest key that exists."""
    # A source's kind, and which of several forms a value was tried as, stand in pydantic's path; they are no keys.
    parts = [
        part
        for part in problem["loc"]
        if part not in SOURCE_KINDS and not (isinstance(part, str) and ("[" in part or part == "str"))
    ]
    path = ".".join(str(part) for part in parts)
    if problem["type"] == "extra_forbidden":
        near = get_close_matches(str(problem["loc"][-1]), list(known_keys), n=1)
        return f"{path}: unknown key." + (f" Did you mean `{near[0]}`?" if near else "")
    if problem["type"] == "missing":
        return f"{path}: missing; it is needed."
    return f"{path or 'file'}: {problem['msg']} (got {problem['input']!r})"
