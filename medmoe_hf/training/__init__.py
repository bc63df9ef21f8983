"""Training on Accelerate: `train(TrainConfig.from_yaml(path))`."""

from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import ConfigError, TrainConfig
from medmoe_hf.training.loop import TrainingError, TrainingRecord, train

__all__ = ["ConfigError", "TrainConfig", "TrainingError", "TrainingRecord", "build_model", "train"]
