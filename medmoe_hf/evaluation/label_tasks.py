"""Zero-shot classification of labelled pairs during training: which tasks there are, and how well they are solved."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medmoe_hf.data.captions import is_empty
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.metrics import classification_metrics
from medmoe_hf.inference.texts import class_embeddings, flatten_prompts
from medmoe_hf.model import Task

NO_TASK = -1


@dataclass(frozen=True)
class HeldOutTasks:
    """The tasks of held-out batches.

    Attributes:
        tasks: Of `label_tasks`.
        classes: (b, 2) of each batch, task and class of its pairs.
        texts: Tokenized batches of `task_sentences`.
    """

    tasks: list[Task]
    classes: list[Tensor]
    texts: list[dict[str, Any]]


def label_tasks(
    samples: Sequence[Mapping[str, Any]],
    modalities: Mapping[int, str],
    sources: Sequence[str] | None = None,
    templates: Sequence[str] = ("{label}",),
    prompts: Mapping[str, Sequence[str]] | None = None,
    smallest_class: int = 1,
) -> tuple[list[Task], Tensor]:
    """Finds the tasks that the labels of samples make up: those of one modality, or of one source and modality.

    Args:
        samples: With `label`, `modality` (id) and, with `sources`, `origin` (a name, may be missing) or else `source`
            (index). Samples without a label or a modality belong to no task.
        modalities: Id -> name.
        sources: Name of each source; None for tasks over all sources.
        templates: Sentences for a label, with the fields `{label}` and `{modality}`.
        prompts: Sentences for single labels, by `label` or `modality/label`, instead of the templates.
        smallest_class: Labels with fewer samples in a task are left out of it.

    Returns:
        The tasks with two or more labels, and (N, 2) int64: task and class of each sample, -1 where there is none.

    Raises:
        ValueError: If a key of `prompts` is no label of a task.

    Example:
        >>> from medmoe_hf.evaluation.label_tasks import label_tasks
        >>> samples = [{"label": "normal", "modality": 0}, {"label": "effusion", "modality": 0}]
        >>> tasks, classes = label_tasks(samples, {0: "xray"}, prompts={"normal": ["Clear lungs."]})
        >>> tasks[0].name, tasks[0].prompts, classes.tolist()
        ('xray', {'effusion': ['effusion'], 'normal': ['Clear lungs.']}, [[0, 1], [0, 0]])
    """
    own = {_folded(key): list(sentences) for key, sentences in (prompts or {}).items()}
    found: dict[str, dict[str, list[int]]] = {}
    spelled: dict[str, Counter[str]] = {}
    of_modality: dict[str, str] = {}
    for row, sample in enumerate(samples):
        modality, label = modalities.get(int(sample["modality"])), sample.get("label")
        if modality is None or is_empty(label):
            continue
        name = modality
        if sources is not None:
            origin = sample.get("origin")
            name += f"/{sources[sample['source']] if is_empty(origin) else origin}"
        of_modality[name] = modality
        found.setdefault(name, {}).setdefault(_folded(label), []).append(row)
        spelled.setdefault(_folded(label), Counter())[" ".join(str(label).split())] += 1
    tasks: list[Task] = []
    classes = torch.full((len(samples), 2), NO_TASK)
    used: set[str] = set()
    for name in sorted(found):
        labels = {label: rows for label, rows in sorted(found[name].items()) if len(rows) >= smallest_class}
        if len(labels) < 2:
            continue
        sentences: dict[str, list[str]] = {}
        for number, (label, rows) in enumerate(labels.items()):
            classes[rows] = torch.tensor([len(tasks), number])
            shown, modality = spelled[label].most_common(1)[0][0], of_modality[name]
            key = next((key for key in (f"{_folded(modality)}/{label}", label) if key in own), None)
            used |= set() if key is None else {key}
            written = [template.format(label=shown, modality=modality) for template in templates]
            sentences[shown] = written if key is None else own[key]
        tasks.append(Task(name, sentences, modality=of_modality[name]))
    unused = [key for key in prompts or {} if _folded(key) not in used]
    if unused and tasks:
        labels_found = sorted({label for task in tasks for label in task.prompts})
        raise ArgumentError(
            f'`prompts`: "{unused[0]}" is no label of a zero-shot task on these data, which has '
            f"{', '.join(labels_found[:12])}{', ...' if len(labels_found) > 12 else ''}."
        )
    return tasks, classes


def score_tasks(tasks: Sequence[Task], image_embeds: Tensor, classes: Tensor, text_embeds: Tensor) -> dict[str, float]:
    """Balanced accuracy of each task, and their mean.

    Args:
        tasks: T tasks of `label_tasks`.
        image_embeds: (N, D), of unit length.
        classes: (N, 2), task and class of each image.
        text_embeds: (M, D) of unit length: the sentences of `task_sentences`, in its order.

    Returns:
        `zero_shot`, the mean over tasks, 0..1; `zero_shot:NAME` of each task; and `zero_shot_pairs`, the number of
        images that belong to a task.
    """
    result: dict[str, float] = {}
    start = 0
    for number, task in enumerate(tasks):
        sentences, class_ids = flatten_prompts(task.prompts)
        embeds = class_embeddings(text_embeds[start : start + len(sentences)], class_ids)
        start += len(sentences)
        rows = classes[:, 0] == number
        logits = (image_embeds[rows].double() @ embeds.double()).numpy()
        measured = classification_metrics(logits, np.asarray(classes[rows, 1]))
        result[f"zero_shot:{task.name}"] = measured["balanced_accuracy"]
    if result:
        result["zero_shot"] = math.fsum(result.values()) / len(result)
        result["zero_shot_pairs"] = int((classes[:, 0] != NO_TASK).sum())
    return result


def task_sentences(tasks: Sequence[Task]) -> list[str]:
    """The sentences of all tasks, one task after the other."""
    return [sentence for task in tasks for sentence in flatten_prompts(task.prompts)[0]]


def _folded(text: Any) -> str:
    return " ".join(str(text).split()).casefold()
