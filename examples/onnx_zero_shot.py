"""Zero-shot labels from an exported folder, with nothing but onnxruntime, numpy, Pillow and tokenizers.

    medmoe export MODEL EXPORTED
    python examples/onnx_zero_shot.py EXPORTED --image scan.png other.png --labels "pneumonia" "no finding"

`--check MODEL` compares with PyTorch and the model's own processor, where these are installed.

The expert of an image is here the one that the image router selects, whatever the labels. The stock pipeline
(`pipeline("zero-shot-image-classification", ...)`) of a model with `config.router="report"` lets each label select the
expert that the image is read with: where the two routers disagree, the probabilities are others. Loaded with
`router="both"`, the same weights follow the rule of this script: `--check` does that, and shows both.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


def read_image(path: Path) -> Image.Image:
    """An upright RGB picture; more than 8 bits are stretched from the darkest to the brightest pixel."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.float64)
        pixels -= pixels.min()
        image = Image.fromarray((pixels / max(pixels.max(), 1e-9) * 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def pixel_values(images: list[Image.Image], facts: dict) -> np.ndarray:
    """(B, 3, H, W) float32, as `export.json` says."""
    rows = []
    for image in images:
        if facts["pad_to_square"]:
            side = max(image.size)
            square = Image.new("RGB", (side, side))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        image = image.resize((facts["width"], facts["height"]), Image.Resampling[facts["resample"].upper()])
        values = np.asarray(image, dtype=np.float32) * facts["rescale_factor"]
        rows.append((values - np.float32(facts["mean"])) / np.float32(facts["std"]))
    return np.stack(rows).transpose(0, 3, 1, 2).astype(np.float32)


class Exported:
    """The two towers of a folder that `medmoe export` wrote."""

    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.towers = {
            name: onnxruntime.InferenceSession(str(folder / self.facts[name]["file"]))
            for name in ("image_tower", "text_tower")
        }

    def run(self, tower: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = self.facts[tower]["outputs"]
        return dict(zip(outputs, self.towers[tower].run(outputs, inputs), strict=True))

    def encode_images(self, images: list[Image.Image]) -> dict[str, np.ndarray]:
        return self.run("image_tower", pixel_values=pixel_values(images, self.facts["images"]))

    def encode_texts(self, texts: list[str]) -> dict[str, np.ndarray]:
        encodings = self.tokenizer.encode_batch(texts)
        word_ids = [[-1 if word is None else word for word in encoding.word_ids] for encoding in encodings]
        return self.run(
            "text_tower",
            input_ids=np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            attention_mask=np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
            word_ids=np.array(word_ids, dtype=np.int64),
        )


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def by_pytorch(folder: str, images: list[Image.Image], labels: list[str], image_router: bool) -> np.ndarray:
    """Probabilities (B, N) by the model itself, as the stock pipeline computes them.

    Args:
        image_router: whether the image router selects the expert, as in an exported folder, or what the model's
            configuration says.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    # "both" keeps the report router, which is among the weights, and lets the image's select.
    rule = {"router": "both"} if image_router and config.router == "report" else {}
    # An exported folder compares global embeddings; a model may be set to its local similarity.
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, similarity="global", **rule).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs = model(**processor(images=images, text=labels, return_tensors="pt"))
    return outputs.logits_per_image.softmax(dim=1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what `medmoe export` wrote")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="image files")
    parser.add_argument("--labels", nargs="+", required=True, help="sentences to choose from")
    parser.add_argument("--check", metavar="MODEL", help="folder or Hub id of the model that was exported")
    arguments = parser.parse_args()

    exported = Exported(arguments.folder)
    images = [read_image(path) for path in arguments.image]
    seen = exported.encode_images(images)
    texts = exported.encode_texts(arguments.labels)
    scale = exported.facts["similarity"]["scale"]
    probabilities = softmax(scale * seen["image_embeds"] @ texts["text_embeds"].T)
    for path, expert, row in zip(arguments.image, seen["expert_ids"], probabilities, strict=True):
        print(f"{path}, by the expert of {exported.facts['modalities'][expert]}:")
        for index in row.argsort()[::-1]:
            print(f"  {row[index]:.3f}  {arguments.labels[index]}")

    if arguments.check:
        right = by_pytorch(arguments.check, images, arguments.labels, image_router=True)
        off = np.abs(probabilities - right).max()
        print(f"PyTorch: at most {off:.4f} away in probability (Pillow and torch round resized pixels differently).")
        stock = np.abs(probabilities - by_pytorch(arguments.check, images, arguments.labels, image_router=False))
        print(f"The stock pipeline: at most {stock.max():.4f} away; there each label selects the expert, see above.")
        if (probabilities.argmax(axis=1) != right.argmax(axis=1)).any():
            raise SystemExit("PyTorch gives other labels.")


if __name__ == "__main__":
    main()
