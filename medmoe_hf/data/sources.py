"""Sources of image-text pairs: the entries of a YAML file, and the shards that they refer to."""

import codecs
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import datasets
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from medmoe_hf.common.loading import explain_loading
from medmoe_hf.common.yaml_files import explain, read_yaml
from medmoe_hf.data.base_source import MAX_CHECKED_SHARDS, BaseSource
from medmoe_hf.data.checksums import file_checksums
from medmoe_hf.data.clip_benchmark import CLASS_NAMES, SHARD_COUNT, TEMPLATES, read_names, split_shards
from medmoe_hf.data.fields import IMAGE_FIELDS, find_field
from medmoe_hf.data.file_patterns import expand, expand_environment
from medmoe_hf.data.image_folders import find_images
from medmoe_hf.data.shards import DatasetShard, ParquetShard, PhantomShard, Shard, TarShard, undecoded
from medmoe_hf.data.tables import TableShard, read_table
from medmoe_hf.errors import ArgumentError, PathNotFoundError, ShardError, SourceError
from medmoe_hf.model.modalities_medmoe import MODALITIES

logger = logging.getLogger(__name__)


class PhantomSource(BaseSource):
    """Synthetic image-report pairs, drawn while they are read (see `medmoe_hf.data.phantom`).

    Attributes:
        kind: `phantom`.
        seed: Seed of the sequence of samples.
        image_size: Width and height in pixels, 48 or more.
        modalities: Modalities to draw; their ids do not change.
        length: Number of samples; None for an endless source.

    Example:
        ```yaml
        - {kind: phantom, seed: 1, image_size: 64, length: 200, modalities: [xray, ct]}
        ```
    """

    kind: Literal["phantom"]
    seed: int = 0
    image_size: int = Field(default=224, ge=48)
    modalities: list[str] = list(MODALITIES)
    length: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _unfiltered(self) -> "PhantomSource":
        if self.where is not None or self.where_not is not None:
            raise ValueError(
                "phantoms are drawn while they are read, so that `where` cannot select some of them; use "
                "`modalities`, or write them to tars with `medmoe phantom`"
            )
        return self

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        return [PhantomShard(self.seed, self.image_size, self.modalities, self.length)]


class _FileSource(BaseSource):
    files: list[str] = Field(min_length=1)

    def paths(self) -> list[str]:
        """Returns the paths of the files, with patterns expanded.

        Raises:
            FileNotFoundError: If no file matches a pattern.
        """
        return [path for pattern in self.files for path in expand(pattern)]

    def content_checksums(self) -> list[Any]:
        return file_checksums(self.paths())


class WebDatasetSource(_FileSource):
    """Uncompressed WebDataset tars: per sample an image, `txt` (the caption) and optionally `cls` (the modality id).

    Attributes:
        kind: `webdataset`.
        files: Paths, or patterns with `*`, `?`, `{000..012}`, `{a,b}` and `::` between several.

    Example:
        ```yaml
        - {kind: webdataset, files: ["shards/train-{000000..000120}.tar"], caption_rule: auto, modality: caption}
        ```
    """

    kind: Literal["webdataset"]

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        paths = self.paths()
        if self.modality is None:
            for folder in dict.fromkeys(Path(path).parent for path in paths):
                if (folder / SHARD_COUNT).is_file() and (folder.parent / CLASS_NAMES).is_file():
                    raise SourceError(
                        f"{folder} has CLIP_benchmark's layout, whose `cls` is a class and no modality: use `kind: "
                        f"clip_benchmark, path: {folder.parent}, split: {folder.name}`, or specify `modality`."
                    )
        return [TarShard(path) for path in paths]


class ClipBenchmarkSource(BaseSource):
    """A set in the webdataset layout of CLIP_benchmark, with one class per image.

    The fields are the image, `label` (the name of the class) and `caption` (the first template, filled with it); for
    captions of your own use `captions` with `{label}`.

    Attributes:
        kind: `clip_benchmark`.
        path: Folder with `classnames.txt`, `zeroshot_classification_templates.txt` and a folder per split.
        split: Name of the split's folder.

    Example:
        ```yaml
        - {kind: clip_benchmark, path: benchmarks/lungs, split: train, modality: xray}
        ```
    """

    kind: Literal["clip_benchmark"]
    path: str
    split: str = "train"

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        folder = Path(expand_environment(self.path))
        classes, templates = read_names(folder)
        return [*split_shards(folder, self.split, classes, templates[0])]

    def content_checksums(self) -> list[Any]:
        folder = Path(expand_environment(self.path))
        names = [str(folder / name) for name in (CLASS_NAMES, TEMPLATES)]
        return file_checksums(names, complete=True) + file_checksums([shard.name for shard in self.shards()])


class ParquetSource(_FileSource):
    """Parquet files whose image column contains bytes, `{"bytes", "path"}`, or a path.

    Attributes:
        kind: `parquet`.
        files: Paths or patterns, as for `WebDatasetSource`.

    Example:
        ```yaml
        - {kind: parquet, files: ["export/*.parquet"], image: image, caption: report, modality: "field:modality"}
        ```
    """

    kind: Literal["parquet"]

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        return [ParquetShard(path) for path in self.paths()]


class TableSource(_FileSource):
    """CSV or JSONL files with a column of image paths, relative to the folder of the file or to `root`.

    Attributes:
        kind: `csv` or `jsonl`.
        files: Paths or patterns, as for `WebDatasetSource`.
        root: Folder to which image paths are relative; by default the folder of the file.
        delimiter: Delimiter of a CSV; by default detected among comma, semicolon, tab and `|`.
        encoding: Python's name of the text encoding, such as `cp1252`; by default detected.

    Example:
        ```yaml
        - {kind: csv, files: [export/reports.csv], image: path, caption: report, modality: dicom, subject: patient}
        ```
    """

    kind: Literal["csv", "jsonl"]
    root: str | None = None
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    encoding: str | None = None

    @model_validator(mode="after")
    def _readable(self) -> "TableSource":
        if self.kind == "jsonl" and self.delimiter is not None:
            raise ValueError("`delimiter` applies to CSV only")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"unknown `encoding` {self.encoding}; examples are utf-8, utf-16 and cp1252") from None
        return self

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        shards: list[Shard] = []
        for path in self.paths():
            rows = read_table(path, self.kind, self.delimiter, self.encoding, keep_faulty=True)
            folder = Path(path).parent if self.root is None else Path(expand_environment(self.root))
            self._join(rows, folder)
            shards.append(TableShard(path, rows))
        return shards

    def _join(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Prepends the folder to image paths, and converts Windows paths on other systems."""
        keys: dict[tuple[str, ...], str | None] = {}
        slashes: bool | None = None
        start = str(folder / "x")[:-1]
        for row in rows:
            names = tuple(row)
            key = keys[names] if names in keys else keys.setdefault(names, find_field(row, self.image, IMAGE_FIELDS))
            if key is None:
                continue
            container, name = (row[key], "path") if isinstance(row[key], dict) else (row, key)
            path = container.get(name)
            if not isinstance(path, str) or not path or "://" in path:
                continue
            if "\\" in path and os.sep == "/":
                if slashes is None:
                    slashes = not (folder / path).exists()
                path = path.replace("\\", "/") if slashes else path
            # `Path` normalizes what is not plain; for all paths it would take longer than the rest of reading.
            plain = os.sep == "/" and path[0] not in "./" and path[-1] != "/" and "//" not in path and "/." not in path
            container[name] = start + path if plain else str(folder / path)

    def content_checksums(self) -> list[Any]:
        return file_checksums(self.paths(), complete=True)


class FolderSource(BaseSource):
    """A folder of images, in one subfolder per label (the field `label` of templates).

    Attributes:
        kind: `imagefolder`.
        path: Path of the folder.

    Example:
        ```yaml
        - {kind: imagefolder, path: lesions, caption_template: "ultrasound of a {label} lesion", modality: us}
        ```
    """

    kind: Literal["imagefolder"]
    path: str

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        root = Path(expand_environment(self.path))
        rows = [
            {"image": str(path), "label": path.parent.name if path.parent != root else ""} for path in self._images()
        ]
        return [TableShard(str(root), rows)]

    def content_checksums(self) -> list[Any]:
        root = Path(expand_environment(self.path))
        digest, size = hashlib.blake2b(digest_size=8), 0
        for path in self._images():
            file_size = path.stat().st_size if path.exists() else None
            digest.update(f"{path.relative_to(root).as_posix()}\0{file_size}\0".encode(errors="surrogateescape"))
            size += file_size or 0
        return [[root.resolve().name, size, digest.hexdigest()]]

    def _images(self) -> list[Path]:
        root = Path(expand_environment(self.path))
        if not root.is_dir():
            raise PathNotFoundError(f'There is no folder "{root}" (`path` of an imagefolder source).')
        others: Counter[str] = Counter()
        images = sorted(Path(path) for path in find_images(str(root), others))
        if others:
            kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common())
            logger.warning("%s: skipping files that are not images (%s)", root, kinds)
        return images


class DatasetSource(BaseSource):
    """A dataset on the Hub (downloaded once), or one that was saved with `save_to_disk`.

    Columns of `datasets.Image` and `datasets.Nifti` are images, and values of `ClassLabel` are their names.

    Attributes:
        kind: `hub` or `saved`.
        path: Hub id, or path of the folder.
        subset: Configuration of a Hub dataset.
        split: Split of the dataset; of a Hub dataset also `train+test` or `train[:10%]`.
        revision: Branch, tag or commit of a Hub dataset; by default main.
        rows: Number of rows of a Hub dataset that are read by streaming, the first ones of the split. Nothing else is
            downloaded, and they are kept in memory. None for all rows.

    Example:
        ```yaml
        - {kind: hub, path: you/reports, split: train, modality: "field:modality"}
        ```
    """

    kind: Literal["hub", "saved"]
    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _of_the_hub(self) -> "DatasetSource":
        if self.kind == "saved" and (self.revision is not None or self.rows is not None):
            raise ValueError("`revision` and `rows` apply to `kind: hub` only")
        return self

    def shards(self) -> list[Shard]:
        """Returns the shards of the source."""
        return [DatasetShard(self.path, self._load())]

    def content_checksums(self) -> list[Any]:
        if self.rows is None:
            return file_checksums([file["filename"] for file in self._load().cache_files])
        digest = hashlib.blake2b(digest_size=8)
        found = undecoded(self._load())
        for row in found:
            digest.update(repr(row).encode())
        return [[self.path, len(found), digest.hexdigest()]]

    def _load(self) -> datasets.Dataset:
        if self.kind == "hub":
            with explain_loading(self.path):
                if self.rows is not None:
                    return _first_rows(self.path, self.subset, self.split, self.revision, self.rows)
                return datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision)
        path = expand_environment(self.path)
        if not Path(path).is_dir():
            raise PathNotFoundError(f'There is no folder "{path}" (`path` of a saved source).')
        found = datasets.load_from_disk(path)
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ArgumentError(f'"{self.path}" has no split "{self.split}"; it has {", ".join(found)}.')
            found = found[self.split]
        return found


@lru_cache(maxsize=8)
def _first_rows(path: str, subset: str | None, split: str, revision: str | None, rows: int) -> datasets.Dataset:
    """Streams the first rows of a Hub dataset; cached, so that checks do not download them again."""
    stream = undecoded(datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True))
    found = list(stream.take(rows))
    return datasets.Dataset.from_list(found, features=stream.features)


SOURCE_MODELS = (
    PhantomSource,
    WebDatasetSource,
    ClipBenchmarkSource,
    ParquetSource,
    TableSource,
    FolderSource,
    DatasetSource,
)
Source = Annotated[
    PhantomSource
    | WebDatasetSource
    | ClipBenchmarkSource
    | ParquetSource
    | TableSource
    | FolderSource
    | DatasetSource,
    Field(discriminator="kind"),
]
_SOURCES: TypeAdapter[list[Any]] = TypeAdapter(list[Source])
SOURCE_SECTIONS = {
    kind: list(model.model_fields)
    for model in SOURCE_MODELS
    for kind in get_args(model.model_fields["kind"].annotation)
}
"""Keys of each kind of source."""


def source_fields(shards: Sequence[Shard]) -> set[str]:
    """Returns the names of the fields of a source, by its first shards."""
    fields: set[str] = set()
    for shard in shards[:MAX_CHECKED_SHARDS]:
        try:
            fields.update(name for name in shard.fields() if name is not None)
        except (ShardError, OSError):
            continue  # counted as a fault when it is read
    return fields


def has_labels(source: Any, shards: Sequence[Shard]) -> bool:
    """Returns whether samples of a source have its `label` field, by its first shards."""
    return any((source.label or "label") in source_fields([shard]) for shard in shards[:MAX_CHECKED_SHARDS])


def load_sources(path: str | Path) -> list[Any]:
    """Reads the sources of a YAML file.

    Args:
        path: Path of the file, a list of sources; the keys are the attributes of the source models.

    Returns:
        One model per entry, by its `kind`: `PhantomSource`, `WebDatasetSource`, `ClipBenchmarkSource`,
        `ParquetSource`, `TableSource`, `FolderSource` or `DatasetSource`.

    Raises:
        SourceError: For a missing file, invalid YAML, unknown keys (the nearest one is suggested) or invalid values.

    Example:
        >>> import pathlib, tempfile
        >>> from medmoe_hf.data.sources import load_sources
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sources.yaml"
        >>> _ = path.write_text("- {kind: phantom, image_size: 64, length: 8}")
        >>> load_sources(path)[0].length
        8
    """
    content = read_yaml(path, SourceError)
    if not isinstance(content, list) or not content:
        raise SourceError(f"{path} must contain a list of sources, each starting with `- kind:`.")
    try:
        return _SOURCES.validate_python(content)
    except ValidationError as error:
        raise SourceError(f"{path} cannot be used:\n{explain(error, SOURCE_SECTIONS)}") from error


def source_names(sources: Sequence[Any]) -> list[str]:
    """Returns a unique name for each source: its `name`, or the path, pattern or Hub id of its data."""
    names: list[str] = []
    for source in sources:
        name = source.name or _location(source)
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(name if not same else f"{name} ({same + 1})")
    return names


def _location(source: Any) -> str:
    if isinstance(source, PhantomSource):
        return f"phantoms {source.seed}"
    files = getattr(source, "files", None)
    if files is None:
        return str(source.path)
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
