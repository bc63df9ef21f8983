"""Compute parameters and operations of image towers, as in Table 3 of the paper.

    python examples/experiments/table3.py [--output table3.json]

GMACs are multiply-adds of convolutions and matrix products for one image of 224x224 pixels, that is half of the count
of PyTorch's `FlopCounterMode`. Normalization, activations, softmax and interpolation are not counted. All weights are
random.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from medmoe_hf.common.files import atomic_write
from medmoe_hf.model import MedMoEConfig, MedMoEVisionModel

SIDE = 224


def multiply_adds(model: nn.Module, forward: Callable[[torch.Tensor], Any]) -> int:
    """Count the multiply-adds for one image, in all operations that PyTorch's counter supports."""
    model.eval()
    # The counter does not support fused attention on CPUs; SDPBackend.MATH uses matrix products, which it counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward(torch.zeros(1, 3, SIDE, SIDE))
    return int(counter.get_total_flops()) // 2


def medmoe_rows(preset: str) -> list[dict[str, Any]]:
    """Return rows for the image tower of a preset: with the selected expert, as it runs, and with all experts."""
    tower = MedMoEVisionModel(MedMoEConfig.from_preset(preset).vision_config)
    every = range(len(tower.experts))

    def with_all(image: torch.Tensor) -> None:
        maps = tower.encode(image).feature_maps
        for expert in tower.experts:
            expert(maps, tower.map_size(maps))

    one = count(tower.backbone) + count(tower.router) + count(tower.level_norms) + count(tower.experts[0])
    return [
        {
            "tower": f"MedMoE `{preset}`, the selected expert",
            "parameters": one,
            "multiply_adds": multiply_adds(tower, lambda image: tower(image, modality=0)),
        },
        {
            "tower": f"MedMoE `{preset}`, all {len(every)} experts",
            "parameters": count(tower),
            "multiply_adds": multiply_adds(tower, with_all),
        },
    ]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rows() -> list[dict[str, Any]]:
    """Return all rows of the table."""
    result = [row for preset in ("paper", "plus", "official") for row in medmoe_rows(preset)]
    resnet = timm.create_model("resnet50_clip", pretrained=False)
    vit = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
        )
    )
    for name, tower in (("CLIP RN50", resnet), ("CLIP ViT-B/16", vit)):
        result.append({"tower": name, "parameters": count(tower), "multiply_adds": multiply_adds(tower, tower)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("table3.json"), help="JSON file for the numbers")
    arguments = parser.parse_args()
    table = rows()
    with atomic_write(arguments.output) as partial:
        partial.write_text(json.dumps({"image_size": SIDE, "towers": table}, indent=1) + "\n", encoding="utf-8")
    print("| image tower | parameters | GMACs |\n|---|---|---|")
    for row in table:
        print(f"| {row['tower']} | {row['parameters'] / 1e6:.1f} M | {row['multiply_adds'] / 1e9:.2f} |")


if __name__ == "__main__":
    main()
