"""The model card: facts that were given and no others, Markdown that renders, metadata that the Hub takes, snippets
that run."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from clean_process import run_clean
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from PIL import Image

from medmoe_hf.errors import CardError
from medmoe_hf.hub.card import HAND_WRITTEN, build_card, write_card
from medmoe_hf.hub.folder_checks import check_folder
from medmoe_hf.model import MedMoEConfig, MedMoEForImageClassification, MedMoEModel
from medmoe_hf.model.configuration_medmoe import REQUIRED_TRANSFORMERS
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ModelSection

ROOT = Path(__file__).parents[2]
RECORD = {
    "steps": 300,
    "samples": 19200,
    "seconds": 5400.0,
    "log": [],
    "evaluations": [
        {"step": 100, "loss": 9.0, "routing_image": 0.5},
        {"step": 300, "loss": 3.25, "routing_image": 0.875, "text_to_image_r1": 0.125},
    ],
    "skipped": {"mine: unreadable image": 3, "mine: empty caption": 4},
    "config": {
        "output_dir": "/secret/place/run",
        "model": {"from_pretrained": "/secret/place/start"},
        "data": {
            "train": [
                {"kind": "csv", "files": ["/secret/place/john_smith.csv"], "modality": "dicom"},
                {"kind": "hub", "path": "someone/scans", "weight": 2.5},
                {"kind": "webdataset", "files": ["/secret/place/*.tar"], "name": "a|b <script>`x`"},
            ],
            "evaluation": {"kind": "phantom"},
        },
        "max_steps": 400,
        "learning_rate": 0.0003,
    },
}
INTERVAL = {"value": 0.9024, "low": 0.871, "high": 0.93, "n": 600, "undefined": 0}
RESULTS = [
    {
        "protocol": "zero-shot",
        "model": "/secret/place/small",
        "dataset": "phantom-xray",
        "count": 600,
        "metrics": {
            "global/accuracy": INTERVAL,
            "global/macro_auroc": INTERVAL | {"value": None, "low": None, "high": None},
            "image/routing_accuracy": INTERVAL | {"value": 0.75},
        },
        "facts": {
            "title": "Phantoms",
            "source": "/secret/place/unseen data/set.tar | drawn",
            "overlaps": ["CheXpert train"],
            "seed": 0,
            "count_by_class": {"normal": 150, "effusion": 450},
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny dual encoder with its processor."""
    model, processor = build_model(ModelSection(preset="tiny"))
    place = tmp_path_factory.mktemp("card") / "small"
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@pytest.fixture
def given(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    return {"training": tmp_path / "training.json", "results": tmp_path / "results.json"}


def rendered(card):
    """Blocks of the card's text: for each table its rows of cells; and the code of each fence by language."""
    lines = card.text.splitlines()
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    tables = [
        [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[token.map[0] : token.map[1]]]
        for token in tokens
        if token.type == "table_open"
    ]
    # A row that a renderer takes for no part of a table is a paragraph with bars in it.
    plain = [token for token in tokens if token.type == "inline" and re.search(r"(?m)^\s*\|", token.content)]
    fences = [(token.info, token.content) for token in tokens if token.type == "fence"]
    html = [token for token in tokens if token.type == "html_block" and token.content.strip() != HAND_WRITTEN]
    return tables, plain + html, fences


def rows_of(card):
    return [[cell.strip() for cell in row] for table in rendered(card)[0] for row in table]


def cells(card):
    """What stands beside the first cell of a row; of equal ones, in the last."""
    return {row[0]: row[1:] for row in rows_of(card)}


def heading(card, name):
    return card.text.split(f"# {name}\n", 1)[1].split("\n## ", 1)[0]


# The Hub's side


def test_metadata_is_what_the_hub_takes(folder, given, tmp_path):
    card = build_card(
        folder, **given, repo="you/medmoe", base_model="someone/start", license="apache-2.0", datasets=["a/b"]
    )
    (tmp_path / "README.md").write_text(str(card))
    found = metadata_load(tmp_path / "README.md")
    assert {key: found[key] for key in ("license", "library_name", "pipeline_tag", "datasets", "base_model")} == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "datasets": ["a/b"],
        "base_model": ["someone/start"],
    }
    assert found["model-index"][0]["name"] == "medmoe"
    again = ModelCard.load(tmp_path / "README.md").data
    measured = {one.metric_type: one.metric_value for one in again.eval_results}
    assert measured == {"accuracy": 0.9024, "routing_accuracy": 0.75}
    assert {(one.task_type, one.dataset_type, one.dataset_name) for one in again.eval_results} == {
        ("zero-shot-image-classification", "phantom-xray", "Phantoms")
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_hub_sources_are_the_datasets_unless_others_are_named(folder, given):
    assert build_card(folder, **given).data.datasets == ["someone/scans"]


# Markdown


@pytest.mark.parametrize("everything", [True, False])
def test_markdown_renders_with_whole_tables(folder, given, everything):
    card = build_card(folder, **given if everything else {}, repo="you/medmoe")
    tables, broken, fences = rendered(card)
    assert len(tables) == (10 if everything else 4)
    assert not broken
    for table in tables:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(cell.strip() for row in table for cell in row)
    assert [info for info, _ in fences] == ["bash", "python", "python", "python", "bibtex"]
    assert "{{" not in card.text.replace(fences[-1][1], "")
    assert "{%" not in card.text


def test_hostile_names_stay_text(folder, given):
    text = MarkdownIt("commonmark").enable("table").render(build_card(folder, **given).text)
    assert "a|b &lt;script&gt;`x`" in text
    assert "<script>" not in text


# Facts


def test_numbers_with_their_intervals(folder, given):
    card = build_card(folder, **given)
    rows = rows_of(card)
    whole = ["zero-shot", "phantom-xray", "600"]
    assert [*whole, "global", "accuracy", "0.902", "0.871 to 0.930"] in rows
    assert [*whole, "global", "macro_auroc", "not defined", "not stated"] in rows
    assert "0.750" in heading(card, "Experts and routing")
    assert "routing_accuracy" not in heading(card, "Evaluation")
    assert ["zero-shot", "phantom-xray", "count_by_class", "normal 150, effusion 450"] in rows
    assert ["zero-shot", "phantom-xray", "overlaps", "CheXpert train"] in rows
    assert ["zero-shot", "phantom-xray", "seed", "0"] in rows


def test_training_of_a_run(folder, given):
    card = build_card(folder, **given)
    found = cells(card)
    assert found["started from"] == ["the checkpoint start"]
    assert found["steps"] == ["300 of 400"]
    assert found["pairs seen"] == ["19,200"]
    assert found["pairs per step"] == ["64"]
    assert found["time"] == ["1.50 h"]
    assert found["unreadable samples"] == ["7 in the main process"]
    assert found["learning rate"] == ["0.0003, cosine, 0 steps of warm-up"]
    assert found["someone/scans"] == ["hub", "not stated", "plain", "2.5"]
    assert found["not stated"] == ["csv", "dicom", "plain", "1"]
    held_out = [row for row in rows_of(card) if row[0] in ("100", "300")]
    assert held_out == [
        ["300", "loss", "3.250"],
        ["300", "routing_image", "0.875"],
        ["300", "text_to_image_r1", "0.125"],
    ]


def test_a_yaml_says_what_was_planned(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "output_dir: runs/x\nmodel: {preset: tiny}\nmax_steps: 7\ndata: {train: {kind: phantom, length: 9}}\n"
    )
    card = build_card(folder, training=tmp_path / "run.yaml")
    found = cells(card)
    assert found["steps"] == ["7 planned; the number done is not stated"]
    assert found["started from"] == ["new weights of the preset tiny"]
    assert "All of these data are synthetic drawings" in card.text
    assert "During training" not in card.text


def test_a_folder_brings_its_own_record(folder, given, tmp_path):
    shutil.copytree(folder, tmp_path / "small")
    shutil.copy(given["training"], tmp_path / "small")
    assert build_card(tmp_path / "small").text == build_card(folder, training=given["training"]).text


def test_no_path_reaches_the_card(folder, given):
    text = str(build_card(folder, **given))
    assert "secret" not in text
    assert "john" not in text
    assert "set.tar" in text
    assert str(folder.parent) not in text


@pytest.mark.parametrize("preset", ["paper", "plus", "official", "tiny"])
def test_architecture_from_the_config(preset, tmp_path):
    config = MedMoEConfig.from_preset(preset)
    config.architectures = ["MedMoEModel"]
    config.save_pretrained(tmp_path)
    found = cells(build_card(tmp_path))
    model = MedMoEModel(config) if preset == "tiny" else None
    # README's table, and a model that is really made
    expected = {"paper": 36.9e6, "official": 36.0e6, "plus": 36.9e6, "tiny": 0.41e6}[preset]
    sizes = {name: int(values[1].replace(",", "")) for name, values in found.items() if len(values) == 2 and
             re.fullmatch(r"[\d,]+", values[1])}  # fmt: skip
    tower = sizes["backbone"] + sizes["experts"] + sizes["image router"] + sizes.get("norms of the pyramid", 0)
    assert tower == pytest.approx(expected, rel=0.01)
    assert sizes["used for one image"] == tower - sizes["experts"] * 5 // 6
    if model is not None:
        assert sizes["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert f"The nearest preset of `medmoe_hf` is `{preset}`. This model does not differ from it." in " ".join(
        build_card(tmp_path).text.split()
    )


def test_differences_from_the_preset(tmp_path):
    config = MedMoEConfig.from_preset("plus", projection_dim=256, vision_config={"modalities": ["xray", "ct"]})
    config.architectures = ["MedMoEModel"]
    config.save_pretrained(tmp_path)
    found = cells(build_card(tmp_path))
    six = "0 xray, 1 ct, 2 mri, 3 ultrasound, 4 histopathology, 5 fundus"
    assert found["projection_dim"] == ["512", "256"]
    assert found["vision_config.modalities"] == [six, "0 xray, 1 ct"]
    assert found["1"][0] == "ct"


def test_what_nobody_gave_is_not_stated(folder):
    card = build_card(folder)
    found = card.data.to_dict()
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    assert "License of the weights: not stated" in card.text
    assert "Base model: not stated" in card.text
    assert "The training configuration is not stated." in heading(card, "Training")
    assert "The training data are not stated." in heading(card, "Training")
    assert "is not stated" in heading(card, "Evaluation")
    assert "is not stated" in heading(card, "Experts and routing")
    # no number but those of the configuration
    assert not re.search(r"\d", heading(card, "Evaluation") + heading(card, "Training"))


# Snippets, from the card's text, where this package is not installed


def run_snippets(card, cwd, after):
    code = "".join(content for info, content in rendered(card)[2] if info == "python")
    run_clean(code + after, folder=cwd)


@pytest.mark.parametrize("repo", ["you/medmoe", pytest.param(None, marks=pytest.mark.slow)])
def test_snippets_run(folder, tmp_path, repo):
    place = tmp_path / (repo or "here")
    shutil.copytree(folder, place)
    cwd = tmp_path if repo else place
    Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12).save(cwd / "scan.png")
    run_snippets(
        build_card(place, repo=repo),
        cwd,
        "assert probabilities.shape == (1, 2) and abs(probabilities.sum().item() - 1) < 1e-5\n"
        "assert routing.modality[0] in ('xray', 'ct', 'mri', 'ultrasound', 'histopathology', 'fundus')\n"
        "assert {answer['label'] for answer in answers} == {'normal', 'abnormal'}\n"
        "assert similarities.shape == (1, 2)\n",
    )


@pytest.mark.slow
def test_snippets_of_a_classifier_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "you" / "medmoe")
    labels = {0: "benign", 1: "malignant", 2: "normal"}
    config = MedMoEConfig.from_pretrained(folder, id2label=labels, label2id={name: i for i, name in labels.items()})
    MedMoEForImageClassification(config).save_pretrained(tmp_path / "you" / "medmoe")
    Image.new("RGB", (50, 70), "grey").save(tmp_path / "scan.png")
    card = build_card(tmp_path / "you" / "medmoe", repo="you/medmoe")
    assert card.data.pipeline_tag == "image-classification"
    assert cells(card)["classes"] == ["benign, malignant, normal"]
    run_snippets(
        card,
        tmp_path,
        "assert probabilities.shape == (1, 3)\n"
        "assert {answer['label'] for answer in answers} == {'benign', 'malignant', 'normal'}\n",
    )


def test_requirements_are_those_of_the_package(folder):
    tomllib = pytest.importorskip("tomllib")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (line,) = [content for info, content in rendered(build_card(folder))[2] if info == "bash"]
    named = set(re.findall(r'"([^"]+)"', line))
    assert named == {one for one in wanted if re.split("[>=]", one)[0] in ("torch", "torchvision", "transformers")}
    assert REQUIRED_TRANSFORMERS in named


# The file


def test_the_file_keeps_what_was_written_by_hand(folder, tmp_path):
    place = tmp_path / "small"
    shutil.copytree(folder, place)
    path = write_card(place, build_card(place))
    first = path.read_text()
    assert first.rstrip().endswith(HAND_WRITTEN)
    path.write_text(first + "\n## Notes\n\nAsk me.\n")
    write_card(place, build_card(place, license="mit"))
    second = path.read_text()
    assert second.endswith(f"{HAND_WRITTEN}\n\n## Notes\n\nAsk me.\n")
    assert metadata_load(path)["license"] == "mit"
    assert write_card(place, build_card(place, license="mit")).read_text() == second
    assert not list(place.glob(".README*"))


def test_a_push_has_nothing_against_the_card(folder, given, tmp_path):
    place = tmp_path / "small"
    shutil.copytree(folder, place)
    write_card(place, build_card(place, **given, repo="you/medmoe"))
    assert check_folder(place) == []


def test_somebody_elses_readme_is_not_replaced_unasked(folder, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(CardError, match="was not written by `medmoe card`"):
        write_card(tmp_path, build_card(folder))
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    write_card(tmp_path, build_card(folder), force=True)
    assert "# Mine" not in (tmp_path / "README.md").read_text()


def test_errors_say_what_to_do(folder, given, tmp_path):
    with pytest.raises(CardError, match=r"Cannot read .*config\.json"):
        build_card(tmp_path / "none")
    with pytest.raises(CardError, match="must be a Hub id"):
        build_card(folder, repo="not a repo")
    with pytest.raises(CardError, match="no record of a run"):
        build_card(folder, training=given["results"])
    with pytest.raises(CardError, match="no list of results"):
        build_card(folder, results=given["training"])
    both = [RESULTS[0], {**RESULTS[0], "model": "clip"}]
    given["results"].write_text(json.dumps(both))
    assert len(build_card(folder, results=given["results"]).data.eval_results) == 2
    given["results"].write_text(json.dumps([both[1], {**RESULTS[0], "model": "siglip"}]))
    with pytest.raises(CardError, match="results of clip, siglip, and none of these is called small"):
        build_card(folder, results=given["results"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CardError, match="Merge it first"):
        build_card(tmp_path)


# The package


@pytest.mark.slow
def test_a_built_package_has_the_template(tmp_path):
    """From the source archive to the wheel, as `pip install` goes; the template is one file in the repository."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "medmoe_hf", source / "medmoe_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    backend = "from setuptools import build_meta as b; print(b.build_{}({!r}))"
    subprocess.run(
        [sys.executable, "-c", backend.format("sdist", str(tmp_path))], cwd=source, check=True, capture_output=True
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    subprocess.run(
        [sys.executable, "-c", backend.format("wheel", str(tmp_path))], cwd=unpacked, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert packed.read("medmoe_hf/hub/model_card.md") == (ROOT / "model_card.md").read_bytes()
        packed.extractall(tmp_path / "site")
    code = "from medmoe_hf.hub import card; print(card.__file__); print(card._template()[:40])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    ).stdout
    assert str(tmp_path / "site") in found
    assert "{# The template of every card" in found
