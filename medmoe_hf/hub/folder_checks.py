"""What a folder must not hold, and must hold, before anything of it leaves this machine."""

import csv
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

GOLDEN = "golden.safetensors"
"""The file with a known input and what the model makes of it (`medmoe_hf.hub.golden`)."""

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
# Left behind wherever they lie: what git, caches and interpreters keep for themselves.
_NEVER_SENT = frozenset({".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store"})

_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_BY_SUFFIX = {
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".hdf5", ".msgpack", ".joblib", ".ot"),
        "weights that are not safetensors, and may run code when they are read",
    ),
    ".ipynb": "a notebook, whose outputs hold whatever was looked at",
    **dict.fromkeys((".dcm", ".dicom"), "a DICOM file"),
    ".nii": "a NIfTI file",
    **dict.fromkeys((".nrrd", ".mha", ".mhd"), "a medical image"),
    **dict.fromkeys(
        (".parquet", ".arrow", ".feather", ".tar", ".tgz", ".gz", ".zip", ".7z", ".npy", ".npz", ".xlsx", ".db"),
        "data, which are no part of a model",
    ),
    **dict.fromkeys((".sqlite", ".lmdb", ".jsonl"), "data, which are no part of a model"),
}
_MAGIC = (
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI file"),
    (344, b"ni1\0", "a NIfTI file"),
    (0, b"\x89HDF\r\n", "HDF5, weights or data that are not safetensors"),
    (0, b"PK\x03\x04", "an archive or a pickled checkpoint"),
    (0, b"PAR1", "data, which are no part of a model"),
    (0, b"ARROW1", "data, which are no part of a model"),
    (0, b"\x93NUMPY", "data, which are no part of a model"),
    *((0, bytes((0x80, protocol)), "a pickle, which runs code when it is read") for protocol in range(2, 6)),
)
# Names that say which patient, study or image: words with a number, MIMIC-CXR's, UIDs, DICOM's way to write names.
_IDENTIFIER = re.compile(
    r"(?:patient|subject|accession|mrn|pat[_-]?id)s?[_-]?(?:id|nr|no)?[_-]?\d{2,}"
    r"|(?<![a-z0-9])[ps][15]\d{7}(?!\d)"
    r"|(?<![\d.])\d+(?:\.\d+){5,}"
    r"|(?:[0-9a-f]{8}-){4}[0-9a-f]{8}"
    r"|[a-z]+\^[a-z]+"
    r"|(?<!\d)(?:19|20)\d\d-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])(?!\d)",
    re.IGNORECASE,
)
_FIELD = (
    r"(?:patient_?(?:name|id|birth_?date|age|sex)|accession_?(?:number|no)|(?:study|series|sop)_?instance_?uid"
    r"|subject_?id|study_?id|dicom_?id|mrn|date_?of_?birth|dob)"
)
_FIELDS = re.compile(rf"(?<![a-z0-9_])[\"']?{_FIELD}[\"']?\s*[:=]", re.IGNORECASE)
_COLUMN = re.compile(
    rf"^(?:{_FIELD}|reports?(?:_text)?|findings|impression|captions?|(?:image|dicom)(?:_?(?:path|file|id))?)$",
    re.IGNORECASE,
)
# A UID of an image or a study; those of the standard itself (1.2.840.10008) are no secret.
_UID = re.compile(r"(?<![\d.])1\.(?:2|3)\.(?!840\.10008\.)\d+\.\d+(?:\.\d+){3,}")
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{36,}"
    r"|github_pat_\w{50,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?:api|access|secret)[_-]?(?:key|token)[\"']?\s*[:=]\s*[\"']?[\w+/-]{16,}",
    re.IGNORECASE,
)
_ROOTS = "home|Users|root|mnt|data|tmp|var|work|workspace|scratch|srv|media|nfs|gpfs|lustre|Volumes|content"
_WINDOWS = r"(?<![A-Za-z])[A-Za-z]:\\{1,2}(?:\w[\w .-]*\\)"
_DATA_TEXT = (".json", ".yaml", ".yml", ".txt", ".csv", ".tsv", ".xml", ".toml", ".ini")


class PublishError(ValueError):
    """A checkpoint that was not published or verified; the message says why, and what to do."""


def published_files(folder: Path) -> dict[str, Path]:
    """What of a folder is published: path in the repo -> file, in order."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _NEVER_SENT & set(path.relative_to(folder).parts)
    }


def check_folder(folder: str | Path) -> list[str]:
    """Every reason not to publish a folder.

    It must be a whole model that loads anywhere (configuration with code, one set of weights, processor); and hold
    nothing but text, safetensors, and pictures that its card shows. Tokens, absolute paths, identifiers and medical
    images are looked for by name and by content. What is found is named by file and line, and not quoted.

    Args:
        folder: as `save_pretrained` of a model and a processor wrote it.

    Returns:
        one line a problem, beginning with the file's path in the folder; empty if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: there is no such folder"]
    files = published_files(folder)
    card = files["README.md"].read_text(encoding="utf-8", errors="replace") if "README.md" in files else ""
    problems = list(_incomplete(files))
    paths = _absolute_paths(folder)
    for name, path in files.items():
        if _IDENTIFIER.search(name):
            problems.append(f"{name}: the name looks like the identifier of a patient, a study or a date")
        problems += [f"{name}{problem}" for problem in _of_file(name, path, card, paths)]
    return problems


def _incomplete(files: dict[str, Path]) -> Iterator[str]:
    if "adapter_config.json" in files:
        yield (
            "adapter_config.json: this is an adapter, which loads only beside its base. `medmoe merge FOLDER OUT` "
            "adds it to the base; publish OUT"
        )
        return
    if any(name.startswith("training_state/") for name in files):
        yield "training_state: this is a checkpoint to resume from; publish the run's `output_dir`"
    if "config.json" not in files:
        yield "config.json: missing; save the model by `model.save_pretrained`"
    else:
        try:
            config = json.loads(files["config.json"].read_text(encoding="utf-8"))
            if not str(config.get("model_type", "")).startswith("medmoe"):
                yield "config.json: `model_type` is not one of MedMoE's"
            for target in (config.get("auto_map") or {"": "missing"}).values():
                if isinstance(target, str) and f"{target.split('.')[0]}.py" not in files:
                    yield f"config.json: `auto_map` needs {target.split('.')[0]}.py, without which nothing loads"
                    break
        except (ValueError, AttributeError):
            yield "config.json: no JSON object"
    if "processor_config.json" not in files:
        yield "processor_config.json: missing; save the processor by `processor.save_pretrained`"
    weights = {name for name in files if name.endswith(".safetensors") and "/" not in name and name != GOLDEN}
    expected = {_WEIGHTS}
    if _INDEX in files:
        try:
            expected = set(json.loads(files[_INDEX].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            yield f"{_INDEX}: no index of shards"
            return
    for name in sorted(expected - weights):
        yield f"{name}: missing"
    for name in sorted(weights - expected):
        # Of a single file and shards, transformers loads the single file, new or not.
        yield f"{name}: no part of the weights that {_INDEX if _INDEX in files else 'are in ' + _WEIGHTS} names"


def _absolute_paths(folder: Path) -> re.Pattern[str]:
    """Places on this machine, and what looks like one on any."""
    here = {str(Path.home()), str(Path.cwd()), tempfile.gettempdir(), str(folder.resolve().parent)}
    own = "|".join(re.escape(place) for place in sorted(here) if len(Path(place).parts) > 1)
    before = r"(?:(?<=file://)|(?<![\w./~>})-]))"
    return re.compile(rf"{before}(?:/(?:{_ROOTS})/[\w.~-]|(?:{own})(?![\w.-]))|{_WINDOWS}")


def _of_file(name: str, path: Path, card: str, paths: re.Pattern[str]) -> Iterator[str]:
    """The problems of one file, each to follow its name."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(352)
    found = next((what for start, magic, what in _MAGIC if head[start : start + len(magic)] == magic), None)
    if head[:2] == b"\x1f\x8b":
        found = _inside_gzip(path)
    if "tfevents" in path.name:
        found = "a training log, which names this machine"
    found = found or _BY_SUFFIX.get(suffix)
    if found is not None:
        yield f": {found}"
        return
    if suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as tensors:
                text = json.dumps(tensors.metadata() or {}, ensure_ascii=False)
        except (SafetensorError, OSError):
            yield ": no whole safetensors file"
            return
    elif suffix in _PICTURES:
        if not re.search(rf"(?<![\w/-])(?:\./)?{re.escape(name)}(?!\w)", card):
            yield ": a picture that README.md does not show; is it a patient's?"
        return
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield ": neither text nor safetensors"
            return
    yield from _of_text(path, text, paths)


def _inside_gzip(path: Path) -> str:
    try:
        with gzip.open(path) as file:
            head = file.read(352)
    except (OSError, EOFError, zlib.error):
        head = b""
    found = next((what for start, magic, what in _MAGIC if head[start : start + len(magic)] == magic), None)
    return found or "an archive"


def _of_text(path: Path, text: str, paths: re.Pattern[str]) -> Iterator[str]:
    suffix = path.suffix.lower()
    patterns = [
        (_SECRET, "a token or key; withdraw it, for it may be in other copies too"),
        (paths, "an absolute path of a machine"),
        (_UID, "what looks like the UID of a study or an image"),
    ]
    # A vocabulary may well have the word "mrn".
    if suffix in _DATA_TEXT and path.name not in ("tokenizer.json", "vocab.json", "vocab.txt"):
        patterns.append((_FIELDS, "a field that identifies a patient or a study"))
    for pattern, what in patterns:
        match = pattern.search(text)
        if match:
            yield f", line {text.count(chr(10), 0, match.start()) + 1}: {what}"
    if suffix in (".csv", ".tsv"):
        header = next(csv.reader(text.splitlines(), delimiter="\t" if suffix == ".tsv" else ","), [])
        columns = [column.strip() for column in header if _COLUMN.match(column.strip())]
        if columns:
            yield f": a table of cases, with the column {columns[0]}"
