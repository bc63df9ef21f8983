"""Measures a checkpoint on real scans: routing, zero-shot classification, linear probes and retrieval.

    python examples/experiments/real/evaluate.py --model FOLDER --data ../shared/real --split val --out results.json
        [--name small] [--cache CACHE] [--only TASK ...] [--no-probes] [--seed 0]

The checkpoint runs in a process without this package, through `AutoModel` and its own code. Everything is chosen on
`val`; `test` and `external` are measured once.

* Routing: the image router alone, on all images and by source.
* Zero-shot: the tasks of `tasks.py`, by the global similarity, the local one, and their mean; on `test` and `external`
  also by the tasks that the checkpoint brings along (`tasks.json`, see `calibrate.py`): the labels, probabilities and
  90 % sets that `model.classify` returns, as the variant `shipped task`.
* Linear probe: 1 %, 10 % and 100 % of the train rows that are not share-alike, on v_g (the image embedding before its
  projection) and on the embedding in the shared space, beside the pooled features of the bare ImageNet backbone at
  224x224 pixels and 16x16 gray pixels. C is chosen on `val`; to measure on `val`, on a fifth of the train subjects.
  `v_g - imagenet` is a difference, with an interval over the same resamples.
* Retrieval: the sources' own texts, all together and by modality.

No image of this folder has a mask or a box, so that pointing cannot be measured. Intervals are 95 % bootstrap
intervals by subject. The results are a list as `medmoe evaluate` writes it.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from encode import StoredEncoder, imagenet_features, pixel_features
from manifest import Row, for_training, is_share_alike, read_manifest, sha256
from report import SHIPPED, TOGETHER
from tasks import TASKS, evaluation_set, tasks_of

from medmoe_hf.common.files import atomic_write
from medmoe_hf.data import MODALITIES
from medmoe_hf.evaluation.calibration_measures import measure_calibrated
from medmoe_hf.evaluation.dataset import EvaluationSet, joined
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.linear_probe import FRACTIONS, linear_probe, mean_of_runs
from medmoe_hf.evaluation.metrics import calibration
from medmoe_hf.evaluation.results import Result
from medmoe_hf.evaluation.retrieval import retrieval
from medmoe_hf.evaluation.routing import routing
from medmoe_hf.evaluation.zero_shot import class_logits, zero_shot
from medmoe_hf.model import Task
from medmoe_hf.model.tasks_medmoe import TASKS_FILE, read_tasks

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FEATURES = ("v_g", "embedding")
BASELINES = ("imagenet", "pixels")
COMPARED = ("balanced_accuracy", "macro_auroc")
FEWEST_TEXTS = 10


def image_set(name: str, rows: Sequence[Row], folder: Path) -> EvaluationSet:
    """Returns images with their modalities and subjects."""
    ids = {modality: index for index, modality in enumerate(MODALITIES)}
    return EvaluationSet(
        name=name,
        images=[str(folder / row["file"]) for row in rows],
        modalities=np.array([ids[row["modality"]] for row in rows], dtype=np.int64),
        subjects=[row["subject"] for row in rows],
    )


def spoken(text: str) -> str:
    """Turns "Q: question A: answer | ..." into sentences, each answer once; other texts stay as they are."""
    if not text.startswith("Q:"):
        return text
    found: dict[str, str] = {}
    for pair in text.split(" | "):
        question, _, answer = pair.removeprefix("Q:").partition(" A: ")
        question, answer = question.strip(), answer.strip()
        plain = answer.lower() in ("yes", "no")
        key = re.sub(r"\W+", " ", question if plain else answer).lower()
        found.setdefault(key, f"{question} {answer}." if plain else f"{answer}.")
    return " ".join(found.values())


def text_sets(rows: Sequence[Row], folder: Path, split: str) -> list[EvaluationSet]:
    """Returns the images with texts of a split: all, and those of each modality with at least ten."""
    own = [row for row in rows if row["split"] == split and row["text"]]
    groups = {"texts": own}
    for modality in MODALITIES:
        groups[f"texts/{modality}"] = [row for row in own if row["modality"] == modality]
    sets = []
    for name, members in groups.items():
        if len(members) >= FEWEST_TEXTS and (name == "texts" or len(members) < len(own)):
            captions = [spoken(row["text"]) for row in members]
            sets.append(replace(image_set(name, members, folder), captions=captions, facts={"split": split}))
    return sets


def encode_split(
    encoder: StoredEncoder,
    rows: Sequence[Row],
    folder: Path,
    split: str,
    sets: Mapping[str, EvaluationSet],
    shipped: Mapping[str, Task] | None = None,
) -> list[EvaluationSet]:
    """Encodes what the protocols need of a split: its images, the prompts of tasks, and the sources' texts.

    Args:
        encoder: The model.
        rows: The manifest.
        folder: Folder of the manifest.
        split: Name of the split.
        sets: Key of `TASKS` -> its images and prompts.
        shipped: Key of `TASKS` -> task of the checkpoint that answers it.

    Returns:
        Those of `text_sets`.
    """
    texts = text_sets(rows, folder, split)
    groups = []
    for key, one in sets.items():
        sentences = [sentence for own in one.prompts.values() for sentence in own]
        sentences += shipped[key].sentences if shipped and key in shipped else []
        groups.append({"images": one.images, "texts": list(dict.fromkeys(sentences))})
    groups += [{"images": one.images, "texts": one.captions or []} for one in texts]
    measured = _of_split(rows, split)
    encoder.run(folder, measured, [text for group in groups for text in group["texts"]], groups)
    return texts


def shipped_of(model: str | Path, keys: Sequence[str]) -> dict[str, Task]:
    """Finds the tasks in the folder of a model that answer tasks of `TASKS`: key -> task; empty without any."""
    path = Path(model) / TASKS_FILE
    own = read_tasks(path) if path.is_file() else {}
    found = {key: own.get(TASKS[key].answered_by or key) for key in keys}
    return {key: task for key, task in found.items() if task is not None}


def add_shipped(
    result: Result, encoder: StoredEncoder, key: str, data: EvaluationSet, task: Task, resamples: int, seed: int
) -> dict[str, np.ndarray] | None:
    """Adds what the task of a checkpoint gives for the same images, beside plain zero-shot classification.

    Args:
        result: That of plain zero-shot classification.
        encoder: The model.
        key: Key of `TASKS`.
        data: Its images.
        task: The task of the checkpoint, with as many classes as that of `TASKS`.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        For `together`: columns of N rows, such as `before` and `after` (N, C); None if the task is not calibrated.
    """
    result.facts["shipped"] = {"task": task.name, "score": task.score, "calibrated": task.calibration is not None}
    if task.calibration is None:
        return None
    assert data.labels is not None
    places = [list(TASKS[key].classes).index(name) for name in data.classes]
    labels = np.array(places, dtype=np.int64)[data.labels]
    logits = class_logits(encoder, data.images, task.prompts, list(dict.fromkeys((task.score, encoder.similarity))))
    scores, plain = logits[task.score].double(), logits[encoder.similarity].double()
    found = measure_calibrated(
        task, scores.numpy(), labels, data.subjects, plain=plain.numpy(), resamples=resamples, seed=seed
    )
    result.add(SHIPPED, {name: interval for name, interval in found.items() if not np.isnan(interval.value)})
    fitted = task.calibration.fitted_on
    result.facts["shipped"] |= {"cases": fitted.get("cases"), "subjects": fitted.get("subjects")}
    result.facts["shipped"]["conformal"] = task.calibration.conformal
    _, sets = task.decide(scores)
    assert sets is not None
    return {
        "before": plain.softmax(dim=1).numpy(),
        "after": task.probabilities(scores, task.calibration.prior).numpy(),
        "labels": labels,
        "covered": np.array([task.classes[label] in own for label, own in zip(labels, sets, strict=True)]),
        "size": np.array([len(own) for own in sets]),
        "subjects": np.array(data.subjects),
    }


def together(parts: Sequence[Mapping[str, np.ndarray]], model: str, resamples: int, seed: int) -> Result:
    """Measures the calibration of several tasks on all their images together.

    One task has too few images for a calibration error below 0.05 to be seen: in bins of few images the error of a
    perfect calibration is above that.

    Args:
        parts: What `add_shipped` returns for each task.
        model: Name of the model.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    width = max(part["after"].shape[1] for part in parts)

    def stacked(name: str) -> np.ndarray:
        # Classes that a task does not have get the probability 0.
        return np.concatenate([np.pad(part[name], ((0, 0), (0, width - part[name].shape[1]))) for part in parts])

    def metric(*drawn: np.ndarray) -> dict[str, float]:
        before, after, labels, covered, size = drawn
        return {
            "ece_before": calibration(before, labels)["ece"],
            "ece": calibration(after, labels)["ece"],
            "coverage": float(covered.mean()),
            "set_size": float(size.mean()),
        }

    rest = [np.concatenate([part[name] for part in parts]) for name in ("labels", "covered", "size")]
    columns = [stacked("before"), stacked("after"), *rest]
    groups = np.concatenate([part["subjects"] for part in parts])
    facts = {"title": "All calibrated findings together", "tasks": len(parts), "resamples": resamples, "seed": seed}
    result = Result(TOGETHER, model, "findings", len(groups), {}, facts)
    result.add(SHIPPED, bootstrap(metric, *columns, groups=groups, resamples=resamples, seed=seed))
    return result


def route(encoder: StoredEncoder, rows: Sequence[Row], folder: Path, resamples: int, seed: int) -> list[Result]:
    """Measures the image router on all rows, and on those of each modality and of each source."""
    parts = {"all sources": list(rows)}
    for column in ("modality", "source"):
        for value in dict.fromkeys(row[column] for row in rows):
            parts[f"{column} {value}"] = [row for row in rows if row[column] == value]
    return [routing(encoder, image_set(name, part, folder), resamples, seed) for name, part in parts.items()]


def probe_set(name: str, rows: Sequence[Row], folder: Path, split: str, seed: int) -> EvaluationSet:
    """Returns the train, validation and test images of a task, where `split` is the one to measure on."""
    allowed = [row for row in rows if row["split"] == split or not is_share_alike(row)]
    train, test = (evaluation_set(name, allowed, folder, one) for one in ("train", split))
    splits = ["train"] * len(train) + ["test"] * len(test)
    parts = [train, test]
    if split == "val":
        # What is measured must not choose C.
        assert train.subjects is not None
        subjects = sorted(set(train.subjects))
        chosen = np.random.default_rng(seed).permutation(len(subjects))[: max(1, len(subjects) // 5)]
        kept = {subjects[index] for index in chosen}
        splits[: len(train)] = ["validation" if subject in kept else "train" for subject in train.subjects]
    else:
        validation = evaluation_set(name, allowed, folder, "val")
        parts.append(validation)
        splits += ["validation"] * len(validation)
    different = {tuple(part.classes) for part in parts}
    if len(different) > 1:
        raise SystemExit(f"{name}: the splits have images of different classes: {different}.")
    return replace(joined(parts, name), splits=np.array(splits), facts=test.facts)


def compare_features(result: Result, data: EvaluationSet, resamples: int, seed: int) -> None:
    """Adds the differences of the model's features to the baselines', on the same images and resamples."""
    test = data.split("test")
    assert test.labels is not None
    for own in FEATURES:
        for other in BASELINES:
            for fraction in FRACTIONS:
                share = f"{fraction:.0%}"
                measured = bootstrap(
                    _difference,
                    result.probabilities[f"{own} {share}"],
                    result.probabilities[f"{other} {share}"],
                    test.labels,
                    groups=test.subjects,
                    resamples=resamples,
                    seed=seed,
                )
                result.add(f"{own} - {other} {share}", measured)


def _difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    measured = [mean_of_runs(runs, labels) for runs in (first, second)]
    return {name: measured[0][name] - measured[1][name] for name in COMPARED}


def mean_over_tasks(probes: Sequence[tuple[Result, EvaluationSet]], resamples: int, seed: int) -> Result:
    """Averages linear probes over tasks, with intervals of the means and of their differences.

    All subjects of all tasks are resampled together, so that tasks with the same images are not independent.

    Args:
        probes: The result and the data of each task.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
    """
    tests = [data.split("test") for _, data in probes]
    labels = [test.labels for test in tests if test.labels is not None]
    owner = np.concatenate([np.full(len(test), number) for number, test in enumerate(tests)])
    classes = [len(test.classes) for test in tests]
    first = probes[0][0]
    result = Result(
        protocol="linear-probe",
        model=first.model,
        dataset="mean over tasks",
        count=len(owner),
        metrics={},
        facts={**first.facts, "title": "Mean over tasks", "tasks": [result.dataset for result, _ in probes]},
    )
    for name in ("notes", "sources", "seeds", "strengths", "trained_on", "count_by_class", "train_count_by_class"):
        result.facts.pop(name, None)
    result.facts["seeds"] = {}
    kinds = (*FEATURES, *BASELINES)
    for fraction in FRACTIONS:
        share = f"{fraction:.0%}"
        columns = [
            np.concatenate([_padded(one.probabilities[f"{kind} {share}"], max(classes)) for one, _ in probes])
            for kind in kinds
        ]

        def metric(*resampled: np.ndarray) -> dict[str, float]:
            *tables, truth, task = resampled
            means: dict[str, float] = {}
            for kind, table in zip(kinds, tables, strict=True):
                found = [
                    mean_of_runs(table[task == number][:, :, :count], truth[task == number])
                    if (task == number).any()
                    else dict.fromkeys(COMPARED, float("nan"))
                    for number, count in enumerate(classes)
                ]
                means |= {f"{kind}/{name}": float(np.mean([one[name] for one in found])) for name in COMPARED}
            differences = {
                f"{own} - {other}/{name}": means[f"{own}/{name}"] - means[f"{other}/{name}"]
                for own in FEATURES
                for other in BASELINES
                for name in COMPARED
            }
            return means | differences

        measured = bootstrap(
            metric,
            *columns,
            np.concatenate(labels),
            owner,
            groups=[subject for test in tests for subject in test.subjects or ()],
            resamples=resamples,
            seed=seed,
        )
        for name, interval in measured.items():
            kind, _, metric_name = name.rpartition("/")
            result.add(f"{kind} {share}", {metric_name: interval})
    return result


def _padded(probabilities: np.ndarray, classes: int) -> np.ndarray:
    return np.pad(probabilities, ((0, 0), (0, 0), (0, classes - probabilities.shape[2])))


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str,
    *,
    name: str | None = None,
    cache: str | Path = "cache",
    only: Sequence[str] | None = None,
    probes: bool = True,
    probe_seeds: int = 3,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Result]:
    """Runs all protocols on one split.

    Args:
        model: Folder of the checkpoint.
        data: Folder of the manifest.
        split: `val`, `test` or `external`.
        name: Name of the model in the results; None for the last two parts of its path.
        cache: Folder in which features are kept.
        only: Names of the tasks; None for all that the split allows.
        probes: Whether linear probes are trained.
        probe_seeds: Number of draws of the small parts of the train rows.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstraps and the draws.

    Returns:
        The results: routing, zero-shot, linear probes and their mean, retrieval.
    """
    folder = Path(data)
    rows = read_manifest(folder)
    measured = _of_split(rows, split)
    if not measured:
        raise SystemExit(f"No row of the manifest is in the split {split}.")
    tasks = {key: task for key, task in tasks_of(rows, split).items() if only is None or key in only}
    sets = {key: evaluation_set(key, rows, folder, split) for key in tasks}
    encoder = StoredEncoder(model, name, Path(cache))
    # On `val`, which they were fitted on, tasks have their own cross-validated measures.
    shipped = {} if split == "val" else shipped_of(model, list(tasks))
    texts = encode_split(encoder, rows, folder, split, sets, shipped)

    results = route(encoder, measured, folder, resamples, seed)
    parts: list[dict[str, np.ndarray]] = []
    for key, one in sets.items():
        results.append(zero_shot(encoder, one, resamples=resamples, seed=seed))
        part = add_shipped(results[-1], encoder, key, one, shipped[key], resamples, seed) if key in shipped else None
        # Modalities and regions are nearly always right, which would hide the rest.
        if part is not None and not key.startswith(("modality", "region")):
            parts.append(part)
    if parts:
        results.append(together(parts, encoder.name, resamples, seed))
    probed = [key for key, task in tasks.items() if task.probe and probes]
    if probed:
        # Each split on its own, so that the cache of one evaluation serves the others.
        learned = [for_training(rows), *([] if split == "val" else [_of_split(rows, "val")])]
        for part in learned:
            encoder.run(folder, part)
        for part in (measured, *learned):
            baselines = {
                "imagenet": imagenet_features(folder, part, Path(cache)),
                "pixels": pixel_features(folder, part, Path(cache)),
            }
            encoder.add_features(part, folder, baselines)
        found = []
        for key in probed:
            one = probe_set(key, rows, folder, split, seed)
            result = linear_probe(encoder, one, seeds=probe_seeds, strengths=STRENGTHS, resamples=resamples, seed=seed)
            compare_features(result, one, resamples, seed)
            found.append((result, one))
        results += [result for result, _ in found]
        if len(found) > 1:
            results.append(mean_over_tasks(found, resamples, seed))
    results += [retrieval(encoder, one, resamples=resamples, seed=seed) for one in texts]
    tasks_file = Path(model) / TASKS_FILE
    origin = {
        **({"tasks_hash": sha256(tasks_file)} if tasks_file.is_file() else {}),
        "similarity": encoder.similarity,
        "weights_hash": sha256(Path(model) / "model.safetensors"),
        "model_hash": encoder.hash,
        "manifest_hash": sha256(folder / "manifest.csv"),
        "split": split,
    }
    for result in results:
        result.facts |= origin
    return results


def _of_split(rows: Sequence[Row], split: str) -> list[Row]:
    return [row for row in rows if row["split"] == split]


def warn(split: str) -> None:
    """Says that a split is not for choosing."""
    if split != "val":
        print(f"{split} is to be measured once, with the final checkpoint: choose everything on val.", file=sys.stderr)


def summary(results: Sequence[Result]) -> str:
    """Returns a table of the metrics that are looked at first."""
    lines = []
    for result in results:
        for variant, metrics in result.by_variant().items():
            names = ("balanced_accuracy", "macro_auroc", "image_to_text_r5", "text_to_image_r5")
            shown = {name: metrics[name] for name in names if name in metrics and not np.isnan(metrics[name].value)}
            if not shown and "accuracy" in metrics:
                shown = {"accuracy": metrics["accuracy"]}
            cells = "  ".join(f"{name} {interval}" for name, interval in shown.items())
            first = next(iter(metrics.values()))
            lines.append(
                f"{result.protocol:12} {result.dataset:28} {variant:26} N {result.count:4} / {first.n:4}  {cells}"
            )
    return "\n".join(lines)


def write_results(results: Sequence[Result], path: Path) -> None:
    """Writes results as `medmoe evaluate` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps([result.to_json() for result in results], indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--split", required=True, choices=("val", "test", "external"))
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--name", help="name of the model in the results; by default the end of its path")
    parser.add_argument("--cache", type=Path, help="folder for features; by default `cache` beside OUT")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="TASK", help="tasks; by default all")
    parser.add_argument("--no-probes", action="store_true", help="leave out linear probes, which take longest")
    parser.add_argument("--probe-seeds", type=int, default=3)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    warn(given.split)
    results = evaluate(
        given.model,
        given.data,
        given.split,
        name=given.name,
        cache=given.cache or given.out.parent / "cache",
        only=given.only,
        probes=not given.no_probes,
        probe_seeds=given.probe_seeds,
        resamples=given.resamples,
        seed=given.seed,
    )
    write_results(results, given.out)
    print(summary(results))


if __name__ == "__main__":
    main()
