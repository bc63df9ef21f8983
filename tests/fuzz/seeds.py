"""Small inputs that the fuzzing starts from, all made here: headers with a synthetic patient, pictures, tables, files.

Each function returns inputs of one kind of reader. Equal calls return equal bytes.
"""

import csv
import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

SECRET = "Zzyzxowitz"
"""Name of the synthetic patient: no message may quote it."""

_PIXELS = np.arange(8 * 6, dtype=np.uint16).reshape(6, 8)


def dicom_syntaxes() -> dict[str, str]:
    """Names and UIDs of transfer syntaxes."""
    return {
        "implicit": "1.2.840.10008.1.2",
        "explicit": "1.2.840.10008.1.2.1",
        "deflated": "1.2.840.10008.1.2.1.99",
        "big": "1.2.840.10008.1.2.2",
        "rle": "1.2.840.10008.1.2.5",
        "jpeg": "1.2.840.10008.1.2.4.50",
        "jpeg lossless": "1.2.840.10008.1.2.4.70",
        "jpeg-ls": "1.2.840.10008.1.2.4.80",
        "jpeg 2000": "1.2.840.10008.1.2.4.90",
    }


def dicom_file(syntax: str = "explicit", pixels: np.ndarray = _PIXELS, frames: int = 1, **tags: Any) -> bytes:
    """Writes a DICOM file.

    Args:
        syntax: A name of `dicom_syntaxes`.
        pixels: (H, W), (H, W, 3), or with several frames (N, H, W).
        frames: Number of frames.
        **tags: Values of tags by keyword, or None to leave a tag out.

    Returns:
        The bytes of the file.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    uid = UID(dicom_syntaxes()[syntax])
    dataset = Dataset()
    shape = pixels.shape[1:] if frames > 1 else pixels.shape
    bits = pixels.dtype.itemsize * 8
    color = len(shape) == 3
    values = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.5",
        "PatientName": f"{SECRET}^Anna",
        "PatientID": f"ID-{SECRET}",
        "Modality": "CT",
        "Rows": shape[0],
        "Columns": shape[1],
        "SamplesPerPixel": 3 if color else 1,
        "PhotometricInterpretation": "RGB" if color else "MONOCHROME2",
        "PlanarConfiguration": 0 if color else None,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "NumberOfFrames": frames if frames > 1 else None,
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    encoded = {"rle": _rle, "jpeg": _picture_bytes("JPEG"), "jpeg 2000": _picture_bytes("JPEG2000")}.get(syntax)
    little = syntax != "big"
    if encoded is None:
        dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
    else:
        parts = [encoded(part) for part in (pixels if frames > 1 else [pixels])]
        dataset.PixelData = encapsulate(parts)
    dataset["PixelData"].VR = "OB" if encoded else "OW"
    meta = dataset.file_meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid, "1.2", "1.2.3.4"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _rle(pixels: np.ndarray) -> bytes:
    """Encodes by PS3.5 annex G, each byte plane as runs of literal bytes."""
    planes = [pixels.astype(pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(pixels.size, -1).T]
    segments = []
    for plane in planes[0]:
        content = b"".join(
            bytes([len(part) - 1]) + part
            for part in (plane.tobytes()[at : at + 128] for at in range(0, plane.size, 128))
        )
        segments.append(content + b"\0" * (len(content) % 2))
    offsets = [64 + sum(map(len, segments[:index])) for index in range(len(segments))]
    return struct.pack("<16L", len(segments), *offsets, *[0] * (15 - len(segments))) + b"".join(segments)


def _picture_bytes(kind: str) -> Any:
    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        options = {"irreversible": False, "no_jp2": True} if kind == "JPEG2000" else {}
        Image.fromarray(pixels.astype(np.uint8)).save(file, kind, **options)
        return file.getvalue()

    return encode


def dicom() -> list[bytes]:
    """Files in every transfer syntax that is read, and headers with everything that the reader looks at."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def item(**tags: Any) -> Dataset:
        made = Dataset()
        for keyword, value in tags.items():
            setattr(made, keyword, value)
        return made

    small = _PIXELS.astype(np.uint8)
    colors = np.stack([small, small + 1, small + 2], axis=-1)
    lut = item(LUTDescriptor=[64, 0, 16], LUTData=np.arange(0, 6400, 100, dtype="<u2").tobytes())
    groups = {
        "SharedFunctionalGroupsSequence": Sequence(
            [
                item(
                    PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.5, 0.6], SliceThickness=2)]),
                    PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
                )
            ]
        ),
        "PerFrameFunctionalGroupsSequence": Sequence(
            [
                item(
                    PlanePositionSequence=Sequence([item(ImagePositionPatient=[0, 0, index])]),
                    FrameVOILUTSequence=Sequence([item(WindowCenter=20, WindowWidth=40)]),
                )
                for index in range(3)
            ]
        ),
    }
    place = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 5], "PixelSpacing": [1, 1]}
    stack = np.stack([_PIXELS, _PIXELS + 1, _PIXELS + 2])
    made = [
        dicom_file(RescaleSlope="1", RescaleIntercept="-1024", WindowCenter=["40", "50"], WindowWidth="400", **place),
        dicom_file("implicit", pixels=_PIXELS.astype(np.int16), PixelPaddingValue=-1, InstanceNumber=3, **place),
        dicom_file("big", Modality="MR"),
        dicom_file("deflated", Modality="US", pixels=small),
        dicom_file("rle"),
        dicom_file("rle", pixels=small, frames=1, BitsStored=7, HighBit=7),
        dicom_file("jpeg", pixels=small, Modality="DX", PhotometricInterpretation="MONOCHROME1"),
        dicom_file("jpeg 2000", pixels=small),
        dicom_file(pixels=stack, frames=3, **groups),
        dicom_file("jpeg", pixels=np.stack([small, small]), frames=2),
        dicom_file(pixels=colors, PatientOrientation=["L", "F"], Modality="OP"),
        dicom_file(pixels=small, VOILUTSequence=Sequence([lut]), ModalityLUTSequence=Sequence([lut])),
        dicom_file(
            pixels=small,
            PhotometricInterpretation="PALETTE COLOR",
            **{
                f"{color}PaletteColorLookupTable{part}": value
                for color in ("Red", "Green", "Blue")
                for part, value in (
                    ("Descriptor", [64, 0, 16]),
                    ("Data", np.arange(0, 6400, 100, dtype="<u2").tobytes()),
                )
            },
        ),
        dicom_file(
            pixels=small,
            SequenceOfUltrasoundRegions=Sequence(
                [item(PhysicalDeltaX=0.1, PhysicalDeltaY=0.1, PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3)]
            ),
        ),
        dicom_file(Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"),
        dicom_file(
            SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6", pixels=stack, frames=3, ImageType=["A", "B", "LABEL"]
        ),
    ]
    first = made[0]
    return [*made, first[132:], first[:-20], _directory()]


def _directory() -> bytes:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import ExplicitVRLittleEndian

    dataset, record = Dataset(), Dataset()
    record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["a.dcm"]
    dataset.DirectoryRecordSequence = Sequence([record, record])
    meta = dataset.file_meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def nifti() -> list[bytes]:
    """Volumes of several types, shapes and affines, plain and compressed."""
    import nibabel

    volume = np.arange(4 * 5 * 3, dtype=np.int16).reshape(4, 5, 3) * 30 - 1000
    affine = np.diag([-0.7, 0.8, 3, 1])
    made = []
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        for voxels in (
            volume,
            volume.astype(np.float32),
            volume.astype(np.uint8),
            np.stack([volume] * 2, axis=-1),
            volume[..., :1],
        ):
            image = kind(voxels, affine)
            image.header["cal_min"], image.header["cal_max"] = (0, 50) if voxels.dtype == np.uint8 else (0, 0)
            image.header["descrip"] = SECRET.encode()
            made.append(image.to_bytes())
    colors = np.zeros((4, 5, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    made.append(nibabel.Nifti1Image(colors, affine).to_bytes())
    return [*made, gzip.compress(made[0], mtime=0), gzip.compress(made[1], mtime=0), made[0][:-40]]


def pictures() -> list[bytes]:
    """Small pictures in the formats and modes that scans come in, and text forms of one."""
    gray = np.arange(12 * 10, dtype=np.uint8).reshape(10, 12)
    wide = (gray.astype(np.uint16) * 257).view(np.uint16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, SECRET
    made = []

    def add(image: Image.Image, kind: str, **options: Any) -> None:
        file = io.BytesIO()
        image.save(file, kind, **options)
        made.append(file.getvalue())

    color = Image.fromarray(np.stack([gray, gray + 1, gray + 2], axis=-1))
    plain = Image.fromarray(gray)
    add(plain, "PNG")
    add(color, "PNG", exif=exif)
    add(Image.fromarray(wide), "PNG")
    add(color.convert("P"), "PNG", transparency=3)
    add(color.convert("RGBA"), "PNG")
    add(color, "JPEG", exif=exif, quality=60)
    add(plain, "JPEG", progressive=True)
    add(color.convert("CMYK"), "JPEG")
    add(Image.fromarray(wide), "TIFF")
    add(color, "TIFF", compression="tiff_lzw")
    add(plain, "TIFF", compression="packbits")
    add(Image.fromarray(gray.astype(np.float32)), "TIFF")
    add(Image.fromarray(gray.astype(np.int32)), "TIFF")
    add(color, "GIF", save_all=True, append_images=[color.rotate(90)], duration=10)
    add(color, "BMP")
    add(color, "WEBP", lossless=True)
    add(plain, "PPM")
    add(color, "TGA")
    add(plain, "JPEG2000")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.stack([wide] * 3, axis=-1).reshape(10, -1))
    made.append(png(12, 10, 16, 2, zlib.compress(rows)))
    return made


def png(width: int, height: int, bits: int, color: int, content: bytes) -> bytes:
    """Writes a PNG of compressed rows."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)),
        (b"IDAT", content),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _small_png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), 9).save(file, "PNG")
    return file.getvalue()


def tars() -> list[bytes]:
    """WebDataset tars: regular, concatenated, with folders, links, long names, and cut off."""
    picture = _small_png()

    def made(*files: tuple[str, bytes], kind: int = tarfile.USTAR_FORMAT, link: str = "") -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as archive:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            if link:
                member = tarfile.TarInfo("c.png")
                member.type, member.linkname = tarfile.SYMTYPE, link
                archive.addfile(member)
        return file.getvalue()

    pair = (("a.png", picture), ("a.txt", f"CT of {SECRET}.".encode()), ("a.cls", b"1"))
    regular = made(*pair, ("b.png", picture), ("b.json", b'{"x": 1}'))[:6144]
    return [
        regular,
        made(*pair, *pair)[:7168],
        made(("d/e.f/a.png", picture), ("x" * 120 + ".txt", b"MRI."), kind=tarfile.PAX_FORMAT),
        made(("d/" + "y" * 120 + ".png", picture), kind=tarfile.GNU_FORMAT, link="../../etc/hosts"),
        regular[:2000],
        b"",
    ]


def csv_tables() -> list[bytes]:
    """CSV files with the delimiters, quotes and encodings of exports."""

    def made(delimiter: str, *rows: tuple[str, ...]) -> str:
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter).writerows(rows)
        return file.getvalue()

    head = ("path", "report", "label", "modality", "patient")
    text = made(",", head, ("x.png", 'CT, "small" nodule', "1", "ct", SECRET), ("x.png", "a\nb", "", "mri", "7.0"))
    return [
        text.encode(),
        made(";", head, ("x.png", "Größe 1,5 cm", "0", "CT", "a")).encode("cp1252"),
        made("\t", head, ("x.png", "µ", "", "", "b")).encode("utf-16"),
        ("\ufeff" + made("|", head, ("x.png", "no", "n/a", "xray", ""), ("x.png",))).encode(),
        b'a, b, c\n1, "2", 3\n"x" y, 1, 2\n',
        b'path,report\nx.png,"never closed\n',
    ]


def jsonl_tables() -> list[bytes]:
    """JSONL files of rows of all kinds of values."""
    rows: list[Any] = [
        {"image": "x.png", "caption": f"CT scan of {SECRET}.", "label": 1, "modality": "ct", "subject": 7.0},
        {"image": {"path": "x.png"}, "text": "MRI_openi_Clear._openi_", "label": ["a", "b"], "modality": 2},
        {"image": {"bytes": None, "path": None}, "caption": None, "organ": "lung", "view": ["pa", "lateral"]},
        {"image": "http://example.com/x.png", "caption": "a", "modality": "unknown"},
        {"image": "../x.png", "caption": {"a": [1, 2.5, True]}, "organ": float("nan"), "view": "", "label": 1e300},
        7,
    ]
    lines = [json.dumps(row) for row in rows]
    return ["\n".join(lines).encode(), *(line.encode() for line in lines), "\n".join(lines).encode("utf-16"), b"{}\n{"]


def parquets() -> list[bytes]:
    """Parquet files of images and captions."""
    import pyarrow
    import pyarrow.parquet

    made = []
    for compression in ("none", "snappy", "gzip"):
        for table in (
            {"image": [{"bytes": _small_png(), "path": "x"}] * 2, "caption": ["CT.", "MRI."]},
            {"label": [1, None, 3], "caption": [["a"], [], None], "x": [1.5, None, 2.0]},
        ):
            file = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(table), file, compression=compression, row_group_size=2)
            made.append(file.getvalue())
    return made


def training_files() -> list[bytes]:
    """Configurations of `medmoe train`."""
    return [
        b"output_dir: runs/x\nmodel: {preset: tiny}\ndata: {train: [{kind: phantom, length: 8}]}\nmax_steps: 4\n",
        b"output_dir: runs/x\nmodel: {from_pretrained: small}\ndata:\n  train:\n  - {kind: csv, files: [a.csv], image:"
        b" path, caption: report, modality: [dicom, caption]}\n  validation_share: 0.2\n  augmentation: standard\n"
        b"freeze: [text_model]\nlearning_rate: 1.0e-4\nlora: {rank: 8}\nevaluate_every: 20\nbatch_size: 16\n",
        b"output_dir: &a runs/x\nrun: *a\nmax_steps: 1_000\nlearning_rate: .inf\nseed: 0x10\nwhen: 2020-13-45\n",
        b"a: &a [1]\nb: [*a, *a]\nc: !!python/object:os.system x\n<<: {d: 1}\n? [e]\n: 2\n",
    ]


def source_files() -> list[bytes]:
    """Files of sources."""
    return [
        b"- {kind: phantom, image_size: 64, length: 8, modalities: [ct, mri]}\n",
        b"- {kind: csv, files: [a.csv], image: path, caption: report, label: tissue, modality: 'field:modality'}\n",
        b"- {kind: webdataset, files: ['t-{000..003}.tar'], modality: [dicom, caption], weight: 2, caption_rule: "
        b"auto}\n",
        b"- kind: jsonl\n  files: [a.jsonl]\n  captions: ['{label} of the {organ}', {field: text, weight: 2}]\n"
        b"  synonyms: {label: {0: [no finding, normal]}}\n  where: {split: [train]}\n  where_not: {x: '*'}\n",
        b"- {kind: imagefolder, path: tiles, caption_template: 'Colon, {label}.', modality: histopathology}\n",
        b"- {kind: hub, path: a/b, split: train, revision: x, rows: 5}\n- {kind: parquet, files: [p.parquet]}\n",
    ]


def recipe_files() -> list[bytes]:
    """Recipes of evaluations."""
    common = (
        b"name: t\ntitle: T\ntasks: [zero-shot, linear-probe]\nmodality: histopathology\nmetric: accuracy\n"
        b"expected: tiles/SPLIT/CLASS/*.png\nsource: here\nlicense: CC0\noverlaps: [None known.]\n"
    )
    prompts = b"classes: [glands, stroma]\nprompts:\n  glands: [Glands.]\n  stroma: [Stroma.]\n"
    return [
        common + prompts + b"layout: {kind: folder, splits: {train: tiles/train, test: tiles/test}}\n",
        common + prompts + b"layout: {kind: table, tables: {test: a.csv}, image: '{path}', label: x}\n",
    ]


def task_files() -> list[bytes]:
    """Tasks as users write them, and as checkpoints keep them."""
    return [
        b"name: chest\nprompts:\n  normal: [Clear lungs.]\n  effusion: [A pleural effusion.]\n",
        b"- {name: a, kind: multi-label, prompts: {x: [X.]}, negative_prompts: {x: [No X.]}, labels: {x: [1, y]}}\n",
        b"pneumonia: [There is pneumonia.]\nnormal: [Normal.]\n",
        *tasks_json(),
    ]


def tasks_json() -> list[bytes]:
    """Files `tasks.json`."""
    numbers = {"a": 0.25, "b": 0.5}
    calibration = {
        "temperature": 2.0,
        "bias": numbers,
        "thresholds": numbers,
        "quantiles": numbers,
        "coverage": 0.9,
        "conformal": "marginal",
        "prior": numbers,
        "prevalence": {},
        "measured": {"auc": [0.9, 0.8, 0.95]},
    }
    task = {"prompts": {"a": ["A."], "b": ["B."]}, "kind": "multi-class", "score": "mean", "modality": "ct"}
    tokens = {"A.": {"input_ids": [2, 5, 3], "word_ids": [-1, 0, -1]}}
    return [
        json.dumps({"schema": 1, "tasks": {"t": task, "u": {**task, "calibration": calibration}}}).encode(),
        json.dumps({"schema": 1, "tasks": {"t": {**task, "tokens": tokens, "score": "global"}}}).encode(),
        json.dumps({"schema": 2, "tasks": {}}).encode(),
    ]


def model_configurations() -> list[bytes]:
    """Files `config.json` of checkpoints."""
    from medmoe_hf.model.configuration_medmoe import MedMoEConfig

    return [
        json.dumps(MedMoEConfig.from_preset(name).to_diff_dict(), default=str).encode() for name in ("tiny", "paper")
    ]


def checkpoints() -> list[bytes]:
    """Files of `torch.save` in both formats, safetensors, and pickles that would run something."""
    import torch
    from safetensors.torch import save

    class Runs:
        def __reduce__(self) -> Any:
            return __import__("os").system, ("true",)

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    made = [save(tensors)]
    for content in (tensors, {"state_dict": tensors, "epoch": 3, "who": SECRET}, {"a": tensors["a"]}):
        # The first format orders storages by their addresses: of two, the order would differ from run to run.
        for zipped in (True,) if len(content) > 1 else (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            saved = file.getvalue()
            # The first format names storages by their addresses, which differ from run to run.
            addresses = list(dict.fromkeys(re.findall(rb"X....(\d{12,})", saved, re.DOTALL)))
            for number, address in enumerate(addresses):
                name = b"%012d" % number
                saved = saved.replace(struct.pack("<L", len(address)) + address, struct.pack("<L", 12) + name)
            made.append(saved)
    for protocol in (0, 2, 4):
        made.append(pickle.dumps({"a": Runs(), "b": [1, (2, {3}), b"x", bytearray(b"y"), frozenset("z")]}, protocol))
    return made


def captions() -> list[bytes]:
    """Reports, tagged captions, templates, and text that regular expressions like least."""
    texts = [
        f"Axial CT of the chest of {SECRET}, compared with the previous radiograph. No effusion.",
        "No effusion._openi_Clear lungs._openi_",
        "a_dr_b_dr_" * 3,
        "{view}, {label} of the {organ!r:>10} .",
        "1. Nodule of 1.5 cm | Q: Large? A: No\n\nDr. Who vs. (a) [b] {c}. .,;: , .",
        "recommend follow up with further evaluation by MRI if clinically indicated as warranted",
        "x " * 200 + "CT",
        "\u0130\u00df\ufb01\u0301\u200d\U0001f9e0 [MASK] [CLS] ##a \x00\x1f",
        ",;:.!? ) ] ( [ " * 20,
    ]
    return [text.encode() for text in texts]
