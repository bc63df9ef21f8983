"""Does anything pile up? Long runs with faults mixed in: what they hold at the end, and after their first hundredth.

    python examples/experiments/soak.py serve --count 10000     requests to `medmoe serve`
    python examples/experiments/soak.py serve-here              likewise, with `--no-isolate`
    python examples/experiments/soak.py stream --count 50000    samples of a stream, 5 % of its rows faulty
    python examples/experiments/soak.py resume --count 200      resumes of a training run
    python examples/experiments/soak.py push --count 1000       pushes of models and data to a Hub on this machine

Each prints resident memory, descriptors, threads, child processes and temporary files as a row of Markdown, and fails
if more is left than the tolerance: 5 % of memory and 16 MiB, two descriptors and threads, no process and no file.

Linux only, offline, with models of random weights; run it in a copy of the repository, whose tests have the Hub.
"""

import argparse
import contextlib
import csv
import gc
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "hub")]

SHARE = 100  # the first hundredth is the start
MEMORY, SPARE_MEMORY = 0.05, 16.0  # share, and MiB
SPARE = 2  # descriptors and threads that may be on their way out
FAULTY = 20  # one of so many rows is faulty
LABELS = "no finding,pneumonia"


@dataclass
class Held:
    """What a process holds: MiB of memory, and numbers of the others."""

    memory: float
    descriptors: int
    threads: int
    processes: int
    files: int

    @classmethod
    def by(cls, pid: int, folder: Path) -> "Held":
        of = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines())
        below = [int(child) for child in (of / f"task/{pid}/children").read_text().split()]
        below += [
            int(one) for child in below for one in Path(f"/proc/{child}/task/{child}/children").read_text().split()
        ]
        files = sum(1 for path in folder.rglob("*") if path.is_file())
        memory = int(status["VmRSS"].split()[0]) / 1024
        return cls(memory, len(list((of / "fd").iterdir())), int(status["Threads"]), len(below), files)

    def excess(self, first: "Held") -> list[str]:
        """What exceeds the tolerance."""
        allowed = Held(
            first.memory * (1 + MEMORY) + SPARE_MEMORY, first.descriptors + SPARE, first.threads + SPARE,
            first.processes, first.files,
        )  # fmt: skip
        return [name for name, value in vars(self).items() if value > getattr(allowed, name)]


def reported(name: str, count: int, first: Held, last: Held, told: Counter[str], seconds: float) -> bool:
    """Prints the row; returns whether nothing has piled up."""
    cells = [
        f"{a:.1f} → {b:.1f}" if isinstance(a, float) else f"{a} → {b}"
        for a, b in zip(astuple(first), astuple(last), strict=True)
    ]
    print(f"| {name} | {count} | {' | '.join(cells)} |")
    print(f"{seconds:.0f} s: {', '.join(f'{number} {what}' for what, number in sorted(told.items()))}")
    excess = last.excess(first)
    if excess:
        print(f"More than the tolerance is left: {', '.join(excess)}.", file=sys.stderr)
    return not excess


def picture(number: int, format: str = "PNG", side: int = 32) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, format)
    return content.getvalue()


# --- requests


def served(count: int, folder: Path, here: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """Sends requests to a server process, one after another; yields what it holds, and what was sent."""
    import httpx
    from processes import free_port
    from small_encoders import medmoe_folder

    model, port = medmoe_folder(here / "model"), free_port()
    command = [
        sys.executable,
        "-m",
        "medmoe_hf.cli",
        "--quiet",
        "serve",
        "--model",
        str(model),
        "--port",
        str(port),
        *options,
    ]
    environment = os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with (here / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    good = picture(0)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/b.png", good)
    # what is sent: its files, fields and status
    kinds: dict[str, tuple[list[Any], dict[str, str], int]] = {
        "pictures": ([("files", ("a.png", good))], {"labels": LABELS}, 200),
        "zip files": ([("files", ("a.zip", packed.getvalue()))], {"labels": LABELS}, 200),
        "no images": ([("files", ("a.txt", b"no image"))], {"labels": LABELS}, 422),
        "cut-off pictures": ([("files", ("a.png", good[:300]))], {"labels": LABELS}, 422),
        "cut-off zip files": ([("files", ("a.zip", packed.getvalue()[:300]))], {"labels": LABELS}, 422),
        "unknown fields": ([("files", ("a.png", good))], {"label": LABELS}, 422),
        "hang-ups": ([], {}, 0),
    }
    weights = [80, 5, 3, 3, 3, 3, 3]
    draw, answers = random.Random(0), {}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            while True:
                assert server.poll() is None, (here / "log").read_text()
                with contextlib.suppress(httpx.TransportError):
                    client.get("/health")
                    break
                time.sleep(1)
            for _ in range(count):
                kind = draw.choices(list(kinds), weights)[0]
                files, fields, status = kinds[kind]
                if kind == "hang-ups":
                    hang_up(port, good)
                else:
                    answer = client.post("/predict", files=files, data=fields)
                    assert answer.status_code == status, (kind, answer.text)
                    assert answers.setdefault(kind, answer.json()) == answer.json(), kind
                yield (lambda: settled(client, server.pid, folder)), kind
    finally:
        server.terminate()
        server.wait()


def served_here(count: int, folder: Path, here: Path) -> Iterator[tuple[Any, str]]:
    """`served` by a process that decodes itself."""
    return served(count, folder, here, "--no-isolate")


def hang_up(port: int, content: bytes) -> None:
    import socket

    body = b'--b\r\ncontent-disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n--b--\r\n' % content
    head = f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body[: len(body) // 2])


def settled(client: Any, pid: int, folder: Path) -> Held:
    """What the server holds once it has answered everything."""
    while client.get("/health").json()["requests"]:
        time.sleep(0.1)
    time.sleep(1)
    return Held.by(pid, folder)


# --- samples


def streamed(count: int, folder: Path, here: Path) -> Iterator[tuple[Any, str]]:
    """Reads samples from tars and a table, whose rows are faulty in every way that rows are."""
    from pydantic import TypeAdapter

    from medmoe_hf.data.sources import Source
    from medmoe_hf.data.stream import SampleStream

    faults = [
        lambda row: row | {"jpg": row["jpg"][:200]},
        lambda row: row | {"jpg": b""},
        lambda row: row | {"jpg": b"no image"},
        lambda row: {"jpg": row["jpg"]},
        lambda row: {"txt": row["txt"]},
        lambda row: row | {"txt": b"\xff\xfe\xfa"},
        lambda row: row | {"txt": b" "},
        lambda row: {"dcm": b"\0" * 128 + b"DICM" + bytes(300), "txt": row["txt"]},
    ]
    rows = []
    for number in range(2000):
        row = {"jpg": picture(number, "JPEG"), "txt": f"caption {number}".encode()}
        rows.append(faults[number // FAULTY % len(faults)](row) if number % FAULTY == 0 else row)
    for shard in range(10):
        with tarfile.open(here / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(100 * shard, 100 * shard + 100):
                for extension, content in rows[number].items():
                    member = tarfile.TarInfo(f"{number:06}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    damaged = (here / "9.tar").read_bytes()
    (here / "9.tar").write_bytes(damaged[: len(damaged) - 5000])
    with (here / "t.csv").open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(1000, 2000):
            if "jpg" in rows[number]:
                (here / f"{number}.jpg").write_bytes(rows[number]["jpg"])
            table.writerow([f"{number}.jpg", rows[number].get("txt", b"").decode("utf-8", "replace")])
    sources = [
        {"kind": "webdataset", "files": [str(here / "*.tar")], "name": "tars"},
        {"kind": "csv", "files": [str(here / "t.csv")], "image": "image", "caption": "caption", "name": "table"},
    ]
    known = [TypeAdapter(Source).validate_python(one) for one in sources]
    stream = SampleStream(known, once=False, buffer=200, max_bad_fraction=0.2)
    for sample in islice(stream, count):
        yield (
            (lambda: Held.by(os.getpid(), folder)),
            f"samples of {'tars' if 'tar' in str(sample['key']) else 'the table'}",
        )


# --- resumes


def resumed(count: int, folder: Path, here: Path) -> Iterator[tuple[Any, str]]:
    """Stops a run after each step, and resumes it."""
    from medmoe_hf.errors import Interrupted
    from medmoe_hf.training import TrainConfig, train
    from medmoe_hf.training.loop import TrainingRun

    config = TrainConfig.model_validate(
        {
            "output_dir": str(here / "out"),
            "model": {"preset": "tiny"},
            "data": {"train": {"kind": "phantom", "image_size": 64}, "num_workers": 0},
            **{"max_steps": count + 2, "batch_size": 2, "warmup_steps": 0, "evaluate_every": count + 2},
            "checkpoints": {"every_steps": count + 2, "keep_last": 1},
        }
    )
    step = TrainingRun.step

    def and_stop(run: TrainingRun, batches: Any) -> None:
        step(run, batches)
        os.kill(os.getpid(), signal.SIGTERM)

    TrainingRun.step = and_stop  # type: ignore[method-assign]
    try:
        for number in range(count + 1):
            with contextlib.suppress(Interrupted):
                train(config, "auto" if number else None)
            if number:
                yield (lambda: Held.by(os.getpid(), folder)), "resumes"
    finally:
        TrainingRun.step = step  # type: ignore[method-assign]
    assert [path.name for path in (here / "out-run" / "checkpoints").iterdir()] == [f"step-{count + 1:08}"]


# --- pushes


def pushed(count: int, folder: Path, here: Path) -> Iterator[tuple[Any, str]]:
    """Pushes to a Hub in this process, which breaks connections, loses answers and refuses tokens."""
    import pytest
    from loopback_hub import LoopbackHub
    from pydantic import TypeAdapter
    from small_encoders import medmoe_folder

    from medmoe_hf.data.sources import Source
    from medmoe_hf.errors import IdentifierError, PublishError
    from medmoe_hf.hub.publish_data import push_data

    publishing = importlib.import_module("medmoe_hf.hub.publishing")
    model, draw = medmoe_folder(here / "model"), random.Random(0)
    faults = ["none", "connection lost", "answer lost", "token refused", "secret in the folder"]
    with pytest.MonkeyPatch.context() as patch, LoopbackHub() as hub:
        hub.use(patch, here / "home", token="hf_write")
        # Outputs are compared in a process of its own, which imports everything and is no part of this.
        patch.setattr(publishing, "write_golden", lambda folder: None)
        patch.setattr(publishing, "compare_with_golden", lambda folder: {"output.logits": 0.0})
        for number in range(count):
            fault = draw.choices(faults, [8, 3, 3, 3, 3])[0]
            secret = model / "notes.txt"
            if fault in ("connection lost", "answer lost"):
                hub.cut_commit(1, applied=fault == "answer lost")
            patch.setenv("HF_TOKEN", "hf_read" if fault == "token refused" else "hf_write")
            what = "models" if number % 2 else "data sets"
            try:
                if what == "models":
                    card = f"---\nlicense: mit\n---\n# Model {number}\n"
                    (model / "README.md").write_text(card)
                    if fault == "secret in the folder":
                        secret.write_text("HF_TOKEN=hf_" + "aB3dE5gH7j" * 4)
                    publishing.publish(model, "user/medmoe")
                else:
                    caption = "MRN 6620413, born 31.08.1947" if fault == "secret in the folder" else f"lung {number}"
                    (here / "a.png").write_bytes(picture(number))
                    (here / "t.jsonl").write_text(json.dumps({"image": "a.png", "caption": caption}))
                    source = {"kind": "jsonl", "files": [str(here / "t.jsonl")]}
                    push_data([TypeAdapter(Source).validate_python(source)], "user/pairs")
                end = "done"
            except (PublishError, IdentifierError, OSError):
                end = "refused or broken off"
            secret.unlink(missing_ok=True)
            # The Hub keeps everything in memory.
            hub.requests.clear()
            hub._cuts.clear()
            for repo in hub.repos.values():
                kept = set(repo.branches.values())
                repo.commits = {name: commit for name, commit in repo.commits.items() if name in kept}
            yield (lambda: Held.by(os.getpid(), folder)), f"{what}, fault: {fault}: {end}"


RUNS = {
    "serve": (served, 10_000, "requests to `medmoe serve`"),
    "serve-here": (served_here, 10_000, "requests to `medmoe serve --no-isolate`"),
    "stream": (streamed, 50_000, "samples of a stream"),
    "resume": (resumed, 200, "resumes of training"),
    "push": (pushed, 1000, "pushes"),
}


def soak(name: str, count: int) -> bool:
    """Makes a long run, and returns whether nothing has piled up."""
    run, _, title = RUNS[name]
    told: Counter[str] = Counter()
    first: Held | None = None
    held: Held | None = None
    begun = time.monotonic()
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        here, folder = Path(place) / "here", Path(place) / "temporary"
        here.mkdir()
        folder.mkdir()
        tempfile.tempdir = str(folder)
        try:
            for number, (look, kind) in enumerate(run(count, folder, here), start=1):
                told[kind] += 1
                if number == max(count // SHARE, 1):
                    gc.collect()
                    first = look()
                if number == count:
                    gc.collect()
                    held = look()
        finally:
            tempfile.tempdir = before
    if first is None or held is None:
        raise AssertionError(f"{sum(told.values())} of {count} {title}")
    return reported(title, count, first, held, told, time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description="Does anything pile up over a long run with faults?")
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--count", type=int, help="by default as in the first lines of this file")
    arguments = parser.parse_args()
    if not soak(arguments.run, arguments.count or RUNS[arguments.run][1]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
