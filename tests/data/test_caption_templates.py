"""Captions from fields, rows selected by their fields, and parts of long texts."""

import json
import random
from collections import Counter
from itertools import pairwise

import datasets
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

from medmoe_hf.cli import app
from medmoe_hf.data.caption_templates import tidy
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.parsing import caption_of
from medmoe_hf.data.sentences import sample_run, sentence_spans
from medmoe_hf.data.sources import Source, load_sources
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import SourceError
from medmoe_hf.model import MedMoEImageProcessor, MedMoEProcessor, MedMoETokenizer

TEMPLATES = ["{kind} of the {organ}: {label}", {"template": "{label}", "weight": 0.5}, {"field": "text", "weight": 3}]
WORDS = {"label": {"0": ["no finding", "normal"], "Pneumonia": "pneumonia, consolidated"}}


def source(**fields):
    return TypeAdapter(Source).validate_python({"kind": "jsonl", "files": ["t.jsonl"]} | fields)


@pytest.fixture
def lines(tmp_path):
    """Writes rows as JSONL and returns a source of them."""

    def write(rows, **fields):
        Image.new("L", (4, 4)).save(tmp_path / "x.png")
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": "x.png", **row}) + "\n" for row in rows))
        return source(files=[str(tmp_path / "t.jsonl")], **fields)

    return write


# Templates


def test_templates_are_drawn_by_weight_among_those_that_fit():
    made = source(captions=TEMPLATES)
    full = {"kind": "CT", "organ": "lung", "label": "nodule", "text": " A nodule. "}

    def shares(row):
        counts = Counter(caption_of(made, row, random.Random(visit))[1] for visit in range(9000))
        return {caption: count / 9000 for caption, count in counts.items()}

    assert shares(full) == pytest.approx(
        {"CT of the lung: nodule": 1 / 4.5, "nodule": 0.5 / 4.5, "A nodule.": 3 / 4.5}, abs=0.02
    )
    assert shares(full | {"text": "n/a"}) == pytest.approx(
        {"CT of the lung: nodule": 2 / 3, "nodule": 1 / 3}, abs=0.02
    )
    assert shares({"label": "nodule", "organ": None}) == {"nodule": 1.0}


def test_synonyms_are_drawn_for_each_visit():
    made = source(captions=["{label} ({kind})"], synonyms=WORDS)
    for value in (0, "0", 0.0, b"0"):
        row = {"label": value, "kind": "CT"}
        counts = Counter(caption_of(made, row, random.Random(visit))[1] for visit in range(2000))
        assert counts.keys() == {"no finding (CT)", "normal (CT)"}
        assert counts["normal (CT)"] / 2000 == pytest.approx(0.5, abs=0.04)
        assert caption_of(made, row, random.Random(1), fixed=True)[1] == "no finding (CT)"
    row = {"label": ["PNEUMONIA", "cyst"], "kind": "CT"}
    assert caption_of(made, row, random.Random(0))[1] == "pneumonia, consolidated, cyst (CT)"


def test_captions_differ_by_epoch_and_not_by_reader(lines):
    rows = [{"kind": "CT", "organ": f"organ {index}", "label": 0} for index in range(20)]
    made = lines(rows, captions=["{kind} of {organ}", "{organ}: {label}", "{organ}"], synonyms=WORDS)

    def read(**options):
        stream = SampleStream([made], seed=3, **options)
        return [[(sample["row"], sample["caption"]) for sample in stream] for _ in range(2)]

    first, second = map(dict, read())
    assert first != second
    # Also where rows keep their positions.
    in_order = read(shuffle=False)
    assert in_order[0] != in_order[1]
    assert read(num_workers=2) == read()
    parts = [read(rank=rank, world_size=2) for rank in range(2)]
    assert [part[0] for part in parts] == [read()[0][rank::2] for rank in range(2)]
    fixed = read(fixed_captions=True)
    assert dict(fixed[0]) == dict(fixed[1]) == {index: f"CT of organ {index}" for index in range(20)}


def test_a_row_that_no_template_fits_is_a_fault(lines):
    made = lines([{"kind": "CT", "organ": "lung", "label": "", "text": "-"}, {"label": "cyst"}], captions=TEMPLATES)
    stream = SampleStream([made], max_bad_fraction=1)
    assert [sample["caption"] for sample in stream] == ["cyst"]
    assert stream.faults.counts == {("t.jsonl", "no caption fits"): 1} or list(stream.faults.counts.values()) == [1]
    (line,) = stream.faults.lines()
    assert "empty in this row (label, text)" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CT of the  chest , : nodule. .", "CT of the chest: nodule."),
        ("nodule., PA view", "nodule. PA view"),
        ("X-ray () of a knee,", "X-ray of a knee"),
        ("grade 3.5 : Mild OA!", "grade 3.5: Mild OA!"),
        ("H&E... (left )", "H&E... (left)"),
        (" : normal", "normal"),
    ],
)
def test_spaces_and_punctuation_are_tidied(text, expected):
    assert tidy(text) == expected
    assert tidy(expected) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"captions": ["a {} b"]}, "names no field"),
        ({"captions": [{"template": "a", "field": "b"}]}, "either a `template` or a `field`"),
        ({"captions": [{"template": "a", "weight": 0}]}, "greater than 0"),
        ({"captions": []}, "at least 1"),
        ({"captions": ["a"], "caption": "text"}, "`captions` replaces `caption`"),
        ({"captions": ["{label}"], "synonyms": {"lable": {"a": ["b"]}}}, "no template has `{lable}`"),
        ({"caption": "label", "synonyms": WORDS}, "no template has `{label}`"),
        ({"captions": ["{label}"], "synonyms": {"label": {True: ["b"]}}}, "put it in quotation marks"),
        ({"captions": ["{label}"], "synonyms": {"label": {"a": ["b"], "A": ["c"]}}}, "occurs twice"),
        ({"where": {"split": True}}, "put it in quotation marks"),
        ({"where": {"split": []}}, "at least 1"),
    ],
)
def test_wrong_keys_are_explained(fields, message):
    with pytest.raises(ValidationError, match=message):
        source(**fields)


def test_missing_columns_of_templates_are_reported_before_reading(lines):
    with pytest.raises(SourceError, match="no column `lable`; did you mean `label`\\? \\(`captions`\\)"):
        SampleStream([lines([{"label": "a"}], captions=["x", "{lable}"])])


def test_states_of_versions_without_these_keys_stay_valid():
    assert not {"captions", "synonyms", "where", "where_not"} & source().identity().keys()
    assert source(where={"split": "val"}).identity()["where"] == {"split": ["val"]}


# Selected rows

SPLITS = [
    {"caption": f"{index}", "split": split, "origin": origin, "site": site, "kind": ["ct", "us"][index % 2]}
    for index, (split, origin, site) in enumerate(
        [("train", "msd-lung", 1), ("val", "busi", 2), ("train", "busi", ""), ("train", "msd-heart", 2)] * 3
    )
]


@pytest.mark.parametrize(
    ("where", "where_not", "kept"),
    [
        ({"split": "train"}, None, lambda row: row["split"] == "train"),
        ({"split": ["val", "test"]}, None, lambda row: row["split"] == "val"),
        (None, {"origin": "msd-*"}, lambda row: row["origin"] == "busi"),
        ({"split": "train", "site": 2}, None, lambda row: row["split"] == "train" and row["site"] == 2),
        (None, {"site": None}, lambda row: row["site"] != ""),
        (
            {"split": "train"},
            {"site": 1, "origin": "busi"},
            lambda row: row["split"] == "train" and row["site"] != 1 and row["origin"] != "busi",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_selected_by_their_fields(lines, tmp_path, kind, where, where_not, kept):
    made = lines(SPLITS, where=where, where_not=where_not)
    if kind == "parquet":
        rows = [row | {"site": str(row["site"]), "image": str(tmp_path / "x.png")} for row in SPLITS]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
        made = source(kind=kind, files=[str(tmp_path / "t.parquet")], where=where, where_not=where_not)
    expected = {index for index, row in enumerate(SPLITS) if kept(row)}
    for options in ({}, {"shuffle": False}, {"balance": ["split"]}):
        samples = list(SampleStream([made], **options))
        # Rows keep their numbers in the file.
        assert {(sample["row"], sample["caption"]) for sample in samples} <= {(one, f"{one}") for one in expected}
        if "balance" not in options:
            assert sorted(sample["row"] for sample in samples) == sorted(expected)


def test_modalities_of_selected_rows_are_mixed(lines):
    made = lines(SPLITS, where={"split": "train"}, modality="field:kind")
    samples = list(SampleStream([made], mixing="modality"))
    assert Counter(sample["modality"] for sample in samples) == {1: 6, 3: 3}


def test_a_selection_without_rows_lists_the_values(lines):
    with pytest.raises(SourceError, match=r"leave none of the rows\. `split` has the values train \(9\), val \(3\)"):
        SampleStream([lines(SPLITS, where={"split": "Train"})])
    with pytest.raises(SourceError, match=r"no column `spilt`; did you mean `split`\? \(`where`\)"):
        SampleStream([lines(SPLITS, where={"spilt": "train"})])
    with pytest.raises(SourceError, match=r"no column `origins`.*\(`where_not`\)"):
        SampleStream([lines(SPLITS, where_not={"origins": "busi"})])
    with pytest.raises(ValidationError, match="use `modalities`"):
        TypeAdapter(Source).validate_python({"kind": "phantom", "where": {"split": "train"}})


def test_inspect_prints_templates_selected_rows_and_shares(tmp_path, lines):
    lines([row | {"label": ["cyst", "0"][index % 3 == 0]} for index, row in enumerate(SPLITS)])
    path = tmp_path / "sources.yaml"
    path.write_text(
        f"- kind: jsonl\n  files: ['{tmp_path}/t.jsonl']\n  modality: field:kind\n  where: {{split: train}}\n"
        "  captions: ['{kind}, {label}', {template: 'site {site}', weight: 2}]\n"
        "  synonyms: {label: {0: [normal], 1: [tumor]}}\n"
    )
    assert load_sources(path)[0].synonyms == {"label": {"0": ["normal"], "1": ["tumor"]}}
    arguments = ["data", "inspect", str(path), "--sheet", str(tmp_path / "s.png"), "--balance", "modality,origin"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for text in (
        "1 shard, 12 samples, of which `where` leaves 9",
        '"{kind}, {label}": weight 1, fits 9 of 9 rows',
        '"site {site}": weight 2, fits 6 of 9 rows',
        "`synonyms` of `label`: no row has the value 1",
        "Balanced by modality, origin (power 0.5)",
        "most often drawn: ultrasound / msd-heart",
    ):
        assert text in result.output
    assert "tumor" not in result.output


# Long texts


def words(texts):
    return [len(text.split()) for text in texts]


def test_sentences_end_at_stops_lines_and_bars():
    text = '1. No acute process. Size 3.5 cm (old.) He said "no." Dr. B. agrees'
    text += "\nLung: clear | Q: Big? A: No. | Q: x? A: y"
    assert [text[start:end] for start, end in sentence_spans(text)] == [
        "1. No acute process.",
        "Size 3.5 cm (old.)",
        'He said "no."',
        "Dr. B. agrees",
        "Lung: clear",
        "Q: Big? A: No.",
        "Q: x? A: y",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_the_longest_that_fit(seed):
    rng = random.Random(seed)
    sentences = [" ".join(["word"] * rng.randint(1, 7)) + f"{index}." for index in range(rng.randint(2, 9))]
    text, limit = "  ".join(sentences), rng.randint(7, 12)
    fitting = {
        (first, last)
        for first in range(len(sentences))
        for last in range(first, len(sentences))
        if sum(words(sentences[first : last + 1])) <= limit
    }
    longest = {
        "  ".join(sentences[first : last + 1])
        for first, last in fitting
        if (first - 1, last) not in fitting and (first, last + 1) not in fitting
    }
    drawn = Counter(sample_run(text, limit, words, random.Random(visit)) for visit in range(300))
    assert drawn.keys() == longest
    assert min(drawn.values()) > 300 / len(longest) / 2


def test_a_sentence_that_is_too_long_is_divided_between_words():
    text = "a b c dd ee ff gg. Short one here."
    drawn = {sample_run(text, 3, words, random.Random(visit)) for visit in range(200)}
    assert drawn == {"a b c", "dd ee ff", "gg.", "Short one here."}
    assert sample_run("one", 0, words, random.Random(0)) == "one"


def test_captions_are_no_longer_than_the_tower_reads(lines):
    tokenizer = MedMoETokenizer.from_words(["no", "effusion", "heart", "normal", "old", "fracture"], max_length=64)
    processor = MedMoEProcessor(MedMoEImageProcessor(size=32), tokenizer, max_length=9)
    collator = ContrastiveCollator(processor)
    sentences = ["No effusion.", "Heart normal.", "Old fracture.", "No fracture.", "No old effusion."]
    report = " ".join(sentences)
    made = lines([{"caption": report}, {"caption": "no effusion"}])
    stream = SampleStream([made], shorten=collator.shorten, prepare=collator.prepare)
    seen = [sample["caption"] for _ in range(30) for sample in stream]
    assert seen.count("no effusion") == 30
    long = set(seen) - {"no effusion"}
    # Two sentences of three tokens each, and two special tokens.
    assert long == {" ".join(pair) for pair in pairwise(sentences)}
    assert all(len(tokenizer(caption, truncation=False)["input_ids"]) <= 9 for caption in long)
    again = SampleStream([made], shorten=collator.shorten, prepare=collator.prepare, num_workers=2)
    assert [sample["caption"] for _ in range(2) for sample in again] == seen[:4]
    batch = collator.assemble(list(SampleStream([made], prepare=collator.prepare)))
    assert batch["input_ids"].shape == (2, 9)  # without it, the end is cut
