"""Studies of a DICOMweb server: the answers of the folder they came from, and what servers do wrong."""

import gc
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_encoders import medmoe_folder
from typer.testing import CliRunner

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("dicomweb_client", reason='pip install "medmoe_hf[dicomweb]"')

from ct_series import COUNT, NAME, ct_series  # noqa: E402
from loopback_dicomweb import LoopbackDicomWeb, listing, multipart  # noqa: E402

from medmoe_hf.cli import app  # noqa: E402
from medmoe_hf.cli.predict import _ended_cleanly  # noqa: E402
from medmoe_hf.errors import ArgumentError, DicomWebError, MissingPackageError  # noqa: E402
from medmoe_hf.inference.dicomweb import DownloadLimits, service  # noqa: E402
from medmoe_hf.inference.dicomweb.addresses import TOKEN, Address, credentials, parse_address  # noqa: E402
from medmoe_hf.inference.dicomweb.downloads import Downloads  # noqa: E402
from medmoe_hf.inference.studies import Question, StudyPredictor, predict, write_predictions  # noqa: E402
from medmoe_hf.inference.studies.predictions import predictions_dict  # noqa: E402

STUDY, SERIES = "1.2.3", ["1.2.3.1", "1.2.3.2"]
SECRET = "tok3n-Zyxwell.41"
LABELS = ["no finding", "pneumonia"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No proxies, no credentials of whoever runs the tests, no waiting, and a place for temporary folders."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in (TOKEN, "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(service._TRIES, "backoff_factor", 0)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    ct_series(folder / "a", series=SERIES[0])
    ct_series(folder / "b", series=SERIES[1], count=4)
    return folder


@pytest.fixture
def server(folder):
    with LoopbackDicomWeb(sorted(folder.rglob("*.dcm"))) as server:
        yield server


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return StudyPredictor(medmoe_folder(tmp_path_factory.mktemp("model") / "tiny"), batch_size=4)


def left(tmp_path):
    return list((tmp_path / "temporary").iterdir())


def download(server, limits=None, series=None):
    return Downloads([server.address(STUDY, series)], limits or DownloadLimits(), progress=False)


def files_of(downloads):
    return sorted(path.read_bytes() for path in Path(downloads.paths[0]).iterdir())


def failing(*uids, answer):
    """Gives an answer of its own for these instances."""
    return lambda path, headers: answer if path.rpartition("/")[2] in uids and "/instances/" in path else None


def test_a_study_has_the_answer_of_its_folder(server, folder, predictor, tmp_path):
    asked = {"model": predictor, "labels": LABELS, "text": "mass", "progress": False}
    server.page = 3
    expected = predictions_dict(predict(folder, **asked))
    found = predict(server.address(STUDY), **asked)
    assert len(found[0].series) == 2
    assert predictions_dict(found) == expected
    one = predict([server.address(STUDY, SERIES[1])], **asked)
    assert predictions_dict(one) == predictions_dict(predict(folder / "b", **asked))
    assert predictions_dict(one, True)["studies"][0]["series"][0]["uid"] == SERIES[1]
    first, second = left(tmp_path)
    assert {first.stat().st_mode & 0o777, second.stat().st_mode & 0o777} == {0o700}

    # Pictures are read again, from the folder.
    write_predictions(found, tmp_path / "out")
    assert (tmp_path / "out" / "study-1-series-1-text-1.nii.gz").stat().st_size > 1000
    found.close()
    one.close()
    assert left(tmp_path) == []


def test_files_live_as_long_as_what_may_read_them(server, predictor, tmp_path):
    found = predict(server.address(STUDY, SERIES[1]), model=predictor, labels=LABELS, progress=False)
    other = found[0].series[0].ask(Question(labels=["head", "chest"]))
    del found
    gc.collect()
    assert other.picture(2).shape[2] == 3
    assert len(left(tmp_path)) == 1
    del other
    gc.collect()
    assert left(tmp_path) == []


def test_files_are_those_of_the_server_page_by_page(server):
    for page in (None, 4):
        server.page = page
        assert files_of(download(server)) == sorted(server.files.values())


def test_a_server_that_ignores_the_offset_is_asked_twice(server):
    uids = [uid for _, series, uid in server.files if series == SERIES[1]]
    same = listing("00080018", uids)
    server.answers = lambda path, headers: same if path.endswith("/instances") else None
    assert len(files_of(download(server, series=SERIES[1]))) == 4
    assert sum("/instances?" in path or path.endswith("/instances") for path, _ in server.asked) == 2


def test_files_are_asked_for_as_they_are_stored(server):
    download(server, series=SERIES[1])
    accepted = {headers["Accept"] for path, headers in server.asked if "/instances/" in path}
    assert accepted == {'multipart/related; type="application/dicom"; transfer-syntax=*'}

    def old(path, headers):
        return (406, {}, b"") if "transfer-syntax" in headers["Accept"] else None

    server.answers = old
    assert len(files_of(download(server, series=SERIES[1]))) == 4


def test_a_busy_server_is_asked_again(server):
    waits = iter([503, 429, None] * 100)

    def busy(path, headers):
        status = next(waits)
        return status and (status, {"Retry-After": "3600"}, b"")

    server.answers = busy
    assert len(files_of(download(server))) == COUNT + 4
    server.answers = lambda path, headers: (503, {}, b"")
    with pytest.raises(DicomWebError, match=r"127.0.0.1: it is busy \(503\)"):
        download(server)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, b""), rf"it asks for credentials: a token in the variable {TOKEN}, or .* in ~/.netrc \(401\)"),
        ((403, {}, b""), r"it forbids this \(403\)"),
        ((404, {}, b""), r"it does not have this \(404\)\. What stands before /studies in the address must be"),
        ((500, {}, b"1.2.3"), "it answers with the status 500"),
        ((302, {"Location": "https://login.example/?study=1.2.3"}, b""), "it leads to another address"),
        ((200, {}, b"<html>1.2.3</html>"), "it sends no list of DICOM JSON"),
        ((200, {}, b"[" * 100_000), "it sends no list of DICOM JSON"),
        ((200, {}, b'"text"'), "it sends no list of DICOM JSON"),
        ((200, {}, b"[]"), "it has no such study or series, or nothing in it"),
        ((204, {}, b""), "it has no such study or series, or nothing in it"),
        ((200, {}, b'[1, {}, {"0020000E": {"Value": ["../../etc"]}}]'), "it has no such study or series"),
        ((200, {"Content-Length": "100"}, b"[{"), "the connection broke off"),
    ],
)
def test_what_servers_answer_instead_of_a_list(server, tmp_path, answer, message):
    server.answers = lambda path, headers: answer
    with pytest.raises(DicomWebError, match=message) as raised:
        download(server)
    assert STUDY not in str(raised.value)
    assert (
        raised.value.__suppress_context__ or raised.value.__context__ is None
    )  # the error of requests contains the address
    assert left(tmp_path) == []


def test_servers_that_are_gone_or_slow(server, monkeypatch):
    monkeypatch.setattr(service, "TIMEOUT", (0.5, 0.2))
    server.answers = lambda path, headers: time.sleep(0.6)
    with pytest.raises(DicomWebError, match=r"127.0.0.1: it does not answer in time\."):
        download(server)
    with LoopbackDicomWeb() as other:
        gone = other.address(STUDY)
    with pytest.raises(DicomWebError, match="cannot be reached, or the connection broke off"):
        Downloads([gone], DownloadLimits(), progress=False)
    with pytest.raises(DicomWebError, match="cannot be reached, or the connection broke off"):
        Downloads([server.address(STUDY).replace("http:", "https:")], DownloadLimits(), progress=False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates_are_verified(server, tmp_path, monkeypatch):
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=here -keyout {key} -out {certificate}".split()
    subprocess.run(["openssl", *made, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with LoopbackDicomWeb(tls=tls) as encrypted:
        encrypted.files = server.files
        with pytest.raises(DicomWebError, match=r"its certificate cannot be verified; .* REQUESTS_CA_BUNDLE\."):
            download(encrypted)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate)
        assert len(files_of(download(encrypted, series=SERIES[1]))) == 4


def deflated(content):
    return content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1)


def test_instances_that_fail_are_left_out_and_listed(server, folder, predictor, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    uids = [f"{SERIES[0]}.{number}" for number in range(1, COUNT + 1)]
    whole = server.files[STUDY, SERIES[0], uids[5]]
    faults = {
        uids[0]: ((404, {}, b""), "it does not have this (404)"),
        uids[1]: (multipart(b"nothing of the kind"), "it sends no DICOM file"),
        uids[2]: ((200, {"Content-Type": "text/html"}, b"<html>"), "it sends no DICOM file"),
        uids[3]: ((200, {"Content-Type": "multipart/related; boundary=x"}, b"\0\1\2"), "it sends no DICOM file"),
        uids[4]: ((406, {}, b""), "it sends it neither as it is stored nor uncompressed (406)"),
        uids[5]: (multipart(deflated(whole)), "it is deflated, which is read from files only"),
        uids[6]: ((200, {}, b"no content type"), "it sends no DICOM file"),
        uids[7]: (multipart(), "it sends no DICOM file"),
    }
    server.answers = lambda path, headers: faults.get(path.rpartition("/")[2], (None,))[0]
    cut = server.files[STUDY, SERIES[0], uids[8]][:-500]
    server.files[STUDY, SERIES[0], uids[8]] = cut
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "cut.dcm").write_bytes(cut)
    for name in ("9.dcm", "10.dcm"):
        (kept / name).write_bytes((folder / "a" / name).read_bytes())
    asked = {"model": predictor, "labels": LABELS, "progress": False}
    (study,) = predict(server.address(STUDY, SERIES[0]), **asked)
    assert [label.to_dict() for label in study.series[0].labels] == [
        label.to_dict() for label in predict(kept, **asked)[0].series[0].labels
    ]
    told = {one.path.rpartition("/")[2]: one.reason for one in study.skipped}
    for uid, (_, reason) in faults.items():
        assert told[uid].startswith(f"it was not downloaded: {reason}")
    assert re.match("slice 1 cannot be read", told[uids[8]])  # by the address, not by the temporary file
    listed = [one.to_dict(keep_identifiers=True) for one in study.skipped]
    assert {one["file"] for one in listed} == {*uids[:9]}
    assert "Downloaded 3 files" in caplog.text
    assert "5 x it sends no DICOM file" in caplog.text
    assert STUDY not in caplog.text


def test_a_server_that_goes_away_ends_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "TIMEOUT", (0.5, 0.2))
    server.answers = lambda path, headers: (
        time.sleep(0.6) if path.endswith(tuple(f".1.{n}" for n in (3, 4, 5))) else None
    )
    message = rf"it does not answer in time, for 3 files in a row; 3 of {COUNT} were downloaded before"
    with pytest.raises(DicomWebError, match=message):
        download(server, series=SERIES[0])
    server.answers = failing(f"{SERIES[0]}.5", answer=(401, {}, b""))
    with pytest.raises(DicomWebError, match=r"asks for credentials.*\(401\)"):
        download(server, series=SERIES[0])
    server.answers = lambda path, headers: (500, {}, b"") if "/instances/" in path else None
    with pytest.raises(
        DicomWebError, match="no file of the study could be downloaded: 4 x it answers with the status"
    ):
        download(server, series=SERIES[1])
    assert left(tmp_path) == []


def test_limits_hold_for_all_addresses_together(server, tmp_path, monkeypatch):
    def both(**limits):
        return Downloads([server.address(STUDY, one) for one in SERIES], DownloadLimits(**limits), progress=False)

    assert len(both(files=COUNT + 4).paths) == 2
    with pytest.raises(DicomWebError, match=r"more than 14 files \(`--max-files`\)"):
        both(files=COUNT + 3)
    endless = iter(range(10**9))
    server.answers = lambda path, headers: (
        listing("00080018", [f"1.{next(endless)}"]) if path.endswith("/instances") else None
    )
    with pytest.raises(DicomWebError, match=r"more than 14 files"):
        both(files=14)
    server.answers = lambda path, headers: multipart(bytes(10**6)) if "/instances/" in path else None
    with pytest.raises(DicomWebError, match=r"more than 1 MB \(`--max-megabytes`\)"):
        both(megabytes=1)
    monkeypatch.setattr(service, "_FILE_BYTES", 10**5)
    with pytest.raises(DicomWebError, match="11 x it has more than 0 MB, which is read from files only"):
        both()
    monkeypatch.setattr(service, "_LIST_BYTES", 100)
    with pytest.raises(DicomWebError, match="it sends a list of more than 0 MB"):
        both()
    monkeypatch.setattr(service, "_LIST_BYTES", 10**6)
    passed = iter(range(0, 10**9, 7))
    monkeypatch.setattr(service.time, "monotonic", lambda: next(passed))
    with pytest.raises(DicomWebError, match=r"takes more than 60 seconds \(`--max-seconds`\)"):
        both(seconds=60)
    with pytest.raises(ArgumentError, match="`files` must be at least 1, got 0"):
        DownloadLimits(files=0)
    gc.collect()
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"https://jane:{SECRET}@pacs.example/studies/{STUDY}", "a user name or a password"),
        (f"https://{SECRET}@pacs.example/studies/{STUDY}", "a user name or a password"),
        (f"https://pacs.example/studies/{STUDY}?token={SECRET}", r"pacs.example contains a \? or #"),
        ("https://pacs.example/dicom-web", "pacs.example names no study or series by UID"),
        (f"https://pacs.example/studies/{STUDY}/series/{NAME}", "pacs.example names no study or series by UID"),
        (f"https://pacs.example/studies/{STUDY}/series/1/instances/2", "pacs.example names no study or series by UID"),
        (f"https://[::1]/studies/{STUDY}", "names no server, or one by IPv6"),
        (f"https:///studies/{STUDY}", "names no server"),
        (f"https://pacs.example:port/studies/{STUDY}", "names no server"),
    ],
)
def test_addresses_that_are_refused_are_not_repeated(text, message):
    with pytest.raises(ArgumentError, match=message) as raised:
        predict(text, progress=False)
    for secret in (SECRET, STUDY, NAME):
        assert secret not in str(raised.value)


def test_addresses():
    long = "HTTPS://pacs.example:8042/a/studies/dicom-web/studies/1.02.3/series/4.5/"
    assert parse_address(long) == Address("https://pacs.example:8042/a/studies/dicom-web", "1.02.3", "4.5")
    assert parse_address("http://pacs/studies/1") == Address("http://pacs", "1", None)
    assert "1.02.3" not in repr(parse_address(long))
    private = {"https://pacs": True, "http://localhost:1": True, "http://127.0.0.1": True, "http://127.example": False}
    assert {base: Address(base, "1").is_private for base in private} == private


def test_credentials_are_sent_where_nobody_can_read_them(server, monkeypatch, tmp_path):
    def sent():
        server.asked.clear()
        download(server, series=SERIES[1])
        return {headers.get("Authorization") for _, headers in server.asked}

    assert sent() == {None}
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login jane password secret\n")
    assert sent() == {"Basic amFuZTpzZWNyZXQ="}
    server.answers = lambda path, headers: (401, {}, b"")
    with pytest.raises(DicomWebError, match=r"it refuses the user name and password of ~/.netrc \(401\)"):
        sent()
    monkeypatch.setenv(TOKEN, SECRET)
    with pytest.raises(DicomWebError, match=rf"it refuses the token of {TOKEN}, which may have expired \(401\)"):
        sent()
    server.answers = lambda path, headers: None
    assert sent() == {f"Bearer {SECRET}"}

    with pytest.raises(ArgumentError, match=f"on the way to pacs.example could read the token of {TOKEN}: use https"):
        credentials(Address("http://pacs.example", STUDY))
    assert credentials(Address("https://pacs.example", STUDY)) is not None
    with pytest.raises(ArgumentError, match="would be sent to several servers"):
        predict([server.address(STUDY), f"https://pacs.example/studies/{STUDY}"])
    monkeypatch.setenv(TOKEN, f"{SECRET}\nX-Other: 1")
    with pytest.raises(ArgumentError, match=rf"{TOKEN} holds characters that no token has") as raised:
        download(server)
    assert SECRET not in str(raised.value)
    monkeypatch.delenv(TOKEN)
    (tmp_path / "netrc").write_text("machine pacs.example login jane password secret\n")
    with pytest.raises(ArgumentError, match=r"could read the password of ~/.netrc: use https"):
        credentials(Address("http://pacs.example", STUDY))


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("level", ["--verbose", "--quiet"])
def test_the_command_tells_neither_credentials_nor_uids(server, predictor, tmp_path, monkeypatch, level):
    monkeypatch.setenv(TOKEN, SECRET)
    out, kept = tmp_path / "out", tmp_path / "kept"
    missing = f"{SERIES[1]}.2"
    server.answers = failing(missing, answer=(503, {"Warning": f"299 - {STUDY}"}, b""))
    base = ["predict", server.address(STUDY, SERIES[1]), "--model", predictor.encoder.model.name_or_path]
    base += ["--labels", "normal,lesion"]
    said = ""
    keep = ["--keep-identifiers", "--dicom"] if importlib.util.find_spec("highdicom") else ["--keep-identifiers"]
    for options in (["--out", str(out)], ["--out", str(kept), *keep], ["--max-files", "1"]):
        result = CliRunner().invoke(app, [level, *base, *options])
        assert (result.exit_code != 0) == ("--max-files" in options), result.output
        said += f"{result.output}{result.stderr}{result.exception}"
    for secret in (SECRET, STUDY, NAME):
        assert secret not in said
        assert all(secret not in path.read_bytes().decode("latin-1") for path in out.iterdir())
    assert all(SECRET not in path.read_bytes().decode("latin-1") for path in kept.iterdir())
    content = json.loads((kept / "prediction.json").read_text())["studies"][0]
    assert content["uid"] == STUDY
    assert {"reason": "it was not downloaded: it is busy (503)", "file": missing} in content["skipped"]
    (series,) = content["series"]
    base = server.address(STUDY, SERIES[1])
    assert {one["file"] for one in series["sources"].values()} <= {
        f"{base}/instances/{SERIES[1]}.{n}" for n in (1, 3, 4)
    }
    assert (kept / "study-1-series-1-capture.dcm").is_file() == ("--dicom" in keep)
    assert left(tmp_path) == []


@pytest.mark.usefixtures("logging_as_before")
def test_without_the_package_its_extra_is_named(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "dicomweb_client.api", None)
    with pytest.raises(MissingPackageError, match=r'dicomweb-client: pip install "medmoe_hf\[dicomweb\]"'):
        download(server)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_a_termination_ends_the_command_as_an_exit_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, _ended_cleanly():
        terminate()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
