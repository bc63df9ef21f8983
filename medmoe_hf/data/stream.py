"""One stream out of many sources: balanced, disjoint over readers, exactly resumable, and not stopped by broken files.

The order of an epoch is a sequence of places (source, shard, row), made of numbers alone in the main process: shards
are shuffled, their rows go through a shuffle buffer, sources are interleaved. Rank r of R reads positions r, r + R and
so on; its workers fetch what they are told, in that order. So the sequence depends on the seed and the epoch, not on
the number of ranks or workers, and a position is all that there is to resume.
"""

import hashlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from medmoe_hf.data.reading import (
    STRICT,
    Fault,
    Place,
    Reader,
    Sample,
    Split,
    fields_before_reading,
    known_modality,
    modality_before_reading,
    template_fields,
)
from medmoe_hf.data.shards import TarShard
from medmoe_hf.data.sources import PhantomSource
from medmoe_hf.errors import ShardError, StreamError
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY

_CHUNK = 8  # samples that a worker fetches at a time
_WORST = 10  # files that a report names
_FIRST = 3  # files that a report names for each kind of fault
_COUNTED_FILES = 10_000  # that faults are counted for
# Below this many samples a bad one proves nothing about the share of bad ones.
_ENOUGH = 100
_STATE_FORMAT = 2  # of `state_dict`; another order of samples is another format too
_BLOCK = 4096  # rows whose shards are looked up at a time
_UNSHUFFLED = 1000  # samples that count as the first ones without a shuffle
_LOOKED_AT = 20  # shards that `order_warnings` opens beside the first ones
_PEEKED = 1000  # rows that it compares, of the first ones and of the rest
_MOST_LABELS = 30  # more than these are no classes
_FAR = 0.25  # share of the first samples that would have to be others
_PARTS = {"train": "training part", "validation": "held-out part"}


@dataclass
class FaultLog:
    """What was skipped, and why. A sample counts once, however many epochs it is met in.

    Attributes:
        part: what the faults are of, in words: `training part`, `held-out part`; empty for all of the data.
        counts: samples by (source name, cause).
        files: samples by file: of images in files of their own these, else the tar, parquet file or dataset.
        first: for each (source name, cause) where the first few are, and the first one's reason.
        good: samples delivered, over all epochs.
        skipped: reads that failed, over all epochs.
    """

    part: str = ""
    counts: Counter = field(default_factory=Counter)
    files: Counter = field(default_factory=Counter)
    first: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    good: int = 0
    skipped: int = 0
    _known: dict[tuple[int, int, int], None] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """How many samples and shards could not be used."""
        return len(self._known)

    def add(
        self, source: str, cause: str, path: str, file: str, sample: tuple[int, int, int], reason: str = ""
    ) -> None:
        """Counts a fault.

        Args:
            source: its name.
            cause: the kind of fault.
            path: where it is, as reports show it.
            file: what it counts for in `files`.
            sample: numbers of source, shard and row; row -1 for a whole shard.
            reason: what is wrong, if that is more than `cause`.
        """
        self.skipped += 1
        if sample in self._known:
            return
        self._known[sample] = None
        self.counts[source, cause] += 1
        if file in self.files or len(self.files) < _COUNTED_FILES:
            self.files[file] += 1
        first = self.first.setdefault((source, cause), [reason if reason != cause else ""])
        if len(first) <= _FIRST and path not in first[1:]:
            first.append(path)

    def knows(self, sample: tuple[int, int, int]) -> bool:
        """Whether a sample (or, with row -1, a shard) has been counted."""
        return sample in self._known

    def __str__(self) -> str:
        part = f"{self.part}: " if self.part else ""
        if not self.counts:
            return f"{part}{self.good} samples, none skipped"
        return "\n".join([f"{part}{self.good} samples, {self.bad} skipped", *self.lines()])

    def lines(self, named: bool = True) -> list[str]:
        """A line for each kind of fault: how many, the first files, and the first one's reason.

        Args:
            named: whether the lines begin with the source.
        """
        lines = []
        for (source, cause), count in self.counts.most_common():
            reason, *paths = self.first[source, cause]
            more = ", ..." if count > len(paths) else ""
            line = f"{count} {cause} ({', '.join(paths)}{more})" + (f": {reason}" if reason else "")
            lines.append(f"  {source}: {line}" if named else line)
        return lines

    def worst(self) -> str:
        """The files with most faults."""
        return ", ".join(f"{file} ({count})" for file, count in self.files.most_common(_WORST))

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": [[*key, count] for key, count in self.counts.items()],
            "files": list(self.files.items()),
            "first": [[*key, list(paths)] for key, paths in self.first.items()],
            "good": self.good,
            "skipped": self.skipped,
            "known": list(self._known),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter({(source, cause): count for source, cause, count in state["counts"]})
        self.files = Counter(dict(state["files"]))
        self.first = {(source, cause): list(paths) for source, cause, paths in state["first"]}
        self.good, self.skipped = state["good"], state["skipped"]
        self._known = dict.fromkeys((source, shard, row) for source, shard, row in state["known"])


def source_names(sources: Sequence[Any]) -> list[str]:
    """What reports call each source: its `name`, else the path, pattern or Hub id of its data. No name comes twice."""
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


@dataclass(frozen=True)
class _Lane:
    """Rows that take turns with those of other lanes: a source's, or those of one modality in it."""

    source: int
    modality: int | None
    weight: float


class SampleStream:
    """Samples of many sources in one order; iterating gives what is left of the current epoch.

    Args:
        sources: models of `medmoe_hf.data.sources`.
        seed: of the order, and of what is random in captions.
        rank, world_size: this reader among the processes.
        mixing: how sources take turns: `weight` (in proportion to their weights), or `modality` (each modality equally
            often, sources of one modality by weight). The modality is the one that a pair turns out to have, by its
            source, a field or its caption; for that, all rows are looked at before the first sample, images left out.
            Pairs whose modality stays unknown, or is told by the image's header alone, count as one modality more.
        once: whether a source that has come to its end leaves the epoch (every sample exactly once), or begins again
            in a new order (the shares stay as they are, and the epoch never ends).
        shuffle: whether shards and rows are shuffled: the rows of tables, parquet files, folders and datasets all with
            one another; of tars the shards, and their rows within `buffer`.
        buffer: places that the rows of tars are shuffled within.
        split: which part of the data; None for all.
        max_bad_fraction: over this share of faulty samples the stream stops.
        num_workers: processes that read and decode; 0 reads here.
        prepare: called in the reader on each decoded image; must be picklable with workers.
        draft: side in pixels that images will be resized to: JPEGs are decoded at a reduced scale that is no smaller.
            None decodes them whole.
        part: what messages call these data; by default what `split` says.

    Attributes:
        faults: what was skipped so far.
        epoch: the current one.
        names: what reports call each source.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mixing: Literal["weight", "modality"] = "weight",
        once: bool = True,
        shuffle: bool = True,
        buffer: int = 10_000,
        split: Split | None = None,
        max_bad_fraction: float = 0.05,
        num_workers: int = 0,
        prepare: Callable[[Image.Image], Any] | None = None,
        draft: int | None = None,
        part: str | None = None,
    ) -> None:
        if not sources:
            raise StreamError("A stream needs at least one source.")
        if not 0 <= rank < world_size:
            raise StreamError(f"rank must lie in 0..{world_size - 1}, got {rank}.")
        self.sources = list(sources)
        self.names = source_names(self.sources)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.mixing, self.once, self.shuffle, self.buffer, self.split = mixing, once, shuffle, buffer, split
        self.max_bad_fraction, self.num_workers, self.prepare, self.draft = (
            max_bad_fraction,
            num_workers,
            prepare,
            draft,
        )
        self.shards = [source.shards() for source in self.sources]
        for source, shards in zip(self.sources, self.shards, strict=True):
            source.check(shards)
        if part is None:
            part = "" if split is None else _PARTS[split.part]
        self.faults = FaultLog(part)
        self.epoch = 0
        self._next = rank
        self._labels: dict[int, list[np.ndarray]] = {}

    # The order

    def _lanes(self) -> list[_Lane]:
        if self.mixing == "weight":
            return [_Lane(index, None, source.weight) for index, source in enumerate(self.sources)]
        lanes = []
        for index, source in enumerate(self.sources):
            known = known_modality(source)
            if known is not None:
                lanes.append(_Lane(index, known, source.weight))
                continue
            labels = self._modalities(index)
            found = sorted(set().union(*(np.unique(part).tolist() for part in labels)))
            lanes += [_Lane(index, modality, source.weight) for modality in found]
        return lanes

    def _weights(self, lanes: Sequence[_Lane]) -> list[float]:
        """How often each lane is drawn from, against the others, while these are left."""
        if self.mixing == "weight":
            return [lane.weight for lane in lanes]
        totals: dict[int | None, float] = dict.fromkeys((lane.modality for lane in lanes), 0.0)
        for lane in lanes:
            totals[lane.modality] += lane.weight
        return [lane.weight / totals[lane.modality] for lane in lanes]

    def _modalities(self, source: int) -> list[np.ndarray]:
        """Of each shard the modality of each row, so far as it is known before the image is read."""
        if source not in self._labels:
            model, fields = self.sources[source], fields_before_reading(self.sources[source])
            labels: list[np.ndarray] = []
            for shard in tqdm(
                self.shards[source],
                desc=f"modalities of {self.names[source]}",
                unit="shard",
                delay=5,
                leave=False,
                disable=self.rank > 0,
            ):
                found = np.full(self._length(source, len(labels)), UNKNOWN_MODALITY, dtype=np.int16)
                for start in range(0, len(found), _BLOCK):
                    rows = range(start, min(start + _BLOCK, len(found)))
                    try:
                        peeked = shard.peek(rows, fields)
                    except Exception:
                        continue  # the reader counts it
                    found[start : rows.stop] = [modality_before_reading(model, row) for row in peeked]
                labels.append(found)
            self._labels[source] = labels
        return self._labels[source]

    def _rows(self, number: int, lane: _Lane) -> Iterator[tuple[int, int]]:
        """(shard, row) of one lane, once over or for ever."""
        cycle = 0
        while True:
            some = False
            for row in self._pass(number, lane, cycle):
                some = True
                yield row
            if self.once or not some:
                return
            cycle += 1

    def _pass(self, number: int, lane: _Lane, cycle: int) -> Iterator[tuple[int, int]]:
        source, shards = lane.source, self.shards[lane.source]
        wanted = None
        if lane.modality is not None and known_modality(self.sources[source]) is None:
            wanted = [np.flatnonzero(part == lane.modality) for part in self._modalities(source)]
        seed = f"{self.seed} {self.epoch} {number} {cycle}"
        # Phantoms are drawn independently: a shuffle would change nothing but which ones are drawn.
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
        """All rows of all shards in one random order."""
        lengths = [
            self._length(source, shard) if wanted is None else len(wanted[shard])
            for shard in range(len(self.shards[source]))
        ]
        ends = np.cumsum(lengths)
        # 4 bytes a row; and the old generator, whose numbers no later version of numpy may change.
        order = np.arange(sum(lengths), dtype=np.uint32 if sum(lengths) < 2**32 else np.uint64)
        digest = np.frombuffer(hashlib.sha256(seed.encode()).digest(), dtype="<u4")
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
            cut = getattr(self.shards[source][shard], "cut_off", False)
            cause = "truncated shard" if cut else None
        except ShardError as error:
            length, cause, reason = 0, error.cause, str(error)
        except Exception as error:
            if not isinstance(error, OSError) and os.environ.get(STRICT):
                raise
            length, cause, reason = 0, "unreadable shard", str(error)
        # A shard is one fault for the rank that would have read its first sample, and none for the others.
        if cause is not None and shard % self.world_size == self.rank and not self.faults.knows((source, shard, -1)):
            name = self.shards[source][shard].name
            self.faulty(Fault(cause, reason or cause, None, name, name, source, shard, -1, -1))
        return length

    def _places(self) -> Iterator[Place]:
        """The epoch, from its beginning, for all ranks."""
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
            yield Place(position, lanes[number].source, *found)
            position += 1

    def _own_chunks(self) -> Iterator[list[Place]]:
        """What this rank still has to read, in chunks for its workers."""
        chunk: list[Place] = []
        for place in self._places():
            if place.position < self._next or place.position % self.world_size != self.rank:
                continue
            row = place.where
            chunk.append(place._replace(where=self.shards[place.source][place.shard].locate(row), row=row))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def __iter__(self) -> Iterator[Sample]:
        """What is left of the epoch; at its end the next one stands ready.

        Raises:
            StreamError: if too many samples are faulty, an epoch has none that is not, or a reading process dies.
        """
        reader = Reader(self.sources, self.shards, self.split, self.prepare, self.draft, (self.seed, self.epoch))
        if self.num_workers:
            # spawn-safe and ordered: the loader gives chunks back in the order they were asked for.
            chunks: Iterable = DataLoader(
                reader,
                batch_sampler=self._own_chunks(),
                collate_fn=identity_collate,
                num_workers=self.num_workers,
                worker_init_fn=_leave_signals_to_main,
                # Else the loader draws a seed from the global generator, which dropout draws from too: a resumed run,
                # or one with another number of readers, would drop other things.
                generator=torch.Generator(),
            )
        else:
            chunks = ([reader[place] for place in chunk] for chunk in self._own_chunks())
        before = self.faults.good
        for chunk in _while_readers_live(chunks):
            for item in chunk:
                if isinstance(item, dict):
                    self._next = item["position"] + self.world_size
                    self.faults.good += 1
                    yield item
                    continue
                self._next = item.position + self.world_size
                if isinstance(item, Fault):
                    self.faulty(item)
                    self._check_faults()
        self._check_faults(at_end=True)
        if self.faults.good == before and self.faults.bad:
            raise StreamError(f"No sample of the epoch could be read: {self.faults}")
        self.epoch += 1
        self._next = self.rank

    def faulty(self, fault: Fault) -> None:
        """Called for each sample that cannot be used, and once for each shard; counts it."""
        sample = (fault.source, fault.shard, fault.row)
        self.faults.add(self.names[fault.source], fault.cause, fault.path, fault.file, sample, fault.reason)

    def _check_faults(self, at_end: bool = False) -> None:
        seen = self.faults.good + self.faults.skipped
        if self.faults.skipped > self.max_bad_fraction * seen and (at_end or seen >= _ENOUGH):
            part = f"Of the {self.faults.part} " if self.faults.part else ""
            again = "" if self.faults.bad == self.faults.skipped else f" ({self.faults.bad} different ones)"
            worst = ""
            if self.faults.files and max(self.faults.files.values()) > 1:
                worst = f"Worst files: {self.faults.worst()}. "
            lines = "\n".join(self.faults.lines())
            raise StreamError(
                f"{part}{self.faults.skipped} of {seen} samples{again} are faulty, more than `max_bad_fraction` "
                f"{self.max_bad_fraction} allows:\n{lines}\n{worst}Mend them, or raise the limit; "
                "`medmoe data inspect --problems FILE.csv` lists them all."
            )

    # What a shuffle cannot mend

    def order_warnings(self) -> list[str]:
        """Where the first samples are far from all: in the modalities or labels that training meets there.

        Tars are shuffled within a buffer, and where they are sorted by class, training sees one class at a time. The
        same goes for any source without a shuffle. Rows of up to 20 shards of a source are looked at, images left out.

        Returns:
            A sentence for each source that is affected.
        """
        if self.mixing == "modality":
            return []
        return [text for source in range(len(self.sources)) for text in self._order_warnings(source)]

    def _order_warnings(self, source: int) -> Iterator[str]:
        model, shards = self.sources[source], self.shards[source]
        if isinstance(model, PhantomSource) or (self.shuffle and not any(isinstance(one, TarShard) for one in shards)):
            return
        window = self.buffer or _UNSHUFFLED
        order = list(range(len(shards)))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch} {source} 0").shuffle(order)  # as `_pass` does
        first: list[tuple[int, int]] = []
        while order and len(first) < window:
            shard = order.pop(0)
            first += [(shard, row) for row in range(self._length(source, shard))]
        rest = first[window:]
        del first[window:]
        later = order[:: max(1, len(order) // _LOOKED_AT)][:_LOOKED_AT]
        lengths = [self._length(source, shard) for shard in later]
        in_rest = len(rest) + (sum(lengths) / len(lengths) * len(order) if lengths else 0)
        rest += [(shard, row) for shard, length in zip(later, lengths, strict=True) for row in range(length)]
        if not first or not rest:
            return
        share_of_rest = in_rest / (len(first) + in_rest)
        fields = fields_before_reading(model)
        others = template_fields(model) | {model.label or "label"}
        seen = [self._peek(source, _evenly(rows, _PEEKED), fields | others) for rows in (first, rest)]
        kinds: dict[str, Callable[[dict[str, Any]], str]] = {f"`{key}`": _cell(key) for key in sorted(others)}
        if known_modality(model) is None:
            kinds = {"modality": lambda row: _modality_name(modality_before_reading(model, row)), **kinds}
        for what, kind in kinds.items():
            now, then = (Counter(map(kind, rows)) for rows in seen)
            if len(now | then) > _MOST_LABELS or not now or not then:
                continue
            shares = {
                value: (
                    now[value] / now.total(),
                    (1 - share_of_rest) * now[value] / now.total() + share_of_rest * then[value] / then.total(),
                )
                for value in now | then
            }
            if sum(abs(one - whole) for one, whole in shares.values()) / 2 > _FAR:
                value, (one, whole) = max(shares.items(), key=lambda item: abs(item[1][0] - item[1][1]))
                buffer = (
                    f"Tars are shuffled within `shuffle_buffer` {self.buffer} only: write them in random order, or "
                    "raise it."
                    if self.shuffle
                    else "Nothing is shuffled here."
                )
                yield (
                    f"{self.names[source]}: the first {len(first)} samples are not like the rest: {what} "
                    f"{value or 'empty'} is {one:.0%} of them and about {whole:.0%} of all. {buffer}"
                )
                return

    def _peek(self, source: int, places: Sequence[tuple[int, int]], fields: set[str]) -> list[dict[str, Any]]:
        by_shard: dict[int, list[int]] = {}
        for shard, row in places:
            by_shard.setdefault(shard, []).append(row)
        found = []
        for shard, rows in by_shard.items():
            try:
                found += self.shards[source][shard].peek(rows, fields)
            except Exception:
                continue  # the reader counts it
        return found

    # Resuming

    @cached_property
    def content(self) -> list[list[Any]]:
        """What tells the content of each source from another one: its `content_facts`."""
        return [source.content_facts() for source in self.sources]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the order depends on: the configuration, and the content of the sources."""
        facts = {
            "sources": [source.model_dump(mode="json") for source in self.sources],
            "content": self.content,
            "seed": self.seed,
            "world_size": self.world_size,
            "mixing": [self.mixing, self.once, self.shuffle, self.buffer],
            "split": None if self.split is None else [self.split.part, self.split.share, self.split.salt],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: everything up to the last sample that it was given is done. Plain, for JSON."""
        return {
            "format": _STATE_FORMAT,
            "fingerprint": self.fingerprint,
            "rank": self.rank,
            "epoch": self.epoch,
            "next": self._next,
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream with the same configuration was; the number of workers may be another.

        Raises:
            StreamError: for a state of another configuration, other data, another rank or another version.
        """
        if state.get("format") != _STATE_FORMAT:
            raise StreamError(
                "This state was saved by another version of medmoe_hf, which reads samples in another order. Resume "
                "with the version that it was saved with, or begin a new run."
            )
        if state["fingerprint"] != self.fingerprint or state["rank"] != self.rank:
            raise StreamError(
                "This state is of a stream with other sources, seed, mixing, split or number of processes (or of "
                "another rank), or the sources' files have changed since: its positions mean other samples here. "
                "Resume with the configuration and data that it was saved with, or begin a new run."
            )
        self.epoch, self._next = state["epoch"], state["next"]
        self.faults.load_state_dict(state["faults"])


def _while_readers_live(chunks: Iterable) -> Iterator[Any]:
    try:
        yield from chunks
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise StreamError(
            "A reading process ended unexpectedly: out of memory, most likely (of the machine, or of /dev/shm). Use "
            "fewer `num_workers`, or 0 to see what it dies of."
        ) from error


def _modality_name(modality: int) -> str:
    return "unknown" if modality == UNKNOWN_MODALITY else MODALITIES[modality]


def _cell(key: str) -> Callable[[dict[str, Any]], str]:
    def text(row: dict[str, Any]) -> str:
        value = row.get(key, "")
        return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)

    return text


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    return [items[index * len(items) // min(most, len(items))] for index in range(min(most, len(items)))]


def _leave_signals_to_main(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; a reader that dies of it would take the last step with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked reader has inherited the trainer's handler, and would not let itself be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def identity_collate(items: list[Any]) -> list[Any]:
    return items


def _shuffled(rows: Iterator[Any], size: int, rng: random.Random) -> Iterator[Any]:
    """A shuffle buffer: holds `size` items, gives a random one for each that comes."""
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
