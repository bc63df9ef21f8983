"""A DICOMweb service by dicomweb-client: QIDO-RS lists instances, WADO-RS retrieves them, within limits.

What dicomweb-client and urllib3 log is hidden, since it contains UIDs.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from medmoe_hf import __version__
from medmoe_hf.errors import ArgumentError, DicomWebError, MedMoEError, MissingPackageError
from medmoe_hf.inference.dicomweb.addresses import TOKEN, Address, credentials, is_uid, token
from medmoe_hf.model.dicom_files_medmoe import no_quotes

TIMEOUT = (10.0, 60.0)  # seconds for a connection, and for each piece of an answer
_TRIES = {"status": 2, "connect": 1, "backoff_factor": 0.5}  # further ones, after 0 and then 1 second
_BUSY = (429, 502, 503, 504)
_LIST_BYTES = 64 * 10**6
_FILE_BYTES = 512 * 10**6  # it is in memory several times while dicomweb-client takes it apart
_CHUNK = 1 << 16  # even if it is compressed, it holds 64 MB at most
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # pydicom would inflate it to any size
_SERIES_UID, _INSTANCE_UID = "0020000E", "00080018"
_BEFORE = "What stands before /studies in the address must be its DICOMweb service, not a viewer."
_TOLD = {
    403: "it forbids this (403): ask who runs it for the right to read the study",
    404: "it does not have this (404)",
    406: "it sends it neither as it is stored nor uncompressed (406)",
    429: "it is busy (429)",
    503: "it is busy (503)",
}

logger = logging.getLogger(__name__)
_is_quiet: ContextVar[bool] = ContextVar("_is_quiet", default=False)  # of this thread


class _NoAddresses(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _is_quiet.get()


for _name in ("dicomweb_client.web", "retrying", "urllib3.connectionpool", "urllib3.util.retry"):
    logging.getLogger(_name).addFilter(_NoAddresses())


@contextlib.contextmanager
def _no_addresses() -> Iterator[None]:
    """Hides what the libraries say in the block, also what pydicom quotes of headers."""
    before = _is_quiet.set(True)
    try:
        with no_quotes():
            yield
    finally:
        _is_quiet.reset(before)


class UnusableError(Exception):
    """An instance that cannot be downloaded; the message says why, without UIDs.

    Attributes:
        lost: Whether the server did not answer.
    """

    def __init__(self, reason: str, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


@dataclass(frozen=True)
class DownloadLimits:
    """What the addresses of a prediction may cost together.

    Args:
        files: Greatest number of instances.
        megabytes: Greatest size of them.
        seconds: Longest time of the download.

    Raises:
        ArgumentError: If one of them is less than 1.
    """

    files: int = 5000
    megabytes: int = 4096
    seconds: int = 3600

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ArgumentError(f"The limit `{name}` must be at least 1, got {value}.")


class Budget:
    """What was used of limits so far.

    Attributes:
        files: Number of instances that were listed.
        bytes: Size of those that were downloaded.
    """

    def __init__(self, limits: DownloadLimits) -> None:
        self.limits, self.files, self.bytes = limits, 0, 0
        self._end = time.monotonic() + limits.seconds

    def check(self, host: str, files: int = 0, size: int = 0) -> None:
        """Raises a `DicomWebError` if a limit is exceeded: by further files, or by further bytes."""
        told = ""
        if self.files + files > self.limits.files:
            told = f"there are more than {self.limits.files} files (`--max-files`)"
        elif self.bytes + size > self.limits.megabytes * 10**6:
            told = f"there are more than {self.limits.megabytes} MB (`--max-megabytes`)"
        elif time.monotonic() > self._end:
            told = f"the download takes more than {self.limits.seconds} seconds (`--max-seconds`)"
        if told:
            raise DicomWebError(f"{host}: {told}. Name a single series of the study, or allow more.")


class _Body:
    """The body of an answer, which is read within limits.

    Args:
        raw: What is read, of urllib3.
        check: Called with the size so far, and with each chunk and the end of the one before.
    """

    def __init__(self, raw: Any, check: Callable[[int, bytes], None]) -> None:
        self._raw, self._check = raw, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def stream(self, amount: int, decode_content: bool | None = None) -> Iterator[bytes]:
        size, end = 0, b""
        for chunk in self._raw.stream(min(amount, _CHUNK), decode_content=decode_content):
            size += len(chunk)
            end = end[-len(_DEFLATED) :] + chunk
            self._check(size, end)
            yield chunk


class Service:
    """What an address needs of its server.

    Args:
        address: A study or series.
        budget: Its limits.

    Attributes:
        address: The same.
        unnamed: Number of listed series and instances without a valid UID.

    Raises:
        ArgumentError: If the credentials cannot be used.
        MissingPackageError: Without dicomweb-client.
    """

    def __init__(self, address: Address, budget: Budget) -> None:
        try:
            import requests
            from dicomweb_client.api import DICOMwebClient
            from urllib3.util import Retry
        except ImportError:
            raise MissingPackageError(
                'Reading DICOMweb addresses needs the package dicomweb-client: pip install "medmoe_hf[dicomweb]"'
            ) from None
        self.address, self.unnamed, self._budget, self._requests = address, 0, budget, requests
        self._is_list = True
        session = requests.Session()
        session.max_redirects = 0  # they lead to pages for signing in, or to other servers
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": f"medmoe_hf/{__version__}"})
        self._signed = session.auth = credentials(address)
        wait = {"raise_on_status": False, "respect_retry_after_header": False}
        tries = Retry(redirect=False, read=False, other=0, status_forcelist=_BUSY, **wait, **_TRIES)
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=tries))
        if not address.is_private:
            logger.warning("The connection to %s is not encrypted; use https if the server has it.", address.host)
        self._client = DICOMwebClient(
            address.base, session, callback=self._limited, permissive_uid=True, timeout=TIMEOUT
        )
        self._client.set_http_retry_params(retry=False)  # it would also repeat what a limit or Ctrl-C has ended

    def instances(self) -> list[tuple[str, str]]:
        """Returns SeriesInstanceUID and SOPInstanceUID of all instances.

        Raises:
            DicomWebError: If they cannot be listed, or there are none or too many.
        """
        study, found, self._is_list = self.address.study, [], True
        try:
            with _no_addresses():
                series = [self.address.series] if self.address.series else []
                for uid in series or self._uids(_SERIES_UID, partial(self._client.search_for_series, study)):
                    listed = self._uids(_INSTANCE_UID, partial(self._client.search_for_instances, study, uid))
                    found += [(uid, instance) for instance in listed]
                    self._budget.files += len(listed)
        except Exception as error:
            told = self._explained(error, "no list of DICOM JSON")
            if isinstance(told, UnusableError) and not told.lost:
                told = DicomWebError(f"{self.address.host}: {told}. {_BEFORE}")
            elif isinstance(told, UnusableError):
                told = DicomWebError(f"{self.address.host}: {told}.")
            raise told from None
        if not found:
            raise DicomWebError(f"{self.address.host}: it has no such study or series, or nothing in it.")
        return found

    def retrieve(self, series: str, uid: str) -> bytes:
        """Returns the file of an instance.

        Raises:
            DicomWebError: If the credentials are refused, or a limit is exceeded.
            UnusableError: If this instance cannot be downloaded.
        """
        self._is_list = False
        try:
            with _no_addresses():
                content = self._file(series, uid)
        except Exception as error:
            raise self._explained(error, "no DICOM file") from None
        self._budget.bytes += len(content)
        return content

    def _file(self, series: str, uid: str) -> bytes:
        ask = partial(self._client.retrieve_instance, self.address.study, series, uid)
        try:
            instance = ask((("application/dicom", "*"),))  # as it is stored
        except self._requests.HTTPError as error:
            if error.response.status_code != 406:
                raise
            instance = ask(("application/dicom",))  # uncompressed; old servers do not know the asterisk
        content: bytes = instance.buffer.getvalue()
        return content

    def _uids(self, tag: str, search: Callable[..., Any]) -> list[str]:
        """Reads all pages of a list. A server that ignores the offset repeats the first page, and has no others."""
        found: dict[str, None] = {}
        seen = 0
        while True:
            rows = search(offset=seen or None)
            if not isinstance(rows, list):
                raise ValueError
            uids = [_uid(row, tag) for row in rows]
            new = {uid for uid in uids if uid and uid not in found}
            if not rows or (seen and not new):
                return list(found)
            seen += len(rows)
            found.update(dict.fromkeys(filter(None, uids)))
            self.unnamed += uids.count("")
            self._budget.check(self.address.host, files=len(found))

    def _limited(self, response: Any, *_: Any, **__: Any) -> Any:
        response.raw = _Body(response.raw, self._check)
        return response

    def _check(self, size: int, content: bytes) -> None:
        self._budget.check(self.address.host, size=0 if self._is_list else size)
        if self._is_list and size > _LIST_BYTES:
            raise UnusableError(f"it sends a list of more than {_LIST_BYTES // 10**6} MB")
        if not self._is_list and size > _FILE_BYTES:
            raise UnusableError(f"it has more than {_FILE_BYTES // 10**6} MB, which is read from files only")
        if not self._is_list and _DEFLATED in content:
            raise UnusableError("it is deflated, which is read from files only")

    def _explained(self, error: Exception, otherwise: str) -> Exception:
        """Returns what to raise for an error of the libraries, whose messages contain addresses."""
        known = self._requests.exceptions
        if isinstance(error, MedMoEError | UnusableError | MemoryError):
            return error
        if isinstance(error, known.HTTPError):
            status = error.response.status_code
            if status == 401:
                return DicomWebError(f"{self.address.host}: {self._refused()} (401).")
            return UnusableError(_TOLD.get(status, f"it answers with the status {status}"))
        if isinstance(error, known.TooManyRedirects):
            return UnusableError(
                "it leads to another address, for signing in perhaps: name that of the service itself"
            )
        if isinstance(error, known.SSLError) and "CERTIFICATE_VERIFY" in str(error):
            return UnusableError(
                "its certificate cannot be verified; where an authority of your own has signed it, name the file of "
                "that in the variable REQUESTS_CA_BUNDLE",
                lost=True,
            )
        late = any(type(one).__name__ == "ReadTimeoutError" for one in error.args)  # in the middle of an answer
        if late or isinstance(error, known.Timeout):
            return UnusableError("it does not answer in time", lost=True)
        if isinstance(error, known.ConnectionError | known.ChunkedEncodingError):
            return UnusableError("it cannot be reached, or the connection broke off", lost=True)
        return UnusableError(f"it sends {otherwise}")

    def _refused(self) -> str:
        if token():
            return f"it refuses the token of {TOKEN}, which may have expired"
        if self._signed:
            return "it refuses the user name and password of ~/.netrc"
        return f"it asks for credentials: a token in the variable {TOKEN}, or user name and password in ~/.netrc"


def _uid(row: Any, tag: str) -> str:
    """Returns a UID of a listed data set; empty if there is none."""
    try:
        uid = row[tag]["Value"][0]
    except (KeyError, TypeError, IndexError):
        return ""
    return uid if is_uid(uid) else ""
