"""Training on Accelerate: `train(TrainConfig.from_yaml(path))`."""

from typing import TYPE_CHECKING

from medmoe_hf.common.lazy import lazy_attributes

if TYPE_CHECKING:
    from medmoe_hf.errors import ConfigError as ConfigError
    from medmoe_hf.errors import Interrupted as Interrupted
    from medmoe_hf.errors import ResumeError as ResumeError
    from medmoe_hf.errors import TrainingError as TrainingError
    from medmoe_hf.training.build import build_model as build_model
    from medmoe_hf.training.config import TrainConfig as TrainConfig
    from medmoe_hf.training.dry_run import Plan as Plan
    from medmoe_hf.training.dry_run import plan as plan
    from medmoe_hf.training.loop import train as train
    from medmoe_hf.training.record import TrainingRecord as TrainingRecord

__getattr__, __all__ = lazy_attributes(
    __name__,
    {
        "medmoe_hf.errors": ["ConfigError", "Interrupted", "ResumeError", "TrainingError"],
        "medmoe_hf.training.build": ["build_model"],
        "medmoe_hf.training.config": ["TrainConfig"],
        "medmoe_hf.training.dry_run": ["Plan", "plan"],
        "medmoe_hf.training.loop": ["train"],
        "medmoe_hf.training.record": ["TrainingRecord"],
    },
)
