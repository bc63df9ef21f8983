"""A file is there whole or as it was before."""

import errno
import os

import pytest

from medmoe_hf.common.files import atomic_dir, atomic_write, check_output
from medmoe_hf.errors import ArgumentError, DiskFullError, PathExistsError


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")

    def fail():
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("write", [atomic_write, atomic_dir])
def test_a_full_disk_is_told_with_what_was_written(write, number, tmp_path):
    target = tmp_path / "new" / "results"
    if write is atomic_write:
        target.parent.mkdir()

    def fail(error):
        with write(target):
            raise error

    with pytest.raises(DiskFullError, match=r"new/results could not be written: .*Make room there") as caught:
        fail(OSError(number, os.strerror(number)))
    assert caught.value.errno == errno.ENOSPC
    assert f"MB are free in {target.parent})" in str(caught.value)
    with pytest.raises(DiskFullError, match="new/results could not"):  # what safetensors says
        fail(RuntimeError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(PermissionError):
        fail(PermissionError(errno.EACCES, "not allowed"))
    assert not list(target.parent.iterdir())


def test_only_a_folder_of_the_same_command_is_replaced(tmp_path, monkeypatch):
    out, scans = tmp_path / "out", tmp_path / "scans"
    scans.mkdir()
    (scans / "one.png").write_text("x")
    check_output(out, False, "made.json", [scans])
    with pytest.raises(PathExistsError, match=r"scans exists already.*--force"):
        check_output(scans, False, "made.json")
    with pytest.raises(PathExistsError, match=r"it has no made\.json, so it was not made by this command"):
        check_output(scans, True, "made.json")
    out.mkdir()
    check_output(out, True, "made.json", [scans])  # an empty folder has nothing to lose
    (out / "made.json").write_text("{}")
    check_output(out, True, "made.json", [scans])
    (out / "link.png").symlink_to(scans / "one.png")
    (scans / "made.json").write_text("{}")
    with pytest.raises(PathExistsError, match=r"it holds .*link\.png, which is read"):
        check_output(scans, True, "made.json", [out / "link.png"])
    with pytest.raises(PathExistsError, match="a file: choose another name"):
        check_output(scans / "one.png", True, "made.json")
    monkeypatch.chdir(out)
    with pytest.raises(PathExistsError, match="it holds the working directory"):
        check_output(".", True, "made.json")


def test_a_folder_that_cannot_be_created_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match=r"file/out cannot be created: .*file is no folder"):
        check_output(tmp_path / "file" / "out", False, "made.json")
    check_output(tmp_path / "new" / "out", False, "made.json")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ArgumentError, match=r"new/out cannot be created: .* is no folder that you may write to"):
        check_output(tmp_path / "new" / "out", False, "made.json")


def test_of_two_runs_into_one_folder_neither_is_lost(tmp_path):
    (tmp_path / "out-2").mkdir()

    def second():
        with atomic_dir(tmp_path / "out") as later:
            (later / "run").write_text("second")
            with atomic_dir(tmp_path / "out") as first:
                (first / "run").write_text("first")

    with pytest.raises(PathExistsError, match=r"out was created by something else meanwhile.*out-3"):
        second()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2", "out-3"]
    assert [(tmp_path / name / "run").read_text() for name in ("out", "out-3")] == ["first", "second"]
