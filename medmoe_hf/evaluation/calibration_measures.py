"""How well a calibrated task answers: calibration error, thresholds and prediction sets, on images with labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import calibration as measure_calibration
from medmoe_hf.inference.studies.pooling import softmax
from medmoe_hf.model import Task


def measure_calibrated(
    task: Task,
    scores: Any,
    labels: Any,
    subjects: Sequence[str] | None = None,
    *,
    plain: Any = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Measures a calibrated task on images that it was not fitted on.

    Args:
        task: A multi-class task with a calibration.
        scores: (N, C) similarities of its kind.
        labels: (N,) ids of classes.
        subjects: Subject of each image; intervals are those of subjects.
        plain: (N, C) logits whose softmax is what the probabilities are compared with; None for `scores`.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        `ece_before`, `brier_before` and `balanced_accuracy_before` of the plain probabilities, `ece` and `brier` of
        the calibrated ones;
        `accuracy` and `balanced_accuracy` of the labels that `Task.decide` chooses; `coverage`, `set_size` and
        `empty_sets` of the prediction sets; sensitivity, specificity and coverage of each class. What concerns a class
        without images is NaN.

    Raises:
        ValueError: For a task without a calibration, or a multi-label one.

    Example:
        ```python
        found = measure_calibrated(model.tasks["chest"], answer.scores, labels, subjects)
        print(found["coverage"])
        ```
    """
    if task.calibration is None or task.kind == "multi-label":
        raise ArgumentError(f'Task "{task.name}" must be multi-class and calibrated to be measured.')
    table, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    chosen, sets = task.decide(torch.from_numpy(table))
    assert sets is not None

    def flags(names: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([[name in row for name in task.classes] for row in names])

    after = task.probabilities(torch.from_numpy(table), task.calibration.prior).numpy()
    limits = np.array([task.calibration.thresholds[name] for name in task.classes])
    columns = {
        "before": softmax(table if plain is None else np.asarray(plain, dtype=np.float64)),
        "after": after,
        "flags": after >= limits,
        "sets": flags(sets),
        "relative": flags(chosen).astype(np.float64),
        "truth": truth,
    }

    def metric(*drawn: np.ndarray) -> dict[str, float]:
        accuracy = float((drawn[4].argmax(axis=1) == drawn[5]).mean())
        return {"accuracy": accuracy, **measure_classes(task.classes, *drawn)}

    return bootstrap(metric, *columns.values(), groups=subjects, resamples=resamples, seed=seed)


def measure_classes(
    classes: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    flags: np.ndarray,
    sets: np.ndarray,
    relative: np.ndarray,
    truth: np.ndarray,
) -> dict[str, float]:
    """Measures a multi-class task on N images.

    Args:
        classes: C names.
        before: (N, C) probabilities before a calibration.
        after: (N, C) probabilities.
        flags: (N, C) whether the probability reaches the threshold.
        sets: (N, C) whether the class is in the prediction set.
        relative: (N, C), largest at the class that is chosen.
        truth: (N,) ids of classes.

    Returns:
        Name -> value; NaN for what concerns a class without images.
    """
    own = truth[:, None] == np.arange(len(classes))
    right = relative.argmax(axis=1) == truth
    old, new = measure_calibration(before, truth), measure_calibration(after, truth)
    result = {
        "ece_before": old["ece"],
        "ece": new["ece"],
        "brier_before": old["brier"],
        "brier": new["brier"],
        "balanced_accuracy_before": _balanced(before.argmax(axis=1) == truth, own),
        "balanced_accuracy": _balanced(right, own),
        "coverage": _mean(sets[own]),
        "set_size": _mean(sets.sum(axis=1)),
        "empty_sets": _mean(sets.sum(axis=1) == 0),
    }
    for index, name in enumerate(classes):
        rows = own[:, index]
        result[f"coverage: {name}"] = _mean(sets[rows, index])
        result[f"sensitivity: {name}"] = _mean(flags[rows, index])
        result[f"specificity: {name}"] = _mean(~flags[~rows, index])
    return result


def measure_findings(
    classes: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    flags: np.ndarray,
    sets: np.ndarray,
    relative: np.ndarray,
    truth: np.ndarray,
) -> dict[str, float]:
    """Measures a multi-label task on N images.

    Args:
        classes: C names.
        before: As in `measure_classes`.
        after: As in `measure_classes`.
        flags: As in `measure_classes`.
        sets: As in `measure_classes`.
        relative: Not used.
        truth: (N, C) with 1, 0, or another number where unknown.

    Returns:
        Name -> value; NaN for what concerns a finding without images.
    """
    by_name: dict[str, list[float]] = {name: [] for name in ("ece_before", "ece", "brier_before", "brier", "coverage")}
    result: dict[str, float] = {}
    for index, name in enumerate(classes):
        present, absent = truth[:, index] == 1, truth[:, index] == 0
        known = present | absent
        for suffix, table in (("_before", before), ("", after)):
            column = table[known, index]
            measured = measure_calibration(np.stack([1 - column, column], axis=1), present[known].astype(np.int64))
            by_name[f"ece{suffix}"].append(measured["ece"])
            by_name[f"brier{suffix}"].append(measured["brier"])
        by_name["coverage"].append(_mean(sets[present, index]))
        result[f"sensitivity: {name}"] = _mean(flags[present, index])
        result[f"specificity: {name}"] = _mean(~flags[absent, index])
        result[f"coverage: {name}"] = by_name["coverage"][-1]
    return {name: float(np.mean(values)) for name, values in by_name.items()} | result


def _balanced(right: np.ndarray, own: np.ndarray) -> float:
    """The mean over classes of the share of their images that are right; `own` is (N, C)."""
    return float(np.mean([_mean(right[rows]) for rows in own.T]))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
