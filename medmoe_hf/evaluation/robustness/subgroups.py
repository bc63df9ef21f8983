"""How well groups of people or images are predicted: by sex, age band, site, or any other column."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.robustness.scores import measure

_AGES = (0, 18, 40, 65, 80)
_MOST_VALUES = 10
_AGE = re.compile(r"0*(\d+(?:\.\d+)?)\s*(y|yr|yrs|years?)?", re.IGNORECASE)


def banded(column: str, cells: Sequence[str]) -> list[str]:
    """Turns numbers into bands; other cells stay as they are.

    Args:
        column: Name of the column. One that contains the word `age` has the bands 0-17, 18-39, 40-64, 65-79 and 80+
            years (cells such as `063Y` of DICOM too); other columns with more than ten different numbers have
            quarters.
        cells: N cells.

    Returns:
        N names of groups; "" where the cell is empty.

    Example:
        >>> banded("age", ["7", "063Y", "", "91"])
        ['0-17', '40-64', '', '80+']
    """
    stripped = [str(cell).strip() for cell in cells]
    known = [cell for cell in stripped if cell]
    if "age" in re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower()):
        matches = {cell: _AGE.fullmatch(cell) for cell in known}
        if all(matches.values()):
            return [_age_band(float(match[1])) if (match := matches.get(cell)) else "" for cell in stripped]
        return stripped
    try:
        numbers = {cell: float(cell) for cell in known}
    except ValueError:
        return stripped
    if len(set(numbers.values())) <= _MOST_VALUES:
        return stripped
    edges = np.quantile([numbers[cell] for cell in known], [0, 0.25, 0.5, 0.75, 1])
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    # A number on an edge belongs to the quarter above it, the largest to the last one.
    return [
        names[min(3, int(np.searchsorted(edges[1:], numbers[cell], "right")))] if cell else "" for cell in stripped
    ]


def _age_band(age: float) -> str:
    place = int(np.searchsorted(_AGES, age, side="right")) - 1
    return f"{_AGES[place]}+" if place == len(_AGES) - 1 else f"{_AGES[place]}-{_AGES[place + 1] - 1}"


def add_subgroups(result: Result, data: EvaluationSet, scores: np.ndarray, smallest: int) -> None:
    """Measures each group of each column, and the gap between its best and its worst group.

    The two groups of a gap are those on all images, in all resamples; `facts["worst_groups"]` has them.

    Args:
        result: Gets the variants `COLUMN = GROUP`, and `COLUMN` with the gaps.
        data: N images with `groups`.
        scores: (N, C), as in `task_scores`.
        smallest: Groups of fewer subjects (images, if subjects are unknown) are left out, and `facts["omitted"]`
            says so.
    """
    labels = data.labels
    assert labels is not None
    subjects = np.arange(len(data)).astype(str) if data.subjects is None else np.array(data.subjects)
    kept: dict[str, dict[str, np.ndarray]] = {}
    omitted: list[str] = result.facts.setdefault("omitted", [])
    for column, cells in data.groups.items():
        names = np.array(banded(column, cells))
        small = []
        for name in sorted(set(names.tolist()) - {""}):
            own = names == name
            count = len(set(subjects[own].tolist()))
            if count < smallest:
                small.append(f"{name} ({count})")
            else:
                kept.setdefault(column, {})[name] = own
        if small:
            what = "images" if data.subjects is None else "subjects"
            omitted.append(f"{column}: groups of fewer than {smallest} {what} are left out: {', '.join(small)}.")
        if empty := int((names == "").sum()):
            omitted.append(f"{column}: {empty} of {len(data)} images have no value and belong to no group.")
        if len(kept.get(column, ())) < 2:
            found = "no group" if column not in kept else f"one group only, {next(iter(kept[column]))}"
            omitted.append(f"{column}: there is {found}, and so no gap.")
    if not kept:
        return
    extremes = _extremes(kept, scores, labels)
    for column, groups in kept.items():
        for name, own in groups.items():
            undefined = [what for what, value in measure(scores[own], labels[own]).items() if np.isnan(value)]
            if undefined:
                omitted.append(
                    f"{column} = {name}: some class has no image, so that {', '.join(undefined)} is not defined."
                )

    def metric(table: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        found: dict[str, float] = {}
        for column, groups in kept.items():
            values = {}
            for name, own in groups.items():
                inside = own[rows]
                values[name] = measure(table[inside], truth[inside])
                found |= {f"{column} = {name}/{what}": value for what, value in values[name].items()}
            for what, (worst, best) in extremes[column].items():
                found[f"{column}/{what}_gap"] = values[best][what] - values[worst][what]
        return found

    measured = bootstrap(
        metric,
        scores,
        labels,
        np.arange(len(data)),
        groups=None if data.subjects is None else data.subjects,
        resamples=result.facts["resamples"],
        seed=result.facts["seed"],
    )
    for key, interval in measured.items():
        for column, groups in kept.items():
            for name, own in groups.items():
                if key.rsplit("/", 1)[0] == f"{column} = {name}":
                    units = len(set(subjects[own].tolist()))
                    interval = replace(interval, n=units, rows=int(own.sum()))
        result.metrics[key] = interval
    result.facts["worst_groups"] = {
        f"{column}, {what}": f"{worst} (best: {best})"
        for column, found in extremes.items()
        for what, (worst, best) in found.items()
    }


def _extremes(
    kept: Mapping[str, Mapping[str, np.ndarray]], scores: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, tuple[str, str]]]:
    """Column -> metric -> the worst and the best of the groups in which it is defined, if there are two."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for column, groups in kept.items():
        found[column] = {}
        by_group = {name: measure(scores[own], labels[own]) for name, own in groups.items()}
        for what in next(iter(by_group.values())):
            defined = {name: values[what] for name, values in by_group.items() if not np.isnan(values[what])}
            if len(defined) > 1:
                ordered = sorted(defined, key=defined.__getitem__)
                found[column][what] = (ordered[0], ordered[-1])
    return found
