"""The small model that the tests of training use: overrides of a preset."""

from copy import deepcopy

SMALL = {
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32},
    "projection_dim": 16,
    "vision_config": {
        "image_size": 64,
        "expert_hidden_size": 8,
        "local_size": 16,
        "scale_attention_size": 8,
        "router_hidden_size": 8,
        "swin_config": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
    },
}

# The same without anything random, so that one process and two, or one batch and several, draw no other numbers; with
# as many text layers as the presets sum.
EXACT = deepcopy(SMALL)
EXACT["text_config"] |= {
    "num_hidden_layers": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
EXACT["vision_config"]["swin_config"]["drop_path_rate"] = 0.0
