"""Records that may be published must not tell where files lie on somebody's machine."""

from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


def without_places(value: Any) -> Any:
    """The same dictionaries, lists and values, in which the last part is all that is left of an absolute path.

    Keys and patterns too, `::` between several included: `/home/me/shards/*.tar` becomes `*.tar`. Relative paths stay.
    """
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, entry in value.items():
            name, number = without_places(key) if isinstance(key, str) else key, 1
            while (name if number == 1 else f"{name} ({number})") in found:
                number += 1  # files of one name in two folders
            found[name if number == 1 else f"{name} ({number})"] = without_places(entry)
        return found
    if isinstance(value, list | tuple):
        return [without_places(entry) for entry in value]
    return "::".join(_last_part(part) for part in value.split("::")) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    if path.startswith(("/", "~")):
        return PurePosixPath(path).name or path
    windows = PureWindowsPath(path)
    return windows.name or path if windows.drive else path
