"""Loads a folder as those do who have never seen this package, and writes what its model makes of the golden input.

`medmoe_hf.hub.golden` runs the text of this file in a process of its own; so it imports nothing of ours.
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
    """A finder that comes before all others, and finds no `medmoe_hf`, though it may be installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "medmoe_hf":
            raise ModuleNotFoundError(f"No module named {name!r}: whoever loads this has not got it.", name=name)


def golden_tensors(model: Any, processor: Any, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """What a processor and a model make of images and texts.

    Args:
        model: any of MedMoE's; gets the images, the texts or both, as it takes.
        images: (B, H, W, 3) uint8.
        texts: any number.

    Returns:
        `input.<name>` for what the processor gave, `output.<name>` for those of `OUTPUTS` that the model has.
    """
    inputs = dict(processor(images=[image.numpy() for image in images], text=list(texts), return_tensors="pt"))
    takes = {name: ("image" if name == "pixel_values" else "text") in model.input_modalities for name in inputs}
    with torch.inference_mode():
        outputs = model(**{name: value for name, value in inputs.items() if takes[name]})
    found = {f"input.{name}": value for name, value in inputs.items()}
    found |= {f"output.{name}": outputs[name] for name in OUTPUTS if outputs.get(name) is not None}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def main(folder: str, golden: str, out: str) -> None:
    """Writes `golden_tensors` of a folder, loaded by its own code, for the images and texts of a golden file."""
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
