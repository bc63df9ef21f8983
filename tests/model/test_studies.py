"""Studies: files written here, whose slices, order and places are known."""

import gzip
import io
import itertools
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe_hf.errors import ArgumentError, ImageTooLargeError, MedicalImageError, PathNotFoundError
from medmoe_hf.model.image_processing_medmoe import MedMoEImageProcessor
from medmoe_hf.model.medical_images_medmoe import read_medical_image
from medmoe_hf.model.modeling_medmoe import MedMoEModel
from medmoe_hf.model.processing_medmoe import MedMoEProcessor
from medmoe_hf.model.studies_medmoe import read_studies
from medmoe_hf.model.tokenization_medmoe import MedMoETokenizer

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless  # noqa: E402

CT, ENHANCED_CT, ULTRASOUND = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "2.1", "3.1"))
CAPTURE, SLIDE = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.77.1.6"
AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]
SIZE = (12, 16)


def dicom(pixels, uid, sop_class=CT, series="1.2.3.1", study="1.2.3", modality="CT", **tags):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.PatientName, dataset.PatientID, dataset.SeriesDescription = "Secret^Name", "SECRET-ID", "of Secret"
    colour = pixels.shape[-1] == 3
    shape = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    bits = pixels.dtype.itemsize * 8
    values = {
        "Modality": modality,
        "Rows": shape[0],
        "Columns": shape[1],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **({"PlanarConfiguration": 0} if colour else {}),
        **tags,
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OW"
    return dataset


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def item(**tags):
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def hounsfield(count=6, seed=0):
    """Slices (N, H, W) that all differ, in Hounsfield units, a fifth of them air."""
    values = np.random.default_rng(seed).integers(-1024, 400, (count, *SIZE)).astype(np.int16)
    values[:, :3] = -1000
    return values


def ct(values, orientation=AXIAL, uid="1.2.3.1", step=2.5, **tags):
    """Datasets of a series, slice k lying k steps along the normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [
        dicom(
            pixels,
            f"{uid}.{number + 1}",
            series=uid,
            InstanceNumber=number + 1,
            ImageOrientationPatient=list(orientation),
            ImagePositionPatient=[*map(float, np.array([-20.0, 7.0, 100.0]) + step * number * normal)],
            PixelSpacing=[0.5, 0.75],
            RescaleSlope=1,
            RescaleIntercept=0,
            **tags,
        )
        for number, pixels in enumerate(values)
    ]


def write(datasets, folder, names=None):
    for number, dataset in enumerate(datasets):
        save(dataset, folder / (names[number] if names else f"{number}.dcm"))


def pixels_of(series, **kwargs):
    return np.stack([image.pixels for _, image in series.slices(**kwargs)])


def only(paths, **kwargs):
    (study,) = read_studies(paths, **kwargs)
    (series,) = study.series
    return series


def between(values, low, high):
    return np.clip((values.astype(float) - low) / (high - low), 0, 1)


# --- invariance


def test_names_order_and_folders_do_not_matter(tmp_path):
    values = hounsfield()
    datasets = ct(values)
    write(datasets, tmp_path / "plain")
    names = ["zz", "b.dcm", "10.ima", "9.ima", "IM0", "a.b.c"]
    random.Random(1).shuffle(names)
    write(datasets[::-1], tmp_path / "shuffled", names)
    write(datasets[::2], tmp_path / "split" / "one")
    write(datasets[1::2], tmp_path / "split" / "two" / "deep", names)
    for folder in ("plain", "shuffled", "split"):
        series = only(tmp_path / folder)
        np.testing.assert_allclose(pixels_of(series), between(values, -160, 240), atol=1e-6)
        np.testing.assert_allclose(series.positions, 100 + 2.5 * np.arange(6))
        assert (series.kind, series.header_modality, len(series), series.size) == ("slices", "ct", 6, SIZE)
        assert (series.spacing, series.step) == ((0.5, 0.75), 2.5)
        assert [series.source(index).sop_instance_uid for index in range(6)] == [f"1.2.3.1.{n}" for n in range(1, 7)]
    two = only([tmp_path / "split" / "two", tmp_path / "split" / "one", tmp_path / "split"])
    assert len(two) == 6


def test_two_series_and_two_studies_in_one_folder(tmp_path):
    first, second, third = hounsfield(seed=1), hounsfield(4, seed=2), hounsfield(3, seed=3)
    other = ct(third, uid="1.2.9.1")
    for dataset in other:
        dataset.StudyInstanceUID = "1.2.9"
    write([*ct(first), *ct(second, uid="1.2.3.2"), *other], tmp_path)
    studies = read_studies(tmp_path)
    assert [study.uid for study in studies] == ["1.2.3", "1.2.9"]
    assert [[len(series) for series in study.series] for study in studies] == [[6, 4], [3]]
    for series, values in zip([*studies[0].series, *studies[1].series], (first, second, third), strict=True):
        np.testing.assert_allclose(pixels_of(series), between(values, -160, 240), atol=1e-6)


def test_copies_count_once_and_stand_in_for_damaged_ones(tmp_path):
    values = hounsfield()
    datasets = ct(values)
    write(datasets, tmp_path / "plain")
    for number, dataset in enumerate(datasets):
        dataset.compress(RLELossless, generate_instance_uid=False)
        save(dataset, tmp_path / "small" / f"{number}")
    both, small = only(tmp_path), only(tmp_path / "small")
    assert len(both) == len(small) == 6
    np.testing.assert_array_equal(pixels_of(both), pixels_of(small))
    assert all("plain" in source.path for source in both.sources)
    reasons = [skipped.reason for skipped in read_studies(tmp_path)[0].skipped]
    assert reasons == ["a copy of an image that is there already"] * 6
    file = tmp_path / "plain" / "3.dcm"
    file.write_bytes(file.read_bytes()[:-200])
    np.testing.assert_array_equal(pixels_of(only(tmp_path)), pixels_of(small))


def test_slices_that_share_a_uid_are_no_copies(tmp_path):
    values = hounsfield()
    datasets = ct(values)
    for dataset in datasets:
        dataset.SOPInstanceUID = "1.2.3.1.1"
    write(datasets, tmp_path)
    np.testing.assert_allclose(pixels_of(only(tmp_path)), between(values, -160, 240), atol=1e-6)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, [-1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0]])
@pytest.mark.parametrize("axes", ["LPS", "PIR"])
def test_dicom_and_the_nifti_made_of_it(tmp_path, orientation, axes):
    values = hounsfield(7)
    write(ct(values, orientation), tmp_path / "dicom")
    # By the definition of ImageOrientationPatient and ImagePositionPatient: x, y of DICOM run to the left and back.
    affine = np.eye(4)
    affine[:3, 0] = np.array(orientation[:3]) * 0.75
    affine[:3, 1] = np.array(orientation[3:]) * 0.5
    affine[:3, 2] = np.cross(orientation[:3], orientation[3:]) * 2.5
    affine[:3, 3] = -20, 7, 100
    volume = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine)
    wanted = nibabel.orientations.axcodes2ornt(axes)
    volume = volume.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), wanted))
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(volume, tmp_path / name)
        plane = {str(AXIAL): "axial", str(CORONAL): "coronal", str(SAGITTAL): "sagittal"}.get(
            str(orientation), "axial"
        )
        series, other = only(tmp_path / "dicom"), only(tmp_path / name, plane=plane)
        assert other.kind == "volume"
        for window in (None, "lung", ["lung", "bone", (0, 100)]):
            np.testing.assert_allclose(pixels_of(series, window=window), pixels_of(other, window=window), atol=1e-6)
        np.testing.assert_allclose(series.affine, other.affine, atol=1e-5)
        np.testing.assert_allclose(series.positions, other.positions, atol=1e-4)
        np.testing.assert_allclose(series.spacing, other.spacing, atol=1e-6)


def test_the_affine_names_places_in_the_patient(tmp_path):
    """A mark whose place in the patient the header defines is at the same place by the affine of upright slices."""
    for orientation in (AXIAL, CORONAL, SAGITTAL, [0, -1, 0, -1, 0, 0], [0.8, 0.6, 0, 0, 0, -1]):
        values = np.zeros((5, *SIZE), np.int16)
        values[3, 2, 9] = 1000
        folder = tmp_path / str(orientation)
        datasets = ct(values, orientation)
        write(datasets, folder)
        series = only(folder, window=(0, 10))
        ((index, row, column),) = np.argwhere(pixels_of(series) > 0.6)
        cosines, origin = np.array(orientation, float), np.array(datasets[3].ImagePositionPatient, float)
        place = (origin + 9 * 0.75 * cosines[:3] + 2 * 0.5 * cosines[3:]) * (-1, -1, 1)
        np.testing.assert_allclose((series.affine @ [row, column, series.slots[index], 1])[:3], place, atol=1e-4)


# --- order


def test_slices_go_from_feet_to_head_whatever_their_numbers(tmp_path):
    values = hounsfield()
    datasets = ct(values, step=-1.5)
    for dataset, number in zip(datasets, (4, 2, 6, 1, 3, 5), strict=True):
        dataset.InstanceNumber = number
    write(datasets, tmp_path)
    series = only(tmp_path)
    np.testing.assert_allclose(pixels_of(series), between(values[::-1], -160, 240), atol=1e-6)
    np.testing.assert_allclose(series.positions, 92.5 + 1.5 * np.arange(6))


def test_without_positions_the_numbers_count(tmp_path):
    values = hounsfield()
    datasets = ct(values)
    for dataset in datasets:
        del dataset.ImagePositionPatient
    write(datasets[::-1], tmp_path)
    series = only(tmp_path)
    np.testing.assert_allclose(pixels_of(series), between(values, -160, 240), atol=1e-6)
    assert (series.positions, series.affine, series.spacing) == (None, None, (0.5, 0.75))


def test_orientations_of_one_series_are_parts_of_it(tmp_path):
    write(ct(hounsfield(3)), tmp_path / "a")
    write(ct(hounsfield(4), CORONAL, **{}), tmp_path / "b")
    for number, file in enumerate(sorted((tmp_path / "b").iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID += f".9{number}"
        dataset.InstanceNumber += 10
        save(dataset, file)
    (study,) = read_studies(tmp_path)
    assert [(len(series), series.uid, series.part) for series in study.series] == [
        (3, "1.2.3.1", 0),
        (4, "1.2.3.1", 1),
    ]
    assert len({series.key for series in study.series}) == 2


def test_sizes_of_one_series_are_parts_of_it(tmp_path):
    """As in a scan that was continued with another matrix."""
    values = hounsfield(5)
    write([*ct(values)[:2], *ct(values[:, 1:, 2:])[2:]], tmp_path)
    (study,) = read_studies(tmp_path)
    assert [(len(series), series.size, series.part) for series in study.series] == [
        (2, SIZE, 0),
        (3, (SIZE[0] - 1, SIZE[1] - 2), 1),
    ]
    np.testing.assert_allclose(pixels_of(study.series[1]), between(values[2:, 1:, 2:], -160, 240), atol=1e-6)


def test_missing_slices_are_noted_and_leave_their_place(tmp_path):
    datasets = ct(hounsfield(9))
    write([dataset for number, dataset in enumerate(datasets) if number not in (3, 6, 7)], tmp_path)
    series = only(tmp_path)
    assert series.missing == [(2, 1), (4, 2)]
    assert series.notes == ["3 slices missing, behind slice 3, 5, counted from 1"]
    assert series.slots.tolist() == [0, 1, 2, 4, 5, 8]
    assert series.step == pytest.approx(2.5)
    np.testing.assert_allclose(series.affine @ [0, 0, 8, 1], [20, -7, 120, 1])


def test_uneven_and_repeated_positions_have_no_grid(tmp_path):
    datasets = ct(hounsfield(5))
    datasets[2].ImagePositionPatient = [-20, 7, 106.2]
    write(datasets, tmp_path / "uneven")
    assert only(tmp_path / "uneven").notes == ["the slices are unevenly spaced"]
    assert only(tmp_path / "uneven").affine is None
    for number, stray in enumerate((1e4, 1e9, 1e30)):  # a grid with all places between would fill the disk
        datasets[2].ImagePositionPatient = [-20, 7, stray]
        write(datasets, tmp_path / f"stray{number}")
        series = only(tmp_path / f"stray{number}")
        assert (len(series), series.notes, series.affine) == (5, ["the slices are unevenly spaced"], None)
    values = hounsfield(6)
    times = [*ct(values[:3]), *ct(values[3:])]
    for number, dataset in enumerate(times):
        dataset.SOPInstanceUID, dataset.InstanceNumber = f"1.2.8.{number}", number
    write(times, tmp_path / "twice")
    series = only(tmp_path / "twice")
    assert (series.notes, series.affine) == (["6 images at 3 positions"], None)
    order = values[[0, 3, 1, 4, 2, 5]]
    np.testing.assert_allclose(pixels_of(series), between(order, -160, 240), atol=1e-6)


def test_a_series_of_one_slice(tmp_path):
    write(ct(hounsfield(1), SliceThickness=4), tmp_path)
    series = only(tmp_path)
    assert (len(series), series.kind, series.step, series.slots.tolist()) == (1, "slices", None, [0])
    np.testing.assert_allclose(series.affine[:3, 2], [0, 0, 4])
    with pytest.raises(IndexError, match="no slice 1: it has 1"):
        series.slice(1)


# --- files with many frames


def enhanced(values, order, syntax=ExplicitVRLittleEndian):
    dataset = dicom(values[order], "1.2.3.1.1", ENHANCED_CT, NumberOfFrames=len(order))
    dataset.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75])],
            PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
        )
    ]
    dataset.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 10.0 + 2 * place])],
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-float(place))],
            FrameVOILUTSequence=[item(WindowCenter=40.5, WindowWidth=401)],
        )
        for place in order
    ]
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


@pytest.mark.parametrize("form", ["explicit", "implicit", "compressed", "deflated"])
def test_enhanced_files_are_sorted_by_position(tmp_path, form):
    values = hounsfield(5)
    syntax = {"implicit": ImplicitVRLittleEndian, "deflated": "1.2.840.10008.1.2.1.99"}
    dataset = enhanced(values, [3, 0, 4, 1, 2], syntax.get(form, ExplicitVRLittleEndian))
    if form == "compressed":
        dataset.compress(RLELossless, generate_instance_uid=False)
    save(dataset, tmp_path / "a")
    series = only(tmp_path)
    assert (series.kind, len(series), series.step) == ("slices", 5, 2)
    assert [source.frame for source in series.sources] == [1, 3, 4, 0, 2]
    expected = between(values - np.arange(5)[:, None, None], -160, 240)
    np.testing.assert_allclose(pixels_of(series), expected, atol=1e-6)


def encapsulated(dataset, frames, table, syntax="1.2.840.10008.1.2.4.50", parts=1):
    dataset.file_meta.TransferSyntaxUID = syntax
    if table == "extended":
        dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = (
            pydicom.encaps.encapsulate_extended(frames)
        )
    else:
        dataset.PixelData = pydicom.encaps.encapsulate(frames, parts, has_bot=table == "basic")
    dataset["PixelData"].VR = "OB"
    return dataset


@pytest.mark.parametrize(("table", "parts"), [("basic", 1), ("basic", 2), ("extended", 1), ("none", 1), ("none", 3)])
def test_a_colour_doppler_loop(tmp_path, table, parts):
    """JPEG frames in YBR_FULL_422, as echocardiographs write them, with and without tables of offsets."""
    pytest.importorskip("pylibjpeg")
    loop = np.zeros((6, 32, 48, 3), np.uint8)
    frames = []
    for index, picture in enumerate(loop):
        picture[:, :] = (40 * index, 100, 255 - 40 * index)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=1)
        frames.append(file.getvalue())
    tags = {"NumberOfFrames": 6, "PhotometricInterpretation": "YBR_FULL_422"}
    dataset = dicom(loop, "1.2.3.1.1", ULTRASOUND, modality="US", **tags)
    save(encapsulated(dataset, frames, table, parts=parts), tmp_path / "a")
    series = only(tmp_path)
    assert (series.kind, series.header_modality, len(series), series.affine) == ("frames", "ultrasound", 6, None)
    shown = pixels_of(series)
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - loop).max() <= 3
    for index in (5, 0):
        np.testing.assert_array_equal(series.slice(index).pixels, read_medical_image(tmp_path / "a", index).pixels)


def test_the_same_position_over_time_is_a_loop(tmp_path):
    values = hounsfield(4)
    datasets = ct(values, step=0.0)
    for dataset, number in zip(datasets, (3, 1, 4, 2), strict=True):
        dataset.InstanceNumber = number
    write(datasets, tmp_path)
    series = only(tmp_path)
    assert series.kind == "frames"
    np.testing.assert_allclose(pixels_of(series), between(values[[1, 3, 0, 2]], -160, 240), atol=1e-6)


def test_loops_of_one_series_are_apart(tmp_path):
    rng = np.random.default_rng(0)
    loops = [rng.integers(0, 256, (count, *SIZE)).astype(np.uint8) for count in (3, 5)]
    for number, loop in enumerate(loops):
        tags = {"NumberOfFrames": len(loop), "InstanceNumber": 2 - number}
        save(dicom(loop, f"1.2.3.1.{number}", ULTRASOUND, modality="US", **tags), tmp_path / f"{number}")
    (study,) = read_studies(tmp_path)
    assert [(len(series), series.kind, series.part) for series in study.series] == [(5, "frames", 0), (3, "frames", 1)]
    np.testing.assert_allclose(pixels_of(study.series[0]), loops[1] / 255, atol=1e-6)


def test_tiles_of_a_slide_without_its_label(tmp_path):
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (4, *SIZE, 3)).astype(np.uint8)
    kinds = ("VOLUME", "LABEL", "OVERVIEW")
    for number, kind in enumerate(kinds):
        tags = {"NumberOfFrames": 4, "ImageType": ["ORIGINAL", "PRIMARY", kind, "NONE"]}
        save(dicom(tiles, f"1.2.3.1.{number}", SLIDE, modality="SM", **tags), tmp_path / kind)
    large = rng.integers(0, 256, (1500, 1600, 3)).astype(np.uint8)
    save(dicom(large, "1.2.4.1.1", SLIDE, "1.2.4.1", "1.2.4", "SM"), tmp_path / "tile")
    slide, tile = read_studies(tmp_path)
    assert [(series.kind, len(series)) for series in slide.series] == [("tiles", 4)]
    np.testing.assert_array_equal(pixels_of(slide.series[0]), tiles)
    assert sorted(skipped.reason for skipped in slide.skipped) == [
        "the label of a slide",
        "the overview of a slide, which shows its label",
    ]
    assert (tile.series[0].kind, tile.series[0].header_modality) == ("image", "histopathology")
    np.testing.assert_array_equal(tile.series[0].slice(0).pixels, large)


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path):
    """A loop of 500 frames, a series and a volume, and the same with a tenth of the slices."""
    peaks = {}
    for count in (50, 500):
        rng = np.random.default_rng(0)
        loop = rng.integers(0, 256, (count, 64, 96)).astype(np.uint8)
        save(
            dicom(loop, "1.2.3.1.1", ULTRASOUND, modality="US", NumberOfFrames=count), tmp_path / f"loop{count}" / "a"
        )
        volume = nibabel.Nifti1Image(np.zeros((200, 160, count), np.int16), np.diag([-1, -1, 1, 1]))
        nibabel.save(volume, tmp_path / f"volume{count}.nii.gz")
        for name in (f"loop{count}", f"volume{count}.nii.gz"):
            series = only(tmp_path / name)
            assert len(series) == count
            indices = range(0, count, count // 10)
            peaks[name] = peak(lambda s=series, i=indices: [image.frame for _, image in s.slices(i)])
    for name in ("loop{}", "volume{}.nii.gz"):
        few, many = peaks[name.format(50)], peaks[name.format(500)]
        assert many < 1.1 * few + 2**18, (name, few, many)


# --- what is left out


def test_what_is_no_image_is_left_out_and_listed(tmp_path):
    write(ct(hounsfield(3)), tmp_path)
    pixels = np.zeros(SIZE, np.uint16)
    rest = {
        "a localiser": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "a dose report": {"SeriesDescription": "Dose Report", "sop_class": CAPTURE},
        "a screenshot": {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"], "sop_class": CAPTURE},
        "a presentation state": {"sop_class": "1.2.840.10008.5.1.4.1.1.11.1", "modality": "PR"},
        "a structured report": {"sop_class": "1.2.840.10008.5.1.4.1.1.88.33", "modality": "SR"},
        "a key object selection": {"sop_class": "1.2.840.10008.5.1.4.1.1.88.59", "modality": "KO"},
        "an encapsulated document": {"sop_class": "1.2.840.10008.5.1.4.1.1.104.1", "modality": "DOC"},
        "a registration, segmentation or other raw data": {"sop_class": "1.2.840.10008.5.1.4.1.1.66.4"},
        "it holds no image: neither rows nor columns": {"Rows": None},
    }
    for number, tags in enumerate(rest.values()):
        save(dicom(pixels, f"1.2.3.7.{number}", series=f"1.2.3.7{number}", **tags), tmp_path / f"x{number}")
    dose = dicom(pixels, "1.2.3.8.1", "1.2.840.10008.5.1.4.1.1.88.67", modality="SR")
    del dose.PixelData, dose.Rows, dose.Columns
    save(dose, tmp_path / "dose")
    bare = dicom(pixels, "1.2.3.8.2", series="1.2.3.8")
    del bare.PixelData
    save(bare, tmp_path / "bare")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden").write_text("hello")
    seen = []
    studies = read_studies(tmp_path, on_skip=seen.append)
    (study,) = studies
    assert [len(series) for series in study.series] == [3]
    expected = [*rest, "a dose report", "it holds no pixels: it is no image, or cut off"]
    assert sorted(skipped.reason for skipped in study.skipped) == sorted(expected)
    assert [skipped.reason for skipped in studies.skipped] == ["it is neither DICOM nor NIfTI nor a picture"]
    assert len(seen) == len(expected) + 1
    with pytest.raises(MedicalImageError, match=r"no image in .*notes.txt': 1 x it is neither"):
        read_studies(tmp_path / "notes.txt")


def test_damaged_slices_are_skipped_and_listed_once(tmp_path):
    values = hounsfield(5)
    write(ct(values), tmp_path)
    for number, cut in ((1, -300), (3, 20)):
        file = tmp_path / f"{number}.dcm"
        file.write_bytes(file.read_bytes()[:cut])
    seen = []
    (study,) = read_studies(tmp_path, on_skip=seen.append)
    (series,) = study.series
    for _ in range(2):
        found = list(series)
        assert [index for index, _ in found] == [0, 2, 3]  # one has no header, another too few pixels
    assert len(series.skipped) == 1
    assert series.skipped[0].reason.startswith("the file is damaged or cut off")
    assert series.missing == [(2, 1)]
    assert len(seen) == 2
    with pytest.raises(MedicalImageError, match="damaged"):
        series.slice(1)


def test_nothing_about_the_patient_is_kept(tmp_path):
    folder = tmp_path / "Secret^Name"
    write(ct(hounsfield(3)), folder)
    bad = folder / "1.dcm"
    bad.write_bytes(bad.read_bytes()[:-100])
    (folder / "text").write_text("no")
    studies = read_studies(folder)
    (study,) = studies
    list(study.series[0])
    assert repr(study) == "Study(1 series: 1 of slices; 3 images; 1 left out)"
    assert repr(study.series[0]) == "Series(slices, ct, 3 images)"
    printed = f"{studies!r}{study.series}{study.skipped}{studies.skipped}{study.series[0].sources}{study.key}"
    assert "secret" not in printed.lower()
    assert "1.2.3" not in printed
    kept = str(vars(study.series[0]._decode._members[study.series[0].source(0).path])).replace(str(folder), "")
    assert "secret" not in kept.lower()


# --- other files


def test_volumes_in_time(tmp_path):
    data = np.arange(8 * 9 * 5 * 3, dtype=np.int16).reshape(8, 9, 5, 3)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([2, 3, 4, 1])), tmp_path / "a.nii.gz")
    first, last = only(tmp_path, window=(500, 1000)), only(tmp_path, window=(500, 1000), volume=2)
    assert (first.notes, last.notes) == (
        ["volume 1 of 3; the others are not read"],
        ["volume 3 of 3; the others are not read"],
    )
    for series, volume in ((first, 0), (last, 2)):
        expected = between(data[::-1, ::-1, :, volume].transpose(2, 1, 0), 0, 1000)
        np.testing.assert_allclose(pixels_of(series), expected, atol=1e-6)
        assert (series.spacing, series.step) == ((3, 2), 4)
    with pytest.raises(MedicalImageError, match="1 x the file has no volume 3: it has 3"):
        read_studies(tmp_path, volume=3)


def test_planes_of_a_volume(tmp_path):
    data = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    nibabel.save(nibabel.Nifti1Image(data, np.diag([1, 2, 3, 1])), tmp_path / "a.nii")
    shapes = {"axial": (6, 5, 4), "coronal": (5, 6, 4), "sagittal": (4, 6, 5)}
    for plane, shape in shapes.items():
        series = only(tmp_path, plane=plane, window=(60, 120))
        assert pixels_of(series).shape == shape
        for index, row, column in itertools.product((0, shape[0] - 1), (0, shape[1] - 1), (1,)):
            voxel = np.rint(np.linalg.inv(np.diag([1, 2, 3, 1])) @ series.affine @ [row, column, index, 1]).astype(int)
            shown = series.slice(index).pixels[row, column]
            assert shown == pytest.approx(data[tuple(voxel[:3])] / 120)
    with pytest.raises(ArgumentError, match="axial"):
        read_studies(tmp_path, plane="oblique")


def test_damaged_volumes(tmp_path):
    data = np.random.default_rng(0).integers(0, 9999, (40, 50, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[:-100])
    series = only(tmp_path)
    assert list(series) == []
    assert len(series.skipped) == 5
    assert "damaged or cut off" in series.skipped[0].reason
    assert str(tmp_path) not in series.skipped[0].reason


def test_pictures_are_studies_of_one_image(tmp_path):
    rng = np.random.default_rng(0)
    gray, wide = rng.integers(0, 256, (9, 8)).astype(np.uint8), rng.integers(0, 4096, (9, 8)).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.tif")
    processor = MedMoEImageProcessor(size=64)
    studies = read_studies([tmp_path / "b.tif", tmp_path / "a.png"])
    assert [repr(study.series) for study in studies] == ["[Series(image, unknown modality, 1 image)]"] * 2
    for study, name in zip(studies, ("b.tif", "a.png"), strict=True):
        image = study.series[0].slice(0)
        torch.testing.assert_close(
            processor(image, return_tensors="pt").pixel_values,
            processor(tmp_path / name, return_tensors="pt").pixel_values,
            atol=1e-4,
            rtol=0,
        )
    assert studies[0].uid != studies[1].uid


def test_a_directory_of_a_disc(tmp_path):
    values = hounsfield(3)
    write(ct(values), tmp_path / "disc" / "images", ["i1", "I2", "I3"])
    save(dicom(values[0], "1.2.77.1", study="1.2.77"), tmp_path / "outside")
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.5"
    names = (["IMAGES", "I1"], ["images", "I2"], ["IMAGES", "GONE"], ["..", "outside"])
    directory.DirectoryRecordSequence = [
        item(DirectoryRecordType="PATIENT"),
        *(item(DirectoryRecordType="IMAGE", ReferencedFileID=name) for name in names),
    ]
    save(directory, tmp_path / "disc" / "DICOMDIR")
    studies = read_studies(tmp_path / "disc" / "DICOMDIR")
    assert [len(study) for study in studies] == [2]
    assert [skipped.reason for skipped in studies.skipped] == ["a DICOMDIR names this file, which does not exist"]
    (tmp_path / "disc" / "link.dcm").symlink_to(tmp_path / "gone.dcm")
    found = {Path(skipped.path).name: skipped.reason for skipped in read_studies(tmp_path / "disc").skipped}
    assert found["link.dcm"] == "it is a link to nothing"
    studies = read_studies(tmp_path / "disc")
    assert [len(study) for study in studies] == [3]


def test_wrong_arguments(tmp_path):
    with pytest.raises(PathNotFoundError, match="there is no such file or folder"):
        read_studies(tmp_path / "gone")
    with pytest.raises(MedicalImageError, match="there are no files"):
        read_studies(tmp_path)
    with pytest.raises(ArgumentError, match="there is no window 'lungs'"):
        read_studies(tmp_path, window="lungs")


# --- processor and model


@pytest.fixture(scope="module")
def processor():
    return MedMoEProcessor(MedMoEImageProcessor(size=64), MedMoETokenizer.from_words(["lung"], max_length=16))


def test_the_processor_takes_a_study(tmp_path, processor):
    values = hounsfield(5)
    write([*ct(values), *ct(values[:2], uid="1.2.3.2")], tmp_path)
    inputs = processor(study=tmp_path, text=["lung", "lung lung"], batch_size=2, window="lung")
    assert inputs["input_ids"].shape[0] == 2
    (study,) = read_studies(tmp_path, window="lung")
    for given in (inputs["pixel_values"], processor(study=study.series, batch_size=2, window="lung")["pixel_values"]):
        for _ in range(2):  # it can be iterated again
            batches = list(given)
            assert [batch["pixel_values"].shape[0] for batch in batches] == [2, 2, 1, 2]
            assert torch.cat([batch["series_ids"] for batch in batches]).tolist() == [0] * 5 + [1] * 2
            assert torch.cat([batch["slice_ids"] for batch in batches]).tolist() == [0, 1, 2, 3, 4, 0, 1]
            files = [source.path for series in study.series for source in series.sources]
            expected = processor(images=files, window="lung", return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), expected)
    with pytest.raises(ArgumentError, match="not both"):
        processor(images=values[0], study=tmp_path)
    with pytest.raises(ArgumentError, match="1 slice or more"):
        processor(study=tmp_path, batch_size=0)


def test_the_model_takes_a_study(tmp_path, processor, small_config, lived_in):
    write([*ct(hounsfield(5)), *ct(hounsfield(3, seed=4), uid="1.2.3.2")], tmp_path)
    model = lived_in(MedMoEModel(small_config()))
    batches = processor(study=tmp_path, batch_size=2)["pixel_values"]
    output = model.get_study_features(batches, modality=["ct", None])
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    ids = ["ct"] * 5 + [None] * 3
    with torch.no_grad():
        apart = [model.get_image_features(one[None], modality=name) for one, name in zip(pixels, ids, strict=True)]
    embeds = torch.nn.functional.normalize(torch.cat([one.pooler_output for one in apart]), dim=-1)
    torch.testing.assert_close(output.slice_embeds, embeds)
    assert output.series_ids.tolist() == [0] * 5 + [1] * 3
    assert output.slice_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    means = torch.stack([embeds[:5].mean(dim=0), embeds[5:].mean(dim=0)])
    torch.testing.assert_close(output.pooler_output, torch.nn.functional.normalize(means, dim=-1))
    routing = model.route(pixels)
    votes = torch.stack([routing.probabilities[:5].mean(dim=0), routing.probabilities[5:].mean(dim=0)])
    torch.testing.assert_close(output.votes, votes)
    assert output.expert_ids[:5].tolist() == [1] * 5
    assert output.expert_ids[5:].tolist() == routing.expert_ids[5:].tolist()
    torch.testing.assert_close(model.get_study_features(pixels[5:]).pooler_output, output.pooler_output[1:])
    with pytest.raises(ValueError, match="1 entries, but there is a series 1"):
        model.get_study_features(batches, modality=["ct"])
    with pytest.raises(ValueError, match="no slices"):
        model.get_study_features([])


def test_files_that_state_very_many_slices_cost_no_memory(tmp_path):
    """Headers of a few bytes, which a server may be sent."""
    save(dicom(np.zeros(SIZE, np.uint8), "1.2.3.1.1", ULTRASOUND, NumberOfFrames=300_000), tmp_path / "a.dcm")
    volume = nibabel.Nifti2Image(np.zeros((2, 2, 2), np.int16), np.diag([-1, -1, 1, 1]))
    content = bytearray(volume.to_bytes())
    content[40:48] = (10**6).to_bytes(8, "little")  # the third dimension
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    found = []
    assert peak(lambda: found.extend(read_studies(tmp_path, on_skip=found.append))) < 2**24
    skipped, (study,) = found[:-1], found[-1:]
    assert len(study) == 1
    assert ["more" in one.reason and "than it has bytes" in one.reason for one in skipped] == [True] * 3


def test_a_limit_of_slices_counts_all_files(tmp_path):
    write(ct(hounsfield(3)), tmp_path)
    save(dicom(np.zeros((4, *SIZE), np.uint8), "1.2.3.2.1", ULTRASOUND, "1.2.3.2", NumberOfFrames=4), tmp_path / "a")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 5), np.int16), np.diag([-1, -1, 1, 1])), tmp_path / "a.nii")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert sum(len(study) for study in read_studies(tmp_path, max_slices=13)) == 13
    with pytest.raises(ImageTooLargeError, match="more than 12 slices"):
        read_studies(tmp_path, max_slices=12)


def test_many_compressed_volumes_keep_few_files_open(tmp_path):
    """A data set of thousands of volumes would use up the file descriptors."""
    data = [np.full((4, 5, 3), 10 * number, np.int16) for number in range(6)]
    for number, values in enumerate(data):
        nibabel.save(nibabel.Nifti1Image(values, np.diag([-1, -1, 1, 1])), tmp_path / f"{number}.nii.gz")
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("open files can be counted on Linux")
    studies = read_studies(tmp_path, window=(50, 100))
    before = len(list(folder.iterdir()))
    for index in (0, 2, 1):  # again and again, as for pictures of key slices
        for study, values in zip(studies, data, strict=True):
            np.testing.assert_allclose(study.series[0].slice(index).pixels, values[..., index].T / 100, atol=1e-6)
    assert len(list(folder.iterdir())) <= before + 2
