"""The training loop, on Accelerate."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from medmoe_hf.data.atomic import whole_folder
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.sources import PhantomSource, WebDatasetSource, open_source
from medmoe_hf.evaluation.validation import validate
from medmoe_hf.training.build import build_model, parameter_groups
from medmoe_hf.training.config import TrainConfig

LOSS_PARTS = ("loss", "loss_global", "loss_local", "loss_aux")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass
class TrainingRecord:
    """What happened in a run: written to `training.json` beside the weights.

    Attributes:
        steps: optimiser steps done.
        samples: pairs seen, over all processes.
        seconds: of training, evaluations left out.
        log: every `log_every` steps: step, learning rate, loss parts, gradient norm.
        evaluations: step and the metrics of `medmoe_hf.evaluation.validate`.
        config: the run's configuration.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig) -> TrainingRecord:
    """Trains a dual encoder as the configuration says and saves it to `config.output_dir`.

    The folder appears whole: it is written beside its final place and renamed.

    Returns:
        The record that was also written to `training.json`.

    Raises:
        FileExistsError: if `output_dir` is there already.
        TrainingError: if the loss is no number any more, or the data ends before `max_steps`.
    """
    # Activations fade into denormals, which CPUs multiply a hundred times slower; set before the first parallel work.
    torch.set_flush_denormal(True)
    if config.output_dir.exists():
        raise FileExistsError(f"{config.output_dir} exists already; choose another `output_dir` or remove it.")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        # An expert that no sample of a batch selects has no gradient in that step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    _share_cores(accelerator, config.data.num_workers)
    set_seed(config.seed)
    model, processor = build_model(config.model)
    _freeze(model, config.freeze)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    collator = ContrastiveCollator(processor)
    optimizer = torch.optim.AdamW(
        # fused: one pass over all parameters; experts have hundreds of small ones
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )
    scheduler = get_scheduler(config.schedule, optimizer, config.warmup_steps, config.max_steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    record = TrainingRecord(config=config.model_dump(mode="json"))
    batches = _batches(config, collator, accelerator)
    bar = tqdm(total=config.max_steps, desc="train", unit="step", disable=not accelerator.is_main_process)
    model.train()
    while record.steps < config.max_steps:
        started = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            raise TrainingError(
                f"The data ended after {record.steps} of {config.max_steps} steps: lower `max_steps` or give more."
            )
        output = model(**batch)
        if not torch.isfinite(output.loss):
            raise TrainingError(
                f"The loss is {output.loss.item()} at step {record.steps + 1}; lower `learning_rate`"
                + (" or use `mixed_precision: bf16`." if config.mixed_precision == "fp16" else ".")
            )
        accelerator.backward(output.loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        record.steps += 1
        record.samples += len(batch["modality_labels"]) * accelerator.num_processes
        record.seconds += time.monotonic() - started
        bar.update()
        if record.steps % config.log_every == 0 or record.steps == config.max_steps:
            parts = {name: output[name].item() for name in LOSS_PARTS}
            rate = scheduler.get_last_lr()[0]
            record.log.append({"step": record.steps, "learning_rate": rate, "gradient_norm": float(norm), **parts})
            bar.set_postfix({name.removeprefix("loss_"): f"{value:.2f}" for name, value in parts.items()})
        due = config.evaluate_every and record.steps % config.evaluate_every == 0
        if config.data.evaluation is not None and (due or record.steps == config.max_steps):
            _evaluate(accelerator.unwrap_model(model), config, collator, accelerator, record, bar)
    bar.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(model), processor, record, config.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return record


def _share_cores(accelerator: Accelerator, num_workers: int) -> None:
    """Leaves a core to each reader: on a CPU, threads that wait for a busy core cost more than they bring."""
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Processes on one machine share its cores as well; Accelerate's launcher sets OMP_NUM_THREADS for them.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - num_workers)))


def _freeze(model: torch.nn.Module, prefixes: list[str]) -> None:
    for prefix in prefixes:
        matching = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not matching:
            top = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ValueError(f'`freeze`: no parameter begins with "{prefix}". The model has {", ".join(top)}.')
        for parameter in matching:
            parameter.requires_grad_(False)


def _loader(
    source: PhantomSource | WebDatasetSource,
    config: TrainConfig,
    collator: ContrastiveCollator,
    accelerator: Accelerator,
    workers: int,
) -> DataLoader:
    stream = open_source(source, num_shards=max(workers, 1) * accelerator.num_processes)
    if accelerator.num_processes > 1:
        stream = split_dataset_by_node(stream, accelerator.process_index, accelerator.num_processes)
    return DataLoader(stream, batch_size=config.batch_size, collate_fn=collator, num_workers=workers, drop_last=True)


def _batches(config: TrainConfig, collator: ContrastiveCollator, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    for batch in _loader(config.data.train, config, collator, accelerator, config.data.num_workers):
        yield _to_device(batch, accelerator.device)


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _evaluate(
    model: Any,
    config: TrainConfig,
    collator: ContrastiveCollator,
    accelerator: Accelerator,
    record: TrainingRecord,
    bar: Any,
) -> None:
    """Measures on the main process alone: the held-out set is small, and one process needs no gathering."""
    if accelerator.is_main_process:
        assert config.data.evaluation is not None
        stream = open_source(config.data.evaluation)
        loader = DataLoader(stream, batch_size=config.batch_size, collate_fn=collator)
        count = -(-config.evaluation_samples // config.batch_size)
        with accelerator.autocast():
            metrics = validate(model, (_to_device(batch, accelerator.device) for batch in islice(loader, count)))
        record.evaluations.append({"step": record.steps, **metrics})
        shown = ("routing_image", "routing_report", "image_to_text_r1", "text_to_image_r1")
        listed = ", ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)
        bar.write(f"step {record.steps}: held-out loss {metrics['loss']:.3f}, {listed}")
    accelerator.wait_for_everyone()


def _save(model: Any, processor: Any, record: TrainingRecord, output_dir: Path) -> None:
    with whole_folder(output_dir) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
