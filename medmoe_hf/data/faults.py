"""Faults: samples that could not be read, and why."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_MAX_WORST = 10  # files listed as the worst ones
_MAX_EXAMPLES = 3  # files listed per kind of fault
_MAX_FILES = 10_000  # files with a count of their own


class SampleError(Exception):
    """A sample cannot be used. Readers catch it and return a `Fault`.

    Attributes:
        cause: Kind of fault.
        reason: Details, if any.
        field: Field that causes it, if any.
    """

    def __init__(self, cause: str, reason: str = "", field: str | None = None) -> None:
        super().__init__(cause)
        self.cause, self.reason, self.field = cause, reason, field


@dataclass(frozen=True)
class Fault:
    """A sample, or a complete shard, that cannot be used.

    Attributes:
        cause: Kind of fault, in a few words; faults are counted by it.
        reason: What is wrong and how to fix it. Never quotes the sample's content.
        field: Field that causes the fault, if any.
        path: Image file. For samples inside a file: that file and the name of the sample.
        file: The file: the image, or the tar, parquet file or table that contains the sample.
        source: Index of the source.
        shard: Index of the shard in the source.
        row: Index of the row in the shard; -1 for a complete shard.
        position: Position in the epoch; -1 for a complete shard.
    """

    cause: str
    reason: str
    field: str | None
    path: str
    file: str
    source: int
    shard: int
    row: int
    position: int


@dataclass
class FaultLog:
    """Counts of the samples that were skipped, by source and cause.

    A sample is counted once, regardless of the number of epochs. A `SampleStream` keeps one as `faults`.

    Attributes:
        part: Part of the data that messages refer to: `training set`, `validation set`, or empty for all data.
        counts: Number of samples by (name of the source, cause).
        files: Number of samples by file: the image file or, for samples inside a file, that file.
        first: For each (name of the source, cause): the reason of the first fault, then the first few paths.
        good: Number of samples that were delivered, over all epochs.
        skipped: Number of failed reads, over all epochs.

    Example:
        >>> from medmoe_hf.data.faults import FaultLog
        >>> log = FaultLog()
        >>> log.add("chest", "unreadable image", "a.png", "a.png", sample=(0, 0, 7))
        >>> print(log)
        0 samples, 1 skipped
          chest: 1 unreadable image (a.png)
    """

    part: str = ""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    first: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    good: int = 0
    skipped: int = 0
    _known: dict[tuple[int, int, int], None] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """Number of different samples and shards that could not be used."""
        return len(self._known)

    def add(
        self, source: str, cause: str, path: str, file: str, sample: tuple[int, int, int], reason: str = ""
    ) -> None:
        """Counts a fault.

        Args:
            source: Name of the source.
            cause: Kind of fault.
            path: Path to show in reports.
            file: File to count it for in `files`.
            sample: Indices of the source, the shard and the row; row -1 for a complete shard.
            reason: What is wrong, if it says more than `cause`.
        """
        self.skipped += 1
        if sample in self._known:
            return
        self._known[sample] = None
        self.counts[source, cause] += 1
        if file in self.files or len(self.files) < _MAX_FILES:
            self.files[file] += 1
        first = self.first.setdefault((source, cause), [reason if reason != cause else ""])
        if len(first) <= _MAX_EXAMPLES and path not in first[1:]:
            first.append(path)

    def __contains__(self, sample: tuple[int, int, int]) -> bool:
        """Returns whether a sample (source, shard, row) has been counted; row -1 for a complete shard."""
        return sample in self._known

    def __str__(self) -> str:
        part = f"{self.part}: " if self.part else ""
        if not self.counts:
            return f"{part}{self.good} samples, none skipped"
        return "\n".join([f"{part}{self.good} samples, {self.bad} skipped", *self.lines()])

    def lines(self, named: bool = True) -> list[str]:
        """Returns one line per kind of fault: the number of samples, the first files and the first reason.

        Args:
            named: Whether lines start with the name of the source.
        """
        lines = []
        for (source, cause), count in self.counts.most_common():
            reason, *paths = self.first[source, cause]
            more = ", ..." if count > len(paths) else ""
            line = f"{count} {cause} ({', '.join(paths)}{more})" + (f": {reason}" if reason else "")
            lines.append(f"  {source}: {line}" if named else line)
        return lines

    def worst(self) -> str:
        """Returns the files with the most faults, and their numbers."""
        return ", ".join(f"{file} ({count})" for file, count in self.files.most_common(_MAX_WORST))

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts as plain values for JSON."""
        return {
            "counts": [[*key, count] for key, count in self.counts.items()],
            "files": list(self.files.items()),
            "first": [[*key, list(paths)] for key, paths in self.first.items()],
            "good": self.good,
            "skipped": self.skipped,
            "known": list(self._known),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts from `state_dict`."""
        self.counts = Counter({(source, cause): count for source, cause, count in state["counts"]})
        self.files = Counter(dict(state["files"]))
        self.first = {(source, cause): list(paths) for source, cause, paths in state["first"]}
        self.good, self.skipped = state["good"], state["skipped"]
        self._known = dict.fromkeys((source, shard, row) for source, shard, row in state["known"])
