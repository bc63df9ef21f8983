"""Datasets for the Hub: they read back as they were, name nobody, and are pushed in one commit."""

import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data.phantom import phantom_sample
from medmoe_hf.data.sources import Source
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import IdentifierError, PublishError
from medmoe_hf.hub import publish_data
from medmoe_hf.hub.identifiers import kinds
from medmoe_hf.hub.publish_data import export_data, push_data

KIND = {"parquet": "parquet", "webdataset": "tar"}


def source(**fields):
    return TypeAdapter(Source).validate_python(fields)


def phantoms(length=7, **fields):
    return source(kind="phantom", image_size=48, length=length, **fields)


def read_back(folder, format, **options):
    files = [str(folder / "data" / f"*.{KIND[format]}")]
    return list(SampleStream([source(kind=format, files=files)], shuffle=False, **options))


def png(color=90, size=(20, 16), **options):
    buffer = io.BytesIO()
    Image.new("L", size, color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def table(folder, rows, name="t.jsonl", **fields):
    folder.mkdir(exist_ok=True)
    for row in rows:
        path = folder / row["image"]
        if not path.exists():
            path.write_bytes(png())
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return source(kind="jsonl", files=[str(folder / name)], **fields)


# What comes back


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_phantoms_read_back_as_they_were(tmp_path, format):
    folder = export_data([phantoms(seed=3)], tmp_path / "out", format, shard_size=3)
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        f"train-{number:05d}.{KIND[format]}" for number in range(3)
    ]
    samples = read_back(folder, format)
    assert len(samples) == 7
    for index, sample in enumerate(samples):
        drawn = phantom_sample(3, index, image_size=48)
        assert np.array_equal(np.asarray(sample["image"]), np.asarray(drawn["image"]))
        assert sample["image"].mode == drawn["image"].mode
        assert (sample["caption"], sample["modality"]) == (drawn["caption"], drawn["modality"])


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_what_datasets_makes_of_the_folder(tmp_path, format, monkeypatch):
    folder = export_data([phantoms(seed=3)], tmp_path / "out", format, shard_size=3)
    # the snippet of the card, run where the folder lies
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    found = {}
    exec(code, found)
    first = phantom_sample(3, 0, image_size=48)
    names = {"parquet": ("image", "caption", "modality"), "webdataset": ("png", "txt", "cls")}[format]
    picture, caption, modality = (found["sample"][name] for name in names)
    assert np.array_equal(np.asarray(picture), np.asarray(first["image"]))
    assert (caption, modality) == (first["caption"], first["modality"])
    assert sum(1 for _ in found["dataset"]) == 7
    if format == "parquet":
        assert found["dataset"].features["modality"].names == [
            "xray", "ct", "mri", "ultrasound", "histopathology", "fundus",
        ]  # fmt: skip


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_unknown_modalities_stay_unknown(tmp_path, format):
    rows = [{"image": "a.png", "caption": "one", "kind": "cxr"}, {"image": "b.png", "caption": "two", "kind": None}]
    folder = export_data([table(tmp_path / "in", rows, modality="field:kind")], tmp_path / "out", format)
    assert [(one["caption"], one["modality"]) for one in read_back(folder, format)] == [("one", 0), ("two", -100)]


def test_pixels_of_every_mode_and_nothing_else_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    gray, rgb = rng.integers(0, 256, (12, 20), np.uint8), rng.integers(0, 256, (12, 20, 3), np.uint8)
    deep = rng.integers(0, 65536, (12, 20)).astype(np.uint16)
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "SECRET")
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "SECRET", 6  # a description, and "turn by a quarter"
    palette = Image.fromarray(rgb).quantize(16)
    pictures = {
        "gray.png": (Image.fromarray(gray), {"pnginfo": info, "icc_profile": b"SECRET profile"}),
        "rgb.png": (Image.fromarray(rgb), {"exif": exif}),
        "deep.png": (Image.fromarray(deep), {"pnginfo": info}),
        "palette.png": (palette, {}),
        "cmyk.tif": (Image.fromarray(rgb).convert("CMYK"), {}),
        "photo.jpg": (Image.fromarray(rgb), {"comment": b"SECRET", "exif": exif, "icc_profile": b"SECRET"}),
    }
    (tmp_path / "in").mkdir()
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / "in" / name, **options)
    assert b"SECRET" in (tmp_path / "in" / "photo.jpg").read_bytes()
    rows = [{"image": name, "caption": name} for name in pictures]
    folder = export_data([table(tmp_path / "in", rows)], tmp_path / "out")
    found = {one["caption"]: one["image"] for one in read_back(folder, "parquet")}
    assert np.array_equal(np.asarray(found["gray.png"]), gray)
    assert np.array_equal(np.asarray(found["rgb.png"]), np.rot90(rgb, -1))
    assert np.array_equal(np.asarray(found["deep.png"]), deep)
    assert np.array_equal(np.asarray(found["palette.png"]), np.asarray(palette.convert("RGB")))
    assert found["cmyk.tif"].mode == "RGB"
    decoded = np.asarray(Image.open(tmp_path / "in" / "photo.jpg"))
    assert np.array_equal(np.asarray(found["photo.jpg"]), np.rot90(decoded, -1))
    assert all(image.info == {} for image in found.values())
    for group in pq.read_table(folder / "data" / "train-00000.parquet")["image"].to_pylist():
        assert group["path"] is None
        assert b"SECRET" not in group["bytes"]
        assert set(re.findall(rb"[A-Za-z]{4}", group["bytes"][8:])) >= {b"IHDR", b"IDAT", b"IEND"}


def test_numbers_that_a_png_does_not_hold_are_left_out_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "in" / "floats.tif")
    rows = [{"image": "floats.tif", "caption": "x"}] + [{"image": f"a{i}.png", "caption": "y"} for i in range(30)]
    folder = export_data([table(tmp_path / "in", rows)], tmp_path / "out")
    assert len(read_back(folder, "parquet")) == 30
    assert "1 unreadable samples were skipped" in (folder / "README.md").read_text()


def test_shards_of_a_tar_hold_running_numbers_only(tmp_path):
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, content in (("ward7_lee.png", png()), ("ward7_lee.txt", b"a scan")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    folder = export_data([source(kind="webdataset", files=[str(tmp_path / "in.tar")])], tmp_path / "out", "webdataset")
    with tarfile.open(folder / "data" / "train-00000.tar") as archive:
        assert archive.getnames() == ["00000-000000.png", "00000-000000.txt", "00000-000000.cls"]


def test_it_appears_whole_and_replaces_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(publish_data._WRITERS, "parquet", full)
    with pytest.raises(OSError, match="out could not be written: the disk"):
        export_data([phantoms()], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export_data([phantoms()], tmp_path / "out")
    with pytest.raises(FileExistsError):
        export_data([phantoms()], tmp_path / "out")
    with pytest.raises(ValueError, match="give it a `length`"):
        export_data([phantoms(length=None)], tmp_path / "other")
    with pytest.raises(ValueError, match="one of parquet, webdataset"):
        export_data([phantoms()], tmp_path / "other", "zip")


# The card


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_the_card_describes_features_and_splits_as_datasets_finds_them(tmp_path, format, caplog):
    folder = export_data([phantoms(seed=3)], tmp_path / "out", format, shard_size=3)
    assert "states no license" in caplog.text
    described = datasets.load_dataset_builder(str(folder)).info
    read = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    size = sum(len(one["png"]) + len(one["txt"]) + 8 for one in members(folder)) if format == "webdataset" else None
    assert described.splits["train"].num_examples == len(read) == 7
    assert size is None or described.splits["train"].num_bytes == size
    if format == "parquet":
        assert described.features == read.features == publish_data.FEATURES
    caplog.clear()
    export_data([phantoms(seed=3)], tmp_path / "licensed", license="cc-by-4.0")
    assert "license" not in caplog.text


def members(folder):
    samples = {}
    for path in (folder / "data").iterdir():
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return samples.values()


def test_the_card_counts_and_keeps_quiet(tmp_path):
    rows = [
        {"image": f"scan{i}.png", "caption": f"caption number {i}", "modality": m} for i, m in enumerate((1, 1, None))
    ]
    sources = [table(tmp_path / "in", rows, name="reports.jsonl"), phantoms(name="a|b"), phantoms(4, seed=1)]
    folder = export_data(sources, tmp_path / "out", license="cc-by-4.0", repo="you/scans")
    text = (folder / "README.md").read_text()
    found = metadata_load(folder / "README.md")
    assert found["license"] == "cc-by-4.0"
    assert found["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert found["size_categories"] == ["n<1K"]
    lines = text.splitlines()
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])
    assert [token.type for token in tokens].count("table_open") == 2
    drawn = [phantom_sample(seed, i, image_size=48)["modality"] for seed, n in ((0, 7), (1, 4)) for i in range(n)]
    expected = Counter(drawn) + Counter({1: 2})
    names = ("xray", "ct", "mri", "ultrasound", "histopathology", "fundus")
    for index, name in enumerate(names):
        assert (f"| {name} | {expected[index]} |" in lines) == bool(expected[index])
    assert "| unknown | 1 |" in lines
    assert r"| a\|b | phantom | 7 |" in lines
    assert "| not stated | jsonl | 3 |" in lines
    for secret in ("caption number", "reports", "scan0", str(tmp_path)):
        assert secret not in text
    assert 'load_dataset("you/scans"' in text


def test_a_card_without_a_license_says_so(tmp_path):
    folder = export_data([phantoms()], tmp_path / "out")
    assert "license" not in metadata_load(folder / "README.md")
    assert "License: not stated" in (folder / "README.md").read_text()
    assert "synthetic drawings without data of patients" in (folder / "README.md").read_text()


# Identifiers


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("Chest radiograph. DOB: 4.7.56", "a date"),
        ("Seen on 12/03/1956 with cough.", "a date"),
        ("Study of 2019-11-30.", "a date"),
        ("Operated on 3 March 2018.", "a date"),
        ("MRN 00123", "a record number"),
        ("No. 4711829 from the ward.", "a record number"),
        ("078-05-1120", "a record number"),
        ("Patient: Miller, cough", "a name"),
        ("Name: O'Brien", "a name"),
        ("Read by Dr. Miller.", "a name"),
        ("MILLER^ANNA", "a name"),
        ("Call (555) 123-4567.", "a phone number"),
        ("Call +49 30 1234 5678", "a phone number"),
        ("Ask a.miller@clinic.example for more", "an e-mail address"),
    ],
)
def test_captions_that_look_like_identifiers_stop_it(tmp_path, caption, kind):
    rows = [{"image": "a.png", "caption": "A scan."}, {"image": "b.png", "caption": caption}]
    sources = [table(tmp_path / "in", rows)]
    with pytest.raises(IdentifierError) as error:
        export_data(sources, tmp_path / "out")
    assert f"1 x {kind} in a caption" in str(error.value)
    assert "Files: b.png." in str(error.value)
    assert caption not in str(error.value)
    assert not {"Miller", "Brien", "MILLER"} & set(re.findall(r"\w+", str(error.value)))
    assert not (tmp_path / "out").exists()
    folder = export_data(sources, tmp_path / "out", i_have_removed_identifiers=True)
    assert [one["caption"] for one in read_back(folder, "parquet")] == ["A scan.", caption]
    assert "They were not searched for identifiers" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "caption",
    [
        "Axial T2 image of the brain with a 12 x 14 mm lesion, Hounsfield 40-60, L4-5.",
        "Patient: male, 45 years. Dr note none; MS plaques in 2019.",
        "Ki-67 index 30 %, magnification 400, 10-15 mitoses per 10 HPF.",
        "MR of the knee. TE 80.5, TR 3500.25, TI 2200, 1.5 T, 0.45 to 0.55 mm.",
        "Known ___ with ___ seen on [**2101-**].",
    ],
)
def test_plain_captions_pass(tmp_path, caption):
    export_data([table(tmp_path / "in", [{"image": "a.png", "caption": caption}])], tmp_path / "out")


def test_phantoms_pass():
    assert not [i for i in range(400) if kinds(phantom_sample(9, i, image_size=48)["caption"])]


@pytest.mark.parametrize(
    "name",
    ["mrn_4711.png", "19560312_chest.png", "MILLER^ANNA.png", "4711829.png", "2019-11-30.png", "a@b.example.png"],
)
def test_names_of_files_that_look_like_identifiers_stop_it_and_are_not_repeated(tmp_path, name):
    rows = [{"image": "a.png", "caption": "x"}, {"image": name, "caption": "y"}]
    with pytest.raises(IdentifierError, match="in the name of a file") as error:
        export_data([table(tmp_path / "in", rows)], tmp_path / "out")
    assert "Files: t.jsonl, sample 1." in str(error.value)
    assert name.removesuffix(".png") not in str(error.value)


@pytest.mark.parametrize(
    "name", ["00000013_002.png", "IM-0001-0001.png", "ISIC_0024306.png", "p10000032.png", "000123.png", "view1.png"]
)
def test_usual_names_of_files_pass(tmp_path, name):
    export_data([table(tmp_path / "in", [{"image": name, "caption": "x"}])], tmp_path / "out")


@pytest.fixture
def dicom(tmp_path):
    """Writes a small CT of pydicom's with a header of one's own into a table or a tar."""
    pydicom = pytest.importorskip("pydicom")
    whole = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    for element in list(whole.iterall()):
        if element.keyword in (*publish_data._IDENTIFYING, *publish_data._PSEUDONYMS):
            element.value = None

    def write(kind, sequence=None, **header):
        for name, value in header.items():
            setattr(whole, name, value)
        if sequence is not None:
            inner = pydicom.Dataset()
            inner.update({})
            for name, value in sequence.items():
                setattr(inner, name, value)
            whole.RequestAttributesSequence = [inner]
        (tmp_path / "in").mkdir(exist_ok=True)
        whole.save_as(tmp_path / "in" / "scan.dcm")
        if kind == "table":
            return table(tmp_path / "in", [{"image": "scan.dcm", "caption": "x"}], modality="dicom")
        content = (tmp_path / "in" / "scan.dcm").read_bytes()
        with tarfile.open(tmp_path / "in" / "t.tar", "w") as archive:
            for name, part in (("scan.dcm", content), ("scan.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
        return source(kind="webdataset", files=[str(tmp_path / "in" / "t.tar")], modality="dicom")

    return write


@pytest.mark.parametrize("kind", ["table", "tar"])
def test_headers_with_identifiers_stop_it(tmp_path, dicom, kind):
    found = dicom(kind, PatientName="Miller^Anna", PatientBirthDate="19560312", sequence={"AccessionNumber": "77"})
    with pytest.raises(IdentifierError) as error:
        export_data([found], tmp_path / "out")
    for field in ("PatientName", "PatientBirthDate", "AccessionNumber"):
        assert f"1 x {field} in a DICOM header" in str(error.value)
    assert "Files: scan" in str(error.value)
    assert not {"Miller", "Anna", "19560312", "77"} & set(re.findall(r"\w+", str(error.value)))
    folder = export_data([found], tmp_path / "out", i_have_removed_identifiers=True)
    (sample,) = read_back(folder, "parquet")
    assert sample["modality"] == 1
    assert b"Miller" not in (folder / "data" / "train-00000.parquet").read_bytes()


def test_headers_without_identifiers_pass(tmp_path, dicom):
    export_data([dicom("table")], tmp_path / "out")


def test_pseudonyms_pass_where_the_header_says_so(tmp_path, dicom):
    named = {"PatientName": "case 12", "PatientID": "c12", "PatientIdentityRemoved": "YES"}
    export_data([dicom("table", **named)], tmp_path / "out")
    with pytest.raises(IdentifierError, match="1 x BurnedInAnnotation in a DICOM header"):
        export_data([dicom("table", **named, BurnedInAnnotation="YES")], tmp_path / "other")


def test_nifti_has_no_such_header(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 3), np.int16), np.eye(4)), tmp_path / "in" / "scan.nii.gz")
    rows = [{"image": "scan.nii.gz", "caption": "x"}]
    export_data([table(tmp_path / "in", rows)], tmp_path / "out")


def test_many_files_are_counted_and_twenty_named(tmp_path):
    rows = [{"image": f"scan{i}.png", "caption": "Patient: Miller"} for i in range(25)]
    with pytest.raises(IdentifierError) as error:
        export_data([table(tmp_path / "in", rows)], tmp_path / "out")
    assert "25 x a name in a caption" in str(error.value)
    assert "and 5 more" in str(error.value)
    assert "scan20.png" not in str(error.value)


# Pushed


def test_a_push_is_one_commit_that_leaves_only_the_new_shards(hub):
    push_data([phantoms(9)], "user/scans", shard_size=3, private=True)
    repo = hub.repo("user/scans", "dataset")
    assert repo.private
    assert sorted(path for path in repo.files() if path.startswith("data/")) == [
        f"data/train-{number:05d}.parquet" for number in range(3)
    ]
    commits = len(repo.commits)
    address = push_data([phantoms(4)], "user/scans", "webdataset", shard_size=3)
    assert len(repo.commits) == commits + 1
    assert address == f"{hub.url}/datasets/user/scans/commit/{repo.find('main')}"
    assert repo.files().keys() - {".gitattributes"} == {
        "README.md",
        "data/train-00000.tar",
        "data/train-00001.tar",
    }


def test_a_dry_run_checks_and_lists_everything_and_sends_nothing(hub, tmp_path):
    new = push_data([phantoms(5)], "user/scans", shard_size=3, private=True, dry_run=True)
    assert [[line.split()[0], line.split()[-1]] for line in new.splitlines()[:3]] == [
        ["add", path] for path in ("README.md", "data/train-00000.parquet", "data/train-00001.parquet")
    ]
    assert "user/scans, main: 3 added, 0 replaced, 0 deleted, 0 unchanged" in new
    assert "into a new repo.\nNothing was sent." in new
    with pytest.raises(IdentifierError):
        push_data([table(tmp_path / "in", [{"image": "a.png", "caption": "Patient: Miller"}])], "user/x", dry_run=True)
    assert hub.sent() == []
    push_data([phantoms(5)], "user/scans", shard_size=3, private=True)
    sent, repo = len(hub.sent()), hub.repo("user/scans", "dataset")
    commits = len(repo.commits)
    (tmp_path / "sources.yaml").write_text(json.dumps([{"kind": "phantom", "length": 2, "image_size": 64}]))
    command = ["data", "push", str(tmp_path / "sources.yaml"), "user/scans", "--dry-run"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.search(r"delete +[\d.]+ \w+  data/train-00001\.parquet", result.output)
    assert "Nothing was sent." in result.output
    assert "Published" not in result.output
    with pytest.raises(PublishError, match="is private"):
        push_data([phantoms(2)], "user/scans", private=False, dry_run=True)
    assert (len(hub.sent()), len(repo.commits)) == (sent, commits)


# Without the interpreter's end, in which pyarrow's threads abort now and then (apache/arrow#45214).
READ = """
import json, os, sys
import datasets
from medmoe_hf.data.sources import load_sources
from medmoe_hf.data.stream import SampleStream
streamed = list(datasets.load_dataset("user/scans", split="train", streaming=True))
samples = SampleStream(load_sources("sources.yaml"), shuffle=False)
print(json.dumps([
    {
        "image": sample["image"].tobytes().hex(),
        "caption": sample["caption"],
        "modality": sample["modality"],
        "streamed": {key: value for key, value in line.items() if isinstance(value, (str, int))},
    }
    for sample, line in zip(samples, streamed, strict=True)
]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("format", ["parquet", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_what_was_pushed_streams_and_trains(hub, format, tmp_path):
    push_data([phantoms(6, seed=2)], "user/scans", format, shard_size=4)
    # what the card says to give to `medmoe train`
    card = hub.repo("user/scans", "dataset").files()["README.md"].decode()
    (sources,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "sources.yaml").write_text(sources)
    # its own process: `datasets` reads once, when it is imported, where the Hub is
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", READ],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "reader", token="hf_read"),
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert len(found) == 6
    for index, sample in enumerate(found):
        drawn = phantom_sample(2, index, image_size=48)
        assert sample["image"] == drawn["image"].tobytes().hex()
        assert (sample["caption"], sample["modality"]) == (drawn["caption"], drawn["modality"])
        assert drawn["caption"] in sample["streamed"].values()
        assert drawn["modality"] in sample["streamed"].values()


def test_nothing_is_sent_of_data_that_are_refused(hub, tmp_path):
    with pytest.raises(IdentifierError):
        push_data([table(tmp_path / "in", [{"image": "a.png", "caption": "Patient: Miller"}])], "user/scans")
    assert hub.sent() == []


def test_a_push_that_is_cut_off_leaves_the_old_one_and_can_be_repeated(hub):
    push_data([phantoms(3)], "user/scans")
    repo = hub.repo("user/scans", "dataset")
    before, files = repo.find("main"), repo.files()
    hub.cut_commit()
    with pytest.raises(PublishError, match=r"failed or broke off .* Run the same command again"):
        push_data([phantoms(5)], "user/scans", "webdataset")
    assert (repo.find("main"), repo.files()) == (before, files)
    push_data([phantoms(5)], "user/scans", "webdataset")
    assert repo.commits[repo.find("main")].parent == before
    assert {path for path in repo.files() if path.startswith("data/")} == {"data/train-00000.tar"}


def test_a_branch_is_made_and_main_left(hub):
    push_data([phantoms(3)], "scans")
    before = hub.repo("user/scans", "dataset").files()
    push_data([phantoms(3)], "user/scans", "webdataset", revision="tars")
    repo = hub.repo("user/scans", "dataset")
    assert repo.files() == before
    assert {path for path in repo.files("tars") if path.startswith("data/")} == {"data/train-00000.tar"}


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "user/scans", r"no token .* `hf auth login`"),
        ("hf_nobody", "user/scans", "token is not valid"),
        ("hf_read", "user/scans", "The token of user is read-only"),
        ("hf_write", "clinic/scans", "has no permission"),
    ],
)
def test_what_the_hub_refuses(hub, monkeypatch, token, repo, message):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=message):
        push_data([phantoms(1)], repo)
    assert hub.repos == {}


@pytest.mark.parametrize(("private", "is_private"), [(True, False), (False, True)])
def test_another_visibility_stops_it_before_the_export(hub, monkeypatch, private, is_private):
    hub.create("user/scans", "dataset", private=is_private)
    monkeypatch.setattr(publish_data, "export_data", None)
    with pytest.raises(PublishError, match=f"exists and is {'private' if is_private else 'public'}"):
        push_data([phantoms(1)], "user/scans", private=private)
    assert hub.sent() == []


def test_files_of_others_stop_it_and_replace_removes_them(hub):
    mine = {"data/train-00000.parquet": b"rows", "data/notes.csv": b"1,2,3", "README.md": b"# Mine", "LICENSE": b"x"}
    repo = hub.create("user/scans", "dataset", files=mine)
    with pytest.raises(PublishError, match="holds files that no push created") as error:
        push_data([phantoms(3)], "user/scans")
    for line in ("data/notes.csv (5 B)", "data/train-00000.parquet (4 B)", "README.md (6 B)"):
        assert f"  {line}\n" in str(error.value)
    assert "LICENSE" not in str(error.value)
    assert "--replace" in str(error.value)
    assert hub.sent() == []
    push_data([phantoms(3)], "user/scans", "webdataset", replace=True)
    assert repo.files().keys() - {".gitattributes"} == {"README.md", "LICENSE", "data/train-00000.tar"}
    assert repo.files()["LICENSE"] == b"x"
    # Now they are our own, and need no flag.
    push_data([phantoms(4)], "user/scans", replace=False)
    assert repo.files().keys() - {".gitattributes"} == {"README.md", "LICENSE", "data/train-00000.parquet"}


def amended(hub, repo, **files):
    """Somebody commits files to a repo's main, as on the website."""
    head = repo.branches["main"]
    state = repo.commits[head]
    repo.branches["main"] = repo.add(type(state)({**state.files, **files}, "By hand", head, "user"))


def test_a_file_of_others_among_our_shards_and_an_edited_card_stop_it(hub):
    push_data([phantoms(3)], "user/scans")
    repo = hub.repo("user/scans", "dataset")
    amended(hub, repo, **{"data/masks.tar": b"7"})
    with pytest.raises(PublishError, match=r"(?s)no push created.*replace:\n  data/masks.tar \(1 B\)\nChoose"):
        push_data([phantoms(4)], "user/scans")
    push_data([phantoms(4)], "user/scans", replace=True)
    card = repo.files()["README.md"]
    amended(hub, repo, **{"README.md": card.replace(b"## Limits", b"## Limits\n\nMind the gap.\n")})
    with pytest.raises(PublishError, match=r"replace:\n  README.md \(written by a push, and edited since\)\nChoose"):
        push_data([phantoms(5)], "user/scans")
    assert b"Mind the gap" in repo.files()["README.md"]
    # Other line ends and blanks at the end, as editors leave them, are no edit.
    amended(hub, repo, **{"README.md": card + b"\n\n"})
    push_data([phantoms(5)], "user/scans")


def test_somebody_else_pushes_during_the_export(hub, monkeypatch):
    push_data([phantoms(3)], "user/scans")
    repo, export = hub.repo("user/scans", "dataset"), publish_data.export_data

    def meanwhile(*args, **kwargs):
        amended(hub, repo, **{"data/masks.tar": b"7"})
        return export(*args, **kwargs)

    monkeypatch.setattr(publish_data, "export_data", meanwhile)
    with pytest.raises(PublishError, match="no push created"):
        push_data([phantoms(4)], "user/scans")
    assert repo.files()["data/masks.tar"] == b"7"
    # Between the last look and the commit, only the commit's parent tells.
    monkeypatch.setattr(publish_data, "export_data", export)
    monkeypatch.setattr(publish_data, "_foreign", lambda remote: amended(hub, repo, NEWS=b"8") or [])
    with pytest.raises(PublishError, match=r"has pushed in the meantime. Look at .*/datasets/user/scans"):
        push_data([phantoms(4)], "user/scans")
    assert repo.files()["NEWS"] == b"8"


def test_sources_without_samples_replace_nothing(hub, tmp_path):
    push_data([phantoms(3)], "user/scans")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(ValueError, match="sources hold no samples"):
        push_data([source(kind="webdataset", files=[str(tmp_path / "empty.tar")])], "user/scans")
    assert "data/train-00000.parquet" in hub.repo("user/scans", "dataset").files()
