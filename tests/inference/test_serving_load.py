"""`medmoe serve` as a process, under eight clients at a time of which half misbehave, round after round.

`pytest -m slow -s tests/inference/test_serving_load.py` prints the figures of docs/pages/studies.md.
"""

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from answers import assert_same, with_files
from processes import free_port
from small_encoders import medmoe_folder

from medmoe_hf.data import phantom_sample
from medmoe_hf.inference.studies import Question, StudyPredictor
from medmoe_hf.inference.studies.predictions import predictions_dict
from medmoe_hf.model.studies_medmoe import read_studies

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")
nibabel = pytest.importorskip("nibabel")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="processes can be looked at on Linux"),
]

NAME = "DOE^JANE"
LABELS = ["no finding", "pneumonia", "effusion"]
WARM_UP, ROUNDS = 3, 12
MEMORY = 0.05  # greatest growth, as a share
SPARE = 2  # descriptors and threads that may be on their way out: one a round would be six times as many
SECONDS = 600  # for a server that has to load a model, on a machine that has more to do


class Server:
    """The running process."""

    def __init__(self, folder, here):
        self.port, self.log, self.uploads = free_port(), here / "log", here / "uploads"
        self.uploads.mkdir()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "medmoe_hf.cli", "serve", "--model", str(folder), "--port", str(self.port)]
        command += ["--max-megabytes", "1", "--max-files", "20"]
        environment = os.environ | {"TMPDIR": str(self.uploads), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait(self):
        """Waits until the server listens, and no request is left."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=60).json()["requests"] == 0:
                    return
            time.sleep(0.1)
        raise AssertionError(f"no answer after {SECONDS} s: {self.log.read_text()}")

    def figures(self):
        """Resident memory in bytes, open files and sockets, and threads."""
        of = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) * 1024, len(list((of / "fd").iterdir())), int(status["Threads"])

    def listens_on(self):
        """Addresses, in hexadecimal, at which the process accepts connections to its port."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.process.pid}/net/{table}").read_text().splitlines()[1:]:
                address, port = line.split()[1].split(":")
                if int(port, 16) == self.port and line.split()[3] == "0A":
                    found.add(address)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    running = Server(folder, tmp_path_factory.mktemp("server"))
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> bytes of a file that can be answered: a picture, a zip file, a compressed volume."""
    here = tmp_path_factory.mktemp("files")
    for index in range(3):
        phantom_sample(5, index, image_size=64)["image"].save(here / f"{NAME}-{index}.png")
    pictures = [path.read_bytes() for path in sorted(here.iterdir())]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, content in enumerate(pictures):
            archive.writestr(f"{NAME}/{number}.png", content)
    volume = np.random.default_rng(0).integers(0, 255, (40, 36, 5)).astype(np.int16)
    nibabel.Nifti1Image(volume, np.diag([0.8, 0.7, 2.0, 1.0])).to_filename(here / "a.nii.gz")
    return {
        f"{NAME}.png": pictures[0],
        f"{NAME}.zip": packed.getvalue(),
        f"{NAME}.nii.gz": (here / "a.nii.gz").read_bytes(),
    }


@pytest.fixture(scope="module")
def expected(folder, files, tmp_path_factory):
    """Name -> what `predict` says."""
    predictor = StudyPredictor(folder)
    found = {}
    for name, content in files.items():
        here = tmp_path_factory.mktemp("expected")
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(here)
        else:
            (here / name).write_bytes(content)
        question = Question(labels=LABELS, text="effusion")
        answer = predictions_dict(predictor(read_studies(here), question, show_progress=False))
        found[name] = with_files(answer, *([0] for _ in answer["studies"]))
    return found


def post(server, path, content, name, **options):
    fields = {"text": "effusion"} | ({"labels": ",".join(LABELS)} if path == "/predict" else {})
    return httpx.post(f"{server.url}{path}", files={"files": (name, content)}, data=fields, timeout=300, **options)


def right(server, name, files, expected):
    answer = post(server, "/predict", files[name], name)
    assert answer.status_code == 200, answer.text
    assert_same(answer.json(), expected[name])


def embedded(server, files):
    answer = post(server, "/embed", files[f"{NAME}.zip"], "a.zip")
    assert answer.status_code == 200, answer.text
    vectors = [one["embedding"] for one in [*answer.json()["series"], *answer.json()["texts"]]]
    assert len(vectors) == 4
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def too_large(server):
    answer = post(server, "/predict", b"\1" * 1_500_000, "a.png")
    assert (answer.status_code, "1 MB" in answer.json()["detail"]) == (413, True)


def wrong(server):
    answer = post(server, "/predict", b"no image", f"{NAME}.txt")
    assert answer.status_code == 422
    assert "neither DICOM nor NIfTI nor a picture" in answer.json()["detail"]
    assert NAME not in answer.text


def hangs_up(server, content, share):
    """Sends a share of a request, and then closes the connection at once, without a farewell."""
    body = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a.zip"\r\n\r\n%s\r\n--b--\r\n' % content
    head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(head.encode() + body[: round(share * len(body))])
        time.sleep(0.2)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def one_round(server, files, expected):
    """Eight clients at a time."""
    packed = files[f"{NAME}.zip"]
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(right, server, name, files, expected) for name in files]
        asked += [threads.submit(embedded, server, files), threads.submit(too_large, server)]
        asked += [threads.submit(wrong, server)]
        asked += [threads.submit(hangs_up, server, packed, share) for share in (0.5, 1)]
        for one in asked:
            one.result()
    server.wait()


def test_it_listens_on_this_machine_only(server):
    assert server.listens_on() == {"0100007F"}  # 127.0.0.1


def test_answers_stay_right_and_nothing_grows(server, files, expected):
    figures = []
    for number in range(WARM_UP + ROUNDS):
        one_round(server, files, expected)
        figures.append(server.figures())
        memory, opened, threads = figures[-1]
        print(f"round {number + 1}: {memory / 2**20:.1f} MiB, {opened} descriptors, {threads} threads")
    warm, last = figures[:WARM_UP], figures[-1]
    assert last[0] <= (1 + MEMORY) * max(one[0] for one in warm)
    assert last[1] <= SPARE + max(one[1] for one in warm)
    assert last[2] <= SPARE + max(one[2] for one in warm)
    # Libraries that the server imports may leave hidden files of their own.
    assert [path.name for path in server.uploads.iterdir() if not path.name.startswith(".")] == []
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "DOE" not in log
    # Who hangs up after the whole request may do so too late to be noticed; who does so before, never.
    answered, gone = log.count("/predict: 200, "), log.count("/predict: 499, ")
    assert answered + gone == 5 * (WARM_UP + ROUNDS)
    assert gone >= WARM_UP + ROUNDS


def test_it_ends_when_it_is_told_to(server):
    assert server.process.poll() is None
    server.process.terminate()
    assert server.process.wait(timeout=60) in (0, -15)
