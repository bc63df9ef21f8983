"""The `medmoe` command: what a person types and reads."""

import datasets
import pytest
from typer.testing import CliRunner

from medmoe_hf.cli import app

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
