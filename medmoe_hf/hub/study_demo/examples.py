"""Studies to try the page with: drawings, and scans that other Python packages ship."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmoe_hf.data import MODALITIES, phantom_sample

_SEED = 18
_SLICES, _SIDE, _STEP = 32, 128, 28.0  # of the drawn CT; millimetres between slices
_FRAMES = 16


@dataclass(frozen=True)
class Example:
    """A study that the page offers.

    Args:
        name: On its button.
        told: What it is, in a few words.
        write: Function that writes its files into an empty folder.
    """

    name: str
    told: str
    write: Callable[[Path], None]


def example_studies() -> list[Example]:
    """Returns the examples whose files exist and whose readers are installed."""
    found = []
    dicom = importlib.util.find_spec("pydicom") is not None
    volume = _shipped("nibabel/tests/data/example4d.nii.gz")
    if volume is not None:
        found.append(Example("MRI of a head", "Real NIfTI file of nibabel", _copying(volume)))
    if dicom:
        found.append(Example("CT of a body", "Drawn DICOM series", write_ct_series))
    found.append(Example("Six pictures", "Drawn, one of each modality", write_pictures))
    if dicom:
        found.append(Example("Ultrasound loop", "Drawn multi-frame file", write_loop))
    section = _shipped("skimage/data/ihc.png")
    if section is not None:
        found.append(Example("Stained section", "Real picture of scikit-image", _copying(section)))
    return found


def _shipped(path: str) -> Path | None:
    """A file of an installed package, which is not imported; None if it is not there."""
    package, _, inside = path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / inside
    return file if file.is_file() else None


def _copying(source: Path) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.copyfile(source, folder / source.name)

    return write


def write_pictures(folder: Path) -> None:
    """Draws a picture per modality."""
    for number, modality in enumerate(MODALITIES):
        drawn = phantom_sample(_SEED, number, modalities=[modality])["image"]
        drawn.save(folder / f"{number}-{modality}.png")


def body_slice(height: float, noise: np.random.Generator, side: int = _SIDE) -> np.ndarray:
    """Draws an axial slice of a body, seen from the feet.

    Args:
        height: Place of the slice: 0 the lower end of the pelvis, 1 the top of the head.
        noise: Source of the noise.
        side: Rows and columns.

    Returns:
        (side, side) int16, Hounsfield units.
    """
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]

    def ellipse(across: float, down: float, wide: float, high: float) -> np.ndarray:
        return np.asarray(((x - across) / wide) ** 2 + ((y - down) / high) ** 2 < 1)

    image = np.full((side, side), -1000.0)
    if height > 0.84:  # head: skull and brain, with ventricles
        top = (height - 0.84) / 0.16
        wide = 0.42 * np.sqrt(max(1 - (1.6 * top - 0.6) ** 2, 0.05))
        image[ellipse(0, 0, wide, 1.25 * wide)] = 40
        image[ellipse(0, 0, 0.94 * wide, 1.18 * wide)] = 1000
        image[ellipse(0, 0, 0.82 * wide, 1.05 * wide)] = 35
        for across in (-0.06, 0.06):
            if 0.3 < top < 0.7:
                image[ellipse(across, 0.02, 0.035, 0.13)] = 5
    elif height > 0.78:  # neck: airway
        image[ellipse(0, 0, 0.3, 0.3)] = 45
        image[ellipse(0, -0.08, 0.06, 0.05)] = -1000
        image[ellipse(0, 0.12, 0.09, 0.08)] = 600
    else:
        image[ellipse(0, 0, 0.85, 0.58)] = -90  # fat
        image[ellipse(0, 0, 0.79, 0.52)] = 45
        image[ellipse(0, 0.33, 0.1, 0.1)] = 600  # spine
        if height > 0.5:  # chest: lungs narrow towards their tips, heart
            share = np.sqrt(max(1 - ((height - 0.56) / 0.22) ** 2, 0.05))
            for across in (-0.38, 0.38):
                image[ellipse(across, -0.02, 0.31 * share, 0.4 * share)] = -820
            if height < 0.68:
                image[ellipse(0.1, -0.12, 0.24, 0.2)] = 50
        elif height > 0.25:  # abdomen: liver, kidneys, bowel
            image[ellipse(-0.4, -0.05, 0.33, 0.33 * min(1, 6 * (height - 0.25)))] = 110
            for across in (-0.35, 0.35):
                image[ellipse(across, 0.26, 0.11, 0.13)] = 150
            for across, down in ((0.25, -0.2), (0.45, -0.05), (0.1, -0.28)):
                image[ellipse(across, down, 0.09, 0.08)] = -500
        else:  # pelvis: iliac bones or hips, bladder
            for across in (-0.52, 0.52):
                image[ellipse(across, 0.08, 0.12, 0.25 if height > 0.12 else 0.14)] = 700
            image[ellipse(0, -0.1, 0.22, 0.16)] = 5
    return np.asarray(image + noise.normal(0, 15, image.shape), dtype=np.int16)


def write_ct_series(folder: Path) -> None:
    """Draws a CT from the pelvis to the head, a DICOM file per slice."""
    noise = np.random.default_rng(_SEED)
    for number in range(_SLICES):
        pixels = body_slice(number / (_SLICES - 1), noise)
        dataset = _dicom("CT", "1.2.840.10008.5.1.4.1.1.2", number + 1, pixels)
        dataset.ImagePositionPatient = [-200.0, -200.0, _STEP * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [400 / _SIDE] * 2, _STEP
        dataset.RescaleIntercept, dataset.RescaleSlope = 0, 1
        dataset.save_as(folder / f"{number:03}.dcm", enforce_file_format=True)


def write_loop(folder: Path) -> None:
    """Draws a loop of ultrasound that moves up and down, as one DICOM file."""
    drawn = np.asarray(phantom_sample(_SEED, 3, modalities=["ultrasound"])["image"].convert("L"))
    shifts = np.round(6 * np.sin(2 * np.pi * np.arange(_FRAMES) / _FRAMES)).astype(int)
    dataset = _dicom("US", "1.2.840.10008.5.1.4.1.1.3.1", 1, np.stack([np.roll(drawn, s, axis=0) for s in shifts]))
    dataset.NumberOfFrames, dataset.FrameTime = _FRAMES, 60
    dataset.save_as(folder / "loop.dcm", enforce_file_format=True)


def _dicom(modality: str, kind: str, number: int, pixels: np.ndarray) -> Any:
    """A DICOM object of (H, W) or (frames, H, W) pixels, with nothing in its header that it need not have."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    study = f"2.25.{_SEED}{ord(modality[0])}"
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, f"{study}.1.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.1"
    dataset.Modality, dataset.InstanceNumber = modality, number
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * pixels.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    return dataset
