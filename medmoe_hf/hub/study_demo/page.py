"""What the page computes and shows of studies, without gradio: `predict` on uploaded files, and HTML."""

import html
import logging
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from medmoe_hf.errors import MedMoEError
from medmoe_hf.inference.isolation import IsolatedReader
from medmoe_hf.inference.serving.archives import Limits, UploadError, hide_metadata, plain_suffix, unpack
from medmoe_hf.inference.studies.grouping import study_labels
from medmoe_hf.inference.studies.pictures import UNREADABLE
from medmoe_hf.inference.studies.predictions import (
    LIMITS,
    LabelPrediction,
    SeriesPrediction,
    StudyPrediction,
    StudyPredictions,
    TextPrediction,
)
from medmoe_hf.inference.studies.predictor import Question, StudyPredictor
from medmoe_hf.inference.studies.report import (
    counted,
    curve,
    data_uri,
    edges,
    explained,
    heat_colours,
    percent,
    place_names,
    series_title,
)
from medmoe_hf.model.studies_medmoe import read_studies

logger = logging.getLogger(__name__)

UPLOAD_LIMITS = Limits(megabytes=500, files=1000, seconds=300)
"""What one study may cost, for public pages."""
MAX_LABELS, MAX_CHARACTERS = 100, 1000  # characters per label or phrase
MAX_PIXELS = 50_000_000  # per picture
PICTURE_SIDE, KEY_SIDE, HEAT_SIDE = 640, 240, 96  # pixels; the maps of a model have 20 to 56 cells on a side
KEYS_SHOWN = 3
COLOURS = "Colours run from none over red to white, where a place speaks most for it; each picture has its own scale."
SIDES = " Letters name the sides of the patient."
NOTHING = "There is no study (or it was here for half an hour): choose files or an example."

Asked = LabelPrediction | TextPrediction


class PageError(Exception):
    """What the page cannot do, and why, in one or two sentences for its user."""


@dataclass(frozen=True)
class Reading:
    """How files are read, as in `predict`.

    Args:
        plane: Plane of NIfTI volumes; None for axial slices.
        window: Name of a window of CT and NIfTI; None for the usual one.
        trust_header: Whether the modality in a header selects the expert.
    """

    plane: str | None = None
    window: str | None = None
    trust_header: bool = False


@dataclass(eq=False)
class View:
    """The studies that a page shows.

    Args:
        studies: The answers, at least one of them with a series.
        folder: Where their files are, which are read again for pictures.
        reading: How they were read.
        holder: Removes the folder; None for examples, which all pages share.
        reader: What decodes the files in a process of its own; None where this process does.
    """

    studies: StudyPredictions
    folder: Path
    reading: Reading
    holder: "tempfile.TemporaryDirectory[str] | None" = None
    reader: IsolatedReader | None = None

    @property
    def places(self) -> list[tuple[StudyPrediction, SeriesPrediction]]:
        """Every series with its study, in the order of reading."""
        return [(study, series) for study in self.studies for series in study.series]

    def series(self, place: int) -> SeriesPrediction:
        """Returns a series by its index in `places`."""
        return self.places[place][1]

    def titles(self) -> list[str]:
        """Returns what the series are called, in the order of `places`."""
        return [
            f"Study {study.number}, series {series.number}: {series_title(series)}, {series.expert}"
            for study, series in self.places
        ]

    def close(self) -> None:
        """Removes the files, and ends the process that has some of them open."""
        if self.reader is not None:
            self.reader.release()
        if self.holder is not None:
            self.holder.cleanup()


class StudyPage:
    """Answers of the page.

    Args:
        predictor: The model.
        limits: What a study may cost.
        reader: What decodes files in processes of their own; None to decode them in this one.
    """

    def __init__(
        self, predictor: StudyPredictor, limits: Limits = UPLOAD_LIMITS, reader: IsolatedReader | None = None
    ) -> None:
        self.predictor, self.limits, self.reader = predictor, limits, reader
        hide_metadata()

    def upload(
        self,
        uploads: Sequence[str | Path],
        reading: Reading,
        labels: str = "",
        phrase: str = "",
        on_slice: Callable[[int, int], None] | None = None,
    ) -> View:
        """Reads uploaded files as studies, and removes them.

        Args:
            uploads: Files: DICOM, NIfTI, pictures, and zip files of folders with them.
            reading: How they are read.
            labels: Labels to compare, one per line; empty for those of the modality.
            phrase: What to look for; may be empty.
            on_slice: Called with the number of slices that are read, and of all.

        Raises:
            PageError: If there is nothing to show, or a limit is exceeded.
        """
        holder = tempfile.TemporaryDirectory(prefix="medmoe-demo-", ignore_cleanup_errors=True)
        folder = Path(holder.name)
        try:
            asked = question(labels, phrase, reading.trust_header)
            with _sentences(folder):
                files = self._adopt(uploads, folder)
                check = self._timer()
                unpack(files, self.limits, check)
            return View(self._predict(folder, reading, asked, on_slice), folder, reading, holder, self.reader)
        except BaseException:
            holder.cleanup()
            raise
        finally:
            for path in uploads:
                Path(path).unlink(missing_ok=True)

    def example(
        self,
        folder: Path,
        reading: Reading,
        labels: str = "",
        phrase: str = "",
        on_slice: Callable[[int, int], None] | None = None,
    ) -> View:
        """Reads a folder of the server as studies, which stays; arguments as for `upload`."""
        asked = question(labels, phrase, reading.trust_header)
        return View(self._predict(folder, reading, asked, on_slice), folder, reading, reader=self.reader)

    def again(
        self,
        view: View | None,
        reading: Reading,
        labels: str = "",
        phrase: str = "",
        on_slice: Callable[[int, int], None] | None = None,
    ) -> View:
        """Reads the files of a view in another way; arguments as for `upload`."""
        if view is None:
            raise PageError(NOTHING)
        other = self.example(view.folder, reading, labels, phrase, on_slice)
        return replace(other, holder=view.holder)

    def ask(self, view: View | None, labels: str, phrase: str) -> View:
        """Asks the studies of a view something else; slices are not encoded again.

        Args:
            view: The view; None if it has expired.
            labels: As for `upload`.
            phrase: As for `upload`.

        Raises:
            PageError: Without a view, or for labels that cannot be used.
        """
        if view is None:
            raise PageError(NOTHING)
        asked = question(labels, phrase, view.reading.trust_header)
        studies = []
        for study in view.studies:
            series = [one.ask(asked) for one in study.series if one.ask is not None]
            studies.append(replace(study, series=series, labels=study_labels(series)))
        return replace(view, studies=StudyPredictions(studies, view.studies.skipped))

    def _adopt(self, uploads: Sequence[str | Path], folder: Path) -> list[Path]:
        """Moves uploads into a folder, by number: their names may name a person."""
        if not uploads:
            raise PageError("Choose at least one file.")
        if len(uploads) > self.limits.files:
            raise self.limits.too_many()
        found, size = [], 0
        for number, upload in enumerate(map(Path, uploads)):
            if not upload.is_file():
                raise PageError("A file is no longer here: choose it again.")
            size += upload.stat().st_size
            if size > self.limits.bytes:
                raise self.limits.too_large()
            if upload.name.upper() == "DICOMDIR":  # it names files that have no names here
                continue
            path = folder / f"{number:06}{plain_suffix(upload.name)}"
            shutil.move(upload, path)
            found.append(path)
        return found

    def _timer(self) -> Callable[[], None]:
        end = time.monotonic() + self.limits.seconds

        def check() -> None:
            if time.monotonic() > end:
                raise PageError(f"This takes longer than {self.limits.seconds} s: choose fewer slices.")

        return check

    def _predict(
        self, folder: Path, reading: Reading, asked: Question, on_slice: Callable[[int, int], None] | None
    ) -> StudyPredictions:
        in_time, done = self._timer(), 0

        def check() -> None:
            nonlocal done
            in_time()
            done += 1
            if on_slice is not None:
                # Slices that another expert has to read count twice.
                on_slice(min(done, total), total)

        with _sentences(folder):
            read = read_studies if self.reader is None else partial(self.reader.read_studies, check=in_time)
            studies = read(
                folder,
                plane=reading.plane,
                window=reading.window,
                max_pixels=MAX_PIXELS,
                max_slices=self.limits.files,
            )
            total = sum(len(study) for study in studies)
            return self.predictor(studies, asked, show_progress=False, check=check)


@contextmanager
def _sentences(folder: Path) -> Iterator[None]:
    """Turns errors into sentences without paths."""
    try:
        yield
    except PageError:
        raise
    except (UploadError, MedMoEError, OSError, ValueError, ImportError) as error:
        said = str(error).replace(repr(str(folder)), "the upload").replace(str(folder), "the upload")
        raise PageError(" ".join(said.split())[:500]) from error
    except Exception as error:
        # Messages of parsers quote headers, so that only the places are logged.
        logger.error("%s at\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        raise PageError("The files cannot be read; the log of the server says where it failed.") from None


def question(labels: str, phrase: str, trust_header: bool = False) -> Question:
    """Makes a question from the text fields of the page.

    Args:
        labels: One per line; empty for those of the modality.
        phrase: What to look for; may be empty.
        trust_header: As for `predict`.

    Raises:
        PageError: For labels that cannot be used.
    """
    names = list(dict.fromkeys(line.strip() for line in labels.splitlines() if line.strip()))
    phrase = phrase.strip()
    if len(names) > MAX_LABELS or max(map(len, [*names, phrase])) > MAX_CHARACTERS:
        raise PageError(
            f"Write at most {MAX_LABELS} labels and a phrase, of at most {MAX_CHARACTERS} characters each."
        )
    try:
        return Question(labels=names or None, text=phrase or None, trust_header=trust_header)
    except MedMoEError as error:
        raise PageError(str(error)) from error


def subjects(series: SeriesPrediction) -> list[tuple[str, str]]:
    """Returns what curves and heat-maps of a series can be of: what it is called, and its key."""
    return [(f"“{text.text}”", f"text:{text.text}") for text in series.texts] + [
        (label.label, f"label:{label.label}") for label in series.labels
    ]


def subject(series: SeriesPrediction, key: str | None) -> Asked | None:
    """Returns the label or text with a key; the first one for an unknown key, None if nothing was asked."""
    listed: list[Asked] = [*series.texts, *series.labels]
    for one, (_, known) in zip(listed, subjects(series), strict=True):
        if known == key:
            return one
    return listed[0] if listed else None


def _name(asked: Asked) -> str:
    return asked.label if isinstance(asked, LabelPrediction) else f"“{asked.text}”"


def _values(asked: Asked) -> np.ndarray:
    return asked.slice_probabilities if isinstance(asked, LabelPrediction) else asked.slice_scores


def _value(asked: Asked, index: int) -> str:
    value = float(_values(asked)[index])
    if np.isnan(value):
        return "not read"
    return percent(value) if isinstance(asked, LabelPrediction) else f"{value:.3f}"


def key_choices(series: SeriesPrediction, asked: Asked | None) -> list[tuple[str, int]]:
    """Returns the key slices of a label or text: text, and number of the slice from 1."""
    place, _ = place_names(series.kind)
    if asked is None or series.count == 1:
        return []
    return [(f"{place} {index + 1}: {_value(asked, index)}", index + 1) for index in asked.key_slices]


def told_html(text: str) -> str:
    """A message of the page."""
    return f'<p role="status">{html.escape(text)}</p>'


def alert_html(text: str) -> str:
    """An error."""
    return f'<p role="alert" class="medmoe-alert">{html.escape(text)}</p>'


def status_text(view: View) -> str:
    """Says what was read."""
    slices = sum(series.count for _, series in view.places)
    skipped = sum(len(study.skipped) for study in view.studies) + len(view.studies.skipped)
    text = (
        f"Read {counted(slices, 'image', 'images')} in {counted(len(view.places), 'series', 'series')} of "
        f"{counted(len(view.studies), 'study', 'studies')}."
    )
    return text + (f" {counted(skipped, 'file or slice was', 'files or slices were')} left out." if skipped else "")


def _stack(series: SeriesPrediction, index: int, asked: Asked | None, side: int, described: str) -> str:
    """A slice, with a heat-map above it, in the proportions of the body."""
    assert series.picture is not None
    assert series.heatmaps is not None
    picture = Image.fromarray(series.picture(index))
    width, height = picture.size
    down, across = series.spacing[:2] if series.spacing is not None and len(series.spacing) >= 2 else (1.0, 1.0)
    picture.thumbnail((side, side))
    overlay = ""
    if asked is not None:
        phrase = asked.label if isinstance(asked, LabelPrediction) else asked.text
        for _, heat in series.heatmaps(phrase, [index], size=HEAT_SIDE):
            overlay = f'<img class="medmoe-heat" src="{data_uri(heat_colours(heat), "PNG")}" alt="">'
    left, top = edges(series.affine)
    sides = "".join(
        f'<span class="medmoe-{edge}" aria-hidden="true">{letter}</span>'
        for edge, letter in (("left", left), ("top", top))
        if letter
    )
    return (
        f'<div class="medmoe-stack medmoe-slice" style="aspect-ratio: {width * across:.4g} / {height * down:.4g}">'
        f'<img src="{data_uri(np.asarray(picture), "JPEG")}" alt="{html.escape(described)}">{overlay}{sides}</div>'
    )


def slice_html(series: SeriesPrediction, index: int, asked: Asked | None) -> str:
    """A slice with the heat-map of a label or text, and a caption.

    Args:
        series: The series.
        index: The slice, from 0.
        asked: The label or text; None for the picture alone.
    """
    place, _ = place_names(series.kind)
    which = place if series.count == 1 else f"{place} {index + 1} of {series.count}"
    try:
        stack = _stack(series, index, asked, PICTURE_SIDE, which)
    except UNREADABLE:
        return alert_html(f"{which} cannot be read; the others can.")
    facts = [which]
    if series.positions is not None and series.count > 1:
        facts.append(f"at {series.positions[index]:.1f} mm")
    if asked is not None:
        facts.append(f"{_name(asked)}: {_value(asked, index)}")
    colours = (
        "" if asked is None else f'<p class="medmoe-note">{COLOURS}{SIDES if series.affine is not None else ""}</p>'
    )
    return (
        f'<figure class="medmoe-picture medmoe-wide">{stack}'
        f"<figcaption>{html.escape(', '.join(facts))}{colours}</figcaption></figure>"
    )


def keys_html(series: SeriesPrediction, asked: Asked | None) -> str:
    """The key slices of a label or text as small pictures with heat-maps; empty for a single image."""
    if asked is None or series.count == 1:
        return ""
    figures = []
    for text, number in key_choices(series, asked)[:KEYS_SHOWN]:
        try:
            stack = _stack(series, number - 1, asked, KEY_SIDE, text)
        except UNREADABLE:
            continue
        figures.append(f'<figure class="medmoe-key">{stack}<figcaption>{html.escape(text)}</figcaption></figure>')
    return f'<div class="medmoe-keys">{"".join(figures)}</div>'


def curve_html(series: SeriesPrediction, index: int, asked: Asked | None) -> str:
    """The curve of a label or text through the slices, with its key slices and the slice that is shown."""
    if asked is None or series.count < 2 or np.isnan(_values(asked)).all():
        return ""
    place, places = place_names(series.kind)
    values = _values(asked)
    drawn = curve(_name(asked), values, asked.key_slices, place)
    lines = "".join(f'<polyline class="medmoe-line" points="{points}"/>' for points in drawn["lines"])
    marks = "".join(f'<line class="medmoe-mark" x1="{x}" x2="{x}" y1="0" y2="44"/>' for x in drawn["marked"])
    here = f'<line class="medmoe-here" x1="{index}" x2="{index}" y1="0" y2="44"/>'
    ends = [_value(asked, int(found)) for found in (np.nanargmax(values), np.nanargmin(values))]
    name = html.escape(_name(asked))
    return (
        f'<figure class="medmoe-curve"><figcaption>{name} through the {places}: from {ends[1]} to {ends[0]}'
        f'</figcaption><svg viewBox="0 0 {drawn["width"]} 44" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(drawn["described"])}">{marks}{lines}{here}</svg>'
        f'<div class="medmoe-ends"><span>{place} 1</span><span>{place} {series.count}</span></div>'
        '<p class="medmoe-note"><span class="medmoe-swatch medmoe-here-swatch"></span>shown '
        f'<span class="medmoe-swatch medmoe-mark-swatch"></span>key {places}</p></figure>'
    )


def _bars(rows: Sequence[tuple[str, float]], chosen: str | None, head: str) -> str:
    body = "".join(
        f'<tr{" class=medmoe-chosen" if name == chosen else ""}><th scope="row">{html.escape(name)}</th>'
        f'<td class="medmoe-bar"><span><span style="width: {100 * value:.1f}%"></span></span></td>'
        f"<td>{html.escape(percent(value))}</td></tr>"
        for name, value in rows
    )
    return f'<table class="medmoe-bars"><caption>{html.escape(head)}</caption><tbody>{body}</tbody></table>'


def answer_html(view: View, place: int) -> str:
    """The answer for a series, and for its study if that has several: expert and why, probabilities, notes."""
    study, series = view.places[place]
    parts = []
    if len(study.series) > 1 and study.labels:
        rows = [(label.label, label.probability) for label in study.labels]
        parts.append(_bars(rows, None, f"Study {study.number}, all {len(study.series)} series together"))
    head = "What it shows" if len(view.places) == 1 else f"What series {series.number} of study {study.number} shows"
    if series.labels:
        parts.append(_bars([(label.label, label.probability) for label in series.labels], None, head))
        parts.append(f'<p class="medmoe-note">{html.escape(explained(series))}</p>')
    else:
        parts.append(f"<p>No labels were asked for, and there are none for {html.escape(series.expert)}.</p>")
    for text in series.texts:
        found = f"“{text.text}”: similarity {text.score:.3f}, from -1 to 1; it compares slices, and studies."
        parts.append(f"<p>{html.escape(found)}</p>")
    routing = sorted(series.routing.items(), key=lambda entry: -entry[1])
    parts.append(_bars(routing, series.expert, "Which expert read it, and why"))
    parts.append(f'<p class="medmoe-note">{html.escape(series.expert_reason)}</p>')
    if series.spacing is not None:
        sizes = " × ".join(f"{value:.3g}" for value in series.spacing)
        parts.append(f'<p class="medmoe-note">Pixels of {sizes} mm.</p>')
    parts += [f'<p class="medmoe-note">Note: {html.escape(note)}</p>' for note in series.notes]
    return "".join(parts)


def left_out_html(view: View) -> str:
    """What was left out, and why; empty if nothing was."""
    reasons = Counter(one.reason for study in view.studies for one in study.skipped)
    reasons += Counter(one.reason for one in view.studies.skipped)
    if not reasons:
        return ""
    items = "".join(
        f"<li>{html.escape(reason)}{f' ({number} times)' if number > 1 else ''}</li>"
        for reason, number in reasons.most_common(20)
    )
    return f'<div class="medmoe-left-out"><h3>Left out</h3><ul>{items}</ul></div>'


def limits_text(limits: Limits = UPLOAD_LIMITS) -> str:
    """What the page cannot do, in Markdown."""
    listed = [
        *LIMITS,
        f"A study may have {limits.megabytes} MB, also when unpacked, {limits.files} files or slices, and take "
        f"{limits.seconds // 60} minutes. A zip file must be neither encrypted nor packed by more than deflate does.",
        "Localizers, reports, screenshots and segmentations are left out, as is everything that is no image.",
    ]
    return "\n".join(f"- {line}" for line in listed)
