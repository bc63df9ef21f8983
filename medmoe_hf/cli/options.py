"""Options that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from medmoe_hf.common.packaged import PACKAGED
from medmoe_hf.errors import ArgumentError

DEFAULT_MODEL = PACKAGED[0]
"""What commands use when no model is named."""

Out = Annotated[Path, typer.Argument(help="Folder to create.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


def window_of(text: str | None) -> str | tuple[float, float] | list[str] | None:
    """Parses a window for CT and NIfTI: a name, `CENTRE,WIDTH`, or three names separated by commas."""
    parts = [part.strip() for part in (text or "").split(",")]
    if text is None or len(parts) == 1:
        return text
    if len(parts) == 2:
        try:
            return float(parts[0]), float(parts[1])
        except ValueError:
            raise ArgumentError(f"--window {text}: expected a name, CENTRE,WIDTH, or three names.") from None
    return parts


def shares(assignments: Sequence[str], option: str) -> dict[str, float]:
    """Reads `CLASS=SHARE` options; a class may contain `=`.

    Raises:
        ArgumentError: For anything else.
    """
    found = {}
    for text in assignments:
        name, _, value = text.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            name = ""
        if not name.strip():
            raise ArgumentError(f'{option} "{text}": expected CLASS=SHARE, such as pneumonia=0.95.')
    return found
