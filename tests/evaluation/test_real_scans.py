"""`examples/experiments/real`: data check, tasks, statistics, tables, card, on a small folder of the same layout."""

import csv
import importlib
import json
import shutil
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import metadata_load
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from small_encoders import medmoe_folder

from medmoe_hf.data import phantom_sample
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, CardError, SourceError
from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import Interval
from medmoe_hf.evaluation.metrics import calibration as measure_calibration
from medmoe_hf.evaluation.results import Result
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.model.tasks_medmoe import read_tasks
from medmoe_hf.training import TrainConfig

FOLDER = Path(__file__).parents[2] / "examples" / "experiments" / "real"
NAMES = (
    "manifest", "tasks", "clean_encode", "encode", "evaluate", "check", "report", "card", "trainings", "leave_one_out",
    "twins", "figures", "pooling", "organs", "calibrate", "robustness", "input_size",
)  # fmt: skip

# The scripts import each other by name; other modules of these names must not be hidden from other tests.
_before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
sys.path.insert(0, str(FOLDER))
scripts = {name: importlib.import_module(name) for name in NAMES}
sys.path.remove(str(FOLDER))
for _name in NAMES:
    sys.modules.pop(_name)
sys.modules.update(_before)

SOURCES = (  # source, modality, body part, labels, license, splits
    ("kermany-cxr", "xray", "chest", ("no finding", "pneumonia"), "CC BY 4.0", ("train", "val", "test")),
    ("nih-cxr14", "xray", "chest", ("no finding", "pneumonia"), "attribution asked", ("train", "val", "test")),
    ("hygd", "fundus", "retina", ("no glaucoma", "glaucoma"), "ODC-By 1.0", ("train", "val", "test")),
    ("hrf-full", "fundus", "retina", ("no finding", "glaucoma", "diabetic retinopathy"), "CC BY 4.0", ("external",)),
    ("msd-heart", "mri", "heart", ("heart",), "CC BY-SA 4.0", ("train", "val")),
    ("vqa-rad", "ct", "abdomen", ("",), "CC0 1.0", ("val", "test")),
)
COLUMNS = (
    "file", "modality", "split", "source", "subject", "label", "body_part", "view", "text", "text_kind", "licence",
    "source_repo", "width", "height", "sha256",
)  # fmt: skip


def write_manifest(folder, rows):
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few dozen phantoms as JPEGs: four subjects of two images per source, split and label."""
    folder = tmp_path_factory.mktemp("scans")
    rows, number = [], 0
    for source, modality, part, labels, licence, splits in SOURCES:
        (folder / modality / source).mkdir(parents=True, exist_ok=True)
        for split in splits:
            for label in labels:
                for index in range(8 if label == "" else 4):
                    number += 1
                    name = f"{modality}/{source}/{number:03d}.jpg"
                    phantom_sample(7, number, image_size=64, modalities=[modality])["image"].save(folder / name)
                    rows.append(
                        {
                            "file": name,
                            "modality": modality,
                            "split": split,
                            "source": source,
                            "subject": f"{source}/{split}-{label}-{index // 2}",
                            "label": label,
                            "body_part": part,
                            "view": "axial" if modality == "ct" else "",
                            "text": f"Q: Is there a mass? A: no | Q: What is seen? A: cyst {number}"
                            if not label
                            else "",
                            "licence": licence,
                            "sha256": sha256((folder / name).read_bytes()).hexdigest(),
                        }
                    )
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("models") / "small", similarity="global", router="both")


@pytest.fixture
def copied(data, tmp_path):
    shutil.copytree(data, tmp_path / "scans")
    return tmp_path / "scans"


def rows_of(folder):
    return scripts["manifest"].read_manifest(folder)


# The data check


def test_the_check_counts_and_finds_nothing_wrong(data, tmp_path, capsys):
    scripts["check"].main(["--data", str(data), "--out", str(tmp_path / "check.json")])
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["problems"] == []
    assert len(found["files"]) == len(rows_of(data)) == 3 * 3 * 8 + 12 + 8 + 16
    by_source = {one["source"]: one for one in found["sources"]}
    assert [by_source["hygd"][split] for split in ("train", "val", "test", "external")] == [8, 8, 8, 0]
    assert by_source["hygd"]["subjects"] == 12
    # Share-alike rows are in the split `train`, and are not trained on.
    assert by_source["msd-heart"]["train"] == 4
    assert not by_source["msd-heart"]["trained_on"]
    assert found["train_files"] == 24
    shown = capsys.readouterr().out
    assert "share-alike: msd-heart" in shown
    assert "nih-cxr14: the terms are recalled" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("file", "has changed"),
        ("missing", "missing"),
        ("subject", "is in several splits: test, train"),
        ("image", "the image with the SHA-256"),
        ("external", "the source hygd is external, but has images in other splits"),
        ("twice", "listed 2 times"),
    ],
)
def test_the_check_names_what_is_wrong(copied, tmp_path, change, message, capsys):
    rows = rows_of(copied)
    train = next(row for row in rows if row["source"] == "hygd" and row["split"] == "train")
    test = next(row for row in rows if row["source"] == "hygd" and row["split"] == "test")
    if change == "file":
        (copied / train["file"]).write_bytes((copied / train["file"]).read_bytes() + b"0")
    elif change == "missing":
        (copied / train["file"]).unlink()
    elif change == "subject":
        test["subject"] = train["subject"]
    elif change == "image":
        shutil.copyfile(copied / train["file"], copied / test["file"])
        test["sha256"] = train["sha256"]
    elif change == "external":
        test["split"] = "external"
    else:
        rows.append(dict(train))
    write_manifest(copied, rows)
    with pytest.raises(SystemExit) as stopped:
        scripts["check"].main(["--data", str(copied), "--out", str(tmp_path / "check.json")])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("split", "testing", "line 2: split is 'testing'"), ("modality", "pet", "line 2: modality is 'pet'")],
)
def test_a_manifest_with_an_unknown_value_is_refused(copied, column, value, message):
    rows = rows_of(copied)
    rows[0][column] = value
    write_manifest(copied, rows)
    with pytest.raises(SourceError, match=message):
        rows_of(copied)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"manifest\.csv does not exist"):
        rows_of(tmp_path)


# Tasks


def test_tasks_offer_what_a_split_has(data):
    tasks, rows = scripts["tasks"], rows_of(data)
    assert {"pneumonia-children", "pneumonia-adults", "glaucoma", "modality"} <= set(tasks.tasks_of(rows, "val"))
    assert not {"knee-severe", "glaucoma-external", "region-xray"} & set(tasks.tasks_of(rows, "val"))
    assert {"fundus-external", "glaucoma-external"} <= set(tasks.tasks_of(rows, "external"))
    one = tasks.evaluation_set("glaucoma-external", rows, data, "external")
    assert one.classes == ["no finding", "glaucoma"]
    assert np.bincount(one.labels).tolist() == [4, 4]
    assert [Path(path).is_file() for path in one.images] == [True] * 8
    # Outside of `external` a class without images is not offered, and labels count the others.
    two = tasks.evaluation_set("modality", rows, data, "test")
    assert two.classes == ["xray", "ct", "fundus"]
    assert np.bincount(two.labels).tolist() == [16, 8, 8]


def test_all_tasks_have_prompts_and_disjoint_classes():
    for name, task in scripts["tasks"].TASKS.items():
        prompts = task.prompts()
        assert list(prompts) == list(task.classes), name
        everything = [sentence for own in prompts.values() for sentence in own]
        assert len(set(everything)) == len(everything), f"{name}: a sentence describes two classes"
        assert all(sentence[0].isupper() and "{" not in sentence for sentence in everything)
    assert "X-ray of the chest: pneumonia." in scripts["tasks"].TASKS["pneumonia-adults"].prompts()["pneumonia"]


def test_a_row_of_two_classes_is_refused(data):
    tasks = scripts["tasks"]
    task = tasks.TASKS["glaucoma"]
    both = {**task.classes, "any": tasks.labelled(("an eye",), "glaucoma", "no glaucoma")}
    with pytest.raises(SourceError, match="belongs to two classes of a task: no glaucoma and any"):
        replace(task, classes=both).rows(rows_of(data), ["val"])


def test_questions_become_sentences():
    spoken = scripts["evaluate"].spoken
    text = "Q: Is there a mass? A: Yes | Q: Where is it? A: Left lobe | Q: Which lobe? A: left lobe | Q: Edema? A: no"
    assert spoken(text) == "Is there a mass? Yes. Left lobe. Edema? no."
    assert spoken("A report: normal | end.") == "A report: normal | end."


# Encoding


def job_of(data, rows):
    images = [str(data / row["file"]) for row in rows]
    texts = ["Chest X-ray: pneumonia.", "No finding.", "A fundus photograph with glaucoma, which is a longer text."]
    return {"images": images, "texts": texts, "batch_size": 5, "groups": [{"images": range(7), "texts": [0, 2]}]}


def test_the_clean_encoder_agrees_with_the_package(data, model):
    rows = [row for row in rows_of(data) if row["split"] == "val"][:12]
    encoder, job = MedMoEEncoder(model, batch_size=4), job_of(data, rows)
    found = scripts["clean_encode"].encode(encoder.model, encoder.processor, job)
    for name, expected in {
        "embedding": encoder.encode_images(job["images"]),
        "texts": encoder.encode_texts(job["texts"]),
        "router": encoder.route_images(job["images"]),
        "v_g": encoder.features(job["images"])[encoder.model.config.vision_config.global_features],
    }.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=1e-4, atol=1e-5)
    assert float(found["scale"]) == pytest.approx(encoder.logit_scale)
    local = encoder.local_scores(job["images"], job["texts"]).numpy()
    np.testing.assert_allclose(found["local"][:7][:, [0, 2]], local[:7][:, [0, 2]], rtol=1e-4, atol=1e-4)
    # Images that share a batch with these are scored too, all others are not.
    assert np.isnan(found["local"][10:]).all()
    assert np.isnan(found["local"][:, 1]).all()


@pytest.fixture
def in_process(monkeypatch, model):
    """Encodes in this process, which saves the start of another one. Returns the jobs."""
    jobs = []

    def run(code, folder, job, out, show):
        assert "RefusePackage" in code
        encoder = MedMoEEncoder(folder)
        jobs.append(json.loads(Path(job).read_text()))
        np.savez(out, **scripts["clean_encode"].encode(encoder.model, encoder.processor, jobs[-1]))

    monkeypatch.setattr(scripts["encode"], "run_clean", run)
    return jobs


def test_what_was_encoded_is_not_encoded_again(data, model, tmp_path, in_process):
    rows = [row for row in rows_of(data) if row["split"] == "external"]
    stored = scripts["encode"].StoredEncoder
    first = stored(model, "small", tmp_path)
    first.run(data, rows, ["Glaucoma."])
    again = stored(model, None, tmp_path)
    again.run(data, rows, ["Glaucoma."])
    assert len(in_process) == 1
    paths = [str(data / row["file"]) for row in rows]
    assert torch.equal(first.encode_images(paths), again.encode_images(paths))
    assert (first.name, again.name) == ("small", "/".join(model.parts[-2:]))
    again.run(data, rows, ["Another text."])
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    (changed / "config.json").write_text((model / "config.json").read_text() + "\n")
    stored(changed, None, tmp_path).run(data, rows, ["Glaucoma."])
    assert len(in_process) == 3
    # The card is no part of what outputs depend on.
    (changed / "README.md").write_text("A card.")
    stored(changed, None, tmp_path).run(data, rows, ["Glaucoma."])
    assert len(in_process) == 3


# Tasks that travel


def test_tasks_are_calibrated_on_val_and_measured_on_test(data, model, tmp_path, in_process, monkeypatch, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    # Eight images of four subjects are too few for all but a softer minimum.
    for name, least in (("MINIMUM", 4), ("FOLDS", 2)):
        monkeypatch.setattr(f"medmoe_hf.evaluation.calibration.{name}", least)
    arguments = ["--data", str(data), "--run", str(tmp_path / "run"), "--resamples", "5"]
    scripts["calibrate"].main([str(folder), *arguments])
    shown = capsys.readouterr().out
    tasks = read_tasks(folder / "tasks.json")
    assert list(tasks)[:2] == ["pneumonia-children", "pneumonia-adults"]
    # Other sources are answered by the task of the first ones.
    assert "fundus-external" in tasks
    assert "glaucoma-external" not in tasks
    fitted = [name for name, task in tasks.items() if task.calibration is not None]
    assert fitted
    assert tasks["fundus-external"].calibration is None
    assert "fundus-external          not calibrated: val has no image of it." in shown
    assert tasks["glaucoma"].modality == "fundus"
    facts = tasks[fitted[0]].calibration.fitted_on
    assert (facts["split"], facts["cases"], facts["subjects"]) == ("val", 8, 4)
    assert set(facts["held_out_loss"]) == {"global", "local", "mean"}

    # Nothing but `val` was read, and what it is measured on is what the model answers.
    assert len(in_process) == 1
    assert {row["split"] for row in rows_of(data) if str(data / row["file"]) in in_process[0]["images"]} == {"val"}
    run = scripts["evaluate"].evaluate
    found = {
        (split, result.dataset): result
        for split in ("test", "external")
        for result in run(folder, data, split, cache=tmp_path / "run" / "cache", probes=False, resamples=5)
        if result.protocol == "zero-shot"
    }
    encoder = MedMoEEncoder(folder)
    for split, key, name in (("test", fitted[0], fitted[0]), ("external", "modality-external", "modality")):
        if tasks[name].calibration is None:
            continue
        one = scripts["tasks"].evaluation_set(key, rows_of(data), data, split)
        pixels = encoder.processor(images=one.images, return_tensors="pt")["pixel_values"]
        answer = encoder.model.classify(pixels, name)
        # Also where the router sends an image of the task to another modality, for which `classify` decides nothing.
        labels, sets = encoder.model.tasks[name].decide(answer.scores)
        truth = [one.classes[label] for label in one.labels]
        measured = found[split, key].by_variant()["shipped task"]
        assert measured["coverage"].value == pytest.approx(
            np.mean([own in names for own, names in zip(truth, sets, strict=True)])
        )
        assert measured["accuracy"].value == np.mean([[own] == c for own, c in zip(truth, labels, strict=True)])
        if split == "test":
            right = balanced_accuracy_score(truth, [label for (label,) in labels])
            assert measured["balanced_accuracy"].value == pytest.approx(right)
            probabilities = answer.probabilities.double().numpy()
            expected = measure_calibration(probabilities / probabilities.sum(axis=1, keepdims=True), one.labels)
            assert measured["ece"].value == pytest.approx(expected["ece"], abs=1e-5)
            plain = found[split, key].by_variant()["global"]["ece"].value
            assert measured["ece_before"].value == pytest.approx(plain, abs=1e-6)
    assert found["external", "glaucoma-external"].facts["shipped"]["task"] == "glaucoma"
    assert found["external", "fundus-external"].facts["shipped"]["calibrated"] is False

    report = scripts["report"]
    results = {"test": [one for (split, _), one in found.items() if split == "test"]}
    line = next(line for line in report.shipped_table(results, "test").splitlines() if f"| {fitted[0]}, " in line)
    assert report.shown(found["test", fitted[0]].by_variant()["shipped task"]["coverage"]) in line
    # Tasks are no part of what features depend on: those of `val` are read again.
    scripts["calibrate"].main([str(folder), *arguments])
    assert len(in_process) == 3


def test_answered_tasks_have_as_many_classes():
    tasks = scripts["tasks"].TASKS
    answered = {name: task.answered_by for name, task in tasks.items() if task.answered_by}
    assert {"glaucoma-external", "modality-external", "region-ct-external"} <= set(answered)
    for name, other in answered.items():
        assert tasks[name].external
        assert not tasks[other].external
        assert len(tasks[name].classes) == len(tasks[other].classes)
        # The same classes in the same order, or the absence of a finding by two names.
        assert list(tasks[name].classes)[1:] == list(tasks[other].classes)[1:]


def test_tasks_are_measured_together():
    draw = np.random.default_rng(0)
    parts = []
    for count, classes in ((30, 2), (20, 3)):
        labels = draw.integers(0, classes, count)
        tables = draw.dirichlet(np.ones(classes), (2, count))
        subjects = np.array([f"{classes}-{row // 2}" for row in range(count)])
        covered, size = draw.random(count) < 0.9, draw.integers(0, classes + 1, count)
        part = {"before": tables[0], "after": tables[1], "labels": labels}
        parts.append({**part, "covered": covered, "size": size, "subjects": subjects})
    result = scripts["evaluate"].together(parts, "mine/small", resamples=20, seed=0)
    found = result.by_variant()["shipped task"]
    assert (result.count, found["ece"].n) == (50, 25)
    assert found["coverage"].value == (parts[0]["covered"].sum() + parts[1]["covered"].sum()) / 50
    for name, key in (("ece_before", "before"), ("ece", "after")):
        confidence = np.concatenate([part[key].max(axis=1) for part in parts])
        right = np.concatenate([part[key].argmax(axis=1) == part["labels"] for part in parts])
        bins = np.ceil(confidence * 15)
        expected = sum(abs((confidence - right)[bins == one].sum()) for one in np.unique(bins)) / 50
        assert found[name].value == pytest.approx(expected)
    table = scripts["report"].shipped_table({"test": [result]}, "test")
    assert f"| 2 tasks | 50 (25) | – | – | {scripts['report'].shown(found['ece_before'])} |" in table


# Statistics


def probe_of(name, tests, subjects, generator):
    """Hand-made probabilities of a task's probes, and its data."""
    labels = generator.integers(0, 2, size=tests)
    labels[:2] = 0, 1
    result = Result("linear-probe", "small", name, tests, {}, {"resamples": 50, "seed": 0})
    for kind in ("v_g", "embedding", "imagenet", "pixels"):
        for share, runs in (("1%", 3), ("10%", 3), ("100%", 1)):
            own = generator.random((tests, runs)) * 0.6 + 0.4 * labels[:, None] * (kind == "v_g")
            result.probabilities[f"{kind} {share}"] = np.stack([1 - own, own], axis=2)
    data = EvaluationSet(
        name, [f"{name}{row}.png" for row in range(tests)], labels=labels, classes=["a", "b"], subjects=subjects
    )
    return result, data


def test_means_over_tasks_are_those_of_scikit_learn():
    generator = np.random.default_rng(3)
    probes = [
        probe_of("one", 40, [f"one{row // 2}" for row in range(40)], generator),
        probe_of("two", 24, [f"two{row // 3}" for row in range(24)], generator),
    ]
    result = scripts["evaluate"].mean_over_tasks(probes, resamples=50, seed=0)

    def plain(kind, share, metric):
        values = []
        for one, data in probes:
            runs = one.probabilities[f"{kind} {share}"]
            scores = [
                balanced_accuracy_score(data.labels, runs[:, run].argmax(axis=1))
                if metric == "balanced_accuracy"
                else roc_auc_score(data.labels, runs[:, run, 1])
                for run in range(runs.shape[1])
            ]
            values.append(np.mean(scores))
        return np.mean(values)

    for share in ("1%", "10%", "100%"):
        for metric in ("balanced_accuracy", "macro_auroc"):
            values = {kind: plain(kind, share, metric) for kind in ("v_g", "imagenet")}
            for kind, value in values.items():
                assert result.metrics[f"{kind} {share}/{metric}"].value == pytest.approx(value)
            difference = result.metrics[f"v_g - imagenet {share}/{metric}"]
            assert difference.value == pytest.approx(values["v_g"] - values["imagenet"])
            assert difference.low <= difference.value <= difference.high
            assert difference.n == 20 + 8
    assert result.count == 64
    assert result.facts["tasks"] == ["one", "two"]


def test_differences_of_features_are_paired():
    probe, data = probe_of("one", 60, [f"s{row // 2}" for row in range(60)], np.random.default_rng(0))
    probe.probabilities["imagenet 10%"] = probe.probabilities["v_g 10%"]
    scripts["evaluate"].compare_features(probe, data, resamples=50, seed=0)
    same = probe.metrics["v_g - imagenet 10%/balanced_accuracy"]
    # Resampled on their own, equal features would differ.
    assert (same.value, same.low, same.high, same.n) == (0, 0, 0, 30)
    first, second = (
        balanced_accuracy_score(data.labels, probe.probabilities[f"{kind} 100%"][:, 0].argmax(axis=1))
        for kind in ("v_g", "pixels")
    )
    assert probe.metrics["v_g - pixels 100%/balanced_accuracy"].value == pytest.approx(first - second)


@pytest.mark.parametrize("split", ["val", "test"])
def test_probes_never_choose_on_what_is_measured(data, split):
    one = scripts["evaluate"].probe_set("glaucoma", rows_of(data), data, split, seed=0)
    parts = {name: one.split(name) for name in ("train", "validation", "test")}
    subjects = [set(part.subjects) for part in parts.values()]
    assert all(subjects)
    assert sum(map(len, subjects)) == len(set().union(*subjects))
    assert {subject.split("/")[1].split("-")[0] for subject in subjects[2]} == {split}
    assert {subject.split("/")[1].split("-")[0] for subject in subjects[1]} == {"train" if split == "val" else "val"}


def test_a_crossing_learns_on_one_source_and_measures_on_another(data):
    crossings, module = scripts["tasks"].CROSSINGS, scripts["leave_one_out"]
    one = module.crossing_set(crossings["glaucoma-camera"], rows_of(data), data, "external")
    sources = {name: {Path(path).parent.name for path in one.split(name).images} for name in set(one.splits)}
    assert sources == {"train": {"hygd"}, "validation": {"hygd"}, "test": {"hrf-full"}}
    assert one.classes == ["no finding", "glaucoma"]
    assert np.bincount(one.split("test").labels).tolist() == [4, 4]
    rows = [row for row in rows_of(data) if row["label"] != "no glaucoma"]
    with pytest.raises(SourceError, match="the train images are of glaucoma"):
        module.crossing_set(crossings["glaucoma-camera"], rows, data, "external")


def need_imagenet_weights():
    try:
        scripts["encode"].imagenet_weights()
    except SourceError as error:
        pytest.skip(str(error))


def test_a_crossing_is_measured_beside_the_bare_backbone(data, model, tmp_path, in_process):
    need_imagenet_weights()
    encoder = scripts["encode"].StoredEncoder(model, "small", tmp_path)
    measure = scripts["leave_one_out"].measure
    zero_shot, probe = measure("adults-to-children", encoder, rows_of(data), data, "val", resamples=20, seed=0)
    assert (zero_shot.dataset, zero_shot.count, zero_shot.metrics["global/macro_auroc"].n) == (
        "adults-to-children",
        8,
        4,
    )
    # The classes of the measured source, in the words of its task.
    one = scripts["tasks"].evaluation_set("pneumonia-children", rows_of(data), data, "val")
    plain = MedMoEEncoder(model)
    embeds = [plain.encode_texts(sentences).mean(dim=0) for sentences in one.prompts.values()]
    text = torch.nn.functional.normalize(torch.stack(embeds), dim=1)
    logits = plain.logit_scale * plain.encode_images(one.images) @ text.T
    auroc = roc_auc_score(one.labels, (logits[:, 1] - logits[:, 0]).double().numpy())
    assert zero_shot.metrics["global/macro_auroc"].value == pytest.approx(auroc)
    baseline = probe.metrics["imagenet 100%/macro_auroc"].value
    difference = zero_shot.metrics["global - imagenet 100%/macro_auroc"]
    assert difference.value == pytest.approx(auroc - baseline)
    assert probe.facts["train_count_by_class"] == {"no finding": 4, "pneumonia": 4}
    tables = scripts["report"].crossing_table({"crossings": [zero_shot, probe]})
    assert f"| {scripts['report'].shown(difference)} |" in tables


@pytest.mark.slow
def test_twins_differ_in_their_experts_only(data, model, tmp_path, in_process, monkeypatch):
    module = scripts["twins"]
    trained = []

    def train(recipe, folder):
        trained.append((folder.name, recipe["model"]["from_pretrained"], recipe["seed"]))
        shutil.copytree(recipe["model"]["from_pretrained"], folder)
        (folder / "training.json").write_text('{"seconds": 1.0}')
        return folder

    monkeypatch.setattr(module, "train", train)
    recipe = {
        "output_dir": "unused",
        "model": {"preset": "tiny"},
        "data": {"train": {"kind": "csv", "files": [str(data / "manifest.csv")], "image": "file", "caption": "label"}},
        "max_steps": 1,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [
        "--recipe",
        tmp_path / "train.yaml",
        "--start",
        model,
        "--data",
        data,
        "--models",
        tmp_path / "models",
    ]
    arguments += ["--out", tmp_path / "twins.json", "--seeds", 0, 1, "--without", "nih-cxr14"]
    module.main(list(map(str, arguments)))
    found = json.loads((tmp_path / "twins.json").read_text())
    assert [name for name, *_ in trained] == ["routed-0", "shared-0", "none-0", "routed-1", "shared-1", "none-1"]
    assert [seed for *_, seed in trained] == [0, 0, 0, 1, 1, 1]
    assert found["others"] == ["pneumonia-adults"]
    sizes = {name: runs["0"]["parameters"] for name, runs in found["runs"].items()}
    assert sizes["none"] < sizes["shared"] == pytest.approx(sizes["routed"], rel=0.02)
    for name, runs in found["runs"].items():
        own = [runs["1"]["metrics"][task]["balanced_accuracy"] for task in ("pneumonia-children", "glaucoma")]
        assert found["table"][name]["tasks"][1] == pytest.approx(np.mean(own))
        assert found["table"][name]["other sources"][1] == runs["1"]["metrics"]["pneumonia-adults"]["macro_auroc"]
    assert scripts["report"].twins_table({"twins": found}).count(" M | 2 |") == 3


def test_recipes_leave_sources_out():
    without = scripts["trainings"].without_sources
    table = {"kind": "csv", "files": ["manifest.csv"], "where_not": {"licence": ["*-SA*"], "source": ["a"]}}
    recipe = {"data": {"train": [table], "evaluation": {**table, "where_not": None}}, "seed": 1}
    found = without(recipe, ["nih-cxr14"])
    assert found["data"]["train"][0]["where_not"] == {"licence": ["*-SA*"], "source": ["a", "nih-cxr14"]}
    assert found["data"]["evaluation"][0]["where_not"] == {"source": ["nih-cxr14"]}
    assert recipe["data"]["train"][0]["where_not"]["source"] == ["a"]
    with pytest.raises(ValueError, match="webdataset source have no column"):
        without({"data": {"train": {"kind": "webdataset", "files": ["a.tar"]}}}, ["nih-cxr14"])


def test_a_recipe_is_trained_without_a_source(data, tmp_path, monkeypatch):
    module = scripts["trainings"]
    source = {
        "kind": "csv",
        "files": [str(data / "manifest.csv")],
        "image": "file",
        "captions": ["{label}", "{modality} of the {body_part}"],
        "modality": "field:modality",
        "where": {"split": "train"},
        "where_not": {"licence": "*-SA*"},
    }
    recipe = {
        "output_dir": str(tmp_path / "unused"),
        "model": {"preset": "tiny"},
        "data": {"train": source, "balance": ["modality", "source", "label"]},
        "max_steps": 3,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    called = []
    monkeypatch.setattr(module, "command", lambda *arguments: called.append(arguments))
    read = module.read_recipe(tmp_path / "train.yaml", ["max_steps=7"])
    folder = module.train(module.without_sources(read, ["nih-cxr14"]), tmp_path / "models" / "without")
    ((verb, path, *_),) = called
    config = TrainConfig.from_yaml(path)
    assert (verb, config.output_dir, config.max_steps) == ("train", folder, 7)
    (own,) = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    assert own.where_not == {"licence": ["*-SA*"], "source": ["nih-cxr14"]}
    # What the training reads: 24 rows of `train` that are not share-alike, a third of them of the excluded source.
    assert len(list(SampleStream([own]))) == 16
    # A model that is trained is not trained again.
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    module.train(recipe, folder)
    assert len(called) == 1


def test_twins_are_averaged_over_tasks_per_seed():
    values = {"pneumonia-children": (0.9, 0.95), "glaucoma": (0.7, 0.8), "fundus-external": (0.4, 0.6)}
    metrics = {name: {"balanced_accuracy": one, "macro_auroc": two} for name, (one, two) in values.items()}
    # Body regions are nearly always right, and do not count.
    metrics |= {"region-xray": {"balanced_accuracy": 1.0, "macro_auroc": 1.0}, "routing": {"balanced_accuracy": 0.99}}
    metrics["routing-external"] = {"balanced_accuracy": 0.8}
    other = {**metrics, "glaucoma": {"balanced_accuracy": 0.5, "macro_auroc": 0.5}}
    runs = {"routed": {"0": {"metrics": metrics}, "1": {"metrics": other}}}
    found = scripts["twins"].summarize(runs, ["fundus-external"])
    assert found["routed"]["tasks"] == pytest.approx([0.8, 0.7])
    assert found["routed"]["other sources"] == pytest.approx([0.6, 0.6])
    assert found["routed"]["routing"] == [0.99, 0.99]
    assert found["routed"]["routing-external"] == [0.8, 0.8]


# Tables and card


def interval(value, n=7):
    return Interval(value, value - 0.05, value + 0.05, n)


def run_files(folder, check, weights="123"):
    """Hand-made results of a run."""
    facts = {
        "weights_hash": weights,
        "model_hash": "abc123",
        "manifest_hash": "def456",
        "similarity": "global",
        "resamples": 1000,
        "seed": 0,
        "versions": {"torch": "2.14"},
        "count_by_class": {"no finding": 4, "pneumonia": 4},
        "title": "Pneumonia, chest X-rays of adults",
        "split": "test",
    }
    names = {"accuracy": 0.0, "balanced_accuracy": 0.0, "macro_auroc": 0.05}
    metrics = {f"{score}/{name}": interval(value + more) for score, value in (("global", 0.81), ("local", 0.6))
               for name, more in names.items()}  # fmt: skip
    probe = {f"{kind} 100%/{name}": interval(value + more) for kind, value in (("imagenet", 0.72), ("pixels", 0.55))
             for name, more in names.items()}  # fmt: skip
    routed = {f"image router/{name}": interval(0.9876) for name in ("accuracy", "balanced_accuracy", "macro_auroc")}
    results = [
        Result("routing", "mine/small", "all sources", 16, routed, facts),
        Result("zero-shot", "mine/small", "pneumonia-adults", 8, metrics, facts),
        Result("linear-probe", "mine/small", "pneumonia-adults", 8, probe, facts),
    ]
    folder.mkdir(exist_ok=True)
    (folder / "test.json").write_text(json.dumps([result.to_json() for result in results]))
    (folder / "check.json").write_text(json.dumps(check))
    return folder


def test_tables_come_from_the_results(data, tmp_path):
    report = scripts["report"]
    run = report.read_run(run_files(tmp_path / "run", scripts["check"].check(data)))
    lines = report.zero_shot_table(run, "test").splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "Pneumonia, chest X-rays of adults", "8 (7)", "0.50", "0.810 (0.760 to 0.860)", "0.860 (0.810 to 0.910)",
        "0.720 (0.670 to 0.770)", "0.550 (0.500 to 0.600)",
    ]  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    report.main([str(tmp_path / "run"), "--page", str(page)])
    first = page.read_text()
    assert "old" not in first
    assert "0.988 (0.938 to 1.038)" in first
    assert "- Pneumonia, chest X-rays of adults: Labels were mined from reports." in first
    assert first.startswith("# Title\n")
    assert first.endswith("\n\nAfter.\n")
    report.main([str(tmp_path / "run"), "--page", str(page)])
    assert page.read_text() == first
    report.main([str(tmp_path / "run"), "--readme", str(page)])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.read_text().splitlines()]
    # In AUROC, and so is the probe beside it.
    adults = ["Pneumonia, chest X-rays of adults, AUROC", "8 (7)", "0.860 (0.810 to 0.910)", "0.770 (0.720 to 0.820)"]
    assert adults in rows
    page.write_text("no marks")
    with pytest.raises(SourceError, match="lacks the lines"):
        report.main([str(tmp_path / "run"), "--page", str(page)])


def test_refused_pictures_have_a_table(data, tmp_path):
    report, card = scripts["report"], scripts["card"]
    assert report.rejection_table(report.read_run(run_files(tmp_path, scripts["check"].check(data)))) == ""
    share = {"images": 64, "subjects": 8, "refused": [0.9, 0.8, 1.0]}
    found = {"foreign": {"photograph": share | {"auroc": [0.99, None, None]}}, "splits": {"external": share}}
    found |= {"sources": {"hrf (fundus)": share | {"refused": [1.0, None, None]}}, "weights_hash": "456"}
    (tmp_path / "rejection.json").write_text(json.dumps(found))
    lines = report.rejection_table(report.read_run(tmp_path)).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["photograph", "64 (8)", "0.900 (0.800 to 1.000)", "0.990"],
        ["scans, external", "64 (8)", "0.900 (0.800 to 1.000)", "–"],
        ["external, hrf (fundus)", "64 (8)", "1.000", "–"],
    ]
    (tmp_path / "test.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CardError, match=r"rejection\.json has the results of other weights"):
        card.check_weights(tmp_path, report.read_run(tmp_path))


def test_the_results_page_has_the_marks():
    page = (FOLDER.parents[2] / "docs" / "pages" / "results.md").read_text()
    for name in ("report", "robustness"):
        assert page.index(scripts[name].BEGIN) < page.index(scripts[name].END)


def test_robustness_is_measured_with_the_prompts_of_the_tasks(data, model, tmp_path):
    robustness, tasks = scripts["robustness"], scripts["tasks"]
    rows = scripts["manifest"].read_manifest(data)
    sets = {one.name: one for one in robustness.sets_of(rows, data, "test")}
    assert list(sets) == ["pneumonia", "glaucoma"]
    both = sets["pneumonia"]
    sources = ["kermany-cxr" if "children" in group else "nih-cxr14" for group in both.groups["patients"]]
    assert [Path(image).relative_to(data).parts[1] for image in both.images] == sources
    assert both.negation == {"pneumonia": "pneumonia"}
    # One template and one name at a time, the same template for all classes.
    assert len(both.paraphrases["pneumonia"]) == len(both.paraphrases["no finding"]) == 12
    assert both.paraphrases["no finding"][3] == "Chest radiograph showing no finding."
    assert both.paraphrases["pneumonia"][3] == "Chest radiograph showing pneumonia."
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n{robustness.BEGIN}\nold\n{robustness.END}\nAfter.\n")
    command = ["--model", model, "--data", data, "--out", tmp_path / "out.json", "--page", page, "--resamples", "5"]
    robustness.main([str(word) for word in [*command, "--severity", "5", "--corrupted-images", "3"]])
    results = [Result.from_json(entry) for entry in json.loads((tmp_path / "out.json").read_text())]
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    title = tasks.TASKS["glaucoma"].title
    flips = next(one for one in results if (one.protocol, one.dataset) == ("paraphrases", "glaucoma"))
    flip_rate = scripts["report"].shown(flips.metrics["all paraphrases/flip_rate"])
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert any(row[0] == title and row[2:4] == ["8", flip_rate] for row in found)
    drops = [one.metrics["noise/balanced_accuracy_drop"].value for one in results if one.protocol == "robustness"]
    assert any(row[0] == "noise" and row[1] == f"{np.mean(drops):.3f}" for row in found)
    with pytest.raises(SystemExit, match="No task has images"):
        robustness.measure(str(model), data, "external", 3, (5,), 5, 0)


def test_the_card_credits_every_source(data, model, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(model, folder)
    check = scripts["check"].check(data)
    run = run_files(tmp_path / "run", check, sha256((model / "model.safetensors").read_bytes()).hexdigest())
    write = scripts["card"].write
    text = write(folder, run, None, None, None).read_text()
    for expected in (
        "license: cc-by-4.0",
        "| kermany-cxr | xray | Kermany et al. 2018, Cell 172:1122; Mendeley Data rscbjbr9sj | CC BY 4.0 | 8 |",
        "Share-alike sources (msd-heart) were left out",
        "- nih-cxr14: the terms are recalled",
        "0.810 (0.760 to 0.860)",
        "abc123",
    ):
        assert expected in text, expected
    trained, measured = text.split("Measured only:")
    assert "| msd-heart |" not in trained.split("## Images and licenses")[1]
    assert "| hrf-full | fundus |" in measured
    # Written again, it is the same; what someone added stays.
    added = text.replace(scripts["card"].BEGIN, f"My own words.\n\n{scripts['card'].BEGIN}")
    (folder / "README.md").write_text(added)
    assert write(folder, run, None, None, None).read_text() == added
    found = metadata_load(folder / "README.md")["model-index"][0]["results"]
    assert [(one["dataset"]["type"], len(one["metrics"])) for one in found] == [
        ("all sources, test", 1),
        ("pneumonia-adults, test", 2),
    ]
    with pytest.raises(CardError, match=r"test\.json has the results of other weights"):
        write(folder, run_files(tmp_path / "other", check), None, None, None)
    check["sources"][0]["source"] = "unheard-of"
    (run / "check.json").write_text(json.dumps(check))
    with pytest.raises(CardError, match="no entry for unheard-of"):
        write(folder, run, None, None, None)


def test_the_real_sources_have_credits():
    credits = yaml.safe_load((FOLDER / "attributions.yaml").read_text())
    assert set(scripts["manifest"].DOUBTFUL) <= set(credits)
    sources = {name for task in scripts["tasks"].TASKS.values() for name in task.where.get("source", ())}
    assert sources <= set(credits)


def test_heatmaps_are_of_findings(data):
    picks = scripts["figures"].chosen(rows_of(data), "val", per_modality=2, seed=0)
    labels = [(pick.row["modality"], pick.row["label"]) for pick in picks]
    assert labels.count(("xray", "pneumonia")) == 2
    assert labels.count(("fundus", "glaucoma")) == 2
    assert {pick.phrase for pick in picks if pick.row["modality"] == "fundus"} == {"glaucoma"}
    assert {pick.reference[0] for pick in picks if pick.row["modality"] == "xray"} == {
        "X-ray of the chest: no finding."
    }


@pytest.mark.slow
def test_evaluation_in_a_clean_process(data, model, tmp_path, capsys):
    need_imagenet_weights()
    out = tmp_path / "run" / "val.json"
    arguments = ["--model", str(model), "--data", str(data), "--split", "val", "--out", str(out), "--resamples", "20"]
    scripts["evaluate"].main([*arguments, "--only", "glaucoma", "pneumonia-adults", "--name", "me/small"])
    results = [Result.from_json(entry) for entry in json.loads(out.read_text())]
    assert {result.model for result in results} == {"me/small"}
    found = {(result.protocol, result.dataset): result for result in results}
    zero_shot = found["zero-shot", "glaucoma"]
    assert zero_shot.count == 8
    assert {name.split("/")[0] for name in zero_shot.metrics} == {"global", "local", "mean", "image router"} - (
        {"image router"} if "image router/routing_accuracy" not in zero_shot.metrics else set()
    )
    probe = found["linear-probe", "glaucoma"]
    assert {"v_g 100%", "imagenet 10%", "v_g - imagenet 10%"} <= set(probe.by_variant())
    assert ("linear-probe", "mean over tasks") in found
    encoder = MedMoEEncoder(model)
    one = scripts["tasks"].evaluation_set("glaucoma", rows_of(data), data, "val")
    from medmoe_hf.evaluation.zero_shot import zero_shot as measure

    expected = measure(encoder, one, resamples=20)
    for name, interval_ in expected.metrics.items():
        assert zero_shot.metrics[name].value == pytest.approx(interval_.value, abs=1e-4), name
    scripts["evaluate"].main([*arguments[:5], "external", *arguments[6:], "--no-probes"])
    assert "measured once" in capsys.readouterr().err


def test_series_that_are_composed_of_slices():
    module = scripts["pooling"]
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert module.auroc(scores, positive) == (1 + 0.5 + 1 + 1) / 4
    # A tumour's slice is as sure of it as the others are of nothing: one of 40 is lost in a mean.
    labels = np.repeat([0, 2], 30)
    logits = np.random.default_rng(0).normal(size=(60, 3)) + 6 * np.eye(3)[labels]
    subjects = np.array([f"s{index // 3}" for index in range(60)])
    found = module.composed(logits, labels, subjects, size=40, tumours=1)
    assert found["attention"] > 0.95 > found["mean"]
    assert found["middle slice"] < 0.6
    assert module.composed(logits, labels, subjects, size=40, tumours=40)["mean"] == 1


def test_organs_are_ranked_by_what_their_slices_and_series_score():
    module = scripts["organs"]
    generator = np.random.default_rng(0)
    organs, count = list(module.ORGANS), 80
    truth = generator.random((count, len(organs))) < 0.5
    logits = {}
    for index, organ in enumerate(organs):
        logits[organ] = 3 * truth[:, index] + generator.normal(size=count)
        logits[f"without {organ}"] = generator.normal(size=count)
        # The sentences agree in what all slices share, which is large and says nothing.
        logits[f"with {organ}"] = logits[f"without {organ}"] + truth[:, index]
    contrast = module.columns(logits, module.CONTRAST)
    assert module.aurocs(contrast, truth) == [1] * len(organs)
    labels = module.answers(module.columns(logits, module.LABELS), module.LABELS)
    np.testing.assert_allclose(labels.sum(axis=1), 1)
    expected = [roc_auc_score(truth[:, index], labels[:, index]) for index in range(len(organs))]
    np.testing.assert_allclose(module.aurocs(labels, truth), expected)
    others = [
        np.mean([roc_auc_score(truth[:, index], labels[:, other]) for other in range(len(organs)) if other != index])
        for index in range(len(organs))
    ]
    np.testing.assert_allclose(module.other_names(labels, truth), others)
    truth[:, 0], truth[:, 1] = np.arange(count) < module.LEAST, np.arange(count) < module.LEAST - 1
    assert [value is None for value in module.aurocs(contrast, truth)[:2]] == [False, True]


def test_series_are_ranges_of_slices_and_show_what_one_of_them_shows():
    module = scripts["organs"]
    truth = np.zeros((60, 2), dtype=bool)
    truth[25:35, 0] = True
    scores = np.where(truth, 2.0, 0.0)  # a slice with the organ scores 2, in every method but that of the middle slice
    places = module.cut(60, 20)
    assert (len(places), places[0], places[-1]) == (41, slice(0, 20), slice(40, 60))
    shows = np.array([truth[place, 0].any() for place in places])
    middle = np.array([scores[place.start + 10, 0] for place in places])
    found = module.series_aurocs(scores, truth, 20, module.CONTRAST)
    assert {name: values[1] for name, values in found.items()} == dict.fromkeys(found)  # no series shows it
    assert found["attention"][0] == found["mean"][0] == 1
    assert found["middle slice"][0] == roc_auc_score(shows, middle)
    assert 0.5 < found["middle slice"][0] < 0.8


def test_regions_are_those_of_the_organs():
    module = scripts["organs"]
    present = {organ: np.zeros(6, dtype=bool) for organ in module.ORGANS}
    present["left lung"][2:] = True
    present["pancreas"][:4] = True
    truth = module.region_truth(present)
    assert truth.tolist() == ["abdomen", "abdomen", "", "", "chest", "chest"]
    logits = {
        "region head": np.array([0.0, 0, 9, 9, 0, 0]),
        "region chest": np.array([1.0, 2, 0, 0, 1, 3]),
        "region abdomen": np.array([3.0, 1, 0, 0, 2, 1]),
    }
    # Differences: 2 and -1 of the abdomen, 1 and -2 of the chest; the answers: abdomen, chest, abdomen, chest.
    answers = {"head": 0, "chest": 2, "abdomen": 2}
    assert module.measure_regions(logits, truth) == {"auroc": 0.75, "accuracy": 0.5, "answers": answers}


def test_random_weights_replace_those_of_the_model_only(tmp_path):
    module = scripts["organs"]
    encoder = MedMoEEncoder(medmoe_folder(tmp_path / "model"))
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    one, same, other = (module.random_model(encoder, seed) for seed in (1, 1, 2))
    image = phantom_sample(1, 1, image_size=64)["image"]
    embeds = [made.encode_images([image]) for made in (encoder, one, same, other)]
    assert torch.equal(embeds[1], embeds[2])
    assert min(float((embeds[a] - embeds[b]).norm()) for a, b in ((0, 1), (0, 3), (1, 3))) > 0.05
    assert one.processor is encoder.processor
    for name, value in encoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_page_gets_tables_and_figure_of_organs(tmp_path, monkeypatch):
    module = scripts["organs"]
    count, organs = 60, list(module.ORGANS)
    truth = np.zeros((count, len(organs)), dtype=bool)
    for index in range(len(organs)):
        truth[2 * index : 2 * index + 20, index] = True
    logits = {}
    for index, organ in enumerate(organs):
        logits |= {
            organ: 5.0 * truth[:, index],
            f"with {organ}": 1.0 - truth[:, index],
            f"without {organ}": np.zeros(count),
        }
    random = {name: values[::-1] for name, values in logits.items()}
    runs = {kind: [module.columns(one, kind) for one in (logits, random)] for kind in module.KINDS}
    slices = {
        kind: [module.aurocs(module.answers(one, kind), truth) for one in scores] for kind, scores in runs.items()
    }
    series = {kind: [module.series_aurocs(one, truth, 20, kind) for one in scores] for kind, scores in runs.items()}
    found = {
        "model": "small", "weights_hash": "0123456789abcdef", "slices": count, "seeds": 1, "organs": organs,
        "shown_by": truth.sum(axis=0).tolist(),
        "slice_auroc": {kind: {"model": one[0], "random": one[1:]} for kind, one in slices.items()},
        "other_names": {kind: [0.5] * len(organs) for kind in module.KINDS},
        "series": {"20": 41},
        "series_auroc": {kind: {"20": {"model": one[0], "random": one[1:]}} for kind, one in series.items()},
        "regions": {
            "slices": {"chest": 30, "abdomen": 20},
            "model": {"auroc": 0.9, "accuracy": 0.75, "answers": {"chest": 40, "abdomen": 10}},
            "random": [{"auroc": 0.5, "accuracy": 0.25}],
        },
        "volumes": [
            {"name": "MRI of the brain", "slices": 24, "expert": "mri", "parts": ["brain"],
             "probability": dict.fromkeys(module.METHODS, 0.5)},
        ],
        "positions": list(range(count)), "present": truth.T.tolist(),
        "curves": {kind: scores[0].T.tolist() for kind, scores in runs.items()},
    }  # fmt: skip
    monkeypatch.setattr(module, "measure", lambda model, seeds: found)
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{module.BEGIN}\nold\n{module.END}\n\nafter\n", encoding="utf-8")
    module.main(["--page", str(page), "--out", str(tmp_path / "organs.json")])
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{module.BEGIN}\n\n`small` (weights 0123456789ab)")
    assert text.endswith(f"\n\n{module.END}\n\nafter\n")
    assert "old" not in text
    # Every organ has 20 of 60 slices: `with` scores exactly the others.
    assert text.count("| 20 / 40 |") == len(organs)
    (mean,) = (line.split(" | ") for line in text.splitlines() if line.startswith("| mean"))
    assert (mean[2], mean[3], mean[5], mean[6]) == ("0.00", "0.50", "1.00", "0.50")
    assert "| checkpoint | 0.90 | 0.75 | chest 40, abdomen 10 |" in text
    assert "| MRI of the brain, 24 slices | mri | brain | 0.50 | 0.50 | 0.50 | 0.50 |" in text
    assert json.loads((tmp_path / "organs.json").read_text(encoding="utf-8")) == found
    assert (tmp_path / "organs.png").stat().st_size > 10_000
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SourceError, match="lacks the lines"):
        module.main(["--page", str(page), "--out", str(tmp_path / "organs.json")])


def test_another_input_size_leaves_the_weights(model, tmp_path):
    sized = tmp_path / "sized"
    scripts["input_size"].main([str(model), str(sized), "--side", "96"])
    assert (sized / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    image = np.random.default_rng(0).integers(0, 256, (120, 100, 3), dtype=np.uint8)
    pixels = MedMoEProcessor.from_pretrained(sized)(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 96, 96)
    loaded = MedMoEModel.from_pretrained(sized).eval()
    assert loaded.config.vision_config.image_size == 96
    with torch.no_grad():
        found = loaded.get_image_features(pixels).pooler_output
        expected = MedMoEModel.from_pretrained(model).eval().get_image_features(pixels).pooler_output
    assert torch.equal(found, expected)
    with pytest.raises(ArgumentError, match="--side 8: give at least 32"):
        scripts["input_size"].main([str(model), str(tmp_path / "tiny"), "--side", "8"])
