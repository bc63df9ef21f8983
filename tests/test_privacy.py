"""A patient's name, numbers and dates go through the commands, and are in nothing that these print or write.

The patient's traits differ by where they are, so that what was asked for (captions on the terminal of `data inspect`)
and what helps to mend data (paths of files on the terminal) can be told from a leak.
"""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

pydicom = pytest.importorskip("pydicom")
sys.path.insert(0, str(Path(__file__).parent / "hub"))

from loopback_hub import LoopbackHub  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian  # noqa: E402
from small_encoders import medmoe_folder  # noqa: E402

from medmoe_hf.cli import app  # noqa: E402
from medmoe_hf.hub.study_demo import page as study_page  # noqa: E402
from medmoe_hf.inference.isolation import IsolatedReader  # noqa: E402
from medmoe_hf.inference.studies import StudyPredictor  # noqa: E402
from medmoe_hf.model import read_studies  # noqa: E402
from medmoe_hf.model.medical_images_medmoe import read_medical_image  # noqa: E402

pytestmark = pytest.mark.usefixtures("logging_as_before")

# What each place says of the patient.
TRAITS = {
    "header": ["Zyxwell", "Quirina", "PAT773492", "19470831", "ACC551928", "Gullhaven", "1.2.826.0.77349.55"],
    "exif": ["Brundlefax", "SN990417"],
    "caption": ["Vimmersk", "31.08.1947", "MRN 6620413"],
    "file": ["Fenwobble", "Tamsin"],
    "subject": ["SUBJ-88231"],
}
SIDE = 64
ROWS = 12


def write_dicom(path, number, shade=0, **tags):
    """A CT slice whose header names the patient."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.77349.55.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.77349.55", "1.2.826.0.77349.55.0"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Zyxwell^Quirina", "PAT773492", "19470831"
    dataset.AccessionNumber, dataset.InstitutionName, dataset.Modality = "ACC551928", "Gullhaven", "CT"
    dataset.Rows = dataset.Columns = SIDE
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.InstanceNumber, dataset.ImagePositionPatient = number, [0, 0, number]
    dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
    pixels = np.random.default_rng(number).integers(0, 2000, (SIDE, SIDE)) + shade
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    # An identifier that breaks DICOM's rules, which pydicom's warnings quote.
    path.write_bytes(stream.getvalue().replace(b"1.2.826.0.77349.55.0", b"Zyxwell^Quirina55.00"))
    return path


def write_picture(path, number):
    """A PNG or a JPEG whose metadata name the patient."""
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 255, (SIDE, SIDE), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x010E], exif[0x013B] = "Brundlefax SN990417", "Brundlefax"
    picture.save(path, exif=exif)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model; and sources with DICOM, pictures, a cut-off file and a missing one, beside a recipe and a study."""
    place = tmp_path_factory.mktemp("clinic")
    medmoe_folder(place / "model", vision_config={"image_size": SIDE})
    (place / "data").mkdir()
    rows = []
    for number in range(1, ROWS + 1):
        name = f"Fenwobble_Tamsin_{number}." + ("dcm", "png", "jpg")[number % 3]
        if name.endswith("dcm"):
            write_dicom(place / "data" / name, number)
        else:
            write_picture(place / "data" / name, number)
        modality = "ct" if name.endswith("dcm") else "xray"
        finding = ("effusion", "normal")[number % 2]
        caption = f"Vimmersk, born 31.08.1947, MRN 6620413: {finding} {number}."
        row = {"image": name, "caption": caption, "who": f"SUBJ-88231-{number}", "finding": finding}
        rows.append(row | {"modality": modality, "split": "train" if number <= ROWS // 2 else "val"})
    whole = rows[2]["image"]
    damaged = {"image": "Fenwobble_Tamsin_cut.dcm", "caption": "Vimmersk", "who": "SUBJ-88231-x", "finding": "normal"}
    (place / "data" / damaged["image"]).write_bytes((place / "data" / whole).read_bytes()[:900])
    missing = damaged | {"image": "Fenwobble_Tamsin_missing.png"}
    for name, listed in (("good", rows), ("all", [*rows, damaged, missing])):
        lines = "\n".join(json.dumps(row) for row in listed)
        (place / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        source = {"kind": "jsonl", "files": [str(place / "data" / f"{name}.jsonl")], "name": name, "image": "image"}
        source |= {"caption": "caption", "label": "finding", "subject": "who", "modality": "field:modality"}
        (place / f"{name}.yaml").write_text(yaml.safe_dump([source]))
    (place / "study").mkdir()
    for number in range(1, 4):
        write_dicom(place / "study" / f"Fenwobble_Tamsin_{number}.dcm", number)
    (place / "study" / "Fenwobble_Tamsin_cut.dcm").write_bytes((place / "data" / whole).read_bytes()[:900])
    recipe = {
        **{"name": "ours", "title": "Ours", "tasks": ["zero-shot"], "modality": "xray", "metric": "accuracy"},
        "layout": {"kind": "folder", "splits": {"train": "tiles/train", "test": "tiles/test"}},
        **{"classes": ["effusion", "normal"], "prompts": {"effusion": ["An effusion."], "normal": ["Normal."]}},
        **{"expected": "tiles/SPLIT/CLASS/*.png", "source": "ours", "license": "CC0", "overlaps": ["None known."]},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for number in range(8):
        folder = place / "tiles" / ("train", "test")[number // 4] / ("effusion", "normal")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_picture(folder / f"Fenwobble_Tamsin_{number}.png", number)
    run = {
        "output_dir": str(place / "trained"),
        "model": {"from_pretrained": str(place / "model")},
        "data": {"train": str(place / "all.yaml"), "validation_share": 0.3, "max_bad_fraction": 0.5},
        **{"max_steps": 2, "batch_size": 4, "evaluate_every": 1, "checkpoints": {"every_steps": 1}},
    }
    (place / "train.yaml").write_text(yaml.safe_dump(run))
    return place


def told(text, *asked_for):
    """The traits in a text or the bytes of a file, but for those of the places that were asked for."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    places = [place for place in TRAITS if place not in asked_for]
    return [trait for place in places for trait in TRAITS[place] if trait.lower() in text.lower()]


def written(folder, *asked_for):
    """The traits in the files of a folder and their names: path -> traits."""
    files = [path for path in [folder, *folder.rglob("*")] if path.is_file()]
    assert files, folder
    found = {path.name: told(path.read_bytes() + path.name.encode(), *asked_for) for path in files}
    return {name: traits for name, traits in found.items() if traits}


def test_the_patient_is_found_where_he_is(place):
    (dicom, *_) = sorted((place / "data").glob("*.dcm"))
    assert set(TRAITS["header"]) <= set(told(dicom.read_bytes()))
    (jpeg, *_) = sorted((place / "data").glob("*.jpg"))
    assert told(jpeg.read_bytes()) == TRAITS["exif"]
    assert set(TRAITS["caption"] + TRAITS["subject"] + TRAITS["file"]) <= set(
        told((place / "data" / "good.jsonl").read_text())
    )


def test_readers_log_nothing_that_a_header_says(place, caplog):
    caplog.set_level(logging.DEBUG)
    (path, *_) = sorted((place / "study").glob("*_1.dcm"))
    with pytest.warns(UserWarning, match="Zyxwell"):  # of pydicom itself
        assert pydicom.dcmread(path).SeriesInstanceUID
    assert "Zyxwell" in caplog.text
    caplog.clear()
    read_medical_image(path)
    assert len(read_studies([place / "study"])[0].series) == 1
    assert told(caplog.text) == []
    pydicom.dcmread(path)  # and outside of our readers, its log is as it was
    with pytest.warns(UserWarning, match="Zyxwell"):
        assert pydicom.dcmread(path).SeriesInstanceUID
    assert "Zyxwell" in caplog.text


def test_onnxruntime_reports_nothing(tmp_path):
    pytest.importorskip("onnxruntime")
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = "import medmoe_hf, onnxruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"
    assert not list(tmp_path.iterdir())  # where it keeps the number of its session


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_page_of_the_demo_tells_nothing_of_the_patient(place, tmp_path, monkeypatch, caplog, capfd, apart):
    caplog.set_level(logging.DEBUG)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    reader = IsolatedReader() if apart else None
    page = study_page.StudyPage(StudyPredictor(place / "model"), reader=reader)
    archive = tmp_path / "Fenwobble_Tamsin.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((place / "study").iterdir()):
            packed.write(path, f"Fenwobble^Tamsin/{path.name}")
    pictures = [place / "data" / f"Fenwobble_Tamsin_{number}" for number in ("1.png", "2.jpg", "3.dcm", "cut.dcm")]
    uploads = [archive, *(shutil.copy(path, tmp_path) for path in pictures if path.exists())]
    assert len(uploads) > 3
    said, names = [], []
    view = page.upload(uploads, study_page.Reading(), "effusion\nnormal", "effusion")
    asked = page.ask(page.again(view, study_page.Reading(trust_header=True)), "effusion\nnormal", "air")
    for shown in (view, asked):
        names += [path.name for path in shown.folder.rglob("*")]
        said += [study_page.status_text(shown), study_page.left_out_html(shown), *shown.titles()]
        for number, (_, series) in enumerate(shown.places):
            subject = study_page.subject(series, None)
            said += [study_page.answer_html(shown, number), study_page.keys_html(series, subject)]
            said += [study_page.slice_html(series, 0, subject), study_page.curve_html(series, 0, subject)]
    assert "3 files or slices were left out" in said[0]
    assert names
    for wrong in ([shutil.copy(place / "study" / "Fenwobble_Tamsin_cut.dcm", tmp_path)], [tmp_path / "Fenwobble.dcm"]):
        with pytest.raises(study_page.PageError) as refused:
            page.upload(wrong, study_page.Reading())
        said.append(str(refused.value))
    view.close()
    if reader is not None:
        reader.close()
    printed = capfd.readouterr()
    for where in ("".join(said), " ".join(names), caplog.text, printed.out, printed.err):
        assert told(where) == []
    assert not list(temporary.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", [["--verbose"], [], ["--quiet"]], ids=["verbose", "default", "quiet"])
def test_commands_tell_nothing_of_the_patient(place, level, tmp_path, monkeypatch):
    leaks, data = {}, place / "data"

    def medmoe(*arguments, shows=(), fails=False):
        """Runs a command; the terminal may show paths of files, and what is asked for."""
        result = CliRunner().invoke(app, [*level, *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        assert (result.exit_code != 0) == fails, (arguments, result.output)
        said = f"{result.output}{result.stderr}{result.exception}"
        name = " ".join(map(str, arguments[:2]))
        leaks[f"{name}: terminal"] = told(said, "file", *shows)
        return said

    def files(name, folder, *asked_for):
        leaks.update({f"{name}: {path}": traits for path, traits in written(folder, *asked_for).items()})

    sheet = tmp_path / "sheet.png"
    medmoe("data", "inspect", place / "all.yaml", "--sheet", sheet, shows=["caption"], fails=True)
    files("data inspect", sheet)
    medmoe("data", "inspect", place / "good.yaml", "--sheet", sheet, shows=["caption"])
    medmoe("data", "overlap", place / "good.yaml", place / "good.yaml", fails=True)

    trained = tmp_path / "trained"
    medmoe("train", place / "train.yaml", "--set", f"output_dir={trained}")
    files("train", trained)
    files("train's run", tmp_path / "trained-run", "file")  # a resumed run names faulty files again
    medmoe("card", trained, "--repo", "user/medmoe", "--license", "cc-by-4.0")
    files("card", trained)

    encoded = tmp_path / "encoded"
    medmoe("encode", place / "all.yaml", encoded, "--model", trained, "--max-bad-fraction", "0.5")
    files("encode", encoded, "file")  # likewise
    medmoe("search", encoded, "--text", "effusion", "--model", trained)

    predicted = tmp_path / "predicted"
    medmoe("predict", place / "study", data, "--model", trained, "--labels", "effusion,normal", "--out", predicted)
    files("predict", predicted)

    evaluated = tmp_path / "evaluated"
    settings = ["--recipe", place / "recipe.yaml", "--data", place, "--output", evaluated, "--resamples", "10"]
    medmoe("evaluate", "zero-shot", trained, *settings)
    files("evaluate", evaluated)

    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump({"name": "ours", "prompts": {"effusion": ["An effusion."], "normal": ["Normal."]}}))
    few = ["--data", place / "good.yaml", "--split", "val", "--out", tmp_path / "fitted"]
    medmoe("calibrate", trained, *few, "--task", task, fails=True)  # too few cases, as is said without naming one
    medmoe("fit-rejector", trained, *few, fails=True)

    with LoopbackHub() as hub:
        hub.use(monkeypatch, tmp_path / "home", token="hf_write")
        medmoe("push", trained, "user/medmoe", "--dry-run")
        said = medmoe("data", "push", place / "good.yaml", "user/pairs", fails=True)
        leaks["data push refused: names"] = told(said, "file")
        medmoe("data", "push", place / "good.yaml", "user/pairs", "--i-have-removed-identifiers")
        repo = hub.repo("user/pairs", "dataset")
        for commit in repo.commits.values():
            leaks["data push: title"] = told(f"{commit.title} {commit.author}")
            leaks.update({f"data push: {name}": told(content, "caption") for name, content in commit.files.items()})

    assert {where: traits for where, traits in leaks.items() if traits} == {}
