"""Votes, pooling and key slices of series, against plain formulations; tasks of labels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import medmoe_hf
from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.studies.pooling import key_slices, pool_slices, route_series
from medmoe_hf.inference.studies.tasks import (
    as_task,
    default_task,
    normal_sentences,
    probabilities,
    read_task,
    reference,
    task_of_labels,
)
from medmoe_hf.inference.task_files import read_task_file
from medmoe_hf.model import Calibration, Task
from medmoe_hf.model.tasks_medmoe import write_tasks

SCORES = np.random.default_rng(0).normal(scale=3, size=(23, 4))


def test_mean_pooling_averages_all_slices():
    expected = [sum(SCORES[row, column] for row in range(23)) / 23 for column in range(4)]
    np.testing.assert_allclose(pool_slices(SCORES, "mean"), expected, rtol=1e-12)


def test_top_k_pooling_averages_the_highest_tenth_of_each_label():
    # A tenth of 23 slices, rounded up, are 3.
    expected = [sum(sorted(SCORES[:, column].tolist(), reverse=True)[:3]) / 3 for column in range(4)]
    np.testing.assert_allclose(pool_slices(SCORES, "top-k"), expected, rtol=1e-12)
    assert pool_slices(SCORES[:10], "top-k").tolist() == SCORES[:10].max(axis=0).tolist()


def test_attention_pooling_weights_slices_by_a_softmax_of_their_scores():
    for column in range(4):
        weights = [math.exp(score) for score in SCORES[:, column]]
        expected = sum(weight * score for weight, score in zip(weights, SCORES[:, column], strict=True)) / sum(weights)
        assert pool_slices(SCORES, "attention")[column] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "top-k", "attention"])
def test_pooling_leaves_out_unreadable_slices_and_ignores_the_order(pooling):
    with_gaps = np.insert(SCORES, [0, 7, 23], np.nan, axis=0)
    np.testing.assert_array_equal(pool_slices(with_gaps, pooling), pool_slices(SCORES, pooling))
    shuffled = np.random.default_rng(1).permutation(SCORES)
    np.testing.assert_allclose(pool_slices(shuffled, pooling), pool_slices(SCORES, pooling), rtol=1e-12)
    assert pool_slices(SCORES[:1], pooling).tolist() == SCORES[0].tolist()


def test_unknown_pooling_is_named():
    with pytest.raises(ArgumentError, match='no pooling "max"; known: attention, top-k, mean'):
        pool_slices(SCORES, "max")


def test_slices_vote_by_the_mean_of_their_log_probabilities():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [np.nan] * 3])
    geometric = np.array([(0.7 * 0.2 * 0.6) ** (1 / 3), (0.2 * 0.7 * 0.3) ** (1 / 3), 0.1])
    np.testing.assert_allclose(route_series(np.log(probabilities), None), geometric / geometric.sum(), rtol=1e-12)


def test_a_header_is_a_prior_that_a_clear_vote_overrules():
    # The prior is 0.9 for the header's modality and 0.05 for the two others: a ratio of 18.
    for ratio, expected in ((17.0, 2), (19.0, 0)):
        votes = np.array([[ratio, 1.0, 1.0]] * 5) / (ratio + 2)
        combined = route_series(np.log(votes), 2)
        assert combined.argmax() == expected
        assert combined[0] / combined[2] == pytest.approx(ratio * 0.05 / 0.9)


def test_key_slices_are_the_highest_that_are_no_neighbours():
    scores = np.zeros(100)
    scores[[40, 41, 44, 46, 90]] = [0.9, 0.95, 0.8, 0.7, 0.5]
    # 5 % of 100 slices: within 5 of slice 41 there is no other key slice.
    assert key_slices(scores) == [41, 90, 0]
    assert key_slices(scores, count=1) == [41]
    scores[47] = 0.6
    assert key_slices(scores) == [41, 47, 90]


def test_key_slices_of_short_series_and_of_unreadable_slices():
    assert key_slices(np.array([0.3])) == [0]
    assert key_slices(np.array([0.3, 0.9])) == [1]
    assert key_slices(np.array([np.nan, 0.1, np.nan, 0.9])) == [3, 1]
    assert key_slices(np.array([0.5, 0.5, 0.5])) == [0, 2]


def test_labels_become_sentences_that_name_the_technique():
    task = task_of_labels(["no finding", "There is a pleural effusion."], "mri")
    assert task.prompts["no finding"] == (
        "MRI showing no finding.",
        "MRI: no finding.",
        "No finding, MRI.",
        "No finding.",
    )
    assert task.prompts["There is a pleural effusion."] == ("There is a pleural effusion.",)
    assert reference(task, "no finding") == ("There is a pleural effusion.",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["pneumonia"], 'One label is not enough.*"no finding".*`text`'),
        ([], "No labels are not enough|not enough"),
        (["a", "a"], "must be different"),
        (["a", " "], "none may be empty"),
        ("pneumonia", "is a list of texts, got the text 'pneumonia'"),
    ],
)
def test_labels_that_cannot_be_compared(labels, message):
    with pytest.raises(ArgumentError, match=message):
        task_of_labels(labels, "ct")


def test_a_task_file_holds_labels_or_prompts_as_a_recipe_does(tmp_path):
    (tmp_path / "plain.yaml").write_text("a: [One., Two.]\nb: Three.\n")
    assert read_task(tmp_path / "plain.yaml") == Task("plain", {"a": ["One.", "Two."], "b": ["Three."]})
    recipe = {"name": "x", "classes": ["a"], "prompts": {"a": ["Yes."]}, "negative_prompts": {"a": ["No."]}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    task = read_task(tmp_path / "recipe.json")
    assert task.kind == "multi-label"
    assert reference(task, "a") == ("No.",)
    assert as_task(str(tmp_path / "recipe.json")) == task
    assert as_task("a task of the model") == "a task of the model"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", "or classes with their sentences"),
        ("a: [1, 2]\nb: [x]\n", r"prompts\.a"),
        ("a: []\nb: [x]\n", r"prompts\.a"),
        ("promts: {a: [x], b: [y]}\n", "promts: unknown key. Did you mean `prompts`"),
        ("prompts: {a: [x]}\nnegative_prompts: {b: [y]}\n", "with the classes of `prompts` in order"),
        ("- {name: a, prompts: {a: x, b: y}}\n- {name: c, prompts: {a: x, b: y}}\n", "holds the tasks a, c"),
        ("a: [x\n", "task.yaml is no valid YAML"),
    ],
)
def test_task_files_that_cannot_be_used(tmp_path, content, message):
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(ArgumentError, match=message):
        read_task(tmp_path / "task.yaml")
    with pytest.raises(ArgumentError, match=r"Cannot read .*missing\.yaml"):
        read_task(tmp_path / "missing.yaml")


def test_probabilities_are_a_softmax_or_independent_sigmoids():
    scores = np.array([[1.0, 3.0], [800.0, -800.0]])
    compared = probabilities(Task("t", {"a": ("x",), "b": ("y",)}), scores)
    assert compared[0, 1] == pytest.approx(math.exp(3) / (math.exp(1) + math.exp(3)))
    assert compared[1].tolist() == [1.0, 0.0]
    independent = probabilities(
        Task("t", {"a": ("x",), "b": ("y",)}, {"a": ("no x",), "b": ("no y",)}, "multi-label"), scores
    )
    assert independent[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))])
    assert independent[1].tolist() == [1.0, 0.0]


def test_a_file_of_a_checkpoint_or_of_a_recipe_is_read_by_the_same_reader(tmp_path):
    half = {"a": 0.5, "b": 0.5}
    fitted = Calibration(2.0, {"a": 0.0, "b": 0.0}, half, half, 0.9, "marginal", half)
    own = Task("chest", {"a": ["x"], "b": ["y"]}, score="mean", modality="xray", calibration=fitted)
    write_tasks(tmp_path / "tasks.json", {"chest": own})
    # A task of a model that runs the code of its own checkpoint is of another class of the same name.
    other = type("Task", (), {"name": own.name, "prompts": own.prompts, "to_dict": own.to_dict})()
    assert as_task(other) == own
    # A calibration fits the weights of its checkpoint only.
    assert read_task(tmp_path / "tasks.json") == own.uncalibrated()
    recipe = next(Path(medmoe_hf.__file__).parent.glob("evaluation/recipe_files/chexpert_5x200.yaml"))
    (entry,) = read_task_file(recipe)
    assert (entry.name, entry.modality, entry.title) == ("chexpert_5x200", "xray", "CheXpert 5x200")
    content = yaml.safe_load(recipe.read_text())
    assert {name: list(own) for name, own in entry.task().prompts.items()} == content["prompts"]


def test_default_labels_exist_for_every_modality():
    from medmoe_hf.model.modalities_medmoe import MODALITIES

    for modality in MODALITIES:
        task = default_task(modality)
        assert task is not None
        assert 3 <= len(task.prompts) <= 6
        assert normal_sentences(modality)
    assert "not a chest" in default_task("xray").prompts  # or knees are given findings of the chest
    assert default_task("thermography") is None
    assert normal_sentences("thermography") == ()
