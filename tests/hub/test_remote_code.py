"""Whose code runs when our commands load a checkpoint of a stranger."""

import importlib
import json
import logging
from contextlib import suppress

import pytest
from small_encoders import medmoe_folder

from medmoe_hf.errors import MedMoEError
from medmoe_hf.hub.folder_checks import published_files
from medmoe_hf.hub.publishing import verify
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder

# Under its name the package has the function.
module = importlib.import_module("medmoe_hf.hub.publishing")
REPO = "stranger/medmoe"


@pytest.fixture
def strangers(tmp_path):
    """A checkpoint whose Python files leave a mark when they run, and the mark."""
    folder, mark = medmoe_folder(tmp_path / "strangers"), tmp_path / "ran"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text())
    assert list(folder.glob("modeling_medmoe.py"))
    return folder, mark


@pytest.fixture
def published(hub, strangers):
    repo = hub.create(REPO)
    repo.commits[repo.branches["main"]].files.update(
        {name: path.read_bytes() for name, path in published_files(strangers[0]).items()}
    )
    return repo.branches["main"]


def test_encoders_run_no_code_of_a_repository(published, strangers, caplog):
    encoder = load_encoder(REPO, device="cpu")
    assert isinstance(encoder, MedMoEEncoder)
    assert encoder.encode_texts(["a scan"]).shape[0] == 1
    assert type(encoder.model).__module__ == "medmoe_hf.model.modeling_medmoe"
    assert not strangers[1].exists()
    assert "Python files" not in caplog.text


@pytest.mark.parametrize("part", ["processor", "image_processor", "tokenizer"])
def test_names_of_foreign_classes_run_no_code(strangers, part):
    folder, mark = strangers
    name = folder / ("tokenizer_config.json" if part == "tokenizer" else "processor_config.json")
    settings = json.loads(name.read_text())
    kind, auto = {
        "processor": ("processor_class", "AutoProcessor"),
        "image_processor": ("image_processor_type", "AutoImageProcessor"),
        "tokenizer": ("tokenizer_class", "AutoTokenizer"),
    }[part]
    changed = settings["image_processor"] if part == "image_processor" else settings
    own = f"{'tokenization' if part == 'tokenizer' else 'processing'}_medmoe.Own"
    changed |= {kind: "Own", "auto_map": {auto: [None, own] if part == "tokenizer" else own}}
    name.write_text(json.dumps(settings))
    # Either it is loaded by our classes, or it is refused.
    with suppress(MedMoEError, OSError):
        load_encoder(folder, device="cpu")
    assert not mark.exists()


def test_models_of_other_kinds_run_no_code(strangers):
    folder, mark = strangers
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((MedMoEError, OSError)):
        load_encoder(folder, device="cpu")
    assert not mark.exists()


def test_verify_warns_of_code_that_is_not_pinned(hub, published, monkeypatch, caplog, tmp_path):
    warned = []

    def compare(folder):
        warned.append([record.levelno for record in caplog.records if "Python files" in record.getMessage()])
        return {"output.logits": 0.0}

    monkeypatch.setattr(module, "compare_with_golden", compare)
    verify(REPO)
    assert warned == [[logging.WARNING]]  # before anything is run
    (message,) = [record.getMessage() for record in caplog.records if "Python files" in record.getMessage()]
    assert REPO in message
    assert message.endswith(f"--revision {published}")

    caplog.clear()
    verify(REPO, published)
    (tmp_path / "folder").mkdir()
    verify(tmp_path / "folder")
    assert warned[1:] == [[], []]
