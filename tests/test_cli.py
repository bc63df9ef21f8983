"""The `medmoe` command: what a person types and reads."""

import io
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from medmoe_hf.cli import _errors_of, app

run = CliRunner().invoke


def test_help_lists_the_commands():
    result = run(app, ["--help"])
    assert result.exit_code == 0
    assert {"train", "phantom"} <= set(result.output.split())


def test_phantom_writes_tars_that_stream_back(tmp_path):
    result = run(app, ["phantom", str(tmp_path / "out"), "--shards", "2", "--samples", "3", "--image-size", "48"])
    assert result.exit_code == 0, result.output
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(tars) == 2
    stream = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    assert sum(1 for _ in stream) == 6


def test_phantom_does_not_overwrite(tmp_path):
    arguments = ["phantom", str(tmp_path / "out"), "--samples", "1", "--image-size", "48"]
    assert run(app, arguments).exit_code == 0
    again = run(app, arguments)
    assert again.exit_code == 1
    assert str(tmp_path / "out") in str(again.output) + str(again.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [("max_step: 1", "Did you mean `max_steps`"), (None, "Cannot read")],
)
def test_train_explains_a_wrong_file_without_a_traceback(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    result = run(app, ["train", str(path)])
    assert result.exit_code == 1
    assert message in str(result.output) + str(result.exception)
    assert "Traceback" not in result.output


def test_train_stops_on_bad_data_with_a_message_and_code_1(tmp_path):
    (tmp_path / "t.csv").write_text("path,report\n" + "none.png,x\n" * 3)
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{preset: tiny}}\nmax_steps: 2\n"
        f"data: {{train: {{kind: csv, files: [{tmp_path}/t.csv], name: mine}}, num_workers: 0}}\n"
    )
    result = run(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 1
    # Before the first step: what can be checked is checked before anything is trained.
    assert "of mine none of the samples that were tried can be used" in str(result.exception)
    assert f"{tmp_path}/none.png: missing image" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_convert_and_init_write_folders_and_explain_errors(tmp_path):
    fixtures = Path(__file__).parent / "fixtures" / "official_small"
    options = [
        "--tokenizer",
        str(fixtures / "vocab.txt"),
        "--image-size",
        "64",
        "--text-heads",
        "4",
        "--max-length",
        "14",
    ]
    command = ["convert", "official", str(fixtures / "official.ckpt"), str(tmp_path / "out"), *options]
    result = run(app, command)
    assert result.exit_code == 0, result.output
    assert "261 tensors taken" in result.output
    assert "dropped 5, the official code never calls it" in result.output
    again = run(app, command)
    assert again.exit_code == 1
    assert "--force" in str(again.exception)
    result = run(app, ["init", str(tmp_path / "new"), "--preset", "tiny"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"out", "new"}
    result = run(app, ["init", str(tmp_path / "other"), "--preset", "paper"])
    assert "--tokenizer" in str(result.exception)


def test_an_error_begins_on_its_own_line_below_a_bar():
    stream = io.StringIO()
    bar = tqdm(total=3, file=stream)
    bar.update()
    assert not stream.getvalue().endswith("\n")
    with pytest.raises(SystemExit, match="medmoe train: the disk is full"), _errors_of("train"):
        raise OSError("the disk is full")
    assert stream.getvalue().endswith("\n")


def test_bars_of_transformers_are_hidden_and_those_of_downloads_are_not(monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    with _errors_of("train"):
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()


def test_warnings_of_torchao_stay_out_of_what_commands_print():
    imported = subprocess.run([sys.executable, "-c", "import medmoe_hf"], capture_output=True, text=True, check=True)
    assert "register_constant" not in imported.stdout + imported.stderr
