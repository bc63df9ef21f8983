"""Parts of a model that are frozen at first and trained from a later step on."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from medmoe_hf.errors import ArgumentError
from medmoe_hf.training.optimizer import matching_parameters


class Unfreezing:
    """The parts that are trained from a later step on.

    Until then they are frozen as by `freeze`: they have no gradients (so that nothing is computed for them), the
    optimizer has no state of them, and `train_mode` keeps their modules in evaluation mode. What is trained depends on
    the step alone, so a resumed run needs no state of this.

    Args:
        model: The model, after `freeze`. All parts are trainable until the first `apply`, so that the optimizer and
            the wrapper of distributed training know them.
        steps: Names or patterns, as in `freeze`, to the number of steps after which the part is trained. They take
            precedence over `freeze`; of several that match a parameter the last one counts.

    Attributes:
        starts: Parameter -> number of steps after which it is trained.

    Raises:
        ValueError: If a name matches nothing, or if nothing is trained in the first step.

    Example:
        ```python
        from medmoe_hf import MedMoEConfig, MedMoEModel
        from medmoe_hf.training.unfreezing import Unfreezing

        model = MedMoEModel(MedMoEConfig.from_preset("tiny"))
        unfreezing = Unfreezing(model, {"vision_model.backbone": 200})
        unfreezing.apply(0)  # before the step that follows so many
        ```
    """

    def __init__(self, model: nn.Module, steps: Mapping[str, int]) -> None:
        self.starts: dict[nn.Parameter, int] = {}
        for pattern, step in steps.items():
            self.starts |= dict.fromkeys(matching_parameters(model, pattern, "unfreeze_at"), step)
        for parameter in self.starts:
            parameter.requires_grad_(True)
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if steps and all(parameter in self.starts for parameter in trained):
            raise ArgumentError(
                "`unfreeze_at` and `freeze` leave nothing to train in the first step; leave a part out of them."
            )

    def apply(self, step: int) -> None:
        """Freezes and unfreezes for the step that follows `step` steps."""
        for parameter, start in self.starts.items():
            if parameter.requires_grad != (step >= start):
                parameter.requires_grad_(step >= start)


def warm_up_late_groups(scheduler: Any, warmup_steps: int) -> None:
    """Gives the groups that start later a linear warm-up of their own, on top of the schedule.

    Args:
        scheduler: A `LambdaLR` of groups of `parameter_groups`.
        warmup_steps: Number of steps; the k-th has k / `warmup_steps` of the schedule's learning rate.
    """
    groups = scheduler.optimizer.param_groups
    scheduler.lr_lambdas = [
        partial(_warmed_up, schedule, group["start"], warmup_steps) if group["start"] and warmup_steps else schedule
        for schedule, group in zip(scheduler.lr_lambdas, groups, strict=True)
    ]


def _warmed_up(schedule: Callable[[int], float], start: int, warmup_steps: int, step: int) -> float:
    return schedule(step) * min(1.0, max(1, step - start + 1) / warmup_steps)
