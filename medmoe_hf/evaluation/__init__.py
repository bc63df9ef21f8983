"""Evaluation: metrics, the measurements made while training, the protocols, and labels without training."""

from medmoe_hf.evaluation.encoders import load_encoder
from medmoe_hf.evaluation.metrics import accuracy, recall_at_k
from medmoe_hf.evaluation.validation import validate
from medmoe_hf.evaluation.zero_shot import ZeroShotClassifier

__all__ = ["ZeroShotClassifier", "accuracy", "load_encoder", "recall_at_k", "validate"]
