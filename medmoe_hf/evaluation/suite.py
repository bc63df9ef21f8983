"""Runs all protocols of a recipe, for one model or several."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medmoe_hf.common.files import check_output
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.clip_benchmark_results import write_clip_benchmark
from medmoe_hf.evaluation.dataset import EvaluationSet, joined, test_split
from medmoe_hf.evaluation.grounding import grounding
from medmoe_hf.evaluation.linear_probe import Unit, linear_probe
from medmoe_hf.evaluation.medmnist_results import standard_results
from medmoe_hf.evaluation.recipes import (
    ClipBenchmarkLayout,
    MedMNISTLayout,
    Recipe,
    TableLayout,
    load_recipe,
    open_recipe,
)
from medmoe_hf.evaluation.report import write
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.retrieval import retrieval
from medmoe_hf.evaluation.robustness import compare, robustness
from medmoe_hf.evaluation.routing import routing
from medmoe_hf.evaluation.zero_shot import zero_shot
from medmoe_hf.inference.batching import BATCH_SIZE
from medmoe_hf.inference.encoders import MedMoEEncoder, load_encoder, split_name

PROTOCOLS: dict[str, Callable[..., Result | list[Result]]] = {
    "zero-shot": zero_shot,
    "linear-probe": linear_probe,
    "retrieval": retrieval,
    "grounding": grounding,
    "routing": routing,
    "robustness": robustness,
}
_BY_CLASS = ("zero-shot", "linear-probe", "robustness")
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
    groups: Sequence[str] = (),
    robustness_settings: Mapping[str, Any] | None = None,
    probe_by: Unit = "image",
) -> list[Result]:
    """Runs the protocols of a recipe on your copy of its data.

    Args:
        models: Folders, Hub ids or other names that `load_encoder` takes.
        recipe: A name of `recipe_names()`, or the path of a YAML file.
        data_dir: Folder of the data.
        protocols: Names from `PROTOCOLS`; None runs the recipe's tasks as far as the copy allows (a probe needs
            training images).
        output: Folder to create for `results.json`, `results.md` and the figures; for sets of MedMNIST also for the
            files of its own evaluator, in `medmnist`, and for sets in CLIP_benchmark's layout for its metrics, in
            `clip_benchmark`. None writes nothing.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        batch_size: Images per batch.
        force: Whether an existing `output` is replaced.
        report: Called with a line per measurement, and the reason if one is left out: only a MedMoE has heat-maps and
            routers.
        groups: Columns of the recipe's table whose groups `robustness` compares, beside those of the recipe.
        robustness_settings: Arguments of `robustness`, such as `severities`; None for the defaults.
        probe_by: `by` of `linear_probe`: `image`, or `case` for the averaged features of each subject.

    Returns:
        A result per model, protocol and set; of `robustness` one per part, and for each model but the first one with
        its differences to the first.

    Raises:
        FileExistsError: If `output` exists and `force` is False, before anything is measured.
        ValueError: For two models of one name, a protocol that is not the recipe's, a model that cannot be scored, or
            incomplete data.

    Example:
        ```python
        results = evaluate(["scratch/model"], "phantoms", "scratch", ["zero-shot"])
        for result in results:
            print(result.dataset, result.metrics["global/accuracy"])
        ```
    """
    if output is not None:
        check_output(output, force, "results.json", [data_dir, *models])
    names = [given or str(model) for given, model in map(split_name, models)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ArgumentError(f"Two models are called {twice[0]}, and results could not be told apart; use NAME=MODEL.")
    read = load_recipe(recipe)
    chosen = list(read.tasks) if protocols is None else list(protocols)
    for protocol in chosen:
        if protocol not in read.tasks and not (protocol == "robustness" and "zero-shot" in read.tasks):
            raise ArgumentError(f"The recipe {read.name} does not support {protocol}, only {', '.join(read.tasks)}.")
    sets = open_recipe(_with_groups(read, groups), data_dir)
    results: list[Result] = []
    baselines: dict[str, list[Result]] = {}
    for model in models:
        encoder = load_encoder(model, batch_size)
        for protocol in chosen:
            if protocol in _MEDMOE_ONLY and not isinstance(encoder, MedMoEEncoder):
                report(f"{protocol} of {encoder.name} is left out: only a MedMoE has it.")
                continue
            own = {"robustness": robustness_settings or {}, "linear-probe": {"by": probe_by}}
            settings = own.get(protocol, {})
            run = partial(PROTOCOLS[protocol], encoder, resamples=resamples, seed=seed, **settings)
            for data in _sets_for(protocol, sets, read.name):
                try:
                    found = run(data)
                except ValueError as error:
                    # Protocols requested by name must run; of all tasks of a recipe, those that the copy allows.
                    if protocols is not None:
                        raise
                    report(f"{protocol} of {encoder.name} on {data.name} is left out: {error}")
                    continue
                parts = [found] if isinstance(found, Result) else found
                if protocol == "robustness" and (base := baselines.setdefault(data.name, parts)) is not parts:
                    parts = [*parts, compare(base, parts, data)]
                results += parts
                report(f"{protocol} of {encoder.name} on {data.name}: N = {parts[0].count}")
    if output is not None:
        write(results, output, force)
        if isinstance(read.layout, MedMNISTLayout) and not read.layout.corrupted:
            scored = [result for result in results if result.protocol in ("zero-shot", "linear-probe")]
            standard_results(scored, read.layout, data_dir, Path(output) / "medmnist")
        if isinstance(read.layout, ClipBenchmarkLayout):
            labels = {data.name: test_split(data).labels for data in sets}
            write_clip_benchmark(results, labels, Path(output) / "clip_benchmark")
    return results


def _with_groups(recipe: Recipe, groups: Sequence[str]) -> Recipe:
    """The recipe, with further columns whose groups are compared."""
    if not groups:
        return recipe
    if not isinstance(recipe.layout, TableLayout):
        raise ArgumentError(f"The recipe {recipe.name} has no table, and so no column {groups[0]}.")
    layout = recipe.layout.model_copy(update={"groups": list(dict.fromkeys([*recipe.layout.groups, *groups]))})
    return recipe.model_copy(update={"layout": layout})


def _sets_for(protocol: str, sets: Sequence[EvaluationSet], name: str) -> list[EvaluationSet]:
    """Protocols by class run on each set; the others on all sets at once."""
    return list(sets) if protocol in _BY_CLASS or len(sets) == 1 else [joined(sets, name)]
