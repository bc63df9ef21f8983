"""Published kinds of medical image-text models, small and with random weights, as folders next to ours.

Each must have the features that its own library computes from the same folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import clip_folder
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from medmoe_hf.data import phantom_sample
from medmoe_hf.errors import EncoderError, MedMoEError
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.inference.open_clip_encoder import OpenClipEncoder
from medmoe_hf.inference.other_encoders import TransformersEncoder

open_clip = pytest.importorskip("open_clip", reason='pip install "medmoe_hf[compare]"')

TEXTS = ["a chest radiograph with effusion", "normal", "axial ct of the abdomen " * 12]
# Unlike those of open_clip, so that settings that are not read from the folder change every feature.
PREPROCESSING = {
    "mean": [0.3, 0.4, 0.5],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


@pytest.fixture(scope="module")
def images():
    """Wider than high: resizing to the shorter side and squashing differ."""
    return [phantom_sample(3, index, image_size=72)["image"].crop((0, 0, 72, 50 + index)) for index in range(5)]


def tokenizer(folder, length):
    letters = [chr(number) for number in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "chest", "normal", "ct", *letters]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*words, *(f"##{letter}" for letter in letters)]))
    return BertTokenizerFast(str(vocabulary), model_max_length=length)


def bert_folder(folder):
    """The configuration and the tokenizer of a small BERT."""
    folder.mkdir(parents=True)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer(folder, 64)
    BertConfig(vocab_size=len(words), max_position_embeddings=64, **tower).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def biomedclip_config(bert, vision):
    """The keys of BiomedCLIP's own file."""
    text = {
        "hf_model_name": str(bert),
        "hf_tokenizer_name": str(bert),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 40,
    }
    return {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": PREPROCESSING}


def open_clip_folder(folder, config, bert=None):
    """A folder with random weights, and the tokenizer and configuration of its text tower."""
    if bert is None:
        folder.mkdir()
    else:
        shutil.copytree(bert, folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    # Weights of an untrained tower are zero in parts.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def library_features(folder, images):
    """Features by open_clip's documented calls."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([transform(image.convert("RGB")) for image in images])
        return model.encode_image(pixels, normalize=True), model.encode_text(words(TEXTS), normalize=True)


def check(encoder, images, expected):
    found = encoder.encode_images(images), encoder.encode_texts(TEXTS)
    for one, right in zip(found, expected, strict=True):
        assert len({tuple(row) for row in right.round(decimals=4).tolist()}) == len(right)
        torch.testing.assert_close(one, right, rtol=0, atol=1e-5)


VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture(scope="module")
def biomedclip(tmp_path_factory, bert):
    """A timm image tower and a text tower of transformers, as BiomedCLIP has."""
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    config = biomedclip_config(bert, {**vision, "image_size": 32})
    return open_clip_folder(tmp_path_factory.mktemp("biomedclip") / "BiomedCLIP", config, bert)


def test_biomedclip_is_loaded_from_its_folder_alone(biomedclip, tmp_path, images):
    expected = library_features(biomedclip, images)
    folder = Path(shutil.copytree(biomedclip, tmp_path / "BiomedCLIP"))
    path = folder / "open_clip_config.json"
    # As published: a name on the Hub, which cannot be reached.
    bert = json.loads(path.read_text())["model_cfg"]["text_cfg"]["hf_model_name"]
    path.write_text(path.read_text().replace(bert, "microsoft/BiomedBERT"))
    encoder = load_encoder(f"theirs={folder}", batch_size=2)
    assert isinstance(encoder, OpenClipEncoder)
    assert (encoder.name, encoder.weights) == ("theirs", "pretrained")
    assert load_encoder(folder).name == f"{tmp_path.name}/BiomedCLIP"
    assert encoder.tokenizer.context_length == 40
    assert (encoder.tokenizer(TEXTS)[2] != 0).all()  # longer than 40
    check(encoder, images, expected)
    scale = load_file(folder / "open_clip_model.safetensors")["logit_scale"]
    assert encoder.logit_scale == pytest.approx(scale.exp().item())


def test_preprocessing_is_the_folders(biomedclip, tmp_path, images):
    before = load_encoder(biomedclip)
    for key, value in (
        ("mean", [0.5, 0.5, 0.5]),
        ("std", [0.5, 0.5, 0.5]),
        ("interpolation", "bicubic"),
        ("resize_mode", "shortest"),
    ):
        folder = Path(shutil.copytree(biomedclip, tmp_path / key))
        path = folder / "open_clip_config.json"
        content = json.loads(path.read_text())
        content["preprocess_cfg"][key] = value
        path.write_text(json.dumps(content))
        after = load_encoder(folder)
        assert after.preprocessing != before.preprocessing
        assert (after.encode_images(images) - before.encode_images(images)).abs().max() > 1e-4
        check(after, images, library_features(folder, images))


def test_a_text_tower_that_is_nowhere_is_asked_for(biomedclip, tmp_path):
    folder = Path(shutil.copytree(biomedclip, tmp_path / "model"))
    (folder / "config.json").unlink()
    path = folder / "open_clip_config.json"
    bert = json.loads(path.read_text())["model_cfg"]["text_cfg"]["hf_model_name"]
    path.write_text(path.read_text().replace(bert, "microsoft/BiomedBERT"))
    with pytest.raises(EncoderError, match=r"copy the config\.json of microsoft/BiomedBERT into the folder"):
        load_encoder(folder)
    path.write_text("{}")
    with pytest.raises(EncoderError, match="does not describe a model of open_clip"):
        load_encoder(folder)


def test_a_folder_without_weights_is_not_scored_with_random_ones(biomedclip, tmp_path):
    folder = Path(shutil.copytree(biomedclip, tmp_path / "model"))
    (folder / "open_clip_model.safetensors").rename(folder / "unimed_clip.pt")
    with pytest.raises(EncoderError, match=r"has open_clip_config\.json but no weights"):
        load_encoder(folder)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_unimed_clip_has_the_names_of_an_older_open_clip(bert, tmp_path, images, suffix):
    config = biomedclip_config(bert, VIT)
    config["model_cfg"]["quick_gelu"] = True
    folder = open_clip_folder(tmp_path / "unimed", config, bert)
    expected = library_features(folder, images)
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    old = {name.replace("text.", "text_encoder.", 1): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    if suffix == "bin":
        # with what its training saves
        old = {f"module.{name}": tensor for name, tensor in old.items()}
        old["module.text_encoder.transformer.embeddings.position_ids"] = torch.arange(64)[None]
        torch.save({"epoch": 3, "state_dict": old}, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(old, folder / "open_clip_model.safetensors")
    encoder = load_encoder(f"UniMed-CLIP={folder}")
    assert encoder.name == "UniMed-CLIP"
    check(encoder, images, expected)


def test_coca_as_conch_has_it(tmp_path, images):
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text_cfg": {
                "context_length": 30, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "embed_cls": True,
                "output_tokens": True,
            },
            "multimodal_cfg": {
                "context_length": 30, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
                "attn_pooler_heads": 2,
            },
            "custom_text": True,
        },
        "preprocess_cfg": PREPROCESSING,
    }  # fmt: skip
    folder = open_clip_folder(tmp_path / "conch", config)
    encoder = load_encoder(f"CoCa={folder}", batch_size=2)
    assert type(encoder.model).__name__ == "CoCa"
    check(encoder, images, library_features(folder, images))


def test_medsiglip(tmp_path, images):
    folder = tmp_path / "medsiglip"
    folder.mkdir()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer(folder, 24)
    config = SiglipConfig(
        text_config={**tower, "vocab_size": len(words), "max_position_embeddings": 24, "projection_size": 32},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(3)
    model = SiglipModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    # without a mask, as SigLIP's own tokenizer
    words.model_input_names = ["input_ids"]
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.4] * 3)
    SiglipProcessor(pictures, words).save_pretrained(folder)
    encoder = load_encoder(f"MedSigLIP={folder}", batch_size=2)
    assert isinstance(encoder, TransformersEncoder)
    assert encoder.text_settings == {"padding": "max_length", "truncation": True, "max_length": 24}
    processor = SiglipProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (3, 24)
    with torch.no_grad():
        output = SiglipModel.from_pretrained(folder).eval()(**inputs)
    check(encoder, images, (output.image_embeds, output.text_embeds))


def test_pubmedclip_in_a_file_of_torch(tmp_path, images):
    folder = clip_folder(tmp_path / "pubmedclip")
    model = CLIPModel.from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(images=images, text=TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    encoder = load_encoder(f"PubMedCLIP={folder}")
    assert encoder.name == "PubMedCLIP"
    check(encoder, images, (output.image_embeds, output.text_embeds))
    # a folder of LAION has both kinds of files
    (folder / "open_clip_config.json").write_text("{}")
    assert isinstance(load_encoder(folder), TransformersEncoder)


def test_a_tokenizer_that_stops_earlier_than_the_model_is_respected(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))
    assert load_encoder(folder).text_settings["max_length"] == 20


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_no_code_in_weights_is_run(tmp_path, biomedclip, kind):
    if kind == "open_clip":
        folder = Path(shutil.copytree(biomedclip, tmp_path / "evil"))
        (folder / "open_clip_model.safetensors").unlink()
        file = folder / "open_clip_pytorch_model.bin"
    else:
        folder = clip_folder(tmp_path / "evil")
        (folder / "model.safetensors").unlink()
        file = folder / "pytorch_model.bin"
    torch.save({"state_dict": Evil(str(tmp_path / "was_run"))}, file)
    with pytest.raises(MedMoEError, match="evil contains more than weights"):
        load_encoder(folder)
    assert not (tmp_path / "was_run").exists()


def test_names_are_no_paths(tmp_path):
    folder = clip_folder(tmp_path / "a=b")
    assert load_encoder(folder).name.endswith("a=b")
    assert load_encoder(f"x y={folder}").name == "x y"
    with pytest.raises(EncoderError, match="There is no folder"):
        load_encoder(f"x={tmp_path / 'nothing'}")


def test_two_models_of_one_name_are_refused_before_anything_is_measured(tmp_path):
    from medmoe_hf.evaluation.suite import evaluate

    with pytest.raises(MedMoEError, match="Two models are called ours"):
        evaluate(["ours=small", "ours=other"], "phantoms", tmp_path)
