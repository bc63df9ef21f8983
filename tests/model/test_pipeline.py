"""The zero-shot pipeline of a folder: by its tasks where they are asked for, as the stock pipeline otherwise."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from small_encoders import medmoe_folder
from transformers import pipeline

from medmoe_hf.model import Calibration, MedMoEModel, MedMoEProcessor, Task
from medmoe_hf.model.modalities_medmoe import MODALITIES
from medmoe_hf.model.pipeline_medmoe import chosen_task

CHEST = {"clear": ["Normal chest radiograph.", "Clear lungs."], "Effusion": ["Large pleural effusion."]}
BRAIN = {"glioma": ["A glioma."], "no tumour": ["Normal brain."]}


def fitted(classes, temperature):
    bias = dict(zip(classes, (0.7, -0.7), strict=True))
    half = dict.fromkeys(classes, 0.5)
    return Calibration(temperature, bias, half, dict.fromkeys(classes, 0.8), 0.9, "marginal", half)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = medmoe_folder(tmp_path_factory.mktemp("piped") / "model")
    model, processor = MedMoEModel.from_pretrained(folder), MedMoEProcessor.from_pretrained(folder)
    tasks = [
        Task("chest", CHEST, score="mean", calibration=fitted(CHEST, 3.0)),
        Task("brain", BRAIN, calibration=fitted(BRAIN, 2.0)),
        Task("brain, other scanner", BRAIN),
        Task("findings", {"mass": ["A mass."], "edema": ["Edema."]}, kind="multi-label"),
    ]
    model.tasks = {task.name: processor.tokenize_task(task) for task in tasks}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (80, 70 + 10 * i, 3), dtype=np.uint8)) for i in range(3)]


@pytest.fixture(scope="module")
def classify(folder):
    return pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def expected(folder, pictures):
    model = MedMoEModel.from_pretrained(folder).eval()
    pixels = MedMoEProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")["pixel_values"]
    return {name: model.classify(pixels, name).probabilities for name in model.tasks}


def by_label(answers):
    assert all(one == sorted(one, key=lambda row: -row["score"]) for one in answers)
    return [{row["label"]: row["score"] for row in one} for one in answers]


def lines(probabilities, labels):
    return [pytest.approx(dict(zip(labels, row, strict=True)), abs=1e-5) for row in probabilities.tolist()]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_labels_of_a_task_are_answered_by_the_task(classify, pictures, expected, batch_size):
    # The other way round and in other letters: labels come back as they were passed.
    found = classify(pictures, candidate_labels=["effusion ", "clear"], batch_size=batch_size)
    assert by_label(found) == lines(expected["chest"], ["clear", "effusion "])
    assert by_label(classify(pictures, task="brain", batch_size=batch_size)) == lines(expected["brain"], list(BRAIN))
    found = by_label(classify(pictures, task="findings"))
    assert found == lines(expected["findings"], ["mass", "edema"])
    assert sum(found[0].values()) != pytest.approx(1)
    assert isinstance(classify(pictures[0], task="chest")[0], dict)


def test_other_labels_are_those_of_the_stock_pipeline(classify, folder, pictures, caplog):
    from transformers import ZeroShotImageClassificationPipeline

    stock = ZeroShotImageClassificationPipeline(
        model=classify.model, tokenizer=classify.tokenizer, image_processor=classify.image_processor
    )
    for labels, options in (
        (["clear", "Effusion"], {"hypothesis_template": "{} chest"}),
        (["clear", "Effusion", "mass"], {}),
        (list(BRAIN), {}),
    ):
        assert by_label(classify(pictures, candidate_labels=labels, **options)) == [
            pytest.approx(row, abs=1e-6) for row in by_label(stock(pictures, candidate_labels=labels, **options))
        ]
    with pytest.raises(ValueError, match=r'no task "heart": it has chest, brain'):
        classify(pictures, task="heart")
    with pytest.raises(ValueError, match='"chest" has the classes clear, Effusion'):
        classify(pictures, task="chest", candidate_labels=["clear", "mass"])
    with pytest.raises(ValueError, match="Pass `candidate_labels`, or the name"):
        classify(pictures)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_images_of_another_modality_are_named_and_counted(classify, pictures, expected, monkeypatch, batch_size):
    told = []
    monkeypatch.setattr(pipeline_logger(classify), "warning", told.append)
    pixels = classify.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    routed = classify.model.route(pixels).modality
    own = type(next(iter(classify.model.tasks.values())))
    tasks = dict(classify.model.tasks)
    wanted = {"first": routed[0], "other": next(name for name in MODALITIES if name not in routed)}
    for name, modality in wanted.items():
        tasks[name] = own.from_dict(name, tasks["chest"].to_dict() | {"modality": modality})
    monkeypatch.setattr(classify.model, "tasks", tasks)
    for name, modality in wanted.items():
        found = classify(pictures, task=name, batch_size=batch_size)
        assert by_label(found) == lines(expected["chest"], list(CHEST))
        for rows, read_as in zip(found, routed, strict=True):
            assert {(row["task"], row["modality"], row["fits"]) for row in rows} == {
                (name, read_as, read_as == modality)
            }
    apart = sum(one != routed[0] for one in routed)
    assert len(told) == 1 + bool(apart)
    assert 'The task "other" is for another modality than 3 images' in told[-1]
    told.clear()
    assert not classify(pictures[0], task="other", batch_size=batch_size)[0]["fits"]
    assert [text.partition(",")[0] for text in told] == ['The task "other" is for another modality than 1 image']
    told.clear()
    streamed = list(classify((one for one in pictures), task="other"))
    assert [rows[0]["fits"] for rows in streamed] == [False] * 3
    assert "fits" not in classify(pictures[0], candidate_labels=["clear", "mass"])[0]
    assert told == []


def pipeline_logger(classify):
    return sys.modules[type(classify).__module__].logger


def test_labels_of_several_tasks_choose_none(monkeypatch):
    from medmoe_hf.model import pipeline_medmoe

    told = []
    monkeypatch.setattr(pipeline_medmoe.logger, "warning", lambda text, *values: told.append(text % values))
    tasks = {"a": Task("a", BRAIN), "b": Task("b", BRAIN), "c": Task("c", CHEST)}
    assert chosen_task(tasks, list(BRAIN)) is None
    assert told == [
        "The tasks a and b of this checkpoint all have these labels, so none was used; choose one by `task`."
    ]
    assert chosen_task(tasks, list(BRAIN), "b") == "b"
    assert chosen_task(tasks, list(CHEST), template=True) is None


def test_what_the_pipeline_saves_loads_again(classify, folder, tmp_path, expected, pictures):
    json.dumps(classify.model.config.to_dict())
    classify.save_pretrained(tmp_path / "again")
    stored = [
        json.loads((path / "config.json").read_text())["custom_pipelines"] for path in (folder, tmp_path / "again")
    ]
    assert stored[0] == stored[1]
    again = pipeline("zero-shot-image-classification", model=str(tmp_path / "again"), trust_remote_code=True)
    assert by_label(again(pictures[:1], task="chest")) == lines(expected["chest"][:1], list(CHEST))
