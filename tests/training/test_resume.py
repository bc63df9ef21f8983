"""Interrupted runs against one that was never interrupted: the same weights, bit for bit."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml
from processes import command, context
from safetensors.torch import load_file
from small_models import SMALL
from test_loop import config

from medmoe_hf import MedMoEModel
from medmoe_hf.data import phantom_sample, write_webdataset
from medmoe_hf.errors import Interrupted, ResumeError, TrainingError
from medmoe_hf.training import TrainConfig, checkpoints, train
from medmoe_hf.training import held_out as held_out_data
from medmoe_hf.training.checkpoints import find_checkpoints
from medmoe_hf.training.loop import TrainingRun

DROPOUT = {**SMALL, "text_config": {**SMALL["text_config"], "hidden_dropout_prob": 0.2}}


def table(folder, rows=50):
    """A source that is shuffled, and has a broken row."""
    folder.mkdir()
    lines = ["path,report", "none.png,x"]
    for index in range(rows):
        phantom_sample(0, index, image_size=64)["image"].save(folder / f"{index}.png")
        lines.append(f"{index}.png,{phantom_sample(0, index, image_size=64)['caption']}".replace('"', ""))
    quoted = (line.split(",", 1) for line in lines)
    (folder / "t.csv").write_text("\n".join(f'{path},"{report}"' for path, report in quoted))
    return {"kind": "csv", "files": [str(folder / "t.csv")], "image": "path", "caption": "report"}


def run_of(output_dir, source, **changes):
    content = {
        "model": {"preset": "tiny", "overrides": DROPOUT},
        "data": {
            "train": source,
            "evaluation": {"kind": "phantom", "seed": 1, "image_size": 64},
            "shuffle_buffer": 16,
            "max_bad_fraction": 0.2,
            "num_workers": 0,
        },
        "max_steps": 14,
        "ema_decay": 0.9,
        "evaluate_every": 4,
    }
    return config(output_dir, **(content | changes))


def interrupted(run, steps):
    """Stops the run after each of these steps, and takes it up again."""
    for stop in steps:
        part = TrainingRun(run, "auto")
        step = part.step

        def and_stop(batches, part=part, step=step, stop=stop):
            step(batches)
            if part.record.steps == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        part.step = and_stop
        with part.handle_signals(), pytest.raises(Interrupted, match=f"SIGTERM after step {stop}.*--resume auto"):
            part.train()
    return train(run, "auto")


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "batch_size": 3, "schedule": "plateau", "plateau_patience": 0},
        {"negatives": "micro_batch", "gradient_accumulation_steps": 2, "batch_size": 3, "ema_decay": None},
    ],
    ids=["plain", "cached, plateau", "accumulated"],
)
def test_a_run_interrupted_five_times_comes_to_the_same_weights(tmp_path, changes):
    source = table(tmp_path / "data")
    straight = train(run_of(tmp_path / "straight", source, **changes))
    stops = sorted(random.Random(str(changes)).sample(range(1, 14), 5))
    resumed = interrupted(run_of(tmp_path / "stopped", source, **changes), stops)
    assert resumed.resumed == stops
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
    for name in ("log", "evaluations", "samples", "skipped", "best_step"):
        assert getattr(straight, name) == getattr(resumed, name), name
    assert straight.skipped  # the broken row, once an epoch, is not counted twice
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_workers_may_be_others_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else a reader takes a core, and sums are cut in other places
    source = table(tmp_path / "data")
    train(run_of(tmp_path / "straight", source))
    run = run_of(tmp_path / "stopped", source)
    part = TrainingRun(run)
    part._signal = signal.SIGINT
    with pytest.raises(Interrupted):
        part.train()
    other = run.model_copy(update={"data": run.data.model_copy(update={"num_workers": 2})})
    train(other, "auto")
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))


def measuring(monkeypatch, *held_out):
    """Evaluations give these losses, one after another, whatever the model; the last one again and again."""
    real, rest = held_out_data.validate, list(held_out)

    def scripted(*arguments):
        return {**real(*arguments), "loss": rest.pop(0) if len(rest) > 1 else rest[0]}

    monkeypatch.setattr(held_out_data, "validate", scripted)


@pytest.mark.parametrize(("held_out", "kept"), [((2.0, 3.0), [4, 6, 8]), ((3.0, 2.0), [6, 8])])
def test_checkpoints_come_in_their_rhythm_and_only_the_last_and_the_best_stay(tmp_path, monkeypatch, held_out, kept):
    """The best is that of step 4, or that of step 8, which is among the last two."""
    measuring(monkeypatch, *held_out)
    run = run_of(
        tmp_path / "out",
        {"kind": "phantom", "image_size": 64},
        checkpoints={"every_steps": 2, "keep_last": 2},
        max_steps=9,
    )
    record = train(run)
    assert [entry["step"] for entry in record.evaluations] == [4, 8, 9]
    assert record.best_step == kept[0] if kept[0] == 4 else 8
    assert [int(path.name[5:]) for path in find_checkpoints(run.run_dir / "checkpoints")] == kept
    newest = run.run_dir / "checkpoints" / "step-00000008"
    assert torch.isfinite(MedMoEModel.from_pretrained(newest).vision_model.router.fc2.weight).all()


def test_a_checkpoint_holds_raw_weights_and_the_output_the_average(tmp_path):
    run = run_of(tmp_path / "out", table(tmp_path / "data"), checkpoints={"every_steps": 13}, max_steps=14)
    train(run)
    place = run.run_dir / "checkpoints" / "step-00000013"
    raw, average = weights(place), load_file(place / "training_state" / "ema.safetensors")
    name = "vision_model.router.fc2.weight"
    assert not torch.equal(raw[name], average[name])
    # one more step moves the average by a little, and the weights are far from both
    final = weights(tmp_path / "out")[name]
    assert (final - average[name]).norm() < (final - raw[name]).norm()


def stopped_run(tmp_path):
    run = run_of(tmp_path / "out", {"kind": "phantom", "image_size": 64}, max_steps=6)
    part = TrainingRun(run)
    part._signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        part.train()
    return run


def test_another_configuration_is_refused_with_each_difference(tmp_path):
    run = stopped_run(tmp_path)
    with pytest.raises(ResumeError) as error:
        train(run.model_copy(update={"learning_rate": 2e-3, "seed": 5, "log_every": 7}), "auto")
    assert "  learning_rate: 0.001 then, 0.002 now\n  seed: 0 then, 5 now\n" in str(error.value)
    assert "log_every" not in str(error.value)
    place = find_checkpoints(run.run_dir / "checkpoints")[0]
    with pytest.raises(ResumeError, match="processes: 1 then, 4 now"):
        checkpoints.read_state(place, run.model_dump(mode="json"), 4)


def test_a_run_is_not_begun_over_another_and_resume_needs_a_checkpoint(tmp_path):
    run = stopped_run(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds checkpoints of a run.*--resume auto"):
        train(run)
    with pytest.raises(ResumeError, match="is no checkpoint of a run"):
        train(run, tmp_path / "nothing")
    fresh = run.model_copy(update={"output_dir": tmp_path / "fresh"})
    assert train(fresh, "auto").steps == 6  # nothing to resume: from the beginning


DAMAGES = {
    "no optimizer": ("training_state/optimizer.safetensors", None, "is missing"),
    "no average": ("training_state/ema.safetensors", None, "is missing"),
    "no random numbers": ("training_state/random.safetensors", None, "is missing"),
    "no state": ("training_state/state.json", None, "is missing"),
    "no weights": ("model.safetensors", None, "is missing"),
    "no tokenizer": ("tokenizer.json", None, "is missing"),
    "weights cut off": ("model.safetensors", lambda content: content[:-1000], r"has \d+ bytes instead of \d+"),
    "a flipped bit": (
        "training_state/optimizer.safetensors",
        lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        r"is damaged \(its checksum differs\)",
    ),
    "another state": (
        "training_state/state.json",
        lambda content: content.replace(b'"step": 4', b'"step": 5'),
        r"is damaged \(its checksum differs\)",
    ),
    "a foreign file": ("training_state/weights.safetensors", lambda _: b"x", "does not belong to it"),
    "no manifest": ("training_state/manifest.json", None, "which lists its files: it is incomplete"),
    "manifest cut off": ("training_state/manifest.json", lambda content: content[:-20], "cannot be read"),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Of a run that was stopped after step 4; and the weights of one that was not."""
    folder = tmp_path_factory.mktemp("two")
    source = {"kind": "phantom", "image_size": 64}
    changes = {"max_steps": 6, "checkpoints": {"every_steps": 2, "keep_best": False}}
    train(run_of(folder / "straight", source, **changes))
    run = run_of(folder / "out", source, **changes)
    part = TrainingRun(run)
    step = part.step

    def and_stop(batches):
        step(batches)
        part._signal = signal.SIGTERM if part.record.steps == 4 else 0

    part.step = and_stop
    with pytest.raises(Interrupted):
        part.train()
    return run, weights(folder / "straight")


@pytest.fixture
def copied(tmp_path, two_checkpoints):
    """The stopped run in a folder of its own: it, its two checkpoints, and the weights it is to end with."""
    run, expected = two_checkpoints
    shutil.copytree(run.run_dir, tmp_path / "out-run")
    run = run.model_copy(update={"output_dir": tmp_path / "out"})  # which may change
    older, newest = find_checkpoints(run.run_dir / "checkpoints")
    assert (older.name, newest.name) == ("step-00000002", "step-00000004")
    return run, older, newest, expected


def damaged(newest, damage):
    name, change, said = DAMAGES[damage]
    file = newest / name
    before = file.read_bytes() if file.exists() else b""
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(before))
        assert file.read_bytes() != before
    return f"step-00000004.*{name}.*{said}"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(copied, damage):
    run, older, newest, _ = copied
    checkpoints.check(newest)
    said = damaged(newest, damage)
    with pytest.raises(ResumeError, match=said):
        train(run, newest)
    found, problems = checkpoints.newest_complete(run.run_dir / "checkpoints")
    assert found == older
    assert len(problems) == 1
    assert re.search(said, problems[0])


def test_auto_uses_the_newest_complete_checkpoint_and_reports_it(copied, caplog):
    run, _, newest, expected = copied
    said = damaged(newest, "no average")
    assert train(run, "auto").resumed == [2]
    out = caplog.text
    assert re.search(f"Skipped: .*{said}", out)
    assert re.search("Resuming from .*step-00000002, the newest complete checkpoint", out)
    assert_same(weights(run.output_dir), expected)
    checkpoints.check(newest)  # written anew on the way


def test_without_a_complete_checkpoint_no_new_run_is_started(copied):
    run, older, newest, _ = copied
    (older / "model.safetensors").unlink()
    (newest / "training_state" / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ResumeError) as error:
        train(run, "auto")
    said = str(error.value)
    assert "step-00000002 is not complete: model.safetensors is missing" in said
    assert "step-00000004 is not complete: training_state/ema.safetensors has 0 bytes instead of" in said


def test_a_run_taken_up_at_an_older_checkpoint_loses_none_and_writes_later_ones_anew(copied):
    """With one kept, the checkpoint of step 4 of before must not push out that of step 3."""
    run, older, newest, _ = copied
    rhythm = run.checkpoints.model_copy(update={"every_steps": 1, "keep_last": 1})
    run = run.model_copy(update={"checkpoints": rhythm})
    (newest / "left.txt").write_text("of before")
    part, seen = TrainingRun(run, older), []
    save = part.save_checkpoint

    def and_look(*arguments, **options):
        save(*arguments, **options)
        names = [int(path.name[5:]) for path in find_checkpoints(run.run_dir / "checkpoints")]
        seen.append((names, (newest / "left.txt").exists()))

    part.save_checkpoint = and_look
    part.train()
    assert seen == [([3, 4], True), ([4], False), ([5], False)]


CHANGES = {
    "row added": r"of other training data.*t\.csv: \d+ bytes .* then, \d+ bytes .* now",
    "held-out row added": r"of other held-out data.*held\.csv: \d+ bytes .* then, \d+ bytes .* now",
    "tar removed": r"of other training data.*phantom-000001\.tar: not there any more",
    "tar added": r"of other training data.*zz\.tar: new",
    "tar swapped": r"of other training data.*phantom-000001\.tar: \d+ bytes .* then, \d+ bytes .* now",
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_data_behind_the_same_names_are_refused(tmp_path, kind):
    data = tmp_path / "data"
    source = table(data, rows=12)
    lines = (data / "t.csv").read_text().split("\n")
    (data / "held.csv").write_text("\n".join([lines[0], *lines[2:8]]))
    if kind.startswith("tar"):
        write_webdataset(data / "tars", shards=3, samples_per_shard=6, image_size=64)
        write_webdataset(data / "more", shards=1, samples_per_shard=6, image_size=64, seed=7)
        source = {"kind": "webdataset", "files": [str(data / "tars" / "*.tar")]}
    held_out = {"kind": "csv", "files": [str(data / "held.csv")], "image": "path", "caption": "report"}
    run = run_of(tmp_path / "out", source, max_steps=6)
    run = TrainConfig.from_dict(
        run.model_dump(mode="json") | {"data": run.data.model_dump(mode="json") | {"evaluation": held_out}}
    )
    part = TrainingRun(run)
    part._signal = signal.SIGTERM
    with pytest.raises(Interrupted):
        part.train()
    tars = sorted((data / "tars").glob("*.tar"))
    if kind == "tar removed":
        tars[1].unlink()
    elif kind == "tar added":
        shutil.copy(tars[0], data / "tars" / "zz.tar")
    elif kind == "tar swapped":
        shutil.copy(next((data / "more").glob("*.tar")), tars[1])
    else:
        with (data / ("held.csv" if kind.startswith("held") else "t.csv")).open("a") as file:
            file.write(f"\n{lines[2]}")
    with pytest.raises(ResumeError, match=f"(?s)step-00000001 is {CHANGES[kind]}"):
        train(run, "auto")


def killed_while_writing(run):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    part = TrainingRun(run, "auto")
    checkpoints.write_state = die
    part.train()


def test_killed_while_a_checkpoint_is_written_the_one_before_is_whole(tmp_path):
    run = stopped_run(tmp_path)
    run = run.model_copy(update={"checkpoints": run.checkpoints.model_copy(update={"every_steps": 2})})
    child = context.Process(target=killed_while_writing, args=(run,))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    folder = run.run_dir / "checkpoints"
    assert [path.name for path in find_checkpoints(folder)] == ["step-00000001"]
    assert list(folder.glob(".step-00000002-*"))  # what was half written
    assert train(run, "auto").resumed == [1]
    assert not list(folder.glob(".step-*"))
    train(run_of(tmp_path / "straight", {"kind": "phantom", "image_size": 64}, max_steps=6))
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "out"))


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(tmp_path, monkeypatch):
    run = stopped_run(tmp_path)
    run = run.model_copy(update={"checkpoints": run.checkpoints.model_copy(update={"every_steps": 2})})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_state", full)
        with pytest.raises(
            TrainingError, match=r"step 2 could not be written: the disk is full.*step-00000001.*make room"
        ):
            train(run, "auto")
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == ["step-00000001"]
    assert train(run, "auto").steps == 6


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        run = run_of(
            disk / "out", {"kind": "phantom", "image_size": 64}, checkpoints={"every_steps": 1, "keep_last": 9}
        )
        with pytest.raises(TrainingError, match=r"could not be written: the disk is full"):
            train(run)
        found = find_checkpoints(run.run_dir / "checkpoints")
        assert found
        for place in found:
            MedMoEModel.from_pretrained(place)
            checkpoints.read_state(place, run.model_dump(mode="json"), 1)
        assert not list((run.run_dir / "checkpoints").glob(".step-*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_the_command_survives_sigterm_at_random_moments(tmp_path):
    """The real thing: a process of its own with readers, killed by signals whenever they come."""
    source = table(tmp_path / "data")
    files = {}
    for name in ("straight", "stopped"):
        run = run_of(tmp_path / name, source, max_steps=100, evaluate_every=10, checkpoints={"every_steps": 50})
        run = run.model_copy(update={"data": run.data.model_copy(update={"num_workers": 1})})
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(run.model_dump(mode="json")))
    chance, said = random.Random(3), tmp_path / "stderr"

    def started(name):
        process = context.Process(target=command, args=(said, "train", "--resume", "auto", str(files[name])))
        process.start()
        return process

    def ended(process):
        process.join(600)
        if process.is_alive():
            process.kill()
        return process.exitcode

    assert ended(started("straight")) == 0, said.read_text()
    for _ in range(5):
        said.write_text("")
        process = started("stopped")
        while "step/s" not in said.read_text():  # it is in the loop
            assert process.is_alive(), said.read_text()
            time.sleep(0.01)
        time.sleep(chance.uniform(0.05, 0.3))
        os.kill(process.pid, chance.choice([signal.SIGTERM, signal.SIGINT]))
        assert ended(process) in (130, 143), said.read_text()
        assert "--resume auto" in said.read_text()
    assert ended(started("stopped")) == 0, said.read_text()
    assert len(json.loads((tmp_path / "stopped" / "training.json").read_text())["resumed"]) == 5
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "stopped"))
