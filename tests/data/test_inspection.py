"""`medmoe data inspect`: the table of problems, the split, duplicates, and the contact sheet."""

import csv
import hashlib
import io
import json
import tarfile
from functools import partial

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data import inspection
from medmoe_hf.data.inspection import COLUMNS, inspect_sources
from medmoe_hf.data.sources import load_sources
from medmoe_hf.data.stream import SampleStream


def run(arguments):
    return CliRunner().invoke(app, ["data", "inspect", *map(str, arguments)])


def table(folder, rows, name="t.csv"):
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def picture(path, level):
    Image.new("L", (9, 7), level).save(path)


def listed(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def export(tmp_path):
    """40 pairs of 10 patients, three of them faulty, with `sources.yaml`."""
    rows = []
    for index in range(40):
        picture(tmp_path / f"{index}.png", index)
        rows.append(
            {
                "path": f"{index}.png",
                "caption": f"secret {index}",
                "modality": ["ct", "MR", "us"][index % 3],
                "patient": f"p{index % 10}",
            }
        )
    (tmp_path / "4.png").unlink()
    (tmp_path / "7.png").write_bytes((tmp_path / "8.png").read_bytes()[:50])
    rows[20]["caption"] = "n/a"
    rows[30]["modality"] = "banana"
    table(tmp_path, rows)
    (tmp_path / "sources.yaml").write_text(
        f"- {{kind: csv, files: ['{tmp_path}/t.csv'], modality: 'field:modality', subject: patient}}\n"
    )
    return rows


def test_every_problem_is_listed_with_row_path_field_and_reason(tmp_path, export):
    problems = tmp_path / "problems.csv"
    result = run([tmp_path / "sources.yaml", "--sheet", tmp_path / "s.png", "--problems", problems])
    assert result.exit_code == 1
    found = listed(problems)
    assert list(found[0]) == list(COLUMNS)
    assert [(one["row"], one["path"], one["field"], one["problem"]) for one in found] == [
        ("5", f"{tmp_path}/4.png", "path", "missing image"),
        ("8", f"{tmp_path}/7.png", "path", "unreadable image"),
        ("21", f"{tmp_path}/20.png", "caption", "empty caption"),
        ("31", f"{tmp_path}/30.png", "modality", "unknown modality name"),
    ]
    assert {one["source"] for one in found} == {one["file"] for one in found} == {f"{tmp_path}/t.csv"}
    reasons = ["does not exist", "truncated", "empty", "use xray, ct"]
    assert all(reason in one["reason"] for reason, one in zip(reasons, found, strict=True))
    assert "secret" not in problems.read_text()
    assert "banana" not in problems.read_text()
    lines = [line for line in result.output.splitlines() if line.startswith("  PROBLEM")]
    assert len(lines) == 4
    assert any(f"1 missing image ({tmp_path}/4.png): the file does not exist" in line for line in lines)
    assert "(of 36 read)" in result.output


def test_a_table_of_problems_names_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"garbage" * 300)
    (tmp_path / "s.yaml").write_text(
        f"- {{kind: webdataset, files: ['{tmp_path}/none*.tar']}}\n"
        f"- {{kind: webdataset, files: ['{tmp_path}/cut.tar']}}\n"
    )
    inspect_sources(load_sources(tmp_path / "s.yaml"), problems=tmp_path / "p.csv")
    assert [(one["path"], one["row"], one["problem"]) for one in listed(tmp_path / "p.csv")] == [
        ("", "", "unreadable source"),
        (f"{tmp_path}/cut.tar", "", "unreadable shard"),
    ]


def test_a_missing_folder_for_the_table_is_reported_before_reading(tmp_path, export):
    result = run([tmp_path / "sources.yaml", "--problems", tmp_path / "none" / "p.csv"])
    assert result.exit_code == 1
    assert "The folder of" in result.output + str(result.exception)


def test_counts_of_the_split_match_training(tmp_path, export):
    share = 0.4
    export[32]["path"] = "2.png"  # another pair of the same patient and modality
    table(tmp_path, export)
    usable = [row for index, row in enumerate(export) if index not in (4, 7, 20, 30)]
    names = {"ct": "ct", "MR": "mri", "us": "ultrasound"}

    def held_out(subject):
        return int.from_bytes(hashlib.blake2b(subject.encode(), digest_size=8).digest(), "big") / 2**64 < share

    (report,) = inspect_sources(load_sources(tmp_path / "sources.yaml"), validation_share=share)
    for title, wanted in (("training", False), ("validation", True)):
        rows = [row for row in usable if held_out(row["patient"]) == wanted]
        part = report.parts[title]
        for name, modality in names.items():
            own = [row for row in rows if row["modality"] == name]
            assert part.pairs[modality] == len(own)
            assert part.subjects[modality] == {row["patient"] for row in own}
            assert len(part.images[modality]) == len({row["path"] for row in own})
        subjects, images = (len({row[key] for row in rows}) for key in ("patient", "path"))
        assert f"{title:<20}{len(rows):>8}{subjects:>10}{images:>10}" in str(report)
        assert 0 < len(rows) < len(usable)
    parts = [problem.split(":")[0] for problem in report.problems]
    assert len(parts) == 4
    assert set(parts) <= {"training", "validation"}


def test_a_modality_missing_from_the_validation_set_is_reported(tmp_path):
    rows = []
    for index in range(20):
        picture(tmp_path / f"{index}.png", index)
        rows.append(
            {"path": f"{index}.png", "caption": "c", "modality": "us" if index == 0 else "ct", "patient": index}
        )
    rows[3]["patient"] = ""
    table(tmp_path, rows)
    (tmp_path / "s.yaml").write_text(f"- {{kind: csv, files: ['{tmp_path}/t.csv'], subject: patient}}\n")
    # Only one patient has an ultrasound, so that one of the sets lacks the modality, depending on the share.
    digest = int.from_bytes(hashlib.blake2b(b"0", digest_size=8).digest(), "big") / 2**64
    (report,) = inspect_sources(load_sources(tmp_path / "s.yaml"), validation_share=digest - 1e-9)
    assert "modalities missing from the validation set: ultrasound" in report.warnings
    assert "without a subject, split by image: 1 pair" in report.warnings


def test_duplicates_are_reported(tmp_path):
    for name, level in (("a", 1), ("b", 1), ("c", 2), ("d", 3)):
        picture(tmp_path / f"{name}.png", level)
    picture(tmp_path / "a.bmp", 1)  # the same pixels in another file format
    rows = [
        {"path": path, "caption": caption, "patient": patient}
        for path, caption, patient in [
            ("a.png", "one", "p1"),
            ("b.png", "one", "p1"),  # a duplicate
            ("a.bmp", "two", "p1"),  # a different caption
            ("c.png", "three", "p2"),
            ("c.png", "four", "p3"),  # with two patients
            ("d.png", "five", "p4"),
        ]
    ]
    table(tmp_path, rows)
    (tmp_path / "s.yaml").write_text(f"- {{kind: csv, files: ['{tmp_path}/t.csv'], subject: patient, modality: us}}\n")
    (report,) = inspect_sources(load_sources(tmp_path / "s.yaml"), problems=tmp_path / "p.csv")
    (warning,) = report.warnings
    assert warning == (
        f"images in several pairs: 2, in 5 pairs ({tmp_path}/a.png, {tmp_path}/c.png); "
        "duplicate pairs, with equal captions: 1"
    )
    assert report.problems == ["pairs whose image also belongs to another subject: 1"]
    assert [(one["row"], one["problem"], one["reason"]) for one in listed(tmp_path / "p.csv")] == [
        ("2", "duplicate pair", f"the same image as in row 1 ({tmp_path}/a.png)"),
        ("5", "image with two subjects", f"the same image as in row 4 ({tmp_path}/c.png)"),
    ]


def test_no_contact_sheet_without_images(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"image": f"{i}.png", "caption": "c"}) for i in range(3)))
    (tmp_path / "s.yaml").write_text(f"- {{kind: jsonl, files: ['{tmp_path}/t.jsonl']}}\n")
    result = run([tmp_path / "s.yaml", "--sheet", tmp_path / "sheet.png"])
    assert result.exit_code == 1
    assert not (tmp_path / "sheet.png").exists()
    assert "No contact sheet: no image could be read." in result.output
    assert result.output.count("missing image") == 1
    assert "PROBLEM     no sample can be read" in result.output


def test_images_of_16_bits_are_shown(tmp_path):
    ramp = np.linspace(1000, 9000, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text("path,caption\nx.png,c\n")
    (tmp_path / "s.yaml").write_text(f"- {{kind: csv, files: ['{tmp_path}/t.csv']}}\n")
    inspect_sources(load_sources(tmp_path / "s.yaml"), tmp_path / "sheet.png")
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))[14:126, 0:112, 0]
    assert shown[4].mean() < 25
    assert shown[-4].mean() > 230


def test_a_sorted_tar_is_warned_about(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SampleStream", partial(SampleStream, buffer=100))
    picture(tmp_path / "x.png", 1)
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "s.yaml").write_text(f"- {{kind: webdataset, files: ['{tmp_path}/a.tar']}}\n")
    warnings = []
    for order in (sorted, lambda labels: labels):
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index, label in enumerate(order([number % 2 for number in range(400)])):
                for extension, data in (("png", content), ("cls", str(label).encode()), ("txt", b"c")):
                    member = tarfile.TarInfo(f"{index:05d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        (report,) = inspect_sources(load_sources(tmp_path / "s.yaml"), samples=5)
        warnings += report.warnings
    (warning,) = warnings
    assert "the first 100 samples are not like the rest: modality" in warning
