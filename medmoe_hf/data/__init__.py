"""Data: any source to a stream of image, caption and modality; and synthetic samples for demos and tests."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.data.phantom import FINDINGS as FINDINGS
    from medmoe_hf.data.phantom import PHRASES as PHRASES
    from medmoe_hf.data.phantom import FindingPhrases as FindingPhrases
    from medmoe_hf.data.phantom import phantom_features as phantom_features
    from medmoe_hf.data.phantom import phantom_sample as phantom_sample
    from medmoe_hf.data.phantom import phantom_stream as phantom_stream
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
            "phantom_features",
            "phantom_sample",
            "phantom_stream",
            "phantom_vocabulary",
            "write_webdataset",
            "zero_shot_prompts",
        ],
        "medmoe_hf.model.modalities_medmoe": ["MODALITIES"],
    },
)
