"""Shards: pieces of a source whose samples can be counted and then read one by one, in any order.

A shard's `locate` says where a sample is, without reading it: numbers that are cheap to send to another process. Its
`read` fetches it. So the order of a stream is decided on numbers alone, and whatever was decided can be resumed.
"""

import csv
import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow.parquet

from medmoe_hf.data.phantom import phantom_sample


class ShardError(RuntimeError):
    """A shard that cannot be opened; `cause` is what is counted, in a few words and without a path."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Shard(Protocol):
    """What a stream asks of a shard."""

    name: str

    def __len__(self) -> int:
        """The number of samples; opens the shard. Raises `ShardError`."""

    def locate(self, row: int) -> Any:
        """Where sample `row` is."""

    def read(self, place: Any) -> dict[str, Any]:
        """The fields of a sample; images as bytes, a path, or decoded."""

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        """Some fields of some samples, without reading the others (the images, say). Absent fields are left out."""


class TarShard:
    """A webdataset tar on disk: samples are runs of files that share what stands before the first dot.

    Attributes:
        name: its path.
        cut_off: whether the tar ends before it should; the samples before the cut are served.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.cut_off = False
        self._places: list[tuple[str, dict[str, tuple[int, int]]]] | None = None

    def _open(self) -> list[tuple[str, dict[str, tuple[int, int]]]]:
        path = Path(self.name)
        places: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        try:
            size = path.stat().st_size
            if size == 0:
                raise ShardError("empty shard", f"{path} has no bytes.")
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    key, _, extension = _split_name(member.name)
                    if member.offset_data + member.size > size:
                        # The header is whole, the content is not.
                        self.cut_off = True
                        places.pop(key, None)
                        break
                    places.setdefault(key, {})[extension] = (member.offset_data, member.size)
            # A tar ends with blocks of zeros; tarfile takes one that stops short of them for whole.
            with open(path, "rb") as file:
                file.seek(-min(size, tarfile.BLOCKSIZE), 2)
                self.cut_off |= any(file.read())
        except FileNotFoundError:
            raise ShardError("missing shard", f"{path} is not there (any more).") from None
        except (tarfile.TarError, OSError) as error:
            raise ShardError("unreadable shard", f"{path} is no (uncompressed) tar: {error}") from error
        return list(places.items())

    def _index(self) -> list[tuple[str, dict[str, tuple[int, int]]]]:
        if self._places is None:
            self._places = self._open()
        return self._places

    def __len__(self) -> int:
        return len(self._index())

    def locate(self, row: int) -> Any:
        return self._index()[row]

    def read(self, place: Any) -> dict[str, Any]:
        key, members = place
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

    def __getstate__(self) -> dict[str, Any]:
        # Readers in other processes are told places; they need no index of their own.
        return {"name": self.name, "cut_off": self.cut_off, "_places": None}


def _split_name(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", dot, extension.lower()


class ParquetShard:
    """A parquet file, read by row groups, since neighbours come from the same one."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._starts: list[int] | None = None

    def __len__(self) -> int:
        if self._starts is None:
            try:
                metadata = pyarrow.parquet.ParquetFile(self.name).metadata
            except FileNotFoundError:
                raise ShardError("missing shard", f"{self.name} is not there (any more).") from None
            except (OSError, pyarrow.ArrowException) as error:
                cause = "empty shard" if Path(self.name).stat().st_size == 0 else "unreadable shard"
                raise ShardError(cause, f"{self.name} is no parquet file: {error}") from error
            self._starts = [0]
            for group in range(metadata.num_row_groups):
                self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        return self._starts[-1]

    def locate(self, row: int) -> Any:
        len(self)
        assert self._starts is not None
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def read(self, place: Any) -> dict[str, Any]:
        group, row = place
        return {name: column[0].as_py() for name, column in zip(*_row(_row_group(self.name, group), row), strict=True)}

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        samples: list[dict[str, Any]] = [{} for _ in rows]
        by_group: dict[int, list[tuple[int, int]]] = {}
        for number, row in enumerate(rows):
            group, inside = self.locate(row)
            by_group.setdefault(group, []).append((number, inside))
        file = pyarrow.parquet.ParquetFile(self.name)
        present = [name for name in file.schema_arrow.names if name in names]
        for group, wanted in by_group.items() if present else ():
            table = file.read_row_group(group, columns=present).take([inside for _, inside in wanted])
            for (number, _), sample in zip(wanted, table.to_pylist(), strict=True):
                samples[number] = sample
        return samples

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_starts": None}


@lru_cache(maxsize=16)
def _row_group(path: str, group: int) -> Any:
    """Kept by process, not by shard: one for each of the sources that take turns, however many files they have."""
    return pyarrow.parquet.ParquetFile(path).read_row_group(group)


def _row(table: Any, row: int) -> tuple[list[str], list[Any]]:
    piece = table.slice(row, 1)
    return piece.column_names, [piece.column(name) for name in piece.column_names]


class TableShard:
    """Rows that are in memory: a CSV or JSONL file, or the files of a folder."""

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, row: int) -> Any:
        return dict(self.rows[row])

    def read(self, place: Any) -> dict[str, Any]:
        return place

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        return [{name: self.rows[row][name] for name in names if name in self.rows[row]} for row in rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "rows": ()}


class DatasetShard:
    """A `datasets.Dataset`: memory-mapped Arrow, images not decoded."""

    def __init__(self, name: str, dataset: datasets.Dataset) -> None:
        self.name = name
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def locate(self, row: int) -> Any:
        return row

    def read(self, place: Any) -> dict[str, Any]:
        return self.dataset[place]

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        present = [name for name in self.dataset.column_names if name in names]
        if not present:
            return [{} for _ in rows]
        columns = self.dataset.select_columns(present)[list(rows)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class PhantomShard:
    """Samples of `medmoe_hf.data.phantom`, drawn where they are read."""

    def __init__(self, seed: int, image_size: int, modalities: Sequence[str], length: int | None) -> None:
        self.name = f"phantoms {seed}"
        self._seed, self._image_size, self._modalities = seed, image_size, tuple(modalities)
        # Endless: nobody lives to see the end.
        self._length = length if length is not None else 2**40

    def __len__(self) -> int:
        return self._length

    def locate(self, row: int) -> Any:
        return row

    def read(self, place: Any) -> dict[str, Any]:
        return phantom_sample(self._seed, place, image_size=self._image_size, modalities=self._modalities)

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        return [{name: value for name, value in self.read(row).items() if name in names} for row in rows]


def read_table(path: str) -> list[dict[str, Any]]:
    """The rows of a CSV or JSONL file.

    Raises:
        ShardError: if it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith((".jsonl", ".json")):
                return [json.loads(line) for line in file if line.strip()]
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise ShardError("missing shard", f"{path} is not there.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ShardError("unreadable shard", f"{path} is no table: {error}") from error


_PIECE = 2**14  # A tar's last 10 kB may be padding.


def files_facts(paths: Sequence[str], whole: bool = False) -> list[list[Any]]:
    """`[name, size, checksum]` of each file: what `content_facts` of a source says.

    Args:
        paths: of the files.
        whole: whether every byte counts, or a file's size, beginning and end.
    """
    # Over a network the time goes into waiting.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda path: _file_facts(path, whole), paths))


def _file_facts(path: str, whole: bool) -> list[Any]:
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(digest_size=8)
            if whole:
                while piece := file.read(2**20):
                    digest.update(piece)
            else:
                digest.update(file.read(_PIECE))
                file.seek(max(_PIECE, size - _PIECE))
                digest.update(file.read(_PIECE))
            return [name, size, digest.hexdigest()]
    except OSError:
        return [name, None, None]
