"""What stops a push: each kind of file or text, named, and nothing that belongs to a checkpoint."""

import gzip
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from medmoe_hf.hub.folder_checks import check_folder, published_files
from medmoe_hf.model import MedMoEImageProcessor, MedMoEModel, MedMoEProcessor, MedMoETokenizer

TOKEN = "hf_" + "AbCdEfGhIj" * 4  # in two parts, so that no scanner takes it for one


@pytest.fixture(scope="module")
def saved(small_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked") / "model"
    tokenizer = MedMoETokenizer.from_words(["chest", "mrn", "dob"], max_length=24)
    MedMoEModel(small_config(text_config={"vocab_size": len(tokenizer)})).save_pretrained(folder)
    MedMoEProcessor(MedMoEImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_a_saved_model_may_go(folder):
    (folder / "README.md").write_text(
        "# MedMoE\n\n![map](figures/map.png) See https://huggingface.co/data/x, ./data/x and `pip install /path`.\n"
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "map.png").write_bytes(png())
    (folder / "metrics.csv").write_text("task,auc\nzero-shot,0.8\n")
    for junk in (".git/config", "__pycache__/x.pyc", ".cache/huggingface/y"):
        (folder / junk).parent.mkdir(parents=True, exist_ok=True)
        (folder / junk).write_text(TOKEN)
    assert check_folder(folder) == []
    assert not [name for name in published_files(folder) if "git" in name or "cache" in name]
    assert "figures/map.png" in published_files(folder)


PICKLE = b"\x80\x04\x95\x00"
DICOM = bytes(128) + b"DICM" + bytes(300)
NIFTI = bytes(344) + b"n+1\0" + bytes(8)
HOME = "/ho" + "me/someone/data.yaml"
UID = "1.2.826.0.1.3680043.8.498.12345"
FILES = {
    "pytorch_model.bin": (PICKLE, "pickle"),
    "optimizer.pt": (b"PK\x03\x04rest", "archive"),
    "harmless.json": (PICKLE, "pickle"),
    "last.ckpt": (b"text", "not safetensors"),
    "weights.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "explore.ipynb": (b"{}", "notebook"),
    "one.dcm": (b"x", "DICOM"),
    "scan": (DICOM, "DICOM"),
    "scan.txt": (DICOM, "DICOM"),
    "brain.nii": (b"x", "NIfTI"),
    "brain.dat": (NIFTI, "NIfTI"),
    "brain.gz": (gzip.compress(NIFTI), "NIfTI"),
    "more/rows.parquet": (b"PAR1", "data"),
    "rows.txt": (b"PAR1", "data"),
    "features.npy": (b"\x93NUMPY", "data"),
    "rows.jsonl": (b"{}", "data"),
    "shard.tar.gz": (gzip.compress(b"x"), "archive"),
    "ct.png": (png(), "does not show"),
    "map.png": (png(), "does not show"),
    "unknown.dat": (bytes(range(128, 256)), "neither text nor"),
    "events.out.tfevents.1.host": (b"x", "training log"),
    "broken.safetensors": (b"version https://git-lfs", "no whole safetensors"),
    "cases.csv": (b"patient_id,score\n17,0.5\n", "patient"),
    "reports.csv": (b"image_path,impression\n", "column image_path"),
    "cases.tsv": (b"score\tMRN\n", "column MRN"),
    "note.json": (b'{"model": 1,\n "PatientName": "x"}', "line 2: a field that identifies"),
    "note.yaml": (b"accession_number: 7\n", "a field that identifies"),
    "study.md": (f"Study {UID}.".encode(), "UID"),
    "p10000032.txt": (b"x", "identifier"),
    "patient_0012.txt": (b"x", "identifier"),
    "DOE^JANE.txt": (b"x", "identifier"),
    f"{UID}.txt": (b"x", "identifier"),
    "born-1950-02-03.txt": (b"x", "identifier"),
    "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.txt": (b"x", "identifier"),
    "train.yaml": (f"a: 1\nsource: {HOME}\n".encode(), "line 2: an absolute path"),
    "training.json": (json.dumps({"config": {"output_dir": HOME}}).encode(), "absolute path"),
    "extra.py": (f'"""Reads\n{HOME}"""\n'.encode(), "line 2: an absolute path"),
    "card.md": (f"Loaded from file://{HOME}".encode(), "absolute path"),
    "win.md": (b"C:\\Users\\someone\\model", "absolute path"),
    ".env": (f"HF={TOKEN}".encode(), "line 1: a token"),
    "run.sh": (f"#!/bin/sh\nexport HF_TOKEN={TOKEN}\n".encode(), "line 2: a token"),
    "key.txt": (b"-----BEGIN RSA PRIVATE " + b"KEY-----\n", "a token"),
    "wandb.yaml": (b"wandb_api_" + b"key: 0123456789abcdef0123\n", "a token"),
    "other.md": (b"sk-" + b"proj-0123456789abcdefABCD", "a token"),
}


@pytest.mark.parametrize("name", FILES)
def test_each_of_these_stops_a_push(folder, name):
    content, reason = FILES[name]
    (folder / "README.md").write_text("![another](figures/map.png)\n")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    problems = check_folder(folder)
    assert problems, name
    assert all(problem.startswith(name) for problem in problems)
    assert any(reason in problem for problem in problems), problems
    assert not any(TOKEN in problem or "someone" in problem for problem in problems)


def test_metadata_of_weights_is_text_too(folder):
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", metadata={"from": HOME})
    assert check_folder(folder) == ["model.safetensors, line 1: an absolute path of a machine"]


def test_places_of_this_machine(folder, monkeypatch):
    place = folder.resolve().parent
    (folder / "note.md").write_text(f"made in {place}\n")
    assert check_folder(folder) == ["note.md, line 1: an absolute path of a machine"]
    (folder / "note.md").write_text("made in /opt/unheard/of\n")
    assert check_folder(folder) == []
    monkeypatch.chdir("/usr/share")
    (folder / "note.md").write_text("made in /usr/share, and not in /usr/shared\n")
    assert len(check_folder(folder)) == 1


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("config.json", "config.json: missing"),
        ("processor_config.json", "processor_config.json: missing"),
        ("model.safetensors", "model.safetensors: missing"),
        ("processing_medmoe.py", "config.json: `auto_map` needs processing_medmoe.py"),
    ],
)
def test_what_a_folder_must_have(folder, missing, problem):
    (folder / missing).unlink()
    problems = check_folder(folder)
    assert len(problems) == 1
    assert problems[0].startswith(problem)


def test_one_set_of_weights(folder, saved):
    MedMoEModel.from_pretrained(saved).save_pretrained(folder, max_shard_size="600kB")
    # transformers leaves the single file where it lies, and would load it.
    (stale,) = check_folder(folder)
    assert stale.startswith("model.safetensors: no part of the weights that model.safetensors.index.json names")
    (folder / "model.safetensors").unlink()
    assert check_folder(folder) == []
    shards = sorted(path.name for path in folder.glob("model-0*.safetensors"))
    assert len(shards) > 1
    (folder / shards[0]).unlink()
    assert check_folder(folder) == [f"{shards[0]}: missing"]


def test_models_of_others_and_adapters(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoConfig": "modeling_medmoe.X"}}')
    assert check_folder(folder) == ["config.json: `model_type` is not one of MedMoE's"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (problem,) = check_folder(adapter)
    assert "medmoe merge FOLDER OUT" in problem
    assert check_folder(tmp_path / "none") == [f"{tmp_path / 'none'}: there is no such folder"]
    (folder / "training_state").mkdir()
    (folder / "training_state" / "state.json").write_text("{}")
    assert any("output_dir" in problem for problem in check_folder(folder))
