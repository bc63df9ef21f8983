"""Sources: the provided YAML files, tables, tars, folders, patterns, inspection, overlap and checksums."""

import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data import write_webdataset
from medmoe_hf.data.file_patterns import expand
from medmoe_hf.data.inspection import inspect_sources
from medmoe_hf.data.sources import TableSource, load_sources
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.data.tables import read_table
from medmoe_hf.errors import ConfigError, ShardError, SourceError
from medmoe_hf.training import TrainConfig

READY = Path(__file__).parents[2] / "examples" / "sources"
CASES = Path(__file__).parents[1] / "fixtures" / "cases"
run = CliRunner().invoke


def joined(tag, items):
    return "".join(f"{item}_{tag}_" for item in items)


def items(prefix, count):
    return [f"{prefix} {index}." for index in range(count)]


# source -> (text in the shard, captions that may come of it, modality id)
LAYOUTS = {
    "radimagenet": (joined("radimagenet", items("A CT slice", 10)), items("A CT slice", 10), 1),
    "chexpert": (joined("chexpert", items("view", 10)), items("view", 10), 0),
    "chestxray8": (joined("chestxray8", items("film", 10)), items("film", 10), 0),
    "openi": (joined("openi", ["The report.", *items("template", 3)]), ["The report."], 0),
    "mimiccxr": (joined("mimiccxr", [*items("template", 10), "", "The report."]), ["The report."], 0),
    "retina_merged": (joined("all_retina_merged", items("retina", 11)), items("retina", 10), 5),
    "dr": (joined("dr", items("eye", 15)), items("eye", 15), 5),
    "medicat": (joined("medicat", ["Figure one.", "nothingpresent"]), ["Figure one."], -100),
    "quilt": ("Nuclei in a row.", ["Nuclei in a row."], 4),
    "retina": ("An eye.", ["An eye."], 5),
    "pmc_oa": ("Figure 2.", ["Figure 2."], -100),
    "roco": ("Axial CT of the abdomen.", ["Axial CT of the abdomen."], 1),
    "llava_med": ("Something.", ["Something."], -100),
}


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for index, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_the_thirteen_sources_of_unimed(tmp_path, monkeypatch):
    """PNG bytes in files that are named jpg, as in the real shards."""
    for number, (name, (text, _, _)) in enumerate(LAYOUTS.items()):
        write(tmp_path / name / "dataset-000000.tar", [{"jpg": png(number), "txt": text.encode()}] * 40)
    monkeypatch.setenv("UNIMED", str(tmp_path))
    sources = load_sources(READY / "unimed.yaml")
    assert [source.name for source in sources] == list(LAYOUTS)
    stream = SampleStream(sources)
    found = {name: Counter() for name in LAYOUTS}
    for sample in stream:
        name = sources[sample["source"]].name
        found[name][sample["caption"]] += 1
        assert sample["image"].getpixel((0, 0))[0] == list(LAYOUTS).index(name)
        assert sample["modality"] == LAYOUTS[name][2], name
    assert not stream.faults.counts
    for name, (_, captions, _) in LAYOUTS.items():
        assert sum(found[name].values()) == 40
        assert set(found[name]) <= set(captions), name
        # Forty draws from ten equally likely captions miss hardly any.
        assert len(found[name]) >= 0.7 * len(captions), name


def test_inspection_reports_a_missing_caption_rule(tmp_path):
    write(tmp_path / "a.tar", [{"jpg": png(1), "txt": LAYOUTS["dr"][0].encode()}])
    sources = load_sources_of(f"- {{kind: webdataset, files: ['{tmp_path}/a.tar']}}", tmp_path)
    assert inspect_sources(sources)[0].problems == [
        "captions contain the tag of another rule; specify `caption_rule: dr`"
    ]


def test_the_official_shards(tmp_path, monkeypatch):
    write(tmp_path / "a.tar", [{"jpg": png(k), "txt": f"c{k}".encode(), "cls": str(k).encode()} for k in range(6)])
    monkeypatch.setenv("MEDMOE", str(tmp_path))
    found = {sample["caption"]: sample["modality"] for sample in SampleStream(load_sources(READY / "official.yaml"))}
    assert found == {f"c{k}": k for k in range(6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {kind: webdataset, fles: [a]}", r"0\.fles: unknown key\. Did you mean `files`"),
        ("- {kind: webdataset, files: [a], weight: 0}", r"0\.weight: .*greater than 0.*got 0"),
        ("- {kind: tar, files: [a]}", "'phantom', 'webdataset'"),
        ("kind: phantom", "must contain a list of sources"),
        ("- [", "no valid YAML"),
        (None, "Cannot read"),
    ],
)
def test_wrong_files_are_explained(tmp_path, content, message):
    path = tmp_path / "sources.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SourceError, match=message):
        load_sources(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "- {kind: webdataset, files: [a], root: b}",
            r"0\.root: unknown key\. It belongs where `kind` is `csv` or `jsonl`",
        ),
        ("- {kind: csvs, files: [a]}", r"0\.kind: must be one of .*'jsonl'.* \(got 'csvs'\)\. Did you mean `csv`\?"),
        ("- {files: [a]}", r"0\.kind: missing"),
        ("- {kind: csv, files: [a], weight: .inf}", r"0\.weight: .*finite"),
        ("- {kind: csv, files: [a], encoding: cp12520}", "unknown `encoding` cp12520"),
        ("- {kind: jsonl, files: [a], delimiter: ';'}", "`delimiter` applies to CSV only"),
        ("- {kind: csv, files: [a], caption_template: 'a {} b'}", "`caption_template`: `{}` names no field"),
        ("- {kind: csv, files: [a], caption_template: 'a {b'}", "`caption_template`: expected '}'"),
        ("- {kind: csv, files: [a], caption_rule: none}", r"  0: `caption_rule` must be one of [\w, ]+ or auto$"),
    ],
)
def test_wrong_sources_are_explained_briefly(tmp_path, content, message):
    path = tmp_path / "sources.yaml"
    path.write_text(content)
    with pytest.raises(SourceError, match=message) as error:
        load_sources(path)
    assert "Value error" not in str(error.value)


def test_the_section_of_a_misplaced_key_is_suggested():
    """Case 24."""
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_yaml(CASES / "24-unknown-key-that-suggests-itself" / "run.yaml")
    assert str(error.value).endswith("cannot be used:\n  num_workers: unknown key. It belongs under `data`.")


def test_a_contradictory_configuration_is_reported_in_one_line(tmp_path):
    content = {"output_dir": "x", "model": {"preset": "tiny"}, "data": {"train": {"kind": "phantom"}}, "max_steps": 1}
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict({**content, "batch_size": 1})
    assert str(error.value) == (
        "the configuration cannot be used:\n"
        "  a pair needs another one to be contrasted with: set `batch_size` to 2 or more"
    )
    # a source or a list: only errors of the intended form are reported
    with pytest.raises(ConfigError) as error:
        TrainConfig.from_dict({**content, "data": {"train": {"kind": "csv", "fils": ["a"]}}})
    assert str(error.value).split("\n")[1:] == [
        "  data.train.files: missing; it is needed.",
        "  data.train.fils: unknown key. Did you mean `files`?",
    ]


# Missing fields are reported before anything is read


def table(tmp_path, text, name="a.csv", encoding="utf-8"):
    (tmp_path / "x.png").write_bytes(png(9))
    (tmp_path / name).write_bytes(text.encode(encoding))
    return tmp_path / name


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved", "webdataset"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("image: Path", "no column `Path`; did you mean `path`? (`image`)"),
        ("caption: reports", "no column `reports`; did you mean `report`? (`caption`)"),
        ("subject: PATIENT", "no column `PATIENT`; did you mean `patient`? (`subject`)"),
        ("modality: 'field:device'", "no column `device` (`modality`)"),
        ("modality: [dicom, 'field:patent']", "no column `patent`; did you mean `patient`? (`modality`)"),
        ("caption_template: 'a {lable} of {patient}'", "no column `lable` (`caption_template`)"),
    ],
)
def test_missing_fields(tmp_path, kind, fields, message):
    import datasets

    row = {"path": "x.png", "report": "r", "patient": "p"}
    if kind == "csv":
        where = f"files: ['{table(tmp_path, 'path,report,patient' + chr(10) + 'x.png,r,p')}']"
    elif kind == "jsonl":
        where = f"files: ['{table(tmp_path, json.dumps(row), 'a.jsonl')}']"
    elif kind == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
        where = f"files: ['{tmp_path}/a.parquet']"
    elif kind == "saved":
        datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "a")
        where = f"path: '{tmp_path}/a'"
    else:
        write(tmp_path / "a.tar", [{"path": png(1), "report": b"r", "patient": b"p"}])
        where = f"files: ['{tmp_path}/none.tar', '{tmp_path}/a.tar']"
    text = f"- {{kind: {kind}, {where}, {fields}}}"
    with pytest.raises(SourceError) as error:
        SampleStream(load_sources_of(text, tmp_path))
    assert message in str(error.value)
    assert str(error.value).endswith("The columns are: path, report, patient.")
    assert str(tmp_path / "a") in str(error.value)
    result = run(app, ["data", "inspect", str(tmp_path / "s.yaml"), "--sheet", str(tmp_path / "sheet.png")])
    assert (result.exit_code, message in result.output) == (1, True)


def test_fields_may_be_missing_in_some_samples(tmp_path):
    """One row of a JSONL file, or one of the tars, suffices; without a name, one of the defaults."""
    path = table(tmp_path, '{"image": "x.png", "text": "a"}\n{"path": "x.png", "text": "b", "site": 1}', "a.jsonl")
    sources = load_sources_of(f"- {{kind: jsonl, files: ['{path}'], modality: ['field:site']}}", tmp_path)
    assert [sample["caption"] for sample in SampleStream(sources, shuffle=False)] == ["a", "b"]
    write(tmp_path / "1.tar", [{"jpg": png(1), "txt": b"a"}])
    write(tmp_path / "2.tar", [{"jpg": png(1), "report": b"b"}])
    sources = load_sources_of(f"- {{kind: webdataset, files: ['{tmp_path}/*.tar'], caption: report}}", tmp_path)
    assert [sample["caption"] for sample in SampleStream(sources, max_bad_fraction=1)] == ["b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "picture,caption\nx.png,a",
            "no column for the image: specify it with `image`. The columns are: picture, caption.",
        ),
        ("image,finding\nx.png,a", "no column for the caption: specify it with `caption`"),
        ("image,caption\n", "has no samples"),
        ("image,caption,caption\nx.png,a,b", 'more than one column "caption"'),
    ],
)
def test_tables_that_cannot_be_used_as_a_source(tmp_path, text, message):
    path = table(tmp_path, text)
    with pytest.raises((SourceError, ShardError), match=message):
        SampleStream(load_sources_of(f"- {{kind: csv, files: ['{path}']}}", tmp_path))


# Tables as hospitals have them

GERMAN = "Röntgen Thorax in zwei Ebenen: Kein Erguss, Herzgröße normal; keine Stauung."
POLISH = "RTG klatki piersiowej: bez płynu w jamach opłucnowych, sylwetka serca w normie."
SPANISH = "Radiografía de tórax: sin derrame pleural, silueta cardíaca de tamaño normal."
RUSSIAN = "Рентгенография грудной клетки: выпота нет, сердце не увеличено."


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "utf-8"),
        (GERMAN, "utf-8-sig"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-16-le"),
        (GERMAN, "utf-16-be"),
        (GERMAN, "cp1252"),
        (SPANISH, "iso-8859-1"),
        (POLISH, "cp1250"),
        (RUSSIAN, "cp1251"),
    ],
)
def test_delimiter_and_encoding_are_detected(tmp_path, caplog, text, encoding, delimiter):
    """With decimal commas, and with the other delimiters in the reports."""
    rows = [
        ["image", "Größe" if "utf" in encoding else "size", "caption"],
        *[["x.png", f"{i},5", f"{text} {i}"] for i in range(9)],
    ]
    content = io.StringIO()
    csv.writer(content, delimiter=delimiter).writerows(rows)
    path = table(tmp_path, content.getvalue(), encoding=encoding)
    source = load_sources_of(f"- {{kind: csv, files: ['{path}']}}", tmp_path)[0]
    assert [list(row.values())[1:] for row in source.shards()[0].rows] == [row[1:] for row in rows[1:]]
    assert ("is not UTF-8 and was read as" in caplog.text) == ("utf" not in encoding)


def test_delimiter_and_encoding_can_be_specified(tmp_path, caplog):
    path = table(tmp_path, "image:caption\nx.png:größer, kleiner; gleich\n", encoding="cp850")
    text = f"- {{kind: csv, files: ['{path}'], delimiter: ':', encoding: cp850}}"
    assert [sample["caption"] for sample in SampleStream(load_sources_of(text, tmp_path))] == [
        "größer, kleiner; gleich"
    ]
    assert not caplog.text
    text = f"- {{kind: csv, files: ['{path}'], encoding: utf-8}}"
    with pytest.raises(ShardError, match=r"a\.csv is not text in utf-8"):
        SampleStream(load_sources_of(text, tmp_path))


def test_a_semicolon_in_reports_is_not_a_delimiter(tmp_path):
    """Nor is it in tables with one column."""
    path = table(tmp_path, 'image,caption\nx.png,"a; b; c"\nx.png,"d; e; f"\n')
    assert [row["caption"] for row in read_table(str(path))] == ["a; b; c", "d; e; f"]
    path = table(tmp_path, "image\nx;y.png\nx.png\n")
    assert read_table(str(path)) == [{"image": "x;y.png"}, {"image": "x.png"}]
    path = table(tmp_path, 'image, caption\nx.png, "a, b"\nx.png, c\n')
    assert read_table(str(path)) == [{"image": "x.png", "caption": "a, b"}, {"image": "x.png", "caption": "c"}]


def test_long_fields_and_the_limit_of_csv(tmp_path):
    """Case 20. The limit of csv is global and must be restored."""
    csv.field_size_limit(2**17)
    report = "word " * 40000
    path = table(tmp_path, f'image,caption\nx.png,"{report}"\nx.png,short\n')
    assert [row["caption"] for row in read_table(str(path))] == [report, "short"]
    assert csv.field_size_limit() == 2**17


def test_ambiguous_rows_are_counted(tmp_path):
    """An unquoted comma would truncate a report, an unclosed quotation mark would absorb the next rows."""
    lines = ["image,caption", "x.png,no effusion, no oedema", "x.png,good,", 'x.png,"a 5" tube"', "x.png"]
    lines += ['x.png,"open', 'x.png,"closed"', "", "x.png,last"]
    path = table(tmp_path, "\n".join(lines))
    source = load_sources_of(f"- {{kind: csv, files: ['{path}']}}", tmp_path)
    stream = SampleStream(source, shuffle=False, max_bad_fraction=1)
    assert [sample["caption"] for sample in stream] == ["good", 'a 5 tube"', "last"]
    counts = Counter({cause: count for (_, cause), count in stream.faults.counts.items()})
    assert counts["row with more cells than columns"] == 1
    assert counts["row with a misplaced quotation mark"] == 2
    assert sum(counts.values()) == 4  # including the row without a caption
    path = table(tmp_path, 'image,caption\nx.png,a\nx.png,"b\nx.png,c\n')
    with pytest.raises(
        ShardError, match=r"a\.csv cannot be read as a table: a quotation mark in line 3 or soon after is never closed"
    ):
        source[0].shards()


@pytest.mark.parametrize("root", [".", "a/b", "/", "./a", "a//b/"])
def test_image_paths_are_joined_as_by_pathlib(root):
    """The `key` of a sample is such a path, and must not change."""
    for path in (
        "x.png",
        "d/x.png",
        "./x.png",
        "../x.png",
        "/x.png",
        "d//x.png",
        "d/./x.png",
        "d/.x.png",
        "x/",
        ".x",
        "~x",
    ):
        rows = [{"image": path}]
        TableSource(kind="csv", files=["t.csv"])._join(rows, Path(root))
        assert rows == [{"image": str(Path(root) / path)}]
    rows = [{"image": "https://h/x.png"}]
    TableSource(kind="csv", files=["t.csv"])._join(rows, Path(root))
    assert rows == [{"image": "https://h/x.png"}]


def test_windows_paths_and_names_with_brackets(tmp_path):
    folder = tmp_path / "study [1] {a}"
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "1.png").write_bytes(png(1))
    path = table(folder, "image,caption\nimg\\1.png,a\n")
    for pattern in (str(path), f"{tmp_path}/study [1] {{a}}/*.csv".replace("{a}", "?a?")):
        assert expand(pattern) == [str(path)]
    (tmp_path / "study [1]").mkdir()
    path.rename(tmp_path / "study [1]" / "b.csv")
    path = tmp_path / "study [1]" / "b.csv"
    (tmp_path / "study 1").mkdir()
    table(tmp_path / "study 1", "image,caption")  # what the brackets would match as a pattern
    assert expand(f"{tmp_path}/study [1]/*.csv") == expand(f"{tmp_path}/study?[[]1]/b.csv") == [str(path)]
    for kind in ("csv", "jsonl"):
        if kind == "jsonl":
            path = table(tmp_path, json.dumps({"image": "img\\1.png", "caption": "a"}), "b.jsonl")
        source = load_sources_of(f"- {{kind: {kind}, files: ['{path}'], root: '{folder}'}}", tmp_path)
        assert [sample["image"].getpixel((0, 0)) for sample in SampleStream(source)] == [(1, 1, 1)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a{0..999999999}.tar", "matches 1000000000 files; at most 1000000"),
        ("{0..999}{0..999}{0..999}.tar", "matches 1000000000 files; at most 1000000"),
        ("{a,{b,c}}.tar", "nested or unbalanced braces"),
        ("{" * 100_000, "nested or unbalanced braces"),
        ("a{9..0}.tar", r"is a descending range; write \{0..9\}"),
    ],
)
def test_patterns_out_of_bounds(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        expand(pattern)
    assert len(str(error.value)) < 300


def test_the_image_field_of_jsonl_may_change_by_row(tmp_path):
    """Changing image keys, images in a dictionary, images that are not paths (case 13), lines that are not objects."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(png(3))
    rows = [{"caption": "a"}, {"file_name": "d/x.png", "caption": "b"}, {"image": {"path": "d/x.png"}, "caption": "c"}]
    rows += [{"image": ["x.png"], "caption": "d"}, {"image": 5, "caption": "e"}, {"path": "d/x.png", "caption": "f"}]
    path = table(tmp_path, "\n".join([*map(json.dumps, rows), "[1]", '{"image": "x', "[" * 100_000]), "a.jsonl")
    stream = SampleStream(
        load_sources_of(f"- {{kind: jsonl, files: ['{path}']}}", tmp_path), shuffle=False, max_bad_fraction=1
    )
    assert [sample["caption"] for sample in stream] == ["b", "c", "f"]
    assert stream.faults.bad == 6
    assert {cause: n for (_, cause), n in stream.faults.counts.items()}["row that is not a JSON object"] == 3


# Tars, parquet, folders


def members(path, *files):
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def served(path, tmp_path):
    stream = SampleStream(
        load_sources_of(f"- {{kind: webdataset, files: ['{path}']}}", tmp_path), shuffle=False, max_bad_fraction=1
    )
    return [(sample["caption"], sample["image"].getpixel((0, 0))[0]) for sample in stream], stream.faults.bad


@pytest.mark.parametrize(
    ("names", "pairs", "faults"),
    [
        # images first, then captions: no key occurs twice
        ("a1.jpg b2.jpg a1.txt b2.txt", "1 2", 0),
        # concatenated shards, adjacent or not, with the same or different extensions
        ("a1.jpg a1.txt b2.jpg b2.txt a3.png a3.txt", "1 2 3", 0),
        ("a1.png a1.txt b2.jpg b2.txt a3.jpg a3.txt", "1 2 3", 0),
        ("a1.jpg a1.txt a2.jpg a2.txt", "1 2", 0),
        ("a1.png a1.txt a2.jpg a2.txt", "1 2", 0),
        ("a1.txt a1.png a2.txt a2.jpg", "1 2", 0),
        # two images in a sample: the first default field, as without concatenation
        ("a1.jpg a8.png a1.txt", "1", 0),
        ("a1.jpg a8.png a1.txt a2.jpg a9.png a2.txt", "1 2", 0),
        # files were lost: counted, and not replaced by others
        ("a1.jpg b2.jpg b2.txt a3.jpg a3.txt", "2 3", 1),
        ("a1.jpg a1.txt b2.jpg b2.txt a3.txt", "1 2", 1),
        ("a1.png a1.txt b2.jpg b2.txt a3.jpg", "1 2", 1),
        ("a1.jpg a1.txt a2.png b3.jpg b3.txt a4.txt", "1 3", 1),
    ],
)
def test_images_and_captions_of_a_tar_belong_together(tmp_path, names, pairs, faults):
    """`a1.jpg` is image 1 with the key a, `a1.txt` its caption."""
    files = []
    for name in names.split():
        number, extension = name[1:].split(".")
        files.append((f"{name[0]}.{extension}", number.encode() if extension == "txt" else png(int(number))))
    members(tmp_path / "a.tar", *files)
    expected = [(number, int(number)) for number in pairs.split()]
    assert served(tmp_path / "a.tar", tmp_path) == (expected, faults)


def test_a_tar_of_two_concatenated_shards(tmp_path):
    """Case 14."""
    pairs, faults = served(CASES / "14-tar-keys-that-come-twice" / "a.tar", tmp_path)
    assert (sorted(pairs), faults) == ([("first", 10), ("second", 20), ("third", 30)], 0)


def test_a_parquet_file_that_is_overwritten(tmp_path):
    """Case 18: the new rows are read, also if there are more."""
    import datasets

    for texts in (["old"], ["new"], ["a", "b", "c"]):
        datasets.Dataset.from_dict({"image": [png(1)] * len(texts), "caption": texts}).to_parquet(
            tmp_path / "a.parquet"
        )
        source = load_sources_of(f"- {{kind: parquet, files: ['{tmp_path}/a.parquet']}}", tmp_path)
        assert [sample["caption"] for sample in SampleStream(source, shuffle=False)] == texts


def test_nifti_columns_can_be_split(tmp_path):
    """Case 17: by the bytes of the file, as in a table with the same files."""
    datasets = pytest.importorskip("datasets", minversion="4.4")
    nibabel = pytest.importorskip("nibabel")
    names = []
    for number in range(8):
        names.append(str(tmp_path / f"{number}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(np.full((6, 6, 1), number, np.float32), np.eye(4)), names[-1])
    data = datasets.Dataset.from_dict({"image": names, "caption": [f"c{number}" for number in range(8)]})
    data.cast_column("image", datasets.Nifti()).save_to_disk(tmp_path / "saved")
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(f"{name},c{i}" for i, name in enumerate(names)))
    found = []
    for text in (f"- {{kind: saved, path: '{tmp_path}/saved'}}", f"- {{kind: csv, files: ['{tmp_path}/t.csv']}}"):
        source = load_sources_of(text, tmp_path)
        parts = [SampleStream(source, shuffle=False, split=Split(part, 0.4)) for part in ("train", "validation")]
        found.append([[sample["caption"] for sample in part] for part in parts])
    assert found[0] == found[1]
    assert sorted(found[0][0] + found[0][1]) == [f"c{number}" for number in range(8)]
    assert all(found[0])


def test_real_world_folders_of_images(tmp_path, caplog):
    """Case 21: other files are skipped, links are followed, also circular ones; DICOM requires no suffix."""
    pydicom = pytest.importorskip("pydicom")
    root, elsewhere = tmp_path / "f", tmp_path / "real"
    for folder in (root / "cyst" / ".hidden", root / "cyst" / "@eaDir", elsewhere):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(1))
    for name in ("1.png", "2.PNG", "photo", "3.dat"):
        (root / "cyst" / name).write_bytes(png(2))
    for name in ("Thumbs.db", "desktop.ini", "readme.txt", "labels.csv", "IM0002"):
        (root / "cyst" / name).write_bytes(b"P5 some text, image,caption")
    dicom = Path(pydicom.data.get_testdata_file("CT_small.dcm"))
    (root / "cyst" / "IM0001").write_bytes(dicom.read_bytes())
    (root / "linked").symlink_to(elsewhere)
    (root / "cyst" / "back").symlink_to(root)
    elsewhere.joinpath("gone.png").symlink_to(tmp_path / "nowhere.png")
    source = load_sources_of(f"- {{kind: imagefolder, path: '{root}', caption_template: '{{label}}'}}", tmp_path)
    (root / "cyst" / "volume.nrrd").write_bytes(b"NRRD0004")
    found = {f"{row['label']}/{Path(row['image']).name}" for row in source[0].shards()[0].rows}
    assert "skipping files that are not images (1 without suffix, 1 .nrrd)" in caplog.text.replace(
        "1 .nrrd, 1 without suffix", "1 without suffix, 1 .nrrd"
    )
    assert found == {f"cyst/{name}" for name in ("1.png", "2.PNG", "photo", "3.dat", "IM0001")} | {
        "linked/1.png",
        "linked/gone.png",
    }
    stream = SampleStream(source, max_bad_fraction=1)
    assert Counter(sample["caption"] for sample in stream) == {"cyst": 5, "linked": 1}
    assert [cause for _, cause in stream.faults.counts] == ["missing image"]


# medmoe data inspect


def test_inspection_counts_samples_and_lists_problems(tmp_path):
    write_webdataset(tmp_path / "good", shards=2, samples_per_shard=15, image_size=48)
    write(tmp_path / "bad.tar", [{"jpg": b"x", "txt": b"x"}, {"jpg": png(1), "txt": b"A chest radiograph."}])
    (tmp_path / "sources.yaml").write_text(
        f"- {{kind: webdataset, name: good, files: ['{tmp_path}/good/*.tar']}}\n"
        f"- {{kind: webdataset, name: bad, files: ['{tmp_path}/bad.tar'], modality: caption}}\n"
        f"- {{kind: webdataset, name: none, files: ['{tmp_path}/none*.tar']}}\n"
        "- {kind: phantom, image_size: 50}\n"
    )
    reports = inspect_sources(load_sources(tmp_path / "sources.yaml"), tmp_path / "sheet.png", samples=20)
    good, bad, none, phantom = reports
    assert (good.shards, good.samples, good.read, good.problems) == (2, 30, 20, [])
    assert {"png", "txt", "cls"} <= set(good.fields)
    assert (good.sizes, phantom.sizes) == (((48, 48), (48, 48)), ((50, 50), (50, 50)))
    assert (bad.samples, dict(bad.modalities), bad.captions) == (2, {"xray": 1}, ["A chest radiograph."])
    (problem,) = bad.problems
    assert problem.startswith(f"1 unreadable image ({tmp_path}/bad.tar/000000): ")
    assert "No file matches" in none.problems[0]
    assert phantom.samples is None
    assert Image.open(tmp_path / "sheet.png").size == (12 * 116, 4 * 146)
    result = run(app, ["data", "inspect", str(tmp_path / "sources.yaml"), "--sheet", str(tmp_path / "again.png")])
    assert result.exit_code == 1
    assert "PROBLEM     1 unreadable image (" in result.output
    assert "good: 2 shards, 30 samples" in result.output


# medmoe data overlap


def test_overlap_finds_equal_and_similar_images(tmp_path):
    from medmoe_hf.data import phantom_sample

    drawn = [phantom_sample(3, index, image_size=128)["image"].convert("RGB") for index in range(24)]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / f"{part}.yaml").write_text(
            f"- {{kind: imagefolder, path: '{tmp_path}/{part}', caption_template: x}}\n"
        )
    for index, image in enumerate(drawn[:12]):
        image.save(tmp_path / "a" / f"{index}.png")
    for index, image in enumerate(drawn[12:]):
        image.save(tmp_path / "b" / f"{index}.png")
    result = run(app, ["data", "overlap", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--distance", "0"])
    assert result.exit_code == 0, result.output
    drawn[4].save(tmp_path / "b" / "copy.bmp")
    drawn[7].resize((100, 100)).save(tmp_path / "b" / "smaller.jpg", quality=80)
    result = run(app, ["data", "overlap", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--distance", "2"])
    assert result.exit_code == 1
    lines = result.output.splitlines()[1:]
    assert [line.split()[0] for line in lines if "/4.png" in line and "copy.bmp" in line] == ["equal"]
    assert [line.split()[1] for line in lines if "/7.png" in line and "smaller.jpg" in line] == ["bits"]


def test_overlap_names_the_images_of_tables(tmp_path):
    import pyarrow.parquet

    from medmoe_hf.data import phantom_sample
    from medmoe_hf.data.overlap import find_overlap

    for index in range(3):
        phantom_sample(3, index, image_size=64)["image"].save(tmp_path / f"{index}.png")
    (tmp_path / "table.csv").write_text("Scan,Words\n" + "".join(f"{index}.png,text {index}\n" for index in range(3)))
    files = [(tmp_path / f"{index}.png").read_bytes() for index in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"Scan": files, "Words": ["a", "b", "c"]}), tmp_path / "t.parquet")
    kinds = {kind: f"- {{kind: {kind}, files: [{tmp_path}/{file}], image: Scan, caption: Words, name: n}}"
             for kind, file in (("csv", "table.csv"), ("parquet", "t.parquet"))}  # fmt: skip
    found = find_overlap(*(load_sources_of(text, tmp_path) for text in kinds.values()))
    assert found.exact == [
        (f"n:{tmp_path}/{index}.png", f"n:{tmp_path}/t.parquet, row {index + 1}") for index in range(3)
    ]
    assert "3 images of the second list are affected" in str(found)


def test_overlap_prints_twenty_pairs_and_counts_the_others():
    from medmoe_hf.data.overlap import Overlap

    exact = [(f"a:{index}", f"b:{index}") for index in range(15)]
    near = [(f"c:{index}", f"d:{index}", 2) for index in range(8)]
    lines = str(Overlap(30, 30, exact, near[:5], 0)).splitlines()
    assert (len(lines), lines[-1].split()) == (21, ["2", "bits", "c:4", "~", "d:4"])
    lines = str(Overlap(30, 30, exact, near, 0)).splitlines()
    assert len(lines) == 22
    assert "15 exact and 8 near" in lines[0]
    assert lines[-1].startswith("  and 3 more pairs")


@pytest.mark.parametrize(
    ("kind", "file"), [("csv", "table.csv"), ("webdataset", "a.tar"), ("parquet", "a.parquet"), ("csv", "*.csv")]
)
def test_a_missing_relative_file_is_told_with_the_folder_that_was_looked_in(kind, file, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fields = "" if kind == "webdataset" else ", image: i, caption: c"
    (tmp_path / "s.yaml").write_text(f"- {{kind: {kind}, files: ['{file}']{fields}}}")
    result = run(app, ["data", "inspect", str(tmp_path / "s.yaml")])
    told = " ".join(f"{result.output} {result.exception}".split())
    assert f"relative to the working directory, {tmp_path}/elsewhere." in told


def test_overlap_equals_comparing_every_pair(tmp_path):
    """The lookup by pieces of hashes, compared with a loop over all pairs."""
    import imagehash

    from medmoe_hf.data import phantom_sample
    from medmoe_hf.data.overlap import find_overlap

    sources = [
        load_sources_of(f"- {{kind: phantom, seed: {seed}, image_size: 48, length: 40}}", tmp_path) for seed in (1, 2)
    ]
    hashes = [
        [imagehash.phash(phantom_sample(seed, i, image_size=48)["image"].convert("RGB")) for i in range(40)]
        for seed in (1, 2)
    ]
    for distance in (0, 6, 12):
        expected = Counter(one - two for one in hashes[0] for two in hashes[1] if one - two <= distance)
        assert Counter(bits for *_, bits in find_overlap(*sources, distance=distance).near) == expected
    assert expected  # there are near duplicates


def load_sources_of(text, folder):
    (folder / "s.yaml").write_text(text)
    return load_sources(folder / "s.yaml")


# Checksums


def test_content_checksums_change_with_the_content_only(tmp_path, monkeypatch):
    """Files added, removed, swapped, truncated or edited; not times, nor the location of the folder."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 1), ("b", 2)):
        write(tmp_path / "x" / f"{name}.tar", [{"jpg": png(number), "txt": b"c"}])
    source = load_sources_of("- {kind: webdataset, files: ['x/*.tar', 'gone.tar']}", tmp_path)[0]
    first = source.content_checksums()
    assert [entry[:2] for entry in first] == [["a.tar", 10240], ["b.tar", 10240], ["gone.tar", None]]
    os.utime(tmp_path / "x" / "a.tar", (1, 1))
    assert source.content_checksums() == first == json.loads(json.dumps(first))
    (tmp_path / "x" / "a.tar").rename(tmp_path / "x" / "c.tar")
    (tmp_path / "x" / "b.tar").rename(tmp_path / "x" / "a.tar")
    (tmp_path / "x" / "c.tar").rename(tmp_path / "x" / "b.tar")
    swapped = source.content_checksums()
    assert [entry[:2] for entry in swapped] == [entry[:2] for entry in first]
    assert swapped != first
    assert [entry[2] for entry in swapped[:2]] == [first[1][2], first[0][2]]
    write(tmp_path / "x" / "c.tar", [{"jpg": png(1), "txt": b"c"}])
    assert len(source.content_checksums()) == 4


@pytest.mark.parametrize("rows", [3, 5000])
def test_content_checksums_of_tables_cover_every_byte(tmp_path, rows):
    lines = ["image,caption", *(f"{index}.png,a caption" for index in range(rows))]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    source = load_sources_of(f"- {{kind: csv, files: ['{path}']}}", tmp_path)[0]
    first = source.content_checksums()
    lines[rows // 2] = lines[rows // 2].replace("caption", "caption"[::-1])
    path.write_text("\n".join(lines))
    (changed,) = source.content_checksums()
    assert changed[:2] == first[0][:2] == ["a.csv", len("\n".join(lines))]
    assert changed[2] != first[0][2]


def test_content_checksums_of_image_folders_and_saved_datasets(tmp_path):
    import datasets

    (tmp_path / "f" / "cyst").mkdir(parents=True)
    (tmp_path / "f" / "cyst" / "1.png").write_bytes(png(1))
    folder = load_sources_of(f"- {{kind: imagefolder, path: '{tmp_path}/f'}}", tmp_path)[0]
    first = folder.content_checksums()
    assert first[0][:2] == ["f", len(png(1))]
    (tmp_path / "f" / "cyst" / "1.png").rename(tmp_path / "f" / "cyst" / "2.png")
    second = folder.content_checksums()
    assert second != first
    (tmp_path / "f" / "cyst" / "3.png").symlink_to(tmp_path / "nowhere.png")
    third = folder.content_checksums()
    assert third[0][:2] == second[0][:2] == first[0][:2]
    assert third != second
    found = []
    for number in (1, 1, 2):
        one = datasets.Dataset.from_dict({"image": [png(number)], "caption": ["c"]})
        one.save_to_disk(tmp_path / "saved")
        source = load_sources_of(f"- {{kind: saved, path: '{tmp_path}/saved'}}", tmp_path)[0]
        found.append(source.content_checksums())
    assert found[0] == found[1]
    assert found[1][0][:2] == found[2][0][:2]
    assert found[1] != found[2]
    assert load_sources_of("- {kind: phantom}", tmp_path)[0].content_checksums() == []
