"""The HTTP service against `predict`, and what a client may do wrong."""

import asyncio
import io
import logging
import runpy
import socket
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from answers import assert_same, with_files
from small_encoders import medmoe_folder
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data import phantom_sample
from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.inference.studies import Question, StudyPredictor
from medmoe_hf.inference.studies.predictions import predictions_dict
from medmoe_hf.model.studies_medmoe import read_studies

for package in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(package)
import uvicorn  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from medmoe_hf.inference.serving import Limits, create_app, serve  # noqa: E402
from medmoe_hf.inference.serving.archives import UploadError, unpack  # noqa: E402

NAME = "DOE^JANE"
LABELS = ["no finding", "pneumonia", "effusion"]
HOST = "http://127.0.0.1"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return StudyPredictor(medmoe_folder(tmp_path_factory.mktemp("model") / "tiny"), batch_size=4)


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder of temporary files, which must be empty in the end."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def client(predictor, uploads):
    with TestClient(create_app(predictor, Limits(megabytes=1, files=6, seconds=30)), base_url=HOST) as client:
        yield client


@pytest.fixture
def pictures(tmp_path):
    """Three PNG files whose names identify a person."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(3):
        phantom_sample(5, index, image_size=64)["image"].save(folder / f"{NAME}-{index}.png")
    return sorted(folder.iterdir())


def uploaded(paths):
    return [("files", (path.name, path.read_bytes())) for path in paths]


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def predicted(predictor, paths, **question):
    return predictions_dict(predictor(read_studies(paths), Question(**question), show_progress=False))


def test_files_and_a_zip_of_them_get_the_answers_of_predict(client, predictor, pictures, caplog):
    caplog.set_level(logging.INFO)
    expected = predicted(predictor, pictures, labels=LABELS, text=["ground glass", "air"], pooling="mean")
    asked = {"labels": ["no finding,pneumonia", "effusion"], "text": ["ground glass", "air"], "pooling": "mean"}
    answer = client.post("/predict", files=uploaded(pictures), data=asked)
    assert answer.status_code == 200
    assert_same(answer.json(), with_files(expected, [0], [1], [2]))
    members = [(f"{NAME}/../{path.name}", path.read_bytes()) for path in reversed(pictures)]
    members += [("__MACOSX/._a.png", b"x"), ("DICOMDIR", b"x"), ("empty/", b"")]
    answer = client.post("/predict", files={"files": (f"{NAME}.zip", zipped(members))}, data=asked)
    assert_same(answer.json(), with_files(expected, [0], [0], [0]))
    assert NAME not in answer.text
    assert "DOE" not in caplog.text
    assert "/predict: 200, 3 files" in caplog.text


def test_each_study_names_the_uploads_that_it_was_read_from(client, pictures, tmp_path):
    pytest.importorskip("pydicom")
    from ct_series import ct_series

    ct_series(tmp_path / "one", count=3)
    slices = sorted((tmp_path / "one").iterdir())
    second, first, third = (path.read_bytes() for path in slices)
    picture = pictures[0].read_bytes()
    parts = [
        ("DICOMDIR", b"x"),  # not kept, but counted
        ("b", second),
        ("c.png", picture),
        ("d.zip", zipped([("x/1.png", picture), ("x/2", first)])),
        ("e", third),
        ("f", third),  # a copy, which is left out
    ]
    answer = client.post("/predict", files=[("files", part) for part in parts], data={"labels": LABELS})
    assert answer.status_code == 200, answer.text
    series = {one["series"][0]["kind"]: one for one in answer.json()["studies"]}
    assert series["slices"]["files"] == [1, 3, 4, 5]
    assert series["slices"]["series"][0]["slices"] == 3
    assert [one["files"] for one in series["slices"]["skipped"]] == [[5]]
    assert sorted(study["files"] for study in answer.json()["studies"]) == [[1, 3, 4, 5], [2], [3]]

    parts = [("a.txt", b"no picture"), ("b.png", picture)]
    answer = client.post("/predict", files=[("files", part) for part in parts], data={"labels": LABELS})
    assert [one["files"] for one in answer.json()["skipped"]] == [[0]]


def test_the_first_page_leads_to_the_description(client):
    answer = client.get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    told = client.get("/openapi.json").json()["paths"]
    assert "/" not in told
    assert "`files` of each study" in told["/predict"]["post"]["description"]


@pytest.mark.parametrize(
    ("module", "missing"),
    [("app", "fastapi"), ("app", "uvicorn"), ("uploads", "python_multipart.exceptions")],
)
def test_the_extra_is_asked_for_as_a_whole(module, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingPackageError, match=r"fastapi, uvicorn and python-multipart.*medmoe_hf\[serve\]"):
        runpy.run_path(sys.modules[f"medmoe_hf.inference.serving.{module}"].__file__)


def test_a_volume_keeps_its_kind(client, predictor, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / f"{NAME}.nii.gz"
    volume = np.random.default_rng(0).integers(0, 255, (40, 36, 5)).astype(np.int16)
    nibabel.Nifti1Image(volume, np.diag([0.8, 0.7, 2.0, 1.0])).to_filename(path)
    answer = client.post("/predict", files=uploaded([path]), data={"labels": LABELS, "plane": "axial", "task": ""})
    assert_same(answer.json(), with_files(predicted(predictor, [path], labels=LABELS), [0]))
    assert [series["slices"] for series in answer.json()["studies"][0]["series"]] == [5]
    narrow = client.post("/predict", files=uploaded([path]), data={"labels": LABELS, "window": "100,20"}).json()
    assert narrow["studies"][0]["labels"] != answer.json()["studies"][0]["labels"]


def test_embeddings_are_those_of_the_model(client, predictor, pictures):
    found = client.post("/embed", files=uploaded(pictures), data={"text": ["effusion", "air"]}).json()
    encoder = predictor.encoder
    images, texts = encoder.encode_images(pictures), encoder.encode_texts(["effusion", "air"])
    assert [one["text"] for one in found["texts"]] == ["effusion", "air"]
    torch.testing.assert_close(torch.tensor([one["embedding"] for one in found["texts"]]), texts, atol=1e-5, rtol=0)
    vectors = torch.tensor([one["embedding"] for one in found["series"]])
    torch.testing.assert_close(vectors, images, atol=1e-5, rtol=0)
    routed = encoder.route_images(pictures).argmax(dim=1).tolist()
    assert [one["modality"] for one in found["series"]] == [encoder.modalities[index] for index in routed]
    assert client.post("/embed", data={"text": "air"}, files={"files": ("", b"")}).json()["series"] == []


def test_eight_uploads_at_a_time_get_their_own_answers(client, predictor, pictures):
    expected = [with_files(predicted(predictor, [path], labels=LABELS), [0]) for path in pictures]

    def ask(number):
        return client.post("/predict", files=uploaded([pictures[number % 3]]), data={"labels": LABELS})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    for number, answer in enumerate(answers):
        assert answer.status_code == 200
        assert_same(answer.json(), expected[number % 3])
    assert client.get("/health").json()["requests"] == 0


BOMB = zipped([("a.dcm", b"\0" * 2_000_000)])
PNG = zipped([("a.png", b"x")])
DAMAGED = zipped([("a.png", b"content")], zipfile.ZIP_STORED).replace(b"content", b"CONTENT")


def encrypted():
    content = bytearray(PNG)
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("files", "data", "status", "told"),
    [
        ([("a.png", b"\1" * 1_100_000)], {}, 413, "1 MB"),
        ([("a.zip", BOMB)], {}, 413, "1 MB"),
        ([(f"{i}.png", b"x") for i in range(7)], {}, 413, "more than 6 files"),
        ([("a.zip", zipped([(f"{i}.png", b"x") for i in range(7)]))], {}, 413, "more than 6 files"),
        ([("a.zip", zipped([(f"{i:030}" * 9, b"") for i in range(40)]))], {}, 413, "more than 6 files"),
        ([(f"{NAME}.txt", b"not an image")], {}, 422, "neither DICOM nor NIfTI nor a picture"),
        ([("a.zip", zipped([]))], {}, 422, "there are no files"),
        ([("a.zip", PNG[:-30])], {}, 422, "damaged"),
        ([("a.zip", DAMAGED)], {}, 422, "damaged"),
        ([("a.zip", encrypted())], {}, 422, "encrypted"),
        ([("a.zip", zipped([("a.png", b"x")], zipfile.ZIP_LZMA))], {}, 422, "deflate"),
        ([("a.png", b"")], {}, 422, "neither"),
        ([("", b"")], {}, 422, "no files"),
        (None, {"labels": "a,b"}, 422, "no files"),
        ([("a.png", b"x")], {"lables": "a,b"}, 422, 'no field "lables"'),
        ([("a.png", b"x")], {"labels": "a"}, 422, "not enough"),
        ([("a.png", b"x")], {"task": "/etc/passwd"}, 422, "no such task"),
        ([("a.png", b"x")], {"pooling": "median"}, 422, "median"),
        ([("a.png", b"x")], {"pooling": ["mean", "top-k"]}, 422, "one value"),
        ([("a.png", b"x")], {"plane": "oblique"}, 422, "oblique"),
        ([("a.png", b"x")], {"window": "1,b"}, 422, "window"),
        ([("a.png", b"x")], {"trust_header": "perhaps"}, 422, "true or false"),
        ([("a.png", b"x")], {"text": "x" * 70_000}, 413, "64 kB"),
        ([("a.png", b"x")], {"text": [str(i) for i in range(257)]}, 413, "256"),
        ([("a.png", b"x")], {"labels": ",".join(map(str, range(257)))}, 413, "256"),
    ],
)
def test_what_cannot_be_answered_is_explained(client, uploads, files, data, status, told):
    # With an empty file the request is multipart in any case.
    listed = [("files", ("", b""))] if files is None else [("files", file) for file in files]
    answer = client.post("/predict", files=listed, data=data)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["detail"]
    assert str(uploads) not in answer.text
    assert "DOE" not in answer.text


def test_other_bodies_are_refused(client, pictures):
    assert client.post("/predict", json={}).status_code == 415
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\ncontent-disposition: form-data; name="%s"; filename="a"\r\n\r\nx\r\n'
    cut = client.post("/predict", content=part % b"files", headers=multipart)
    assert (cut.status_code, cut.json()["detail"]) == (400, "The body ends too early.")
    assert client.post("/predict", content=b"nonsense", headers=multipart).status_code == 400
    assert client.post("/predict", content=part % b"image" + b"--b--", headers=multipart).status_code == 422

    def chunks():
        yield part % b"files"
        yield b"--b--" + b" " * 1000
        yield from [b"x" * 500_000] * 3

    endless = client.post("/predict", content=chunks(), headers=multipart)  # states no length
    assert (endless.status_code, "1 MB" in endless.text) == (413, True)
    rebound = client.get("/health", headers={"host": "evil.example"})
    assert rebound.status_code == 400


def test_too_slow_and_too_many(predictor, pictures, uploads, monkeypatch):
    service = create_app(predictor, Limits(seconds=1, requests=1))
    started, go = threading.Event(), threading.Event()
    read = read_studies

    def slow(*args, **kwargs):
        started.set()
        assert go.wait(20)
        return read(*args, **kwargs)

    monkeypatch.setattr("medmoe_hf.inference.serving.app.read_studies", slow)
    with TestClient(service, base_url=HOST) as client, ThreadPoolExecutor(1) as thread:
        first = thread.submit(client.post, "/predict", files=uploaded(pictures))
        assert started.wait(20)
        busy = client.post("/predict", files=uploaded(pictures))
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "10")
        assert client.get("/health").json()["requests"] == 1
        time.sleep(1.1)
        go.set()
        assert (first.result().status_code, first.result().json()["detail"][:20]) == (413, "The prediction took ")


def test_a_failure_is_logged_without_what_it_says(predictor, pictures, uploads, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError(NAME)

    monkeypatch.setattr("medmoe_hf.inference.serving.app.read_studies", broken)
    with TestClient(create_app(predictor), base_url=HOST) as client:
        answer = client.post("/predict", files=uploaded(pictures))
    assert answer.status_code == 500
    assert "RuntimeError" in caplog.text
    assert "in _studies" in caplog.text
    assert NAME not in caplog.text + answer.text


def test_a_client_that_hangs_up_ends_its_prediction(predictor, pictures, uploads, monkeypatch):
    """Against the application itself: a test client does not hang up."""
    read, seen = read_studies, []

    def wait(*args, **kwargs):
        studies = read(*args, **kwargs)
        time.sleep(1.2)  # longer than two looks at the client
        seen.append(len(studies))
        return studies

    monkeypatch.setattr("medmoe_hf.inference.serving.app.read_studies", wait)
    monkeypatch.setattr(predictor, "_encode", lambda *args, **kwargs: pytest.fail("the prediction went on"))
    body = b"".join(
        b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n' % path.read_bytes()
        for path in pictures
    )

    def status(messages):
        """What is answered to a client that sends these messages and then hangs up."""

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        return answer_of(create_app(predictor), receive)

    whole = {"type": "http.request", "body": body + b"--b--\r\n", "more_body": False}
    assert status([whole]) == 499
    assert seen == [3]
    assert status([{"type": "http.request", "body": body[:-100], "more_body": True}]) == 499
    assert seen == [3]


def test_a_real_client_that_hangs_up_ends_its_prediction(predictor, pictures, uploads, monkeypatch, caplog):
    """A socket that is closed while its request is computed, as a server sees it."""
    caplog.set_level(logging.INFO)
    read, begun = read_studies, threading.Event()

    def wait(*args, **kwargs):
        studies = read(*args, **kwargs)
        begun.set()
        time.sleep(1.7)  # longer than two looks at the client
        return studies

    monkeypatch.setattr("medmoe_hf.inference.serving.app.read_studies", wait)
    monkeypatch.setattr(predictor, "_encode", lambda *args, **kwargs: pytest.fail("the prediction went on"))
    server = uvicorn.Server(uvicorn.Config(create_app(predictor), port=0, log_config=None))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(server.run)
        while not server.started:
            time.sleep(0.02)
        try:
            body = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n--b--\r\n'
            body %= pictures[0].read_bytes()
            head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
            head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
            with socket.create_connection(server.servers[0].sockets[0].getsockname()) as client:
                client.sendall(head.encode() + body)
                assert begun.wait(20)
            end = time.monotonic() + 20
            while "/predict: " not in caplog.text and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            server.should_exit = True
            running.result()
    assert "/predict: 499, 1 files" in caplog.text


def answer_of(app, receive, *headers):
    """The status that an application answers with to what `receive` sends."""
    sent = []

    async def send(message):
        sent.append(message.get("status"))

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=b"), *headers]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80), "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]


def test_a_slow_upload_ends(predictor, uploads):
    messages = iter(range(60))

    async def receive():
        await asyncio.sleep(0.1)
        more = next(messages, None)
        return {"type": "http.disconnect"} if more is None else {"type": "http.request", "more_body": True}

    assert answer_of(create_app(predictor, Limits(seconds=1)), receive) == 408


def test_a_body_that_states_too_large_a_size_is_not_read(predictor, uploads):
    async def receive():
        pytest.fail("the body was read")

    app = create_app(predictor, Limits(megabytes=1))
    assert answer_of(app, receive, (b"content-length", b"1000001")) == 413


def test_one_prediction_is_computed_at_a_time(client, pictures, monkeypatch):
    read, inside, most = read_studies, [], []

    def counted(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        studies = read(*args, **kwargs)
        inside.pop()
        return studies

    monkeypatch.setattr("medmoe_hf.inference.serving.app.read_studies", counted)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: client.post("/predict", files=uploaded(pictures[:1])), range(6)))
    assert most == [1] * 6


def test_the_list_of_a_zip_file_is_measured_before_it_is_read(tmp_path, monkeypatch):
    """`zipfile` holds the whole list in memory."""
    (tmp_path / "000000").write_bytes(zipped([(f"{index:030}" * 9, b"") for index in range(40)]))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("the list was read"))
    with pytest.raises(UploadError, match="more than 6 files"):
        unpack([tmp_path / "000000"], Limits(files=6), lambda: None)


def test_damaged_slices_take_time_too(predictor, tmp_path):
    """A prediction ends in time also where no slice of a series can be decoded."""
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).integers(0, 255, (40, 36, 5)).astype(np.int16)
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:-100])
    checks = []
    with pytest.raises(ArgumentError, match="no picture to predict"):
        predictor(read_studies(tmp_path), show_progress=False, check=lambda: checks.append(1))
    assert len(checks) == 5


def test_names_in_a_zip_lead_nowhere(tmp_path):
    names = ["../../escaped.dcm", "/absolute.nii.gz", "a/b/../../../c.png", "b\\..\\d", "plain.NII.GZ"]
    archive = tmp_path / "in" / "000000"
    archive.parent.mkdir()
    archive.write_bytes(zipped([(name, name.encode()) for name in names]))
    unpack([archive], Limits(), lambda: None)
    found = {path.read_bytes().decode(): path for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(found) == sorted(names)
    for name, path in found.items():
        assert path.resolve().is_relative_to(archive)
        assert path.name[6:] == {"../../escaped.dcm": ".dcm", "/absolute.nii.gz": ".nii.gz"}.get(
            name, ".nii.gz" if name == "plain.NII.GZ" else ""
        )


def test_a_zip_that_grows_beyond_its_ratio_is_refused_while_it_is_unpacked(tmp_path, monkeypatch):
    content = b"\0" * 3_000_000
    archive = tmp_path / "000000"
    archive.write_bytes(zipped([("zeros.dcm", content)]))
    assert archive.stat().st_size * 500 < len(content)
    unpack([archive], Limits(), lambda: None)  # small enough for any ratio
    assert [path.read_bytes() for path in archive.rglob("*.dcm")] == [content]
    monkeypatch.setattr("medmoe_hf.inference.serving.archives._ALWAYS", 1_000_000)
    again = tmp_path / "000001"
    again.write_bytes(zipped([("zeros.dcm", content)]))
    with pytest.raises(UploadError, match="more than 100 times its own size"):
        unpack([again], Limits(), lambda: None)
    assert sum(path.stat().st_size for path in again.rglob("*") if path.is_file()) <= 1_000_000
    plain = tmp_path / "000002"
    plain.write_bytes(zipped([("noise.dcm", bytes(range(256)) * 12_000)], zipfile.ZIP_STORED))
    unpack([plain], Limits(), lambda: None)


def test_a_check_ends_the_unpacking(tmp_path):
    (tmp_path / "000000").write_bytes(zipped([("a", b"x")]))

    def check():
        raise UploadError(413, "late")

    with pytest.raises(UploadError, match="late"):
        unpack([tmp_path / "000000"], Limits(), check)


def test_limits_are_positive():
    with pytest.raises(ArgumentError, match="seconds"):
        Limits(seconds=0)


def test_frames_count_as_files(client, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for count, status in ((6, 200), (7, 413)):
        volume = np.random.default_rng(0).integers(0, 255, (24, 24, count)).astype(np.int16)
        nibabel.Nifti1Image(volume, np.diag([-1, -1, 1, 1])).to_filename(tmp_path / "a.nii")
        for path in ("/predict", "/embed"):
            answer = client.post(path, files=uploaded([tmp_path / "a.nii"]))
            assert answer.status_code == status, answer.text
    assert "more than 6 slices" in answer.json()["detail"]


def test_the_description_names_fields_and_errors(client):
    described = client.get("/openapi.json").json()
    body = described["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"files", "labels", "text", "task", "pooling", "plane", "window", "trust_header"} == set(body["properties"])
    assert {"413", "422", "503"} <= set(described["paths"]["/embed"]["post"]["responses"])
    assert client.get("/docs").status_code == 200


def test_the_command_listens_on_this_machine_only(predictor, monkeypatch, caplog):
    started = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: started.update(options))
    monkeypatch.setattr("warnings.simplefilter", lambda *args, **options: None)
    monkeypatch.setattr("medmoe_hf.inference.studies.StudyPredictor", lambda *args, **options: predictor)

    def made(predictor, limits, hosts, reader):
        started.update(limits=limits, hosts=hosts, reader=reader)

    monkeypatch.setattr("medmoe_hf.inference.serving.app.create_app", made)
    limits = ["--max-megabytes", "2", "--max-files", "3", "--max-seconds", "4", "--max-requests", "5"]
    result = CliRunner().invoke(app, ["serve", "--port", "8123", *limits])
    assert result.exit_code == 0, result.output
    assert (started["host"], started["port"], started["access_log"]) == ("127.0.0.1", 8123, False)
    assert started["limits"] == Limits(megabytes=2, files=3, seconds=4, requests=5)
    assert "*" not in started["hosts"]
    assert started["reader"].limits.seconds == 4  # not longer than a prediction
    result = CliRunner().invoke(app, ["serve", "--no-isolate"])
    assert (result.exit_code, started["reader"]) == (0, None)
    serve(predictor)
    assert (started["host"], started["limits"]) == ("127.0.0.1", None)
    assert "password" not in caplog.text
    serve(predictor, "0.0.0.0")
    assert (started["host"], started["hosts"]) == ("0.0.0.0", ["*"])
    assert "neither a password nor encryption" in caplog.text
