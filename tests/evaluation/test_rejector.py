"""`medmoe fit-rejector`: fits against a plain formulation, the folder that is written, and what is refused."""

import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.evaluation.rejector import fit_rejector
from medmoe_hf.hub.card import build_card
from medmoe_hf.hub.folder_checks import check_folder
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ModelSection

COUNTS = {"train": 120, "val": 60, "test": 10}


def test_a_fit_is_that_of_a_plain_formulation():
    random = np.random.default_rng(5)
    mix = random.normal(size=(12, 12)) * np.linspace(3, 0.2, 12)
    ids, held_ids = np.arange(300) % 3, np.arange(100) % 2
    features = (random.normal(size=(300, 12)) @ mix + 4 * ids[:, None]).astype(np.float32)
    held = (random.normal(size=(100, 12)) @ mix + 4 * held_ids[:, None]).astype(np.float32)
    found = fit_rejector(features, ids, held, held_ids, experts=4, weights=torch.zeros(3), accept=0.9, directions=5)

    known = features.astype(np.float64)
    known = (known - known.mean(axis=0)) / known.std(axis=0)
    means = [known[ids == k].mean(axis=0) for k in range(3)]
    apart = known - np.stack(means)[ids]
    values, vectors = np.linalg.eigh(apart.T @ apart / 300)
    largest, directions = values[::-1][:5], vectors[:, ::-1][:, :5]
    rest = values[::-1][5:].mean()
    covariance = (directions * (largest - rest)) @ directions.T + rest * np.eye(12)
    standard = (held - features.astype(np.float64).mean(axis=0)) / features.astype(np.float64).std(axis=0)
    offsets = standard - np.stack(means)[held_ids]
    distances = np.sqrt(np.einsum("nf,nf->n", offsets @ np.linalg.inv(covariance), offsets))
    got = found.distances(torch.from_numpy(held).double(), torch.from_numpy(held_ids)).numpy()
    np.testing.assert_allclose(got, distances, rtol=1e-4)
    # Each of two experts has 50 images, of which 45.9 are to be accepted; the others have the limit of all 100.
    for expert in (0, 1):
        assert found.limits[expert] == pytest.approx(np.sort(distances[held_ids == expert])[45], rel=1e-4)
    assert found.limits[2] == pytest.approx(np.sort(distances)[90], rel=1e-4)
    # No image was routed to the last expert: everything that is, is refused.
    assert (found.scores(torch.from_numpy(held), torch.full((100,), 3)) > 1000).all()


def test_what_cannot_be_fitted_is_said():
    features, ids = np.random.default_rng(0).normal(size=(60, 4)), np.zeros(60, dtype=int)
    options = {"experts": 1, "weights": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"needs 50 images .* got 60 and 20\."):
        fit_rejector(features, ids, features[:20], ids[:20], **options)
    with pytest.raises(ValueError, match="`features` must be finite"):
        fit_rejector(features * np.nan, ids, features, ids, **options)
    with pytest.raises(ValueError, match="between 0 and 1"):
        fit_rejector(features, ids, features, ids, accept=1.0, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, dim gray images of many subjects, and the sources that name them."""
    place = tmp_path_factory.mktemp("reject")
    torch.manual_seed(3)
    model, processor = build_model(ModelSection(preset="tiny", overrides={"vision_config": {"image_size": 64}}))
    model.eval().save_pretrained(place / "model")
    processor.image_processor.size = {"height": 64, "width": 64}
    processor.save_pretrained(place / "model")
    random = np.random.default_rng(0)
    rows = ["file,text,patient,split"]
    for split, count in COUNTS.items():
        for number in range(count):
            pixels = np.clip(random.normal(60 + number % 20, 10, size=(64, 64)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{split}{number}.png")
            rows.append(f"{split}{number}.png,dim,{split}{number // 2},{split}")
    (place / "scans.csv").write_text("\n".join(rows) + "\n")
    source = {"kind": "csv", "files": [str(place / "scans.csv")], "name": "scans", "image": "file", "caption": "text"}
    (place / "sources.yaml").write_text(yaml.safe_dump([source | {"subject": "patient", "modality": "unknown"}]))
    return place


def run(place, *arguments):
    options = ["fit-rejector", place / "model", "--data", place / "sources.yaml", *arguments]
    return CliRunner().invoke(app, [str(one) for one in options])


def test_a_folder_gets_a_rejector_that_is_dropped_by_training(place, tmp_path, caplog):
    before = {path.name for path in (place / "model").iterdir()}
    out = run(place, "--split", "train", "--held-out", "val", "--out", tmp_path / "made", "--accept", 0.9)
    assert out.exit_code == 0, out.output
    assert "Fitted on 120 images of 60 subjects (scans, split train)." in out.output
    assert "set the limits" not in caplog.text
    assert "Limits from 60 images of 30 subjects (split val): 9" in out.output
    assert {path.name for path in (tmp_path / "made").iterdir()} == before | {"rejector.safetensors"}
    assert (tmp_path / "made/rejector.safetensors").stat().st_size < 1_000_000
    model, processor = (kind.from_pretrained(tmp_path / "made") for kind in (MedMoEModel, MedMoEProcessor))
    assert model.rejector.facts["fitted_on"] | {"date": "", "by_expert": {}} == {
        "data": "scans", "split": "train", "images": 120, "subjects": 60, "date": "", "by_expert": {},
    }  # fmt: skip

    def accepted(images):
        return model.eval().route(processor(images=images, return_tensors="pt")["pixel_values"]).accepted

    known = accepted([str(place / f"val{number}.png") for number in range(COUNTS["val"])])
    assert 54 <= int(known.sum()) <= 57
    assert float(known.double().mean()) == pytest.approx(model.rejector.facts["limits_from"]["accepted"])
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[::8] = [255, 0, 80]
    assert accepted([stripes, np.full((64, 64), 255, dtype=np.uint8)]).tolist() == [False, False]

    assert [line for line in check_folder(tmp_path / "made") if "rejector" in line] == []
    card = str(build_card(tmp_path / "made"))
    assert "120 images of 60 subjects, scans, train" in card
    assert "without a warning" not in card
    assert "without a warning" in str(build_card(place / "model"))
    with caplog.at_level(logging.WARNING):
        trained, _ = build_model(ModelSection(from_pretrained=str(tmp_path / "made")))
    assert trained.rejector is None
    assert "medmoe fit-rejector" in caplog.text


def test_a_fifth_of_few_subjects_cannot_set_limits(place, tmp_path, caplog):
    out = run(place, "--split", "train", "--out", tmp_path / "made", "--max-images", 100)
    # Fitting on `train` is right; only its limits are not.
    assert "Images of `train` may be fitted on, but here they also set the limits" in caplog.text
    assert "by `--held-out`" in caplog.text
    assert "fit on others" not in caplog.text
    assert out.exit_code == 1  # 20 images cannot set limits
    assert "and 50 others that set its limits, got " in str(out.exception) + out.output
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("options", [(), ("--split", "test"), ("--split", "train", "--held-out", "test")])
def test_test_data_are_refused(place, tmp_path, options):
    out = run(place, *options, "--out", tmp_path / "made")
    assert out.exit_code == 1
    assert 'The split is called "test"' in str(out.exception) + out.output
    assert not (tmp_path / "made").exists()


def test_the_halves_of_foreign_pictures_share_no_photograph():
    pytest.importorskip("skimage")
    folder = Path(__file__).parents[2] / "examples" / "experiments" / "real"
    spec = importlib.util.spec_from_file_location("foreign_pictures", folder / "foreign.py")
    foreign = importlib.util.module_from_spec(spec)
    sys.modules["foreign_pictures"] = foreign  # dataclasses look there
    try:
        spec.loader.exec_module(foreign)
        halves = [foreign.photographs(half) for half in (0, 1)]
    finally:
        del sys.modules["foreign_pictures"]
    names = [{one.subject for one in half} for half in halves]
    assert not names[0] & names[1]
    assert all(len(half) == foreign.CROPS * len(own) for half, own in zip(halves, names, strict=True))
    assert {"retina", "ihc", "cell"} & (names[0] | names[1]) == set()
