# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "onnxruntime", "pillow", "tokenizers"]
# ///
"""Zero-shot classification with an exported model: onnxruntime, numpy, Pillow and tokenizers, no PyTorch.

    medmoe export MODEL EXPORTED
    python examples/onnx_zero_shot.py EXPORTED --image scan.png other.png --labels "pneumonia" "no finding"

`--check MODEL` compares with PyTorch. An exported model always selects the expert with the image router; with
`config.router="report"` the stock pipeline lets each label select it, so its probabilities can differ.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def read_image(path: Path) -> Image.Image:
    """Return an upright RGB image; more than 8 bits are scaled from the darkest to the brightest pixel."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float64)
        pixels -= pixels.min()
        image = Image.fromarray((pixels / max(pixels.max(), 1e-9) * 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def pixel_values(images: list[Image.Image], settings: dict[str, Any]) -> np.ndarray:
    """Preprocess images as `export.json` describes; returns (B, 3, H, W) float32."""
    rows = []
    for image in images:
        if settings["pad_to_square"]:
            square = Image.new("RGB", (max(image.size), max(image.size)))
            square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
            image = square
        image = image.resize((settings["width"], settings["height"]), Image.Resampling[settings["resample"].upper()])
        values = np.asarray(image, dtype=np.float32) * settings["rescale_factor"]
        rows.append((values - np.float32(settings["mean"])) / np.float32(settings["std"]))
    return np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32)


class Exported:
    """The image and the text tower of a folder written by `medmoe export`."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.towers = {
            name: onnxruntime.InferenceSession(str(folder / self.manifest[name]["file"]))
            for name in ("image_tower", "text_tower")
        }

    def run(self, tower: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.manifest[tower]["outputs"]
        return dict(zip(outputs, self.towers[tower].run(outputs, inputs), strict=True))

    def encode_images(self, images: list[Image.Image]) -> dict[str, np.ndarray]:
        return self.run("image_tower", pixel_values=pixel_values(images, self.manifest["images"]))

    def encode_texts(self, texts: list[str]) -> dict[str, np.ndarray]:
        encodings = self.tokenizer.encode_batch(texts)
        inputs = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "word_ids": [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings],
        }
        return self.run("text_tower", **{name: np.array(rows, dtype=np.int64) for name, rows in inputs.items()})


def pytorch_probabilities(folder: str, images: list[Image.Image], labels: list[str], router: str | None) -> np.ndarray:
    """Return probabilities (B, N) of the PyTorch model; `router` overrides the router of its configuration."""
    import torch
    from transformers import AutoModel, AutoProcessor

    changes = {"router": router} if router else {}
    # An exported folder compares global embeddings; a model may be configured for local similarity.
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, similarity="global", **changes).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(images=images, text=labels, return_tensors="pt"))
    return np.asarray(outputs.logits_per_image.softmax(dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder written by `medmoe export`")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="image files")
    parser.add_argument("--labels", nargs="+", required=True, help="sentences to choose from")
    parser.add_argument("--check", metavar="MODEL", help="folder or Hub id of the model that was exported")
    arguments = parser.parse_args()
    exported = Exported(arguments.folder)
    images = [read_image(path) for path in arguments.image]
    seen = exported.encode_images(images)
    texts = exported.encode_texts(arguments.labels)
    logits = exported.manifest["similarity"]["scale"] * seen["image_embeds"] @ texts["text_embeds"].T
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    for path, expert, row in zip(arguments.image, seen["expert_ids"], probabilities, strict=True):
        print(f"{path}, routed to {exported.manifest['modalities'][expert]}:")
        for index in row.argsort()[::-1]:
            print(f"  {row[index]:.3f}  {arguments.labels[index]}")

    if arguments.check:
        # An exported model selects the expert by image; router="both" does so and keeps the report router's weights.
        router = "both" if "report_router_logits" in exported.manifest["text_tower"]["outputs"] else None
        expected = pytorch_probabilities(arguments.check, images, arguments.labels, router)
        stock = pytorch_probabilities(arguments.check, images, arguments.labels, None)
        print(f"Largest difference to PyTorch with the image router: {np.abs(probabilities - expected).max():.4f}")
        print(f"Largest difference to the stock pipeline: {np.abs(probabilities - stock).max():.4f}")
        if (probabilities.argmax(axis=1) != expected.argmax(axis=1)).any():
            raise SystemExit("PyTorch predicts other labels.")


if __name__ == "__main__":
    main()
