"""Loads a folder without this package installed, and writes the model's outputs for the golden input.

`medmoe_hf.hub.golden` runs the text of this file in a separate process; so it imports nothing from this package.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OUTPUTS = (
    "logits_per_image",
    "image_embeds",
    "text_embeds",
    "router_logits",
    "report_router_logits",
    "expert_ids",
    "logits",
    "pooler_output",
)


class RefusePackage:
    """An import finder that hides `medmoe_hf`, even if it is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "medmoe_hf":
            raise ModuleNotFoundError(f"No module named {name!r}: it is not installed here.", name=name)


def golden_tensors(model: Any, processor: Any, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of a processor and a model for images and texts.

    Args:
        model: Any MedMoE model; it gets the images, the texts or both, as it needs.
        processor: Its processor.
        images: (B, H, W, 3) uint8.
        texts: N texts.

    Returns:
        `input.<name>`, the processor's outputs, and `output.<name>`, those of `OUTPUTS` that the model has, and
        `output.ood_score` of a model with a rejector.
    """
    inputs = dict(processor(images=[image.numpy() for image in images], text=list(texts), return_tensors="pt"))
    takes = {name: ("image" if name == "pixel_values" else "text") in model.input_modalities for name in inputs}
    with torch.inference_mode():
        outputs = model(**{name: value for name, value in inputs.items() if takes[name]})
        rejects = getattr(model, "rejector", None) is not None
        scores = model.route(inputs["pixel_values"]).ood_score if rejects else None
    found = {f"input.{name}": value for name, value in inputs.items()}
    found |= {f"output.{name}": outputs[name] for name in OUTPUTS if outputs.get(name) is not None}
    if scores is not None:
        found["output.ood_score"] = scores
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def main(folder: str, golden: str, out: str) -> None:
    """Writes `golden_tensors` of a folder, loaded with its own code, for the images and texts of a golden file."""
    sys.meta_path.insert(0, RefusePackage)
    import transformers

    with safe_open(golden, "pt") as file:
        images, texts = file.get_tensor("images"), json.loads(file.metadata()["golden"])["texts"]
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    wanted = config["architectures"][0]
    kind = next(kind for kind, path in config["auto_map"].items() if str(path).endswith(f".{wanted}"))
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    save_file(golden_tensors(model, processor, images, texts), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
