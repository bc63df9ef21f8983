"""How sure a measurement is: bootstrap intervals, by row or by subject."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from medmoe_hf.common.console import progress


@dataclass(frozen=True)
class Interval:
    """A measured value and the interval it is known to.

    Attributes:
        value: measured on all rows.
        low, high: ends of the interval; NaN if there was nothing to tell them from.
        n: how many independent units it rests on: groups where there are any, else rows.
        rows: on how many rows it was measured; None where nobody has said it.
        undefined: resamples in which the metric was NaN; the interval is of the others.
    """

    value: float
    low: float
    high: float
    n: int
    undefined: int = 0
    rows: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    metric: Callable[..., Mapping[str, float]],
    *columns: ArrayLike,
    groups: Sequence[str] | Sequence[int] | np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap of several metrics at once.

    All metrics come from the same resamples, and the same rows of all columns are drawn together. Not by
    `scipy.stats.bootstrap`: it knows neither groups nor several metrics.

    Args:
        metric: gives the metrics of some rows, with the same names each time. It is called `resamples + 1` times.
        columns: what it takes, (N, ...) each.
        groups: (N,) of each row, such as its subject; rows of a group are drawn together, since they say less than as
            many independent ones. None means that rows are independent.
        resamples: how often to draw.
        seed: the same seed, columns and groups give the same intervals.
        level: the share of such intervals that should hold the truth, between 0 and 1.

    Returns:
        An interval by name. Its ends are NaN if there is only one row or group: that says nothing of the spread.

    Raises:
        ValueError: no rows, columns of different lengths, or a setting out of range.
    """
    tables = [np.asarray(column) for column in columns]
    lengths = [len(table) for table in tables] + ([] if groups is None else [len(groups)])
    if not tables or len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"`columns` and `groups` must have the same number of rows, at least one; got {lengths}.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"Expected resamples >= 1 and 0 < level < 1, got {resamples} and {level}.")
    members = None if groups is None else _members(np.asarray(groups))
    units = lengths[0] if members is None else len(members)
    values = metric(*tables)
    if units == 1:
        nan = float("nan")
        return {name: Interval(float(value), nan, nan, 1, rows=lengths[0]) for name, value in values.items()}
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for _ in progress(range(resamples), "bootstrap", unit="resample"):
        picked = generator.integers(units, size=units)
        rows = picked if members is None else np.concatenate([members[unit] for unit in picked])
        for name, value in metric(*(table[rows] for table in tables)).items():
            drawn[name].append(value)
    return {
        name: replace(_interval(float(value), np.array(drawn[name]), units, level), rows=lengths[0])
        for name, value in values.items()
    }


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """The rows of each group."""
    _, number, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1])


def _interval(value: float, drawn: np.ndarray, units: int, level: float) -> Interval:
    known = drawn[~np.isnan(drawn)]
    tail = (1 - level) / 2
    # A value that was drawn, not one between two: between a number and infinity there is none.
    low, high = np.quantile(known, [tail, 1 - tail], method="inverted_cdf") if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), units, len(drawn) - len(known))
