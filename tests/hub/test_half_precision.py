"""Checkpoints of half the size: what is rounded, in which precision they load, and what is said about the cost."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.errors import ConvertError, PathExistsError
from medmoe_hf.hub import shrink, write_golden
from medmoe_hf.hub.folder_checks import GOLDEN
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer


@pytest.fixture(scope="module")
def saved(small_config, lived_in, tmp_path_factory):
    """A model with a convolutional backbone of timm, whose BatchNorms have statistics, and golden outputs."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    processor = MedMoEProcessor(
        MedMoEImageProcessor(size={"height": 64, "width": 64}), MedMoETokenizer.from_words(["lung"], max_length=40)
    )
    torch.manual_seed(0)
    config = small_config(
        text_config={"vocab_size": len(processor.tokenizer)},
        projection_dim=32,
        vision_config={"backbone": "timm/mobilenetv3_small_050"},
    )
    lived_in(MedMoEModel(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    write_golden(folder)
    (folder / "README.md").write_text("# A model\n")
    return folder


@pytest.fixture(scope="module")
def small(saved):
    out = saved.parent / "half"
    return out, shrink(saved, out)


def test_weights_are_rounded_and_statistics_are_not(saved, small):
    before, after = load_file(saved / "model.safetensors"), load_file(small[0] / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kept = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        expected = tensor if kept else tensor.half()
        assert after[name].dtype == expected.dtype
        assert torch.equal(after[name], expected)
    assert any(name.endswith("running_var") for name in after)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (saved, small[0])]
    assert [small[1].before, small[1].after] == sizes
    assert sizes[1] < 0.58 * sizes[0]


def test_it_computes_in_float32_unless_asked(saved, small):
    model = AutoModel.from_pretrained(small[0]).eval()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert model.config.dtype == torch.float32
    right = MedMoEModel.from_pretrained(saved).eval()
    with torch.no_grad():
        for parameter in right.parameters():
            parameter.copy_(parameter.half())
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "input_ids": torch.randint(5, 70, (3, 6))}
        found, expected = model(**inputs).logits_per_image, right(**inputs).logits_per_image
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = right.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    half = AutoModel.from_pretrained(small[0], dtype=torch.float16)
    assert half.text_projection.weight.dtype == torch.float16
    model.save_pretrained(small[0].parent / "again")
    again = load_file(small[0].parent / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {torch.float32, torch.int64}


def test_other_files_are_copied_and_golden_outputs_are_recorded_again(saved, small):
    out = small[0]
    assert {path.name for path in out.iterdir()} == {path.name for path in saved.iterdir()}
    for path in saved.iterdir():
        if path.name not in ("model.safetensors", "config.json", GOLDEN):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((saved / "config.json").read_text())
    before, after = load_file(saved / GOLDEN), load_file(out / GOLDEN)
    assert not torch.equal(before["output.image_embeds"], after["output.image_embeds"])
    torch.testing.assert_close(before["output.image_embeds"], after["output.image_embeds"], rtol=0.05, atol=0.01)
    model = MedMoEModel.from_pretrained(out).eval()
    with torch.no_grad():
        found = model.get_image_features(after["input.pixel_values"]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), after["output.image_embeds"])


def test_the_cost_is_measured(saved, small, tmp_path):
    differences = small[1].differences
    assert differences["expert_ids"] == 0
    assert 0 < differences["image_embeds"] < 0.01
    assert 0 < differences["text_embeds"] < 0.01
    result = CliRunner().invoke(app, ["shrink", str(saved), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert re.search(r"Weights: [\d.]+ MB before, [\d.]+ MB now, in float16", result.output)
    assert "Experts of 12 phantoms: the same." in result.output
    assert re.search(r"image_embeds +\d\.\de-0\d", result.output)


def test_values_that_16_bits_cannot_hold_stay(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / GOLDEN).unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors["text_projection.weight"][0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = shrink(folder, tmp_path / "out")
    assert report.kept == ["text_projection.weight"]
    assert "exceed the range of float16: text_projection.weight" in str(report)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[report.kept[0]], tensors[report.kept[0]])
    assert not (tmp_path / "out" / GOLDEN).exists()
    assert MedMoEModel.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_shards_become_one_file(saved, tmp_path):
    folder = tmp_path / "sharded"
    MedMoEModel.from_pretrained(saved).save_pretrained(folder, max_shard_size="1MB")
    MedMoEProcessor.from_pretrained(saved).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    report = shrink(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*.safetensors*")] == ["model.safetensors"]
    assert report.before == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    MedMoEModel.from_pretrained(tmp_path / "out")


def test_what_is_refused(saved, small, tmp_path):
    with pytest.raises(ConvertError, match="have 16 bits already"):
        shrink(small[0], tmp_path / "out")
    with pytest.raises(ConvertError, match=r"config\.json names no MedMoE model"):
        shrink(tmp_path / "nothing", tmp_path / "out")
    folder = shutil.copytree(saved, tmp_path / "step")
    (folder / "training_state").mkdir()
    with pytest.raises(ConvertError, match="a checkpoint to resume from"):
        shrink(folder, tmp_path / "out")
    with pytest.raises(PathExistsError, match="--force"):
        shrink(saved, small[0])
    assert not (tmp_path / "out").exists()
