"""Encoders: each returns what plain calls of its model return, and unsuitable models are refused."""

import json
import shutil

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file
from safetensors.torch import load_file, save_file
from small_encoders import clip_folder, medmoe_folder, open_clip_architecture
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel

from medmoe_hf.data import phantom_sample
from medmoe_hf.errors import EncoderError, WeightsError
from medmoe_hf.inference.batching import read_picture
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder, scores_of
from medmoe_hf.inference.open_clip_encoder import OpenClipEncoder
from medmoe_hf.inference.other_encoders import ExportedEncoder, TransformersEncoder

TEXTS = ["a chest radiograph with effusion", "normal", "axial ct of the abdomen with a cyst of the left kidney"]


@pytest.fixture(scope="module")
def images():
    return [phantom_sample(3, index, image_size=72)["image"] for index in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("encoders") / "medmoe")


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


# --- MedMoE


def test_medmoe_embeddings_equal_the_models_for_any_batch_size(folder, loaded, images):
    model, processor = loaded
    encoder = load_encoder(folder, batch_size=3)
    assert isinstance(encoder, MedMoEEncoder)
    assert encoder.name == "/".join(folder.parts[-2:])
    with torch.no_grad():
        pooled = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
        texts = model.get_text_features(**processor(text=TEXTS, return_tensors="pt")).pooler_output
    torch.testing.assert_close(encoder.encode_images(images), pooled / pooled.norm(dim=1, keepdim=True))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), texts / texts.norm(dim=1, keepdim=True))
    assert encoder.encode_images(images).dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"router": "both", "projection_dim": 48}, {"local_loss": "token"}])
def test_local_scores_equal_the_models_local_logits(tmp_path, images, changes, monkeypatch):
    folder = medmoe_folder(tmp_path / "medmoe", **changes)
    encoder = MedMoEEncoder(folder, batch_size=4)
    texts = TEXTS + [phantom_sample(3, index, image_size=72)["caption"] for index in range(6)]
    # Few texts per batch: each batch has to fill the right columns.
    monkeypatch.setattr("medmoe_hf.inference.encoders.TEXT_BATCH_SIZE", 2)
    found = encoder.local_scores(images, texts)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, similarity="local").eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(**processor(images=images, text=texts, return_tensors="pt"))
    torch.testing.assert_close(found, output.logits_per_image, rtol=1e-4, atol=1e-4)
    assert len(encoder.route_texts(texts).argmax(dim=1).unique()) > 1
    assert len(encoder.route_images(images).argmax(dim=1).unique()) > 1


def test_router_both_gives_the_probabilities_of_the_image_routers_experts(folder, images):
    """As documented: the routing of encoders and exports, in the stock pipeline."""
    encoder = MedMoEEncoder(folder)
    rule = (encoder.logit_scale * encoder.encode_images(images) @ encoder.encode_texts(TEXTS).T).softmax(dim=1)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=images, text=TEXTS, return_tensors="pt")
    found = {}
    for name, settings in (("stock", {}), ("image router", {"router": "both"})):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, **settings).eval()
        with torch.no_grad():
            found[name] = model(**inputs).logits_per_image.softmax(dim=1)
    torch.testing.assert_close(found["image router"], rule, rtol=1e-4, atol=1e-5)
    assert (found["stock"] - rule).abs().max() > 0.01


def test_features_are_the_image_towers(folder, loaded, images):
    model, processor = loaded
    features = MedMoEEncoder(folder, batch_size=3).features(images)
    with torch.no_grad():
        output = model.vision_model(**processor(images=images, return_tensors="pt"))
    torch.testing.assert_close(features["backbone"], output.last_hidden_state.mean(dim=1))
    torch.testing.assert_close(features["expert"], output.local_embeds.mean(dim=(2, 3)))
    assert torch.equal(features["both"], torch.cat([features["backbone"], features["expert"]], dim=1))


def test_routes_are_the_models(folder, loaded, images):
    model, processor = loaded
    encoder = MedMoEEncoder(folder, batch_size=3)
    of_images = model.route(**processor(images=images, return_tensors="pt")).probabilities
    of_texts = model.route(**processor(text=TEXTS, return_tensors="pt")).probabilities
    torch.testing.assert_close(encoder.route_images(images), of_images)
    torch.testing.assert_close(encoder.route_texts(TEXTS), of_texts)
    assert encoder.expert_ids([0, 5, -100]).tolist() == [0, 5, -100]


def test_heatmaps_equal_the_models_in_original_pixels(folder, loaded):
    model, processor = loaded
    images = [phantom_sample(3, index, image_size=72)["image"].crop((0, 0, 72, 60 + index)) for index in range(4)]
    phrases = ["effusion", "pleural effusion", "cyst", "normal"]
    references = [["no effusion"], [], ["no effusion"], ["normal", "no cyst"]]
    modalities = [0, -100, 1, 2]
    maps = MedMoEEncoder(folder, batch_size=2).heatmaps(images, phrases, references, modalities, sigma=1.0)
    for row, (image, phrase) in enumerate(zip(images, phrases, strict=True)):
        against = processor(text=references[row], return_tensors="pt") if references[row] else None
        inputs = processor(images=image, text=phrase, return_tensors="pt")
        modality = None if modalities[row] < 0 else modalities[row]
        grounding = model.ground(**inputs, reference=against, modality=modality)
        sizes = [(image.height, image.width)]
        (expected,) = processor.post_process_grounding(grounding, target_sizes=sizes, sigma=1.0)
        assert maps[row].shape == (image.height, image.width)
        np.testing.assert_allclose(maps[row], expected.mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)


def test_heatmaps_are_smoothed_over_one_and_a_half_cells_by_default(folder, loaded):
    model, processor = loaded
    encoder = MedMoEEncoder(folder)
    image = phantom_sample(3, 0, image_size=72)["image"]
    grounding = model.ground(**processor(images=image, text="effusion", return_tensors="pt"))
    for settings, sigma in (({}, 1.5), ({"sigma": 0}, 0), ({"sigma": 3.0}, 3.0)):
        (found,) = encoder.heatmaps([image], ["effusion"], **settings)
        (expected,) = processor.post_process_grounding(grounding, target_sizes=[(72, 72)], sigma=sigma)
        np.testing.assert_allclose(found, expected.mean(dim=0).numpy(), rtol=1e-4, atol=1e-5)
    smooth, sharp = (encoder.heatmaps([image], ["effusion"], **settings)[0] for settings in ({}, {"sigma": 0}))
    roughness = [np.abs(np.diff(heatmap, axis=0)).sum() for heatmap in (smooth, sharp)]
    assert roughness[0] < 0.7 * roughness[1]


def test_dicom_goes_through_the_models_own_processor_and_maps_have_its_pixels(folder, loaded):
    model, processor = loaded
    path = get_testdata_file("MR_small.dcm")
    encoder = MedMoEEncoder(folder)
    with torch.no_grad():
        expected = model.get_image_features(**processor(images=path, return_tensors="pt")).pooler_output
    torch.testing.assert_close(encoder.encode_images([path]), torch.nn.functional.normalize(expected))
    header = pydicom.dcmread(path)
    (heatmap,) = encoder.heatmaps([path], ["normal"])
    assert heatmap.shape == (header.Rows, header.Columns)


def test_a_folder_without_a_text_tower_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "classifier")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    save_file(kept, tmp_path / "classifier" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"classifier lacks \d+ tensors"):
        load_encoder(tmp_path / "classifier")


def test_the_hash_depends_on_the_preprocessing_and_not_on_the_path(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "elsewhere")
    settings = MedMoEEncoder(folder).preprocessing
    assert MedMoEEncoder(tmp_path / "elsewhere").preprocessing == settings
    path = next(
        path for path in (tmp_path / "elsewhere").glob("*processor_config.json") if "resample" in path.read_text()
    )
    path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))
    assert MedMoEEncoder(tmp_path / "elsewhere").preprocessing != settings


# --- others


def test_clip_equals_plain_transformers_calls(tmp_path, images):
    folder = clip_folder(tmp_path / "clip")
    encoder = load_encoder(folder, batch_size=3)
    assert isinstance(encoder, TransformersEncoder)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(
            **processor(images=images, text=TEXTS, return_tensors="pt", padding=True, truncation=True, max_length=32)
        )
    torch.testing.assert_close(encoder.encode_images(images), output.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), output.text_embeds, rtol=1e-4, atol=1e-5)
    logits = encoder.logit_scale * encoder.encode_images(images) @ encoder.encode_texts(TEXTS).T
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-4, atol=1e-4)
    assert encoder.encode_texts(["word " * 300]).shape == (1, 16)
    assert list(encoder.features(images)) == ["embedding"]
    assert scores_of(encoder, ("global", "local", "mean")) == ["global"]
    with pytest.raises(ValueError, match="no score cosine"):
        scores_of(encoder, ("cosine",))


def test_siglip_texts_are_padded_to_the_maximum_length(tmp_path, images):
    folder = clip_folder(tmp_path / "siglip")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 190, "max_position_embeddings": 40},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    encoder = load_encoder(folder)
    model, processor = SiglipModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    # All shorter than 40 tokens: a longer text would be truncated to 40, and the others padded to it anyway.
    texts = ["normal", "a small cyst", "chest radiograph, effusion"]
    inputs = processor(
        images=images, text=texts, return_tensors="pt", padding="max_length", max_length=40, truncation=True
    )
    assert inputs["input_ids"].shape == (3, 40)
    assert processor(text=texts, return_tensors="pt", padding=True)["input_ids"].shape[1] < 40
    with torch.no_grad():
        output = model(**inputs)
    torch.testing.assert_close(encoder.encode_images(images), output.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(texts), output.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(texts[:1]), output.text_embeds[:1], rtol=1e-4, atol=1e-5)


def test_a_model_of_one_tower_is_refused(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    vision = CLIPModel.from_pretrained(folder).vision_model
    shutil.copytree(folder, tmp_path / "tower")
    vision.save_pretrained(tmp_path / "tower")
    with pytest.raises(EncoderError, match="no get_"):
        load_encoder(tmp_path / "tower")


@pytest.mark.slow
def test_an_export_is_scored_as_its_model(folder, images, tmp_path):
    pytest.importorskip("onnxscript")
    from medmoe_hf.hub.export import export

    export(folder, tmp_path / "exported")
    encoder, model = load_encoder(f"onnx:{tmp_path / 'exported'}", batch_size=3), load_encoder(folder)
    assert isinstance(encoder, ExportedEncoder)
    assert encoder.name == f"onnx:{tmp_path.name}/exported"
    assert encoder.logit_scale == pytest.approx(model.logit_scale)
    assert encoder.modalities == model.modalities
    for found, right in (
        (encoder.encode_images(images), model.encode_images(images)),
        (encoder.features(images)["embedding"], model.encode_images(images)),
        (encoder.encode_texts(TEXTS), model.encode_texts(TEXTS)),
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    facts = json.loads((tmp_path / "exported" / "export.json").read_text())
    facts["image_tower"]["file"] = "image_tower.pt2"
    (tmp_path / "exported" / "export.json").write_text(json.dumps(facts))
    with pytest.raises(EncoderError, match="--format onnx"):
        load_encoder(f"onnx:{tmp_path / 'exported'}")


def test_a_folder_without_an_export_is_refused(folder):
    pytest.importorskip("onnxruntime")
    with pytest.raises(EncoderError, match="was not written by `medmoe export`"):
        load_encoder(f"onnx:{folder}")


def test_open_clip_equals_plain_calls_and_loads_a_file(tmp_path, images):
    open_clip = pytest.importorskip("open_clip")
    architecture = open_clip_architecture(tmp_path)
    encoder = load_encoder(f"open_clip:{architecture}", batch_size=3)
    assert isinstance(encoder, OpenClipEncoder)
    assert encoder.weights == "random"
    before = torch.random.get_rng_state()
    again = load_encoder(f"open_clip:{architecture}")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again.encode_texts(TEXTS), encoder.encode_texts(TEXTS))

    model, _, transform = open_clip.create_model_and_transforms(architecture)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.eval()
    with torch.no_grad():
        of_images = model.encode_image(
            torch.stack([transform(image.convert("RGB")) for image in images]), normalize=True
        )
        of_texts = model.encode_text(open_clip.get_tokenizer(architecture)(TEXTS), normalize=True)
    for name in ("weights.safetensors", "weights.pt"):
        encoder = load_encoder(f"open_clip:{architecture}:{tmp_path / name}")
        assert encoder.weights == "pretrained"
        assert encoder.name == f"open_clip:{architecture}:{name}"
        torch.testing.assert_close(encoder.encode_images(images), of_images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.encode_texts(TEXTS), of_texts, rtol=1e-4, atol=1e-5)


def test_weights_of_another_architecture_are_told_as_such(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    config["projection_dim"] = 24
    (folder / "config.json").write_text(json.dumps(config))
    told = r"2 tensors of the CLIPModel have other shapes, such as .*\(16, 32\) in place of \(24, 32\)"
    with pytest.raises(WeightsError, match=told):
        load_encoder(folder)
    pytest.importorskip("open_clip")
    architecture = open_clip_architecture(tmp_path)
    model = load_encoder(f"open_clip:{architecture}").model
    state = model.state_dict()
    name = next(name for name in state if name.startswith("visual.") and name.endswith("mlp.c_fc.weight"))
    for wrong in (state | {name: state[name][:-1].contiguous()}, {k: v for k, v in state.items() if k != name}):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(WeightsError, match=rf"wrong.safetensors do not fit .*{architecture}: .*visual"):
            load_encoder(f"open_clip:{architecture}:{tmp_path / 'wrong.safetensors'}")


def test_open_clip_never_unpickles(tmp_path):
    pytest.importorskip("open_clip")
    architecture = open_clip_architecture(tmp_path)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was_run"), "w")

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(EncoderError, match="more than weights"):
        load_encoder(f"open_clip:{architecture}:{tmp_path / 'evil.pt'}")
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(EncoderError, match="open_clip:ARCH"):
        load_encoder("open_clip:no-such-architecture")


# --- pictures


def test_images_of_all_kinds_become_rgb(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(colour), colour):
        picture = read_picture(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), colour)
    gray = np.arange(108, dtype=np.uint16).reshape(9, 12) * 600
    stretched = np.asarray(read_picture(gray))[..., 0].astype(float)
    np.testing.assert_allclose(stretched, (gray / gray.max() * 255).round(), atol=1)
    header = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    picture = read_picture(get_testdata_file("CT_small.dcm"))
    assert picture.size == (header.Columns, header.Rows)
    assert np.asarray(picture).std() > 10


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(EncoderError, match=r"There is no folder .*nothing_here"):
        load_encoder(tmp_path / "nothing_here")


def test_settings_contain_no_path(folder):
    assert str(folder) not in json.dumps(MedMoEEncoder(folder).preprocessing)
