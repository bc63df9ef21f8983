"""Metrics against loops, scikit-learn and numbers computed by hand."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from medmoe_hf.evaluation import accuracy, recall_at_k
from medmoe_hf.evaluation.metrics import (
    box_mask,
    calibration,
    caption_groups,
    classification_metrics,
    contrast_to_noise,
    energy_in_box,
    mean_iou,
    pointing_hit,
    precision_at_k,
    ranks,
    retrieval_metrics,
)


def brute_force(scores, captions, k, transpose):
    hits = 0
    count = len(captions)
    for query in range(count):
        row = [scores[query][j] if not transpose else scores[j][query] for j in range(count)]
        right = [j for j in range(count) if captions[j] == captions[query]]
        best = max(row[j] for j in right)
        wrong_before = sum(row[j] >= best for j in range(count) if j not in right)
        hits += wrong_before < k
    return hits / count


def test_recall_equals_brute_force_with_ties_and_twins():
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        scores = torch.randint(0, 5, (12, 12), generator=generator).float()
        captions = [f"report {number}" for number in torch.randint(0, 8, (12,), generator=generator).tolist()]
        result = recall_at_k(scores, captions, ks=(1, 3))
        for k in (1, 3):
            assert result[f"image_to_text_r{k}"] == pytest.approx(brute_force(scores.tolist(), captions, k, False)), (
                trial
            )
            assert result[f"text_to_image_r{k}"] == pytest.approx(brute_force(scores.tolist(), captions, k, True)), (
                trial
            )


def test_ties_count_against_the_model():
    assert recall_at_k(torch.zeros(4, 4), ks=(1,)) == {"image_to_text_r1": 0.0, "text_to_image_r1": 0.0}
    assert recall_at_k(torch.eye(4), ks=(1,)) == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


def test_scores_must_be_square():
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        recall_at_k(torch.zeros(2, 3))


def several_captions(generator, images=15):
    """One to three captions per image, of so few different ones that images share them."""
    return [[f"finding {generator.integers(12)}" for _ in range(generator.integers(1, 4))] for _ in range(images)]


def ranks_by_loop(scores, is_right):
    """By sorting: among equal scores the wrong ones first, then the rank of the first right one."""
    found = []
    for query, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], is_right(query, j)))
        found.append(next(place for place, j in enumerate(order) if is_right(query, j)))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_ranks_of_several_captions_per_image_equal_a_sort(seed):
    generator = np.random.default_rng(seed)
    captions = several_captions(generator)
    texts = list(itertools.chain.from_iterable(captions))
    scores = generator.integers(0, 6, (len(captions), len(texts))).astype(np.float32)
    groups = caption_groups(captions)
    of_texts = groups[groups >= 0]
    image_ranks = ranks(scores.__getitem__, groups, of_texts)
    text_ranks = ranks(scores.T.__getitem__, of_texts, groups)
    assert image_ranks.dtype == text_ranks.dtype == np.int64
    assert image_ranks.tolist() == ranks_by_loop(scores, lambda i, t: texts[t] in captions[i])
    assert text_ranks.tolist() == ranks_by_loop(scores.T, lambda t, i: texts[t] in captions[i])


def test_a_shared_caption_does_not_make_other_captions_right():
    # Both images have "clear"; "effusion" is the second's alone, and comes first for the first image.
    groups = caption_groups([["clear"], ["clear", "effusion"]])
    assert groups.tolist() == [[0, -1], [0, 1]]
    scores = np.array([[0.1, 0.2, 0.9], [0.1, 0.2, 0.9]])
    assert ranks(scores.__getitem__, groups, groups[groups >= 0]).tolist() == [1, 0]


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_chunked_ranks_are_those_of_the_whole(chunk):
    generator = np.random.default_rng(1)
    images, texts = generator.integers(-2, 3, (2, 50, 4)).astype(np.float32)
    groups = generator.integers(0, 30, 50)
    table = images @ texts.T
    asked = []

    def scores_of(rows):
        asked.append(rows.stop - rows.start)
        return torch.from_numpy(images[rows]) @ torch.from_numpy(texts).T

    found = ranks(scores_of, groups, groups, chunk)
    assert found.tolist() == ranks_by_loop(table, lambda i, j: groups[i] == groups[j])
    assert sum(asked) == 50
    assert max(asked) == min(chunk, 50)


def test_nan_scores_count_against_the_model():
    scores = torch.tensor([[math.nan, 0.5, 0.4], [math.nan, 0.5, 0.4], [-math.inf, -math.inf, -math.inf]])
    assert ranks(scores.__getitem__, [0, 1, 2], [0, 1, 2]).tolist() == [2, 1, 2]


def test_a_query_needs_a_right_candidate_and_scores_of_its_shape():
    table = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="Query 2 has no right candidate"):
        ranks(table.__getitem__, [0, 1, 7], [0, 1], chunk=2)
    with pytest.raises(ValueError, match=r"Query 0 "):
        ranks(table.__getitem__, [-1, 1, 0], [-1, 1])
    with pytest.raises(ValueError, match=r"Queries 0\.\.2 have scores \(3, 2\), not \(3, 4\)"):
        ranks(table.__getitem__, [0, 1, 0], [0, 1, 2, 3])


def test_retrieval_metrics_by_hand():
    assert retrieval_metrics([0, 0, 4, 9], np.array([1, 2, 10]), ks=(1, 5)) == {
        "image_to_text_r1": 0.5,
        "image_to_text_r5": 0.75,
        "image_to_text_median_rank": 3.0,  # places 1, 1, 5, 10
        "text_to_image_r1": 0.0,
        "text_to_image_r5": pytest.approx(2 / 3),
        "text_to_image_median_rank": 3.0,
    }
    assert set(retrieval_metrics(text_ranks=[0])) == {
        "text_to_image_r1",
        "text_to_image_r5",
        "text_to_image_r10",
        "text_to_image_median_rank",
    }


@pytest.mark.parametrize("seed", range(5))
def test_precision_equals_a_sort_with_the_wrong_first(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 8, (9, 40)).astype(float)
    queries, candidates = generator.integers(0, 3, 9), generator.integers(0, 3, 40)
    result = precision_at_k(torch.from_numpy(scores), queries, candidates, ks=(1, 5, 40, 41))
    for k in (1, 5, 40):
        expected = []
        for row, label in zip(scores, queries, strict=True):
            order = sorted(range(40), key=lambda j: (-row[j], candidates[j] == label))
            expected.append(sum(candidates[j] == label for j in order[:k]) / k)
        assert result[f"precision_at_{k}"].tolist() == pytest.approx(expected)
    assert np.isnan(result["precision_at_41"]).all()


def test_nan_scores_count_against_the_precision():
    result = precision_at_k([[math.nan, 0.9, 0.1], [0.9, math.nan, 0.1]], [0, 0], [0, 1, 0], ks=(1, 2))
    assert result["precision_at_1"].tolist() == [0, 0]
    assert result["precision_at_2"].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        precision_at_k([[1, 2, 3]], [0], [0, 1])


def test_accuracy_leaves_unknown_labels_out():
    assert accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, -100, 3])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_classification_equals_scikit_learn(classes, decimals):
    generator = np.random.default_rng(classes)
    labels = generator.choice(classes, 400, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    # Few decimals make many ties. They break the sum of 1, which scikit-learn's roc_auc_score wants of a table.
    scores = generator.dirichlet(np.ones(classes), 400) + 0.4 * np.eye(classes)[labels]
    scores = np.round(scores, decimals)
    predicted, truth = scores.argmax(axis=1), np.eye(classes)[labels]
    assert classification_metrics(scores, labels) == pytest.approx(
        {
            "accuracy": sklearn_metrics.accuracy_score(labels, predicted),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, predicted),
            "macro_auroc": sklearn_metrics.roc_auc_score(truth, scores, average="macro"),
            "macro_f1": sklearn_metrics.f1_score(labels, predicted, average="macro"),
            "macro_average_precision": sklearn_metrics.average_precision_score(truth, scores, average="macro"),
        }
    )


def test_auroc_of_two_classes_is_that_of_the_second():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 100)
    positive = generator.random(100)
    found = classification_metrics(np.stack([1 - positive, positive], axis=1), labels)["macro_auroc"]
    assert found == pytest.approx(sklearn_metrics.roc_auc_score(labels, positive))


def test_a_missing_class_gives_nan_and_never_an_exception():
    scores = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missing = classification_metrics(scores, [0, 1, 1])
        nothing = classification_metrics(scores, [-100] * 3)
        broken = classification_metrics(np.where(scores == 0.7, np.nan, scores), [0, 1, 2])
        one = classification_metrics([[0.3], [0.4]], [0, 0])
    assert missing["accuracy"] == pytest.approx(2 / 3)
    assert all(math.isnan(value) for name, value in missing.items() if name != "accuracy")
    for result in (nothing, broken):
        assert list(result) == list(missing)
        assert all(map(math.isnan, result.values()))
    assert one["accuracy"] == one["macro_f1"] == one["macro_average_precision"] == 1
    assert math.isnan(one["macro_auroc"])


def test_rows_of_unknown_class_are_left_out_and_labels_out_of_range_named():
    generator = np.random.default_rng(3)
    scores, labels = generator.dirichlet(np.ones(3), 50), generator.integers(0, 3, 50)
    hidden = np.where(np.arange(50) < 10, -100, labels)
    assert classification_metrics(scores, hidden) == classification_metrics(scores[10:], labels[10:])
    np.testing.assert_equal(calibration(scores, hidden), calibration(scores[10:], labels[10:]))
    with pytest.raises(ValueError, match=r"0\.\.2.*got 0\.\.3"):
        classification_metrics(scores[:2], [0, 3])
    with pytest.raises(ValueError, match=r"\(50, 3\) and \(49,\)"):
        classification_metrics(scores, labels[:49])


def test_calibration_by_hand():
    # Confidence and whether it was right: 0.91 yes, 0.89 no (one bin, 0.9 against 0.5); 0.70 yes; 0.55 no.
    probabilities = [[0.91, 0.09], [0.89, 0.11], [0.30, 0.70], [0.45, 0.55]]
    result = calibration(probabilities, [0, 1, 1, 0])
    assert result["ece"] == pytest.approx((2 * 0.4 + 0.3 + 0.55) / 4)
    assert result["brier"] == pytest.approx(2 * (0.09**2 + 0.89**2 + 0.3**2 + 0.55**2) / 4)
    bins = result["bins"]
    assert len(bins) == 15
    assert [row["count"] for row in bins] == [0] * 8 + [1, 0, 1, 0, 0, 2, 0]
    assert bins[13] == pytest.approx({"low": 13 / 15, "high": 14 / 15, "count": 2, "confidence": 0.9, "accuracy": 0.5})
    assert math.isnan(bins[0]["confidence"])
    assert math.isnan(bins[0]["accuracy"])


def test_a_confidence_on_an_edge_belongs_to_the_lower_bin():
    result = calibration([[1.0, 0.0, 0.0], [1.0 + 1e-6, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], [0, 1, 0])
    assert [index for index, row in enumerate(result["bins"]) if row["count"]] == [4, 14]
    assert result["bins"][14]["count"] == 2
    assert result["ece"] == pytest.approx((2 * 0.5 + 2 / 3) / 3, abs=1e-6)


def test_calibration_equals_scikit_learn_and_a_loop():
    generator = np.random.default_rng(0)
    honest = generator.dirichlet(np.ones(4), 5000)
    labels = np.array([generator.choice(4, p=row) for row in honest])
    result = calibration(honest, labels)
    assert result["brier"] == pytest.approx(
        sklearn_metrics.brier_score_loss(labels, honest, labels=range(4), scale_by_half=False)
    )
    by_bin = {}
    for row, label in zip(honest, labels, strict=True):
        by_bin.setdefault(math.ceil(row.max() * 15), []).append((row.max(), row.argmax() == label))
    expected = sum(abs(sum(p for p, _ in rows) - sum(hit for _, hit in rows)) for rows in by_bin.values()) / 5000
    assert result["ece"] == pytest.approx(expected)
    # The labels were drawn by the probabilities; sharper ones claim too much.
    sharp = honest**3 / (honest**3).sum(axis=1, keepdims=True)
    assert result["ece"] < 0.03 < 0.15 < calibration(sharp, labels)["ece"]


def test_calibration_of_nothing_and_of_logits():
    nothing = calibration(np.zeros((0, 3)), [])
    assert math.isnan(nothing["ece"])
    assert math.isnan(nothing["brier"])
    assert sum(row["count"] for row in nothing["bins"]) == 0
    with pytest.raises(ValueError, match="softmax"):
        calibration([[2.0, -1.0]], [0])
    with pytest.raises(ValueError, match="softmax"):
        calibration([[math.nan, 1.0]], [0])


def test_box_mask_touches_what_the_box_touches():
    assert np.argwhere(box_mask((1, 0, 3, 2), (3, 5))).tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert np.argwhere(box_mask((1.9, 1.2, 2.1, 1.3), (3, 5))).tolist() == [[1, 1], [1, 2]]
    assert box_mask((-9, -9, 99, 99), (3, 5)).all()
    assert box_mask((-9, -9, 1, 99), (3, 5)).sum() == 3
    for wrong in ((5, 0, 9, 2), (3, 0, 3, 2), (3, 0, 1, 2), (0, -4, 2, 0)):
        with pytest.raises(ValueError, match="height 3 and width 5"):
            box_mask(wrong, (3, 5))


HEAT = np.array([[1.0, 3.0, 0.0], [5.0, 3.0, 0.0]])
LEFT = np.array([[True, False, False], [True, False, False]])


def test_grounding_by_hand():
    # In: 1, 5, mean 3, variance 4. Out: 3, 0, 3, 0, mean 1.5, variance 2.25.
    assert contrast_to_noise(HEAT, LEFT) == pytest.approx(1.5 / 2.5)
    assert pointing_hit(HEAT, LEFT) == 1.0
    assert pointing_hit(HEAT, ~LEFT) == 0.0
    assert energy_in_box(HEAT, LEFT) == pytest.approx(6 / 12)
    # Scaled: 0.2, 1 in; 0.6, 0.6, 0, 0 out. From 0.1: 2 of 4; from 0.5: 1 of 4; from 0.7: 1 of 2.
    assert mean_iou(HEAT, LEFT, (0.1, 0.5, 0.7)) == pytest.approx((2 / 4 + 1 / 4 + 1 / 2) / 3)
    assert mean_iou(LEFT.astype(float), LEFT) == 1.0
    assert energy_in_box(LEFT.astype(float), LEFT) == 1.0
    assert contrast_to_noise(LEFT.astype(float), LEFT) == math.inf


def slow_grounding(heat, mask):
    pairs = [(heat[y][x], mask[y][x]) for y in range(len(heat)) for x in range(len(heat[0]))]
    inside, outside = [h for h, m in pairs if m], [h for h, m in pairs if not m]
    mean_in, mean_out = sum(inside) / len(inside), sum(outside) / len(outside)
    noise = sum((h - mean_in) ** 2 for h in inside) / len(inside)
    noise += sum((h - mean_out) ** 2 for h in outside) / len(outside)
    low, high = min(h for h, _ in pairs), max(h for h, _ in pairs)
    overlaps = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        warm = [((h - low) / (high - low) >= threshold, m) for h, m in pairs]
        overlaps.append(sum(w and m for w, m in warm) / sum(w or m for w, m in warm))
    return {
        contrast_to_noise: abs(mean_in - mean_out) / math.sqrt(noise),
        pointing_hit: float(all(m for h, m in pairs if h == high)),
        mean_iou: sum(overlaps) / 5,
        energy_in_box: sum(h - low for h in inside) / sum(h - low for h, _ in pairs),
    }


@pytest.mark.parametrize("seed", range(12))
def test_grounding_equals_loops(seed):
    generator = np.random.default_rng(seed)
    height, width = generator.integers(3, 12, 2)
    mask = box_mask((0, 1, generator.integers(1, width), 3), (height, width))
    # Every other time with negative values and ties.
    heat = generator.integers(-3, 4, mask.shape).astype(float) if seed % 2 else generator.normal(size=mask.shape)
    heat += 2 * mask
    for metric, expected in slow_grounding(heat.tolist(), mask.tolist()).items():
        assert metric(torch.from_numpy(heat), torch.from_numpy(mask)) == pytest.approx(expected), metric.__name__


@pytest.mark.parametrize("level", [0.0, 0.1, -0.3])
def test_a_constant_map_scores_zero(level):
    flat = np.full((7, 9), level, dtype=np.float32)
    mask = box_mask((2, 2, 5, 6), flat.shape)
    for metric in (contrast_to_noise, pointing_hit, mean_iou, energy_in_box):
        assert metric(flat, mask) == 0.0, metric.__name__


def test_a_map_equal_to_the_mask_has_no_noise():
    mask = box_mask((3, 3, 20, 30), (50, 60))
    assert contrast_to_noise(np.where(mask, 0.7, 0.1), mask) == math.inf


def test_two_peaks_are_a_hit_only_if_both_are_in_the_box():
    heat = np.array([[1.0, 1.0, 0.0]])
    assert pointing_hit(heat, np.array([[True, False, False]])) == 0.0
    assert pointing_hit(heat, np.array([[True, True, False]])) == 1.0


def test_a_mask_of_the_whole_image_has_no_contrast_to_measure():
    whole = np.ones_like(LEFT)
    assert math.isnan(contrast_to_noise(HEAT, whole))
    assert pointing_hit(HEAT, whole) == energy_in_box(HEAT, whole) == 1.0


@pytest.mark.parametrize(
    ("heat", "mask", "message"),
    [
        (HEAT, LEFT.astype(int), "int64"),
        (HEAT, LEFT.T, r"\(2, 3\) and \(3, 2\)"),
        (HEAT, np.zeros_like(LEFT), "no true pixel"),
        (np.where(LEFT, np.nan, HEAT), LEFT, "not finite"),
    ],
)
@pytest.mark.parametrize("metric", [contrast_to_noise, pointing_hit, mean_iou, energy_in_box])
def test_maps_and_masks_of_different_shapes(metric, heat, mask, message):
    with pytest.raises(ValueError, match=message):
        metric(heat, mask)
