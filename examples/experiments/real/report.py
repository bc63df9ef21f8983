"""Tables of the results on real scans, for the results page and the model card: no number is typed by hand.

    python examples/experiments/real/report.py RUN [--page docs/pages/results.md] [--readme README.md]

RUN is the folder with `test.json` and `external.json` of `evaluate.py`, `crossings.json`, `twins.json` and
`check.json`; what is missing is left out. With --page the tables replace what is between the two marks on that page,
and with --readme a selection of them.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tasks import CROSSINGS, TASKS

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import SourceError
from medmoe_hf.evaluation.intervals import Interval
from medmoe_hf.evaluation.linear_probe import FRACTIONS
from medmoe_hf.evaluation.results import Result
from medmoe_hf.hub.card import markdown_table

BEGIN = "<!-- real scans: written by examples/experiments/real/report.py -->"
END = "<!-- real scans: end -->"
SHIPPED = "shipped task"
"""Name of the variant in results of zero-shot classification, as `evaluate.py` writes it."""
TOGETHER = "shipped-tasks"
"""Protocol of the result over all of them."""
FILES = ("val", "test", "external", "crossings", "twins", "check", "rejection")

Run = Mapping[str, Any]


def read_run(folder: str | Path) -> dict[str, Any]:
    """Reads the files of a run.

    Args:
        folder: Folder with JSON files; those of `evaluate.py` and `leave_one_out.py` become lists of `Result`.

    Raises:
        SourceError: If there is none.
    """
    found: dict[str, Any] = {}
    for name in FILES:
        path = Path(folder) / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = [Result.from_json(entry) for entry in content] if isinstance(content, list) else content
    if not found:
        raise SourceError(f"{folder} has none of {', '.join(f'{name}.json' for name in FILES)}.")
    return found


def shown(interval: Interval | None) -> str:
    """Returns a value with its interval, three digits each."""
    if interval is None or np.isnan(interval.value):
        return "–"
    if np.isnan(interval.low):
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def counted(result: Result) -> str:
    """Returns the number of images, and of subjects in brackets."""
    subjects = next(iter(result.metrics.values())).n
    return f"{result.count} ({subjects})"


def measured(run: Run, split: str, protocol: str) -> list[Result]:
    """Returns the results of a protocol in one file of a run, such as that of a split."""
    return [result for result in run.get(split, ()) if result.protocol == protocol]


def probes_of(results: Sequence[Result]) -> dict[str, Mapping[str, Interval]]:
    """Returns the metrics of the linear probes, by task."""
    return {result.dataset: result.metrics for result in results if result.protocol == "linear-probe"}


def routing_table(run: Run, split: str) -> str:
    """Returns the accuracy of the image router: on all sources, by modality and by source."""
    rows = []
    for result in measured(run, split, "routing"):
        metrics = result.by_variant()["image router"]
        balanced = shown(metrics["balanced_accuracy"]) if result.dataset == "all sources" else "–"
        rows.append([result.dataset, counted(result), shown(metrics["accuracy"]), balanced])
    return markdown_table(("images", "N (subjects)", "accuracy", "balanced accuracy"), rows)


def zero_shot_table(run: Run, split: str) -> str:
    """Returns zero-shot classification by task, beside chance and the linear probes of the two baselines."""
    probes = probes_of(run.get(split, ()))
    rows = []
    for result in measured(run, split, "zero-shot"):
        metrics = result.by_variant()[result.facts.get("similarity", "global")]
        classes = len(result.facts["count_by_class"])
        balanced, what = metrics["balanced_accuracy"], ""
        if np.isnan(balanced.value):
            balanced, what = metrics["accuracy"], "accuracy "
        auroc = metrics["macro_auroc"] if classes == 2 else None
        probe = probes.get(result.dataset, {})
        baselines = [shown(probe.get(f"{name} 100%/balanced_accuracy")) for name in ("imagenet", "pixels")]
        title = result.facts.get("title", result.dataset)
        rows.append([title, counted(result), f"{1 / classes:.2f}", what + shown(balanced), shown(auroc), *baselines])
    header = ("task", "N (subjects)", "chance", "balanced accuracy", "AUROC", "probe, ImageNet", "probe, 16x16 pixels")
    return markdown_table(header, rows)


def shipped_table(run: Run, split: str) -> str:
    """Returns what the checkpoint's own tasks give, beside plain zero-shot classification of the same images."""
    rows = []
    for result in measured(run, split, "zero-shot"):
        own = result.by_variant().get(SHIPPED)
        if own is None:
            continue
        facts = result.facts["shipped"]
        plain = result.by_variant()[result.facts.get("similarity", "global")]
        name = "balanced_accuracy" if "balanced_accuracy" in own else "accuracy"
        what = "" if name == "balanced_accuracy" else "accuracy "
        rows.append(
            [
                result.facts.get("title", result.dataset),
                f"{facts['task']}, {facts['score']}",
                counted(result),
                what + shown(plain[name]),
                what + shown(own[name]),
                shown(own["ece_before"]),
                shown(own["ece"]),
                shown(own["coverage"]),
                shown(own["set_size"]),
            ]
        )
    for result in measured(run, split, TOGETHER):
        own = result.by_variant()[SHIPPED]
        shares = [shown(own[name]) for name in ("ece_before", "ece", "coverage", "set_size")]
        number = result.facts["tasks"]
        named = "1 task" if number == 1 else f"{number} tasks"
        rows.append([result.facts["title"], named, counted(result), "–", "–", *shares])
    if not rows:
        return ""
    header = (
        "images", "task, score", "N (subjects)", "balanced accuracy, plain", "with the task",
        "calibration error, plain", "with the task", "coverage of 90 % sets", "classes in a set",
    )  # fmt: skip
    return markdown_table(header, rows)


def uncalibrated(run: Run) -> str:
    """Returns the tasks of the checkpoint that are not calibrated, as a sentence."""
    names = dict.fromkeys(
        f"`{result.facts['shipped']['task']}`"
        for split in ("test", "external")
        for result in measured(run, split, "zero-shot")
        if "shipped" in result.facts and not result.facts["shipped"]["calibrated"]
    )
    return f"Too few images in `val`, so that prompts only are shipped: {', '.join(names)}." if names else ""


def probe_table(run: Run, split: str) -> str:
    """Returns linear probes as means over tasks, and the differences to the baselines."""
    rows = []
    for result in measured(run, split, "linear-probe"):
        if result.dataset != "mean over tasks":
            continue
        for fraction in FRACTIONS:
            share = f"{fraction:.0%}"
            kinds = ("v_g", "embedding", "imagenet", "pixels", "v_g - imagenet", "embedding - imagenet")
            rows.append([share, *(shown(result.metrics.get(f"{kind} {share}/balanced_accuracy")) for kind in kinds)])
    header = ("train rows", "v_g", "embedding", "ImageNet", "16x16 pixels", "v_g − ImageNet", "embedding − ImageNet")
    return markdown_table(header, rows)


def probe_tasks_table(run: Run, split: str, share: str = "10%") -> str:
    """Returns linear probes by task, with a share of the train rows."""
    rows = [
        [
            result.facts.get("title", result.dataset),
            counted(result),
            *(
                shown(result.metrics.get(f"{kind} {share}/balanced_accuracy"))
                for kind in ("v_g", "imagenet", "pixels", "v_g - imagenet")
            ),
        ]
        for result in measured(run, split, "linear-probe")
        if result.dataset != "mean over tasks"
    ]
    return markdown_table(("task", "N (subjects)", "v_g", "ImageNet", "16x16 pixels", "v_g − ImageNet"), rows)


def retrieval_table(run: Run, split: str) -> str:
    """Returns recall on the sources' texts, beside chance."""
    rows = []
    for result in measured(run, split, "retrieval"):
        metrics = result.by_variant()[result.facts.get("similarity", "global")]
        for direction, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            cells = [
                f"{shown(metrics[f'{direction}_r{k}'])}, chance {result.facts['chance'][f'r{k}']:.2f}"
                for k in (1, 5, 10)
            ]
            rows.append([result.dataset, counted(result), arrow, *cells])
    return markdown_table(("texts", "N (subjects)", "direction", "R@1", "R@5", "R@10"), rows)


def crossing_table(run: Run) -> str:
    """Returns the AUROC on sources that a model has not seen, beside that of the bare ImageNet backbone."""
    probes = probes_of(run.get("crossings", ()))
    rows = []
    for result in measured(run, "crossings", "zero-shot"):
        score = result.facts.get("similarity", "global")
        probe = probes[result.dataset]
        rows.append(
            [
                CROSSINGS[result.dataset].title,
                f"{result.facts['split']}, {counted(result)}",
                shown(result.metrics[f"{score}/macro_auroc"]),
                shown(probe["imagenet 100%/macro_auroc"]),
                shown(probe["pixels 100%/macro_auroc"]),
                shown(result.metrics[f"{score} - imagenet 100%/macro_auroc"]),
            ]
        )
    header = ("crossing", "split, N (subjects)", "zero-shot AUROC", "probe, ImageNet", "probe, pixels", "difference")
    return markdown_table(header, rows)


def twins_table(run: Run) -> str:
    """Returns means and ranges over seeds of the variants with and without experts."""
    twins = run.get("twins")
    if not twins:
        return ""
    rows = []
    for name, values in twins["table"].items():
        some = next(iter(twins["runs"][name].values()))
        rows.append(
            [
                twins["labels"][name],
                f"{some['parameters'] / 1e6:.2f} M",
                str(len(twins["runs"][name])),
                *(_mean_and_range(own) for own in values.values()),
            ]
        )
    header = ("variant", "parameters", "seeds", "tasks", "other sources, AUROC", "routing", "routing, other sources")
    trained = (
        f"Trained for {twins['steps']} steps on images of {twins['image_size']} pixels"
        f"{''.join(f', without {source}' for source in twins['without'])}. "
        f"Frozen: {', '.join(f'`{name}`' for name in twins['freeze']) or 'nothing'}."
    )
    return f"{trained}\n\n{markdown_table(header, rows)}"


def _mean_and_range(values: Sequence[float]) -> str:
    known = [value for value in values if value is not None and not np.isnan(value)]
    if not known:
        return "–"
    return f"{statistics.fmean(known):.3f} ({min(known):.3f} to {max(known):.3f})"


def rejection_table(run: Run) -> str:
    """Returns how well foreign pictures are told from scans, and how many of both are refused."""
    found = run.get("rejection")
    if not found:
        return ""
    rows = []
    for part, named in (("foreign", "{}"), ("splits", "scans, {}"), ("sources", "external, {}")):
        for name, entry in found[part].items():
            refused, auroc = (_of_list(entry.get(key)) for key in ("refused", "auroc"))
            rows.append([named.format(name), f"{entry['images']} ({entry['subjects']})", refused, auroc])
    return markdown_table(("pictures", "N (subjects)", "share refused", "AUROC against `test`"), rows)


def _of_list(numbers: Sequence[float | None] | None) -> str:
    value, low, high = (float("nan") if one is None else one for one in numbers or (None, None, None))
    return shown(Interval(value, low, high, n=1))


def notes(run: Run) -> str:
    """Returns what limits the tasks that were measured, as a list."""
    names = [result.dataset for split in ("test", "external") for result in measured(run, split, "zero-shot")]
    lines = [f"- {TASKS[name].title}: {TASKS[name].note}" for name in names if TASKS[name].note]
    return "\n".join(dict.fromkeys(lines))


def setup_table(run: Run) -> str:
    """Returns what identifies the model and the data of a run."""
    results = [result for split in ("test", "external", "val") for result in run.get(split, ())]
    if not results:
        return ""
    facts = results[0].facts
    tasks = [["tasks (SHA-256)", facts["tasks_hash"]]] if "tasks_hash" in facts else []
    rows = [
        ["weights (SHA-256)", facts["weights_hash"]],
        *tasks,
        ["weights, configuration, tokenizer and code (SHA-256)", facts["model_hash"]],
        ["manifest of the images (SHA-256)", facts["manifest_hash"]],
        ["similarity of zero-shot and retrieval", facts.get("similarity", "global")],
        ["resamples, seed of the bootstrap", f"{facts['resamples']}, {facts['seed']}"],
        ["versions", [f"{name} {version}" for name, version in facts["versions"].items()]],
    ]
    return markdown_table(("what", "value"), rows)


_SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("Image router, `test`", "No text is given. Sources of `test` are those of the training, with other subjects.",
     lambda run: routing_table(run, "test")),
    ("Image router, `external`", "Sources that no training image comes from.",
     lambda run: routing_table(run, "external")),
    ("Zero-shot, `test`",
     "Classes described by sentences. The two probes beside it are trained on all train rows of the task.",
     lambda run: zero_shot_table(run, "test")),
    ("Zero-shot, `external`", "Where a class has no image, the table has the accuracy.",
     lambda run: zero_shot_table(run, "external")),
    ("Tasks of the checkpoint, `test`",
     "What `model.classify` answers: score, temperature, biases, thresholds and sets were fitted on `val`. The "
     "calibration error is the expected one, of 15 bins; plain is a softmax of the model's own similarity.",
     lambda run: shipped_table(run, "test")),
    ("Tasks of the checkpoint, `external`",
     "Calibrated on other sources, so that neither the calibration nor the coverage is guaranteed. Where a class has "
     "no image, the table has the accuracy.",
     lambda run: shipped_table(run, "external")),
    ("Tasks of the checkpoint that are not calibrated", "", uncalibrated),
    ("Across sources",
     "Trained without the measured source; the probe is trained on the same source as the model was.", crossing_table),
    ("Linear probes, `test`, mean over tasks",
     "Balanced accuracy. v_g is the image embedding before its projection, `embedding` the one in the shared space.",
     lambda run: probe_table(run, "test")),
    ("Linear probes, `test`, 10 % of the train rows", "Balanced accuracy.",
     lambda run: probe_tasks_table(run, "test")),
    ("Retrieval, `test`", "Texts that came with the images; texts of another modality are easy to rule out.",
     lambda run: retrieval_table(run, "test")),
    ("Retrieval, `external`", "", lambda run: retrieval_table(run, "external")),
    ("Routed experts, a shared one, or none",
     "Mean over seeds, in brackets the range. Same data, order and number of steps. `tasks`: mean balanced accuracy "
     "of zero-shot classification.", twins_table),
    ("Refused pictures",
     "The rejector was fitted on `train`, and its limits accept 95 % of `val`. Foreign pictures are of `foreign.py`, "
     "of the half that nothing was chosen on; parts of one photograph count as one subject. For scans, being refused "
     "is the error.", rejection_table),
    ("What limits these tasks", "", notes),
    ("Setup", "", setup_table),
)  # fmt: skip


def sections(run: Run, level: int = 3) -> str:
    """Returns all tables that a run has data for, with headings.

    Args:
        run: Of `read_run`.
        level: Level of the headings.
    """
    parts = []
    for title, lead, table in _SECTIONS:
        body = table(run)
        if body:
            parts.append("\n\n".join(part for part in (f"{'#' * level} {title}", lead, body) if part))
    return "\n\n".join(parts)


_SUMMARY = (
    ("test", "pneumonia-children", "macro_auroc"),
    ("test", "pneumonia-adults", "macro_auroc"),
    ("test", "brain-tumour", "balanced_accuracy"),
    ("test", "lung-ct", "balanced_accuracy"),
    ("test", "breast-ultrasound", "balanced_accuracy"),
    ("test", "lung-histology", "balanced_accuracy"),
    ("test", "glaucoma", "macro_auroc"),
    ("external", "fundus-external", "balanced_accuracy"),
)
_METRICS = {"macro_auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}


def summary_table(run: Run) -> str:
    """Returns a selection for the README: the router on sources it has not seen, and zero-shot classification."""
    rows = []
    for split, seen in (("test", "other subjects"), ("external", "other sources")):
        for result in measured(run, split, "routing"):
            if result.dataset == "all sources":
                value = shown(result.by_variant()["image router"]["balanced_accuracy"])
                rows.append([f"image router, balanced accuracy, {seen}", counted(result), value, "–"])
    for split, task, metric in _SUMMARY:
        probes = probes_of(run.get(split, ()))
        for result in measured(run, split, "zero-shot"):
            if result.dataset == task:
                value = result.by_variant()[result.facts.get("similarity", "global")][metric]
                probe = probes.get(task, {}).get(f"imagenet 100%/{metric}")
                rows.append([f"{TASKS[task].title}, {_METRICS[metric]}", counted(result), shown(value), shown(probe)])
    probes = probes_of(run.get("crossings", ()))
    for result in measured(run, "crossings", "zero-shot"):
        value = result.metrics[f"{result.facts.get('similarity', 'global')}/macro_auroc"]
        baseline = shown(probes[result.dataset]["imagenet 100%/macro_auroc"])
        rows.append([f"{CROSSINGS[result.dataset].title}, AUROC", counted(result), shown(value), baseline])
    header = ("zero-shot, on subjects or sources that were not trained on", "N (subjects)", "small", "ImageNet probe")
    return markdown_table(header, rows)


def write_page(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replaces what is between two marks on a page.

    Args:
        path: The page.
        text: What to write.
        begin: The line before it.
        end: The line behind it.

    Raises:
        SourceError: If the page lacks the marks.
    """
    content = path.read_text(encoding="utf-8")
    before, first, rest = content.partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise SourceError(f"{path} lacks the lines\n{begin}\n{end}\nbetween which the tables are written.")
    with atomic_write(path) as partial:
        partial.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with the JSON files")
    parser.add_argument("--page", type=Path, help="Markdown page to write the tables into")
    parser.add_argument("--readme", type=Path, help="Markdown page to write a selection into")
    given = parser.parse_args(arguments)
    run = read_run(given.run)
    if given.page:
        write_page(given.page, sections(run))
    if given.readme:
        write_page(given.readme, summary_table(run))
    if not given.page and not given.readme:
        print(sections(run))


if __name__ == "__main__":
    main()
