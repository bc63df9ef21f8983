"""Registers the model with the Auto classes of transformers. Importing `medmoe_hf.model`'s classes imports this."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from .configuration_medmoe import MedMoEConfig, MedMoETextConfig, MedMoEVisionConfig
from .image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil
from .modeling_medmoe import (
    MedMoEForImageClassification,
    MedMoEModel,
    MedMoETextModel,
    MedMoEVisionModel,
)
from .processing_medmoe import MedMoEProcessor
from .tokenization_medmoe import MedMoETokenizer

for config_class, model_class in (
    (MedMoEConfig, MedMoEModel),
    (MedMoEVisionConfig, MedMoEVisionModel),
    (MedMoETextConfig, MedMoETextModel),
):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModel.register(config_class, model_class)
    AutoProcessor.register(config_class, MedMoEProcessor)
    AutoTokenizer.register(config_class, fast_tokenizer_class=MedMoETokenizer)
    AutoImageProcessor.register(
        config_class, image_processor_classes={"torchvision": MedMoEImageProcessor, "pil": MedMoEImageProcessorPil}
    )
AutoModelForZeroShotImageClassification.register(MedMoEConfig, MedMoEModel)
AutoModelForImageClassification.register(MedMoEConfig, MedMoEForImageClassification)
