"""Rejectors: distances against a plain formulation, their file, and what makes a model drop one."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoders import medmoe_folder

from medmoe_hf.hub.golden import compare_with_golden, write_golden
from medmoe_hf.model import MedMoEModel, Rejector
from medmoe_hf.model.rejection_medmoe import rejection_features, sample_weights

FACTS = {"accept": 0.95, "fitted_on": {"data": "scans", "images": 80, "subjects": 40, "date": "2026-11"}}


def make(model, limit=1.0, seed=0):
    """A rejector of random numbers that suits a model."""
    random = np.random.default_rng(seed)
    features, experts = 2 * sum(model.vision_model.backbone.channels), model.config.vision_config.num_experts
    directions = np.linalg.qr(random.normal(size=(features, 5)))[0]
    tensors = {
        "center": random.normal(size=features),
        "spread": random.uniform(0.5, 2, size=features),
        "means": random.normal(size=(experts, features)),
        "directions": directions,
        "variances": random.uniform(1, 4, size=5),
        "rest": np.array(0.3),
        "limits": limit * random.uniform(1, 3, size=experts),
    }
    stored = {name: torch.from_numpy(value).float() for name, value in tensors.items()}
    return Rejector(**stored, weights=sample_weights(model.vision_model), facts=FACTS)


@pytest.fixture
def model(small_config, lived_in):
    torch.manual_seed(2)
    return lived_in(MedMoEModel(small_config()))


def plain_distances(rejector, features, ids):
    """Mahalanobis' distance by the full covariance, in float64."""
    get = {name: getattr(rejector, name).double().numpy() for name in ("center", "spread", "means", "directions")}
    variances, rest = rejector.variances.double().numpy(), float(rejector.rest)
    along = get["directions"]
    covariance = along @ np.diag(variances) @ along.T + rest * (np.eye(len(along)) - along @ along.T)
    found = []
    for row, expert in zip(features, ids, strict=True):
        apart = (row - get["center"]) / get["spread"] - get["means"][expert]
        found.append(np.sqrt(apart @ np.linalg.solve(covariance, apart)))
    return np.array(found)


def test_distances_are_those_of_the_full_covariance(model):
    rejector = make(model)
    features = np.random.default_rng(3).normal(size=(9, len(rejector.center)))
    ids = np.arange(9) % model.config.vision_config.num_experts
    expected = plain_distances(rejector, features, ids)
    found = rejector.distances(torch.from_numpy(features), torch.from_numpy(ids))
    # The directions were rounded to float32, and are orthonormal to its precision only.
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    single = rejector.scores(torch.from_numpy(features).float(), torch.from_numpy(ids))
    np.testing.assert_allclose(single, expected / rejector.limits.numpy()[ids], rtol=1e-4)
    with pytest.raises(ValueError, match="belongs to another model"):
        rejector.scores(torch.zeros(1, 3), torch.tensor([0]))


def test_features_are_means_and_deviations_of_each_scale():
    maps = [torch.rand(2, 3, 4, 5, dtype=torch.float64), torch.rand(2, 6, 2, 1, dtype=torch.float64)]
    found = rejection_features(maps)
    expected = [
        [*(m[row, c].numpy().mean() for m in maps for c in range(m.shape[1])),
         *(m[row, c].numpy().std() for m in maps for c in range(m.shape[1]))]
        for row in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == torch.float32


def test_route_says_what_is_accepted(model):
    pixels = torch.rand(5, 3, 64, 64)
    without = model.route(pixels)
    assert without.ood_score is None
    assert without.accepted is None
    model.rejector = make(model)
    with torch.no_grad():
        encoded = model.vision_model.encode(pixels)
    features = rejection_features(encoded.feature_maps).double().numpy()
    distances = plain_distances(model.rejector, features, without.expert_ids.numpy())
    middle = float(np.median(distances / model.rejector.limits.numpy()[without.expert_ids.numpy()]))
    model.rejector = Rejector(**{**vars(model.rejector), "limits": model.rejector.limits * middle})
    found = model.route(pixels)
    expected = distances / model.rejector.limits.numpy()[without.expert_ids.numpy()]
    np.testing.assert_allclose(found.ood_score, expected, rtol=1e-3)
    assert found.accepted.tolist() == (found.ood_score <= 1).tolist()
    assert 2 <= int(found.accepted.sum()) <= 3
    assert torch.equal(found.probabilities, without.probabilities)


def test_a_model_keeps_its_rejector_until_its_weights_change(model, tmp_path, caplog):
    pixels = torch.rand(3, 3, 64, 64)
    model.rejector = make(model)
    expected = model.route(pixels).ood_score
    model.save_pretrained(tmp_path)
    loaded = MedMoEModel.from_pretrained(tmp_path).eval()
    assert loaded.rejector.facts == FACTS
    assert torch.equal(loaded.route(pixels).ood_score, expected)
    half = MedMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.rejector is not None  # rounding is no training
    with torch.no_grad():
        for parameter in loaded.vision_model.experts.parameters():
            parameter.mul_(1.5)  # nothing that a rejector sees
    loaded.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same/rejector.safetensors").read_bytes() == (tmp_path / "rejector.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in loaded.vision_model.backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loaded.save_pretrained(tmp_path / "same")
    assert not (tmp_path / "same/rejector.safetensors").exists()
    assert loaded.rejector is None
    # A file beside weights that it was not fitted to.
    (tmp_path / "same/rejector.safetensors").write_bytes((tmp_path / "rejector.safetensors").read_bytes())
    assert MedMoEModel.from_pretrained(tmp_path / "same").rejector is None


def test_faults_are_explained(model, tmp_path):
    rejector = make(model)
    for change, problem in (
        ({"limits": rejector.limits[:2]}, "`means` must have the shape"),
        ({"spread": rejector.spread * 0}, "`spread` must be above 0"),
        ({"means": rejector.means * float("nan")}, "`means` must be finite"),
    ):
        with pytest.raises(ValueError, match=problem):
            Rejector(**{**vars(rejector), **change})
    path = tmp_path / "rejector.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no rejector, or damaged"):
        Rejector.load(path)
    save_file({"center": torch.zeros(3)}, path, metadata={"rejector": json.dumps({"schema": 2})})
    with pytest.raises(ValueError, match="has another schema"):
        Rejector.load(path)
    save_file({"center": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no rejector, or damaged"):
        Rejector.load(path)


@pytest.mark.slow
def test_a_clean_process_refuses_the_same(model, tmp_path):
    model.rejector = make(model)
    model.save_pretrained(tmp_path / "model")
    pixels = torch.rand(4, 3, 64, 64)
    torch.save(pixels, tmp_path / "pixels.pt")
    expected = model.route(pixels)
    code = """
import sys
sys.modules["medmoe_hf"] = None
import json, torch
from transformers import AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True).eval()
found = model.route(torch.load("pixels.pt"))
model.save_pretrained("again")
print(json.dumps([found.ood_score.tolist(), found.accepted.tolist()]))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    scores, accepted = json.loads(run.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(scores), expected.ood_score)
    assert accepted == expected.accepted.tolist()
    stored = [(tmp_path / name / "rejector.safetensors").read_bytes() for name in ("model", "again")]
    assert stored[0] == stored[1]


@pytest.mark.slow
def test_golden_outputs_hold_the_scores(tmp_path):
    folder = medmoe_folder(tmp_path / "model")
    model = MedMoEModel.from_pretrained(folder).eval()
    write_golden(folder)
    model.rejector = make(model)
    model.rejector.save(folder / "rejector.safetensors")
    # Recorded before, they say nothing of the scores; recorded again, they hold them.
    assert max(compare_with_golden(folder).values()) <= 1e-4
    write_golden(folder)
    stored = load_file(folder / "golden.safetensors")
    torch.testing.assert_close(stored["output.ood_score"], model.route(stored["input.pixel_values"]).ood_score)
    differences = compare_with_golden(folder)
    assert differences["output.ood_score"] <= 1e-4
    make(model, limit=2).save(folder / "rejector.safetensors")
    assert compare_with_golden(folder)["output.ood_score"] > 0.1
