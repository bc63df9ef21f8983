"""What is known of the rows of sources before they are read: their fields, and which of them are used."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from medmoe_hf.common.console import progress
from medmoe_hf.data.cells import cell_texts, selects
from medmoe_hf.data.parsing import fields_before_reading, modality_before_reading
from medmoe_hf.data.shards import Shard
from medmoe_hf.data.tables import FaultyRow
from medmoe_hf.errors import SourceError
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY

_BLOCK = 4096  # rows that are looked up at a time
_MAX_LISTED = 10  # values of a field that a message lists


class KnownRows:
    """Looks up fields of rows, without their images, when they are first needed, and keeps the results.

    Args:
        sources: Models of `medmoe_hf.data.sources`.
        shards: Shards of each source.
        names: Name of each source in messages.
        length: Returns the number of rows of a shard, given the indices of the source and the shard; 0 if it cannot be
            read.
        quiet: Whether to show no progress bars.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        shards: Sequence[Sequence[Shard]],
        names: Sequence[str],
        length: Callable[[int, int], int],
        quiet: bool,
    ) -> None:
        self.sources, self.shards, self.names = sources, shards, names
        self._length, self._quiet = length, quiet
        self._selected: dict[int, list[np.ndarray]] = {}
        self._modalities: dict[int, list[np.ndarray]] = {}

    def peek(self, source: int, fields: set[str], what: str) -> Iterator[tuple[int, range, list[dict[str, Any]]]]:
        """Yields some fields of all rows of a source.

        Args:
            source: Index of the source.
            fields: Names of the fields.
            what: What the fields tell, for the progress bar.

        Yields:
            The index of the shard, adjacent rows of it, and their fields. A row that cannot be read is a `FaultyRow`
            without fields.
        """
        shards, name = self.shards[source], f"{what} of {self.names[source]}"
        for number, shard in enumerate(progress(shards, name, "shard", delay=5, disable=self._quiet)):
            length = self._length(source, number)
            for start in range(0, length, _BLOCK):
                rows = range(start, min(start + _BLOCK, length))
                try:
                    peeked = shard.peek(rows, fields)
                except Exception:
                    peeked = [FaultyRow("unreadable row") for _ in rows]
                yield number, rows, peeked

    def rows(self, source: int, shard: int) -> Sequence[int]:
        """Returns the rows of a shard that the source uses.

        Args:
            source: Index of the source.
            shard: Index of the shard in the source.

        Returns:
            All of its rows, or those that `where` and `where_not` leave. A shard that cannot be read has none.

        Raises:
            SourceError: If `where` and `where_not` leave no row of the source.
        """
        selection = self.selection(source)
        if selection is None:
            return range(self._length(source, shard))
        rows: list[int] = selection[shard].tolist()
        return rows

    def selection(self, source: int) -> list[np.ndarray] | None:
        """Returns the rows of each shard that `where` and `where_not` leave; None for all.

        Raises:
            SourceError: If they leave no row of the source.
        """
        model = self.sources[source]
        fields = model.filter_fields
        if not fields:
            return None
        if source not in self._selected:
            selected: list[list[int]] = [[] for _ in self.shards[source]]
            values: dict[str, Counter[str]] = {name: Counter() for name in fields}
            for shard, rows, peeked in self.peek(source, set(fields), "rows"):
                for row, found in zip(rows, peeked, strict=True):
                    # A row that cannot be read is a fault of the source, not of `where`.
                    if isinstance(found, FaultyRow) or selects(found, model.where, model.where_not):
                        selected[shard].append(row)
                    else:
                        for name in fields:
                            values[name].update(cell_texts(found.get(name)))
            if not any(selected) and any(values.values()):
                raise SourceError(
                    f"{self.names[source]}: `where` and `where_not` leave none of the rows. "
                    + "; ".join(f"`{name}` has the values {_listed(counts)}" for name, counts in values.items())
                    + "."
                )
            self._selected[source] = [np.array(rows, dtype=np.int64) for rows in selected]
        return self._selected[source]

    def modalities(self, source: int) -> list[int]:
        """Returns the modality ids that used rows of a source have, as far as they are known; -100 for unknown."""
        labels, selection = self._labels(source), self.selection(source)
        if selection is not None:
            labels = [part[rows] for part, rows in zip(labels, selection, strict=True)]
        return sorted(set().union(*(np.unique(part).tolist() for part in labels)))

    def rows_of_modality(self, source: int, modality: int) -> list[np.ndarray]:
        """Returns the used rows of each shard that have a modality."""
        labels, selection = self._labels(source), self.selection(source)
        if selection is None:
            return [np.flatnonzero(part == modality) for part in labels]
        return [rows[part[rows] == modality] for part, rows in zip(labels, selection, strict=True)]

    def _labels(self, source: int) -> list[np.ndarray]:
        """Returns the modality id of each row, by shard, as far as it is known before the image is read."""
        if source not in self._modalities:
            model, fields = self.sources[source], fields_before_reading(self.sources[source])
            labels = [
                np.full(self._length(source, shard), UNKNOWN_MODALITY, dtype=np.int16)
                for shard in range(len(self.shards[source]))
            ]
            for shard, rows, peeked in self.peek(source, fields, "modalities"):
                labels[shard][rows.start : rows.stop] = [modality_before_reading(model, row) for row in peeked]
            self._modalities[source] = labels
        return self._modalities[source]

    # Numbers of rows over all sources

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first row of each shard, counted over all sources; then the number of all rows."""
        lengths = [
            self._length(source, shard) for source, shards in enumerate(self.shards) for shard in range(len(shards))
        ]
        return np.cumsum([0, *lengths], dtype=np.int64)

    @cached_property
    def first_shards(self) -> np.ndarray:
        """Number of the first shard of each source, counted over all sources; then the number of all shards."""
        return np.cumsum([0, *map(len, self.shards)], dtype=np.int64)

    def locate(self, numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yields the source, the shard and the row of each number of a row."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        sources = np.searchsorted(self.first_shards, shards, side="right") - 1
        columns = sources, shards - self.first_shards[sources], numbers - self.starts[shards]
        yield from zip(*(column.tolist() for column in columns), strict=True)


def _listed(counts: Counter[str]) -> str:
    """Returns the most frequent values, with their counts."""
    some = ", ".join(f"{value or '(empty)'} ({count})" for value, count in counts.most_common(_MAX_LISTED))
    return some + (", ..." if len(counts) > _MAX_LISTED else "")
