"""Zero-shot classification: a class is a set of sentences, and an image belongs to the one it is most like."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.recipes import EvaluationSet
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class, tested
from medmoe_hf.inference.encoders import SCORES, Encoder, MedMoEEncoder, scores_of


class ZeroShotClassifier:
    """An encoder and classes of sentences. The sentences are encoded once, whatever number of images follows.

    A class's sentences are encoded, brought to length 1, averaged, and brought to length 1 again.

    Args:
        encoder: see `load_encoder`.
        prompts: class -> its sentences, one or more.

    Attributes:
        classes: C names, in the order of the columns.
        class_embeds: (D, C), columns of length 1.

    Raises:
        ValueError: without classes, or for one without a sentence.
    """

    def __init__(self, encoder: Encoder, prompts: Mapping[str, Sequence[str]]) -> None:
        empty = [name for name, sentences in prompts.items() if isinstance(sentences, str) or not sentences]
        if empty or not prompts:
            raise ArgumentError(f"Each class needs a list of sentences; {empty[0] if empty else 'no class'} has none.")
        self.encoder, self.classes = encoder, list(prompts)
        sentences, class_ids = flatten_prompts(prompts)
        by_class = _by_class(encoder.encode_texts(sentences).t(), class_ids)
        self.class_embeds = nn.functional.normalize(by_class, dim=0)

    def logits(self, images: Sequence[Any]) -> Tensor:
        """(N, C): cosines times the encoder's scale; of paths (DICOM and NIfTI too), PIL images or arrays."""
        return self.encoder.logit_scale * self.encoder.encode_images(images) @ self.class_embeds

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """(N, C) probabilities: a softmax over the classes."""
        return self.logits(images).softmax(dim=1)


def zero_shot(
    encoder: Encoder, data: EvaluationSet, scores: Sequence[str] = SCORES, resamples: int = 1000, seed: int = 0
) -> Result:
    """Classifies the test part of a set by its prompts.

    Globally as `ZeroShotClassifier` does; locally the similarities of a class's prompts to the image are averaged.
    Probabilities are a softmax over the classes.

    Args:
        scores: which of `SCORES`; encoders without a local similarity have the global one alone.
        resamples: of the bootstrap; whole subjects are drawn where they are known.
        seed: of the bootstrap.

    Raises:
        ValueError: for a set without labels, prompts or a test part, or an unknown score.
    """
    data = tested(data)
    if data.labels is None or not data.classes or list(data.prompts) != list(data.classes):
        raise ArgumentError(f"{data.name}: zero-shot needs labels, and prompts for each of its classes.")
    sentences, class_ids = flatten_prompts(data.prompts)
    result = Result(
        protocol="zero-shot",
        model=encoder.name,
        dataset=data.name,
        count=len(data),
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples, sentences),
            "count_by_class": count_by_class(data.labels, data.classes),
            "prompts_by_class": {name: len(data.prompts[name]) for name in data.classes},
        },
    )
    kinds = scores_of(encoder, scores)
    logits: dict[str, Tensor] = {}
    if "global" in kinds or "mean" in kinds:
        logits["global"] = ZeroShotClassifier(encoder, data.prompts).logits(data.images)
    if isinstance(encoder, MedMoEEncoder) and ("local" in kinds or "mean" in kinds):
        logits["local"] = _by_class(encoder.local_scores(data.images, sentences), class_ids)
    if "mean" in kinds:
        logits["mean"] = (logits["global"] + logits["local"]) / 2
    for kind in kinds:
        probabilities = logits[kind].double().softmax(dim=1).numpy()
        result.add_classification(kind, probabilities, data.labels, data.classes, data.subjects)
    if isinstance(encoder, MedMoEEncoder) and data.modalities is not None:
        _add_routing(result, encoder, data, data.modalities)
    return result


def flatten_prompts(prompts: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
    """The M sentences of all classes, and the class of each, (M,)."""
    sentences = [sentence for name in prompts for sentence in prompts[name]]
    return sentences, torch.tensor([label for label, name in enumerate(prompts) for _ in prompts[name]])


def _by_class(by_sentence: Tensor, class_ids: Tensor) -> Tensor:
    """Means over the sentences of each class: (..., M) to (..., C)."""
    return torch.stack([by_sentence[:, class_ids == label].mean(dim=1) for label in class_ids.unique()], dim=1)


def _add_routing(result: Result, encoder: MedMoEEncoder, data: EvaluationSet, modalities: np.ndarray) -> None:
    truth = encoder.expert_ids(modalities)
    known = truth >= 0
    if not known.any():
        return
    routed = encoder.route_images(data.images).argmax(dim=1).numpy()
    measured = bootstrap(
        lambda right: {"routing_accuracy": float(right.mean())},
        (routed == truth)[known],
        groups=None if data.subjects is None else np.array(data.subjects)[known],
        resamples=result.facts["resamples"],
        seed=result.facts["seed"],
    )
    result.add("image router", measured)
