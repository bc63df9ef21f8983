"""What a checkpoint says about the quickstart's scans, in a process that cannot import `medmoe_hf`.

    python examples/experiments/quickstart_scans.py MODEL FOLDER [--picture PNG]

MODEL is a folder or Hub id, FOLDER the output folder of `examples/quickstart.py`. Everything here needs transformers,
the model's folder and a reader of medical files only. Prints JSON.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = (
    "X-ray of the chest",
    "X-ray of the knee",
    "CT scan of the head",
    "CT scan of the chest",
    "MRI of the brain",
    "MRI of the abdomen",
    "ultrasound of the breast",
    "ultrasound of the heart",
    "histopathology image of the colon",
    "fundus photograph of the retina",
)
TISSUES = {
    "glands": "Histopathology image of the colon: stained glands.",
    "stroma": "Histopathology image of the colon: stroma between the glands.",
}
# scan -> a word, and the text that it is compared with
HEATMAPS = {"ct-head": ("head", "chest")}
SIDE = 320  # of a picture in pixels


def main(name: str, folder: Path, picture: Path | None) -> None:
    torch.set_flush_denormal(True)
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    scans = read_table(folder / "scans.csv")
    answers: list[dict[str, Any]] = []
    for scan in scans:
        path = str(folder / scan["path"])
        with torch.no_grad():
            routed = model.route(**processor(images=path, return_tensors="pt"))
        scores = zero_shot(model, processor, [path], LABELS)[0]
        answers.append(
            {
                "scan": scan["path"],
                "modality": scan["modality"],
                "routed_to": routed.modality[0],
                "probability": routed.probabilities.max().item(),
                "label": LABELS[int(scores.argmax())],
                "label_probability": scores.max().item(),
            }
        )
        if len(answers) == 1:
            first = time.monotonic() - started
    test = read_table(folder / "test.csv")
    found = zero_shot(model, processor, [str(folder / row["path"]) for row in test], list(TISSUES.values()))
    right = [list(TISSUES)[best] == row["tissue"] for best, row in zip(found.argmax(dim=1), test, strict=True)]
    report = {"first_answer_seconds": first, "scans": answers, "tissue_accuracy": sum(right) / len(right)}
    if picture is not None:
        draw(model, processor, folder, answers, picture)
    print(json.dumps(report))


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def zero_shot(model: Any, processor: Any, images: list[str], texts: Any) -> torch.Tensor:
    """Return (images, texts), the probability of each text among all."""
    inputs = processor(images=images, text=list(texts), return_tensors="pt")
    return torch.as_tensor(model(**inputs).logits_per_image.softmax(dim=1))


@torch.no_grad()
def heatmap(model: Any, processor: Any, image: str, word: str, reference: str) -> Any:
    """Return the (SIDE, SIDE) map of the first word: what makes the image more similar to it than to the reference."""
    inputs = processor(images=image, text=[word], return_tensors="pt")
    grounding = model.ground(**inputs, reference=processor(text=[reference], return_tensors="pt"))
    return processor.post_process_grounding(grounding, target_sizes=[(SIDE, SIDE)], sigma=1.5)[0][0].numpy()


def draw(model: Any, processor: Any, folder: Path, answers: list[dict[str, Any]], path: Path) -> None:
    """Draw every scan with its answer, and heat-maps of words."""
    panels = len(answers) + len(HEATMAPS)
    figure, axes = plt.subplots(2, (panels + 1) // 2, figsize=(2.3 * ((panels + 1) // 2), 6.0), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    size = {"height": SIDE, "width": SIDE}
    shown = {}
    for axis, answer in zip(axes.flat, answers, strict=False):
        pixels = processor.image_processor(
            str(folder / answer["scan"]), size=size, do_normalize=False, return_tensors="pt"
        )["pixel_values"][0]
        shown[Path(answer["scan"]).name.split(".")[0]] = pixels.permute(1, 2, 0).clamp(0, 1).numpy(), answer["scan"]
        axis.imshow(pixels.permute(1, 2, 0).clamp(0, 1).numpy())
        colour = "black" if answer["routed_to"] == answer["modality"] else "crimson"
        axis.set_title(f"{answer['routed_to']} {answer['probability']:.2f}", fontsize=11, color=colour)
        label = f"{answer['label']}\n{answer['label_probability']:.2f}"
        axis.text(0.5, -0.03, label, transform=axis.transAxes, ha="center", va="top", fontsize=8)
    for axis, (name, (word, reference)) in zip(list(axes.flat)[len(answers) :], HEATMAPS.items(), strict=False):
        pixels, scan = shown[name]
        axis.imshow(pixels)
        heat = heatmap(model, processor, str(folder / scan), word, reference)
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        axis.imshow(heat, cmap="inferno", alpha=0.65 * heat)
        axis.set_title(f'where is "{word}"?', fontsize=11)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.modules["medmoe_hf"] = None  # type: ignore[assignment]  # `import medmoe_hf` fails, installed or not
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("folder", type=Path, help="output folder of examples/quickstart.py")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    main(arguments.model, arguments.folder, arguments.picture)
