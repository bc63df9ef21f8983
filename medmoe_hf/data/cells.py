"""Values of cells, compared as text: equal for `7`, `7.0`, `" 7 "` and `b"7"`, however a file stores them."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from medmoe_hf.data.captions import is_empty

_PATTERN = frozenset("*?[")


def cell_text(value: Any) -> str:
    """Returns the value of a cell as text.

    Args:
        value: Text, bytes, number or truth value; None for no value.

    Returns:
        The text without surrounding white space, integers without decimals, `true` or `false`; "" for an empty cell
        (see `is_empty`).

    Example:
        >>> from medmoe_hf.data.cells import cell_text
        >>> [cell_text(value) for value in (7, 7.0, " 7.0 ", b"7", "n/a")]
        ['7', '7', '7', '7', '']
    """
    if is_empty(value):
        return ""
    if isinstance(value, (bytes, bytearray)):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


def cell_texts(value: Any) -> list[str]:
    """Returns the text of a cell, or of each entry of a cell that is a list."""
    return [cell_text(one) for one in value] if isinstance(value, (list, tuple, np.ndarray)) else [cell_text(value)]


def matches(value: Any, wanted: Sequence[str]) -> bool:
    """Returns whether a cell has one of the wanted values.

    Args:
        value: The cell; a list matches if one of its entries does.
        wanted: Values as returned by `cell_text`, or patterns with `*`, `?` and `[...]`, which match cells that are
            not empty. The letter case counts.

    Example:
        >>> from medmoe_hf.data.cells import matches
        >>> [matches(value, ["msd-*", ""]) for value in ("msd-lung", "busi", None)]
        [True, False, True]
    """
    return any(
        text in wanted or (text != "" and any(_PATTERN.intersection(one) and fnmatchcase(text, one) for one in wanted))
        for text in cell_texts(value)
    )


def selects(
    row: Mapping[str, Any], where: Mapping[str, Sequence[str]] | None, where_not: Mapping[str, Sequence[str]] | None
) -> bool:
    """Returns whether a row is used: it matches all fields of `where` and none of `where_not`.

    Args:
        row: Fields of the row; absent ones count as empty.
        where: Wanted values of each field; None for no condition.
        where_not: Unwanted values of each field; None for no condition.
    """
    return all(matches(row.get(name), wanted) for name, wanted in (where or {}).items()) and not any(
        matches(row.get(name), wanted) for name, wanted in (where_not or {}).items()
    )
