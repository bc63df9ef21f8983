"""Multi-label sets: tables of findings, metrics against scikit-learn's, zero-shot and linear probe."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from small_encoders import medmoe_folder

from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL, EvaluationSet
from medmoe_hf.evaluation.linear_probe import STRENGTHS, linear_probe, multilabel_part, own_splits
from medmoe_hf.evaluation.metrics import multilabel_metrics
from medmoe_hf.evaluation.recipes import RecipeError, check_recipe, load_recipe, open_recipe
from medmoe_hf.evaluation.report import summary, to_markdown, write
from medmoe_hf.evaluation.retrieval import retrieval
from medmoe_hf.evaluation.zero_shot import multilabel_logits, zero_shot
from medmoe_hf.inference.encoders import load_encoder

FINDINGS = ["edema", "effusion", "lung/heart"]


class FakeEncoder:
    """Images are their own embeddings; texts are looked up."""

    name, logit_scale, preprocessing, weights = "fake", 3.0, "none", "none"

    def __init__(self, texts=None):
        self.texts = texts

    def encode_images(self, images):
        return torch.nn.functional.normalize(torch.tensor(np.array(images), dtype=torch.float32), dim=-1)

    def encode_texts(self, texts):
        return self.encode_images([self.texts[text] for text in texts])

    def features(self, images):
        return {"embedding": torch.tensor(np.array(images), dtype=torch.float32)}


def findings(count=240, seed=0):
    """Findings that overlap, with some unknown, and features that show them; two images per subject."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < (0.4, 0.5, 0.2)).astype(np.int64)
    images = rng.normal(size=(count, 5)) + 2.0 * labels @ np.eye(5)[:3]
    labels[rng.random((count, 3)) < 0.1] = UNKNOWN_LABEL
    prompts = {name: [f"{name} {number}" for number in range(2)] for name in FINDINGS}
    negatives = {name: [f"no {name}"] for name in FINDINGS}
    texts = {
        text: rng.normal(size=5) for by_class in (prompts, negatives) for own in by_class.values() for text in own
    }
    data = EvaluationSet(
        "toy",
        list(images),
        labels=labels,
        classes=FINDINGS,
        prompts=prompts,
        negative_prompts=negatives,
        splits=np.array(["train"] * (count // 2) + ["validation"] * (count // 6) + ["test"] * (count // 3)),
        subjects=[f"s{row // 2}" for row in range(count)],
    )
    return data, texts


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# --- metrics


def test_metrics_are_those_of_scikit_learn_on_the_known_rows():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(80, 3)).round(1)  # with ties
    labels = rng.integers(2, size=(80, 3))
    labels[rng.random((80, 3)) < 0.2] = UNKNOWN_LABEL
    found = multilabel_metrics(scores, labels, FINDINGS)
    for metric, expected in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        values = []
        for index, name in enumerate(FINDINGS):
            known = labels[:, index] != UNKNOWN_LABEL
            values.append(expected(labels[known, index], scores[known, index]))
            assert found[f"{name}/{metric}"] == pytest.approx(values[-1])
        assert found[f"macro_{metric}"] == pytest.approx(np.mean(values))
    complete = np.where(labels == UNKNOWN_LABEL, 0, labels)
    found = multilabel_metrics(scores, complete, FINDINGS)
    assert found["macro_auroc"] == pytest.approx(roc_auc_score(complete, scores, average="macro"))
    assert found["macro_average_precision"] == pytest.approx(
        average_precision_score(complete, scores, average="macro")
    )


def test_a_finding_that_is_always_or_never_present_has_no_metrics_and_is_left_out_of_the_mean():
    scores = np.array([[0.9, 0.1, 0.2], [0.1, 0.4, 0.3], [0.3, 0.3, 0.9]])
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, UNKNOWN_LABEL, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = multilabel_metrics(scores, labels, FINDINGS)
    assert found["macro_auroc"] == found["edema/auroc"] == 1
    assert np.isnan(found["effusion/auroc"])
    assert np.isnan(found["lung/heart/average_precision"])
    scores[0, 0] = np.nan
    assert np.isnan(multilabel_metrics(scores, labels, FINDINGS)["macro_auroc"])
    with pytest.raises(ValueError, match="labels \\(N, C\\) and C names"):
        multilabel_metrics(scores, labels[:, 0], FINDINGS)
    with pytest.raises(ValueError, match="1 \\(present\\), 0 \\(absent\\) or -100"):
        multilabel_metrics(scores, labels - 1, FINDINGS)


# --- zero-shot


@pytest.mark.parametrize("with_negatives", [True, False])
def test_zero_shot_compares_positive_with_negative_prompts_or_takes_the_similarity(with_negatives):
    data, texts = findings()
    if not with_negatives:
        data = replace(data, negative_prompts={})
    result = zero_shot(FakeEncoder(texts), data, resamples=60)
    test = data.splits == "test"
    images, labels = unit(np.array(data.images)[test]), data.labels[test]

    def similarity(by_class):
        centres = unit(
            np.stack([unit(np.array([texts[text] for text in by_class[name]])).mean(0) for name in FINDINGS])
        )
        return 3.0 * images @ centres.T

    scores = similarity(data.prompts) - (similarity(data.negative_prompts) if with_negatives else 0)
    macro = []
    for index, name in enumerate(FINDINGS):
        known = labels[:, index] != UNKNOWN_LABEL
        macro.append(roc_auc_score(labels[known, index], scores[known, index]))
        interval = result.metrics[f"global, {name}/auroc"]
        assert interval.value == pytest.approx(macro[-1], abs=1e-6)
        assert interval.low < interval.value < interval.high
        assert interval.rows == known.sum()
        subjects = np.array(data.subjects)[test][known]
        assert interval.n == len(set(subjects))
        expected = average_precision_score(labels[known, index], scores[known, index])
        assert result.metrics[f"global, {name}/average_precision"].value == pytest.approx(expected, abs=1e-6)
    assert result.metrics["global/macro_auroc"].value == pytest.approx(np.mean(macro), abs=1e-6)
    assert result.metrics["global/macro_auroc"].n == test.sum() // 2
    assert result.count == test.sum()
    assert result.facts["count_by_class"] == {name: int((labels[:, i] == 1).sum()) for i, name in enumerate(FINDINGS)}
    assert result.facts["known_by_class"] == {name: int((labels[:, i] >= 0).sum()) for i, name in enumerate(FINDINGS)}
    assert not result.confusions


def test_negative_prompts_are_part_of_the_hash_and_belong_to_the_same_findings():
    data, texts = findings()
    result = zero_shot(FakeEncoder(texts), data, resamples=5)
    assert (
        zero_shot(FakeEncoder(texts), replace(data, negative_prompts={}), resamples=5).facts["prompts"]
        != (result.facts["prompts"])
    )
    with pytest.raises(ValueError, match="for each of the classes, or for none"):
        zero_shot(FakeEncoder(texts), replace(data, negative_prompts={"edema": ["no edema"]}))
    with pytest.raises(ValueError, match="must have the findings of `prompts`"):
        multilabel_logits(FakeEncoder(texts), data.images, data.prompts, {"edema": ["no edema"]})


def test_a_medmoe_has_all_three_scores(tmp_path):
    encoder = load_encoder(medmoe_folder(tmp_path / "medmoe"))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(255, size=(64, 64, 3), dtype=np.uint8)) for _ in range(6)]
    prompts = {"edema": ["Pulmonary edema.", "Congestion."], "effusion": ["A pleural effusion."]}
    negatives = {"edema": ["No edema."], "effusion": ["No effusion."]}
    found = multilabel_logits(encoder, images, prompts, negatives)
    local = encoder.local_scores(images, ["Pulmonary edema.", "Congestion.", "A pleural effusion."])
    local = torch.stack([local[:, :2].mean(1), local[:, 2]], 1) - encoder.local_scores(
        images, ["No edema.", "No effusion."]
    )
    torch.testing.assert_close(found["local"], local)
    torch.testing.assert_close(found["mean"], (found["global"] + found["local"]) / 2)
    assert list(multilabel_logits(encoder, images, prompts, negatives, scores=("local",))) == ["local"]


# --- linear probe


def test_the_probe_fits_each_finding_on_its_known_images():
    data, _ = findings()
    result = linear_probe(FakeEncoder(), data, fractions=(1.0,), resamples=30)
    images = np.array(data.images, dtype=np.float32).astype(np.float64)
    parts = {name: data.splits == name for name in ("train", "validation", "test")}
    for index, name in enumerate(FINDINGS):
        rows = {part: own & (data.labels[:, index] >= 0) for part, own in parts.items()}
        scaler = StandardScaler().fit(images[rows["train"]])
        best = None
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=5000)
            model.fit(scaler.transform(images[rows["train"]]), data.labels[rows["train"], index])
            chances = model.predict_proba(scaler.transform(images[rows["validation"]]))
            loss = log_loss(data.labels[rows["validation"], index], chances, labels=[0, 1])
            if best is None or loss < best[0]:
                best = (loss, strength, model)
        scores = best[2].predict_proba(scaler.transform(images[rows["test"]]))[:, 1]
        expected = roc_auc_score(data.labels[rows["test"], index], scores)
        assert result.metrics[f"embedding 100%, {name}/auroc"].value == pytest.approx(expected, abs=2e-3)
        assert result.facts["strengths"]["embedding 100%"][0][index] == best[1]
        assert expected > 0.6
    macro = np.mean([result.metrics[f"embedding 100%, {name}/auroc"].value for name in FINDINGS])
    assert result.metrics["embedding 100%/macro_auroc"].value == pytest.approx(macro)


def test_the_probe_means_over_draws_and_needs_no_validation_for_one_strength():
    data, _ = findings()
    data = replace(data, splits=np.where(data.splits == "validation", "train", data.splits))
    with pytest.raises(ValueError, match="needs a validation split"):
        linear_probe(FakeEncoder(), data, fractions=(0.1,), seeds=3, resamples=5)
    result = linear_probe(FakeEncoder(), data, fractions=(0.1, 1.0), seeds=3, resamples=10, strengths=(1.0,))
    for_seeds = result.facts["seeds"]["embedding 10%"]
    assert len(for_seeds) == 3
    assert result.metrics["embedding 10%/macro_auroc"].value == pytest.approx(np.mean(for_seeds))
    assert result.facts["seed_metric"] == "macro_auroc"
    assert (
        result.to_json()
        == linear_probe(FakeEncoder(), data, fractions=(0.1, 1.0), seeds=3, resamples=10, strengths=(1.0,)).to_json()
    )
    never = data.labels.copy()
    never[:, 1] = np.where(never[:, 1] == 1, 0, never[:, 1])
    with pytest.raises(ValueError, match="no image with effusion"):
        linear_probe(FakeEncoder(), replace(data, labels=never), strengths=(1.0,))


def test_parts_have_every_finding_present_and_absent():
    labels = np.zeros((300, 2), dtype=np.int64)
    labels[5, 0] = 1
    labels[:, 1] = 1
    labels[7, 1] = 0
    for seed in range(5):
        rows = multilabel_part(labels, 0.05, seed)
        assert {5, 7} <= set(rows.tolist())
        assert 15 <= len(rows) <= 17
        assert sorted(set(rows.tolist())) == rows.tolist()
    assert multilabel_part(labels, 1.0, 0).tolist() == list(range(300))
    with pytest.raises(ValueError, match="fraction"):
        multilabel_part(labels, 1.5, 0)


def test_own_splits_spread_rare_findings_and_keep_subjects_together():
    labels = np.zeros((200, 2), dtype=np.int64)
    labels[:20, 0] = 1
    labels[:, 1] = np.arange(200) % 2
    subjects = [f"s{row // 2}" for row in range(200)]
    data = own_splits(EvaluationSet("toy", [0] * 200, labels=labels, classes=["rare", "often"], subjects=subjects), 0)
    counts = {name: int((data.splits[:20] == name).sum()) for name in ("train", "validation", "test")}
    assert counts == {"train": 10, "validation": 4, "test": 6}
    of_subject = dict(zip(subjects, data.splits.tolist(), strict=True))
    assert [of_subject[subject] for subject in subjects] == data.splits.tolist()


# --- reports


def test_reports_have_a_row_per_finding(tmp_path):
    data, texts = findings()
    encoder = FakeEncoder(texts)
    results = [zero_shot(encoder, data, resamples=20), linear_probe(encoder, data, (0.1, 1.0), seeds=2, resamples=20)]
    write(results, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "linear-probe.png"}
    text = to_markdown(results)
    known = results[0].facts["known_by_class"]["edema"]
    assert any(line.startswith(f"| toy | {known} (") and "| global, edema |" in line for line in text.splitlines())
    assert f"edema {results[0].facts['count_by_class']['edema']} of {known}, effusion" in text
    assert "standard deviation of the macro AUROC over draws: embedding 10%" in text
    short = summary(results)
    assert "AUROC" in short
    assert "global, lung/heart" in short
    assert "embedding 10%, edema" not in short
    assert "roc_auc" in {entry.metric_type for entry in results[0].to_eval_results()}


def test_retrieval_leaves_out_precision_by_class():
    data, texts = findings()
    captions = [f"caption {row}" for row in range(len(data))]
    texts |= {caption: np.ones(5) for caption in captions}
    result = retrieval(FakeEncoder(texts), replace(data, captions=captions), resamples=5)
    assert not any("precision" in name for name in result.metrics)


# --- recipes


def chexpert(folder, cells=("1.0", "", "-1.0", "0.0", "")):
    rows = [
        "valid/patient64541/study1/view1_frontal.jpg,Frontal,1.0,0.0,0.0,0.0,1.0",
        "valid/patient64541/study1/view2_lateral.jpg,Lateral,1.0,0.0,0.0,0.0,1.0",
        "valid/patient64542/study1/view1_frontal.jpg,Frontal," + ",".join(cells),
    ]
    root = folder / "CheXpert-v1.0"
    header = "Path,Frontal/Lateral,Atelectasis,Cardiomegaly,Consolidation,Edema,Pleural Effusion"
    for row in (rows[0], rows[2]):
        path = root / row.split(",")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(path)
    (root / "valid.csv").write_text("\n".join([header, *(f"CheXpert-v1.0/{row}" for row in rows)]) + "\n")
    return root


def test_chexpert_reads_several_findings_of_an_image(tmp_path):
    chexpert(tmp_path)
    recipe = load_recipe("chexpert")
    (found,) = open_recipe(recipe, tmp_path)
    assert found.multi_label
    assert found.labels.tolist() == [[1, 0, 0, 0, 1], [1, 0, UNKNOWN_LABEL, 0, 0]]
    assert found.subjects == ["patient64541", "patient64542"]
    assert list(found.prompts) == list(found.negative_prompts) == found.classes
    assert found.facts["metric"] == "macro_auroc"
    warnings_ = check_recipe(recipe, tmp_path)
    assert all(message.startswith("warning: ") for message in warnings_)
    assert any("the train split is left out" in message for message in warnings_)


def test_an_invalid_cell_is_a_problem(tmp_path):
    chexpert(tmp_path, ("1.0", "maybe", "0", "0", "0"))
    (message, *_) = check_recipe(load_recipe("chexpert"), tmp_path)
    assert "1 labels cannot be read: the columns of the classes should contain 1, 0, -1 or nothing" in message
    assert '"maybe" in Cardiomegaly' in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "accuracy"}, "`metric` must be macro_auroc or"),
        ({"labels": "single"}, "go with `labels: multi` only"),
        ({"metric": "balanced_accuracy"}, "`metric` must be macro_auroc or macro_average_precision"),
        ({"negative_prompts": {"Edema": ["No edema."]}}, "`negative_prompts` must hold sentences for each"),
        ({"layout": {"kind": "folder"}}, "`labels: multi` needs `layout` of kind table"),
        ({"labels": "both"}, "labels"),
    ],
)
def test_inconsistent_multi_label_recipes_are_refused(tmp_path, change, message):
    content = load_recipe("chexpert").model_dump() | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "mine.yaml")


def test_how_uncertain_and_empty_cells_are_read_is_a_choice(tmp_path):
    chexpert(tmp_path)
    content = load_recipe("chexpert").model_dump()
    content["layout"] |= {"uncertain": "positive", "empty": "unknown"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (found,) = open_recipe(load_recipe(tmp_path / "mine.yaml"), tmp_path)
    assert found.labels[1].tolist() == [1, UNKNOWN_LABEL, 1, 0, UNKNOWN_LABEL]
