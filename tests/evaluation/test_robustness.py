"""Robustness reports against loops over images, and corruptions against their formulas."""

import csv
import json
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from typer.testing import CliRunner

import medmoe_hf.evaluation.suite as suite
from medmoe_hf.cli import app
from medmoe_hf.evaluation.dataset import UNKNOWN_LABEL, EvaluationSet, joined
from medmoe_hf.evaluation.recipes import RecipeError, load_recipe, open_recipe
from medmoe_hf.evaluation.robustness import CORRUPTIONS, compare, corrupt, robustness
from medmoe_hf.evaluation.robustness.comparison import drawn_rows
from medmoe_hf.evaluation.robustness.corruptions import CorruptedImages
from medmoe_hf.evaluation.robustness.subgroups import banded
from medmoe_hf.inference.batching import read_picture

CLASSES = ["normal", "Pleural_Effusion", "mass"]


class PixelEncoder:
    """Images are 4x4 gray pixels; texts are vectors drawn by their letters."""

    logit_scale, preprocessing, weights = 4.0, "none", "none"

    def __init__(self, name="pixels", seed=0):
        self.name, self.seed = name, seed

    def encode_images(self, images):
        listed = images[0 : len(images)]
        small = [np.asarray(read_picture(image).convert("L").resize((4, 4), Image.Resampling.BOX)) for image in listed]
        pixels = torch.tensor(np.stack(small), dtype=torch.float32).reshape(len(listed), 16)
        return torch.nn.functional.normalize(pixels - 100.0, dim=-1)

    def encode_texts(self, texts):
        rows = [np.random.default_rng([crc32(text.encode()), self.seed]).normal(size=16) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=-1)


@pytest.fixture(scope="module")
def data():
    """Ninety images of thirty subjects, which the encoder classifies better than by chance."""
    rng = np.random.default_rng(0)
    prompts = {name: [f"{name} {number}" for number in range(2 + place)] for place, name in enumerate(CLASSES)}
    labels = rng.integers(3, size=90)
    encoder = PixelEncoder()
    images = []
    for label in labels:
        towards = encoder.encode_texts(prompts[CLASSES[label]]).numpy().mean(axis=0)
        pixels = 100 + 250 * towards + rng.normal(scale=40, size=16)
        tile = pixels.clip(0, 255).round().astype(np.uint8).reshape(4, 4)
        images.append(Image.fromarray(np.kron(tile, np.ones((10, 12), dtype=np.uint8))))
    return EvaluationSet(
        "toy",
        images,
        labels=labels,
        classes=CLASSES,
        prompts=prompts,
        subjects=[f"s{row // 3}" for row in range(90)],
        groups={"sex": (["F"] * 30 + ["M"] * 45 + ["X"] * 3 + [""] * 12)},
    )


def unit(table):
    return table / np.linalg.norm(table, axis=-1, keepdims=True)


def plain_logits(encoder, images, prompts):
    """Image by image and class by class, in float64."""
    table = []
    for image in images:
        embed = encoder.encode_images([image])[0].double().numpy()
        row = []
        for sentences in prompts.values():
            centre = np.mean([encoder.encode_texts([text])[0].double().numpy() for text in sentences], axis=0)
            row.append(encoder.logit_scale * embed @ unit(centre))
        table.append(row)
    return np.array(table)


def plain_softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def parts(results):
    return {result.protocol: result for result in results}


# --- corruptions


def photo(seed=0, side=(48, 64)):
    pixels = np.random.default_rng(seed).integers(40, 200, size=(side[0] // 8, side[1] // 8, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), dtype=np.uint8)))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_repeatable_and_grows_with_its_severity(name):
    image = photo(side=(144, 160))
    errors = []
    for severity in range(1, 6):
        found = corrupt(image, name, severity, seed=3, sample=7)
        assert found.size == image.size
        assert found.mode == "RGB"
        assert found == corrupt(image, name, severity, seed=3, sample=7)
        errors.append(np.square(np.asarray(found, dtype=float) - np.asarray(image)).mean())
    assert errors[0] > 0
    assert errors == sorted(errors)
    assert image == photo(side=(144, 160))  # unchanged


@pytest.mark.parametrize("name", ["noise", "speckle", "brightness", "gamma", "rotation", "text"])
def test_draws_depend_on_the_image_and_the_seed(name):
    image = photo()
    different = {corrupt(image, name, 5, seed=seed, sample=sample).tobytes() for seed in (0, 1) for sample in range(5)}
    assert len(different) >= 2
    assert len({corrupt(image, name, 5, sample=sample).tobytes() for sample in range(12)}) >= 2


def test_gray_curves_are_their_formulas():
    image = photo()
    pixels = np.asarray(image, dtype=float)
    shifts = {tuple(np.clip(pixels + sign * 255 * 0.3, 0, 255).round().astype(np.uint8).ravel()) for sign in (-1, 1)}
    powers = {tuple((255 * (pixels / 255) ** power).round().astype(np.uint8).ravel()) for power in (2.0, 1 / 2.0)}
    for name, expected in (("brightness", shifts), ("gamma", powers)):
        found = {tuple(np.asarray(corrupt(image, name, 3, sample=sample)).ravel()) for sample in range(12)}
        assert found == expected  # both directions are drawn
    flatter = pixels.mean() + 0.45 * (pixels - pixels.mean())
    assert np.array_equal(np.asarray(corrupt(image, "contrast", 3)), flatter.round().astype(np.uint8))
    turned = {tuple(image.rotate(angle, Image.Resampling.BILINEAR).tobytes()) for angle in (-15, 15)}
    assert {tuple(corrupt(image, "rotation", 3, sample=sample).tobytes()) for sample in range(12)} == turned


def test_noise_has_its_strength_and_is_gray_in_gray_images():
    gray = Image.new("RGB", (80, 60), (128, 128, 128))
    found = np.asarray(corrupt(gray, "noise", 2), dtype=float)
    assert (found == found[..., :1]).all()
    assert found.std() == pytest.approx(255 * 0.08, rel=0.1)
    speckled = np.asarray(corrupt(gray, "speckle", 1), dtype=float)
    assert speckled.std() == pytest.approx(128 * 0.1, rel=0.1)
    assert np.asarray(corrupt(Image.new("RGB", (80, 60)), "speckle", 5)).max() == 0  # black stays black
    coloured = np.asarray(corrupt(Image.new("RGB", (80, 60), (120, 128, 128)), "noise", 2))
    assert (coloured[..., 1] != coloured[..., 2]).any()
    # In large images noise has cells as large as what a model sees of them.
    large = np.asarray(corrupt(Image.new("L", (600, 520), 128), "noise", 2))
    assert np.array_equal(large[0::2, 0::2], large[1::2, 1::2])


def test_corrupted_images_are_made_one_by_one_and_read_once(monkeypatch):
    images, versions = [photo(0), photo(1)], [("noise", 1), ("jpeg", 5), ("text", 3)]
    expected = [
        corrupt(image, name, severity, seed=4, sample=sample)
        for sample, image in enumerate(images)
        for name, severity in versions
    ]
    made = CorruptedImages(images, versions, seed=4)
    assert len(made) == 6
    assert [made[number] for number in range(6)] == expected
    assert made[1:4] == expected[1:4]
    assert made[-1] == expected[5]
    with pytest.raises(IndexError):
        made[6]
    read = []
    monkeypatch.setattr(
        "medmoe_hf.evaluation.robustness.corruptions.read_picture", lambda image: read.append(image) or image
    )
    assert list(CorruptedImages(images, versions, seed=4)[:]) == expected
    assert [id(image) for image in read] == [id(image) for image in images]


@pytest.mark.parametrize(
    ("name", "severity", "message"), [("fog", 1, "no corruption"), ("blur", 0, "1, 2, 3, 4 or 5")]
)
def test_unknown_corruptions_are_refused(name, severity, message, data):
    with pytest.raises(ValueError, match=message):
        corrupt(photo(), name, severity)
    with pytest.raises(ValueError, match=message):
        robustness(PixelEncoder(), data, corruptions=[name], severities=[severity])


# --- the report


@pytest.fixture(scope="module")
def report(data):
    versions = {"corruptions": ("noise", "rotation"), "severities": (2, 5)}
    return parts(robustness(PixelEncoder(), data, **versions, smallest_group=5, resamples=60))


def test_drops_are_those_of_a_loop_over_corrupted_images(data, report):
    encoder, result = PixelEncoder(), report["robustness"]

    def measured(images):
        chances = plain_softmax(plain_logits(encoder, images, data.prompts))
        return {
            "accuracy": (chances.argmax(axis=1) == data.labels).mean(),
            "balanced_accuracy": balanced_accuracy_score(data.labels, chances.argmax(axis=1)),
            "macro_auroc": roc_auc_score(data.labels, chances, multi_class="ovr"),
        }

    clean = measured(data.images)
    assert clean["accuracy"] > 0.6
    every = {name: [] for name in clean}
    for name in ("noise", "rotation"):
        own = {metric: [] for metric in clean}
        for severity in (2, 5):
            images = [corrupt(image, name, severity, sample=row) for row, image in enumerate(data.images)]
            for metric, value in measured(images).items():
                assert result.metrics[f"{name}, severity {severity}/{metric}"].value == pytest.approx(value, abs=1e-6)
                own[metric].append(value)
        for metric, values in own.items():
            drop = result.metrics[f"{name}/{metric}_drop"]
            assert drop.value == pytest.approx(clean[metric] - np.mean(values), abs=1e-6)
            assert drop.low <= drop.value <= drop.high
            assert (drop.n, drop.rows) == (30, 90)
            every[metric] += values
    for metric, value in clean.items():
        assert result.metrics[f"clean/{metric}"].value == pytest.approx(value, abs=1e-6)
        expected = value - np.mean(every[metric])
        assert result.metrics[f"all corruptions/{metric}_drop"].value == pytest.approx(expected, abs=1e-6)
    assert result.metrics["all corruptions/accuracy_drop"].value > 0.02


def test_some_images_are_drawn_for_corruption(data):
    settings = {"corruptions": ("blur",), "severities": (4,), "resamples": 10}
    first, again, other = (
        parts(robustness(PixelEncoder(), data, corrupted_images=20, seed=seed, **settings))["robustness"]
        for seed in (1, 1, 2)
    )
    assert first.facts["corrupted_images"] == 20
    assert first.metrics["blur/accuracy"].rows == 20
    assert first.metrics["clean/accuracy"].rows == 90
    assert np.array_equal(first.probabilities["corrupted"], again.probabilities["corrupted"])
    assert not np.array_equal(first.probabilities["corrupted"], other.probabilities["corrupted"])
    none = robustness(PixelEncoder(), data, corruptions=(), resamples=10)[0]
    assert {key.split("/")[0] for key in none.metrics} == {"clean"}
    with pytest.raises(ValueError, match="At least one image"):
        robustness(PixelEncoder(), data, corrupted_images=0)


def test_draws_keep_the_shares_of_classes():
    labels = np.random.default_rng(0).permutation([0] * 100 + [1] * 50 + [2] * 10 + [3] * 2)
    rows = drawn_rows(labels, 54, seed=1)
    assert rows.tolist() == sorted(set(rows.tolist()))
    found = np.bincount(labels[rows], minlength=4)
    assert np.abs(found - np.array([100, 50, 10, 2]) * 54 / 162).max() <= 1
    assert (found > 0).all()
    assert sorted(labels[drawn_rows(labels, 4, seed=1)]) == [0, 1, 2, 3]
    assert drawn_rows(labels, 54, seed=1).tolist() == rows.tolist() != drawn_rows(labels, 54, seed=2).tolist()
    for most in (None, 162, 200):
        assert drawn_rows(labels, most, seed=1).tolist() == list(range(162))
    several = np.stack([labels == 1, labels == 2], axis=1).astype(np.int64)
    assert len(set(drawn_rows(several, 20, seed=0).tolist())) == 20


@pytest.mark.parametrize("given", [False, True])
def test_flips_are_counted_label_by_label(data, report, given):
    encoder = PixelEncoder()
    sentences = {name: [f"other {name} {k}" for k in range(3)] for name in CLASSES} if given else data.prompts
    result = report["paraphrases"]
    if given:
        other = robustness(encoder, replace(data, paraphrases=sentences), corruptions=(), resamples=10)
        result = parts(other)["paraphrases"]
    count = 3 if given else 2  # the class with the fewest prompts has two
    base = plain_logits(encoder, data.images, data.prompts).argmax(axis=1)
    flips, right, any_flip = [], [], np.zeros(90, dtype=bool)
    for k in range(count):
        one = plain_logits(encoder, data.images, {name: [sentences[name][k]] for name in CLASSES}).argmax(axis=1)
        flips.append((one != base).mean())
        right.append((one == data.labels).mean())
        any_flip |= one != base
        assert result.metrics[f"paraphrase {k + 1}/flip_rate"].value == pytest.approx(flips[-1])
        assert result.metrics[f"paraphrase {k + 1}/accuracy"].value == pytest.approx(right[-1])
    found = {key.split("/")[1]: value.value for key, value in result.metrics.items() if key.startswith("all ")}
    assert found == pytest.approx(
        {
            "flip_rate": np.mean(flips),
            "any_flip": any_flip.mean(),
            "accuracy": np.mean(right),
            "lowest_accuracy": min(right),
            "highest_accuracy": max(right),
        }
    )
    assert f"paraphrase {count + 1}/accuracy" not in result.metrics
    assert 0 < found["flip_rate"] < found["any_flip"]


def test_negation_is_compared_where_the_finding_is_and_is_not(data, report):
    result, encoder = report["negation"], PixelEncoder()
    assert result.facts["findings"] == {"Pleural_Effusion": "pleural effusion", "mass": "mass"}
    means = {"negated_higher_present": [], "negated_higher_absent": []}
    for name, words in result.facts["findings"].items():
        upper = words[0].upper() + words[1:]
        affirmed = [f"{upper}.", f"There is {words}.", f"Findings of {words}.", f"{upper} is present."]
        negated = [f"No {words}.", f"There is no {words}.", f"No findings of {words}.", f"{upper} is absent."]
        table = plain_logits(encoder, data.images, {"yes": affirmed, "no": negated})
        present = data.labels == CLASSES.index(name)
        expected = {
            "negated_higher_present": (table[present, 1] > table[present, 0]).mean(),
            "negated_higher_absent": (table[~present, 1] > table[~present, 0]).mean(),
            "auroc": roc_auc_score(present, table[:, 0] - table[:, 1]),
        }
        right = [table[present, 0] >= table[present, 1], table[~present, 1] > table[~present, 0]]
        expected["negation_balanced_accuracy"] = np.mean([one.mean() for one in right])
        for metric, value in expected.items():
            assert result.metrics[f"finding {name}/{metric}"].value == pytest.approx(value)
        for metric in means:
            means[metric].append(expected[metric])
    for metric, values in means.items():
        assert result.metrics[f"all findings/{metric}"].value == pytest.approx(np.mean(values))


def test_labels_without_an_image_are_those_of_the_mean_and_of_gray(data, report):
    result, encoder = report["text-only"], PixelEncoder()
    total = np.mean(
        [np.asarray(read_picture(image).resize((256, 256), 2), dtype=float) for image in data.images], axis=0
    )
    pictures = {
        "mean image": Image.fromarray(total.round().astype(np.uint8)),
        "gray image": Image.new("RGB", (9, 9), (128, 128, 128)),
    }
    own = plain_logits(encoder, data.images, data.prompts).argmax(axis=1)
    for name, picture in pictures.items():
        chances = plain_softmax(plain_logits(encoder, [picture], data.prompts))[0]
        assert list(result.facts["without_image"][name].values()) == pytest.approx(chances, abs=1e-4)
        label = chances.argmax()
        found = {key.split("/")[1]: value.value for key, value in result.metrics.items() if key.startswith(name)}
        assert found["accuracy"] == pytest.approx((data.labels == label).mean())
        assert found["balanced_accuracy"] == pytest.approx(1 / 3)
        assert found["macro_auroc"] == pytest.approx(0.5)
        assert found["same_label"] == pytest.approx((own == label).mean())
        gain = (own == data.labels).mean() - (data.labels == label).mean()
        assert found["gain_of_images_accuracy"] == pytest.approx(gain)
    most = np.bincount(data.labels).max() / 90
    assert result.metrics["most frequent class/accuracy"].value == pytest.approx(most)


def test_groups_are_measured_alone_and_small_ones_are_named(data, report):
    result, encoder = report["subgroups"], PixelEncoder()
    chances = plain_softmax(plain_logits(encoder, data.images, data.prompts))
    cells, values = np.array(data.groups["sex"]), {}
    for name in ("F", "M"):
        own = cells == name
        values[name] = (chances[own].argmax(axis=1) == data.labels[own]).mean()
        interval = result.metrics[f"sex = {name}/accuracy"]
        assert interval.value == pytest.approx(values[name])
        assert (interval.n, interval.rows) == (len({data.subjects[row] for row in np.flatnonzero(own)}), own.sum())
        auroc = roc_auc_score(data.labels[own], chances[own], multi_class="ovr")
        assert result.metrics[f"sex = {name}/macro_auroc"].value == pytest.approx(auroc)
    worst, best = sorted(values, key=values.__getitem__)
    assert result.facts["worst_groups"]["sex, accuracy"] == f"{worst} (best: {best})"
    # The gap's interval, resample by resample.
    rng, gaps = np.random.default_rng(0), []
    names = sorted(set(data.subjects))
    rows_of = {name: [row for row in range(90) if data.subjects[row] == name] for name in names}
    right = chances.argmax(axis=1) == data.labels
    for _ in range(60):
        rows = [row for unit in rng.integers(30, size=30) for row in rows_of[names[unit]]]
        gap = [right[[row for row in rows if cells[row] == name]].mean() for name in (best, worst)]
        gaps.append(gap[0] - gap[1])
    gap = result.metrics["sex/accuracy_gap"]
    assert gap.value == pytest.approx(values[best] - values[worst])
    low, high = np.quantile(gaps, [0.025, 0.975], method="inverted_cdf")
    assert (gap.low, gap.high) == pytest.approx((low, high))
    assert "sex: groups of fewer than 5 subjects are left out: X (1)." in result.facts["omitted"]
    assert "sex: 12 of 90 images have no value and belong to no group." in result.facts["omitted"]
    assert not any("sex = X" in key for key in result.metrics)


def test_groups_without_a_class_or_without_another_group_say_so(data):
    sites = np.where(data.labels == 0, "A", "B").tolist()
    one = replace(data, groups={"site": sites, "scanner": ["S"] * 90, "empty": [""] * 90})
    result = parts(robustness(PixelEncoder(), one, corruptions=(), smallest_group=2, resamples=10))["subgroups"]
    omitted = result.facts["omitted"]
    assert "site = A: some class has no image, so that balanced_accuracy, macro_auroc is not defined." in omitted
    assert "scanner: there is one group only, S, and so no gap." in omitted
    assert "empty: there is no group, and so no gap." in omitted
    assert np.isnan(result.metrics["site = A/macro_auroc"].value)
    assert "site/accuracy_gap" in result.metrics
    assert not {"site/macro_auroc_gap", "scanner/accuracy_gap"} & set(result.metrics)


def test_numbers_become_bands():
    assert banded("PatientAge", ["017Y", "18", "39.5", "064Y", "65", "80", "101", ""]) == [
        "0-17", "18-39", "18-39", "40-64", "65-79", "80+", "80+", "",
    ]  # fmt: skip
    assert banded("stage", ["1", "2"]) == ["1", "2"]
    assert banded("age", ["old", "7"]) == ["old", "7"]
    weights = [str(number) for number in range(12)] + [""]
    found = banded("weight", weights)
    assert found[-1] == ""
    assert [found.count(name) for name in dict.fromkeys(found[:-1])] == [3, 3, 3, 3]
    assert found[0] == "0 to 2.75"
    assert found[11] == "8.25 to 11"


def test_findings_of_a_multi_label_set_have_no_single_label(data):
    labels = np.stack([(data.labels == label).astype(np.int64) for label in range(3)], axis=1)
    labels[::7, 1] = UNKNOWN_LABEL
    negatives = {name: [f"no {name}"] for name in CLASSES}
    multi = replace(data, labels=labels, negative_prompts=negatives)
    settings = {"corruptions": ("blur",), "severities": (5,), "smallest_group": 5, "resamples": 10}
    found = parts(robustness(PixelEncoder(), multi, **settings))
    assert list(found) == ["robustness", "paraphrases", "negation", "subgroups"]
    assert any(why.startswith("text-only:") for why in found["robustness"].facts["omitted"])
    encoder = PixelEncoder()
    yes, no = (plain_logits(encoder, multi.images, prompts) for prompts in (data.prompts, negatives))
    known = labels >= 0
    aurocs = [roc_auc_score(labels[known[:, c], c], (yes - no)[known[:, c], c]) for c in range(3)]
    assert found["robustness"].metrics["clean/macro_auroc"].value == pytest.approx(np.mean(aurocs), abs=1e-6)
    single = plain_logits(encoder, multi.images, {name: data.prompts[name][:1] for name in CLASSES})
    flips = ((single > no) != (yes > no)).mean()
    assert found["paraphrases"].metrics["paraphrase 1/flip_rate"].value == pytest.approx(flips)
    right = ((single > no) == labels)[known].mean()
    assert found["paraphrases"].metrics["paraphrase 1/accuracy"].value == pytest.approx(right)
    negation = found["negation"].metrics["finding Pleural_Effusion/negated_higher_present"]
    assert negation.rows == known[:, 1].sum()
    alone = robustness(PixelEncoder(), replace(multi, negative_prompts={}), **settings)
    assert any(why.startswith("paraphrases:") for why in alone[0].facts["omitted"])


def test_what_a_set_does_not_allow_is_left_out_with_a_reason(data):
    names = ["normal", "no nodule", "healthy"]
    few = replace(data, classes=names, prompts={name: [name] for name in names}, groups={})
    found = robustness(PixelEncoder(), few, corruptions=(), resamples=10)
    assert [result.protocol for result in found] == ["robustness", "text-only"]
    assert [why.split(":")[0] for why in found[0].facts["omitted"]] == ["paraphrases", "negation"]
    missing = replace(data, labels=np.where(data.labels == 2, 1, data.labels))
    negation = parts(robustness(PixelEncoder(), missing, corruptions=(), resamples=10))["negation"]
    assert any("to be with mass" in why for why in negation.facts["omitted"])
    assert np.isnan(negation.metrics["finding mass/negated_higher_present"].value)
    assert not np.isnan(negation.metrics["all findings/negated_higher_present"].value)
    for wrong, message in (
        ({"paraphrases": {"normal": ["a"], "mass": ["b"]}}, "same number of sentences"),
        ({"paraphrases": {"normal": ["a"], "mass": ["b"], "Pleural_Effusion": ["c", "d"]}}, "same number"),
        ({"negation": {"cyst": "cyst"}}, '"cyst", which is none of'),
        ({"labels": None}, "needs labels"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness(PixelEncoder(), replace(data, **wrong), corruptions=(), resamples=10)
    named = replace(data, negation={"mass": "tumour"})
    found = parts(robustness(PixelEncoder(), named, corruptions=(), resamples=10))
    assert found["negation"].facts["findings"] == {"mass": "tumour"}


def test_groups_follow_splits_and_joins(data):
    halves = replace(data, splits=np.array(["train", "test"] * 45))
    assert halves.split("test").groups == {"sex": data.groups["sex"][1::2]}
    both = joined([data, replace(data, groups={**data.groups, "site": ["A"] * 90})], "both")
    assert both.groups == {"sex": data.groups["sex"] * 2}


# --- comparisons


def test_differences_are_paired(data):
    settings = {"corruptions": ("noise",), "severities": (1, 4), "corrupted_images": 50, "resamples": 50}
    encoders = [PixelEncoder("one"), PixelEncoder("two", seed=1)]
    first, other = (robustness(encoder, data, **settings) for encoder in encoders)
    found = compare(first, other, data)
    assert (found.protocol, found.model, found.facts["baseline"]) == ("comparison", "two", "one")
    right = [plain_logits(encoder, data.images, data.prompts).argmax(axis=1) == data.labels for encoder in encoders]
    rng, drawn = np.random.default_rng(0), []
    names = sorted(set(data.subjects))
    rows_of = {name: [row for row in range(90) if data.subjects[row] == name] for name in names}
    for _ in range(50):
        rows = [row for unit in rng.integers(30, size=30) for row in rows_of[names[unit]]]
        drawn.append(right[1][rows].mean() - right[0][rows].mean())
    clean = found.metrics["clean - one/accuracy"]
    assert clean.value == pytest.approx(right[1].mean() - right[0].mean())
    assert (clean.low, clean.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")))
    means = [results[0].metrics["all corruptions/accuracy"].value for results in (first, other)]
    corrupted = found.metrics["corrupted - one/accuracy"]
    assert corrupted.value == pytest.approx(means[1] - means[0])
    assert corrupted.rows == 50
    same = compare(first, first, data).metrics["clean - one/accuracy"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="seed differs"):
        compare(first, robustness(encoders[1], data, **settings, seed=1), data)


# --- recipes and the command


@pytest.fixture
def copy(data, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "finding", "patient", "sex", "age"])
        for row, image in enumerate(data.images):
            image.save(folder / f"{row}.png")
            sex = data.groups["sex"][row]
            writer.writerow([f"{row}.png", CLASSES[data.labels[row]], data.subjects[row], sex, 10 * (row // 10)])
    recipe = {
        "name": "toy",
        "title": "Toy",
        "tasks": ["zero-shot"],
        "modality": "xray",
        "metric": "accuracy",
        "layout": {
            "kind": "table",
            "tables": {"test": "test.csv"},
            "image": "{file}",
            "label": "finding",
            "subject": "{patient}",
            "groups": ["sex"],
        },
        "classes": CLASSES,
        "prompts": data.prompts,
        "negation": {"mass": "a mass"},
        "expected": "test.csv",
        "source": "here",
        "license": "CC0",
        "overlaps": ["none"],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path


def test_the_command_writes_all_parts_and_compares_models(copy, monkeypatch, data):
    encoders = {"one": PixelEncoder("one"), "two": PixelEncoder("two", seed=1)}
    monkeypatch.setattr(suite, "load_encoder", lambda name, batch_size: encoders[str(name)])
    command = "evaluate robustness one --compare two --group age --smallest-group 3 --severity 5 --severity 1"
    command += f" --resamples 20 --recipe {copy}/toy.yaml --data {copy}/copy --output {copy}/out"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    found = json.loads((copy / "out" / "results.json").read_text())
    protocols = ["robustness", "paraphrases", "negation", "text-only", "subgroups"]
    assert [(one["model"], one["protocol"]) for one in found] == [
        *(("one", name) for name in protocols),
        *(("two", name) for name in protocols),
        ("two", "comparison"),
    ]
    expected = robustness(encoders["one"], replace(data, groups={}), corruptions=("gamma",), severities=(1, 5))
    gamma = {key: value.value for key, value in expected[0].metrics.items() if key.startswith("gamma/")}
    assert {key: found[0]["metrics"][key]["value"] for key in gamma} == pytest.approx(gamma)
    assert found[2]["facts"]["findings"] == {"mass": "a mass"}
    assert {"age = 0-17/accuracy", "age = 80+/accuracy", "sex = F/accuracy"} <= set(found[4]["metrics"])
    page = (copy / "out" / "results.md").read_text()
    for text in ("| toy | 90 (30 subjects) | one | noise, severity 5 |", "worst group by sex, accuracy: ", "X (1)"):
        assert text in page
    assert "severity 5" not in done.output
    assert "all corruptions" in done.output
    assert done.output.count("worst group by") == 2


def test_recipes_name_groups_and_paraphrases_that_do_not_fit(copy, monkeypatch):
    recipe = load_recipe(copy / "toy.yaml")
    (opened,) = open_recipe(recipe, copy / "copy")
    assert set(opened.groups["sex"]) == {"F", "M", "X", ""}
    monkeypatch.setattr(suite, "load_encoder", lambda name, batch_size: PixelEncoder())
    with pytest.raises(RecipeError, match=r'no column "site", but file, finding, patient, sex, age'):
        suite.evaluate(["one"], copy / "toy.yaml", copy / "copy", ["robustness"], groups=["site"])
    content = yaml.safe_load((copy / "toy.yaml").read_text())
    for change, message in (
        ({"paraphrases": {"normal": ["a"]}}, "as many sentences for each of"),
        ({"negation": {"cyst": "cyst"}}, "'cyst', which is not in"),
        ({"tasks": ["routing"], "negation": {"mass": "mass"}}, "goes with `tasks` of zero-shot"),
    ):
        (copy / "wrong.yaml").write_text(yaml.safe_dump({**content, **change}, sort_keys=False))
        with pytest.raises(RecipeError, match=message):
            load_recipe(copy / "wrong.yaml")
    with pytest.raises(ValueError, match="has no table, and so no column age"):
        suite.evaluate(["one"], "phantoms", copy / "copy", ["robustness"], groups=["age"])
