"""Evaluation: metrics, and the measurements made while training."""

from medmoe_hf.evaluation.metrics import accuracy, recall_at_k
from medmoe_hf.evaluation.validation import validate

__all__ = ["accuracy", "recall_at_k", "validate"]
