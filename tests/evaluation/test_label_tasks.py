"""Zero-shot tasks from the labels of held-out pairs, against a classification written out here."""

import pytest
import torch
from torch.nn.functional import normalize

from medmoe_hf.evaluation.label_tasks import label_tasks, score_tasks, task_sentences

NAMES = {0: "xray", 1: "ct"}


def rows(*entries):
    return [dict(zip(("modality", "label", "source", "origin"), entry, strict=False)) for entry in entries]


SAMPLES = rows(
    (0, "Normal", 0),
    (0, " normal", 0),
    (0, "effusion", 0),
    (0, "effusion", 1),
    (1, "normal", 1),
    (1, None, 1),
    (-100, "effusion", 0),
    (0, "mass", 0),
    (0, "n/a", 0),
)


def test_tasks_are_the_labels_of_a_modality():
    tasks, classes = label_tasks(SAMPLES, NAMES, templates=["{modality} with {label}", "{label}."])
    assert [task.name for task in tasks] == ["xray"]  # one label alone is no task
    assert tasks[0].prompts == {
        "effusion": ["xray with effusion", "effusion."],
        "mass": ["xray with mass", "mass."],
        "normal": ["xray with normal", "normal."],  # the most frequent spelling
    }
    none = [-1, -1]
    assert classes.tolist() == [[0, 2], [0, 2], [0, 0], [0, 0], none, none, none, [0, 1], none]
    assert task_sentences(tasks)[:2] == ["xray with effusion", "effusion."]


def test_tasks_by_source_and_rare_labels():
    """The field `source` of a row counts before the source of the configuration."""
    named = [*SAMPLES, *rows((0, "normal", 0, "clinic"), (0, "mass", 1, "clinic"))]
    tasks, classes = label_tasks(named, NAMES, sources=["first", "second"])
    assert [task.name for task in tasks] == ["xray/clinic", "xray/first"]
    assert classes[-2:].tolist() == [[0, 1], [0, 0]]
    tasks, classes = label_tasks(SAMPLES, NAMES, smallest_class=2)
    assert list(tasks[0].prompts) == ["effusion", "normal"]
    assert classes[7].tolist() == [-1, -1]


def test_sentences_of_single_labels():
    prompts = {"normal": ["No finding."], "xray/NORMAL": ["Clear lungs.", "A healthy chest."]}
    with pytest.raises(ValueError, match=r"`prompts`: .normal. is no label .*effusion, mass"):
        label_tasks(SAMPLES, NAMES, prompts=prompts)
    tasks, _ = label_tasks(SAMPLES, NAMES, prompts={"xray/NORMAL": prompts["xray/NORMAL"]})
    assert tasks[0].prompts["normal"] == ["Clear lungs.", "A healthy chest."]


def test_the_score_is_the_mean_over_tasks_of_the_mean_over_classes_of_the_share_that_is_right():
    torch.manual_seed(0)
    samples = rows(*[(k % 2, "abc"[k % 3 if k % 4 else 0], 0) for k in range(60)])
    tasks, classes = label_tasks(samples, NAMES, templates=["{label}", "{modality} {label}"])
    images = normalize(torch.randn(60, 8), dim=-1)
    texts = normalize(torch.randn(len(task_sentences(tasks)), 8), dim=-1)
    found = score_tasks(tasks, images, classes, texts)
    scores, start = {}, 0
    for modality, name in sorted(NAMES.items(), key=lambda item: item[1]):
        columns = []
        for label in "abc":
            sentences = [label, f"{name} {label}"]
            assert task_sentences(tasks)[start : start + 2] == sentences
            columns.append(normalize(texts[start : start + 2].mean(dim=0), dim=0))
            start += 2
        recalls = []
        for index, label in enumerate("abc"):
            own = [k for k, one in enumerate(samples) if one["modality"] == modality and one["label"] == label]
            right = [int((images[k] @ torch.stack(columns).t()).argmax()) == index for k in own]
            recalls.append(sum(right) / len(own))
        scores[name] = sum(recalls) / 3
    for name, score in scores.items():
        assert found[f"zero_shot:{name}"] == pytest.approx(score)
    assert found["zero_shot"] == pytest.approx(sum(scores.values()) / 2)
    assert found["zero_shot_pairs"] == 60
    assert 0.1 < found["zero_shot"] < 0.9
