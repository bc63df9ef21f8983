"""A folder saved by version 0.1 loads, and gives what that version gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import medmoe_hf  # noqa: F401  # registers the classes: the folder has no code of its own

FOLDER = Path(__file__).parent.parent / "fixtures" / "saved_by_0_1"


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def outputs(expected):
    model = AutoModel.from_pretrained(FOLDER).eval()
    inputs = {name.removeprefix("input."): value for name, value in expected.items() if name.startswith("input.")}
    with torch.no_grad():
        return model, model(**inputs, return_loss=True)


@pytest.mark.parametrize(
    "name",
    ["logits_per_image", "image_embeds", "text_embeds", "router_logits", "report_router_logits", "loss_global"],
)
def test_outputs_are_equal(name, expected, outputs):
    torch.testing.assert_close(outputs[1][name], expected[f"output.{name}"], rtol=1e-5, atol=1e-5)


def test_the_precision_of_the_local_loss_is_read(expected, outputs):
    model, output = outputs
    assert model.config.local_loss_matmul_dtype == "bfloat16"
    # bfloat16 has eight bits, and not every processor rounds its sums at the same places.
    torch.testing.assert_close(output.loss_local, expected["output.loss_local"], rtol=5e-3, atol=5e-3)


def test_the_tokenizer_reads_as_before(expected):
    processor = AutoProcessor.from_pretrained(FOLDER)
    ids = expected["input.input_ids"]
    text = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    again = processor(text=text, return_tensors="pt", padding=True)
    assert torch.equal(again["input_ids"], ids)
