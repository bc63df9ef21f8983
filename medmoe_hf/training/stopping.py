"""Which evaluation of a run was the best, and whether to stop: functions of the evaluations so far."""

import re
from collections.abc import Mapping, Sequence

METRICS = re.compile(
    r"loss(_global|_local|_aux)?|routing_(image|report)|(image_to_text|text_to_image)_r(1|5|10)|zero_shot(:.+)?"
)
"""Metrics that an evaluation may have; which ones depends on the held-out data."""


def lower_is_better(metric: str) -> bool:
    """Whether small values of a metric are good: true for losses."""
    return metric.startswith("loss")


def best_step(evaluations: Sequence[Mapping[str, float]], metric: str) -> int | None:
    """The step of the best evaluation, of equal ones the first; `None` without evaluations.

    Args:
        evaluations: With `step` and the metric.
        metric: Name of the metric.
    """
    values = [one[metric] if lower_is_better(metric) else -one[metric] for one in evaluations]
    known = [number for number, value in enumerate(values) if value == value]
    return int(evaluations[min(known, key=values.__getitem__)]["step"]) if known else None


def reason_to_stop(
    evaluations: Sequence[Mapping[str, float]], metric: str, patience: int, min_delta: float
) -> str | None:
    """Why a run should stop after these evaluations; `None` if it should not.

    Args:
        evaluations: With `step` and the metric, oldest first.
        metric: Name of the metric.
        patience: Number of evaluations in a row without an improvement.
        min_delta: An improvement is a value that is better than the best before by more than this.

    Example:
        >>> from medmoe_hf.training.stopping import reason_to_stop
        >>> evaluations = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 2.1}, {"step": 30, "loss": 2.0}]
        >>> reason_to_stop(evaluations, "loss", patience=2, min_delta=0.0)
        'loss did not improve in 2 evaluations after 2 at step 10'
    """
    sign = -1 if lower_is_better(metric) else 1
    best, since, waited = float("-inf"), 0, 0
    for one in evaluations:
        value = sign * one[metric]
        if value > best + min_delta:
            best, since, waited = value, int(one["step"]), 0
        else:
            waited += 1
    if waited < patience:
        return None
    than = f" by more than {min_delta:g}" if min_delta else ""
    return f"{metric} did not improve{than} in {waited} evaluations after {sign * best:.6g} at step {since}"
