"""`examples/experiments/evaluate_real.py`: labels from segmentations, and a split with gaps between the parts."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "experiments"
_spec = importlib.util.spec_from_file_location("evaluate_real", FOLDER / "evaluate_real.py")
example = importlib.util.module_from_spec(_spec)
sys.path.insert(0, str(FOLDER))
_spec.loader.exec_module(example)
ct = sys.modules["chest_ct"]
sys.path.remove(str(FOLDER))


def test_an_organ_is_present_if_its_structures_together_are_large_enough():
    mask = np.zeros((20, 20, 4), dtype=np.uint8)
    mask[:5, :5, 1] = 7  # 25 pixels of 1 mm²
    mask[:4, :6, 2] = 7  # 24
    mask[:4, :6, 3] = 7
    mask[10, 10, 3] = 9  # the 25th pixel, in the other structure of the organ
    mask[12:, 12:, :] = 8  # another organ
    assert ct.presence(mask, [7, 9], pixel_area=1.0).tolist() == [False, True, False, True]


def test_blocks_alternate_with_gaps_between_them():
    parts, blocks = example.split_in_blocks(11, block=3, gap=2)
    assert parts.tolist() == ["train"] * 3 + ["gap"] * 2 + ["test"] * 3 + ["gap"] * 2 + ["train"]
    assert blocks.tolist() == [0] * 5 + [1] * 5 + [2]


@pytest.mark.parametrize("count", [133, 64])
def test_the_gap_separates_test_slices_from_training_slices(count):
    parts, blocks = example.split_in_blocks(count, example.BLOCK, example.GAP)
    train, test = (np.flatnonzero(parts == part) for part in ("train", "test"))
    assert np.abs(train[:, None] - test[None, :]).min() == example.GAP + 1
    assert not set(blocks[train]) & set(blocks[test])


def test_an_organ_needs_enough_slices_with_and_without_it_in_both_parts():
    parts = np.array(["train"] * 4 + ["gap"] * 2 + ["test"] * 4)
    present = np.array([1, 1, 0, 0, 1, 1, 0, 0, 1, 1], dtype=bool)
    assert example.is_measurable(present, parts, least=2)
    assert not example.is_measurable(present, parts, least=3)
    missing = present.copy()
    missing[6:8] = True  # it is present in all test slices
    assert not example.is_measurable(missing, parts, least=2)


def test_each_organ_of_a_slice_has_its_own_captions():
    assert example.slice_captions(["heart", "left lung"], ["colon"]) == [
        "Axial CT slice with the heart.",
        "The heart is seen on this CT slice.",
        "Axial CT slice with the left lung.",
        "The left lung is seen on this CT slice.",
        "Axial CT slice without the colon.",
        "The colon is not seen on this CT slice.",
    ]


def test_parts_share_no_subject_and_both_contain_each_modality():
    parts = {}
    for image in example.IMAGES:
        parts.setdefault(image.subject, set()).add(image.part)
    assert all(len(parts_of_subject) == 1 for parts_of_subject in parts.values())
    for part in ("train", "test"):
        assert {image.modality for image in example.IMAGES if image.part == part} == set(example.MODALITIES)
