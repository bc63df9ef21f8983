"""Studies as plain data, and back: what a process that decodes tells about the files that it read."""

from collections.abc import Callable
from typing import Any

import numpy as np

from medmoe_hf.model.medical_pixels_medmoe import MedicalImage
from medmoe_hf.model.modalities_medmoe import MODALITIES
from medmoe_hf.model.studies_medmoe import Series, Source, Studies, Study
from medmoe_hf.model.study_files_medmoe import Skipped

Decode = Callable[[int, int, int, Any], MedicalImage]
"""Function of a study, a series and a slice, counted from 0, and of a window."""

_KINDS = ("slices", "frames", "tiles", "volume", "image")


def described(studies: Studies) -> dict[str, Any]:
    """Returns everything about studies but their pixels, as JSON can hold it."""
    return {
        "studies": [
            {
                "uid": study.uid,
                "series": [_series(series) for series in study.series],
                "left_out": [_skipped(one) for one in study.left_out],
            }
            for study in studies
        ],
        "skipped": [_skipped(one) for one in studies.skipped],
    }


def _series(series: Series) -> dict[str, Any]:
    return {
        "uid": series.uid,
        "part": series.part,
        "kind": series.kind,
        "header_modality": series.header_modality,
        "sources": [[one.path, one.frame, one.sop_instance_uid, one.sop_class_uid] for one in series.sources],
        "size": None if series.size is None else [int(side) for side in series.size],
        "spacing": None if series.spacing is None else [float(side) for side in series.spacing],
        "positions": None if series.positions is None else np.asarray(series.positions, dtype=float).tolist(),
        "affine": None if series.affine is None else np.asarray(series.affine, dtype=float).tolist(),
        "slots": None if series.slots is None else [int(slot) for slot in series.slots],
        "missing": [[int(index), int(count)] for index, count in series.missing],
        "notes": series.notes,
    }


def _skipped(one: Skipped) -> list[Any]:
    return [one.path, one.reason, one.frame]


def rebuilt(told: dict[str, Any], decode: Decode, check_path: Callable[[str], None], window: Any = None) -> Studies:
    """Makes studies of what `described` returned; every value is checked, since its sender is not trusted.

    Args:
        told: The description.
        decode: What decodes a slice.
        check_path: Raises a ValueError for a path that was not to be read.
        window: Window with which slices are read by default.

    Raises:
        ValueError: The description is not one of `described`.
    """

    def skipped(entries: Any) -> list[Skipped]:
        made = [Skipped(_text(path), _text(reason)[:1000], _index(frame)) for path, reason, frame in entries]
        for one in made:
            check_path(one.path)
        return made

    def series(study: int, number: int, entry: Any) -> Series:
        sources = [
            Source(_text(path), _count(frame), _text(uid), _text(sop_class))
            for path, frame, uid, sop_class in entry["sources"]
        ]
        for source in sources:
            check_path(source.path)
        if entry["kind"] not in _KINDS or entry["header_modality"] not in (None, *MODALITIES):
            raise ValueError("there is no such kind or modality")
        made = Series(
            _text(entry["uid"]),
            _count(entry["part"]),
            entry["kind"],
            entry["header_modality"],
            sources,
            _pair(entry["size"], _count),
            _pair(entry["spacing"], float),
            _array(entry["positions"], (len(sources),)),
            _array(entry["affine"], (4, 4)),
            _array(entry["slots"], (len(sources),), np.int64),
            [(_count(index), _count(count)) for index, count in entry["missing"]],
            [_text(note) for note in entry["notes"]],
        )
        made._decode = lambda index, wanted: decode(study, number, index, wanted)
        made._window = window
        return made

    try:
        studies = []
        for place, entry in enumerate(told["studies"]):
            members = [series(place, number, one) for number, one in enumerate(entry["series"])]
            studies.append(Study(_text(entry["uid"]), members, skipped(entry["left_out"])))
        return Studies(studies, skipped(told["skipped"]))
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is no description of studies ({type(error).__name__})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("it is no number of something")
    return value


def _index(value: Any) -> int | None:
    return None if value is None else _count(value)


def _pair(value: Any, kind: Callable[[Any], Any]) -> tuple[Any, Any] | None:
    if value is None:
        return None
    first, second = value
    return kind(first), kind(second)


def _array(value: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray | None:
    if value is None:
        return None
    made = np.asarray(value, dtype=dtype)
    if made.shape != shape:
        raise ValueError("an array has another shape")
    return made
