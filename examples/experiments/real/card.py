"""Writes the model card of a checkpoint that was trained on real scans.

    python examples/experiments/real/card.py FOLDER --run RUN [--training training.json] [--repo you/medmoe-small]

The upper part is that of `medmoe card`, with the main results as metadata. The sources with their licenses, all tables
of `report.py`, the limits, and the hashes follow. RUN is the folder of `report.py` and must have `check.json`.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from manifest import sha256
from report import read_run, sections

from medmoe_hf.common.files import atomic_write
from medmoe_hf.common.yaml_files import read_yaml
from medmoe_hf.errors import CardError
from medmoe_hf.evaluation.results import Result
from medmoe_hf.hub.card import HAND_WRITTEN, build_card, markdown_table, write_card

LICENSE = "cc-by-4.0"
BASE_MODELS = ("timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2")
BEGIN = "<!-- Written by examples/experiments/real/card.py. -->"

# Facts about the data that a reader of the tables must know.
LIMITS = (
    "In this collection a source often has one class, one scanner and one country, so that a model can tell sources "
    "apart where it seems to tell findings apart. Numbers of `external` and across sources are the ones to trust.",
    "For the lung CTs (iq-othnccd), brain tumours, breast and ovary ultrasound, lung tissue and nerve ultrasound, "
    "subjects were derived and are not known. Images of one patient may be in both `train` and `test`.",
    "Children's chest X-rays come from one hospital, and no other training source shows children's chests.",
    "The knee radiographs were equalized in contrast by their publishers; others may look different to the model.",
    "The lung tissue tiles are augmented copies of few slides, so that near 100 % there says little.",
    '"No glaucoma" in hygd does not mean a healthy eye.',
    "The labels of nih-cxr14 were mined from reports, and some are wrong.",
    "The training has few CTs of the head and no other view of many regions; on regions without training images even "
    "the modality may be wrong.",
    "Images of at most 288 pixels on the shorter side were seen. Small findings are not visible at that size.",
    "No masks or boxes were available, so that heat-maps were looked at and not measured.",
)


def licence_table(check: Mapping[str, Any], trained: bool) -> str:
    """Returns the sources with whom to credit, license, and number of images.

    Args:
        check: Of `check.py`.
        trained: Whether to list the sources that were trained on, or the others.

    Raises:
        CardError: If a source has no entry in `attributions.yaml`.
    """
    credits = read_yaml(Path(__file__).with_name("attributions.yaml"), CardError)
    rows = []
    for source in check["sources"]:
        if source["trained_on"] != trained:
            continue
        if source["source"] not in credits:
            raise CardError(f"attributions.yaml has no entry for {source['source']}: add whom to credit for it.")
        images = source["train"] if trained else source["images"]
        rows.append([source["source"], source["modality"], credits[source["source"]], source["licence"], images])
    header = ("source", "modality", "credit", "license", "images trained on" if trained else "images measured")
    return markdown_table(header, rows)


def doubts(check: Mapping[str, Any]) -> str:
    """Returns the sources whose terms are in doubt, as a list."""
    found = {
        source["source"]: source["doubt"] for source in check["sources"] if source["doubt"] and source["trained_on"]
    }
    return "\n".join(f"- {name}: {doubt}." for name, doubt in found.items())


def main_results(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the results for the card's metadata: routing, and zero-shot classification of findings."""
    kept = []
    for split in ("test", "external"):
        for result in run.get(split, ()):
            similarity = result.facts.get("similarity", "global")
            if result.protocol == "routing" and result.dataset == "all sources":
                keys = ["image router/balanced_accuracy"]
            elif result.protocol == "zero-shot" and not result.dataset.startswith(("modality", "region")):
                keys = [f"{similarity}/balanced_accuracy", f"{similarity}/macro_auroc"]
            else:
                continue
            metrics = {key: result.metrics[key] for key in keys if not np.isnan(result.metrics[key].value)}
            facts = {"title": f"{result.facts.get('title', result.dataset)}, {split}"}
            own = Result(result.protocol, result.model, f"{result.dataset}, {split}", result.count, metrics, facts)
            kept.append(own.to_json())
    return [one for one in kept if one["metrics"]]


def check_weights(folder: Path, run: Mapping[str, Any]) -> None:
    """Refuses results of other weights.

    Raises:
        CardError: If `test`, `external` or `rejection` were measured with weights that are not those of the folder.
    """
    own = sha256(folder / "model.safetensors")
    measured = {split: {one.facts["weights_hash"] for one in run.get(split, ())} for split in ("test", "external")}
    if "rejection" in run:
        measured["rejection"] = {run["rejection"]["weights_hash"]}
    for name, hashes in measured.items():
        if hashes - {own}:
            raise CardError(
                f"{name}.json has the results of other weights than those of {folder}; measure these weights, or "
                "pass the folder that was measured."
            )


def own_part(run: Mapping[str, Any], recipe: Path | None) -> str:
    """Returns the sections below the line that marks handwritten text."""
    check = run["check"]
    hashes = [["manifest", check["manifest"]]]
    if recipe is not None:
        hashes.append(["training recipe", sha256(recipe)])
    excluded = sorted({source["source"] for source in check["sources"] if source["share_alike"]})
    left_out = f" Share-alike sources ({', '.join(excluded)}) were left out of the training." if excluded else ""
    parts = [
        BEGIN,
        "## Images and licenses",
        f"Trained on {check['train_files']:,} images under these licenses, none of which is part of this repository."
        + left_out,
        licence_table(check, trained=True),
        "Measured only:",
        licence_table(check, trained=False),
    ]
    doubtful = doubts(check)
    if doubtful:
        parts += ["The terms of some sources are in doubt:", doubtful]
    parts += [
        "The start weights are EfficientNet-Lite0, trained on ImageNet (Apache-2.0), and the sentence encoder MiniLM "
        "(Apache-2.0, packaged under MIT).",
        "## Limits of these data",
        "\n".join(f"- {limit}" for limit in LIMITS),
        "## All results",
        "Intervals in brackets are 95 % bootstrap intervals by subject. Everything was chosen on `val`; `test` and "
        "`external` were measured once.",
        sections(run),
        "### Files",
        "Every image was compared with its hash in the manifest before the training.",
        markdown_table(("file", "SHA-256"), hashes),
    ]
    return "\n\n".join(parts)


def write(folder: Path, run_folder: Path, training: Path | None, repo: str | None, recipe: Path | None) -> Path:
    """Writes the card.

    Args:
        folder: Folder of the checkpoint.
        run_folder: Folder of `report.py`.
        training: Record of the training; None for the `training.json` of the folder.
        repo: Hub id for the code examples; None without.
        recipe: Training YAML, whose hash is recorded; None without.

    Returns:
        Path of the card.

    Raises:
        CardError: If the run has no `check.json`, or results of other weights.
    """
    run = read_run(run_folder)
    if "check" not in run:
        raise CardError(f"{run_folder} has no check.json; run check.py first: the card lists the sources it found.")
    check_weights(folder, run)
    with tempfile.TemporaryDirectory() as scratch:
        found = main_results(run)
        results = Path(scratch) / "results.json"
        results.write_text(json.dumps(found), encoding="utf-8")
        card = build_card(
            folder,
            training=training,
            results=results if found else None,
            repo=repo,
            base_model=BASE_MODELS,
            license=LICENSE,
        )
    path = write_card(folder, card, force=True)
    text = path.read_text(encoding="utf-8")
    before, mark, after = text.partition(HAND_WRITTEN)
    # What someone wrote above our own part stays.
    kept = after.partition(BEGIN)[0].strip()
    body = "\n\n".join(part for part in (before + mark, kept, own_part(run, recipe)) if part)
    with atomic_write(path) as partial:
        partial.write_text(body + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the checkpoint")
    parser.add_argument("--run", required=True, type=Path, help="folder with the JSON files")
    parser.add_argument("--training", type=Path, help="training.json; by default the folder's")
    parser.add_argument("--recipe", type=Path, help="training YAML, whose hash is recorded")
    parser.add_argument("--repo", help="Hub id for the code examples")
    given = parser.parse_args(arguments)
    print(write(given.folder, given.run, given.training, given.repo, given.recipe))


if __name__ == "__main__":
    main()
