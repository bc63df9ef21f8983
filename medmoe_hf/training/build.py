"""New models with their processors, and the optimiser's parameter groups."""

from typing import Any

from torch import nn
from transformers import AutoTokenizer

from medmoe_hf.data.phantom import phantom_vocabulary
from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEImageProcessor,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETokenizer,
)
from medmoe_hf.model.configuration_medmoe import PRESET_MAX_LENGTH
from medmoe_hf.training.config import ModelSection


def build_model(section: ModelSection) -> tuple[MedMoEModel, MedMoEProcessor]:
    """The model that a configuration names, with the processor that belongs to it.

    A new model's vocabulary and positions follow its tokenizer.

    Raises:
        ValueError: for an unknown preset or a wrong override.
    """
    if section.from_pretrained is not None:
        model = MedMoEModel.from_pretrained(section.from_pretrained, **section.overrides)
        return model, MedMoEProcessor.from_pretrained(section.from_pretrained)
    assert section.preset is not None  # checked by ModelSection
    max_length = PRESET_MAX_LENGTH.get(section.preset, 25)
    if section.tokenizer is None:
        tokenizer = MedMoETokenizer.from_words(phantom_vocabulary(), max_length=max_length)
    else:
        tokenizer = MedMoETokenizer.from_tokenizer(
            AutoTokenizer.from_pretrained(section.tokenizer), max_length=max_length
        )
    overrides = dict(section.overrides)
    overrides["text_config"] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **overrides.get("text_config", {}),
    }
    config = MedMoEConfig.from_preset(section.preset, **overrides)
    side = config.vision_config.image_size
    processor = MedMoEProcessor(MedMoEImageProcessor(size={"height": side, "width": side}), tokenizer)
    return MedMoEModel(config), processor


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels with weight decay, vectors and scalars without.

    Norms, biases and temperatures have one dimension or none, and pulling them to zero only hurts.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
