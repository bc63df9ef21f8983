"""What a list of sources holds, and what is wrong with it, seen before anything is trained on it."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm.auto import tqdm

from medmoe_hf.common.files import atomic_write
from medmoe_hf.data.captions import detect_rule
from medmoe_hf.data.reading import Fault, Split
from medmoe_hf.data.stream import SampleStream, source_names
from medmoe_hf.errors import PathNotFoundError, ShardError, StreamError
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.modalities_medmoe import MODALITIES

_COUNTED_SHARDS = 20  # opening thousands only to count them would take minutes
_THUMBNAIL, _COLUMNS = 112, 12
_TITLE = 200  # characters of a source's name on a contact sheet
_FIRST = 3  # duplicates that a report names

COLUMNS = ("source", "file", "row", "path", "field", "problem", "reason")
"""Of the table of problems. A row is one of `file`, counted from 1 without its header; a whole file has none."""


@dataclass
class PartReport:
    """What of a source lands in one part of the split.

    Attributes:
        pairs: how many of each modality (`unknown` among them).
        subjects: the different ones of each modality; empty without a `subject`.
        images: hashes of the different ones of each modality.
        without_subject: pairs whose subject is empty, so that their image decides.
    """

    pairs: Counter = field(default_factory=Counter)
    subjects: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    images: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    without_subject: int = 0

    def lines(self, title: str) -> list[str]:
        def line(name: str, pairs: int, subjects: Iterable[set], images: Iterable[set]) -> str:
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
    """What one source holds.

    Attributes:
        name: the source's.
        shards, counted: how many shards there are, and how many of them were opened to count.
        samples: samples in the shards that were counted; None for an endless source.
        fields: names of the fields of the first sample.
        looked_at: samples that were read.
        modalities: how many of these have which modality (`unknown` among them).
        captions: some of their captions, after the rule.
        sizes: smallest and largest width and height in pixels.
        parts: what lands in the training part and what in the held-out part, if that was asked for.
        warnings: what may be as intended, and mostly is not.
        problems: everything that was wrong, in words.
    """

    name: str
    shards: int = 0
    counted: int = 0
    samples: int | None = 0
    fields: list[str] = field(default_factory=list)
    looked_at: int = 0
    modalities: Counter = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
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
        lines = [f"{self.name}: {_counted(self.shards, 'shard')}, {amount}"]
        if self.fields:
            lines.append(f"  fields      {', '.join(self.fields)}")
        if self.looked_at:
            known = ", ".join(f"{name} {count}" for name, count in self.modalities.most_common())
            lines.append(f"  modalities  {known} (of {self.looked_at} looked at)")
        if self.sizes is not None:
            (narrow, low), (wide, high) = self.sizes
            lines.append(f"  sizes       {narrow}x{low} to {wide}x{high} pixels")
        lines += [f"  caption     {caption}" for caption in self.captions]
        if self.parts:
            lines.append(f"  split       {'':<12}{'pairs':>8}{'subjects':>10}{'images':>10}")
            for title, one in self.parts.items():
                lines += one.lines(title)
        lines += [f"  WARNING     {warning}" for warning in self.warnings]
        lines += [f"  PROBLEM     {problem}" for problem in self.problems]
        return "\n".join(lines)


class _Hash:
    """What a stream's readers make of an image: a hash of its pixels and its size, in place of the pixels."""

    def __call__(self, image: Image.Image) -> tuple[bytes, tuple[int, int]]:
        head = f"{image.mode} {image.width}x{image.height}".encode()
        return blake2b(head + image.tobytes(), digest_size=16).digest(), image.size


class _Listing(SampleStream):
    """A stream that keeps its faults one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.found: list[Fault] = []
        super().__init__(*args, **kwargs)

    def faulty(self, fault: Fault) -> None:
        super().faulty(fault)
        self.found.append(fault)


@dataclass
class _Seen:
    """The first pair with an image, and what else comes with it."""

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
    """Looks into each source without training.

    With `problems` or `validation_share` every pair is read and decoded, as training would; else a few of each source.

    Args:
        sources: models of `medmoe_hf.data.sources`.
        sheet: where to write a contact sheet (PNG): rows of a source's first images with their modality. It is not
            written where no image can be read.
        samples: how many samples of each source to read.
        seed: which ones.
        problems: where to write a table (CSV) of every pair that cannot be used, with its file and the reason, and of
            every pair that comes twice. It names files, and quotes no captions.
        validation_share: share of the subjects (without a `subject`, of the images) that training would hold out.
        num_workers: processes that read when every pair is read.

    Returns:
        A report for each source.

    Raises:
        FileNotFoundError: if the folder of `problems` or `sheet` does not exist.
    """
    for place in (sheet, problems):
        # Reading may take hours.
        if place is not None and not Path(place).absolute().parent.is_dir():
            raise PathNotFoundError(f"There is no folder for {place}.")
    reports, rows = [], []
    listed: list[tuple[Any, ...]] = []
    whole = problems is not None or validation_share is not None
    for source, name in zip(sources, source_names(sources), strict=True):
        report, images = _look(source, name, samples, seed)
        endless = source.kind == "phantom" and source.length is None
        if whole and report.shards and not endless:
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


def _look(source: Any, name: str, count: int, seed: int) -> tuple[SourceReport, list[tuple[Image.Image, str]]]:
    report = SourceReport(name)
    images: list[tuple[Image.Image, str]] = []
    try:
        stream = SampleStream([source], seed=seed, max_bad_fraction=0.5)
    except (OSError, ValueError, ShardError) as error:
        report.problems.append(str(error))
        return report, images
    shards = stream.shards[0]
    report.shards, report.counted = len(shards), min(len(shards), _COUNTED_SHARDS)
    endless = source.kind == "phantom" and source.length is None
    report.samples = None if endless else 0
    for shard in shards[: report.counted]:
        try:
            length = len(shard)
            if length and not report.fields:
                report.fields = [key for key in shard.read(shard.locate(0)) if key != "__key__"]
        except (ShardError, OSError, ValueError):
            continue  # the stream counts it
        if report.samples is not None:
            report.samples += length
    widths, heights, rules = [], [], set()
    try:
        for sample in islice(stream, count):
            label = _label(sample)
            report.looked_at += 1
            report.modalities[label] += 1
            widths.append(sample["image"].width)
            heights.append(sample["image"].height)
            if len(report.captions) < 3:
                report.captions.append(sample["caption"])
            rules.add(detect_rule(sample["caption"]))
            if len(images) < _COLUMNS:
                images.append((sample["image"], label))
    except StreamError:
        # The faults themselves are listed below.
        report.problems.append("more than half of the samples cannot be used" if images else "nothing can be read")
    if widths:
        report.sizes = (min(widths), min(heights)), (max(widths), max(heights))
    report.warnings += stream.order_warnings()
    report.problems += [
        f"captions hold the tag of another rule; say `caption_rule: {rule}`" for rule in sorted(rules - {"plain"})
    ]
    report.problems += stream.faults.lines(named=False)
    return report, images


def _read_all(source: Any, report: SourceReport, share: float, num_workers: int) -> list[tuple[Any, ...]]:
    """Reads every pair, adds to the report, and gives the rows of the table of problems."""
    splits = {"training": Split("train", share), "held-out": Split("validation", share)} if share else {"all": None}
    faults: list[tuple[int, int, tuple[Any, ...]]] = []
    seen: dict[bytes, _Seen] = {}
    report.problems = [problem for problem in report.problems if problem.startswith("captions hold")]
    report.looked_at, report.modalities = 0, Counter()
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    twice = two_subjects = 0
    in_both: set[bytes] = set()
    counted: dict[str, Counter] = {}
    for title, split in splits.items():
        part = PartReport()
        stream = _Listing(
            [source], shuffle=False, split=split, max_bad_fraction=1.0, num_workers=num_workers, prepare=_Hash()
        )
        shards = stream.shards[0]
        try:
            for sample in tqdm(stream, desc=f"{report.name} ({title})", unit="pair", delay=5, leave=False):
                digest, size = sample["image"]
                sizes = _extremes([*(sizes or ()), size])
                label, subject, caption = _label(sample), sample["subject"], hash(sample["caption"])
                row = sample["row"] + 1
                report.looked_at += 1
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
                    problem, twice = "pair that comes twice", twice + 1
                elif before.subject is not None and subject is not None and subject != before.subject:
                    problem, two_subjects = "image of two subjects", two_subjects + 1
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
            pass  # nothing of this part can be read: its faults are listed
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
            report.warnings.append(f"without a subject: {_counted(part.without_subject, 'pair')}, split by image")
    report.sizes = sizes
    several = [one for one in seen.values() if one.pairs > 1]
    if several:
        first = ", ".join(one.path for one in several[:_FIRST]) + (", ..." if len(several) > _FIRST else "")
        report.warnings.append(
            f"images that come more than once: {len(several)}, in {sum(one.pairs for one in several)} pairs "
            f"({first}); pairs that repeat an earlier one, caption and all: {twice}"
        )
    if two_subjects:
        report.problems.append(f"pairs with an image that another subject has too: {two_subjects}")
    if in_both:
        report.problems.append(f"images in both parts: {len(in_both)}; give the pairs of an image one subject")
    if share:
        missing = [name for name in counted["training"] if not counted["held-out"][name]]
        if missing:
            report.warnings.append(f"nothing is held out of: {', '.join(missing)}")
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
        pen.text((2, row * height), name[-_TITLE:], fill="black")
        for column, (image, label) in enumerate(images):
            x, y = column * (_THUMBNAIL + 4), row * height + line
            sheet.paste(ImageOps.contain(_shown(image), (_THUMBNAIL, _THUMBNAIL)), (x, y))
            pen.text((x + 2, y + _THUMBNAIL), label, fill="black")
    return sheet


def _shown(image: Image.Image) -> Image.Image:
    """8-bit RGB as the model sees it: Pillow's own conversion makes images of 16 bits white."""
    try:
        return Image.fromarray(to_rgb(image).permute(1, 2, 0).numpy().round().astype(np.uint8))
    except ValueError:
        return image.convert("RGB")
