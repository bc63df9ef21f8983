"""What a study is asked: labels with the sentences that describe them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_hf.common.yaml_files import read_yaml
from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.studies.pooling import softmax

_TECHNIQUES = {
    "xray": "X-ray",
    "ct": "CT scan",
    "mri": "MRI",
    "ultrasound": "ultrasound image",
    "histopathology": "histopathology image",
    "fundus": "fundus photograph",
}
_SENTENCE_WORDS = 6  # a label with so many words is a sentence of its own


@dataclass(frozen=True)
class LabelTask:
    """Labels and the sentences that describe them.

    Args:
        prompts: Label -> sentences.
        negative_prompts: Label -> sentences that describe its absence; their similarity is subtracted.
        independent: Whether each label has a probability of its own, as with negative sentences; otherwise the
            probabilities of all labels sum to 1.
        convert: Function of (N, C) scores that returns calibrated probabilities; None without a calibration.

    Raises:
        ArgumentError: Without labels, for a label without sentences, for a single label without negative sentences,
            or if the labels of the two differ.
    """

    prompts: Mapping[str, tuple[str, ...]]
    negative_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    independent: bool = False
    convert: Callable[[np.ndarray], np.ndarray] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.negative_prompts:
            object.__setattr__(self, "independent", True)
        for table in (self.prompts, self.negative_prompts):
            for label, sentences in table.items():
                if not sentences or any(not sentence.strip() for sentence in sentences):
                    raise ArgumentError(f'The label "{label}" needs at least one sentence, and none that is empty.')
        if self.negative_prompts and list(self.prompts) != list(self.negative_prompts):
            raise ArgumentError("`negative_prompts` must have the labels of `prompts`, in their order.")
        if len(self.prompts) < (1 if self.independent else 2):
            raise ArgumentError(
                f"{'One label is' if self.prompts else 'No labels are'} not enough: a label's probability is relative "
                'to the others. Add one, such as "no finding", or ask for a single phrase by `text`.'
            )

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Makes probabilities of scores (N, C): a softmax over the labels, or a sigmoid of each where independent."""
        if self.convert is not None:
            return self.convert(scores)
        if self.independent:
            # 1 / (1 + exp(-x)) without overflow
            return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(scores, dtype=np.float64))))
        return softmax(scores)

    def reference(self, label: str) -> tuple[str, ...]:
        """Returns the sentences that a heat-map of a label is compared with: its absence, or else the other labels."""
        if self.negative_prompts:
            return tuple(self.negative_prompts[label])
        return tuple(sentences[0] for other, sentences in self.prompts.items() if other != label)


def task_of_labels(labels: Sequence[str], modality: str) -> LabelTask:
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
    return LabelTask(prompts)


def read_task(path: str | Path) -> LabelTask:
    """Reads a task from a YAML or JSON file.

    Args:
        path: A file with `label: [sentence, ...]`; or with `prompts` and, optionally, `negative_prompts`, each of this
            form, as in an evaluation recipe, whose other keys are ignored.

    Returns:
        The task.

    Raises:
        ArgumentError: If the file cannot be read, or holds anything else.
    """
    content = read_yaml(path, ArgumentError)
    if not isinstance(content, dict):
        raise ArgumentError(f"{path} must hold labels with their sentences: `pneumonia: [There is pneumonia.]`.")
    if not isinstance(content.get("prompts"), dict):
        content = {"prompts": content}
    negative = content.get("negative_prompts") or {}
    try:
        return LabelTask(_sentences(content["prompts"]), _sentences(negative))
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error


def as_task(task: Any) -> Any:
    """Converts what `predict` accepts as a task.

    Args:
        task: None, a file, labels with their sentences, a `LabelTask`, or a task of a model with its calibration.

    Returns:
        A `LabelTask`, None, or the text if it is no file: the name of a task that the model may bring along.

    Raises:
        ArgumentError: For anything else.
    """
    if task is None or isinstance(task, LabelTask):
        return task
    if isinstance(task, Mapping):
        return LabelTask(_sentences(task))
    if isinstance(task, Path) or (isinstance(task, str) and Path(task).exists()):
        return read_task(task)
    if isinstance(task, str):
        return task
    if hasattr(task, "prompts") and hasattr(task, "kind"):
        # A calibration was fitted to one kind of score; studies have the global one.
        calibrated = getattr(task, "calibration", None) is not None and task.score == "global"
        return LabelTask(
            _sentences(task.prompts),
            _sentences(task.negative_prompts),
            independent=task.kind == "multi-label",
            convert=(lambda scores: _calibrated(task, scores)) if calibrated else None,
        )
    raise ArgumentError(f"`task` is a file or a dictionary of labels and sentences, not a {type(task).__name__}.")


def _calibrated(task: Any, scores: np.ndarray) -> np.ndarray:
    import torch

    return np.asarray(task.probabilities(torch.from_numpy(np.asarray(scores, dtype=np.float64))).numpy())


def _sentences(table: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(table, Mapping):
        raise ArgumentError("labels and their sentences must be a mapping: `pneumonia: [There is pneumonia.]`.")
    found = {}
    for label, sentences in table.items():
        listed = [sentences] if isinstance(sentences, str) else sentences
        if not isinstance(listed, list | tuple) or not all(isinstance(sentence, str) for sentence in listed):
            raise ArgumentError(f'the label "{label}" needs a list of sentences.')
        found[str(label)] = tuple(listed)
    return found


@cache
def _defaults() -> dict[str, Any]:
    content = read_yaml(Path(__file__).with_name("default_labels.yaml"), ArgumentError)
    assert isinstance(content, dict)
    return content


def default_task(modality: str) -> LabelTask | None:
    """Returns what is asked where the user names no labels; None for a modality that the package does not know."""
    entry = _defaults().get(modality)
    return None if entry is None else LabelTask(_sentences(entry["labels"]))


def normal_sentences(modality: str) -> tuple[str, ...]:
    """Returns sentences without a finding, which heat-maps of a text are compared with; none for other modalities."""
    return tuple(_defaults().get(modality, {}).get("normal", ()))
