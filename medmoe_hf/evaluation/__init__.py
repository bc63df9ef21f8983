"""Evaluation: protocols, metrics, and the measurements made during training."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.evaluation.metrics import accuracy as accuracy
    from medmoe_hf.evaluation.metrics import recall_at_k as recall_at_k
    from medmoe_hf.evaluation.validation import validate as validate

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.evaluation.metrics": ["accuracy", "recall_at_k"],
        "medmoe_hf.evaluation.validation": ["validate"],
    },
)
