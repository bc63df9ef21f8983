"""`medmoe calibrate`: from sources and a task file to a folder with fitted probabilities, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import medmoe_hf.evaluation.calibrate as calibrate_module
from medmoe_hf.cli import app
from medmoe_hf.data.sources import load_sources
from medmoe_hf.evaluation.calibrate import calibrate
from medmoe_hf.evaluation.calibration import fit_calibration
from medmoe_hf.hub.card import build_card
from medmoe_hf.hub.folder_checks import check_folder
from medmoe_hf.inference.task_files import TaskFile, read_task_file
from medmoe_hf.model import Calibration, MedMoEModel, MedMoEProcessor, Task
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ModelSection

COUNT = 80
PROMPTS = {"dark": ["Normal chest radiograph.", "Clear lungs."], "bright": ["Large pleural effusion."]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, images of two kinds with some wrong labels, and the sources and the task that name them."""
    place = tmp_path_factory.mktemp("calibrate")
    torch.manual_seed(3)
    sizes = {"vision_config": {"image_size": 64}}
    model, processor = build_model(ModelSection(preset="tiny", overrides=sizes))
    model.eval().save_pretrained(place / "model")
    processor.image_processor.size = {"height": 64, "width": 64}
    processor.save_pretrained(place / "model")
    rng = np.random.default_rng(0)
    rows = ["file,finding,patient,split,site,modality"]
    pixels = []
    for row in range(COUNT):
        shade = 60 + 130 * (row % 2)
        pixels.append(np.clip(rng.normal(shade, 40, size=(64, 64)), 0, 255).astype(np.uint8))
        Image.fromarray(pixels[-1]).save(place / f"{row}.png")
        finding = (row % 2) ^ (rng.random() < 0.2)
        rows.append(f"{row}.png,{'AB'[finding]},p{row // 2},{'val' if row < 72 else 'test'},{row % 4},xray")
    rows.append("0.png,C,p0,val,0,xray")
    (place / "scans.csv").write_text("\n".join(rows) + "\n")
    source = {"kind": "csv", "files": [str(place / "scans.csv")], "name": "scans", "image": "file"}
    source |= {"caption": "finding", "label": "finding", "subject": "patient", "modality": "field:modality"}
    (place / "sources.yaml").write_text(yaml.safe_dump([source]))
    # An untrained model finds one kind more similar to the one sentence: that is the class of this kind.
    task = processor.tokenize_task(read_task({"name": "shade", "prompts": PROMPTS}, place).task())
    inputs = processor(images=pixels, return_tensors="pt")["pixel_values"]
    scores = model.classify(inputs, task).scores
    gap = scores[:, 1] - scores[:, 0]
    names = "AB" if gap[1::2].mean() > gap[::2].mean() else "BA"
    written = {"name": "shade", "title": "Shades", "prompts": PROMPTS, "modality": "xray"}
    written |= {"labels": dict(zip(PROMPTS, names, strict=True))}
    (place / "task.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    return place


def read_task(content, place):
    (place / "some.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_task_file(place / "some.yaml")[0]


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def test_a_folder_is_calibrated_in_place(place, tmp_path):
    before = {path.name for path in (place / "model").iterdir()}
    options = ("--data", place / "sources.yaml", "--task", place / "task.yaml", "--resamples", 20)
    out = run(place / "model", *options, "--split", "val", "--out", tmp_path / "made", "--prevalence", "bright=0.1")
    assert out.exit_code == 0, out.output
    assert "fitted on 72 images of 36 subjects (scans, split val); 1 others have none of its classes." in out.output
    assert {path.name for path in (tmp_path / "made").iterdir()} == before | {"tasks.json"}
    again = run(tmp_path / "made", *options, "--split", "val", "--prevalence", "bright=0.1")
    assert again.exit_code == 0, again.output
    model = MedMoEModel.from_pretrained(tmp_path / "made").eval()
    processor = MedMoEProcessor.from_pretrained(tmp_path / "made")
    task = model.tasks["shade"]

    # The same by hand: scores of the processor's own pixels, and what the tests of the fit have checked.
    rows = [line.split(",") for line in (place / "scans.csv").read_text().splitlines()[1:73]]
    pixels = processor(images=[str(place / row[0]) for row in rows], return_tensors="pt")["pixel_values"]
    names = yaml.safe_load((place / "task.yaml").read_text())["labels"]
    labels = [[names[name][0] for name in PROMPTS].index(row[1]) for row in rows]
    scores = model.classify(pixels, task).scores.double().numpy()
    fitted = fit_calibration(task.uncalibrated(), scores, labels, [row[2] for row in rows], resamples=20).calibration
    assert task.calibration.temperature == pytest.approx(fitted.temperature, rel=1e-3)
    for key in ("bias", "thresholds", "prior", "quantiles"):
        assert getattr(task.calibration, key) == pytest.approx(getattr(fitted, key), rel=1e-2, abs=1e-2)
    assert task.calibration.prevalence == pytest.approx({"dark": 0.9, "bright": 0.1})
    assert task.calibration.fitted_on["data"] == "scans"
    assert str(place) not in (tmp_path / "made/tasks.json").read_text()

    answer = model.classify(pixels, "shade")
    shifted = task.probabilities(answer.scores, task.calibration.prior)
    assert (answer.probabilities[:, 1] < shifted[:, 1]).all()
    card = str(build_card(tmp_path / "made"))
    assert "shade: Shades" in card
    assert "72 images of 36 subjects, scans, val" in card
    assert [line for line in check_folder(tmp_path / "made") if "tasks.json" in line] == []
    assert "## Tasks" not in str(build_card(place / "model"))


@pytest.mark.parametrize(
    ("measured", "worse"),
    [
        (
            {
                "ece_before": [0.1, 0.0, 0.2],
                "ece": [0.1],
                "balanced_accuracy_before": [0.6],
                "balanced_accuracy": [0.6],
            },
            "",
        ),
        ({"ece_before": [0.2], "ece": [0.1, 0.0, 0.3]}, ""),
        ({"ece_before": [0.1], "ece": [0.125]}, "expected calibration error 0.125 instead of 0.100"),
        (
            {"ece_before": [0.1], "ece": [0.2], "balanced_accuracy_before": [0.75], "balanced_accuracy": [0.5]},
            "expected calibration error 0.200 instead of 0.100 and balanced accuracy 0.500 instead of 0.750",
        ),
    ],
)
def test_what_a_calibration_makes_worse_is_said_in_one_sentence(measured, worse):
    half = dict.fromkeys(PROMPTS, 0.5)
    facts = {"cases": 20, "subjects": 10, "data": "scans", "split": "val"}
    fitted = Calibration(1.0, half, half, half, 0.9, "marginal", half, fitted_on=facts, measured=measured)
    report = calibrate_module.CalibrationReport([Task("shade", PROMPTS, calibration=fitted)], "made", {"shade": 0})
    lines = [line for line in str(report).splitlines() if "Worse" in line]
    told = f"  Worse than before the calibration on these subjects: {worse}; calibrate on more cases, or keep the"
    assert lines == ([f"{told} uncalibrated task."] if worse else [])


def test_test_data_are_refused(place, tmp_path):
    options = ("--data", place / "sources.yaml", "--task", place / "task.yaml", "--resamples", 5)
    out = run(place / "model", *options, "--out", tmp_path / "made")
    assert out.exit_code == 1
    assert 'The split is called "test"' in str(out.exception) + out.output
    out = run(place / "model", *options, "--out", tmp_path / "made", "--split", "test")
    assert 'The split is called "test"' in str(out.exception) + out.output
    assert not (tmp_path / "made").exists()
    allowed = run(place / "model", *options, "--out", tmp_path / "made", "--allow-test")
    assert allowed.exit_code == 0, allowed.output
    stored = json.loads((tmp_path / "made/tasks.json").read_text())["tasks"]["shade"]["calibration"]
    assert stored["fitted_on"]["split"] == "test, val"
    source = yaml.safe_load((place / "sources.yaml").read_text())[0]
    (place / "scans_test.csv").write_text((place / "scans.csv").read_text())
    (place / "named.yaml").write_text(yaml.safe_dump([source | {"files": [str(place / "scans_test.csv")]}]))
    out = run(place / "model", "--data", place / "named.yaml", *options[2:], "--out", tmp_path / "b", "--split", "val")
    assert 'The file or folder is called "scans_test.csv"' in str(out.exception) + out.output


def test_what_is_wrong_is_said(place, tmp_path, monkeypatch):
    sources = load_sources(place / "sources.yaml")

    def refused(changes, match, **arguments):
        content = yaml.safe_load((place / "task.yaml").read_text()) | changes
        with pytest.raises(ValueError, match=match):
            calibrate(
                place / "model", sources, [read_task(content, place)], tmp_path / "out", split="val", **arguments
            )
        assert not (tmp_path / "out").exists()

    refused({"where": {"site": 0}}, r"has 0 cases|has \d cases, \d+ more")
    refused({"labels": {"dark": "D", "bright": "E"}}, r"no image has one of the classes .* The labels are: [AB], ")
    refused({"labels": {"drak": "A"}}, 'has "drak", which is no class')
    refused({"prompt": {}}, "prompt.*prompts")
    refused({"kind": "multi"}, "kind")
    refused({}, '"grey" is no class', sensitivity={"grey": 0.9})
    with monkeypatch.context() as patched:  # before a model is loaded
        patched.setattr(calibrate_module, "MedMoEModel", None)
        refused({}, r"`sensitivity` of \"dark\" must lie between 0 and 1, got 90", sensitivity={"dark": 90})
        refused({}, "`coverage` is a share of at least 0.5", coverage=90)
    sources = [sources[0].model_copy(update={"where": {"site": ["[12]"]}})]
    refused({"where": {"site": [0, 3]}}, "`where` of the task leaves none of scans, by `site`")
    refused({"where": {"site": [0, 1]}}, r"has \d cases, \d+ more")  # site 1 alone has one kind
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists already"):
        calibrate(place / "model", sources, read_task_file(place / "task.yaml"), tmp_path / "there")
    with pytest.raises(ValueError, match="name a new one"):
        calibrate("someone/model", sources, read_task_file(place / "task.yaml"))


def test_labels_of_findings_are_separated():
    prompts = {"edema": ["Edema."], "effusion": ["Effusion."]}
    task = TaskFile(name="f", prompts=prompts, kind="multi-label", labels={"effusion": ["effusion", "fluid"]})
    found = [task.classes_of(text) for text in ("Edema|Effusion", "no finding", "", "fluid, Nodule", None, "EDEMA")]
    assert found == [[0, 1], [], None, [1], None, [0]]
