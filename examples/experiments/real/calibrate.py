"""Gives a checkpoint the tasks of `tasks.py`, calibrated on `val`: the `tasks.json` that travels with its weights.

    python examples/experiments/real/calibrate.py FOLDER --data ../shared/real --run RUN [--seed 0]

For each task the score (`global`, `local` or their `mean`) is the one whose calibrated probabilities fit `val` best:
the mean over classes of the negative log-likelihood, by cross-validation over subjects. Then temperature, biases,
thresholds and 90 % sets are fitted to all of `val`, as `medmoe calibrate` does. Train images are not used: the model
is too sure of them. A task with a class of fewer than 10 images or 5 subjects in `val` is stored with its prompts
only, and says that it is not calibrated.

The features of `val` are those of `evaluate.py --split val`; if these are in RUN/cache, this takes a minute. Run it on
the folder that is packed: packing keeps its `tasks.json`.
"""

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from encode import StoredEncoder
from evaluate import encode_split
from manifest import Row, read_manifest
from tasks import TASKS, evaluation_set, tasks_of

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.calibration import fit_best_score
from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.zero_shot import class_logits
from medmoe_hf.inference.encoders import SCORES
from medmoe_hf.model import MedMoEProcessor, Task
from medmoe_hf.model.tasks_medmoe import TASKS_FILE, write_tasks

SPLIT = "val"


def shipped_tasks(rows: Sequence[Row], score: str = "global") -> dict[str, Task]:
    """Returns the tasks that a checkpoint brings along, before they are calibrated.

    Args:
        rows: The manifest; tasks without images in it are left out.
        score: The similarity of tasks that cannot be calibrated.

    Returns:
        Key of `TASKS` -> task.
    """
    found = {}
    for name, task in TASKS.items():
        members, _ = task.rows(rows, ("train", "val", "test", "external"))
        if not members or task.answered_by:
            continue
        modalities = {row["modality"] for row in members}
        modality = modalities.pop() if len(modalities) == 1 else None
        found[name] = Task(name, task.prompts(), score=score, modality=modality, title=task.title)
    return found


def calibrated(task: Task, scores: Mapping[str, np.ndarray], data: EvaluationSet, resamples: int, seed: int) -> Task:
    """Fits one task to the images of `val`.

    Args:
        task: Of `shipped_tasks`.
        scores: Kind of score -> (N, C).
        data: The N images.
        resamples: Number of bootstrap resamples.
        seed: Seed of folds and bootstrap.

    Raises:
        ArgumentError: If there is too little to calibrate on.
    """
    assert data.labels is not None
    if data.classes != task.classes:
        missing = [name for name in task.classes if name not in data.classes]
        raise ArgumentError(f'Task "{task.name}": {SPLIT} has no image of {", ".join(missing)}.')
    sources = ", ".join(data.facts["sources"])
    # Whole dates look like those of patients, which are not published.
    facts = {"data": sources, "split": SPLIT, "date": datetime.now(timezone.utc).strftime("%Y-%m")}
    return fit_best_score(task, scores, data.labels, data.subjects, fitted_on=facts, resamples=resamples, seed=seed)


def calibrate(
    folder: Path, data: Path, cache: Path, resamples: int = 1000, seed: int = 0
) -> tuple[dict[str, Task], dict[str, str]]:
    """Fits all tasks, and writes them into the folder of a model.

    Args:
        folder: Folder of the model; its `tasks.json` is replaced.
        data: Folder of the manifest.
        cache: Folder for features.
        resamples: Number of bootstrap resamples.
        seed: Seed of folds and bootstrap.

    Returns:
        Name -> task; and for those that are not calibrated, name -> reason.
    """
    rows = read_manifest(data)
    encoder = StoredEncoder(folder, None, cache)
    sets = {name: evaluation_set(name, rows, data, SPLIT) for name in tasks_of(rows, SPLIT)}
    encode_split(encoder, rows, data, SPLIT, sets)
    processor = MedMoEProcessor.from_pretrained(folder)
    tasks: dict[str, Task] = {}
    reasons: dict[str, str] = {}
    for name, task in shipped_tasks(rows, encoder.similarity).items():
        try:
            if name not in sets:
                raise ArgumentError(f'Task "{name}": {SPLIT} has no image of it.')
            logits = class_logits(encoder, sets[name].images, sets[name].prompts, SCORES)
            scores = {kind: table.double().numpy() for kind, table in logits.items()}
            task = calibrated(task, scores, sets[name], resamples, seed)
        except ArgumentError as error:
            reasons[name] = str(error).removeprefix(f'Task "{name}": ')
        tasks[name] = processor.tokenize_task(task)
    with atomic_write(folder / TASKS_FILE) as partial:
        write_tasks(partial, tasks)
    return tasks, reasons


def shown(tasks: Mapping[str, Task], reasons: Mapping[str, str]) -> str:
    """Returns a line per task: what it was fitted on and what was measured, or why it is not calibrated."""
    lines = []
    for name, task in tasks.items():
        found = task.calibration
        if found is None:
            lines.append(f"{name:24} not calibrated: {reasons[name]}")
            continue
        losses = "  ".join(f"{kind} {loss:.3f}" for kind, loss in found.fitted_on["held_out_loss"].items())
        measured = "  ".join(
            f"{key} {found.measured[key][0]:.3f}"
            for key in ("ece_before", "ece", "balanced_accuracy", "coverage", "set_size")
        )
        lines.append(
            f"{name:24} {task.score:6} temperature {found.temperature:5.2f}  N {found.fitted_on['cases']:3} / "
            f"{found.fitted_on['subjects']:3}  {measured}  {found.conformal}  (losses: {losses})"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the model; its tasks.json is replaced")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--run", required=True, type=Path, help="folder of the results, with the cache of features")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print(shown(*calibrate(given.folder, given.data, given.run / "cache", given.resamples, given.seed)))
    print(f"Wrote {given.folder / TASKS_FILE}.")


if __name__ == "__main__":
    main()
