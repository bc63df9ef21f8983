"""What ends a run early: found before the first step where it can be, and never without a checkpoint."""

import subprocess

import pytest
from test_loop import bad_table, config
from test_resume import assert_same, run_of, weights

from medmoe_hf.data import MODALITIES, phantom_sample, write_webdataset
from medmoe_hf.data.split import Split
from medmoe_hf.errors import StreamError, TrainingError
from medmoe_hf.training import held_out, plan, train
from medmoe_hf.training.checkpoints import find_checkpoints
from medmoe_hf.training.loop import TrainingRun

PHANTOMS = {"kind": "phantom", "image_size": 64}


def nothing_begun(folder):
    return not (folder / "out").exists() and not list(folder.glob("out-run/checkpoints/*"))


def test_missing_held_out_files_are_found_before_the_first_step(tmp_path):
    """40 subjects with two images each; of those that are held out, every second image is not there."""
    held_out = Split("validation", 0.3)
    rows = ["path,report,patient"]
    for patient in range(40):
        for image in range(2):
            name = f"{patient}-{image}.png"
            row = {"patient": str(patient)}
            if not (image and held_out.contains(row, "patient", b"")):
                phantom_sample(0, patient, image_size=64)["image"].save(tmp_path / name)
            rows.append(f"{name},report {patient},{patient}")
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    source = {"kind": "csv", "files": [str(tmp_path / "t.csv")], "image": "path", "subject": "patient"}
    data = {"train": source, "validation_share": 0.3, "num_workers": 0}
    run = config(tmp_path / "out", data=data, evaluation_samples=100)
    with pytest.raises(StreamError, match=r"(?s)^Held-out data: .*missing image.*Nothing was trained yet"):
        train(run)
    assert nothing_begun(tmp_path)
    with pytest.raises(StreamError, match=r"^Held-out data: "):
        plan(run)


def test_a_held_out_part_of_one_pair_is_refused_before_the_first_step(tmp_path):
    held_out = {**PHANTOMS, "length": 1}
    run = config(tmp_path / "out", data={"train": PHANTOMS, "evaluation": held_out, "num_workers": 0})
    with pytest.raises(TrainingError, match=r"^Held-out data: one pair in all, and a loss needs at least two"):
        train(run)
    assert nothing_begun(tmp_path)


def test_a_source_that_cannot_be_used_is_found_before_the_first_step(tmp_path):
    """One of several: it would have to be met many times until its share is too high."""
    source = bad_table(tmp_path, good=30, bad=0)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"no image")
    run = config(tmp_path / "out", data={"train": [{**PHANTOMS, "weight": 50}, source], "num_workers": 0})
    with pytest.raises(StreamError, match=r"(?s)^Training data: of mine none of the samples.*png: unreadable image"):
        train(run)
    assert nothing_begun(tmp_path)


def test_a_column_that_is_not_there_is_found_before_the_first_step(tmp_path):
    source = bad_table(tmp_path, good=12, bad=0)
    data = {"train": PHANTOMS, "evaluation": {**source, "image": "Path"}, "num_workers": 0}
    with pytest.raises(ValueError, match=r"^Held-out data: .*`path`"):
        train(config(tmp_path / "out", data=data))
    assert nothing_begun(tmp_path)


def test_tars_that_are_sorted_by_class_are_said_before_the_first_step(tmp_path, caplog):
    for modality in MODALITIES[:2]:
        write_webdataset(tmp_path / modality, shards=2, samples_per_shard=12, image_size=64, modalities=[modality])
    files = [str(tmp_path / modality / "*.tar") for modality in MODALITIES[:2]]
    for buffer, said in ((4, True), (1000, False)):
        data = {"train": {"kind": "webdataset", "files": files, "name": "mine"}, "shuffle_buffer": buffer}
        data["num_workers"] = 0
        train(config(tmp_path / f"out{buffer}", data=data, max_steps=1))
        found = "training data: mine: the first 4 samples are not like the rest" in caplog.text
        assert found == said
        caplog.clear()


@pytest.mark.parametrize("where", ["output_dir", "run_dir"])
def test_a_place_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path, where):
    if where == "output_dir":
        (tmp_path / "file").write_text("")
        run = config(tmp_path / "file" / "out")
    else:
        (tmp_path / "out-run").write_text("")
        run = config(tmp_path / "out")
    with pytest.raises(TrainingError, match=r"cannot be written to \(.*\); choose another `output_dir`"):
        TrainingRun(run)


def test_a_read_only_disk_is_found_before_the_first_step(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk needs root")
    try:
        with pytest.raises(TrainingError, match=r"disk/deeper cannot be written to \(Read-only file system\)"):
            TrainingRun(config(disk / "deeper" / "out"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fail_once(place, name, at, monkeypatch, error=None):
    """The function fails at its n-th call, after it has done its work."""
    error = error or RuntimeError("out of memory")
    real, calls = getattr(place, name), []

    def failing(*arguments, **options):
        calls.append(1)
        result = real(*arguments, **options)
        if len(calls) == at:
            raise error
        return result

    monkeypatch.setattr(place, name, failing)


CHANGES = {"max_steps": 5, "evaluate_every": 3, "checkpoints": {"every_minutes": 0, "keep_best": False}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing stops: with dropout, running statistics and a moving average."""
    folder = tmp_path_factory.mktemp("straight")
    return train(run_of(folder / "out", PHANTOMS, **CHANGES)), weights(folder / "out")


@pytest.mark.parametrize(("where", "step"), [("evaluation", 3), ("forward", 2), ("reading", 2), ("tracker", 2)])
def test_whatever_fails_leaves_a_checkpoint_that_goes_on_to_the_same_weights(
    tmp_path, monkeypatch, straight, where, step, caplog
):
    """The failure comes after random numbers, running statistics and the stream have moved on."""
    part = TrainingRun(run_of(tmp_path / "out", PHANTOMS, **CHANGES))
    with monkeypatch.context() as patch:
        if where == "evaluation":
            fail_once(held_out, "validate", 1, patch)
        elif where == "forward":
            fail_once(part, "_backward", 3, patch)
        elif where == "reading":
            fail_once(part.collator, "assemble", 2 + 3, patch)  # two batches are held out
        else:
            fail_once(part.accelerator, "log", 2, patch)
        with pytest.raises(RuntimeError, match="out of memory"):
            part.train()
    newest = find_checkpoints(tmp_path / "out-run" / "checkpoints")[-1]
    assert newest.name == f"step-0000000{step}"
    said = caplog.text
    assert f"RuntimeError: the run ends; the state after {step} steps is saved in {newest}" in said
    resumed = train(run_of(tmp_path / "out", PHANTOMS, **CHANGES), "auto")
    record, expected = straight
    assert resumed.resumed == [step]
    for name in ("evaluations", "best_step", "samples", "log"):
        assert getattr(resumed, name) == getattr(record, name), name
    assert_same(expected, weights(tmp_path / "out"))


def test_a_loss_that_is_no_number_leaves_the_last_step_in_a_checkpoint(tmp_path, straight):
    part = TrainingRun(run_of(tmp_path / "out", PHANTOMS, **CHANGES))
    real = part._backward

    def broken(batches):
        losses, counts = real(batches)
        return (losses | {"loss": losses["loss"] * float("nan")} if part.record.steps == 2 else losses), counts

    part._backward = broken
    with pytest.raises(TrainingError, match=r"The loss is nan at step 3.*newest checkpoint is .*step-00000002"):
        part.train()
    train(run_of(tmp_path / "out", PHANTOMS, **CHANGES), "auto")
    assert_same(straight[1], weights(tmp_path / "out"))


def test_a_model_that_cannot_be_written_leaves_a_checkpoint(tmp_path):
    run = run_of(tmp_path / "out", PHANTOMS, max_steps=2, evaluate_every=0)
    part = TrainingRun(run)
    (tmp_path / "out").mkdir()  # by somebody else, meanwhile
    with pytest.raises(TrainingError, match=r"exists already.*The newest complete checkpoint is .*step-00000002"):
        part.train()
    (tmp_path / "out").rmdir()
    assert train(run, "auto").resumed == [2]
    assert_same(dict(part.ema.module.state_dict()), weights(tmp_path / "out"))
