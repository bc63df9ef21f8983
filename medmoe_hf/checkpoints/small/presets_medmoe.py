"""Presets of the configuration, by name."""

from difflib import get_close_matches
from typing import Any

from .errors_medmoe import ArgumentError

PRESETS: dict[str, dict[str, Any]] = {
    # Swin-T, six experts (36.9 M parameters in the image tower) and Bio_ClinicalBERT's shapes.
    "paper": {"text_config": {"model_type": "bert", "vocab_size": 28996}},
    # The official code, version 3 (see `OFFICIAL_VERSIONS`).
    "official": {
        "text_config": {"model_type": "bert", "vocab_size": 28996},
        "word_rule": "official",
        "report_length": 25,
        "router": "image",
        "aux_loss_on": "probabilities",
        "global_loss_weight": 0.5,
        "local_loss_weight": 0.5,
        "aux_loss_weight": 2.0,
        "vision_config": {
            "swin_config": {"pyramid": "merged"},
            "expert_type": "token",
            "scale_attention_size": 384,
            "global_features": "expert",
        },
    },
    # Result of examples/experiments/ablation.py: v_g from both and the projections won individually, the rest won as a
    # group; a learned scale of the global loss lost. Pooled regions were as good as the whole map, and cost less.
    "plus": {
        "text_config": {"model_type": "bert", "vocab_size": 28996},
        "word_pooling": "mean",
        "router": "both",
        "projection_dim": 512,
        "local_loss_regions": 19,
        "temp1_regions": 361,
        "contrast": "mean",
        "aux_label_smoothing": 0.1,
        "aux_loss_weight": 0.5,
        "vision_config": {
            "pyramid_norm": True,
            "global_features": "both",
            "scale_attention_native": True,
            "router_norm": True,
        },
    },
    # `plus` on an EfficientNet-Lite0 and a MiniLM sentence encoder. The encoder was trained so that the mean of its
    # last layer embeds a sentence: with one layer and `word_pooling="sum"` report embeddings agree with its own (mean
    # cosine 0.99 on sentences of radiology reports; 0.59 with four layers, and reports are then hard to tell apart).
    "small": {
        "text_config": {
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
        "num_summed_layers": 1,
        "word_pooling": "sum",
        "router": "both",
        "projection_dim": 256,
        "temp1_regions": 361,
        "contrast": "mean",
        "aux_label_smoothing": 0.1,
        "aux_loss_weight": 0.5,
        "vision_config": {
            "backbone": "timm/tf_efficientnet_lite0",
            "image_size": 160,
            "map_size": 20,
            "expert_hidden_size": 64,
            "local_size": 192,
            "scale_attention_size": 64,
            "pyramid_norm": True,
            "global_features": "both",
            "scale_attention_native": True,
            "router_norm": True,
        },
    },
    # Learns in minutes on two CPU cores from random weights: shallow, with a larger initialisation than pretrained
    # models, and with v_g from the expert, whose convolutions learn faster than attention does. Two levels and small
    # windows keep each region's receptive field small, so that its vector is specific to its location.
    "tiny": {
        "text_config": {
            "model_type": "bert",
            "vocab_size": 1024,
            "hidden_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 192,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "num_summed_layers": 1,
        "projection_dim": 64,
        "temp1": 8.0,
        "temp2": 8.0,
        "temp3": 6.0,
        "vision_config": {
            "image_size": 64,
            "global_features": "expert",
            "initializer_range": 0.08,
            "swin_config": {
                "embed_dim": 32,
                "depths": (1, 1),
                "num_heads": (2, 4),
                "window_size": 2,
                "drop_path_rate": 0.0,
                "initializer_range": 0.08,
            },
            "expert_hidden_size": 48,
            "local_size": 64,
            "scale_attention_size": 32,
            "router_hidden_size": 64,
        },
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """Returns the fields of a preset.

    Args:
        name: One of `PRESETS`.

    Raises:
        ValueError: The name is unknown; the message lists the known ones.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ArgumentError(f'Unknown preset "{name}". Known presets: {", ".join(sorted(PRESETS))}.{hint}')
    return PRESETS[name]


PRESET_MAX_LENGTH = {"paper": 25, "official": 25, "plus": 256, "small": 128, "tiny": 48}
"""Maximum text length of each preset, in tokens including special ones, for the processor of a new model."""

OFFICIAL_VERSIONS: dict[int, dict[str, Any]] = {
    1: {"global_features": "backbone", "mixture": "soft", "map_size": 16},
    2: {"global_features": "backbone"},
    3: {},
}
"""Changes of the preset's `vision_config` for each version of the official code; they share their parameters."""
