"""Benchmark of the data path from tar shards to normalized batches, in images per second and core.

    python examples/experiments/benchmarks/data.py [--images 600] [--rounds 5]

Writes a shard of 512x512 JPEGs and times, on one thread and with rounds in turn so that other load affects all alike:
decoding alone (the upper bound), a baseline (`datasets` and the image processors of transformers, with both backends),
and this package with full and with reduced decoding. Prints medians over rounds with their range, and ratios within
the run.
"""

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers import ViTImageProcessor, ViTImageProcessorPil

from medmoe_hf.data import phantom_sample, phantom_vocabulary
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.sources import WebDatasetSource
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer

BATCH = 32


def write_shard(path: Path, count: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in range(count):
            sample = phantom_sample(0, index, image_size=512)
            picture = io.BytesIO()
            sample["image"].convert("RGB").save(picture, "JPEG", quality=90)
            for extension, content in (("jpg", picture.getvalue()), ("txt", sample["caption"].encode())):
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def jpegs(path: Path) -> list[bytes]:
    with tarfile.open(path) as archive:
        return [archive.extractfile(member).read() for member in archive if member.name.endswith("jpg")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=600, help="number of images")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.tar"
        write_shard(shard, arguments.images)
        files = jpegs(shard)
        processor = MedMoEProcessor(MedMoEImageProcessor(), MedMoETokenizer.from_words(phantom_vocabulary(), 25))
        collator = ContrastiveCollator(processor)

        def decode_only() -> None:
            for content in files:
                Image.open(io.BytesIO(content)).load()

        def baseline(kind: type) -> Callable[[], None]:
            stock = kind(size={"height": 224, "width": 224}, resample=3)

            def run() -> None:
                stream = datasets.load_dataset("webdataset", data_files=[str(shard)], split="train", streaming=True)
                held = []
                for sample in stream:
                    held.append(sample)
                    if len(held) == BATCH:
                        stock([row["jpg"] for row in held], return_tensors="pt")
                        processor.tokenizer([row["txt"] for row in held], return_tensors="pt")
                        held = []

            return run

        def ours(draft: int | None) -> Callable[[], None]:
            def run() -> None:
                source = WebDatasetSource(kind="webdataset", files=[str(shard)])
                held = []
                for sample in SampleStream([source], prepare=collator.prepare, draft=draft):
                    held.append(sample)
                    if len(held) == BATCH:
                        collator.normalize(collator.assemble(held))
                        held = []

            return run

        paths = {
            "decode only": decode_only,
            "baseline, Pillow": baseline(ViTImageProcessorPil),
            "baseline, torchvision": baseline(ViTImageProcessor),
            "ours, full decoding": ours(None),
            "ours, reduced decoding": ours(224),
        }
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for path in paths.values():
            path()  # warm-up
        for _ in range(arguments.rounds):
            for name, path in paths.items():
                started = time.perf_counter()
                path()
                rates[name].append(arguments.images / (time.perf_counter() - started))

    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{arguments.images} JPEGs of 512x512, one thread, {arguments.rounds} rounds\n")
    heads = ("images/s", "range", "x Pillow", "x torchvision", "of decoding")
    print(f"{'path':<26}{heads[0]:>10}{heads[1]:>16}{heads[2]:>11}{heads[3]:>15}{heads[4]:>12}")
    for name, rate in medians.items():
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        ratios = [rate / medians[other] for other in ("baseline, Pillow", "baseline, torchvision", "decode only")]
        print(f"{name:<26}{rate:>10.0f}{spread:>16}{ratios[0]:>11.2f}{ratios[1]:>15.2f}{ratios[2]:>12.0%}")


if __name__ == "__main__":
    main()
