"""What words do to predictions: paraphrases, negated findings, and prompts without an image."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from medmoe_hf.common.console import progress
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import multilabel_metrics
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.robustness.scores import NEGATIVE, PROMPTS, measure, score_sets, softmax
from medmoe_hf.inference.batching import read_picture
from medmoe_hf.inference.encoders import Encoder

AFFIRMED, NEGATED = "affirmed", "negated"
_AFFIRMED = ("{}.", "There is {}.", "Findings of {}.", "{} is present.")
_NEGATED = ("No {}.", "There is no {}.", "No findings of {}.", "{} is absent.")
_ABSENCE = re.compile(r"(no|non|none|not|normal|healthy|without|negative|absent|unremarkable)\b", re.IGNORECASE)
_SIDE = 256  # pixels of the pictures that stand for no image


def paraphrase_sets(data: EvaluationSet) -> dict[str, dict[str, list[str]]]:
    """Returns sets of one sentence per class: paraphrase k of each class, or else the k-th of its prompts.

    Args:
        data: A set with prompts.

    Returns:
        Name -> class -> one sentence; empty if some class has a single sentence and no paraphrases are given.

    Raises:
        ArgumentError: If `paraphrases` lacks a class, or classes have different numbers of them.
    """
    given = data.paraphrases
    counts = [len(given.get(name, ())) for name in data.classes]
    if given and (len(set(counts)) > 1 or not counts[0] or set(given) != set(data.classes)):
        raise ArgumentError(
            f"{data.name}: `paraphrases` needs the same number of sentences for each of {', '.join(data.classes)}."
        )
    source = given or data.prompts
    number = min(len(source[name]) for name in data.classes)
    if not given and number < 2:
        return {}
    return {f"paraphrase {k + 1}": {name: [source[name][k]] for name in data.classes} for k in range(number)}


def findings_of(data: EvaluationSet) -> dict[str, str]:
    """Returns the words for each class that names a finding.

    Args:
        data: A set with classes; `data.negation` has precedence over the classes' names.

    Returns:
        Class -> words that fit after "there is no"; without the classes that name an absence, such as `normal`.

    Raises:
        ArgumentError: If `negation` names what is no class.
    """
    unknown = [name for name in data.negation if name not in data.classes]
    if unknown:
        raise ArgumentError(f'{data.name}: `negation` has "{unknown[0]}", which is none of {", ".join(data.classes)}.')
    if data.negation:
        return dict(data.negation)
    spoken = {name: " ".join(re.split(r"[\s_]+", name.strip())) for name in data.classes}
    return {
        name: words if words.isupper() else words.lower()
        for name, words in spoken.items()
        if not _ABSENCE.match(words)
    }


def negation_sets(data: EvaluationSet) -> dict[str, dict[str, list[str]]]:
    """Returns sentences that affirm each finding and the same ones negated; empty without findings."""
    findings = findings_of(data)
    return {
        name: {label: [_sentence(template, words) for template in templates] for label, words in findings.items()}
        for name, templates in ((AFFIRMED, _AFFIRMED), (NEGATED, _NEGATED))
        if findings
    }


def _sentence(template: str, words: str) -> str:
    sentence = template.format(words)
    return sentence[0].upper() + sentence[1:]


def add_paraphrases(result: Result, data: EvaluationSet, logits: Mapping[str, np.ndarray]) -> None:
    """Measures how many labels change with the words.

    Args:
        result: Gets the variants `all paraphrases` and one per paraphrase.
        data: N images. Of a multi-label set with negative prompts each finding is a decision of its own.
        logits: (N, C) of the prompts and of each set of `paraphrase_sets`.
    """
    names = [name for name in logits if name.startswith("paraphrase ")]
    labels = data.labels
    assert labels is not None
    # (N, P + 1) or (N, P + 1, C): the first is decided by the task's prompts.
    decided = np.stack([_decisions(logits[name], logits.get(NEGATIVE)) for name in (PROMPTS, *names)], axis=1)

    def metric(rows: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        changed = rows[:, 1:] != rows[:, :1]
        known = np.broadcast_to((truth >= 0)[:, None], rows.shape)
        right = [_mean((rows[:, k] == truth)[known[:, k]]) for k in range(rows.shape[1])]
        found = {"prompts/accuracy": right[0]}
        for k, name in enumerate(names):
            found |= {f"{name}/flip_rate": float(changed[:, k].mean()), f"{name}/accuracy": right[k + 1]}
        return found | {
            "all paraphrases/flip_rate": float(changed.mean()),
            "all paraphrases/any_flip": float(changed.any(axis=1).mean()),
            "all paraphrases/accuracy": float(np.mean(right[1:])),
            "all paraphrases/lowest_accuracy": min(right[1:]),
            "all paraphrases/highest_accuracy": max(right[1:]),
        }

    result.metrics |= _bootstrap(result, metric, decided, labels, groups=data.subjects)
    result.facts["paraphrases"] = "given" if data.paraphrases else "single sentences of the prompts"


def _decisions(logits: np.ndarray, negative: np.ndarray | None) -> np.ndarray:
    """(N,) classes, or with negative prompts (N, C) presences."""
    decided: np.ndarray = logits.argmax(axis=1) if negative is None else (logits > negative).astype(np.int64)
    return decided


def add_negation(result: Result, data: EvaluationSet, logits: Mapping[str, np.ndarray]) -> None:
    """Compares the negated sentences of each finding with the affirmed ones.

    Args:
        result: Gets the variants `all findings` (means over findings) and `finding NAME`.
        data: N images.
        logits: (N, F) of the sets of `negation_sets`.
    """
    findings = list(findings_of(data))
    labels = data.labels
    assert labels is not None
    columns = [data.classes.index(name) for name in findings]
    truth = labels[:, columns] if data.multi_label else (labels[:, None] == np.array(columns)).astype(np.int64)
    names = ("negated_higher_present", "negated_higher_absent", "negation_balanced_accuracy", "auroc")

    def metric(affirmed: np.ndarray, negated: np.ndarray, present: np.ndarray) -> dict[str, float]:
        ranked = multilabel_metrics(affirmed - negated, present, findings)
        by_finding = []
        for number, name in enumerate(findings):
            higher = negated[:, number] > affirmed[:, number]
            wrong, right = (_mean(higher[present[:, number] == shown]) for shown in (1, 0))
            by_finding.append((wrong, right, (1 - wrong + right) / 2, ranked[f"{name}/auroc"]))
        found = {
            f"finding {name}/{what}": value
            for name, values in zip(findings, by_finding, strict=True)
            for what, value in zip(names, values, strict=True)
        }
        for what, values in zip(names, zip(*by_finding, strict=True), strict=True):
            found[f"all findings/{what}"] = _mean(np.array([value for value in values if not np.isnan(value)]))
        return found

    measured = _bootstrap(result, metric, logits[AFFIRMED], logits[NEGATED], truth, groups=data.subjects)
    for number, name in enumerate(findings):
        rows = np.flatnonzero(truth[:, number] >= 0)
        units = len(rows) if data.subjects is None else len({data.subjects[row] for row in rows})
        for key in [key for key in measured if key.startswith(f"finding {name}/")]:
            measured[key] = replace(measured[key], n=units, rows=len(rows))
        for shown, word in ((1, "with"), (0, "without")):
            if not (truth[:, number] == shown).any():
                _omit(result, f"no image is known to be {word} {name}, so that half of its negation test is missing.")
    result.metrics |= {key: measured[key] for key in sorted(measured, key=lambda key: not key.startswith("all "))}
    result.facts["findings"] = findings_of(data)


def add_text_only(
    result: Result, encoder: Encoder, data: EvaluationSet, probabilities: np.ndarray, score: str
) -> None:
    """Compares predictions with those that the prompts yield without an image: for a mean image and a gray one.

    Args:
        result: Gets the variants `with images`, `mean image`, `gray image` and `most frequent class`.
        encoder: The encoder.
        data: N images of one class each.
        probabilities: (N, C), of the images.
        score: `global`, `local` or `mean`.
    """
    labels = data.labels
    assert labels is not None
    pictures = {
        "mean image": mean_picture(data.images),
        "gray image": Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128)),
    }
    prior = softmax(score_sets(encoder, list(pictures.values()), {PROMPTS: data.prompts}, score)[PROMPTS])
    constant = dict(zip(pictures, prior.argmax(axis=1).tolist(), strict=True))
    constant["most frequent class"] = int(np.bincount(labels, minlength=len(data.classes)).argmax())

    def metric(rows: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        own = measure(rows, truth)
        found = {f"with images/{name}": value for name, value in own.items()}
        for name, label in constant.items():
            always = measure(np.broadcast_to(np.eye(len(data.classes))[label], rows.shape), truth)
            found |= {f"{name}/{what}": value for what, value in always.items()}
            found |= {f"{name}/gain_of_images_{what}": own[what] - always[what] for what in always}
            if name in pictures:
                found[f"{name}/same_label"] = float((rows.argmax(axis=1) == label).mean())
        return found

    result.metrics |= _bootstrap(result, metric, probabilities, labels, groups=data.subjects)
    result.facts["without_image"] = {
        name: dict(zip(data.classes, row.round(4).tolist(), strict=True))
        for name, row in zip(pictures, prior, strict=True)
    }


def mean_picture(images: Sequence[Any]) -> Image.Image:
    """Averages images at 256x256 pixels.

    Args:
        images: N paths, PIL images or arrays, at least one.

    Returns:
        An RGB image.
    """
    total = np.zeros((_SIDE, _SIDE, 3))
    for image in progress(images, "mean image", unit="image"):
        total += np.asarray(read_picture(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    return Image.fromarray((total / len(images)).round().astype(np.uint8))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _omit(result: Result, why: str) -> None:
    result.facts.setdefault("omitted", []).append(why)


def _bootstrap(result: Result, metric: Any, *columns: np.ndarray, groups: Any) -> dict[str, Interval]:
    resamples, seed = result.facts["resamples"], result.facts["seed"]
    return bootstrap(metric, *columns, groups=groups, resamples=resamples, seed=seed)
