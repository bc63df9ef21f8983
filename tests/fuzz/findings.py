"""Inputs that once were findings: each by the name of its harness, in the smallest form, with what went wrong."""

import base64
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


def _packed(text: str) -> bytes:
    """An input as the campaign found it, which no few lines would make."""
    return zlib.decompress(base64.b85decode(text))


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
    (
        "picture",
        "a transparent colour that the palette does not have: ValueError",
        _packed(
            "c-n<hy=&7^6un0LAlO0eAnIT`v=9Ufr>n7+6dO!psR6+$AY24j2XPVy!PV`8gM&yWSLe92$er9&aBy-KClRjaynnz4"
            "$&dT)*ZFua_oug3x)-}<wldlq9`JjHzwYVd{QvOl&XHN?-Q$DlUHjjGnVW@KnpKMdb6CI<RxJ%TcMG?4t5%IL4~wu2"
            "tJaJ(Pm8ont2PT|UKV9pR&6viiLI<<Qk!@j2q1xKiy6Bk9O<ZrgJ};$AOqE4vDy=n$V4@iZ1zGFvQP~)1eq8KiYUYZ"
            "8q7&-WvwXjf+yV5y&6L<W*p%eUX3tuFdgZcUX4Ftu{z4LyqX-4HWY*GNmuGX3<#MR2})u?dpMYr*edOyNGBtzNlAuW"
            "%s4ZuDNDk{!E{zs6B;ssIm%33r8^{*np5m$14Kx(QW)h5v{s{2lVlQ<)Fz&4o>59N<YLCvEQH+VRt7XsjzXRYR!U|W"
            "3@Im+DKX?X#8048kYzuFLL5?q^%|gBQQ`&9&)K&_K9H09<Jm4lJ7(iAKW^}5IvU=bJ$e0LzJ20p=g*agYm38q|IM|<"
            "#^Ti5@#Mnq$=PSi)k_<nzg~T{+*)q+2L0uFumAl;uQ%v@S|9Yz9ZlwY+nvqn{o6bD)@=3T<?DaXZ$8q)AMH+u?|0_U"
            "{{dkwbwd"
        ),
    ),
    (
        "tar",
        "a sparse file that is cut off: IndexError",
        _packed(
            "c-l+UE67V{pe--}0y7g6FbxFgw1J_aA)E~nH#0LcVNft&paUo^E=eo`TFEdnL1%!UJ1>_M7m&&8>ERLtq**|i10>lq"
            ">);|FCE)4e7*a7O`AJGbLPC;*A_F5ogP_yO{URVWp00i_>zoprC~<@U!zdUKkf>KuQ8GZe|34By$^C`~h9+hv#taI<"
            "qxqi-;Q#*-nz#)|q^|+s_c-e"
        ),
    ),
    (
        "tar",
        "the size of extended headers beyond a machine word: OverflowError",
        _packed(
            "c-l+RPt{A)Pt+^OOJ|@iD21~OfWXYe1WW?~I&ENRXb5M6#SMX^34?+Um0iSw)tSX5iA6x`8Ac}P4DfU3<&xq8GI>2c"
            "T!Ns%#KHlR?3s0N5s(t_ba4!+n3Mb@B_Sap$w85Uk)J`(Y2|(qkQz@{KbLh*2~A|!{T~kgVU;%}WWZg9Q9vQk)7R5?"
            "2uQ5(NKH&hEuxJbIPyIx{`WxQ|L=d){BLSxY{;OHPLBW>M){uuLN$=0$I#eBp&+p&!?uD};5&Y4y^@L&uF-rrPyi!7"
            "wow?}#s<*z#Dzr?wIu+u-vPCZFo4Q|^&1n=kJ*xd>xYROn;IJcOA>?8l7!~KH^@_uOsxXLH&ix?RVfW-_W=M4jMO*"
        ),
    ),
    (
        "tar",
        "the size of a long name beyond a machine word: OverflowError",
        _packed(
            "c-l+RPt{A)Pt+^OOJ|@JFaQEG6B95E1n9JZp`jt14G}jtGcsdP2&S?-Sg;9}7MCOz0j*>hnV>Vk&z+Y`iVMi(_4IHF"
            "f(8={2S~DK*1<(UO2E^_F{ENn@{^Q=goGpqMFvKG20^El`$a%%JYD@<);T3Kkzx0LB!D&D5HjE{!ziE-=;`a}I|L+F"
            "c%&w#q!!UG|6|Gbp!nYdiT%I-QS!f`si8SA|NGD*0ESWi=YUWRr06j;Hc==@EXlB~7$BfmQc=P+nhysGP(4144WQ|X"
            "3yUObO8{iQ18Nyz0F@(3KW0k;t{*0DY-(&^$e>^_T9VKl_y&3Ek*QT+G#}yw8^x-WXlOhDPf*lK"
        ),
    ),
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
