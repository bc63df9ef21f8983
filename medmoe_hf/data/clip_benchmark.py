"""The webdataset layout of CLIP_benchmark: a folder with tars per split, class names and templates.

classnames.txt                            a name per line, in the order of the numbers in `.cls`
zeroshot_classification_templates.txt     a sentence per line, with {c} in place of the name
test/nshards.txt, test/0.tar, ...         an image and .cls per sample
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from medmoe_hf.data.shards import TarShard
from medmoe_hf.errors import PathNotFoundError, ShardError, SourceError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
SHARD_COUNT = "nshards.txt"
_TYPE = "dataset_type.txt"


class ClipBenchmarkShard(TarShard):
    """A tar of this layout: `label` is the name of the class, `caption` the first template filled with it.

    `cls`, which is the modality in other tars, is not among the fields.

    Args:
        path: Path of the tar.
        classes: Names, in the order of `cls`.
        template: With `{c}` in place of the name.
    """

    def __init__(self, path: str, classes: Sequence[str], template: str) -> None:
        super().__init__(path)
        self.classes, self.template = list(classes), template

    def read(self, location: Any) -> dict[str, Any]:
        return self._named(super().read(location))

    def peek(self, rows: Sequence[int], names: Collection[str]) -> list[dict[str, Any]]:
        wanted = {*names, "cls"} if {"label", "caption"} & set(names) else set(names) - {"cls"}
        found = []
        for sample in super().peek(rows, wanted):
            try:
                sample = self._named(sample) if "cls" in wanted else sample
            except ShardError:
                sample.pop("cls", None)  # counted as a fault when it is read
            found.append({name: value for name, value in sample.items() if name in names})
        return found

    def fields(self) -> list[str]:
        return [*(name for name in super().fields() if name != "cls"), "label", "caption"]

    def _named(self, sample: dict[str, Any]) -> dict[str, Any]:
        content = sample.pop("cls", None)
        try:
            number = int(content)
        except (TypeError, ValueError):
            raise ShardError("no class", f"{self.name}: a sample has no number of a class in .cls") from None
        if not 0 <= number < len(self.classes):
            raise ShardError(
                "unknown class", f"{self.name}: .cls is {number}, but {CLASS_NAMES} has {len(self.classes)} lines"
            )
        name = self.classes[number]
        return sample | {"label": name, "caption": self.template.format(c=name)}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"classes": self.classes, "template": self.template}


def read_names(folder: Path) -> tuple[list[str], list[str]]:
    """Reads the names of the classes and the templates of a folder.

    Args:
        folder: The folder of the set.

    Returns:
        Names of the classes in the order of `.cls`, and templates with `{c}`.

    Raises:
        PathNotFoundError: There is no such folder, or it lacks one of the two files.
        SourceError: A line is empty, a name occurs twice, a template has no `{c}`, or the set is not of single labels.
    """
    if not folder.is_dir():
        raise PathNotFoundError(f'There is no folder "{folder}".')
    kind = (folder / _TYPE).read_text(encoding="utf-8").strip() if (folder / _TYPE).is_file() else "classification"
    if kind != "classification":
        raise SourceError(
            f"{folder / _TYPE} says {kind}; only sets with one class per image can be read. For pairs of a retrieval "
            "set use `{kind: webdataset, caption: txt}`."
        )
    classes, templates = (_lines(folder / name) for name in (CLASS_NAMES, TEMPLATES))
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise SourceError(f"{folder / CLASS_NAMES} has {twice[0]!r} twice; names must differ.")
    for template in templates:
        check_template(template, str(folder / TEMPLATES))
    return classes, templates


def check_template(template: str, where: str) -> None:
    """Checks a template of this layout.

    Args:
        template: A sentence.
        where: What contains it, for the message.

    Raises:
        SourceError: It has no `{c}`, or other braces.
    """
    try:
        usable = template.format(c="a") != template.format(c="b")
    except (ValueError, LookupError, AttributeError):
        usable = False
    if not usable:
        raise SourceError(f"{where}: {template!r} must contain {{c}} in place of the class, and no other braces.")


def split_shards(folder: Path, split: str, classes: Sequence[str], template: str) -> list[ClipBenchmarkShard]:
    """Returns the tars of a split.

    Args:
        folder: The folder of the set.
        split: Name of the split's folder.
        classes: Names, in the order of `cls`.
        template: With `{c}`, for the field `caption`.

    Raises:
        PathNotFoundError: The split, its count of shards or one of its tars is missing.
        SourceError: The count is not a number.
    """
    counted = folder / split / SHARD_COUNT
    if not counted.is_file():
        there = sorted(path.parent.name for path in folder.glob(f"*/{SHARD_COUNT}"))
        raise PathNotFoundError(f"{counted} is missing; splits with one: {', '.join(there) or 'none'}.")
    text = counted.read_text(encoding="utf-8").strip()
    if not (text.isdecimal() and int(text) > 0):
        raise SourceError(f"{counted} must contain the number of tars, but contains {text[:20]!r}.")
    paths = [folder / split / f"{number}.tar" for number in range(int(text))]
    if missing := [path for path in paths if not path.is_file()]:
        raise PathNotFoundError(f"{missing[0]} is missing; {counted} states {text} tars.")
    return [ClipBenchmarkShard(str(path), classes, template) for path in paths]


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise PathNotFoundError(f"{path} is missing; a set in CLIP_benchmark's layout has one.") from None
    if not lines or "" in lines:
        raise SourceError(f"{path}, line {lines.index('') + 1 if lines else 1}: the line is empty; remove it.")
    return lines
