"""Bootstrap intervals, by row or by subject."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from medmoe_hf.common.console import progress


@dataclass(frozen=True)
class Interval:
    """A measured value and its confidence interval.

    Attributes:
        value: Value on all rows.
        low: Lower end of the interval; NaN if there is none.
        high: Upper end of the interval; NaN if there is none.
        n: Number of independent units: groups if there are any, otherwise rows.
        undefined: Number of resamples in which the metric was NaN; the interval is over the others.
        rows: Number of rows; None if unknown.

    Example:
        >>> print(Interval(0.75, 0.5, 0.9, n=20))
        0.750 [0.50, 0.90]
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
    """Computes percentile bootstrap intervals of several metrics at once.

    All metrics use the same resamples, and the same rows of all columns are drawn together. (`scipy.stats.bootstrap`
    supports neither groups nor several metrics.)

    Args:
        metric: Function of resampled columns that returns metrics, with the same names each time. It is called
            `resamples + 1` times.
        columns: Arguments of `metric`, (N, ...) each.
        groups: (N,) group of each row, such as its subject; rows of a group are drawn together, since they carry less
            information than as many independent ones. None if rows are independent.
        resamples: Number of resamples.
        seed: The same seed, columns and groups yield the same intervals.
        level: Confidence level, between 0 and 1.

    Returns:
        Name -> interval. Its ends are NaN if there is only one row or group, which has no spread.

    Raises:
        ValueError: For no rows, columns of different lengths, or a setting out of range.

    Example:
        >>> import numpy as np
        >>> right = np.array([1, 1, 0, 1])
        >>> found = bootstrap(lambda rows: {"accuracy": float(rows.mean())}, right, resamples=100)
        >>> found["accuracy"].value, found["accuracy"].n
        (0.75, 4)
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
    # A drawn value, not an interpolated one: there is none between a number and infinity.
    low, high = np.quantile(known, [tail, 1 - tail], method="inverted_cdf") if len(known) else (np.nan, np.nan)
    return Interval(value, float(low), float(high), units, len(drawn) - len(known))
