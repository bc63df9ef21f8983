"""Reports of an evaluation: Markdown tables, a short table for a terminal, and a folder with figures."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmoe_hf.common.console import text_table
from medmoe_hf.common.files import atomic_dir
from medmoe_hf.evaluation.figures import draw_confusions, draw_heatmaps, draw_probes, draw_recalls, draw_reliability
from medmoe_hf.evaluation.intervals import Interval
from medmoe_hf.evaluation.results import DETAIL, Result, metric_name

_QUOTED_OF_FINDINGS = ("macro_average_precision", "chexpert5_auroc", "auroc", "average_precision")
_QUOTED = {
    "zero-shot": ("accuracy", "macro_auroc", "routing_accuracy"),
    "linear-probe": ("accuracy", "macro_auroc"),
    "retrieval": ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5"),
    "grounding": ("pointing", "contrast_to_noise", "same_map"),
    "routing": ("accuracy", "balanced_accuracy"),
    "robustness": ("macro_auroc", "accuracy_drop", "macro_auroc_drop"),
    "paraphrases": ("flip_rate", "any_flip", "lowest_accuracy"),
    "negation": ("negated_higher_present", "negated_higher_absent", "negation_balanced_accuracy"),
    "text-only": ("accuracy", "balanced_accuracy", "same_label"),
    "subgroups": ("accuracy", "macro_auroc", "accuracy_gap", "macro_auroc_gap"),
    "comparison": ("accuracy", "macro_auroc"),
}
"""Metrics of the short table; a recipe's own is added."""


def to_markdown(results: Sequence[Result]) -> str:
    """Formats results as Markdown: a table per protocol, a row per set, model and variant; then data and runs.

    Args:
        results: Results of any protocols.

    Returns:
        The complete page.
    """
    lines = [
        "# Evaluation",
        "",
        "In brackets: 95 % bootstrap intervals. They hold for images like these, and say nothing about other "
        "scanners, hospitals or people.",
    ]
    for warning in _overlap_warnings(results):
        lines += ["", f"**Warning:** {warning}"]
    for protocol in dict.fromkeys(result.protocol for result in results):
        chosen = [result for result in results if result.protocol == protocol]
        names = list(dict.fromkeys(key.rsplit("/", 1)[1] for result in chosen for key in result.metrics))
        quoted = {result.facts.get("metric") for result in chosen}
        head = [f"**{metric_name(name)}**" if name in quoted else metric_name(name) for name in names]
        lines += ["", f"## {protocol}", "", _row(["set", "N", "model", "variant", *head])]
        lines.append(_row(["---"] * (4 + len(names))))
        for result in sorted(chosen, key=lambda result: [other.dataset for other in chosen].index(result.dataset)):
            for variant, metrics in result.by_variant().items():
                cells = [_cell(metrics[name]) if name in metrics else "" for name in names]
                lines.append(_row([result.dataset, _counted(result, metrics), result.model, variant, *cells]))
        for note in _notes(chosen):
            lines += ["", note]
    lines += ["", "## Data", ""]
    lines += dict.fromkeys(line for result in results for line in _data_lines(result))
    lines += ["", "## Runs", ""]
    lines += dict.fromkeys(_run_line(result) for result in results)
    return "\n".join(lines) + "\n"


def summary(results: Sequence[Result]) -> str:
    """Formats the most quoted metrics for a terminal: a table per protocol, with notes.

    Args:
        results: Results of any protocols.

    Returns:
        Aligned text.
    """
    parts = []
    for protocol in dict.fromkeys(result.protocol for result in results):
        chosen = [result for result in results if result.protocol == protocol]
        present = dict.fromkeys(key.rsplit("/", 1)[1] for result in chosen for key in result.metrics)
        wanted = {*_QUOTED[protocol], *(result.facts.get("metric") for result in chosen)}
        if protocol == "zero-shot" and any("known_by_class" in result.facts for result in chosen):
            wanted |= {*_QUOTED_OF_FINDINGS}
        names = [name for name in present if name in wanted]
        several = len({result.model for result in chosen}) > 1
        rows = [["set", *["model"] * several, "variant", "N", *map(metric_name, names)]]
        for result in chosen:
            for variant, metrics in result.by_variant().items():
                if DETAIL in variant or not metrics.keys() & set(names):
                    continue
                cells = [_cell(metrics[name]) if name in metrics else "" for name in names]
                model = [result.model] * several
                rows.append([result.dataset, *model, variant, _counted(result, metrics), *cells])
        notes = "".join(f"\n{note}" for note in _notes(chosen, brief=True))
        parts.append(f"{protocol}\n\n{text_table(rows)}\n{notes}".rstrip())
    parts += [f"warning: {warning}" for warning in _overlap_warnings(results)]
    return "\n\n".join(parts)


def _overlap_warnings(results: Sequence[Result]) -> list[str]:
    """Public sets of the data that published models were trained on, a sentence per set of results."""
    titles: dict[tuple[str, ...], dict[str, None]] = {}
    for result in results:
        if seen := result.facts.get("trained_on_by"):
            titles.setdefault(tuple(seen), {})[result.facts.get("title", result.dataset)] = None
    return [
        f"{', '.join(names)}: {' '.join(seen)} A model that was trained on them may have seen these images."
        for seen, names in titles.items()
    ]


def _counted(result: Result, metrics: Mapping[str, Interval]) -> str:
    """Number of images of a variant, and of subjects or cases if these are fewer."""
    images = max(result.rows_of(interval) for interval in metrics.values())
    if result.facts.get("unit") == "case":
        return f"{images} cases ({result.count} images)"
    units = min(interval.n for interval in metrics.values())
    return str(images) if units >= images else f"{images} ({units} subjects)"


def _notes(results: Sequence[Result], brief: bool = False) -> list[str]:
    """Notes for the readers of a protocol's table.

    Args:
        results: Results of one protocol.
        brief: Whether explanations are left out.
    """
    notes = []
    if results[0].protocol == "grounding":
        words = ", ".join(dict.fromkeys(word for result in results for word in result.facts["nonsense"]))
        notes.append(f"Nonsense ({words}): what the map of a meaningless word shows does not depend on the word.")
        if not brief:
            notes.append(
                "CNR ignores the sign: a map that is coldest in the box has a high one too, so read it together with "
                "the pointing game. `same map` is the correlation of the maps of a phrase and of nonsense."
            )
    if results[0].protocol == "linear-probe":
        notes += [] if brief else [_spread_of_draws(result) for result in results]
        notes += _equal_rows(results)
    notes += [_always_one(result) for result in results if result.protocol == "retrieval"]
    if not brief:
        notes += _ROBUSTNESS_NOTES.get(results[0].protocol, [])
    for result in results:
        facts = result.facts
        if 0 < facts.get("corrupted_images", 0) < result.count:
            notes.append(f"{result.dataset}: {facts['corrupted_images']} images were drawn and corrupted.")
        worst = [f"{what}: {names}" for what, names in facts.get("worst_groups", {}).items()]
        notes += [f"{result.dataset}, {result.model}, worst group by {', '.join(worst)}."] if worst else []
        notes += [f"{result.dataset}: {why}" for why in facts.get("omitted", ())]
    notes += _not_always_defined(results)
    return [note for note in dict.fromkeys(notes) if note]


_ROBUSTNESS_NOTES = {
    "robustness": [
        "A corruption without a severity is the mean over severities; a drop is what the same images lose by it. "
        "Severities are those of this package: compare models by them, not with corruptions of others."
    ],
    "paraphrases": [
        "Flip rate: share of labels that other words change, mean over paraphrases; `any flip`: share that at least "
        "one paraphrase changes. Without `paraphrases` in the recipe, one sentence per class replaces its ensemble."
    ],
    "negation": [
        'How often "there is no X" scores higher than "there is X": 0 is right where X is present, 1 where it is '
        "absent. A balanced accuracy of 0.5 means that the negation is not understood."
    ],
    "text-only": [
        "Labels that the prompts yield without an image: all images get the one of their mean, or of plain gray."
    ],
    "subgroups": [
        "A gap is between the best and the worst group as they are on all images. Of several groups the extremes "
        "differ by chance too, so a gap is evidence only if its interval is far from 0."
    ],
    "comparison": ["Differences to the model after the minus sign, on the same images and resamples."],
}


def _spread_of_draws(result: Result) -> str:
    facts = result.facts
    metric = metric_name(facts.get("seed_metric", "accuracy"))
    seeds = max(len(values) for values in facts["seeds"].values())
    spread = "; ".join(
        f"{variant} {np.std(values, ddof=1):.3f}" for variant, values in facts["seeds"].items() if len(values) > 1
    )
    return (
        f"{result.dataset}, {result.model}: means over {seeds} draws of the training {facts.get('unit', 'image')}s; "
        f"standard deviation of the {metric} over draws: {spread}. {facts['not_converged']} fits did not converge."
    )


def _equal_rows(results: Sequence[Result]) -> list[str]:
    """Shares of a small training split that consist of the same images."""
    sets: dict[str, list[str]] = {}
    for result in results:
        for shares in result.facts.get("same_parts", ()):
            count = result.facts["trained_on"][shares[0]]
            sets.setdefault(" and ".join(shares), []).append(f"{count} of {result.dataset}")
    return [
        f"The rows of {shares} must be equal: each share has at least one image of each class, and so these are the "
        f"same training images ({', '.join(dict.fromkeys(found))})."
        for shares, found in sets.items()
    ]


def _always_one(result: Result) -> str:
    """Names the recalls at k that are 1 because there are at most k candidates."""
    ks = [name for name, chance in result.facts.get("chance", {}).items() if chance >= 1]
    if not ks:
        return ""
    names = " and ".join(f"R@{name.removeprefix('r')}" for name in ks)
    return f"{result.dataset}: too small for {names}, which is 1 among {result.count} pairs for any model."


def _not_always_defined(results: Sequence[Result]) -> list[str]:
    """Names the metrics that are undefined in some resamples."""
    shares: dict[str, float] = {}
    names: dict[str, None] = {}
    for result in results:
        for key, interval in result.metrics.items():
            if interval.undefined and not math.isnan(interval.value):
                names[metric_name(key.rsplit("/", 1)[1])] = None
                share = interval.undefined / result.facts["resamples"]
                shares[result.dataset] = max(shares.get(result.dataset, 0.0), share)
    if not shares:
        return []
    listed = ", ".join(f"{share:.0%} in {name}" for name, share in shares.items())
    return [
        f"Resamples of sets this small may lack images of a class, which these metrics need: {', '.join(names)}. "
        f"Their intervals leave such resamples out: {listed}."
    ]


def _size(result: Result) -> str:
    """Number of test images; of a probe by case also of cases, by split."""
    facts = result.facts
    if facts.get("unit") != "case":
        return f"N = {result.count}"
    return "cases with averaged features, " + ", ".join(
        f"{split} {units['cases']} of {units['images']} images" for split, units in facts["units"].items()
    )


def _data_lines(result: Result) -> list[str]:
    facts, lines = result.facts, []
    if "count_by_class" in facts:
        known = {name: f" of {count}" for name, count in facts.get("known_by_class", {}).items()}
        counts = ", ".join(f"{name} {count}{known.get(name, '')}" for name, count in facts["count_by_class"].items())
        lines.append(f"- {result.protocol}, {result.dataset}: {_size(result)}: {counts}")
    if facts.get("split"):
        lines.append(f"- {result.protocol}, {result.dataset}: {facts['split']}")
    title = facts.get("title", result.dataset)
    lines += [f"- {title}, {key}: {_one_line(facts[key])}" for key in ("source", "license", "notes") if facts.get(key)]
    lines += [f"- {title}, overlap with training data: {_one_line(overlap)}" for overlap in facts.get("overlaps", [])]
    return lines


def _run_line(result: Result) -> str:
    facts = result.facts
    texts = f", texts {facts['prompts']}" if facts["prompts"] else ""
    return (
        f"- {result.protocol}, {result.dataset}, {result.model}: {facts['weights']} weights, preprocessing "
        f"{facts['preprocessing']}{texts}, seed {facts['seed']}, {facts['resamples']} resamples"
    )


def write(results: Sequence[Result], folder: str | Path, force: bool = False) -> None:
    """Writes `results.json`, `results.md` and the figures, atomically.

    Args:
        results: Results of any protocols.
        folder: Folder to create.
        force: Whether an existing folder is replaced.

    Raises:
        FileExistsError: If it exists and `force` is False.
    """
    with atomic_dir(folder, force) as partial:
        content = [result.to_json() for result in results]
        (partial / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (partial / "results.md").write_text(to_markdown(results), encoding="utf-8")
        for protocol in dict.fromkeys(result.protocol for result in results):
            chosen = [result for result in results if result.protocol == protocol]
            if confused := [result for result in chosen if result.confusions]:
                draw_confusions(confused, partial / f"{protocol}_confusion.png")
            if any(result.calibrations for result in chosen):
                draw_reliability(chosen, partial / f"{protocol}_reliability.png")
            if protocol == "retrieval":
                draw_recalls(chosen, partial / "retrieval_recall.png")
            if protocol == "linear-probe":
                draw_probes(chosen, partial / "linear-probe.png")
            for result in chosen:
                if result.examples:
                    name = re.sub(r"[^\w.-]+", "_", f"{protocol}_{result.dataset}_{result.model}")
                    draw_heatmaps(result, partial / f"{name}_heatmaps.png")


def _cell(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "not defined"
    return str(interval)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
