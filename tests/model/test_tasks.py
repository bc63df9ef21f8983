"""Tasks: scores, probabilities and decisions against plain formulations, and their file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from clean_process import run_clean

from medmoe_hf.evaluation.zero_shot import class_logits, multilabel_logits
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer, modeling_medmoe
from medmoe_hf.model.tasks_medmoe import Calibration, Task, read_tasks, task_tokens, write_tasks

PROMPTS = {
    "normal": ["The lungs are clear.", "No finding."],
    "effusion": ["A large pleural effusion.", "Fluid, chest.", "Effusion."],
    "edema": ["There is pulmonary edema."],
}
NEGATIVE = {name: [f"No {name}.", f"There is no {name} at all."] for name in PROMPTS}
CALIBRATION = Calibration(
    temperature=0.7,
    bias={"normal": 0.3, "effusion": -0.5, "edema": 0.2},
    thresholds={"normal": 0.5, "effusion": 0.2, "edema": 0.4},
    quantiles={"normal": 0.55, "effusion": 0.8, "edema": 0.6},
    coverage=0.9,
    conformal="class-conditional",
    prior={"normal": 0.6, "effusion": 0.3, "edema": 0.1},
    fitted_on={"data": "lungs", "split": "val", "cases": 90, "subjects": 60},
    measured={"ece": [0.03, 0.01, 0.06]},
)
SCORES = torch.tensor(
    [[1.0, 0.4, -0.2], [0.1, 0.2, 0.9], [0.3, 0.9, 0.2], [5.0, -4.0, -4.0], [0.6, 0.9, 0.0]], dtype=torch.float64
)


@pytest.fixture(scope="module")
def processor():
    words = " ".join(one for table in (PROMPTS, NEGATIVE) for sentences in table.values() for one in sentences)
    return MedMoEProcessor(MedMoEImageProcessor(size=64), MedMoETokenizer.from_words([words], max_length=20))


@pytest.fixture(scope="module")
def make(small_config, lived_in, processor):
    def made(**changes):
        torch.manual_seed(1)
        text = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
        return lived_in(MedMoEModel(small_config(text_config=text, **changes)))

    return made


@pytest.mark.parametrize("router", ["image", "report"])
@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_scores_are_those_of_the_evaluation(make, processor, tmp_path, router, kind):
    model = make(router=router)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = [np.random.default_rng(seed).integers(256, size=(64, 64), dtype=np.uint8) for seed in range(3)]
    encoder = MedMoEEncoder(tmp_path)
    negative = NEGATIVE if kind == "multi-label" else {}
    if negative:
        expected = multilabel_logits(encoder, images, PROMPTS, negative)
    else:
        expected = class_logits(encoder, images, PROMPTS, ("global", "local", "mean"))
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    for score, logits in expected.items():
        task = processor.tokenize_task(Task("lungs", PROMPTS, negative, kind, score))
        answer = model.classify(pixels, task)
        torch.testing.assert_close(answer.scores, logits, rtol=1e-4, atol=1e-4)
        wanted = logits.sigmoid() if negative else logits.softmax(dim=1)
        torch.testing.assert_close(answer.probabilities, wanted, rtol=1e-4, atol=1e-4)
        assert answer.sets is None
        assert not answer.calibrated


def test_encoded_sentences_follow_the_weights_and_the_prompts(make, processor):
    model, pixels = make(), torch.rand(2, 3, 64, 64)
    task = processor.tokenize_task(Task("lungs", PROMPTS))
    before = model.classify(pixels, task).scores
    assert torch.equal(before, model.classify(pixels, task).scores)
    other = processor.tokenize_task(Task("lungs", PROMPTS | {"edema": ["Effusion."]}))
    assert not torch.allclose(before[:, 2], model.classify(pixels, other).scores[:, 2])
    model.classify(pixels, task)
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(before, model.classify(pixels, task).scores)


def test_images_of_another_modality_are_named_and_not_decided(make, processor, monkeypatch):
    told = []
    monkeypatch.setattr(modeling_medmoe.logger, "warning", told.append)
    model, pixels = make(), torch.rand(3, 3, 64, 64)
    names = list(model.config.modalities.values())
    given = [names[0], names[1], names[0]]
    found = {}
    for modality in (None, names[0], names[0].upper(), names[1], "of no expert"):
        task = processor.tokenize_task(Task("lungs", PROMPTS, modality=modality, calibration=CALIBRATION))
        found[modality] = model.classify(pixels, task, modality=given)
        assert found[modality].modality == given
    decided, sets = task.decide(found[None].scores)
    fits = {
        None: [1, 1, 1],
        names[0]: [1, 0, 1],
        names[0].upper(): [1, 0, 1],
        names[1]: [0, 1, 0],
        "of no expert": [0] * 3,
    }
    for modality, answer in found.items():
        own = list(map(bool, fits[modality]))
        assert answer.fits == own
        assert answer.labels == [label if one else None for label, one in zip(decided, own, strict=True)]
        assert answer.sets == [label if one else None for label, one in zip(sets, own, strict=True)]
        assert torch.equal(answer.probabilities, found[None].probabilities)
    meaning = "unless that is wrong, the probabilities mean nothing, and nothing is decided."
    assert told == [
        f'The task "lungs" is for another modality than {count}, read as {read}: {meaning}'
        for count, read in (
            ("1 image", names[1]),
            ("1 image", names[1]),
            ("2 images", names[0]),
            ("3 images", f"{names[0]}, {names[1]}"),
        )
    ]
    # Without a modality of the caller, it is the image router's; without a calibration there are no sets.
    routed = model.route(pixels).modality
    other = next(name for name in names if name not in routed)
    for modality in (routed[0], other):
        answer = model.classify(pixels, processor.tokenize_task(Task("lungs", PROMPTS, modality=modality)))
        assert answer.modality == routed
        assert answer.fits == [name == modality for name in routed]
        assert answer.sets is None
    assert answer.labels == [None] * 3


def test_probabilities_and_decisions_of_a_multi_class_task():
    task = Task("lungs", PROMPTS, calibration=CALIBRATION)
    logits = SCORES.numpy() / 0.7 + np.array([0.3, -0.5, 0.2])
    plain = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(task.probabilities(SCORES), plain, rtol=1e-12)
    wanted = {"normal": 0.2, "effusion": 0.2, "edema": 0.6}
    shifted = plain * np.array([0.2, 0.2, 0.6]) / np.array([0.6, 0.3, 0.1])
    shifted /= shifted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(task.probabilities(SCORES, wanted), shifted, rtol=1e-12)
    kept = replace(task, calibration=replace(CALIBRATION, prevalence=wanted))
    np.testing.assert_allclose(kept.probabilities(SCORES), shifted, rtol=1e-12)
    labels, sets = task.decide(SCORES)
    assert labels == [[task.classes[row.argmax()]] for row in plain / np.array([0.5, 0.2, 0.4])]
    assert labels[-1] == ["effusion"]  # although it is less probable than normal
    assert plain[-1].argmax() == 0
    limits = np.array([0.55, 0.8, 0.6])
    assert sets == [[name for name, one in zip(PROMPTS, row, strict=True) if one] for row in 1 - plain <= limits]
    assert (labels, sets) == kept.decide(SCORES)
    assert len({tuple(one) for one in sets}) > 1
    assert len({tuple(one) for one in labels}) > 1


def test_probabilities_and_decisions_of_a_multi_label_task():
    task = Task("lungs", PROMPTS, NEGATIVE, "multi-label", calibration=CALIBRATION)
    logits = SCORES.numpy() / 0.7 + np.array([0.3, -0.5, 0.2])
    plain = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(task.probabilities(SCORES), plain, rtol=1e-12)
    new, old = np.array([0.2, 0.2, 0.6]), np.array([0.6, 0.3, 0.1])
    present, absent = plain * new / old, (1 - plain) * (1 - new) / (1 - old)
    found = task.probabilities(SCORES, dict(zip(PROMPTS, new, strict=True)))
    np.testing.assert_allclose(found, present / (present + absent), rtol=1e-12)
    labels, _ = task.decide(SCORES)
    limits = np.array([0.5, 0.2, 0.4])
    assert labels == [[name for name, one in zip(PROMPTS, row, strict=True) if one] for row in plain >= limits]


def test_a_model_keeps_its_tasks(make, processor, tmp_path):
    model = make()
    task = processor.tokenize_task(Task("lungs", PROMPTS, title="Lungs [\n 1, 2\n ]", calibration=CALIBRATION))
    model.tasks = {"lungs": task}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "tasks.json").read_text()
    assert '"ece": [0.03, 0.01, 0.06]' in text
    loaded, _ = MedMoEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.tasks == {"lungs": task}
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(
        loaded.eval().classify(pixels, "lungs").probabilities, model.classify(pixels, task).probabilities
    )
    loaded.tasks = {}
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / "tasks.json").exists()
    with pytest.raises(ValueError, match=r'no task "lungs".*none; `medmoe calibrate` adds one'):
        loaded.classify(pixels, "lungs")


def test_faults_are_explained(tmp_path, processor):
    path = tmp_path / "tasks.json"
    entry = Task("lungs", PROMPTS, calibration=CALIBRATION).to_dict()
    write_tasks(path, {"lungs": Task.from_dict("lungs", entry)})
    assert read_tasks(path)["lungs"].calibration == CALIBRATION
    faults = [
        ({"schema": 2, "tasks": {}}, "schema 2"),
        ({"schema": 1, "tasks": {"lungs": entry | {"promps": {}}}}, "unknown key `promps`; did you mean `prompts`"),
        ({"schema": 1, "tasks": {"lungs": entry | {"kind": "binary"}}}, "`kind` must be one of multi-class"),
        ({"schema": 1, "tasks": {"lungs": {}}}, "prompts"),
        ({"schema": 1, "tasks": {"lungs": {"prompts": {"normal": ["Clear."]}}}}, "two classes or more"),
        ({"schema": 1, "tasks": {"lungs": {"prompts": {"normal": "Clear.", "b": ["B."]}}}}, "list of sentences"),
    ]
    for change, problem in (
        ({"temperature": 0.0}, "temperature"),
        ({"bias": {"normal": 1.0}}, "`calibration.bias` must have a number for each class"),
        ({"thresholds": CALIBRATION.thresholds | {"edema": 1.0}}, "between 0 and 1"),
        ({"sure": True}, "unknown key `sure`"),
    ):
        broken = entry | {"calibration": entry["calibration"] | change}
        faults.append(({"schema": 1, "tasks": {"lungs": broken}}, problem))
    for content, problem in faults:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=problem):
            read_tasks(path)
    task = Task("lungs", PROMPTS)
    with pytest.raises(ValueError, match=r"processor\.tokenize_task"):
        task_tokens(task)
    with pytest.raises(ValueError, match="not calibrated"):
        task.probabilities(SCORES, {"normal": 1 / 3, "effusion": 1 / 3, "edema": 1 / 3})
    calibrated = replace(task, calibration=CALIBRATION)
    with pytest.raises(ValueError, match="sum to 1"):
        calibrated.probabilities(SCORES, {"normal": 0.5, "effusion": 0.5, "edema": 0.5})


@pytest.mark.slow
def test_a_clean_process_gives_the_same_answers(make, processor, tmp_path):
    model = make()
    model.tasks = {"lungs": processor.tokenize_task(Task("lungs", PROMPTS, score="mean", calibration=CALIBRATION))}
    model.save_pretrained(tmp_path / "model")
    pixels = torch.rand(4, 3, 64, 64)
    expected = model.classify(pixels, "lungs", prevalence={"normal": 0.2, "effusion": 0.2, "edema": 0.6})
    torch.save(pixels, tmp_path / "pixels.pt")
    code = """
import json, torch
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True).eval()
answer = model.classify(
    torch.load("pixels.pt"), "lungs", prevalence={"normal": 0.2, "effusion": 0.2, "edema": 0.6}
)
model.save_pretrained("again")
print(json.dumps([answer.probabilities.tolist(), answer.labels, answer.sets]))
"""
    printed = run_clean(code, folder=tmp_path)
    probabilities, labels, sets = json.loads(printed.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(probabilities), expected.probabilities)
    assert (labels, sets) == (expected.labels, expected.sets)
    assert (tmp_path / "again/tasks.json").read_text() == (tmp_path / "model/tasks.json").read_text()
