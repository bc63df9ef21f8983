"""The question of the paper on real scans: routed experts, one shared expert of equal size, or none.

    python examples/experiments/real/twins.py --recipe train.yaml --start START --data ../shared/real --models MODELS
        --out twins.json [--split val] [--seeds 0 1 2] [--without nih-cxr14] [--set KEY=VALUE ...]

For each seed `variants.py` makes three start checkpoints of START, which differ in their experts only. All are trained
with the same recipe, data, order and number of steps. Sources of `--without` are left out of the training and measured
as other sources, and so is `external` together with `--split test`. Runs that exist are not repeated.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluate import evaluate, warn
from manifest import read_manifest
from safetensors import safe_open
from tasks import TASKS, tasks_of
from trainings import Overrides, merged, read_recipe, train, without_sources
from variants import write

from medmoe_hf.common.files import atomic_dir, atomic_write
from medmoe_hf.evaluation.results import Result


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        label: What it is.
        train: Keys of the recipe that differ.
    """

    label: str
    train: Overrides = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "routed": Variant("six routed experts"),
    "shared": Variant("one shared expert with the parameters of six"),
    "none": Variant("no expert: linear projections, the global embedding is the backbone's"),
}
"""Names of `variants.py` -> what is said about them, and what of the recipe differs."""

MEASURES = ("tasks", "other sources", "routing", "routing-external")


def task_metrics(results: Sequence[Result], split: str) -> dict[str, dict[str, float]]:
    """Returns task, `routing` or `routing-external` -> metric -> value, of the global score."""
    found = {}
    for result in results:
        metrics = result.by_variant()
        if result.protocol == "zero-shot":
            found[result.dataset] = {name: one.value for name, one in metrics["global"].items()}
        elif result.protocol == "routing" and result.dataset == "all sources":
            found["routing-external" if split == "external" else "routing"] = {
                name: one.value for name, one in metrics["image router"].items()
            }
    return found


def summarize(runs: Mapping[str, Mapping[str, Any]], others: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Averages each run over its tasks.

    Args:
        runs: Variant -> seed -> `{"metrics": task_metrics(...)}`.
        others: Tasks of sources that were not trained on.

    Returns:
        Variant -> measure -> one value per seed. `tasks` is the mean balanced accuracy over the finding tasks of the
        trained sources, `other sources` the mean AUROC over `others`, `routing` and `routing-external` balanced
        accuracies of the image router.
    """
    table: dict[str, dict[str, list[float]]] = {}
    for variant, by_seed in runs.items():
        values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
        for _, run in sorted(by_seed.items()):
            metrics = run["metrics"]
            own = [metrics[name]["balanced_accuracy"] for name in metrics if name in TASKS and _is_own(name, others)]
            foreign = [metrics[name]["macro_auroc"] for name in metrics if name in others]
            values["tasks"].append(statistics.fmean(own) if own else float("nan"))
            values["other sources"].append(statistics.fmean(foreign) if foreign else float("nan"))
            for routing in MEASURES[2:]:
                values[routing].append(metrics.get(routing, {}).get("balanced_accuracy", float("nan")))
        table[variant] = values
    return table


def _is_own(name: str, others: Sequence[str]) -> bool:
    return TASKS[name].probe and name not in others


def _parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(_product(shape) for shape in shapes)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def image_size(folder: Path) -> int:
    """Returns the side of the images that a checkpoint expects, in pixels."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["vision_config"]["image_size"])


def run(
    name: str,
    seed: int,
    recipe: Mapping[str, Any],
    start: Path,
    models: Path,
    data: Path,
    splits: Sequence[str],
    cache: Path,
) -> dict[str, Any]:
    """Makes, trains and measures a variant with a seed.

    Args:
        name: Key of `VARIANTS`.
        seed: Seed of the new experts and of the training.
        recipe: A training configuration as plain values.
        start: Checkpoint that all variants start from.
        models: Folder for start checkpoints and trained models.
        data: Folder of the manifest.
        splits: Splits to measure.
        cache: Folder for features.

    Returns:
        `parameters`, `seconds` of the training, and `metrics`, see `task_metrics`.
    """
    starts, folder = models / f"starts-{seed}", models / f"{name}-{seed}"
    if not starts.is_dir():
        with atomic_dir(starts) as partial:
            write(str(start), partial, seed)
    model: dict[str, Any] = {**dict.fromkeys(recipe["model"]), "from_pretrained": str(starts / name), "overrides": {}}
    train(merged({**recipe, "model": model, "seed": seed}, VARIANTS[name].train), folder)
    # The table shows ranges over seeds, and no intervals.
    metrics: dict[str, dict[str, float]] = {}
    for split in splits:
        metrics |= task_metrics(evaluate(folder, data, split, cache=cache, probes=False, resamples=1), split)
    seconds = json.loads((folder / "training.json").read_text(encoding="utf-8"))["seconds"]
    return {"parameters": _parameters(folder), "seconds": seconds, "metrics": metrics}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True, type=Path, help="training YAML")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--models", required=True, type=Path, help="folder for the models")
    parser.add_argument("--start", required=True, type=Path, help="checkpoint that all variants start from")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--without", nargs="+", default=[], metavar="SOURCE", help="sources left out of the training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--cache", type=Path, help="folder for features; by default `cache` beside OUT")
    given = parser.parse_args(arguments)
    warn(given.split)
    recipe = without_sources(read_recipe(given.recipe, given.set), given.without)
    splits = [given.split, *(["external"] if given.split == "test" else [])]
    rows = read_manifest(given.data)
    others = [
        name
        for split in splits
        for name, task in tasks_of(rows, split).items()
        if not name.startswith(("modality", "region"))
        and (task.external or set(task.where.get("source", ())) & set(given.without))
    ]
    runs: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        for name in given.only:
            cache = given.cache or given.out.parent / "cache"
            found = run(name, seed, recipe, given.start, given.models, given.data, splits, cache)
            runs.setdefault(name, {})[str(seed)] = found
            content = {
                "labels": {key: VARIANTS[key].label for key in runs},
                "split": given.split,
                "without": given.without,
                "steps": recipe["max_steps"],
                "image_size": image_size(given.start),
                "freeze": recipe.get("freeze") or [],
                "others": others,
                "runs": runs,
                "table": summarize(runs, others),
            }
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(given.out) as partial:
                partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summarize(runs, others), indent=1))


if __name__ == "__main__":
    main()
