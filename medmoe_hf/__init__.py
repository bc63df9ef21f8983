"""MedMoE (arXiv 2506.08356) for Hugging Face.

Importing this package makes the Auto classes of transformers know it, and loads neither transformers nor torch.
"""

import logging
import os
from typing import TYPE_CHECKING

from medmoe_hf.common.auto_classes import register_on_use
from medmoe_hf.common.lazy import lazy_attributes

# From version 1.32 at the latest, onnxruntime reports its use over the network, unless this says no before its import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from medmoe_hf.common.packaged import pretrained as pretrained
    from medmoe_hf.inference.studies.paths import predict as predict
    from medmoe_hf.model import MedMoEConfig as MedMoEConfig
    from medmoe_hf.model import MedMoEForImageClassification as MedMoEForImageClassification
    from medmoe_hf.model import MedMoEImageProcessor as MedMoEImageProcessor
    from medmoe_hf.model import MedMoEImageProcessorPil as MedMoEImageProcessorPil
    from medmoe_hf.model import MedMoEModel as MedMoEModel
    from medmoe_hf.model import MedMoEProcessor as MedMoEProcessor
    from medmoe_hf.model import MedMoETextModel as MedMoETextModel
    from medmoe_hf.model import MedMoETokenizer as MedMoETokenizer
    from medmoe_hf.model import MedMoEVisionModel as MedMoEVisionModel

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.common.packaged": ["pretrained"],
        "medmoe_hf.inference.studies.paths": ["predict"],
        "medmoe_hf.model": [
            "MedMoEConfig",
            "MedMoEForImageClassification",
            "MedMoEImageProcessor",
            "MedMoEImageProcessorPil",
            "MedMoEModel",
            "MedMoEProcessor",
            "MedMoETextModel",
            "MedMoETokenizer",
            "MedMoEVisionModel",
        ],
    },
)

__version__ = "0.1.0"

register_on_use()
# transformers imports torchao where it is installed, which calls a deprecated function of torch twice.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
