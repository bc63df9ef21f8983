"""The robustness report of one model on one set."""

from collections.abc import Sequence

import numpy as np

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.results import DETAIL, Result, common_facts, count_by_class, known_by_class
from medmoe_hf.evaluation.robustness.comparison import drawn_rows
from medmoe_hf.evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, CorruptedImages, check_corruptions
from medmoe_hf.evaluation.robustness.scores import NEGATIVE, measure, own_score, score_sets, task_prompts, task_scores
from medmoe_hf.evaluation.robustness.subgroups import add_subgroups
from medmoe_hf.evaluation.robustness.words import (
    add_negation,
    add_paraphrases,
    add_text_only,
    negation_sets,
    paraphrase_sets,
)
from medmoe_hf.evaluation.zero_shot import check_labelled
from medmoe_hf.inference.encoders import Encoder


def robustness(
    encoder: Encoder,
    data: EvaluationSet,
    *,
    score: str | None = None,
    corruptions: Sequence[str] = tuple(CORRUPTIONS),
    severities: Sequence[int] = SEVERITIES,
    corrupted_images: int | None = None,
    smallest_group: int = 20,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Result]:
    """Measures what corrupted images, other words, missing images and groups do to zero-shot classification.

    Each part is a result of its own: `robustness` (the images as they are and corrupted), `paraphrases`, `negation`,
    `text-only`, and `subgroups` where the set has `groups`. What a set does not allow is left out, and
    `facts["omitted"]` says why.

    Args:
        encoder: See `load_encoder`.
        data: A set with labels and prompts.
        score: `global`, `local` or `mean`; None for the model's own similarity.
        corruptions: Keys of `CORRUPTIONS`; none leaves them out.
        severities: Any of 1 to 5. Each corruption at each severity costs one pass over the images.
        corrupted_images: Number of images that are corrupted, drawn by `seed` with the shares of classes; None for
            all.
        smallest_group: Groups of fewer subjects are left out.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap, the corruptions and the draw.

    Returns:
        A result per part.

    Raises:
        ValueError: For a set without labels, prompts or test images, or an unknown score, corruption or severity.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("rsna_pneumonia"), "rsna")
        for result in robustness(load_encoder("small"), data, severities=(3,)):
            print(result.protocol, result.metrics)
        ```
    """
    data = check_labelled(data)
    check_corruptions(corruptions, severities)
    if corrupted_images is not None and corrupted_images < 1:
        raise ArgumentError(f"At least one image must be corrupted, got {corrupted_images}.")
    kind = own_score(encoder, score)
    paraphrases, negation = paraphrase_sets(data), negation_sets(data)
    sets = {**task_prompts(data), **paraphrases, **negation}
    logits = score_sets(encoder, data.images, sets, kind)
    scores = task_scores(logits, data)
    texts = [sentence for prompts in sets.values() for sentences in prompts.values() for sentence in sentences]
    facts = {**common_facts(encoder, data, seed, resamples, texts), "score": kind}

    def part(protocol: str) -> Result:
        return Result(protocol, encoder.name, data.name, len(data), {}, dict(facts))

    first = part("robustness")
    results, omitted = [first], []
    _add_corruptions(first, encoder, data, scores, corruptions, severities, corrupted_images)
    if data.multi_label and NEGATIVE not in logits:
        omitted.append("paraphrases: without negative prompts a finding is neither present nor absent.")
    elif not paraphrases:
        omitted.append("paraphrases: some class has a single sentence; add more, or `paraphrases`.")
    else:
        results.append(part("paraphrases"))
        add_paraphrases(results[-1], data, logits)
    if negation:
        results.append(part("negation"))
        add_negation(results[-1], data, logits)
    else:
        omitted.append("negation: all classes name an absence; name the findings by `negation`.")
    if data.multi_label:
        omitted.append("text-only: all images get the same score of a finding, whose AUROC is 0.5.")
    else:
        results.append(part("text-only"))
        add_text_only(results[-1], encoder, data, scores, kind)
    if data.groups:
        results.append(part("subgroups"))
        add_subgroups(results[-1], data, scores, smallest_group)
    first.facts["omitted"] = omitted
    return results


def _add_corruptions(
    result: Result,
    encoder: Encoder,
    data: EvaluationSet,
    scores: np.ndarray,
    names: Sequence[str],
    severities: Sequence[int],
    most: int | None,
) -> None:
    """Adds the variants `clean`, `NAME, severity S`, `NAME` (means over severities) and `all corruptions`.

    Drops are those from the same images as they are.
    """
    labels = data.labels
    assert labels is not None
    seed, resamples = result.facts["seed"], result.facts["resamples"]
    result.add("clean", bootstrap(measure, scores, labels, groups=data.subjects, resamples=resamples, seed=seed))
    result.probabilities["clean"] = scores[:, None]
    result.facts["count_by_class"] = count_by_class(labels, data.classes)
    if data.multi_label:
        result.facts["known_by_class"] = known_by_class(labels, data.classes)
    versions = [(name, severity) for name in names for severity in severities]
    if not versions:
        return
    rows = drawn_rows(labels, most, seed)
    images = CorruptedImages([data.images[row] for row in rows], versions, seed)
    logits = score_sets(encoder, images, task_prompts(data), result.facts["score"])
    table = task_scores(logits, data).reshape(len(rows), len(versions), -1)
    result.probabilities["corrupted"] = table
    result.facts |= {"corruptions": list(names), "severities": list(severities), "corrupted_images": len(rows)}

    def metric(clean: np.ndarray, corrupted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        before = measure(clean, truth)
        found: dict[str, float] = {}
        after = [measure(corrupted[:, number], truth) for number in range(len(versions))]
        for (name, severity), measured in zip(versions, after, strict=True):
            found |= {f"{name}{DETAIL}{severity}/{what}": value for what, value in measured.items()}
        for name in (*names, "all corruptions"):
            own = [one for (other, _), one in zip(versions, after, strict=True) if name in (other, "all corruptions")]
            for what, value in before.items():
                mean = float(np.mean([one[what] for one in own]))
                found |= {f"{name}/{what}": mean, f"{name}/{what}_drop": value - mean}
        return found

    groups = None if data.subjects is None else [data.subjects[row] for row in rows]
    measured = bootstrap(metric, scores[rows], table, labels[rows], groups=groups, resamples=resamples, seed=seed)
    result.metrics |= {key: measured[key] for key in sorted(measured, key=lambda key: DETAIL in key)}
