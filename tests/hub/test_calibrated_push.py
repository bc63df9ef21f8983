"""A folder with tasks and a rejector, pushed to a Hub and loaded elsewhere, answers and refuses as it did here."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_encoders import medmoe_folder

from medmoe_hf.data.sources import load_sources
from medmoe_hf.evaluation.calibrate import calibrate
from medmoe_hf.evaluation.rejector import add_rejector
from medmoe_hf.hub import publish
from medmoe_hf.inference.task_files import read_task_file
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

REPO = "user/calibrated"
COUNT = 300  # A rejector needs 50 images beside those that it is fitted on.

ELSEWHERE = """
import sys
sys.modules["medmoe_hf"] = None
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

remote = {"trust_remote_code": True}
pictures = [Image.open(f"{i}.png") for i in range(8)]
model = AutoModel.from_pretrained(REPO, **remote).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
pixels = AutoProcessor.from_pretrained(REPO, **remote)(images=pictures, return_tensors="pt")["pixel_values"]
answer, task = model.classify(pixels, "shade"), model.tasks["shade"]
routed = model.route(pixels)
classify = pipeline("zero-shot-image-classification", model=REPO, **remote)
torch.save({
    "probabilities": answer.probabilities,
    "labels": answer.labels,
    "sets": answer.sets,
    "calibrated": answer.calibrated,
    "thresholds": dict(task.calibration.thresholds),
    "quantiles": dict(task.calibration.quantiles),
    "pipeline": classify(pictures, candidate_labels=["bright", "dark"]),
    "ood_score": routed.ood_score,
    "accepted": routed.accepted,
    "named": classify(pictures, task="shade"),
}, "found.pt")
"""


@pytest.fixture
def made(tmp_path):
    """A folder that was calibrated on noisy labels of what the model finds in pictures of two shades."""
    folder = medmoe_folder(tmp_path / "model")
    draw = np.random.default_rng(0)
    for row in range(COUNT):
        shade = np.clip(draw.normal(60 + 130 * (row % 2), 40, size=(64, 64)), 0, 255)
        Image.fromarray(shade.astype(np.uint8)).save(tmp_path / f"{row}.png")
    prompts = {"dark": ["Normal chest radiograph."], "bright": ["Large pleural effusion.", "Fluid."]}
    (tmp_path / "task.yaml").write_text(
        yaml.safe_dump({"name": "shade", "prompts": prompts, "score": "mean"}, sort_keys=False)
    )
    (wanted,) = read_task_file(tmp_path / "task.yaml")
    model, processor = MedMoEModel.from_pretrained(folder).eval(), MedMoEProcessor.from_pretrained(folder)
    pixels = processor(images=[str(tmp_path / f"{row}.png") for row in range(COUNT)], return_tensors="pt")
    scores = model.classify(pixels["pixel_values"], processor.tokenize_task(wanted.task())).scores
    gap = scores[:, 1] - scores[:, 0]
    bright = (gap > gap.median()).numpy() ^ (draw.random(COUNT) < 0.2)
    rows = [f"{row}.png,{'bright' if one else 'dark'},p{row},xray" for row, one in enumerate(bright)]
    (tmp_path / "val.csv").write_text("\n".join(["file,finding,patient,modality", *rows]) + "\n")
    source = {"kind": "csv", "files": [str(tmp_path / "val.csv")], "image": "file", "caption": "finding"}
    source |= {"label": "finding", "subject": "patient", "modality": "field:modality", "name": "shades"}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump([source]))
    calibrate(folder, load_sources(tmp_path / "sources.yaml"), [wanted], tmp_path / "made", resamples=5)
    add_rejector(tmp_path / "made", load_sources(tmp_path / "sources.yaml"))
    # One that is unlike the others.
    stripes = np.tile(np.arange(64) % 2 * 255, (64, 1)).astype(np.uint8)
    Image.fromarray(stripes).save(tmp_path / "7.png")
    return tmp_path / "made"


@pytest.mark.slow
def test_a_folder_answers_and_refuses_the_same_from_the_hub(hub, made, tmp_path):
    model, processor = MedMoEModel.from_pretrained(made).eval(), MedMoEProcessor.from_pretrained(made)
    pictures = [str(tmp_path / f"{row}.png") for row in range(8)]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    answer, routed = model.classify(pixels, "shade"), model.route(pixels)
    fitted = model.tasks["shade"].calibration
    publish(made, REPO)
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"REPO = {REPO!r}\n{ELSEWHERE}"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "another home", "hf_read"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found["probabilities"], answer.probabilities, rtol=1e-5, atol=1e-6)
    assert (found["labels"], found["sets"], found["calibrated"]) == (answer.labels, answer.sets, True)
    assert (found["thresholds"], found["quantiles"]) == (dict(fitted.thresholds), dict(fitted.quantiles))
    torch.testing.assert_close(found["ood_score"], routed.ood_score, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["accepted"], routed.accepted)
    assert not routed.accepted[7]
    assert routed.accepted[:7].any()
    # Not what the scores alone would say.
    plain = model.tasks["shade"].uncalibrated().probabilities(answer.scores)
    assert (plain - answer.probabilities).abs().max() > 0.01
    for kind in ("pipeline", "named"):
        scores = [{row["label"]: row["score"] for row in rows} for rows in found[kind]]
        expected = [dict(zip(answer.classes, row, strict=True)) for row in answer.probabilities.tolist()]
        assert scores == [pytest.approx(row, abs=1e-5) for row in expected]
