"""What commands print: tables, and progress bars that leave the lines of others alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from tqdm.auto import tqdm

_DELAY = 2  # seconds


def progress(items: Iterable[Any] | None, what: str, unit: str, total: int | None = None) -> Any:
    """A progress bar for what may take minutes: it comes after two seconds, and goes when it is done.

    Args:
        items: what is gone through; None for a bar that is told of each step by `update`.
        what: is done.
        unit: of what is counted.
        total: how many; None: the length of `items`.
    """
    return tqdm(items, desc=what, unit=unit, total=total, leave=False, delay=_DELAY)


def hide_foreign_bars() -> None:
    """Turns off the bars of transformers ("Loading weights", "Writing model shards"), which break into ours.

    Bars of downloads stay: they may take minutes.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()


def close_bars() -> None:
    """Ends the progress bars that an exception has left open, so that the next line printed begins on its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the header, in columns of equal width; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
