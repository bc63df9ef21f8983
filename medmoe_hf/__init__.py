"""MedMoE (arXiv 2506.08356) for Hugging Face.

Importing this package registers its classes with the Auto classes of transformers.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without_torchao_warnings() -> Iterator[None]:
    """transformers imports torchao where it is installed, which warns twice of a deprecated function of torch."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


with _without_torchao_warnings():
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
