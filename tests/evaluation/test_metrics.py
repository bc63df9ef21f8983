"""Retrieval and routing metrics against counts by hand."""

import pytest
import torch

from medmoe_hf.evaluation import accuracy, recall_at_k


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


def test_ties_count_against_us():
    assert recall_at_k(torch.zeros(4, 4), ks=(1,)) == {"image_to_text_r1": 0.0, "text_to_image_r1": 0.0}
    assert recall_at_k(torch.eye(4), ks=(1,)) == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


def test_scores_must_be_square():
    with pytest.raises(ValueError, match=r"square.*\(2, 3\)"):
        recall_at_k(torch.zeros(2, 3))


def test_accuracy_leaves_unknown_labels_out():
    assert accuracy(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, -100, 3])) == pytest.approx(2 / 3)
