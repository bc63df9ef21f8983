"""Metrics of retrieval, classification, calibration and grounding, as functions of scores.

They take NumPy arrays or tensors and return plain floats, or one value per query where the docstring says so.
Undecided cases count against the model: ties, constant heat-maps, scores that are NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from medmoe_hf.errors import ArgumentError

CALIBRATION_BINS = 15
CHEXPERT_FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
"""The findings of CheXpert's competition, over whose AUROC models are compared."""
CHEXPERT_METRIC = "chexpert5_auroc"
_SAME_FINDING = {"effusion": "pleural effusion", "oedema": "edema"}
_UNKNOWN = -100  # as in the losses


def caption_groups(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Numbers captions, equal captions alike: the groups by which `ranks` knows the right candidates.

    Args:
        captions: N sequences, the captions of each image.

    Returns:
        (N, G) int64, with G the largest number of captions per image; -1 where an image has fewer.
        `groups[groups >= 0]` are the groups of all captions, image by image.

    Example:
        >>> caption_groups([["normal"], ["cyst", "normal"]]).tolist()
        [[0, -1], [1, 0]]
    """
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(caption, len(numbers)) for caption in own] for own in captions]
    width = max((len(row) for row in rows), default=0)
    return np.array([row + [-1] * (width - len(row)) for row in rows], dtype=np.int64).reshape(len(rows), width)


def ranks(
    scores_of: Callable[[slice], Any], query_groups: ArrayLike, candidate_groups: ArrayLike, chunk: int = 1024
) -> np.ndarray:
    """Computes the rank, from 0, of each query's best right candidate, in chunks of queries.

    The rank is the number of wrong candidates that score the same or higher: ties count against the model. A candidate
    is right if it shares a group with the query, so identical captions must have the same group (`caption_groups`).

    Args:
        scores_of: Function that returns the scores (n, M) of a slice of the queries; for a table (N, M),
            `table.__getitem__`.
        query_groups: (N,), or (N, G) for queries with several groups; negative numbers are not groups.
        candidate_groups: (M,) or (M, G), likewise.
        chunk: Queries per chunk.

    Returns:
        (N,) int64, 0 to the number of wrong candidates.

    Raises:
        ValueError: If a query has no right candidate, or the scores do not match the groups.

    Example:
        >>> table = np.array([[0.9, 0.1], [0.7, 0.6]])
        >>> ranks(table.__getitem__, [0, 1], [0, 1]).tolist()
        [0, 1]
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
        unmatched = (~right.any(dim=1)).nonzero().flatten()
        if len(unmatched):
            raise ArgumentError(
                f"Query {start + int(unmatched[0])} has no right candidate: none shares a group with it."
            )
        right = right.to(table.device)
        best = table.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # Not `>=`: a NaN compares false with everything, and must not make a query look solved.
        found[rows] = (~(table < best) & ~right).sum(dim=1).cpu().numpy()
    return found


def retrieval_metrics(
    image_ranks: ArrayLike | None = None, text_ranks: ArrayLike | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Computes recall@k and median rank from ranks.

    In a bootstrap, resample the ranks: all candidates stay.

    Args:
        image_ranks: (N,) ranks from `ranks` of images as queries among texts; None omits this direction.
        text_ranks: (M,) ranks of texts as queries among images, likewise.
        ks: Cut-offs.

    Returns:
        `{"image_to_text_r1": ..., "image_to_text_median_rank": ..., "text_to_image_r1": ..., ...}`: recalls are
        0..1, the best median rank is 1.

    Example:
        >>> retrieval_metrics([0, 3], ks=(1,))
        {'image_to_text_r1': 0.5, 'image_to_text_median_rank': 2.5}
    """
    result: dict[str, float] = {}
    for direction, found in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        if found is not None:
            positions = np.asarray(found)
            result |= {f"{direction}_r{k}": float((positions < k).mean()) for k in ks}
            result[f"{direction}_median_rank"] = float(np.median(positions)) + 1
    return result


def recall_at_k(
    scores: Tensor, captions: Sequence[str] | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Computes recall@k of a paired set, in both directions.

    A query is a hit if any right candidate is among the first k. Ties count against the model: see `ranks`.

    Args:
        scores: (N, N), row i for image i, column j for caption j; image i belongs to caption i.
        captions: N captions, so that identical ones count as right for each other's images; None if all differ.
        ks: Cut-offs.

    Returns:
        `{"image_to_text_r1": ..., "text_to_image_r1": ..., ...}`, 0..1.

    Raises:
        ValueError: If `scores` is not square.

    Example:
        >>> recall_at_k(torch.tensor([[0.9, 0.1], [0.7, 0.6]]), ks=(1,))
        {'image_to_text_r1': 0.5, 'text_to_image_r1': 1.0}
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
    """Computes the fraction of each query's first k candidates that are of its class; in ties, wrong ones come first.

    A class with fewer than k candidates cannot reach 1.

    Args:
        scores: (N, M).
        query_labels: (N,) class ids.
        candidate_labels: (M,) class ids.
        ks: Cut-offs.

    Returns:
        `{"precision_at_5": (N,) float64, ...}`, one value per query, 0..1, so that their mean can be bootstrapped;
        NaN where there are fewer than k candidates.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> precision_at_k([[0.9, 0.8, 0.1]], [1], [1, 0, 1], ks=(2,))["precision_at_2"].tolist()
        [0.5]
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
    """Computes the fraction of right predictions.

    Args:
        predicted: (N,) ids.
        labels: (N,) ids.
        ignore: Label of rows that are left out.

    Returns:
        0..1; NaN if all rows are left out.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), ignore=-100) > 0.66
        True
    """
    known = labels != ignore
    return (predicted[known] == labels[known]).float().mean().item()


def classification_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Computes accuracy, and the means over classes of recall, AUROC, F1 and average precision.

    AUROC and average precision compare each class with the rest by its column of scores. The scores of different rows
    must therefore be comparable: pass probabilities over the classes, not cosines.

    Args:
        scores: (N, C); the highest of a row is its prediction.
        labels: (N,) ids 0..C-1; rows of -100 are left out.

    Returns:
        `accuracy`, `balanced_accuracy`, `macro_auroc`, `macro_f1`, `macro_average_precision`, 0..1. The means are NaN
        if a class has no row (AUROC also if it has all rows), and everything is NaN if a score is NaN.

    Raises:
        ValueError: If the shapes do not match, or a label is out of range.

    Example:
        >>> metrics = classification_metrics([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [0, 1, 1])
        >>> round(metrics["accuracy"], 3), metrics["macro_auroc"]
        (0.667, 1.0)
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


def chexpert_findings(names: Sequence[str]) -> list[str]:
    """Finds the five findings of CheXpert's competition among the findings of a set.

    Args:
        names: Names of findings. Case and underscores do not matter; `effusion`, as in ChestX-ray14, is the pleural
            one.

    Returns:
        The five names as they are in `names`, in the order of `CHEXPERT_FINDINGS`; empty unless all are there.

    Example:
        >>> chexpert_findings(["edema", "Effusion", "mass", "atelectasis", "Cardiomegaly", "consolidation"])
        ['atelectasis', 'Cardiomegaly', 'consolidation', 'edema', 'Effusion']
    """
    known = {}
    for name in names:
        plain = " ".join(name.replace("_", " ").casefold().split())
        known[_SAME_FINDING.get(plain, plain)] = name
    found = [known.get(finding.casefold()) for finding in CHEXPERT_FINDINGS]
    return [name for name in found if name is not None] if None not in found else []


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
        `chexpert5_auroc`, the mean AUROC of CheXpert's five competition findings, if all of them are among `names`;
        NaN unless all five are defined.

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
    if five := chexpert_findings(names):
        result[CHEXPERT_METRIC] = float(np.mean([result[f"{name}/auroc"] for name in five]))
    return result


def _one_against_rest(scores: np.ndarray, is_class: np.ndarray) -> tuple[float, float]:
    """Computes AUROC and average precision of one class.

    From two sorted lists: scikit-learn's functions return the same, but take fifteen times as long, and the bootstrap
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
    """Measures the calibration of probabilities.

    Args:
        probabilities: (N, C), rows sum to 1.
        labels: (N,) ids 0..C-1; rows of -100 are left out.

    Returns:
        `ece`: expected calibration error, 0..1: the mean distance between accuracy and confidence (the highest
        probability of a row) over 15 bins of equal width. `brier`: mean over rows of the squared errors' sum over
        classes, 0..2. Both are NaN without rows. `bins`: for the reliability diagram, a list of `{"low", "high",
        "count", "confidence", "accuracy"}`, each (low, high]; NaN where the count is 0.

    Raises:
        ValueError: If rows are not probabilities.

    Example:
        >>> round(calibration([[0.9, 0.1], [0.2, 0.8]], [0, 1])["brier"], 3)
        0.05
    """
    table, known = _known_rows(probabilities, labels)
    if not (np.all(table >= 0) and np.allclose(table.sum(axis=1), 1, atol=1e-3)):
        raise ValueError("`probabilities` must be at least 0 and sum to 1 in each row; logits need a softmax first.")
    confidence, right = table.max(axis=1), table.argmax(axis=1) == known
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    # Rounding may put a confidence slightly above 1.
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
    """Selects the rows whose label is known: scores (n, C) float64 and labels (n,) int64."""
    table, known = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if table.ndim != 2 or known.shape != table.shape[:1]:
        raise ValueError(f"Expected scores (N, C) and labels (N,), got {table.shape} and {known.shape}.")
    table, known = table[known != _UNKNOWN], known[known != _UNKNOWN]
    if len(known) and not 0 <= known.min() <= known.max() < table.shape[1]:
        raise ValueError(
            f"Labels must lie in 0..{table.shape[1] - 1}, or be {_UNKNOWN} where the class is unknown; "
            f"got {known.min()}..{known.max()}."
        )
    return table, known


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Draws the pixels that a box touches.

    Args:
        box: Left, top, right, bottom in pixels; right and bottom are the first pixels outside.
        size: Height and width of the image.

    Returns:
        (height, width) bool; the box is clipped to the image.

    Raises:
        ValueError: If the box is outside the image.

    Example:
        >>> int(box_mask((1, 0, 3, 2), (4, 4)).sum())
        4
    """
    left, top, right, bottom = box
    height, width = size
    if not (max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)):
        raise ValueError(
            f"Box {tuple(box)} does not overlap an image of height {height} and width {width}; expected left, top, "
            "right, bottom in pixels, with left < right and top < bottom."
        )
    mask = np.zeros(size, dtype=bool)
    mask[max(int(np.floor(top)), 0) : int(np.ceil(bottom)), max(int(np.floor(left)), 0) : int(np.ceil(right))] = True
    return mask


def contrast_to_noise(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """Computes the contrast-to-noise ratio `|μ_in - μ_out| / sqrt(σ²_in + σ²_out)`.

    Args:
        heatmap: (H, W).
        mask: (H, W) bool, true where the finding is.

    Returns:
        0 or more; 0 for a constant map, infinite for one that is constant inside and outside the mask but differs
        between them; NaN if the mask covers the complete image.

    Raises:
        ValueError: If the shapes differ, the mask is empty or the map is not finite.

    Example:
        >>> contrast_to_noise([[2.0, 0.0], [2.0, 1.0]], np.array([[True, False], [True, False]]))
        3.0
    """
    heat, region = _map_and_region(heatmap, mask)
    if region.all():
        return float("nan")
    # Before any rounding: the means of equal numbers may differ in their last bits, and so may the noise.
    if heat.min() == heat.max():
        return 0.0
    inside, outside = heat[region], heat[~region]
    # Constant parts have exactly no noise, for the same reason.
    noise = sum(float(part.var()) if part.min() < part.max() else 0.0 for part in (inside, outside))
    contrast = abs(float(inside.mean()) - float(outside.mean()))
    return contrast / noise**0.5 if noise else float("inf")


def pointing_hit(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """Plays the pointing game: whether the map's peak lies in the finding; all peaks, if there are several.

    Args:
        heatmap: (H, W).
        mask: (H, W) bool, true where the finding is.

    Returns:
        1 or 0.

    Raises:
        ValueError: If the shapes differ, the mask is empty or the map is not finite.

    Example:
        >>> pointing_hit([[0.1, 0.9]], np.array([[False, True]]))
        1.0
    """
    heat, region = _map_and_region(heatmap, mask)
    return float(heat[region].max() > heat[~region].max(initial=-np.inf))


def mean_iou(heatmap: ArrayLike, mask: ArrayLike, thresholds: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)) -> float:
    """Computes the intersection over union of the finding and the thresholded map, as a mean over thresholds.

    Args:
        heatmap: (H, W); it is scaled to 0..1 by its minimum and maximum.
        mask: (H, W) bool, true where the finding is.
        thresholds: Thresholds of the scaled map, 0..1.

    Returns:
        0..1; 0 for a constant map.

    Raises:
        ValueError: If the shapes differ, the mask is empty or the map is not finite.

    Example:
        >>> mean_iou([[0.0, 1.0]], np.array([[False, True]]))
        1.0
    """
    heat, region = _map_and_region(heatmap, mask)
    heat = _scaled(heat)
    above = [heat >= threshold for threshold in thresholds]
    return float(np.mean([(part & region).sum() / (part | region).sum() for part in above]))


def energy_in_box(heatmap: ArrayLike, mask: ArrayLike) -> float:
    """Computes the share of the map's energy that lies in the finding (energy-based pointing game).

    Args:
        heatmap: (H, W); its minimum counts as zero energy.
        mask: (H, W) bool, true where the finding is.

    Returns:
        0..1; 0 for a constant map.

    Raises:
        ValueError: If the shapes differ, the mask is empty or the map is not finite.

    Example:
        >>> energy_in_box([[0.0, 1.0, 3.0]], np.array([[False, False, True]]))
        0.75
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
        raise ValueError("The heat-map contains values that are not finite.")
    return heat, region


def _scaled(heat: np.ndarray) -> np.ndarray:
    """Scales to 0..1 by minimum and maximum; zeros if they are equal."""
    low, high = heat.min(), heat.max()
    return (heat - low) / (high - low) if low < high else np.zeros_like(heat)
