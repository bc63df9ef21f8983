"""Robustness reports: what corrupted images, other words, missing images and groups of people do to predictions."""

from medmoe_hf.evaluation.robustness.comparison import compare
from medmoe_hf.evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from medmoe_hf.evaluation.robustness.protocol import robustness

__all__ = ["CORRUPTIONS", "SEVERITIES", "compare", "corrupt", "robustness"]
