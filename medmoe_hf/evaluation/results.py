"""Results of an evaluation: numbers with intervals, as JSON and as entries of a model card."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from medmoe_hf.evaluation.dataset import EvaluationSet
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.metrics import CHEXPERT_METRIC, calibration, classification_metrics, multilabel_metrics
from medmoe_hf.inference.batching import short_hash
from medmoe_hf.inference.encoders import Encoder

PACKAGES = ("medmoe_hf", "torch", "torchvision", "transformers", "numpy", "scikit-learn", "pillow")

DETAIL = ", severity "
"""Part of the name of variants that short tables and model cards leave out: corruptions at a single severity."""

_TASKS = {
    "zero-shot": "zero-shot-image-classification",
    "linear-probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "grounding": "visual-grounding",
    "routing": "image-classification",
    **dict.fromkeys(
        ("robustness", "paraphrases", "negation", "text-only", "subgroups", "comparison"),
        "zero-shot-image-classification",
    ),
}
# Names of metrics on the Hub, where they differ.
_METRIC_TYPES = {
    "auroc": "roc_auc",
    "macro_auroc": "roc_auc",
    CHEXPERT_METRIC: "roc_auc",
    "macro_f1": "f1",
    "macro_average_precision": "average_precision",
}


@dataclass
class HeatmapExample:
    """One example in a figure of heat-maps.

    Attributes:
        image: (H, W, 3) uint8.
        phrase: Phrase that was localized.
        heatmap: (H, W) map of the phrase.
        nonsense: Meaningless word, the control.
        nonsense_heatmap: (H, W) map of the control.
        boxes: Left, top, right, bottom in pixels.
        label: Title of the example, such as the modality.
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
    """Confusion matrix.

    Attributes:
        classes: C names.
        counts: (C, C) number of images of class i (row) that were classified as class j (column).
    """

    classes: list[str]
    counts: list[list[int]]


@dataclass
class Result:
    """Result of one protocol with one model on one set.

    Attributes:
        protocol: zero-shot, linear-probe, retrieval, grounding or routing; or a part of a robustness report:
            robustness, paraphrases, negation, text-only, subgroups, comparison.
        model: Name of the model.
        dataset: Name of the set.
        count: Number of images, also where `facts["unit"]` is `case` and intervals are over cases.
        metrics: `<variant>/<metric>`, such as `global/accuracy`, to its value and interval. The variant is the score,
            features or router.
        facts: What a reader needs to judge or repeat the evaluation: counts by class, hashes of prompts and
            preprocessing, seeds, versions, license and overlaps of the data.
        confusions: Variant -> confusion matrix.
        calibrations: Variant -> result of `metrics.calibration`.
        examples: Heat-maps for a figure; not part of the JSON.
        probabilities: Variant -> (N, R, C) probabilities of the test images in R runs (zero-shot has one), for paired
            comparisons; not part of the JSON. Zero-shot findings have them with negative prompts only.

    Example:
        >>> result = Result("zero-shot", "you/medmoe", "toy", 4, {"global/accuracy": Interval(0.75, 0.5, 1.0, 4)}, {})
        >>> result.by_variant()["global"]["accuracy"].value
        0.75
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
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, variant: str, measured: Mapping[str, Interval]) -> None:
        """Adds metrics of one variant.

        Args:
            variant: Name of the variant.
            measured: Metric -> interval, as `bootstrap` returns them.

        Example:
            ```python
            result.add("global", bootstrap(metric, scores, labels))
            ```
        """
        self.metrics |= {f"{variant}/{name}": interval for name, interval in measured.items()}

    def add_classification(
        self, variant: str, probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str], subjects: Any
    ) -> None:
        """Measures classification and calibration metrics of probabilities, and counts confusions.

        Args:
            variant: Name of the variant.
            probabilities: (N, C), rows sum to 1.
            labels: (N,) 0..C-1.
            classes: C names.
            subjects: (N,) subjects for the bootstrap, or None.

        Example:
            ```python
            result.add_classification("global", probabilities, data.labels, data.classes, data.subjects)
            ```
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
        means = {name: one for name, one in measured.items() if name.startswith("macro_") or name == CHEXPERT_METRIC}
        self.add(variant, means)
        for index, name in enumerate(classes):
            rows = np.flatnonzero(labels[:, index] >= 0)
            units = len(rows) if subjects is None else len({subjects[row] for row in rows})
            own = {metric: measured[f"{name}/{metric}"] for metric in ("auroc", "average_precision")}
            self.add(
                f"{variant}, {name}",
                {metric: replace(interval, n=units, rows=len(rows)) for metric, interval in own.items()},
            )

    def to_json(self) -> dict[str, Any]:
        """Converts to plain objects for `json.dumps`, without `examples` and `probabilities`.

        NaN and infinity become None.

        Returns:
            Field -> value.

        Example:
            ```python
            print(json.dumps(result.to_json()))
            ```
        """
        left_out = ("examples", "probabilities")
        plain: dict[str, Any] = _plain({name: value for name, value in _shallow(self).items() if name not in left_out})
        return plain

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Result":
        """Converts back from plain objects; confusion matrices, calibrations and examples stay behind.

        Args:
            entry: What `to_json` returned.

        Returns:
            The result.

        Raises:
            KeyError: If a field is missing.
            TypeError: If a field is of another type.

        Example:
            ```python
            results = [Result.from_json(entry) for entry in json.loads(path.read_text())]
            ```
        """
        return cls(
            entry["protocol"],
            entry["model"],
            entry["dataset"],
            entry["count"],
            {name: Interval(**_with_nan(interval)) for name, interval in entry["metrics"].items()},
            entry["facts"],
        )

    def rows_of(self, interval: Interval) -> int:
        """Returns the number of images that an interval is over: a variant may leave out some.

        Args:
            interval: One of `metrics`.

        Returns:
            Number of images.
        """
        return self.count if interval.rows is None else interval.rows

    def by_variant(self) -> dict[str, dict[str, Interval]]:
        """Groups `metrics` by variant.

        Returns:
            Variant -> metric -> interval.

        Example:
            ```python
            print(result.by_variant()["global"]["accuracy"])
            ```
        """
        variants: dict[str, dict[str, Interval]] = {}
        for key, interval in self.metrics.items():
            variant, metric = key.rsplit("/", 1)
            variants.setdefault(variant, {})[metric] = interval
        return variants

    def to_eval_results(self) -> list[EvalResult]:
        """Converts to entries of a model card.

        Returns:
            Entries for `ModelCardData(eval_results=...)`, without metrics that are not finite and without single
            severities of corruptions.

        Example:
            ```python
            data = ModelCardData(model_name="medmoe", eval_results=result.to_eval_results())
            ```
        """
        by_case = self.facts.get("unit") == "case"
        return [
            EvalResult(
                task_type=_TASKS[self.protocol],
                task_name=f"{self.protocol} ({variant}{', by case' if by_case else ''})",
                dataset_type=self.dataset,
                dataset_name=self.facts.get("title", self.dataset),
                metric_type=_METRIC_TYPES.get(metric, metric),
                metric_name=f"{metric_name(metric)}, {variant}",
                metric_value=round(interval.value, 4),
                metric_args={
                    "variant": variant,
                    **({"cases": self.rows_of(interval)} if by_case else {}),
                    "images": self.count if by_case else self.rows_of(interval),
                    **{
                        f"{end}_95": round(value, 4)
                        for end, value in (("low", interval.low), ("high", interval.high))
                        if math.isfinite(value)
                    },
                },
            )
            for variant, metrics in self.by_variant().items()
            if DETAIL not in variant
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
    """Collects the facts that every result has.

    Args:
        encoder: The encoder.
        data: The set.
        seed: Seed of the bootstrap.
        resamples: Number of resamples.
        texts: Prompts, captions or phrases that were encoded, in order; only their hash is recorded.

    Returns:
        Facts, for `Result.facts`.
    """
    return {
        **data.facts,
        "weights": encoder.weights,
        "preprocessing": short_hash(encoder.preprocessing),
        "prompts": short_hash(json.dumps(list(texts))) if texts else None,
        "seed": seed,
        "resamples": resamples,
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _with_nan(interval: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN; undefined values are null.
    return {key: math.nan if value is None and key != "rows" else value for key, value in interval.items()}


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # scikit-learn is optional
        return None


def metric_name(metric: str) -> str:
    """Formats the name of a metric for tables and figures."""
    for ending in ("_drop", "_gap"):
        if metric.endswith(ending):
            return metric_name(metric.removesuffix(ending)) + ending.replace("_", " ")
    if metric.startswith("gain_of_images_"):
        return "images' gain in " + metric_name(metric.removeprefix("gain_of_images_"))
    return _NAMES.get(metric, metric.replace("_", " "))


_NAMES = {
    "auroc": "AUROC",
    "macro_auroc": "macro AUROC",
    CHEXPERT_METRIC: "AUROC of CheXpert's five",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "brier": "Brier",
    "mean_iou": "mIoU",
    "contrast_to_noise": "CNR",
    **{f"{direction}_r{k}": f"{direction.replace('_', ' ')} R@{k}"
       for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
}  # fmt: skip
