"""MedMNIST+ and MedMNIST-C: files in their layout, read and scored as by the package `medmnist`."""

import re
import sys

import numpy as np
import pytest

medmnist = pytest.importorskip("medmnist", reason='pip install "medmoe_hf[medmnist]"')

from medmnist import INFO, Evaluator  # noqa: E402

from medmoe_hf.errors import MissingPackageError, RecipeError  # noqa: E402
from medmoe_hf.evaluation.recipes import check_recipe, load_recipe, open_recipe  # noqa: E402
from medmoe_hf.evaluation.recipes.medmnist_sets import SIZES  # noqa: E402
from medmoe_hf.evaluation.suite import evaluate  # noqa: E402

FLAGS = [flag for flag, info in INFO.items() if "3d" not in flag]


def images(draw, labels, size, color):
    """Noise, brighter for larger labels, so that a probe has something to learn."""
    shape = (len(labels), size, size, *([3] if color else []))
    noise = draw.integers(0, 120, shape)
    return (noise + 60 * labels[:, :1].reshape(-1, *[1] * (len(shape) - 1)) % 130).astype(np.uint8)


def write_clean(folder, flag, size, count=8):
    draw, info = np.random.default_rng(0), INFO[flag]
    classes, multi = len(info["label"]), info["task"].startswith("multi-label")
    arrays = {}
    for split in ("train", "val", "test"):
        if multi:
            labels = (np.arange(count)[:, None] + np.arange(classes)) % 2
        else:
            labels = (np.arange(count) % classes)[:, None]
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
        arrays[f"{split}_images"] = images(draw, labels, size, info["n_channels"] == 3)
    name = flag if size == 28 else f"{flag}_{size}"
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return arrays


@pytest.mark.parametrize("flag", FLAGS)
def test_a_recipe_has_the_classes_and_the_task_of_its_set(flag):
    info = INFO[flag]
    for size in SIZES:
        recipe = load_recipe(f"medmnist:{flag}" if size == 28 else f"medmnist:{flag}_{size}")
        assert recipe.classes == list(info["label"].values())
        assert (recipe.labels == "multi") == (info["task"] == "multi-label, binary-class")
        assert (recipe.count, recipe.layout.size) == (info["n_samples"]["test"], size)
        # grades without names have nothing that zero-shot could describe
        assert ("zero-shot" in recipe.tasks) == (flag != "retinamnist")
        assert "linear-probe" in recipe.tasks


def test_images_and_labels_are_those_of_its_data_set(tmp_path):
    for flag, size in (("pathmnist", 28), ("chestmnist", 64)):
        write_clean(tmp_path, flag, size)
        (data,) = open_recipe(load_recipe(f"medmnist:{flag}" + ("" if size == 28 else f"_{size}")), tmp_path)
        for split, theirs in (("train", "train"), ("validation", "val"), ("test", "test")):
            ours = data.split(split)
            official = getattr(medmnist, INFO[flag]["python_class"])(theirs, root=str(tmp_path), size=size)
            assert len(ours) == 8
            for index in range(8):
                picture, label = official[index]
                np.testing.assert_array_equal(ours.images[index], np.asarray(picture))
                np.testing.assert_array_equal(np.atleast_1d(ours.labels[index]), label)


def test_scores_are_those_of_its_evaluator(saved, tmp_path):
    arrays = write_clean(tmp_path, "breastmnist", 64)
    name, out = "medmnist:breastmnist_64", tmp_path / "out"
    results = evaluate([saved.folder], name, tmp_path, output=out, resamples=3, report=lambda line: None)
    found = {result.protocol: result for result in results}
    assert found.keys() == {"zero-shot", "linear-probe"}
    evaluator = Evaluator("breastmnist", "test", size=64, root=str(tmp_path))
    runs = [path.name.partition("@")[2] for path in (out / "medmnist").iterdir()]
    for variant, of_variant in found["zero-shot"].by_variant().items():
        if variant == "image router":
            continue
        (path,) = (out / "medmnist").glob(f"*-zero-shot-{variant}-0.csv")
        rows = np.loadtxt(path, delimiter=",", ndmin=2)
        theirs = evaluator.evaluate(rows[:, 1:])
        assert of_variant["macro_auroc"].value == pytest.approx(theirs.AUC, abs=1e-5)
        assert of_variant["accuracy"].value == pytest.approx(theirs.ACC, abs=1e-5)
        assert path.name.startswith(f"breastmnist_64_test_[AUC]{theirs.AUC:.3f}_[ACC]{theirs.ACC:.3f}@")
        if variant == "global":
            # the same by the model alone
            recipe = load_recipe(name)
            prompts = np.stack([saved.texts(recipe.prompts[label]).mean(axis=0) for label in recipe.classes])
            prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
            logits = float(saved.model.global_scale) * saved.images(list(arrays["test_images"])) @ prompts.T
            expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(rows[:, 1:], expected, rtol=0, atol=1e-5)
    probe = found["linear-probe"]
    theirs = evaluator.evaluate(probe.probabilities["both 100%"][:, 0])
    assert probe.metrics["both 100%/macro_auroc"].value == pytest.approx(theirs.AUC, abs=1e-5)
    assert probe.metrics["both 100%/accuracy"].value == pytest.approx(theirs.ACC, abs=1e-5)
    assert all(re.fullmatch(r"[\w-]+\.csv", run) for run in runs)


def test_findings_are_scored_by_its_evaluator(saved, tmp_path):
    write_clean(tmp_path, "chestmnist", 28)
    options = {"resamples": 2, "report": lambda line: None}
    (result,) = evaluate([saved.folder], "medmnist:chestmnist", tmp_path, ["zero-shot"], tmp_path / "out", **options)
    (path,) = (tmp_path / "out" / "medmnist").glob("*-model-zero-shot-global-0.csv")
    rows = np.loadtxt(path, delimiter=",")[:, 1:]
    assert ((rows > 0) & (rows < 1)).all()
    auc = float(re.search(r"\[AUC\]([\d.]+)_", path.name)[1])
    assert result.metrics["global/macro_auroc"].value == pytest.approx(auc, abs=6e-4)
    theirs = Evaluator("chestmnist", "test", root=str(tmp_path)).evaluate(rows)
    assert result.metrics["global/macro_auroc"].value == pytest.approx(theirs.AUC, abs=1e-5)


def test_corruptions_are_sets_whose_severities_weigh_the_same(saved, tmp_path):
    draw, labels = np.random.default_rng(1), np.tile([[0], [1], [1]], (5, 1)).astype(np.uint8)
    (tmp_path / "breastmnist").mkdir()
    for corruption in ("pixelate", "brightness_up"):
        np.savez(
            tmp_path / "breastmnist" / f"{corruption}.npz",
            test_images=images(draw, labels, 224, False),
            test_labels=labels,
        )
    results = evaluate([saved.folder], "medmnist-c:breastmnist", tmp_path, resamples=3, report=lambda line: None)
    assert [result.dataset for result in results] == ["breastmnist-c/brightness_up", "breastmnist-c/pixelate"]
    for result in results:
        chosen = result.probabilities["global"][:, 0].argmax(axis=1).reshape(5, 3)
        # MedMNIST-C's error: balanced, by severity, then the mean
        errors = [1 - (float(one[0] == 0) + (one[1:] == 1).mean()) / 2 for one in chosen]
        assert 1 - result.metrics["global/balanced_accuracy"].value == pytest.approx(np.mean(errors), abs=1e-5)
        assert result.metrics["global/accuracy"].n == 3  # images, each with five severities


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("medmnist:pathmnis", "no 2D set \"pathmnis\". Did you mean pathmnist"),
        ("medmnist:organmnist3d", "no 2D set"),
        ("medmnist:pathmnist_32", "no images of 32 pixels, only of 28, 64, 128, 224"),
        ("medmnist-c:pathmnist_64", "MedMNIST-C has one size; use medmnist-c:pathmnist"),
        ("medmnist-c:retinamnist", "grades without names"),
    ],
)  # fmt: skip
def test_a_wrong_name_says_what_exists(name, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(name)


def test_wrong_files_say_what_is_wrong(tmp_path):
    recipe = load_recipe("medmnist:breastmnist")
    assert "breastmnist.npz is missing" in check_recipe(recipe, tmp_path)[0]
    good = write_clean(tmp_path, "breastmnist", 28)
    assert check_recipe(recipe, tmp_path) == [
        "warning: the test split has N = 8, the published one has 156; results on another N cannot be compared with "
        "published ones."
    ]
    for changed, message in (
        ({"val_images": np.zeros((8, 30, 30), np.uint8)}, "val_images are uint8 (8, 30, 30)"),
        ({"test_labels": np.full((8, 1), 2, np.uint8)}, "test_labels are 2 to 2, expected are 0 to 1"),
        ({"train_labels": np.zeros((7, 1), np.uint8)}, "expected is (8, 1)"),
    ):
        np.savez(tmp_path / "breastmnist.npz", **good | changed)
        assert message in check_recipe(recipe, tmp_path)[0]
    (tmp_path / "breastmnist.npz").write_bytes(b"no archive")
    assert "has no train_images and train_labels that can be read" in check_recipe(recipe, tmp_path)[0]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist.info", None)
    with pytest.raises(MissingPackageError, match=re.escape('pip install "medmoe_hf[medmnist]"')):
        load_recipe("medmnist:pathmnist")
