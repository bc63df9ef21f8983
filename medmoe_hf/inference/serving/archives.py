"""Limits of uploads, and zip files that are unpacked within them; names and metadata of files are not kept."""

import logging
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medmoe_hf.errors import ArgumentError

_CHUNK = 1 << 20
_MEMBER = 1 << 10  # bytes of an entry in the directory of a zip file, generously
_RATIO = 100  # by which a zip file may be smaller than what it holds; scans compress to a half or a tenth
_ALWAYS = 50 * 10**6  # bytes that it may hold at any ratio: an empty mask compresses to nothing
_END = b"PK\x05\x06"  # of a zip file
NEEDED = (
    "`medmoe serve` needs fastapi, uvicorn and python-multipart, at least one of which is missing: "
    'pip install "medmoe_hf[serve]" installs all three.'
)
"""Message where any package of the extra is missing."""
# By these names DICOM without a preamble is recognised.
_SUFFIX = re.compile(r"\.(?:nii\.gz|nii|dcm|dicom)$")


class UploadError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: Status of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Args:
        megabytes: Greatest size of an upload, and of what its zip files hold.
        files: Greatest number of files, those in zip files included; and of slices.
        seconds: Longest time of an upload; and of reading and prediction, once it is a request's turn.
        requests: Number of requests at a time; one is computed, the others upload or wait.

    Raises:
        ArgumentError: If one of them is less than 1.
    """

    megabytes: int = 1024
    files: int = 2000
    seconds: int = 300
    requests: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ArgumentError(f"The limit `{name}` must be at least 1, got {value}.")

    @property
    def bytes(self) -> int:
        """`megabytes` in bytes."""
        return self.megabytes * 10**6

    def too_large(self) -> UploadError:
        """Returns the error for too many bytes."""
        return UploadError(413, f"The upload, or what its zip files hold, exceeds {self.megabytes} MB.")

    def too_many(self) -> UploadError:
        """Returns the error for too many files or slices."""
        return UploadError(413, f"There are more than {self.files} files or slices.")


def hide_metadata() -> None:
    """Leaves Pillow's messages for debugging out of all logs: they quote EXIF and other metadata of pictures."""
    logging.getLogger("PIL").setLevel(logging.INFO)


def plain_suffix(name: str) -> str:
    """Returns the ending of a file name that readers need, which names nobody; empty for all other names."""
    found = _SUFFIX.search(name.lower())
    return found[0] if found else ""


def unpack(files: list[Path], limits: Limits, check: Callable[[], None]) -> None:
    """Replaces zip files by folders with what they hold. Names in them are not used, so that none leads elsewhere.

    Folders stay apart, and files are in the order of their names. Hidden files are left out.

    Args:
        files: Files that `receive` saved.
        limits: What they may hold together.
        check: Called before each file and each of its parts; what it raises ends the work.

    Raises:
        UploadError: If a zip file is damaged, encrypted or exceeds a limit, which its ratio of compression also has.
    """
    count, size = len(files), 0
    for path in files:
        with path.open("rb") as file:
            if file.read(4) not in (b"PK\x03\x04", _END):
                continue
        archive = path.rename(path.with_name(f"{path.name}.zip"))
        try:
            if _directory_size(archive) > (limits.files + 1) * _MEMBER:
                raise limits.too_many()
            with zipfile.ZipFile(archive) as opened:
                members = sorted(filter(_is_wanted, opened.infolist()), key=lambda member: member.filename)
                most = max(_ALWAYS, _RATIO * archive.stat().st_size)
                before = size
                count += len(members) - 1
                if count > limits.files:
                    raise limits.too_many()
                folders: dict[PurePosixPath, Path] = {}
                path.mkdir()
                for number, member in enumerate(members):
                    if member.flag_bits & 1:
                        raise UploadError(422, "A zip file is encrypted.")
                    # Others may need much memory.
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise UploadError(422, "A zip file uses a compression other than deflate.")
                    parent = PurePosixPath(member.filename).parent
                    target = folders.setdefault(parent, path / f"{len(folders):06}")
                    target.mkdir(exist_ok=True)
                    with (
                        opened.open(member) as source,
                        (target / f"{number:06}{plain_suffix(member.filename)}").open("xb") as out,
                    ):
                        check()
                        while chunk := source.read(_CHUNK):
                            check()
                            # The sizes that a zip file states may be wrong.
                            size += len(chunk)
                            if size > limits.bytes:
                                raise limits.too_large()
                            if size - before > most:
                                raise UploadError(413, f"A zip file holds more than {_RATIO} times its own size.")
                            out.write(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, RuntimeError):
            raise UploadError(422, "A zip file is damaged or of an unknown kind.") from None
        archive.unlink()


def _is_wanted(member: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(member.filename).parts
    hidden = any(part.startswith((".", "__")) for part in parts if part != "..")
    return not member.is_dir() and not hidden and bool(parts) and parts[-1].upper() != "DICOMDIR"


def _directory_size(archive: Path) -> int:
    """Size of the list of members, which `zipfile` would read as a whole."""
    with archive.open("rb") as file:
        file.seek(max(archive.stat().st_size - 65557, 0))
        tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + 22:
        raise UploadError(422, "A zip file is damaged or of an unknown kind.")
    return int.from_bytes(tail[at + 12 : at + 16], "little")
