"""Tables: rows of CSV and JSONL files. Delimiter and encoding are detected where they are not specified."""

import codecs
import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import Any, Literal

import chardet

from medmoe_hf.data.file_patterns import looked_in
from medmoe_hf.errors import ArgumentError, ShardError

logger = logging.getLogger(__name__)


class FaultyRow(dict[str, Any]):
    """A row of a table that cannot be used; it has no fields.

    Attributes:
        cause: Kind of fault, in a few words.
    """

    def __init__(self, cause: str) -> None:
        super().__init__()
        self.cause = cause


class TableShard:
    """A shard of rows in memory: a CSV or JSONL file, or the files of a folder.

    Args:
        name: Path of the file or folder.
        rows: Its rows.
    """

    def __init__(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def locate(self, row: int) -> Any:
        found = self.rows[row]
        return found if isinstance(found, FaultyRow) else dict(found)

    def read(self, location: Any) -> dict[str, Any]:
        if isinstance(location, FaultyRow):
            raise ShardError(location.cause, f"{self.name}: {location.cause}")
        row: dict[str, Any] = location
        return row

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        found = [self.rows[row] for row in rows]
        return [
            row if isinstance(row, FaultyRow) else {name: row[name] for name in names if name in row} for row in found
        ]

    def fields(self) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "rows": ()}


def read_table(
    path: str,
    kind: Literal["csv", "jsonl"] | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
    keep_faulty: bool = False,
) -> list[dict[str, Any]]:
    """Reads a CSV or JSONL file.

    Args:
        path: Path of the file.
        kind: Format of the file; None to decide by the name, JSONL if it ends in `.jsonl` or `.json`.
        delimiter: Delimiter of a CSV; None to detect it: the one of comma, semicolon, tab and `|` by which most of the
            first rows have as many cells as the header.
        encoding: Python's name of the encoding; None to detect it by the byte order mark, or else to try UTF-8 and, if
            that fails, guess from the bytes (the guess is logged).
        keep_faulty: Whether rows that cannot be used are returned as `FaultyRow` or raise an error.

    Returns:
        One dictionary per row. Values of a CSV are strings; a row with fewer cells than columns has None for the rest.

    Raises:
        ShardError: If the file cannot be read; the message names the line if one is to blame.
    """
    is_json = path.endswith((".jsonl", ".json")) if kind is None else kind == "jsonl"

    def rows(encoding: str) -> list[dict[str, Any]]:
        if is_json:
            return _json_rows(path, encoding, keep_faulty)
        return _csv_rows(path, encoding, delimiter or _delimiter(path, encoding), keep_faulty)

    limit = csv.field_size_limit(_MAX_CELL_LENGTH)
    try:
        if encoding is not None:
            return rows(encoding)
        try:
            return rows(_encoding_by_mark(path))
        except UnicodeDecodeError:
            guess = _guessed_encoding(path)
            logger.warning(
                "%s is not UTF-8 and was read as %s, which is a guess. Specify its `encoding` if letters look wrong.",
                path,
                guess,
            )
            return rows(guess)
    except FileNotFoundError:
        raise ShardError("missing shard", f"{path} does not exist{looked_in(path)}.") from None
    except UnicodeError as error:
        raise ShardError(
            "unreadable shard", f"{path} is not text in {encoding or 'any known encoding'}: {error}"
        ) from error
    except LookupError as error:
        raise ShardError("unreadable shard", f"{path}: {error} (`encoding` of a source)") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ShardError("unreadable shard", f"{path} cannot be read as a table: {error}") from error
    finally:
        csv.field_size_limit(limit)


_MAX_CELL_LENGTH = 2**24  # characters; some reports exceed csv's default of 2**17


def _json_rows(path: str, encoding: str, keep_faulty: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with open(path, encoding=encoding, newline="") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                problem: Any = None if isinstance(row, dict) else f"{type(row).__name__} instead of an object"
            except (ValueError, RecursionError) as error:
                problem = error
            if problem is not None:
                if not keep_faulty:
                    raise ValueError(f"line {number}: {problem}")
                row = FaultyRow("row that is not a JSON object")
            rows.append(row)
    if rows and all(isinstance(row, FaultyRow) for row in rows):
        raise ValueError("none of its lines is a JSON object")
    return rows


def _csv_rows(path: str, encoding: str, delimiter: str, keep_faulty: bool) -> list[dict[str, Any]]:
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
        repeated = [name for name, count in Counter(header).items() if count > 1 and name]
        if repeated and keep_faulty:
            raise ArgumentError(f'it has more than one column "{repeated[0]}"; rename all but one')
        width = len(header)
        while True:
            begun = above + reader.line_num
            try:
                row = next(reader, None)
            except csv.Error as error:
                row = _parse_leniently(error, last, options, begun + 1, above + reader.line_num)
                if row is None:
                    if not keep_faulty:
                        raise
                    rows += [FaultyRow("row with a misplaced quotation mark")] * (above + reader.line_num - begun)
                    continue
            if row is None:
                return rows
            if len(row) == width:
                rows.append(dict(zip(header, row, strict=True)))
            elif len(row) < width:
                # Blank lines are skipped.
                if row:
                    rows.append(dict(zip_longest(header, row)))
            elif keep_faulty and any(row[width:]):
                rows.append(FaultyRow("row with more cells than columns"))
            else:
                # Extra cells have the key None, as with `csv.DictReader`.
                extra: dict[Any, Any] = {None: row[width:]} if any(row[width:]) else {}
                rows.append(dict(zip(header, row, strict=False)) | extra)


def _parse_leniently(error: csv.Error, line: str, options: dict[str, Any], first: int, last: int) -> list[str] | None:
    """Parses a row with misplaced quotation marks, if it is on one line and therefore certainly one row.

    Args:
        error: What the strict parser raised.
        line: Last line that was read.
        options: Options of the parser.
        first: Number of the first line of the row.
        last: Number of its last line.

    Returns:
        The cells, or None if the row spans several lines.

    Raises:
        csv.Error: If the end of the row cannot be determined.
    """
    if "unexpected end" in str(error) or "field larger" in str(error):
        raise csv.Error(f"a quotation mark in line {first} or soon after is never closed ({error})") from error
    if first < last:
        error.args = (f"line {first} to {last}: {error}",)
        return None
    return next(csv.reader([line], **{**options, "strict": False}))


def _delimiter(path: str, encoding: str) -> str:
    """Returns the delimiter by which most of the first rows have as many cells as the header; by default a comma.

    `csv.Sniffer` mistakes decimal commas and words of reports for delimiters.
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
    """Returns the encoding by the byte order mark, or by the zero bytes of UTF-16 without one; UTF-8 otherwise."""
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
    """Returns the encoding that chardet detects in the lines that are not ASCII."""
    sample = bytearray()
    with open(path, "rb") as file:
        for line in file:
            if not line.isascii():
                sample += line
            if len(sample) > 2**16:
                break
    return chardet.detect(bytes(sample))["encoding"] or "cp1252"
