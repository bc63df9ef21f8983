"""Files and folders that are written atomically, and records without the paths of a machine."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medmoe_hf.errors import PathExistsError


@contextmanager
def atomic_write(target: str | Path) -> Iterator[Path]:
    """Gives a path beside `target` to write to, which takes its name when the block ends well.

    What is there already stays until then, and is replaced. An interruption leaves at most `.NAME.partial`.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Gives a new folder beside `target` to write into, which takes its name when the block ends well.

    Args:
        target: the folder's final place; its parents are made.
        force: whether a folder that is there already is replaced. It is moved aside until the new one is in place.

    Raises:
        FileExistsError: if `target` exists and `force` is False, before anything is written.
    """
    target = Path(target)
    if target.exists() and not force:
        raise PathExistsError(f"{target} exists already; choose another folder or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        if not target.exists():
            os.rename(partial, target)
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        os.rename(target, old / target.name)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(old / target.name, target)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    # mkdtemp makes folders for their owner only; there is no way to read the mask without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def redact_paths(value: Any) -> Any:
    """The same dictionaries, lists and values, in which the last part is all that is left of an absolute path.

    Keys and patterns too, `::` between several included: `/home/me/shards/*.tar` becomes `*.tar`. Relative paths stay.
    """
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, entry in value.items():
            name, number = redact_paths(key) if isinstance(key, str) else key, 1
            while (name if number == 1 else f"{name} ({number})") in found:
                number += 1  # files of one name in two folders
            found[name if number == 1 else f"{name} ({number})"] = redact_paths(entry)
        return found
    if isinstance(value, list | tuple):
        return [redact_paths(entry) for entry in value]
    return "::".join(_last_part(part) for part in value.split("::")) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    if path.startswith(("/", "~")):
        return PurePosixPath(path).name or path
    windows = PureWindowsPath(path)
    return windows.name or path if windows.drive else path
