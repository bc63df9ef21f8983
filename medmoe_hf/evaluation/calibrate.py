"""Calibrates a checkpoint for tasks on labelled images, and writes its folder anew.

The layer below, `medmoe_hf.evaluation.calibration`, fits; this one reads images, guards the test data, and writes.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import medmoe_hf.model.tasks_medmoe as model_tasks
from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_dir, check_output, redact_paths
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.common.packaged import copy_model_code
from medmoe_hf.data.cells import cell_text, matches
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, SourceError
from medmoe_hf.evaluation.calibration import check_shares, fit_calibration
from medmoe_hf.inference.batching import BATCH_SIZE, default_device
from medmoe_hf.inference.task_files import TaskFile
from medmoe_hf.model import MedMoEModel, MedMoEProcessor, Task

logger = logging.getLogger(__name__)

_NEVER_FITTED = frozenset({"test", "testing", "external"})
"""Words in the name of a split, or of a file, whose images are for measuring only."""
_TOO_SURE = "The model is too sure of images that it was trained on: fit on others than `train`."


@dataclass
class CalibrationReport:
    """What `calibrate` did.

    Attributes:
        tasks: The calibrated tasks.
        folder: The folder that was written.
        left_out: Task -> number of images of its sources without a class of the task.
    """

    tasks: list[Task]
    folder: str
    left_out: dict[str, int]

    def __str__(self) -> str:
        return "\n".join([*(_shown(task, self.left_out[task.name]) for task in self.tasks), f"Wrote {self.folder}."])


def _shown(task: Task, left_out: int) -> str:
    found = task.calibration
    assert found is not None
    data = found.fitted_on
    subjects = "of unknown subjects" if data["subjects"] is None else f"of {data['subjects']} subjects"
    lines = [
        f"{task.name}: fitted on {data['cases']} images {subjects} ({data['data']}, split {data['split']})"
        + (f"; {left_out} others have none of its classes." if left_out else "."),
        f"  temperature {found.temperature:.3g}; sets {found.coverage:.0%}, "
        + ("a quantile for each class" if found.conformal == "class-conditional" else "one quantile for all classes"),
        "  on subjects that were left out of the fit, with 95 % intervals:",
    ]
    for name, (value, *ends) in found.measured.items():
        interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else " (no interval)"
        lines.append(f"    {name:<32} {value:.3f}{interval}")
    worse = _worse(found.measured)
    if worse:
        lines.append(
            f"  Worse than before the calibration on these subjects: {worse}; calibrate on more cases, or keep the "
            "uncalibrated task."
        )
    wide = [(name, ends) for name, (_, *ends) in found.measured.items() if ends and name.startswith("coverage")]
    loose = [name for name, ends in wide if ends[1] - ends[0] > 0.15]
    if loose:
        lines.append(
            f"  Uncertain: {', '.join(loose)} may be off by {max(ends[1] - ends[0] for _, ends in wide) / 2:.0%} or "
            "more; calibrate on more subjects before you rely on it."
        )
    return "\n".join(lines)


def _worse(measured: Mapping[str, Sequence[float]]) -> str:
    """What a calibration makes worse, with both values."""
    pairs = (
        ("expected calibration error", "ece_before", "ece", 1),
        ("balanced accuracy", "balanced_accuracy_before", "balanced_accuracy", -1),
    )
    return " and ".join(
        f"{name} {measured[after][0]:.3f} instead of {measured[before][0]:.3f}"
        for name, before, after, sign in pairs
        if before in measured and after in measured and sign * (measured[after][0] - measured[before][0]) > 0
    )


def calibrate(
    model: str | Path,
    sources: Sequence[Any],
    tasks: Sequence[TaskFile],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    allow_test: bool = False,
    coverage: float = 0.9,
    sensitivity: Mapping[str, float] | None = None,
    prevalence: Mapping[str, float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
    force: bool = False,
) -> CalibrationReport:
    """Fits temperature, thresholds and prediction sets of tasks, and stores them in the folder of the model.

    The folder is copied with a new `tasks.json`, and renamed once it is complete. Other tasks in it are kept.

    Args:
        model: Folder, Hub id, or `small`, the checkpoint of the package.
        sources: Models of `medmoe_hf.data.sources`, with a `label` and, for honest intervals, a `subject`.
        tasks: Tasks of `read_task_file`.
        out: Folder to create; None replaces `model`, which must be a folder of yours.
        split: Only rows with this value of the field `split` are used, whatever the sources say of that field; None
            for the rows that the sources select.
        allow_test: Whether a split or file called test or external may be used. It cannot be measured on afterwards.
        coverage: Share of images whose set holds their class, of 0..1.
        sensitivity: Class -> sensitivity that its threshold is chosen for (for tasks that have the class).
        prevalence: Class -> share where the model will be used (for tasks that have these classes).
        resamples: Number of bootstrap resamples for the intervals.
        seed: Seed of folds and bootstrap.
        batch_size: Images per batch.
        num_workers: Processes that read and decode.
        max_bad_fraction: Share of faulty samples, of 0..1, above which nothing is written.
        force: Whether an existing `out` is replaced.

    Returns:
        What was fitted, and how sure it is.

    Raises:
        ArgumentError: For a split that is for testing, too few subjects or cases, or an argument that does not fit.
        SourceError: For sources without labels or rows.
        FileExistsError: If `out` exists and `force` is False.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.evaluation.calibrate import calibrate
        from medmoe_hf.inference.task_files import read_task_file

        report = calibrate("scratch/model", load_sources("sources.yaml"), read_task_file("chest.yaml"), split="val")
        print(report)
        ```
    """
    folder, target = places(model, out, force)
    for what, named in (("sensitivity", sensitivity), ("prevalence", prevalence)):
        unknown = [name for name in named or {} if not any(name in task.prompts for task in tasks)]
        if unknown:
            raise ArgumentError(f'`{what}`: "{unknown[0]}" is no class of {", ".join(task.name for task in tasks)}.')
    check_shares(coverage, sensitivity or {})
    chosen = [_selected(sources, task.where, split) for task in tasks]
    streams = {}
    for task, own in zip(tasks, chosen, strict=True):
        try:
            streams[task.name] = open_stream(own, f"images of {task.name}", num_workers, max_bad_fraction)
        except SourceError as error:
            raise SourceError(f'Task "{task.name}": {error}') from error
    splits = {name: split_of(stream, allow_test, _TOO_SURE) for name, stream in streams.items()}
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(folder, dtype=torch.float32).eval().to(default_device(None))
        processor: Any = MedMoEProcessor.from_pretrained(folder)
    fitted, left_out = [], {}
    for wanted in tasks:
        task = processor.tokenize_task(wanted.task())
        stream = streams[wanted.name]
        scores, labels, subjects, left_out[task.name] = _score(loaded, processor, wanted, task, stream, batch_size)
        fitted.append(
            fit_calibration(
                task,
                scores,
                labels,
                subjects,
                coverage=coverage,
                sensitivity={name: value for name, value in (sensitivity or {}).items() if name in task.prompts},
                prevalence=_of_task(task, prevalence or {}),
                fitted_on={
                    "data": data_names(stream),
                    "split": splits[wanted.name],
                    # Whole dates look like those of patients, which are not published.
                    "date": datetime.now(timezone.utc).strftime("%Y-%m"),
                },
                resamples=resamples,
                seed=seed,
            )
        )
    tasks_of_model = {**loaded.tasks, **{task.name: task for task in fitted}}
    write_anew(
        folder,
        target,
        model_tasks,
        lambda made: model_tasks.write_tasks(made / model_tasks.TASKS_FILE, tasks_of_model),
    )
    return CalibrationReport(fitted, str(target), left_out)


def places(model: str | Path, out: str | Path | None, force: bool) -> tuple[str, Path]:
    """Finds the folder or Hub id of a model, and the folder that its copy with something fitted will have.

    Args:
        model: Folder, Hub id, or `small`, the checkpoint of the package.
        out: Folder to create; None for the model's own.
        force: Whether an existing `out` is replaced.

    Raises:
        ArgumentError: If the model is no folder of the user's, and `out` is None.
        FileExistsError: If `out` exists and `force` is False.
    """
    folder = find_checkpoint(model)
    target = Path(folder if out is None else out)
    if out is None and (not Path(folder).is_dir() or folder != str(model)):
        raise ArgumentError(f"{model} is no folder of yours: name a new one for the fitted copy by --out.")
    if out is not None:
        check_output(target, force, "config.json")
    return folder, target


def _selected(sources: Sequence[Any], where: Mapping[str, list[str]], split: str | None) -> list[Any]:
    """The sources with the rows of a task and a split."""
    found = []
    for source in sources:
        wanted = dict(source.where or {})
        for name, values in where.items():
            wanted[name] = [one for one in values if name not in wanted or matches(one, wanted[name])]
            if not wanted[name]:
                raise SourceError(f"`where` of the task leaves none of {source.name or source.kind}, by `{name}`.")
        if split is not None:
            wanted["split"] = [split]
        found.append(source.model_copy(update={"where": wanted or None}))
    return found


def open_stream(
    sources: Sequence[Any],
    part: str,
    num_workers: int,
    max_bad_fraction: float,
    shuffle: bool = False,
    seed: int = 0,
) -> SampleStream:
    """Opens labelled images that something is fitted on.

    Args:
        sources: Models of `medmoe_hf.data.sources`.
        part: What the images are called in messages.
        num_workers: Processes that read and decode.
        max_bad_fraction: Share of faulty samples, of 0..1, above which reading ends.
        shuffle: Whether they are in a random order.
        seed: Seed of this order.

    Raises:
        SourceError: For endless sources, and those without rows.
    """
    for source in sources:
        if source.kind == "phantom" and source.length is None:
            raise SourceError("Nothing can be fitted on an endless phantom source; set its `length`.")
    return SampleStream(
        sources,
        seed=seed,
        shuffle=shuffle,
        fixed_captions=True,
        num_workers=num_workers,
        max_bad_fraction=max_bad_fraction,
        part=part,
    )


def split_of(stream: SampleStream, allow_test: bool, warning: str = "") -> str:
    """Names the split of a stream's rows.

    Args:
        stream: The rows.
        allow_test: Whether a split or file called test or external may be used.
        warning: What is logged for images that the model was trained on; empty for nothing.

    Raises:
        ArgumentError: If its name says that it is for measuring.
    """
    names: Counter[str] = Counter()
    places = []
    for index, (source, shards) in enumerate(zip(stream.sources, stream.shards, strict=True)):
        if source.kind in ("hub", "saved"):
            names[source.split] += 1
        places += [Path(part).name for part in getattr(source, "files", [getattr(source, "path", "")])]
        if source.kind == "phantom":
            continue
        for number, shard in enumerate(shards):
            rows = list(stream.known_rows.rows(index, number))
            names.update(cell_text(row.get("split")) for row in shard.peek(rows, {"split"}))
    names.pop("", None)
    for what, named in (("split", sorted(names)), ("file or folder", places)):
        measured = [name for name in named if _NEVER_FITTED & set(re.split(r"[\W\d_]+", name.lower()))]
        if measured and not allow_test:
            raise ArgumentError(
                f'The {what} is called "{measured[0]}": what is fitted on test data cannot be measured on it. Choose '
                "another with --split; --allow-test if it is not what its name says."
            )
    if warning and any(set(re.split(r"[\W\d_]+", name.lower())) & {"train", "training"} for name in names):
        logger.warning(warning)
    return ", ".join(sorted(names)) or "not stated"


def _score(
    model: Any, processor: Any, wanted: TaskFile, task: Task, stream: SampleStream, batch_size: int
) -> tuple[np.ndarray, np.ndarray, list[str] | None, int]:
    """Scores and labels of the images that have a class, their subjects (None if one is unknown), and the others."""
    collator = ContrastiveCollator(processor)
    stream.prepare = collator.prepare  # without `draft`: JPEGs are decoded as they will be when the model is used
    scores: list[torch.Tensor] = []
    labels: list[Any] = []
    subjects: list[Any] = []
    left_out, seen = 0, Counter[str]()
    waiting: list[Any] = []

    def finish() -> None:
        pixels = torch.from_numpy(np.stack(waiting)).to(model.device)
        batch = collator.normalize({"pixel_values": pixels})["pixel_values"].float()
        # The scores do not depend on a calibration; no warning for each batch with an image that is routed elsewhere.
        scores.append(model._answer_task(batch, task).scores.cpu())
        waiting.clear()

    for sample in progress(stream, f"images of {task.name}", unit="image"):
        found = wanted.classes_of(sample["label"])
        if found is None:
            left_out += 1
            seen[str(sample["label"])] += 1
            continue
        row = np.zeros(len(task.classes), dtype=np.int64)
        row[found] = 1
        labels.append(row if task.kind == "multi-label" else found[0])
        subjects.append(sample["subject"])
        waiting.append(sample["image"])
        if len(waiting) == batch_size:
            finish()
    if waiting:
        finish()
    if not labels:
        some = ", ".join(name for name, _ in seen.most_common(8))
        raise SourceError(
            f'Task "{task.name}": no image has one of the classes {", ".join(task.classes)}. The labels are: '
            f"{some or 'none'}. Say which of them mean a class by `labels` in the task's file, and which field they "
            "are in by `label` in the sources."
        )
    known = None if any(one is None for one in subjects) else subjects
    if known is None:
        logger.warning("%s: some images have no subject, so that each counts as one of its own.", task.name)
    return torch.cat(scores).double().numpy(), np.array(labels, dtype=np.int64), known, left_out


def _of_task(task: Task, prevalence: Mapping[str, float]) -> dict[str, float]:
    """The prevalences of a task's classes; the one that is missing in a multi-class task is what is left."""
    own = {name: value for name, value in prevalence.items() if name in task.prompts}
    missing = [name for name in task.classes if name not in own]
    if own and len(missing) == 1 and task.kind == "multi-class":
        own[missing[0]] = 1 - sum(own.values())
    if own and set(own) != set(task.prompts):
        raise ArgumentError(f'Task "{task.name}": the prevalence of {", ".join(missing)} is missing.')
    return own


def data_names(stream: SampleStream) -> str:
    """Names the sources of a stream, without folders."""
    short = [Path(name).name if "/" in name and "*" not in name else name for name in stream.names]
    return ", ".join(str(redact_paths(name)) for name in short)


def write_anew(folder: str, target: Path, code: ModuleType, write: Callable[[Path], None]) -> None:
    """Writes a copy of a model's folder with something added, which is complete or absent at any time.

    Args:
        folder: The model's folder, or its id on the Hub.
        target: The copy, which may be the folder itself.
        code: The module of `medmoe_hf.model` that reads what is added.
        write: Called with the copy, to add it.
    """
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder)
    with atomic_dir(target, force=True) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True, symlinks=Path(folder) == target)
        if not (partial / Path(str(code.__file__)).name).is_file():
            # Saved by an older version, whose code cannot read it.
            copy_model_code(partial)
        write(partial)
