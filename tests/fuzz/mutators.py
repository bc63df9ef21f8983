"""Mutators: what changes an input while most of its structure stays valid. Deterministic, by the generator.

Each takes `(content, rng, maximum)` and returns at most `maximum` bytes.
"""

import gzip
import io
import json
import math
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

Mutator = Callable[[bytes, random.Random, int], bytes]

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    127,
    128,
    255,
    256,
    1000,
    4096,
    32767,
    32768,
    65535,
    65536,
    2**24,
    2**31 - 1,
    2**31,
)
_NUMBERS += (2**32 - 2, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def plain(tokens: Sequence[bytes] = ()) -> Mutator:
    """Changes bits, bytes, numbers and blocks, and inserts tokens."""

    def mutate(content: bytes, rng: random.Random, maximum: int) -> bytes:
        data = bytearray(content or b"\0")
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
            action = rng.randrange(8 if tokens else 7)
            if action == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif action == 1 and at < len(data):
                data[at] = rng.randrange(256)
            elif action == 2:
                number = _number(rng)
                data[at : at + len(number)] = number
            elif action == 3:
                del data[at:end]
            elif action == 4:
                data[at:at] = data[at:end] * rng.choice((1, 1, 2, 50))
            elif action == 5:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
            elif action == 6:
                start = rng.randrange(len(data) + 1)
                data[at:end] = data[start : start + end - at]
            elif action == 7:
                token = rng.choice(tokens)
                data[at : at + (len(token) if rng.random() < 0.3 else 0)] = token
        return bytes(data[:maximum])

    return mutate


def _number(rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(_NUMBERS) % 2 ** (8 * size)
    return number.to_bytes(size, rng.choice(("little", "big")))


# --- DICOM

_LONG = {b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR", b"OF", b"OD", b"OL", b"OV", b"SV", b"UV"}
_VRS = (
    *sorted(_LONG),
    b"US",
    b"SS",
    b"DS",
    b"IS",
    b"CS",
    b"UI",
    b"LO",
    b"PN",
    b"FD",
    b"FL",
    b"AT",
    b"UL",
    b"??",
    b"\0\0",
)
_ITEM, _ITEM_END, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
_UNDEFINED = 2**32 - 1
# Group, element and type of what the reader looks at.
_TAGS = {
    (0x0028, 0x0010): b"US",  # Rows
    (0x0028, 0x0011): b"US",  # Columns
    (0x0028, 0x0002): b"US",  # SamplesPerPixel
    (0x0028, 0x0004): b"CS",  # PhotometricInterpretation
    (0x0028, 0x0006): b"US",  # PlanarConfiguration
    (0x0028, 0x0008): b"IS",  # NumberOfFrames
    (0x0028, 0x0030): b"DS",  # PixelSpacing
    (0x0028, 0x0100): b"US",  # BitsAllocated
    (0x0028, 0x0101): b"US",  # BitsStored
    (0x0028, 0x0102): b"US",  # HighBit
    (0x0028, 0x0103): b"US",  # PixelRepresentation
    (0x0028, 0x0120): b"SS",  # PixelPaddingValue
    (0x0028, 0x0121): b"SS",  # PixelPaddingRangeLimit
    (0x0028, 0x1050): b"DS",  # WindowCenter
    (0x0028, 0x1051): b"DS",  # WindowWidth
    (0x0028, 0x1052): b"DS",  # RescaleIntercept
    (0x0028, 0x1053): b"DS",  # RescaleSlope
    (0x0028, 0x1056): b"CS",  # VOILUTFunction
    (0x0028, 0x3000): b"SQ",  # ModalityLUTSequence
    (0x0028, 0x3002): b"US",  # LUTDescriptor
    (0x0028, 0x3006): b"OW",  # LUTData
    (0x0028, 0x3010): b"SQ",  # VOILUTSequence
    (0x0028, 0x1101): b"US",  # RedPaletteColorLookupTableDescriptor
    (0x0028, 0x1201): b"OW",  # RedPaletteColorLookupTableData
    (0x0028, 0x1221): b"OW",  # SegmentedRedPaletteColorLookupTableData
    (0x0020, 0x0010): b"SH",
    (0x0020, 0x000D): b"UI",  # StudyInstanceUID
    (0x0020, 0x000E): b"UI",  # SeriesInstanceUID
    (0x0020, 0x0011): b"IS",  # SeriesNumber
    (0x0020, 0x0012): b"IS",  # AcquisitionNumber
    (0x0020, 0x0013): b"IS",  # InstanceNumber
    (0x0020, 0x0020): b"CS",  # PatientOrientation
    (0x0020, 0x0032): b"DS",  # ImagePositionPatient
    (0x0020, 0x0037): b"DS",  # ImageOrientationPatient
    (0x0018, 0x0050): b"DS",  # SliceThickness
    (0x0018, 0x1164): b"DS",  # ImagerPixelSpacing
    (0x0018, 0x6011): b"SQ",  # SequenceOfUltrasoundRegions
    (0x0018, 0x602C): b"FD",  # PhysicalDeltaX
    (0x0008, 0x0005): b"CS",  # SpecificCharacterSet
    (0x0008, 0x0008): b"CS",  # ImageType
    (0x0008, 0x0016): b"UI",  # SOPClassUID
    (0x0008, 0x0018): b"UI",  # SOPInstanceUID
    (0x0008, 0x0060): b"CS",  # Modality
    (0x0008, 0x103E): b"LO",  # SeriesDescription
    (0x0004, 0x1220): b"SQ",  # DirectoryRecordSequence
    (0x0004, 0x1500): b"CS",  # ReferencedFileID
    (0x5200, 0x9229): b"SQ",  # SharedFunctionalGroupsSequence
    (0x5200, 0x9230): b"SQ",  # PerFrameFunctionalGroupsSequence
    (0x7FE0, 0x0001): b"OV",  # ExtendedOffsetTable
    (0x7FE0, 0x0002): b"OV",  # ExtendedOffsetTableLengths
    (0x7FE0, 0x0008): b"OF",  # FloatPixelData
    (0x7FE0, 0x0009): b"OD",  # DoubleFloatPixelData
    (0x7FE0, 0x0010): b"OW",  # PixelData
}
_TEXTS = {
    b"DS": (b"0", b"1", b"-1", b"1e308", b"-1e-308", b"nan", b"inf", b"1,5", b"1\\2", b"1\\0\\0\\0\\1\\0",
    b"0\\0\\0\\0\\0\\0",
            b"1e300\\1e300\\1e300", b"", b"x", b" 1 ", b"9" * 40, b"1\\0\\0\\0\\0\\1", b"0\\0\\7"),
    b"IS": (b"0", b"1", b"-1", b"2", b"3", b"100000", b"2147483647", b"4294967296", b"1.5", b"", b"x", b"1\\2",
    b"9" * 30),
    b"CS": (b"CT", b"MR", b"US", b"DX", b"SM", b"OP", b"SR", b"MONOCHROME1", b"MONOCHROME2", b"RGB", b"YBR_FULL",
    b"YBR_FULL_422",
            b"PALETTE COLOR", b"YBR_RCT", b"YBR_ICT", b"SIGMOID", b"LINEAR_EXACT", b"L\\F", b"P\\H", b"A", b"",
            b"\\", b"x" * 70,
            b"ISO 2022 IR 87", b"ISO_IR 192", b"ORIGINAL\\PRIMARY\\LOCALIZER", b"a.dcm", b"..\\x"),
    b"UI": (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.5", b"1.2.3",
    b"",
            b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.51", b"1.2.840.10008.1.2.4.57",
            b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.4.81", b"1.2.840.10008.1.2.4.90",
            b"1.2.840.10008.1.2.4.91", b"1.2.840.10008.1.2.4.201", b"1.2.840.10008.1.2.4.110",
            b"1.2.840.10008.1.2.8.1",
            b"1.2.840.10008.5.1.4.1.1.77.1.6", b"1.2.840.10008.1.3.10", b"1.2.840.10008.5.1.4.1.1.7", b"x", b"1" * 70),
}  # fmt: skip

_Element = list[Any]
"""Group, element, type, and value: bytes, a list of items (lists of elements), or a `_Fragments`."""


class _Fragments(list[bytes]):
    """The parts of encapsulated pixels; the first is the table of offsets."""


class _Cut(Exception):
    """What the grammar does not describe."""


def _elements(
    data: bytes, at: int, end: int, implicit: bool, order: str, depth: int = 0
) -> tuple[list[_Element], int]:
    found: list[_Element] = []
    while at + 8 <= end:
        if data[at : at + 4] in (_ITEM_END, _SEQUENCE_END):
            return found, at + 8
        group, element = struct.unpack(f"{order}HH", data[at : at + 4])
        explicit = group == 2 or not implicit
        vr = data[at + 4 : at + 6] if explicit else _TAGS.get((group, element), b"UN")
        if not explicit:
            length, at = struct.unpack(f"{order}L", data[at + 4 : at + 8])[0], at + 8
        elif vr in _LONG:
            length, at = struct.unpack(f"{order}L", data[at + 8 : at + 12].ljust(4, b"\0"))[0], at + 12
        else:
            length, at = struct.unpack(f"{order}H", data[at + 6 : at + 8])[0], at + 8
        stop = end if length == _UNDEFINED else min(at + length, end)
        if vr == b"SQ" and depth < 8:
            items, at = _items(data, at, stop, implicit, order, depth)
            found.append([group, element, vr, items])
        elif length == _UNDEFINED:
            fragments, at = _fragments(data, at, end)
            found.append([group, element, vr, fragments])
        else:
            found.append([group, element, vr, data[at:stop]])
            at = stop
    return found, at


def _items(data: bytes, at: int, stop: int, implicit: bool, order: str, depth: int) -> tuple[list[Any], int]:
    items = []
    while at + 8 <= stop and data[at : at + 4] == _ITEM:
        length = struct.unpack(f"{order}L", data[at + 4 : at + 8])[0]
        inner = stop if length == _UNDEFINED else min(at + 8 + length, stop)
        content, at = _elements(data, at + 8, inner, implicit, order, depth + 1)
        items.append(content)
    return items, at + 8 if data[at : at + 4] == _SEQUENCE_END else at


def _fragments(data: bytes, at: int, end: int) -> tuple[_Fragments, int]:
    found = _Fragments()
    while at + 8 <= end and data[at : at + 4] == _ITEM:
        length = struct.unpack("<L", data[at + 4 : at + 8])[0]
        found.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return found, min(at + 8, end)


def _written(elements: Sequence[_Element], implicit: bool, order: str, rng: random.Random) -> bytes:
    out = bytearray()
    for group, element, vr, value in elements:
        undefined, content = False, value
        if isinstance(value, _Fragments):
            parts = b"".join(_ITEM + struct.pack("<L", len(part)) + part for part in value)
            undefined, content = True, parts + _SEQUENCE_END + b"\0\0\0\0"
        elif isinstance(value, list):
            undefined = rng.random() < 0.3
            items = []
            for item in value:
                inner = _written(item, implicit, order, rng)
                open_end = rng.random() < 0.3
                length = _UNDEFINED if open_end else len(inner)
                items.append(_ITEM + struct.pack(f"{order}L", length) + inner + (_ITEM_END + b"\0" * 4) * open_end)
            content = b"".join(items) + (_SEQUENCE_END + b"\0" * 4) * undefined
        length = _UNDEFINED if undefined else len(content)
        if rng.random() < 0.004:  # a length that lies
            length = rng.choice(_NUMBERS) % 2**32
        here = "<" if group == 2 else order
        out += struct.pack(f"{here}HH", group & 0xFFFF, element & 0xFFFF)
        if implicit and group != 2:
            out += struct.pack(f"{here}L", length)
        elif vr in _LONG:
            out += vr + b"\0\0" + struct.pack(f"{here}L", length)
        else:
            out += vr[:2].ljust(2) + struct.pack(f"{here}H", length % 2**16)
        out += content
    return bytes(out)


def _syntax_of(meta: Sequence[_Element]) -> bytes:
    return next(
        (bytes(one[3]).strip(b"\0 ") for one in meta if one[:2] == [2, 0x10] and isinstance(one[3], bytes)), b""
    )


def dicom(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes elements, values by their type, sequences, fragments, lengths and the transfer syntax."""
    if rng.random() < 0.25:
        return _PLAIN_DICOM(content, rng, maximum)
    start = 132 if content[128:132] == b"DICM" else 0
    try:
        meta, split = [], start
        while content[split : split + 2] == b"\x02\0" and len(meta) < 20:
            size = 12 if content[split + 4 : split + 6] in _LONG else 8
            length = int.from_bytes(content[split + (8 if size == 12 else 6) : split + size], "little")
            meta.append([2, int.from_bytes(content[split + 2 : split + 4], "little"), content[split + 4 : split + 6],
                         content[split + size : split + size + length]])  # fmt: skip
            split += size + length
        syntax, body = _syntax_of(meta), content[split:]
        if syntax.endswith(b".1.99"):
            body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, 2**16)
        implicit, order = syntax == b"1.2.840.10008.1.2", ">" if syntax == b"1.2.840.10008.1.2.2" else "<"
        elements, _ = _elements(body, 0, len(body), implicit, order)
    except (struct.error, zlib.error, IndexError):
        return _PLAIN_DICOM(content, rng, maximum)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        _change(elements, rng, order)
    if meta and rng.random() < 0.15:
        chosen = rng.choice(meta)
        if chosen[1] == 0x10:
            chosen[3] = rng.choice(_TEXTS[b"UI"])
        else:
            meta.remove(chosen)
    written = _syntax_of(meta)
    # Mostly as the syntax says: otherwise nothing behind the first element is read.
    if rng.random() < 0.95:
        implicit, order = written == b"1.2.840.10008.1.2", ">" if written == b"1.2.840.10008.1.2.2" else "<"
    body = _written(elements, implicit, order, rng)
    if written.endswith(b".1.99"):
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        body = deflater.compress(body) + deflater.flush()
    head = _written([[*one[:3], one[3] + b"\0" * (len(one[3]) % 2)] for one in meta], False, "<", rng)
    return (content[:start] + head + body)[:maximum]


def _change(elements: list[_Element], rng: random.Random, order: str) -> None:
    lists = [elements]
    for one in elements:
        if isinstance(one[3], list) and not isinstance(one[3], _Fragments):
            lists += [item for item in one[3] if isinstance(item, list)]
            lists += [item for inner in one[3] for deeper in inner if isinstance(deeper[3], list)
                      and not isinstance(deeper[3], _Fragments) for item in deeper[3]]  # fmt: skip
    chosen = rng.choice(lists) if rng.random() < 0.4 else elements
    action = rng.randrange(10)
    if action <= 3 and chosen:
        one = rng.choice(chosen)
        if isinstance(one[3], _Fragments):
            _change_fragments(one[3], rng)
        elif isinstance(one[3], list):
            _change_items(one[3], rng)
        else:
            one[3] = _value(one[2], one[3], rng, order)
    elif action <= 6:
        tag, vr = rng.choice(list(_TAGS.items()))
        value: Any = [[]] if vr == b"SQ" else _value(vr, b"", rng, order)
        chosen[:] = [one for one in chosen if tuple(one[:2]) != tag]
        chosen.append([*tag, vr, value])
        chosen.sort(key=lambda one: tuple(one[:2]))
    elif action == 7 and chosen:
        chosen.remove(rng.choice(chosen))
    elif action == 8 and chosen:
        one = rng.choice(chosen)
        if not isinstance(one[3], list):
            one[2] = rng.choice(_VRS[:-2] if rng.random() < 0.9 else _VRS)
    elif chosen:
        copied = list(rng.choice(chosen))
        if rng.random() < 0.5:
            copied[:2] = rng.choice(list(_TAGS))
        chosen.insert(rng.randrange(len(chosen) + 1), copied)
        if isinstance(copied[3], list):
            copied[3] = type(copied[3])(copied[3])


def _change_fragments(parts: _Fragments, rng: random.Random) -> None:
    if not parts:
        parts.append(b"")
    at = rng.randrange(len(parts))
    action = rng.randrange(6)
    if action == 0:
        parts.insert(at, parts[at][: rng.randrange(len(parts[at]) + 1)])
    elif action == 1:
        del parts[at]
    elif action == 2:
        parts[0] = b"".join(struct.pack("<L", rng.choice(_NUMBERS) % 2**32) for _ in range(rng.randrange(4)))
    else:
        parts[at] = plain()(parts[at], rng, 4096)


def _change_items(items: list[Any], rng: random.Random) -> None:
    action = rng.randrange(4)
    if action == 0 or not items:
        items.insert(0, [])
    elif action == 1:
        del items[rng.randrange(len(items))]
    elif action == 2:
        items.append(rng.choice(items))
    else:  # deeper and deeper
        tag = rng.choice([tag for tag, vr in _TAGS.items() if vr == b"SQ"])
        for _ in range(rng.choice((1, 3, 40))):
            items[:] = [[[*tag, b"SQ", list(items)]]]


def _value(vr: bytes, old: bytes, rng: random.Random, order: str) -> bytes:
    if vr in _TEXTS and rng.random() < 0.8:
        value = rng.choice(_TEXTS[vr])
        return value + (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    code = {b"US": "H", b"SS": "h", b"UL": "L", b"FD": "d", b"FL": "f", b"OV": "Q", b"OF": "f", b"OD": "d"}.get(vr)
    if code in ("H", "h", "L", "Q") and rng.random() < 0.9:
        size = struct.calcsize(f"<{code}")
        numbers = [rng.choice(_NUMBERS) % 2 ** (8 * size) for _ in range(rng.choice((1, 1, 1, 2, 3, 0)))]
        return b"".join(number.to_bytes(size, "big" if order == ">" else "little") for number in numbers)
    if code in ("d", "f") and rng.random() < 0.9:
        numbers = [
            rng.choice((0.0, 1.0, -1.0, 1e38, -1e-38, math.nan, math.inf)) for _ in range(rng.choice((1, 1, 2, 48)))
        ]
        return b"".join(struct.pack(f"{order}{code}", number) for number in numbers)
    return plain()(old, rng, 4096)


_PLAIN_DICOM = plain([*_TEXTS[b"UI"], *_VRS, _ITEM, _ITEM_END, _SEQUENCE_END, b"\xff\xff\xff\xff"])

# --- other formats


def inflated(inner: Mutator) -> Mutator:
    """Changes the content of gzip files, so that their checksums stay right; other files as `inner` does."""

    def mutate(content: bytes, rng: random.Random, maximum: int) -> bytes:
        if content[:2] == b"\x1f\x8b" and rng.random() < 0.8:
            try:
                content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content, 2**16)
                return gzip.compress(inner(content, rng, 2**16), 6, mtime=0)[:maximum]
            except zlib.error:
                pass
        return inner(content, rng, maximum)

    return mutate


def nifti(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes fields of the header, or bytes."""
    data = bytearray(content)
    if len(data) > 352 and rng.random() < 0.6:
        first = data[:2] == b"\x5c\x01"
        # dim, intent_code, datatype, bitpix, pixdim, vox_offset, slope and intercept, xyzt_units, form codes, affine
        fields = (
            ("h", 40),
            ("h", 68),
            ("h", 70),
            ("h", 72),
            ("f", 76),
            ("f", 108),
            ("f", 112),
            ("B", 123),
            ("f", 124),
        )
        more = (("h", 252), ("h", 254), ("f", 256), ("f", 280))
        second = (("h", 12), ("h", 14), ("q", 16), ("d", 104), ("q", 168), ("d", 176), ("l", 344), ("d", 400))
        for _ in range(rng.choice((1, 1, 2, 3))):
            code, at = rng.choice((*fields, *more) if first else second)
            at += struct.calcsize(f"<{code}") * rng.choice((0, 1, 2, 3, 4))
            if at + struct.calcsize(f"<{code}") > len(data):
                continue
            if code in "fd":
                number: Any = rng.choice((0.0, 1.0, -1.0, math.nan, math.inf, 352.0, 1e-30, 1e30, 1e9))
            else:
                size = 8 * struct.calcsize(f"<{code}")
                wrapped = rng.choice((*_NUMBERS, 2, 4, 8, 64, 128, 512, 768, 1792, 2304, 3002)) % 2**size
                number = wrapped if code == "B" or wrapped < 2 ** (size - 1) else wrapped - 2**size
            struct.pack_into(f"<{code}", data, at, number)
        return bytes(data[:maximum])
    return plain((b"n+1\0", b"ni1\0", b"n+2\0\r\n\x1a\n"))(content, rng, maximum)


def picture(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes bytes; in PNG files, chunks and inflated rows with right checksums."""
    if not content.startswith(b"\x89PNG") or rng.random() < 0.2:
        return _PLAIN_PICTURE(content, rng, maximum)
    at, out = 8, bytearray(content[:8])
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        kind, value = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length
        if rng.random() < 0.35:
            try:
                rows = zlib.decompress(value) if kind == b"IDAT" else value
                changed = plain()(rows, rng, 2**14)
                value = zlib.compress(changed) if kind == b"IDAT" else changed
            except zlib.error:
                value = plain()(value, rng, 2**14)
        if rng.random() < 0.05:
            kind = rng.choice(
                (b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"acTL", b"fdAT")
            )
        out += struct.pack(">L", len(value)) + kind + value + struct.pack(">L", zlib.crc32(kind + value))
    return bytes(out[:maximum])


_PLAIN_PICTURE = plain((b"II*\0", b"MM\0*", b"\xff\xd8\xff", b"\xff\xc0", b"\xff\xc4", b"\xff\xda", b"GIF89a",
                         b"BM", b"P5 ",
                        b"RIFF", b"WEBP", b"VP8L", b"\xff\x4f\xff\x51", b"\x01\x01", b"\x01\x02", b"\x01\x11",
                        b"n+1\0"))  # fmt: skip


def tar(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes headers, whose checksums are then made right, and contents."""
    tokens = (b"ustar\x0000", b"ustar  \0", b"././@LongLink", b"a.png", b"a.txt", b"../", b"/", b"0000000", b"7777777")
    data = bytearray(
        plain((*tokens, b"\x80\0\0\0\xff\xff\xff\xff", b"30 path=x\n", b"22 GNU.sparse.major=1\n"))(
            content, rng, maximum
        )
    )
    for at in range(0, len(data) - 511, 512):
        if rng.random() < 0.1:
            data[at + 156] = rng.choice(b"01235gxLKSV7\0")
        if rng.random() < 0.1:
            data[at + 124 : at + 136] = rng.choice((-513, -512, -1, 0, 511, 2**20, 2**62)).to_bytes(
                12, "big", signed=True
            )
        if data[at + 257 : at + 262] == b"ustar" and rng.random() < 0.9:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


_WORDS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7.0,
    1e308,
    -1e-9,
    float("nan"),
    float("inf"),
    2**63,
    10**30,
    "",
    " ",
    "x",
    "nan",
    "1",
    "\0",
)
_WORDS += ([], {}, [[]], [None], {"a": None}, "\ud800", "ct", "{x}", "{", "*", "../x", "field:", ["ct", 1], {"x": [1]})


def json_values(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes values of JSON, line by line in files of several lines; other texts as bytes."""
    if rng.random() < 0.3:
        return _PLAIN_TEXT(content, rng, maximum)
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:
        try:
            value, lines, at = json.loads(content), [b""], 0
        except ValueError:
            return _PLAIN_TEXT(content, rng, maximum)
    lines[at] = json.dumps(_changed(value, rng)).encode()
    return b"\n".join(lines)[:maximum]


def _changed(value: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(places) < 500:
        one = waiting.pop()
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            places += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not places:
            return rng.choice(_WORDS)
        holder, key = rng.choice(places)
        if isinstance(holder, list) and not -len(holder) <= key < len(holder):
            continue
        action = rng.randrange(6)
        if action <= 2:
            holder[key] = json.loads(json.dumps(rng.choice(_WORDS)))
        elif action == 3 and isinstance(holder, dict):
            holder.pop(key, None)
        elif action == 4:
            source, other = rng.choice(places)
            copied = source.get(other) if isinstance(source, dict) else source[other] if other < len(source) else None
            try:
                holder[key] = json.loads(json.dumps(copied))
            except (ValueError, RecursionError):
                continue
        elif isinstance(holder, dict):
            holder[str(rng.choice((key, f"{key}s", "kind", "x", "", 0)))] = rng.choice(_WORDS[:19])
        else:
            holder.append(rng.choice(_WORDS[:19]))
    return value


def yaml_values(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes values of YAML, or bytes."""
    if rng.random() < 0.4:
        return _PLAIN_YAML(content, rng, maximum)
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        value = yaml.load(content, Loader=loader)
        changed = json.loads(json.dumps(value))
        # JSON is YAML, and faster to write.
        return json.dumps(_changed(changed, rng)).encode()[:maximum]
    except Exception:
        return _PLAIN_YAML(content, rng, maximum)


_PLAIN_TEXT = plain((b'"', b"\\", b"\n", b"\r", b"{", b"}", b"[", b"]", b",", b";", b"\t", b"|", b"\0", b"\xff\xfe",
                         b"\xef\xbb\xbf",
                     b"\xc3", b"null", b"NaN", b"1e999", b"\\ud800", "\u2028".encode(), b"[" * 40))  # fmt: skip
_PLAIN_YAML = plain((b"&a ", b"*a", b"- ", b": ", b"? ", b"!!", b"!!int ", b"!!timestamp ", b"!!binary ", b"!!set ",
                         b"<<: ", b"|\n", b">-\n",
                     b"{", b"}", b"[", b"]", b"'", b'"', b"#", b"\n", b"\n  ", b"---\n", b"...\n", b"%YAML 1.1\n",
                     b"0x", b"1:30:00", b"2020-02-30",
                     b".inf", b".nan", b"~", b"\t", b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\x85", b"[" * 60,
                     b"{a: " * 30))  # fmt: skip

_CODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
_CALLS = (b"c__builtin__\nbytearray\n", b"c__builtin__\nrange\n", b"cbuiltins\nlist\n", b"cbuiltins\nint\n",
                         b"ctorch\nSize\n",
          b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n", b"cbuiltins\neval\n",
          b"ccollections\nOrderedDict\n", b"(", b")", b"t", b"R",
          b"\x81", b"b", b"I999999999\n", b"J\xff\xff\xff\x7f", b"\x8a\x05\x00\x00\x00\x00\x10", b"K\x05", b"N",
          b"}", b"]", b".", b"\x85", b"\x86",
          b"\x87", b"e", b"u", b"s", b"Q", b"0", b"2", b"cbuiltins\nset\n", b"cbuiltins\nbytes\n",
          b"cbuiltins\nstr\n", b"cbuiltins\ntuple\n")  # fmt: skip
_PLAIN_PICKLE = plain((*_CODES, *_CALLS, *_CALLS))


def checkpoint(content: bytes, rng: random.Random, maximum: int) -> bytes:
    """Changes pickles, also inside zip files, and the header of safetensors."""
    if content.startswith(b"PK") and rng.random() < 0.8:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        except Exception:
            files = {}
        if not files:
            return _PLAIN_PICKLE(content, rng, maximum)
        name = rng.choice([name for name in files if name.endswith(".pkl")] * 3 + list(files))
        files[name] = _PLAIN_PICKLE(files[name], rng, maximum)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for one, value in files.items():
                archive.writestr(zipfile.ZipInfo(one), value)
        return out.getvalue()[:maximum]
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and rng.random() < 0.6:
        header = json_values(content[8 : 8 + size], rng, maximum)
        return (len(header).to_bytes(8, "little") + header + content[8 + size :])[:maximum]
    return _PLAIN_PICKLE(content, rng, maximum)


table: Mutator = _PLAIN_TEXT
_REPORT_WORDS = (b"CT ", b"MRI ", b"x-ray ", b"compared with ", b"recommended ", b"follow up ", b"the ", b"of ",
                         b". ", b"\n", b" | ", b"_openi_",
                 b"_dr_", b"_medicat_", b"{label}", b"{organ[0]}", b"{view!r}", b"{x:>9999999}", b"{}", b"{{",
                 b"1.5 ", b"Dr.", b"A:", b"?",
                 b"(", b")", b"[UNK]", b"##", b"\xcc\x81", "\u0130".encode(), b"\xf0\x9f\xa7\xa0", b"\0", b" ",
                 b" " * 40, b"x" * 40)  # fmt: skip
caption: Mutator = plain(_REPORT_WORDS)
