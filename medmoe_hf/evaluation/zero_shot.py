"""Zero-shot classification: a class is described by sentences, and an image is assigned to the most similar class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet, test_split
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.results import Result, common_facts, count_by_class, known_by_class
from medmoe_hf.inference.encoders import SCORES, Encoder, MedMoEEncoder, scores_of
from medmoe_hf.inference.texts import by_class, class_embeddings, flatten_prompts


class ZeroShotClassifier:
    """Zero-shot classifier: classes described by sentences, which are encoded once for any number of images.

    The embeddings of a class's sentences are normalized to length 1, averaged, and normalized again.

    Args:
        encoder: See `load_encoder`.
        prompts: Class -> one or more sentences.

    Attributes:
        encoder: The encoder.
        classes: C names, in the order of the columns.
        class_embeds: (D, C), columns of length 1.

    Raises:
        ValueError: Without classes, or for a class without sentences.

    Example:
        ```python
        prompts = {"normal": ["The lungs are clear."], "effusion": ["A large pleural effusion."]}
        classify = ZeroShotClassifier(load_encoder("small"), prompts)
        probabilities = classify(["scan.png"])  # (1, 2)
        ```
    """

    def __init__(self, encoder: Encoder, prompts: Mapping[str, Sequence[str]]) -> None:
        empty = [name for name, sentences in prompts.items() if isinstance(sentences, str) or not sentences]
        if empty or not prompts:
            raise ArgumentError(f"Each class needs a list of sentences; {empty[0] if empty else 'no class'} has none.")
        self.encoder, self.classes = encoder, list(prompts)
        sentences, class_ids = flatten_prompts(prompts)
        self.class_embeds = class_embeddings(encoder.encode_texts(sentences), class_ids)

    def logits(self, images: Sequence[Any]) -> Tensor:
        """Computes logits: cosines times the encoder's scale.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, C) float32, on the CPU.

        Example:
            ```python
            logits = classify.logits(["scan.png"])
            ```
        """
        return self.encoder.logit_scale * self.encoder.encode_images(images) @ self.class_embeds

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """Computes probabilities: a softmax over the classes.

        Args:
            images: N paths (DICOM and NIfTI too), PIL images or arrays.

        Returns:
            (N, C) float32, on the CPU; rows sum to 1.
        """
        return self.logits(images).softmax(dim=1)


def zero_shot(
    encoder: Encoder, data: EvaluationSet, scores: Sequence[str] = SCORES, resamples: int = 1000, seed: int = 0
) -> Result:
    """Classifies the test split by prompts.

    The global score is that of `ZeroShotClassifier`; the local score is the mean similarity of a class's prompts to
    the image. Probabilities are a softmax over the classes. On a multi-label set each finding is scored on its own
    (`multilabel_logits`) and measured by AUROC and average precision: `<score>` has their means over findings,
    `<score>, <finding>` those of one.

    Args:
        encoder: See `load_encoder`.
        data: A set with labels and prompts.
        scores: Which of `SCORES`; encoders without a local similarity have the global one only.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap.

    Returns:
        The result, with protocol `zero-shot` and a variant per score.

    Raises:
        ValueError: For a set without labels, prompts or test images, or an unknown score.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("chexpert_5x200"), "chexpert")
        result = zero_shot(load_encoder("small"), data)
        print(result.metrics["global/accuracy"])
        ```
    """
    data = check_labelled(data)
    assert data.labels is not None
    sentences = [*flatten_prompts(data.prompts)[0], *flatten_prompts(data.negative_prompts)[0]]
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
            **({"known_by_class": known_by_class(data.labels, data.classes)} if data.multi_label else {}),
        },
    )
    if data.multi_label:
        found = multilabel_logits(encoder, data.images, data.prompts, data.negative_prompts, scores)
        for kind, logits in found.items():
            if data.negative_prompts:
                result.probabilities[kind] = logits.double().sigmoid().numpy()[:, None]
            result.add_multilabel(kind, logits.double().numpy(), data.labels, data.classes, data.subjects)
    else:
        for kind, logits in class_logits(encoder, data.images, data.prompts, scores).items():
            probabilities = logits.double().softmax(dim=1).numpy()
            result.probabilities[kind] = probabilities[:, None]
            result.add_classification(kind, probabilities, data.labels, data.classes, data.subjects)
    if isinstance(encoder, MedMoEEncoder) and data.modalities is not None:
        _add_routing(result, encoder, data, data.modalities)
    return result


def check_labelled(data: EvaluationSet) -> EvaluationSet:
    """Selects the test split of a set that can be classified by prompts.

    Args:
        data: A set with labels and prompts.

    Returns:
        The images of `data` that are for testing.

    Raises:
        ArgumentError: For a set without labels, prompts or test images.
    """
    data = test_split(data)
    if data.labels is None or not data.classes or list(data.prompts) != list(data.classes):
        raise ArgumentError(f"{data.name}: zero-shot needs labels, and prompts for each of its classes.")
    if data.negative_prompts and list(data.negative_prompts) != list(data.classes):
        raise ArgumentError(f"{data.name}: negative prompts must be given for each of the classes, or for none.")
    return data


def multilabel_logits(
    encoder: Encoder,
    images: Sequence[Any],
    prompts: Mapping[str, Sequence[str]],
    negative_prompts: Mapping[str, Sequence[str]] | None = None,
    scores: Sequence[str] = SCORES,
) -> dict[str, Tensor]:
    """Scores how much each image shows each finding, independently of the other findings.

    With negative prompts a logit is the similarity to a finding's prompts minus that to its negative prompts, so that
    a sigmoid makes it a probability; without, it is the similarity itself.

    Args:
        encoder: See `load_encoder`.
        images: N paths, PIL images or arrays.
        prompts: Finding -> sentences that describe it.
        negative_prompts: Finding -> sentences that describe its absence, for the same findings; None or empty without.
        scores: Which of `SCORES`; encoders without a local similarity have the global one only.

    Returns:
        Score -> (N, C) float32 on the CPU.

    Raises:
        ValueError: If the findings of the two differ, or for an unknown score.

    Example:
        ```python
        encoder = load_encoder("small")
        prompts = {"effusion": ["There is a pleural effusion."]}
        logits = multilabel_logits(encoder, ["scan.png"], prompts, {"effusion": ["No pleural effusion."]})
        print(logits["global"].sigmoid())
        ```
    """
    negatives = negative_prompts or {}
    if negatives and list(negatives) != list(prompts):
        raise ArgumentError("`negative_prompts` must have the findings of `prompts`, in their order.")
    # One pass for both: images are encoded once.
    both = {str(index): texts for index, texts in enumerate([*prompts.values(), *negatives.values()])}
    logits = class_logits(encoder, images, both, scores)
    if not negatives:
        return logits
    return {kind: table[:, : len(prompts)] - table[:, len(prompts) :] for kind, table in logits.items()}


def class_logits(
    encoder: Encoder, images: Sequence[Any], prompts: Mapping[str, Sequence[str]], scores: Sequence[str]
) -> dict[str, Tensor]:
    """Scores images by the sentences of each class.

    Args:
        encoder: See `load_encoder`.
        images: N paths, PIL images or arrays; one pass over them for all classes.
        prompts: Class -> sentences, C classes.
        scores: Which of `SCORES`.

    Returns:
        Score -> (N, C) float32 on the CPU, for those of the scores that the encoder has.
    """
    kinds = scores_of(encoder, scores)
    logits: dict[str, Tensor] = {}
    if "global" in kinds or "mean" in kinds:
        logits["global"] = ZeroShotClassifier(encoder, prompts).logits(images)
    if isinstance(encoder, MedMoEEncoder) and ("local" in kinds or "mean" in kinds):
        sentences, class_ids = flatten_prompts(prompts)
        logits["local"] = by_class(encoder.local_scores(images, sentences), class_ids)
    if "mean" in kinds:
        logits["mean"] = (logits["global"] + logits["local"]) / 2
    return {kind: logits[kind] for kind in kinds}


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
