"""Measures which pictures a checkpoint refuses, and first fits its rejector if it has none.

    python examples/experiments/real/rejection.py --model FOLDER --data DATA --out RUN/rejection.json [--fit]

With --fit, the rejector is fitted on `train` (at most 100 images of a source), its limits are set on `val`, and it is
stored in FOLDER with what was measured. Share-alike sources are left out of both. `medmoe fit-rejector` does the same
for any model and data.

Measured: how well scores tell images of `test` from photographs, pages of text, noise, drawings and screenshots, those
of `foreign.py` that nothing was chosen on; and how many images of each split are refused, with intervals by subject.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foreign import foreign_images
from manifest import SPLITS, Row, is_share_alike, read_manifest, sha256
from sklearn.metrics import roc_auc_score

import medmoe_hf.model.rejection_medmoe as model_rejection
from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write
from medmoe_hf.evaluation.calibrate import write_anew
from medmoe_hf.evaluation.intervals import Interval, bootstrap
from medmoe_hf.evaluation.rejector import ACCEPT, KnownImages, fit_rejector, known_images
from medmoe_hf.model import MedMoEModel, MedMoEProcessor, Rejector
from medmoe_hf.model.rejection_medmoe import REJECTOR_FILE, sample_weights

BATCH_SIZE = 32
OF_A_SOURCE = 100
CHOSEN_ON, REPORTED = 0, 1  # halves of the foreign pictures


def read(model: Any, processor: Any, images: Sequence[Any], subjects: Sequence[str], what: str) -> KnownImages:
    """Computes the features of images (paths or PIL images)."""
    found = []
    for start in progress(range(0, len(images), BATCH_SIZE), what, unit="batch"):
        pixels = processor(images=list(images[start : start + BATCH_SIZE]), return_tensors="pt")["pixel_values"]
        found.append(known_images(model, pixels))
    features, ids = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return KnownImages(features, ids, list(subjects))


def few_of_each(rows: Sequence[Row], most: int, seed: int = 0) -> list[Row]:
    """Selects at most so many rows of each source and modality, at random."""
    random, kept = np.random.default_rng(seed), dict[tuple[str, str], int]()
    found = []
    for place in random.permutation(len(rows)):
        key = rows[place]["source"], rows[place]["modality"]
        kept[key] = kept.get(key, 0) + 1
        if kept[key] <= most:
            found.append(rows[place])
    return found


def auroc(scores: np.ndarray, foreign: np.ndarray) -> dict[str, float]:
    """The probability that a foreign picture has a higher score than a scan; NaN without one of the two."""
    both = 0 < foreign.sum() < len(foreign)
    return {"auroc": float(roc_auc_score(foreign, scores)) if both else float("nan")}


def refused(scores: np.ndarray) -> dict[str, float]:
    """The share of pictures that are refused."""
    return {"refused": float((scores > 1).mean())}


def listed(interval: Interval) -> list[float | None]:
    """A value and the ends of its interval, as JSON."""
    return [None if np.isnan(one) else round(one, 4) for one in (interval.value, interval.low, interval.high)]


def share_refused(scores: np.ndarray, subjects: Sequence[str]) -> dict[str, Any]:
    """The share of pictures that are refused, with its interval, and their numbers."""
    found = bootstrap(refused, scores, groups=list(subjects))["refused"]
    return {"images": len(scores), "subjects": found.n, "refused": listed(found)}


def measure(
    model: Any, processor: Any, folder: Path, rows: Sequence[Row], fit: bool
) -> tuple[Rejector, dict[str, Any]]:
    """Fits a rejector if asked to, and measures it.

    Args:
        model: The model, in `eval` mode.
        processor: Its processor.
        folder: Folder of the manifest.
        rows: Its rows.
        fit: Whether to fit a rejector; otherwise the model's own is measured.

    Returns:
        The rejector, and the content of `rejection.json`.
    """

    def of(some: Sequence[Row], what: str) -> KnownImages:
        return read(model, processor, [str(folder / row["file"]) for row in some], [r["subject"] for r in some], what)

    by_split = {name: [row for row in rows if row["split"] == name] for name in SPLITS}
    known = {name: of(by_split[name], name) for name in SPLITS if name != "train" and by_split[name]}
    rejector = model.rejector
    if fit:
        names = list(model.config.modalities.values())
        allowed = [row for row in by_split["train"] if not is_share_alike(row)]
        train = of(few_of_each(allowed, OF_A_SOURCE), "train")
        own = np.array([not is_share_alike(row) for row in by_split["val"]])
        val, weights = known["val"].part(np.flatnonzero(own)), sample_weights(model.vision_model)
        assert weights is not None
        facts: dict[str, Any] = {
            "accept": ACCEPT,
            "fitted_on": {"data": "manifest.csv", "split": "train", **train.facts(names)}
            | {"date": datetime.now(timezone.utc).strftime("%Y-%m")},
            "limits_from": {"data": "manifest.csv", "split": "val", **val.facts(names)},
        }
        rejector = fit_rejector(
            train.features, train.ids, val.features, val.ids, experts=len(names), weights=weights, facts=facts
        )
        facts["limits_from"]["accepted"] = float((score(rejector, val) <= 1).mean())
    result: dict[str, Any] = {"facts": {**rejector.facts, "measured": {}}, "foreign": {}, "splits": {}, "sources": {}}
    scores = {name: score(rejector, images) for name, images in known.items()}
    pictures = foreign_images(REPORTED)
    images = [one.image.convert("RGB") for one in pictures]
    other = read(model, processor, images, [one.subject for one in pictures], "foreign pictures")
    foreign_scores, kinds = score(rejector, other), np.array([one.kind for one in pictures])
    for kind in [*dict.fromkeys(kinds.tolist()), "all of them"]:
        rows_of = np.flatnonzero((kinds == kind) | (kind == "all of them"))
        entry = share_refused(foreign_scores[rows_of], [other.subjects[row] or "" for row in rows_of])
        if "test" in scores:
            both = np.concatenate([scores["test"], foreign_scores[rows_of]])
            truth = np.arange(len(both)) >= len(scores["test"])
            subjects = [*known["test"].subjects, *(other.subjects[row] for row in rows_of)]
            entry["auroc"] = listed(bootstrap(auroc, both, truth, groups=np.array(subjects))["auroc"])
            result["facts"]["measured"][f"AUROC, {kind} against test"] = entry["auroc"]
        result["foreign"][kind] = entry
    for name, of_split in scores.items():
        result["splits"][name] = share_refused(of_split, [one or "" for one in known[name].subjects])
        result["facts"]["measured"][f"refused, {name}"] = result["splits"][name]["refused"]
    if "external" in scores:
        origin = np.array([f"{row['source']} ({row['modality']})" for row in by_split["external"]])
        for name in sorted(set(origin.tolist())):
            places = np.flatnonzero(origin == name)
            subjects_of = [known["external"].subjects[place] or "" for place in places]
            result["sources"][name] = share_refused(scores["external"][places], subjects_of)
    return rejector, result


def score(rejector: Rejector, images: KnownImages) -> np.ndarray:
    """The scores (N,) of images."""
    found: np.ndarray = rejector.scores(torch.from_numpy(images.features), torch.from_numpy(images.ids)).numpy()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--fit", action="store_true", help="fit a rejector first, and store it in the checkpoint")
    given = parser.parse_args(arguments)
    model = MedMoEModel.from_pretrained(given.model, dtype=torch.float32).eval()
    processor = MedMoEProcessor.from_pretrained(given.model)
    if model.rejector is None and not given.fit:
        parser.error(f"{given.model} has no {REJECTOR_FILE}: fit one by --fit")
    rejector, result = measure(model, processor, given.data, read_manifest(given.data), given.fit)
    if given.fit:
        stored = Rejector(**{**vars(rejector), "facts": result["facts"]})
        write_anew(
            str(given.model),
            given.model,
            model_rejection,
            lambda made: stored.save(made / model_rejection.REJECTOR_FILE),
        )
        print(f"Stored {model_rejection.REJECTOR_FILE} in {given.model}.")
    result["weights_hash"] = sha256(given.model / "model.safetensors")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(given.out) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(shown(result))


def shown(result: Mapping[str, Any]) -> str:
    """Formats what was measured as lines of text."""
    lines = [
        f"{kind:<24}{entry['images']:>5} of {entry['subjects']:>4}, refused {entry['refused']}, "
        f"AUROC {entry.get('auroc')}"
        for part in ("foreign", "splits", "sources")
        for kind, entry in result[part].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
