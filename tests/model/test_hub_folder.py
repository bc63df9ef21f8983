"""Saved folders: what is in them, and that they work where this package is not installed.

A clean process, in which `medmoe_hf` cannot be imported, loads every folder through the Auto classes and the stock
pipelines, fine-tunes, and saves again; a second one loads what the first has saved.
"""

import json
import os

import numpy as np
import pytest
import torch
from clean_process import run_clean
from PIL import Image

from medmoe_hf.model import (
    MedMoEForImageClassification,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)
from medmoe_hf.model.saving_medmoe import SENTENCE_TRANSFORMERS_FILES

FILES = {f"{name}_medmoe.py" for name in ("configuration", "modeling", "losses", "tokenization", "processing")} | {
    "errors_medmoe.py",
    "handler.py",
    "image_processing_medmoe.py",
    "image_files_medmoe.py",
    "medical_images_medmoe.py",
    "medical_pixels_medmoe.py",
    "dicom_medmoe.py",
    "dicom_files_medmoe.py",
    "studies_medmoe.py",
    "study_files_medmoe.py",
    "nifti_medmoe.py",
    "modalities_medmoe.py",
    "presets_medmoe.py",
    "word_regions_medmoe.py",
    "local_loss_kernel_medmoe.py",
    "local_loss_triton_medmoe.py",
    "saving_medmoe.py",
    "tasks_medmoe.py",
    "rejection_medmoe.py",
    "pipeline_medmoe.py",
}
PROCESSING = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_medmoe.MedMoEImageProcessor",
        "pil": "image_processing_medmoe.MedMoEImageProcessorPil",
    },
    "AutoTokenizer": ["tokenization_medmoe.MedMoETokenizer", None],
    "AutoProcessor": "processing_medmoe.MedMoEProcessor",
}
DUAL = {
    "AutoConfig": "configuration_medmoe.MedMoEConfig",
    "AutoModel": "modeling_medmoe.MedMoEModel",
    "AutoModelForZeroShotImageClassification": "modeling_medmoe.MedMoEModel",
    "AutoModelForImageClassification": "modeling_medmoe.MedMoEForImageClassification",
}
AUTO_MAPS = {
    "dual": DUAL | PROCESSING,
    "classifier": DUAL | PROCESSING,
    "vision": {
        "AutoConfig": "configuration_medmoe.MedMoEVisionConfig",
        "AutoModel": "modeling_medmoe.MedMoEVisionModel",
        **PROCESSING,
    },
    "text": {
        "AutoConfig": "configuration_medmoe.MedMoETextConfig",
        "AutoModel": "modeling_medmoe.MedMoETextModel",
        **PROCESSING,
    },
}
TEXTS = ["a chest x-ray of pneumonia", "an axial ct of the head", "fundus"]
LABELS = ["pneumonia", "no finding", "haemorrhage"]

PREAMBLE = """
from pathlib import Path
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline

TEXTS, LABELS = {texts}, {labels}
pictures = [Image.open(f"{{i}}.png") for i in range(3)]
remote = {{"trust_remote_code": True}}
found = {{}}

def outputs(folder, kind, inputs):
    model = kind.from_pretrained(folder, **remote)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        return model, {{name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)}}
"""

FIRST = """
from transformers.dynamic_module_utils import check_imports
for file in Path("dual").glob("*.py"):
    check_imports(file)

inputs = torch.load("inputs.pt")
pixels = {"pixel_values": inputs["pixel_values"]}
words = {name: value for name, value in inputs.items() if name != "pixel_values"}
found["configs"] = {name: type(AutoConfig.from_pretrained(name, **remote)).__name__ for name in
                    ("dual", "classifier", "vision", "text")}
dual, found["dual"] = outputs("dual", AutoModel, inputs)
_, found["zero-shot"] = outputs("dual", AutoModelForZeroShotImageClassification, inputs)
classifier, found["classifier"] = outputs("classifier", AutoModelForImageClassification, pixels)
_, found["vision"] = outputs("vision", AutoModel, pixels)
_, found["text"] = outputs("text", AutoModel, words)

processor = AutoProcessor.from_pretrained("dual", **remote)
tokenizer = AutoTokenizer.from_pretrained("dual", **remote)
found["processor"] = dict(processor(images=pictures, text=TEXTS, return_tensors="pt"))
found["tokenizer"] = dict(tokenizer(TEXTS, return_tensors="pt"))
found["types"] = [type(processor).__name__, type(tokenizer).__name__]
for backend in ("torchvision", "pil"):
    image_processor = AutoImageProcessor.from_pretrained("dual", backend=backend, **remote)
    found["types"].append(type(image_processor).__name__)
    found[backend] = dict(image_processor(pictures, return_tensors="pt"))

for size in (1, 2):
    zero_shot = pipeline("zero-shot-image-classification", model="dual", batch_size=size, **remote)
    scores = zero_shot(pictures, candidate_labels=LABELS, hypothesis_template="{}")
    found[f"zero-shot pipeline {size}"] = [{line["label"]: line["score"] for line in lines} for lines in scores]
    classify = pipeline("image-classification", model="classifier", batch_size=size, **remote)
    found[f"classification pipeline {size}"] = [
        {line["label"]: line["score"] for line in lines} for lines in classify(pictures)]
    extract = pipeline("image-feature-extraction", model="dual", batch_size=size, **remote)
    found[f"features pipeline {size}"] = torch.tensor(extract(pictures)).squeeze(1)
    found[f"pooled pipeline {size}"] = torch.tensor(extract(pictures, pool=True)).squeeze(1)

zero_shot.save_pretrained("piped")
again = AutoProcessor.from_pretrained("piped", **remote)
found["piped"] = dict(again(images=pictures, text=TEXTS, return_tensors="pt"))

from datasets.fingerprint import Hasher
loaded_twice = [AutoProcessor.from_pretrained("dual", **remote) for _ in range(2)]
found["fingerprints"] = [Hasher.hash(one) for one in (*loaded_twice, processor)]
other = AutoProcessor.from_pretrained("dual", max_length=7, **remote)
found["other fingerprint"] = Hasher.hash(other)

from sentence_transformers import SentenceTransformer
sentences = SentenceTransformer("dual", trust_remote_code=True, device="cpu")
assert type(sentences[0].model).__module__.startswith("transformers_modules")
for kind, items in (("images", pictures), ("texts", TEXTS)):
    found[f"sentence-transformers {kind}"] = torch.cat([torch.tensor(sentences.encode([item])) for item in items])
with torch.no_grad():
    found["images one by one"] = torch.cat([dual.get_image_features(one[None]).pooler_output
                                            for one in inputs["pixel_values"]])
    found["texts one by one"] = torch.cat([
        dual.get_text_features(**processor(text=[text], return_tensors="pt")).pooler_output for text in TEXTS])
found["similarity"] = sentences.similarity(sentences.encode(pictures), sentences.encode(TEXTS))

dual.train()
dual(**inputs, return_loss=True, modality_labels=torch.tensor([0, 1, 2])).loss.backward()
torch.optim.SGD(dual.parameters(), lr=0.1).step()
dual.eval()
classifier = AutoModelForImageClassification.from_pretrained("dual", num_labels=4, **remote)
for name, model in (("dual", dual), ("classifier", classifier)):
    model.save_pretrained(f"again/{name}")
    processor.save_pretrained(f"again/{name}")
with torch.no_grad():
    found["tuned"] = {"logits_per_image": dual(**inputs).logits_per_image, "logits": classifier(**pixels).logits}
torch.save(found, "first.pt")
"""

SECOND = """
inputs = AutoProcessor.from_pretrained("again/dual", **remote)(images=pictures, text=TEXTS, return_tensors="pt")
pixels = {"pixel_values": inputs["pixel_values"]}
for name in ("AutoModel", "AutoModelForZeroShotImageClassification"):
    found[name] = outputs("again/dual", globals()[name], inputs)[1]["logits_per_image"]
found["logits"] = outputs("again/classifier", AutoModelForImageClassification, pixels)[1]["logits"]
torch.save(found, "second.pt")
"""


def clean_process(script, folder, name):
    """Runs a script in `folder` where this package does not exist, and gives what it has saved as `name`."""
    code = PREAMBLE.format(texts=TEXTS, labels=LABELS) + script
    run_clean(code, folder=folder, HF_HOME=folder / f"home of {name}")
    return torch.load(folder / f"{name}.pt")


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (80, 70 + 10 * i, 3), dtype=np.uint8)) for i in range(3)]


@pytest.fixture(scope="module")
def saved(small_config, pictures, tmp_path_factory):
    """A folder with four models saved in it, the models, and the processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = MedMoETokenizer.from_words([*TEXTS, *LABELS], max_length=24)
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": 64, "width": 64}), tokenizer)
    config = small_config(similarity="mean", text_config={"vocab_size": len(tokenizer)})
    dual = MedMoEModel(config).eval()
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    classifier_config = small_config(classifier_features="both", **names)
    classifier = MedMoEForImageClassification(classifier_config).eval()
    with torch.no_grad():
        for parameter in (*dual.parameters(), *classifier.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    models = {"dual": dual, "classifier": classifier, "vision": dual.vision_model, "text": dual.text_model}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    for name in ("dual", "classifier"):
        processor.save_pretrained(folder / name)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index}.png")
    return folder, models, processor


@pytest.fixture(scope="module")
def inputs(saved, pictures):
    return dict(saved[2](images=pictures, text=TEXTS, return_tensors="pt"))


@pytest.fixture(scope="module")
def first(saved, inputs):
    """What the first clean process has found."""
    torch.save(inputs, saved[0] / "inputs.pt")
    return clean_process(FIRST, saved[0], "first")


def tensors(outputs):
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dual", "classifier", "vision", "text"])
def test_what_a_folder_holds(saved, name):
    folder = saved[0] / name
    held = {path.name for path in folder.iterdir()}
    assert {path for path in held if path.endswith(".py")} == FILES
    assert {"config.json", "model.safetensors"} <= held
    assert not {path for path in held if path.endswith((".bin", ".pt", ".pyc"))}
    # only a dual encoder has one space for images and texts
    assert held & SENTENCE_TRANSFORMERS_FILES.keys() == (
        SENTENCE_TRANSFORMERS_FILES.keys() if name == "dual" else set()
    )
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAPS[name]


def test_the_files_are_those_of_this_package(saved):
    import medmoe_hf.model as package

    source = os.path.dirname(package.__file__)
    for file in FILES:
        with open(os.path.join(source, file)) as original:
            assert (saved[0] / "dual" / file).read_text() == original.read()


def test_configs_load_without_the_package(first):
    assert first["configs"] == {
        "dual": "MedMoEConfig",
        "classifier": "MedMoEConfig",
        "vision": "MedMoEVisionConfig",
        "text": "MedMoETextConfig",
    }


@pytest.mark.parametrize(
    ("loaded", "model"),
    [("dual", "dual"), ("zero-shot", "dual"), ("classifier", "classifier"), ("vision", "vision"), ("text", "text")],
)
def test_models_without_the_package_give_the_same(saved, first, inputs, loaded, model):
    wanted = {"classifier": ["pixel_values"], "vision": ["pixel_values"]}.get(model, list(inputs))
    given = {name: inputs[name] for name in wanted if not (model == "text" and name == "pixel_values")}
    with torch.no_grad():
        expected = tensors(saved[1][model](**given))
    assert first[loaded].keys() == expected.keys()
    assert_same(first[loaded], expected)


def test_processors_without_the_package_give_the_same(first, inputs):
    assert first["types"] == ["MedMoEProcessor", "MedMoETokenizer", "MedMoEImageProcessor", "MedMoEImageProcessorPil"]
    assert_same(first["processor"], inputs)
    assert_same(first["tokenizer"], {name: value for name, value in inputs.items() if name != "pixel_values"})
    assert_same(first["torchvision"]["pixel_values"], inputs["pixel_values"])
    assert (first["pil"]["pixel_values"] - inputs["pixel_values"]).abs().max() < 0.1


def by_label(probabilities):
    lines = [dict(zip(LABELS, line, strict=True)) for line in probabilities.tolist()]
    return [pytest.approx(line, abs=1e-5) for line in lines]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_stock_pipelines(saved, first, inputs, pictures, batch_size):
    _, models, processor = saved
    prompts = processor(images=pictures, text=LABELS, return_tensors="pt")
    with torch.no_grad():
        scores = models["dual"](**prompts).logits_per_image.softmax(dim=1)
        classes = models["classifier"](inputs["pixel_values"]).logits.softmax(dim=1)
        features = models["dual"](pixel_values=inputs["pixel_values"])
    assert first[f"zero-shot pipeline {batch_size}"] == by_label(scores)
    assert first[f"classification pipeline {batch_size}"] == by_label(classes)
    torch.testing.assert_close(first[f"features pipeline {batch_size}"], features.last_hidden_state)
    torch.testing.assert_close(first[f"pooled pipeline {batch_size}"], features.pooler_output)


def test_a_pipelines_folder_gives_a_processor(saved, first, inputs):
    assert_same(first["piped"], inputs)
    assert (saved[0] / "piped" / "processing_medmoe.py").is_file()


def test_datasets_can_tell_processors_apart(first):
    """`map` finds its cache again only by equal fingerprints, of another load and after a call."""
    assert len(set(first["fingerprints"])) == 1
    assert first["other fingerprint"] not in first["fingerprints"]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_sentence_transformers_gives_the_same(first, kind):
    expected = torch.nn.functional.normalize(first[f"{kind} one by one"], dim=-1)
    assert_same(first[f"sentence-transformers {kind}"], expected)


def test_sentence_transformers_compares_images_with_texts(saved, first, inputs):
    with torch.no_grad():
        outputs = saved[1]["dual"](**inputs)
    cosines = outputs.image_embeds @ outputs.text_embeds.T
    torch.testing.assert_close(first["similarity"], cosines, rtol=1e-5, atol=1e-5)


def test_a_model_tuned_without_the_package_is_saved_whole(saved, first):
    second = clean_process(SECOND, saved[0], "second")
    expected = first["tuned"]
    assert not torch.allclose(expected["logits_per_image"], first["dual"]["logits_per_image"])
    assert_same(second["AutoModel"], expected["logits_per_image"])
    assert_same(second["AutoModelForZeroShotImageClassification"], expected["logits_per_image"])
    assert_same(second["logits"], expected["logits"])
    assert second["logits"].shape == (3, 4)
    for name in ("dual", "classifier"):
        assert {path.name for path in (saved[0] / "again" / name).iterdir()} >= FILES
        auto_map = json.loads((saved[0] / "again" / name / "config.json").read_text())["auto_map"]
        assert auto_map == AUTO_MAPS[name]
