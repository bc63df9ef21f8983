"""YAML files that people write: read within bounds, with clear words for what is wrong with them."""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

_MOST_BYTES = 4 * 2**20
_MOST_VALUES = 200_000  # with every alias counted as what it stands for
_DEEPEST = 50
_LONGEST_NUMBER = 100

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path, error: type[ValueError]) -> Any:
    """What a YAML file holds.

    Args:
        path: of the file.
        error: what is raised.

    Raises:
        error: for a missing file, broken YAML, a key that comes twice in one place, or a file that is too large, too
            deep or grows too large by its aliases; names the file, and the line where there is one.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as problem:
        raise error(f"Cannot read {path}: {problem.strerror}.") from problem
    if len(content) > _MOST_BYTES:
        raise error(f"{path} has more than {_MOST_BYTES // 2**20} MiB, which is too much for a configuration.")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is no UTF-8 text: {problem}") from problem
    try:
        _check_bounds(text)
        node = yaml.compose(text, Loader=_Loader)
        _check_keys(node)
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, _OutOfBounds) as problem:
        raise error(f"{path} is no valid YAML: {problem}") from problem
    # Dates and numbers that look like some and are none.
    except (ValueError, ArithmeticError, AttributeError, RecursionError) as problem:
        raise error(f"{path} has a value that YAML cannot read: {problem}") from problem


class _OutOfBounds(Exception):
    """A file that could take for ever, or all memory."""


def _check_bounds(text: str) -> None:
    """Goes through a file without building anything of it."""
    sizes: dict[str, int] = {}
    # (anchor, values before it) of what is open
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _OutOfBounds(f"{line}`*{event.anchor}` stands for nothing, or within itself")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if len(event.value) > _LONGEST_NUMBER and _is_number(event):
                raise _OutOfBounds(
                    f"{line}a number of {len(event.value)} digits; at most {_LONGEST_NUMBER} are allowed"
                )
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
            if event.anchor is not None:
                # What stands within itself has no size yet.
                sizes.pop(event.anchor, None)
            if len(opened) > _DEEPEST:
                raise _OutOfBounds(f"{line}more than {_DEEPEST} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > _MOST_VALUES:
            raise _OutOfBounds(f"{line}more than {_MOST_VALUES} values, aliases counted as what they stand for")


def _is_number(event: yaml.ScalarEvent) -> bool:
    # YAML 1.1 reads 1:30 as 90, at a cost that grows with the square of the length.
    return bool(event.tag) or (
        event.style in (None, "") and re.fullmatch(r"[-+0-9a-fA-FxXob_.:]+", event.value) is not None
    )


def _check_keys(root: yaml.Node | None) -> None:
    """YAML readers take the last of two equal keys, and say nothing."""
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
                        raise _OutOfBounds(f"line {key.start_mark.line + 1}: `{key.value}` stands here a second time")
                    keys.add(key.value)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant; None if there is none, and never the word itself."""
    plain = {_plain(name): name for name in known if name != word}
    near = get_close_matches(_plain(word), list(plain), n=1)
    return plain[near[0]] if near else None


def _plain(word: str) -> str:
    return re.sub(r"[\s-]", "_", word.strip().lower())


def in_words(error: ValidationError, sections: Mapping[str, Sequence[str]]) -> str:
    """What pydantic found in a file, a line for each problem: which key, what is wrong, and what was meant.

    Args:
        error: pydantic's.
        sections: the keys of each section of the file, by its name; "" is the top level. A kind of source is a section
            too.
    """
    problems = error.errors(include_url=False, include_context=True)
    lines = [_line(problem, sections) for problem in problems if not _of_another_form(problem, problems)]
    return "\n".join(f"  {line}" for line in dict.fromkeys(lines))


def _of_another_form(problem: Any, problems: Sequence[Any]) -> bool:
    """Whether a value that may have several forms was tried as one that it plainly has not."""
    if problem["type"] not in ("list_type", "tuple_type", "dict_type", "model_attributes_type", "string_type"):
        return False
    above = _keys(problem["loc"])
    return any(
        other["type"] != problem["type"] and other is not problem and _keys(other["loc"])[: len(above)] == above
        for other in problems
    )


def _keys(place: Iterable[Any]) -> list[str]:
    # Which of several forms a value was tried as stands in pydantic's path; it is no key.
    return [str(part) for part in place if not (isinstance(part, str) and ("[" in part or part == "str"))]


def _line(problem: Any, sections: Mapping[str, Sequence[str]]) -> str:
    keys = _keys(problem["loc"])
    # Which kind of source a section is stands there too.
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
    # A section with all that is in it would bury the words.
    got = f" (got {_shown(given)})" if isinstance(given, (str, int, float)) or given is None else ""
    return f"{path}: {text}{got}" if path else f"{text}{got}"


def _wrong_kind(path: str, context: Mapping[str, str]) -> str:
    key = context["discriminator"].strip("'")
    place = f"{path}.{key}" if path else key
    if "tag" not in context:
        return f"{place}: missing; it is needed."
    known = context["expected_tags"]
    near = nearest(context["tag"], re.findall(r"'(.*?)'", known))
    return f"{place}: must be one of {known} (got {_shown(context['tag'])})." + (
        f" Did you mean `{near}`?" if near else ""
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(key: str, section: str, sections: Mapping[str, Sequence[str]]) -> str:
    holders = [name for name, keys in sections.items() if name != section and key in keys]
    if holders:
        return f" It belongs {_place(holders, sections)}."
    near = nearest(key, sections.get(section, ()))
    if near:
        return f" Did you mean `{near}`?"
    near = nearest(key, [name for keys in sections.values() for name in keys])
    if near:
        return (
            f" Did you mean `{near}`, {_place([name for name, keys in sections.items() if near in keys], sections)}?"
        )
    return ""


def _place(holders: Sequence[str], sections: Mapping[str, Sequence[str]]) -> str:
    kinds = [f"`{name}`" for name in holders if "kind" in sections[name]]
    places = [
        "at the top level" if not name else f"under `{name}`" for name in holders if "kind" not in sections[name]
    ]
    if kinds:
        places.append("beside a `kind`" if len(kinds) > 3 else f"where `kind` is {' or '.join(kinds)}")
    return " or ".join(places)
