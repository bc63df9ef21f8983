"""Receives multipart uploads into a folder, part by part, within limits; files keep neither names nor paths."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from medmoe_hf.errors import MissingPackageError
from medmoe_hf.inference.serving.archives import NEEDED, Limits, UploadError, plain_suffix

try:
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header
except ImportError as error:
    raise MissingPackageError(NEEDED) from error

_MAX_TEXT = 1 << 16  # bytes of all fields that are no files
_MAX_HEADER = 1 << 13  # bytes of the headers of a part
_DIGITS = 9  # of the number of an upload: more than can be sent


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
        self._texts = self._header_bytes = self._uploads = 0
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
        self._uploads += 1
        # A DICOMDIR names files that have no names here.
        self._ignored = PurePosixPath(name).name == "dicomdir"
        if self._ignored:
            return
        self._unnamed = not name
        if len(self._form.files) == self._limits.files:
            raise self._limits.too_many()
        path = self._folder / f"{self._uploads - 1:0{_DIGITS}}{plain_suffix(name)}"
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
                self._uploads -= 1
        elif not self._ignored:
            try:
                text = self._text.decode("utf-8")
            except UnicodeDecodeError:
                raise UploadError(422, f'The field "{self._name[:40]}" is not UTF-8.') from None
            self._form.fields.setdefault(self._name, []).append(text)

    def _on_end(self) -> None:
        self.complete = True


def upload_numbers(paths: Iterable[str], folder: Path) -> list[int]:
    """Returns which uploads files come from, without repetitions and in order.

    Args:
        paths: Files in the folder, of uploads and of what their zip files held.
        folder: The folder that `receive` saved uploads in.

    Returns:
        Numbers in the order of the request, from 0; a DICOMDIR counts, though it is not kept.
    """
    return sorted({int(Path(path).relative_to(folder).parts[0][:_DIGITS]) for path in paths})


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
