"""prediction.json against its schema, prediction.csv, report.html, heat-maps as NIfTI, and the terminal's table."""

import csv
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_studies import AFFINE, FOLDER, LABELS, NAME, blob, synthetic_series, synthetic_studies

import medmoe_hf.inference.studies.predictions as predictions
from medmoe_hf.errors import ArgumentError, ImageError, PathExistsError
from medmoe_hf.inference.studies import summary, write_heatmap, write_predictions
from medmoe_hf.inference.studies.grouping import study_labels
from medmoe_hf.inference.studies.report import heat_colours, percent, report_html
from medmoe_hf.model.studies_medmoe import read_studies

SCHEMA = json.loads((Path(predictions.__file__).parent / "prediction.schema.json").read_text())
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
}


def problems(value, schema, where="$"):
    """The part of JSON Schema that the schema uses, checked plainly."""
    unknown = schema.keys() - {
        *("$schema", "title", "description", "type", "properties", "required", "additionalProperties", "items"),
        *("enum", "const", "minimum", "maximum"),
    }
    assert not unknown
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value!r} is not {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(
        isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool)) for name in types
    ):
        yield f"{where}: {value!r} is not of type {types}"
        return
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value} is out of range"
    if isinstance(value, list):
        for index, entry in enumerate(value):
            yield from problems(entry, schema.get("items", {}), f"{where}[{index}]")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key in set(schema.get("required", ())) - value.keys():
            yield f"{where}: {key} is missing"
        for key, entry in value.items():
            if key not in known and rest is False:
                yield f"{where}: {key} is unknown"
            yield from problems(entry, known.get(key, rest if isinstance(rest, dict) else {}), f"{where}.{key}")


@pytest.fixture
def written(tmp_path):
    def write(keep_identifiers=False, **changes):
        out = tmp_path / f"out-{keep_identifiers}"
        write_predictions(synthetic_studies(**changes), out, keep_identifiers=keep_identifiers)
        return out

    return write


@pytest.mark.parametrize("keep_identifiers", [False, True])
def test_json_fits_its_schema(written, keep_identifiers):
    content = json.loads((written(keep_identifiers, unreadable=[3]) / "prediction.json").read_text())
    assert list(problems(content, SCHEMA)) == []
    assert content["schema"] == predictions.SCHEMA == 1
    series = content["studies"][0]["series"][0]
    pneumonia = next(label for label in series["labels"] if label["label"] == "pneumonia")
    assert len(pneumonia["slice_scores"]) == series["slices"] == 40
    assert pneumonia["slice_scores"][3] is None
    best = max(range(40), key=lambda index: pneumonia["slice_probabilities"][index] or 0)
    assert pneumonia["key_slices"][0] == best
    assert sum(label["probability"] for label in series["labels"]) == pytest.approx(1, abs=1e-5)


def test_the_schema_notices_missing_unknown_and_wrong_values(written):
    content = json.loads((written() / "prediction.json").read_text())
    del content["model"]
    content["studies"][0]["more"] = 1
    content["studies"][1]["series"][0]["routing"]["ct"] = 1.5
    found = " ".join(problems(content, SCHEMA))
    assert "model is missing" in found
    assert "more is unknown" in found
    assert "1.5 is out of range" in found


def test_csv_has_a_row_per_study_and_label(written):
    with (written() / "prediction.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["study"], row["label"]) for row in rows] == [
        ("1", "pneumonia"),
        ("1", "no finding"),
        ("1", LABELS[2]),
        ("2", "pneumonia"),
        ("2", "no finding"),
        ("2", LABELS[2]),
    ]
    first = rows[0]
    studies = synthetic_studies()
    both = [next(label for label in series.labels if label.label == "pneumonia") for series in studies[0].series]
    assert float(first["score"]) == pytest.approx((both[0].score + both[1].score) / 2, abs=1e-5)
    assert (first["series"], first["slices"], first["expert"], first["model"]) == ("2", "41", "ct", "small")
    assert first["key_series"] == "2"  # the picture, at whose only slice the label peaks
    assert sum(float(row["probability"]) for row in rows[:3]) == pytest.approx(1, abs=1e-5)


def test_labels_of_a_study_are_compared_within_the_series_that_were_asked_the_same():
    series = [synthetic_series(1), synthetic_series(2)]
    for label in series[1].labels:
        label.label = f"other {label.label}"
    prompts = dict(zip(map("other {}".format, LABELS), series[0].task.prompts.values(), strict=True))
    series[1].task = replace(series[1].task, prompts=prompts)
    labels = study_labels(series)
    assert [label.asked for label in labels] == [[1]] * 3 + [[2]] * 3
    assert sum(label.probability for label in labels[:3]) == pytest.approx(1)
    assert [label.probability for label in labels[:3]] == pytest.approx([one.probability for one in series[0].labels])


def test_nothing_that_identifies_is_written_unless_asked_for(written):
    identifying = (NAME, "DOE", "1.2.3", FOLDER, "notes.txt")
    for path in written().iterdir():
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
        content = re.sub(rb"base64,[^\"]*", b"", content)  # pixels may spell anything
        assert not any(text.encode() in content for text in identifying), path.name
        assert not any(text in path.name for text in identifying)
    out = written(True)
    kept = (out / "prediction.json").read_text()
    assert f"{FOLDER}/{NAME}.dcm" in kept
    assert '"uid": "1.2.3"' in kept
    assert f"{NAME}-dose.dcm: it is a dose report" in (out / "report.html").read_text()


class Page(HTMLParser):
    """Tags that are opened and closed, addresses, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text, self.tags = [], [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "input", "polyline", "line", "link", "br"):
            self.open.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_without_requests_or_scripts():
    html = report_html(synthetic_studies())
    page = Page()
    page.feed(html)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_the_report_states_labels_experts_reasons_and_limits():
    page = Page()
    page.feed(report_html(synthetic_studies(unreadable=[3])))
    text = " ".join(page.text.split())
    for part in (
        "not a medical device",
        "Series 1: 40 slices",
        "Series 2: a picture",
        "a loop of 12 frames",
        LABELS[2],  # as text, not as markup
        "Router and header agree: the 40 slices voted for ct (97%).",
        "2 slices are missing behind slice 10.",
        "it is a dose report (2 times)",
        "it is no image",
        "There is always a warmest place",
        "Pixels of 0.8 × 0.7 mm. Slices every 2.51 mm. The header states ct.",
        "pneumonia 0.231 to 0.941",
        "Slice 20 of 40: pneumonia",
    ):
        assert part in text, part
    assert "b" not in page.tags
    # Of the three labels: three pictures of the first one, one of each other; three of the text.
    assert text.count("of 40: ") == 3 + 1 + 1 + 3
    assert page.tags.count("polyline") == 4 * 2 + 4  # a gap splits the curves of the first series


def test_heat_colours_run_from_transparent_to_white():
    colours = heat_colours(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert colours[0].tolist() == [[0, 0, 0, 0], [255, 128, 0, 64], [255, 255, 255, 255]]
    assert not heat_colours(np.ones((2, 2), dtype=np.float32)).any()


def test_percentages_do_not_claim_certainty():
    assert [percent(value) for value in (0, 0.0004, 0.125, 0.9996, 1)] == [
        "0.0 %",
        "< 0.1 %",
        "12.5 %",
        "> 99.9 %",
        "100.0 %",
    ]


def test_heatmap_is_a_volume_in_the_space_of_the_series(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    series = synthetic_series(count=5, unreadable=[3])
    series.slots = [0, 1, 2, 3, 6]  # two slices are missing
    write_heatmap(series, "pneumonia", tmp_path / "heat.nii.gz")
    with pytest.raises(ImageError, match="1 x it is a heat-map of a prediction"):
        read_studies(tmp_path)
    volume = nibabel.load(tmp_path / "heat.nii.gz")
    assert volume.shape == (48, 64, 7)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(volume.header.get_zooms(), np.linalg.norm(AFFINE[:3, :3], axis=0), rtol=1e-5)
    assert volume.header.get_xyzt_units()[0] == "mm"
    values = volume.get_fdata()
    for slot, index in ((0, 0), (1, 1), (2, 2), (6, 4)):
        np.testing.assert_allclose(values[:, :, slot], blob(index, 5), atol=1e-3)
    assert not values[:, :, [3, 4, 5]].any()


def test_heatmap_needs_a_grid(tmp_path):
    with pytest.raises(ArgumentError, match="form no grid"):
        write_heatmap(synthetic_series(kind="frames", affine=None), "pneumonia", tmp_path / "heat.nii.gz")


def test_files_are_named_by_numbers_and_existing_folders_stay(written, tmp_path):
    out = written()
    assert sorted(path.name for path in out.iterdir()) == [
        "prediction.csv",
        "prediction.json",
        "report.html",
        "study-1-series-1-text-1.nii.gz",
    ]
    with pytest.raises(PathExistsError):
        write_predictions(synthetic_studies(), out)
    (out / "old").write_text("")
    files = write_predictions(synthetic_studies(text=False), out, force=True)
    assert [path.name for path in files] == ["prediction.csv", "prediction.json", "report.html"]
    assert not (out / "old").exists()


def test_what_is_refused_is_said_everywhere(tmp_path):
    studies = synthetic_studies()
    for one in (series for study in studies for series in study.series):
        one.ood_scores = np.full(one.count, 0.5)
    studies[0].series[0].ood_scores = np.array([2.0] * 24 + [0.4] * 15 + [np.nan])
    write_predictions(studies, tmp_path / "out")
    content = json.loads((tmp_path / "out/prediction.json").read_text())
    assert list(problems(content, SCHEMA)) == []
    first, second = content["studies"][0]["series"]
    assert (first["ood_score"], first["accepted"]) == (2.0, False)
    assert [first["slice_ood_scores"][index] for index in (0, 24, 39)] == [2.0, 0.4, None]
    assert (second["ood_score"], second["accepted"]) == (0.5, True)
    with (tmp_path / "out/prediction.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = {(row["key_series"], row["ood_score"], row["accepted"]) for row in rows if row["study"] == "1"}
    assert shown <= {("1", "2.0", "False"), ("2", "0.5", "True")}
    assert ("2", "0.5", "True") in shown
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<strong>Refused.</strong>") == 1
    told = "24 of 39 refused; score 2.00, accepted up to 1"
    loop = studies[1].series[0]
    loop.ood_scores = np.full(loop.count, 9e7)
    assert "(12 of 12 refused; score above 1000, accepted" in loop.acceptance
    loop.ood_scores = np.full(loop.count, 1.002)
    assert "score 1.01, accepted up to 1" in loop.acceptance
    loop.ood_scores = np.full(loop.count, 0.5)
    assert told in page
    lines = summary(studies).splitlines()
    assert re.search(r"ct +NO +pneumonia", lines[1])
    assert any(line.startswith("REFUSED: study 1, series 1.") and told in line for line in lines)
    assert "no rejector" not in page + "".join(lines)


def test_a_task_for_another_modality_is_said_everywhere(tmp_path):
    studies = synthetic_studies()
    assert "ANOTHER MODALITY" not in summary(studies)
    studies[0].series[1].task = replace(studies[0].series[1].task, modality="fundus")
    studies[0].series[1].foreign_task = True
    write_predictions(studies, tmp_path / "out")
    content = json.loads((tmp_path / "out/prediction.json").read_text())
    told = "The task is for images of the modality fundus, but these were read as ct: unless that is wrong"
    assert [one["notes"][0].startswith(told) for one in content["studies"][0]["series"]] == [False, True]
    assert (tmp_path / "out/report.html").read_text().count(told) == 1
    assert any(
        line.startswith(f"ANOTHER MODALITY: study 1, series 2. {told}") for line in summary(studies).splitlines()
    )


def test_the_files_of_rows_are_named_where_identifiers_are_kept(tmp_path):
    studies = synthetic_studies()
    (loop,) = studies[1].series
    loop.sources = {index: {**loop.sources[20], "file": "loop.dcm", "frame": index} for index in range(loop.count)}
    write_predictions(studies, tmp_path / "out", keep_identifiers=True)
    with (tmp_path / "out/prediction.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["uid"], row["file"]) for row in rows if row["study"] == "2"} == {("1.2.4", "loop.dcm")}
    assert "<h2>Study 2: loop.dcm</h2>" in (tmp_path / "out/report.html").read_text()


def test_an_image_that_was_not_checked_is_no_accepted_one(written):
    out = written()
    series = json.loads((out / "prediction.json").read_text())["studies"][0]["series"][0]
    assert (series["ood_score"], series["accepted"], series["slice_ood_scores"]) == (None, None, None)
    assert "it has no rejector" in (out / "report.html").read_text()
    assert "it has no rejector" in summary(synthetic_studies())


def test_the_table_says_how_many_labels_it_leaves_out():
    studies = synthetic_studies()
    series = studies[0].series[0]
    (first, *_) = series.labels
    for count, told in ((8, []), (9, ["(1 more in prediction.json, see --out)"])):
        series.labels = [replace(first, label=f"label {number}") for number in range(count)]
        text = summary(studies)
        assert re.findall(r"label \d", text) == [f"label {number}" for number in range(8)]
        assert re.findall(r"\(\d more.*?\)", text) == told


def test_the_table_repeats_notes_once():
    studies = synthetic_studies()
    every = [one for study in studies for one in study.series]
    every[1].notes = ["two slices are missing"]
    lines = summary(studies).splitlines()
    assert f"Note on {len(every) - 1} series: 2 slices are missing behind slice 10." in lines
    assert "Note: two slices are missing" in lines
    every[1].notes = [f"note {number}" for number in range(6)]
    assert "There are 2 other notes, which prediction.json lists." in summary(studies)


def test_the_table_shows_series_labels_and_what_was_left_out():
    text = summary(synthetic_studies())
    lines = text.splitlines()
    columns = ["study", "series", "content", "expert", "accepted", "label", "probability", "key", "slice"]
    assert lines[0].split() == columns
    assert re.match(r"1 +1 +40 slices +ct +not checked +pneumonia +\d\d\.\d % +20 of 40$", lines[1])
    assert "“ground glass”" in text
    assert "Left out: 2 x it is a dose report" in text
    assert "not a medical device" in lines[-1]
    assert NAME not in text
