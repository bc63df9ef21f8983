"""`handler.py`, which saved checkpoints bring along, in a process without this package."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from small_encoders import medmoe_folder

from medmoe_hf.data import phantom_sample
from medmoe_hf.hub.folder_checks import check_folder
from medmoe_hf.hub.golden import run_clean
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.model import MedMoEForImageClassification, MedMoEModel
from medmoe_hf.model.handler import EndpointHandler

LABELS = ["clear lungs", "effusion", "fracture"]
# As the toolkit of Inference Endpoints loads the file.
CODE = """
import importlib.util, json, sys
class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "medmoe_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse)
requests = json.load(open(sys.argv[1]))
answers = []
for folder, asked in requests:
    spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.EndpointHandler(folder)
    answers.append([handler(request) for request in asked])
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("models") / "dual")


@pytest.fixture(scope="module")
def handler(folder):
    return EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    kept = tmp_path_factory.mktemp("images")
    for index in range(3):
        phantom_sample(5, index, image_size=64)["image"].save(kept / f"{index}.png")
    return sorted(kept.iterdir())


def test_a_saved_checkpoint_answers_without_this_package(folder, files, tmp_path):
    images = [base64.b64encode(path.read_bytes()).decode() for path in files]
    encoder = MedMoEEncoder(folder)
    config = encoder.model.config
    config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    classifier = MedMoEForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    encoder.processor.save_pretrained(tmp_path / "classifier")
    asked = [
        {"inputs": f"data:image/png;base64,{images[0]}", "parameters": {"candidate_labels": LABELS}},
        {"inputs": images, "parameters": {"candidate_labels": "clear lungs, effusion", "hypothesis_template": "a {}"}},
        {"inputs": {"images": images, "texts": LABELS}},
        {"inputs": {"texts": LABELS}},
        {"inputs": {"images": images}, "parameters": {"modality": "ct"}},
    ]
    requests = [[str(folder), asked], [str(tmp_path / "classifier"), [{"inputs": images}]]]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    run_clean(CODE, str(tmp_path / "requests.json"), str(tmp_path / "answers.json"))
    (one, two, both, texts, ct), (classes,) = json.loads((tmp_path / "answers.json").read_text())

    inputs = encoder.processor(images=files, text=LABELS, return_tensors="pt")
    with torch.no_grad():
        outputs = encoder.model(**inputs)
        short = encoder.processor(images=files, text=["a clear lungs", "a effusion"], return_tensors="pt")
        pairs = encoder.model(**short).logits_per_image.softmax(dim=1)
        chosen = encoder.model.get_image_features(inputs["pixel_values"], modality="ct").pooler_output
        logits = classifier(pixel_values=inputs["pixel_values"]).logits.softmax(dim=1)
    expected = outputs.logits_per_image.softmax(dim=1)
    assert {entry["label"]: entry["score"] for entry in one} == pytest.approx(
        dict(zip(LABELS, expected[0].tolist(), strict=True)), abs=1e-5
    )
    assert [entry["score"] for entry in one] == sorted((entry["score"] for entry in one), reverse=True)
    found = [{entry["label"]: entry["score"] for entry in row} for row in two]
    torch.testing.assert_close(torch.tensor([[row[name] for name in LABELS[:2]] for row in found]), pairs)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        torch.testing.assert_close(torch.tensor(both[name]), outputs[name], rtol=1e-5, atol=1e-5)
    assert both["modality"] == [encoder.modalities[index] for index in outputs.expert_ids.tolist()]
    torch.testing.assert_close(torch.tensor(texts["text_embeds"]), outputs.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(ct["image_embeds"]), torch.nn.functional.normalize(chosen, dim=1), rtol=1e-5, atol=1e-5
    )
    assert ct["modality"] == ["ct"] * 3
    for row, scores in zip(classes, logits.tolist(), strict=True):
        assert {entry["label"]: entry["score"] for entry in row} == pytest.approx(
            dict(zip(LABELS, scores, strict=True)), abs=1e-5
        )


def test_it_may_be_published(folder):
    assert not [problem for problem in check_folder(folder) if problem.startswith("handler.py")]


def test_tasks_of_the_checkpoint(handler, files):
    from medmoe_hf.model import Task

    task = Task("chest", {"clear": ["Clear lungs."], "effusion": ["A pleural effusion."]})
    handler.model.tasks["chest"] = handler.processor.tokenize_task(task)
    found = handler({"inputs": files[0].read_bytes(), "parameters": {"task": "chest"}})
    pixels = handler.processor(images=[files[0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = handler.model.classify(pixels, "chest").probabilities[0].tolist()
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(
        dict(zip(task.classes, expected, strict=True))
    )
    handler.model.tasks["chest"] = replace(handler.model.tasks["chest"], modality="ct")
    for modality, fits in (("ct", True), ("xray", False)):
        found = handler({"inputs": files[0].read_bytes(), "parameters": {"task": "chest", "modality": modality}})
        assert {(entry["modality"], entry["fits"]) for entry in found} == {(modality, fits)}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "empty|must be"),
        ({"inputs": []}, "empty"),
        ({"inputs": {"image": "x"}}, "`images`, `texts`"),
        ({"inputs": "https://example.org/a.png"}, "not base64"),
        ({"inputs": "../../etc/passwd"}, "not base64"),
        ({"inputs": "AAAA"}, "image"),
        ({"inputs": [3]}, "int"),
        ({"inputs": {"texts": [" "]}}, "none is empty"),
        ({"inputs": {"texts": ["a"] * 257}}, "256"),
        ({"inputs": ["AAAA"] * 257}, "256"),
        ({"inputs": {"texts": ["a"]}, "parameters": {"candidate_labels": ["a", "b"]}}, "for images"),
        ({"inputs": "AAAA", "parameters": {"candidate_labels": ["a"]}}, "two labels"),
        ({"inputs": "AAAA", "parameters": {"candidate_labels": ["a", "b"], "task": "c"}}, "not both"),
        ({"inputs": "AAAA", "parameters": {"candidate_labels": ["a", "b"], "hypothesis_template": "x"}}, "{}"),
        ({"inputs": "AAAA", "parameters": {"top_k": 1}}, "unknown parameters top_k"),
        ({"inputs": "AAAA", "parameters": []}, "empty|image"),
        ({"inputs": "AAAA", "parameters": [1]}, "object"),
    ],
)
def test_requests_that_cannot_be_answered(handler, data, told):
    with pytest.raises(ValueError, match=told):
        handler(data)


def test_other_models_are_refused(small_config, tmp_path):
    MedMoEModel(small_config()).text_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MedMoETextModel"):
        EndpointHandler(str(tmp_path))
