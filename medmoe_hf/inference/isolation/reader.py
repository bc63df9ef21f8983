"""`read_studies` whose files are opened and decoded in processes of their own."""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medmoe_hf.errors import DecodingError, IsolationError, MedicalImageError
from medmoe_hf.inference.isolation.child import ERRORS
from medmoe_hf.inference.isolation.messages import MessageError, receive, send
from medmoe_hf.inference.isolation.plain_studies import rebuilt
from medmoe_hf.inference.isolation.processes import DecodingLimits, Fork, Launcher
from medmoe_hf.model.medical_pixels_medmoe import MAX_PIXELS, MedicalImage
from medmoe_hf.model.studies_medmoe import Studies
from medmoe_hf.model.study_files_medmoe import Skipped, find_files

logger = logging.getLogger(__name__)

_MOST_FAULTS = 5  # of a set of files, each of which may have cost the whole limit of time
_BYTES_PER_PIXEL = 12  # three float32


class _Fault(Exception):
    """A process ended, or had to be ended; `file` is what it had opened last, while headers were read."""

    def __init__(self, reason: str, file: str = "") -> None:
        super().__init__(reason)
        self.file = file


class IsolatedReader:
    """Reads studies as `read_studies` does, but opens and decodes their files in processes with limits.

    A codec that crashes, hangs or takes too much memory ends its process. The file is then left out with the reason,
    as a damaged one is, and the next one is decoded by a new process. Each set of files has a process of its own,
    whose memory holds nothing of other files and no variables of this process, and which dumps no memory. Its rights
    are otherwise those of this process: it is no sandbox.

    Args:
        limits: What decoding may cost.
        kept: Number of sets of files whose processes are kept for further slices; others read their headers again.
        plugins: Modules to import there that add codecs, such as `pillow_heif`.

    Raises:
        IsolationError: On systems without limits for processes, such as Windows.

    Example:
        ```python
        from medmoe_hf.inference.isolation import IsolatedReader
        from medmoe_hf.inference.studies import StudyPredictor

        predictor = StudyPredictor("small")
        with IsolatedReader() as reader:
            predictions = predictor(reader.read_studies("exports/study"))
        ```
    """

    def __init__(self, limits: DecodingLimits | None = None, *, kept: int = 1, plugins: Sequence[str] = ()) -> None:
        self.limits, self._kept, self._plugins = limits or DecodingLimits(), max(1, kept), tuple(plugins)
        self._lock = threading.RLock()
        self._launcher = Launcher(self._plugins)
        self._open: OrderedDict[_Files, None] = OrderedDict()
        self._warned = False

    def read_studies(
        self,
        paths: Any,
        *,
        plane: str | None = None,
        window: Any = None,
        max_pixels: int = MAX_PIXELS,
        max_slices: int | None = None,
        on_skip: Callable[[Skipped], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> Studies:
        """Finds the studies in files and folders; see `medmoe_hf.model.read_studies`.

        Args:
            paths: As for `read_studies`, and so are the others but `check`.
            plane: Plane of NIfTI volumes.
            window: Window of CT and NIfTI.
            max_pixels: Greatest number of pixels of an image.
            max_slices: Greatest number of slices.
            on_skip: Called with each file, once all headers are read, and each slice that is left out.
            check: Called several times a second while headers are read; what it raises ends the work.

        Returns:
            The studies, whose slices are decoded apart for as long as this reader is not closed.

        Raises:
            IsolationError: If files end too many processes, or none can be started.
            MedicalImageError: If there is no image, and other errors of `read_studies`.
        """
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        files = _Files(self, [os.fsdecode(path) for path in given], plane, window, max_pixels, max_slices)
        with self._lock:
            studies = files.read(check)
        if on_skip is not None:
            for one in [skipped for study in studies for skipped in study.left_out] + studies.skipped:
                on_skip(one)
            for series in (series for study in studies for series in study.series):
                series._on_skip = on_skip
        return studies

    def picture(self, path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> MedicalImage:
        """Decodes one picture, DICOM or NIfTI file for an image processor, which reads the result like the file.

        Args:
            path: The file.
            max_pixels: Greatest number of pixels.

        Raises:
            DecodingError: If the decoder crashes, or exceeds a limit.
            ImageError: If the file cannot be used, and other errors of `load_image`.
        """
        name = os.fsdecode(path)
        with self._lock:
            files = _Files(self, [], None, None, max_pixels, None)
            try:
                return _image(*files.ask({"do": "picture", "path": name, "max_pixels": max_pixels}))
            except _Fault as fault:
                raise DecodingError(f"cannot read {name!r}: {fault}") from None
            finally:
                files.end()

    def release(self) -> None:
        """Ends the processes of all sets of files, and so closes these; further slices start new ones."""
        with self._lock:
            for files in list(self._open):
                files.end()

    def close(self) -> None:
        """Ends all processes. Slices can no longer be decoded."""
        with self._lock:
            self.release()
            self._launcher.close()

    def __enter__(self) -> "IsolatedReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _fork(self, files: "_Files") -> Fork:
        """Starts a process, and ends that of the files that were used longest ago."""
        if not self._launcher.alive:
            raise IsolationError("The reader of these files was closed.")
        while len(self._open) >= self._kept:
            next(iter(self._open)).end()
        try:
            fork, missing = self._launcher.fork(self.limits)
        except IsolationError:  # somebody killed the launcher, or it is a machine without memory
            self._launcher.close()
            self._launcher = Launcher(self._plugins)
            fork, missing = self._launcher.fork(self.limits)
        if missing and not self._warned:
            self._warned = True
            logger.warning("Decoding apart is not limited by %s, which this system does not have.", ", ".join(missing))
        self._open[files] = None
        return fork


class _Files:
    """A set of files, and the process that has read their headers."""

    def __init__(
        self,
        reader: IsolatedReader,
        given: list[str],
        plane: str | None,
        window: Any,
        max_pixels: int,
        max_slices: int | None,
    ) -> None:
        self._reader, self._given, self._window = reader, given, window
        self._arguments = {"plane": plane, "window": window, "max_pixels": max_pixels, "max_slices": max_slices}
        self._most = _BYTES_PER_PIXEL * max_pixels
        self._fork: Fork | None = None
        self._counts: list[list[int]] = []
        self._left_out: dict[str, str] = {}  # of headers
        self._broken: dict[tuple[int, int, int], str] = {}  # slices
        self._faults = 0
        self._known: set[str] = set()  # paths that may be named
        self._folders: set[str] = set()

    def read(self, check: Callable[[], None] | None = None) -> Studies:
        """Reads the headers, without the files that end a process."""
        told = self._headers(check)
        try:
            studies = rebuilt(told, self._slice, self._check_path, self._window)
        except ValueError as error:
            self.end()
            raise IsolationError(f"The process that reads files gave no valid answer: {error}.") from None
        studies.skipped += [Skipped(path, reason) for path, reason in self._left_out.items()]
        self._counts = [[len(series) for series in study.series] for study in studies]
        return studies

    def _headers(self, check: Callable[[], None] | None) -> dict[str, Any]:
        while True:
            paths = self._given
            if self._left_out:
                paths = [path for path in find_files(self._given) if path not in self._left_out]
            if not paths:
                reasons = "; ".join(dict.fromkeys(self._left_out.values()))
                raise MedicalImageError(f"there is no image in the given files: {reasons}")
            try:
                return self.ask({"do": "read", "paths": paths, **self._arguments}, check)[0]
            except _Fault as fault:
                self._count(str(fault))
                if not fault.file or fault.file in self._left_out:
                    raise IsolationError(f"The files cannot be read: {fault}.") from None
                self._left_out[fault.file] = str(fault)

    def _slice(self, study: int, series: int, index: int, window: Any) -> MedicalImage:
        place = (study, series, index)
        with self._reader._lock:
            if place in self._broken:
                raise DecodingError(self._broken[place])
            if self._fork is None:
                told = self._headers(None)
                if [[len(one["sources"]) for one in entry["series"]] for entry in told["studies"]] != self._counts:
                    raise IsolationError("The files have changed since their headers were read.")
            self._reader._open.move_to_end(self)
            request = {"do": "slice", "study": study, "series": series, "index": index, "window": window}
            try:
                told, pixels = self.ask(request)
            except _Fault as fault:
                self._broken[place] = f"the file cannot be decoded: {fault}"
                self._count(str(fault))
                raise DecodingError(self._broken[place]) from None
        return _image(told, pixels)

    def _count(self, reason: str) -> None:
        self._faults += 1
        if self._faults > _MOST_FAULTS:
            raise IsolationError(
                f"More than {_MOST_FAULTS} of these files or slices ended the process that decodes them, the last one "
                f"because {reason}. Remove them, and try again."
            )

    def ask(
        self, request: dict[str, Any], check: Callable[[], None] | None = None
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Asks the process, and starts it before if need be.

        Raises:
            _Fault: It ended, or exceeded a limit.
        """
        limits, file = self._reader.limits, ""
        if self._fork is None:
            self._fork = self._reader._fork(self)
        end = time.monotonic() + limits.seconds

        def waiting() -> None:
            if check is not None:
                check()
            if time.monotonic() > end:
                raise _Fault(f"it took its decoder longer than {limits.seconds} s", file)

        try:
            send(self._fork.channel, request)
            while True:
                told, pixels = receive(self._fork.channel, self._most, waiting)
                if "file" not in told:
                    break
                waiting()
                file, end = str(told["file"]), time.monotonic() + limits.seconds
        except (EOFError, ConnectionError):
            raise _Fault(f"it crashed its decoder ({self.end()})", file) from None
        except MessageError as error:
            self.end()
            raise _Fault(f"its decoder gave no valid answer: {error}", file) from None
        except BaseException:
            self.end()
            raise
        if "error" in told:
            raise self._error(told, file)
        return told, pixels

    def _error(self, told: dict[str, Any], file: str) -> Exception:
        name, message = str(told["error"]), str(told.get("message", ""))
        if name == "MemoryError":
            self.end()
            return _Fault(f"its decoder needs more than {self._reader.limits.megabytes} MB of memory", file)
        if name in ERRORS:
            return ERRORS[name](message)
        logger.error("%s in the process that decodes files, at\n%s", name[:100], str(told.get("places", ""))[:10000])
        return RuntimeError(f"{name[:100]} in the process that decodes files")

    def end(self) -> str:
        """Ends the process; returns how it ended."""
        self._reader._open.pop(self, None)
        fork, self._fork = self._fork, None
        return "" if fork is None else self._reader._launcher.end(fork)

    def _check_path(self, path: str) -> None:
        """A process that a file has taken over must not name other files, which are read here for their headers."""
        if path in self._known:
            return
        if not self._folders:
            real = [os.path.realpath(one) for one in self._given]
            self._folders = {one if os.path.isdir(one) else os.path.dirname(one) for one in real}
        inside = any(os.path.commonpath([os.path.realpath(path), folder]) == folder for folder in self._folders)
        if not inside and path not in find_files(self._given):  # a link in a folder may lead out of it
            raise ValueError("it names a file that was not to be read")
        self._known.add(path)


def _image(told: dict[str, Any], pixels: np.ndarray | None) -> MedicalImage:
    try:
        spacing = None if told["spacing"] is None else tuple(float(side) for side in told["spacing"])
        modality = None if told["modality"] is None else str(told["modality"])
        if pixels is None or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise ValueError
        if spacing is not None and len(spacing) != 2:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DecodingError("the file cannot be decoded: its decoder gave no picture") from None
    return MedicalImage(pixels, modality, spacing, 0, 1)
