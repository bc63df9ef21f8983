"""The three steps of collation, compared with the processor."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe_hf.data import phantom_sample, phantom_vocabulary
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.model import MedMoEImageProcessor, MedMoEImageProcessorPil, MedMoEProcessor, MedMoETokenizer


def processor(kind=MedMoEImageProcessor, **options):
    options = {
        "size": {"height": 64, "width": 80},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
    } | options
    return MedMoEProcessor(kind(**options), MedMoETokenizer.from_words(phantom_vocabulary(), max_length=30))


def pictures():
    deep = np.linspace(0, 65535, 90 * 70).reshape(90, 70).astype(np.uint16)
    drawn = [phantom_sample(0, index, image_size=96)["image"] for index in range(4)]
    return [*drawn, Image.fromarray(deep), drawn[0].convert("P"), drawn[1].convert("RGBA"), drawn[2].convert("RGB")]


@pytest.mark.parametrize(
    ("kind", "options", "in_parts"),
    [
        (MedMoEImageProcessor, {}, True),
        (MedMoEImageProcessor, {"do_normalize": False}, False),
        (MedMoEImageProcessorPil, {}, False),
    ],
)
def test_the_steps_together_equal_the_processor(kind, options, in_parts):
    whole = processor(kind, **options)
    collator = ContrastiveCollator(whole)
    assert collator.in_parts == in_parts
    images = pictures()
    samples = [{"image": image, "caption": f"normal {i}", "modality": i - 1} for i, image in enumerate(images)]
    batch = collator(samples)
    expected = whole(images=images, text=[sample["caption"] for sample in samples], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(batch[name], expected[name]) for name in expected if name != "pixel_values")
    assert batch["modality_labels"].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert batch["return_loss"] is True


def test_8_bit_images_stay_in_8_bits_until_normalization():
    collator = ContrastiveCollator(processor())
    samples = [{"image": collator.prepare(image), "caption": "x", "modality": 0} for image in pictures()[:3]]
    assert collator.assemble(samples)["pixel_values"].dtype == torch.uint8
    assert collator.side == 80


def groups_of(positives, samples):
    drawn = {"image": phantom_sample(0, 0, image_size=64)["image"], "caption": "x", "modality": 0}
    groups = ContrastiveCollator(processor(), positives)([drawn | sample for sample in samples])["positive_groups"]
    assert groups.dtype == torch.long
    return groups.tolist()


def partition(groups):
    """Numbers groups in order of appearance: [5, 7, 5, -1] becomes [0, 1, 0, -1]."""
    known = list(dict.fromkeys(group for group in groups if group != -1))
    return [-1 if group == -1 else known.index(group) for group in groups]


@pytest.mark.parametrize("positives", ["none", "text_similarity"])
def test_batches_without_groups(positives):
    samples = [{"image": pictures()[0], "caption": "x", "modality": 0, "label": "a"}]
    assert "positive_groups" not in ContrastiveCollator(processor(), positives)(samples)


def test_pairs_with_equal_captions_are_a_group():
    captions = ["Normal chest.", " normal\n chest", "NORMAL CHEST", "No normal chest", "...", "Normal  chest ."]
    groups = groups_of("caption", [{"caption": caption} for caption in captions])
    assert partition(groups) == [0, 0, 0, 1, -1, 0]
    # Equal in every process and run, unlike Python's own hashes.
    digest = hashlib.blake2b(b"caption\0normal chest", digest_size=8).digest()
    assert groups[0] == int.from_bytes(digest, "big") // 2 < 2**63


def test_pairs_with_equal_labels_are_a_group():
    """Within a modality, numbers within a source, a `group` everywhere; unknown labels have no group."""
    samples = [
        {"label": "Pneumonia", "source": 0},
        {"label": "pneumonia ", "source": 1},
        {"label": "pneumonia", "modality": 1},
        {"label": 1, "source": 0},
        {"label": 1.0, "source": 0},
        {"label": "1", "source": 1},
        {"label": np.int64(1), "source": 0},
        {"label": None},
        {"label": ""},
        {"label": float("nan")},
        {"label": "n/a"},
        {},
        {"group": "pneumonia"},
        {"group": "pneumonia", "label": "other", "modality": 3},
        {"group": None, "label": "pneumonia"},
        {"label": 0.5, "source": 0},
        {"label": 0.5, "source": 1},
    ]
    expected = [0, 0, 1, 2, 2, 3, 2, -1, -1, -1, -1, -1, 4, 4, 0, 5, 6]
    assert partition(groups_of("label", samples)) == expected


def test_missing_labels_are_an_error():
    with pytest.raises(ValueError, match="no sample of the batch has a `label` or `group`"):
        groups_of("label", [{}, {}])
