"""The tasks and the rejector of a model card: what a checkpoint can be asked, and what it refuses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmoe_hf.errors import ArgumentError, CardError
from medmoe_hf.model import Rejector, Task
from medmoe_hf.model.rejection_medmoe import REJECTOR_FILE
from medmoe_hf.model.tasks_medmoe import TASKS_FILE, read_tasks

TASK_HEADER = ("task", "classes", "score", "fitted on", "measured, with 95 % intervals")

# In the order of the card; sensitivities and coverages of classes are in the file.
_SHOWN = {
    "ece_before": "calibration error before",
    "ece": "after",
    "balanced_accuracy": "balanced accuracy",
    "coverage": "coverage of sets",
    "set_size": "classes in a set",
}


def task_rows(folder: Path) -> list[list[Any]]:
    """Returns the rows of a table with `TASK_HEADER`; none without a `tasks.json`.

    Args:
        folder: Folder of the model.

    Raises:
        CardError: If its `tasks.json` cannot be read.
    """
    path = folder / TASKS_FILE
    if not path.is_file():
        return []
    try:
        tasks = read_tasks(path)
    except ArgumentError as error:
        raise CardError(str(error)) from error
    return [[_name(task), task.classes, task.score, _fitted_on(task), _measured(task)] for task in tasks.values()]


def rejector_rows(folder: Path) -> list[list[Any]]:
    """Returns the rows of a table of two columns, what and value; none without a `rejector.safetensors`.

    Args:
        folder: Folder of the model.

    Raises:
        CardError: If the file cannot be read.
    """
    path = folder / REJECTOR_FILE
    if not path.is_file():
        return []
    try:
        facts = Rejector.load(path).facts
    except ArgumentError as error:
        raise CardError(str(error)) from error
    limits = facts.get("limits_from", {})
    rows = [["fitted on", _images(facts.get("fitted_on", {}))], ["limits from", _images(limits)]]
    if "accept" in facts:
        rows.append(["share of new images like these that is accepted, as fitted", f"{facts['accept']:.0%}"])
    return rows + [[name, _value(numbers)] for name, numbers in facts.get("measured", {}).items()]


def _images(facts: Mapping[str, Any]) -> str:
    subjects = "" if facts.get("subjects") is None else f" of {facts['subjects']} subjects"
    return ", ".join(
        [f"{facts.get('images')} images{subjects}", *(str(facts[k]) for k in ("data", "split") if k in facts)]
    )


def _name(task: Task) -> str:
    return f"{task.name}: {task.title}" if task.title else task.name


def _fitted_on(task: Task) -> str:
    if task.calibration is None:
        return "not calibrated"
    facts = task.calibration.fitted_on
    subjects = "" if facts.get("subjects") is None else f" of {facts['subjects']} subjects"
    words = [f"{facts.get('cases')} images{subjects}", *(str(facts[key]) for key in ("data", "split") if key in facts)]
    return ", ".join(words)


def _measured(task: Task) -> str:
    found = {} if task.calibration is None else task.calibration.measured
    return "; ".join(f"{words} {_value(found[name])}" for name, words in _SHOWN.items() if name in found)


def _value(numbers: Sequence[float]) -> str:
    value, *ends = numbers
    return f"{value:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends and None not in ends else "")
