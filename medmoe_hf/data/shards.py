"""Shards: parts of a source whose samples can be counted and then read one by one, in any order.

`locate` returns where a sample is stored, without reading it: a few numbers that are cheap to send to another process.
`read` reads the sample. The order of a stream is therefore decided on numbers only, and can be resumed.
"""

import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow.parquet

from medmoe_hf.data.fields import CAPTION_FIELDS, IMAGE_FIELDS
from medmoe_hf.data.file_patterns import looked_in
from medmoe_hf.data.phantom import phantom_sample
from medmoe_hf.errors import ShardError

_Extent = tuple[int, int]
"""Offset and size of a file in a tar, in bytes."""
_Member = tuple[str, str, _Extent]
"""A file in a tar: key, extension, extent."""
_Run = list[tuple[str, _Extent]]
_ENDLESS = 2**40  # samples of an endless source: effectively infinite


class Shard(Protocol):
    """What a stream requires of a shard.

    Attributes:
        name: Path, or another name for messages.
    """

    name: str

    def __len__(self) -> int:
        """Returns the number of samples. Opens the shard, and raises `ShardError` if that fails."""

    def locate(self, row: int) -> Any:
        """Returns the location of a sample, which can be sent to another process."""

    def read(self, location: Any) -> dict[str, Any]:
        """Returns the fields of a sample, images as bytes, path or decoded. Raises `ShardError` for a faulty row."""

    def fields(self) -> list[str]:
        """Returns the names of the fields; some samples may lack some of them. May raise `ShardError`."""

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        """Returns some fields of some samples, without reading the others. Absent fields are omitted."""


class TarShard:
    """A WebDataset tar on disk. The files of a sample share their key: the part of the name before the first dot.

    They may be in any order, unless a key occurs twice, as in concatenated tars. Then each run of adjacent files with
    the same key is a sample, so that no image is paired with the caption of another.

    Attributes:
        name: Path of the tar.
        truncated: Whether the tar is truncated; the samples before the truncation are readable.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.truncated = False
        self._samples: list[tuple[str, dict[str, _Extent]]] | None = None

    def _open(self) -> list[tuple[str, dict[str, _Extent]]]:
        path = Path(self.name)
        members: list[_Member] = []
        try:
            size = path.stat().st_size
            if size == 0:
                raise ShardError("empty shard", f"{path} is an empty file.")
            with tarfile.open(path, "r:") as archive:
                last = -1
                for member in archive:
                    # With such a size, tarfile returns to where it was, for ever.
                    if member.size < 0 or member.offset <= last:
                        raise tarfile.ReadError(f"the header at byte {member.offset} states a negative size")
                    last = member.offset
                    if not member.isfile():
                        continue
                    key, _, extension = _split_name(member.name)
                    if member.offset_data + member.size > size:
                        # The content of the file is truncated, the header is not.
                        self.truncated = True
                        while members and members[-1][0] == key:
                            members.pop()
                        break
                    members.append((key, extension, (member.offset_data, member.size)))
            # A tar ends with blocks of zeros; tarfile accepts one without them, which is truncated.
            with open(path, "rb") as file:
                file.seek(-min(size, tarfile.BLOCKSIZE), 2)
                self.truncated |= any(file.read())
        except FileNotFoundError:
            raise ShardError("missing shard", f"{path} does not exist{looked_in(path)}.") from None
        except (tarfile.TarError, OSError, ValueError, OverflowError, IndexError, MemoryError) as error:
            # The last three are what tarfile makes of damaged sizes and of sparse files that are cut off.
            raise ShardError("unreadable shard", f"{path} is not an uncompressed tar: {error}") from error
        return _group_members(members)

    def _index(self) -> list[tuple[str, dict[str, _Extent]]]:
        if self._samples is None:
            self._samples = self._open()
        return self._samples

    def __len__(self) -> int:
        return len(self._index())

    def locate(self, row: int) -> Any:
        return self._index()[row]

    def read(self, location: Any) -> dict[str, Any]:
        key, members = location
        sample: dict[str, Any] = {"__key__": key}
        with open(self.name, "rb") as file:
            for extension, (offset, size) in members.items():
                file.seek(offset)
                content = file.read(size)
                if len(content) < size:
                    raise OSError(f"{self.name} ends inside {key}.{extension}")
                sample[extension] = content
        return sample

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        index = self._index()
        samples = []
        with open(self.name, "rb") as file:
            for row in rows:
                sample = {}
                for extension, (offset, size) in index[row][1].items():
                    if extension in names:
                        file.seek(offset)
                        sample[extension] = file.read(size)
                samples.append(sample)
        return samples

    def fields(self) -> list[str]:
        return list(dict.fromkeys(extension for _, members in self._index() for extension in members))

    def __getstate__(self) -> dict[str, Any]:
        # Workers are sent locations; they do not need the index.
        return {"name": self.name, "truncated": self.truncated, "_samples": None}


def _split_name(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", dot, extension.lower()


def _group_members(members: Sequence[_Member]) -> list[tuple[str, dict[str, _Extent]]]:
    """Returns the samples of a tar, in its order: key, and extent by extension."""
    joined: dict[str, dict[str, _Extent]] = {}
    last, roles = None, set[str]()
    for key, extension, extent in members:
        if key != last:
            last = key
            sample = joined.setdefault(key, {})
            # roles of earlier files with the same key that are not adjacent
            roles = {_role(known) for known in sample}
        if extension in sample or (roles and _role(extension) in roles):
            break
        sample[extension] = extent
    else:
        return list(joined.items())
    runs = groupby(members, lambda member: member[0])
    return [(key, dict(piece)) for key, run in runs for piece in _split_run([member[1:] for member in run])]


def _split_run(run: _Run) -> list[_Run]:
    """Splits adjacent files with the same key into samples: a repeated extension starts a new sample."""
    by_extension = _split_at_repeats(run, lambda extension: extension)
    if len({frozenset(extension for extension, _ in piece) for piece in by_extension}) == 1:
        return by_extension
    # If one sample has a jpg and the next a png, the second image starts the next sample.
    return _split_at_repeats(run, _role)


def _split_at_repeats(run: _Run, label: Callable[[str], str]) -> list[_Run]:
    pieces: list[_Run] = []
    seen: set[str] = set()
    for extension, extent in run:
        if not pieces or label(extension) in seen:
            pieces.append([])
            seen = set()
        pieces[-1].append((extension, extent))
        seen.add(label(extension))
    return pieces


def _role(extension: str) -> str:
    return "image" if extension in IMAGE_FIELDS else "caption" if extension in CAPTION_FIELDS else extension


class ParquetShard:
    """A parquet file, read by row groups, since adjacent rows are in the same one."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._starts: list[int] | None = None
        # modification time, size and inode: a file that is overwritten must not be read from the cache
        self._state: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        if self._starts is None:
            with self._explained():
                metadata = pyarrow.parquet.ParquetFile(self.name).metadata
                starts = [0]
                for group in range(metadata.num_row_groups):
                    starts.append(starts[-1] + metadata.row_group(group).num_rows)
                if min(starts) < 0 or starts != sorted(starts):
                    raise ValueError("it states a negative number of rows")
            self._starts = starts
        return self._starts[-1]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what pyarrow raises at a damaged file, some of it about its text, into a `ShardError`."""
        try:
            yield
        except FileNotFoundError:
            raise ShardError("missing shard", f"{self.name} does not exist{looked_in(self.name)}.") from None
        except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
            cause = "empty shard" if Path(self.name).stat().st_size == 0 else "unreadable shard"
            raise ShardError(cause, f"{self.name} is not a parquet file, or damaged: {error}") from error

    def locate(self, row: int) -> Any:
        len(self)
        assert self._starts is not None
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def read(self, location: Any) -> dict[str, Any]:
        group, row = location
        if self._state is None:
            status = os.stat(self.name)
            self._state = status.st_mtime_ns, status.st_size, status.st_ino
        table = _row_group(self.name, group, self._state)
        return {name: column[0].as_py() for name, column in zip(*_row(table, row), strict=True)}

    def fields(self) -> list[str]:
        len(self)
        with self._explained():
            names: list[str] = pyarrow.parquet.ParquetFile(self.name).schema_arrow.names
        return names

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = [{} for _ in rows]
        by_group: dict[int, list[tuple[int, int]]] = {}
        for number, row in enumerate(rows):
            group, inside = self.locate(row)
            by_group.setdefault(group, []).append((number, inside))
        with self._explained():
            file = pyarrow.parquet.ParquetFile(self.name)
            present = [name for name in file.schema_arrow.names if name in names]
            for group, wanted in by_group.items() if present else ():
                table = file.read_row_group(group, columns=present).take([inside for _, inside in wanted])
                for (number, _), sample in zip(wanted, table.to_pylist(), strict=True):
                    samples[number] = sample
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_starts": None, "_state": None}


@lru_cache(maxsize=16)
def _row_group(path: str, group: int, state: tuple[int, int, int]) -> Any:
    """Caches row groups per process, not per shard: a few suffice, however many files the sources have.

    Args:
        path: Path of the file.
        group: Index of the row group.
        state: Distinguishes the file from one that overwrites it.
    """
    return _parquet_file(path, *state).read_row_group(group)


@lru_cache(maxsize=16)
def _parquet_file(path: str, *state: int) -> Any:
    """Keeps files open: in random order, reading the footer again would take as long as reading the rows."""
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False)


def _row(table: Any, row: int) -> tuple[list[str], list[Any]]:
    piece = table.slice(row, 1)
    return piece.column_names, [piece.column(name) for name in piece.column_names]


class DatasetShard:
    """A `datasets.Dataset`: memory-mapped Arrow, with images, NIfTI volumes etc. not decoded.

    Numbers of a `ClassLabel` are read as the names of their classes, since numbers mean nothing outside the dataset.
    """

    def __init__(self, name: str, dataset: datasets.Dataset) -> None:
        self.name = name
        self.dataset = undecoded(dataset)
        self._classes = {
            column: classes for column, feature in dataset.features.items() if (classes := _class_label(feature))
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def locate(self, row: int) -> Any:
        return row

    def read(self, location: Any) -> dict[str, Any]:
        return self._named(self.dataset[location])

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        present = [name for name in self.dataset.column_names if name in names]
        if not present:
            return [{} for _ in rows]
        columns = self.dataset.select_columns(present)[list(rows)]
        return [self._named(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def fields(self) -> list[str]:
        return list(self.dataset.column_names)

    def _named(self, row: dict[str, Any]) -> dict[str, Any]:
        for column, feature in self._classes.items():
            value = row.get(column)
            if isinstance(value, list):
                row[column] = [feature.names[number] for number in value if number is not None and number >= 0]
            elif value is not None:
                row[column] = feature.names[value] if value >= 0 else None  # -1 is a label that is not known
        return row


def undecoded(dataset: Any) -> Any:
    """Returns a dataset whose images, NIfTI volumes etc. are read as bytes and paths.

    Args:
        dataset: A `datasets.Dataset` or `datasets.IterableDataset` with features.
    """
    for column, feature in (dataset.features or {}).items():
        if getattr(feature, "decode", False):
            plain = copy(feature)
            plain.decode = False
            dataset = dataset.cast_column(column, plain)
    return dataset


def _class_label(feature: Any) -> datasets.ClassLabel | None:
    """Returns the classes of a column of classes or of lists of them."""
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, datasets.ClassLabel) else None


class PhantomShard:
    """Samples of `medmoe_hf.data.phantom`, drawn by the worker that reads them."""

    def __init__(self, seed: int, image_size: int, modalities: Sequence[str], length: int | None) -> None:
        self.name = f"phantoms {seed}"
        self._seed, self._image_size, self._modalities = seed, image_size, tuple(modalities)
        self._length = length if length is not None else _ENDLESS

    def __len__(self) -> int:
        return self._length

    def locate(self, row: int) -> Any:
        return row

    def read(self, location: Any) -> dict[str, Any]:
        return phantom_sample(self._seed, location, image_size=self._image_size, modalities=self._modalities)

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        return [{name: value for name, value in self.read(row).items() if name in names} for row in rows]

    def fields(self) -> list[str]:
        return list(self.read(0))
