"""Models with random weights, small enough for tests, as folders or names that `load_encoder` takes."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from medmoe_hf.data import phantom_sample
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ModelSection


def medmoe_folder(folder: Path, **overrides: Any) -> Path:
    """A `tiny` MedMoE whose routers send different images and texts to different experts."""
    torch.manual_seed(0)
    model, processor = build_model(ModelSection(preset="tiny", overrides=overrides))
    samples = [phantom_sample(5, index, image_size=64) for index in range(24)]
    inputs = processor(
        images=[sample["image"] for sample in samples],
        text=[sample["caption"] for sample in samples],
        return_tensors="pt",
    )
    pixels = inputs.pop("pixel_values")
    model.eval()
    with torch.no_grad():
        spread_out(model.vision_model.router, model.vision_model.encode(pixels).pooler_output)
        if model.report_router is not None:
            spread_out(model.report_router, model.text_model(**inputs).pooler_output)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def spread_out(router: Any, embeds: torch.Tensor) -> None:
    """Random weights that send some of these embeddings to each of several experts."""
    torch.nn.init.normal_(router.fc1.weight)
    router.fc1.bias.copy_(-router.fc1.weight @ embeds.mean(dim=0))
    torch.nn.init.normal_(router.fc2.weight)
    router.fc2.bias.copy_(-router.fc2.weight @ router.fc1(embeds).relu().mean(dim=0))


def clip_folder(folder: Path) -> Path:
    """A CLIP of transformers, with a tokenizer of letters."""
    torch.manual_seed(1)
    letters = [chr(number) for number in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(pieces),
            "max_position_embeddings": 32,
            "bos_token_id": len(pieces) - 2,
            "eos_token_id": len(pieces) - 1,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def open_clip_architecture(folder: Path) -> str:
    """An architecture that open_clip has not known before."""
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / "medmoe-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "medmoe-test-tiny"
