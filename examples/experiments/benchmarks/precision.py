"""Benchmark of precision: zero-shot accuracy and retrieval of a trained model in bfloat16, int8 and as ONNX.

    python examples/experiments/benchmarks/precision.py [--model scratch/model] [--data scratch]

By default the model of `train_from_scratch.py` on its unseen phantoms. Each format encodes the same images and texts;
the cosines compare its embeddings with those in float32. int8 by torchao needs `pip install torchao`, ONNX needs `pip
install "medmoe_hf[export]"`. `inference.py` measures the speed of each format.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmoe_hf.evaluation import recall_at_k
from medmoe_hf.evaluation.recipes import load_recipe, open_recipe
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier
from medmoe_hf.hub.export import export
from medmoe_hf.inference.encoders import Encoder, MedMoEEncoder, load_encoder


class InBfloat16(MedMoEEncoder):
    """A model with weights and activations in bfloat16; the experts' BatchNorm stays float32."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.model.bfloat16()

    def _image_features(self, pixels: Tensor) -> Any:
        return super()._image_features(pixels.bfloat16())


def formats(model: str, folder: Path) -> Iterator[tuple[str, Encoder]]:
    """Yield the name and the encoder of each format, float32 first."""
    yield "float32", load_encoder(model)
    yield "bfloat16", InBfloat16(model)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("torchao is not installed, so its rows are skipped: pip install torchao")
    else:
        for name, kind in (
            ("int8 weights, torchao", Int8WeightOnlyConfig),
            ("int8, torchao", Int8DynamicActivationInt8WeightConfig),
        ):
            encoder = MedMoEEncoder(model)
            quantize_(encoder.model, kind())
            yield name, encoder
    for name, int8 in (("ONNX", False), ("ONNX, int8", True)):
        export(model, folder / name, int8=int8)
        yield name, load_encoder(f"onnx:{folder / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scratch/model", help="folder or Hub id")
    parser.add_argument("--data", type=Path, default=Path("scratch"), help="folder of the data")
    parser.add_argument("--recipe", default="phantoms", help="name or path of a recipe")
    arguments = parser.parse_args()
    read = load_recipe(arguments.recipe)
    if not {"zero-shot", "retrieval"} <= set(read.tasks):
        parser.error(f"the recipe {read.name} does not support both zero-shot and retrieval")
    sets = open_recipe(read, arguments.data)
    captions = [caption for data in sets for caption in data.captions or ()]

    reference: list[Tensor] = []
    print(f"{'':24}{'zero-shot':>10}{'R@1':>8}{'R@5':>8}{'cosine of images':>18}{'of texts':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, encoder in formats(arguments.model, Path(temporary)):
            parts, accuracies = [], []
            for data in sets:
                parts.append(encoder.encode_images(data.images))
                best = (parts[-1] @ ZeroShotClassifier(encoder, data.prompts).class_embeds).argmax(dim=1)
                accuracies.append(float((best == torch.as_tensor(data.labels)).float().mean()))
            images, texts = torch.cat(parts), encoder.encode_texts(captions)
            reference = reference or [images, texts]
            recalls = recall_at_k(images @ texts.T, captions, (1, 5))
            pairs = zip((images, texts), reference, strict=True)
            cosines = [float((found * one).sum(dim=1).min()) for found, one in pairs]
            print(
                f"{name:24}{sum(accuracies) / len(accuracies):>10.3f}{recalls['text_to_image_r1']:>8.3f}"
                f"{recalls['text_to_image_r5']:>8.3f}{cosines[0]:>18.4f}{cosines[1]:>10.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
