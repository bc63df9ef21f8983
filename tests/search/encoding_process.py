"""Code that test_encode.py shares with the processes it starts."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch

from medmoe_hf.data import phantom_sample, write_webdataset
from medmoe_hf.data.sources import WebDatasetSource
from medmoe_hf.search import encode_sources
from medmoe_hf.training import build_model
from medmoe_hf.training.config import ModelSection

PLACE = ("source", "shard", "row", "key", "position")


def model_folder(folder, preset="tiny", seed=0, **overrides):
    torch.manual_seed(seed)
    model, processor = build_model(ModelSection(preset=preset, overrides=overrides))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def add_samples(path, samples):
    """A tar of (key, image bytes, caption)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, image, caption in samples:
            for extension, content in (("png", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_sources(folder):
    """90 phantoms in three tars, and a tar of five samples of which two are broken."""
    write_webdataset(folder, shards=3, samples_per_shard=30, image_size=64)
    good = phantom_sample(1, 0, image_size=64)
    content = [png(good["image"]), b"no image", png(good["image"]), png(good["image"])[:200], png(good["image"])]
    add_samples(folder / "worse.tar", [(f"{index}", image, good["caption"]) for index, image in enumerate(content)])


def sources_of(folder):
    first = sorted(str(path) for path in folder.glob("phantom-*.tar"))
    return [
        WebDatasetSource(kind="webdataset", files=first, name="phantoms"),
        WebDatasetSource(kind="webdataset", files=[str(folder / "worse.tar")], name="worse"),
    ]


def encode_all(data, out, model, **changes):
    arguments = {"batch_size": 4, "samples_per_shard": 10, **changes}
    return encode_sources(sources_of(Path(data)), out, model, **arguments)


def table_of(out):
    """All pairs, in the order of the run."""
    parts = [pyarrow.parquet.read_table(path) for path in sorted(Path(out).glob("embeds-*.parquet"))]
    return pyarrow.concat_tables([part.replace_schema_metadata() for part in parts]).sort_by("position")


def launched(rank, world, port, data, out, model):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    encode_all(data, out, model)


def alone(rank, data, out, model):
    torch.set_num_threads(1)
    encode_all(data, out, model)
