"""Embeddings in kaiko-eva's layout: files, numbers of classes, splits, and what cannot be written."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_encoders import medmoe_folder
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data.sources import load_sources
from medmoe_hf.errors import ArgumentError, MedMoEError, PathExistsError
from medmoe_hf.inference.encoders import load_encoder
from medmoe_hf.search.eva import encode_for_eva


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return medmoe_folder(tmp_path_factory.mktemp("eva") / "medmoe")


def table(folder, labels, start=0):
    """Pictures in colour and with 16 bits, and their source."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(start)
    lines = ["image,caption,kind"]
    for number, label in enumerate(labels):
        deep = number % 2
        values = draw.integers(0, 9000 if deep else 256, (70, 80) if deep else (70, 80, 3))
        Image.fromarray(values.astype(np.uint16 if deep else np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,caption {number},{label}")
    (folder / "table.csv").write_text("\n".join(lines))
    path = folder / "sources.yaml"
    path.write_text(json.dumps([{"kind": "csv", "files": [str(folder / "table.csv")], "label": "kind"}]))
    return path


def manifest(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def encoded(model, tmp_path_factory):
    """Two splits, the first written by the command."""
    root = tmp_path_factory.mktemp("encoded")
    path = table(root / "train", ["nodule", "effusion", "nodule", "normal lung", "effusion"])
    arguments = [str(path), str(root / "out"), "--model", str(model), "--layout", "eva", "--batch-size", "2"]
    run = CliRunner().invoke(app, ["encode", *arguments])
    assert run.exit_code == 0, run.output
    assert "5 images encoded as train" in run.output
    more = load_sources(table(root / "val", ["effusion", "normal lung"], 1))
    assert encode_for_eva(more, root / "out", model, "val") == 2
    return root / "out"


def test_every_row_is_the_embedding_of_its_image(encoded, model):
    rows = manifest(encoded)
    assert [list(row) for row in rows] == [["origin", "embeddings", "target", "split"]] * 7
    assert (encoded / "classnames.txt").read_text() == "nodule\neffusion\nnormal lung\n"
    assert [row["target"] for row in rows] == ["0", "1", "0", "2", "1", "1", "2"]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["val"] * 2
    paths = [encoded.parent / "train" / f"{index}.png" for index in range(5)]
    paths += [encoded.parent / "val" / f"{index}.png" for index in range(2)]
    expected = load_encoder(model).encode_images(paths)
    for row, path, right in zip(rows, paths, expected, strict=True):
        assert row["origin"].endswith(path.name)
        found = torch.load(encoded / row["embeddings"])
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
        # not the storage of the whole batch
        assert found.untyped_storage().nbytes() == 4 * len(found)


def test_what_cannot_be_written_leaves_the_folder_as_it_was(encoded, model, tmp_path):
    before = {path: path.read_bytes() for path in encoded.rglob("*") if path.is_file()}
    new = load_sources(table(tmp_path / "new", ["effusion", "mass"]))
    bare = json.loads((tmp_path / "new" / "sources.yaml").read_text())
    del bare[0]["label"]
    (tmp_path / "bare.yaml").write_text(json.dumps(bare))
    for sources, folder, split, kind, message in (
        (new, encoded, "test", ArgumentError, "'mass', which"),
        (new, encoded, "val", PathExistsError, "has the split val already"),
        (new, encoded, "validation", ArgumentError, "`split` must be train, val, test"),
        (new, tmp_path / "new", "test", PathExistsError, r"has no manifest\.csv"),
        (load_sources(tmp_path / "bare.yaml"), tmp_path / "out", "test", ArgumentError, "has no label"),
    ):
        with pytest.raises(kind, match=message):
            encode_for_eva(sources, folder, model, split)
    assert {path: path.read_bytes() for path in encoded.rglob("*") if path.is_file()} == before
    # and what an interruption left does not stand in the way
    (tmp_path / "out" / "test").mkdir(parents=True, exist_ok=True)
    assert encode_for_eva(new, tmp_path / "out", model, "test") == 2
    (tmp_path / "out" / "manifest.csv").write_text("a,b\n")
    with pytest.raises(MedMoEError, match="has the columns a, b, not origin"):
        encode_for_eva(new, tmp_path / "out", model, "train")


def test_options_of_the_other_layout_are_refused(tmp_path):
    (tmp_path / "s.yaml").write_text("[]")
    eva = ["--layout", "eva"]
    for name, options in (
        ("split", ["--split", "val"]),
        ("dtype", [*eva, "--dtype", "float32"]),
        ("keep-captions", [*eva, "--keep-captions"]),
    ):
        run = CliRunner().invoke(app, ["encode", str(tmp_path / "s.yaml"), str(tmp_path / "out"), *options])
        assert run.exit_code == 1
        assert f"--{name} does not go with --layout" in run.output
