"""Figures of an evaluation, as PNG files: confusion, reliability, recall, linear probes by size, heat-maps."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from medmoe_hf.errors import MissingPackageError
from medmoe_hf.evaluation.results import Result, metric_name

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingPackageError('Figures need matplotlib: pip install "medmoe_hf[evaluate]"') from error

_DPI = 130
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # distinguishable if colour-blind
_MARKERS = "osD^vP"
_CONTROL = (
    "The control is a made-up word that no report contains, so its map shows what does not depend on the word: the "
    "map of a finding is evidence only where it is hotter in the box than the control's. The two maps of an image "
    "share one colour scale, from dark (low) to yellow (high)."
)


def draw_confusions(results: Sequence[Result], path: Path) -> None:
    """Draws a confusion matrix per result; shades are shares of a row, numbers are images.

    Zero-shot has a panel for its first score, routing one per router.
    """
    panels = [
        (result, variant, confusion)
        for result in _by_set(results)
        for variant, confusion in list(result.confusions.items())[: None if result.protocol == "routing" else 1]
    ]
    most = max(len(confusion.classes) for _, _, confusion in panels)
    side = 1.6 + 0.42 * most
    figure, axes = _grid(len(panels), side + 0.5, side + 0.3, _models_beside(results))
    for axis, (result, variant, confusion) in zip(axes, panels, strict=True):
        counts = np.array(confusion.counts)
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(confusion.classes))
        names = [_shortened(name) for name in confusion.classes]
        axis.set_xticks(ticks, names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(ticks, names, fontsize=8)
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                colour = "white" if shares[row, column] > 0.6 else "black"
                axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
        axis.set_ylabel("true", fontsize=8)
        axis.set_title(_title(result, variant), fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
    _save(figure, path)


def draw_reliability(results: Sequence[Result], path: Path) -> None:
    """Draws a reliability diagram per result: accuracy by confidence; perfect calibration is the diagonal."""
    chosen = [result for result in _by_set(results) if result.calibrations]
    figure, axes = _grid(len(chosen), 3.2, 4.2, _models_beside(results))
    for axis, result in zip(axes, chosen, strict=True):
        axis.plot((0, 1), (0, 1), color="0.6", linewidth=1, linestyle="--")
        for variant, colour, marker in zip(result.calibrations, _COLOURS, _MARKERS, strict=False):
            calibrated = result.calibrations[variant]
            bins = [row for row in calibrated["bins"] if row["count"]]
            confidence, right = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
            sizes = [12 + 90 * row["count"] / result.count for row in bins]
            axis.plot(confidence, right, color=colour, linewidth=1, alpha=0.7)
            label = f"{variant}, ECE {calibrated['ece']:.2f}"
            axis.scatter(confidence, right, s=sizes, color=colour, marker=marker, alpha=0.8, label=label, linewidth=0)
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.04, 1.04), aspect="equal")
        axis.set_xlabel("confidence", fontsize=8)
        axis.set_ylabel("accuracy", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_title(_title(result), fontsize=9)
        # Below the axes: inside it would cover marks.
        legend = axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([24])
    figure.suptitle("Reliability; larger marks hold more images", fontsize=10)
    _save(figure, path)


def draw_recalls(results: Sequence[Result], path: Path) -> None:
    """Draws bars of R@1, 5, 10 in both directions, with intervals, per model and score; the line is chance."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    figure, axes = _grid(2 * len(datasets), 4.8, 3.6, columns=2)
    for axis, (dataset, direction) in zip(
        axes, [(name, way) for name in datasets for way in ("image_to_text", "text_to_image")], strict=True
    ):
        chosen = [result for result in results if result.dataset == dataset]
        bars = [(result, kind, metrics) for result in chosen for kind, metrics in result.by_variant().items()]
        ks = [int(name.removeprefix("r")) for name in chosen[0].facts["chance"]]
        width = 0.8 / len(bars)
        for number, (result, kind, metrics) in enumerate(bars):
            intervals = [metrics[f"{direction}_r{k}"] for k in ks]
            values = np.array([interval.value for interval in intervals])
            reach = np.array([[one.value - one.low, one.high - one.value] for one in intervals]).T.clip(0)
            position = np.arange(len(ks)) + (number - (len(bars) - 1) / 2) * width
            # Scores of one model share a colour and differ in shade.
            model = [other.model for other in chosen].index(result.model)
            shade = (1.0, 0.65, 0.4)[list(result.by_variant()).index(kind) % 3]
            colour = _COLOURS[model % len(_COLOURS)]
            label = f"{result.model}, {kind}"
            axis.bar(position, values, width * 0.92, color=colour, alpha=shade, label=label)
            axis.errorbar(position, values, np.nan_to_num(reach), fmt="none", ecolor="0.2", elinewidth=0.9, capsize=2)
        for index, k in enumerate(ks):
            chance = chosen[0].facts["chance"][f"r{k}"]
            axis.plot((index - 0.45, index + 0.45), (chance, chance), color="black", linewidth=1, linestyle=":")
        axis.set_xticks(range(len(ks)), [f"R@{k}" for k in ks], fontsize=9)
        axis.set_ylim(0, 1)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        axis.set_axisbelow(True)
        arrow = direction.replace("_to_", " → ")
        axis.set_title(f"{dataset}: {arrow}, N = {chosen[0].count}", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)
    figure.suptitle("Recall with 95 % intervals; dotted: chance", fontsize=10)
    _save(figure, path)


def draw_probes(results: Sequence[Result], path: Path) -> None:
    """Draws linear probes by the number of training images; marks are means, dots single seeds."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    figure, axes = _grid(len(datasets), 4.2, 3.4)
    for axis, dataset in zip(axes, datasets, strict=True):
        lines: list[tuple[str, list[tuple[int, Any, list[float]]]]] = []
        for result in (result for result in results if result.dataset == dataset):
            kinds = dict.fromkeys(variant.rsplit(" ", 1)[0] for variant in result.facts["seeds"])
            metric = result.facts.get("seed_metric", "accuracy")
            for kind in kinds:
                points = [
                    (size, result.metrics[f"{kind} {share}/{metric}"], result.facts["seeds"][f"{kind} {share}"])
                    for share, size in result.facts["trained_on"].items()
                ]
                lines.append((f"{result.model}, {kind}", points))
        for number, (label, points) in enumerate(lines):
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            # Side by side, not on top of each other.
            sizes = np.array([size for size, _, _ in points]) * 1.04 ** (number - (len(lines) - 1) / 2)
            values = np.array([interval.value for _, interval, _ in points])
            reach = np.array([[one.value - one.low, one.high - one.value] for _, one, _ in points]).T.clip(0)
            axis.errorbar(
                sizes, values, np.nan_to_num(reach), color=colour, marker=marker, markersize=5, capsize=2,
                linewidth=1.2, label=label,
            )  # fmt: skip
            for size, (_, _, seeds) in zip(sizes, points, strict=True):
                axis.scatter([size] * len(seeds), seeds, s=7, color=colour, alpha=0.5, linewidth=0, zorder=3)
        axis.set_xscale("log")
        ticks = sorted({size for _, points in lines for size, _, _ in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(0, 1.02)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(axis="y", linewidth=0.4, alpha=0.6)
        units = {result.facts.get("unit", "image") for result in results if result.dataset == dataset}
        axis.set_xlabel(f"training {' and '.join(f'{unit}s' for unit in sorted(units))}", fontsize=8)
        axis.set_ylabel(metric_name(metric), fontsize=8)
        axis.set_title(dataset, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)
    figure.suptitle("Linear probes: mean with 95 % interval over what is tested; dots are single draws", fontsize=10)
    _save(figure, path)


def draw_heatmaps(result: Result, path: Path) -> None:
    """Draws two examples per row, each the image with its boxes, the phrase's heat-map, and that of a nonsense word.

    The two maps of an example share a colour scale, so that they can be compared.
    """
    figure, axes = _grid(3 * len(result.examples), 2.3, 2.45, columns=6 if len(result.examples) > 3 else 3)
    for number, example in enumerate(result.examples):
        panels = (
            (None, example.label),
            (example.heatmap, f"“{_shortened(example.phrase, 30)}”"),
            (example.nonsense_heatmap, f"“{example.nonsense}” (control)"),
        )
        both = np.stack([example.heatmap, example.nonsense_heatmap])
        low, high = float(both.min()), float(both.max())
        for axis, (heatmap, title) in zip(axes[3 * number : 3 * number + 3], panels, strict=True):
            axis.imshow(example.image)
            if heatmap is not None:
                axis.imshow(heatmap, cmap="inferno", alpha=0.55, vmin=low, vmax=high)
                y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
                axis.plot(x, y, "+", color="cyan", markersize=10, markeredgewidth=1.8)
            for left, top, right, bottom in example.boxes:
                size = right - left, bottom - top
                axis.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, edgecolor="lime", linewidth=1.4))
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    figure.suptitle(f"{result.model} on {result.dataset}: box = finding, + = hottest pixel", fontsize=10)
    figure.supxlabel("\n".join(wrap(_CONTROL, 150 if len(result.examples) > 3 else 60)), fontsize=8)
    _save(figure, path)


def _by_set(results: Sequence[Result]) -> list[Result]:
    """Sorts results so that models on the same set are side by side."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    return sorted(results, key=lambda result: datasets.index(result.dataset))


def _models_beside(results: Sequence[Result]) -> int | None:
    """Number of columns so that each row is one set; None if there is one model, or more than fit."""
    models = len({result.model for result in results})
    return models if 1 < models <= 4 and len(results) % models == 0 else None


def _title(result: Result, variant: str | None = None) -> str:
    tail = "" if variant is None else f", {variant}"
    return f"{result.dataset}\n{result.model}{tail}, N = {result.count}"


def _shortened(text: str, most: int = 18) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _grid(panels: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """Creates a figure with panels of `width` x `height` inches."""
    rows = -(-panels // (columns or max(1, int(13 // width))))
    columns = columns or -(-panels // rows)
    # Not through pyplot, which keeps figures and selects a backend for the process.
    figure = Figure(figsize=(columns * width, rows * height + 0.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _save(figure: Figure, path: Path) -> None:
    # Without the software version that matplotlib writes: the same results yield the same file.
    figure.savefig(path, metadata={"Software": None})
