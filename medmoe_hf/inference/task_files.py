"""Tasks in files: what a user, a checkpoint or a recipe says of classes and their sentences, read by one reader."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from medmoe_hf.common.yaml_files import explain, read_yaml
from medmoe_hf.data.cells import cell_text
from medmoe_hf.errors import ArgumentError
from medmoe_hf.model import Task


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _as_cells(value: Any) -> list[str]:
    return [cell_text(one) for one in _listed(value)]


_Texts = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
_Values = Annotated[list[str], BeforeValidator(_as_cells), Field(min_length=1)]


class TaskFile(BaseModel):
    """A task as a user writes it: a YAML or JSON file, or an entry of a list of them.

    Attributes:
        name: Name by which the task is chosen.
        prompts: Class -> one or more sentences that describe it.
        negative_prompts: Class -> sentences that describe its absence (multi-label only).
        kind: `multi-class` (each image has one class) or `multi-label` (any number of them).
        score: The similarity: `global`, `local` or `mean`.
        modality: Name of the modality of the images.
        title: What the task is, in words.
        labels: Class -> the values of the data's `label` that mean it; by default the class's name. In a multi-label
            task, several labels of an image are separated by `|`, `;` or `,`; an image with none of them has no class.
        where: Field -> values: only rows with one of these values in each of the fields belong to the task.

    Example:
        >>> from medmoe_hf.inference.task_files import TaskFile
        >>> prompts = {"normal": "Clear lungs.", "effusion": ["A pleural effusion.", "Fluid in the chest."]}
        >>> TaskFile(name="chest", prompts=prompts).task().classes
        ['normal', 'effusion']
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    prompts: dict[str, _Texts]
    negative_prompts: dict[str, _Texts] = {}
    kind: Literal["multi-class", "multi-label"] = "multi-class"
    score: Literal["global", "local", "mean"] = "global"
    modality: str | None = None
    title: str = ""
    labels: dict[str, _Values] = {}
    where: dict[str, _Values] = {}

    def task(self) -> Task:
        """Returns the task without what concerns the data.

        Raises:
            ValueError: If its parts do not fit together.
        """
        unknown = [name for name in self.labels if name not in self.prompts]
        if unknown:
            raise ArgumentError(f'Task "{self.name}": `labels` has "{unknown[0]}", which is no class of `prompts`.')
        kept = self.model_dump(exclude={"labels", "where"})
        return Task(**kept)

    def classes_of(self, label: Any) -> list[int] | None:
        """Finds the classes of a label of the data.

        Args:
            label: The label, as a stream returns it.

        Returns:
            Indices of classes; None for an empty label, and in a multi-class task for one of no class.
        """
        text = _folded(label)
        if not text:
            return None
        known = {
            _folded(value): index for index, name in enumerate(self.prompts) for value in self.labels.get(name, [name])
        }
        if self.kind == "multi-class":
            return [known[text]] if text in known else None
        parts = [text] if text in known else [part.strip() for part in re.split(r"[|;,]", text)]
        return sorted({known[part] for part in parts if part in known})


def _folded(value: Any) -> str:
    return " ".join(cell_text(value).split()).casefold()


def read_task_file(path: str | Path) -> list[TaskFile]:
    """Reads tasks: those that a user has written, or those of another checkpoint or of an evaluation.

    Args:
        path: A YAML or JSON file: with the keys of `TaskFile`, or a list of such entries; a `tasks.json` of a
            checkpoint, whose calibrations are left out because they fit its weights only; a recipe of an evaluation,
            of which name, title, modality and prompts are used; or just classes with their sentences, a task with the
            name of the file.

    Returns:
        The tasks.

    Raises:
        ArgumentError: For a missing file, an unknown key, a repeated name, or a task that cannot be used.
    """
    content = read_yaml(path, ArgumentError)
    entries = content if isinstance(content, list) else _entries(content, Path(path).stem)
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise ArgumentError(
                f"{path} must hold a task, `name: ...` and `prompts: ...`, a list of tasks, or classes with their "
                "sentences: `pneumonia: [There is pneumonia.]`."
            )
        try:
            found.append(TaskFile.model_validate(entry))
            found[-1].task()
        except ValidationError as error:
            sections = {"": list(TaskFile.model_fields)}
            raise ArgumentError(f"{path} cannot be used:\n{explain(error, sections)}") from error
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error
    repeated = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if repeated or not found:
        raise ArgumentError(f"{path} has {'the task ' + repeated[0] + ' twice' if repeated else 'no task'}.")
    return found


def _entries(content: Any, name: str) -> list[Any]:
    """The entries of a file that is no list."""
    if not isinstance(content, dict):
        return [content]
    if isinstance(content.get("tasks"), dict) and "schema" in content:
        kept = set(TaskFile.model_fields)
        return [
            {"name": key, **{field: value for field, value in entry.items() if field in kept}}
            if isinstance(entry, dict)
            else entry
            for key, entry in content["tasks"].items()
        ]
    if {"layout", "classes"} & set(content) and "prompts" in content:
        fields = ("name", "title", "modality", "prompts", "negative_prompts")
        kind = "multi-label" if content.get("labels") == "multi" or content.get("negative_prompts") else "multi-class"
        return [{"name": name, **{field: content[field] for field in fields if content.get(field)}, "kind": kind}]
    # Classes have sentences; a mapping is a misspelt key, such as `promts`.
    if not set(content) & set(TaskFile.model_fields) and not any(isinstance(one, dict) for one in content.values()):
        return [{"name": name, "prompts": content}]
    if "prompts" in content:
        # A file for one task may leave out what follows from the rest.
        implied = {"kind": "multi-label"} if content.get("negative_prompts") else {}
        return [{"name": name, **implied, **content}]
    return [content]
