"""Fits a rejector on images that a model should accept, and writes the model's folder anew.

Shapes: N images, M images that set the limits, F features, K experts.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medmoe_hf.model.rejection_medmoe as model_rejection
from medmoe_hf.common.console import progress
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.errors import ArgumentError, SourceError
from medmoe_hf.evaluation.calibrate import data_names, open_stream, places, split_of, write_anew
from medmoe_hf.inference.batching import BATCH_SIZE, default_device
from medmoe_hf.model import MedMoEModel, MedMoEProcessor, Rejector
from medmoe_hf.model.rejection_medmoe import rejection_features, sample_weights

logger = logging.getLogger(__name__)

DIRECTIONS = 64
"""Directions with a variance of their own: a quarter of a megabyte for a thousand features."""
ACCEPT = 0.95
LEAST = 50
"""Images that a rejector is fitted on, and images that set its limits, at least."""
LEAST_OF_EXPERT = 10
"""Images of an expert, at least, from which a distance to it is measured; those routed to others are refused."""
LEFT_OUT = 0.2
"""Share of the subjects that set the limits if no other images do."""
_ROUNDING = 2e-5  # of distances, more than float32 makes of them
_TOO_NEAR = (
    "Images of `train` may be fitted on, but here they also set the limits, which are too strict if the model was "
    "trained on them: name images that it was not trained on by `--held-out`."
)


def fit_rejector(
    features: np.ndarray,
    expert_ids: np.ndarray,
    held_features: np.ndarray,
    held_ids: np.ndarray,
    *,
    experts: int,
    weights: Tensor,
    accept: float = ACCEPT,
    directions: int = DIRECTIONS,
    facts: Mapping[str, Any] | None = None,
) -> Rejector:
    """Fits a rejector to features.

    Args:
        features: (N, F) of `rejection_features`, of images that the model may have been trained on.
        expert_ids: (N,), the expert that each is routed to.
        held_features: (M, F), of images that it was not trained on.
        held_ids: (M,).
        experts: K.
        weights: Of `sample_weights`.
        accept: Share of new images like these that are accepted, between 0 and 1.
        directions: Directions with a variance of their own, at most.
        facts: What the rejector is stored with.

    Returns:
        The rejector.

    Raises:
        ArgumentError: For too few images, values that are not finite, or a share out of range.

    Example:
        >>> import numpy as np, torch
        >>> from medmoe_hf.evaluation.rejector import fit_rejector
        >>> known = np.random.default_rng(0).normal(size=(300, 8))
        >>> ids = np.zeros(100, dtype=int)
        >>> rejector = fit_rejector(
        ...     known[:200], ids.repeat(2), known[200:], ids, experts=1, weights=torch.zeros(1), directions=4
        ... )
        >>> scores = rejector.scores(torch.from_numpy(known[200:]), torch.from_numpy(ids))
        >>> int((scores <= 1).sum()), bool(rejector.scores(torch.full((1, 8), 9.0), torch.tensor([0])) > 1)
        (96, True)
    """
    if min(len(features), len(held_features)) < LEAST:
        raise ArgumentError(
            f"A rejector needs {LEAST} images to be fitted on and {LEAST} others that set its limits, got "
            f"{len(features)} and {len(held_features)}."
        )
    for what, values in (("features", features), ("held_features", held_features)):
        if not np.isfinite(values).all():
            raise ArgumentError(f"`{what}` must be finite; check the weights of the model.")
    if not 0 < accept < 1:
        raise ArgumentError(f"`accept` must lie between 0 and 1, got {accept}.")
    known = np.asarray(features, dtype=np.float64)
    center, spread = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-6)
    known = (known - center) / spread
    counts = np.bincount(expert_ids, minlength=experts)
    overall = known.mean(axis=0)
    means = np.stack(
        [known[expert_ids == k].mean(axis=0) if counts[k] >= LEAST_OF_EXPERT else overall for k in range(experts)]
    )
    apart = known - means[expert_ids]
    # The smaller of both numbers of dimensions: few images span few directions.
    _, values, rows = np.linalg.svd(apart, full_matrices=False)
    variances = np.maximum(values**2 / len(apart), 1e-9)
    kept = min(directions, len(apart) // 4, known.shape[1] - 1)
    rest = max(float(variances[kept:].sum()) / (known.shape[1] - kept), 1e-9)
    fitted = {
        "center": center,
        "spread": spread,
        "means": means,
        "directions": rows[:kept].T,
        "variances": variances[:kept],
        "rest": np.array(rest),
        "limits": np.ones(experts),
    }
    tensors: dict[str, Any] = {name: torch.tensor(value).float() for name, value in fitted.items()}
    unlimited = Rejector(**tensors, weights=weights)
    distances = unlimited.distances(torch.from_numpy(held_features).double(), torch.from_numpy(held_ids)).numpy()
    limits = _limits(distances, held_ids, counts, accept)
    return Rejector(**{**tensors, "limits": torch.from_numpy(limits).float()}, weights=weights, facts=facts or {})


def _limits(distances: np.ndarray, ids: np.ndarray, counts: np.ndarray, accept: float) -> np.ndarray:
    """The distance up to which images of each expert are accepted; of all images together where an expert has few."""
    found = np.full(len(counts), _quantile(distances, accept))
    for expert, count in enumerate(counts):
        own = distances[ids == expert]
        if count < LEAST_OF_EXPERT:
            found[expert] = 1e-6  # nothing is near an expert of which no image is known
        elif len(own) >= LEAST:
            found[expert] = _quantile(own, accept)
    limits: np.ndarray = np.maximum(found, 1e-6)
    return limits


def _quantile(distances: np.ndarray, accept: float) -> float:
    """The distance within which a new image is with this probability, as in split conformal prediction."""
    place = min(math.ceil((len(distances) + 1) * accept), len(distances))
    # The image that sets the limit is accepted, also where another size of batch rounds its features otherwise.
    return float(np.sort(distances)[place - 1]) * (1 + _ROUNDING)


@dataclass
class RejectorReport:
    """What `add_rejector` did.

    Attributes:
        rejector: The rejector.
        folder: The folder that was written.
        experts: Names of the experts.
    """

    rejector: Rejector
    folder: str
    experts: list[str]

    def __str__(self) -> str:
        fitted, held = (self.rejector.facts[key] for key in ("fitted_on", "limits_from"))
        lines = [
            f"Fitted on {_counted(fitted)} ({fitted['data']}, split {fitted['split']}).",
            f"Limits from {_counted(held)} (split {held['split']}): {held['accepted']:.1%} of them are accepted.",
        ]
        unknown = [name for name in self.experts if fitted["by_expert"].get(name, 0) < LEAST_OF_EXPERT]
        if unknown:
            lines.append(
                f"Refused whatever they show: images that are routed to {', '.join(unknown)}, without images."
            )
        return "\n".join([*lines, f"Wrote {self.folder}."])


def _counted(facts: Mapping[str, Any]) -> str:
    subjects = "" if facts["subjects"] is None else f" of {facts['subjects']} subjects"
    return f"{facts['images']} images{subjects}"


def add_rejector(
    model: str | Path,
    sources: Sequence[Any],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    held_out: str | None = None,
    accept: float = ACCEPT,
    allow_test: bool = False,
    max_images: int = 5000,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
    force: bool = False,
) -> RejectorReport:
    """Fits a rejector on images that the model should accept, and stores it in the folder of the model.

    The folder is copied with a new `rejector.safetensors`, and renamed once it is complete.

    Args:
        model: Folder, Hub id, or `small`, the checkpoint of the package.
        sources: Models of `medmoe_hf.data.sources`; no labels are needed.
        out: Folder to create; None replaces `model`, which must be a folder of yours.
        split: Rows with this value of the field `split` are fitted on; None for those that the sources select.
        held_out: Rows with this value of the field `split` set the limits: images that the model was not trained on.
            None to leave out a fifth of the subjects of the other images.
        accept: Share of new images like these that are accepted, between 0 and 1.
        allow_test: Whether a split or file called test or external may be used. It cannot be measured on afterwards.
        max_images: Largest number of images of each of the two parts; of more, a random choice.
        seed: Seed of this choice and of the subjects that are left out.
        batch_size: Images per batch.
        num_workers: Processes that read and decode.
        max_bad_fraction: Share of faulty samples, of 0..1, above which nothing is written.
        force: Whether an existing `out` is replaced.

    Returns:
        What was fitted.

    Raises:
        ArgumentError: For a split that is for testing, too few images, or an argument that does not fit.
        SourceError: For sources without rows.
        FileExistsError: If `out` exists and `force` is False.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.evaluation.rejector import add_rejector

        print(add_rejector("scratch/model", load_sources("sources.yaml"), split="train", held_out="val"))
        ```
    """
    folder, target = places(model, out, force)
    if not 0 < accept < 1:
        raise ArgumentError(f"`accept` must lie between 0 and 1, got {accept}.")
    if held_out is not None and held_out == split:
        raise ArgumentError(f"`held_out` must be another split than {split}, which the rejector is fitted on.")
    parts = [split] if held_out is None else [split, held_out]
    streams = []
    for number, name in enumerate(parts):
        what = "known images" if number == 0 else "images that set the limits"
        chosen = [_of_split(source, name) for source in sources]
        streams.append(open_stream(chosen, what, num_workers, max_bad_fraction, shuffle=True, seed=seed))
    # Images that the model was trained on may be fitted on, but are nearer than new ones, which the limits are for.
    last = len(streams) - 1
    splits = [
        split_of(stream, allow_test, _TOO_NEAR if number == last else "") for number, stream in enumerate(streams)
    ]
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(folder, dtype=torch.float32).eval().to(default_device(None))
        processor: Any = MedMoEProcessor.from_pretrained(folder)
    weights = sample_weights(loaded.vision_model)
    assert weights is not None  # loaded in float32
    known, *others = [_read(loaded, processor, stream, batch_size, max_images) for stream in streams]
    known, held = (known, others[0]) if others else _left_out(known, seed)
    names = list(loaded.config.modalities.values())
    rejector = fit_rejector(
        known.features, known.ids, held.features, held.ids, experts=len(names), weights=weights, accept=accept
    )
    accepted = rejector.scores(torch.from_numpy(held.features), torch.from_numpy(held.ids)) <= 1
    facts = {
        "accept": accept,
        # Whole dates look like those of patients, which are not published.
        "fitted_on": {"data": data_names(streams[0]), "split": splits[0], **known.facts(names)}
        | {"date": datetime.now(timezone.utc).strftime("%Y-%m")},
        "limits_from": {"data": data_names(streams[-1]), "split": splits[-1], **held.facts(names)}
        | {"accepted": float(accepted.double().mean())},
    }
    stored = Rejector(**{**vars(rejector), "facts": facts})
    write_anew(folder, target, model_rejection, lambda made: stored.save(made / model_rejection.REJECTOR_FILE))
    return RejectorReport(stored, str(target), names)


def _of_split(source: Any, split: str | None) -> Any:
    if split is None:
        return source
    return source.model_copy(update={"where": {**(source.where or {}), "split": [split]}})


@dataclass
class KnownImages:
    """What a rejector is fitted on.

    Attributes:
        features: (N, F) float32 of `rejection_features`.
        ids: (N,) the expert that each image is routed to.
        subjects: N subjects; None where one is unknown.
    """

    features: np.ndarray
    ids: np.ndarray
    subjects: list[str | None]

    def part(self, rows: np.ndarray) -> "KnownImages":
        """Selects rows."""
        return KnownImages(self.features[rows], self.ids[rows], [self.subjects[row] for row in rows])

    def facts(self, experts: Sequence[str]) -> dict[str, Any]:
        """Numbers of images, subjects (None if one is unknown) and images of each expert."""
        counts = Counter(self.ids.tolist())
        return {
            "images": len(self.ids),
            "subjects": None if None in self.subjects else len(set(self.subjects)),
            "by_expert": {name: counts[number] for number, name in enumerate(experts)},
        }


@torch.inference_mode()
def known_images(model: Any, pixel_values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Computes what a rejector sees of images.

    Args:
        model: A `MedMoEModel` in `eval` mode.
        pixel_values: (B, 3, H, W).

    Returns:
        (B, F) float32 features, and the (B,) experts that the images are routed to.
    """
    encoded = model.vision_model.encode(pixel_values)
    ids = model.vision_model.router(encoded.pooler_output).argmax(dim=-1)
    return rejection_features(encoded.feature_maps).cpu().numpy(), ids.cpu().numpy()


def _read(model: Any, processor: Any, stream: Any, batch_size: int, max_images: int) -> KnownImages:
    collator = ContrastiveCollator(processor)
    stream.prepare = collator.prepare  # as `calibrate` does
    found: list[tuple[np.ndarray, np.ndarray]] = []
    subjects: list[Any] = []
    waiting: list[Any] = []

    def finish() -> None:
        pixels = torch.from_numpy(np.stack(waiting)).to(model.device)
        found.append(known_images(model, collator.normalize({"pixel_values": pixels})["pixel_values"].float()))
        waiting.clear()

    for sample in progress(stream, "images", unit="image"):
        subjects.append(None if sample["subject"] is None else str(sample["subject"]))
        waiting.append(sample["image"])
        if len(waiting) == batch_size:
            finish()
        if len(subjects) == max_images:
            break
    if waiting:
        finish()
    if not found:
        raise SourceError("The sources have no images.")
    features, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return KnownImages(features, ids, subjects)


def _left_out(known: KnownImages, seed: int) -> tuple[KnownImages, KnownImages]:
    """Leaves out a fifth of the subjects; each image of an unknown subject counts as one."""
    keys = [f"row {row}" if one is None else one for row, one in enumerate(known.subjects)]
    if None in known.subjects:
        logger.warning("Some images have no subject: images of one patient may be on both sides of the limits.")
    names = sorted(set(keys))
    chosen = np.random.default_rng(seed).permutation(len(names))[: max(1, round(LEFT_OUT * len(names)))]
    held = {names[place] for place in chosen}
    rows = np.array([key in held for key in keys])
    return known.part(np.flatnonzero(~rows)), known.part(np.flatnonzero(rows))
