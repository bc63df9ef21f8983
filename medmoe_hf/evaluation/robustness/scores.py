"""Scores of images for several sets of prompts in one pass, and how they are measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.metrics import classification_metrics, multilabel_metrics
from medmoe_hf.evaluation.zero_shot import class_logits
from medmoe_hf.inference.encoders import Encoder, MedMoEEncoder, scores_of

PromptSets = Mapping[str, Mapping[str, Sequence[str]]]
PROMPTS, NEGATIVE = "prompts", "negative prompts"
"""Names of the sets by which a task is solved."""


def own_score(encoder: Encoder, score: str | None) -> str:
    """Returns the similarity to use: `score`, or else the model's own.

    Raises:
        ArgumentError: For an unknown score.
    """
    if score is None:
        score = encoder.model.config.similarity if isinstance(encoder, MedMoEEncoder) else "global"
    return next(iter(scores_of(encoder, [score])), "global")


def task_prompts(data: EvaluationSet) -> dict[str, Mapping[str, Sequence[str]]]:
    """Returns the sets of prompts by which a task is solved."""
    sets: dict[str, Mapping[str, Sequence[str]]] = {PROMPTS: data.prompts}
    if data.negative_prompts:
        sets[NEGATIVE] = data.negative_prompts
    return sets


def score_sets(encoder: Encoder, images: Sequence[Any], sets: PromptSets, score: str) -> dict[str, np.ndarray]:
    """Scores images by several sets of prompts; images are encoded once.

    Args:
        encoder: See `load_encoder`.
        images: N paths, PIL images or arrays.
        sets: Name of a set -> class -> sentences.
        score: `global`, `local` or `mean`.

    Returns:
        Name of a set -> (N, C) float64 logits, one column per class of that set.
    """
    keys = [(name, label) for name, prompts in sets.items() for label in prompts]
    both = {f"{number}": sets[name][label] for number, (name, label) in enumerate(keys)}
    table = class_logits(encoder, images, both, [score])[score].double().numpy()
    return {name: table[:, [number for number, (of, _) in enumerate(keys) if of == name]] for name in sets}


def task_scores(logits: Mapping[str, np.ndarray], data: EvaluationSet) -> np.ndarray:
    """Returns (N, C) probabilities; of a multi-label set the logits, minus those of the negative prompts if any."""
    if data.multi_label:
        scores: np.ndarray = logits[PROMPTS] - logits[NEGATIVE] if NEGATIVE in logits else logits[PROMPTS]
        return scores
    return softmax(logits[PROMPTS])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (..., C) of logits (..., C)."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def measure(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures scores: the mean over runs if there are several.

    Args:
        scores: (N, C), or (N, R, C) of R runs.
        labels: (N,) classes; or (N, C) of a multi-label set.

    Returns:
        `accuracy`, `balanced_accuracy` and `macro_auroc`; of a multi-label set `macro_auroc` and
        `macro_average_precision`. NaN where a metric is not defined.
    """
    if scores.ndim == 3:
        found = [measure(scores[:, run], labels) for run in range(scores.shape[1])]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    if labels.ndim == 2:
        names = [str(number) for number in range(labels.shape[1])]
        multilabel = multilabel_metrics(scores, labels, names)
        return {name: multilabel[name] for name in ("macro_auroc", "macro_average_precision")}
    measured = classification_metrics(scores, labels)
    return {name: measured[name] for name in ("accuracy", "balanced_accuracy", "macro_auroc")}
