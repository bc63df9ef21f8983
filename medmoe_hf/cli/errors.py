"""Which errors commands print as a message, and which as a traceback."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from medmoe_hf.common.console import close_bars, hide_foreign_bars
from medmoe_hf.common.files import full_disk_message, is_disk_full
from medmoe_hf.errors import MedMoEError

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Launchers number the processes that they start."""
    return os.environ.get("RANK", "0") == "0"


def is_fixable(error: Exception) -> bool:
    """Whether a user can fix an error; all others are bugs, whose traceback helps."""
    if isinstance(error, ImportError):
        return isinstance(error, MedMoEError) or not (error.name or "").startswith("medmoe_hf")
    if isinstance(error, MedMoEError | OSError):  # OSError: of files, disks, ports and the Hub
        return True
    from huggingface_hub.errors import HFValidationError, StrictDataclassError  # of a repository id, a configuration

    return isinstance(error, HFValidationError | StrictDataclassError)


@contextmanager
def errors_of(command: str) -> Iterator[None]:
    """Prints errors that a user can fix in one line, without a traceback."""
    hide_foreign_bars()
    try:
        yield
    except Exception as error:
        if not is_fixable(error):
            raise
        close_bars()
        logger.debug("traceback of the error below", exc_info=True)
        raise SystemExit(f"medmoe {command}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """The message; of many files that could not be copied, the first one's, since most are for the same reason."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list) and error.args[0]:
        failed = error.args[0]
        return f"{failed[0][-1]}" + (f" (and {len(failed) - 1} other files)" if len(failed) > 1 else "")
    if is_disk_full(error) and not isinstance(error, MedMoEError):  # those say what was written
        if name := getattr(error, "filename", None):
            return full_disk_message(name)
        return (
            "a file could not be written: the disk, or the quota, is full. Make room for files in "
            f"{os.getcwd()} and for temporary ones in {tempfile.gettempdir()}, and run the command again."
        )
    return str(error)
