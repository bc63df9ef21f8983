"""A CT series with a patient in its headers, whose slices differ from each other."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medmoe_hf.data import phantom_sample

NAME = "DOE^JANE"
COUNT, SIZE = 11, (40, 56)


def gray(index):
    """Slices that differ from each other and send a model to different experts."""
    drawn = phantom_sample(5, index, image_size=64)["image"].convert("L").resize(SIZE[::-1])
    return np.asarray(drawn).astype(np.int16) * 4 - 400


def ct_series(folder, names=None, series="1.2.3.1", count=COUNT, modality="CT"):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, f"{series}.{index + 1}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", series
        dataset.PatientName, dataset.PatientID, dataset.StudyDate = NAME, "ID-4711", "19700102"
        dataset.Modality, dataset.InstanceNumber = modality, index + 1
        dataset.ImagePositionPatient = [0, 0, 2.5 * index]
        dataset.ImageOrientationPatient, dataset.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.8, 0.7]
        dataset.Rows, dataset.Columns = SIZE
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = gray(index).tobytes()
        paths.append(folder / (names[index] if names else f"{index}.dcm"))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths
