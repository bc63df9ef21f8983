"""Labels of a study from those of its series."""

from collections.abc import Sequence

import numpy as np

from medmoe_hf.inference.studies.predictions import SeriesPrediction, StudyLabel
from medmoe_hf.inference.studies.tasks import probabilities


def study_labels(series: Sequence[SeriesPrediction]) -> list[StudyLabel]:
    """Averages the scores of the series that were asked for the same labels.

    Series of several modalities are asked for different labels if the user names none; each set of labels then has
    probabilities of its own.

    Args:
        series: The series of a study.

    Returns:
        The labels, set by set in the order of the series, the most probable of a set first.
    """
    groups: dict[tuple[str, ...], list[SeriesPrediction]] = {}
    for one in series:
        groups.setdefault(tuple(sorted(label.label for label in one.labels)), []).append(one)
    found: list[StudyLabel] = []
    for names, members in groups.items():
        if not names:
            continue
        by_name = [{label.label: label for label in one.labels} for one in members]
        task = members[0].task
        assert task is not None
        names = tuple(task.prompts)
        means = np.array([np.mean([own[name].score for own in by_name]) for name in names])
        chances = probabilities(task, means[None])[0]
        group = []
        alone = by_name[0] if len(members) == 1 else {}  # several scores are no longer those of a single image
        for name, mean, probability in zip(names, means.tolist(), chances.tolist(), strict=True):
            best = max(range(len(members)), key=lambda index: by_name[index][name].score)
            group.append(
                StudyLabel(
                    label=name,
                    probability=probability,
                    score=mean,
                    series=members[best].number,
                    key_slice=by_name[best][name].key_slices[0],
                    slices=sum(one.count for one in members),
                    asked=[one.number for one in members],
                    selected=alone[name].selected if alone else None,
                    in_set=alone[name].in_set if alone else None,
                )
            )
        found += sorted(group, key=lambda label: -label.probability)
    return found
