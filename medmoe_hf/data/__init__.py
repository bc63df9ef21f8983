"""Data: the synthetic phantom stream that demos and tests train on."""

from medmoe_hf.data.phantom import (
    FINDINGS,
    PHRASES,
    FindingPhrases,
    phantom_features,
    phantom_sample,
    phantom_stream,
    phantom_vocabulary,
    write_webdataset,
    zero_shot_prompts,
)
from medmoe_hf.model.modalities_medmoe import MODALITIES

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
