"""Streams: every sample once, in an order that does not depend on readers, exact resuming, all sources, and faults."""

import csv
import io
import json
import random
import tarfile
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from medmoe_hf.data import reading
from medmoe_hf.data.file_patterns import expand
from medmoe_hf.data.sources import Source, load_sources
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import StreamError

CASES = Path(__file__).parents[1] / "fixtures" / "cases"
SOURCE = TypeAdapter(Source)


def source(**fields):
    return SOURCE.validate_python(fields)


def picture(number, format="PNG", size=(16, 12)):
    """An image whose top left pixel is (number % 256, number // 256, 7)."""
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    pixels[:8, :8] = (number % 256, number // 256, 7)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_tar(path, samples, end=True):
    """Writes samples (bytes by extension) as a tar; `end=False` omits the final blocks of zeros."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        offset = archive.offset
    if not end:
        content = path.read_bytes()[:offset]
        path.write_bytes(content)
    return offset


def pairs(start, count, label=None):
    return [
        {"jpg": picture(number), "txt": f"caption {number}".encode()}
        | ({} if label is None else {"cls": str(label).encode()})
        for number in range(start, start + count)
    ]


@pytest.fixture
def shards(tmp_path):
    """Three shards: of 8 samples each (`equal`), or of 1, 17 and 6 (`unequal`)."""

    def write(kind):
        sizes, start, paths = {"equal": (8, 8, 8), "unequal": (1, 17, 6)}[kind], 0, []
        for index, size in enumerate(sizes):
            paths.append(tmp_path / f"{kind}-{index}.tar")
            write_tar(paths[-1], pairs(start, size))
            start += size
        return [str(path) for path in paths]

    return write


def captions(stream):
    return [sample["caption"] for sample in stream]


def number(sample):
    red, green, _ = sample["image"].getpixel((0, 0))
    return red + 256 * green


# Order


def two_sources(files, **options):
    first = source(kind="webdataset", files=files[:2], weight=3)
    second = source(kind="webdataset", files=files[2:], weight=1)
    return SampleStream([first, second], **{"seed": 5, "buffer": 4} | options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_every_sample_once_in_an_order_independent_of_readers(shards, kind, ranks, workers):
    files = shards(kind)
    alone = captions(two_sources(files))
    assert sorted(alone) == sorted(f"caption {index}" for index in range(24))
    parts = [captions(two_sources(files, rank=r, world_size=ranks, num_workers=workers)) for r in range(ranks)]
    assert all(part == alone[r::ranks] for r, part in enumerate(parts))


def test_the_order_is_a_function_of_seed_and_epoch(shards):
    files = shards("unequal")
    one, two, other = two_sources(files), two_sources(files), two_sources(files, seed=6)
    first, second = captions(one), captions(one)
    assert [captions(two), captions(two)] == [first, second]
    assert first != second
    assert sorted(first) == sorted(second)
    assert captions(other) not in (first, second)
    plain = [f"caption {index}" for index in range(24)]
    assert captions(SampleStream([source(kind="webdataset", files=files)], shuffle=False)) == plain


def test_image_caption_and_modality_belong_together(shards):
    for sample in two_sources(shards("unequal"), num_workers=2):
        assert f"caption {number(sample)}" == sample["caption"]
        assert sample["modality"] == -100


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_at_ten_positions_continues_the_sequence(shards, ranks, workers):
    files = shards("unequal")
    for rank in range(ranks):
        options = {"rank": rank, "world_size": ranks}
        whole = two_sources(files, **options)
        expected = captions(whole) + captions(whole)
        first = two_sources(files, **options, num_workers=workers)
        seen, states = [], []
        for _ in range(2):
            for sample in first:
                seen.append(sample["caption"])
                states.append(json.dumps(first.state_dict()))
        assert seen == expected
        for stop in random.Random(rank).sample(range(1, len(expected)), 10):
            # a different number of workers
            second = two_sources(files, **options, num_workers=2 - workers)
            second.load_state_dict(json.loads(states[stop - 1]))
            rest = captions(second)
            while stop + len(rest) < len(expected):
                rest += captions(second)
            assert expected[:stop] + rest == expected
            assert second.faults.good == len(expected)


def test_a_state_of_another_configuration_is_rejected(shards):
    files = shards("equal")
    state = two_sources(files).state_dict()
    for change in (
        {"seed": 6},
        {"buffer": 5},
        {"world_size": 2},
        {"mixing": "modality"},
        {"split": Split("train", 0.5)},
    ):
        with pytest.raises(StreamError, match="different sources, seed, mixing, split, rank or number of processes"):
            two_sources(files, **change).load_state_dict(state)
    with pytest.raises(StreamError, match="different sources"):
        two_sources(files[::-1]).load_state_dict(state)


def test_changed_data_are_rejected(tmp_path, table):
    fields = written_as("csv", table, tmp_path) | {"image": "path"}
    stream = SampleStream([source(**fields)])
    list(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    SampleStream([source(**fields)]).load_state_dict(state)
    written_as("csv", [*table, table[0]], tmp_path)
    with pytest.raises(StreamError, match="the files of the sources have changed"):
        SampleStream([source(**fields)]).load_state_dict(state)


def test_states_of_other_versions_are_rejected(shards):
    stream = two_sources(shards("equal"))
    before = {"fingerprint": "0123456789abcdef", "rank": 0, "epoch": 1, "next": 3, "reported": [], "faults": {}}
    with pytest.raises(StreamError, match="saved by another version of medmoe_hf"):
        stream.load_state_dict(before)


def test_default_names_of_sources(tmp_path):
    tars = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    (tmp_path / "x.png").write_bytes(picture(0))
    made = [
        source(kind="webdataset", files=tars[:1]),
        source(kind="webdataset", files=tars),
        source(kind="webdataset", files=tars[:1], name="mine"),
        source(kind="webdataset", files=tars[:1]),
        source(kind="phantom", seed=3),
        source(kind="imagefolder", path=str(tmp_path), caption_template="a scan"),
    ]
    names = [tars[0], f"{tars[0]} and 1 more", "mine", f"{tars[0]} (2)", "phantoms 3", str(tmp_path)]
    assert SampleStream(made).names == names


# Mixing


def test_weights_hold_when_sources_start_again(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 5))
    write_tar(tmp_path / "b.tar", pairs(100, 50))
    sources = [
        source(kind="webdataset", files=[str(tmp_path / "a.tar")], weight=3),
        source(kind="webdataset", files=[str(tmp_path / "b.tar")], weight=1),
    ]
    endless = iter(SampleStream(sources, once=False))
    counts = Counter(next(endless)["source"] for _ in range(2000))
    assert counts[0] / 2000 == pytest.approx(0.75, abs=0.03)


def test_modalities_are_equally_frequent(tmp_path):
    sources = [
        source(kind="phantom", image_size=48, modalities=["xray"], modality="xray"),
        source(kind="phantom", image_size=48, seed=1, modalities=["xray"], modality="xray", weight=3),
        source(kind="phantom", image_size=48, modalities=["ct"], modality="ct", weight=9),
    ]
    stream = iter(SampleStream(sources, mixing="modality"))
    counts = Counter(next(stream)["source"] for _ in range(1200))
    assert [counts[index] / 1200 for index in range(3)] == pytest.approx([0.125, 0.375, 0.5], abs=0.04)


def test_phantoms_are_not_shuffled():
    from medmoe_hf.data import phantom_sample

    stream = iter(SampleStream([source(kind="phantom", seed=3, image_size=48)]))
    for index in range(5):
        sample, drawn = next(stream), phantom_sample(3, index, image_size=48)
        assert (sample["caption"], sample["modality"]) == (drawn["caption"], drawn["modality"])
        assert sample["image"].tobytes() == drawn["image"].tobytes()


@pytest.fixture
def small(tmp_path):
    """The bytes of a small image, which also exists as `x.png`."""
    Image.new("L", (2, 2)).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def drawn(stream, count):
    """Shares of the modalities among the first samples of a stream."""
    found = Counter(sample["modality"] for sample in islice(stream, count))
    return {modality: number / count for modality, number in sorted(found.items())}


def test_aliases_of_a_modality_are_one_modality(monkeypatch):
    monkeypatch.chdir(next(CASES.glob("15-*")))
    stream = SampleStream(load_sources("sources.yaml"), mixing="modality", once=False, seed=1)
    assert drawn(stream, 2000) == pytest.approx({1: 0.5, 3: 0.5}, abs=0.04)


@pytest.mark.parametrize("way", ["field:kind", "caption", ["dicom", "field:kind"]])
@pytest.mark.parametrize("kind", ["csv", "parquet", "saved", "webdataset"])
def test_modalities_of_rows_are_equally_frequent(tmp_path, small, kind, way):
    """One source has nine CT per MRI, a second one only ultrasound."""
    rows = [("ct", "Axial CT.") if index % 10 else ("MR", "Brain MRI.") for index in range(200)]
    if kind == "webdataset":
        samples = [{"png": small, "txt": text.encode(), "kind": label.encode()} for label, text in rows]
        write_tar(tmp_path / "a.tar", samples[:120])
        write_tar(tmp_path / "b.tar", samples[120:])
        fields = {"kind": kind, "files": [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]}
    else:
        table = [{"path": "x.png", "caption": text, "kind": label} for label, text in rows]
        fields = written_as(kind, table, tmp_path) | {"image": "path"}
    ultrasound = source(
        kind="webdataset", files=[str(write_ultrasound(tmp_path, small))], modality="sonography", weight=5
    )
    sources = [source(**fields, modality=way), ultrasound]
    stream = SampleStream(sources, mixing="modality", once=False)
    assert drawn(stream, 900) == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, abs=0.06)
    every = SampleStream(sources, mixing="modality", buffer=50)
    assert Counter(sample["modality"] for sample in every) == {1: 180, 2: 20, 3: 30}
    # Until the smaller modalities are exhausted.
    first = SampleStream(sources, mixing="modality", buffer=50, seed=2)
    assert drawn(first, 45) == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, abs=0.2)
    counts = Counter()
    for rank in range(2):
        counts += Counter(
            sample["modality"] for sample in SampleStream(sources, mixing="modality", rank=rank, world_size=2)
        )
    assert counts == {1: 180, 2: 20, 3: 30}


def write_ultrasound(folder, small):
    write_tar(folder / "us.tar", [{"png": small, "txt": b"A scan."}] * 30)
    return folder / "us.tar"


def test_remaining_sources_take_over_the_share_of_an_exhausted_one(tmp_path, small):
    """Of two ultrasound sources, the one with the larger weight ends first: the other then provides all ultrasound."""
    table = [{"path": "x.png", "caption": "c"}]
    for name, count in (("a", 5), ("b", 400), ("c", 400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(small)
        written_as("csv", table * count, tmp_path / name)
    sources = [
        source(kind="csv", files=[str(tmp_path / name / "t.csv")], image="path", modality=modality, weight=weight)
        for name, modality, weight in (("a", "us", 9), ("b", "us", 1), ("c", "ct", 1))
    ]
    stream = SampleStream(sources, mixing="modality")
    assert drawn(stream, 600) == pytest.approx({1: 0.5, 3: 0.5}, abs=0.06)


# Sources of known length are fully shuffled


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved", "imagefolder"])
def test_a_table_sorted_by_class_is_not_read_in_class_order(tmp_path, small, kind):
    count = 1200
    if kind == "imagefolder":
        for index in range(count):
            label = "ct" if index < count // 2 else "mri"
            (tmp_path / "f" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "f" / label / f"{index}.png").write_bytes(small)
        made = source(kind=kind, path=str(tmp_path / "f"), caption_template="{label}", modality="field:label")
    else:
        rows = [
            {"path": "x.png", "caption": f"{index}", "kind": ["ct", "mri"][index // (count // 2)]}
            for index in range(count)
        ]
        made = source(**written_as(kind, rows, tmp_path), image="path", modality="field:kind")
    stream = SampleStream([made], buffer=10)
    assert stream.order_warnings() == []
    assert drawn(stream, 200) == pytest.approx({1: 0.5, 2: 0.5}, abs=0.12)
    again = [sample["row"] for sample in SampleStream([made], buffer=99)]
    assert sorted(again) == list(range(count))
    # As in a random order, successive rows are on average a third of the length apart in the file.
    assert np.abs(np.diff(again)).mean() == pytest.approx(count / 3, rel=0.1)


def test_files_of_one_source_are_shuffled_together(tmp_path, small):
    for number, label in enumerate(("ct", "mri", "us")):
        (tmp_path / f"{number}.csv").write_text("path,caption,kind\n" + f"x.png,c,{label}\n" * 300)
    made = source(kind="csv", files=[str(tmp_path / f"{number}.csv") for number in range(3)], modality="field:kind")
    assert drawn(SampleStream([made]), 300) == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, abs=0.1)
    seen = Counter((sample["shard"], sample["row"]) for sample in SampleStream([made]))
    assert seen == Counter({(shard, row): 1 for shard in range(3) for row in range(300)})


def test_resuming_in_a_table_continues_the_sequence(tmp_path, small):
    rows = [{"path": "x.png", "caption": f"{index}", "kind": ["ct", "mri"][index % 5 == 0]} for index in range(60)]
    made = source(**written_as("csv", rows, tmp_path), image="path", modality="field:kind")
    for mixing in ("weight", "modality"):
        whole = SampleStream([made], mixing=mixing)
        expected = captions(whole) + captions(whole)
        assert expected[:60] != expected[60:]
        for stop in (1, 17, 60, 61, 100):
            first, seen = SampleStream([made], mixing=mixing), []
            while len(seen) < stop:
                for sample in first:
                    seen.append(sample["caption"])
                    if len(seen) == stop:
                        break
            state = json.loads(json.dumps(first.state_dict()))
            second = SampleStream([made], mixing=mixing)
            second.load_state_dict(state)
            rest = captions(second)
            rest += captions(second) if len(seen) + len(rest) < 120 else []
            assert seen + rest == expected


class _Long:
    """A shard of ten million rows."""

    name = "long"

    def __len__(self):
        return 10**7

    def fields(self):
        return ["image", "caption"]

    def locate(self, row):
        return row


def test_ten_million_rows_are_shuffled_in_bounded_memory(tmp_path, small, monkeypatch):
    made = source(kind="csv", files=[str(tmp_path / "t.csv")])
    monkeypatch.setattr(type(made), "shards", lambda self: [_Long()])
    stream = SampleStream([made])
    tracemalloc.start()
    try:
        rows = [index.row for index in islice(stream._sample_order(), 100_000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(rows)) == 100_000
    assert np.mean(rows) == pytest.approx(5e6, rel=0.02)
    assert peak < 100e6


# Tars are shuffled within a buffer, with a warning if it is insufficient


def sorted_tars(folder, small, labels, per_shard=50):
    for number, label in enumerate(labels):
        write_tar(
            folder / f"s-{number:02d}.tar", [{"png": small, "txt": b"c", "cls": str(label).encode()}] * per_shard
        )
    return {"kind": "webdataset", "files": [str(folder / f"s-{number:02d}.tar") for number in range(len(labels))]}


def test_an_insufficient_buffer_is_warned_about(tmp_path, small):
    one = tmp_path / "one.tar"
    samples = [{"png": small, "txt": b"c", "cls": b"0123"[index // 100 :][:1]} for index in range(400)]
    write_tar(one, samples)
    big = source(kind="webdataset", files=[str(one)])
    (warning,) = SampleStream([big], buffer=100).order_warnings()
    assert warning.startswith(
        f"{one}: the first 100 samples are not like the rest: modality xray is 100% of them and "
    )
    assert "about 25% of all. Tars are shuffled only within `shuffle_buffer` 100" in warning
    assert SampleStream([big], buffer=400).order_warnings() == []
    assert SampleStream([big], buffer=100, mixing="modality").order_warnings() == []
    # With one class per shard, shuffling shards suffices for many shards, but not for two.
    many = source(**sorted_tars(tmp_path, small, [0, 1] * 10))
    assert SampleStream([many], buffer=500).order_warnings() == []
    assert len(SampleStream([many], buffer=50).order_warnings()) == 1


def test_order_warnings_by_label(tmp_path, small):
    samples = [{"png": small, "label": [b"cyst", b"normal"][index // 150]} for index in range(300)]
    write_tar(tmp_path / "a.tar", samples)
    made = source(kind="webdataset", files=[str(tmp_path / "a.tar")], caption_template="a {label}", modality="us")
    (warning,) = SampleStream([made], buffer=100).order_warnings()
    assert "`label` cyst is 100% of them and about 50% of all" in warning
    random.Random(0).shuffle(samples)
    write_tar(tmp_path / "a.tar", samples)
    assert SampleStream([made], buffer=100).order_warnings() == []


def test_unshuffled_tables_are_warned_about(tmp_path, small):
    rows = [{"path": "x.png", "caption": "c", "kind": ["ct", "mri"][index // 1500]} for index in range(3000)]
    made = source(**written_as("csv", rows, tmp_path), image="path", modality="field:kind")
    (warning,) = SampleStream([made], shuffle=False, buffer=0).order_warnings()
    assert "modality ct is 100% of them and about 50% of all. The samples are not shuffled." in warning


# Kinds of sources


@pytest.fixture
def table(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(4):
        (tmp_path / "images" / f"{index}.png").write_bytes(picture(index))
        rows.append({"path": f"images/{index}.png", "report": f"report {index}", "kind": ["CXR", "ct"][index % 2]})
    return rows


def written_as(kind, rows, folder):
    if kind == "csv":
        with open(folder / "t.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return {"kind": "csv", "files": [str(folder / "t.csv")]}
    if kind == "jsonl":
        (folder / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return {"kind": "jsonl", "files": [str(folder / "t.jsonl")]}
    decoded = [{**row, "path": {"bytes": (folder / row["path"]).read_bytes(), "path": None}} for row in rows]
    dataset = datasets.Dataset.from_list(decoded).cast_column("path", datasets.Image())
    if kind == "parquet":
        dataset.to_parquet(folder / "t.parquet", batch_size=3)
        return {"kind": "parquet", "files": [str(folder / "t.parquet")]}
    dataset.save_to_disk(folder / "saved")
    return {"kind": "saved", "path": str(folder / "saved")}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved"])
def test_tables_and_datasets(tmp_path, table, kind, workers):
    fields = written_as(kind, table, tmp_path) | {"image": "path", "modality": "field:kind"}
    samples = list(SampleStream([source(**fields)], seed=1, num_workers=workers))
    assert sorted(number(sample) for sample in samples) == [0, 1, 2, 3]
    for sample in samples:
        assert sample["caption"] == f"report {number(sample)}"
        assert sample["modality"] == number(sample) % 2


def test_a_folder_per_label_with_a_template(tmp_path):
    for index, label in enumerate(("benign", "malignant")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(picture(index))
    folder = source(kind="imagefolder", path=str(tmp_path), caption_template="a {label} lesion", modality="us")
    found = {(sample["caption"], number(sample), sample["modality"]) for sample in SampleStream([folder])}
    assert found == {("a benign lesion", 0, 3), ("a malignant lesion", 1, 3)}


def test_labels_from_captions(tmp_path):
    texts = ["Axial CT of the abdomen.", "Frontal chest radiograph.", "A nice picture."]
    write_tar(tmp_path / "a.tar", [{"png": picture(i), "txt": text.encode()} for i, text in enumerate(texts)])
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")], modality="caption")
    assert {number(s): s["modality"] for s in SampleStream([tars])} == {0: 1, 1: 0, 2: -100}


def test_patterns(tmp_path):
    for name in ("a-007.tar", "a-008.tar", "b.tar"):
        write_tar(tmp_path / name, pairs(0, 1))
    root = str(tmp_path)
    assert expand(f"{root}/a-{{006..008}}.tar") == [f"{root}/a-{n}.tar" for n in ("006", "007", "008")]
    assert expand(f"{root}/a-*.tar::{root}/{{b,c}}.tar") == [
        f"{root}/{name}.tar" for name in ("a-007", "a-008", "b", "c")
    ]
    with pytest.raises(FileNotFoundError, match=r"No file matches .*z\*\.tar"):
        expand(f"{root}/z*.tar")


def test_unknown_caption_rules_are_rejected():
    with pytest.raises(ValidationError, match="`caption_rule` must be one of plain"):
        source(kind="webdataset", files=["a.tar"], caption_rule="mimic")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("window", "shown"), [((40, 400), 128), ("lung", 236), (("lung", "bone", "brain"), (236, 77, 128))]
)
def test_dicom_in_tables_and_tars(tmp_path, window, shown, workers):
    """40 HU except in a frame: in the middle of its own window, near the top of the lung window."""
    pydicom = pytest.importorskip("pydicom")
    whole = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    stored = np.full((whole.Rows, whole.Columns), 40 - int(whole.RescaleIntercept), np.int16)
    stored[0] = 0
    whole.PixelData = stored.tobytes()
    whole.save_as(tmp_path / "x.dcm")
    write_tar(tmp_path / "a.tar", [{"dcm": (tmp_path / "x.dcm").read_bytes(), "txt": b"a scan"}])
    (tmp_path / "t.csv").write_text("path,report\nx.dcm,a scan\n")
    for fields in (
        {"kind": "webdataset", "files": [str(tmp_path / "a.tar")]},
        {"kind": "csv", "files": [str(tmp_path / "t.csv")]},
    ):
        (sample,) = SampleStream([source(**fields, modality="dicom", window=window)], num_workers=workers)
        assert (sample["caption"], sample["modality"]) == ("a scan", 1)
        assert sample["image"].getpixel((60, 60)) == shown


def test_unknown_windows_are_rejected():
    with pytest.raises(ValidationError, match="unknown `window` lungs; use lung, mediastinum"):
        source(kind="webdataset", files=["a.tar"], window="lungs")


# The split


def test_no_subject_is_in_both_parts_of_a_split(tmp_path, table):
    rows = [{**table[index % 4], "patient": f"p{index % 7}"} for index in range(28)]
    fields = written_as("csv", rows, tmp_path) | {"image": "path", "subject": "patient"}

    class Seen(Split):
        def contains(self, row, subject, content):
            chosen = super().contains(row, subject, content)
            if chosen:
                sides[self.part].add(row["patient"])
            return chosen

    sides = {"train": set(), "validation": set()}
    counts = {part: len(list(SampleStream([source(**fields)], split=Seen(part, 0.4)))) for part in sides}
    assert sum(counts.values()) == 28
    assert not sides["train"] & sides["validation"]
    assert sides["train"]
    assert sides["validation"]


def test_without_subjects_equal_images_stay_together(tmp_path):
    write_tar(tmp_path / "a.tar", [{"jpg": picture(i // 3), "txt": f"c{i}".encode()} for i in range(300)])
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")])
    parts = {
        part: Counter(number(sample) for sample in SampleStream([tars], split=Split(part, 0.3)))
        for part in ("train", "validation")
    }
    assert set(parts["train"]).isdisjoint(parts["validation"])
    assert set((parts["train"] + parts["validation"]).values()) == {3}
    assert len(parts["validation"]) / 100 == pytest.approx(0.3, abs=0.12)


# Faults are skipped and counted by cause


def bad_tar(path, name, good=30):
    """A shard with one sample per kind of fault inside shards."""
    samples = pairs(0, good)
    broken = {
        "unreadable image": {"jpg": picture(900, "JPEG")[:200], "txt": b"x"},
        "too many pixels": {"png": picture(901), "txt": b"x"},
        "empty caption": {"jpg": picture(902), "txt": b"  "},
        "unknown modality name": {"jpg": picture(903), "txt": b"x", "cls": b"17"},
        "unreadable DICOM or NIfTI": {"dcm": b"\0" * 128 + b"DICM" + b"\1\2\3", "txt": b"x"},
        "no caption field": {"jpg": picture(904)},
        "no image field": {"txt": b"x"},
        "caption is not UTF-8": {"jpg": picture(905), "txt": b"\xff\xfe"},
    }
    if name == "too many pixels":
        broken[name]["png"] = picture(901, size=(200, 200))
    write_tar(path, [*samples[:3], broken[name], *samples[3:]])
    return good


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "cause",
    [
        "unreadable image",
        "too many pixels",
        "empty caption",
        "unknown modality name",
        "unreadable DICOM or NIfTI",
        "no caption field",
        "no image field",
        "caption is not UTF-8",
    ],
)
def test_a_broken_sample_is_skipped_and_counted(tmp_path, monkeypatch, cause, workers):
    monkeypatch.setattr(reading, "MAX_PIXELS", 10_000)
    good = bad_tar(tmp_path / "a.tar", cause)
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")], name="mine")
    stream = SampleStream([tars], num_workers=workers)
    assert sorted(number(sample) for sample in stream) == list(range(good))
    assert dict(stream.faults.counts) == {("mine", cause): 1}
    assert dict(stream.faults.files) == {str(tmp_path / "a.tar"): 1}
    total, line = str(stream.faults).splitlines()
    assert total == "30 samples, 1 skipped"
    assert line.startswith(f"  mine: 1 {cause} ({tmp_path}/a.tar/000003)")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_shards(tmp_path, ranks, workers):
    """Truncated inside a sample, truncated between two, empty, garbage, and missing."""
    cut = tmp_path / "cut.tar"
    end = write_tar(cut, pairs(0, 6))
    cut.write_bytes(cut.read_bytes()[: end - 1536])
    write_tar(tmp_path / "between.tar", pairs(10, 3), end=False)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    write_tar(tmp_path / "whole.tar", pairs(20, 30))
    names = ("cut", "between", "empty", "garbage", "gone", "whole")
    tars = source(kind="webdataset", files=[str(tmp_path / f"{name}.tar") for name in names], name="t")
    counts, found = Counter(), []
    for rank in range(ranks):
        stream = SampleStream([tars], rank=rank, world_size=ranks, num_workers=workers, max_bad_fraction=1)
        found += [number(sample) for sample in stream]
        counts += stream.faults.counts
    assert sorted(found) == [*range(5), *range(10, 13), *range(20, 50)]
    assert counts == {
        ("t", "truncated shard"): 2,
        ("t", "empty shard"): 1,
        ("t", "unreadable shard"): 1,
        ("t", "missing shard"): 1,
    }


def test_a_shard_that_is_deleted_during_an_epoch(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 20))
    write_tar(tmp_path / "b.tar", pairs(100, 20))
    tars = source(kind="webdataset", files=[str(tmp_path / f"{name}.tar") for name in "ab"], name="t")
    stream = SampleStream([tars], shuffle=False, max_bad_fraction=1)
    found = []
    for sample in stream:
        found.append(number(sample))
        if len(found) == 24:  # three chunks have been read, including four samples of the second shard
            (tmp_path / "b.tar").unlink()
    assert found == [*range(20), *range(100, 104)]
    assert stream.faults.counts == {("t", "missing shard"): 16}


def test_a_missing_image_is_not_a_missing_table(tmp_path, table):
    fields = written_as("csv", [*table, {**table[0], "path": "images/none.png"}], tmp_path) | {"image": "path"}
    stream = SampleStream([source(**fields, name="t", modality="field:kind")], max_bad_fraction=1)
    assert len(list(stream)) == 4
    assert stream.faults.counts == {("t", "missing image"): 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_limit_the_stream_stops_and_lists_the_worst_files(tmp_path, workers):
    samples = pairs(0, 300)
    for index in range(0, 300, 10):
        samples[index]["jpg"] = b"no picture"
    write_tar(tmp_path / "a.tar", samples)
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")])
    stream = SampleStream([tars], max_bad_fraction=0.05, num_workers=workers)
    with pytest.raises(
        StreamError, match=r"faulty, more than `max_bad_fraction` 0\.05 allows:\n.*unreadable image"
    ) as e:
        list(stream)
    assert str(tmp_path / "a.tar") in str(e.value)
    assert 80 <= stream.faults.good <= 105
    patient = SampleStream([tars], max_bad_fraction=0.2)
    assert len(list(patient)) == 270


def test_faults_are_counted_once_per_sample(tmp_path, table):
    rows = [{**row, "path": f"absent/{index}.png"} if index < 3 else row for index, row in enumerate(table * 5)]
    fields = written_as("csv", rows, tmp_path) | {"image": "path", "modality": "field:kind", "name": "t"}
    stream = SampleStream([source(**fields)], max_bad_fraction=0.5)
    for _ in range(4):
        assert len(list(stream)) == 17
    again = SampleStream([source(**fields)], max_bad_fraction=0.5)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for one in (stream, again):
        assert len(list(one)) == 17
        assert (one.faults.bad, one.faults.good, one.faults.skipped) == (3, 85, 15)
        total, line = str(one.faults).splitlines()
        assert total == "85 samples, 3 skipped"
        assert line.startswith("  t: 3 missing image (")
        assert line.endswith("): the file does not exist")
        assert {f"{tmp_path}/absent/{index}.png" in line for index in range(3)} == {True}
        assert one.faults.files == {f"{tmp_path}/absent/{index}.png": 1 for index in range(3)}


def test_an_unmounted_disk_stops_the_run_in_any_epoch(tmp_path, small):
    rows = [{"path": "x.png", "caption": f"{index}"} for index in range(300)]
    stream = SampleStream([source(**written_as("csv", rows, tmp_path), image="path")])
    assert len(list(stream)) == 300
    (tmp_path / "x.png").unlink()
    with pytest.raises(StreamError, match=r"\d+ of \d+ samples are faulty"):
        list(stream)
    assert stream.faults.skipped < 30


def test_a_caption_that_does_not_match_its_rule(tmp_path):
    samples = [{"jpg": picture(0), "txt": b"a_dr_b_dr_"}, {"jpg": picture(1), "txt": b"no tag"}]
    write_tar(tmp_path / "a.tar", samples)
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")], name="t", caption_rule="dr")
    stream = SampleStream([tars], max_bad_fraction=1)
    assert [number(sample) for sample in stream] == [0]
    assert stream.faults.counts == {("t", "caption does not match its rule"): 1}


def test_an_epoch_without_readable_samples_is_an_error(tmp_path):
    (tmp_path / "empty.tar").touch()
    tars = source(kind="webdataset", files=[str(tmp_path / "empty.tar")])
    for once in (True, False):
        with pytest.raises(StreamError, match=r"No sample of the epoch could be read: .*\n.*1 empty shard"):
            list(SampleStream([tars], max_bad_fraction=1, once=once))


def test_jpegs_can_be_decoded_at_a_reduced_scale(tmp_path):
    noise = np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).resize((512, 512))
    )
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    write_tar(tmp_path / "a.tar", [{"jpg": buffer.getvalue(), "txt": b"x"}])
    tars = source(kind="webdataset", files=[str(tmp_path / "a.tar")])
    whole = next(iter(SampleStream([tars])))["image"]
    small = next(iter(SampleStream([tars], draft=200)))["image"]
    assert (whole.size, small.size) == ((512, 512), (256, 256))
    wanted, found = (np.asarray(image.resize((200, 200), Image.Resampling.BICUBIC), float) for image in (whole, small))
    assert np.abs(wanted - found).mean() < 1.5
    assert next(iter(SampleStream([tars], draft=300)))["image"].size == (512, 512)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("glioma", "glioma"),
        (b"glioma", "glioma"),
        (3, 3),
        (np.int64(3), 3),
        (["effusion", "cardiomegaly"], "cardiomegaly, effusion"),
        ("n/a", None),
        (float("nan"), None),
        ({"bytes": b"a mask", "path": None}, None),
        (b"\x89PNG", None),
        (Image.new("L", (2, 2)), None),
        ([[0, 1], [1, 0]], None),
    ],
)
def test_a_label_is_text_or_a_number(value, label):
    assert reading.label_of({"label": value, "other": "x"}, None) == label
    assert reading.label_of({"other": value, "label": "x"}, "other") == label
    assert reading.label_of({}, None) is None
