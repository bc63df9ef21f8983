"""Linear probe: linear classifiers on the features of a frozen image tower, with few and with many images."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from medmoe_hf.common.console import progress
from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL, EvaluationSet, test_split
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.metrics import classification_metrics, multilabel_metrics
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class, known_by_class
from medmoe_hf.inference.encoders import Encoder

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise MissingPackageError('Linear probes need scikit-learn: pip install "medmoe_hf[evaluate]"') from error

FRACTIONS = (0.01, 0.1, 1.0)
SEEDS = 5
STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Values of C, the inverse of the penalty, from which the validation split selects."""
Unit = Literal["image", "case"]
"""What a probe classifies: single images, or cases, whose images' features are averaged."""
_ITERATIONS = 2000
_OWN_SPLITS = "no training split; split here by subject into a half for training, a fifth for validation and the rest"


def linear_probe(
    encoder: Encoder,
    data: EvaluationSet,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = SEEDS,
    resamples: int = 1000,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    by: Unit = "image",
) -> Result:
    """Fits logistic regression (L-BFGS) on cached features of the image tower, on parts of the training split.

    A part is stratified, has at least one image of each class, and is drawn again per seed. Features are standardized
    by the part's mean and standard deviation. C is the one of `strengths` with the lowest log loss on the validation
    split. Variants are `<features> <share>`, such as `expert 10%`; a metric is the mean over seeds, its interval is
    over the images of the test split, and `facts["seeds"]` has the accuracy per seed. `Result.probabilities` holds
    what the metrics are computed from, so that two kinds of features can be compared on the same images. A set without
    splits is split by `own_splits`, as noted in `facts["split"]`.

    On a multi-label set one binary classifier is fitted per finding, on the images where it is known, each with a C of
    its own. `<features> <share>` has the means over findings and `<features> <share>, <finding>` the metrics of one;
    `facts["seeds"]` has the macro AUROC per seed.

    By case, the features of all images of a subject (a patient or a study, as the recipe's `subject` says) are
    averaged before anything is fitted; parts, C and intervals are over cases. A finding is present in a case if it is
    in one of its images, else absent if it is in one of them. `facts["units"]` has the numbers of images and cases of
    each split.

    Args:
        encoder: See `load_encoder`.
        data: A set with labels.
        fractions: Shares of the training split, of 0..1. The complete split is used once: seeds would change nothing.
        seeds: Number of parts per share.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap; the parts' seeds are `seed`, `seed + 1`, ...
        strengths: Values of C, the inverse of the penalty. With one value no validation split is needed.
        by: Whether single images or whole cases are classified.

    Returns:
        The result, with protocol `linear-probe`.

    Raises:
        ValueError: For a set without labels or one of the splits, or a class without training images. By case also for
            a set without subjects, a case in two splits, or a case whose images are of different classes.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("rsna_pneumonia"), "rsna")
        result = linear_probe(load_encoder("small"), data, fractions=(1.0,))
        print(result.metrics["both 100%/macro_auroc"])
        ```
    """
    if data.labels is None:
        raise ArgumentError(f"{data.name}: a linear probe needs labels.")
    if by not in get_args(Unit):
        raise ArgumentError(f"`by` must be {' or '.join(get_args(Unit))}, got {by}.")
    split = None
    if data.splits is None or (data.splits == "test").all():
        data, split = own_splits(data, seed), _OWN_SPLITS
    test = test_split(data)
    train, validation = data.split("train"), data.split("validation")
    assert train.labels is not None
    assert validation.labels is not None
    assert test.labels is not None
    needed = {"train": train} | ({"validation": validation} if len(strengths) > 1 else {})
    for name, part in needed.items():
        if not len(part):
            raise ArgumentError(f"{data.name}: a linear probe needs a {name} split, and no image is in it.")
    images = {"train": len(train), "validation": len(validation), "test": len(test)}
    cases = [None, None, None] if by == "image" else _cases_of_splits(data, (train, validation, test))
    train, validation, test = (
        part if found is None else found.joined(part)
        for part, found in zip((train, validation, test), cases, strict=True)
    )
    assert train.labels is not None
    assert validation.labels is not None
    assert test.labels is not None
    _check_classes(train.labels, validation.labels if len(strengths) > 1 else None, data)
    fit: Callable[..., _Fit] = _fit_findings if data.multi_label else _fit_classes
    counts = count_by_class(train.labels, data.classes)
    result = Result(
        protocol="linear-probe",
        model=encoder.name,
        dataset=data.name,
        count=images["test"],
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples),
            "count_by_class": count_by_class(test.labels, data.classes),
            **({"known_by_class": known_by_class(test.labels, data.classes)} if data.multi_label else {}),
            "train_count_by_class": counts,
            "validation_count": len(validation),
            "unit": by,
            "units": {
                name: {"images": images[name], **({"cases": len(part)} if by == "case" else {})}
                for name, part in (("train", train), ("validation", validation), ("test", test))
            },
            "split": split,
            "seeds": {},
            "seed_metric": "macro_auroc" if data.multi_label else "accuracy",
            "strengths": {},
            "not_converged": 0,
        },
    )
    # Once for the three splits: the tower is frozen.
    features = [_features(encoder, part, found) for part, found in zip((train, validation, test), cases, strict=True)]
    assert features[0] is not None
    draw = multilabel_part if data.multi_label else stratified_part
    parts = {
        fraction: [draw(train.labels, fraction, seed + run) for run in range(1 if fraction == 1 else seeds)]
        for fraction in fractions
    }
    result.facts["same_parts"] = _same_parts(parts)
    result.facts["trained_on"] = {f"{fraction:.0%}": len(rows[0]) for fraction, rows in parts.items()}
    bar = progress(None, "linear probes", unit="probe", total=len(features[0]) * sum(map(len, parts.values())))
    for kind in features[0]:
        columns = [np.empty((0, 0)) if of_split is None else of_split[kind] for of_split in features]
        # In a small split 1 % and 10 % are the same images.
        fitted: dict[bytes, _Fit] = {}
        for fraction in fractions:
            runs = []
            for rows in parts[fraction]:
                key = rows.tobytes()
                if key not in fitted:
                    fitted[key] = fit(columns, rows, train.labels, validation.labels, strengths)
                runs.append(fitted[key])
                bar.update()
            variant = f"{kind} {fraction:.0%}"
            probabilities = result.probabilities[variant] = np.stack([run.probabilities for run in runs], axis=1)
            if data.multi_label:
                result.add_multilabel(variant, probabilities, test.labels, data.classes, test.subjects)
                found = [multilabel_metrics(run.probabilities, test.labels, data.classes) for run in runs]
                result.facts["seeds"][variant] = [one["macro_auroc"] for one in found]
            else:
                measured = bootstrap(
                    mean_of_runs, probabilities, test.labels, groups=test.subjects, resamples=resamples, seed=seed
                )
                result.add(variant, measured)
                right = probabilities.argmax(axis=2) == test.labels[:, None]
                result.facts["seeds"][variant] = right.mean(axis=0).tolist()
            result.facts["strengths"][variant] = [run.strength for run in runs]
            result.facts["not_converged"] += sum(not run.converged for run in runs)
    bar.close()
    return result


class Cases(NamedTuple):
    """The cases of the images of a split.

    Attributes:
        names: S names, in the order in which they occur.
        numbers: (N,) number of each image's case.
        labels: (S,), or (S, C) for findings.
    """

    names: list[str]
    numbers: np.ndarray
    labels: np.ndarray

    def joined(self, part: EvaluationSet) -> EvaluationSet:
        """The split with one row per case; `images` holds lists of the cases' images."""
        rows: list[list[Any]] = [[] for _ in self.names]
        for image, number in zip(part.images, self.numbers.tolist(), strict=True):
            rows[number].append(image)
        return EvaluationSet(part.name, rows, labels=self.labels, classes=part.classes)

    def mean(self, features: np.ndarray) -> np.ndarray:
        """Averages features (N, F) over the images of each case: (S, F)."""
        total = np.zeros((len(self.names), features.shape[1]))
        np.add.at(total, self.numbers, features)
        averaged: np.ndarray = total / np.bincount(self.numbers)[:, None]
        return averaged


def cases_of(part: EvaluationSet) -> Cases:
    """Groups the images of a split by subject.

    Args:
        part: Images with labels and subjects.

    Returns:
        Their cases. A finding is present in a case if it is in one of its images, else absent if it is in one of them,
        else unknown.

    Raises:
        ValueError: If the images of a case are of different classes.
    """
    assert part.labels is not None
    assert part.subjects is not None
    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(subject, len(known)) for subject in part.subjects], dtype=np.int64)
    shape = (len(known), *part.labels.shape[1:])
    highest, lowest = np.full(shape, UNKNOWN_LABEL), np.full(shape, np.iinfo(np.int64).max)
    # Present (1) is above absent (0), which is above unknown (-100).
    np.maximum.at(highest, numbers, part.labels)
    np.minimum.at(lowest, numbers, part.labels)
    if not part.multi_label and (mixed := np.flatnonzero(highest != lowest)).size:
        classes = [part.classes[label] for label in np.unique(part.labels[numbers == mixed[0]])]
        raise ArgumentError(
            f"{part.name}: the images of {len(mixed)} of {len(known)} cases are of different classes, such as "
            f"{' and '.join(classes)}; probe it by image."
        )
    return Cases(list(known), numbers, highest)


def _cases_of_splits(data: EvaluationSet, parts: Sequence[EvaluationSet]) -> list[Cases]:
    """The cases of each split, which must not share any."""
    if data.subjects is None:
        raise ArgumentError(f"{data.name}: a probe by case needs subjects; state `subject` in the recipe's layout.")
    found = [cases_of(part) for part in parts]
    twice = sum(count > 1 for count in Counter(name for cases in found for name in cases.names).values())
    if twice:
        raise ArgumentError(f"{data.name}: {twice} cases have images in several splits; a probe by case needs one.")
    return found


def _features(encoder: Encoder, part: EvaluationSet, cases: Cases | None) -> dict[str, np.ndarray] | None:
    """Features of a split by kind, float64: a row per image, or the mean of each case. None for an empty split."""
    if not len(part):
        return None
    if cases is None:
        return {kind: values.double().numpy() for kind, values in encoder.features(part.images).items()}
    flat = [image for own in part.images for image in own]
    # `part` lists images by case.
    ordered = cases._replace(numbers=np.repeat(np.arange(len(part)), [len(own) for own in part.images]))
    return {kind: ordered.mean(values.double().numpy()) for kind, values in encoder.features(flat).items()}


def _check_classes(train: np.ndarray, validation: np.ndarray | None, data: EvaluationSet) -> None:
    """Raises for a class without training images, or a finding that cannot be learned or validated."""
    name = data.name
    if not data.multi_label:
        empty = [label for label, count in count_by_class(train, data.classes).items() if not count]
        if empty:
            raise ArgumentError(f"{name}: the train split has no image of {', '.join(empty)}.")
        return
    for index, finding in enumerate(data.classes):
        for label, word in ((1, "with"), (0, "without")):
            if not (train[:, index] == label).any():
                raise ArgumentError(f"{name}: the train split has no image {word} {finding}.")
        if validation is not None and not (validation[:, index] >= 0).any():
            raise ArgumentError(f"{name}: the validation split has no image in which {finding} is known.")


def _same_parts(parts: Mapping[float, Sequence[np.ndarray]]) -> list[list[str]]:
    """Groups of two or more shares of a training split that are the same images in every draw."""
    groups: dict[tuple[bytes, ...], list[str]] = {}
    for fraction, draws in parts.items():
        groups.setdefault(tuple(rows.tobytes() for rows in draws), []).append(f"{fraction:.0%}")
    return [shares for shares in groups.values() if len(shares) > 1]


def mean_of_runs(runs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Computes classification metrics of several runs on the same images.

    Args:
        runs: (N, R, C) probabilities of R runs.
        labels: (N,) ids 0..C-1.

    Returns:
        The metrics of `classification_metrics`, as means over the runs.
    """
    found = [classification_metrics(runs[:, run], labels) for run in range(runs.shape[1])]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def own_splits(data: EvaluationSet, seed: int) -> EvaluationSet:
    """Splits a set that is all for testing: half for training, a fifth for validation and the rest for testing.

    The split is stratified by class, and by subject where subjects are known; a subject counts to the class of its
    first image. On a multi-label set an image counts to its rarest finding.

    Args:
        data: A set with labels.
        seed: Seed of the split.

    Returns:
        The set with `splits`.
    """
    assert data.labels is not None
    strata = _rarest_findings(data.labels) if data.multi_label else data.labels
    subjects = list(range(len(data))) if data.subjects is None else data.subjects
    first: dict[Any, int] = {}
    for subject, label in zip(subjects, strata.tolist(), strict=True):
        first.setdefault(subject, label)
    generator, split_of = np.random.default_rng(seed), {}
    for label in sorted(set(first.values())):
        members = [subject for subject, own in first.items() if own == label]
        order = generator.permutation(len(members))
        for rank, position in enumerate(order):
            share = (rank + 0.5) / len(members)
            split_of[members[position]] = "train" if share < 0.5 else "validation" if share < 0.7 else "test"
    return replace(data, splits=np.array([split_of[subject] for subject in subjects]))


def _rarest_findings(labels: np.ndarray) -> np.ndarray:
    """(N,) index of each image's rarest finding, C where it has none; of labels (N, C)."""
    present = labels == 1
    frequency = np.where(present, present.sum(axis=0), len(labels) + 1)
    rarest: np.ndarray = np.where(present.any(axis=1), frequency.argmin(axis=1), labels.shape[1])
    return rarest


def stratified_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a share of a split, the same share of each class, rounded, and at least one image.

    Args:
        labels: (N,) class indices.
        fraction: Share, above 0 and at most 1.
        seed: Seed of the draw.

    Returns:
        (n,) row indices, sorted.

    Raises:
        ValueError: If `fraction` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ArgumentError(f"A fraction must lie in 0..1 and be more than 0, got {fraction}.")
    generator = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        rows = (labels == label).nonzero()[0]
        parts.append(generator.permutation(rows)[: max(1, round(fraction * len(rows)))])
    return np.sort(np.concatenate(parts))


def multilabel_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a share of a multi-label split, in which each finding is present and absent at least once.

    Args:
        labels: (N, C) with 1, 0, or -100 where unknown.
        fraction: Share, above 0 and at most 1.
        seed: Seed of the draw.

    Returns:
        (n,) row indices, sorted; the share, rounded, plus images that are added for rare findings.

    Raises:
        ValueError: If `fraction` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ArgumentError(f"A fraction must lie in 0..1 and be more than 0, got {fraction}.")
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = order[: max(1, round(fraction * len(labels)))].tolist()
    for column in labels.T:
        for label in (1, 0):
            if not (column[chosen] == label).any():
                chosen += order[column[order] == label][:1].tolist()
    return np.sort(np.array(chosen, dtype=np.int64))


class _Fit(NamedTuple):
    """Probabilities (N, C) of the test split, the chosen C (per finding, if there are several), and convergence."""

    probabilities: np.ndarray
    strength: float | list[float]
    converged: bool


def _fit_findings(
    columns: Sequence[np.ndarray],
    rows: np.ndarray,
    labels: np.ndarray,
    validation_labels: np.ndarray,
    strengths: Sequence[float],
) -> _Fit:
    """One binary classifier per finding, on the images where it is known."""
    train, validation, test = columns
    found: list[np.ndarray] = []
    chosen: list[Any] = []
    converged = True
    for index in range(labels.shape[1]):
        known = rows[labels[rows, index] >= 0]
        judged = validation_labels[:, index] >= 0
        part = [train, validation[judged] if len(validation) else validation, test]
        fit = _fit_classes(part, known, labels[:, index], validation_labels[judged, index], strengths)
        found.append(fit.probabilities[:, 1])
        chosen.append(fit.strength)
        converged &= fit.converged
    return _Fit(np.stack(found, axis=1), chosen, converged)


def _fit_classes(
    columns: Sequence[np.ndarray],
    rows: np.ndarray,
    labels: np.ndarray,
    validation_labels: np.ndarray,
    strengths: Sequence[float],
) -> _Fit:
    """One classifier of all classes: that of the strength with the lowest log loss on the validation split."""
    train, validation, test = columns
    classes = np.unique(labels[rows])
    fits = []
    for strength in strengths:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(train[rows], labels[rows])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        loss = 0.0
        if len(strengths) > 1:
            loss = log_loss(validation_labels, model.predict_proba(validation), labels=classes)
        fits.append((loss, strength, model, converged))
    # Among equals the first, with the strongest penalty.
    _, strength, model, converged = min(fits, key=lambda fit: fit[0])
    return _Fit(model.predict_proba(test), strength, converged)
