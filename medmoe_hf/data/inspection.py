"""What a list of sources holds, seen before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from medmoe_hf.data.captions import detect_rule
from medmoe_hf.data.shards import ShardError
from medmoe_hf.data.stream import SampleStream, StreamError
from medmoe_hf.model.modalities_medmoe import MODALITIES

_COUNTED_SHARDS = 20  # opening thousands only to count them would take minutes
_THUMBNAIL, _COLUMNS = 112, 12


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
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.samples is None:
            amount = "endless"
        else:
            part = "" if self.counted == self.shards else f" in the first {self.counted}"
            amount = f"{self.samples} samples{part}"
        lines = [f"{self.name}: {self.shards} shards, {amount}"]
        if self.fields:
            lines.append(f"  fields      {', '.join(self.fields)}")
        if self.looked_at:
            known = ", ".join(f"{name} {count}" for name, count in self.modalities.most_common())
            lines.append(f"  modalities  {known} (of {self.looked_at} looked at)")
        if self.sizes is not None:
            (narrow, low), (wide, high) = self.sizes
            lines.append(f"  sizes       {narrow}x{low} to {wide}x{high} pixels")
        lines += [f"  caption     {caption}" for caption in self.captions]
        lines += [f"  PROBLEM     {problem}" for problem in self.problems]
        return "\n".join(lines)


def inspect_sources(
    sources: Sequence[Any], sheet: str | Path | None = None, samples: int = 48, seed: int = 0
) -> list[SourceReport]:
    """Looks into each source without training.

    Args:
        sources: models of `medmoe_hf.data.sources`.
        sheet: where to write a contact sheet (PNG): rows of a source's first images with their modality.
        samples: how many samples of each source to read.
        seed: which ones.
    """
    reports, rows = [], []
    for index, source in enumerate(sources):
        report, images = _look(source, source.name or f"{source.kind} {index}", samples, seed)
        reports.append(report)
        rows.append((report.name, images))
    if sheet is not None:
        _contact_sheet(rows).save(sheet)
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
        except (ShardError, OSError) as error:
            report.problems.append(f"{shard.name}: {error}")
            continue
        if report.samples is not None:
            report.samples += length
    widths, heights, rules = [], [], set()
    try:
        for sample in islice(stream, count):
            modality = sample["modality"]
            label = "unknown" if modality < 0 else MODALITIES[modality]
            report.looked_at += 1
            report.modalities[label] += 1
            widths.append(sample["image"].width)
            heights.append(sample["image"].height)
            if len(report.captions) < 3:
                report.captions.append(sample["caption"])
            rules.add(detect_rule(sample["caption"]))
            if len(images) < _COLUMNS:
                images.append((sample["image"], label))
    except (StreamError, OSError, ValueError) as error:
        report.problems.append(str(error))
    if widths:
        report.sizes = (min(widths), min(heights)), (max(widths), max(heights))
    report.problems += [
        f"captions hold the tag of another rule; say `caption_rule: {rule}`" for rule in sorted(rules - {"plain"})
    ]
    report.problems += [f"{total} of {cause}" for (_, cause), total in stream.faults.counts.most_common()]
    return report, images


def _contact_sheet(rows: Sequence[tuple[str, Sequence[tuple[Image.Image, str]]]]) -> Image.Image:
    line = 14
    height = _THUMBNAIL + 2 * line + 6
    sheet = Image.new("RGB", (_COLUMNS * (_THUMBNAIL + 4), max(1, len(rows)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows):
        pen.text((2, row * height), name, fill="black")
        for column, (image, label) in enumerate(images):
            x, y = column * (_THUMBNAIL + 4), row * height + line
            sheet.paste(ImageOps.contain(image.convert("RGB"), (_THUMBNAIL, _THUMBNAIL)), (x, y))
            pen.text((x + 2, y + _THUMBNAIL), label, fill="black")
    return sheet
