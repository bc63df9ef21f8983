"""Results as JSON, Markdown, figures and entries of a model card."""

import json
import math

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.axes import Axes
from PIL import Image

from medmoe_hf.evaluation.figures import draw_heatmaps
from medmoe_hf.evaluation.intervals import Interval
from medmoe_hf.evaluation.metrics import calibration
from medmoe_hf.evaluation.report import summary, to_markdown, write
from medmoe_hf.evaluation.results import HeatmapExample, Result

FACTS = {
    "title": "A set | of images",
    "metric": "accuracy",
    "license": "CC0",
    "overlaps": ["lies in CheXpert's training part"],
    "weights": "pretrained",
    "preprocessing": "0123456789ab",
    "prompts": "ba9876543210",
    "seed": 0,
    "resamples": 100,
    "versions": {},
}


def result(protocol="zero-shot", model="you/medmoe", dataset="toy", count=4, metrics=None, **changes):
    metrics = metrics or {"global/accuracy": Interval(0.75, 0.5, 1.0, 4)}
    return Result(protocol, model, dataset, count, metrics, {**FACTS, **changes.pop("facts", {})}, **changes)


@pytest.fixture
def everything():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(3), 40)
    labels = rng.integers(3, size=40)
    classified = result(count=40, facts={"count_by_class": {"a": 20, "b": 20, "c": 0}})
    for variant in ("global", "local"):
        classified.add_classification(variant, chances, labels, ["a", "b", "c"], None)
    routed = result("routing", count=40)
    routed.add_classification("image router", chances, labels, ["a", "b", "c"], None)
    recalls = {
        f"{kind}/{way}_{name}": Interval(value, value - 0.1, value + 0.1, 50)
        for kind in ("global", "local")
        for way in ("image_to_text", "text_to_image")
        for name, value in (("r1", 0.2), ("r5", 0.5), ("r10", 0.7), ("median_rank", 6.0))
    }
    retrieved = [
        result("retrieval", model, count=50, metrics=recalls, facts={"chance": {"r1": 0.02, "r5": 0.1, "r10": 0.2}})
        for model in ("you/medmoe", "you/clip")
    ]
    probed = result(
        "linear-probe",
        metrics={f"expert {share}/accuracy": Interval(0.5, 0.4, 0.6, 20) for share in ("10%", "100%")},
        facts={
            "seeds": {"expert 10%": [0.4, 0.6], "expert 100%": [0.5]},
            "trained_on": {"10%": 12, "100%": 120},
            "not_converged": 0,
        },
    )
    example = HeatmapExample(
        np.zeros((30, 40, 3), np.uint8),
        "effusion",
        rng.random((30, 40)),
        "glorbix",
        rng.random((30, 40)),
        [(3, 4, 9, 12)],
        "xray",
    )
    grounded = result("grounding", facts={"nonsense": ["glorbix"]}, examples=[example])
    return [classified, routed, *retrieved, probed, grounded]


def test_write_creates_json_markdown_and_figures(tmp_path, everything):
    write(everything, tmp_path / "out")
    pictures = {
        "zero-shot_confusion.png",
        "zero-shot_reliability.png",
        "routing_confusion.png",
        "routing_reliability.png",
        "retrieval_recall.png",
        "linear-probe.png",
        "grounding_toy_you_medmoe_heatmaps.png",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures | {"results.json", "results.md"}
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [entry["protocol"] for entry in content] == [one.protocol for one in everything]
    assert content[0]["metrics"]["global/accuracy"]["value"] == everything[0].metrics["global/accuracy"].value
    assert content[0]["confusions"]["global"]["classes"] == ["a", "b", "c"]
    assert "examples" not in content[5]


def test_the_same_results_give_the_same_files(tmp_path, everything):
    for name in ("one", "two"):
        write(everything, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_write_replaces_only_when_told(tmp_path, everything):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="out exists already"):
        write(everything, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    write(everything[:1], tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_json_has_null_for_values_that_are_not_finite():
    metrics = {
        "global/macro_auroc": Interval(math.nan, math.nan, math.nan, 3, 10),
        "a/b": Interval(1.0, 0.0, math.inf, 3),
    }
    found = json.loads(json.dumps(result(metrics=metrics).to_json(), allow_nan=False))["metrics"]
    assert found["global/macro_auroc"] == {
        "value": None, "low": None, "high": None, "n": 3, "undefined": 10, "rows": None,
    }  # fmt: skip
    assert found["a/b"]["high"] is None


def test_markdown_has_a_row_for_each_variant_with_intervals(everything):
    text = to_markdown(everything)
    rows = [line for line in text.splitlines() if line.startswith("| toy | 40 | you/medmoe | local |")]
    assert len(rows) == 1
    assert str(everything[0].metrics["local/accuracy"]) in rows[0]
    tables = [line for line in text.splitlines() if line.startswith("|")]
    header = None
    for line in tables:
        header = line if line.startswith("| set |") else header
        assert line.count(" | ") == header.count(" | ")
    assert "**accuracy**" in text  # the one to quote
    assert "a 20, b 20, c 0" in text
    assert "lies in CheXpert's training part" in text
    assert "0123456789ab" in text
    assert "expert 10% 0.141" in text  # the standard deviation of 0.4 and 0.6
    nothing = to_markdown([result(metrics={"global/accuracy": Interval(math.nan, math.nan, math.nan, 1)})])
    assert "not defined" in nothing


def test_each_row_has_its_own_n():
    """A variant may be measured on some of the images, and its interval is by subject."""
    metrics = {
        "phrase/pointing": Interval(0.5, 0.4, 0.6, 31, rows=88),
        "phrase, ct/pointing": Interval(0.5, 0.4, 0.6, 9, rows=9),
        "phrase, mri/pointing": Interval(0.5, 0.4, 0.6, 2, rows=13),
    }
    grounded = result("grounding", count=88, metrics=metrics, facts={"nonsense": ["glorbix"]})
    lines = to_markdown([grounded]).splitlines()
    cells = {line.split(" | ")[3]: line.split(" | ")[1] for line in lines if line.startswith("| toy |")}
    assert cells == {"phrase": "88 (31 subjects)", "phrase, ct": "9", "phrase, mri": "13 (2 subjects)"}
    assert [entry.metric_args["images"] for entry in grounded.to_eval_results()] == [88, 9, 13]
    assert "  13 (2 subjects)  " in summary([grounded])


def test_the_short_table_has_the_metrics_that_are_quoted(everything):
    text = summary(everything)
    tables = {block.splitlines()[0]: i for i, block in enumerate(text.split("\n\n"))}
    assert {"zero-shot", "routing", "retrieval", "linear-probe", "grounding"} <= tables.keys()
    zero_shot = text.split("\n\n")[tables["zero-shot"] + 1].splitlines()
    assert [word.strip() for word in zero_shot[0].split("  ") if word] == [
        "set", "variant", "N", "accuracy", "macro AUROC",
    ]  # fmt: skip
    assert zero_shot[1].startswith("toy  global   40  ")
    assert str(everything[0].metrics["global/macro_auroc"]) in zero_shot[1]
    retrieved = text.split("\n\n")[tables["retrieval"] + 1].splitlines()
    assert [line.split()[1] for line in retrieved[1:]] == ["you/medmoe"] * 2 + ["you/clip"] * 2
    assert len({line.index("0.200 [0.10, 0.30]") for line in retrieved[1:]}) == 1


def test_sets_that_are_too_small_for_a_metric_say_so(everything):
    for text in (to_markdown, summary):
        assert "too small" not in text(everything)
        few = result(
            "retrieval",
            count=7,
            metrics={"global/image_to_text_r10": Interval(1.0, 1.0, 1.0, 7)},
            facts={"chance": {"r1": 1 / 7, "r5": 5 / 7, "r10": 1.0}},
        )
        assert "toy: too small for R@10, which is 1 among 7 pairs for any model." in text([few])
        metrics = {
            "global/macro_auroc": Interval(0.7, 0.6, 0.8, 5, undefined=83, rows=5),
            "global/accuracy": Interval(0.7, 0.6, 0.8, 5, rows=5),
        }
        found = text([result(metrics=metrics)])
        assert "which these metrics need: macro AUROC. Their intervals leave such resamples out: 83% in toy." in found
        assert "resamples out" not in text([result()])


def test_shares_of_the_same_training_images_say_that_their_rows_are_equal(everything):
    probed = next(one for one in everything if one.protocol == "linear-probe")
    assert "must be equal" not in to_markdown([probed])
    probed.facts |= {"same_parts": [["1%", "10%"]], "trained_on": {"1%": 4, "10%": 4, "100%": 14}}
    for text in (to_markdown, summary):
        assert "The rows of 1% and 10% must be equal" in text([probed])
        assert "(4 of toy)" in text([probed])


def test_a_heatmap_and_its_control_have_one_colour_scale(tmp_path, monkeypatch):
    """A control that is flat relative to the finding's map looks flat."""
    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda *args, **settings: drawn.append(imshow(*args, **settings)) or drawn[-1])
    hot, flat = np.zeros((30, 40)), np.full((30, 40), 0.1)
    hot[5:9, 5:9] = 4.0
    flat[20, 20] = 0.2
    image = np.zeros((30, 40, 3), np.uint8)
    example = HeatmapExample(image, "effusion", hot, "glorbix", flat, [(5, 5, 9, 9)], "xray")
    draw_heatmaps(result("grounding", examples=[example]), tmp_path / "sheet.png")
    maps = [one for one in drawn if one.get_array().ndim == 2]
    assert [one.get_clim() for one in maps] == [(0.0, 4.0)] * 2
    figure = maps[0].figure
    assert "made-up word" in " ".join(figure.get_supxlabel().split())


def test_entries_of_a_model_card_survive_the_card(everything):
    metrics = {
        "global/accuracy": Interval(0.75, 0.5, 1.0, 4),
        "local/macro_auroc": Interval(0.8, math.nan, math.nan, 1),
        "global/macro_f1": Interval(math.nan, math.nan, math.nan, 4),
    }
    entries = result(metrics=metrics).to_eval_results()
    assert all(isinstance(entry, EvalResult) for entry in entries)
    found = [(entry.metric_type, entry.metric_value, entry.metric_args["variant"]) for entry in entries]
    assert found == [("accuracy", 0.75, "global"), ("roc_auc", 0.8, "local")]
    assert entries[0].metric_args == {"variant": "global", "images": 4, "low_95": 0.5, "high_95": 1.0}
    assert "low_95" not in entries[1].metric_args

    entries = [entry for one in everything for entry in one.to_eval_results()]
    data = ModelCardData(model_name="medmoe", eval_results=entries)
    read = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert sorted(
        (one.task_type, one.dataset_type, one.metric_name, one.metric_value) for one in read.eval_results
    ) == (sorted((one.task_type, one.dataset_type, one.metric_name, one.metric_value) for one in entries))


def test_classification_is_counted_by_hand():
    chances = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    labels = np.array([0, 1, 1, 0])
    one = result()
    one.add_classification("global", chances, labels, ["a", "b"], ["s", "s", "t", "t"])
    assert one.confusions["global"].counts == [[2, 0], [1, 1]]
    assert one.metrics["global/accuracy"].value == 0.75
    assert one.metrics["global/accuracy"].n == 2  # subjects, not images
    assert one.metrics["global/brier"].value == pytest.approx(np.mean([0.02, 0.08, 0.72, 0.18]))
    assert one.calibrations["global"]["ece"] == calibration(chances, labels)["ece"]
