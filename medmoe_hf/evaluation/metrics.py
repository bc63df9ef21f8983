"""Metrics of retrieval, classification, calibration and grounding, as functions of scores.

They take numpy arrays or tensors and give plain floats, or one value for each query where it says so. Whatever is
undecided counts against the model: ties, maps that are the same everywhere, scores that are no numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from medmoe_hf.errors import ArgumentError

CALIBRATION_BINS = 15
_UNKNOWN = -100  # what the losses leave out, too


def caption_groups(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Numbers captions, the same number for the same words: the groups by which `ranks` knows what is right.

    Args:
        captions: of each image, one or several.

    Returns:
        (N, G) int64, G the most captions of an image; -1 where an image has fewer. `groups[groups >= 0]` are the
        groups of all captions, image by image.
    """
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(caption, len(numbers)) for caption in own] for own in captions]
    width = max((len(row) for row in rows), default=0)
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int64).reshape(len(rows), width)


def ranks(
    scores_of: Callable[[slice], Any], query_groups: ArrayLike, candidate_groups: ArrayLike, chunk: int = 1024
) -> np.ndarray:
    """The rank of each query's best right candidate, from 0, a few queries at a time.

    It is the number of wrong candidates that score as much or more: ties count against us. A candidate is right if it
    shares a group with the query, so identical captions must have the same one (`caption_groups`).

    Args:
        scores_of: gives the scores (n, M) of a slice of the queries; `table.__getitem__` of a table (N, M).
        query_groups: (N,), or (N, G) for queries with several groups; a negative number is no group.
        candidate_groups: (M,) or (M, G), likewise.
        chunk: how many queries are scored at once.

    Returns:
        (N,) int64, 0 to the number of wrong candidates.

    Raises:
        ValueError: a query has no right candidate, or the scores do not fit the groups.
    """
    tables = [np.asarray(groups, dtype=np.int64) for groups in (query_groups, candidate_groups)]
    queries, candidates = (torch.tensor(table if table.ndim == 2 else table[:, None]) for table in tables)
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        table = torch.as_tensor(scores_of(rows))
        expected = (rows.stop - rows.start, len(candidates))
        if table.shape != expected:
            raise ValueError(
                f"Queries {rows.start}..{rows.stop - 1} have scores {tuple(table.shape)}, not {expected}."
            )
        right = torch.zeros(expected, dtype=torch.bool)
        for query in queries[rows].unbind(dim=1):
            for candidate in candidates.unbind(dim=1):
                right |= (query[:, None] == candidate) & (query[:, None] >= 0)
        lost = (~right.any(dim=1)).nonzero().flatten()
        if len(lost):
            raise ArgumentError(f"Query {start + int(lost[0])} has no right candidate: none shares a group with it.")
        right = right.to(table.device)
        best = table.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # Not `>=`: a score that is no number is neither more nor less, and must not make a query look solved.
        found[rows] = (~(table < best) & ~right).sum(dim=1).cpu().numpy()
    return found


def retrieval_metrics(
    image_ranks: ArrayLike | None = None, text_ranks: ArrayLike | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k and median rank of what `ranks` found.

    Args:
        image_ranks: (N,) of images as queries among texts; None leaves this direction out.
        text_ranks: (M,) of texts as queries among images, likewise.
        ks: the cut-offs.

    Returns:
        `{"image_to_text_r1": ..., "image_to_text_median_rank": ..., "text_to_image_r1": ..., ...}`: recalls are
        fractions of 0..1, the best median rank is 1. In the bootstrap, ranks are the rows: all candidates stay.
    """
    result: dict[str, float] = {}
    for direction, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        if found is not None:
            places = np.asarray(found)
            result |= {f"{direction}_r{k}": float((places < k).mean()) for k in ks}
            result[f"{direction}_median_rank"] = float(np.median(places)) + 1
    return result


def recall_at_k(
    scores: Tensor, captions: Sequence[str] | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall@k of a paired set, in both directions.

    A hit is any candidate that is right within the first k. Ties count against us: see `ranks`.

    Args:
        scores: (N, N), row i image i, column j caption j; i and i belong together.
        captions: the N captions, so that identical ones count as right for one another's images.
        ks: the cut-offs.

    Returns:
        `{"image_to_text_r1": ..., "text_to_image_r1": ..., ...}`, fractions of 0..1.
    """
    count = len(scores)
    if scores.shape != (count, count):
        raise ValueError(f"`scores` must be square, image i with caption i; got {tuple(scores.shape)}.")
    groups = np.arange(count) if captions is None else caption_groups([[caption] for caption in captions])
    of_images, of_texts = (ranks(table.__getitem__, groups, groups) for table in (scores, scores.t()))
    metrics = retrieval_metrics(of_images, of_texts, ks)
    return {name: value for name, value in metrics.items() if not name.endswith("median_rank")}


def precision_at_k(
    scores: ArrayLike, query_labels: ArrayLike, candidate_labels: ArrayLike, ks: Sequence[int] = (5, 10, 100)
) -> dict[str, np.ndarray]:
    """Fraction of each query's first k candidates that are of its class; among ties the wrong ones come first.

    A class of fewer than k candidates cannot reach 1.

    Args:
        scores: (N, M).
        query_labels: (N,) ids of classes.
        candidate_labels: (M,) ids of classes.
        ks: the cut-offs.

    Returns:
        `{"precision_at_5": (N,) float64, ...}`, one value for each query, 0..1, so that their means can be
        bootstrapped; NaN where there are fewer than k candidates.
    """
    table = np.asarray(scores)
    right = np.asarray(query_labels)[:, None] == np.asarray(candidate_labels)
    if table.shape != right.shape:
        raise ValueError(f"`scores` are {table.shape}, but the labels are of {right.shape} queries and candidates.")
    table = np.where(np.isnan(table), np.where(right, -np.inf, np.inf), table)
    result = {}
    for k in ks:
        if k > table.shape[1]:
            result[f"precision_at_{k}"] = np.full(len(table), np.nan)
            continue
        limit = np.partition(table, -k, axis=1)[:, -k, None]
        above = table > limit
        room = k - above.sum(axis=1)
        wrong_at_limit = ((table == limit) & ~right).sum(axis=1)
        result[f"precision_at_{k}"] = ((above & right).sum(axis=1) + np.maximum(room - wrong_at_limit, 0)) / k
    return result


def accuracy(predicted: Tensor, labels: Tensor, ignore: int = _UNKNOWN) -> float:
    """Fraction of right predictions among the labels that are not `ignore`; NaN if there are none.

    Args:
        predicted, labels: (N,) ids.
    """
    known = labels != ignore
    return (predicted[known] == labels[known]).float().mean().item()


def classification_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, and the means over classes of recall, AUROC, F1 and average precision.

    AUROC and average precision set each class against the rest by its column of scores. So the scores of different
    rows must be comparable: give probabilities over the classes, not cosines.

    Args:
        scores: (N, C); the highest of a row is its prediction.
        labels: (N,) ids 0..C-1; rows of -100 are left out.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_auroc`, `macro_f1`, `macro_average_precision`, of 0..1. The means are
        NaN if a class has no row (AUROC also if it has them all), and all is NaN if a score is.
    """
    table, known = _known_rows(scores, labels)
    classes = table.shape[1]
    names = ("accuracy", "balanced_accuracy", "macro_auroc", "macro_f1", "macro_average_precision")
    if not len(known) or np.isnan(table).any():
        return dict.fromkeys(names, float("nan"))
    confusion = np.bincount(known * classes + table.argmax(axis=1), minlength=classes**2).reshape(classes, classes)
    right, labelled, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    result = {"accuracy": float(right.sum() / len(known))}
    if not labelled.all():
        return dict.fromkeys(names, float("nan")) | result
    auroc, precision = zip(
        *(_one_against_rest(table[:, label], known == label) for label in range(classes)), strict=True
    )
    means = (right / labelled, auroc, 2 * right / (labelled + predicted), precision)
    return result | {name: float(np.mean(values)) for name, values in zip(names[1:], means, strict=True)}


def multilabel_metrics(scores: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Computes AUROC and average precision per finding, and their means over findings.

    Args:
        scores: (N, C); only the order within a column matters.
        labels: (N, C) with 1 where a finding is present, 0 where it is absent and -100 where it is unknown.
        names: C names of the findings.

    Returns:
        `<name>/auroc` and `<name>/average_precision` per finding, 0..1, over the rows where it is known; NaN unless
        the finding is present in one of them and absent in another, or if a score is NaN. `macro_auroc` and
        `macro_average_precision`, their means over the findings for which they are defined; NaN if there are none.

    Raises:
        ValueError: If the shapes do not match, or a label is none of 1, 0 and -100.

    Example:
        >>> metrics = multilabel_metrics([[0.9, 0.2], [0.1, 0.8]], [[1, 0], [0, -100]], ["edema", "effusion"])
        >>> metrics["edema/auroc"], metrics["effusion/auroc"], metrics["macro_auroc"]
        (1.0, nan, 1.0)
    """
    table, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if table.ndim != 2 or truth.shape != table.shape or len(names) != table.shape[1]:
        raise ValueError(
            f"Expected scores (N, C), labels (N, C) and C names, got {table.shape}, {truth.shape} and {len(names)}."
        )
    if not np.isin(truth, (0, 1, _UNKNOWN)).all():
        raise ValueError(f"Labels must be 1 (present), 0 (absent) or {_UNKNOWN} (unknown).")
    result: dict[str, float] = {}
    for index, name in enumerate(names):
        present, absent = truth[:, index] == 1, truth[:, index] == 0
        column, known = table[:, index], present | absent
        defined = present.any() and absent.any() and not np.isnan(column[known]).any()
        found = _one_against_rest(column[known], present[known]) if defined else (float("nan"), float("nan"))
        result |= {f"{name}/auroc": found[0], f"{name}/average_precision": found[1]}
    for metric in ("auroc", "average_precision"):
        values = [result[f"{name}/{metric}"] for name in names]
        known_values = [value for value in values if not np.isnan(value)]
        result[f"macro_{metric}"] = float(np.mean(known_values)) if known_values else float("nan")
    return result


def _one_against_rest(scores: np.ndarray, is_class: np.ndarray) -> tuple[float, float]:
    """AUROC and average precision of one class.

    From two sorted lists: scikit-learn's functions give the same, but take fifteen times as long, and the bootstrap
    calls this for every class in every resample.
    """
    inside, outside = np.sort(scores[is_class]), np.sort(scores[~is_class])
    if not len(outside):
        return float("nan"), 1.0
    below = np.searchsorted(outside, inside, side="left")
    through = np.searchsorted(outside, inside, side="right")
    hits = len(inside) - np.searchsorted(inside, inside, side="left")
    false_alarms = len(outside) - below
    return float((below + through).mean() / (2 * len(outside))), float((hits / (hits + false_alarms)).mean())


def calibration(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, Any]:
    """How far the probabilities can be believed.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: (N,) ids 0..K-1; rows of -100 are left out.

    Returns:
        `ece`: expected calibration error, 0..1: by 15 bins of equal width, the mean distance of the accuracy from the
        highest probability of a row. `brier`: mean over rows of the squared errors' sum over classes, 0..2. Both are
        NaN without a row. `bins`: for the reliability diagram a list of `{"low", "high", "count", "confidence",
        "accuracy"}`, each (low, high]; NaN where the count is 0.

    Raises:
        ValueError: rows that are no probabilities.
    """
    table, known = _known_rows(probabilities, labels)
    if not (np.all(table >= 0) and np.allclose(table.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("`probabilities` must be at least 0 and sum to 1 in each row; logits need a softmax first.")
    confidence, right = table.max(axis=1), table.argmax(axis=1) == known
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    # Rounding may put a certain row a little over 1.
    number = np.minimum(np.searchsorted(edges, confidence, side="left"), CALIBRATION_BINS) - 1
    bins, gap = [], 0.0
    for index in range(CALIBRATION_BINS):
        chosen = number == index
        row = {"low": float(edges[index]), "high": float(edges[index + 1]), "count": int(chosen.sum())}
        if row["count"]:
            row |= {"confidence": float(confidence[chosen].mean()), "accuracy": float(right[chosen].mean())}
            gap += row["count"] * abs(row["confidence"] - row["accuracy"])
        else:
            row |= {"confidence": float("nan"), "accuracy": float("nan")}
        bins.append(row)
    errors = ((table - np.eye(table.shape[1])[known]) ** 2).sum(axis=1)
    return {
        "ece": gap / len(known) if len(known) else float("nan"),
        "brier": float(errors.mean()) if len(known) else float("nan"),
        "bins": bins,
    }


def _known_rows(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose label is known: scores (n, C) float64 and labels (n,) int64."""
    table, known = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if table.ndim != 2 or known.shape != table.shape[:1]:
        raise ValueError(f"Expected scores (N, C) and labels (N,), got {table.shape} and {known.shape}.")
    table, known = table[known != _UNKNOWN], known[known != _UNKNOWN]
    if len(known) and not 0 <= known.min() <= known.max() < table.shape[1]:
        raise ValueError(
            f"Labels must lie in 0..{table.shape[1] - 1}, or be {_UNKNOWN} where the class is not known; "
            f"got {known.min()}..{known.max()}."
        )
    return table, known


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels that a box touches.

    Args:
        box: left, top, right, bottom in pixels; right and bottom are the first outside.
        size: height and width of the image.

    Returns:
        (height, width) bool. What lies outside the image is cut off.

    Raises:
        ValueError: nothing of the box lies in the image.
    """
    left, top, right, bottom = box
    height, width = size
    if not (max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)):
        raise ValueError(
            f"Box {tuple(box)} has no pixel in an image of height {height} and width {width}; expected left, top, "
            "right, bottom in pixels, with left < right and top < bottom."
        )
    mask = np.zeros(size, dtype=bool)
    mask[max(int(np.floor(top)), 0) : int(np.ceil(bottom)), max(int(np.floor(left)), 0) : int(np.ceil(right))] = True
    return mask


def contrast_to_noise(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """Contrast-to-noise ratio `|μ_in - μ_out| / sqrt(σ²_in + σ²_out)`.

    Args:
        heatmap: (H, W).
        mask: (H, W) bool, true where the finding is.

    Returns:
        0 or more; 0 for a map that is the same everywhere, infinite for one with two values that are the mask's; NaN
        if the mask is the whole image.
    """
    heat, region = _map_and_region(heatmap, mask)
    if region.all():
        return float("nan")
    # Before any rounding: the means of equal numbers may differ in their last bits, and the noise is as small.
    if heat.min() == heat.max():
        return 0.0
    inside, outside = heat[region], heat[~region]
    # Constant parts exactly, for the same reason.
    noise = sum(float(part.var()) if part.min() < part.max() else 0.0 for part in (inside, outside))
    contrast = abs(float(inside.mean()) - float(outside.mean()))
    return contrast / noise**0.5 if noise else float("inf")


def pointing_hit(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """The pointing game: whether the map's peak lies in the finding; all of its peaks, if it has several.

    Args:
        heatmap: (H, W).
        mask: (H, W) bool, true where the finding is.

    Returns:
        1 or 0.
    """
    heat, region = _map_and_region(heatmap, mask)
    return float(heat[region].max() > heat[~region].max(initial=-np.inf))


def mean_iou(heatmap: ArrayLike, mask: ArrayLike, thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)) -> float:
    """Intersection over union of the finding and the map's warm pixels, as a mean over thresholds.

    Args:
        heatmap: (H, W); it is scaled to 0..1 by its least and greatest value.
        mask: (H, W) bool, true where the finding is.
        thresholds: of 0..1; pixels of at least so much are warm.

    Returns:
        0..1; 0 for a map that is the same everywhere.
    """
    heat, region = _map_and_region(heatmap, mask)
    heat = _scaled(heat)
    warm = [heat >= threshold for threshold in thresholds]
    return float(np.mean([(part & region).sum() / (part | region).sum() for part in warm]))


def energy_in_box(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """The share of the map's heat that lies in the finding: the pointing game by energy.

    Args:
        heatmap: (H, W); its least value counts as no heat.
        mask: (H, W) bool, true where the finding is.

    Returns:
        0..1; 0 for a map that is the same everywhere.
    """
    heat, region = _map_and_region(heatmap, mask)
    heat = _scaled(heat)
    total = heat.sum()
    return float(heat[region].sum() / total) if total else 0.0


def _map_and_region(heatmap: ArrayLike, mask: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    heat, region = np.asarray(heatmap, dtype=np.float64), np.asarray(mask)
    if heat.ndim != 2 or heat.shape != region.shape or region.dtype != bool:
        raise ValueError(
            f"Expected a heat-map (H, W) and a bool mask of the same size, got {heat.shape} and {region.shape} "
            f"{region.dtype}."
        )
    if not region.any():
        raise ArgumentError("The mask has no true pixel: there is no finding to point at.")
    if not np.isfinite(heat).all():
        raise ValueError("The heat-map holds values that are not finite numbers.")
    return heat, region


def _scaled(heat: np.ndarray) -> np.ndarray:
    """To 0..1 by the least and greatest value; zeros if they are equal."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if low < high else np.zeros_like(heat)
