"""Checks of a folder before it is published: required files, and content that must not be published."""

import codecs
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from safetensors import SafetensorError, safe_open

from medmoe_hf.hub.identifiers import (
    CLINICAL_TEXT,
    CREDENTIAL_FILE,
    DATE,
    FIELD,
    FILE_NAME,
    OVERLAP,
    PASSWORD,
    PASSWORD_IN_CODE,
    PASSWORD_IN_PROSE,
    SCRIPT,
    SECRET,
    UID,
    cells,
    machine_paths,
    personal_column,
    unescaped,
)
from medmoe_hf.model.rejection_medmoe import REJECTOR_FILE

GOLDEN = "golden.safetensors"
"""File with a known input and the model's outputs for it (`medmoe_hf.hub.golden`)."""

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
# Never published: files of git, caches and interpreters.
_NEVER_SENT = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store"})

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_BY_SUFFIX = {
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".msgpack", ".joblib", ".ot"),
        "weights that are not safetensors, and may run code when loaded",
    ),
    ".ipynb": "a notebook, whose outputs may show data",
    **dict.fromkeys((".dcm", ".dicom"), "a DICOM file"),
    ".nii": "a NIfTI file",
    **dict.fromkeys((".nrrd", ".mha", ".mhd"), "a medical image"),
    **dict.fromkeys(
        (".parquet", ".arrow", ".feather", ".tar", ".tgz", ".gz", ".zip", ".7z", ".npy", ".npz", ".xlsx", ".db"),
        "data, which are not part of a model",
    ),
    **dict.fromkeys((".sqlite", ".lmdb", ".jsonl"), "data, which are not part of a model"),
}
_MAGIC = (
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI file"),
    (344, b"ni1\0", "a NIfTI file"),
    (0, b"\x89HDF\r\n", "HDF5, weights or data that are not safetensors"),
    (0, b"PK\x03\x04", "an archive or a pickled checkpoint"),
    (0, b"PAR1", "data, which are not part of a model"),
    (0, b"ARROW1", "data, which are not part of a model"),
    (0, b"\x93NUMPY", "data, which are not part of a model"),
    *((0, bytes((0x80, protocol)), "a pickle, which runs code when loaded") for protocol in range(2, 6)),
)
_MAX_TEXT = 50_000_000
"""Largest size in bytes of a text that is searched; a tokenizer has some 30 MB, larger files are data."""
_MAX_PICTURE = 50_000_000  # bytes, and pixels
_HEAD = 8192  # bytes that are read to recognise the kind of file
_PIECE = 1 << 20  # bytes of a text that are read at a time
_EDGE = 256  # a match that ends this close to the end of a piece may be truncated
_RULE = re.compile(r"\s{0,3}\|?(?:\s*:?-+:?\s*\|)+(?:\s*:?-+:?\s*)?")  # below the header of a table in Markdown

_CODE = (".py", ".pyi", ".sh", ".js", ".css")
_PROSE = (".md", ".rst", ".bib", ".cff")
_ESCAPED = (".py", ".pyi", ".js", ".json")
_TABLES = (".csv", ".tsv", ".tab", ".psv")
# A vocabulary may contain the word "mrn".
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
# Metadata that programs write into pictures, and that are not about their content.
_PLAIN_TEXTS = {"software", "creation time", "date:create", "date:modify", "date:timestamp", "date:create.utc"}
_PLAIN_EXIF = frozenset(
    {0xFE, 0x100, 0x101, 0x102, 0x103, 0x106, 0x10A, 0x111, 0x112, 0x115, 0x116, 0x117, 0x11A, 0x11B, 0x11C, 0x128}
    | {0x131, 0x13D, 0x13E, 0x13F, 0x140, 0x142, 0x143, 0x144, 0x145, 0x152, 0x153, 0x15B, 0x211, 0x212, 0x213, 0x214}
    | {0x8769, 0x8773, 0x9000, 0x9101, 0xA000, 0xA001, 0xA002, 0xA003}
)
_GPS, _EXIF_PART = 0x8825, 0x8769


def published_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are published: path in the repository -> file, sorted."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _NEVER_SENT & set(path.relative_to(folder).parts)
    }


def check_folder(folder: str | Path) -> list[str]:
    """Lists all reasons not to publish a folder.

    The folder must be a complete model (configuration with code, one set of weights, processor), and contain only
    text, safetensors, and pictures that its card shows. It is searched for tokens, absolute paths, identifiers and
    medical images, by file name and content. Findings are reported by file and line, and never quoted.

    Args:
        folder: Folder of a model and its processor, as `save_pretrained` writes it.

    Returns:
        One line per problem, beginning with the file's path in the folder; empty if there is none.

    Example:
        ```python
        from medmoe_hf.hub import check_folder

        print(check_folder("runs/first"))
        ```
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: there is no such folder"]
    files = published_files(folder)
    card = ""
    if "README.md" in files:
        with files["README.md"].open(encoding="utf-8", errors="replace") as file:
            card = file.read(_MAX_TEXT)
    problems = [*_incomplete(files), *_links(folder)]
    places = {str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), str(folder.resolve().parent)}
    paths = machine_paths(sorted(place for place in places if len(Path(place).parts) > 1))
    for name, path in files.items():
        shown = path.suffix.lower() in (*_PICTURES, ".svg") and _shows(card, name)
        # A figure may be named by its date.
        if FILE_NAME.search(name) or (DATE.search(name) and not shown):
            problems.append(f"{name}: the name looks like an identifier of a patient or study, or a date")
        if CREDENTIAL_FILE.search(name):
            problems.append(f"{name}: a file for passwords or keys")
        problems += [f"{name}{problem}" for problem in _of_file(name, path, shown, paths)]
    return problems


def _links(folder: Path) -> Iterator[str]:
    """Links out of the folder: their targets would be published instead."""
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_symlink() or _NEVER_SENT & set(name.parts):
            continue
        target = path.resolve()
        if not target.is_relative_to(inside):
            yield f"{name.as_posix()}: a link out of the folder; copy the file into the folder if it belongs there"
        elif not target.is_file():
            yield f"{name.as_posix()}: a broken link, of which nothing would be published"


def _shows(card: str, name: str) -> bool:
    return re.search(rf"(?<![\w/-])(?:\./)?{re.escape(name)}(?!\w)", card) is not None


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: For other content, and for a file that is too large.
    """
    if path.stat().st_size > _MAX_TEXT:
        raise ValueError(f"more than {_MAX_TEXT} bytes")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _incomplete(files: dict[str, Path]) -> Iterator[str]:
    if "adapter_config.json" in files:
        yield (
            "adapter_config.json: this is an adapter, which loads only with its base. `medmoe merge FOLDER OUT` "
            "merges it into the base; publish OUT"
        )
        return
    if any(name.startswith("training_state/") for name in files):
        yield "training_state: this is a checkpoint to resume from; publish the run's `output_dir`"
    if "config.json" not in files:
        yield "config.json: missing; save the model with `model.save_pretrained`"
    else:
        try:
            config = _object(files["config.json"])
            if not str(config.get("model_type", "")).startswith("medmoe"):
                yield "config.json: `model_type` is not one of MedMoE's"
            for target in (config.get("auto_map") or {"": "missing"}).values():
                if isinstance(target, str) and f"{target.split('.')[0]}.py" not in files:
                    yield f"config.json: `auto_map` needs {target.split('.')[0]}.py, without which nothing loads"
                    break
        except (ValueError, AttributeError):
            yield "config.json: no JSON object"
    if "processor_config.json" not in files:
        yield "processor_config.json: missing; save the processor with `processor.save_pretrained`"
    others = (GOLDEN, REJECTOR_FILE)
    weights = {name for name in files if name.endswith(".safetensors") and "/" not in name and name not in others}
    expected = {_WEIGHTS}
    if _INDEX in files:
        try:
            expected = set(_object(files[_INDEX])["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            yield f"{_INDEX}: no index of shards"
            return
    for name in sorted(expected - weights):
        yield f"{name}: missing"
    for name in sorted(weights - expected):
        # transformers prefers a single file to shards, even if it is older.
        yield f"{name}: not part of the weights in {_INDEX if _INDEX in files else _WEIGHTS}"


def _of_file(name: str, path: Path, shown: bool, paths: dict[str, re.Pattern[str]]) -> Iterator[str]:
    """The problems of one file, to be appended to its name."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(_HEAD)
    found = next((what for start, magic, what in _MAGIC if head[start : start + len(magic)] == magic), None)
    if head[:2] == b"\x1f\x8b":
        found = _inside_gzip(path)
    if "tfevents" in path.name:
        found = "a training log, which contains the name of this machine"
    found = found or _BY_SUFFIX.get(suffix)
    if found is not None:
        yield f": {found}"
    elif suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as tensors:
                text = json.dumps(tensors.metadata() or {}, ensure_ascii=False)
        except (SafetensorError, OSError):
            yield ": no complete safetensors file"
            return
        yield from _of_text(path, [text], paths)
    elif suffix in _PICTURES:
        yield from _of_picture(path) if shown else [": a picture that README.md does not show; it may be of a patient"]
    elif b"\0" in head:
        yield ": neither text nor safetensors"
    elif path.stat().st_size > _MAX_TEXT:
        yield f": a text of more than {_MAX_TEXT // 10**6} MB, which is not part of a model"
    else:
        if suffix == ".svg" and not shown:
            yield ": a picture that README.md does not show; it may be of a patient"
        try:
            yield from _of_text(path, _pieces(path), paths)
        except UnicodeDecodeError:
            yield ": neither text nor safetensors"


def _of_picture(path: Path) -> Iterator[str]:
    """Metadata of a picture, which are not visible in the card."""
    if path.stat().st_size > _MAX_PICTURE:
        yield f": a picture of more than {_MAX_PICTURE // 10**6} MB"
        return
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PICTURE:
                yield f": a picture of more than {_MAX_PICTURE // 10**6} megapixels"
                return
            image.load()  # PNG may have texts after the pixels
            tags = image.getexif()
            located, other = _GPS in tags, set(tags) - _PLAIN_EXIF - {_GPS}
            other |= set(tags.get_ifd(_EXIF_PART)) - _PLAIN_EXIF
            texts = {
                str(key)
                for key, value in image.info.items()
                if str(key).lower() in ("xmp", "photoshop", "comment", "xml:com.adobe.xmp", "xml:com.adobe.xmp.raw")
                or (isinstance(value, str) and image.format == "PNG" and str(key).lower() not in _PLAIN_TEXTS)
            }
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        yield ": a picture that cannot be read"
        return
    fix = "save the picture again without them"
    if located:
        yield f": its EXIF data contain a location; {fix}"
    if other:
        named = ", ".join(sorted(str(ExifTags.TAGS.get(tag, hex(tag))) for tag in other)[:5])
        yield f": its EXIF data contain {named}; {fix}"
    if texts:
        yield f": it contains texts ({', '.join(sorted(texts)[:5])}); {fix}"


def _pieces(path: Path) -> Iterator[str]:
    """Reads a text in pieces.

    Raises:
        UnicodeDecodeError: If it is no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while part := file.read(_PIECE):
            yield decoder.decode(part)
    yield decoder.decode(b"", final=True)


def _inside_gzip(path: Path) -> str:
    try:
        with gzip.open(path) as file:
            head = file.read(352)
    except (OSError, EOFError, zlib.error):
        head = b""
    found = next((what for start, magic, what in _MAGIC if head[start : start + len(magic)] == magic), None)
    return found or "an archive"


def _patterns(path: Path, paths: dict[str, re.Pattern[str]]) -> list[tuple[re.Pattern[str], str]]:
    """What a text is searched for, depending on its kind."""
    suffix = path.suffix.lower()
    kind = "prose" if suffix in _PROSE else "escaped" if suffix in _ESCAPED else "plain"
    # Names like ".env" have no suffix, and hold settings.
    prose = suffix in (*_PROSE, ".txt") or (suffix == "" and not path.name.startswith("."))
    password = PASSWORD_IN_CODE if suffix in _CODE else PASSWORD_IN_PROSE if prose else PASSWORD
    patterns = [
        (SECRET, "a token or key; revoke it, as there may be other copies"),
        (password, "a password; change it, as there may be other copies"),
        (paths[kind], "an absolute path of a machine"),
        (UID, "what looks like the UID of a study or an image"),
    ]
    if path.name in _VOCABULARIES:
        return [pattern for pattern in patterns if pattern[0] is not password]
    if suffix not in (*_CODE, ".safetensors"):
        # Prose may explain a field; elsewhere it has a value.
        pattern = CLINICAL_TEXT if suffix in _PROSE else FIELD
        patterns.append((pattern, "a field that identifies a patient or a study"))
        if pattern is FIELD:
            patterns.append((CLINICAL_TEXT, "what looks like a patient's number, name or date of birth"))
    if suffix == ".svg":
        patterns.append((SCRIPT, "a script, or a reference to another server, in a picture"))
    return patterns


def _of_text(path: Path, pieces: Iterable[str], paths: dict[str, re.Pattern[str]]) -> Iterator[str]:
    """The first occurrence of each kind of problem."""
    wanted = _patterns(path, paths)
    before, lines, first = "", 1, True
    pieces = iter(pieces)
    piece = next(pieces, "")
    while piece:
        following = next(pieces, "")
        text = before + piece
        if first:
            yield from _of_table(path, text)
        for pattern, what in list(wanted):
            for searched in filter(None, (text, unescaped(text))):
                # One character before, for lookbehinds. A match at the end may continue in the next piece.
                match = pattern.search(searched, 0 if first else 1)
                if match and (not following or match.end() < len(searched) - _EDGE):
                    wanted.remove((pattern, what))
                    yield f", line {lines + searched.count(chr(10), 0, match.start())}: {what}"
                    break
        cut = max(len(text) - OVERLAP, 0)
        lines += text.count("\n", 0, cut)
        before, piece, first = text[cut:], following, False


def _of_table(path: Path, text: str) -> Iterator[str]:
    """A header of patient data at the beginning of a text, or in a table in Markdown."""
    suffix = path.suffix.lower()
    lines = text[:OVERLAP].lstrip().splitlines()
    if suffix in _PROSE:
        lines = text.splitlines()
        headers = [line for line, rule in pairwise(lines) if _RULE.fullmatch(rule)]
    elif suffix in (*_TABLES, ".txt", ".dat", "") and path.name not in _VOCABULARIES:
        # Excel begins with the delimiter.
        headers = lines[1:2] if lines and re.fullmatch(r"sep=.", lines[0]) else lines[:1]
    else:
        return
    for header in headers:
        columns = cells(header[:OVERLAP])
        if suffix not in _TABLES and len(columns) < 2:
            continue
        column = personal_column(columns, suffix in _PROSE)
        if column is not None:
            yield f": a table of cases, with the column {column}"
            return
