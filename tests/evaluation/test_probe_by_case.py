"""Linear probes by case, CheXpert's five findings, and the warning of training sets."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.common.packaged import pretrained
from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL, EvaluationSet
from medmoe_hf.evaluation.linear_probe import cases_of, linear_probe
from medmoe_hf.evaluation.metrics import CHEXPERT_FINDINGS, multilabel_metrics
from medmoe_hf.evaluation.recipes import RecipeError, load_recipe, open_recipe, recipe_names
from medmoe_hf.evaluation.report import summary, to_markdown
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.training_sets import corpora, overlaps_of
from medmoe_hf.evaluation.zero_shot import zero_shot


class Numbers:
    """Images are their own features."""

    name, logit_scale, preprocessing, weights = "numbers", 1.0, "none", "none"

    def encode_images(self, images):
        return torch.nn.functional.normalize(torch.tensor(np.array(images), dtype=torch.float32), dim=-1)

    def encode_texts(self, texts):
        return torch.eye(len(texts), 4)

    def features(self, images):
        return {"embedding": torch.tensor(np.array(images), dtype=torch.float32)}


def cases(count=120, seed=0):
    """Cases of one to four images, in mixed order, whose class is seen better in their mean."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 5, count)
    of_image = np.repeat(np.arange(count), sizes)
    draw.shuffle(of_image)
    classes = np.arange(count) % 2
    images = draw.normal(size=(len(of_image), 4)) * 2
    images[:, 0] += 1.5 * classes[of_image]
    split = np.array(["train", "train", "validation", "test"])[draw.integers(0, 4, count)]
    return EvaluationSet(
        "cases",
        list(images),
        labels=classes[of_image],
        classes=["normal", "sick"],
        splits=split[of_image],
        subjects=[f"p{number}" for number in of_image],
        facts={"metric": "accuracy"},
    )


def averaged(data, split, labels):
    """Per case, by plain loops: mean feature and label."""
    chosen = [row for row in range(len(data)) if data.splits[row] == split]
    order = list(dict.fromkeys(data.subjects[row] for row in chosen))
    rows = {name: [row for row in chosen if data.subjects[row] == name] for name in order}
    features = np.array([np.mean([data.images[row] for row in own], axis=0) for own in rows.values()])
    return features.astype(np.float32).astype(np.float64), np.array([labels(own) for own in rows.values()])


def test_features_of_a_case_are_averaged_and_split_by_case():
    data = cases()
    result = linear_probe(Numbers(), data, (1.0,), resamples=50, strengths=(0.1,), by="case")
    train, labels = averaged(data, "train", lambda rows: data.labels[rows[0]])
    test, truth = averaged(data, "test", lambda rows: data.labels[rows[0]])
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(train), labels)
    expected = model.predict_proba(scaler.transform(test))
    np.testing.assert_allclose(result.probabilities["embedding 100%"][:, 0], expected, atol=1e-4)
    interval = result.metrics["embedding 100%/accuracy"]
    assert interval.value == pytest.approx(accuracy_score(truth, expected.argmax(1)))
    assert result.metrics["embedding 100%/macro_auroc"].value == pytest.approx(roc_auc_score(truth, expected[:, 1]))
    images = {name: int((data.splits == name).sum()) for name in ("train", "validation", "test")}
    assert (interval.n, interval.rows, result.count) == (len(truth), len(truth), images["test"])
    assert len(truth) < images["test"]
    assert result.facts["units"]["train"] == {"images": images["train"], "cases": len(labels)}
    assert result.facts["trained_on"] == {"100%": len(labels)}
    by_image = linear_probe(Numbers(), data, (1.0,), resamples=50, strengths=(0.1,))
    assert by_image.facts["units"]["test"] == {"images": images["test"]}
    assert by_image.metrics["embedding 100%/accuracy"].rows == images["test"]
    assert interval.value > by_image.metrics["embedding 100%/accuracy"].value

    page, short = to_markdown([result]), summary([result])
    assert f"| {len(truth)} cases ({images['test']} images) |" in page
    assert f"{len(truth)} cases ({images['test']} images)" in short
    assert f"test {len(truth)} of {images['test']} images" in page
    (entry,) = (one for one in result.to_eval_results() if one.metric_type == "accuracy")
    assert entry.task_name == "linear-probe (embedding 100%, by case)"
    assert (entry.metric_args["cases"], entry.metric_args["images"]) == (len(truth), images["test"])


def test_parts_are_drawn_by_case_and_c_is_chosen_on_cases():
    data = cases(200, 1)
    result = linear_probe(Numbers(), data, (0.1, 1.0), seeds=2, resamples=20, by="case")
    train, labels = averaged(data, "train", lambda rows: data.labels[rows[0]])
    counts = np.bincount(labels)
    assert result.facts["trained_on"] == {"10%": sum(round(0.1 * count) for count in counts), "100%": len(train)}
    validation, _ = averaged(data, "validation", lambda rows: data.labels[rows[0]])
    assert result.facts["units"]["validation"]["cases"] == result.facts["validation_count"] == len(validation)


def test_a_finding_of_a_case_is_that_of_any_image():
    labels = np.array([[0, UNKNOWN_LABEL], [1, UNKNOWN_LABEL], [0, 0], [UNKNOWN_LABEL, 1], [0, 0]])
    subjects = ["a", "a", "b", "c", "b"]
    data = EvaluationSet(
        "toy", [[1.0], [3.0], [5.0], [7.0], [9.0]], labels=labels, classes=["x", "y"], subjects=subjects
    )
    found = cases_of(data)
    assert found.names == ["a", "b", "c"]
    assert found.labels.tolist() == [[1, UNKNOWN_LABEL], [0, 0], [UNKNOWN_LABEL, 1]]
    assert found.mean(np.array(data.images)).tolist() == [[2.0], [7.0], [7.0]]
    assert found.joined(data).images == [[[1.0], [3.0]], [[5.0], [9.0]], [[7.0]]]


def test_cases_that_cannot_be_used_are_refused():
    data = cases()
    with pytest.raises(ValueError, match="needs subjects; state `subject`"):
        linear_probe(Numbers(), replace(data, subjects=None), by="case")
    with pytest.raises(ValueError, match="`by` must be image or case"):
        linear_probe(Numbers(), data, by="study")
    moved = data.splits.copy()
    row = next(row for row in range(len(data)) if moved[row] == "test" and data.subjects.count(data.subjects[row]) > 1)
    moved[row] = "train"
    with pytest.raises(ValueError, match="1 cases have images in several splits"):
        linear_probe(Numbers(), replace(data, splits=moved), by="case")
    mixed = data.labels.copy()
    mixed[row] = 1 - mixed[row]
    with pytest.raises(ValueError, match=r"1 of \d+ cases are of different classes, such as normal and sick"):
        linear_probe(Numbers(), replace(data, labels=mixed), by="case")


def test_the_command_probes_by_case(tmp_path, monkeypatch):
    seen = {}

    def evaluate(*arguments, **settings):
        seen.update(settings)
        return []

    monkeypatch.setattr("medmoe_hf.evaluation.suite.evaluate", evaluate)
    arguments = ["--recipe", "phantoms", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    run = CliRunner().invoke(app, ["evaluate", "linear-probe", *arguments, "--by", "case"])
    assert run.exit_code == 0, run.output
    assert seen["probe_by"] == "case"


# --- CheXpert's five


def test_the_mean_over_chexperts_five_is_that_of_scikit_learn():
    names = ["Mass", "effusion", "Edema", "Pneumonia", "consolidation", "Cardiomegaly", "atelectasis"]
    draw = np.random.default_rng(0)
    scores, labels = draw.normal(size=(90, 7)), draw.integers(0, 2, (90, 7))
    labels[draw.random((90, 7)) < 0.2] = UNKNOWN_LABEL
    found = multilabel_metrics(scores, labels, names)
    each = [
        roc_auc_score(labels[known, index], scores[known, index])
        for index in (1, 2, 4, 5, 6)
        for known in [labels[:, index] != UNKNOWN_LABEL]
    ]
    assert found["chexpert5_auroc"] == pytest.approx(np.mean(each))
    assert found["chexpert5_auroc"] != pytest.approx(found["macro_auroc"])
    # undefined for one of them, so for the mean: it must be over five
    labels[:, 1] = 0
    assert np.isnan(multilabel_metrics(scores, labels, names)["chexpert5_auroc"])
    assert "chexpert5_auroc" not in multilabel_metrics(scores[:, 1:], labels[:, 1:], [*names[1:-1], "Nodule"])


def test_zero_shot_and_probe_report_the_five_with_an_interval():
    draw = np.random.default_rng(1)
    names = [*CHEXPERT_FINDINGS, "Fracture"]
    labels = draw.integers(0, 2, (160, 6))
    images = draw.normal(size=(160, 6)) + labels
    data = EvaluationSet(
        "x", list(images), labels=labels, classes=names, prompts={name: [name] for name in names},
        splits=np.array(["train"] * 80 + ["test"] * 80), facts={"metric": "chexpert5_auroc"},
    )  # fmt: skip
    encoder = Numbers()
    encoder.encode_texts = lambda texts: torch.eye(6)[[names.index(text) for text in texts]]
    for result in (
        zero_shot(encoder, data, resamples=30),
        linear_probe(encoder, data, (1.0,), resamples=30, strengths=(1.0,)),
    ):
        variant = "global" if result.protocol == "zero-shot" else "embedding 100%"
        interval = result.metrics[f"{variant}/chexpert5_auroc"]
        each = [result.metrics[f"{variant}, {name}/auroc"].value for name in CHEXPERT_FINDINGS]
        assert interval.value == pytest.approx(np.mean(each))
        assert interval.low < interval.value < interval.high
        assert interval.value != result.metrics[f"{variant}/macro_auroc"].value
        assert "**AUROC of CheXpert's five**" in to_markdown([result])
        assert "AUROC of CheXpert's five" in summary([result])


def test_a_recipe_may_quote_the_five_only_if_it_has_them(tmp_path):
    content = load_recipe("chexpert").model_dump() | {"metric": "chexpert5_auroc"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert load_recipe(path).metric == "chexpert5_auroc"
    content["classes"] = content["classes"][:4]
    for key in ("prompts", "negative_prompts"):
        del content[key]["Pleural Effusion"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match="needs `labels: multi` and Atelectasis"):
        load_recipe(path)


# --- training sets


def test_recipes_name_the_corpora_that_contain_their_sets():
    found = {name: overlaps_of(load_recipe(name).public_sets) for name in recipe_names()}
    assert {name for name, sentences in found.items() if sentences} == {
        "breast_us", "chexpert", "chexpert_5x200", "ms_cxr", "openi", "rocov2", "rsna_pneumonia"
    }  # fmt: skip
    assert found["chexpert_5x200"] == [
        "CheXpert (training part): images of CheXpert are in UniMed (UniMed-CLIP, and MedMoE as published)."
    ]
    assert found["breast_us"] == ["Images of BUSI are in small (the checkpoint small of this package)."]
    assert "BiomedCLIP" in found["rocov2"][1]
    assert "PubMedCLIP" in found["rocov2"][1]
    assert overlaps_of(["CHEXPERT"]) == ["Images of CHEXPERT are in UniMed (UniMed-CLIP, and MedMoE as published)."]
    assert overlaps_of(["CheXpert Plus", "our own"]) == []


def test_recipes_of_medmnist_name_them_too():
    pytest.importorskip("medmnist")
    found = {flag: overlaps_of(load_recipe(f"medmnist:{flag}").public_sets) for flag in ("chestmnist", "bloodmnist")}
    assert found["bloodmnist"] == []
    assert re.search("UniMed .*, small ", found["chestmnist"][0])
    assert "small" in overlaps_of(load_recipe("medmnist:breastmnist_224").public_sets)[0]


def test_the_sets_of_the_packaged_checkpoint_are_those_of_its_card():
    with open(f"{pretrained('small')}/README.md", encoding="utf-8") as file:
        table = re.split(r"^Trained on [\d,]+ images", file.read(), flags=re.MULTILINE)[1].split("\n\n")[1]
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (?:xray|ct|mri|ultrasound|histopathology|fundus) \|", table, re.MULTILINE)
    sources = {row.removesuffix("-chest") for row in rows}
    assert len(sources) == len(corpora()["small"].sets) == 17


def test_reports_warn_once(tmp_path):
    (tmp_path / "test.csv").write_text("file,finding\na.png,normal\nb.png,effusion\n")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    content = {
        "name": "ours", "title": "Ours", "tasks": ["linear-probe"], "modality": "xray", "metric": "accuracy",
        "layout": {"kind": "table", "tables": {"test": "test.csv"}, "image": "{file}", "label": "finding"},
        "classes": ["normal", "effusion"], "expected": "test.csv", "source": "ours", "license": "none",
        "overlaps": ["MIMIC-CXR"], "public_sets": ["MIMIC-CXR (test part)"],
    }  # fmt: skip
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(content))
    (data,) = open_recipe(load_recipe(tmp_path / "ours.yaml"), tmp_path)
    (sentence,) = overlaps_of(["MIMIC-CXR (test part)"])
    assert data.facts["trained_on_by"] == [sentence]
    facts = {**data.facts, "weights": "pretrained", "preprocessing": "x", "prompts": None, "seed": 0, "resamples": 1}
    results = [Result("zero-shot", model, "ours", 2, {}, facts) for model in ("a", "b")]
    expected = f"Ours: {sentence} A model that was trained on them may have seen these images."
    assert to_markdown(results).count(f"**Warning:** {expected}") == 1
    assert summary(results).count(f"warning: {expected}") == 1
    plain = {key: value for key, value in facts.items() if key != "trained_on_by"}
    assert "arning" not in to_markdown([Result("zero-shot", "a", "ours", 2, {}, plain)])
