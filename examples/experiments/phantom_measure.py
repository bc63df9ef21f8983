"""Second half of `train_from_scratch.py`: evaluate a saved MedMoE folder in a process that cannot import `medmoe_hf`.

    python examples/experiments/phantom_measure.py FOLDER

FOLDER is the output folder of `examples/train_from_scratch.py`. Everything here needs transformers and the model's
folder (or its repository on the Hub) only.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.modules["medmoe_hf"] = None  # type: ignore[assignment]  # from here on `import medmoe_hf` fails, installed or not

import datasets
import matplotlib
import numpy as np
import pydicom
import pydicom.data
import skimage
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

Sample = dict[str, Any]
Prompts = dict[str, dict[str, list[str]]]

NONSENSE = ("glorbix", "quandle", "zwyvex")
BATCH = 50
CONTROL = (
    "The control is a made-up word that no report contains. The model shows the control's map for any\n"
    "word, so a finding's map is evidence only where it is hotter inside the box than the control's.\n"
    "The two maps of a row share one colour scale, from dark (low) to yellow (high)."
)


def main(folder: Path) -> None:
    torch.set_flush_denormal(True)
    model = AutoModel.from_pretrained(folder / "model", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
    prompts = json.loads((folder / "prompts.json").read_text())
    shards = [str(path) for path in sorted((folder / "unseen").glob("*.tar"))]
    stream = datasets.load_dataset("webdataset", data_files=shards, split="train", streaming=True)
    samples = [read_sample(sample) for sample in stream]

    report = {
        "unseen_phantoms": len(samples),
        "synthetic": True,
        **measure_pairs(model, processor, samples),
        "zero_shot_accuracy": measure_zero_shot(model, processor, samples, prompts),
        "pointing_game": measure_pointing(model, processor, samples, prompts),
        "real_images": route_real_images(model, processor),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_heatmaps(model, processor, samples, prompts, folder / "heatmaps.png")


def read_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the image, caption, modality id, finding, the word that names it and its box in pixels."""
    facts = sample["json"]
    return {
        "image": sample["png"],
        "caption": sample["txt"],
        "modality": int(sample["cls"]),
        "finding": facts["finding"],
        "word": facts["finding_word"],
        "box": facts["box"],
    }


def batches(samples: list[Any], description: str) -> Iterator[list[Any]]:
    """Yield batches of `BATCH` samples, with a progress bar."""
    parts = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    yield from tqdm(parts, desc=description, leave=False)


@torch.no_grad()
def image_embeddings(model: Any, processor: Any, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, D) embeddings of unit length and the (N,) experts that the image router selects."""
    embeds, experts = [], []
    for batch in batches(samples, "measuring: images"):
        pixels = processor(images=[sample["image"] for sample in batch], return_tensors="pt")
        features = model.get_image_features(**pixels, local=False)
        embeds.append(torch.nn.functional.normalize(features.pooler_output, dim=-1))
        experts.append(features.router_logits.argmax(dim=-1))
    return torch.cat(embeds), torch.cat(experts)


@torch.no_grad()
def text_embeddings(model: Any, processor: Any, texts: list[str]) -> torch.Tensor:
    """Return (N, D) embeddings of unit length."""
    parts = [
        model.get_text_features(**processor(text=batch, return_tensors="pt"))
        for batch in batches(texts, "measuring: texts")
    ]
    return torch.nn.functional.normalize(torch.cat([part.pooler_output for part in parts]), dim=-1)


def measure_pairs(model: Any, processor: Any, samples: list[Sample]) -> dict[str, Any]:
    """Measure routing by image and by report, and retrieval among all unseen pairs."""
    truth = torch.tensor([sample["modality"] for sample in samples])
    captions = [sample["caption"] for sample in samples]
    images, by_image = image_embeddings(model, processor, samples)
    texts = text_embeddings(model, processor, captions)
    by_report = torch.cat(
        [
            model.route(**processor(text=batch, return_tensors="pt")).expert_ids
            for batch in batches(captions, "measuring: routing of reports")
        ]
    )
    retrieval = {}
    scores = images @ texts.T
    for direction, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        own = table.diagonal()[:, None]
        # Ties count against the model: the rank is the number of other pairs with the same score or a higher one.
        rank = (table >= own).sum(dim=1) - 1
        for k in (1, 5):
            retrieval[f"{direction}_r{k}"] = (rank < k).float().mean().item()
    retrieval |= {f"chance_r{k}": k / len(samples) for k in (1, 5)}
    return {
        "routing_accuracy": {
            "image": (by_image == truth).float().mean().item(),
            "report": (by_report == truth).float().mean().item(),
        },
        "retrieval": retrieval,
    }


def measure_zero_shot(model: Any, processor: Any, samples: list[Sample], prompts: Prompts) -> dict[str, Any]:
    """Measure accuracy over the findings of each modality; the prompts of a finding are averaged to one embedding."""
    names = list(model.config.modalities.values())
    result = {}
    for number, modality in enumerate(names):
        findings = list(prompts[modality])
        classes = torch.stack(
            [text_embeddings(model, processor, prompts[modality][name]).mean(0) for name in findings]
        )
        chosen = [sample for sample in samples if sample["modality"] == number]
        truth = torch.tensor([findings.index(sample["finding"]) for sample in chosen])
        images, _ = image_embeddings(model, processor, chosen)
        predicted = (images @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(dim=1)
        result[modality] = (predicted == truth).float().mean().item()
    chance = float(np.mean([1 / len(prompts[name]) for name in names]))
    return {"mean": float(np.mean(list(result.values()))), "chance": chance, "by_modality": result}


@torch.no_grad()
def word_heatmaps(
    model: Any, processor: Any, samples: list[Sample], words: Sequence[str], prompts: Prompts
) -> list[np.ndarray]:
    """Return the (H, W) heat-map of one word per sample, in the pixels of its image.

    The map shows what makes the image more similar to the word than to normal reports of its modality.
    """
    heatmaps: list[Any] = [None] * len(samples)
    for number, name in model.config.modalities.items():
        rows = [row for row, sample in enumerate(samples) if sample["modality"] == number]
        normal = processor(text=prompts[name]["normal"], return_tensors="pt")
        for batch in batches(rows, f"measuring: heat-maps, {name}"):
            images = [samples[row]["image"] for row in batch]
            inputs = processor(images=images, text=[words[row] for row in batch], return_tensors="pt")
            grounding = model.ground(**inputs, reference=normal, modality=name)
            sizes = [image.size[::-1] for image in images]
            maps = processor.post_process_grounding(grounding, target_sizes=sizes, sigma=1.5)
            for row, by_word in zip(batch, maps, strict=True):
                heatmaps[row] = by_word[0].numpy()
    return heatmaps


def is_hit(heatmap: np.ndarray, box: list[float]) -> bool:
    """Return whether the hottest pixel is inside the box."""
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    left, top, right, bottom = box
    return bool(left <= x < right and top <= y < bottom)


def measure_pointing(model: Any, processor: Any, samples: list[Sample], prompts: Prompts) -> dict[str, Any]:
    """Measure how often the hottest pixel is inside the finding's box, for its word and for nonsense words."""
    chosen = [sample for sample in samples if sample["word"]]

    def hits(words: Sequence[str]) -> list[bool]:
        maps = word_heatmaps(model, processor, chosen, words, prompts)
        return [is_hit(heatmap, sample["box"]) for heatmap, sample in zip(maps, chosen, strict=True)]

    real = hits([sample["word"] for sample in chosen])
    by_modality = {
        name: float(np.mean([hit for hit, sample in zip(real, chosen, strict=True) if sample["modality"] == number]))
        for number, name in model.config.modalities.items()
    }
    areas = [
        (right - left) * (bottom - top) / np.prod(sample["image"].size)
        for sample in chosen
        for left, top, right, bottom in [sample["box"]]
    ]
    return {
        "finding_word": float(np.mean(real)),
        "nonsense_word": float(np.mean([hits([word] * len(chosen)) for word in NONSENSE])),
        "chance": float(np.mean(areas)),
        "by_modality": by_modality,
        "images": len(chosen),
    }


def real_images() -> list[tuple[str, str, Any]]:
    """Return (name, modality, image) of two DICOM files from pydicom and a retina photograph from scikit-image."""
    ct = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    hounsfield = ct.pixel_array * float(ct.RescaleSlope) + float(ct.RescaleIntercept)
    soft_tissue = np.clip((hounsfield + 160) / 400, 0, 1)  # the window 40 ± 200 HU
    mr = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm")).pixel_array.astype(float)
    low, high = np.percentile(mr, (1, 99))
    retina = Path(skimage.__file__).parent / "data" / "retina.jpg"
    return [
        ("CT_small.dcm (pydicom)", "ct", soft_tissue),
        ("MR_small.dcm (pydicom)", "mri", np.clip((mr - low) / (high - low), 0, 1)),
        ("retina.jpg (scikit-image)", "fundus", str(retina)),
    ]


def route_real_images(model: Any, processor: Any) -> list[dict[str, Any]]:
    """Return the router's probabilities for each of the real images."""
    report = []
    for name, modality, image in real_images():
        routed = model.route(**processor(images=image, return_tensors="pt"))
        probabilities = dict(zip(model.config.modalities.values(), routed.probabilities[0].tolist(), strict=True))
        report.append(
            {
                "name": name,
                "modality": modality,
                "routed_to": routed.modality[0],
                "probability": max(probabilities.values()),
                "probabilities": probabilities,
            }
        )
    return report


def draw_heatmaps(model: Any, processor: Any, samples: list[Sample], prompts: Prompts, path: Path) -> None:
    """Draw a row per modality: the image with the finding's box, the word's heat-map and the control's."""
    names = list(model.config.modalities.values())
    chosen = [next(s for s in samples if s["modality"] == number and s["word"]) for number in range(len(names))]
    real = word_heatmaps(model, processor, chosen, [sample["word"] for sample in chosen], prompts)
    none = word_heatmaps(model, processor, chosen, NONSENSE[:1] * len(chosen), prompts)
    figure, axes = plt.subplots(len(chosen), 3, figsize=(9, 3.2 * len(chosen)), layout="constrained")
    figure.supxlabel(CONTROL, fontsize=10)
    for row, sample, word_map, nonsense_map, name in zip(axes, chosen, real, none, names, strict=True):
        left, top, right, bottom = sample["box"]
        control = f"{NONSENSE[0]} (control)"
        panels = ((None, f"{name}: {sample['finding']}"), (word_map, sample["word"]), (nonsense_map, control))
        # Both maps share one colour scale, so that they can be compared.
        low, high = min(word_map.min(), nonsense_map.min()), max(word_map.max(), nonsense_map.max())
        for axis, (heatmap, title) in zip(row, panels, strict=True):
            axis.imshow(sample["image"], cmap="gray")
            if heatmap is not None:
                axis.imshow(heatmap, cmap="inferno", alpha=0.55, vmin=low, vmax=high)
                y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
                axis.plot(x, y, "+", color="cyan", markersize=11, markeredgewidth=2)
            axis.add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="lime", linewidth=1.5
                )
            )
            axis.set_title(title, fontsize=11)
            axis.set_axis_off()
    figure.suptitle(
        "Synthetic phantoms: finding (box), heat-maps of its word and of the control; + is the hottest pixel"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
