"""Grounding: whether the heat-map of a phrase lies where the finding is, and that of a nonsense word does not."""

from collections.abc import Sequence

import numpy as np

from medmoe_hf.errors import ArgumentError
from medmoe_hf.evaluation.dataset import Box, EvaluationSet, test_split
from medmoe_hf.evaluation.intervals import bootstrap
from medmoe_hf.evaluation.metrics import box_mask, contrast_to_noise, energy_in_box, mean_iou, pointing_hit
from medmoe_hf.evaluation.results import HeatmapExample, Result, common_facts
from medmoe_hf.inference.batching import read_picture
from medmoe_hf.inference.encoders import Encoder, MedMoEEncoder
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY

NONSENSE = ("glorbix", "quandle", "zwyvex")
"""Meaningless words: what their maps show does not depend on the word."""

METRICS = {
    "contrast_to_noise": contrast_to_noise,
    "pointing": pointing_hit,
    "mean_iou": mean_iou,
    "energy_in_box": energy_in_box,
}
_EXAMPLES_BY_MODALITY = 2
_SHEET_ROWS = 12


def grounding(encoder: Encoder, data: EvaluationSet, resamples: int = 1000, seed: int = 0) -> Result:
    """Localizes each image's phrase in the test split, and nonsense words in the same images.

    Images without a phrase or a box are left out. Variants: `phrase`; `nonsense`, the mean over three made-up words;
    `phrase - nonsense`, per image; `chance`, the hits of a random pixel; and `phrase, <modality>`. `same_map` is the
    correlation of the phrase's map with those of nonsense words: near 1, the map does not depend on the words.

    Args:
        encoder: A `MedMoEEncoder`; see `load_encoder`.
        data: A set with phrases and boxes.
        resamples: Number of bootstrap resamples; subjects are resampled where they are known.
        seed: Seed of the bootstrap.

    Returns:
        The result, with protocol `grounding` and a few `examples` for a figure.

    Raises:
        ValueError: For a model without heat-maps, or a set without phrases and boxes.

    Example:
        ```python
        (data,) = open_recipe(load_recipe("ms_cxr"), "ms_cxr")
        result = grounding(load_encoder("small"), data)
        print(result.metrics["phrase - nonsense/pointing"])
        ```
    """
    if not isinstance(encoder, MedMoEEncoder):
        raise ArgumentError(f"{encoder.name} has no heat-maps of words; only a MedMoE has.")
    data = test_split(data)
    if data.phrases is None or data.boxes is None:
        raise ArgumentError(f"{data.name}: grounding needs phrases and boxes.")
    rows = [row for row in range(len(data)) if data.phrases[row] and data.boxes[row]]
    if not rows:
        raise ArgumentError(f"{data.name}: no image of the test split has both a phrase and a box.")
    images, boxes = [data.images[row] for row in rows], [data.boxes[row] for row in rows]
    phrases = [data.phrases[row] for row in rows]
    references = None if data.references is None else [data.references[row] for row in rows]
    modalities = np.full(len(rows), UNKNOWN_MODALITY) if data.modalities is None else data.modalities[rows]
    experts = encoder.expert_ids(modalities)

    def localize(words: Sequence[str]) -> list[np.ndarray]:
        return encoder.heatmaps(images, words, references, experts.tolist())

    found = localize(phrases)
    masks = [_mask(own, heatmap.shape) for own, heatmap in zip(boxes, found, strict=True)]
    measured = _measure(found, masks)
    chosen = _spread(modalities)
    controls, shown = [], {}
    # One word at a time: maps in original pixels are large.
    for word in NONSENSE:
        maps = localize([word] * len(rows))
        same = [_correlation(one, other) for one, other in zip(found, maps, strict=True)]
        controls.append(_measure(maps, masks) | {"same_map": np.array(same)})
        if word == NONSENSE[0]:
            shown = {row: maps[row] for row in chosen}
    nonsense = {name: np.mean([control[name] for control in controls], axis=0) for name in controls[0]}

    result = Result(
        protocol="grounding",
        model=encoder.name,
        dataset=data.name,
        count=len(rows),
        metrics={},
        facts={
            **common_facts(encoder, data, seed, resamples, phrases),
            "nonsense": list(NONSENSE),
            "references": references is not None,
        },
    )
    subjects = None if data.subjects is None else np.array(data.subjects)[rows]

    def add(variant: str, columns: dict[str, np.ndarray], kept: np.ndarray) -> None:
        names, values = list(columns), np.stack(list(columns.values()), axis=1)[kept]
        groups = None if subjects is None else subjects[kept]
        result.add(
            variant,
            bootstrap(
                lambda part: dict(zip(names, part.mean(axis=0).tolist(), strict=True)),
                values,
                groups=groups,
                resamples=resamples,
                seed=seed,
            ),
        )

    everything = np.ones(len(rows), dtype=bool)
    add("phrase", measured, everything)
    add("nonsense", nonsense, everything)
    add("phrase - nonsense", {name: measured[name] - nonsense[name] for name in METRICS}, everything)
    add("chance", {"pointing": np.array([mask.mean() for mask in masks])}, everything)
    for modality, name in enumerate(MODALITIES):
        if 0 < (modalities == modality).sum() < len(rows):
            add(f"phrase, {name}", measured, modalities == modality)
    result.examples = [
        HeatmapExample(
            image=np.asarray(read_picture(images[row])),
            phrase=phrases[row],
            heatmap=found[row],
            nonsense=NONSENSE[0],
            nonsense_heatmap=shown[row],
            boxes=list(boxes[row]),
            label=MODALITIES[modalities[row]] if modalities[row] >= 0 else "",
        )
        for row in chosen
    ]
    return result


def _mask(boxes: Sequence[Box], size: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool: the union of the boxes."""
    covered: np.ndarray = np.any([box_mask(box, (size[0], size[1])) for box in boxes], axis=0)
    return covered


def _measure(heatmaps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> (N,) values of each of `METRICS`."""
    return {
        name: np.array([metric(heatmap, mask) for heatmap, mask in zip(heatmaps, masks, strict=True)])
        for name, metric in METRICS.items()
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson correlation of two maps; 0 if one of them is constant."""
    left, right = one - one.mean(dtype=np.float64), other - other.mean(dtype=np.float64)
    length = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum() / length) if length else 0.0


def _spread(modalities: np.ndarray) -> list[int]:
    """Selects the first few rows of each modality, without cherry-picking."""
    rows = [
        int(row)
        for modality in np.unique(modalities)
        for row in (modalities == modality).nonzero()[0][:_EXAMPLES_BY_MODALITY]
    ]
    return rows if len(np.unique(modalities)) > 1 else list(range(min(_SHEET_ROWS // 2, len(modalities))))
