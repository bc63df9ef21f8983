"""The `medmoe` command: what a person types and reads."""

import io
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from synthetic_studies import synthetic_studies
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import medmoe_hf
from medmoe_hf import errors
from medmoe_hf.cli import app
from medmoe_hf.cli.errors import errors_of
from medmoe_hf.common import console
from medmoe_hf.evaluation.report import write
from medmoe_hf.evaluation.results import Result
from medmoe_hf.inference.studies import write_predictions
from medmoe_hf.training import TrainConfig

pytestmark = pytest.mark.usefixtures("logging_as_before")

run = CliRunner().invoke


def in_new_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_lists_the_commands():
    result = run(app, ["--help"])
    assert result.exit_code == 0
    assert {"train", "phantom"} <= set(result.output.split())


HELP = """
import os, runpy, sys
sys.argv = ["medmoe", *sys.argv[1:], "--help"]
try:
    runpy.run_module("medmoe_hf", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
times = os.times()
slow = [name for name in ("torch", "transformers", "datasets", "huggingface_hub", "numpy") if name in sys.modules]
print(f"\\nREPORT {times.user + times.system:.2f} {','.join(slow)}")
"""


@pytest.mark.parametrize("command", [[], ["train"], ["data", "inspect"], ["evaluate", "zero-shot"], ["convert"]])
def test_help_loads_no_torch_and_takes_half_a_second_of_cpu_time_at_most(command):
    printed = in_new_process(HELP, *command)
    assert "Usage: medmoe" in printed
    seconds, slow = printed.rpartition("REPORT ")[2].rstrip("\n").split(" ")
    assert slow == ""
    # Twice what is promised: other processes may share the core.
    assert float(seconds) < 1.0


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, medmoe_hf.training, medmoe_hf.hub; print({'torch', 'transformers'} & set(sys.modules))"
    assert in_new_process(code).strip() == "set()"


@pytest.mark.parametrize("command", [["medmoe_hf", "--version"], ["medmoe_hf.cli", "--version"]])
def test_version_is_that_of_the_package(command):
    printed = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == f"medmoe_hf {medmoe_hf.__version__}"


def test_shell_completion_is_offered():
    assert "--install-completion" in run(app, ["--help"], env={"COLUMNS": "120"}).output


AUTO = """
import os, sys
order, folder, *classes = sys.argv[1:]
if order == "package first":
    import medmoe_hf
import transformers
classes = [getattr(transformers, name) for name in classes]
if order == "transformers first":
    import medmoe_hf
for auto in classes:
    # each in a process where the others have loaded nothing
    if os.fork() == 0:
        print(type(auto.from_pretrained(folder)).__module__)
        break
    assert os.wait()[1] == 0
"""


@pytest.mark.parametrize(
    ("order", "modules"),
    [
        ("transformers first", {"AutoModel": "modeling_medmoe", "AutoTokenizer": "tokenization_medmoe"}),
        (
            "package first",
            {
                "AutoModel": "modeling_medmoe",
                "AutoProcessor": "processing_medmoe",
                "AutoImageProcessor": "image_processing_medmoe",
            },
        ),
    ],
)
def test_auto_classes_load_a_folder_without_trusting_its_code(order, modules):
    folder = Path(__file__).parent / "fixtures" / "saved_by_0_1"
    printed = in_new_process(AUTO, order, str(folder), *modules).split()
    assert printed == [f"medmoe_hf.model.{module}" for module in modules.values()]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.ArgumentError("a wrong argument"), "a wrong argument"),
        (errors.ResumeError("no checkpoint"), "no checkpoint"),
        (errors.MissingPackageError('pip install "medmoe_hf[search]"'), r"pip install \"medmoe_hf\[search\]\""),
        (FileNotFoundError(2, "No such file", "a.png"), "a.png"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), "timm"),
    ],
)
def test_errors_that_a_user_can_fix_are_messages(error, message):
    with pytest.raises(SystemExit, match=f"medmoe train: .*{message}"), errors_of("train"):
        raise error


WRITERS = {
    "predict": lambda out: write_predictions(synthetic_studies(), out),
    "evaluate": lambda out: write([Result("zero-shot", "a/b", "toy", 4, {}, {"note": "x" * 50_000})], out),
}


@pytest.mark.parametrize("command", [*WRITERS, "phantom"])
def test_a_really_full_disk_is_told_with_what_was_written(command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    out = disk / "out"
    try:
        if command == "phantom":
            result = run(app, ["phantom", str(out), "--samples", "9", "--image-size", "48"])
            told = str(result.exception)
            out /= "phantom-000000.tar"
        else:
            with pytest.raises(SystemExit) as caught, errors_of(command):
                WRITERS[command](out)
            told = str(caught.value)
        assert re.fullmatch(
            rf"medmoe {command}: {out} could not be written: the disk, or the quota, is full \(0 MB are free in .*\). "
            "Make room there or choose a place on another disk, and run the command again\\.",
            told,
        ), told
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_without_a_name_too():
    with pytest.raises(SystemExit, match=r"the disk, or the quota, is full.*temporary ones in"), errors_of("search"):
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit, match=r"/no/where could not be written.*MB are free in /\)"), errors_of("search"):
        raise OSError(28, "No space left on device", "/no/where")


def test_of_many_files_that_could_not_be_copied_one_is_named():
    failed = [("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'"), ("c", "d", "[Errno 28] ... 'c' -> 'd'")]
    with pytest.raises(SystemExit) as caught, errors_of("calibrate"):
        raise shutil.Error(failed)
    assert str(caught.value) == (
        "medmoe calibrate: [Errno 28] No space left on device: 'a' -> 'b' (and 1 other files)"
    )


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("shapes do not match"),
        KeyError("x"),
        RuntimeError("a bug"),
        ImportError("cannot import name 'x' from 'medmoe_hf.hub'", name="medmoe_hf.hub"),
    ],
)
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)) as caught, errors_of("train"):
        raise bug
    assert caught.value is bug


def test_every_error_class_of_the_package_has_the_base():
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.MedMoEError), name


@pytest.mark.parametrize(
    ("option", "shown"),
    [(None, "info\nwarning: careful\n"), ("-q", ""), ("-v", "a: debug: detail\na: info\na: warning: careful\n")],
)
def test_verbosity(option, shown, monkeypatch):
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console.set_up_logging(verbose=option == "-v", quiet=option == "-q")
    logger = logging.getLogger("medmoe_hf.a")
    logger.debug("detail")
    logger.info("info")
    logger.warning("careful")
    assert stream.getvalue().replace("medmoe_hf.a", "a") == shown
    assert console.progress(range(3), "test", "item").disable == (option == "-q")


def test_verbose_and_quiet_exclude_each_other():
    assert run(app, ["-v", "-q", "evaluate", "recipes"]).exit_code == 2


def test_train_set_overrides_keys_and_explains_wrong_ones(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"output_dir: {tmp_path}/out\nmodel: {{preset: tiny}}\nmax_steps: 2\ndata: {{train: {{kind: phantom}}}}\n"
    )
    result = run(app, ["train", str(path), "--set", "max_step=1", "--set", "data.num_worker=0"])
    assert result.exit_code == 1
    assert "max_step: unknown key. Did you mean `max_steps`?" in str(result.exception)
    assert "data.num_worker: unknown key. Did you mean `num_workers`?" in str(result.exception)
    result = run(app, ["train", str(path), "--set", "max_steps"])
    assert "--set max_steps: expected KEY=VALUE" in str(result.exception)
    config = TrainConfig.from_yaml(path, ["max_steps=7", "data.train.length=9", "freeze=[text_model]", "lora=null"])
    assert (config.max_steps, config.data.train.length, config.freeze) == (7, 9, ["text_model"])
    assert config.model_dump(mode="json")["max_steps"] == 7


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
    assert "dropped 5, the official code never uses it" in result.output
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
    with pytest.raises(SystemExit, match="medmoe train: the disk is full"), errors_of("train"):
        raise OSError("the disk is full")
    assert stream.getvalue().endswith("\n")


def test_bars_of_transformers_are_hidden_and_those_of_downloads_are_not(monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    with errors_of("train"):
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()


def test_warnings_of_torchao_stay_out_of_what_commands_print():
    imported = subprocess.run([sys.executable, "-c", "import medmoe_hf"], capture_output=True, text=True, check=True)
    assert "register_constant" not in imported.stdout + imported.stderr
