"""What the demo page computes of studies: against `predict` on the same files, without gradio and a browser."""

import base64
import io
import re
import tempfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from small_encoders import medmoe_folder

pytest.importorskip("pydicom")

from medmoe_hf.hub.study_demo import examples, page
from medmoe_hf.hub.study_demo.page import PageError, Reading, StudyPage
from medmoe_hf.inference.serving.archives import Limits
from medmoe_hf.inference.studies import StudyPredictor, predict
from medmoe_hf.inference.studies.predictions import predictions_dict
from medmoe_hf.inference.studies.report import heat_colours, percent

NAME = "DOE^JANE"
LABELS = ["chest", "head", "pelvis"]
SLICES = 7


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return StudyPredictor(medmoe_folder(tmp_path_factory.mktemp("model") / "tiny"), batch_size=4)


@pytest.fixture
def study_page(predictor):
    return StudyPage(predictor)


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder of temporary files, which must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def series(tmp_path, monkeypatch):
    """A drawn CT, 7 files."""
    monkeypatch.setattr(examples, "_SLICES", SLICES)
    folder = tmp_path / "series"
    folder.mkdir()
    examples.write_ct_series(folder)
    return folder


def zipped(path, folder, name="{}"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir(), reverse=True):
            archive.write(file, name.format(file.name))
    return path


def content(studies):
    return predictions_dict(studies)["studies"]


def test_a_zip_is_answered_as_predict_answers_its_folder(study_page, predictor, series, uploads, tmp_path):
    archive = zipped(tmp_path / f"{NAME}.zip", series, f"{NAME}/a/{{}}")
    counted = []
    view = study_page.upload([archive], Reading(), "\n".join(LABELS), "liver", lambda *at: counted.append(at))
    expected = predict(series, model=predictor, labels=LABELS, text="liver", progress=False)
    assert content(view.studies) == content(expected)
    assert view.series(0).count == SLICES
    assert counted[:SLICES] == [(number + 1, SLICES) for number in range(SLICES)]
    assert not archive.exists()
    assert not any(NAME in str(path) for path in uploads.rglob("*"))
    view.close()


def test_files_of_a_series_and_others_are_answered_as_predict_does(study_page, predictor, series, uploads, tmp_path):
    Image.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(64, 48)).save(series / "picture.png")
    (series / "notes.txt").write_text("no image")
    expected = predict(series, model=predictor, progress=False)
    files = sorted(series.iterdir(), key=lambda path: path.name[::-1])
    view = study_page.upload(files, Reading(trust_header=False))
    assert content(view.studies) == content(expected)
    assert view.titles() == [
        f"Study 1, series 1: {SLICES} slices, {expected[0].series[0].expert}",
        f"Study 2, series 1: a picture, {expected[1].series[0].expert}",
    ]
    assert (
        page.status_text(view) == f"Read {SLICES + 1} images in 2 series of 2 studies. 1 file or slice was left out."
    )
    assert "Left out" in page.left_out_html(view)
    assert not list(series.iterdir())
    view.close()


def test_another_question_is_answered_without_encoding_again(study_page, predictor, series, uploads, monkeypatch):
    view = study_page.example(series, Reading())
    monkeypatch.setattr(predictor, "_encode", None)
    other = study_page.ask(view, "chest\n\nhead\nchest\n", " a lung ")
    monkeypatch.undo()
    expected = predict(series, model=predictor, labels=["chest", "head"], text="a lung", progress=False)
    assert content(other.studies) == content(expected)
    # The old view and its files are as they were.
    assert content(view.studies) == content(predict(series, model=predictor, progress=False))
    other.close()
    assert len(list(series.iterdir())) == SLICES


def test_files_are_read_again_in_another_way(study_page, predictor, series, uploads, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).normal(size=(20, 24, 6)).astype(np.float32)
    file, copy = tmp_path / "volume.nii.gz", tmp_path / "copy.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0])), file)
    copy.write_bytes(file.read_bytes())
    view = study_page.upload([copy], Reading())
    other = study_page.again(view, Reading(plane="coronal"), "", "tumour")
    expected = predict(file, model=predictor, plane="coronal", text="tumour", progress=False)
    assert other.series(0).count == 24
    assert content(other.studies) == content(expected)
    trusted = study_page.example(series, Reading(trust_header=True))
    assert content(trusted.studies) == content(predict(series, model=predictor, trust_header=True, progress=False))
    other.close()


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def test_a_slice_is_shown_with_its_heat_map_in_the_bodys_proportions(study_page, series):
    view = study_page.ask(study_page.example(series, Reading()), "\n".join(LABELS), "<b>lung")
    one = view.series(0)
    one.spacing = [2.0, 1.0]
    asked = page.subject(one, "label:head")
    shown = page.slice_html(one, 5, asked)
    below, above = (decoded(source) for source in re.findall('src="([^"]+)"', shown))
    assert np.abs(below.astype(int) - one.picture(5)).mean() < 3  # a JPEG
    ((_, heat),) = one.heatmaps("head", [5], size=page.HEAT_SIDE)
    np.testing.assert_array_equal(above, heat_colours(heat))
    assert "aspect-ratio: 128 / 256" in shown
    assert re.findall('aria-hidden="true">(.)</span>', shown) == ["R", "A"]
    assert f"Slice 6 of 7, at 140.0 mm, head: {percent(asked.slice_probabilities[5])}".replace("<", "&lt;") in shown
    assert next(key for _, key in page.subjects(one)) == "text:<b>lung"
    text = page.subject(one, "text:<b>lung")
    assert page.subject(one, "unknown") is text
    everything = page.slice_html(one, 0, text) + page.curve_html(one, 0, text) + page.answer_html(view, 0)
    assert "&lt;b&gt;lung" in everything
    assert "<b>" not in everything


def test_the_curve_runs_through_all_slices_and_marks_the_one_that_is_shown(study_page, series):
    one = study_page.example(series, Reading(), "\n".join(LABELS)).series(0)
    asked = page.subject(one, "label:pelvis")
    values = asked.slice_probabilities
    drawn = page.curve_html(one, 3, asked)
    points = [tuple(map(float, point.split(","))) for point in re.search('points="([^"]+)"', drawn)[1].split()]
    assert [x for x, _ in points] == list(range(SLICES))
    heights = np.array([y for _, y in points])
    np.testing.assert_allclose((40 - heights) / 36, (values - values.min()) / np.ptp(values), atol=0.01)
    assert 'class="medmoe-here" x1="3" x2="3"' in drawn
    assert re.findall('class="medmoe-mark" x1="([0-9]+)"', drawn) == [str(index) for index in asked.key_slices]
    assert [number for _, number in page.key_choices(one, asked)] == [index + 1 for index in asked.key_slices]
    assert page.keys_html(one, asked).count("<figure") == min(page.KEYS_SHOWN, len(asked.key_slices))


def test_the_answer_says_which_expert_and_why_and_all_probabilities(study_page, series):
    view = study_page.example(series, Reading(), "\n".join(LABELS))
    one = view.series(0)
    told = page.answer_html(view, 0)
    assert one.expert_reason in told
    rows = re.findall(
        '<tr( class=medmoe-chosen)?><th scope="row">(.*?)</th>.*?width: (.*?)%.*?<td>(.*?)</td></tr>', told
    )
    expected = [(label.label, label.probability) for label in one.labels]
    expected += sorted(one.routing.items(), key=lambda entry: -entry[1])
    assert [name for _, name, _, _ in rows] == [name for name, _ in expected]
    assert [float(width) for *_, width, _ in rows] == pytest.approx([100 * value for _, value in expected], abs=0.06)
    assert [name for chosen, name, _, _ in rows if chosen] == [one.expert]


def bomb(folder):
    with zipfile.ZipFile(folder / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.dcm", b"\0" * 1_500_000)
    return [folder / "in.zip"]


def file(name, data):
    def write(folder):
        (folder / name).write_bytes(data)
        return [folder / name]

    return write


def many(folder):
    paths = [folder / f"{number}.png" for number in range(9)]
    for path in paths:
        Image.new("L", (8, 8)).save(path)
    return paths


PROBLEMS = {
    "nothing": (lambda folder: [], "Choose at least one file"),
    "gone": (lambda folder: [folder / "gone.dcm"], "no longer here"),
    "text": (file(f"{NAME}.txt", b"nothing of the kind"), "no image"),
    "empty": (file("empty.dcm", b""), "no image"),
    "cut off": (file("cut.zip", b"PK\x03\x04" + b"x" * 99), "zip file is damaged"),
    "bomb": (bomb, "exceeds 1 MB"),
    "large": (file("large.nii", b"\0" * 1_000_001), "exceeds 1 MB"),
    "many": (many, "more than 8 files"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_cannot_be_shown_gets_a_sentence_and_leaves_nothing(predictor, uploads, tmp_path, problem):
    write, said = PROBLEMS[problem]
    files = write(tmp_path)
    with pytest.raises(PageError, match=said) as caught:
        StudyPage(predictor, Limits(megabytes=1, files=8)).upload(files, Reading())
    message = str(caught.value)
    assert str(tmp_path) not in message
    assert NAME not in message
    assert "\n" not in message
    assert not any(path.exists() for path in files)


def test_names_in_a_zip_lead_nowhere(study_page, uploads, tmp_path):
    picture = io.BytesIO()
    Image.new("L", (30, 20), 99).save(picture, format="PNG")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("../../../escaped.png", picture.getvalue())
    view = study_page.upload([tmp_path / "in.zip"], Reading())
    assert view.series(0).count == 1
    assert not list(tmp_path.rglob("escaped*"))
    assert all(path.is_relative_to(view.folder) for path in uploads.rglob("*.*") if path.is_file())
    view.close()


def test_labels_and_time_are_bounded(study_page, series, monkeypatch):
    for labels, phrase, said in (
        ("only one", "", "One label is not enough"),
        ("\n".join(map(str, range(101))), "", "at most 100 labels"),
        ("", "a" * 1001, "at most 1000 characters"),
    ):
        with pytest.raises(PageError, match=said):
            study_page.example(series, Reading(), labels, phrase)
    with pytest.raises(PageError, match="There is no study"):
        study_page.ask(None, "", "")
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(page.time, "monotonic", lambda: next(clock))
    with pytest.raises(PageError, match="takes longer than 300 s"):
        study_page.example(series, Reading())


def test_a_slice_that_cannot_be_read_leaves_the_others(study_page, series):
    whole = (series / "003.dcm").read_bytes()
    (series / "003.dcm").write_bytes(whole[:-5000])
    view = study_page.example(series, Reading(), "\n".join(LABELS))
    one = view.series(0)
    asked = page.subject(one, "label:head")
    assert np.isnan(asked.slice_probabilities).tolist() == [index == 3 for index in range(SLICES)]
    assert 'role="alert"' in page.slice_html(one, 3, asked)
    assert page.curve_html(one, 3, asked).count("<polyline") == 2
    assert "slice 4 cannot be read" in page.left_out_html(view)


def test_examples_are_studies_of_their_kinds(study_page, tmp_path):
    found = {}
    for number, example in enumerate(examples.example_studies()):
        folder = tmp_path / str(number)
        folder.mkdir()
        example.write(folder)
        studies = page.read_studies(folder)
        found[example.name] = [(one.kind, one.header_modality, len(one)) for study in studies for one in study.series]
    assert found["CT of a body"] == [("slices", "ct", 32)]
    assert found["Ultrasound loop"] == [("frames", "ultrasound", 16)]
    assert found["Six pictures"] == [("image", None, 1)] * 6
    assert found.get("MRI of a head", [("volume", None, 24)]) == [("volume", None, 24)]
    assert found.get("Stained section", [("image", None, 1)]) == [("image", None, 1)]


def test_the_drawn_body_has_air_around_it_lungs_in_the_chest_and_a_skull():
    noise = np.random.default_rng(0)
    shares = {}
    for name, height in {"pelvis": 0.1, "abdomen": 0.4, "chest": 0.6, "head": 0.92}.items():
        pixels = examples.body_slice(height, noise)
        assert pixels[:4].max() < -900
        shares[name] = ((pixels > -900) & (pixels < -700)).mean(), (pixels > 800).mean()
    assert shares["chest"][0] > 0.1 > 0.02 > max(shares[name][0] for name in ("pelvis", "abdomen", "head"))
    assert shares["head"][1] > 0.01 > max(shares[name][1] for name in ("pelvis", "abdomen", "chest"))
