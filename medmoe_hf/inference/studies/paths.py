"""Predictions for paths and addresses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmoe_hf.errors import ArgumentError
from medmoe_hf.inference.dicomweb.downloads import Downloads
from medmoe_hf.inference.dicomweb.service import DownloadLimits
from medmoe_hf.inference.encoders import MedMoEEncoder
from medmoe_hf.inference.isolation import IsolatedReader
from medmoe_hf.inference.studies.pooling import POOLINGS, Pooling
from medmoe_hf.inference.studies.predictions import StudyPredictions
from medmoe_hf.inference.studies.predictor import BATCH_SIZE, Question, StudyPredictor
from medmoe_hf.model.studies_medmoe import read_studies


def predict(
    paths: str | Path | Sequence[str | Path],
    *,
    model: str | Path | MedMoEEncoder | StudyPredictor = "small",
    labels: Sequence[str] | None = None,
    task: Any = None,
    text: str | Sequence[str] | None = None,
    trust_header: bool = False,
    pooling: Pooling = POOLINGS[0],
    plane: str | None = None,
    window: Any = None,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    progress: bool = True,
    limits: DownloadLimits | None = None,
    isolate: bool = False,
) -> StudyPredictions:
    """Reads files, folders and DICOMweb addresses as studies, and predicts each study.

    Slices are decoded and encoded batch by batch. All slices of a series vote for its expert, and the modality in the
    header is a prior of these votes.

    Args:
        paths: Files and folders: DICOM, NIfTI and pictures; folders are read with their subfolders. Names and order do
            not matter.
        model: `small`, the checkpoint of the package; the folder or Hub id of a MedMoE; or a loaded
            encoder or `StudyPredictor`.
        labels: Labels to compare, at least two; by default those of the modality, see `default_labels.yaml`.
        task: A YAML or JSON file, or a dictionary, of labels and their sentences: `{"effusion": ["There is ..."]}`; a
            `Task`; or the name of a task of the model. A file may hold `prompts` and `negative_prompts`, as an
            evaluation recipe does. Its score and its calibration are used.
        text: A phrase to look for in all slices, or several.
        trust_header: Whether the modality in a header selects the expert, whatever the router votes for.
        pooling: `attention`, `top-k` or `mean`, see `pool_slices`.
        plane: Plane of the slices of a NIfTI volume: `axial` (default), `coronal` or `sagittal`.
        window: Window of CT and NIfTI by name (`lung`), as (centre, width), or three of these for three channels.
        batch_size: Slices per batch.
        device: Device to run on; None selects a GPU if there is one.
        progress: Whether to show a progress bar.
        limits: What may be downloaded from addresses; by default 5000 files, 4096 MB and an hour.
        isolate: Whether files are decoded in a process of its own, see `IsolatedReader`.

    Returns:
        The studies, in the order of reading: a list that also has `skipped`, the files of no study. Names and UIDs of
        files are only written if asked for.

    Raises:
        ArgumentError: If an argument cannot be used, or no slice can be read.
        DicomWebError: If a server does not give what an address names; the message contains no UID.
        MissingPackageError: For an address without the package dicomweb-client.
        PathNotFoundError: If a path does not exist.
        EncoderError: If there is no such model.

    Example:
        ```python
        import medmoe_hf
        from medmoe_hf.inference.studies import write_predictions

        studies = medmoe_hf.predict(["exports/study"], labels=["no finding", "pneumonia"], text="opacity")
        write_predictions(studies, "prediction")
        ```
    """
    question = Question(labels, task, text, trust_header, pooling)
    listed = _listed(paths)
    if not listed:
        raise ArgumentError("There are no paths to read: name files, folders or addresses.")
    downloads = Downloads(listed, limits or DownloadLimits(), progress)
    try:
        read = IsolatedReader().read_studies if isolate else read_studies
        studies = read(downloads.paths, plane=plane, window=window, on_skip=downloads.keep)
        predictor = model if isinstance(model, StudyPredictor) else None
        if not isinstance(model, StudyPredictor):
            predictor = StudyPredictor(model, batch_size=batch_size, device=device)
        assert predictor is not None
        return downloads.named(predictor(studies, question, show_progress=progress))
    except BaseException:
        downloads.close()
        raise


def _listed(paths: Any) -> list[str | Path]:
    """The paths as a list; images, arrays and tensors are refused, since they have no study."""
    if isinstance(paths, str | Path) or not isinstance(paths, Iterable):
        paths = [paths]
    given = list(paths)
    for one in given:
        if not isinstance(one, str | Path):
            raise ArgumentError(
                "`paths` are files, folders or addresses, as text or Path, or a list of them; got something of the "
                f"type {type(one).__name__}. Save pixels as a file, or pass them to the processor and to a method of "
                "the model, such as `classify`."
            )
    return given
