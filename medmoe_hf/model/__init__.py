"""The model: what travels to the Hub with every checkpoint, registered with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from .configuration_medmoe import MedMoEConfig, MedMoESwinConfig, MedMoETextConfig, MedMoEVisionConfig
from .errors_medmoe import ImageError, ImageTooLargeError
from .image_files_medmoe import load_image
from .image_processing_medmoe import MedMoEImageProcessor, MedMoEImageProcessorPil
from .medical_images_medmoe import MedicalImage, read_medical_image
from .modeling_medmoe import (
    MedMoEExpert,
    MedMoEForImageClassification,
    MedMoEModel,
    MedMoEOutput,
    MedMoETextModel,
    MedMoEVisionModel,
    register_expert,
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

__all__ = [
    "ImageError",
    "ImageTooLargeError",
    "MedMoEConfig",
    "MedMoEExpert",
    "MedMoEForImageClassification",
    "MedMoEImageProcessor",
    "MedMoEImageProcessorPil",
    "MedMoEModel",
    "MedMoEOutput",
    "MedMoEProcessor",
    "MedMoESwinConfig",
    "MedMoETextConfig",
    "MedMoETextModel",
    "MedMoETokenizer",
    "MedMoEVisionConfig",
    "MedMoEVisionModel",
    "MedicalImage",
    "load_image",
    "read_medical_image",
    "register_expert",
]
