"""The long runs of `examples/experiments/soak.py` in short, and whether they notice what piles up."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

if not Path("/proc/self/fd").is_dir():
    pytest.skip("processes can be looked at on Linux", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "experiments"))

import soak


def test_what_exceeds_the_tolerance():
    first = soak.Held(memory=1000.0, descriptors=8, threads=4, processes=1, files=0)
    assert first.excess(first) == []
    assert replace(first, memory=1066.0, descriptors=10, threads=6).excess(first) == []
    for name, value in {"memory": 1066.1, "descriptors": 11, "threads": 7, "processes": 2, "files": 1}.items():
        assert replace(first, **{name: value}).excess(first) == [name]


def test_what_is_left_is_noticed(monkeypatch, capsys):
    kept = []

    def leaking(count, folder, here):
        for number in range(count):
            kept.append((folder / str(number)).open("w"))
            yield (lambda: soak.Held.by(soak.os.getpid(), folder)), "files"

    monkeypatch.setitem(soak.RUNS, "leaking", (leaking, 10, "files that are not closed"))
    assert not soak.soak("leaking", 10)
    assert "descriptors, files" in capsys.readouterr().err
    for file in kept:
        file.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize(
    ("run", "count"),
    [
        ("stream", 400),
        ("push", 12),
        pytest.param("resume", 3, marks=pytest.mark.slow),
        pytest.param("serve", 60, marks=pytest.mark.slow),
        pytest.param("serve-here", 60, marks=pytest.mark.slow),
    ],
)
def test_nothing_piles_up_in_short(run, count, monkeypatch, capsys):
    if run.startswith("serve"):
        for package in ("fastapi", "uvicorn", "httpx"):
            pytest.importorskip(package)
    if run == "push":
        pytest.importorskip("datasets")
    monkeypatch.setattr(soak, "SHARE", 5)
    told: list[Counter[str]] = []
    report = soak.reported
    monkeypatch.setattr(soak, "reported", lambda *arguments: told.append(arguments[4]) or report(*arguments))
    assert soak.soak(run, count), capsys.readouterr()
    assert sum(told[0].values()) == count
    assert len(told[0]) > 1 or run == "resume"
