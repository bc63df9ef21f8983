"""The three parts of a batch's making against the processor as a whole."""

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
def test_the_parts_together_are_the_processor(kind, options, in_parts):
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


def test_eight_bit_images_travel_in_eight_bits():
    collator = ContrastiveCollator(processor())
    samples = [{"image": collator.prepare(image), "caption": "x", "modality": 0} for image in pictures()[:3]]
    assert collator.assemble(samples)["pixel_values"].dtype == torch.uint8
    assert collator.side == 80
