"""Plan of a run, without training: `medmoe train --dry-run`."""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medmoe_hf.training.config import TrainConfig
from medmoe_hf.training.loop import TrainingRun

_STEPS = 2
_NEGATIVES = {
    "micro_batch": "its own micro-batch",
    "ranks": "the micro-batches of all processes",
    "global": "the entire step",
}


@dataclass
class Plan:
    """Sizes and costs of a run, measured in two steps and computed.

    Attributes:
        parameters: Number of parameters.
        trainable: Number of trainable parameters.
        groups: Name, number of parameters, learning rate and weight decay of each parameter group.
        processes: Number of processes.
        pairs: Pairs per step, over all processes.
        contrasted: Description and number of the pairs that a pair is contrasted with.
        positives: `positives` of the model's configuration.
        max_steps: Number of steps of the run.
        schedule: Description of the learning rate schedule.
        step_seconds: Duration of the second step, as the first one warms up.
        weight_bytes: Memory of the weights of one process, without sharding.
        gradient_bytes: Memory of the gradients.
        optimizer_bytes: Memory of the optimizer's state.
        average_bytes: Memory of the moving average; 0 without one.
        peak_bytes: Peak memory of the device, or of the process on a CPU, in these steps.
        checkpoint_bytes: Size of a checkpoint on disk.
        device: Name of the device.
        losses: Losses of the two steps, in which the parts of `unfreeze_at` are trained already.
        locations: Lines that name the folders of model, checkpoints and logs.
        balance: Lines about the groups of `data.balance`: their rows and shares.
    """

    parameters: int
    trainable: int
    groups: list[tuple[str, int, float, float]]
    processes: int
    pairs: int
    contrasted: tuple[str, int]
    positives: str
    max_steps: int
    schedule: str
    step_seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    peak_bytes: int
    checkpoint_bytes: int
    device: str
    losses: list[float] = field(default_factory=list)
    locations: list[str] = field(default_factory=list)
    balance: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        hours = self.step_seconds * self.max_steps / 3600
        lines = [
            f"model       {self.parameters:,} parameters, {self.trainable:,} trained "
            f"({self.trainable / self.parameters:.1%})",
            *(
                f"            {name}: {count:,} learning rate {rate:.2g}, weight decay {decay:g}"
                for name, count, rate, decay in self.groups
            ),
            f"step        {self.pairs} pairs on {self.processes} process{'es' if self.processes > 1 else ''} "
            f"({self.device}); each pair against {self.contrasted[0]} ({self.contrasted[1]})"
            + ("" if self.positives == "none" else f", positives by {self.positives.replace('_', ' ')}"),
            f"schedule    {self.max_steps:,} steps, {self.schedule}",
            f"time        {self.step_seconds:.2f} s per step, about {hours:.1f} h in total, without evaluations",
            f"memory      weights {_size(self.weight_bytes)}, gradients {_size(self.gradient_bytes)}, optimizer "
            f"{_size(self.optimizer_bytes)}"
            + (f", moving average {_size(self.average_bytes)}" if self.average_bytes else "")
            + f"; peak in {_STEPS} steps {_size(self.peak_bytes)}",
            f"disk        {_size(self.checkpoint_bytes)} per checkpoint",
            f"losses      {', '.join(f'{loss:.3f}' for loss in self.losses)}",
            *self.locations,
            *self.balance,
        ]
        return "\n".join(lines)


def plan(config: TrainConfig) -> Plan:
    """Runs two steps of a configuration and reports sizes and costs. Leaves no files.

    Args:
        config: Configuration of the run.

    Returns:
        The plan; `str()` of it is the output of `medmoe train --dry-run`.

    Raises:
        TrainingError: As `train`, for settings that cannot be used.
        StreamError: If too many samples cannot be read.

    Example:
        ```python
        from medmoe_hf.training import TrainConfig, plan

        print(plan(TrainConfig.from_yaml("run.yaml")))
        ```
    """
    with tempfile.TemporaryDirectory() as folder:
        dry = config.model_copy(update={"output_dir": Path(folder) / "model", "trackers": []})
        run = TrainingRun(dry)
        if run.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.check_data()
        run.unfreezing.starts.clear()  # everything is trained, as at the end: the most time and memory
        batches = run.batches()
        losses, seconds = [], 0.0
        for _ in range(_STEPS):
            started = time.monotonic()
            run.step(batches)
            seconds = time.monotonic() - started
            losses.append(run.last["loss"])
        if run.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            # in KiB, except on a Mac
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    model = run.accelerator.unwrap_model(run.model)
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    gradients = sum(
        parameter.numel() * parameter.element_size() for parameter in parameters if parameter.requires_grad
    )
    processes = run.accelerator.num_processes
    at_a_time = config.batch_size * (processes if config.negatives != "micro_batch" else 1)
    contrasted = at_a_time * (config.gradient_accumulation_steps if config.negatives == "global" else 1)
    average = weights if run.ema is not None else 0
    groups = run.optimizer.param_groups
    full = [group.get("initial_lr", group["lr"]) for group in groups]
    schedule = f"{config.schedule} after {config.warmup_steps} steps of warm-up"
    return Plan(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        groups=[
            (group["name"], sum(parameter.numel() for parameter in group["params"]), rate, group["weight_decay"])
            for group, rate in zip(groups, full, strict=True)
        ],
        processes=processes,
        pairs=config.batch_size * config.gradient_accumulation_steps * processes,
        contrasted=(_NEGATIVES[config.negatives], contrasted),
        positives=run.inner.config.positives,
        max_steps=config.max_steps,
        schedule=schedule,
        step_seconds=seconds,
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=2 * gradients,
        average_bytes=average,
        peak_bytes=peak,
        checkpoint_bytes=(weights if config.lora is None else gradients) + 2 * gradients + average,
        device=str(run.accelerator.device),
        losses=losses,
        locations=[
            f"model       {config.output_dir}",
            f"checkpoints {config.run_dir / 'checkpoints'}",
            *([f"logs        {config.run_dir / 'logs'}"] if config.trackers else []),
        ],
        balance=list(run.stream.balanced_rows.lines()) if run.stream.balance else [],
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
