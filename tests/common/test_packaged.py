"""The checkpoints in the package, and their names."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import medmoe_hf
from medmoe_hf.cli import app
from medmoe_hf.common import packaged
from medmoe_hf.common.packaged import CHECKPOINTS, PACKAGED, packaged_folder, pretrained
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ArgumentError, EncoderError, PathNotFoundError
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ModelSection

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "tests" / "fixtures" / "saved_by_0_1"


def refresh(package: Path) -> None:
    """Run `.ci/refresh_checkpoints.py` for the checkpoints of another folder."""
    spec = importlib.util.spec_from_file_location("refresh_checkpoints", ROOT / ".ci" / "refresh_checkpoints.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.PACKAGE = package
    script.main()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A small checkpoint in the place of the packaged one, and another folder to work in."""
    monkeypatch.setattr(packaged, "CHECKPOINTS", tmp_path / "checkpoints")
    shutil.copytree(SAVED, tmp_path / "checkpoints" / "small")
    refresh(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(tmp_path / "checkpoints" / "small")


def test_the_name_of_a_packaged_checkpoint_is_that_of_its_folder(stand_in):
    assert pretrained() == pretrained("small") == medmoe_hf.pretrained("small") == stand_in
    assert find_checkpoint("small") == stand_in


def test_a_local_folder_comes_before_a_packaged_checkpoint(stand_in):
    Path("small").mkdir()
    assert packaged_folder("small") == find_checkpoint("small") == "small"
    assert find_checkpoint("someone/small") == "someone/small"


def test_an_unknown_name_is_answered_with_the_names_that_exist(stand_in):
    with pytest.raises(ArgumentError, match='no packaged checkpoint "smal"; this version contains: small'):
        pretrained("smal")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_copy_without_some_files_says_which(stand_in, file):
    (Path(stand_in) / file).unlink()
    with pytest.raises(PathNotFoundError, match=f'lacks {file} of its checkpoint "small"'):
        pretrained("small")
    with pytest.raises(EncoderError, match=f"lacks {file}"):
        load_encoder("small")


def test_python_functions_take_the_name(stand_in):
    model, processor = build_model(ModelSection(from_pretrained="small"))
    assert model.config.model_type == "medmoe"
    encoder = load_encoder("small")
    assert encoder.name == "checkpoints/small"
    assert encoder.modalities == list(model.config.modalities.values())
    assert processor.tokenizer.get_vocab() == encoder.processor.tokenizer.get_vocab()


def test_commands_use_the_packaged_checkpoint_when_no_model_is_named(monkeypatch, tmp_path):
    named = []
    sources = tmp_path / "sources.yaml"
    sources.write_text("- {kind: phantom, length: 2}\n")
    monkeypatch.setattr("medmoe_hf.evaluation.suite.evaluate", lambda models, *args, **options: named.append(models))
    monkeypatch.setattr("medmoe_hf.evaluation.report.summary", lambda results: "")
    monkeypatch.setattr("medmoe_hf.search.encode_sources", lambda sources, out, model, **options: named.append(model))
    out = str(tmp_path / "out")
    for command in (
        ["evaluate", "zero-shot", "--recipe", "phantoms", "--data", "x", "--output", out],
        ["evaluate", "all", "other", "--recipe", "phantoms", "--data", "x", "--output", out],
        ["encode", str(sources), out],
        ["encode", str(sources), out, "--model", "other"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert named == [["small"], ["other"], "small", "other"]


def test_the_demo_shows_the_packaged_checkpoint_unless_another_is_named(stand_in, monkeypatch):
    shown = []
    # instead of the page itself, which needs gradio
    page = SimpleNamespace(launch=lambda name, port, isolate, *rest: shown.append((name, isolate)))
    monkeypatch.setitem(sys.modules, "medmoe_hf.hub.space.app", page)
    for arguments, variable in (([], ""), (["small"], ""), ([], "you/medmoe"), (["mine"], "you/medmoe")):
        monkeypatch.setenv("MEDMOE_MODEL", variable)
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert result.exit_code == 0, result.output
    assert shown == [(name, True) for name in (stand_in, stand_in, "you/medmoe", "mine")]


def test_importing_the_package_does_not_look_for_checkpoints():
    code = "import sys, medmoe_hf; print('medmoe_hf.common.packaged' in sys.modules, 'pretrained' in dir(medmoe_hf))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
    assert "pretrained" in medmoe_hf.__all__


def test_refreshing_replaces_the_code_and_nothing_else(stand_in, tmp_path):
    folder = Path(stand_in)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "modeling_medmoe.py").write_text("old")
    (folder / "gone_medmoe.py").write_text("old")
    refresh(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert before["modeling_medmoe.py"] == (ROOT / "medmoe_hf" / "model" / "modeling_medmoe.py").read_bytes()


@pytest.mark.parametrize("name", PACKAGED)
def test_the_code_in_a_checkpoint_is_the_code_of_the_package(name):
    model = ROOT / "medmoe_hf" / "model"
    current = {path.name: path.read_bytes() for path in [*model.glob("*_medmoe.py"), model / "handler.py"]}
    copies = {path.name: path.read_bytes() for path in (CHECKPOINTS / name).glob("*.py")}
    assert copies == current, "run: python .ci/refresh_checkpoints.py"


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_checkpoint_is_complete_and_small(name):
    folder = Path(pretrained(name))
    assert (folder / "model.safetensors").stat().st_size <= 40e6
    assert {"README.md", "golden.safetensors", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    # as the patterns of the package data in pyproject.toml, which know one level
    assert all(path.is_file() for path in folder.iterdir() if path.name != "__pycache__")
    assert {path.name for path in CHECKPOINTS.iterdir() if not path.name.startswith(("_", "."))} == set(PACKAGED)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_checkpoint_can_be_published_under_another_name(name):
    pytest.importorskip("torch")
    from medmoe_hf.hub import check_folder, verify

    assert check_folder(pretrained(name)) == []
    assert verify(name).ok
