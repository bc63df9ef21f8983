"""The tab of the page that shows whole studies: its controls, and what they call."""

import html
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from medmoe_hf.hub.study_demo.examples import Example, example_studies
from medmoe_hf.hub.study_demo.page import (
    NOTHING,
    PageError,
    Reading,
    StudyPage,
    View,
    alert_html,
    answer_html,
    curve_html,
    key_choices,
    keys_html,
    left_out_html,
    limits_text,
    slice_html,
    status_text,
    subject,
    subjects,
    told_html,
)
from medmoe_hf.inference.studies.pictures import pixels_of
from medmoe_hf.inference.studies.report import data_uri, place_names
from medmoe_hf.model.medical_images_medmoe import WINDOWS
from medmoe_hf.model.studies_medmoe import read_studies

USUAL = "usual"
PLANES = ["axial", "coronal", "sagittal"]
EMPTY = '<p class="medmoe-empty">The slices will be here.</p>'
TURN = "studies"  # one study at a time is computed
THUMBNAIL = 160  # pixels

STUDY_CSS = """
#study-examples { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)); }
.medmoe-wide { max-width: 640px; }
.medmoe-slice { background: #000; margin: 0 auto; max-height: 640px; max-width: 100%; }
.medmoe-slice img { height: 100%; width: 100%; }
.medmoe-slice span { color: #fff; font-size: 14px; font-weight: 700; line-height: 1; position: absolute;
  text-shadow: 0 0 3px #000, 0 0 3px #000; }
.medmoe-slice .medmoe-left { left: 6px; top: calc(50% - 7px); }
.medmoe-slice .medmoe-top { left: calc(50% - 5px); top: 6px; }
.medmoe-example img { aspect-ratio: 1; background: #000; border-radius: 6px; display: block; margin: 0 auto;
  object-fit: contain; width: 100%; max-width: 160px; }
.medmoe-example p { font-size: 0.9em; line-height: 1.35; margin: 6px 0 0; min-height: 2.7em; text-align: center; }
.medmoe-curve { margin: 0; }
.medmoe-curve svg { background: var(--background-fill-secondary); display: block; height: 110px; width: 100%; }
.medmoe-curve line, .medmoe-curve polyline { fill: none; vector-effect: non-scaling-stroke; }
.medmoe-line { stroke: #1d4ed8; stroke-width: 2px; }
.medmoe-mark { stroke: #b45309; stroke-dasharray: 4 3; stroke-width: 2px; }
.medmoe-here { stroke: #15803d; stroke-width: 3px; }
.dark .medmoe-line { stroke: #93c5fd; } .dark .medmoe-mark { stroke: #fbbf24; } .dark .medmoe-here { stroke: #4ade80; }
.medmoe-ends { display: flex; font-size: 0.9em; justify-content: space-between; }
.medmoe-note { font-size: 0.9em; line-height: 1.45; margin: 4px 0 14px; }
.medmoe-swatch { display: inline-block; height: 1em; margin: 0 6px 0 0; vertical-align: -0.15em; }
.medmoe-here-swatch { border-left: 3px solid #15803d; }
.medmoe-mark-swatch { border-left: 3px dashed #b45309; margin-left: 14px; }
.medmoe-keys { display: grid; gap: 10px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.medmoe-key { margin: 0; } .medmoe-key figcaption { font-size: 0.9em; line-height: 1.3; margin-top: 4px; }
table.medmoe-bars { border: 0 !important; border-collapse: collapse; margin: 0 0 6px; width: 100%; }
.medmoe-bars caption { font-size: 1.1em; font-weight: 600; padding: 4px 0 6px; text-align: left; }
/* Gradio draws borders around all cells. */
table.medmoe-bars :is(th, td) { border-color: var(--border-color-primary) !important; border-style: solid !important;
  border-width: 0 0 1px !important; }
table.medmoe-bars :is(tbody, tr) { border: 0 !important; }
.medmoe-bars th { font-weight: 400; overflow-wrap: break-word; padding: 4px 10px 4px 0 !important; text-align: left; }
.medmoe-bars td { padding: 4px 0 !important; }
.medmoe-bars td:last-child { font-variant-numeric: tabular-nums; padding-left: 10px !important;
  text-align: right; white-space: nowrap; width: 5.5em; }
.medmoe-bar { width: 38%; }
.medmoe-bar > span { background: var(--background-fill-secondary); border-radius: 3px; display: block; height: 14px;
  outline: 1px solid var(--border-color-primary); overflow: hidden; }
.medmoe-bar > span > span { background: #1d4ed8; display: block; height: 14px; }
.medmoe-chosen th, .medmoe-chosen td { font-weight: 700; }
.medmoe-chosen .medmoe-bar > span > span { background: #15803d; }
.medmoe-left-out ul { list-style: disc; padding-left: 1.3em; }
"""


class _Tab:
    """Event handlers: from the values of the controls to updates of the outputs."""

    def __init__(self, page: StudyPage, examples: list[Path], holder: Any) -> None:
        self.page, self.examples, self.holder = page, examples, holder

    def upload(
        self,
        files: list[str] | None,
        view: View | None,
        labels: str,
        phrase: str,
        plane: str,
        window: str,
        trust: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (gradio looks for it among the defaults)
    ) -> tuple[Any, ...]:
        def read(on_slice: Callable[[int, int], None]) -> View:
            return self.page.upload(files or [], _reading(plane, window, trust), labels, phrase, on_slice)

        # The component is emptied: its files are gone, and the next study does not belong to this one.
        return gr.update(value=None), *self._replace(view, read, progress)

    def example(
        self,
        number: int,
        view: View | None,
        labels: str,
        phrase: str,
        plane: str,
        window: str,
        trust: bool,
        progress: gr.Progress,
    ) -> tuple[Any, ...]:
        def read(on_slice: Callable[[int, int], None]) -> View:
            folder = self.examples[number]
            return self.page.example(folder, _reading(plane, window, trust), labels, phrase, on_slice)

        return self._replace(view, read, progress)

    def again(
        self,
        view: View | None,
        labels: str,
        phrase: str,
        plane: str,
        window: str,
        trust: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        try:
            other = self.page.again(view, _reading(plane, window, trust), labels, phrase, _shown_by(progress))
        except PageError as error:
            return view, alert_html(str(error)), *([gr.skip()] * 9)
        return other, told_html(status_text(other)), *_show(other, 0, None, None)

    def _replace(
        self, view: View | None, read: Callable[[Callable[[int, int], None]], View], progress: gr.Progress
    ) -> tuple[Any, ...]:
        if view is not None:
            view.close()
        try:
            other = read(_shown_by(progress))
        except PageError as error:
            return None, alert_html(str(error)), *_nothing()
        return other, told_html(status_text(other)), *_show(other, 0, None, None)

    def ask(
        self, view: View | None, place: int | None, number: int, key: str | None, labels: str, phrase: str
    ) -> tuple[Any, ...]:
        try:
            other = self.page.ask(view, labels, phrase)
        except PageError as error:
            return view, alert_html(str(error)), *([gr.skip()] * 9)
        # A phrase is shown where it is: at its first key slice.
        new = f"text:{phrase.strip()}" if phrase.strip() else key
        moved = None if new != key else int(number) - 1
        return other, told_html(status_text(other)), *_show(other, place or 0, new, moved)

    def choose(self, view: View | None, place: int | None) -> tuple[Any, ...]:
        if view is None:
            return alert_html(NOTHING), *_nothing()
        return told_html(status_text(view)), *_show(view, place or 0, None, None)

    def point(self, view: View | None, place: int | None, key: str | None) -> tuple[Any, ...]:
        """Another label: its curve and key slices, at the first of them."""
        if view is None:
            return alert_html(NOTHING), *_nothing()
        return told_html(status_text(view)), *_show(view, place or 0, key, None)

    def move(self, view: View | None, place: int | None, key: str | None, number: float) -> tuple[Any, ...]:
        """Another slice."""
        if view is None:
            return EMPTY, ""
        series = view.series(place or 0)
        index = min(max(int(number) - 1, 0), series.count - 1)
        asked = subject(series, key)
        return slice_html(series, index, asked), curve_html(series, index, asked)

    def jump(self, view: View | None, place: int | None, key: str | None, number: int) -> tuple[Any, ...]:
        """A key slice: the slider follows."""
        return gr.update(value=number), *self.move(view, place, key, number)


def _shown_by(progress: gr.Progress) -> Callable[[int, int], None]:
    def show(done: int, of: int) -> None:
        progress((done, of), unit="images")

    return show


def _reading(plane: str, window: str, trust: bool) -> Reading:
    return Reading(None if plane == PLANES[0] else plane, None if window == USUAL else window, bool(trust))


def _show(view: View, place: int, key: str | None, index: int | None) -> tuple[Any, ...]:
    """Updates of all outputs but view and status; without an index the first key slice is shown."""
    place = min(place, len(view.places) - 1)
    series = view.series(place)
    asked = subject(series, key)
    if index is None:
        index = asked.key_slices[0] if asked is not None and asked.key_slices else series.count // 2
    index = min(index, series.count - 1)
    listed = subjects(series)
    known = [entry for _, entry in listed]
    one, places = place_names(series.kind)
    keys = key_choices(series, asked)
    several = series.count > 1
    return (
        gr.update(choices=[(title, number) for number, title in enumerate(view.titles())], value=place,
                  visible=len(view.places) > 1),
        gr.update(choices=listed, value=(key if key in known else known[0]) if known else None, visible=bool(known)),
        gr.update(minimum=1, maximum=max(series.count, 2), value=index + 1, label=one, visible=several),
        slice_html(series, index, asked),
        curve_html(series, index, asked),
        gr.update(choices=keys, value=index + 1 if index + 1 in [number for _, number in keys] else None,
                  label=f"Key {places}", visible=bool(keys)),
        keys_html(series, asked),
        answer_html(view, place),
        left_out_html(view),
    )  # fmt: skip


def _nothing() -> tuple[Any, ...]:
    hidden = gr.update(visible=False)
    return hidden, hidden, hidden, EMPTY, "", hidden, "", "", ""


def _thumbnail(folder: Path) -> str:
    """The middle slice of the first series as a data URI."""
    series = read_studies(folder)[0].series[0]
    pixels = pixels_of(series.slice(len(series) // 2)).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_uri(np.asarray(image), "PNG")


def _example_handler(tab: _Tab, number: int) -> Callable[..., tuple[Any, ...]]:
    def load(
        view: View | None,
        labels: str,
        phrase: str,
        plane: str,
        window: str,
        trust: bool,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        return tab.example(number, view, labels, phrase, plane, window, trust, progress)

    return load


def build_tab(
    page: StudyPage, uploads_only: Callable[[gr.File], gr.File], seconds_kept: int, set_opacity: str, min_width: int
) -> None:
    """Adds the controls to the page that is being built.

    Args:
        page: What answers.
        uploads_only: Function that makes a file component refuse addresses.
        seconds_kept: How long an unused study is kept.
        set_opacity: Script that the slider of the opacity runs.
        min_width: Of a column, in pixels.
    """
    # Lives as long as the server.
    holder = tempfile.TemporaryDirectory(prefix="medmoe-examples-", ignore_cleanup_errors=True)
    offered: list[Example] = example_studies()
    folders = [Path(holder.name) / str(number) for number in range(len(offered))]
    for folder, example in zip(folders, offered, strict=True):
        folder.mkdir()
        example.write(folder)
    tab = _Tab(page, folders, holder)
    view = gr.State(None, time_to_live=seconds_kept, delete_callback=lambda one: one.close() if one else None)
    files = uploads_only(
        gr.File(
            label="Study: zip, DICOM, NIfTI, pictures",
            file_count="multiple",
            height=140,
            elem_id="study-files",
        )
    )
    gr.Markdown("Or try an example:")
    buttons = []
    with gr.Row(elem_id="study-examples"):
        for folder, example in zip(folders, offered, strict=True):
            with gr.Column(min_width=96):
                gr.HTML(
                    f'<div class="medmoe-example"><img src="{_thumbnail(folder)}" alt="">'
                    f"<p>{html.escape(example.told)}</p></div>"
                )
                buttons.append(gr.Button(example.name, size="sm"))
    status = gr.HTML(elem_id="study-status")
    with gr.Row():
        with gr.Column(min_width=min_width):
            place = gr.Dropdown([], label="Series", visible=False, filterable=False, elem_id="study-series")
            shown = gr.HTML(EMPTY, elem_id="study-slice")
            number = gr.Slider(1, 2, value=1, step=1, label="Slice", visible=False, elem_id="study-slider")
            curve = gr.HTML(elem_id="study-curve")
            opacity = gr.Slider(0, 1, value=0.6, step=0.05, label="Opacity of the heat-map", elem_id="study-opacity")
            key = gr.Dropdown(
                [], label="Heat-map and curve of", visible=False, filterable=False, elem_id="study-subject"
            )
            jump = gr.Radio([], label="Key slices", visible=False, elem_id="study-jump")
            keys = gr.HTML(elem_id="study-keys")
        with gr.Column(min_width=min_width):
            answer = gr.HTML(elem_id="study-answer")
            phrase = gr.Textbox(
                label="Word or phrase",
                info="Where is it? Its heat-map and its curve through the slices.",
                max_lines=1,
                elem_id="study-phrase",
            )
            labels = gr.Textbox(
                label="Labels",
                info="Two or more, one per line. Empty: those of the modality.",
                lines=3,
                elem_id="study-labels",
            )
            ask = gr.Button("Ask", variant="primary", elem_id="study-ask")
            with gr.Accordion("How files are read", open=False):
                plane = gr.Radio(PLANES, value=PLANES[0], label="Plane of NIfTI volumes")
                window = gr.Dropdown([USUAL, *WINDOWS], value=USUAL, label="Window of CT", filterable=False)
                trust = gr.Checkbox(label="The modality in the header selects the expert")
                again = gr.Button("Read again", elem_id="study-again")
            left_out = gr.HTML(elem_id="study-left-out")
    gr.Markdown(f"## What this page cannot do\n\n{limits_text(page.limits)}", elem_id="study-limits")

    outputs = [place, key, number, shown, curve, jump, keys, answer, left_out]
    asked = [labels, phrase]
    reading = [plane, window, trust]
    turn: dict[str, Any] = {"concurrency_id": TURN, "concurrency_limit": 1, "show_progress_on": [status]}
    files.upload(tab.upload, [files, view, *asked, *reading], [files, view, status, *outputs], **turn)
    for index, button in enumerate(buttons):
        button.click(_example_handler(tab, index), [view, *asked, *reading], [view, status, *outputs], **turn)
    again.click(tab.again, [view, *asked, *reading], [view, status, *outputs], **turn)
    gr.on([ask.click, phrase.submit], tab.ask, [view, place, number, key, *asked], [view, status, *outputs], **turn)
    place.input(tab.choose, [view, place], [status, *outputs], **turn)
    key.input(tab.point, [view, place, key], [status, *outputs], **turn)
    quick = {**turn, "show_progress": "hidden", "trigger_mode": "always_last"}
    number.input(tab.move, [view, place, key, number], [shown, curve], **quick)
    jump.input(tab.jump, [view, place, key, jump], [number, shown, curve], **quick)
    opacity.change(None, [opacity], None, js=set_opacity)
