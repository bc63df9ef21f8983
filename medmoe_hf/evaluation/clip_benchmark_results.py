"""Zero-shot classification by the metrics of CLIP_benchmark, in files as it writes them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.evaluation.results import Result

_MOST = 5


def clip_benchmark_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Computes what CLIP_benchmark reports for zero-shot classification.

    Args:
        scores: (N, C), higher for likelier classes; of equal scores, the first class precedes.
        labels: (N,) 0..C-1.

    Returns:
        `acc1` and `acc5`, shares of images whose class is among the first and the first five (NaN with fewer than
        five classes), and `mean_per_class_recall`, the mean over the classes that have images.

    Example:
        >>> clip_benchmark_metrics([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], [0, 1, 1])["mean_per_class_recall"]
        0.75
    """
    table, truth = np.asarray(scores), np.asarray(labels)
    first = np.argsort(-table, axis=1, kind="stable")[:, :_MOST]
    hits = first == truth[:, None]
    recalls = [hits[truth == label, 0].mean() for label in np.unique(truth)]
    return {
        "acc1": float(hits[:, 0].mean()),
        "acc5": float(hits.any(axis=1).mean()) if table.shape[1] >= _MOST else math.nan,
        "mean_per_class_recall": float(np.mean(recalls)),
    }


def write_clip_benchmark(
    results: Sequence[Result], labels: Mapping[str, np.ndarray | None], output: str | Path
) -> dict[str, dict[str, float]]:
    """Writes a JSON file per zero-shot result and score, with the keys of CLIP_benchmark's result files.

    Args:
        results: Results of `evaluate`; those of other protocols are left out.
        labels: Name of the set -> (N,) classes of its test images.
        output: Folder to create.

    Returns:
        Name of the file -> its metrics.
    """
    written: dict[str, dict[str, float]] = {}
    with atomic_dir(output, force=True) as partial:
        for result in results:
            truth = labels.get(result.dataset)
            if result.protocol != "zero-shot" or truth is None:
                continue
            for variant, probabilities in result.probabilities.items():
                metrics = clip_benchmark_metrics(probabilities[:, 0], truth)
                content = {
                    "dataset": result.dataset.rpartition("/")[2],
                    "model": result.model,
                    "pretrained": variant,
                    "task": "zeroshot_classification",
                    "metrics": metrics,
                    "language": "en",
                }
                name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{result.dataset} {result.model} {variant}").strip("-.")
                (partial / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
                written[f"{name}.json"] = metrics
    return written
