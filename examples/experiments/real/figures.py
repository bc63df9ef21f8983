"""Draws heat-maps of one scan per modality, for the prompt of its true label.

    python examples/experiments/real/figures.py --model FOLDER --data ../shared/real --out heatmaps.png
        [--split val] [--seed 0] [--per-modality 1]

The picture holds images of `--data`: it is for looking at, and does not belong into the project. The map of a made-up
word beside each shows what does not depend on the words.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from manifest import Row, read_manifest
from PIL import Image
from tasks import tasks_of

from medmoe_hf.data import MODALITIES
from medmoe_hf.evaluation.figures import draw_heatmaps
from medmoe_hf.evaluation.results import HeatmapExample, Result
from medmoe_hf.inference.encoders import MedMoEEncoder

NONSENSE = "glorbix"


def chosen(rows: Sequence[Row], split: str, per_modality: int, seed: int) -> list[tuple[Row, str]]:
    """Draws images with a finding, and a prompt of their class.

    Args:
        rows: The manifest.
        split: Name of the split.
        per_modality: Images per modality.
        seed: Seed of the draw.

    Returns:
        Rows and prompts. Where a modality has no task of findings, its tasks of body regions are used.
    """
    generator = np.random.default_rng(seed)
    found: list[tuple[Row, str]] = []
    tasks = [task for name, task in tasks_of(rows, split).items() if not name.startswith("modality")]
    for modality in MODALITIES:
        pool: list[tuple[Row, str]] = []
        # Tasks of findings come first, and their first class is that without a finding.
        for task in tasks:
            prompts = list(task.prompts().values())
            own, labels = task.rows([row for row in rows if row["modality"] == modality], [split])
            positive = [(row, prompts[label][0]) for row, label in zip(own, labels.tolist(), strict=True) if label]
            pool = pool or positive
            if task.probe and positive:
                pool = positive
                break
        picked = generator.permutation(len(pool))[:per_modality]
        found += [pool[index] for index in picked]
    return found


def examples(encoder: MedMoEEncoder, picks: Sequence[tuple[Row, str]], folder: Path) -> list[HeatmapExample]:
    """Computes the heat-map of each image's prompt, and that of a made-up word."""
    paths, phrases = [str(folder / row["file"]) for row, _ in picks], [phrase for _, phrase in picks]
    maps, controls = encoder.heatmaps(paths, phrases), encoder.heatmaps(paths, [NONSENSE] * len(paths))
    found = []
    for (row, phrase), path, own, control in zip(picks, paths, maps, controls, strict=True):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        found.append(HeatmapExample(pixels, phrase, own, NONSENSE, control, [], row["modality"]))
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
