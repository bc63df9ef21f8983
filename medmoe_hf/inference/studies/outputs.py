"""Files of predictions: prediction.json, prediction.csv, report.html and heat-maps as NIfTI."""

import csv
import gzip
import json
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medmoe_hf.common.console import text_table
from medmoe_hf.common.files import atomic_dir, check_output
from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.studies.dicom_out import has_dicom, write_dicom
from medmoe_hf.inference.studies.predictions import (
    CSV_COLUMNS,
    IDENTIFYING_COLUMNS,
    SeriesPrediction,
    StudyPrediction,
    csv_rows,
    predictions_dict,
    skipped_of,
)
from medmoe_hf.inference.studies.report import percent, report_html, series_title
from medmoe_hf.model.study_files_medmoe import HEATMAP

_MAP_SIDE = 64  # sides at which maps are kept until their range is known; models have 20 to 56 cells
_INT16 = 4  # NIfTI's code
_STEPS = 2000  # of the greatest value; finer ones would only make the file larger
_REASONS_SHOWN = 5
_NOTES_SHOWN = 5


def write_predictions(
    studies: Sequence[StudyPrediction],
    out: str | Path,
    *,
    keep_identifiers: bool = False,
    dicom: bool = False,
    force: bool = False,
) -> list[Path]:
    """Writes a folder with prediction.json, prediction.csv and report.html, and heat-maps of texts as NIfTI.

    There is a NIfTI file for each text and each series whose slices form a grid:
    `study-1-series-1-text-1.nii.gz`. By default nothing is written that identifies a person, except what the pictures
    themselves show.

    Args:
        studies: What `predict` returned. Their files are read again, for pictures and heat-maps.
        out: Folder to create.
        keep_identifiers: Also write UIDs and names of files.
        dicom: Also write what `write_dicom` does, for studies that were read from DICOM and have labels.
        force: Replace `out` if it exists.

    Returns:
        The files.

    Raises:
        ArgumentError: For `dicom` without `keep_identifiers`, or where nothing was read from DICOM.
        PathExistsError: If `out` exists and `force` is False, or if it was not made by this function, or holds files
            of the studies: those would be lost.

    Example:
        ```python
        studies = medmoe_hf.predict(["exports/study"], text="effusion")
        print(write_predictions(studies, "prediction"))
        ```
    """
    if dicom and not keep_identifiers:
        raise ArgumentError("DICOM output names the patient of the images: pass `keep_identifiers=True` as well.")
    out = Path(out)
    read = {source["file"] for study in studies for series in study.series for source in series.sources.values()}
    check_output(out, force, "prediction.json", read)
    with atomic_dir(out, force) as folder:
        content = predictions_dict(studies, keep_identifiers)
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
        with (folder / "prediction.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS + (IDENTIFYING_COLUMNS if keep_identifiers else ()))
            writer.writeheader()
            writer.writerows(csv_rows(studies, keep_identifiers))
        (folder / "report.html").write_text(report_html(studies, keep_identifiers), encoding="utf-8")
        for study in studies:
            for series in study.series:
                for number, one in enumerate(series.texts, start=1):
                    if series.affine is not None:
                        name = f"study-{study.number}-series-{series.number}-text-{number}.nii.gz"
                        write_heatmap(series, one.text, folder / name)
        if dicom:
            found = [write_dicom(study, folder) for study in studies if has_dicom(study)]
            if not found:
                raise ArgumentError("Nothing was read from DICOM, so there are no DICOM files to write.")
        names = sorted(path.name for path in folder.iterdir())
    return [out / name for name in names]


def write_heatmap(series: SeriesPrediction, phrase: str, path: str | Path) -> None:
    """Writes the heat-map of a label or text through a series as a NIfTI volume of 16-bit integers with a scale.

    Voxel (row, column, slot) belongs to that pixel of the upright slice, and the affine puts it to the place of the
    patient where the series has it. Slices that are missing or cannot be read are 0.

    Args:
        series: A series with an affine.
        phrase: A label or any text.
        path: File to write, ending in `.nii.gz`.

    Raises:
        ArgumentError: For a series whose slices form no grid.

    Example:
        ```python
        (study,) = medmoe_hf.predict(["exports/study"], labels=["liver", "spleen"])
        write_heatmap(study.series[0], "liver", "liver.nii.gz")
        ```
    """
    if series.affine is None or series.heatmaps is None or series.picture is None:
        raise ArgumentError("The slices of the series form no grid in space, so there is no volume of its heat-map.")
    maps = dict(series.heatmaps(phrase, range(series.count), size=_MAP_SIDE))
    slots = series.slots or list(range(series.count))
    by_slot = {slots[index]: index for index in maps}
    if not maps:
        raise ArgumentError("No slice of the series can be read any more.")
    height, width = series.picture(next(iter(maps))).shape[:2]
    top = max(float(np.abs(heat).max()) for heat in maps.values())
    scale = top / _STEPS if top > 0 else 1.0
    depth = max(slots) + 1
    # Level 1: maps are smooth, and higher levels take ten times as long for a tenth less.
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(_header((height, width, depth), np.asarray(series.affine), scale))
        for slot in range(depth):
            index = by_slot.get(slot)
            plane = np.zeros((height, width), np.int16)
            if index is not None:
                # Pillow wants (width, height).
                smooth = Image.fromarray(maps[index].astype(np.float32)).resize(
                    (width, height), Image.Resampling.BILINEAR
                )
                plane = np.round(np.asarray(smooth) / scale).astype(np.int16)
            file.write(plane.astype("<i2").tobytes(order="F"))


def _header(shape: tuple[int, int, int], affine: np.ndarray, scale: float) -> bytes:
    """The header of a NIfTI-1 file: 348 bytes, and 4 that say that no extension follows."""
    header = bytearray(352)
    sides = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, _INT16, 16)
    struct.pack_into("<8f", header, 76, 1.0, *sides, 0.0, 0.0, 0.0, 0.0)
    struct.pack_into("<3f", header, 108, 352.0, scale, 0.0)
    header[123] = 2  # millimetres
    struct.pack_into("80s", header, 148, HEATMAP)
    struct.pack_into("<2h", header, 252, 0, 1)  # the sform is set: "scanner"
    struct.pack_into("<12f", header, 280, *affine[:3].ravel().tolist())
    header[344:348] = b"n+1\0"
    return bytes(header)


def summary(studies: Sequence[StudyPrediction], labels: int = 8) -> str:
    """Formats predictions for the terminal: a table of series and their most probable labels, without identifiers.

    Args:
        studies: What `predict` returned.
        labels: Number of labels per series; a row says how many more there are.
    """
    rows = [["study", "series", "content", "expert", "accepted", "label", "probability", "key slice"]]
    for study in studies:
        for series in study.series:
            first = [str(study.number), str(series.number), series_title(series), series.expert, _accepted(series)]
            shown = [
                [label.label, percent(label.probability), _place(series, label.key_slices)]
                for label in series.labels[:labels]
            ]
            if more := len(series.labels) - len(shown):
                shown.append([f"({more} more in prediction.json, see --out)", "", ""])
            shown += [
                [f"“{text.text}”", f"({text.score:+.3f})", _place(series, text.key_slices)] for text in series.texts
            ]
            for number, cells in enumerate(shown or [["-", "-", "-"]]):
                rows.append([*(first if number == 0 else [""] * len(first)), *cells])
    lines = [text_table(rows), ""]
    for study in studies:
        for series in study.series:
            if series.decision:
                lines.append(f"Study {study.number}, series {series.number}. {series.decision}")
    if any(series.texts for study in studies for series in study.series):
        lines.append("In parentheses: similarity of a text, -1 to 1.")
    every = [(study, series) for study in studies for series in study.series]
    for study, series in every:
        if series.accepted is False:
            lines.append(f"REFUSED: study {study.number}, series {series.number}. {series.acceptance}")
        if series.task_warning:
            lines.append(f"ANOTHER MODALITY: study {study.number}, series {series.number}. {series.task_warning}")
    if any(series.accepted is None for _, series in every):
        lines.append("Not checked whether the images are of a kind that the model knows: it has no rejector.")
    notes = Counter(note for _, series in every for note in series.notes)
    for note, number in list(notes.items())[:_NOTES_SHOWN]:
        lines.append(f"Note{f' on {number} series' if number > 1 else ''}: {note}")
    if len(notes) > _NOTES_SHOWN:
        lines.append(f"There are {len(notes) - _NOTES_SHOWN} other notes, which prediction.json lists.")
    reasons = Counter(
        one.reason for one in [*(one for study in studies for one in study.skipped), *skipped_of(studies)]
    )
    lines += [f"Left out: {number} x {reason}" for reason, number in reasons.most_common(_REASONS_SHOWN)]
    if len(reasons) > _REASONS_SHOWN:
        lines.append(f"Left out for {len(reasons) - _REASONS_SHOWN} other reasons, which prediction.json lists.")
    lines.append("Probabilities compare the labels with each other. Research software, not a medical device.")
    return "\n".join(lines)


def _accepted(series: SeriesPrediction) -> str:
    return {None: "not checked", True: "yes", False: "NO"}[series.accepted]


def _place(series: SeriesPrediction, keys: Sequence[int]) -> str:
    return "-" if not keys or series.count == 1 else f"{keys[0] + 1} of {series.count}"
