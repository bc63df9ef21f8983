"""Files that are decoded apart: the same pixels, and whatever a codec does, its process alone ends."""

import contextlib
import json
import logging
import os
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from answers import with_files
from PIL import Image
from small_encoders import medmoe_folder
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.errors import ArgumentError, DecodingError, ImageTooLargeError, IsolationError, PathNotFoundError
from medmoe_hf.hub.study_demo import examples
from medmoe_hf.inference.isolation import DecodingLimits, IsolatedReader
from medmoe_hf.inference.isolation.messages import MessageError, receive, send
from medmoe_hf.inference.isolation.plain_studies import described, rebuilt
from medmoe_hf.inference.studies import Question, StudyPredictor
from medmoe_hf.inference.studies.predictions import predictions_dict
from medmoe_hf.model.studies_medmoe import read_studies

LABELS = ["no finding", "pneumonia"]
CRASHES = {
    "exit": "it crashed its decoder (exit code 3)",
    "segfault": "it crashed its decoder (SIGSEGV)",
    "sleep": "it took its decoder longer than 4 s",
    "allocate": "its decoder needs more than 1000 MB of memory",
    "descriptors": "Too many open files",
    "babble": "its decoder gave no valid answer: it is too large",
}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return StudyPredictor(medmoe_folder(tmp_path_factory.mktemp("model") / "tiny"), batch_size=4)


@pytest.fixture(scope="module")
def reader():
    os.environ["MEDMOE_TEST_TOKEN"] = "hf_secret"
    limits = DecodingLimits(megabytes=1000, seconds=4, open_files=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        reader = IsolatedReader(limits, plugins=["hostile_codec"])
    with reader:
        yield reader
    del os.environ["MEDMOE_TEST_TOKEN"]


@pytest.fixture(autouse=True)
def nothing_left(request):
    """No process of a test is left, and no descriptor."""
    if "reader" not in request.fixturenames:
        yield
        return
    reader = request.getfixturevalue("reader")
    reader.read_studies([Path(__file__).parent / "../../docs/pages/organs.png"])
    reader.release()
    before = descriptors()
    yield
    reader.release()
    assert children(reader) == []
    assert descriptors() == before


def descriptors():
    """What is open, by its kind and name, and not by number."""
    found = []
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # of the listing itself
            found.append(os.readlink(link))
    return sorted(found)


def children(reader):
    path = Path(f"/proc/{reader._launcher.pid}/task/{reader._launcher.pid}/children")
    return path.read_text().split() if path.exists() else []


def hostile(path, what, when="load"):
    path.write_text(f"HOSTILE {when} {what}")
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A CT, a loop, a volume, pictures of 8 and 16 bits, and files that cannot be read."""
    folder = tmp_path / "DOE^JANE"
    folder.mkdir()
    pytest.importorskip("pydicom")
    monkeypatch.setattr(examples, "_SLICES", 5)
    (folder / "ct").mkdir()
    examples.write_ct_series(folder / "ct")
    examples.write_loop(folder)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "a.jpg")
    Image.fromarray(random.integers(0, 65535, (40, 50), dtype=np.uint16)).save(folder / "b.png")
    (folder / "b-cut.png").write_bytes((folder / "b.png").read_bytes()[:200])
    (folder / "c.txt").write_text("no image")
    nibabel = pytest.importorskip("nibabel")
    volume = random.integers(0, 255, (40, 36, 5)).astype(np.int16)
    nibabel.Nifti1Image(volume, np.diag([0.8, 0.7, 2.0, 1.0])).to_filename(folder / "d.nii.gz")
    return folder


def test_pixels_and_predictions_are_those_of_one_process(reader, predictor, files):
    for asked in ({}, {"plane": "sagittal", "window": (100.0, 50.0)}, {"window": ["lung", "bone", (0, 100)]}):
        plain, apart = read_studies(files, **asked), reader.read_studies(files, **asked)
        assert json.dumps(described(apart)) == json.dumps(described(plain))
        assert sum(map(len, plain)) > 10
        for one, other in zip(plain, apart, strict=True):
            for series, same in zip(one.series, other.series, strict=True):
                pairs = list(zip(list(series), list(same), strict=True))
                assert [one.reason for one in series.skipped] == [one.reason for one in same.skipped]
                for (index, image), (number, copy) in pairs:
                    assert (index, image.modality, image.spacing) == (number, copy.modality, copy.spacing)
                    assert (image.frame, image.frames) == (copy.frame, copy.frames)
                    assert image.pixels.dtype == copy.pixels.dtype
                    np.testing.assert_array_equal(image.pixels, copy.pixels)
    question = Question(labels=LABELS, text="air")
    found = [
        predictions_dict(predictor(read(files), question, show_progress=False), keep_identifiers=True)
        for read in (read_studies, reader.read_studies)
    ]
    assert found[0] == found[1]


@pytest.mark.usefixtures("logging_as_before")
def test_the_command_decodes_apart_if_asked(reader, predictor, files, monkeypatch):
    made = []
    monkeypatch.setattr("medmoe_hf.inference.studies.paths.IsolatedReader", lambda: made.append(1) or reader)
    monkeypatch.setattr("medmoe_hf.inference.studies.predictor.load_encoder", lambda *arguments: predictor.encoder)
    told = [CliRunner().invoke(app, ["predict", str(files), *flag]) for flag in ([], ["--isolate"])]
    assert [one.exit_code for one in told] == [0, 0], told[1].output
    assert told[0].stdout == told[1].stdout
    assert made == [1]


def test_a_picture_is_read_like_its_file(reader, predictor, files):
    process = predictor.encoder.processor
    for name in ("a.jpg", "b.png", "d.nii.gz"):
        expected = process(images=files / name, return_tensors="np")["pixel_values"]
        found = process(images=reader.picture(files / name), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(PathNotFoundError, match="there is no such file"):
        reader.picture(files / "missing.png")
    with pytest.raises(ImageTooLargeError, match="more than `max_pixels` 100 allows"):
        reader.picture(files / "a.jpg", max_pixels=100)
    with pytest.raises(DecodingError, match="SIGSEGV"):
        reader.picture(hostile(files / "x", "segfault"))


def test_what_a_codec_does_ends_with_its_file(reader, files):
    for number, what in enumerate(CRASHES):
        paths = [files / "a.jpg", hostile(files / "x", what), files / "b.png"]
        begun = time.monotonic()
        before, bad, after = reader.read_studies(paths)
        for good in (before, after):
            assert len(list(good.series[0])) == 1
        assert list(bad.series[0]) == [], number
        (skipped,) = bad.skipped
        assert CRASHES[what] in skipped.reason
        assert str(files) not in skipped.reason
        assert len(list(after.series[0])) == 1
        assert time.monotonic() - begun < 30


def test_what_a_header_does_ends_with_its_file(reader, files):
    paths = [files / "a.jpg", hostile(files / "x", "segfault", "open"), files / "b.png", hostile(files / "z", "exit")]
    paths.append(hostile(files / "y", "exit", "open"))
    told = []
    studies = reader.read_studies(paths, on_skip=told.append)
    assert [len(list(study.series[0])) for study in studies] == [1, 1, 0]
    assert {Path(one.path).name for one in told} == {"x", "y", "z"}
    assert {one.path: one.reason for one in studies.skipped} == {
        str(files / "x"): CRASHES["segfault"],
        str(files / "y"): CRASHES["exit"],
    }
    with pytest.raises(OSError, match="there is no image in the given files: it crashed its decoder"):
        reader.read_studies(files / "y")


def test_a_look_at_the_clock_ends_the_reading_of_headers(reader, files):
    begun = time.monotonic()

    def check():
        if time.monotonic() - begun > 0.5:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        reader.read_studies(hostile(files / "x", "sleep", "open"), check=check)
    assert time.monotonic() - begun < 3


def test_too_many_crashes_end_the_work(reader, files):
    paths = [hostile(files / f"x{number}", "exit") for number in range(7)]
    studies = reader.read_studies(paths)
    for study in studies[:5]:
        assert list(study.series[0]) == []
    with pytest.raises(IsolationError, match=r"More than 5 of these files or slices .*exit code 3"):
        list(studies[5].series[0])
    again = [hostile(files / f"x{number}", "exit", "open") for number in range(7)]
    with pytest.raises(IsolationError, match="More than 5"):
        reader.read_studies(again)


def test_a_process_sees_no_variables_and_has_limits(reader, files):
    assert os.environ["MEDMOE_TEST_TOKEN"]
    told, written = {}, files / "written"
    for what in ("variables", f"write={written}", "fault"):
        (study,) = reader.read_studies(hostile(files / "x", what))
        list(study.series[0])
        told[what] = study.skipped[0].reason
    assert "PATH" in told["variables"]
    assert "TOKEN" not in told["variables"]
    assert "too large" in told[f"write={written}"]
    assert written.stat().st_size <= 10**9
    reader.read_studies(files / "a.jpg")
    (process,) = reader._open
    limits = Path(f"/proc/{process._fork.pid}/limits").read_text()
    for name, most in {"core file size": 0, "file size": 10**9, "open files": 64}.items():
        (line,) = [line for line in limits.splitlines() if line.startswith(f"Max {name} ")]
        assert line.removeprefix(f"Max {name} ").split()[:2] == [str(most)] * 2


def test_faults_of_the_package_are_told_as_such(reader, files, caplog):
    reader.read_studies(files / "a.jpg")
    (process,) = reader._open
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="IndexError in the process that decodes"):
        process.ask({"do": "slice", "study": 7, "series": 0, "index": 0, "window": None})
    assert "in _slice" in caplog.text


def test_sets_of_files_take_turns(reader, files):
    first, second = reader.read_studies(files / "d.nii.gz"), reader.read_studies(files / "b.png")
    plain = read_studies(files / "d.nii.gz")[0].series[0]
    for index in range(3):
        np.testing.assert_array_equal(first[0].series[0].slice(index).pixels, plain.slice(index).pixels)
        assert second[0].series[0].slice(0).pixels.shape == (40, 50, 3)
        assert len(children(reader)) == 1
    reader.release()
    (files / "d.nii.gz").unlink()
    with pytest.raises(PathNotFoundError):
        first[0].series[0].slice(0)


@pytest.mark.slow
def test_a_launcher_that_was_killed_is_replaced(files):
    with IsolatedReader() as other:
        (study,) = other.read_studies(files / "a.jpg")
        os.kill(other._launcher.pid, 9)
        other.release()
        assert study.series[0].slice(0).pixels.shape == (40, 50, 3)
    with pytest.raises(IsolationError, match="was closed"):
        study.series[0].slice(0)
    assert not Path(f"/proc/{other._launcher.pid}").exists()


def test_systems_without_limits_are_refused(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(IsolationError, match=r"need Linux or macOS.*--no-isolate"):
        IsolatedReader()
    told = CliRunner().invoke(app, ["predict", str(tmp_path), "--isolate"])
    assert told.exit_code == 1
    assert "need Linux or macOS" in str(told.output) + str(told.exception)


def test_limits_have_least_values():
    with pytest.raises(ArgumentError, match="`seconds` must be at least 1, got 0"):
        DecodingLimits(seconds=0)


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (struct.pack("<QQ", 1 << 40, 0), "too large"),
        (struct.pack("<QQ", 2, 1 << 40) + b"{}", "too large"),
        (struct.pack("<QQ", 1, 0) + b"{", "no JSON"),
        (struct.pack("<QQ", 200000, 0) + b"[" * 200000, "no JSON"),
        (struct.pack("<QQ", 2, 0) + b"[]", "no JSON object"),
        (struct.pack("<QQ", 2, 4) + b"{}" + bytes(4), "does not describe its pixels"),
        (b'{"pixels": ["uint8", [2, 3]]}', "not those that it describes"),
        (b'{"pixels": ["uint8", [-1, -4]]}', "not those that it describes"),
        (b'{"pixels": ["object", [4]]}', "not those that it describes"),
        (b'{"pixels": ["float32", []]}', "not those that it describes"),
        (b'{"pixels": ["uint8", [1e400]]}', "does not describe its pixels"),
        (b'{"pixels": 3}', "does not describe its pixels"),
    ],
)
def test_messages_are_not_trusted(pair, message, told):
    if message[:1] == b"{":
        message = struct.pack("<QQ", len(message), 4) + message + bytes(4)
    pair[0].settimeout(5)
    pair[1].settimeout(5)
    sender = threading.Thread(target=pair[0].sendall, args=(message,), daemon=True)
    sender.start()
    with pytest.raises(MessageError, match=told):
        receive(pair[1], most_pixels=1000)


def test_messages_arrive_as_they_were_sent(pair):
    pixels = np.arange(6, dtype=np.float32).reshape(2, 3).T
    send(pair[0], {"a": [1.5, float("inf"), None, "\udcff"]}, pixels)
    told, same = receive(pair[1], most_pixels=24)
    assert told == {"a": [1.5, float("inf"), None, "\udcff"]}
    np.testing.assert_array_equal(same, pixels)
    pair[0].close()
    with pytest.raises(EOFError):
        receive(pair[1])


def test_descriptions_are_not_trusted(reader, files):
    told = described(read_studies([files / "a.jpg", files / "d.nii.gz"]))
    studies = rebuilt(told, None, lambda path: None)
    assert json.dumps(described(studies)) == json.dumps(told)

    def changed(**entries):
        copy = json.loads(json.dumps(told))
        copy["studies"][1]["series"][0].update(entries)
        return copy

    for wrong in (
        {},
        {"studies": 3, "skipped": []},
        changed(uid=3),
        changed(part=-1),
        changed(part=True),
        changed(kind="other"),
        changed(header_modality="other"),
        changed(sources=[["a"]]),
        changed(size=[1]),
        changed(spacing=["a", 1]),
        changed(positions=[0.0]),
        changed(affine=[[1.0]]),
        changed(slots=[[]]),
        changed(notes=[3]),
        told | {"skipped": [["a", "b", "c"]]},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            rebuilt(wrong, None, lambda path: None)
    reader.read_studies(files / "a.jpg")
    (process,) = reader._open
    process._check_path(str(files / "ct" / "other.dcm"))  # DICOMDIRs name files beside them
    for elsewhere in ("/etc/passwd", str(files / ".." / "other.png"), ""):
        with pytest.raises(ValueError, match="not to be read"):
            process._check_path(elsewhere)


def test_the_service_goes_on_after_a_crash(reader, predictor, files, tmp_path, monkeypatch, caplog):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from medmoe_hf.inference.serving import Limits, create_app

    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    good = [("files", ("DOE^JANE.png", (files / "b.png").read_bytes()))]
    with TestClient(create_app(predictor, Limits(), reader=reader), base_url="http://127.0.0.1") as client:
        predicted = predictor(read_studies(files / "b.png"), Question(LABELS), show_progress=False)
        expected = with_files(predictions_dict(predicted), [0])

        def ask(files):
            return client.post("/predict", files=files, data={"labels": LABELS})

        assert ask(good).json() == expected
        open_before = len(descriptors())
        for when in ("load", "open"):
            for what in ("exit", "segfault", "allocate") + (("sleep",) if when == "open" else ()):
                bad = [("files", ("DOE^JANE.x", f"HOSTILE {when} {what}".encode()))]
                answer = ask(bad)
                assert answer.status_code == 422, (when, what, answer.text)
                if (when, what) != ("open", "allocate"):
                    assert CRASHES[what] in answer.json()["detail"]
                assert str(folder) not in answer.text
                assert ask(good).json() == expected
                assert children(reader) == []
        mixed = ask([*good, ("files", ("x", b"HOSTILE load segfault"))])
        assert mixed.status_code == 200
        assert mixed.json()["studies"][0]["labels"] == expected["studies"][0]["labels"]
        assert CRASHES["segfault"] in json.dumps(mixed.json())
        embedded = client.post("/embed", files=good).json()["series"][0]
        assert len(embedded["embedding"]) > 0
        assert len(descriptors()) == open_before
    assert not list(folder.iterdir())
    assert "DOE" not in caplog.text
