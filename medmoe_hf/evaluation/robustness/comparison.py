"""Paired differences between two models on the same images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet, test_split
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.robustness.scores import measure


def compare(first: Sequence[Result], other: Sequence[Result], data: EvaluationSet) -> Result:
    """Computes how much better one model is than another on the same images.

    Both are measured on the same resamples of subjects, so that what is difficult for both cancels out: intervals of
    differences are narrower than those of two models suggest.

    Args:
        first: What `robustness` returned for the model that differences are taken to.
        other: The same for another model, with the same corruptions, images and seed.
        data: The set of both.

    Returns:
        A result of the protocol `comparison` with the variants `clean - MODEL` and `corrupted - MODEL`: metrics of
        `other` minus those of `first`.

    Raises:
        ArgumentError: If the two were not measured on the same images.

    Example:
        ```python
        runs = [robustness(load_encoder(name), data) for name in ("small", "openai/clip-vit-base-patch32")]
        print(compare(*runs, data).metrics["clean - openai/clip-vit-base-patch32/accuracy"])
        ```
    """
    data = test_split(data)
    base, own = (next(one for one in results if one.protocol == "robustness") for results in (first, other))
    settings = ("seed", "resamples", "corruptions", "severities", "corrupted_images")
    different = [name for name in settings if base.facts.get(name) != own.facts.get(name)]
    if base.dataset != own.dataset or different or data.labels is None or len(data) != base.count:
        what = different[0] if different else "the set"
        raise ArgumentError(f"{base.model} and {own.model} cannot be compared on {data.name}: {what} differs.")
    result = replace(own, protocol="comparison", metrics={}, facts=dict(own.facts), probabilities={})
    for name in ("corruptions", "severities", "omitted", "count_by_class", "known_by_class"):
        result.facts.pop(name, None)
    result.facts["baseline"] = base.model
    for variant, scores in own.probabilities.items():
        rows = drawn_rows(data.labels, len(scores), own.facts["seed"])
        result.add(
            f"{variant} - {base.model}",
            bootstrap(
                _difference,
                base.probabilities[variant],
                scores,
                data.labels[rows],
                groups=None if data.subjects is None else [data.subjects[row] for row in rows],
                resamples=own.facts["resamples"],
                seed=own.facts["seed"],
            ),
        )
    return result


def _difference(first: np.ndarray, other: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    base = measure(first, labels)
    return {name: value - base[name] for name, value in measure(other, labels).items()}


def drawn_rows(labels: np.ndarray, most: int | None, seed: int) -> np.ndarray:
    """Draws rows, the same for the same arguments.

    Args:
        labels: (N,) classes, whose shares are kept, with at least one row of each as far as `most` allows; or (N, C)
            of a multi-label set.
        most: Number of rows to draw; None, or N or more, for all.
        seed: Seed of the draw.

    Returns:
        (min(N, most),) row indices, sorted.
    """
    if most is None or most >= len(labels):
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    strata = np.zeros(len(labels), dtype=np.int64) if labels.ndim == 2 else labels[order]
    # Where a row stands within its class: those that stand first are taken, of all classes alike.
    place = np.zeros(len(labels))
    for label in np.unique(strata):
        own = np.flatnonzero(strata == label)
        place[own[1:]] = (np.arange(1, len(own)) + 0.5) / len(own)
    return np.sort(order[np.argsort(place, kind="stable")[:most]])
