"""Sources of training data: what a YAML says about one, and the shards that it becomes."""

import codecs
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import escape, glob, has_magic
from itertools import product
from math import prod
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args

import datasets
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from medmoe_hf.common.loading import explain_loading
from medmoe_hf.common.yaml_files import explain, nearest, read_yaml
from medmoe_hf.data.captions import CAPTION_RULES
from medmoe_hf.data.shards import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    DatasetShard,
    ParquetShard,
    PhantomShard,
    Shard,
    TableShard,
    TarShard,
    files_facts,
    read_table,
)
from medmoe_hf.errors import ArgumentError, PathNotFoundError, ShardError, SourceError
from medmoe_hf.model.medical_images_medmoe import WINDOWS, is_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES

logger = logging.getLogger(__name__)


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
        label: field that says what an image shows, for training with `positives: label`; None takes a field `label`,
            where there is one.
        window: how DICOM and NIfTI are shown: a CT window's name, (centre, width), or three of these for three
            channels; None: as the file says (see `read_medical_image`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: str
    name: str | None = None
    weight: float = Field(default=1.0, gt=0)
    image: str | None = None
    caption: str | None = None
    caption_rule: str = "plain"
    caption_template: str | None = None
    modality: str | Annotated[list[str], Field(min_length=1)] | None = None
    subject: str | None = None
    label: str | None = None
    window: str | tuple[float, float] | tuple[str, str, str] | None = None

    @model_validator(mode="after")
    def _known_rule(self) -> "_Fields":
        if self.caption_rule not in (*CAPTION_RULES, "auto"):
            raise ValueError(f"`caption_rule` must be one of {', '.join(CAPTION_RULES)} or auto")
        for name in (self.window,) if isinstance(self.window, str) else self.window or ():
            if isinstance(name, str) and name not in WINDOWS:
                raise ValueError(f"there is no `window` {name}, but {', '.join(WINDOWS)}")
        if self.caption_template is not None:
            try:
                _template_fields(self.caption_template)
            except ValueError as error:
                raise ValueError(
                    f"`caption_template`: {error}; write fields as `{{label}}`, braces as `{{{{`"
                ) from None
        return self

    def check(self, shards: Sequence[Shard]) -> None:
        """Looks for the fields that this source names, before a sample is read.

        Args:
            shards: what `shards` gave.

        Raises:
            SourceError: if no sample has a field that `image`, `caption`, `caption_template`, `modality`, `subject` or
                `label` needs, or if there are no samples; says which fields there are, and the nearest one.
        """
        if all(isinstance(shard, (TableShard, DatasetShard)) and not len(shard) for shard in shards):
            raise SourceError(f"{self.name or (shards[0].name if shards else self.kind)} holds no samples.")
        there: dict[str, None] = {}
        first = None
        for shard in shards[:_CHECKED_SHARDS]:
            try:
                there.update(dict.fromkeys(name for name in shard.fields() if name is not None))
            except (ShardError, OSError):
                continue  # counted when it is read
            first = first or shard.name
            problems = [problem for key, names in self._needed() if (problem := _absent(key, names, there))]
            if not problems:
                return
        if there:
            known = list(there)
            some = ", ".join(known[:_NAMED_FIELDS]) + (", ..." if len(known) > _NAMED_FIELDS else "")
            raise SourceError(f"{first}: {'; '.join(problems)}. The columns are: {some}.")

    def _needed(self) -> list[tuple[str, Sequence[str]]]:
        """Keys, and the fields one of which each needs."""
        needed: list[tuple[str, Sequence[str]]] = [("image", IMAGE_FIELDS if self.image is None else (self.image,))]
        if self.caption_template is not None:
            needed += [("caption_template", (name,)) for name in _template_fields(self.caption_template)]
        else:
            needed.append(("caption", CAPTION_FIELDS if self.caption is None else (self.caption,)))
        said = [self.modality] if isinstance(self.modality, str) else self.modality or []
        needed += [("modality", (one.removeprefix("field:"),)) for one in said if one.startswith("field:")]
        named = {"subject": self.subject, "label": self.label}
        return needed + [(key, (name,)) for key, name in named.items() if name is not None]

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
        delimiter: between the cells of a CSV; None finds out whether it is a comma, semicolon, tab or `|`.
        encoding: of the text, as Python names it: `cp1252`, say; None finds out.
    """

    kind: Literal["csv", "jsonl"]
    root: str | None = None
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    encoding: str | None = None

    @model_validator(mode="after")
    def _readable(self) -> "TableSource":
        if self.kind == "jsonl" and self.delimiter is not None:
            raise ValueError("`delimiter` is a CSV's; JSONL has none")
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise ValueError(f"there is no `encoding` {self.encoding}; utf-8, utf-16 and cp1252 are some") from None
        return self

    def shards(self) -> list[Shard]:
        shards: list[Shard] = []
        for path in self.paths():
            rows = read_table(path, self.kind, self.delimiter, self.encoding, keep_faults=True)
            folder = Path(path).parent if self.root is None else Path(_with_environment(self.root))
            self._join(rows, folder)
            shards.append(TableShard(path, rows))
        return shards

    def _join(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Makes image paths start from the folder; those of Windows are understood elsewhere."""
        keys: dict[tuple[str, ...], str | None] = {}
        slashes: bool | None = None
        start = str(folder / "x")[:-1]
        for row in rows:
            names = tuple(row)
            key = keys[names] if names in keys else keys.setdefault(names, field_of(row, self.image, IMAGE_FIELDS))
            if key is None:
                continue
            holder, name = (row[key], "path") if isinstance(row[key], dict) else (row, key)
            path = holder.get(name)
            if not isinstance(path, str) or not path or "://" in path:
                continue
            if "\\" in path and os.sep == "/":
                if slashes is None:
                    slashes = not (folder / path).exists()
                path = path.replace("\\", "/") if slashes else path
            # What `Path` would change, it may; it takes longer than the rest of the reading.
            plain = os.sep == "/" and path[0] not in "./" and path[-1] != "/" and "//" not in path and "/." not in path
            holder[name] = start + path if plain else str(folder / path)

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
        root = Path(_with_environment(self.path))
        rows = [
            {"image": str(path), "label": path.parent.name if path.parent != root else ""} for path in self._images()
        ]
        return [TableShard(str(root), rows)]

    def content_facts(self) -> list[Any]:
        root = Path(_with_environment(self.path))
        digest, size = hashlib.blake2b(digest_size=8), 0
        for path in self._images():
            bytes_of_one = path.stat().st_size if path.exists() else None
            digest.update(f"{path.relative_to(root).as_posix()}\0{bytes_of_one}\0".encode(errors="surrogateescape"))
            size += bytes_of_one or 0
        return [[root.resolve().name, size, digest.hexdigest()]]

    def _images(self) -> list[Path]:
        root = Path(_with_environment(self.path))
        if not root.is_dir():
            raise PathNotFoundError(f'There is no folder "{root}" (`path` of an imagefolder source).')
        others: Counter[str] = Counter()
        images = sorted(Path(path) for path in _images_below(str(root), (), others))
        if others:
            kinds = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common())
            logger.warning("%s: files that are no images are left out (%s)", root, kinds)
        return images


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
            with explain_loading(self.path):
                return datasets.load_dataset(self.path, self.subset, split=self.split)
        path = _with_environment(self.path)
        if not Path(path).is_dir():
            raise PathNotFoundError(f'There is no folder "{path}" (`path` of a saved source).')
        found = datasets.load_from_disk(path)
        if isinstance(found, datasets.DatasetDict):
            if self.split not in found:
                raise ArgumentError(f'"{self.path}" has no split "{self.split}", but {", ".join(found)}.')
            found = found[self.split]
        return found


SOURCE_MODELS = (PhantomSource, WebDatasetSource, ParquetSource, TableSource, FolderSource, DatasetSource)
Source = Annotated[
    PhantomSource | WebDatasetSource | ParquetSource | TableSource | FolderSource | DatasetSource,
    Field(discriminator="kind"),
]
_SOURCES: TypeAdapter[list[Any]] = TypeAdapter(list[Source])
SOURCE_SECTIONS = {
    kind: list(model.model_fields)
    for model in SOURCE_MODELS
    for kind in get_args(model.model_fields["kind"].annotation)
}
"""The keys of each kind of source."""


_PLAIN_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_RARE_SUFFIXES = (".avif", ".j2k", ".jp2", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
_IMAGE_SUFFIXES = (*_PLAIN_SUFFIXES, *_RARE_SUFFIXES, ".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
_PLAIN_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Those that begin in a way that nothing else does."""


_COMPANIONS = (".csv", ".db", ".ini", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")
"""What lies beside images everywhere, and is not worth a word."""


def _images_below(folder: str, above: tuple[tuple[int, int], ...], others: Counter[str]) -> Iterator[str]:
    """Paths of the images in a folder and its subfolders, linked ones too.

    Args:
        folder: where to look.
        above: the folders on the way to it.
        others: counts the suffixes of files that are no images.
    """
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        return  # a link that leads back
    with os.scandir(folder) as entries:
        for entry in entries:
            # hidden, and what NAS systems put beside images
            if entry.name.startswith(".") or entry.name == "@eaDir":
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, (*above, identity), others)
            # A link to nothing is an image that is missing.
            elif _is_image(entry.path) and (entry.is_file() or entry.is_symlink()):
                yield entry.path
            elif (suffix := os.path.splitext(entry.name)[1].lower()) not in _COMPANIONS:
                others[suffix] += 1


def _is_image(path: str) -> bool:
    """By the name; files with another name, such as DICOM without one, by how they begin."""
    if path.lower().endswith(_IMAGE_SUFFIXES):
        return True
    if not os.path.isfile(path):
        return False
    if is_medical_image(path):
        return True
    try:
        with Image.open(path, formats=_PLAIN_FORMATS):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


_CHECKED_SHARDS = 20
"""Opened at most, when a field is looked for: tars may differ in what they hold."""
_NAMED_FIELDS = 20


def _template_fields(template: str) -> list[str]:
    """Raises ValueError for braces that do not fit together, and for `{}` and `{0}`, which name no field."""
    names = [re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(template) if name is not None]
    for name in names:
        if not name or name.isdigit():
            raise ArgumentError("`{" + name + "}` names no field")
    return names


def _absent(key: str, names: Sequence[str], there: Iterable[str]) -> str | None:
    """What is wrong with a key whose value is one of these fields; None if one of them is there."""
    if any(name in there for name in names):
        return None
    if len(names) > 1:
        return f"no column for the {key}: name it with `{key}`"
    near = nearest(names[0], there)
    return f"no column `{names[0]}`" + (f"; did you mean `{near}`?" if near else "") + f" (`{key}`)"


def has_labels(source: Any, shards: Sequence[Shard]) -> bool:
    """Whether samples of a source have the field that its `label` stands for; the first shards are looked at."""
    for shard in shards[:_CHECKED_SHARDS]:
        try:
            if (source.label or "label") in shard.fields():
                return True
        except (ShardError, OSError):
            continue  # counted when it is read
    return False


def field_of(row: Any, named: str | None, usual: Sequence[str]) -> str | None:
    """The field of a row that a source names, or the first of the usual names that it has; None without one."""
    if named is not None:
        return named if named in row else None
    return next((name for name in usual if name in row), None)


def expand(pattern: str) -> list[str]:
    """Paths behind a pattern.

    `::` separates several, `{000..012}` counts, `{a,b}` chooses, `*` and `?` glob, `$NAME` and `~` stand for the
    environment's value and the home folder. Brackets and braces in the name of a file or folder that exists are its
    own.

    Raises:
        FileNotFoundError: if no file fits a pattern with `*` or `?`; other paths are taken as they are, to be missed
            when they are read.
        ValueError: for braces in braces, or more than a million paths.
    """
    paths: list[str] = []
    for part in _with_environment(pattern).split("::"):
        if os.path.lexists(part):
            paths.append(part)
            continue
        choices = [_choices(piece) for piece in re.split(r"(\{[^{}]*\})", part)]
        count = prod(len(some) for some in choices) + len(paths)
        if count > _MOST_PATHS:
            raise ArgumentError(
                f'"{_shortened(pattern)}" stands for {count} files; at most {_MOST_PATHS} are allowed.'
            )
        for chosen in product(*choices):
            path = "".join(chosen)
            if not has_magic(path) or os.path.lexists(path):
                paths.append(path)
                continue
            found = sorted(glob(_own_brackets(path)) or glob(path.replace("[", "[[]")))
            if not found:
                raise PathNotFoundError(f'No file fits "{path}" (`files` of a source).')
            paths += found
    return paths


_MOST_PATHS = 1_000_000


def _with_environment(path: str) -> str:
    return os.path.expanduser(os.path.expandvars(path))


def _own_brackets(pattern: str) -> str:
    """The pattern, in which folders that exist by the very name that is written stand for themselves alone."""
    parts = pattern.split("/")
    escaped = list(parts)
    for index, part in enumerate(parts):
        if has_magic(part):
            if not os.path.isdir("/".join(parts[: index + 1])):
                break
            escaped[index] = escape(part)
    return "/".join(escaped)


def _choices(piece: str) -> list[str]:
    """What a piece of a pattern stands for."""
    if not (piece.startswith("{") and piece.endswith("}")):
        if "{" in piece or "}" in piece:
            raise ArgumentError(
                f'"{_shortened(piece)}": braces within braces, or that do not close; write the names out.'
            )
        return [piece]
    inside = piece[1:-1]
    counted = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if counted is None:
        return inside.split(",")
    first, last = counted.groups()
    if int(first) > int(last):
        raise ArgumentError(f'"{piece}" counts down; write {{{last}..{first}}}.')
    numbers = range(int(first), int(last) + 1)
    if len(numbers) > _MOST_PATHS:
        raise ArgumentError(f'"{piece}" stands for {len(numbers)} files; at most {_MOST_PATHS} are allowed.')
    return [str(number).zfill(len(first)) for number in numbers]


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


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
        raise SourceError(f"{path} cannot be used:\n{explain(error, SOURCE_SECTIONS)}") from error
