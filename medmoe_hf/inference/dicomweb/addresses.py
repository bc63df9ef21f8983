"""Addresses of studies on DICOMweb servers, and how one signs in there.

Errors repeat neither the address, which contains UIDs, nor a credential.
"""

import ipaddress
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from medmoe_hf.errors import ArgumentError

TOKEN = "MEDMOE_DICOMWEB_TOKEN"
"""The variable of a bearer token."""

_FORM = "expected https://SERVER/PREFIX/studies/UID or https://SERVER/PREFIX/studies/UID/series/UID"
_RESOURCE = re.compile(r"(?P<base>/?.*?)/studies/(?P<study>[^/]+)(?:/series/(?P<series>[^/]+))?/?")
_BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750
_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class Address:
    """A study or series of a DICOMweb server.

    Args:
        base: Address of the service, which ends before `/studies`.
        study: StudyInstanceUID.
        series: SeriesInstanceUID; None for all series of the study.
    """

    base: str
    study: str = field(repr=False)
    series: str | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        """Name of the server."""
        return urlsplit(self.base).hostname or ""

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent: it is encrypted, or stays on this machine."""
        if self.base.startswith("https:") or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False


def is_address(path: object) -> bool:
    """Whether a path is an address."""
    return isinstance(path, str) and path.lower().startswith(("http://", "https://"))


def is_uid(value: object) -> bool:
    """Whether a value is made like a UID. Zeros may lead, as they do where software has replaced identifiers."""
    return isinstance(value, str) and _UID.fullmatch(value) is not None


def parse_address(text: str) -> Address:
    """Reads the address of a study or of a series.

    Raises:
        ArgumentError: For anything else, and for addresses with credentials.
    """
    if "@" in text:
        raise ArgumentError(
            "The address contains a user name or a password (before the @), which would stay in the history of the "
            f"shell and in the list of processes. Put them into ~/.netrc, or a token into the variable {TOKEN}."
        )
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or "[" in parts.netloc:
        raise ArgumentError(f"The address names no server, or one by IPv6, which is not read: {_FORM}.")
    if parts.query or parts.fragment:
        raise ArgumentError(f"The address on {host} contains a ? or #, which would not be sent: {_FORM}.")
    found = _RESOURCE.fullmatch(parts.path)
    if found is None or not is_uid(found["study"]) or not is_uid(found["series"] or "0"):
        raise ArgumentError(f"The address on {host} names no study or series by UID: {_FORM}.")
    return Address(f"{parts.scheme.lower()}://{parts.netloc}{found['base']}", found["study"], found["series"])


def token() -> str:
    """Returns the token to send; empty if there is none.

    Raises:
        ArgumentError: If it cannot be sent.
    """
    found = os.environ.get(TOKEN, "").strip()
    if found and _BEARER.fullmatch(found) is None:
        raise ArgumentError(f"The variable {TOKEN} holds characters that no token has: set it to the bare token.")
    return found


def credentials(address: Address) -> Callable[[Any], Any] | tuple[str, str] | None:
    """Returns what signs a request of the library requests: a token, or user and password of ~/.netrc.

    Raises:
        ArgumentError: If they would be readable on the way.
    """
    from requests.utils import get_netrc_auth

    bearer = token()
    user: tuple[str, str] | None = None if bearer else get_netrc_auth(address.base)
    if (bearer or user) and not address.is_private:
        place = f"the token of {TOKEN}" if bearer else "the password of ~/.netrc"
        raise ArgumentError(f"Everybody on the way to {address.host} could read {place}: use https.")

    def sign(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {bearer}"
        return request

    return sign if bearer else user
