"""A DICOMweb server on this machine, for tests: QIDO-RS in JSON, WADO-RS in multipart, and faults on demand."""

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom

PREFIX = "/dicom-web"
BOUNDARY = "part-of-this-answer"
Answer = tuple[int, dict[str, str], bytes]


def multipart(*parts: bytes) -> Answer:
    """The answer of WADO-RS that holds these files."""
    head = f"--{BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    body = b"".join(head + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()
    return 200, {"Content-Type": f'multipart/related; type="application/dicom"; boundary="{BOUNDARY}"'}, body


def listing(tag: str, uids: Iterable[str]) -> Answer:
    """The answer of QIDO-RS that lists these UIDs."""
    rows = [{tag: {"vr": "UI", "Value": [uid]}} for uid in uids]
    return 200, {"Content-Type": "application/dicom+json"}, json.dumps(rows).encode()


class LoopbackDicomWeb:
    """Serves DICOM files by their UIDs, encrypted if a context is given.

    Attributes:
        answers: Function of a path and its headers that returns the answer to give instead, or None; tests set it.
        page: Rows of a list at once; None for all.
        asked: Path and headers of each request.
    """

    def __init__(self, files: Iterable[Path] = (), tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.files: dict[tuple[str, str, str], bytes] = {}
        for path in files:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            key = (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
            self.files[tuple(map(str, key))] = path.read_bytes()
        self.answers: Callable[[str, Any], Answer | None] = lambda path, headers: None
        self.page: int | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []

    def address(self, study: str, series: str | None = None) -> str:
        host, port = self._server.server_address[:2]
        scheme = "http" if self.tls is None else "https"
        rest = "" if series is None else f"/series/{series}"
        return f"{scheme}://{host}:{port}{PREFIX}/studies/{study}{rest}"

    def answer(self, target: str, headers: Any) -> Answer:
        parts = urlsplit(target)
        found = self.answers(parts.path, headers)
        if found is not None:
            return found
        matched = re.fullmatch(rf"{PREFIX}/studies/([^/]+)(/series(?:/([^/]+)/instances(?:/([^/]+))?)?)?", parts.path)
        if matched is None or matched[2] is None:
            return 404, {}, b""
        study, series, instance = matched[1], matched[3], matched[4]
        if instance is not None:
            content = self.files.get((study, series, instance))
            return (404, {}, b"") if content is None else multipart(content)
        if series is None:
            uids = dict.fromkeys(key[1] for key in self.files if key[0] == study)
        else:
            uids = dict.fromkeys(key[2] for key in self.files if key[:2] == (study, series))
        offset = int(parse_qs(parts.query).get("offset", ["0"])[0])
        listed = list(uids)[offset:][: self.page]
        return listing("0020000E" if series is None else "00080018", listed) if listed else (204, {}, b"")

    def __enter__(self) -> "LoopbackDicomWeb":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers)))
                status, headers, body = outer.answer(self.path, self.headers)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
