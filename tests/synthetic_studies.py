"""Predictions that no model made, for tests of what is written from them."""

import numpy as np

from medmoe_hf.inference.studies.grouping import study_labels
from medmoe_hf.inference.studies.pooling import key_slices, pool_slices
from medmoe_hf.inference.studies.predictions import (
    LabelPrediction,
    SeriesPrediction,
    SkippedFile,
    StudyPrediction,
    StudyPredictions,
    TextPrediction,
)
from medmoe_hf.inference.studies.tasks import probabilities, task_of_labels

NAME = "DOE^JANE"
FOLDER = f"/exports/{NAME}"
AFFINE = np.array([[0.0, 0.7, 0.1, -20.0], [-0.8, 0.0, 0.2, 30.0], [0.0, 0.05, 2.5, -100.0], [0.0, 0.0, 0.0, 1.0]])
LABELS = ["no finding", "pneumonia", '<b>effusion</b> & "quotes"']


def blob(index, count, size=(48, 64)):
    """A spot (H, W) that wanders through the slices, 0 to 1."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    row, column = size[0] * (0.3 + 0.4 * index / count), size[1] * 0.6
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * 6**2)).astype(np.float32)


def synthetic_series(number=1, count=40, kind="slices", size=(48, 64), unreadable=(), text=True, affine=AFFINE):
    """A series whose second label peaks in the middle."""
    task = task_of_labels(LABELS, "ct")
    along = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    scores = np.stack([np.zeros(count), 4 * np.exp(-8 * along**2) - 1, np.full(count, -1.5)], axis=1)
    scores[list(unreadable)] = np.nan
    by_slice, pooled = probabilities(task, scores), pool_slices(scores, "top-k")
    of_series = probabilities(task, pooled[None])[0]
    labels = [
        LabelPrediction(name, of_series[i], pooled[i], key_slices(by_slice[:, i]), scores[:, i], by_slice[:, i])
        for i, name in enumerate(LABELS)
    ]
    cosines = scores[:, 1] / 10
    found = TextPrediction("ground glass", float(np.nanmax(cosines)), key_slices(cosines), cosines)

    def picture(index):
        gray = (40 + 150 * blob(count - index, count, size)).astype(np.uint8)
        return np.stack([gray] * 3, axis=-1)

    def heatmaps(phrase, indices, size=None, full=size):
        for index in indices:
            if index not in unreadable:
                yield index, blob(index, count, full)

    return SeriesPrediction(
        number=number,
        kind=kind,
        count=count,
        spacing=[0.8, 0.7],
        positions=None if kind != "slices" else [2.5 * index for index in range(count)],
        header_modality="ct",
        expert="ct",
        expert_reason=f"Router and header agree: the {count} slices voted for ct (97%).",
        routing={"xray": 0.01, "ct": 0.97, "mri": 0.01, "ultrasound": 0.005, "histopathology": 0.003, "fundus": 0.002},
        pooling="top-k",
        labels=sorted(labels, key=lambda label: -label.probability),
        texts=[found] if text else [],
        uid="1.2.3.999",
        sources={
            20: {"file": f"{FOLDER}/{NAME}.dcm", "frame": 0, "sop_instance_uid": "1.2.3.4" if kind == "slices" else ""}
        },
        notes=["2 slices are missing behind slice 10."],
        affine=affine,
        task=task,
        picture=picture,
        heatmaps=heatmaps,
    )


def synthetic_studies(**changes):
    """Two studies, one of them of two series, and what was left out."""
    both = [synthetic_series(1, **changes), synthetic_series(2, count=1, kind="image", text=False, affine=None)]
    skipped = [SkippedFile(f"{FOLDER}/{NAME}-dose.dcm", "it is a dose report")] * 2
    loop = [synthetic_series(1, count=12, kind="frames", affine=None)]
    return StudyPredictions(
        [
            StudyPrediction(1, both, study_labels(both), skipped, "small", "1.2.3"),
            StudyPrediction(2, loop, study_labels(loop), [], "small", "1.2.4"),
        ],
        [SkippedFile(f"{FOLDER}/notes.txt", "it is no image")],
    )
