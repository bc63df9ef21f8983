"""What an evaluation found: numbers with intervals, as JSON, as Markdown, as figures and for a model card."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from medmoe_hf.common.console import text_table
from medmoe_hf.common.files import atomic_dir
from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.figures import draw_confusions, draw_heatmaps, draw_probes, draw_recalls, draw_reliability
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import calibration, classification_metrics
from medmoe_hf.evaluation.recipes import EvaluationSet
from medmoe_hf.inference.encoders import Encoder, fingerprint

PACKAGES = ("medmoe_hf", "torch", "torchvision", "transformers", "numpy", "scikit-learn", "pillow")

_TASKS = {
    "zero-shot": "zero-shot-image-classification",
    "linear-probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "grounding": "visual-grounding",
    "routing": "image-classification",
}
# The names by which the Hub knows a metric; others go by their own.
_METRIC_TYPES = {"macro_auroc": "roc_auc", "macro_f1": "f1", "macro_average_precision": "average_precision"}


_QUOTED = {
    "zero-shot": ("accuracy", "macro_auroc", "routing_accuracy"),
    "linear-probe": ("accuracy", "macro_auroc"),
    "retrieval": ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5"),
    "grounding": ("pointing", "contrast_to_noise", "same_map"),
    "routing": ("accuracy", "balanced_accuracy"),
}
"""Metrics of the short table; a recipe's own is added."""


@dataclass
class HeatmapExample:
    """One row of a heat-map sheet.

    Attributes:
        image: (H, W, 3) uint8.
        phrase, nonsense: what was looked for, and the control.
        heatmap, nonsense_heatmap: (H, W).
        boxes: left, top, right, bottom in pixels.
        label: of the row: the modality, say.
    """

    image: np.ndarray
    phrase: str
    heatmap: np.ndarray
    nonsense: str
    nonsense_heatmap: np.ndarray
    boxes: list[Any]
    label: str


@dataclass
class Confusion:
    """How often class i was taken for class j: `counts` (C, C), row i the truth."""

    classes: list[str]
    counts: list[list[int]]


@dataclass
class Result:
    """One protocol, one model, one set.

    Attributes:
        protocol: zero-shot, linear-probe, retrieval, grounding or routing.
        model, dataset: their names.
        count: images that were measured on.
        metrics: `variant/metric`, such as `global/accuracy`, to its value and interval. The variant says which score,
            features or router it is of.
        facts: what a reader needs to judge or repeat it: counts by class, hashes of prompts and preprocessing, seeds,
            versions, licence and overlaps of the data.
        confusions, calibrations: by variant; the latter as `metrics.calibration` gives them.
        examples: for the heat-map sheet; only in the figures, never in the JSON.
    """

    protocol: str
    model: str
    dataset: str
    count: int
    metrics: dict[str, Interval]
    facts: dict[str, Any]
    confusions: dict[str, Confusion] = field(default_factory=dict)
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[HeatmapExample] = field(default_factory=list)

    def add(self, variant: str, measured: Mapping[str, Interval]) -> None:
        """Takes what `bootstrap` gave for one variant."""
        self.metrics |= {f"{variant}/{name}": interval for name, interval in measured.items()}

    def add_classification(
        self, variant: str, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], subjects: Any
    ) -> None:
        """Measures how often probabilities are right, and how far they can be believed.

        Args:
            probabilities: (N, C).
            labels: (N,) 0..C-1.
            subjects: (N,) for the bootstrap, or None.
        """

        def metric(rows: np.ndarray, truth: np.ndarray) -> dict[str, float]:
            calibrated = calibration(rows, truth)
            return classification_metrics(rows, truth) | {name: calibrated[name] for name in ("ece", "brier")}

        resamples, seed = self.facts["resamples"], self.facts["seed"]
        self.add(variant, bootstrap(metric, probabilities, labels, groups=subjects, resamples=resamples, seed=seed))
        self.calibrations[variant] = calibration(probabilities, labels)
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (labels, probabilities.argmax(axis=1)), 1)
        self.confusions[variant] = Confusion(list(classes), counts.tolist())

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes; NaN and infinity become null."""
        return _plain({name: value for name, value in _shallow(self).items() if name != "examples"})

    def rows_of(self, interval: Interval) -> int:
        """How many images an interval of this result was measured on: a variant may leave out some."""
        return self.count if interval.rows is None else interval.rows

    def by_variant(self) -> dict[str, dict[str, Interval]]:
        """The metrics of each variant."""
        variants: dict[str, dict[str, Interval]] = {}
        for key, interval in self.metrics.items():
            variant, metric = key.rsplit("/", 1)
            variants.setdefault(variant, {})[metric] = interval
        return variants

    def to_eval_results(self) -> list[EvalResult]:
        """For `ModelCardData(eval_results=...)`; what could not be measured is left out."""
        return [
            EvalResult(
                task_type=_TASKS[self.protocol],
                task_name=f"{self.protocol} ({variant})",
                dataset_type=self.dataset,
                dataset_name=self.facts.get("title", self.dataset),
                metric_type=_METRIC_TYPES.get(metric, metric),
                metric_name=f"{_words(metric)}, {variant}",
                metric_value=round(interval.value, 4),
                metric_args={
                    "variant": variant,
                    "images": self.rows_of(interval),
                    **{
                        f"{end}_95": round(value, 4)
                        for end, value in (("low", interval.low), ("high", interval.high))
                        if math.isfinite(value)
                    },
                },
            )
            for variant, metrics in self.by_variant().items()
            for metric, interval in metrics.items()
            if math.isfinite(interval.value)
        ]


def tested(data: EvaluationSet) -> EvaluationSet:
    """The part of a set that is for testing.

    Raises:
        ValueError: if it is empty.
    """
    part = data.split("test")
    if not len(part):
        raise ArgumentError(f"{data.name}: none of the {len(data)} images is in the test split.")
    return part


def count_by_class(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """N of each class."""
    return {name: int((labels == label).sum()) for label, name in enumerate(classes)}


def common_facts(
    encoder: Encoder, data: EvaluationSet, seed: int, resamples: int, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """The facts that every result has.

    Args:
        texts: the prompts, captions or phrases that were encoded, in order; only their hash is kept.
    """
    return {
        **data.facts,
        "weights": encoder.weights,
        "preprocessing": fingerprint(encoder.preprocessing),
        "prompts": fingerprint(json.dumps(list(texts))) if texts else None,
        "seed": seed,
        "resamples": resamples,
        "versions": {name: version(name) for name in PACKAGES},
    }


def to_markdown(results: Sequence[Result]) -> str:
    """A table for each protocol, a row for each set, model and variant; then what the data are and how it was run."""
    lines = [
        "# Evaluation",
        "",
        "In brackets: 95 % bootstrap intervals. They tell how sure the numbers are on images like these, and nothing "
        "about other scanners, hospitals or people.",
    ]
    for protocol in dict.fromkeys(result.protocol for result in results):
        chosen = [result for result in results if result.protocol == protocol]
        names = list(dict.fromkeys(key.rsplit("/", 1)[1] for result in chosen for key in result.metrics))
        quoted = {result.facts.get("metric") for result in chosen}
        head = [f"**{_words(name)}**" if name in quoted else _words(name) for name in names]
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
    """The metrics that are quoted most, in a table for each protocol, for a terminal; then what a reader must know."""
    parts = []
    for protocol in dict.fromkeys(result.protocol for result in results):
        chosen = [result for result in results if result.protocol == protocol]
        there = dict.fromkeys(key.rsplit("/", 1)[1] for result in chosen for key in result.metrics)
        wanted = {*_QUOTED[protocol], *(result.facts.get("metric") for result in chosen)}
        names = [name for name in there if name in wanted]
        several = len({result.model for result in chosen}) > 1
        rows = [["set", *["model"] * several, "variant", "N", *map(_words, names)]]
        for result in chosen:
            for variant, metrics in result.by_variant().items():
                cells = [_cell(metrics[name]) if name in metrics else "" for name in names]
                model = [result.model] * several
                rows.append([result.dataset, *model, variant, _counted(result, metrics), *cells])
        notes = "".join(f"\n{note}" for note in _notes(chosen, brief=True))
        parts.append(f"{protocol}\n\n{text_table(rows)}\n{notes}".rstrip())
    return "\n\n".join(parts)


def _counted(result: Result, metrics: Mapping[str, Interval]) -> str:
    """On how many images a variant was measured, and of how many subjects where these are fewer."""
    images = max(result.rows_of(interval) for interval in metrics.values())
    units = min(interval.n for interval in metrics.values())
    return str(images) if units >= images else f"{images} ({units} subjects)"


def _notes(results: Sequence[Result], brief: bool = False) -> list[str]:
    """What a reader of a protocol's table must know.

    Args:
        results: of one protocol.
        brief: leaves out what only explains.
    """
    notes = []
    if results[0].protocol == "grounding":
        words = ", ".join(dict.fromkeys(word for result in results for word in result.facts["nonsense"]))
        notes.append(f"Nonsense ({words}): what a map shows for words that mean nothing, it shows for any word.")
        if not brief:
            notes.append(
                "CNR knows no sign: a map that is coldest in the box has one too, so it says little without the "
                "pointing game. `same map` is the correlation of a phrase's map with nonsense's."
            )
    if results[0].protocol == "linear-probe":
        notes += [] if brief else [_spread_of_draws(result) for result in results]
        notes += _equal_rows(results)
    notes += [_always_one(result) for result in results if result.protocol == "retrieval"]
    notes += _not_always_defined(results)
    return [note for note in dict.fromkeys(notes) if note]


def _spread_of_draws(result: Result) -> str:
    facts = result.facts
    seeds = max(len(values) for values in facts["seeds"].values())
    spread = "; ".join(
        f"{variant} {np.std(values, ddof=1):.3f}" for variant, values in facts["seeds"].items() if len(values) > 1
    )
    return (
        f"{result.dataset}, {result.model}: means over {seeds} draws of the training part; standard deviation of "
        f"the accuracy over draws: {spread}. {facts['not_converged']} fits did not converge."
    )


def _equal_rows(results: Sequence[Result]) -> list[str]:
    """Of a small training part several shares are the same images."""
    sets: dict[str, list[str]] = {}
    for result in results:
        for shares in result.facts.get("same_parts", ()):
            count = result.facts["trained_on"][shares[0]]
            sets.setdefault(" and ".join(shares), []).append(f"{count} of {result.dataset}")
    return [
        f"The rows of {shares} must be equal: at least one image of each class is taken, and so these shares are the "
        f"same training images ({', '.join(dict.fromkeys(found))})."
        for shares, found in sets.items()
    ]


def _always_one(result: Result) -> str:
    """Among k candidates or fewer, each is within the first k."""
    ks = [name for name, chance in result.facts.get("chance", {}).items() if chance >= 1]
    if not ks:
        return ""
    names = " and ".join(f"R@{name.removeprefix('r')}" for name in ks)
    return f"{result.dataset}: too small for {names}, which is 1 among {result.count} pairs whatever a model does."


def _not_always_defined(results: Sequence[Result]) -> list[str]:
    """Intervals that some resamples say nothing of."""
    shares: dict[str, float] = {}
    names: dict[str, None] = {}
    for result in results:
        for key, interval in result.metrics.items():
            if interval.undefined and not math.isnan(interval.value):
                names[_words(key.rsplit("/", 1)[1])] = None
                share = interval.undefined / result.facts["resamples"]
                shares[result.dataset] = max(shares.get(result.dataset, 0.0), share)
    if not shares:
        return []
    listed = ", ".join(f"{share:.0%} in {name}" for name, share in shares.items())
    return [
        f"Sets this small give resamples without images of some class, which these metrics need: {', '.join(names)}. "
        f"Their intervals leave such resamples out: {listed}."
    ]


def _data_lines(result: Result) -> list[str]:
    facts, lines = result.facts, []
    if "count_by_class" in facts:
        counts = ", ".join(f"{name} {count}" for name, count in facts["count_by_class"].items())
        lines.append(f"- {result.protocol}, {result.dataset}: N = {result.count}: {counts}")
    if facts.get("split"):
        lines.append(f"- {result.protocol}, {result.dataset}: {facts['split']}")
    title = facts.get("title", result.dataset)
    lines += [f"- {title}, {key}: {_one_line(facts[key])}" for key in ("source", "licence", "notes") if facts.get(key)]
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
    """Writes `results.json`, `results.md` and the figures that there is something for; the folder appears whole.

    Args:
        folder: to make.
        force: whether one that is there already is replaced.

    Raises:
        FileExistsError: if it exists and `force` is False.
    """
    with atomic_dir(folder, force) as place:
        content = [result.to_json() for result in results]
        (place / "results.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (place / "results.md").write_text(to_markdown(results), encoding="utf-8")
        for protocol in dict.fromkeys(result.protocol for result in results):
            chosen = [result for result in results if result.protocol == protocol]
            if any(result.confusions for result in chosen):
                draw_confusions(chosen, place / f"{protocol}_confusion.png")
            if any(result.calibrations for result in chosen):
                draw_reliability(chosen, place / f"{protocol}_reliability.png")
            if protocol == "retrieval":
                draw_recalls(chosen, place / "retrieval_recall.png")
            if protocol == "linear-probe":
                draw_probes(chosen, place / "linear-probe.png")
            for result in chosen:
                if result.examples:
                    name = re.sub(r"[^\w.-]+", "_", f"{protocol}_{result.dataset}_{result.model}")
                    draw_heatmaps(result, place / f"{name}_heatmaps.png")


def _shallow(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (Interval, Confusion)):
        return _plain(asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _cell(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "not defined"
    return str(interval)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _words(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


_NAMES = {
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "brier": "Brier",
    "mean_iou": "mIoU",
    "contrast_to_noise": "CNR",
    **{f"{direction}_r{k}": f"{direction.replace('_', ' ')} R@{k}"
       for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
}  # fmt: skip
