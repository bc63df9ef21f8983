"""One stream of samples from many sources: mixed, shuffled, divided among processes, resumable, tolerant of faults.

The order of an epoch is a sequence of indices (source, shard, row), generated in the main process: shards are
shuffled, their rows pass through a shuffle buffer, and sources are interleaved. Rank r of R reads the positions r, r +
R and so on; its workers read what they are asked for, in that order. So the order depends on the seed and the epoch
only, not on the number of ranks or workers, and a position is all that is needed to resume.
"""

import hashlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from medmoe_hf.data.augmentation import Augmentation
from medmoe_hf.data.balancing import DEFAULT_POWER, BalancedRows, check_balance, powers_of
from medmoe_hf.data.faults import Fault, FaultLog
from medmoe_hf.data.groups import check_groups, find_groups
from medmoe_hf.data.known_rows import KnownRows
from medmoe_hf.data.parsing import fields_before_reading, modality_before_reading, modality_of_source
from medmoe_hf.data.reading import STRICT, Reader, Sample, SampleIndex
from medmoe_hf.data.shards import DatasetShard, TarShard
from medmoe_hf.data.sources import PhantomSource, source_names
from medmoe_hf.data.split import Split
from medmoe_hf.data.tables import FaultyRow, TableShard
from medmoe_hf.errors import ShardError, StreamError
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY

_CHUNK = 8  # samples that a worker reads at a time
_MIN_SEEN = 100  # samples below which the share of faulty ones is not judged
_STATE_FORMAT = 2  # of `state_dict`; increased when the order of samples changes
_BLOCK = 4096  # rows that are looked up at a time
_UNSHUFFLED_WINDOW = 1000  # samples compared with the rest where nothing is shuffled
_MAX_COMPARED_SHARDS = 20  # shards that `order_warnings` opens in addition to the first ones
_MAX_COMPARED_ROWS = 1000  # rows that it compares, of the first ones and of the rest
_MAX_CLASSES = 30  # fields with more values are not treated as classes
_MAX_SHIFT = 0.25  # total variation distance between the first samples and all, above which it warns
_PARTS = {"train": "training set", "validation": "validation set"}


@dataclass(frozen=True)
class _Lane:
    """Rows that are interleaved with those of other lanes: those of a source, or of one modality in a source."""

    source: int
    modality: int | None
    weight: float


class SampleStream:
    """Samples from many sources in one reproducible order. Iterating yields the rest of the current epoch.

    Args:
        sources: Models of `medmoe_hf.data.sources`.
        seed: Seed of the order and of random caption choices.
        rank: Index of this process, 0..`world_size` - 1.
        world_size: Number of processes; each reads a different part of every epoch.
        mixing: How sources are mixed: in proportion to their weights (`weight`), or so that all modalities are equally
            frequent and sources of the same modality are mixed by weight (`modality`). The modality is taken from the
            source, a field or the caption, which requires a pass over all rows (without images) before the first
            sample. Samples whose modality is unknown, or known only from the image's header, are treated as one more
            modality.
        balance: Keys by which samples are drawn in a balanced way, from the outermost level: `modality`, `source` (the
            field `source` of a row, or else the name of its source), `label`, or any field. Empty to draw each sample
            once. An epoch then has as many draws as there are rows, some of which are drawn several times and others
            not at all (see `medmoe_hf.data.balancing`); `mixing` and `once` do not apply, and the weights of sources
            multiply their shares. This requires a pass over all rows, without images, before the first sample.
        balance_power: How far shares are balanced, for all keys or by key: 0 (as in the data) to 1 (equal).
        once: Whether each sample occurs exactly once per epoch. If False, exhausted sources start again in a new
            order, so that the proportions are kept and the epoch never ends.
        shuffle: Whether to shuffle shards and rows. Rows of tables, parquet files, folders and datasets are fully
            shuffled; of tars, shards are shuffled and their rows within `buffer`.
        buffer: Size of the shuffle buffer for rows of tars.
        split: Part of the data to read; None for all.
        max_bad_fraction: Share of faulty samples, 0..1, above which the stream raises an error.
        num_workers: Number of processes that read and decode; 0 to read in this one.
        prepare: Called with each decoded image in the reading process. Must be picklable if there are workers.
        draft: Side in pixels to which images will be resized. JPEGs are decoded at the smallest scale that is not
            smaller. None decodes them at full resolution.
        augmentation: Modality to its augmentation, as `standard_augmentation` returns it; None for no augmentation.
        shorten: Called with each caption and a generator; returns the part of the caption to use. Must be picklable if
            there are workers. None for whole captions.
        fixed_captions: Whether captions are made of the first template that fits, and of the first synonyms, instead
            of random ones.
        part: Name of these data in messages; by default `training set` or `validation set` according to `split`.

    Attributes:
        faults: The samples that were skipped, a `FaultLog`.
        epoch: The current epoch, from 0.
        names: Name of each source in reports.
        known_rows: What is known of rows before they are read, such as those that `where` selects; a `KnownRows`.

    Raises:
        StreamError: If there are no sources, `rank` is out of range, or the samples cannot be balanced.
        SourceError: If a source has no samples, or lacks a column that it names, or no row that `where` selects; or if
            no source has a field of `balance`.

    Example:
        >>> from medmoe_hf.data.sources import PhantomSource
        >>> from medmoe_hf.data.stream import SampleStream
        >>> stream = SampleStream([PhantomSource(kind="phantom", image_size=64, length=4)])
        >>> len([sample["caption"] for sample in stream])
        4
        >>> state = stream.state_dict()  # save with a checkpoint; `load_state_dict` resumes
        >>> state["epoch"]
        1
    """

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mixing: Literal["weight", "modality"] = "weight",
        balance: Sequence[str] = (),
        balance_power: float | Mapping[str, float] = DEFAULT_POWER,
        once: bool = True,
        shuffle: bool = True,
        buffer: int = 10_000,
        split: Split | None = None,
        max_bad_fraction: float = 0.05,
        num_workers: int = 0,
        prepare: Callable[[Image.Image], Any] | None = None,
        draft: int | None = None,
        augmentation: Mapping[str, Augmentation] | None = None,
        shorten: Callable[[str, random.Random], str] | None = None,
        fixed_captions: bool = False,
        part: str | None = None,
    ) -> None:
        if not sources:
            raise StreamError("A stream requires at least one source.")
        if not 0 <= rank < world_size:
            raise StreamError(f"rank must be in 0..{world_size - 1}, got {rank}.")
        self.sources = list(sources)
        self.names = source_names(self.sources)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.mixing, self.once, self.shuffle, self.buffer, self.split = mixing, once, shuffle, buffer, split
        self.max_bad_fraction, self.num_workers = max_bad_fraction, num_workers
        self.balance, self.balance_power = tuple(balance), balance_power
        self.prepare, self.draft, self.augmentation = prepare, draft, augmentation
        self.shorten, self.fixed_captions = shorten, fixed_captions
        self.shards = [source.shards() for source in self.sources]
        for source, shards in zip(self.sources, self.shards, strict=True):
            source.check(shards)
        if part is None:
            part = "" if split is None else _PARTS[split.part]
        self.faults = FaultLog(part)
        self.epoch = 0
        self._next = rank
        self.known_rows = KnownRows(self.sources, self.shards, self.names, self._length, quiet=rank > 0)
        if self.balance:
            check_balance(self.balance, balance_power, mixing, shuffle)
            check_groups(self.known_rows, self.balance)
        for index, found in enumerate(self.shards):
            # Tars and parquet files, of which there may be many, are opened when they are needed.
            if all(isinstance(shard, (TableShard, DatasetShard)) for shard in found):
                self.known_rows.selection(index)

    # Order

    def _lanes(self) -> list[_Lane]:
        if self.mixing == "weight":
            return [_Lane(index, None, source.weight) for index, source in enumerate(self.sources)]
        lanes = []
        for index, source in enumerate(self.sources):
            known = modality_of_source(source)
            if known is not None:
                lanes.append(_Lane(index, known, source.weight))
                continue
            lanes += [_Lane(index, modality, source.weight) for modality in self.known_rows.modalities(index)]
        return lanes

    def _weights(self, lanes: Sequence[_Lane]) -> list[float]:
        """Returns the relative frequency of each lane while only these have rows left."""
        if self.mixing == "weight":
            return [lane.weight for lane in lanes]
        totals: dict[int | None, float] = dict.fromkeys((lane.modality for lane in lanes), 0.0)
        for lane in lanes:
            totals[lane.modality] += lane.weight
        return [lane.weight / totals[lane.modality] for lane in lanes]

    def _rows(self, number: int, lane: _Lane) -> Iterator[tuple[int, int]]:
        """Yields (shard, row) of one lane, once or endlessly."""
        cycle = 0
        while True:
            empty = True
            for row in self._pass(number, lane, cycle):
                empty = False
                yield row
            if self.once or empty:
                return
            cycle += 1

    def _pass(self, number: int, lane: _Lane, cycle: int) -> Iterator[tuple[int, int]]:
        source, shards = lane.source, self.shards[lane.source]
        wanted = self.known_rows.selection(source)
        if lane.modality is not None and modality_of_source(self.sources[source]) is None:
            wanted = self.known_rows.rows_of_modality(source, lane.modality)
        seed = f"{self.seed} {self.epoch} {number} {cycle}"
        # Phantoms are independent of one another, so that shuffling them has no effect.
        shuffled = self.shuffle and not isinstance(self.sources[source], PhantomSource)
        if shuffled and not any(isinstance(shard, TarShard) for shard in shards):
            yield from self._permuted(source, wanted, seed)
            return
        rng = random.Random(seed)
        order = list(range(len(shards)))
        if shuffled:
            rng.shuffle(order)
        rows = (
            (shard, row)
            for shard in order
            for row in (range(self._length(source, shard)) if wanted is None else wanted[shard].tolist())
        )
        yield from _shuffled(rows, self.buffer, rng) if shuffled else rows

    def _permuted(self, source: int, wanted: list[np.ndarray] | None, seed: str) -> Iterator[tuple[int, int]]:
        """Yields all rows of all shards in one random order."""
        lengths = [
            self._length(source, shard) if wanted is None else len(wanted[shard])
            for shard in range(len(self.shards[source]))
        ]
        ends = np.cumsum(lengths)
        order = np.arange(sum(lengths), dtype=np.uint32 if sum(lengths) < 2**32 else np.uint64)  # 4 bytes per row
        digest = np.frombuffer(hashlib.sha256(seed.encode()).digest(), dtype="<u4")
        # The legacy generator, whose numbers are the same in all versions of numpy.
        np.random.RandomState(digest.tolist()).shuffle(order)
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK].astype(np.int64)
            shards = np.searchsorted(ends, block, side="right")
            rows = (block - (ends[shards] - np.take(lengths, shards))).tolist()
            for shard, row in zip(shards.tolist(), rows, strict=True):
                yield shard, (row if wanted is None else int(wanted[shard][row]))

    def _length(self, source: int, shard: int) -> int:
        reason = ""
        try:
            length = len(self.shards[source][shard])
            truncated = getattr(self.shards[source][shard], "truncated", False)
            cause = "truncated shard" if truncated else None
        except ShardError as error:
            length, cause, reason = 0, error.cause, str(error)
        except Exception as error:
            if not isinstance(error, OSError) and os.environ.get(STRICT):
                raise
            length, cause, reason = 0, "unreadable shard", str(error)
        # A faulty shard is counted once, by one of the ranks.
        if cause is not None and shard % self.world_size == self.rank and (source, shard, -1) not in self.faults:
            name = self.shards[source][shard].name
            self.record_fault(Fault(cause, reason or cause, None, name, name, source, shard, -1, -1))
        return length

    def _sample_order(self) -> Iterator[SampleIndex]:
        """Yields the complete epoch, for all ranks."""
        if self.balance:
            yield from self._balanced_order()
            return
        rng = random.Random(f"{self.seed} {self.epoch} mix")
        lanes = self._lanes()
        rows = [self._rows(number, lane) for number, lane in enumerate(lanes)]
        alive = list(range(len(lanes)))
        weights = self._weights(lanes)
        position = 0
        while alive:
            number = alive[0] if len(alive) == 1 else rng.choices(alive, weights)[0]
            found = next(rows[number], None)
            if found is None:
                alive.remove(number)
                weights = self._weights([lanes[index] for index in alive])
                continue
            yield SampleIndex(position, lanes[number].source, *found)
            position += 1

    # Balance

    @cached_property
    def balanced_rows(self) -> BalancedRows:
        """The groups of `balance`, with their rows and shares. The first use reads fields of all rows."""
        return find_groups(self.known_rows, self.balance, self.balance_power, self.split, self._record_faulty_row)

    def _record_faulty_row(self, row: FaultyRow, source: int, shard: int, number: int) -> None:
        """Counts a row that is in no group, and therefore never drawn."""
        if shard % self.world_size == self.rank and (source, shard, number) not in self.faults:
            name = self.shards[source][shard].name
            self.record_fault(Fault(row.cause, row.cause, None, name, name, source, shard, number, -1))

    def _balanced_order(self) -> Iterator[SampleIndex]:
        order = self.balanced_rows.order(self.seed, self.epoch)
        for start in range(0, len(order), _BLOCK):
            found = self.known_rows.locate(order[start : start + _BLOCK])
            for position, location in enumerate(found, start):
                yield SampleIndex(position, *location)

    def _own_chunks(self) -> Iterator[list[SampleIndex]]:
        """Yields what this rank has yet to read, in chunks for its workers."""
        chunk: list[SampleIndex] = []
        for index in self._sample_order():
            if index.position < self._next or index.position % self.world_size != self.rank:
                continue
            location = self.shards[index.source][index.shard].locate(index.row)
            chunk.append(index._replace(location=location))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def reader(self) -> Reader:
        """Reads samples of the current epoch by index, in this process or another."""
        return Reader(
            self.sources,
            self.shards,
            self.split,
            self.prepare,
            self.draft,
            (self.seed, self.epoch),
            self.augmentation,
            self.shorten,
            self.fixed_captions,
        )

    def __iter__(self) -> Iterator[Sample]:
        """Yields the rest of the epoch, as dictionaries (see `medmoe_hf.data.reading.Sample`), and moves to the next.

        Raises:
            StreamError: If too many samples are faulty, an epoch has no readable sample, or a reading process dies.
        """
        reader = self.reader()
        if self.num_workers:
            # The loader returns chunks in the order in which they were requested.
            chunks: Iterable[Any] = DataLoader(
                reader,
                batch_sampler=self._own_chunks(),
                collate_fn=identity_collate,
                num_workers=self.num_workers,
                worker_init_fn=_ignore_interrupts,
                # Otherwise the loader would advance the global generator, and with it change the dropout masks of a
                # resumed run or of one with a different number of workers.
                generator=torch.Generator(),
            )
        else:
            chunks = ([reader[index] for index in chunk] for chunk in self._own_chunks())
        # Of a resumed epoch, only faulty samples may be left.
        complete, before = self._next == self.rank, self.faults.good
        for chunk in _detect_dead_workers(chunks):
            for item in chunk:
                if isinstance(item, dict):
                    self._next = item["position"] + self.world_size
                    self.faults.good += 1
                    yield item
                    continue
                self._next = item.position + self.world_size
                if isinstance(item, Fault):
                    self.record_fault(item)
                    self._check_faults()
        self._check_faults(at_end=True)
        if complete and self.faults.good == before and self.faults.bad:
            raise StreamError(f"No sample of the epoch could be read: {self.faults}")
        self.epoch += 1
        self._next = self.rank

    def record_fault(self, fault: Fault) -> None:
        """Counts a sample or a shard that cannot be used. Subclasses may extend it."""
        sample = (fault.source, fault.shard, fault.row)
        self.faults.add(self.names[fault.source], fault.cause, fault.path, fault.file, sample, fault.reason)

    def _check_faults(self, at_end: bool = False) -> None:
        seen = self.faults.good + self.faults.skipped
        if self.faults.skipped > self.max_bad_fraction * seen and (at_end or seen >= _MIN_SEEN):
            part = f"Of the {self.faults.part} " if self.faults.part else ""
            different = "" if self.faults.bad == self.faults.skipped else f" ({self.faults.bad} different ones)"
            worst = ""
            if self.faults.files and max(self.faults.files.values()) > 1:
                worst = f"Worst files: {self.faults.worst()}. "
            lines = "\n".join(self.faults.lines())
            raise StreamError(
                f"{part}{self.faults.skipped} of {seen} samples{different} are faulty, more than `max_bad_fraction` "
                f"{self.max_bad_fraction} allows:\n{lines}\n{worst}Fix them, or raise the limit; "
                "`medmoe data inspect --problems FILE.csv` lists them all."
            )

    # Insufficient shuffling

    def order_warnings(self) -> list[str]:
        """Warns of sources whose first samples are not representative, by modality or label.

        Tars are shuffled within a buffer. If they are sorted by class, training sees one class at a time. The same
        holds for any source that is not shuffled. Rows of up to 20 shards per source are compared, without images.

        Returns:
            One sentence per affected source.
        """
        if self.mixing == "modality" or self.balance:
            return []
        return [text for source in range(len(self.sources)) for text in self._order_warnings(source)]

    def _order_warnings(self, source: int) -> Iterator[str]:
        model, shards = self.sources[source], self.shards[source]
        if isinstance(model, PhantomSource) or (self.shuffle and not any(isinstance(one, TarShard) for one in shards)):
            return
        window = self.buffer or _UNSHUFFLED_WINDOW
        order = list(range(len(shards)))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch} {source} 0").shuffle(order)  # as in `_pass`
        first: list[tuple[int, int]] = []
        while order and len(first) < window:
            shard = order.pop(0)
            first += [(shard, row) for row in self.known_rows.rows(source, shard)]
        rest = first[window:]
        del first[window:]
        later = order[:: max(1, len(order) // _MAX_COMPARED_SHARDS)][:_MAX_COMPARED_SHARDS]
        lengths = [len(self.known_rows.rows(source, shard)) for shard in later]
        in_rest = len(rest) + (sum(lengths) / len(lengths) * len(order) if lengths else 0)
        rest += [(shard, row) for shard in later for row in self.known_rows.rows(source, shard)]
        if not first or not rest:
            return
        share_of_rest = in_rest / (len(first) + in_rest)
        fields = fields_before_reading(model)
        others = {*model.caption_fields, model.label or "label"}
        seen = [self._peek(source, _evenly(rows, _MAX_COMPARED_ROWS), fields | others) for rows in (first, rest)]
        kinds: dict[str, Callable[[dict[str, Any]], str]] = {f"`{key}`": _cell(key) for key in sorted(others)}
        if modality_of_source(model) is None:
            kinds = {"modality": lambda row: _modality_name(modality_before_reading(model, row)), **kinds}
        for what, kind in kinds.items():
            now, then = (Counter(map(kind, rows)) for rows in seen)
            if len(now | then) > _MAX_CLASSES or not now or not then:
                continue
            shares = {
                value: (
                    now[value] / now.total(),
                    (1 - share_of_rest) * now[value] / now.total() + share_of_rest * then[value] / then.total(),
                )
                for value in now | then
            }
            if sum(abs(first_share - share) for first_share, share in shares.values()) / 2 > _MAX_SHIFT:
                value, (first_share, share) = max(shares.items(), key=lambda item: abs(item[1][0] - item[1][1]))
                buffer = (
                    f"Tars are shuffled only within `shuffle_buffer` {self.buffer}: write them in random order, or "
                    "raise it."
                    if self.shuffle
                    else "The samples are not shuffled."
                )
                yield (
                    f"{self.names[source]}: the first {len(first)} samples are not like the rest: {what} "
                    f"{value or 'empty'} is {first_share:.0%} of them and about {share:.0%} of all. {buffer}"
                )
                return

    def _peek(self, source: int, rows: Sequence[tuple[int, int]], fields: set[str]) -> list[dict[str, Any]]:
        by_shard: dict[int, list[int]] = {}
        for shard, row in rows:
            by_shard.setdefault(shard, []).append(row)
        found: list[dict[str, Any]] = []
        for shard, in_shard in by_shard.items():
            try:
                found += self.shards[source][shard].peek(in_shard, fields)
            except Exception:
                continue  # counted as a fault when it is read
        return found

    # Resuming

    @cached_property
    def content(self) -> list[list[Any]]:
        """The `content_checksums` of each source: names, sizes and checksums of its files."""
        return [source.content_checksums() for source in self.sources]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on: the configuration and the content of the sources."""
        facts = {
            "sources": [source.identity() for source in self.sources],
            "content": self.content,
            "seed": self.seed,
            "world_size": self.world_size,
            "mixing": [self.mixing, self.once, self.shuffle, self.buffer],
            # The empty string keeps the states of earlier versions valid.
            "split": None if self.split is None else [self.split.part, self.split.share, ""],
        }
        if self.balance:
            facts["balance"] = [list(self.balance), powers_of(self.balance, self.balance_power)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of this rank, after the last sample that was yielded, as plain values for JSON."""
        return {
            "format": _STATE_FORMAT,
            "fingerprint": self.fingerprint,
            "rank": self.rank,
            "epoch": self.epoch,
            "next": self._next,
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes at the position of a stream with the same configuration. The number of workers may differ.

        Args:
            state: From `state_dict` of the same rank.

        Raises:
            StreamError: If the state is from a different configuration, data, rank or incompatible version.
        """
        if state.get("format") != _STATE_FORMAT:
            raise StreamError(
                "This state was saved by another version of medmoe_hf, which reads samples in a different order. "
                "Resume with that version, or start a new run."
            )
        if state["fingerprint"] != self.fingerprint or state["rank"] != self.rank:
            raise StreamError(
                "The state is of a stream with different sources, seed, mixing, split, rank or number of processes, "
                "or the files of the sources have changed, so that its positions refer to different samples. Resume "
                "with the configuration and data that it was saved with, or start a new run."
            )
        self.epoch, self._next = state["epoch"], state["next"]
        self.faults.load_state_dict(state["faults"])


def _detect_dead_workers(chunks: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from chunks
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StreamError(
            "A reading process died unexpectedly, most likely out of memory (RAM or /dev/shm). Use fewer "
            "`num_workers`, or 0 to see the error."
        ) from error


def _modality_name(modality: int) -> str:
    return "unknown" if modality == UNKNOWN_MODALITY else MODALITIES[modality]


def _cell(key: str) -> Callable[[dict[str, Any]], str]:
    def text(row: dict[str, Any]) -> str:
        value = row.get(key, "")
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)

    return text


def _evenly(items: Sequence[Any], limit: int) -> list[Any]:
    """Returns at most `limit` evenly spaced items."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _ignore_interrupts(_: int) -> None:
    """Ignores Ctrl-C, which reaches every process of a terminal: the main process finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked worker inherits the trainer's handler, which would keep it from being terminated.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def identity_collate(items: list[Any]) -> list[Any]:
    return items


def _shuffled(rows: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """Shuffles with a buffer: holds `size` items, and yields a random one for each new one."""
    held: list[Any] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
            continue
        index = int(rng.random() * size)
        held[index], row = row, held[index]
        yield row
    rng.shuffle(held)
    yield from held
