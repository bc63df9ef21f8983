"""Draws heat-maps of one scan per modality, for the name of its true label.

    python examples/experiments/real/figures.py --model FOLDER --data ../shared/real --out heatmaps.png
        [--split val] [--seed 0] [--per-modality 1]

A map shows where the label is more similar to the image than the sentences of the class without a finding are; beside
it is that of a made-up word. The picture holds images of `--data`: it is for looking at, not for the project.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from manifest import Row, read_manifest
from PIL import Image
from tasks import tasks_of

from medmoe_hf.data import MODALITIES
from medmoe_hf.evaluation.figures import draw_heatmaps
from medmoe_hf.evaluation.results import HeatmapExample, Result
from medmoe_hf.inference.encoders import MedMoEEncoder

NONSENSE = "glorbix"


class Pick(NamedTuple):
    """An image, a name of its class, and sentences of the class without a finding."""

    row: Row
    phrase: str
    reference: tuple[str, ...]


def chosen(rows: Sequence[Row], split: str, per_modality: int, seed: int) -> list[Pick]:
    """Draws images with a finding.

    Args:
        rows: The manifest.
        split: Name of the split.
        per_modality: Images per modality.
        seed: Seed of the draw.

    Returns:
        Images of the first task of findings of each modality, or else of another task.
    """
    generator = np.random.default_rng(seed)
    found: list[Pick] = []
    tasks = [task for name, task in tasks_of(rows, split).items() if not name.startswith("modality")]
    tasks.sort(key=lambda task: not task.probe)
    for modality in MODALITIES:
        own = [row for row in rows if row["modality"] == modality]
        for task in tasks:
            names = [choice.names[0] for choice in task.classes.values()]
            # The first class is that without a finding, where there is one.
            reference = tuple(next(iter(task.prompts().values())))
            members, labels = task.rows(own, [split])
            pool = [
                Pick(row, names[label], reference)
                for row, label in zip(members, labels.tolist(), strict=True)
                if label
            ]
            if pool:
                found += [pool[index] for index in generator.permutation(len(pool))[:per_modality]]
                break
    return found


def examples(encoder: MedMoEEncoder, picks: Sequence[Pick], folder: Path) -> list[HeatmapExample]:
    """Computes the heat-map of each image's label, and that of a made-up word."""
    paths, references = [str(folder / pick.row["file"]) for pick in picks], [pick.reference for pick in picks]
    maps = encoder.heatmaps(paths, [pick.phrase for pick in picks], references)
    controls = encoder.heatmaps(paths, [NONSENSE] * len(picks), references)
    found = []
    for pick, path, own, control in zip(picks, paths, maps, controls, strict=True):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        found.append(HeatmapExample(pixels, pick.phrase, own, NONSENSE, control, [], pick.row["modality"]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--data", required=True, type=Path, help="folder with manifest.csv")
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--split", choices=("val", "test", "external"), default="val")
    parser.add_argument("--per-modality", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    encoder = MedMoEEncoder(given.model)
    picks = chosen(read_manifest(given.data), given.split, given.per_modality, given.seed)
    shown = examples(encoder, picks, given.data)
    result = Result("grounding", encoder.name, f"real scans, {given.split}", len(shown), {}, {}, examples=shown)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw_heatmaps(result, given.out)
    print(given.out)


if __name__ == "__main__":
    main()
