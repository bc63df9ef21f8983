"""Predictions as DICOM objects: a Secondary Capture of a key slice with its heat-map, and a Structured Report.

Both belong to the patient and the study of the images that they refer to, so they identify a person.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmoe_hf import __version__
from medmoe_hf.errors import ArgumentError, MissingPackageError
from medmoe_hf.inference.studies.predictions import DISCLAIMER, LabelPrediction, SeriesPrediction, StudyPrediction
from medmoe_hf.inference.studies.report import heat_colours
from medmoe_hf.model.dicom_files_medmoe import no_quotes

_SCHEME = "99MEDMOE"  # a private scheme of codes: labels are free text
_OPACITY = 0.5
_CAPTURE_SERIES, _REPORT_SERIES = 9001, 9002
# Of patient and study (type 2): highdicom copies them.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)


@no_quotes()
def write_dicom(study: StudyPrediction, folder: str | Path) -> list[Path]:
    """Writes, for each series that was read from DICOM, a Secondary Capture and a Structured Report.

    The Secondary Capture shows the key slice of the most probable label with its heat-map. The Structured Report
    (TID 1500, Comprehensive SR, neither complete nor verified) states the probability of each label and refers to its
    key slices. They get new series of the study of the images, whose patient and study they copy.

    Args:
        study: A prediction.
        folder: An existing folder.

    Returns:
        The files: `study-1-series-1-capture.dcm`, `study-1-series-1-report.dcm`, ...

    Raises:
        MissingPackageError: Without highdicom: `pip install "medmoe_hf[dicom-out]"`.
        ArgumentError: If no series was read from DICOM.

    Example:
        ```python
        (study,) = medmoe_hf.predict(["exports/study"], labels=["no finding", "pneumonia"])
        write_dicom(study, "prediction")
        ```
    """
    need_highdicom()
    files = []
    for series in study.series:
        if not _is_dicom(series):
            continue
        start = Path(folder) / f"study-{study.number}-series-{series.number}"
        for kind, make in (("capture", _capture), ("report", _report)):
            files.append(start.with_name(f"{start.name}-{kind}.dcm"))
            make(series, study.model).save_as(files[-1], enforce_file_format=True)
    if not files:
        raise ArgumentError(f"No series of study {study.number} with labels was read from DICOM files.")
    return files


def need_highdicom() -> None:
    """Checks that DICOM files can be written.

    Raises:
        MissingPackageError: Without highdicom.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise MissingPackageError('DICOM output needs highdicom: pip install "medmoe_hf[dicom-out]"') from error


def has_dicom(study: StudyPrediction) -> bool:
    """Returns whether a series of the study has labels and was read from DICOM."""
    return any(_is_dicom(series) for series in study.series)


def _is_dicom(series: SeriesPrediction) -> bool:
    return bool(series.labels) and any(source["sop_instance_uid"] for source in series.sources.values())


def _header(series: SeriesPrediction, index: int) -> Any:
    """The header of the file of a key slice."""
    from pydicom import dcmread

    header = dcmread(series.paths.get(index, series.sources[index]["file"]), stop_before_pixels=True)
    for keyword in _MAY_BE_EMPTY:  # software that removes identifiers also removes some of these
        if keyword not in header:
            setattr(header, keyword, "")
    return header


def _about(model: str) -> dict[str, str]:
    return {
        "manufacturer": "medmoe_hf",
        "manufacturer_model_name": model[:64],
        "software_versions": __version__,
        "device_serial_number": "none",
    }


def overlaid(series: SeriesPrediction, label: LabelPrediction) -> np.ndarray:
    """Returns the first key slice of a label with its heat-map, (H, W, 3) uint8."""
    index = label.key_slices[0]
    if series.picture is None or series.heatmaps is None:
        raise ArgumentError("The pictures of the series are not available.")
    picture = Image.fromarray(series.picture(index))
    for _, heat in series.heatmaps(label.label, [index]):
        colours = heat_colours(heat)
        colours[..., 3] = np.round(_OPACITY * colours[..., 3])
        picture.paste(Image.fromarray(colours[..., :3]), mask=Image.fromarray(colours[..., 3]))
    return np.asarray(picture)


def directions(affine: np.ndarray | None) -> tuple[str, str] | None:
    """Returns DICOM's PatientOrientation: to where columns and rows increase, by their main direction."""
    if affine is None:
        return None
    letters = ("L", "R"), ("P", "A"), ("F", "H")
    found = []
    for axis in (1, 0):
        main = int(np.abs(affine[:3, axis]).argmax())
        found.append(letters[main][int(affine[main, axis] > 0)])
    return found[0], found[1]


def _capture(series: SeriesPrediction, model: str) -> Any:
    import highdicom as hd

    label = series.labels[0]
    header = _header(series, label.key_slices[0])
    about = _about(model)
    image = hd.sc.SCImage.from_ref_dataset(
        ref_dataset=header,
        pixel_array=overlaid(series, label),
        photometric_interpretation=hd.PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=hd.CoordinateSystemNames.PATIENT,
        series_instance_uid=hd.UID(),
        series_number=_CAPTURE_SERIES,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=about["manufacturer"],
        patient_orientation=directions(series.affine) or ("L", "P"),
    )
    if series.affine is None:
        image.PatientOrientation = None  # required by the function above; unknown for slices without a place
    image.ManufacturerModelName = about["manufacturer_model_name"]
    image.SoftwareVersions = about["software_versions"]
    image.SeriesDescription = "MedMoE heat-map, research only"
    image.ImageComments = f"{label.label}: {label.probability:.3f}. {DISCLAIMER}"
    # Colours are computed, and names that were burned into the source are still there.
    image.BurnedInAnnotation = getattr(header, "BurnedInAnnotation", "YES")
    image.SourceImageSequence = [_reference(header, series.sources[label.key_slices[0]])]
    return image


def _reference(header: Any, source: dict[str, Any]) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    if int(getattr(header, "NumberOfFrames", 1) or 1) > 1:
        item.ReferencedFrameNumber = source["frame"] + 1
    return item


def _report(series: SeriesPrediction, model: str) -> Any:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    headers = {index: _header(series, index) for index in _keys(series.labels)}
    device = hd.sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=hd.UID(), name="medmoe_hf", manufacturer_name="medmoe_hf", model_name=model[:64]
        ),
    )
    probability = hd.sr.CodedConcept("PROBABILITY", _SCHEME, "Probability among the given labels")
    groups = []
    for number, label in enumerate(series.labels, start=1):
        images = []
        for index in label.key_slices:
            header, source = headers[index], series.sources[index]
            several = int(getattr(header, "NumberOfFrames", 1) or 1) > 1
            images.append(
                hd.sr.SourceImageForMeasurementGroup(
                    header.SOPClassUID, header.SOPInstanceUID, [source["frame"] + 1] if several else None
                )
            )
        groups.append(
            hd.sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=hd.sr.TrackingIdentifier(hd.UID(), label.label),
                finding_type=hd.sr.CodedConcept(f"LABEL{number}", _SCHEME, label.label[:64]),
                measurements=[
                    hd.sr.Measurement(name=probability, value=round(label.probability, 6), unit=codes.UCUM.NoUnits)
                ],
                source_images=images,
            )
        )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(observer_device_context=device),
        procedure_reported=hd.sr.CodedConcept("PREDICTION", _SCHEME, "Prediction by MedMoE, research only"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    # Each file once: frames of one file share it.
    evidence = list({header.SOPInstanceUID: header for header in headers.values()}.values())
    report = hd.sr.ComprehensiveSR(
        evidence=evidence,
        content=content,
        series_instance_uid=hd.UID(),
        series_number=_REPORT_SERIES,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        is_complete=False,
        is_verified=False,
        series_description="MedMoE prediction, research only",
        **_about(model),
    )
    return report


def _keys(labels: Sequence[LabelPrediction]) -> list[int]:
    return sorted({index for label in labels for index in label.key_slices})
