"""Linear probe: what a linear classifier can read from a frozen image tower, with few and with many examples."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medmoe_hf.common.console import progress
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.metrics import classification_metrics
from medmoe_hf.evaluation.recipes import EvaluationSet
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class, tested
from medmoe_hf.inference.encoders import Encoder

FRACTIONS = (0.01, 0.1, 1.0)
SEEDS = 5
STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Values of C, the inverse of the penalty, that validation chooses from."""
_ITERATIONS = 2000
_OWN_SPLITS = "it has no training part, so half of it trains, a fifth validates and the rest tests, by subject"


def linear_probe(
    encoder: Encoder,
    data: EvaluationSet,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = SEEDS,
    resamples: int = 1000,
    seed: int = 0,
) -> Result:
    """Logistic regression (L-BFGS) on cached features of the image tower, trained on parts of the training split.

    A part is stratified, with at least one image of each class, and drawn anew for each seed. Features are scaled to
    the part's own mean and spread. C is the one of `STRENGTHS` with the lowest log loss on the validation split.
    Variants: `<features> <share>`, as `expert 10%`; a metric is the mean over seeds, its interval is over the images
    of the test split, and `facts["seeds"]` has the accuracy for each seed. A set without any split is split here, by
    `own_splits`, and says so.

    Args:
        fractions: shares of the training split, of 0..1. All of it is trained on once: seeds would change nothing.
        seeds: parts of each size.
        resamples: of the bootstrap; whole subjects are drawn where they are known.
        seed: of the bootstrap; the parts' seeds are `seed`, `seed + 1`, ...

    Raises:
        ValueError: for a set without labels or one of the three splits, or a class without training images.
    """
    if data.labels is None:
        raise ArgumentError(f"{data.name}: a linear probe needs labels.")
    split = None
    if data.splits is None or (data.splits == "test").all():
        data, split = own_splits(data, seed), _OWN_SPLITS
    test = tested(data)
    train, validation = data.split("train"), data.split("val")
    assert train.labels is not None
    assert validation.labels is not None
    assert test.labels is not None
    for part, name in ((train, "train"), (validation, "val")):
        if not len(part):
            raise ArgumentError(f"{data.name}: a linear probe needs a {name} split, and no image is in it.")
    counts = count_by_class(train.labels, data.classes)
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise ArgumentError(f"{data.name}: the train split has no image of {', '.join(empty)}.")
    result = Result(
        protocol="linear-probe",
        model=encoder.name,
        dataset=data.name,
        count=len(test),
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples),
            "count_by_class": count_by_class(test.labels, data.classes),
            "train_count_by_class": counts,
            "validation_count": len(validation),
            "split": split,
            "seeds": {},
            "strengths": {},
            "not_converged": 0,
        },
    )
    # Once for the three splits: the tower is frozen.
    features = [encoder.features(part.images) for part in (train, validation, test)]
    parts = {
        fraction: [stratified_part(train.labels, fraction, seed + run) for run in range(1 if fraction == 1 else seeds)]
        for fraction in fractions
    }
    result.facts["same_parts"] = _same_parts(parts)
    result.facts["trained_on"] = {f"{fraction:.0%}": len(rows[0]) for fraction, rows in parts.items()}
    bar = progress(None, "linear probes", unit="probe", total=len(features[0]) * sum(map(len, parts.values())))
    for kind in features[0]:
        columns = [of_split[kind].double().numpy() for of_split in features]
        # Of a small split 1 % and 10 % are the same images.
        fitted: dict[bytes, tuple[np.ndarray, float, bool]] = {}
        for fraction in fractions:
            runs = []
            for rows in parts[fraction]:
                key = rows.tobytes()
                if key not in fitted:
                    fitted[key] = _fit(columns, rows, train.labels, validation.labels, len(counts))
                runs.append(fitted[key])
                bar.update()
            variant = f"{kind} {fraction:.0%}"
            probabilities = np.stack([run[0] for run in runs], axis=1)
            measured = bootstrap(
                _mean_of_runs, probabilities, test.labels, groups=test.subjects, resamples=resamples, seed=seed
            )
            result.add(variant, measured)
            result.facts["strengths"][variant] = [run[1] for run in runs]
            result.facts["not_converged"] += sum(not run[2] for run in runs)
            right = probabilities.argmax(axis=2) == test.labels[:, None]
            result.facts["seeds"][variant] = right.mean(axis=0).tolist()
    bar.close()
    return result


def _same_parts(parts: Mapping[float, Sequence[np.ndarray]]) -> list[list[str]]:
    """Shares of a training split that are the same images in every draw, in groups of two or more."""
    groups: dict[tuple[bytes, ...], list[str]] = {}
    for fraction, draws in parts.items():
        groups.setdefault(tuple(rows.tobytes() for rows in draws), []).append(f"{fraction:.0%}")
    return [shares for shares in groups.values() if len(shares) > 1]


def _mean_of_runs(runs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of probabilities (N, R, C)."""
    found = [classification_metrics(runs[:, run], labels) for run in range(runs.shape[1])]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def own_splits(data: EvaluationSet, seed: int) -> EvaluationSet:
    """A set that is all for testing, with half of it for training, a fifth for validation and the rest for testing.

    Within each class, by subject where subjects are known; a subject counts to the class of its first image.
    """
    assert data.labels is not None
    subjects = list(range(len(data))) if data.subjects is None else data.subjects
    first: dict[Any, int] = {}
    for subject, label in zip(subjects, data.labels.tolist(), strict=True):
        first.setdefault(subject, label)
    generator, split_of = np.random.default_rng(seed), {}
    for label in sorted(set(first.values())):
        members = [subject for subject, own in first.items() if own == label]
        order = generator.permutation(len(members))
        for place, position in enumerate(order):
            share = (place + 0.5) / len(members)
            split_of[members[position]] = "train" if share < 0.5 else "val" if share < 0.7 else "test"
    return replace(data, splits=np.array([split_of[subject] for subject in subjects]))


def stratified_part(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Rows of a share of a split: of each class the same share, rounded, and at least one; sorted.

    Args:
        labels: (N,).
        fraction: of 0..1.
    """
    if not 0 < fraction <= 1:
        raise ArgumentError(f"A fraction must lie in 0..1 and be more than 0, got {fraction}.")
    generator = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        rows = (labels == label).nonzero()[0]
        parts.append(generator.permutation(rows)[: max(1, round(fraction * len(rows)))])
    return np.sort(np.concatenate(parts))


def _fit(
    columns: Sequence[np.ndarray], rows: np.ndarray, labels: np.ndarray, truth: np.ndarray, classes: int
) -> tuple[np.ndarray, float, bool]:
    """Probabilities (N, C) of the test split, the chosen C, and whether that fit has converged."""
    train, validation, test = columns
    fits = []
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=_ITERATIONS))
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(train[rows], labels[rows])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        loss = log_loss(truth, model.predict_proba(validation), labels=range(classes))
        fits.append((loss, strength, model, converged))
    # Of equally good ones the first, with the strongest penalty.
    _, strength, model, converged = min(fits, key=lambda fit: fit[0])
    return model.predict_proba(test), strength, converged
