"""Inputs that once were findings: each by the name of its harness, in the smallest form, with what went wrong."""

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
import seeds
from PIL import Image


def _tasks(**fields: object) -> bytes:
    task = {"prompts": {"a": ["A."], "b": ["B."]}, **fields}
    return json.dumps({"schema": 1, "tasks": {"t": task}}).encode()


def _calibrated(**changes: object) -> bytes:
    content = json.loads(seeds.tasks_json()[0])
    content["tasks"]["u"]["calibration"].update(changes)
    return json.dumps(content).encode()


def _float_picture(value: float) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.float32)).save(file, "TIFF")
    return file.getvalue()


def _legacy(content: bytes) -> bytes:
    """A file of `torch.save` in its first format: three pickles before that of the content."""
    head = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + content


def _nested(depth: int) -> bytes:
    """A tuple of a tuple of a tuple, each twice: few bytes, and 2 ** depth parts to be hashed."""
    return b"K\x01" + b"2\x86" * depth


def _compressed_zeros() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("x/data.pkl"), pickle.dumps({}, 2))
        archive.writestr(zipfile.ZipInfo("x/data/0"), b"\0" * 2**21, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _negative_tar() -> bytes:
    """A tar whose second header states a size of -513 bytes: what follows is this header again."""
    first = bytearray(seeds.tars()[0][:512])
    headers = []
    for size in (0, -513):
        header = first[:124] + size.to_bytes(12, "big", signed=True) + first[136:148] + b" " * 8 + first[156:]
        header[124] |= 0x80
        header[148:156] = b"%06o\0 " % sum(header)
        headers.append(bytes(header))
    return b"".join(headers) + bytes(1024)


def _negative_nifti() -> bytes:
    content = bytearray(seeds.nifti()[0])
    struct.pack_into("<hhhh", content, 40, 3, 4, 5, -2)
    return bytes(content)


def million_slices() -> bytes:
    """A compressed NIfTI-2 of four million slices of one voxel, in some four kilobytes."""
    import nibabel

    image = nibabel.Nifti2Image(np.zeros((1, 1, 2), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    struct.pack_into("<q", content, 16 + 3 * 8, 2**22)
    return gzip.compress(bytes(content) + bytes(2**22), mtime=0)


FINDINGS: list[tuple[str, str, bytes]] = [
    ("training", "an unknown key with a bracket: IndexError", b"'[e]': 2\noutput_dir: x\n"),
    ("task", "an unknown key with a bracket: IndexError", b'[{"name": "a", "prompts": {"x": ["X."]}, "n[": 1}]'),
    ("sources", "a tag without a number: IndexError", b"- {kind: hub, path: a/b, !!int : parquet}\n"),
    ("recipe", "a key that is a number: TypeError", b"name: t\n7: x\n"),
    ("tasks", "tokens that are a number: TypeError", _tasks(tokens=7)),
    ("tasks", "tokens that are null: read as none", _tasks(tokens=None)),
    ("tasks", "tokens that are no lists: TypeError", _tasks(tokens={"A.": {"input_ids": 5}})),
    ("tasks", "a title that is NaN: read, and not written", _tasks(title=float("nan"))),
    ("tasks", "a number beyond float64: read, and not written", _tasks(title="x").replace(b'"x"', b"1e999")),
    ("tasks", "half a character: UnicodeEncodeError", _tasks(title="\ud800")),
    ("tasks", "a bias that is a list: AttributeError", _calibrated(bias=["a", "b"])),
    ("tasks", "a whole number beyond float64: OverflowError", _calibrated(temperature=10**400)),
    ("tasks", "a whole number beyond int64: OverflowError when it is used", _calibrated(temperature=10**30)),
    ("tasks", "a number beyond float32: NaN when it is used", _calibrated(bias={"a": 1e300, "b": 1e300})),
    ("tasks", "very deep JSON: RecursionError", b"[" * 4000),
    ("config", "names of labels that are text: AttributeError", b'{"vision_config": {"id2label": "x"}}'),
    ("config", "names of labels of the Swin: text", b'{"vision_config": {"swin_config": {"id2label": "x"}}}'),
    ("identifiers", "a carriage return within a line: csv.Error", b"a [\r b"),
    ("picture", "a picture of NaN: ValueError of no class of ours", _float_picture(float("nan"))),
    ("picture", "a picture of infinity: ValueError of no class of ours", _float_picture(float("inf"))),
    ("picture", "a palette that is missing: AssertionError", seeds.png(12, 10, 8, 3, zlib.compress(bytes(130)))),
    ("tar", "a negative size: endless, and ever more memory", _negative_tar()),
    ("parquet", "names that are not UTF-8: UnicodeDecodeError", seeds.parquets()[1].replace(b"label", b"lab\x80l")),
    ("nifti", "minus two slices: an image of none", _negative_nifti()),
    ("studies", "a volume of minus two slices", _negative_nifti()),
    ("caption", "a sentence of mentions: time grows with the square of its length", b"no x-ray " * 450),
    ("caption", "a run of white space: time grows with the square of its length", b"a" + b" " * 4000 + b"b"),
    ("caption", "the width of a field: a text of ten gigabytes", b"{x:>9999999999}"),
    ("caption", "a width that a row states", b"{x:>{label}}"),
    ("checkpoint", "a frame beyond the address space: OverflowError", b"\x80\x04\x95" + b"\xff" * 8),
    ("checkpoint", "the number of an object, 2 ** 31: 32 GiB", _legacy(b"\x80\x02}r\xff\xff\xff\x7f.")),
    ("checkpoint", "the size of a bytearray: MemoryError", _legacy(b"cbuiltins\nbytearray\n(I99999999999\ntR.")),
    ("checkpoint", "a list of a range: endless", _legacy(b"cbuiltins\nlist\n(cbuiltins\nrange\n(I99999999999\ntRtR.")),
    ("checkpoint", "text of a tuple of tuples: endless", _legacy(b"cbuiltins\nstr\n(" + _nested(40) + b"tR.")),
    ("checkpoint", "a key that is a tuple of tuples: endless", _legacy(b"}" + _nested(40) + b"K\x01s.")),
    ("checkpoint", "the defaults of a function of torch: changed", _legacy(
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b.")),
    ("checkpoint", "an id that is text: AssertionError", _legacy(b"\x80\x02X\x01\x00\x00\x00aQ.")),
    ("checkpoint", "two megabytes of zeros in two kilobytes", _compressed_zeros()),
    ("checkpoint", "a header of safetensors of 2 ** 63 bytes", struct.pack("<Q", 2**63) + b"{}"),
]  # fmt: skip
