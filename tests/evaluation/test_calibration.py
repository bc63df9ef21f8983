"""Calibration against plain formulations and established libraries, and on data whose calibration is known."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from medmoe_hf.evaluation.calibration import (
    _folds,
    conformal_quantile,
    fit_best_score,
    fit_calibration,
    fit_scale,
    held_out_loss,
    sensitivity_threshold,
    youden_threshold,
)
from medmoe_hf.evaluation.calibration_measures import measure_calibrated
from medmoe_hf.evaluation.metrics import calibration as measure
from medmoe_hf.model import Task

CLASSES = ["normal", "effusion", "edema"]
TASK = Task("lungs", {name: [f"{name}."] for name in CLASSES})
FINDINGS = Task("findings", {name: [f"{name}."] for name in CLASSES}, kind="multi-label")
TRUE_SCALE, TRUE_BIAS = 0.5, np.array([0.8, -0.3, -0.5])


def draw(count, seed=0, subjects=None):
    """Scores, and labels that have the probabilities softmax(TRUE_SCALE * score + TRUE_BIAS)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=4, size=(count, 3))
    table = TRUE_SCALE * scores + TRUE_BIAS
    chances = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return scores, labels, None if subjects is None else [f"s{row % subjects}" for row in range(count)]


def draw_findings(count, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(loc=14, scale=2, size=(count, 3))
    chances = 1 / (1 + np.exp(-(1.5 * (scores - 14) + np.array([-0.5, 0.0, 0.5]))))
    return scores, (rng.random((count, 3)) < chances).astype(np.int64)


def test_scale_and_bias_are_those_of_scipy():
    scores, labels, _ = draw(300)
    scale, bias = fit_scale(scores, labels)
    sizes = np.bincount(labels)
    targets = np.full((300, 3), 0.0)
    for row, label in enumerate(labels):
        targets[row] = 1 / (sizes[label] + 2) / 2
        targets[row, label] = (sizes[label] + 1) / (sizes[label] + 2)

    def loss(at):
        table = at[0] * scores + np.array([at[1], at[2], -at[1] - at[2]])
        return -(targets * (table - np.logaddexp.reduce(table, axis=1, keepdims=True))).sum()

    found = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-6}).x
    np.testing.assert_allclose([scale, *bias[:2]], found, atol=1e-5)
    assert abs(bias.sum()) < 1e-9
    many = fit_scale(*draw(20_000)[:2])
    np.testing.assert_allclose([many[0], *many[1]], [TRUE_SCALE, *TRUE_BIAS], atol=0.05)


def test_scale_and_bias_of_one_finding_are_those_of_logistic_regression():
    scores, labels = draw_findings(400)
    known = np.arange(400) % 3 > 0
    masked = np.where(known, labels[:, 0], -100)[:, None]
    scale, bias = fit_scale(scores[:, :1], masked, smooth=False)
    reference = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000).fit(scores[known, :1], labels[known, 0])
    np.testing.assert_allclose([scale, bias[0]], [reference.coef_[0, 0], reference.intercept_[0]], rtol=1e-4)


def test_separated_classes_have_a_finite_temperature():
    labels = np.arange(60) % 3
    scale, bias = fit_scale(10 * np.eye(3)[labels], labels)
    # Platt's targets: 21 / 22 for the class, half of 1 / 22 for each of the others
    assert math.exp(10 * scale) == pytest.approx(42)
    np.testing.assert_allclose(bias, 0, atol=1e-6)


def test_youden_threshold_is_that_of_the_roc_curve():
    rng = np.random.default_rng(3)
    for _ in range(20):
        present = rng.random(80) < 0.3
        chances = np.round(np.clip(rng.normal(loc=0.3 + 0.3 * present, scale=0.2), 0, 1), 2)
        threshold = youden_threshold(chances, present)
        alarms, hits, _ = roc_curve(present, chances)
        reached = (chances[present] >= threshold).mean() - (chances[~present] >= threshold).mean()
        assert reached == pytest.approx((hits - alarms).max())


def test_sensitivity_threshold_is_the_highest_with_the_wanted_rank():
    chances = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.65, 0.3])
    present = np.array([True, True, True, True, True, False, False])
    # ceil(0.6 * 6) = 4 of the five must be reached
    threshold = sensitivity_threshold(chances, present, 0.6)
    assert threshold == pytest.approx(0.55)
    reached = []
    for seed in range(400):
        drawn = np.random.default_rng(seed).random(21)
        limit = sensitivity_threshold(np.append(drawn[:20], 0.0), np.arange(21) < 20, 0.8)
        reached.append(drawn[20] >= limit)
    assert 0.76 < np.mean(reached) < 0.88


def test_quantile_covers_new_images():
    assert conformal_quantile(np.arange(9) / 9, 0.9) == pytest.approx(8 / 9, abs=1e-5)
    assert conformal_quantile(np.arange(8) / 9, 0.9) == 1.0
    inside = []
    for seed in range(600):
        drawn = np.random.default_rng(seed).random(20)
        inside.append(drawn[19] <= conformal_quantile(drawn[:19], 0.9))
    assert abs(np.mean(inside) - 0.9) < 0.04


@pytest.fixture(scope="module")
def fitted():
    return fit_calibration(TASK, *draw(600, subjects=300), resamples=60, fitted_on={"data": "drawn", "split": "val"})


def test_a_fitted_task_is_calibrated_on_new_images(fitted):
    scores, labels, _ = draw(4000, seed=9)
    found = fitted.calibration
    old = measure(TASK.probabilities(torch.tensor(scores)).numpy(), labels)["ece"]
    new = measure(fitted.probabilities(torch.tensor(scores)).numpy(), labels)["ece"]
    assert old > 0.1 > 0.05 > new
    _, sets = fitted.decide(torch.tensor(scores))
    covered = np.array([CLASSES[label] in row for label, row in zip(labels, sets, strict=True)])
    assert found.conformal == "class-conditional"
    for label in range(3):
        assert abs(covered[labels == label].mean() - 0.9) < 0.06
    # what is stated of it agrees with the new images
    assert found.measured["coverage"][1] < covered.mean() < found.measured["coverage"][2]
    assert abs(found.measured["ece_before"][0] - old) < 0.04
    assert found.measured["ece"][0] < 0.08
    counts = np.bincount(draw(600)[1])
    np.testing.assert_allclose(list(found.prior.values()), counts / 600)
    assert found.fitted_on == {
        "data": "drawn",
        "split": "val",
        "cases": 600,
        "subjects": 300,
        "subjects_by_class": found.fitted_on["subjects_by_class"],
    }


def test_subjects_stay_together_and_classes_are_spread_over_the_folds():
    rng = np.random.default_rng(4)
    kinds = np.arange(60) % 3
    subject = rng.integers(60, size=400)
    folds = _folds(kinds[subject], np.array([f"s{one}" for one in subject]), seed=0)
    of_subject = [set(folds[subject == one]) for one in np.unique(subject)]
    assert {len(one) for one in of_subject} == {1}
    for kind in range(3):
        numbers = np.bincount(
            [min(one) for row, one in enumerate(of_subject) if kinds[np.unique(subject)[row]] == kind]
        )
        assert len(numbers) == 5
        assert numbers.max() - numbers.min() <= 1
    masks = np.array([[1, 0], [1, 0], [0, 1], [0, 0]] * 5)
    assert set(np.bincount(_folds(masks, np.arange(20).astype(str), seed=1))) == {4}


def test_figures_depend_on_subjects_that_were_left_out():
    scores, labels, _ = draw(120, seed=2)
    # Every subject is there five times: the folds must not share one, and the intervals must be of 24 subjects.
    rows = np.repeat(np.arange(90), 5)
    subjects = [f"s{row}" for row in rows]
    by_subject = fit_calibration(TASK, scores[rows], labels[rows], subjects, resamples=60).calibration
    by_case = fit_calibration(TASK, scores[rows], labels[rows], resamples=60).calibration
    assert by_subject.fitted_on["subjects"] == 90
    widths = [one.measured["coverage"][2] - one.measured["coverage"][1] for one in (by_subject, by_case)]
    assert widths[0] > 1.5 * widths[1]


def test_findings_are_calibrated_each_on_its_own():
    scores, labels = draw_findings(500)
    labels[::7, 1] = -100
    found = fit_calibration(FINDINGS, scores, labels, sensitivity={"edema": 0.95}, resamples=20)
    new, truth = draw_findings(4000, seed=5)
    chances = found.probabilities(torch.tensor(new)).numpy()
    for index in range(3):
        pair = np.stack([1 - chances[:, index], chances[:, index]], axis=1)
        assert measure(pair, truth[:, index])["ece"] < 0.05
    named, sets = found.decide(torch.tensor(new))
    sensitive = np.mean(["edema" in row for row, one in zip(named, truth[:, 2], strict=True) if one])
    assert abs(sensitive - 0.95) < 0.025
    covered = np.mean(["effusion" in row for row, one in zip(sets, truth[:, 1], strict=True) if one])
    assert abs(covered - 0.9) < 0.04
    assert found.calibration.fitted_on["cases"] == 500


def test_two_classes_share_a_threshold():
    task = Task("two", {"normal": ["Normal."], "edema": ["Edema."]})
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    scores = np.eye(2)[labels] * 2 + rng.normal(size=(300, 2))
    for wanted in ({}, {"normal": 0.9}, {"edema": 0.9}):
        found = fit_calibration(task, scores, labels, sensitivity=wanted, resamples=5)
        limits = found.calibration.thresholds
        assert sum(limits.values()) == pytest.approx(1)
        chosen = np.array([task.classes.index(row[0]) for row in found.decide(torch.tensor(scores))[0]])
        chances = found.probabilities(torch.tensor(scores)).numpy()
        assert (chosen == (chances[:, 1] >= limits["edema"])).all()
        for name, value in wanted.items():
            index = task.classes.index(name)
            assert 0.9 <= (chosen[labels == index] == index).mean() < value + 0.02


def test_what_cannot_be_fitted_is_refused():
    scores, labels, _ = draw(200)
    rare = np.where(labels == 2, 0, labels)
    rare[:4] = 2
    with pytest.raises(ValueError, match=r'needs 10 cases or more: "edema" has 4 cases, 6 more\.'):
        fit_calibration(TASK, scores, rare)
    with pytest.raises(ValueError, match=r'10 cases of 5 subjects or more: "normal" has 4 subjects, 1 more'):
        fit_calibration(TASK, scores, labels, [f"s{row % 4}" for row in range(200)])
    with pytest.raises(ValueError, match="higher scores do not mean more probable classes"):
        fit_calibration(TASK, -scores, labels, resamples=5)
    with pytest.raises(ValueError, match=r'sensitivity of 0\.999 for "edema" needs 999 cases'):
        fit_calibration(TASK, scores, labels, sensitivity={"edema": 0.999})
    with pytest.raises(ValueError, match='"oedema" is none of the classes'):
        fit_calibration(TASK, scores, labels, sensitivity={"oedema": 0.9})
    with pytest.raises(ValueError, match="sum to 1"):
        fit_calibration(TASK, scores, labels, prevalence=dict.fromkeys(CLASSES, 0.5), resamples=5)
    absent = np.zeros((200, 3), dtype=np.int64)
    absent[:50, :2] = absent[50:, 2] = 1
    absent[:, 1] = 1
    with pytest.raises(ValueError, match='the absence of "effusion" has 0 cases, 10 more'):
        fit_calibration(FINDINGS, scores, absent)


def test_the_score_with_the_likeliest_answers_is_kept():
    scores, labels, subjects = draw(240, subjects=80)
    noise = np.random.default_rng(1).normal(scale=8, size=scores.shape)
    task = fit_best_score(
        TASK, {"global": scores + noise, "local": -scores, "mean": scores}, labels, subjects, resamples=5
    )
    assert task.score == "mean"
    alone = fit_calibration(TASK, scores, labels, subjects, resamples=5).calibration
    assert task.calibration.temperature == alone.temperature
    assert task.calibration.measured == alone.measured
    losses = task.calibration.fitted_on["held_out_loss"]
    assert losses["mean"] < losses["global"] < math.log(3) * 1.05

    # By hand: a calibration without a fold's subjects, and the mean over classes of -log(p).
    folds = _folds(labels, np.array(subjects), 0)
    chances = np.zeros_like(scores)
    for fold in range(5):
        rows = folds == fold
        scale, bias = fit_scale(scores[~rows], labels[~rows])
        table = scale * scores[rows] + bias
        chances[rows] = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    own = -np.log(chances[np.arange(240), labels])
    expected = np.mean([own[labels == index].mean() for index in range(3)])
    assert held_out_loss(TASK, scores, labels, subjects) == pytest.approx(expected)
    # Of equals the task's own score stays; where nothing can be fitted, the reason is that of the best one.
    assert fit_best_score(TASK, {"mean": scores, "global": scores}, labels, resamples=5).score == "global"
    with pytest.raises(ValueError, match="higher scores do not mean"):
        fit_best_score(TASK, {"global": -scores}, labels, resamples=5)
    with pytest.raises(ValueError, match="too little to calibrate on"):
        fit_best_score(TASK, {"global": scores[:20]}, labels[:20], resamples=5)


def test_new_images_are_measured_by_what_the_task_answers():
    scores, labels, _ = draw(400)
    task = fit_calibration(TASK, scores, labels, resamples=5, sensitivity={"edema": 0.95})
    new, truth, subjects = draw(300, seed=7, subjects=100)
    found = measure_calibrated(task, new, truth, subjects, plain=new / 2, resamples=20)
    chosen, sets = task.decide(torch.from_numpy(new))
    names = [CLASSES[label] for label in truth]
    right = np.array([[name] == own for name, own in zip(names, chosen, strict=True)])
    assert found["accuracy"].value == right.mean()
    assert found["balanced_accuracy"].value == pytest.approx(np.mean([right[truth == one].mean() for one in range(3)]))
    plain = (new / 2).argmax(axis=1) == truth
    before = np.mean([plain[truth == one].mean() for one in range(3)])
    assert found["balanced_accuracy_before"].value == pytest.approx(before)
    held = np.array([name in own for name, own in zip(names, sets, strict=True)])
    assert (found["coverage"].value, found["coverage"].n) == (held.mean(), 100)
    assert found["coverage: edema"].value == pytest.approx(held[truth == 2].mean())
    assert found["set_size"].value == pytest.approx(np.mean([len(own) for own in sets]))
    assert found["ece"].value == pytest.approx(
        measure(task.probabilities(torch.from_numpy(new)).numpy(), truth)["ece"]
    )
    plain = torch.from_numpy(new / 2).softmax(dim=1).numpy()
    assert found["ece_before"].value == pytest.approx(measure(plain, truth)["ece"])
    assert found["coverage"].low < found["coverage"].value < found["coverage"].high
    with pytest.raises(ValueError, match="must be multi-class and calibrated"):
        measure_calibrated(TASK, new, truth)
