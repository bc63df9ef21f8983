"""CLIP_benchmark's webdataset layout and open_clip's CSV: written by us and read by them, and the other way round."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data.sources import load_sources
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, IdentifierError, MedMoEError, SourceError
from medmoe_hf.evaluation.clip_benchmark_results import clip_benchmark_metrics
from medmoe_hf.evaluation.recipes import check_recipe, load_recipe, open_recipe
from medmoe_hf.evaluation.suite import evaluate
from medmoe_hf.hub.data_layouts import export_clip_benchmark, export_open_clip

CLASSES = ["normal lung", "effusion", "lesion", "fundus", "chest", "liver"]
TEMPLATES = ["a scan with {c}", "{c} lesion"]


def table(folder, count=14, start=0, **fields):
    """A CSV with colour, gray and 16-bit PNGs of six classes, and its source."""
    draw = np.random.default_rng(start)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image\tcaption\tkind"]
    for number in range(count):
        deep = number % 3 == 2
        shape = (40, 50 + number, 3) if number % 3 else (40, 50)
        values = draw.integers(0, 256, shape, np.uint8)
        if deep:
            values = draw.integers(300, 9000, (40, 50)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{number}.png")
        lines.append(f"{number}.png\tcaption {number}\t{CLASSES[number % 6]}")
    (folder / "table.csv").write_text("\n".join(lines))
    path = folder / "sources.yaml"
    path.write_text(json.dumps([{"kind": "csv", "files": [str(folder / "table.csv")], "label": "kind", **fields}]))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A set with two splits, the first written by the command, with 14 images in three tars."""
    folder = tmp_path_factory.mktemp("exported")
    options = [word for template in TEMPLATES for word in ("--template", template)]
    arguments = [str(table(folder / "in")), str(folder / "set"), "--layout", "clip_benchmark", "--shard-size", "5"]
    run = CliRunner().invoke(app, ["data", "export", *arguments, *options])
    assert run.exit_code == 0, run.output
    sources = load_sources(table(folder / "more", 7, 9))
    assert export_clip_benchmark(sources, folder / "set", "train") == CLASSES
    return folder / "set"


def expected(exported, index):
    """The picture that was exported, by 8 bits as our processor sees it."""
    picture = np.asarray(Image.open(exported.parent / "in" / f"{index}.png"))
    if picture.dtype == np.uint8:
        return picture
    values = picture.astype(np.float64)
    return np.rint((values - values.min()) / (values.max() - values.min()) * 255)


def test_the_files_are_those_of_the_layout(exported):
    assert (exported / "classnames.txt").read_text() == "".join(f"{name}\n" for name in CLASSES)
    assert (exported / "zeroshot_classification_templates.txt").read_text() == "".join(f"{t}\n" for t in TEMPLATES)
    assert sorted(path.name for path in (exported / "test").iterdir()) == ["0.tar", "1.tar", "2.tar", "nshards.txt"]
    assert (exported / "test" / "nshards.txt").read_text() == "3\n"
    assert (exported / "train" / "nshards.txt").read_text() == "1\n"


def test_their_loader_reads_what_we_wrote_and_our_recipe_the_same(exported):
    pytest.importorskip("webdataset", reason="pip install --no-deps clip-benchmark webdataset braceexpand")
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = builder.build_dataset("wds/set", root=str(exported), split="test", transform=np.asarray)
    (data,) = open_recipe(load_recipe("clip_benchmark"), exported)
    ours = data.split("test")
    assert ours.classes == theirs.classes == CLASSES
    assert theirs.templates == TEMPLATES
    assert ours.prompts == {name: [template.format(c=name) for template in TEMPLATES] for name in CLASSES}
    assert ours.name == "clip_benchmark/set"
    assert (len(ours), len(data.split("train")), len(data.split("validation"))) == (14, 7, 0)
    for index, (picture, label) in enumerate(theirs):
        assert label == ours.labels[index] == index % 6
        np.testing.assert_array_equal(picture, np.asarray(ours.images[index].convert("RGB")))
        found = expected(exported, index)
        found = found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=2)
        np.testing.assert_allclose(picture, found, atol=1)
    assert index == 13


TOKENS = ("input_ids", "token_type_ids", "attention_mask", "word_ids")


class Client(torch.nn.Module):
    """Our model with the two methods that CLIP_benchmark calls."""

    def __init__(self, saved):
        super().__init__()
        self.saved = saved

    def encode_image(self, pixels):
        return self.saved.model.get_image_features(pixels).pooler_output

    def encode_text(self, tokens):
        return self.saved.model.get_text_features(**dict(zip(TOKENS, tokens.unbind(1), strict=True))).pooler_output


def test_metrics_are_theirs_on_the_same_files(saved, exported, tmp_path, monkeypatch):
    options = {"resamples": 2, "report": lambda line: None}
    evaluate([saved.folder], "clip_benchmark", exported, ["zero-shot"], tmp_path / "out", **options)
    (path,) = (tmp_path / "out" / "clip_benchmark").glob("*-global.json")
    content = json.loads(path.read_text())
    assert (content["dataset"], content["task"]) == ("set", "zeroshot_classification")
    ours = content["metrics"]
    assert 0 < ours["acc1"] < ours["acc5"]

    # by the model alone
    (data,) = open_recipe(load_recipe("clip_benchmark"), exported)
    test = data.split("test")
    prompts = np.stack([saved.texts(data.prompts[name]).mean(axis=0) for name in data.classes], axis=1)
    scores = saved.images(test.images) @ (prompts / np.linalg.norm(prompts, axis=0))
    assert ours == pytest.approx(plain_metrics(scores, test.labels), abs=1e-5)

    pytest.importorskip("webdataset", reason="pip install --no-deps clip-benchmark webdataset braceexpand")
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    from clip_benchmark.metrics import zeroshot_classification

    def of_one(value):
        return float(value.item() if isinstance(value, np.ndarray) else value)

    # CLIP_benchmark 1.6.2 calls float() with arrays of one number, which NumPy 2.5 refuses
    monkeypatch.setattr(zeroshot_classification, "float", of_one, raising=False)

    def pixels(picture):
        return saved.processor(images=[picture], return_tensors="pt")["pixel_values"][0]

    def tokens(texts):
        found = saved.processor(text=texts, return_tensors="pt")
        # a tokenizer returns one tensor there
        return torch.stack([found[name] for name in TOKENS], dim=1)

    dataset = builder.build_dataset("wds/set", root=str(exported), split="test", transform=pixels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    classifier = zeroshot_classification.zero_shot_classifier(
        Client(saved), tokens, dataset.classes, dataset.templates, "cpu", amp=False
    )
    logits, _ = zeroshot_classification.run_classification(Client(saved), classifier, loader, "cpu", amp=False)
    np.testing.assert_allclose(logits / 100, scores, rtol=0, atol=1e-5)
    theirs = zeroshot_classification.evaluate(
        Client(saved), loader, tokens, dataset.classes, dataset.templates, "cpu", amp=False
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


def plain_metrics(scores, labels):
    orders = [sorted(range(len(row)), key=lambda label: -row[label]) for row in scores]
    recalls = []
    for label in sorted(set(labels.tolist())):
        chosen = [order[0] == label for order, truth in zip(orders, labels, strict=True) if truth == label]
        recalls.append(sum(chosen) / len(chosen))
    return {
        "acc1": np.mean([order[0] == truth for order, truth in zip(orders, labels, strict=True)]),
        "acc5": np.mean([truth in order[:5] for order, truth in zip(orders, labels, strict=True)]),
        "mean_per_class_recall": np.mean(recalls),
    }


def test_metrics_by_hand():
    draw = np.random.default_rng(0)
    # class 6 has no image
    scores, labels = draw.normal(size=(60, 7)), draw.integers(0, 6, 60)
    assert clip_benchmark_metrics(scores, labels) == pytest.approx(plain_metrics(scores, labels))
    few = clip_benchmark_metrics([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], [0, 1, 1])
    assert np.isnan(few["acc5"])
    assert (few["acc1"], few["mean_per_class_recall"]) == pytest.approx((2 / 3, 0.75))


def test_a_set_is_a_source_whose_numbers_are_classes(exported, tmp_path):
    path = tmp_path / "s.yaml"
    keys = {"kind": "clip_benchmark", "path": str(exported), "split": "test"}
    path.write_text(
        json.dumps([keys, {**keys, "split": "train", "captions": ["{label}!"], "where": {"label": "effusion"}}])
    )
    first, second = load_sources(path)
    samples = list(SampleStream([first], shuffle=False))
    assert [sample["label"] for sample in samples] == [CLASSES[index % 6] for index in range(14)]
    assert [sample["caption"] for sample in samples] == [f"a scan with {CLASSES[i % 6]}" for i in range(14)]
    # not that of a tar's `cls`
    assert {sample["modality"] for sample in samples} == {-100}
    # by two processes that are sent locations only
    again = list(SampleStream([first], shuffle=False, num_workers=2))
    assert [sample["caption"] for sample in again] == [sample["caption"] for sample in samples]
    assert [sample["caption"] for sample in SampleStream([second], shuffle=False)] == ["effusion!"]
    path.write_text(
        json.dumps([{"kind": "webdataset", "files": [str(exported / "test" / "*.tar")], "caption": "txt"}])
    )
    with pytest.raises(SourceError, match="a class and no modality: use `kind: clip_benchmark, path: "):
        SampleStream(load_sources(path))


def test_a_broken_set_says_what_is_wrong(exported, tmp_path):
    import shutil

    recipe = load_recipe("clip_benchmark")
    folder = Path(shutil.copytree(exported, tmp_path / "set"))
    names, count = folder / "classnames.txt", folder / "test" / "nshards.txt"
    for path, content, message in (
        (names, "a\nb\n", "but classnames.txt has 2 lines"),
        (names, "a\n\nb\n", "classnames.txt, line 2: the line is empty"),
        (names, "a\na\nb\n", "has 'a' twice"),
        (count, "4\n", "3.tar is missing"),
        (count, "many", "must contain the number of tars"),
        (folder / "zeroshot_classification_templates.txt", "a scan\n", "must contain {c}"),
        (folder / "dataset_type.txt", "multilabel\n", "says multilabel"),
    ):
        old = path.read_text() if path.exists() else None
        path.write_text(content)
        assert message in check_recipe(recipe, folder)[0]
        path.unlink() if old is None else path.write_text(old)
    count.unlink()
    assert "nshards.txt is missing; splits with one: train" in check_recipe(recipe, folder)[0]


def test_what_cannot_be_exported_leaves_nothing(exported, tmp_path):
    sources = load_sources(table(tmp_path / "in", 6, label="caption"))
    for arguments, message in (
        ((exported, "other"), "of the class 'caption 0', which"),
        ((exported, "test"), "exists already"),
        ((exported, "val", ["{c}"]), "leave out the templates"),
        ((exported, "../up"), "the name of a folder"),
        ((tmp_path / "in",), "has no classnames.txt"),
        ((tmp_path / "new", "test", ["no place"]), "must contain {c}"),
    ):
        with pytest.raises(MedMoEError, match=re.escape(message)):
            export_clip_benchmark(sources, *arguments)
    assert sorted(path.name for path in exported.iterdir() if path.is_dir()) == ["test", "train"]
    named = load_sources(table(tmp_path / "named", 2, caption="kind", where={"kind": "effusion"}))
    with pytest.raises(ArgumentError, match="All samples are of the class 'effusion'"):
        export_clip_benchmark(named, tmp_path / "new")
    # a failed export does not stand in the way of the next one
    assert export_clip_benchmark(load_sources(table(tmp_path / "in", 6)), tmp_path / "new") == CLASSES
    (tmp_path / "in" / "table.csv").write_text("image\tcaption\tkind\n0.png\tMRN: 12345678\tx\n")
    with pytest.raises(IdentifierError):
        export_open_clip(load_sources(tmp_path / "in" / "sources.yaml"), tmp_path / "csv")
    assert not (tmp_path / "csv").exists()


def test_open_clip_reads_the_csv_that_we_write_and_we_read_it_too(exported, tmp_path, monkeypatch):
    data = pytest.importorskip("open_clip_train.data", reason='pip install "medmoe_hf[compare]"')
    sources = load_sources(exported.parent / "in" / "sources.yaml")
    table_file = export_open_clip(sources, tmp_path / "pairs")
    monkeypatch.chdir(tmp_path / "pairs")
    theirs = data.CsvDataset(str(table_file), np.asarray, "filepath", "title", tokenizer=lambda texts: texts)
    (tmp_path / "s.yaml").write_text(json.dumps([{"kind": "csv", "files": [str(table_file)]}]))
    ours = list(SampleStream(load_sources(tmp_path / "s.yaml"), shuffle=False))
    assert len(theirs) == len(ours) == 14
    for index, sample in enumerate(ours):
        picture, title = theirs[index]
        assert title == sample["caption"] == f"caption {index}"
        np.testing.assert_array_equal(picture, np.asarray(sample["image"]))
        np.testing.assert_allclose(picture, expected(exported, index), atol=1)
