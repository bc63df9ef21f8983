"""Benchmark of bulk encoding that is killed twice: checks for gaps and duplicates, memory, and planted neighbours.

    python examples/experiments/benchmarks/encode.py [--samples 20000] [--image-size 64] [--output bulk]
        [--processes 1]

Writes phantoms to tars, adds a copy of one image and of one report, and runs `medmoe encode` with a new `tiny` model.
The process is killed (SIGKILL) at two random times and started again. Prints the resident memory of the encoding
process over time, pairs per second, and the results of `medmoe search`.
"""

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet
import torch
import yaml

from medmoe_hf.data import phantom_sample, write_webdataset
from medmoe_hf.search import EmbeddingIndex, search
from medmoe_hf.training import build_model
from medmoe_hf.training.config import ModelSection

TAR = 1000  # samples per tar
SHARDS = 20  # minimum number of embedding shards
PLANTED_IMAGE, PLANTED_REPORT = 123, 456


def write_data(folder: Path, samples: int, image_size: int) -> Path:
    """Write the tars and a YAML of their sources; returns the path of the YAML."""
    write_webdataset(folder, shards=samples // TAR, samples_per_shard=TAR, image_size=image_size)
    image, report = (phantom_sample(0, index, image_size=image_size) for index in (PLANTED_IMAGE, PLANTED_REPORT))
    image["image"].save(folder / "query.png")
    picture = io.BytesIO()
    phantom_sample(1, 0, image_size=image_size)["image"].save(picture, "PNG")
    pairs = {
        "planted-image": ((folder / "query.png").read_bytes(), "no report"),
        "planted-report": (picture.getvalue(), report["caption"]),
    }
    with tarfile.open(folder / "planted.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, (content, caption) in pairs.items():
            for extension, data in (("png", content), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    sources = [{"kind": "webdataset", "name": "phantoms", "files": [str(folder / "*.tar")]}]
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources))
    return folder / "sources.yaml"


def run_and_watch(command: list[str], kill_after: int | None, log: list[tuple[float, float]]) -> bool:
    """Run a command and log its memory; returns whether it finished.

    Args:
        command: A `medmoe encode` command.
        kill_after: Number of new shards after which the command is killed, with a random delay of up to a second; None
            to let it finish.
        log: Receives twice a second (seconds since the start, resident MB of the largest process).
    """
    process = subprocess.Popen(command, start_new_session=True)
    started, noted = time.monotonic(), 0.0
    out = Path(command[command.index("encode") + 2])
    before = len(list(out.glob("embeds-*")))
    while process.poll() is None:
        time.sleep(0.02)
        if kill_after is not None and len(list(out.glob("embeds-*"))) >= before + kill_after:
            time.sleep(random.random())
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        if time.monotonic() - noted < 0.5:
            continue
        noted = time.monotonic()
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            resident = max(member.memory_info().rss for member in family) / 2**20
        except psutil.NoSuchProcess:
            continue
        log.append((noted - started, resident))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}.")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=20_000, help=f"number of samples, a multiple of {TAR}")
    parser.add_argument("--image-size", type=int, default=64, help="size in pixels")
    parser.add_argument("--output", type=Path, default=Path("bulk"), help="new folder for all results")
    parser.add_argument("--processes", type=int, default=1, help="number of processes")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True)

    started = time.monotonic()
    sources = write_data(output / "data", arguments.samples, arguments.image_size)
    print(f"{arguments.samples} phantoms of {arguments.image_size} pixels drawn in {time.monotonic() - started:.0f} s")
    torch.manual_seed(0)
    model, processor = build_model(ModelSection(preset="tiny"))
    model.save_pretrained(output / "model")
    processor.save_pretrained(output / "model")

    command = [sys.executable, "-m"]
    if arguments.processes > 1:
        command += ["torch.distributed.run", "--nproc_per_node", str(arguments.processes), "-m"]
    command += ["medmoe_hf.cli", "encode", str(sources), str(output / "embeds"), "--model", str(output / "model")]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    command += ["--samples-per-shard", str(max(1, arguments.samples // SHARDS))]
    for kill_after in (random.randint(1, SHARDS // 3), random.randint(1, SHARDS // 3), None):
        log: list[tuple[float, float]] = []
        ended = run_and_watch(command, kill_after, log)
        shards = len(list((output / "embeds").glob("embeds-*")))
        print(
            f"{'ended' if ended else 'killed'} after {log[-1][0]:.0f} s, with {shards} shards. "
            "Resident memory in MB by second:"
        )
        steps = log[:: max(1, len(log) // 12)]
        print("   " + "  ".join(f"{second:.0f}s:{resident:.0f}" for second, resident in steps))

    expected = {f"{output}/data/phantom-{index // TAR:06d}.tar/{index:09d}" for index in range(arguments.samples)}
    expected |= {f"{output}/data/planted.tar/planted-{name}" for name in ("image", "report")}
    keys: list[str] = []
    for path in (output / "embeds").glob("embeds-*"):
        keys += pyarrow.parquet.read_table(path, columns=["key"]).column("key").to_pylist()
    print(f"{len(keys)} pairs, {len(keys) - len(set(keys))} duplicates, {len(expected - set(keys))} missing")
    if len(keys) != len(set(keys)) or set(keys) != expected:
        raise SystemExit("Pairs are missing or duplicated.")

    started = time.monotonic()
    EmbeddingIndex(output / "embeds")
    print(f"index built in {time.monotonic() - started:.1f} s")
    started = time.monotonic()
    found = search(output / "embeds", image=output / "data" / "query.png", k=2)
    print(
        f"search by image, including loading the model: {time.monotonic() - started:.1f} s\n  {found[0]}\n  {found[1]}"
    )
    if not any(hit.key.endswith("planted-image") for hit in found):
        raise SystemExit("The planted image was not found.")
    caption = phantom_sample(0, PLANTED_REPORT, image_size=arguments.image_size)["caption"]
    found = search(output / "embeds", caption, among="reports", k=50)
    # Many phantoms have equal reports, and therefore equal scores.
    best = [hit for hit in found if hit.score > found[0].score - 1e-4]
    print(f"search by a report: {len(best)} with the same score\n  {best[-1]}")
    if not any(hit.key.endswith("planted-report") for hit in best):
        raise SystemExit("The planted report was not found.")


if __name__ == "__main__":
    main()
