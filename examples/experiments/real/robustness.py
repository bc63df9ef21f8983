"""Measures what corrupted images, other words, missing images and groups do to zero-shot classification of real scans.

    python examples/experiments/real/robustness.py --data ../shared/real --out RUN/robustness.json
        [--model small] [--split test] [--page docs/pages/results.md] [--corrupted-images 30] [--severity 1 3 5]

One task for each kind of image, with the prompts of `tasks.py`; pneumonia is one task over both hospitals, so that
children (one of them) and adults (the other) are groups. Columns `sex`, `age` and `site` of the manifest are groups
too, where it has them. Of each task, `--corrupted-images` images are drawn by the seed and corrupted; all other parts
use all images. Paraphrases are the sentences of `tasks.py`, one template and one name at a time. With --page, the
tables replace what is between the two marks on that page.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from evaluate import warn, write_results
from manifest import Row, read_manifest, sha256
from report import counted, shown, write_page
from tasks import TASKS, evaluation_set

from medmoe_hf.common.packaged import packaged_folder
from medmoe_hf.evaluation.dataset import EvaluationSet, joined
from medmoe_hf.evaluation.results import DETAIL, Result
from medmoe_hf.evaluation.robustness import CORRUPTIONS, robustness
from medmoe_hf.hub.card import markdown_table
from medmoe_hf.inference.encoders import load_encoder

BEGIN = "<!-- robustness: written by examples/experiments/real/robustness.py -->"
END = "<!-- robustness: end -->"
MEASURED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pneumonia": (("pneumonia-children", "pneumonia-adults"), ("pneumonia",)),
    "knee-severe": (("knee-severe",), ("severe",)),
    "lung-ct": (("lung-ct",), ("benign", "malignant")),
    "brain-tumour": (("brain-tumour",), ("glioma", "meningioma", "pituitary tumour")),
    "breast-ultrasound": (("breast-ultrasound",), ("benign", "malignant")),
    "lung-histology": (("lung-histology",), ("adenocarcinoma", "squamous cell carcinoma")),
    "glaucoma": (("glaucoma",), ("glaucoma",)),
}
"""Name -> the tasks of `tasks.py` whose images are measured together, and the classes that are findings."""
PATIENTS = {"kermany-cxr": "children (kermany-cxr)", "nih-cxr14": "adults (nih-cxr14)"}
COLUMNS = ("sex", "age", "site")
METRIC = "balanced_accuracy"


def sets_of(rows: Sequence[Row], folder: Path, split: str) -> Iterator[EvaluationSet]:
    """Yields the set of each of `MEASURED` that has images of two classes in a split."""
    cells = {str(folder / row["file"]): row for row in rows}
    for name, (members, findings) in MEASURED.items():
        present = [member for member in members if len(TASKS[member].present(rows, [split])) > 1]
        if not present:
            continue
        parts = [evaluation_set(member, rows, folder, split) for member in present]
        data = joined(parts, name) if len(parts) > 1 else replace(parts[0], name=name)
        task = TASKS[present[0]]
        names = {own: task.classes[own].names for own in data.classes}
        number = min(map(len, names.values()))
        groups = {column: [cells[image].get(column, "") for image in data.images] for column in COLUMNS}
        if len(parts) > 1:
            data.facts = {**data.facts, "title": "Pneumonia, chest X-rays of children and adults"}
            groups["patients"] = [PATIENTS[cells[image]["source"]] for image in data.images]
        yield replace(
            data,
            groups={column: values for column, values in groups.items() if any(values)},
            negation={own: names[own][0] for own in findings if own in names},
            paraphrases={
                own: [_capitalized(template.format(word)) for template in task.templates for word in words[:number]]
                for own, words in names.items()
            },
        )


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def of_part(results: Sequence[Result], protocol: str) -> list[Result]:
    return [result for result in results if result.protocol == protocol]


def _title(result: Result) -> str:
    return str(result.facts.get("title", result.dataset))


def drop_table(results: Sequence[Result]) -> str:
    """Returns the drop of each corruption by task: the mean over severities, of balanced accuracy."""
    rows = []
    for result in of_part(results, "robustness"):
        some = result.metrics[f"all corruptions/{METRIC}_drop"]
        drops = [result.metrics[f"{name}/{METRIC}_drop"] for name in CORRUPTIONS]
        means = (f"{drop.value:.2f}" for drop in drops)
        rows.append([_title(result), f"{some.rows} ({some.n})", shown(some), *means])
    return markdown_table(("task", "N (subjects)", "mean drop", *CORRUPTIONS), rows)


def severity_table(results: Sequence[Result]) -> str:
    """Returns the mean over tasks of the drop at each severity."""
    found = of_part(results, "robustness")
    severities = found[0].facts["severities"]
    clean = {
        result.dataset: result.metrics[f"noise/{METRIC}"].value + result.metrics[f"noise/{METRIC}_drop"].value
        for result in found
    }
    rows = []
    for name in CORRUPTIONS:
        drops = [
            np.mean([clean[one.dataset] - one.metrics[f"{name}{DETAIL}{level}/{METRIC}"].value for one in found])
            for level in severities
        ]
        rows.append([name, *(f"{drop:.3f}" for drop in drops)])
    return markdown_table(("corruption", *(f"severity {level}" for level in severities)), rows)


def paraphrase_table(results: Sequence[Result]) -> str:
    """Returns how many labels other words change, and how far they move the accuracy."""
    rows = []
    for result in of_part(results, "paraphrases"):
        metrics = {key.removeprefix("all paraphrases/"): value for key, value in result.metrics.items()}
        wordings = sum(key.startswith("paraphrase ") and key.endswith("/flip_rate") for key in metrics)
        extremes = f"{metrics['lowest_accuracy'].value:.3f} to {metrics['highest_accuracy'].value:.3f}"
        changed = (shown(metrics[name]) for name in ("flip_rate", "any_flip"))
        rows.append(
            [_title(result), counted(result), str(wordings), *changed, shown(metrics["prompts/accuracy"]), extremes]
        )
    header = ("task", "N (subjects)", "wordings", "flip rate", "any flip", "accuracy, ensemble", "accuracy, wordings")
    return markdown_table(header, rows)


def negation_table(results: Sequence[Result]) -> str:
    """Returns how often the negated sentences score higher, by finding."""
    rows = []
    for result in of_part(results, "negation"):
        for label, words in result.facts["findings"].items():
            values = result.by_variant()[f"finding {label}"]
            names = ("negated_higher_present", "negated_higher_absent", "negation_balanced_accuracy", "auroc")
            rows.append([words, _title(result), *(shown(values[name]) for name in names)])
    header = ("finding", "task", '"no" higher, present', '"no" higher, absent', "balanced accuracy", "AUROC")
    return markdown_table(header, rows)


def text_only_table(results: Sequence[Result]) -> str:
    """Returns the accuracy with images, and of the labels that prompts yield without."""
    rows = []
    for result in of_part(results, "text-only"):
        variants = result.by_variant()
        names = ("with images", "mean image", "gray image", "most frequent class")
        accuracies = (shown(variants[name]["accuracy"]) for name in names)
        gain = shown(variants["mean image"]["gain_of_images_accuracy"])
        rows.append([_title(result), counted(result), *accuracies, gain])
    header = ("task", "N (subjects)", "with images", "mean image", "gray image", "most frequent class", "images' gain")
    return markdown_table(header, rows)


def group_table(results: Sequence[Result]) -> str:
    """Returns the metrics of each group, and the gaps between the best and the worst."""
    rows = []
    for result in of_part(results, "subgroups"):
        for variant, metrics in result.by_variant().items():
            some, gap = next(iter(metrics.values())), "" if " = " in variant else "_gap"
            cells = (shown(metrics.get(f"{name}{gap}")) for name in ("accuracy", METRIC, "macro_auroc"))
            label = f"{variant}: gap" if gap else variant
            rows.append([_title(result), label, f"{result.rows_of(some)} ({some.n})", *cells])
    return markdown_table(("task", "group", "N (subjects)", "accuracy", "balanced accuracy", "AUROC"), rows)


def sections(results: Sequence[Result]) -> str:
    """Returns all tables, with headings."""
    facts = results[0].facts
    drawn = ", ".join(f"{name:g}" for name in facts["severities"])
    lead = (
        f"Split `{facts['split']}`; weights {facts['weights_hash'][:12]}, similarity `{facts['score']}`, seed "
        f"{facts['seed']}, {facts['resamples']} resamples. In brackets: 95 % bootstrap intervals by subject."
    )
    dropped = (
        "Drop of balanced accuracy on the same images, drawn by the seed with the shares of classes. Severities are "
        f"{drawn} of 5; drops are means over them. Negative: better with the corruption."
    )
    tables = (
        ("Corrupted images", dropped, drop_table(results)),
        ("", "Mean over these tasks:", severity_table(results)),
        (
            "Paraphrases",
            "Share of images whose label differs from that of the ensemble if a single sentence describes each class.",
            paraphrase_table(results),
        ),
        (
            "Negation",
            'Share of images for which "there is no X" scores higher than "there is X": right is 0 where X is present '
            "and 1 where it is absent. The AUROC is that of the difference of the two.",
            negation_table(results),
        ),
        (
            "Without images",
            "Accuracy of the label that the prompts yield for the mean of the images and for plain gray; the gain is "
            "over the mean image.",
            text_only_table(results),
        ),
        ("Groups", "Best minus worst group, as they are on all images.", group_table(results)),
    )
    parts = [lead]
    for title, text, table in tables:
        parts += [*([f"#### {title}"] if title else []), text, table] if table else []
    omitted = dict.fromkeys(f"- {_title(one)}: {why}" for one in results for why in one.facts.get("omitted", ()))
    return "\n\n".join([*parts, *(["\n".join(omitted)] if omitted else [])])


def measure(
    model: str, data: Path, split: str, corrupted_images: int, severities: Sequence[int], resamples: int, seed: int
) -> list[Result]:
    """Runs the report on each of `MEASURED`."""
    rows = read_manifest(data)
    encoder = load_encoder(model)
    weights = Path(packaged_folder(model)) / "model.safetensors"
    origin = {"weights_hash": sha256(weights), "manifest_hash": sha256(data / "manifest.csv"), "split": split}
    results = []
    for one in sets_of(rows, data, split):
        results += robustness(
            encoder,
            one,
            severities=severities,
            corrupted_images=corrupted_images,
            resamples=resamples,
            seed=seed,
        )
    for result in results:
        result.facts |= origin
    if not results:
        raise SystemExit(f"No task has images of two classes in the split {split}.")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="folder of the checkpoint; by default that of the package")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="Markdown page to write the tables into")
    parser.add_argument("--corrupted-images", type=int, default=30, help="images of each task, drawn by the seed")
    parser.add_argument("--severity", type=int, nargs="+", default=[1, 3, 5], choices=(1, 2, 3, 4, 5))
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    warn(given.split)
    results = measure(
        given.model, given.data, given.split, given.corrupted_images, given.severity, given.resamples, given.seed
    )
    write_results(results, given.out)
    text = sections(results)
    if given.page:
        write_page(given.page, text, BEGIN, END)
    else:
        print(text)


if __name__ == "__main__":
    main()
