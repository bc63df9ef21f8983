"""Receives multipart uploads into a folder, part by part, within limits; files keep neither names nor paths."""

import re
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medmoe_hf.errors import ArgumentError, MissingPackageError

try:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header
except ImportError as error:
    raise MissingPackageError('`medmoe serve` needs python-multipart: pip install "medmoe_hf[serve]"') from error

_CHUNK = 1 << 20
_MAX_TEXT = 1 << 16  # bytes of all fields that are no files
_MAX_HEADER = 1 << 13  # bytes of the headers of a part
_MEMBER = 1 << 10  # bytes of an entry in the directory of a zip file, generously
_END = b"PK\x05\x06"  # of a zip file
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


@dataclass
class Form:
    """A received request.

    Attributes:
        fields: Name -> values, in the order of the request.
        files: The saved files.
        size: Number of bytes received.
    """

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    size: int = 0


class _Parts:
    """Callbacks of the parser: files go to disk, other fields to `form`."""

    def __init__(self, folder: Path, limits: Limits, form: Form) -> None:
        self._folder, self._limits, self._form = folder, limits, form
        self._file: Any = None
        self._text = bytearray()
        self._texts = self._header_bytes = 0
        self._ignored = self._unnamed = self.complete = False
        self._header, self._value, self._headers = b"", b"", dict[bytes, bytes]()
        self._name = ""

    def callbacks(self) -> dict[str, Any]:
        names = "part_begin part_data part_end header_field header_value header_end headers_finished end"
        return {f"on_{name}": getattr(self, f"_on_{name}") for name in names.split()}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _on_part_begin(self) -> None:
        self._headers, self._header, self._value, self._header_bytes = {}, b"", b"", 0
        self._file, self._ignored, self._text = None, False, bytearray()

    def _counted(self, data: bytes) -> bytes:
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER:
            raise UploadError(400, "A part of the request has too long a header.")
        return data

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += self._counted(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._counted(data[start:end])

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != "files":
            if b"filename" in options:
                raise UploadError(422, f'Files belong in the field "files", not in "{self._name[:40]}".')
            return
        name = options.get(b"filename", b"").decode("utf-8", "replace").lower()
        # A DICOMDIR names files that have no names here.
        self._ignored = PurePosixPath(name).name == "dicomdir"
        if self._ignored:
            return
        self._unnamed = not name
        if len(self._form.files) == self._limits.files:
            raise self._limits.too_many()
        path = self._folder / f"{len(self._form.files):06}{_suffix(name)}"
        self._file = path.open("xb")
        self._form.files.append(path)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
        elif not self._ignored:
            self._texts += end - start
            if self._texts > _MAX_TEXT:
                raise UploadError(413, f"The fields that are no files exceed {_MAX_TEXT // 1024} kB.")
            self._text += data[start:end]

    def _on_part_end(self) -> None:
        if self._file is not None:
            empty = self._file.tell() == 0
            self._file.close()
            self._file = None
            if empty and self._unnamed:  # what browsers send if no file was chosen
                self._form.files.pop().unlink()
        elif not self._ignored:
            try:
                text = self._text.decode("utf-8")
            except UnicodeDecodeError:
                raise UploadError(422, f'The field "{self._name[:40]}" is not UTF-8.') from None
            self._form.fields.setdefault(self._name, []).append(text)

    def _on_end(self) -> None:
        self.complete = True


def _suffix(name: str) -> str:
    found = _SUFFIX.search(name.lower())
    return found[0] if found else ""


async def receive(stream: AsyncIterator[bytes], content_type: str, folder: Path, limits: Limits) -> Form:
    """Saves the files of a multipart request in a folder, with little memory.

    Args:
        stream: The body.
        content_type: Its type, with the boundary.
        folder: An empty folder.
        limits: What the request may cost.

    Returns:
        Fields, and files in the order of the request. Zip files are not unpacked yet.

    Raises:
        UploadError: If the request is malformed or exceeds a limit.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UploadError(415, 'Send multipart/form-data, with files in the field "files".')
    form = Form()
    parts = _Parts(folder, limits, form)
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        async for chunk in stream:
            form.size += len(chunk)
            if form.size > limits.bytes:
                raise limits.too_large()
            parser.write(chunk)
    except FormParserError:
        raise UploadError(400, "The body is no well-formed multipart/form-data.") from None
    finally:
        parts.close()
    if not parts.complete:
        raise UploadError(400, "The body ends too early.")
    return form


def unpack(files: list[Path], limits: Limits, check: Callable[[], None]) -> None:
    """Replaces zip files by folders with what they hold. Names in them are not used, so that none leads elsewhere.

    Folders stay apart, and files are in the order of their names. Hidden files are left out.

    Args:
        files: Files that `receive` saved.
        limits: What they may hold together.
        check: Called before each file and each of its parts; what it raises ends the work.

    Raises:
        UploadError: If a zip file is damaged, encrypted or exceeds a limit.
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
                        (target / f"{number:06}{_suffix(member.filename)}").open("xb") as out,
                    ):
                        check()
                        while chunk := source.read(_CHUNK):
                            check()
                            # The sizes that a zip file states may be wrong.
                            size += len(chunk)
                            if size > limits.bytes:
                                raise limits.too_large()
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
