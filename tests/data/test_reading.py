"""From a row to a sample or a fault: captions, labels, images, and the split before an image is read."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from pydantic import TypeAdapter

from medmoe_hf.data import reading
from medmoe_hf.data.captions import is_empty
from medmoe_hf.data.sources import Source
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import StreamError
from medmoe_hf.model import MedMoEImageProcessor

CASES = Path(__file__).parents[1] / "fixtures" / "cases"
SOURCE = TypeAdapter(Source)


def source(**fields):
    return SOURCE.validate_python(fields)


def case(number):
    (folder,) = CASES.glob(f"{number}-*")
    return folder


def picture(path, level=0):
    Image.new("L", (8, 8), level).save(path)


@pytest.fixture
def lines(tmp_path):
    """Writes a JSONL file and returns a stream of it that no fault stops; `x.png` exists."""
    picture(tmp_path / "x.png")

    def write(rows, stream=None, **fields):
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        made = source(kind="jsonl", files=[str(tmp_path / "t.jsonl")], name="t", **fields)
        return SampleStream([made], shuffle=False, **{"max_bad_fraction": 1.0} | (stream or {}))

    return write


class _Listing(SampleStream):
    def record_fault(self, fault):
        super().record_fault(fault)
        self.__dict__.setdefault("found", []).append(fault)


# Images


def test_exif_orientation_is_applied_as_by_the_image_processor():
    folder = case(11)
    table = source(kind="csv", files=[str(folder / "a.csv")])
    processor = MedMoEImageProcessor()
    stored = np.asarray(Image.open(folder / "a.jpg"))
    (sample,) = SampleStream([table])
    # Orientation 6: the first stored row is the right-hand column.
    assert np.array_equal(np.asarray(sample["image"]), np.rot90(stored, -1))
    (prepared,) = SampleStream([table], prepare=lambda image: processor(image)["pixel_values"][0])
    assert np.array_equal(prepared["image"], processor(str(folder / "a.jpg"))["pixel_values"][0])


def bomb():
    """A PNG whose header specifies 40000 x 40000 pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0), b"IDAT"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_invalid_images_are_counted_with_a_reason(lines, tmp_path, workers):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder").mkdir()
    wanted = {
        "https://example.org/x.png": ("image is a URL", "download the image"),
        "absent.png": ("missing image", "does not exist"),
        "pipe": ("image is not a file", "a device, pipe or socket"),
        "/dev/zero": ("image is not a file", "a device, pipe or socket"),
        "folder": ("image is not a file", "is a folder"),
        "bomb.png": ("too many pixels", "1600000000 pixels"),
        "text.png": ("unreadable image", "not DICOM, NIfTI or an image file"),
        "a\0b.png": ("image is not a path", "characters that are not allowed"),
    }
    rows = [{"image": str(tmp_path / path), "caption": "c"} for path in wanted]
    stream = lines([*rows, {"image": str(tmp_path / "x.png"), "caption": "good"}])
    stream = _Listing(stream.sources, shuffle=False, max_bad_fraction=1.0, num_workers=workers)
    assert [sample["caption"] for sample in stream] == ["good"]
    for fault, (path, (cause, reason)) in zip(stream.found, wanted.items(), strict=True):
        assert (fault.cause, fault.field) == (cause, "image"), path
        assert reason in fault.reason
        assert fault.path == str(tmp_path / path)
    assert [fault.row for fault in stream.found] == list(range(len(wanted)))


def test_a_url_relative_to_a_folder_is_not_a_missing_file(lines):
    stream = lines([{"image": "http://example.org/x.png", "caption": "c"}])
    with pytest.raises(StreamError, match="image is a URL"):
        list(stream)


class _Fails:
    def __call__(self, image):
        raise ZeroDivisionError("the text of a report")


class _Dies:
    def __call__(self, image):
        os._exit(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_exception_is_counted_or_raised(lines, monkeypatch, workers):
    rows = [{"image": "x.png", "caption": "c"}] * 3
    stream = {"prepare": _Fails(), "num_workers": workers}
    with pytest.raises(ZeroDivisionError):
        list(lines(rows, stream))
    monkeypatch.delenv(reading.STRICT)
    counted = lines(rows, stream)
    with pytest.raises(StreamError, match="No sample of the epoch") as error:
        list(counted)
    assert counted.faults.counts == {("t", "unexpected ZeroDivisionError"): 3}
    assert "ZeroDivisionError in test_reading.py, line" in str(error.value)
    assert "the text of a report" not in str(error.value)


def test_a_dead_reading_process_is_a_stream_error(lines):
    with pytest.raises(StreamError, match="A reading process died unexpectedly"):
        list(lines([{"image": "x.png", "caption": "c"}], {"prepare": _Dies(), "num_workers": 1}))


# Captions


def test_captions_that_are_not_text_are_faults():
    folder = case(12)
    stream = SampleStream([source(kind="jsonl", files=[str(folder / "nan.jsonl")], name="t")], max_bad_fraction=1.0)
    assert len(list(stream)) == 2
    assert stream.faults.counts == {("t", "empty caption"): 1}
    stream = SampleStream([source(kind="parquet", files=[str(folder / "list.parquet")], name="t")])
    with pytest.raises(StreamError, match=r"caption is not text.*one text is expected"):
        list(stream)


@pytest.mark.parametrize("value", [7, 2.5, True, ["a", "b"], {"text": "a"}])
def test_other_types_of_captions(lines, value):
    stream = lines([{"image": "x.png", "caption": value}, {"image": "x.png", "caption": "good"}])
    assert [sample["caption"] for sample in stream] == ["good"]
    assert stream.faults.counts == {("t", "caption is not text"): 1}


EMPTY = [
    None,
    float("nan"),
    "",
    "  ",
    "NaN",
    "nan",
    "-",
    "--",
    "n/a",
    "N/A",
    "NA",
    "none",
    "None",
    "NULL",
    "...",
    "<NA>",
]


def test_words_for_empty_cells_are_not_captions(lines):
    assert all(is_empty(value) for value in EMPTY)
    said = ["Normal.", "No finding", "0", "nan 1", "nonetheless", "正常", b"text", 0, 1.5, [], "null hypothesis"]
    assert not any(is_empty(value) for value in said)
    assert is_empty(b"nan")
    assert is_empty(np.float32("nan"))
    rows = [{"image": "x.png", "caption": value} for value in [*EMPTY, "good"]]
    stream = lines(rows)
    assert [sample["caption"] for sample in stream] == ["good"]
    assert stream.faults.counts == {("t", "empty caption"): len(EMPTY)}


def test_empty_sentences_are_never_chosen(lines):
    text = "_dr_".join(["n/a", "a retina", "nan", ""])
    assert {sample["caption"] for sample in lines([{"image": "x.png", "caption": text}] * 20, caption_rule="dr")} == {
        "a retina"
    }


def test_templates_omit_empty_cells(lines):
    rows = [
        {"image": "x.png", "organ": "liver", "side": "left"},
        {"image": "x.png", "organ": "liver", "side": None},
        {"image": "x.png", "organ": float("nan"), "side": "n/a"},
        {"image": "x.png", "organ": "liver"},
    ]
    stream = lines(rows, caption_template="{organ} {side}")
    assert [sample["caption"] for sample in stream] == ["liver left", "liver"]
    assert stream.faults.counts == {("t", "empty caption"): 1, ("t", "no field side"): 1}


def test_templates_of_tars_contain_text_not_bytes(tmp_path):
    import tarfile

    picture(tmp_path / "x.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in (("0.png", (tmp_path / "x.png").read_bytes()), ("0.label", b"cyst")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")], caption_template="a {label}")
    assert [sample["caption"] for sample in SampleStream([tars])] == ["a cyst"]


# Modalities


def test_labels_that_pandas_converted_to_floats():
    folder = case(16)
    tables = [
        source(kind=kind, files=[str(folder / f"a.{kind}")], modality="field:modality") for kind in ("parquet", "csv")
    ]
    found = [[sample["modality"] for sample in SampleStream([table], shuffle=False)] for table in tables]
    assert found == [[1, -100, 2], [1, -100]]


def test_an_empty_modality_is_unknown(lines):
    values = ["", None, "n/a", "-", "unknown", "CT", "XA", 3, "5.0"]
    rows = [{"image": "x.png", "caption": "c", "m": value} for value in [*values, "banana"]]
    stream = lines(rows, modality="field:m")
    assert [sample["modality"] for sample in stream] == [-100] * 5 + [1, 0, 3, 5]
    assert stream.faults.counts == {("t", "unknown modality name"): 1}


def test_a_list_of_modalities_is_tried_in_order(lines, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm"), tmp_path / "ct.dcm")
    rows = [
        {"image": "ct.dcm", "caption": "Frontal chest radiograph.", "modality": "us"},  # the header comes first
        {"image": "x.png", "caption": "Frontal chest radiograph.", "modality": "us"},
        {"image": "x.png", "caption": "Frontal chest radiograph.", "modality": ""},
        {"image": "x.png", "caption": "Frontal chest radiograph."},
        {"image": "x.png", "caption": "A nice picture.", "modality": None},
    ]
    stream = lines(rows, modality=["dicom", "field:modality", "caption"])
    assert [sample["modality"] for sample in stream] == [1, 3, 0, 0, -100]
    fixed = lines(rows, modality=["field:modality", "mri"])
    assert [sample["modality"] for sample in fixed] == [3, 3, 2, 2, 2]


# The split


def part_of(subject, share):
    """The documented rule: BLAKE2b of the text, as a fraction of 2^64."""
    digest = hashlib.blake2b(subject.encode(), digest_size=8, key=b"").digest()
    return "validation" if int.from_bytes(digest, "big") / 2**64 < share else "train"


def test_a_subject_decides_before_the_image_is_read(lines, tmp_path):
    rows = [{"image": f"{index}.png", "caption": f"{index}", "patient": f"p{index % 20}"} for index in range(100)]
    parts = [part_of(row["patient"], 0.3) for row in rows]
    assert 10 < parts.count("validation") < 60
    for index, part in enumerate(parts):
        if part == "train":
            picture(tmp_path / f"{index}.png", index)
    train = lines(rows, {"split": Split("train", 0.3)}, subject="patient")
    assert [sample["caption"] for sample in train] == [str(i) for i, part in enumerate(parts) if part == "train"]
    assert (train.faults.bad, str(train.faults)) == (0, f"training set: {parts.count('train')} samples, none skipped")
    held_out = lines(rows, {"split": Split("validation", 0.3), "max_bad_fraction": 0.1}, subject="patient")
    with pytest.raises(StreamError, match=r"^Of the validation set \d+ of \d+ samples are faulty"):
        list(held_out)
    assert held_out.faults.counts == {("t", "missing image"): parts.count("validation")}


@pytest.mark.parametrize("subject", [None, "patient"])
def test_each_fault_is_in_one_part_of_the_split(lines, tmp_path, subject):
    """Absent files, rows without an image and rows without a subject."""
    rows = []
    for index in range(60):
        picture(tmp_path / f"{index}.png", index)
        rows.append({"image": f"{index}.png", "caption": f"{index}", "patient": f"p{index % 20}"})
    for row in rows[:40:2]:
        (tmp_path / row["image"]).unlink()
    rows[41]["image"] = None
    rows[43]["caption"] = None
    rows[45]["patient"] = None
    found, faults = [], {}
    for part in ("train", "validation"):
        stream = lines(rows, {"split": Split(part, 0.4)}, subject=subject)
        found += [sample["caption"] for sample in stream]
        faults[part] = stream.faults.bad
    good = [str(index) for index in range(60) if index not in range(0, 40, 2) and index not in (41, 43)]
    assert sorted(found) == sorted(good)
    assert sum(faults.values()) == 22
    assert min(faults.values()) > 2


def test_numbers_of_subjects_are_normalized(tmp_path):
    for value in (7, 7.0, "7", " 7 ", "7.0", b"7"):
        assert reading.subject_of({"p": value}, "p") == "7", value
    assert reading.subject_of({"p": "7.5"}, "p") == "7.5"
    assert reading.subject_of({"p": "v1.0"}, "p") == "v1.0"
    assert [reading.subject_of({"p": value}, "p") for value in (None, float("nan"), "", "n/a")] == [None] * 4


def test_nibabel_images_are_split_by_content(tmp_path):
    pytest.importorskip("nibabel")
    shutil.copytree(case(17), tmp_path / "case")
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path / "case", check=True, capture_output=True)
    saved = source(kind="saved", path=str(tmp_path / "case" / "saved"))
    counts = [len(list(SampleStream([saved], split=Split(part, 0.5)))) for part in ("train", "validation")]
    assert sorted(counts) == [0, 3]  # three times the same volume


def test_nibabel_images_are_hashed():
    nibabel = pytest.importorskip("nibabel")
    volumes = [nibabel.Nifti1Image(np.full((2, 2, 2), level, np.int16), np.eye(4)) for level in range(40)]
    again = nibabel.Nifti1Image(np.full((2, 2, 2), 3, np.int16), np.eye(4))
    sides = [Split("train", 0.5).contains({}, None, volume) for volume in volumes]
    assert 5 < sum(sides) < 35
    assert Split("train", 0.5).contains({}, None, again) == sides[3]


# Rows


def test_a_damaged_parquet_file_is_counted(tmp_path):
    picture(tmp_path / "x.png")
    image = (tmp_path / "x.png").read_bytes()
    table = pyarrow.table(
        {"image": [{"bytes": image, "path": None}] * 4, "caption": [f"{i}" * 2000 for i in range(4)]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="snappy")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(2).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(content)
    files = source(kind="parquet", files=[str(tmp_path / "a.parquet")], name="p")
    stream = SampleStream([files], shuffle=False, max_bad_fraction=1.0)
    assert [sample["caption"][0] for sample in stream] == ["0", "1"]
    assert stream.faults.counts == {("p", "unreadable row"): 2}
