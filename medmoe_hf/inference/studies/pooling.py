"""From slices to a series: votes of the router, pooled scores and key slices.

Shapes: N slices, C labels, K experts. Slices that could not be read are NaN and take no part.
"""

import math
from typing import Literal

import numpy as np

from medmoe_hf.errors import ArgumentError

Pooling = Literal["mean", "top-k", "attention"]
POOLINGS: tuple[Pooling, ...] = ("attention", "top-k", "mean")
"""How scores of slices become one of the series; the first one is the default, because it notices single slices best.

`examples/experiments/real/pooling.py` measures it; docs/pages/studies.md has the numbers.
"""

TOP_SHARE = 0.1
"""Share of the slices that `top-k` averages, at least one."""

HEADER_PRIOR = 0.9
"""Prior probability of the modality that a header states; the other experts share the rest.

The router overrules a header only where its mean vote is some 45 times as strong: headers are seldom wrong, but some
are (screenshots of another modality, converted files).
"""

NEIGHBOURHOOD = 0.05
"""Share of a series, on both sides of a key slice, in which there is no other one; at least one slice."""


def pool_slices(scores: np.ndarray, pooling: Pooling) -> np.ndarray:
    """Pools the scores of slices, label by label.

    Args:
        scores: (N, C); rows with NaN are left out, and at least one has none.
        pooling: `attention`, the mean weighted by a softmax of the label's scores; `top-k`, the mean of its highest
            tenth, at least one slice; or `mean`.

    Returns:
        (C,) float64.

    Raises:
        ArgumentError: For an unknown pooling.

    Example:
        >>> pool_slices(np.array([[0.0], [1.0], [2.0]]), "top-k").tolist()
        [2.0]
    """
    if pooling not in POOLINGS:
        raise ArgumentError(f'There is no pooling "{pooling}"; known: {", ".join(POOLINGS)}.')
    known = np.asarray(scores, dtype=np.float64)
    known = known[~np.isnan(known).any(axis=1)]
    if pooling == "mean":
        pooled = known.mean(axis=0)
    elif pooling == "top-k":
        pooled = np.sort(known, axis=0)[-math.ceil(TOP_SHARE * len(known)) :].mean(axis=0)
    else:
        pooled = (softmax(known, axis=0) * known).sum(axis=0)
    return np.asarray(pooled)


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    """Computes a softmax in float64; NaN stays NaN."""
    raised = np.asarray(logits, dtype=np.float64)
    powers = np.exp(raised - raised.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def route_series(log_probabilities: np.ndarray, header: int | None) -> np.ndarray:
    """Combines the votes of slices: the mean of the router's log-probabilities, plus those of the header as a prior.

    Args:
        log_probabilities: (N, K), of the image router; rows with NaN are left out.
        header: Expert of the modality that the header states; None if it states none, or one without an expert.

    Returns:
        (K,) probabilities, float64.

    Example:
        >>> route_series(np.log([[0.5, 0.5], [0.5, 0.5]]), header=0).round(3).tolist()
        [0.9, 0.1]
    """
    votes = np.asarray(log_probabilities, dtype=np.float64)
    votes = votes[~np.isnan(votes).any(axis=1)].mean(axis=0)
    if header is not None and len(votes) > 1:
        prior = np.full(len(votes), (1 - HEADER_PRIOR) / (len(votes) - 1))
        prior[header] = HEADER_PRIOR
        votes = votes + np.log(prior)
    return softmax(votes)


def key_slices(scores: np.ndarray, count: int = 3) -> list[int]:
    """Selects the slices with the highest scores that are not neighbours of each other.

    Args:
        scores: (N,); NaN is never selected.
        count: Maximum number of slices.

    Returns:
        Indices, the highest score first; of equal scores the first slice.

    Example:
        >>> key_slices(np.array([0.1, 0.9, 0.8, 0.2, 0.5]), count=2)
        [1, 4]
    """
    distance = max(1, round(NEIGHBOURHOOD * len(scores)))
    found: list[int] = []
    for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist():
        if len(found) == count or math.isnan(scores[index]):
            break
        if all(abs(index - other) > distance for other in found):
            found.append(index)
    return found
