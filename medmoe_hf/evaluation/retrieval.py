"""Retrieval: find the report of an image among all reports, and the image of a report."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet, test_split
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.metrics import caption_groups, precision_at_k, ranks, retrieval_metrics
from medmoe_hf.evaluation.results import Result, common_facts
from medmoe_hf.inference.encoders import SCORES, Encoder, MedMoEEncoder, scores_of

KS = (1, 5, 10)
PRECISION_KS = (5, 10, 100)
_CHUNK = 1024


def retrieval(
    encoder: Encoder, data: EvaluationSet, scores: Sequence[str] = SCORES, resamples: int = 1000, seed: int = 0
) -> Result:
    """Ranks the captions of the test split for each image, and the images for each caption.

    Ties count against the model. Identical captions are all right, and so are all captions of an image that appears in
    several rows. Intervals are over queries; the candidates stay the same. With class labels, the precision of the
    first k by class is measured too.

    Args:
        encoder: See `load_encoder`.
        data: A set with captions.
        scores: Which of `SCORES`; encoders without a local similarity have the global one only.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap.

    Returns:
        The result, with protocol `retrieval` and a variant per score.

    Raises:
        ValueError: For a set without captions or test images, or an unknown score.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("rocov2"), "rocov2")
        result = retrieval(load_encoder("small"), data)
        print(result.metrics["global/text_to_image_r5"])
        ```
    """
    data = test_split(data)
    if data.captions is None:
        raise ArgumentError(f"{data.name}: retrieval needs a caption for each image.")
    kinds = scores_of(encoder, scores)
    image_groups, text_groups = _groups(data.images, data.captions)
    result = Result(
        protocol="retrieval",
        model=encoder.name,
        dataset=data.name,
        count=len(data),
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples, data.captions),
            "different_captions": len(np.unique(text_groups)),
            "chance": {f"r{k}": min(1.0, k / len(data)) for k in KS},
        },
    )
    tables = _tables(encoder, data.images, data.captions, kinds)
    for kind in kinds:
        by_image, by_text = tables[kind]
        found = [
            ranks(by_image, image_groups, text_groups, _CHUNK),
            ranks(by_text, text_groups, image_groups, _CHUNK),
        ]
        precisions = {} if data.labels is None or data.multi_label else _precisions(by_image, data.labels)
        metric = partial(_metric, list(precisions))
        result.add(
            kind,
            bootstrap(metric, *found, *precisions.values(), groups=data.subjects, resamples=resamples, seed=seed),
        )
    return result


def _metric(names: Sequence[str], *columns: np.ndarray) -> dict[str, float]:
    """Metrics of the ranks of images and of texts, and of a column per precision."""
    means = {name: float(column.mean()) for name, column in zip(names, columns[2:], strict=True)}
    return retrieval_metrics(columns[0], columns[1], KS) | means


_Table = Callable[[slice], Tensor]


def _tables(
    encoder: Encoder, images: Sequence[Any], captions: Sequence[str], kinds: Sequence[str]
) -> dict[str, tuple[_Table, _Table]]:
    """Scores of a slice of the images with all captions, and of a slice of the captions with all images."""
    tables: dict[str, tuple[_Table, _Table]] = {}
    if "global" in kinds or "mean" in kinds:
        by_image = encoder.logit_scale * encoder.encode_images(images)
        by_text = encoder.encode_texts(captions)
        tables["global"] = (lambda rows: by_image[rows] @ by_text.t(), lambda rows: by_text[rows] @ by_image.t())
    if isinstance(encoder, MedMoEEncoder) and ("local" in kinds or "mean" in kinds):
        local = encoder.local_scores(images, captions)
        tables["local"] = (lambda rows: local[rows], lambda rows: local.t()[rows])
    if "mean" in kinds:
        both = tables["global"], tables["local"]
        tables["mean"] = (
            lambda rows: (both[0][0](rows) + both[1][0](rows)) / 2,
            lambda rows: (both[0][1](rows) + both[1][1](rows)) / 2,
        )
    return tables


def _groups(images: Sequence[Any], captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Groups for `ranks`: (N, G) of the images, all captions of their file; (N, 1) of the captions."""
    keys = [str(image) if isinstance(image, (str, Path)) else row for row, image in enumerate(images)]
    captions_of: dict[Any, list[str]] = {}
    for key, caption in zip(keys, captions, strict=True):
        captions_of.setdefault(key, []).append(caption)
    together = caption_groups([*(captions_of[key] for key in keys), *([caption] for caption in captions)])
    return together[: len(keys)], together[len(keys) :, :1]


def _precisions(by_image: _Table, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Precision at k of each image among the captions, for the k that are not larger than their number."""
    ks = [k for k in PRECISION_KS if k <= len(labels)]
    parts = [
        precision_at_k(by_image(slice(start, start + _CHUNK)), labels[start : start + _CHUNK], labels, ks)
        for start in range(0, len(labels), _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
