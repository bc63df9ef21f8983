"""Measures how scores of slices become one of a case: attention, top-k, mean, and the middle slice alone.

    python examples/experiments/real/pooling.py --model TRAINED --data ../shared/real

Whole cases: held-out subjects of three tasks, with all their images. Composed series: held-out slices of the lung
without a finding, in half of the series some of them replaced by slices with a malignant tumour. Prints two tables.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from manifest import read_manifest
from tasks import TASKS

from medmoe_hf.common.console import text_table
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.inference.studies.pooling import POOLINGS, pool_slices, softmax
from medmoe_hf.inference.texts import class_embeddings, flatten_prompts

CASES = ("lung-ct", "brain-tumour", "breast-ultrasound")
COMPOSED = ((20, 1), (100, 5), (100, 1), (300, 3), (300, 30))  # slices, and those with a tumour
NORMAL, TUMOUR = 0, 2  # classes of lung-ct
SERIES, SUBJECTS = 200, 7  # composed series, and subjects whose slices one of them is drawn from

METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{name: (lambda scores, name=name: pool_slices(scores, name)) for name in POOLINGS},
    "middle slice": lambda scores: scores[len(scores) // 2],
}


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive has a higher score than a negative; ties count half."""
    above, below = scores[positive][:, None], scores[~positive][None]
    return float((above > below).mean() + (above == below).mean() / 2)


def macro_auroc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the AUROC of each class that some and not all cases have."""
    known = [label for label in range(probabilities.shape[1]) if 0 < (labels == label).sum() < len(labels)]
    return float(np.mean([auroc(probabilities[:, label], labels == label) for label in known]))


def _measured(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"auroc": macro_auroc(probabilities, labels)}


def composed(
    logits: np.ndarray, labels: np.ndarray, subjects: np.ndarray, size: int, tumours: int, seed: int = 1
) -> dict[str, float]:
    """The AUROC of each method on series that are drawn from slices.

    Args:
        logits: (N, 3) scores of slices.
        labels: (N,) classes.
        subjects: (N,) subjects.
        size: Slices of a series.
        tumours: Those of them that show a tumour, in half of the series.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    normal, positive = np.flatnonzero(labels == NORMAL), np.flatnonzero(labels == TUMOUR)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    truth = np.arange(SERIES) % 2 == 1
    for shows in truth:
        some = generator.permutation(np.unique(subjects[normal]))[:SUBJECTS]
        pool, number = normal[np.isin(subjects[normal], some)], tumours if shows else 0
        rows = np.concatenate([generator.choice(pool, size - number), generator.choice(positive, number)])
        rows = generator.permutation(rows)
        for name, method in METHODS.items():
            found[name].append(float(softmax(method(logits[rows]))[TUMOUR]))
    return {name: auroc(np.array(scores), truth) for name, scores in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    given = parser.parse_args(arguments)
    encoder, rows = MedMoEEncoder(given.model), read_manifest(given.data)
    cases = [["macro AUROC of whole cases", "cases", *METHODS]]
    series = [["AUROC of composed series", *METHODS]]
    for name in CASES:
        task = TASKS[name]
        members, labels = task.rows(rows, ("val", "test"))
        sentences, class_ids = flatten_prompts(task.prompts())
        embeds = encoder.encode_images([str(given.data / row["file"]) for row in members])
        classes = class_embeddings(encoder.encode_texts(sentences), class_ids)
        logits = (encoder.logit_scale * embeds @ classes).numpy()
        subjects = np.array([row["subject"] for row in members])
        own = [np.flatnonzero(subjects == subject) for subject in np.unique(subjects)]
        truth = np.array([labels[index[0]] for index in own])
        line = [name, str(len(own))]
        for method in METHODS.values():
            probabilities = softmax(np.stack([method(logits[index]) for index in own]))
            measured = bootstrap(_measured, probabilities, truth)["auroc"]
            line.append(f"{measured.value:.2f} [{measured.low:.2f}, {measured.high:.2f}]")
        cases.append(line)
        if name == "lung-ct":
            for size, tumours in COMPOSED:
                found = composed(logits, labels, subjects, size, tumours)
                series.append([f"{tumours} of {size}", *(f"{value:.2f}" for value in found.values())])
    print(f"{text_table(cases)}\n\n{text_table(series)}")


if __name__ == "__main__":
    main()
