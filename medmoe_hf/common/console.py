"""What commands print: log messages, tables, and progress bars that do not break each other's lines."""

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from tqdm.auto import tqdm

_DELAY = 2  # seconds
_quiet = False


def set_up_logging(verbose: bool = False, quiet: bool = False) -> None:
    """Sends log messages to standard error; only the command line calls this.

    By default those of this package from INFO on are shown, and warnings of others.

    Args:
        verbose: Show DEBUG messages of this package, and INFO of transformers, datasets and huggingface_hub.
        quiet: Show errors only, and no progress bars.
    """
    global _quiet
    _quiet = quiet
    root, own = logging.getLogger(), logging.getLogger("medmoe_hf")
    for handler in [handler for handler in root.handlers if isinstance(handler, _ConsoleHandler)]:
        root.removeHandler(handler)
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter(verbose))
    root.addHandler(handler)
    root.setLevel(logging.ERROR if quiet else logging.WARNING)
    own.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    if verbose or quiet:
        # Read when these libraries are imported, which is later.
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ[name] = "error" if quiet else "info"
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Prints above the progress bars, on the standard error of the moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    """The message; its level where that is not INFO, and its logger where all is shown."""

    def __init__(self, verbose: bool) -> None:
        super().__init__()
        self._verbose = verbose

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{record.name}: {level}{record.message}" if self._verbose else f"{level}{record.message}"


def progress(
    items: Iterable[Any] | None,
    description: str,
    unit: str,
    total: int | None = None,
    *,
    delay: float = _DELAY,
    disable: bool = False,
    **options: Any,
) -> Any:
    """A progress bar for work that may take minutes; it is removed when the work is done. `--quiet` hides it.

    Args:
        items: What is iterated over; None for a bar whose `update` is called for each step.
        description: What is done.
        unit: Name of one item.
        total: Number of items; None: the length of `items`.
        delay: Seconds before the bar appears.
        disable: Show no bar.
        options: Other arguments of tqdm.

    Returns:
        A tqdm bar, which iterates over `items`.
    """
    options = {"leave": False} | options
    return tqdm(items, desc=description, unit=unit, total=total, delay=delay, disable=disable or _quiet, **options)


def hide_foreign_bars() -> None:
    """Hides the bars of transformers ("Loading weights", "Writing model shards"), which break into ours.

    Bars of downloads stay unless `--quiet` hides them: they may take minutes.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()


def close_bars() -> None:
    """Closes the progress bars that an exception has left open, so that the next line begins on its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells, the first one the header, in columns of equal width.

    Args:
        rows: Cells; each row has the same number.

    Returns:
        One line per row; the last column is not padded.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
