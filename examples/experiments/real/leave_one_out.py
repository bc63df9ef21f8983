"""Trains without a source, and measures on it.

    python examples/experiments/real/leave_one_out.py --recipe train.yaml --data ../shared/real --models MODELS
        --candidate FOLDER --split test --out crossings.json [--set KEY=VALUE ...] [--only CROSSING ...]

For each crossing of `tasks.py`, the recipe is trained with `where_not: {source: ...}` added to its sources (unless
MODELS has the result already), and classifies the images of the source that it has not seen by prompts. A crossing
whose source is external anyway is measured with the candidate, and only with `--split test`.

The baseline is a linear probe on the pooled features of the bare ImageNet backbone at 224x224 pixels, trained on the
rows that the model saw labels of; C is chosen on their source's `val`. `global - imagenet 100%` is the difference.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from encode import StoredEncoder, imagenet_features, pixel_features
from evaluate import BASELINES, STRENGTHS, summary, warn, write_results
from manifest import Row, read_manifest
from tasks import CROSSINGS, TASKS, Crossing, evaluation_set
from trainings import read_recipe, train, without_sources

from medmoe_hf.errors import SourceError
from medmoe_hf.evaluation.dataset import EvaluationSet, joined
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.linear_probe import linear_probe, mean_of_runs
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.zero_shot import zero_shot
from medmoe_hf.inference.encoders import SCORES


def crossing_set(crossing: Crossing, rows: Sequence[Row], folder: Path, split: str) -> EvaluationSet:
    """Returns the train and validation images of one source, and the images of another one that are measured.

    Args:
        crossing: What is learned and measured.
        rows: The manifest.
        folder: Folder of the manifest.
        split: Split of the measured images.

    Raises:
        SourceError: If a class has no image in one of the parts.
    """
    parts = {
        "train": evaluation_set(crossing.learned, rows, folder, "train"),
        "validation": evaluation_set(crossing.learned, rows, folder, "val"),
        "test": evaluation_set(crossing.measured, rows, folder, split),
    }
    measured = parts["test"]
    for name, part in parts.items():
        assert part.labels is not None
        if len(part.classes) != len(measured.classes) or len(np.unique(part.labels)) != len(part.classes):
            raise SourceError(f"{crossing.title}: the {name} images are of {', '.join(part.classes) or 'no class'}.")
    # The classes correspond in order, whatever each task calls them.
    named = [replace(part, classes=measured.classes, prompts=measured.prompts) for part in parts.values()]
    splits = np.repeat(list(parts), [len(part) for part in named])
    facts = {
        **measured.facts,
        "title": crossing.title,
        "excluded": list(crossing.excluded),
        "trained_on_source": parts["train"].facts["sources"],
    }
    return replace(joined(named, measured.name), splits=splits, facts=facts)


def measure(
    name: str, encoder: StoredEncoder, rows: Sequence[Row], folder: Path, split: str, resamples: int, seed: int
) -> list[Result]:
    """Measures a model on a crossing: zero-shot, the probes of the baselines, and the differences.

    Args:
        name: Key of `CROSSINGS`.
        encoder: The model that was trained without the measured source.
        rows: The manifest.
        folder: Folder of the manifest.
        split: Split of the measured images.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    data = replace(crossing_set(CROSSINGS[name], rows, folder, split), name=name)
    test = data.split("test")
    row_of = {str(folder / row["file"]): row for row in rows}
    prompts = [sentence for own in test.prompts.values() for sentence in own]
    groups = [{"images": test.images, "texts": prompts}]
    encoder.run(folder, [row_of[path] for path in test.images], prompts, groups)
    result = zero_shot(encoder, test, resamples=resamples, seed=seed)
    for part in (data.split("train"), data.split("validation"), test):
        chosen = [row_of[path] for path in part.images]
        if part is not test:
            encoder.run(folder, chosen)
        features = {
            "imagenet": imagenet_features(folder, chosen, encoder.cache),
            "pixels": pixel_features(folder, chosen, encoder.cache),
        }
        encoder.add_features(chosen, folder, features)
    probe = linear_probe(encoder, data, (1.0,), resamples=resamples, seed=seed, strengths=STRENGTHS)
    for score in SCORES:
        for baseline in BASELINES:
            measured = bootstrap(
                _auroc_difference,
                result.probabilities[score],
                probe.probabilities[f"{baseline} 100%"],
                test.labels if test.labels is not None else (),
                groups=test.subjects,
                resamples=resamples,
                seed=seed,
            )
            result.add(f"{score} - {baseline} 100%", measured)
    for one in (result, probe):
        one.facts |= {"model_hash": encoder.hash, "similarity": encoder.similarity, "split": split}
    return [result, probe]


def _auroc_difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    values = [mean_of_runs(runs, labels)["macro_auroc"] for runs in (first, second)]
    return {"macro_auroc": values[0] - values[1]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True, type=Path, help="training YAML")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--models", required=True, type=Path, help="folder for the trained models")
    parser.add_argument("--candidate", type=Path, help="folder of the model of all sources, for external crossings")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--only", nargs="+", choices=CROSSINGS, default=list(CROSSINGS))
    parser.add_argument("--cache", type=Path, help="folder for features; by default `cache` beside OUT")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstraps")
    given = parser.parse_args(arguments)
    warn(given.split)
    rows, cache = read_manifest(given.data), given.cache or given.out.parent / "cache"
    results: list[Result] = []
    for name in given.only:
        crossing, split = CROSSINGS[name], given.split
        if TASKS[crossing.measured].external:
            if split != "test" or given.candidate is None:
                print(f"{name} is left out: it needs --candidate and --split test, and is measured once.")
                continue
            split, folder = "external", given.candidate
        else:
            folder = train(
                without_sources(read_recipe(given.recipe, given.set), crossing.excluded), given.models / name
            )
        encoder = StoredEncoder(folder, name, cache)
        results += measure(name, encoder, rows, given.data, split, given.resamples, given.seed)
        write_results(results, given.out)
    print(summary(results))


if __name__ == "__main__":
    main()
