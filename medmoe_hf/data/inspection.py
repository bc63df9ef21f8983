"""Inspection of sources before training: what they contain, and what is wrong with them."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write
from medmoe_hf.data.caption_report import caption_lines, caption_warnings
from medmoe_hf.data.captions import detect_rule
from medmoe_hf.data.faults import Fault
from medmoe_hf.data.sources import source_names
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import PathNotFoundError, ShardError, StreamError
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.modalities_medmoe import MODALITIES

_MAX_COUNTED_SHARDS = 20  # opening thousands of shards to count their samples would take minutes
_THUMBNAIL, _COLUMNS = 112, 12
_MAX_TITLE = 200  # characters of a source's name on a contact sheet
_MAX_PEEKED = 100_000  # rows of a source of which captions are made
_MAX_EXAMPLES = 3  # duplicates listed in a report

COLUMNS = ("source", "file", "row", "path", "field", "problem", "reason")
"""Columns of the table of problems. `row` counts the rows of `file` from 1, without its header; empty for a file."""


@dataclass
class PartReport:
    """What one part of the split contains of a source.

    Attributes:
        pairs: Number of pairs by modality (including `unknown`).
        subjects: Distinct subjects by modality; empty if the source has no `subject`.
        images: Hashes of the distinct images by modality.
        without_subject: Number of pairs whose subject is empty, which are split by image.
    """

    pairs: Counter[str] = field(default_factory=Counter)
    subjects: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    images: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    without_subject: int = 0

    def lines(self, title: str) -> list[str]:
        """Returns the lines of a table: one for the part, one per modality."""

        def line(name: str, pairs: int, subjects: Iterable[set[str]], images: Iterable[set[bytes]]) -> str:
            of_subjects = f"{len(set().union(*subjects)):>10}" if self.subjects else f"{'-':>10}"
            return f"    {name:<20}{pairs:>8}{of_subjects}{len(set().union(*images)):>10}"

        return [
            line(title, self.pairs.total(), self.subjects.values(), self.images.values()),
            *(
                line(f"  {name}", count, [self.subjects.get(name, set())], [self.images[name]])
                for name, count in self.pairs.most_common()
            ),
        ]


@dataclass
class SourceReport:
    """What one source contains. `str(report)` is the text that `medmoe data inspect` prints.

    Attributes:
        name: Name of the source.
        shards: Number of shards.
        counted: Number of shards whose samples were counted.
        samples: Number of samples in these shards; None for an endless source.
        selected: Number of them that `where` and `where_not` leave; None without these keys.
        fields: Names of the fields of the first sample.
        read: Number of samples that were read.
        modalities: Number of these samples by modality (including `unknown`).
        captions: Some of their captions, after the caption rule.
        templates: Lines about the entries of `captions`, with examples.
        sizes: ((width, height) of the smallest, (width, height) of the largest), in pixels, each side on its own.
        parts: A `PartReport` each for `training` and `validation`, if a validation share was given.
        warnings: What may be intended but usually is not.
        problems: What is wrong.
    """

    name: str
    shards: int = 0
    counted: int = 0
    samples: int | None = 0
    selected: int | None = None
    fields: list[str] = field(default_factory=list)
    read: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    parts: dict[str, PartReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.samples is None:
            amount = "endless"
        else:
            part = "" if self.counted == self.shards else f" in the first {self.counted}"
            amount = f"{_counted(self.samples, 'sample')}{part}"
            if self.selected is not None:
                amount += f", of which `where` leaves {self.selected}"
        lines = [f"{self.name}: {_counted(self.shards, 'shard')}, {amount}"]
        if self.fields:
            lines.append(f"  fields      {', '.join(self.fields)}")
        if self.read:
            known = ", ".join(f"{name} {count}" for name, count in self.modalities.most_common())
            lines.append(f"  modalities  {known} (of {self.read} read)")
        if self.sizes is not None:
            (narrow, low), (wide, high) = self.sizes
            lines.append(f"  sizes       {narrow}x{low} to {wide}x{high} pixels")
        if self.templates:
            lines += [f"  captions    {line}" for line in self.templates]
        else:
            lines += [f"  caption     {caption}" for caption in self.captions]
        if self.parts:
            lines.append(f"  split       {'':<12}{'pairs':>8}{'subjects':>10}{'images':>10}")
            for title, one in self.parts.items():
                lines += one.lines(title)
        lines += [f"  WARNING     {warning}" for warning in self.warnings]
        lines += [f"  PROBLEM     {problem}" for problem in self.problems]
        return "\n".join(lines)


class _Hash:
    """Returns a hash of an image's pixels, and its size. A class, so that workers can unpickle it."""

    def __call__(self, image: Image.Image) -> tuple[bytes, tuple[int, int]]:
        head = f"{image.mode} {image.width}x{image.height}".encode()
        return blake2b(head + image.tobytes(), digest_size=16).digest(), image.size


class _FaultListingStream(SampleStream):
    """A stream that keeps every fault, not only counts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.found: list[Fault] = []
        super().__init__(*args, **kwargs)

    def record_fault(self, fault: Fault) -> None:
        super().record_fault(fault)
        self.found.append(fault)


@dataclass
class _Seen:
    """The first pair with an image, and the captions of all pairs with it."""

    row: int
    path: str
    subject: str | None
    part: str
    captions: set[int]
    pairs: int = 1


def inspect_sources(
    sources: Sequence[Any],
    sheet: str | Path | None = None,
    samples: int = 48,
    seed: int = 0,
    *,
    problems: str | Path | None = None,
    validation_share: float | None = None,
    num_workers: int = 0,
) -> list[SourceReport]:
    """Inspects sources without training.

    If `problems` or `validation_share` is given, every pair is read and decoded as in training; otherwise a few per
    source.

    Args:
        sources: Models of `medmoe_hf.data.sources`.
        sheet: Path of a contact sheet (PNG) to write, with the first images of each source and their modality. It is
            not written if no image can be read.
        samples: Number of samples to read per source.
        seed: Seed that selects these samples.
        problems: Path of a table (CSV) to write, with the file and the reason for every pair that cannot be used and
            for every duplicate. It names files, and never quotes captions.
        validation_share: Share of the subjects (of the images, where there is no subject) in the validation set, 0..1.
        num_workers: Number of processes that read, when every pair is read.

    Returns:
        One report per source.

    Raises:
        FileNotFoundError: If the folder of `problems` or `sheet` does not exist.

    Example:
        >>> from medmoe_hf.data.inspection import inspect_sources
        >>> from medmoe_hf.data.sources import PhantomSource
        >>> [report] = inspect_sources([PhantomSource(kind="phantom", image_size=64, length=8)])
        >>> report.samples, report.problems
        (8, [])
    """
    for path in (sheet, problems):
        # Checked first, since reading may take hours.
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise PathNotFoundError(f"The folder of {path} does not exist.")
    reports, rows = [], []
    listed: list[tuple[Any, ...]] = []
    complete = problems is not None or validation_share is not None
    for source, name in zip(sources, source_names(sources), strict=True):
        report, images = _read_some(source, name, samples, seed)
        endless = source.kind == "phantom" and source.length is None
        if complete and report.shards and not endless:
            listed += _read_all(source, report, validation_share or 0.0, num_workers)
        elif not report.shards:
            listed += [(name, "", "", "", "", "unreadable source", problem) for problem in report.problems]
        reports.append(report)
        rows.append((report.name, images))
    if sheet is not None and any(images for _, images in rows):
        _contact_sheet(rows).save(sheet)
    if problems is not None:
        with atomic_write(problems) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(listed)
    return reports


def _read_some(source: Any, name: str, count: int, seed: int) -> tuple[SourceReport, list[tuple[Image.Image, str]]]:
    report = SourceReport(name)
    images: list[tuple[Image.Image, str]] = []
    try:
        stream = SampleStream([source], seed=seed, max_bad_fraction=0.5)
    except (OSError, ValueError, ShardError) as error:
        report.problems.append(str(error))
        return report, images
    shards = stream.shards[0]
    report.shards, report.counted = len(shards), min(len(shards), _MAX_COUNTED_SHARDS)
    endless = source.kind == "phantom" and source.length is None
    report.samples = None if endless else 0
    peeked: list[dict[str, Any]] = []
    if source.filter_fields:
        report.selected = 0
    for number, shard in enumerate(shards[: report.counted]):
        try:
            length = len(shard)
            if length and not report.fields:
                report.fields = [key for key in shard.read(shard.locate(0)) if key != "__key__"]
        except (ShardError, OSError, ValueError):
            continue  # counted as a fault by the stream
        if report.samples is not None:
            report.samples += length
            rows = stream.known_rows.rows(0, number)
            if report.selected is not None:
                report.selected += len(rows)
            if source.caption_fields and len(peeked) < _MAX_PEEKED:
                with suppress(ShardError, OSError):  # counted as a fault by the stream
                    peeked += shard.peek(rows[: _MAX_PEEKED - len(peeked)], set(source.caption_fields))
    if peeked:
        report.templates = caption_lines(source, peeked, seed)
    if peeked and report.counted == report.shards and len(peeked) < _MAX_PEEKED:
        report.warnings += caption_warnings(source, peeked)
    widths, heights, rules = [], [], set()
    try:
        for sample in islice(stream, count):
            label = _label(sample)
            report.read += 1
            report.modalities[label] += 1
            widths.append(sample["image"].width)
            heights.append(sample["image"].height)
            if len(report.captions) < 3:
                report.captions.append(sample["caption"])
            rules.add(detect_rule(sample["caption"]))
            if len(images) < _COLUMNS:
                images.append((sample["image"], label))
    except StreamError:
        # The individual faults are listed below.
        report.problems.append("more than half of the samples cannot be used" if images else "no sample can be read")
    if widths:
        report.sizes = (min(widths), min(heights)), (max(widths), max(heights))
    report.warnings += stream.order_warnings()
    report.problems += [
        f"captions contain the tag of another rule; specify `caption_rule: {rule}`"
        for rule in sorted(rules - {"plain"})
    ]
    report.problems += stream.faults.lines(named=False)
    return report, images


def _read_all(source: Any, report: SourceReport, share: float, num_workers: int) -> list[tuple[Any, ...]]:
    """Reads every pair, completes the report, and returns the rows of the table of problems."""
    splits: dict[str, Split | None] = (
        {"training": Split("train", share), "validation": Split("validation", share)} if share else {"all": None}
    )
    faults: list[tuple[int, int, tuple[Any, ...]]] = []
    seen: dict[bytes, _Seen] = {}
    report.problems = [problem for problem in report.problems if problem.startswith("captions contain")]
    report.read, report.modalities = 0, Counter()
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    repeated = two_subjects = 0
    in_both: set[bytes] = set()
    counted: dict[str, Counter[str]] = {}
    for title, split in splits.items():
        part = PartReport()
        stream = _FaultListingStream(
            [source], shuffle=False, split=split, max_bad_fraction=1.0, num_workers=num_workers, prepare=_Hash()
        )
        shards = stream.shards[0]
        try:
            for sample in progress(stream, f"{report.name} ({title})", "pair", delay=5):
                digest, size = sample["image"]
                sizes = _extremes([*(sizes or ()), size])
                label, subject, caption = _label(sample), sample["subject"], hash(sample["caption"])
                row = sample["row"] + 1
                report.read += 1
                report.modalities[label] += 1
                part.pairs[label] += 1
                part.images[label].add(digest)
                if subject is not None:
                    part.subjects[label].add(subject)
                elif source.subject is not None:
                    part.without_subject += 1
                before = seen.setdefault(digest, _Seen(row, sample["key"], subject, title, set(), 0))
                before.pairs += 1
                problem = ""
                if caption in before.captions:
                    problem, repeated = "duplicate pair", repeated + 1
                elif before.subject is not None and subject is not None and subject != before.subject:
                    problem, two_subjects = "image with two subjects", two_subjects + 1
                if title != before.part:
                    in_both.add(digest)
                before.captions.add(caption)
                if problem:
                    reason = f"the same image as in row {before.row} ({before.path})"
                    entry = (
                        report.name,
                        shards[sample["shard"]].name,
                        row,
                        sample["key"],
                        source.image or "",
                        problem,
                        reason,
                    )
                    faults.append((sample["shard"], sample["row"], entry))
        except StreamError:
            pass  # no sample of this part can be read; its faults are listed
        for fault in stream.found:
            where = fault.row + 1 if fault.row >= 0 else ""
            entry = (
                report.name,
                shards[fault.shard].name,
                where,
                fault.path,
                fault.field or "",
                fault.cause,
                fault.reason,
            )
            faults.append((fault.shard, fault.row, entry))
        lines = stream.faults.lines(named=False)
        report.problems += [f"{title}: {line}" if share else line for line in lines]
        counted[title] = part.pairs
        if share:
            report.parts[title] = part
        if part.without_subject:
            report.warnings.append(f"without a subject, split by image: {_counted(part.without_subject, 'pair')}")
    report.sizes = sizes
    several = [one for one in seen.values() if one.pairs > 1]
    if several:
        first = ", ".join(one.path for one in several[:_MAX_EXAMPLES]) + (
            ", ..." if len(several) > _MAX_EXAMPLES else ""
        )
        report.warnings.append(
            f"images in several pairs: {len(several)}, in {sum(one.pairs for one in several)} pairs ({first}); "
            f"duplicate pairs, with equal captions: {repeated}"
        )
    if two_subjects:
        report.problems.append(f"pairs whose image also belongs to another subject: {two_subjects}")
    if in_both:
        report.problems.append(
            f"images in both the training and the validation set: {len(in_both)}; "
            "assign all pairs of an image to one subject"
        )
    if share:
        missing = [name for name in counted["training"] if not counted["validation"][name]]
        if missing:
            report.warnings.append(f"modalities missing from the validation set: {', '.join(missing)}")
    return [entry for *_, entry in sorted(faults, key=lambda fault: fault[:2])]


def _extremes(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    widths, heights = zip(*sizes, strict=True)
    return (min(widths), min(heights)), (max(widths), max(heights))


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _label(sample: dict[str, Any]) -> str:
    return "unknown" if sample["modality"] < 0 else MODALITIES[sample["modality"]]


def _contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]]) -> Image.Image:
    line = 14
    height = _THUMBNAIL + 2 * line + 6
    sheet = Image.new("RGB", (_COLUMNS * (_THUMBNAIL + 4), max(1, len(rows)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows):
        pen.text((2, row * height), name[-_MAX_TITLE:], fill="black")
        for column, (image, label) in enumerate(images):
            x, y = column * (_THUMBNAIL + 4), row * height + line
            sheet.paste(ImageOps.contain(_to_8_bit(image), (_THUMBNAIL, _THUMBNAIL)), (x, y))
            pen.text((x + 2, y + _THUMBNAIL), label, fill="black")
    return sheet


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB as the model does; Pillow would convert 16-bit images to white."""
    try:
        return Image.fromarray(to_rgb(image).permute(1, 2, 0).numpy().round().astype(np.uint8))
    except ValueError:
        return image.convert("RGB")
