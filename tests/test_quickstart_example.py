"""The files that the quickstart begins with."""

import csv
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from medmoe_hf.data.sources import TableSource, WebDatasetSource
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.model.modalities_medmoe import MODALITIES

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARD = {"name": "scans", "modality": ["dicom", "caption"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from experiments.quickstart_data import write_scans, write_tiles
    write_scans(folder)
    write_tiles(folder)
    return folder


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_shard_holds_every_scan_with_its_report_and_modality(files):
    scans = table(files / "scans.csv")
    assert {scan["modality"] for scan in scans} == {"ct", "mri", "ultrasound", "histopathology", "fundus"}
    source = WebDatasetSource(kind="webdataset", files=[str(files / "shards" / "*.tar")], **SHARD)
    stream = SampleStream([source], max_bad_fraction=0.0)
    samples = list(stream)
    assert stream.faults.bad == 0
    assert sorted((s["caption"], MODALITIES[s["modality"]]) for s in samples) == sorted(
        (scan["report"], scan["modality"]) for scan in scans if not scan["path"].endswith(".nii.gz")
    )


def test_the_hospital_that_a_scan_names_is_covered(files):
    original = pydicom.dcmread(get_testdata_file("examples_jpeg2k.dcm")).pixel_array
    covered = pydicom.dcmread(files / "scans" / "ultrasound-node.dcm").pixel_array
    assert original[:104].any()
    assert not covered[:104].any()
    assert (covered[104:] == original[104:]).all()


def test_tiles_are_labelled_by_the_brown_stain_and_split_by_half_of_the_section(files):
    section = np.asarray(Image.open(files / "scans" / "histopathology.png").convert("RGB")).astype(float)
    for name, count, columns in (("reports.csv", 12, range(0, 257)), ("test.csv", 20, range(256, 513))):
        rows = table(files / name)
        assert [row["tissue"] for row in rows].count("glands") == [row["tissue"] for row in rows].count("stroma")
        assert len(rows) == 2 * count
        brown = {"glands": [], "stroma": []}
        for row in rows:
            y, x = map(int, Path(row["path"]).stem.split("-"))
            assert x in columns
            assert x + 80 in columns
            tile = np.asarray(Image.open(files / row["path"])).astype(float)
            assert (tile == section[y : y + 80, x : x + 80]).all()
            assert row["tissue"] in row["path"]
            # another measure of brown than that of the labels
            brown[row["tissue"]].append((tile[..., 0] - tile[..., 2]).mean())
        assert min(brown["glands"]) > max(brown["stroma"])


def test_the_table_is_a_source(files):
    columns = {"image": "path", "caption": "report", "modality": "field:modality"}
    source = TableSource(kind="csv", files=[str(files / "reports.csv")], **columns)
    samples = list(SampleStream([source], max_bad_fraction=0.0))
    assert len(samples) == 24
    assert {MODALITIES[sample["modality"]] for sample in samples} == {"histopathology"}
