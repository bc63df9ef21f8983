"""Calibration of a task: temperature and bias, thresholds and prediction sets, from scores of labelled images.

Whatever is reported of a calibration was measured by cross-validation over subjects: it was fitted on four fifths of
them and measured on the fifth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.calibration_measures import measure_classes, measure_findings
from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.model.tasks_medmoe import Calibration, Task

FOLDS = 5
"""Parts of the cross-validation. Each class needs as many subjects, or else a part lacks it."""

MINIMUM = 10
"""Cases that each class needs: the 90 % quantile of nine is their largest."""

CLASS_CONDITIONAL = 30
"""Subjects that each class needs for a quantile of its own: the coverage for new images then has a standard deviation
of at most sqrt(0.9 * 0.1 / 30) = 5.5 %."""

_EDGE = 1e-6  # thresholds stay inside of 0..1, and quantiles above the rounding of float32


@dataclass(frozen=True)
class _Part:
    """A fitted calibration, in arrays: (C,) each but the scale."""

    scale: float
    bias: np.ndarray
    thresholds: np.ndarray
    quantiles: np.ndarray


@dataclass(frozen=True)
class _Settings:
    multi_label: bool
    coverage: float
    sensitivity: dict[int, float]
    by_class: bool


def fit_calibration(
    task: Task,
    scores: Any,
    labels: Any,
    subjects: Sequence[str] | None = None,
    *,
    coverage: float = 0.9,
    sensitivity: Mapping[str, float] | None = None,
    prevalence: Mapping[str, float] | None = None,
    fitted_on: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Task:
    """Fits a calibration to the scores of labelled images.

    Temperature and biases maximise the likelihood, with Platt's targets (a class of n images has the target
    (n + 1) / (n + 2) instead of 1), which keep them finite where classes are separated. Thresholds maximise Youden's
    index, sensitivity + specificity - 1, of a class against the others; or have a wanted sensitivity. Prediction sets
    are those of split conformal prediction with the score `1 - probability`, from the probabilities that the
    cross-validation gave: the quantile is the ceil((n + 1) * coverage)-th smallest.

    Args:
        task: The task.
        scores: (N, C) similarities, see `medmoe_hf.model.tasks_medmoe.task_scores`.
        labels: (N,) ids of classes, -100 where unknown; for a multi-label task (N, C) with 1 (present), 0 (absent) or
            -100.
        subjects: Subject of each image, for folds and intervals; None if images are independent.
        coverage: Share of images whose set holds their class, of 0..1.
        sensitivity: Class -> sensitivity that its threshold is chosen for, of 0..1; the others have Youden's.
        prevalence: Class -> share where the model will be used; None if it is that of the images.
        fitted_on: What is recorded of the data, besides numbers of cases and subjects.
        resamples: Number of bootstrap resamples for the intervals.
        seed: Seed of the folds and the bootstrap.

    Returns:
        The task with a calibration.

    Raises:
        ValueError: If a class has too few subjects or cases, scores do not rise with the probability of their class,
            or an argument does not fit.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.evaluation.calibration import fit_calibration
        >>> from medmoe_hf.model import Task
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(200) % 2
        >>> scores = 3 * (np.eye(2)[labels] + rng.normal(size=(200, 2)))
        >>> task = Task("toy", {"normal": ["Normal."], "effusion": ["Effusion."]})
        >>> fitted = fit_calibration(task, scores, labels, resamples=20).calibration
        >>> bool(fitted.temperature > 2), fitted.conformal
        (True, 'class-conditional')
    """
    table, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    multi_label, classes = task.kind == "multi-label", task.classes
    shape = (len(table), len(classes))
    if table.shape != shape or truth.shape != (shape if multi_label else shape[:1]) or not np.isfinite(table).all():
        raise ArgumentError(
            f"Expected finite scores (N, {len(classes)}) and labels {'(N, C)' if multi_label else '(N,)'}, got "
            f"{table.shape} and {truth.shape}."
        )
    check_shares(coverage, sensitivity or {})
    known = (truth != UNKNOWN_LABEL).any(axis=1) if multi_label else truth != UNKNOWN_LABEL
    groups = np.array([str(row) for row in range(len(table))] if subjects is None else list(map(str, subjects)))
    if len(groups) != len(table):
        raise ArgumentError(f"There are {len(table)} images but {len(groups)} subjects.")
    table, truth, groups = table[known], truth[known], groups[known]
    unit = "cases" if subjects is None else "subjects"
    units = _refuse_too_few(task, truth, groups, subjects is not None)
    settings = _Settings(
        multi_label,
        coverage,
        _wanted(task, truth, sensitivity or {}),
        # A multi-label set lists what cannot be ruled out, so its quantile is one of the images with the finding.
        multi_label or min(units.values()) >= CLASS_CONDITIONAL,
    )
    held_out = _cross_validate(settings, table, truth, groups, seed)
    part = _fit(settings, table, truth)
    if part.scale <= 0:
        raise ArgumentError(
            f'Task "{task.name}": higher scores do not mean more probable classes on these {len(table)} images, so '
            "there is nothing to calibrate. Check the prompts and the labels, and that the classes are those of the "
            "data."
        )
    part = replace(part, quantiles=_quantiles(settings, held_out["after"], truth))
    shares = _shares(settings, truth, len(classes))

    def by_class(values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(classes, values, strict=True)}

    found = Calibration(
        temperature=1 / part.scale,
        bias=by_class(part.bias),
        thresholds=by_class(part.thresholds),
        quantiles=by_class(part.quantiles),
        coverage=coverage,
        conformal="class-conditional" if settings.by_class else "marginal",
        prior=by_class(shares),
        prevalence=dict(prevalence or {}),
        fitted_on={
            **(fitted_on or {}),
            "cases": len(table),
            "subjects": None if subjects is None else len(set(groups)),
            f"{unit}_by_class": units,
        },
        measured=_measured(settings, classes, held_out, truth, groups, resamples, seed),
    )
    calibrated = replace(task, calibration=found)
    if prevalence:
        calibrated.probabilities(torch.zeros(1, len(classes)))  # checks it
    return calibrated


def fit_best_score(
    task: Task, scores: Mapping[str, Any], labels: Any, subjects: Sequence[str] | None = None, **options: Any
) -> Task:
    """Fits a calibration to each of several scores, and keeps the one that is right with the highest probability.

    Compared is the mean over classes of the negative logarithm of the probability of the right answer, of subjects
    that the calibration was not fitted on. It needs fewer images than a comparison of accuracies, in which an image
    counts only if it changes sides. `fitted_on["held_out_loss"]` has that of each score.

    Args:
        task: The task; its own score is kept where none is better.
        scores: Kind of score, as in `Task.score` -> (N, C) similarities.
        labels: As in `fit_calibration`.
        subjects: As in `fit_calibration`.
        **options: Other arguments of `fit_calibration`.

    Returns:
        The task with a calibration, and the score that it belongs to.

    Raises:
        ValueError: As in `fit_calibration`, if no score can be calibrated.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.evaluation.calibration import fit_best_score
        >>> from medmoe_hf.model import Task
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(200) % 2
        >>> clear, vague = (np.eye(2)[labels] * height + rng.normal(size=(200, 2)) for height in (3, 0.5))
        >>> task = Task("toy", {"normal": ["Normal."], "effusion": ["Effusion."]})
        >>> fit_best_score(task, {"global": vague, "local": clear}, labels, resamples=20).score
        'local'
    """
    if not scores:
        raise ArgumentError(f'Task "{task.name}": there are no scores.')
    # The own score first: of equal losses it is the smallest.
    order = sorted(scores, key=lambda kind: kind != task.score)
    losses = {kind: held_out_loss(task, scores[kind], labels, subjects, options.get("seed", 0)) for kind in order}
    refused: list[ArgumentError] = []
    for kind in sorted(losses, key=losses.__getitem__):
        try:
            best = fit_calibration(replace(task, score=kind), scores[kind], labels, subjects, **options)
        except ArgumentError as error:
            refused.append(error)  # another score may rise with the probability of its class
            continue
        assert best.calibration is not None
        facts = {
            **best.calibration.fitted_on,
            "held_out_loss": {name: round(loss, 4) for name, loss in losses.items()},
        }
        return replace(best, calibration=replace(best.calibration, fitted_on=facts))
    raise refused[0]


def held_out_loss(task: Task, scores: Any, labels: Any, subjects: Sequence[str] | None = None, seed: int = 0) -> float:
    """Computes the mean over classes of -log(probability of the right answer), by cross-validation over subjects.

    Args:
        task: The task.
        scores: (N, C).
        labels: As in `fit_calibration`.
        subjects: As in `fit_calibration`.
        seed: Seed of the folds.

    Returns:
        A loss above 0; that of guessing is the logarithm of the number of classes, or of 2 for a multi-label task.

    Raises:
        ValueError: If a class has too few subjects or cases.
    """
    table, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    multi_label = task.kind == "multi-label"
    known = (truth != UNKNOWN_LABEL).any(axis=1) if multi_label else truth != UNKNOWN_LABEL
    groups = np.arange(len(table)).astype(str) if subjects is None else np.array(list(map(str, subjects)))
    table, truth, groups = table[known], truth[known], groups[known]
    _refuse_too_few(task, truth, groups, subjects is not None)
    settings = _Settings(multi_label, 0.9, {}, by_class=False)
    after = np.clip(_cross_validate(settings, table, truth, groups, seed)["after"], _EDGE, 1 - _EDGE)
    own = truth if multi_label else np.eye(len(task.classes), dtype=np.int64)[truth]
    parts = [-np.log(after)[own[:, index] == 1, index].mean() for index in range(len(task.classes))]
    if multi_label:
        parts += [-np.log(1 - after)[own[:, index] == 0, index].mean() for index in range(len(task.classes))]
    return float(np.mean(parts))


# What is needed


def _refuse_too_few(task: Task, truth: np.ndarray, groups: np.ndarray, known: bool) -> dict[str, int]:
    """Returns the number of subjects (cases, where subjects are not known) of each class.

    Raises:
        ArgumentError: If a class has too few subjects or cases.
    """
    found, lacking = {}, []
    for index, name in enumerate(task.classes):
        present = truth[:, index] == 1 if truth.ndim == 2 else truth == index
        found[name] = len(set(groups[present]))
        counts = [(f'"{name}"', present)]
        if truth.ndim == 2:
            counts.append((f'the absence of "{name}"', truth[:, index] == 0))
        for what, rows in counts:
            cases, subjects = int(rows.sum()), len(set(groups[rows]))
            if cases < MINIMUM:
                lacking.append(f"{what} has {cases} cases, {MINIMUM - cases} more")
            elif subjects < FOLDS:
                lacking.append(f"{what} has {subjects} subjects, {FOLDS - subjects} more")
    if lacking:
        needed = f"{MINIMUM} cases{f' of {FOLDS} subjects' if known else ''}"
        raise ArgumentError(
            f'Task "{task.name}": too little to calibrate on. Each class needs {needed} or more: {"; ".join(lacking)}.'
        )
    return found


def check_shares(coverage: float, sensitivity: Mapping[str, float]) -> None:
    """Checks what a calibration is wanted to reach, before images are scored.

    Args:
        coverage: Share of images whose prediction set holds their class.
        sensitivity: Class -> share of its images that are found.

    Raises:
        ArgumentError: For a percentage, or another number that is no such share.
    """
    if not 0.5 <= coverage < 1:
        raise ArgumentError(f"`coverage` is a share of at least 0.5 and below 1, got {coverage}.")
    for name, value in sensitivity.items():
        if not 0 < value < 1:
            raise ArgumentError(f'`sensitivity` of "{name}" must lie between 0 and 1, got {value}.')


def _wanted(task: Task, truth: np.ndarray, sensitivity: Mapping[str, float]) -> dict[int, float]:
    """The wanted sensitivities by the index of the class."""
    for name, value in sensitivity.items():
        if name not in task.classes:
            raise ArgumentError(f'`sensitivity`: "{name}" is none of the classes {", ".join(task.classes)}.')
        index = task.classes.index(name)
        count = int(((truth[:, index] if truth.ndim == 2 else truth == index) == 1).sum())
        if math.ceil(value * (count + 1)) > count:
            needed = math.ceil(value / (1 - value) - 1e-9)
            raise ArgumentError(f'A sensitivity of {value:g} for "{name}" needs {needed} cases of it, got {count}.')
    if truth.ndim == 1 and len(task.classes) == 2 and len(sensitivity) == 2:
        raise ArgumentError("The two classes share one threshold: name the sensitivity of one of them.")
    return {task.classes.index(name): value for name, value in sensitivity.items()}


# Fitting


def _fit(settings: _Settings, scores: np.ndarray, truth: np.ndarray) -> _Part:
    scale, bias = fit_scale(scores, truth)
    probabilities = _probabilities(settings, scores, scale, bias)
    count = scores.shape[1]
    thresholds = np.full(count, 0.5)
    for index in range(count):
        positive = truth[:, index] if settings.multi_label else (truth == index).astype(np.int64)
        rows = positive != UNKNOWN_LABEL
        column, present = probabilities[rows, index], positive[rows] == 1
        if present.all() or not present.any():
            continue  # a fold of a rare finding
        wanted = settings.sensitivity.get(index)
        thresholds[index] = (
            youden_threshold(column, present) if wanted is None else sensitivity_threshold(column, present, wanted)
        )
    if not settings.multi_label and count == 2:
        # One cut between the two classes: that of the class with a wanted sensitivity, or of the second one.
        chosen = next(iter(settings.sensitivity), 1)
        thresholds[1 - chosen] = 1 - thresholds[chosen]
    return _Part(scale, bias, thresholds, _quantiles(settings, probabilities, truth))


def fit_scale(scores: np.ndarray, labels: np.ndarray, smooth: bool = True) -> tuple[float, np.ndarray]:
    """Fits `scale * score + bias` by maximum likelihood: Newton's method, since the loss is convex in both.

    Args:
        scores: (N, C).
        labels: (N,) ids for a softmax over classes, or (N, C) with 1, 0 or -100 for a sigmoid per class.
        smooth: Whether Platt's targets are used; without them nothing is finite where classes are separated.

    Returns:
        The scale (1 / temperature; not above 0 if scores do not rise with the probability of their class) and (C,)
        biases, with a mean of 0 for a softmax.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.evaluation.calibration import fit_scale
        >>> scale, bias = fit_scale(np.array([[1.0], [2.0], [1.5], [3.0]]), np.array([[0], [1], [1], [0]]))
        >>> bias.shape
        (1,)
    """
    count = scores.shape[1]
    multi_label = labels.ndim == 2
    known = labels != UNKNOWN_LABEL if multi_label else np.ones_like(scores, dtype=bool)
    present = labels == 1 if multi_label else labels[:, None] == np.arange(count)
    targets = present.astype(np.float64)
    if smooth:
        if multi_label:
            high = (present.sum(axis=0) + 1) / (present.sum(axis=0) + 2)
            low = 1 / ((known & ~present).sum(axis=0) + 2)
            targets = np.where(present, high, low)
        else:
            sizes = present.sum(axis=0)[labels][:, None]
            targets = np.where(present, (sizes + 1) / (sizes + 2), 1 / ((sizes + 2) * (count - 1)))
    # Only differences count: between classes of a row for a softmax, between rows for a sigmoid.
    centre = (
        np.array([scores[known[:, column], column].mean() for column in range(count)])
        if multi_label
        else scores.mean(axis=1, keepdims=True)
    )
    spread = float((scores - centre)[known].std()) or 1.0
    values = (scores - centre) / spread
    parameters = np.zeros(count + 1)

    def logits(at: np.ndarray) -> np.ndarray:
        table: np.ndarray = at[0] * values + at[1:]
        return table

    def loss(at: np.ndarray) -> float:
        table = logits(at)
        if multi_label:
            return float((np.logaddexp(0, table) - targets * table)[known].sum())
        return float((np.logaddexp.reduce(table, axis=1) - (targets * table).sum(axis=1)).sum())

    current = loss(parameters)
    for _ in range(100):
        table = logits(parameters)
        chances = _sigmoid(table) if multi_label else _softmax(table)
        errors = np.where(known, chances - targets, 0.0)
        gradient = np.concatenate([[(errors * values).sum()], errors.sum(axis=0)])
        hessian = np.zeros((count + 1, count + 1))
        if multi_label:
            weights = np.where(known, chances * (1 - chances), 0.0)
            hessian[0, 0] = (weights * values**2).sum()
            hessian[0, 1:] = (weights * values).sum(axis=0)
            hessian[1:, 1:] = np.diag(weights.sum(axis=0))
        else:
            means = (chances * values).sum(axis=1, keepdims=True)
            hessian[0, 0] = (chances * (values - means) ** 2).sum()
            hessian[0, 1:] = (chances * (values - means)).sum(axis=0)
            hessian[1:, 1:] = np.diag(chances.sum(axis=0)) - chances.T @ chances
        hessian[1:, 0] = hessian[0, 1:]
        # The biases of a softmax have one direction that changes nothing.
        step = np.linalg.solve(hessian + 1e-9 * np.eye(count + 1), gradient)
        size = 1.0
        while size > 1e-8 and not (tried := loss(parameters - size * step)) <= current:
            size /= 2
        if size <= 1e-8:
            break
        parameters = parameters - size * step
        done = current - tried <= 1e-12 * max(1.0, abs(current))
        current = tried
        if done:
            break
    scale = float(parameters[0] / spread)
    bias = parameters[1:]
    return (scale, bias - scale * centre) if multi_label else (scale, bias - bias.mean())


def youden_threshold(probabilities: np.ndarray, present: np.ndarray) -> float:
    """Finds the threshold with the largest sensitivity + specificity.

    Args:
        probabilities: (N,).
        present: (N,) truth values, of both kinds.

    Returns:
        A number halfway between two probabilities; of equally good ones the lowest, which has the higher sensitivity.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.evaluation.calibration import youden_threshold
        >>> youden_threshold(np.array([0.1, 0.3, 0.5, 0.9]), np.array([False, False, True, True]))
        0.4
    """
    values = np.unique(probabilities)
    if len(values) == 1:
        return _inside(float(values[0]))
    above = np.sort(probabilities[present]), np.sort(probabilities[~present])
    rates = [1 - np.searchsorted(column, values[1:], side="left") / len(column) for column in above]
    best = int(np.argmax(np.round(rates[0] - rates[1], 12)))
    return _inside(float((values[best] + values[best + 1]) / 2))


def sensitivity_threshold(probabilities: np.ndarray, present: np.ndarray, sensitivity: float) -> float:
    """Finds the highest threshold whose expected sensitivity for new images is at least the wanted one.

    Args:
        probabilities: (N,).
        present: (N,) truth values.
        sensitivity: The wanted share of the n images with the class, of 0..1.

    Returns:
        A threshold that the ceil((n + 1) * sensitivity) most probable of them reach.
    """
    inside = np.sort(probabilities[present])[::-1]
    value = inside[min(math.ceil(sensitivity * (len(inside) + 1) - 1e-9), len(inside)) - 1]
    below = probabilities[probabilities < value]
    return _inside(float((value + below.max()) / 2 if len(below) else value / 2))


def conformal_quantile(distances: np.ndarray, coverage: float) -> float:
    """Computes the finite-sample quantile of split conformal prediction.

    Args:
        distances: (n,) 1 - probability of the right class, of images that are not used for anything else.
        coverage: Wanted share, of 0..1.

    Returns:
        The ceil((n + 1) * coverage)-th smallest; 1 (every class is in the set) if n is too small for the coverage.

    Example:
        >>> import numpy as np
        >>> from medmoe_hf.evaluation.calibration import conformal_quantile
        >>> round(conformal_quantile(np.arange(10) / 10, 0.8), 3), conformal_quantile(np.zeros(5), 0.9)
        (0.8, 1.0)
    """
    number = math.ceil((len(distances) + 1) * coverage - 1e-9)
    return 1.0 if number > len(distances) else min(1.0, float(np.sort(distances)[number - 1]) + _EDGE)


def _quantiles(settings: _Settings, probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    count = probabilities.shape[1]
    present = truth == 1 if settings.multi_label else truth[:, None] == np.arange(count)
    distances = [1 - probabilities[present[:, index], index] for index in range(count)]
    if settings.by_class:
        return np.array([conformal_quantile(column, settings.coverage) for column in distances])
    return np.full(count, conformal_quantile(np.concatenate(distances), settings.coverage))


def _probabilities(settings: _Settings, scores: np.ndarray, scale: float, bias: np.ndarray) -> np.ndarray:
    table = scale * scores + bias
    return _sigmoid(table) if settings.multi_label else _softmax(table)


def _softmax(table: np.ndarray) -> np.ndarray:
    raised = np.exp(table - table.max(axis=1, keepdims=True))
    chances: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return chances


def _sigmoid(table: np.ndarray) -> np.ndarray:
    chances: np.ndarray = np.exp(-np.logaddexp(0, -table))
    return chances


def _inside(value: float) -> float:
    return min(max(value, _EDGE), 1 - _EDGE)


def _shares(settings: _Settings, truth: np.ndarray, count: int) -> np.ndarray:
    if settings.multi_label:
        return np.array([(truth[:, index] == 1).sum() / (truth[:, index] >= 0).sum() for index in range(count)])
    return np.bincount(truth, minlength=count) / len(truth)


# Measuring


def _cross_validate(
    settings: _Settings, scores: np.ndarray, truth: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """What calibrations that were fitted without a subject give for it: (N, C) each."""
    before = _probabilities(settings, scores, 1.0, np.zeros(scores.shape[1]))
    after, flags, sets = np.zeros_like(before), np.zeros(before.shape, bool), np.zeros(before.shape, bool)
    relative = np.zeros_like(before)
    folds = _folds(truth, groups, seed)
    for fold in range(FOLDS):
        rows = folds == fold
        part = _fit(settings, scores[~rows], truth[~rows])
        after[rows] = _probabilities(settings, scores[rows], part.scale, part.bias)
        flags[rows] = after[rows] >= part.thresholds
        relative[rows] = after[rows] / part.thresholds
        sets[rows] = 1 - after[rows] <= part.quantiles
    return {"before": before, "after": after, "flags": flags, "sets": sets, "relative": relative}


def _folds(truth: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each row: subjects stay together, and classes are spread evenly."""
    names, first, number = np.unique(groups, return_index=True, return_inverse=True)
    # Subjects of a class (of a combination of findings) lie next to each other and are dealt one by one.
    kinds = np.unique(truth[first], axis=0, return_inverse=True)[1].reshape(-1)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(names)), kinds))
    dealt = np.empty(len(names), dtype=np.int64)
    dealt[order] = np.arange(len(names)) % FOLDS
    folds: np.ndarray = dealt[number.reshape(-1)]
    return folds


def _measured(
    settings: _Settings,
    classes: Sequence[str],
    held_out: Mapping[str, np.ndarray],
    truth: np.ndarray,
    groups: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, list[float]]:
    measure = measure_findings if settings.multi_label else measure_classes
    found = bootstrap(
        lambda *columns: measure(classes, *columns),
        *(held_out[name] for name in ("before", "after", "flags", "sets", "relative")),
        truth,
        groups=groups,
        resamples=resamples,
        seed=seed,
    )
    return {name: _rounded(interval) for name, interval in found.items() if math.isfinite(interval.value)}


def _rounded(interval: Interval) -> list[float]:
    ends = (interval.low, interval.high)
    return [round(one, 4) for one in (interval.value, *(ends if all(map(math.isfinite, ends)) else ()))]
