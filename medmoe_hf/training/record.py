"""What a training run writes to `training.json`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainingRecord:
    """What happened in a run.

    It is written to `training.json` next to the weights; absolute paths in it are shortened to their last part.

    Attributes:
        steps: Optimizer steps done.
        samples: Image-text pairs seen, over all processes.
        seconds: Training time, without evaluations.
        log: One entry per `log_every` steps: step, learning rate, loss terms, gradient norm.
        evaluations: One entry per evaluation: the step and the metrics of `medmoe_hf.evaluation.validate`, with the
            number of pairs behind each.
        best_step: Step of the evaluation that was the best by `best_metric`; `None` before the first evaluation.
        saved_step: Step whose weights were saved, by `final_model`; `None` before the end.
        stopped: Why the run ended: `"max_steps"`, or what `early_stopping` waited for; `None` before the end.
        skipped: Number of samples that the main process could not read, per source and cause.
        resumed: Steps at which the run was resumed.
        config: The run's configuration.

    Example:
        ```python
        import json
        from pathlib import Path

        from medmoe_hf.training import TrainingRecord

        record = TrainingRecord(**json.loads(Path("runs/first/training.json").read_text()))
        print(record.steps, record.evaluations[-1]["loss"])
        ```
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    saved_step: int | None = None
    stopped: str | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
