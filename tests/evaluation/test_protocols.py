"""Protocols: their numbers against plain formulations, their errors, and three kinds of models in one run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from small_encoders import clip_folder, medmoe_folder, open_clip_architecture

from medmoe_hf.common import console
from medmoe_hf.data import MODALITIES, write_webdataset, zero_shot_prompts
from medmoe_hf.evaluation.dataset import EvaluationSet, joined
from medmoe_hf.evaluation.grounding import NONSENSE, grounding
from medmoe_hf.evaluation.linear_probe import linear_probe, own_splits, stratified_part
from medmoe_hf.evaluation.recipes import load_recipe, open_recipe
from medmoe_hf.evaluation.retrieval import retrieval
from medmoe_hf.evaluation.routing import routing
from medmoe_hf.evaluation.suite import PROTOCOLS, evaluate
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier, zero_shot
from medmoe_hf.inference.encoders import load_encoder


class FakeEncoder:
    """Images are their own embeddings; texts are looked up."""

    name, logit_scale, preprocessing, weights = "fake", 3.0, "none", "none"

    def __init__(self, texts):
        self.texts = texts

    def encode_images(self, images):
        return torch.nn.functional.normalize(torch.tensor(np.array(images), dtype=torch.float32), dim=-1)

    def encode_texts(self, texts):
        table = np.array([self.texts[text] for text in texts])
        return torch.nn.functional.normalize(torch.tensor(table, dtype=torch.float32), dim=-1)

    def features(self, images):
        return {"embedding": torch.tensor(np.array(images), dtype=torch.float32)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sixty phantoms as the example writes them."""
    folder = tmp_path_factory.mktemp("scratch")
    write_webdataset(folder / "unseen", shards=1, samples_per_shard=60, seed=2, image_size=64)
    prompts = {modality: zero_shot_prompts(modality) for modality in MODALITIES}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder, open_recipe(load_recipe("phantoms"), folder)


@pytest.fixture(scope="module")
def medmoe(tmp_path_factory):
    return load_encoder(medmoe_folder(tmp_path_factory.mktemp("protocols") / "medmoe"))


# --- zero-shot


def test_a_classifier_encodes_its_prompts_once():
    rng = np.random.default_rng(0)
    prompts = {"a": ["a 0", "a 1"], "b": ["b 0", "b 1", "b 2"]}
    encoder = FakeEncoder({text: rng.normal(size=4) for texts in prompts.values() for text in texts})
    classify = ZeroShotClassifier(encoder, prompts)
    encoder.encode_texts = None
    images = rng.normal(size=(7, 4))
    centres = []
    for texts in prompts.values():
        mean = np.mean([encoder.texts[text] / np.linalg.norm(encoder.texts[text]) for text in texts], axis=0)
        centres.append(mean / np.linalg.norm(mean))
    units = images / np.linalg.norm(images, axis=1, keepdims=True)
    powers = np.exp(3.0 * units @ np.array(centres).T)
    expected = powers / powers.sum(axis=1, keepdims=True)
    for rows in (slice(0, 4), slice(4, 7)):
        np.testing.assert_allclose(classify(images[rows]).numpy(), expected[rows], rtol=1e-5)
    for wrong in ({}, {"a": []}, {"a": "a sentence"}):
        with pytest.raises(ValueError, match="needs a list of sentences"):
            ZeroShotClassifier(encoder, wrong)


def test_zero_shot_is_the_nearest_mean_of_its_prompts():
    rng = np.random.default_rng(0)
    texts = {f"{name} {number}": rng.normal(size=4) for name in "abc" for number in range(3)}
    images = rng.normal(size=(40, 4))
    labels = rng.integers(3, size=40)
    prompts = {name: [f"{name} {number}" for number in range(3)] for name in "abc"}
    data = EvaluationSet("toy", list(images), labels=labels, classes=list("abc"), prompts=prompts)
    result = zero_shot(FakeEncoder(texts), data, resamples=50)

    centres = []
    for name in "abc":
        units = [texts[text] / np.linalg.norm(texts[text]) for text in prompts[name]]
        mean = np.mean(units, axis=0)
        centres.append(mean / np.linalg.norm(mean))
    cosines = images / np.linalg.norm(images, axis=1, keepdims=True) @ np.array(centres).T
    chances = np.exp(3.0 * cosines)
    chances /= chances.sum(axis=1, keepdims=True)
    expected = {
        "accuracy": accuracy_score(labels, cosines.argmax(1)),
        "balanced_accuracy": balanced_accuracy_score(labels, cosines.argmax(1)),
        "macro_f1": f1_score(labels, cosines.argmax(1), average="macro"),
        "macro_auroc": roc_auc_score(labels, chances, multi_class="ovr"),
        "brier": ((chances - np.eye(3)[labels]) ** 2).sum(axis=1).mean(),
    }
    for name, value in expected.items():
        interval = result.metrics[f"global/{name}"]
        assert interval.value == pytest.approx(value, abs=1e-6)
        assert interval.low <= interval.high
    assert {key.split("/")[0] for key in result.metrics} == {"global"}
    assert result.facts["count_by_class"] == {name: int((labels == label).sum()) for label, name in enumerate("abc")}
    assert np.sum(result.confusions["global"].counts) == 40
    assert np.trace(result.confusions["global"].counts) == round(expected["accuracy"] * 40)


def test_zero_shot_measures_the_test_split_only_and_hashes_the_prompts():
    texts = {"yes": [1.0, 0.0], "no": [0.0, 1.0], "never": [0.0, 1.0]}
    images = [[1.0, 0.1], [0.1, 1.0], [1.0, 0.0], [1.0, 0.0]]
    data = EvaluationSet(
        "toy",
        images,
        labels=np.array([0, 1, 1, 1]),
        classes=["p", "n"],
        prompts={"p": ["yes"], "n": ["no"]},
        splits=np.array(["test", "test", "train", "validation"]),
    )
    result = zero_shot(FakeEncoder(texts), data, resamples=10)
    assert result.count == 2
    assert result.metrics["global/accuracy"].value == 1
    other = zero_shot(FakeEncoder(texts), replace(data, prompts={"p": ["yes"], "n": ["never"]}), resamples=10)
    assert other.facts["prompts"] != result.facts["prompts"]
    assert other.facts["preprocessing"] == result.facts["preprocessing"]
    with pytest.raises(ValueError, match="prompts for each of its classes"):
        zero_shot(FakeEncoder(texts), replace(data, prompts={"p": ["yes"]}))
    with pytest.raises(ValueError, match="none of the 4 images is in the test split"):
        zero_shot(FakeEncoder(texts), replace(data, splits=np.array(["train"] * 4)))


def test_zero_shot_of_a_medmoe_has_three_scores_and_its_routing(medmoe, sets):
    data = sets[1][2]
    result = zero_shot(medmoe, data, resamples=20)
    sentences = [sentence for texts in data.prompts.values() for sentence in texts]
    owner = np.array([number for number, texts in enumerate(data.prompts.values()) for _ in texts])
    table = medmoe.local_scores(data.images, sentences).numpy()
    local = np.stack([table[:, owner == number].mean(axis=1) for number in range(len(data.classes))], axis=1)
    texts = medmoe.encode_texts(sentences).numpy()
    means = np.stack([texts[owner == number].mean(axis=0) for number in range(len(data.classes))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = medmoe.logit_scale * medmoe.encode_images(data.images).numpy() @ means.T
    for kind, logits in (("global", cosines), ("local", local), ("mean", (cosines + local) / 2)):
        assert result.metrics[f"{kind}/accuracy"].value == pytest.approx((logits.argmax(1) == data.labels).mean())
    routed = medmoe.route_images(data.images).argmax(dim=1).numpy()
    assert result.metrics["image router/routing_accuracy"].value == pytest.approx((routed == data.modalities).mean())
    assert (
        zero_shot(medmoe, data, scores=("local",), resamples=20).metrics["local/accuracy"]
        == (result.metrics["local/accuracy"])
    )


# --- linear probe


def probe_data(count=300, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    images = rng.normal(size=(count, 5)) + 1.5 * np.eye(5)[labels]
    splits = np.array(["train"] * 200 + ["validation"] * 40 + ["test"] * (count - 240))
    return EvaluationSet("toy", list(images), labels=labels, classes=list("abc"), splits=splits)


def test_linear_probe_of_all_is_the_best_of_the_strengths_by_validation():
    data = probe_data()
    result = linear_probe(FakeEncoder({}), data, fractions=(1.0,), resamples=20)
    images = np.array(data.images)
    part = {name: data.splits == name for name in ("train", "validation", "test")}
    scaler = StandardScaler().fit(images[part["train"]])
    best = None
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100):
        model = LogisticRegression(C=strength, max_iter=5000)
        model.fit(scaler.transform(images[part["train"]]), data.labels[part["train"]])
        chances = model.predict_proba(scaler.transform(images[part["validation"]]))
        loss = -np.log(chances[np.arange(40), data.labels[part["validation"]]]).mean()
        if best is None or loss < best[0]:
            best = (loss, strength, model)
    expected = best[2].score(scaler.transform(images[part["test"]]), data.labels[part["test"]])
    assert result.metrics["embedding 100%/accuracy"].value == pytest.approx(expected)
    assert result.facts["strengths"]["embedding 100%"] == [best[1]]
    assert result.count == 60
    assert result.facts["trained_on"] == {"100%": 200}
    assert expected > 0.7


def test_linear_probe_means_over_seeds_and_is_the_same_twice():
    data = probe_data()
    result = linear_probe(FakeEncoder({}), data, fractions=(0.01, 0.1), seeds=3, resamples=20)
    for variant in ("embedding 1%", "embedding 10%"):
        of_seeds = result.facts["seeds"][variant]
        assert len(of_seeds) == 3
        assert result.metrics[f"{variant}/accuracy"].value == pytest.approx(np.mean(of_seeds))
    again = linear_probe(FakeEncoder({}), data, fractions=(0.01, 0.1), seeds=3, resamples=20)
    assert again.to_json() == result.to_json()


def test_shares_that_are_the_same_training_images_are_known():
    data = probe_data()  # 200 training images of three classes: of 1 % and of 2 % there is one of each
    result = linear_probe(FakeEncoder({}), data, fractions=(0.01, 0.018, 0.1, 1.0), seeds=2, resamples=10)
    assert result.facts["trained_on"]["1%"] == result.facts["trained_on"]["2%"] == 3
    assert result.facts["same_parts"] == [["1%", "2%"]]
    for metric in ("accuracy", "macro_auroc"):
        assert result.metrics[f"embedding 1%/{metric}"] == result.metrics[f"embedding 2%/{metric}"]
    result = linear_probe(FakeEncoder({}), data, fractions=(0.01, 0.1), seeds=2, resamples=10)
    assert result.facts["same_parts"] == []


def test_parts_are_stratified_nested_in_the_split_and_never_without_a_class():
    labels = np.array([0] * 200 + [1] * 50 + [2] * 3)
    rows = stratified_part(labels, 0.1, seed=1)
    assert np.bincount(labels[rows]).tolist() == [20, 5, 1]
    assert np.bincount(labels[stratified_part(labels, 0.001, seed=1)]).tolist() == [1, 1, 1]
    assert not np.array_equal(rows, stratified_part(labels, 0.1, seed=2))
    assert stratified_part(labels, 1.0, seed=1).tolist() == list(range(253))
    with pytest.raises(ValueError, match="fraction"):
        stratified_part(labels, 0.0, seed=1)


def test_own_splits_keep_subjects_together_and_classes_everywhere():
    labels = np.repeat(np.arange(3), 40)
    subjects = [f"s{row // 2}" for row in range(120)]
    data = own_splits(EvaluationSet("toy", [0] * 120, labels=labels, classes=list("abc"), subjects=subjects), seed=0)
    of_subject = {}
    for subject, split in zip(subjects, data.splits.tolist(), strict=True):
        assert of_subject.setdefault(subject, split) == split
    for label in range(3):
        counts = {name: int((data.splits[labels == label] == name).sum()) for name in ("train", "validation", "test")}
        assert counts == {"train": 20, "validation": 8, "test": 12}


def test_linear_probe_names_what_is_missing():
    data = probe_data()
    with pytest.raises(ValueError, match="needs a validation split"):
        linear_probe(
            FakeEncoder({}), replace(data, splits=np.where(data.splits == "validation", "train", data.splits))
        )
    with pytest.raises(ValueError, match="no image of d"):
        linear_probe(FakeEncoder({}), replace(data, classes=list("abcd")))
    with pytest.raises(ValueError, match="needs labels"):
        linear_probe(FakeEncoder({}), replace(data, labels=None))


# --- retrieval


def test_retrieval_by_brute_force_with_equal_captions_and_files_in_several_rows(tmp_path):
    rng = np.random.default_rng(3)
    files = ["a", "a", "b", "c", "d", "e", "f", "g"]
    captions = ["one", "two", "one", "three", "four", "five", "five", "six"]
    vectors = {name: rng.normal(size=3) for name in {*files, *captions}}

    class ByFile(FakeEncoder):
        def encode_images(self, images):
            return super().encode_images([vectors[str(image)] for image in images])

    data = EvaluationSet("toy", files, captions=captions, labels=np.array([0, 0, 0, 1, 1, 1, 0, 1]))
    result = retrieval(ByFile(vectors), data, resamples=30)
    unit = {name: vector / np.linalg.norm(vector) for name, vector in vectors.items()}
    table = np.array([[unit[file] @ unit[caption] for caption in captions] for file in files])
    belongs = {(file, caption) for file, caption in zip(files, captions, strict=True)}
    right = np.array([[(file, caption) in belongs for caption in captions] for file in files])
    for direction, scores, hits in (("image_to_text", table, right), ("text_to_image", table.T, right.T)):
        places = [sum(row[~hit] >= row[hit].max()) for row, hit in zip(scores, hits, strict=True)]
        for k in (1, 5, 10):
            assert result.metrics[f"global/{direction}_r{k}"].value == np.mean(np.array(places) < k)
        assert result.metrics[f"global/{direction}_median_rank"].value == np.median(places) + 1
    same = data.labels[:, None] == data.labels[None, :]
    # Equal captions score the same: of these the wrong ones come first.
    best = np.array([np.lexsort((row, -scores))[:5] for row, scores in zip(same, table, strict=True)])
    same = np.take_along_axis(same, best, axis=1)
    assert result.metrics["global/precision_at_5"].value == pytest.approx(same.mean())
    assert "global/precision_at_10" not in result.metrics
    with pytest.raises(ValueError, match="caption for each image"):
        retrieval(FakeEncoder({}), replace(data, captions=None))


def test_retrieval_of_a_medmoe_averages_its_own_two_similarities(medmoe, sets):
    data = joined(sets[1], "phantoms")
    result = retrieval(medmoe, data, resamples=20)
    cosines = medmoe.logit_scale * medmoe.encode_images(data.images) @ medmoe.encode_texts(data.captions).T
    tables = {"global": cosines, "local": medmoe.local_scores(data.images, data.captions)}
    tables["mean"] = (tables["global"] + tables["local"]) / 2
    right = np.array([[one == other for other in data.captions] for one in data.captions])
    for kind, table in tables.items():
        scores = table.numpy()
        hits = np.mean([sum(row[~hit] >= row[hit].max()) < 5 for row, hit in zip(scores, right, strict=True)])
        assert result.metrics[f"{kind}/image_to_text_r5"].value == pytest.approx(hits)


# --- grounding and routing


def test_grounding_counts_peaks_in_boxes_and_the_control(medmoe, sets):
    data = joined(sets[1], "phantoms")
    result = grounding(medmoe, data, resamples=20)
    rows = [row for row in range(len(data)) if data.phrases[row]]
    assert result.count == len(rows) < len(data)

    def hits(words):
        maps = medmoe.heatmaps(
            [data.images[row] for row in rows],
            words,
            [data.references[row] for row in rows],
            data.modalities[rows].tolist(),
        )
        found = []
        for heatmap, row in zip(maps, rows, strict=True):
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            left, top, right, bottom = data.boxes[row][0]
            found.append(left <= x < right and top <= y < bottom)
        return np.mean(found)

    pointing = hits([data.phrases[row] for row in rows])
    control = np.mean([hits([word] * len(rows)) for word in NONSENSE])
    assert result.metrics["phrase/pointing"].value == pytest.approx(pointing)
    assert result.metrics["nonsense/pointing"].value == pytest.approx(control)
    assert result.metrics["phrase - nonsense/pointing"].value == pytest.approx(pointing - control)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) / 64**2 for box in (data.boxes[row][0] for row in rows)]
    assert result.metrics["chance/pointing"].value == pytest.approx(np.mean(areas), rel=0.1)
    by_modality = [result.metrics[f"phrase, {name}/pointing"] for name in MODALITIES]
    weighted = sum(interval.value * interval.n for interval in by_modality)
    assert weighted / sum(interval.n for interval in by_modality) == pytest.approx(pointing)
    assert {example.label for example in result.examples} == set(MODALITIES)


def test_grounding_detects_maps_that_do_not_depend_on_words(sets, medmoe, monkeypatch):
    data = joined(sets[1], "phantoms")
    rng = np.random.default_rng(0)
    shared = rng.random((64, 64))
    monkeypatch.setattr(type(medmoe), "heatmaps", lambda self, images, *rest: [shared] * len(images))
    result = grounding(medmoe, data, resamples=20)
    assert result.metrics["nonsense/same_map"].value == pytest.approx(1)
    assert result.metrics["phrase - nonsense/pointing"].value == pytest.approx(0, abs=1e-12)
    assert result.metrics["phrase - nonsense/mean_iou"].value == pytest.approx(0, abs=1e-12)


def test_several_boxes_are_one_region(medmoe, monkeypatch):
    heatmap = np.zeros((10, 10))
    heatmap[8, 8] = 1
    monkeypatch.setattr(type(medmoe), "heatmaps", lambda self, images, *rest: [heatmap] * len(images))
    boxes = [[(0, 0, 2, 2), (7, 7, 10, 10)], [(0, 0, 2, 2)], []]
    images = [Image.new("L", (10, 10))] * 3
    data = EvaluationSet("toy", images, phrases=["x", "y", "z"], boxes=boxes)
    result = grounding(medmoe, data, resamples=20)
    assert result.count == 2
    assert result.metrics["phrase/pointing"].value == 0.5
    with pytest.raises(ValueError, match="both a phrase and a box"):
        grounding(medmoe, replace(data, phrases=["", "", ""]))
    with pytest.raises(ValueError, match="only a MedMoE"):
        grounding(FakeEncoder({}), data)


def test_slow_steps_have_progress_bars(tmp_path, sets, medmoe, monkeypatch, capsys):
    monkeypatch.setitem(console.progress.__kwdefaults__, "delay", 0)
    data = sets[1][2]
    shown = {}
    for name, run in PROTOCOLS.items():
        of_labels = name == "linear-probe"
        run(FakeEncoder({}) if of_labels else medmoe, probe_data() if of_labels else data, resamples=5)
        shown[name] = capsys.readouterr().err
    assert all("bootstrap:" in bars for bars in shown.values())
    assert all("images:" in shown[name] for name in ("zero-shot", "retrieval", "routing"))
    assert all("local similarity:" in shown[name] for name in ("zero-shot", "retrieval"))
    assert "texts:" in shown["zero-shot"]
    assert "reports:" in shown["routing"]
    assert "heat-maps:" in shown["grounding"]
    assert "linear probes:" in shown["linear-probe"]
    # Fast steps have none.
    monkeypatch.undo()
    medmoe.encode_images(data.images)
    assert capsys.readouterr().err == ""


def test_routing_of_images_and_reports(medmoe, sets):
    data = joined(sets[1], "phantoms")
    unknown = data.modalities.copy()
    unknown[:7] = -100
    result = routing(medmoe, replace(data, modalities=unknown), resamples=20)
    assert result.count == len(data) - 7
    for variant, ask, items in (
        ("image router", medmoe.route_images, data.images),
        ("report router", medmoe.route_texts, data.captions),
    ):
        chances = ask(items[7:]).numpy()
        truth = data.modalities[7:]
        assert result.metrics[f"{variant}/accuracy"].value == pytest.approx((chances.argmax(1) == truth).mean())
        counts = np.array(result.confusions[variant].counts)
        assert counts.sum(axis=1).tolist() == np.bincount(truth, minlength=6).tolist()
        assert sum(row["count"] for row in result.calibrations[variant]["bins"]) == result.count
    with pytest.raises(ValueError, match="has no router"):
        routing(FakeEncoder({}), data)
    with pytest.raises(ValueError, match="modality is known"):
        routing(medmoe, replace(data, modalities=None))


# --- intervals by subject, in every protocol


def repeated(data, times):
    """Each image `times` times over, as rows of one subject; subjects sort like the images."""
    rows = np.repeat(np.arange(len(data)), times)
    columns = {"images", "captions", "labels", "modalities", "splits", "boxes", "phrases", "references"}
    taken = {
        name: value[rows] if isinstance(value, np.ndarray) else [value[row] for row in rows]
        for name in columns
        if (value := getattr(data, name)) is not None
    }
    return replace(data, subjects=[f"subject {row:03d}" for row in rows], **taken)


@pytest.mark.parametrize("protocol", ["zero-shot", "linear-probe", "retrieval", "grounding", "routing"])
def test_repeated_rows_of_a_subject_do_not_narrow_intervals(protocol, medmoe, sets):
    everything = joined(sets[1], "phantoms")
    few = np.array(["test" if row % 4 == 0 else "train" for row in range(len(everything))])
    encoder, data, settings = {
        "zero-shot": (medmoe, sets[1][2], {}),
        "linear-probe": (FakeEncoder({}), probe_data(), {"fractions": (0.1, 1.0), "seeds": 2}),
        "retrieval": (medmoe, replace(everything, splits=few, labels=None).split("test"), {}),
        "grounding": (medmoe, replace(everything, splits=few).split("test"), {}),
        "routing": (medmoe, everything, {}),
    }[protocol]
    data = replace(data, subjects=None)
    if protocol == "linear-probe":
        # Fits must not change: only test images stand there three times.
        test = data.splits == "test"
        both = joined([replace(data.split(name), subjects=None) for name in ("train", "validation")], "toy")
        again = joined([replace(both, subjects=["-"] * len(both)), repeated(data.split("test"), 3)], "toy")
        assert (again.splits == "test").sum() == 3 * test.sum()
    else:
        again = repeated(data, 3)
    run = PROTOCOLS[protocol]
    once = run(encoder, data, resamples=30, **settings).metrics
    thrice = run(encoder, again, resamples=30, **settings).metrics
    assert once.keys() == thrice.keys()
    compared = 0
    for name, expected in once.items():
        found = thrice[name]
        # The same number of subjects is drawn, by the same random numbers: counted by rows it would be three times
        # as many, and narrower intervals.
        assert found.n == expected.n, name
        if protocol == "retrieval" and not name.endswith("_r1"):
            continue  # two more wrong candidates for each one before
        numbers = [(one.value, one.low, one.high) for one in (found, expected)]
        np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-5, err_msg=name)
        compared += expected.low < expected.high
    assert compared


# --- several models in one run


def test_three_kinds_of_models_side_by_side_in_one_run(tmp_path, sets):
    pytest.importorskip("open_clip")
    models = [
        medmoe_folder(tmp_path / "medmoe"),
        clip_folder(tmp_path / "clip"),
        f"open_clip:{open_clip_architecture(tmp_path)}",
    ]
    lines: list[str] = []
    tasks = ["zero-shot", "retrieval", "routing"]
    results = evaluate(models, "phantoms", sets[0], tasks, resamples=20, report=lines.append)
    names = [f"{tmp_path.name}/medmoe", f"{tmp_path.name}/clip", "open_clip:medmoe-test-tiny"]
    for protocol, per_model in (("zero-shot", 6), ("retrieval", 1)):
        found = [result.model for result in results if result.protocol == protocol]
        assert found == [name for name in names for _ in range(per_model)]
    assert [result.model for result in results if result.protocol == "routing"] == names[:1]
    assert sum("left out" in line for line in lines) == 2
    assert results[6 + 2].facts["prompts"] == results[0].facts["prompts"]  # the same texts for every model
    assert all(
        np.isfinite(result.metrics["global/image_to_text_r10"].value)
        for result in results
        if result.protocol == "retrieval"
    )
    again = evaluate(models[1:], "phantoms", sets[0], ["zero-shot"], resamples=20, report=lines.append)
    expected = [result.to_json() for result in results if result.protocol == "zero-shot"][6:]
    assert [result.to_json() for result in again] == expected
    with pytest.raises(FileExistsError, match=tmp_path.name):
        evaluate(["not looked for"], "phantoms", sets[0], output=tmp_path)
    with pytest.raises(ValueError, match="does not support nonsense"):
        evaluate(models, "phantoms", sets[0], ["nonsense"])
