"""What runs apart: a launcher that imports the readers once, and its forks, each of which reads one set of files.

The launcher touches no file of a user. It has a single thread, so that a fork of it is as clean as a new process and
is made in milliseconds. Each fork sets its limits before its first file, and ends with its set of files, so that
nothing of them is there when the next ones are read.
"""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medmoe_hf.errors import (
    ArgumentError,
    ImageError,
    ImageTooLargeError,
    MedicalImageError,
    MissingPackageError,
    PathNotFoundError,
)
from medmoe_hf.inference.isolation.messages import receive, send
from medmoe_hf.inference.isolation.plain_studies import described

ERRORS: dict[str, type[Exception]] = {
    "ImageTooLargeError": ImageTooLargeError,
    "MedicalImageError": MedicalImageError,
    "ImageError": ImageError,
    "PathNotFoundError": PathNotFoundError,
    "MissingPackageError": MissingPackageError,
    "ArgumentError": ArgumentError,
    "OSError": OSError,
    "ValueError": ValueError,
}
"""Errors of files that are told by name, the narrower ones first; all others are faults of the package."""

FORK, END = b"f", b"e"
PID_BYTES = 8
_READERS = ("medmoe_hf.model.studies_medmoe", "pydicom.pixels", "nibabel", "openjpeg", "libjpeg", "rle", "gdcm")
_PATIENCE = 3  # times the limit, after which a fork ends itself if nobody else does


def launch(control: socket.socket, plugins: Sequence[str]) -> None:
    """Imports the readers, and then forks and ends processes until the other side closes.

    Args:
        control: Socket to the process that needs files decoded.
        plugins: Modules to import, which add codecs.
    """
    try:
        for name in plugins:
            importlib.import_module(name)
        for name in _READERS:
            with contextlib.suppress(ImportError):  # what is missing is said when a file needs it
                importlib.import_module(name)
        from PIL import Image

        Image.init()
        importlib.import_module("torch").set_num_threads(1)
    except Exception as error:
        send(control, {"failed": f"{type(error).__name__}: {error}"})
        return
    gc.collect()
    gc.freeze()  # so that forks share the pages of these objects
    send(control, {"failed": ""})
    children: set[int] = set()
    try:
        while True:
            asked, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if asked == FORK and descriptors:
                pid = os.fork()
                if not pid:
                    control.close()
                    _serve(socket.socket(fileno=descriptors[0]))
                os.close(descriptors[0])
                children.add(pid)
                send(control, {"pid": pid})
            elif asked == END:
                pid = int.from_bytes(control.recv(PID_BYTES, socket.MSG_WAITALL), "little")
                # Only what was not waited for yet: the number cannot belong to anybody else.
                send(control, {"status": _ended(pid) if pid in children else 0})
                children.discard(pid)
            else:
                return
    finally:
        for pid in children:
            _ended(pid)


def _ended(pid: int) -> int:
    """Kills a fork, unless it has ended, and returns its exit code; negative for a signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve(channel: socket.socket) -> None:
    """The life of a fork."""
    try:
        limits, _ = receive(channel)
        send(channel, {"missing": _restrict(**limits)})
        _Reader(channel, int(limits["seconds"])).run()
    except BaseException:  # the other side is gone
        pass
    finally:
        os._exit(0)


def _restrict(megabytes: int, open_files: int, seconds: int) -> list[str]:
    """Sets limits of the operating system; returns the names of those that it does not have."""
    import resource

    sys.dont_write_bytecode = True
    wanted = {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": megabytes * 10**6,  # of volumes that are inflated to temporary files
        "RLIMIT_NOFILE": open_files,
    }
    missing = []
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        wanted["RLIMIT_AS"] = mapped + megabytes * 10**6  # libraries map much that they never use
    except OSError:  # macOS does not tell how much that is, nor does it keep to the limit
        missing.append("RLIMIT_AS")
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            missing.append(name)
    return missing


class _Reader:
    """Answers one request after another."""

    def __init__(self, channel: socket.socket, seconds: int) -> None:
        self._channel, self._seconds = channel, seconds
        self._studies: Any = []
        self._below: tuple[str, ...] = ()
        self._file = ""
        # Python tells of every file that it opens, and so which one is to blame.
        sys.addaudithook(self._opened)

    def run(self) -> None:
        known: dict[str, Callable[..., tuple[dict[str, Any], np.ndarray | None]]]
        known = {"read": self._read, "slice": self._slice, "picture": self._picture}
        while True:
            request, _ = receive(self._channel)
            signal.alarm(_PATIENCE * self._seconds)
            try:
                told, pixels = known[request.pop("do")](**request)
            except Exception as error:
                told, pixels = _told(error), None
            finally:
                self._below = ()
                signal.alarm(0)
            send(self._channel, told, pixels)

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event == "open" and self._below else None
        if isinstance(path, str) and path != self._file and path.startswith(self._below):
            self._file = path
            signal.alarm(_PATIENCE * self._seconds)
            send(self._channel, {"file": path})

    def _read(self, paths: list[str], **arguments: Any) -> tuple[dict[str, Any], None]:
        from medmoe_hf.model.studies_medmoe import read_studies

        self._file, self._below = "", tuple(paths)
        self._studies = read_studies(paths, **arguments)
        return described(self._studies), None

    def _slice(self, study: int, series: int, index: int, window: Any) -> tuple[dict[str, Any], np.ndarray]:
        image = self._studies[study].series[series].slice(index, window)
        return {"modality": image.modality, "spacing": image.spacing}, image.pixels

    def _picture(self, path: str, max_pixels: int) -> tuple[dict[str, Any], np.ndarray]:
        import torch

        from medmoe_hf.model.image_files_medmoe import load_image
        from medmoe_hf.model.image_processing_medmoe import to_rgb
        from medmoe_hf.model.medical_images_medmoe import is_medical_image

        if not os.path.isfile(path):
            raise PathNotFoundError(f"{path!r}: there is no such file")
        medical = is_medical_image(path)
        image, modality = load_image(path, max_pixels=max_pixels)
        if not medical:
            rgb = to_rgb(image).permute(1, 2, 0)
            image = rgb.numpy() if rgb.dtype == torch.uint8 else (rgb / 255).numpy()
        return {"modality": modality, "spacing": None}, np.asarray(image)


def _told(error: Exception) -> dict[str, Any]:
    reason: BaseException | None = error
    while reason is not None:  # readers make errors of their own out of it
        if isinstance(reason, MemoryError):
            return {"error": "MemoryError"}
        reason = reason.__context__
    for name, kind in ERRORS.items():
        if isinstance(error, kind):
            return {"error": name, "message": str(error)}
    if isinstance(error, ImportError):
        return {"error": "MissingPackageError", "message": str(error)}
    # Messages of parsers quote headers, so that only the places are told.
    places = "".join(traceback.format_tb(error.__traceback__))
    return {"error": type(error).__name__, "message": "", "places": places}
