"""Files and folders that appear whole, by rename, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
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
def whole_folder(target: str | Path, force: bool = False) -> Iterator[Path]:
    """Gives a new folder beside `target` to write into, which takes its name when the block ends well.

    Args:
        target: the folder's final place; its parents are made.
        force: whether a folder that is there already is replaced. It is moved aside until the new one is in place.

    Raises:
        FileExistsError: if `target` exists and `force` is False, before anything is written.
    """
    target = Path(target)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already; choose another folder or remove it.")
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
