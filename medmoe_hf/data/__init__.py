"""Data: the synthetic phantom stream that demos and tests train on."""

from medmoe_hf.data.phantom import (
    FINDINGS,
    MODALITIES,
    PHRASES,
    FindingPhrases,
    phantom_features,
    phantom_sample,
    phantom_stream,
    phantom_vocabulary,
    write_webdataset,
    zero_shot_prompts,
)

__all__ = [
    "FINDINGS",
    "MODALITIES",
    "PHRASES",
    "FindingPhrases",
    "phantom_features",
    "phantom_sample",
    "phantom_stream",
    "phantom_vocabulary",
    "write_webdataset",
    "zero_shot_prompts",
]
