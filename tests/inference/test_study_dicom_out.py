"""Secondary Captures and Structured Reports of predictions, as pydicom and highdicom read them."""

import numpy as np
import pytest
from synthetic_studies import LABELS, blob, synthetic_series, synthetic_studies

from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.studies import write_dicom, write_predictions
from medmoe_hf.inference.studies.grouping import study_labels
from medmoe_hf.inference.studies.predictions import StudyPrediction
from medmoe_hf.inference.studies.report import heat_colours

highdicom = pytest.importorskip("highdicom", reason='pip install "medmoe_hf[dicom-out]"')
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sr.codedict import codes  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ComprehensiveSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

NAME = "DOE^JANE"


def source(path, number):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"1.2.3.4.{number + 1}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    dataset.PatientName, dataset.PatientID, dataset.StudyID = NAME, "ID-4711", "S1"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.AccessionNumber = "19700102", "F", "A1"
    dataset.StudyDate, dataset.StudyTime, dataset.ReferringPhysicianName = "20200101", "120000", ""
    dataset.Modality, dataset.FrameOfReferenceUID = "CT", "1.2.3.5"
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def study(tmp_path):
    series = synthetic_series(count=8)
    series.sources = {}
    for index in range(8):
        source(tmp_path / f"{index}.dcm", index)
        entry = {"file": str(tmp_path / f"{index}.dcm"), "frame": 0, "sop_instance_uid": f"1.2.3.4.{index + 1}"}
        series.sources[index] = entry
    return StudyPrediction(1, [series], study_labels([series]), [], "small", "1.2.3")


def test_capture_shows_the_key_slice_with_its_heatmap(study, tmp_path):
    capture, _ = write_dicom(study, tmp_path)
    dataset = pydicom.dcmread(capture)
    series = study.series[0]
    index = series.labels[0].key_slices[0]
    assert dataset.SOPClassUID == SecondaryCaptureImageStorage
    assert (dataset.PatientName, dataset.StudyInstanceUID) == (NAME, "1.2.3")
    assert dataset.SeriesInstanceUID != "1.2.3.4"
    assert dataset.SourceImageSequence[0].ReferencedSOPInstanceUID == f"1.2.3.4.{index + 1}"
    assert "not a medical device" in dataset.ImageComments
    # Columns go to x, the patient's right, and rows to -y, the back.
    assert list(dataset.PatientOrientation) == ["R", "P"]
    colours = heat_colours(blob(index, 8))
    share = np.round(0.5 * colours[..., 3:].astype(float)) / 255
    expected = (1 - share) * series.picture(index) + share * colours[..., :3]
    np.testing.assert_allclose(dataset.pixel_array, expected, atol=1.5)


def test_report_states_probabilities_and_refers_to_key_slices(study, tmp_path):
    _, path = write_dicom(study, tmp_path)
    report = highdicom.sr.srread(path)
    assert report.SOPClassUID == ComprehensiveSRStorage
    assert report.CompletionFlag == "PARTIAL"
    assert report.VerificationFlag == "UNVERIFIED"
    assert report.PatientID == "ID-4711"
    groups = report.content.get_image_measurement_groups()
    labels = study.series[0].labels
    assert [group.finding_type.meaning for group in groups] == [label.label for label in labels]
    assert set(LABELS) == {label.label for label in labels}
    for group, label in zip(groups, labels, strict=True):
        (measurement,) = group.get_measurements()
        assert float(measurement.value) == pytest.approx(label.probability, abs=1e-6)
        assert measurement.unit == codes.UCUM.NoUnits
        found = [image.referenced_sop_instance_uid for image in group.source_images]
        assert found == [f"1.2.3.4.{index + 1}" for index in label.key_slices]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPInstanceUID for item in evidence} == {
        f"1.2.3.4.{index + 1}" for label in labels for index in label.key_slices
    }


def test_dicom_is_written_with_identifiers_only(study, tmp_path):
    with pytest.raises(ArgumentError, match="keep_identifiers=True"):
        write_predictions([study], tmp_path / "out", dicom=True)
    assert not (tmp_path / "out").exists()
    files = write_predictions([study], tmp_path / "out", dicom=True, keep_identifiers=True)
    assert {"study-1-series-1-capture.dcm", "study-1-series-1-report.dcm"} < {path.name for path in files}
    with pytest.raises(ArgumentError, match="Nothing was read from DICOM"):
        write_predictions(synthetic_studies()[1:], tmp_path / "other", dicom=True, keep_identifiers=True)


def test_studies_of_other_files_have_no_dicom(tmp_path):
    study = synthetic_studies()[1]
    study.series[0].sources = {0: {"file": "a.nii", "frame": 0, "sop_instance_uid": ""}}
    with pytest.raises(ArgumentError, match="No series of study 2 with labels was read from DICOM"):
        write_dicom(study, tmp_path)
