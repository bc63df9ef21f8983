"""`kind: hub` with the layouts of `datasets`: NIfTI and image folders, tars, slices, streaming, revisions."""

import io
import json
import subprocess
import sys
import tarfile

import datasets
import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image
from pydantic import TypeAdapter

from medmoe_hf.data.shards import DatasetShard
from medmoe_hf.data.sources import Source

# Without the interpreter's end, in which pyarrow's threads abort now and then (apache/arrow#45214).
READ = """
import json, os
from medmoe_hf.data.sources import load_sources
from medmoe_hf.data.stream import SampleStream
found = []
for source in load_sources("sources.yaml"):
    stream = SampleStream([source], shuffle=False)
    found.append([
        [one["caption"], one["label"], one["modality"], sorted(set(one["image"].convert("L").tobytes()))]
        for one in stream
    ])
    found[-1].append(source.content_checksums() == source.content_checksums() != [])
print(json.dumps(found), flush=True)
os._exit(0)
"""


def png(level):
    buffer = io.BytesIO()
    Image.new("L", (20, 16), level).save(buffer, "PNG")
    return buffer.getvalue()


def nifti(level):
    volume = np.full((6, 5, 3), level, np.int16)
    volume[0] = 0
    return nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()


def tar(samples):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, parts in samples.items():
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_layouts_of_datasets_from_the_hub(hub, tmp_path):
    volumes = {f"train/{name}/{name}{i}.nii": nifti(40 + i) for name in ("liver", "spleen") for i in range(2)}
    hub.create("user/volumes", "dataset", files=volumes)
    pictures = {f"{split}/{name}/{name}.png": png(9) for split in ("train", "test") for name in ("mri", "ct")}
    hub.create("user/pictures", "dataset", files=pictures)
    pairs = {f"s{i}": {"png": png(10 + i), "txt": f"caption {i}".encode()} for i in range(6)}
    hub.create("user/tars", "dataset", files={"train/0.tar": tar(pairs)})
    sources = [
        {"kind": "hub", "path": "user/volumes", "caption_template": "CT of the {label}", "modality": "ct"},
        {"kind": "hub", "path": "user/pictures", "split": "test+train[:50%]", "caption_template": "{label}"},
        {"kind": "hub", "path": "user/pictures", "caption_template": "a {label}", "modality": "field:label"},
        {"kind": "hub", "path": "user/tars", "revision": "main", "split": "train[4:]"},
        {"kind": "hub", "path": "user/tars", "rows": 2},
    ]
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    # its own process: `datasets` reads once, when it is imported, where the Hub is
    run = subprocess.run(
        [sys.executable, "-c", READ],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "child", "hf_read"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    volumes, joined, named, sliced, streamed = json.loads(run.stdout)
    assert all(part.pop() for part in (volumes, joined, named, sliced, streamed))
    assert sorted(row[:3] for row in volumes) == [
        [f"CT of the {name}", name, 1] for name in ("liver", "spleen") for _ in range(2)
    ]
    assert sorted(row[0] for row in joined) == ["ct", "ct", "mri"]
    # classes in their alphabetical order, which is not that of the modalities
    assert sorted(row[:3] for row in named) == [["a ct", "ct", 1], ["a mri", "mri", 2]]
    assert [(row[0], row[3]) for row in sliced] == [("caption 4", [14]), ("caption 5", [15])]
    assert [(row[0], row[3]) for row in streamed] == [("caption 0", [10]), ("caption 1", [11])]


def test_classes_are_read_by_name():
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=["b", "a"]),
            "several": datasets.List(datasets.ClassLabel(names=["x", "y"])),
            "number": datasets.Value("int64"),
        }
    )
    rows = {"label": [1, 0, None, -1], "several": [[0, 1], [], [1], [-1]], "number": [1, 0, 1, 0]}
    shard = DatasetShard("d", datasets.Dataset.from_dict(rows, features=features))
    expected = [
        {"label": "a", "several": ["x", "y"], "number": 1},
        {"label": "b", "several": [], "number": 0},
        {"label": None, "several": ["y"], "number": 1},
        {"label": None, "several": [], "number": 0},
    ]
    assert [shard.read(index) for index in range(4)] == expected
    assert shard.peek([2, 0], ["label", "number"]) == [
        {"label": None, "number": 1},
        {"label": "a", "number": 1},
    ]


def test_keys_of_the_hub_are_refused_for_a_folder():
    for key, value in (("rows", 3), ("revision", "v1")):
        with pytest.raises(ValueError, match="apply to `kind: hub` only"):
            TypeAdapter(Source).validate_python({"kind": "saved", "path": "x", key: value})
