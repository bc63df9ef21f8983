"""Runs all protocols of a recipe, for one model or several."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_hf.errors import ArgumentError, PathExistsError
from medmoe_hf.evaluation.dataset import EvaluationSet, joined
from medmoe_hf.evaluation.grounding import grounding
from medmoe_hf.evaluation.linear_probe import linear_probe
from medmoe_hf.evaluation.recipes import load_recipe, open_recipe
from medmoe_hf.evaluation.report import write
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.retrieval import retrieval
from medmoe_hf.evaluation.routing import routing
from medmoe_hf.evaluation.zero_shot import zero_shot
from medmoe_hf.inference.batching import BATCH_SIZE
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder

PROTOCOLS: dict[str, Callable[..., Result]] = {
    "zero-shot": zero_shot,
    "linear-probe": linear_probe,
    "retrieval": retrieval,
    "grounding": grounding,
    "routing": routing,
}
_BY_CLASS = ("zero-shot", "linear-probe")
_MEDMOE_ONLY = ("grounding", "routing")


def evaluate(
    models: Sequence[str | Path],
    recipe: str | Path,
    data_dir: str | Path,
    protocols: Sequence[str] | None = None,
    output: str | Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    force: bool = False,
    report: Callable[[str], Any] = print,
) -> list[Result]:
    """Runs the protocols of a recipe on your copy of its data.

    Args:
        models: Folders, Hub ids or other names that `load_encoder` takes.
        recipe: A name of `recipe_names()`, or the path of a YAML file.
        data_dir: Folder of the data.
        protocols: Names from `PROTOCOLS`; None runs the recipe's tasks as far as the copy allows (a probe needs
            training images).
        output: Folder to create for `results.json`, `results.md` and the figures; None writes nothing.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        batch_size: Images per batch.
        force: Whether an existing `output` is replaced.
        report: Called with a line per measurement, and the reason if one is left out: only a MedMoE has heat-maps and
            routers.

    Returns:
        A result per model, protocol and set.

    Raises:
        FileExistsError: If `output` exists and `force` is False, before anything is measured.
        ValueError: For a protocol that is not the recipe's, a model that cannot be scored, or incomplete data.

    Example:
        ```python
        results = evaluate(["scratch/model"], "phantoms", "scratch", ["zero-shot"])
        for result in results:
            print(result.dataset, result.metrics["global/accuracy"])
        ```
    """
    if output is not None and Path(output).exists() and not force:
        raise PathExistsError(f"{output} exists already; choose another folder or remove it.")
    read = load_recipe(recipe)
    chosen = list(read.tasks) if protocols is None else list(protocols)
    for protocol in chosen:
        if protocol not in read.tasks:
            raise ArgumentError(f"The recipe {read.name} does not support {protocol}, only {', '.join(read.tasks)}.")
    sets = open_recipe(read, data_dir)
    results = []
    for model in models:
        encoder = load_encoder(model, batch_size)
        for protocol in chosen:
            if protocol in _MEDMOE_ONLY and not isinstance(encoder, MedMoEEncoder):
                report(f"{protocol} of {encoder.name} is left out: only a MedMoE has it.")
                continue
            run = partial(PROTOCOLS[protocol], encoder, resamples=resamples, seed=seed)
            for data in _sets_for(protocol, sets, read.name):
                try:
                    result = run(data)
                except ValueError as error:
                    # Protocols requested by name must run; of all tasks of a recipe, those that the copy allows.
                    if protocols is not None:
                        raise
                    report(f"{protocol} of {encoder.name} on {data.name} is left out: {error}")
                    continue
                results.append(result)
                report(f"{protocol} of {encoder.name} on {data.name}: N = {result.count}")
    if output is not None:
        write(results, output, force)
    return results


def _sets_for(protocol: str, sets: Sequence[EvaluationSet], name: str) -> list[EvaluationSet]:
    """Protocols by class run on each set; the others on all sets at once."""
    return list(sets) if protocol in _BY_CLASS or len(sets) == 1 else [joined(sets, name)]
