"""Retrieval: the report of an image among all, and the image of a report."""

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
    """Ranks the captions of the test part of a set for each image, and the images for each caption.

    Ties count against the model. Identical captions are all right, and so are all captions of an image that stands in
    several rows. Intervals are over queries: the candidates stay as they are. With labels also the precision of the
    first k by class.

    Args:
        scores: which of `SCORES`; encoders without a local similarity have the global one alone.
        resamples: of the bootstrap; whole subjects are drawn where they are known.
        seed: of the bootstrap.

    Raises:
        ValueError: for a set without captions or a test part, or an unknown score.
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
    """Ranks of images and of texts, and one column for each precision."""
    means = {name: float(column.mean()) for name, column in zip(names, columns[2:], strict=True)}
    return retrieval_metrics(columns[0], columns[1], KS) | means


_Table = Callable[[slice], Tensor]


def _tables(
    encoder: Encoder, images: Sequence[Any], captions: Sequence[str], kinds: Sequence[str]
) -> dict[str, tuple[_Table, _Table]]:
    """The scores of a slice of the images with all captions, and of a slice of the captions with all images."""
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
    """For `ranks`: (N, G) of the images, all captions of their file; (N, 1) of the captions, themselves."""
    keys = [str(image) if isinstance(image, (str, Path)) else row for row, image in enumerate(images)]
    captions_of: dict[Any, list[str]] = {}
    for key, caption in zip(keys, captions, strict=True):
        captions_of.setdefault(key, []).append(caption)
    together = caption_groups([*(captions_of[key] for key in keys), *([caption] for caption in captions)])
    return together[: len(keys)], together[len(keys) :, :1]


def _precisions(by_image: _Table, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Of each image among the captions, where k is not more than there are."""
    ks = [k for k in PRECISION_KS if k <= len(labels)]
    parts = [
        precision_at_k(by_image(slice(start, start + _CHUNK)), labels[start : start + _CHUNK], labels, ks)
        for start in range(0, len(labels), _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
