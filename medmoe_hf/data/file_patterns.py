"""Patterns of paths: `*`, `?`, `{000..012}`, `{a,b}`, `::`, `$NAME` and `~`."""

import os
import re
from glob import escape, glob, has_magic
from itertools import product
from math import prod

from medmoe_hf.errors import ArgumentError, PathNotFoundError


def expand(pattern: str) -> list[str]:
    """Returns the paths that match a pattern.

    Args:
        pattern: A path, in which `::` separates several patterns, `{000..012}` is a range of numbers, `{a,b}` are
            alternatives, `*` and `?` match as in a shell, `$NAME` is an environment variable and `~` the home folder.
            Brackets and braces in the names of files and folders that exist are taken literally.

    Raises:
        FileNotFoundError: If no file matches a pattern with `*` or `?`. Other paths are not checked.
        ValueError: For nested or unbalanced braces, or more than a million paths.
    """
    paths: list[str] = []
    for part in expand_environment(pattern).split("::"):
        if os.path.lexists(part):
            paths.append(part)
            continue
        choices = [_choices(piece) for piece in re.split(r"(\{[^{}]*\})", part)]
        count = prod(len(some) for some in choices) + len(paths)
        if count > _MAX_PATHS:
            raise ArgumentError(f'"{_shortened(pattern)}" matches {count} files; at most {_MAX_PATHS} are allowed.')
        for chosen in product(*choices):
            path = "".join(chosen)
            if not has_magic(path) or os.path.lexists(path):
                paths.append(path)
                continue
            found = sorted(glob(_escape_existing(path)) or glob(path.replace("[", "[[]")))
            if not found:
                raise PathNotFoundError(f'No file matches "{path}" (`files` of a source){looked_in(path)}.')
            paths += found
    return paths


_MAX_PATHS = 1_000_000


def looked_in(path: str | os.PathLike[str]) -> str:
    """Says where a relative path was looked for, to be added to a message; empty for an absolute one or an address."""
    return (
        ""
        if os.path.isabs(path) or "://" in str(path)
        else f": it is relative to the working directory, {os.getcwd()}"
    )


def expand_environment(path: str) -> str:
    """Replaces `$NAME` and `~` by their values."""
    return os.path.expanduser(os.path.expandvars(path))


def _escape_existing(pattern: str) -> str:
    """Escapes the names of folders that exist literally."""
    parts = pattern.split("/")
    escaped = list(parts)
    for index, part in enumerate(parts):
        if has_magic(part):
            if not os.path.isdir("/".join(parts[: index + 1])):
                break
            escaped[index] = escape(part)
    return "/".join(escaped)


def _choices(piece: str) -> list[str]:
    """Returns the alternatives of a piece of a pattern."""
    if not (piece.startswith("{") and piece.endswith("}")):
        if "{" in piece or "}" in piece:
            raise ArgumentError(f'"{_shortened(piece)}": nested or unbalanced braces; write the names out.')
        return [piece]
    inside = piece[1:-1]
    counted = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if counted is None:
        return inside.split(",")
    first, last = counted.groups()
    if int(first) > int(last):
        raise ArgumentError(f'"{piece}" is a descending range; write {{{last}..{first}}}.')
    numbers = range(int(first), int(last) + 1)
    if len(numbers) > _MAX_PATHS:
        raise ArgumentError(f'"{piece}" matches {len(numbers)} files; at most {_MAX_PATHS} are allowed.')
    return [str(number).zfill(len(first)) for number in numbers]


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
