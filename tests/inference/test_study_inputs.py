"""What hospitals send, through the whole prediction: against the model on pixels that are known, not on read ones."""

import json

import numpy as np
import pytest
import torch
from small_encoders import medmoe_folder
from torch.nn.functional import normalize

from medmoe_hf.inference.studies import predict, write_heatmap
from medmoe_hf.inference.studies.pooling import HEADER_PRIOR
from medmoe_hf.inference.studies.predictor import StudyPredictor
from medmoe_hf.inference.studies.report import edges, report_html
from medmoe_hf.inference.studies.tasks import task_of_labels
from medmoe_hf.model.medical_pixels_medmoe import MedicalImage

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, RLELossless  # noqa: E402

LABELS = ["no finding", "pneumonia", "effusion"]
SIZE = (32, 40)
CT, ULTRASOUND, SLIDE = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "3.1", "77.1.6"))
SAME = 1e-4
"""Tolerance of probabilities, scores and cosines on docs/pages/studies.md."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A model whose router is as sure of these images being CT as a trained one is."""
    made = StudyPredictor(medmoe_folder(tmp_path_factory.mktemp("model") / "tiny"), batch_size=4)
    with torch.no_grad():
        made.encoder.model.vision_model.router.fc2.bias[made.encoder.modalities.index("ct")] += 30
    return made


def ask(predictor, path, **options):
    return predict(path, model=predictor, labels=LABELS, text="effusion", progress=False, **options)


def hounsfield(count, seed=0):
    """Smooth slices (N, H, W) that all differ, surrounded by air."""
    coarse = np.random.default_rng(seed).integers(-900, 500, (count, 4, 5))
    values = np.kron(coarse, np.ones((1, 8, 8))).astype(np.int16)
    values[:, :4] = -1000
    return values


def shown(values):
    """As CT without a window is shown."""
    return np.clip((values.astype(np.float32) + 160) / 400, 0, 1)


def dicom(pixels, uid, series="1.2.3.1", sop_class=CT, modality="CT", **tags):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2.3", series, modality
    colour = pixels.shape[-1] == 3
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(pixels.dtype.kind == "i")
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def ct(values, series="1.2.3.1", first=0):
    return [
        dicom(
            pixels,
            f"{series}.{number + 1}",
            series,
            InstanceNumber=number + 1,
            ImagePositionPatient=[-20.0, 7.0, 100 + 2.5 * (first + number)],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[0.5, 0.75],
            RescaleSlope=1,
            RescaleIntercept=0,
        )
        for number, pixels in enumerate(values)
    ]


def save(datasets, folder, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{prefix}{number}.dcm", enforce_file_format=True)


def scores_of(predictor, pixels, expert):
    """Logits (N, C) of known pixels, one image at a time through the public model."""
    model, processor = predictor.encoder.model, predictor.encoder.processor
    prompts = task_of_labels(LABELS, expert).prompts
    classes = [predictor.encoder.encode_texts(list(sentences)).mean(dim=0) for sentences in prompts.values()]
    classes = torch.stack([normalize(embed, dim=0) for embed in classes], dim=1)
    with torch.no_grad():
        inputs = [
            processor(images=MedicalImage(one, None, None, 0, 1), return_tensors="pt")["pixel_values"]
            for one in pixels
        ]
        embeds = [normalize(model.get_image_features(one, modality=expert).pooler_output[0], dim=0) for one in inputs]
    return (predictor.encoder.logit_scale * torch.stack(embeds) @ classes).numpy()


def assert_scores(predictor, series, pixels, indices=None):
    indices = range(series.count) if indices is None else indices
    expected = scores_of(predictor, pixels, series.expert)
    by_label = {label.label: label for label in series.labels}
    for column, name in enumerate(LABELS):
        found = by_label[name].slice_scores[list(indices)]
        np.testing.assert_allclose(found, expected[:, column], atol=SAME, err_msg=name)


def answer(series):
    """What is said about a series, but for the header: numbers that a tolerance is for, and the rest."""
    content = series.to_dict()
    numbers = [
        value
        for one in [*sorted(content["labels"], key=lambda label: label["label"]), *content["texts"]]
        for value in (one.get("probability", 0.0), one["score"], *one["slice_scores"])
    ]
    keys = {one.get("label") or one["text"]: one["key_slices"] for one in [*content["labels"], *content["texts"]]}
    return np.array(numbers), (content["expert"], content["slices"], keys)


# --- the same images in another form


def test_compressed_copies_get_the_same_answer(predictor, tmp_path):
    datasets = ct(hounsfield(6))
    save(datasets, tmp_path / "plain")
    for dataset in datasets:
        dataset.compress(RLELossless, generate_instance_uid=False)
    save(datasets, tmp_path / "compressed")
    answers = [
        json.dumps(ask(predictor, paths)[0].series[0].to_dict())
        for paths in (tmp_path / "plain", tmp_path / "compressed", tmp_path)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL"])
def test_a_nifti_file_made_of_dicom_gets_the_same_answer(predictor, tmp_path, axes):
    values = hounsfield(7)
    save(ct(values), tmp_path / "dicom")
    # By the definition of ImageOrientationPatient and ImagePositionPatient: x, y of DICOM run to the left and back.
    affine = np.diag([-1.0, -1, 1, 1]) @ np.array([[0.75, 0, 0, -20], [0, 0.5, 0, 7], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    volume = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)
    wanted = nibabel.orientations.axcodes2ornt(axes)
    turns = nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), wanted)
    volume.as_reoriented(turns).to_filename(tmp_path / "a.nii.gz")
    (series,), (other,) = (ask(predictor, tmp_path / name)[0].series for name in ("dicom", "a.nii.gz"))
    (numbers, said), (same_numbers, same) = answer(series), answer(other)
    assert said == same
    np.testing.assert_allclose(same_numbers, numbers, atol=SAME)
    # NIfTI has no header that states CT. Without its prior the votes are the same.
    assert (series.header_modality, other.header_modality) == ("ct", None)
    prior = {name: (1 - HEADER_PRIOR) / (len(series.routing) - 1) for name in series.routing} | {"ct": HEADER_PRIOR}
    votes = {name: value / prior[name] for name, value in series.routing.items()}
    total = sum(votes.values())
    assert other.routing == pytest.approx({name: value / total for name, value in votes.items()}, abs=SAME)
    assert edges(series.affine) == edges(other.affine) == ("R", "A")


def test_two_series_in_one_folder_get_the_answers_that_each_gets_alone(predictor, tmp_path):
    first, second = ct(hounsfield(4, seed=1)), ct(hounsfield(5, seed=2), "1.2.3.2", first=1)
    save(first, tmp_path / "first")
    save(second, tmp_path / "second")
    save(second, tmp_path / "mixed", "a")
    save(first, tmp_path / "mixed", "b")
    alone = [ask(predictor, tmp_path / name)[0].series[0] for name in ("first", "second")]
    (study,) = ask(predictor, tmp_path / "mixed")
    assert [series.number for series in study.series] == [1, 2]
    for series, expected in zip(study.series, alone, strict=True):
        found, said = series.to_dict(), expected.to_dict()
        assert found | {"series": 0} == said | {"series": 0}
    means = {name: np.mean([_score(series, name) for series in alone]) for name in LABELS}
    assert {label.label: label.score for label in study.labels} == pytest.approx(means, abs=1e-9)


def _score(series, name):
    return next(label.score for label in series.labels if label.label == name)


# --- odd ones


def test_missing_slices_are_told_as_people_count_and_stay_empty(predictor, tmp_path):
    values = hounsfield(8)
    datasets = [dataset for number, dataset in enumerate(ct(values)) if number != 3]
    save(datasets, tmp_path / "ct")
    (study,) = ask(predictor, tmp_path / "ct")
    (series,) = study.series
    assert_scores(predictor, series, shown(np.delete(values, 3, axis=0)))
    # Slice 3 for people is index 2; the table and the report also count from 1.
    assert series.to_dict()["notes"] == ["1 slice missing, behind slice 3, counted from 1"]
    page = report_html([study])
    assert "Note: 1 slice missing, behind slice 3, counted from 1" in page
    assert f"Slice {series.labels[0].key_slices[0] + 1} of 7: {series.labels[0].label}" in page
    write_heatmap(series, "effusion", tmp_path / "heat.nii.gz")
    heat = np.abs(nibabel.load(tmp_path / "heat.nii.gz").get_fdata()).max(axis=(0, 1))
    assert (heat > 0).tolist() == [True, True, True, False, True, True, True, True]


def test_a_damaged_frame_takes_no_part(predictor, tmp_path):
    loop = np.random.default_rng(0).integers(0, 256, (5, *SIZE)).astype(np.uint8)
    save([dicom(loop, "1.2.3.1.1", sop_class=ULTRASOUND, modality="US", NumberOfFrames=5)], tmp_path)
    file = tmp_path / "0.dcm"
    file.write_bytes(file.read_bytes()[:-100])
    (study,) = ask(predictor, tmp_path)
    (series,) = study.series
    assert [one.reason for one in study.skipped] == [
        "slice 5 cannot be read: the file is cut off before the end of frame 5; copy it"
    ]
    assert series.to_dict()["labels"][0]["slice_scores"][4] is None
    assert_scores(predictor, series, np.float32(loop[:4] / 255), range(4))


def test_one_slice(predictor, tmp_path):
    values = hounsfield(1)
    save(ct(values), tmp_path)
    (study,) = ask(predictor, tmp_path)
    (series,) = study.series
    assert (series.kind, series.count, series.notes) == ("slices", 1, [])
    assert_scores(predictor, series, shown(values))
    assert all(label.key_slices == [0] for label in series.labels)
    assert "Through the slices" not in report_html([study])


def test_of_several_volumes_the_first_one_is_read_and_that_is_told(predictor, tmp_path):
    values = np.stack([hounsfield(4, seed=seed) for seed in (1, 2, 3)])
    # (volumes, slices, rows from the front, columns from the right) to (right, front, head, volume)
    volumes = nibabel.Nifti1Image(values.transpose(3, 2, 1, 0)[::-1, ::-1], np.diag([0.75, 0.5, 2.5, 1]))
    volumes.to_filename(tmp_path / "a.nii.gz")
    (study,) = ask(predictor, tmp_path)
    (series,) = study.series
    assert (series.kind, series.count, series.notes) == ("volume", 4, ["volume 1 of 3; the others are not read"])
    assert_scores(predictor, series, shown(values[0]))


@pytest.mark.slow
def test_an_echo_of_500_frames(predictor, tmp_path):
    loop = np.random.default_rng(0).integers(0, 256, (500, 16, 24)).astype(np.uint8)
    save([dicom(loop, "1.2.3.1.1", sop_class=ULTRASOUND, modality="US", NumberOfFrames=500)], tmp_path)
    (study,) = ask(predictor, tmp_path)
    (series,) = study.series
    assert (series.kind, series.count, series.header_modality) == ("frames", 500, "ultrasound")
    checked = range(0, 500, 50)
    assert_scores(predictor, series, np.float32(loop[checked] / 255), checked)
    assert not np.isnan(series.texts[0].slice_scores).any()
    first, *others = series.labels[0].key_slices
    assert all(abs(first - other) > 25 for other in others)
    assert f"Frame {first + 1} of 500" in report_html([study])


@pytest.mark.parametrize(
    ("kind", "frames", "sop_class", "modality", "header"),
    [
        ("frames", 6, ULTRASOUND, "US", "ultrasound"),  # a colour Doppler loop
        ("tiles", 4, SLIDE, "SM", "histopathology"),
        ("image", 1, SLIDE, "SM", "histopathology"),  # a tile
    ],
)
def test_colours(predictor, tmp_path, kind, frames, sop_class, modality, header):
    pixels = np.random.default_rng(0).integers(0, 256, (frames, *SIZE, 3)).astype(np.uint8)
    tags = {"NumberOfFrames": frames} if frames > 1 else {}
    save([dicom(pixels, "1.2.3.1.1", sop_class=sop_class, modality=modality, **tags)], tmp_path)
    (study,) = ask(predictor, tmp_path)
    (series,) = study.series
    assert (series.kind, series.count, series.header_modality) == (kind, frames, header)
    assert_scores(predictor, series, pixels)
    np.testing.assert_array_equal(series.picture(frames - 1), pixels[-1])
