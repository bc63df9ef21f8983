"""Training on Accelerate: `train(TrainConfig.from_yaml(path))`."""

from medmoe_hf.training.build import build_model
from medmoe_hf.training.checkpoints import ResumeError
from medmoe_hf.training.config import ConfigError, TrainConfig
from medmoe_hf.training.loop import Interrupted, TrainingError, TrainingRecord, train
from medmoe_hf.training.plan import Plan, plan

__all__ = [
    "ConfigError",
    "Interrupted",
    "Plan",
    "ResumeError",
    "TrainConfig",
    "TrainingError",
    "TrainingRecord",
    "build_model",
    "plan",
    "train",
]
