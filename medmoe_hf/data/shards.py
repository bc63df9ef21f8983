"""Shards: pieces of a source whose samples can be counted and then read one by one, in any order.

A shard's `locate` says where a sample is, without reading it: numbers that are cheap to send to another process. Its
`read` fetches it. So the order of a stream is decided on numbers alone, and whatever was decided can be resumed.
"""

import codecs
import csv
import hashlib
import io
import json
import logging
import os
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import chardet
import datasets
import pyarrow.parquet

from medmoe_hf.data.phantom import phantom_sample
from medmoe_hf.errors import ArgumentError, ShardError

logger = logging.getLogger(__name__)


IMAGE_FIELDS = ("image", "jpg", "jpeg", "png", "webp", "tif", "tiff", "dcm", "file_name", "path")
CAPTION_FIELDS = ("caption", "txt", "text", "report")

_Member = tuple[str, str, tuple[int, int]]
"""A file in a tar: key, extension, and where its bytes are."""
_Run = list[tuple[str, tuple[int, int]]]


class Shard(Protocol):
    """What a stream asks of a shard."""

    name: str

    def __len__(self) -> int:
        """The number of samples; opens the shard. Raises `ShardError`."""

    def locate(self, row: int) -> Any:
        """Where sample `row` is."""

    def read(self, place: Any) -> dict[str, Any]:
        """The fields of a sample; images as bytes, a path, or decoded. Raises `ShardError` for a row that is none."""

    def fields(self) -> list[str]:
        """Names of fields that samples have; not every sample need have all of them. Raises `ShardError`."""

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        """Some fields of some samples, without reading the others (the images, say). Absent fields are left out."""


class TarShard:
    """A webdataset tar on disk: samples are files that share their key, what stands before the first dot.

    They need not be neighbours, unless a key comes twice, as in tars that were joined: then each run of neighbours is
    a sample of its own, so that no image meets the caption of another one.

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
        members: list[_Member] = []
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
                        while members and members[-1][0] == key:
                            members.pop()
                        break
                    members.append((key, extension, (member.offset_data, member.size)))
            # A tar ends with blocks of zeros; tarfile takes one that stops short of them for whole.
            with open(path, "rb") as file:
                file.seek(-min(size, tarfile.BLOCKSIZE), 2)
                self.cut_off |= any(file.read())
        except FileNotFoundError:
            raise ShardError("missing shard", f"{path} is not there (any more).") from None
        except (tarfile.TarError, OSError) as error:
            raise ShardError("unreadable shard", f"{path} is no (uncompressed) tar: {error}") from error
        return _samples(members)

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

    def fields(self) -> list[str]:
        return list(dict.fromkeys(extension for _, members in self._index() for extension in members))

    def __getstate__(self) -> dict[str, Any]:
        # Readers in other processes are told places; they need no index of their own.
        return {"name": self.name, "cut_off": self.cut_off, "_places": None}


def _split_name(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", dot, extension.lower()


def _samples(members: Sequence[_Member]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """The files of a tar, in its order, as samples: key, and place by extension."""
    joined: dict[str, dict[str, tuple[int, int]]] = {}
    last, roles = None, set[str]()
    for key, extension, place in members:
        if key != last:
            last = key
            sample = joined.setdefault(key, {})
            # of what came before under the same key, with others in between
            roles = {_role(known) for known in sample}
        if extension in sample or (roles and _role(extension) in roles):
            break
        sample[extension] = place
    else:
        return list(joined.items())
    runs = groupby(members, lambda member: member[0])
    return [(key, dict(piece)) for key, run in runs for piece in _pieces([member[1:] for member in run])]


def _pieces(run: _Run) -> list[_Run]:
    """The samples in a run of files of one key: each ends where something comes that it has already."""
    by_extension = _split_at_repeats(run, lambda extension: extension)
    if len({frozenset(extension for extension, _ in piece) for piece in by_extension}) == 1:
        return by_extension
    # Where one has its image as jpg and the next as png, the second image begins the next one.
    return _split_at_repeats(run, _role)


def _split_at_repeats(run: _Run, label: Callable[[str], str]) -> list[_Run]:
    pieces: list[_Run] = []
    seen: set[str] = set()
    for extension, place in run:
        if not pieces or label(extension) in seen:
            pieces.append([])
            seen = set()
        pieces[-1].append((extension, place))
        seen.add(label(extension))
    return pieces


def _role(extension: str) -> str:
    return "image" if extension in IMAGE_FIELDS else "caption" if extension in CAPTION_FIELDS else extension


class ParquetShard:
    """A parquet file, read by row groups, since neighbours come from the same one."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._starts: list[int] | None = None
        # of the file when it was first read: a file that is written again is another one, though it has the same name
        self._state: tuple[int, int, int] | None = None

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
        if self._state is None:
            status = os.stat(self.name)
            self._state = status.st_mtime_ns, status.st_size, status.st_ino
        table = _row_group(self.name, group, self._state)
        return {name: column[0].as_py() for name, column in zip(*_row(table, row), strict=True)}

    def fields(self) -> list[str]:
        len(self)
        return pyarrow.parquet.ParquetFile(self.name).schema_arrow.names

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
        return {"name": self.name, "_starts": None, "_state": None}


@lru_cache(maxsize=16)
def _row_group(path: str, group: int, state: tuple[int, int, int]) -> Any:
    """Kept by process, not by shard: one for each of the sources that take turns, however many files they have.
    `state` tells a file from one that was written over it."""
    return _parquet_file(path, *state).read_row_group(group)


@lru_cache(maxsize=16)
def _parquet_file(path: str, *state: int) -> Any:
    """Kept open: in a random order of rows, reading the footer anew would take as long as reading the rows."""
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False)


def _row(table: Any, row: int) -> tuple[list[str], list[Any]]:
    piece = table.slice(row, 1)
    return piece.column_names, [piece.column(name) for name in piece.column_names]


class FaultyRow(dict):
    """A row of a table that cannot be used, without fields; `cause` says why, in a few words."""

    def __init__(self, cause: str) -> None:
        super().__init__()
        self.cause = cause


class TableShard:
    """Rows that are in memory: a CSV or JSONL file, or the files of a folder."""

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, row: int) -> Any:
        found = self.rows[row]
        return found if isinstance(found, FaultyRow) else dict(found)

    def read(self, place: Any) -> dict[str, Any]:
        if isinstance(place, FaultyRow):
            raise ShardError(place.cause, f"{self.name}: {place.cause}")
        return place

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        return [{name: self.rows[row][name] for name in names if name in self.rows[row]} for row in rows]

    def fields(self) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "rows": ()}


class DatasetShard:
    """A `datasets.Dataset`: memory-mapped Arrow; images, NIfTI volumes and the like as bytes or paths, not decoded."""

    def __init__(self, name: str, dataset: datasets.Dataset) -> None:
        self.name = name
        for column, feature in dataset.features.items():
            if getattr(feature, "decode", False):
                undecoded = copy(feature)
                undecoded.decode = False
                dataset = dataset.cast_column(column, undecoded)
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

    def fields(self) -> list[str]:
        return list(self.dataset.column_names)


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

    def fields(self) -> list[str]:
        return list(self.read(0))


def read_table(
    path: str,
    kind: Literal["csv", "jsonl"] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    keep_faults: bool = False,
) -> list[dict[str, Any]]:
    """The rows of a CSV or JSONL file.

    Args:
        path: of the file.
        kind: None: by the name, JSONL where it ends in `.jsonl` or `.json`.
        delimiter: between a CSV's cells; None: the one of comma, semicolon, tab and `|` that the first rows agree on.
        encoding: as Python names it; None: by the byte order mark, else UTF-8, else guessed from the bytes (the guess
            is logged).
        keep_faults: whether rows that cannot be used come as `FaultyRow`, or are an error.

    Raises:
        ShardError: if the file cannot be read; the message says in which line, where a line is at fault.
    """
    is_json = path.endswith((".jsonl", ".json")) if kind is None else kind == "jsonl"

    def rows(encoding: str) -> list[dict[str, Any]]:
        if is_json:
            return _json_rows(path, encoding, keep_faults)
        return _csv_rows(path, encoding, delimiter or _delimiter(path, encoding), keep_faults)

    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        if encoding is not None:
            return rows(encoding)
        try:
            return rows(_encoding_by_mark(path))
        except UnicodeDecodeError:
            guess = _guessed_encoding(path)
            logger.warning(
                "%s is no UTF-8; read as %s, which is a guess. State its `encoding` if letters look wrong.",
                path,
                guess,
            )
            return rows(guess)
    except FileNotFoundError:
        raise ShardError("missing shard", f"{path} is not there.") from None
    except UnicodeError as error:
        raise ShardError(
            "unreadable shard", f"{path} is no text in {encoding or 'any known encoding'}: {error}"
        ) from error
    except LookupError as error:
        raise ShardError("unreadable shard", f"{path}: {error} (`encoding` of a source)") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ShardError("unreadable shard", f"{path} is no table: {error}") from error
    finally:
        csv.field_size_limit(limit)


_LONGEST_FIELD = 2**24  # characters; csv's own limit, 2**17, is less than some reports have


def _json_rows(path: str, encoding: str, keep_faults: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with open(path, encoding=encoding, newline="") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem: Any = None if isinstance(row, dict) else f"{type(row).__name__} in place of an object"
            except (ValueError, RecursionError) as error:
                problem = error
            if problem is not None:
                if not keep_faults:
                    raise ValueError(f"line {number}: {problem}")
                row = FaultyRow("row that is no JSON object")
            rows.append(row)
    if rows and all(isinstance(row, FaultyRow) for row in rows):
        raise ValueError("none of its lines is a JSON object")
    return rows


def _csv_rows(path: str, encoding: str, delimiter: str, keep_faults: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with open(path, encoding=encoding, newline="") as file:
        last = ""

        def lines() -> Iterator[str]:
            nonlocal last
            for line in file:
                last = line
                yield line

        options: dict[str, Any] = {"delimiter": delimiter, "strict": True}
        reader = csv.reader(lines(), **options)
        header = next((row for row in reader if row), [])
        above = 0
        if len(header) > 1 and all(name.startswith(" ") for name in header[1:]):
            options["skipinitialspace"] = True
            above = reader.line_num
            reader = csv.reader(lines(), **options)
        header = [name.strip() for name in header]
        twice = [name for name, count in Counter(header).items() if count > 1 and name]
        if twice and keep_faults:
            raise ArgumentError(f'it has more than one column "{twice[0]}"; rename all but one')
        width = len(header)
        while True:
            begun = above + reader.line_num
            try:
                row = next(reader, None)
            except csv.Error as error:
                row = _leniently(error, last, options, begun + 1, above + reader.line_num)
                if row is None:
                    if not keep_faults:
                        raise
                    rows += [FaultyRow("row with a misplaced quotation mark")] * (above + reader.line_num - begun)
                    continue
            if row is None:
                return rows
            if len(row) == width:
                rows.append(dict(zip(header, row, strict=True)))
            elif len(row) < width:
                # A blank line is no row.
                if row:
                    rows.append(dict(zip_longest(header, row)))
            elif keep_faults and any(row[width:]):
                rows.append(FaultyRow("row with more cells than columns"))
            else:
                # The extra cells stand under None, as with `csv.DictReader`.
                extra: dict[Any, Any] = {None: row[width:]} if any(row[width:]) else {}
                rows.append(dict(zip(header, row, strict=False)) | extra)


def _leniently(error: csv.Error, line: str, options: dict[str, Any], first: int, last: int) -> list[str] | None:
    """A row whose quotation marks are not as they should be, if it is one line and so certainly no more than one row.

    Raises:
        csv.Error: where the rows after it cannot be told apart.
    """
    if "unexpected end" in str(error) or "field larger" in str(error):
        raise csv.Error(f"a quotation mark in line {first} or soon after is never closed ({error})") from error
    if first < last:
        error.args = (f"line {first} to {last}: {error}",)
        return None
    return next(csv.reader([line], **{**options, "strict": False}))


def _delimiter(path: str, encoding: str) -> str:
    """The delimiter by which most of the first rows have as many cells as the header; a comma if there is none.

    `csv.Sniffer` takes decimal commas and the words of reports for delimiters.
    """
    with open(path, encoding=encoding, newline="") as file:
        text = file.read(2**16)
    if len(text) == 2**16:
        text = text[: text.rfind("\n") + 1] or text

    def agreement(delimiter: str) -> tuple[float, int]:
        header, *others = [row for row in islice(csv.reader(io.StringIO(text), delimiter=delimiter), 50) if row] or [
            []
        ]
        if len(header) < 2:
            return -1.0, 0
        return sum(len(row) == len(header) for row in others) / max(1, len(others)), len(header)

    return max(",;\t|", key=agreement)


def _encoding_by_mark(path: str) -> str:
    """By the byte order mark that a file begins with, or the zero bytes of UTF-16 without one; UTF-8 otherwise."""
    with open(path, "rb") as file:
        start = file.read(2**10)
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    low, high = start[::2].count(0), start[1::2].count(0)
    if 4 * max(low, high) > len(start):
        return "utf-16-le" if high > low else "utf-16-be"
    return "utf-8-sig"


def _guessed_encoding(path: str) -> str:
    """What chardet takes the lines for that are not plain ASCII."""
    sample = bytearray()
    with open(path, "rb") as file:
        for line in file:
            if not line.isascii():
                sample += line
            if len(sample) > 2**16:
                break
    return chardet.detect(bytes(sample))["encoding"] or "cp1252"


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
