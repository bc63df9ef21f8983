"""Measurements during training, against the model's losses and counts by hand."""

import math

import pytest
import torch

from medmoe_hf.data import phantom_sample
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.evaluation.validation import LOSS_PARTS, describe, validate
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

SAMPLES = [phantom_sample(0, index, image_size=64) for index in range(11)]


@pytest.fixture(scope="module")
def model_and_collator(small_config):
    tokenizer = MedMoETokenizer.from_words([sample["caption"] for sample in SAMPLES], max_length=32)
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    torch.manual_seed(0)
    model = MedMoEModel(small_config(projection_dim=16, text_config={"vocab_size": len(tokenizer)})).eval()
    return model, ContrastiveCollator(processor)


def cut(collator, *sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [collator(SAMPLES[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("rest", [(), (1,), (3,)])
def test_the_loss_is_over_batches_of_one_size(model_and_collator, rest):
    """The InfoNCE of a single pair is 0: in the mean, it would be the best loss."""
    model, collator = model_and_collator
    with torch.no_grad():
        outputs = [model(**batch) for batch in cut(collator, 4, 4)]
        alone = model(**collator(SAMPLES[:1]))
    assert alone.loss_global == 0
    found = validate(model, cut(collator, 4, 4, *rest))
    for name in LOSS_PARTS:
        expected = sum(output[name].double().item() for output in outputs) / 2
        assert found[name] == pytest.approx(expected, rel=1e-6)
    assert (found["loss_pairs"], found["loss_batch_size"]) == (8, 4)
    assert found["pairs"] == 8 + sum(rest)
    assert found["routing_pairs"] == 8 + sum(rest)


def test_all_pairs_count_for_routing_and_retrieval(model_and_collator):
    model, collator = model_and_collator
    found = validate(model, cut(collator, 4, 4, 3))
    with torch.no_grad():
        output = model(**collator(SAMPLES))
    labels = collator(SAMPLES)["modality_labels"]
    assert found["routing_image"] == pytest.approx((output.router_logits.argmax(-1) == labels).float().mean().item())
    scores = output.image_embeds @ output.text_embeds.t()
    ranks = (scores >= scores.diagonal()[:, None]).sum(dim=1)
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx((ranks <= k).float().mean().item())


def test_recalls_that_are_always_1_are_left_out(model_and_collator):
    model, collator = model_and_collator
    found = validate(model, cut(collator, 5))
    assert {name for name in found if "_r" in name and "to" in name} == {"image_to_text_r1", "text_to_image_r1"}
    batch = cut(collator, 5)[0]
    batch["modality_labels"] = torch.full((5,), -100)
    found = validate(model, [batch])
    assert found["routing_pairs"] == 0
    assert "routing_image" not in found
    assert not any(math.isnan(value) for value in found.values())
    with pytest.raises(ValueError, match="two or more pairs"):
        validate(model, cut(collator, 1, 1))


def test_every_number_is_shown_with_its_number_of_pairs(model_and_collator):
    model, collator = model_and_collator
    batches = cut(collator, 4, 4, 1)
    batches[0]["modality_labels"][:3] = -100
    shown = describe(validate(model, batches))
    assert "(8 pairs, 4 at a time)" in shown
    assert "(of 6)" in shown
    assert "(among 9)" in shown
