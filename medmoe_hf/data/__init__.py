"""Data: sources, streams of image-text pairs, and synthetic samples for demos and tests."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.data.phantom import FINDINGS as FINDINGS
    from medmoe_hf.data.phantom import PHRASES as PHRASES
    from medmoe_hf.data.phantom import FindingPhrases as FindingPhrases
    from medmoe_hf.data.phantom import phantom_sample as phantom_sample
    from medmoe_hf.data.phantom import phantom_vocabulary as phantom_vocabulary
    from medmoe_hf.data.phantom import write_webdataset as write_webdataset
    from medmoe_hf.data.phantom import zero_shot_prompts as zero_shot_prompts
    from medmoe_hf.model.modalities_medmoe import MODALITIES as MODALITIES

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.data.phantom": [
            "FINDINGS",
            "PHRASES",
            "FindingPhrases",
            "phantom_sample",
            "phantom_vocabulary",
            "write_webdataset",
            "zero_shot_prompts",
        ],
        "medmoe_hf.model.modalities_medmoe": ["MODALITIES"],
    },
)
