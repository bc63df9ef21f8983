"""A missing folder is reported immediately wherever a folder or a Hub id is accepted, without asking the Hub."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data import checkpoint_names
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import EncoderError
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.search import index


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the folder `runs/model` and the file `vocab.txt`."""
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "vocab.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [
    "runs/modle", "./runs/modle", "../x", "~/modle", "runs/model/best/", "a/b/c", "modle", "two words", "runs\\model",
    Path("runs/modle"), "-",
])  # fmt: skip
def test_neither_a_folder_nor_an_id(here, name):
    with pytest.raises(FileNotFoundError) as caught:
        refuse_missing_folder(name)
    assert f'no folder "{name}"' in str(caught.value)
    assert "user/name" in str(caught.value)


@pytest.mark.parametrize("name", ["runs/model", "vocab.txt", "./runs", "someone/medmoe", Path("runs/model")])
def test_existing_paths_and_possible_ids(here, name):
    refuse_missing_folder(name)


def test_ids_without_a_user(here):
    refuse_missing_folder("bert-base-uncased", bare_ids=True)
    with pytest.raises(FileNotFoundError):
        refuse_missing_folder("bert-base-uncased")


def test_the_nearest_folder_is_suggested(here):
    with pytest.raises(FileNotFoundError, match=r'Did you mean "runs/model"\?'):
        refuse_missing_folder("runs/modle")
    with pytest.raises(FileNotFoundError, match=r'There is no folder "ruins/of" either'):
        refuse_missing_folder("ruins/of/model")


def test_a_home_folder_that_is_not_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    with pytest.raises(FileNotFoundError, match=rf'Did you mean "{here}/runs/model"\?'):
        refuse_missing_folder("~/runs/model")


def test_a_cached_model_whose_user_has_the_name_of_a_local_folder(here, monkeypatch):
    config = here / "config.json"
    config.touch()
    cached = {"runs/a": str(config)}
    monkeypatch.setattr(checkpoint_names, "try_to_load_from_cache", lambda repo, name: cached.get(repo))
    refuse_missing_folder("runs/a")
    with pytest.raises(FileNotFoundError):
        refuse_missing_folder("runs/b")


COMMANDS = {
    "export": ["export", "runs/modle", "out"],
    "verify": ["verify", "runs/modle"],
    "merge": ["merge", "adapter", "out", "--base", "runs/modle"],
    "encode": ["encode", "sources.yaml", "out", "--model", "runs/modle"],
    "train": ["train", "train.yaml"],
    "train on a tokenizer": ["train", "tokenizer.yaml"],
    "init by a vision tower": ["init", "out", "--preset", "tiny", "--vision", "runs/modle"],
    "init by a text tower": ["init", "out", "--preset", "tiny", "--text", "runs/modle"],
    "init by a tokenizer": ["init", "out", "--preset", "tiny", "--tokenizer", "runs/modle"],
}
SOURCE = "{kind: phantom, image_size: 64, length: 4}"
TRAINING = """
model:
  {model}
data:
  train: [{source}]
batch_size: 2
max_steps: 1
output_dir: out
"""


@pytest.fixture
def no_hub(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_a_missing_folder_immediately(here, no_hub, command):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (here / "adapter" / "adapter_model.safetensors").touch()
    (here / "sources.yaml").write_text(f"- {SOURCE}\n")
    (here / "train.yaml").write_text(TRAINING.format(source=SOURCE, model="from_pretrained: runs/modle"))
    tokenizer = "preset: tiny\n  tokenizer: runs/modle"
    (here / "tokenizer.yaml").write_text(TRAINING.format(source=SOURCE, model=tokenizer))
    result = CliRunner().invoke(app, COMMANDS[command])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert 'no folder "runs/modle"' in str(result.exception)
    assert not (here / "out").exists()


def test_a_model_to_evaluate(here, no_hub):
    with pytest.raises(EncoderError, match=r'no folder "runs/modle".* Did you mean "runs/model"'):
        load_encoder("runs/modle")


def test_a_model_to_search_with(here, no_hub, monkeypatch):
    monkeypatch.setattr(index, "EmbeddingIndex", lambda out, among: SimpleNamespace(manifest={"model": "runs/modle"}))
    with pytest.raises(FileNotFoundError, match='no folder "runs/modle"'):
        index.search("out", "effusion")


def test_a_misspelled_preset(here):
    result = CliRunner().invoke(app, ["init", "out", "--preset", "tinny"])
    assert "Did you mean `tiny`?" in str(result.exception)
