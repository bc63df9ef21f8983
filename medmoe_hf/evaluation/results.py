"""Results of an evaluation: numbers with intervals, as JSON and as entries of a model card."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import calibration, classification_metrics, multilabel_metrics
from medmoe_hf.inference.batching import short_hash
from medmoe_hf.inference.encoders import Encoder

PACKAGES = ("medmoe_hf", "torch", "torchvision", "transformers", "numpy", "scikit-learn", "pillow")

_TASKS = {
    "zero-shot": "zero-shot-image-classification",
    "linear-probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "grounding": "visual-grounding",
    "routing": "image-classification",
}
# The names by which the Hub knows a metric; others go by their own.
_METRIC_TYPES = {
    "auroc": "roc_auc",
    "macro_auroc": "roc_auc",
    "macro_f1": "f1",
    "macro_average_precision": "average_precision",
}


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

    def add_multilabel(
        self, variant: str, scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], subjects: Any
    ) -> None:
        """Measures how scores rank the images that show a finding above those that do not.

        The means over findings become metrics of `variant`, those of a finding metrics of `<variant>, <finding>`.

        Args:
            variant: Name of what is measured.
            scores: (N, C), or (N, R, C) for the mean over R runs.
            labels: (N, C) with 1, 0, or -100 where unknown.
            classes: C names of findings.
            subjects: (N,) subjects for the bootstrap, or None.
        """

        def metric(runs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
            found = [multilabel_metrics(runs[:, run], truth, classes) for run in range(runs.shape[1])]
            return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

        runs = scores if scores.ndim == 3 else scores[:, None]
        resamples, seed = self.facts["resamples"], self.facts["seed"]
        measured = bootstrap(metric, runs, labels, groups=subjects, resamples=resamples, seed=seed)
        self.add(variant, {name: interval for name, interval in measured.items() if name.startswith("macro_")})
        for index, name in enumerate(classes):
            rows = np.flatnonzero(labels[:, index] >= 0)
            units = len(rows) if subjects is None else len({subjects[row] for row in rows})
            own = {metric: measured[f"{name}/{metric}"] for metric in ("auroc", "average_precision")}
            self.add(
                f"{variant}, {name}",
                {metric: replace(interval, n=units, rows=len(rows)) for metric, interval in own.items()},
            )

    def to_json(self) -> dict[str, Any]:
        """What `json.dumps` takes; NaN and infinity become null."""
        plain: dict[str, Any] = _plain({name: value for name, value in _shallow(self).items() if name != "examples"})
        return plain

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
                metric_name=f"{metric_name(metric)}, {variant}",
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


def count_by_class(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Counts the images per class.

    Args:
        labels: (N,) indices into `classes`, or (N, C) with 1 where a finding is present.
        classes: C names.

    Returns:
        Name -> number of images.
    """
    if labels.ndim == 2:
        return {name: int((labels[:, index] == 1).sum()) for index, name in enumerate(classes)}
    return {name: int((labels == label).sum()) for label, name in enumerate(classes)}


def known_by_class(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Counts the images in which each finding of a multi-label set is known to be present or absent.

    Args:
        labels: (N, C) with 1, 0, or -100 where unknown.
        classes: C names.

    Returns:
        Name -> number of images.
    """
    return {name: int((labels[:, index] >= 0).sum()) for index, name in enumerate(classes)}


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
        "preprocessing": short_hash(encoder.preprocessing),
        "prompts": short_hash(json.dumps(list(texts))) if texts else None,
        "seed": seed,
        "resamples": resamples,
        "versions": {name: version(name) for name in PACKAGES},
    }


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


def metric_name(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


_NAMES = {
    "auroc": "AUROC",
    "macro_auroc": "macro AUROC",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "brier": "Brier",
    "mean_iou": "mIoU",
    "contrast_to_noise": "CNR",
    **{f"{direction}_r{k}": f"{direction.replace('_', ' ')} R@{k}"
       for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
}  # fmt: skip
