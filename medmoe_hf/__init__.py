"""MedMoE (arXiv 2506.08356) for Hugging Face.

Importing this package registers its classes with the Auto classes of transformers.
"""

from medmoe_hf.model import (
    MedMoEConfig,
    MedMoEForImageClassification,
    MedMoEImageProcessor,
    MedMoEImageProcessorPil,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETextModel,
    MedMoETokenizer,
    MedMoEVisionModel,
)

__version__ = "0.1.0"

__all__ = [
    "MedMoEConfig",
    "MedMoEForImageClassification",
    "MedMoEImageProcessor",
    "MedMoEImageProcessorPil",
    "MedMoEModel",
    "MedMoEProcessor",
    "MedMoETextModel",
    "MedMoETokenizer",
    "MedMoEVisionModel",
]
