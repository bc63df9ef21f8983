"""YAML files written by hand: read within limits, with error messages that say how to fix them."""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from medmoe_hf.errors import MedMoEError

_MAX_BYTES = 4 * 2**20
_MAX_VALUES = 200_000  # each alias counts as all that it refers to
_MAX_DEPTH = 50
_MAX_DIGITS = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path, error: type[MedMoEError]) -> Any:
    """Reads a YAML file.

    Args:
        path: The file.
        error: Class of the exception that is raised.

    Returns:
        What the file holds: a dictionary, list, string, number, truth value, date or None.

    Raises:
        error: For a missing file, broken YAML, a repeated key, or a file that is too large, too deep or becomes too
            large by its aliases; names the file, and the line if there is one.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"Cannot read {path}: {problem.strerror}.") from problem
    if len(content) > _MAX_BYTES:
        raise error(f"{path} has more than {_MAX_BYTES // 2**20} MiB, which is too much for a configuration.")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is no UTF-8 text: {problem}") from problem
    return _parse(text, str(path), error)


def set_values(content: Any, assignments: Sequence[str], error: type[MedMoEError]) -> Any:
    """Sets values of a configuration by `key=value`, as `medmoe train --set` does.

    Args:
        content: What `read_yaml` returned; it is not changed.
        assignments: `dotted.key=value`. The value is YAML; parts of the key that are missing are added, and numbers
            select entries of a list, counted from 0.
        error: Class of the exception that is raised.

    Returns:
        The configuration with the new values.

    Raises:
        error: For text without `=`, a value that is not YAML, or a key below something that has no keys.

    Example:
        >>> set_values({"model": {"preset": "tiny"}}, ["model.preset=paper", "max_steps=10"], ConfigError)
        {'model': {'preset': 'paper'}, 'max_steps': 10}
    """
    result = deepcopy(content)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        *parents, last = key.strip().split(".")
        if not separator or not all([*parents, last]):
            raise error(f"--set {assignment}: expected KEY=VALUE, such as max_steps=100 or model.preset=tiny.")
        value = _parse(text, f"--set {key}", error)
        section = result
        for depth, part in enumerate([*parents, last]):
            position = _position(section, part)
            if position is None:
                above = ".".join(parents[:depth])
                raise error(f"--set {key}: {f'`{above}`' if above else 'the file'} has no `{part}` to be set.")
            if depth == len(parents):
                section[position] = value
            elif isinstance(section, dict) and section.get(position) is None:
                section[position] = {}
            section = section[position]
    return result


def _position(section: Any, part: str) -> str | int | None:
    """Where a part of a dotted key belongs in a section; None if it has no such position."""
    if isinstance(section, dict):
        return part
    return int(part) if isinstance(section, list) and part.isdecimal() and int(part) < len(section) else None


def _parse(text: str, name: str, error: type[MedMoEError]) -> Any:
    try:
        _check_limits(text)
        _check_keys(yaml.compose(text, Loader=_Loader))
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, _LimitError) as problem:
        raise error(f"{name} is no valid YAML: {problem}") from problem
    # Values that look like dates or numbers and are none; PyYAML raises many types for them.
    except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as problem:
        raise error(f"{name} has a value that YAML cannot read: {problem}") from problem


class _LimitError(Exception):
    """A file whose reading could take hours, or all memory."""


def _check_limits(text: str) -> None:
    """Counts the values of a text without building them."""
    sizes: dict[str, int] = {}
    # (anchor, number of values before it) of open collections
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _LimitError(f"{line}`*{event.anchor}` stands for nothing, or within itself")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if len(event.value) > _MAX_DIGITS and _is_number(event):
                raise _LimitError(f"{line}a number of {len(event.value)} digits; at most {_MAX_DIGITS} are allowed")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
            if event.anchor is not None:
                # A collection that contains itself has no size yet.
                sizes.pop(event.anchor, None)
            if len(opened) > _MAX_DEPTH:
                raise _LimitError(f"{line}more than {_MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > _MAX_VALUES:
            raise _LimitError(f"{line}more than {_MAX_VALUES} values, aliases counted as what they stand for")


def _is_number(event: yaml.ScalarEvent) -> bool:
    # YAML 1.1 reads 1:30 as 90, at a cost that grows with the square of the length.
    return bool(event.tag) or (
        event.style in (None, "") and re.fullmatch(r"[-+0-9a-fA-FxXob_.:]+", event.value) is not None
    )


def _check_keys(root: yaml.Node | None) -> None:
    """Refuses repeated keys, of which YAML readers silently take the last."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                waiting.append(value)
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in keys:
                        raise _LimitError(f"line {key.start_mark.line + 1}: `{key.value}` stands here a second time")
                    keys.add(key.value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Finds the known word that was probably meant.

    Args:
        word: What was written.
        known: The words that are allowed.

    Returns:
        The most similar known word other than `word`; None if none is similar.
    """
    plain = {_plain(name): name for name in known if name != word}
    near = get_close_matches(_plain(word), list(plain), n=1)
    return plain[near[0]] if near else None


def _plain(word: str) -> str:
    return re.sub(r"[\s-]", "_", word.strip().lower())


def explain(error: ValidationError, sections: Mapping[str, Sequence[str]]) -> str:
    """Formats the errors that pydantic found in a file: which key, what is wrong, and what was probably meant.

    Args:
        error: Pydantic's exception.
        sections: The keys of each section of the file, by the section's name; "" is the top level. A kind of source
            is a section too.

    Returns:
        One line per error.
    """
    problems = error.errors(include_url=False, include_context=True)
    lines = [_line(problem, sections) for problem in problems if not _is_other_type(problem, problems)]
    return "\n".join(f"  {line}" for line in dict.fromkeys(lines))


def _is_other_type(problem: Any, problems: Sequence[Any]) -> bool:
    """Whether pydantic tried a value, which may have several types, as one that it plainly does not have."""
    if problem["type"] not in ("list_type", "tuple_type", "dict_type", "model_attributes_type", "string_type"):
        return False
    above = _keys(problem["loc"])
    return any(
        other["type"] != problem["type"] and other is not problem and _keys(other["loc"])[: len(above)] == above
        for other in problems
    )


def _keys(path: Iterable[Any]) -> list[str]:
    # Pydantic's path also names which of several types was tried; that is no key.
    return [str(part) for part in path if not (isinstance(part, str) and ("[" in part or part == "str"))]


def _line(problem: Any, sections: Mapping[str, Sequence[str]]) -> str:
    keys = _keys(problem["loc"])
    if problem["type"] == "extra_forbidden":
        # An unknown key may look like the name of a type, which is none of the keys.
        keys = [*_keys(problem["loc"][:-1]), str(problem["loc"][-1])]
    # The path also names the kind of source of a section.
    kinds = [key for key in keys if "kind" in sections.get(key, ())]
    path = ".".join(key for key in keys if key not in kinds)
    if problem["type"] == "extra_forbidden":
        section = kinds[-1] if kinds else next((key for key in keys[-2::-1] if key in sections), "")
        return f"{path}: unknown key.{_suggestion(keys[-1], section, sections)}"
    if problem["type"] == "missing":
        return f"{path}: missing; it is needed."
    if problem["type"].startswith("union_tag"):
        return _wrong_kind(path, problem["ctx"])
    text, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    # The content of a section would hide the message.
    got = f" (got {_shortened(given)})" if isinstance(given, (str, int, float)) or given is None else ""
    return f"{path}: {text}{got}" if path else f"{text}{got}"


def _wrong_kind(path: str, context: Mapping[str, str]) -> str:
    key = context["discriminator"].strip("'")
    full = f"{path}.{key}" if path else key
    if "tag" not in context:
        return f"{full}: missing; it is needed."
    known = context["expected_tags"]
    near = nearest(context["tag"], re.findall(r"'(.*?)'", known))
    return f"{full}: must be one of {known} (got {_shortened(context['tag'])})." + (
        f" Did you mean `{near}`?" if near else ""
    )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(key: str, section: str, sections: Mapping[str, Sequence[str]]) -> str:
    holders = [name for name, keys in sections.items() if name != section and key in keys]
    if holders:
        return f" It belongs {_location(holders, sections)}."
    near = nearest(key, sections.get(section, ()))
    if near:
        return f" Did you mean `{near}`?"
    near = nearest(key, [name for keys in sections.values() for name in keys])
    if near:
        holders = [name for name, keys in sections.items() if near in keys]
        return f" Did you mean `{near}`, {_location(holders, sections)}?"
    return ""


def _location(holders: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    kinds = [f"`{name}`" for name in holders if "kind" in sections[name]]
    locations = [
        "at the top level" if not name else f"under `{name}`" for name in holders if "kind" not in sections[name]
    ]
    if kinds:
        locations.append("beside a `kind`" if len(kinds) > 3 else f"where `kind` is {' or '.join(kinds)}")
    return " or ".join(locations)
