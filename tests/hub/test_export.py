"""Exported folders: equal to the model at other batch sizes and under mixed routing, and enough without torch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.nn.functional import normalize

from medmoe_hf.errors import ExportError
from medmoe_hf.hub import export as export_module
from medmoe_hf.hub.export import export
from medmoe_hf.model import (
    MedMoEForImageClassification,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
    MedMoEVisionModel,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_zero_shot.py"
TEXTS = ["a chest x-ray of pneumonia, on the left", "fundus", "", "an axial ct of the head " * 8]
MAX_LENGTH = 20
KINDS = {
    "report router": {},
    "official": {
        "router": "image",
        "word_rule": "official",
        "report_length": MAX_LENGTH,
        "bracket_token_ids": [0, 1, 2, 3, 4],
        "vision_config": {
            "expert_type": "token",
            "global_features": "expert",
            "swin_config": {"pyramid": "merged"},
        },
    },
    "timm": {"vision_config": {"backbone": "timm/resnet18"}},
}
SHALLOW = {"depths": (1, 1), "num_heads": (1, 1), "embed_dim": 8}


def save_model(small_config, lived_in, folder, kind):
    fields = KINDS[kind]
    vision = fields.get("vision_config", {})
    tokenizer = MedMoETokenizer.from_words(TEXTS, max_length=MAX_LENGTH)
    config = small_config(
        projection_dim=24,
        **{**fields, "vision_config": {**vision, "swin_config": {**SHALLOW, **vision.get("swin_config", {})}}},
        text_config={"vocab_size": len(tokenizer)},
    )
    model = lived_in(MedMoEModel(config))
    with torch.no_grad():
        # As after training, where images go to different experts.
        router = model.vision_model.router
        router.fc1.weight.mul_(60)
        router.fc2.weight.mul_(20)
        pixel_values = 2 * torch.randn(40, 3, 64, 64) + torch.randn(40, 3, 1, 1)
        router.fc2.bias.sub_(router(model.vision_model.encode(pixel_values).pooler_output).mean(dim=0))
    model.save_pretrained(folder)
    images = MedMoEImageProcessor(size={"height": 64, "width": 64}, pad_to_square=True)
    MedMoEProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(
    scope="module",
    params=[("onnx", "report router"), ("onnx", "official"), ("torch-export", "official"), ("onnx", "timm")],
)
def exported(request, small_config, lived_in, tmp_path_factory):
    format, kind = request.param
    torch.manual_seed(0)
    folder, out = (tmp_path_factory.mktemp(part) / "model" for part in ("model", "out"))
    save_model(small_config, lived_in, folder, kind)
    report = export(folder, out, format)
    return SimpleNamespace(
        folder=folder,
        out=out,
        format=format,
        kind=kind,
        report=report,
        facts=json.loads((out / "export.json").read_text()),
        # As users load it: with fused attention.
        model=MedMoEModel.from_pretrained(folder).eval(),
        processor=MedMoEProcessor.from_pretrained(folder),
    )


def run(exported, tower, inputs):
    facts = exported.facts[tower]
    file = exported.out / facts["file"]
    if exported.format == "torch-export":
        found = torch.export.load(file).module()(**inputs)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        assert [entry.name for entry in session.get_inputs()] == facts["inputs"]
        arrays = session.run(facts["outputs"], {name: tensor.numpy() for name, tensor in inputs.items()})
        found = [torch.from_numpy(array) for array in arrays]
    return dict(zip(facts["outputs"], found, strict=True))


def close(found, right):
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_both_towers_give_what_the_model_gives(exported):
    """At several batch sizes, images sent to different experts."""
    model = exported.model
    for count in (1, 3, 9):
        pixel_values = 2 * torch.randn(count, 3, 64, 64) + torch.randn(count, 3, 1, 1)
        found = run(exported, "image_tower", {"pixel_values": pixel_values})
        right = model.get_image_features(pixel_values)
        close(found["image_embeds"], normalize(right.pooler_output, dim=-1))
        for name in ("local_embeds", "router_logits", "scale_weights", "expert_ids"):
            close(found[name], right[name])
    assert len(set(found["expert_ids"].tolist())) > 1

    for texts in (TEXTS, TEXTS[1:2]):
        given = exported.processor(text=texts, return_tensors="pt")
        given = {name: given[name] for name in ("input_ids", "attention_mask", "word_ids")}
        found, right = run(exported, "text_tower", given), model.get_text_features(**given)
        close(found["text_embeds"], normalize(right.pooler_output, dim=-1))
        close(found["word_embeds"], right.word_embeds)
        assert torch.equal(found["word_mask"], right.word_mask)
        assert ("report_router_logits" in found) == (exported.kind != "official")
        if exported.kind != "official":
            right = model.route(**given).probabilities
            close(found["report_router_logits"].softmax(dim=-1), right)


@pytest.mark.slow
def test_the_report_says_what_was_compared(exported):
    report = exported.report
    assert report.batch_sizes == [7, 1]
    # A random router need not have a region for every expert.
    assert len(report.experts) >= 4
    assert 0 < report.largest_difference <= 1e-4
    ending = export_module.FORMATS[exported.format]
    files = {f"image_tower{ending}", f"text_tower{ending}"}
    assert {path.name for path in exported.out.iterdir()} == {*files, "export.json", "tokenizer.json"}
    assert report.sizes == {name: (exported.out / name).stat().st_size for name in files}
    assert all(name in str(report) for name in files)


@pytest.mark.slow
def test_the_tokenizer_gives_what_the_processor_gives(exported):
    encodings = Tokenizer.from_file(str(exported.out / "tokenizer.json")).encode_batch(TEXTS)
    right = exported.processor(text=TEXTS)
    assert [encoding.ids for encoding in encodings] == right["input_ids"]
    assert [encoding.attention_mask for encoding in encodings] == right["attention_mask"]
    assert [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings] == right[
        "word_ids"
    ]


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchvision", "transformers", "medmoe_hf"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@torch.no_grad()
def test_the_example_gives_pytorch_s_labels_without_torch(exported, tmp_path):
    if exported.format != "onnx":
        pytest.skip("the example is for ONNX Runtime")
    generator = np.random.default_rng(0)
    # Coarse noise at the model's own size: there is nothing to resize, about which Pillow and torch would disagree.
    coarse = [generator.integers(0, 256, (8, 8, channels), dtype=np.uint8) for channels in (3, 4)]
    images = [Image.fromarray(values).resize((64, 64), Image.Resampling.NEAREST) for values in coarse]
    images.append(Image.fromarray(generator.integers(0, 3000, (64, 64), dtype=np.uint16)))
    images.append(images[0].crop((0, 0, 64, 30)).resize((64, 30)))
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    labels = ["a chest x-ray of pneumonia", "fundus", "an axial ct of the head"]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(EXAMPLE), str(exported.out)]
    done = subprocess.run(
        [*command, "--image", *map(str, paths), "--labels", *labels], capture_output=True, text=True, check=True
    )
    blocks = [block.splitlines() for block in done.stdout.split(f"{tmp_path}/")[1:]]

    model, processor = exported.model, exported.processor
    seen = model.get_image_features(**processor(images=paths, return_tensors="pt"))
    read = model.get_text_features(**processor(text=labels, return_tensors="pt"))
    cosines = normalize(seen.pooler_output, dim=-1) @ normalize(read.pooler_output, dim=-1).T
    right = (model.config.temp3 * cosines).softmax(dim=1)
    assert len(blocks) == len(images)
    for block, expert, row in zip(blocks, seen.expert_ids.tolist(), right, strict=True):
        assert model.config.modalities[expert] in block[0]
        found = {line[9:]: float(line[2:7]) for line in block[1:]}
        assert next(iter(found)) == labels[int(row.argmax())]
        assert found == pytest.approx(dict(zip(labels, row.tolist(), strict=True)), abs=2e-3)


@pytest.mark.slow
@torch.no_grad()
def test_int8_stays_near_the_model(small_config, lived_in, tmp_path):
    import onnx

    folder = save_model(small_config, lived_in, tmp_path / "model", "official")
    report = export(folder, tmp_path / "int8", int8=True)
    assert set(report.int8) == {"image_tower.image_embeds", "text_tower.text_embeds"}
    facts = json.loads((tmp_path / "int8" / "export.json").read_text())
    whole = SimpleNamespace(out=tmp_path / "int8", facts=facts, format="onnx")
    for tower in ("image_tower", "text_tower"):
        kinds = [node.op_type for node in onnx.load(tmp_path / "int8" / f"{tower}.onnx").graph.node]
        assert kinds.count("MatMulInteger") > 5
        assert report.sizes[f"{tower}.onnx"] == (tmp_path / "int8" / f"{tower}.onnx").stat().st_size
    model = MedMoEModel.from_pretrained(folder).eval()
    pixel_values = 2 * torch.randn(24, 3, 64, 64) + torch.randn(24, 3, 1, 1)
    found, right = run(whole, "image_tower", {"pixel_values": pixel_values}), model.get_image_features(pixel_values)
    alike = found["expert_ids"] == right.expert_ids
    assert alike.float().mean() >= 0.8
    assert len(set(right.expert_ids[alike].tolist())) > 1
    cosines = torch.cosine_similarity(found["image_embeds"], right.pooler_output)[alike]
    assert 0.98 <= cosines.min() < 1
    assert report.int8["image_tower.image_embeds"] >= 0.98
    assert 0 < report.int8_routed <= 1
    assert f"{report.int8_routed:.0%} of the images their expert" in str(report)


# Errors


def through_nothing(change):
    """In the place of a file: the tower itself, and what `change` makes of each of its outputs."""

    def through_file(tower, file):
        file.touch()
        return lambda inputs: [change(value) for value in tower(**inputs)]

    return through_file


def moved(value):
    return value + 2e-4 if value.is_floating_point() else value


def routed_elsewhere(value):
    return (value + 1) % 6 if value.dtype == torch.long else value


@pytest.mark.parametrize(("wrong", "named"), [(moved, "image_embeds"), (routed_elsewhere, "expert_ids")])
def test_an_export_that_differs_is_an_error_and_leaves_nothing(
    small_config, lived_in, tmp_path, monkeypatch, wrong, named
):
    folder = save_model(small_config, lived_in, tmp_path / "model", "report router")
    monkeypatch.setattr(torch.export, "export", lambda tower, **_: tower)
    monkeypatch.setattr(export_module, "_through_file", through_nothing(lambda value: value))
    assert export(folder, tmp_path / "right", "torch-export").largest_difference == 0
    monkeypatch.setattr(export_module, "_through_file", through_nothing(wrong))
    with pytest.raises(ExportError, match=rf"differs from the model by more than 0.0001 in image_tower.{named}"):
        export(folder, tmp_path / "out", "torch-export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "right"]


def test_int8_that_is_too_far_is_an_error(small_config, lived_in, tmp_path, monkeypatch):
    folder = save_model(small_config, lived_in, tmp_path / "model", "report router")
    with pytest.raises(ExportError, match="leave the format at onnx"):
        export(folder, tmp_path / "out", "torch-export", int8=True)
    monkeypatch.setattr(torch.export, "export", lambda tower, **_: tower)

    def through_onnx(tower, file, *_):
        file.touch()
        return lambda inputs: tower(**inputs)

    monkeypatch.setattr(export_module, "_through_onnx", through_onnx)
    monkeypatch.setattr(export_module, "_quantise", lambda file: None)

    def far(file, outputs):
        return lambda inputs: [torch.ones(7, 24), *[torch.zeros(7)] * len(outputs)]

    monkeypatch.setattr(export_module, "_onnx_run", far)
    with pytest.raises(
        ExportError, match=r"not precise enough in int8: below a cosine of 0.98 in image_tower.image_embeds"
    ):
        export(folder, tmp_path / "out", int8=True)
    assert not (tmp_path / "out").exists()


def test_not_a_number_is_a_difference():
    whole = torch.ones(3)
    assert export_module._difference(torch.tensor([1.0, float("nan"), 1.0]), whole) == float("inf")
    assert export_module._difference(whole.double(), whole) == float("inf")
    assert export_module._difference(whole[:2], whole) == float("inf")
    assert export_module._difference(1000 * whole + 0.5, 1000 * whole) == pytest.approx(5e-4)


def test_errors_come_before_the_work(small_config, tmp_path, monkeypatch):
    folder = tmp_path / "classifier"
    MedMoEForImageClassification(small_config()).save_pretrained(folder)
    with pytest.raises(ExportError, match='onnx, torch-export, got "tflite"'):
        export(folder, tmp_path / "out", "tflite")
    with pytest.raises(FileExistsError, match="--force"):
        export(folder, folder)
    with pytest.raises(ExportError, match="no complete dual encoder"):
        export(folder, tmp_path / "out", "torch-export")
    MedMoEVisionModel(small_config().vision_config).save_pretrained(tmp_path / "tower")
    with pytest.raises(ExportError, match='type "medmoe_vision_model"'):
        export(tmp_path / "tower", tmp_path / "out", "torch-export")
    monkeypatch.setattr(export_module, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"medmoe_hf\[export\]"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
