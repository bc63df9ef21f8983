"""The lock of a run's folder: one run at a time, and no lock that stays."""

import errno
import fcntl
import logging
import os
import signal
import time

import pytest
import torch
from processes import context
from test_resume import assert_same, run_of, weights

from medmoe_hf.errors import PathExistsError, TrainingError
from medmoe_hf.training import train
from medmoe_hf.training.checkpoints import find_checkpoints
from medmoe_hf.training.loop import TrainingRun
from medmoe_hf.training.run_lock import LOCK, locked_run

PHANTOMS = {"kind": "phantom", "image_size": 64}


def run_in(folder):
    return run_of(folder / "out", PHANTOMS, max_steps=4, checkpoints={"every_steps": 1, "every_minutes": 0})


def slow(run, pipe, threads):
    """Trains with a number of threads, on which the last bits depend.

    After the second step it has a child that inherits its files, says so, and waits.
    """
    step = TrainingRun.step

    def and_wait(self, batches):
        step(self, batches)
        if self.record.steps == 2:
            self.save_checkpoint()
            child = os.fork()
            if not child:
                time.sleep(300)
                os._exit(0)
            pipe.send(child)
            pipe.recv()

    TrainingRun.step = and_wait
    torch.set_num_threads(threads)
    train(run)


def test_a_second_run_ends_at_once_and_the_first_can_be_resumed_when_killed(tmp_path):
    run = run_in(tmp_path)
    ours, theirs = context.Pipe()
    first = context.Process(target=slow, args=(run, theirs, torch.get_num_threads()))
    first.start()
    assert ours.poll(120)
    child = ours.recv()
    try:
        for resume in ("auto", None):
            with pytest.raises(TrainingError) as error:
                train(run, resume)
            told = f"process {first.pid} on {os.uname().nodename} holds {run.run_dir / LOCK}. Wait until it ends"
            assert told in str(error.value)
            assert "`--resume auto`" in str(error.value)
        steps = [path.name for path in find_checkpoints(run.run_dir / "checkpoints")]
        assert steps[-1] == "step-00000002"
        os.kill(first.pid, signal.SIGKILL)
        first.join(60)
        assert (run.run_dir / LOCK).exists()
        # What the run has forked is still there, with the lock's file open.
        os.kill(child, 0)
        with pytest.raises(PathExistsError, match="holds checkpoints of a run"):
            train(run)
        assert train(run, "auto").resumed == [2]
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (run.run_dir / LOCK).exists()
    train(run_in(tmp_path / "straight"))
    assert_same(weights(tmp_path / "straight" / "out"), weights(tmp_path / "out"))


def test_an_ended_run_leaves_no_folder_and_no_lock(tmp_path):
    place = tmp_path / "runs" / "out-run"
    with locked_run(place):
        assert (place / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not place.exists()
    with locked_run(place):
        (place / "log").write_text("")
    assert [path.name for path in place.iterdir()] == ["log"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_get_a_warning(tmp_path, monkeypatch, caplog, number):
    def without(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", without)
    with caplog.at_level(logging.WARNING), locked_run(tmp_path / "out-run"):
        pass
    assert f"out-run cannot be locked ({os.strerror(number)}): make sure that no other run" in caplog.text
