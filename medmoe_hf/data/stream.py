"""One stream out of many sources: balanced, disjoint over readers, exactly resumable, and not stopped by broken files.

The order of an epoch is a sequence of places (source, shard, row), made of numbers alone in the main process: shards
are shuffled, their rows go through a shuffle buffer, sources are interleaved. Rank r of R reads positions r, r + R and
so on; its workers fetch what they are told, in that order. So the sequence depends on the seed and the epoch, not on
the number of ranks or workers, and a position is all that there is to resume.
"""

import hashlib
import io
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from medmoe_hf.data.captions import RULE_MODALITY, CaptionError, apply_rule, detect_rule
from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.shards import Shard, ShardError, TarShard
from medmoe_hf.data.sources import CAPTION_FIELDS, IMAGE_FIELDS, PhantomSource, field_of
from medmoe_hf.model.medical_images_medmoe import is_medical_image, read_medical_image
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY, modality_id

MAX_PIXELS = 100_000_000
"""An image with more pixels is taken for a decompression bomb: skipped, and counted."""

_CHUNK = 8  # samples that a worker fetches at a time
_WORST = 10  # files that a report names
# Below this many samples a bad one proves nothing about the share of bad ones.
_ENOUGH = 100


class StreamError(RuntimeError):
    """The stream cannot go on, or cannot be resumed; the message says why and what to do."""


class Place(NamedTuple):
    """Where a sample of the stream is: its position in the epoch, its source and shard, and the shard's own words."""

    position: int
    source: int
    shard: int
    where: Any


Sample = dict[str, Any]
"""One training pair: `image` (a PIL image, or what the stream's `prepare` made of it), `caption`, `modality` (id, or
-100), `source` (its number), `key` (what it is called there) and `position` (in the epoch)."""


@dataclass
class Fault:
    """A sample that could not be had. `cause` is one of a few words; `file` says where, never what was in it."""

    cause: str
    source: int
    file: str
    position: int


@dataclass
class _LeftOut:
    """A sample that belongs to the other part of the split."""

    position: int


@dataclass
class FaultLog:
    """What was skipped, and why.

    Attributes:
        counts: how many by (source name, cause).
        files: how many by file.
        good: samples delivered.
    """

    counts: Counter = field(default_factory=Counter)
    files: Counter = field(default_factory=Counter)
    good: int = 0

    @property
    def bad(self) -> int:
        return sum(self.counts.values())

    def add(self, source: str, cause: str, file: str) -> None:
        self.counts[source, cause] += 1
        self.files[file] += 1

    def __str__(self) -> str:
        if not self.counts:
            return f"{self.good} samples, none skipped"
        causes = ", ".join(f"{source}: {count} {cause}" for (source, cause), count in self.counts.most_common())
        return f"{self.good} samples, {self.bad} skipped ({causes})"

    def worst(self) -> str:
        """The files with most faults."""
        return ", ".join(f"{file} ({count})" for file, count in self.files.most_common(_WORST))

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": [[*key, count] for key, count in self.counts.items()],
            "files": list(self.files.items()),
            "good": self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter({(source, cause): count for source, cause, count in state["counts"]})
        self.files = Counter(dict(state["files"]))
        self.good = state["good"]


class _Problem(Exception):
    """A sample's fault on its way to becoming a `Fault`."""


class _Reader(Dataset):
    """Fetches samples by place; what workers run."""

    def __init__(
        self,
        sources: Sequence[Any],
        shards: list[list[Shard]],
        split: "Split | None",
        prepare: Callable[[Image.Image], Any] | None,
        draft: int | None,
        seed: tuple[int, int],
    ) -> None:
        self.sources, self.shards, self.split = sources, shards, split
        self.prepare, self.draft, self.seed = prepare, draft, seed

    def __getitem__(self, place: Place) -> Sample | Fault | _LeftOut:
        source, shard = self.sources[place.source], self.shards[place.source][place.shard]
        try:
            return self._read(source, shard, place)
        except FileNotFoundError as error:
            cause = "missing image" if str(error.filename) != shard.name else "missing shard"
        except CaptionError:
            cause = "caption of another layout"
        except _Problem as error:
            cause = str(error)
        except OSError:
            cause = "truncated shard" if isinstance(shard, TarShard) else "unreadable image"
        return Fault(cause, place.source, shard.name, place.position)

    def _read(self, source: Any, shard: Shard, place: Place) -> Sample | _LeftOut:
        row = shard.read(place.where)
        key = field_of(row, source.image, IMAGE_FIELDS)
        if key is None or row[key] is None or row[key] == "":
            raise _Problem("no image field" if key is None else "no image")
        content = row[key]
        if isinstance(content, dict):
            content = content["bytes"] if content.get("bytes") is not None else content["path"]
        if isinstance(content, str) and not isinstance(source, PhantomSource):
            content = Path(content).read_bytes() if not is_medical_image(content) else content
        if self.split is not None and not self.split.wants(row, source.subject, content):
            return _LeftOut(place.position)
        # A random choice belongs to a position of an epoch, whoever reads it.
        rng = random.Random(f"{self.seed} {place.position}")
        rule, caption = self._caption(source, row, rng)
        image, header = self._decode(content, source.window)
        modality = self._modality(source, row, rule, caption, header)
        try:
            prepared = image if self.prepare is None else self.prepare(image)
        except ValueError:
            raise _Problem("unusable image") from None
        return {
            "image": prepared,
            "caption": caption,
            "modality": modality,
            "source": place.source,
            "key": _key(row, shard),
            "position": place.position,
        }

    def _caption(self, source: Any, row: dict[str, Any], rng: random.Random) -> tuple[str, str]:
        if source.caption_template is not None:
            try:
                return "plain", source.caption_template.format(**row)
            except KeyError as error:
                raise _Problem(f"no field {error.args[0]}") from None
        key = field_of(row, source.caption, CAPTION_FIELDS)
        if key is None:
            raise _Problem("no caption field")
        text = row[key]
        if isinstance(text, (bytes, bytearray)):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                raise _Problem("caption is no UTF-8") from None
        if not text or not text.strip():
            raise _Problem("empty caption")
        rule = detect_rule(text) if source.caption_rule == "auto" else source.caption_rule
        return rule, apply_rule(rule, text, rng)

    def _decode(self, content: Any, window: Any) -> tuple[Image.Image, str | None]:
        if isinstance(content, Image.Image):
            return content, None
        if is_medical_image(content):
            try:
                medical = read_medical_image(content, window=window)
            except (ValueError, OSError):
                raise _Problem("unreadable DICOM or NIfTI") from None
            pixels = medical.pixels
            if pixels.dtype != np.uint8:
                # The window is chosen by now: 256 grey levels of it are what a screen shows.
                pixels = (255 * pixels + 0.5).astype(np.uint8)
            return Image.fromarray(pixels), medical.modality
        try:
            # By content: shards hold PNG bytes under names that end in jpg.
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise _Problem("too many pixels")
            if self.draft is not None:
                # Lets the JPEG decoder leave out resolution that a resize would throw away.
                image.draft(None, (self.draft, self.draft))
            image.load()
        except Image.DecompressionBombError:
            raise _Problem("too many pixels") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, TypeError):
            raise _Problem("unreadable image") from None
        return image, None

    @staticmethod
    def _modality(source: Any, row: dict[str, Any], rule: str, caption: str, header: str | None) -> int:
        said = source.modality
        if said is None:
            said = RULE_MODALITY.get(rule)
            key = field_of(row, None, ("modality", "cls")) if said is None else None
            said = "unknown" if said is None and key is None else said or f"field:{key}"
        if said == "unknown":
            return UNKNOWN_MODALITY
        if said == "caption":
            name: Any = modality_from_text(caption)
        elif said == "dicom":
            name = header
        elif said.startswith("field:"):
            key = said.removeprefix("field:")
            if key not in row:
                raise _Problem(f"no field {key}")
            name = row[key]
        else:
            name = said
        try:
            return modality_id(name)
        except ValueError:
            raise _Problem("wrong label") from None


@dataclass(frozen=True)
class Split:
    """Which part of the data a stream reads.

    Attributes:
        part: `train` or `validation`.
        share: of the subjects (or images) that validation gets, 0..1.
        salt: another one gives another split.
    """

    part: Literal["train", "validation"]
    share: float
    salt: str = ""

    def wants(self, row: dict[str, Any], subject: str | None, content: Any) -> bool:
        """Whether a sample belongs to this part: by its subject where there is one, else by its image's bytes, so that
        an image that stands in several samples is on one side only."""
        if subject is not None:
            if subject not in row:
                raise _Problem(f"no field {subject}")
            key = str(row[subject]).encode()
        elif isinstance(content, Image.Image):
            key = content.tobytes()
        else:
            key = content if isinstance(content, bytes) else Path(content).read_bytes()
        digest = hashlib.blake2b(key, digest_size=8, key=self.salt.encode()[:64]).digest()
        return (int.from_bytes(digest, "big") / 2**64 < self.share) == (self.part == "validation")


class SampleStream:
    """Samples of many sources in one order; iterating gives what is left of the current epoch.

    Args:
        sources: models of `medmoe_hf.data.sources`.
        seed: of the order, and of what is random in captions.
        rank, world_size: this reader among the processes.
        mixing: how sources take turns: `weight` (in proportion to their weights), or `modality` (each modality equally
            often, sources of one modality by weight; those without a fixed one count as one more).
        once: whether a source that has come to its end leaves the epoch (every sample exactly once), or begins again
            in a new order (the shares stay as they are, and the epoch never ends).
        shuffle: whether shards and rows are shuffled.
        buffer: places that the rows of a source are shuffled within.
        split: which part of the data; None for all.
        max_bad_fraction: over this share of faulty samples the stream stops.
        num_workers: processes that read and decode; 0 reads here.
        prepare: called in the reader on each decoded image; must be picklable with workers.
        draft: side in pixels that images will be resized to: JPEGs are decoded at a reduced scale that is no smaller.
            None decodes them whole.

    Attributes:
        faults: what was skipped so far.
        epoch: the current one.
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
    ) -> None:
        if not sources:
            raise StreamError("A stream needs at least one source.")
        if not 0 <= rank < world_size:
            raise StreamError(f"rank must lie in 0..{world_size - 1}, got {rank}.")
        self.sources = list(sources)
        self.names = [source.name or f"{source.kind} {index}" for index, source in enumerate(self.sources)]
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.mixing, self.once, self.shuffle, self.buffer, self.split = mixing, once, shuffle, buffer, split
        self.max_bad_fraction, self.num_workers, self.prepare, self.draft = (
            max_bad_fraction,
            num_workers,
            prepare,
            draft,
        )
        self.shards = [source.shards() for source in self.sources]
        self.faults = FaultLog()
        self.epoch = 0
        self._next = rank
        self._reported: set[tuple[int, int]] = set()

    # The order

    def _weights(self) -> list[float]:
        weights = [source.weight for source in self.sources]
        if self.mixing == "weight":
            return weights
        groups = [source.modality for source in self.sources]
        totals = {group: sum(w for w, g in zip(weights, groups, strict=True) if g == group) for group in groups}
        return [weight / totals[group] for weight, group in zip(weights, groups, strict=True)]

    def _rows(self, source: int) -> Iterator[tuple[int, int]]:
        """(shard, row) of one source, once over or for ever."""
        cycle = 0
        while True:
            rng = random.Random(f"{self.seed} {self.epoch} {source} {cycle}")
            order = list(range(len(self.shards[source])))
            # Phantoms are drawn independently: a shuffle would change nothing but which ones are drawn.
            shuffled = self.shuffle and not isinstance(self.sources[source], PhantomSource)
            if shuffled:
                rng.shuffle(order)
            rows = ((shard, row) for shard in order for row in range(self._length(source, shard)))
            some = False
            for place in _shuffled(rows, self.buffer, rng) if shuffled else rows:
                some = True
                yield place
            if self.once or not some:
                return
            cycle += 1

    def _length(self, source: int, shard: int) -> int:
        try:
            length = len(self.shards[source][shard])
            cut = getattr(self.shards[source][shard], "cut_off", False)
            cause = "truncated shard" if cut else None
        except ShardError as error:
            length, cause = 0, error.cause
        # A shard is one fault for the rank that would have read its first sample, and none for the others.
        if cause is not None and (source, shard) not in self._reported and shard % self.world_size == self.rank:
            self._reported.add((source, shard))
            self.faults.add(self.names[source], cause, self.shards[source][shard].name)
        return length

    def _places(self) -> Iterator[Place]:
        """The epoch, from its beginning, for all ranks."""
        rng = random.Random(f"{self.seed} {self.epoch} mix")
        weights = self._weights()
        rows = {source: self._rows(source) for source in range(len(self.sources))}
        position = 0
        while rows:
            alive = list(rows)
            source = alive[0]
            if len(alive) > 1:
                source = rng.choices(alive, [weights[index] for index in alive])[0]
            found = next(rows[source], None)
            if found is None:
                del rows[source]
                continue
            yield Place(position, source, *found)
            position += 1

    def _own_chunks(self) -> Iterator[list[Place]]:
        """What this rank still has to read, in chunks for its workers."""
        chunk: list[Place] = []
        for place in self._places():
            if place.position < self._next or place.position % self.world_size != self.rank:
                continue
            chunk.append(place._replace(where=self.shards[place.source][place.shard].locate(place.where)))
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def __iter__(self) -> Iterator[Sample]:
        """What is left of the epoch; at its end the next one stands ready.

        Raises:
            StreamError: if too many samples are faulty, or an epoch has none that is not.
        """
        reader = _Reader(self.sources, self.shards, self.split, self.prepare, self.draft, (self.seed, self.epoch))
        if self.num_workers:
            # spawn-safe and ordered: the loader gives chunks back in the order they were asked for.
            chunks: Iterable = DataLoader(
                reader,
                batch_sampler=self._own_chunks(),
                collate_fn=_as_it_is,
                num_workers=self.num_workers,
                worker_init_fn=_leave_signals_to_main,
                # Else the loader draws a seed from the global generator, which dropout draws from too: a resumed run,
                # or one with another number of readers, would drop other things.
                generator=torch.Generator(),
            )
        else:
            chunks = ([reader[place] for place in chunk] for chunk in self._own_chunks())
        before = self.faults.good
        for chunk in chunks:
            for item in chunk:
                if isinstance(item, dict):
                    self._next = item["position"] + self.world_size
                    self.faults.good += 1
                    yield item
                    continue
                self._next = item.position + self.world_size
                if isinstance(item, Fault):
                    self.faults.add(self.names[item.source], item.cause, item.file)
                    self._check_faults()
        self._check_faults(at_end=True)
        if self.faults.good == before and self.faults.bad:
            raise StreamError(f"No sample of the epoch could be read: {self.faults}. Files: {self.faults.worst()}.")
        self.epoch += 1
        self._next = self.rank

    def _check_faults(self, at_end: bool = False) -> None:
        seen = self.faults.good + self.faults.bad
        if self.faults.bad > self.max_bad_fraction * seen and (at_end or seen >= _ENOUGH):
            raise StreamError(
                f"{self.faults.bad} of {seen} samples are faulty, more than `max_bad_fraction` "
                f"{self.max_bad_fraction} allows: {self.faults}. "
                f"Worst files: {self.faults.worst()}. Mend them, or raise the limit."
            )

    # Resuming

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the order depends on."""
        facts = {
            "sources": [source.model_dump(mode="json") for source in self.sources],
            "seed": self.seed,
            "world_size": self.world_size,
            "mixing": [self.mixing, self.once, self.shuffle, self.buffer],
            "split": None if self.split is None else [self.split.part, self.split.share, self.split.salt],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: everything up to the last sample that it was given is done. Plain, for JSON."""
        return {
            "fingerprint": self.fingerprint,
            "rank": self.rank,
            "epoch": self.epoch,
            "next": self._next,
            "reported": sorted(self._reported),
            "faults": self.faults.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a stream with the same configuration was; the number of workers may be another.

        Raises:
            StreamError: for a state of another configuration or rank.
        """
        if state["fingerprint"] != self.fingerprint or state["rank"] != self.rank:
            raise StreamError(
                "This state is of a stream with other sources, seed, mixing, split or number of processes (or of "
                "another rank): its positions mean other samples here. Resume with the configuration that it was "
                "saved with, or begin a new run."
            )
        self.epoch, self._next = state["epoch"], state["next"]
        self._reported = {(source, shard) for source, shard in state["reported"]}
        self.faults.load_state_dict(state["faults"])


def _key(row: dict[str, Any], shard: Shard) -> str:
    """What a sample is called: its key in a tar, its image's path in a table, else its shard."""
    if "__key__" in row:
        return f"{shard.name}/{row['__key__']}"
    named = row.get("id")
    path = next((row[name] for name in IMAGE_FIELDS if isinstance(row.get(name), str)), None)
    return str(path or named or shard.name)


def _leave_signals_to_main(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; a reader that dies of it would take the last step with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A forked reader has inherited the trainer's handler, and would not let itself be ended.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_it_is(items: list[Any]) -> list[Any]:
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
