"""What a study is asked: labels with the sentences that describe them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmoe_hf.common.yaml_files import read_yaml
from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.task_files import read_task_file
from medmoe_hf.model import Task

_TECHNIQUES = {
    "xray": "X-ray",
    "ct": "CT scan",
    "mri": "MRI",
    "ultrasound": "ultrasound image",
    "histopathology": "histopathology image",
    "fundus": "fundus photograph",
}
_SENTENCE_WORDS = 6  # a label with so many words is a sentence of its own


def probabilities(task: Task, scores: np.ndarray) -> np.ndarray:
    """Makes probabilities of scores (N, C), by the task's calibration where it has one."""
    return np.asarray(task.probabilities(torch.from_numpy(np.asarray(scores, dtype=np.float64))).numpy())


def decided(task: Task, scores: np.ndarray) -> dict[str, tuple[bool, bool]]:
    """Returns label -> whether it is selected and whether it is in the prediction set of an image.

    Args:
        task: A task; without a calibration, there are no decisions.
        scores: (C,) scores of the image.
    """
    if task.calibration is None:
        return {}
    selected, sets = task.decide(torch.from_numpy(np.asarray(scores, dtype=np.float64))[None])
    assert sets is not None
    return {label: (label in selected[0], label in sets[0]) for label in task.prompts}


def reference(task: Task, label: str) -> tuple[str, ...]:
    """Returns the sentences that a heat-map of a label is compared with: its absence, or else the other labels."""
    if task.negative_prompts:
        return tuple(task.negative_prompts[label])
    return tuple(sentences[0] for other, sentences in task.prompts.items() if other != label)


def task_of_labels(labels: Sequence[str], modality: str) -> Task:
    """Makes sentences from labels.

    Args:
        labels: Names such as `"pleural effusion"`, which templates complete, or sentences (six words or more, or with
            a full stop), which are used as they are.
        modality: The modality whose technique the sentences name.

    Returns:
        The task.

    Raises:
        ArgumentError: For a repeated or empty label, or fewer than two.

    Example:
        >>> task_of_labels(["no finding", "pneumonia"], "ct").prompts["pneumonia"]
        ('CT scan showing pneumonia.', 'CT scan: pneumonia.', 'Pneumonia, CT scan.', 'Pneumonia.')
    """
    if isinstance(labels, str):
        raise ArgumentError(f"`labels` is a list of texts, got the text {labels!r}; write [{labels!r}, ...].")
    names = [str(label).strip() for label in labels]
    if "" in names or len(set(names)) < len(names):
        raise ArgumentError("Each label must be different from the others, and none may be empty.")
    technique = _TECHNIQUES.get(modality, modality)
    prompts: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name.endswith(".") or len(name.split()) >= _SENTENCE_WORDS:
            prompts[name] = (name,)
            continue
        templates = f"{technique} showing {name}.", f"{technique}: {name}.", f"{name}, {technique}.", f"{name}."
        prompts[name] = tuple(text[0].upper() + text[1:] for text in templates)
    return _task(prompts)


def read_task(path: str | Path) -> Task:
    """Reads a file with one task.

    Args:
        path: As `medmoe_hf.inference.task_files.read_task_file` takes it; a file of several tasks is refused.

    Returns:
        The task.

    Raises:
        ArgumentError: If the file cannot be read, or does not hold one task.
    """
    found = read_task_file(path)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ArgumentError(f"{path} holds the tasks {names}: put the one that is asked into a file of its own.")
    return found[0].task()


def as_task(task: Any) -> Task | str | None:
    """Converts what `predict` accepts as a task.

    Args:
        task: None, a file, labels with their sentences, or a task.

    Returns:
        A task, None, or the text if it is no file: the name of a task that the model may bring along.

    Raises:
        ArgumentError: For anything else.
    """
    if task is None or isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return _task(task)
    if isinstance(task, Path) or (isinstance(task, str) and Path(task).is_file()):
        return read_task(task)
    if isinstance(task, str):
        return task
    if hasattr(task, "to_dict") and hasattr(task, "prompts"):
        # Of a model that runs the code of its own checkpoint.
        return Task.from_dict(task.name, task.to_dict())
    raise ArgumentError(f"`task` is a file or a dictionary of labels and sentences, not a {type(task).__name__}.")


def _task(prompts: Mapping[str, Any]) -> Task:
    if len(prompts) < 2:
        raise ArgumentError(
            f"{'One label is' if prompts else 'No labels are'} not enough: a label's probability is relative to the "
            'others. Add one, such as "no finding", or ask for a single phrase by `text`.'
        )
    listed = {str(label): [own] if isinstance(own, str) else own for label, own in prompts.items()}
    return Task("labels", listed)


@cache
def _defaults() -> dict[str, Any]:
    content = read_yaml(Path(__file__).with_name("default_labels.yaml"), ArgumentError)
    assert isinstance(content, dict)
    return content


def default_task(modality: str) -> Task | None:
    """Returns what is asked where the user names no labels; None for a modality that the package does not know."""
    entry = _defaults().get(modality)
    return None if entry is None else _task(entry["labels"])


def default_labels() -> list[str]:
    """Returns the labels of all modalities that are asked where the user names none, without repetitions."""
    return list(dict.fromkeys(str(label) for entry in _defaults().values() for label in entry["labels"]))


def normal_sentences(modality: str) -> tuple[str, ...]:
    """Returns sentences without a finding, which heat-maps of a text are compared with; none for other modalities."""
    return tuple(_defaults().get(modality, {}).get("normal", ()))
