"""Atomic writing of files and folders, and removal of directory names from records."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from medmoe_hf.errors import ArgumentError, DiskFullError, PathExistsError


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error says that a disk or a quota is full; libraries such as safetensors say so in words only."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left", "Disk quota exceeded"))


@contextmanager
def explain_full_disk(target: str | Path) -> Iterator[None]:
    """Turns the error of a full disk, which names no file, into one that names what is written in the block.

    Args:
        target: The file or folder that is written.

    Raises:
        DiskFullError: If the block ends because the disk is full.

    Example:
        ```python
        with explain_full_disk("results.csv"):
            Path("results.csv").write_text("a,b")
        ```
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(full_disk_message(target)) from error


def full_disk_message(target: str | Path) -> str:
    """Says that a file or folder could not be written, how much is free there, and what to do."""
    place = next(folder for folder in Path(target).absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free / 1e6
    return (
        f"{target} could not be written: the disk, or the quota, is full ({free:.0f} MB are free in {place}). "
        "Make room there or choose a place on another disk, and run the command again."
    )


@contextmanager
def atomic_write(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `target` when the block ends without an exception.

    An existing file is kept until then and replaced. A crash leaves at most `.NAME.partial`.

    Args:
        target: The file's final path.

    Raises:
        DiskFullError: If the block ends because the disk is full.

    Example:
        ```python
        with atomic_write("results.json") as path:
            path.write_text("{}")
        ```
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with explain_full_disk(target):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Yields a new folder to write into, and renames it to `target` when the block ends without an exception.

    Args:
        target: The folder's final path; its parents are created.
        force: Replace an existing folder. It is moved aside until the new one is in place.

    Raises:
        PathExistsError: If `target` exists and `force` is False, before anything is written; or if another process
            has created it meanwhile: the new folder then gets the name that the message says, beside it.
        DiskFullError: If the block ends because the disk is full.

    Example:
        ```python
        with atomic_dir("model") as folder:
            model.save_pretrained(folder)
        ```
    """
    target = Path(target)
    if target.exists() and not force:
        raise PathExistsError(f"{target} exists already; choose another folder or remove it.")
    with explain_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with explain_full_disk(target):
            yield partial
        partial.chmod(0o777 & ~_umask())
        if not target.exists():
            os.rename(partial, target)
            return
        if not force:
            beside = _free_name(target)
            os.rename(partial, beside)
            raise PathExistsError(
                f"{target} was created by something else meanwhile; what belongs there is in {beside}."
            )
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


def _free_name(target: Path) -> Path:
    return next(
        path for number in count(2) if not os.path.lexists(path := target.with_name(f"{target.name}-{number}"))
    )


def check_output(out: str | Path, force: bool, made: str, inputs: Iterable[str | Path] = ()) -> None:
    """Checks before minutes of work that a folder may be created, or replaced without loss of anything else.

    What is in a replaced folder is gone, so one that was not made by the same command, or that holds what the command
    reads, is never replaced.

    Args:
        out: Folder to create.
        force: Whether an existing one is replaced.
        made: Name of a file that all folders have that the command has made.
        inputs: Files and folders that the command reads.

    Raises:
        ArgumentError: If `out` cannot be created.
        PathExistsError: If `out` exists and `force` is False, or if it must not be replaced.

    Example:
        ```python
        check_output("prediction", force=True, made="prediction.json", inputs=["exports/study"])
        ```
    """
    out = Path(out)
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ArgumentError(f"{out} cannot be created: {above} is no folder that you may write to.")
    if not os.path.lexists(out):
        return
    if not force:
        raise PathExistsError(f"{out} exists already; choose another folder, or replace it with --force.")
    refused = f"{out} is not replaced, since all that is in it would be lost: it"
    if not out.is_dir():
        raise PathExistsError(f"{out} is a file: choose another name for the folder to create.")
    place = out.resolve()
    if Path.cwd().is_relative_to(place):
        raise PathExistsError(f"{refused} holds the working directory. Choose another folder.")
    for path in inputs:
        if Path(path).exists() and Path(path).resolve().is_relative_to(place):
            raise PathExistsError(f"{refused} holds {path}, which is read. Choose another folder.")
    if not (out / made).is_file() and any(out.iterdir()):
        raise PathExistsError(f"{refused} has no {made}, so it was not made by this command. Choose another folder.")


def _umask() -> int:
    # mkdtemp creates folders for their owner only; the mask cannot be read without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def redact_paths(value: Any) -> Any:
    """Shortens absolute paths to their last part, so that records do not reveal directories of a machine.

    Keys, glob patterns and paths joined by `::` are shortened too. Relative paths stay.

    Args:
        value: Nested dictionaries, lists and values.

    Returns:
        A copy with shortened paths; keys that become equal are numbered.

    Example:
        >>> redact_paths({"files": ["/home/me/shards/*.tar"]})
        {'files': ['*.tar']}
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
