"""The model: what travels to the Hub with every checkpoint.

Its names are imported when they are first used; the classes are then registered with the Auto classes of transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_medmoe import MedMoEConfig as MedMoEConfig
    from .configuration_medmoe import MedMoESwinConfig as MedMoESwinConfig
    from .configuration_medmoe import MedMoETextConfig as MedMoETextConfig
    from .configuration_medmoe import MedMoEVisionConfig as MedMoEVisionConfig
    from .errors_medmoe import ImageError as ImageError
    from .errors_medmoe import ImageTooLargeError as ImageTooLargeError
    from .image_files_medmoe import load_image as load_image
    from .image_processing_medmoe import MedMoEImageProcessor as MedMoEImageProcessor
    from .image_processing_medmoe import MedMoEImageProcessorPil as MedMoEImageProcessorPil
    from .medical_images_medmoe import read_medical_image as read_medical_image
    from .medical_pixels_medmoe import MedicalImage as MedicalImage
    from .modeling_medmoe import MedMoEExpert as MedMoEExpert
    from .modeling_medmoe import MedMoEForImageClassification as MedMoEForImageClassification
    from .modeling_medmoe import MedMoEModel as MedMoEModel
    from .modeling_medmoe import MedMoEOutput as MedMoEOutput
    from .modeling_medmoe import MedMoETextModel as MedMoETextModel
    from .modeling_medmoe import MedMoEVisionModel as MedMoEVisionModel
    from .modeling_medmoe import register_expert as register_expert
    from .processing_medmoe import MedMoEProcessor as MedMoEProcessor
    from .rejection_medmoe import Rejector as Rejector
    from .studies_medmoe import Series as Series
    from .studies_medmoe import Study as Study
    from .studies_medmoe import read_studies as read_studies
    from .tasks_medmoe import Calibration as Calibration
    from .tasks_medmoe import Task as Task
    from .tasks_medmoe import TaskAnswer as TaskAnswer
    from .tokenization_medmoe import MedMoETokenizer as MedMoETokenizer

_HOMES = {
    "Calibration": "tasks",
    "ImageError": "errors",
    "ImageTooLargeError": "errors",
    "MedMoEConfig": "configuration",
    "MedMoEExpert": "modeling",
    "MedMoEForImageClassification": "modeling",
    "MedMoEImageProcessor": "image_processing",
    "MedMoEImageProcessorPil": "image_processing",
    "MedMoEModel": "modeling",
    "MedMoEOutput": "modeling",
    "MedMoEProcessor": "processing",
    "MedMoESwinConfig": "configuration",
    "MedMoETextConfig": "configuration",
    "MedMoETextModel": "modeling",
    "MedMoETokenizer": "tokenization",
    "MedMoEVisionConfig": "configuration",
    "MedMoEVisionModel": "modeling",
    "MedicalImage": "medical_pixels",
    "Rejector": "rejection",
    "Series": "studies",
    "Study": "studies",
    "Task": "tasks",
    "TaskAnswer": "tasks",
    "load_image": "image_files",
    "read_medical_image": "medical_images",
    "read_studies": "studies",
    "register_expert": "modeling",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # As medmoe_hf.common.lazy, which this lowest layer does not import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith("MedMoE"):
        importlib.import_module(".registration", __name__)
    value = getattr(importlib.import_module(f".{_HOMES[name]}_medmoe", __name__), name)
    globals()[name] = value
    return value
