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
from tqdm.auto import tqdm
from transformers import get_scheduler

from medmoe_hf.data.atomic import whole_folder
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.stream import Sample, SampleStream, Split, StreamError
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
        skipped: samples of the main process that could not be read, by source and cause.
        config: the run's configuration.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig) -> TrainingRecord:
    """Trains a dual encoder as the configuration says and saves it to `config.output_dir`.

    The folder appears whole: it is written beside its final place and renamed.

    Returns:
        The record that was also written to `training.json`.

    Raises:
        FileExistsError: if `output_dir` is there already.
        TrainingError: if the loss is no number any more, or there are no data.
        StreamError: if too many samples cannot be read; the model is then in `<output_dir>-stopped`.
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
    stream = _training_stream(config, collator, accelerator)
    batches = _batches(stream, collator, config.batch_size, accelerator.device)
    bar = tqdm(total=config.max_steps, desc="train", unit="step", disable=not accelerator.is_main_process)
    model.train()
    while record.steps < config.max_steps:
        started = time.monotonic()
        try:
            batch = next(batches)
        except StreamError as error:
            raise _stopped(error, accelerator, model, processor, record, config) from error
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
            shown = {name.removeprefix("loss_"): f"{value:.2f}" for name, value in parts.items()}
            bar.set_postfix(shown | ({"skipped": stream.faults.bad} if stream.faults.bad else {}))
        due = config.evaluate_every and record.steps % config.evaluate_every == 0
        evaluated = config.data.evaluation is not None or config.data.validation_share
        if evaluated and (due or record.steps == config.max_steps):
            _evaluate(accelerator.unwrap_model(model), config, collator, accelerator, record, bar)
    bar.close()
    record.skipped = {f"{source}: {cause}": count for (source, cause), count in stream.faults.counts.items()}
    if record.skipped and accelerator.is_main_process:
        bar.write(f"data: {stream.faults}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _save(accelerator.unwrap_model(model), processor, record, config.output_dir)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return record


def _stopped(
    error: StreamError,
    accelerator: Accelerator,
    model: Any,
    processor: Any,
    record: TrainingRecord,
    config: TrainConfig,
) -> StreamError:
    """Saves what was learned before the data failed beside the place of the finished model, and says so."""
    if not record.steps or not accelerator.is_main_process:
        return error
    place = config.output_dir.with_name(f"{config.output_dir.name}-stopped")
    _save(accelerator.unwrap_model(model), processor, record, place, force=True)
    return StreamError(f"{error} The model as it was after {record.steps} steps is in {place}.")


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


def _sources(section: Any) -> list[Any]:
    return section if isinstance(section, list) else [section]


def _training_stream(config: TrainConfig, collator: ContrastiveCollator, accelerator: Accelerator) -> SampleStream:
    data = config.data
    return SampleStream(
        _sources(data.train),
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        mixing=data.mixing,
        once=data.once,
        shuffle=data.shuffle_buffer > 0,
        buffer=data.shuffle_buffer,
        split=Split("train", data.validation_share) if data.validation_share else None,
        max_bad_fraction=data.max_bad_fraction,
        num_workers=data.num_workers,
        prepare=collator.prepare,
        draft=collator.side if data.reduced_decode else None,
    )


def _batches(
    stream: SampleStream, collator: ContrastiveCollator, batch_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Full batches, epoch after epoch; one that an epoch leaves unfinished is filled from the next."""
    held: list[Sample] = []
    while True:
        some = False
        for sample in stream:
            some = True
            held.append(sample)
            if len(held) == batch_size:
                yield collator.normalise(_to_device(collator.assemble(held), device))
                held = []
        if not some:
            raise TrainingError("The training data are empty: no sample in a whole epoch.")


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
        data, held_out = config.data, None
        if data.evaluation is None:
            held_out = Split("validation", data.validation_share)
        stream = SampleStream(
            _sources(data.train if data.evaluation is None else data.evaluation),
            shuffle=False,
            split=held_out,
            max_bad_fraction=data.max_bad_fraction,
            prepare=collator.prepare,
        )
        samples = list(islice(stream, config.evaluation_samples))
        parts = [samples[start : start + config.batch_size] for start in range(0, len(samples), config.batch_size)]
        with accelerator.autocast():
            batches = (_to_device(collator.assemble(part), accelerator.device) for part in parts)
            metrics = validate(model, map(collator.normalise, batches))
        record.evaluations.append({"step": record.steps, **metrics})
        shown = ("routing_image", "routing_report", "image_to_text_r1", "text_to_image_r1")
        listed = ", ".join(f"{name} {metrics[name]:.3f}" for name in shown if name in metrics)
        bar.write(f"step {record.steps}: held-out loss {metrics['loss']:.3f}, {listed}")
    accelerator.wait_for_everyone()


def _save(model: Any, processor: Any, record: TrainingRecord, output_dir: Path, force: bool = False) -> None:
    with whole_folder(output_dir, force) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
