"""Draw word-level heat-maps across modalities, as in Figure 3 of the paper, with the model of `train_from_scratch.py`.

    python examples/experiments/figure3.py scratch [--output figure3.png]

Each row shows one modality: an unseen phantom with the box of its finding, then the heat-maps of up to four words of
its report: the word that names the finding, and others that do not occur in normal reports. As there, each
word is encoded alone, with normal reports of the modality as reference: the map shows what makes the image more
similar to the word than to normal reports. Words that occur with findings only ("large", "evidence") therefore point
at the finding too. The images are drawings.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import torch

from medmoe_hf.data import MODALITIES
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

WORDS = 4


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Read the unseen phantoms of a folder of examples/train_from_scratch.py."""
    shards = [str(path) for path in sorted((folder / "unseen").glob("*.tar"))]
    return list(datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=True))


def select_words(words: list[str], finding: str, normal: set[str]) -> list[str]:
    """Select the finding's word and the longest words that do not occur in normal reports, in report order."""
    others = [word for word in words if word.lower() not in normal | {finding.lower()} and word.isalpha()]
    kept = {finding, *sorted(others, key=len, reverse=True)[: WORDS - 1]}
    return [word for word in dict.fromkeys(words) if word in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="output folder of examples/train_from_scratch.py")
    parser.add_argument("--output", type=Path, default=Path("figure3.png"), help="PNG file")
    parser.add_argument("--sample", type=int, default=0, help="index of the unseen phantom per modality")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    model = MedMoEModel.from_pretrained(arguments.folder / "model").eval()
    processor = MedMoEProcessor.from_pretrained(arguments.folder / "model")
    prompts = json.loads((arguments.folder / "prompts.json").read_text(encoding="utf-8"))
    samples = read_samples(arguments.folder)
    figure, axes = plt.subplots(
        len(MODALITIES), 1 + WORDS, figsize=(2.4 * (1 + WORDS), 2.75 * len(MODALITIES)), layout="constrained"
    )
    for number, (modality, row) in enumerate(zip(MODALITIES, axes, strict=True)):
        own = [sample for sample in samples if int(sample["cls"]) == number]
        sample = [one for one in own if one["json"]["finding_word"]][arguments.sample]
        reports = prompts[modality]["normal"]
        normal = {word.lower() for report in processor.tokenizer.words(reports) for word in report}
        words = select_words(processor.tokenizer.words(sample["txt"]), sample["json"]["finding_word"], normal)
        grounding = model.ground(
            **processor(images=[sample["png"]] * len(words), text=words, return_tensors="pt"),
            reference=processor(text=reports, return_tensors="pt"),
            modality=modality,
        )
        sizes = [sample["png"].size[::-1]] * len(words)
        maps = processor.post_process_grounding(grounding, target_sizes=sizes, sigma=1.5)
        draw_row(row, sample, modality, {word: one[0].numpy() for word, one in zip(words, maps, strict=True)})
    figure.suptitle(
        "Synthetic phantoms: heat-maps of words relative to normal reports (each map has its own scale)\n"
        "box: the finding, bold: its word, +: the hottest pixel"
    )
    figure.savefig(arguments.output, dpi=110)
    print(f"Written: {arguments.output}")


def draw_row(row: Any, sample: dict[str, Any], modality: str, maps: dict[str, np.ndarray]) -> None:
    """Draw the image and the heat-map of each word."""
    left, top, right, bottom = sample["json"]["box"]
    for axis in row:
        axis.set_axis_off()
    for axis, (title, heatmap) in zip(row, [(modality, None), *maps.items()], strict=False):
        axis.imshow(sample["png"], cmap="gray")
        axis.set_title(title, fontsize=11, fontweight="bold" if title == sample["json"]["finding_word"] else "normal")
        if heatmap is not None:
            axis.imshow(heatmap, cmap="inferno", alpha=0.55)
            y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
            axis.plot(x, y, "+", color="cyan", markersize=10, markeredgewidth=2)
        corner = (left - 0.5, top - 0.5)
        axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="lime", linewidth=1.3))


if __name__ == "__main__":
    main()
