"""The training loop, on Accelerate."""

import errno
import importlib.util
import json
import logging
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, distributed
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import get_scheduler

from medmoe_hf.common.files import atomic_dir, redact_paths
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.reading import Fault, Place, Reader
from medmoe_hf.data.sources import has_labels
from medmoe_hf.data.stream import Sample, SampleStream, Split
from medmoe_hf.errors import (
    Interrupted,
    PathExistsError,
    ResumeError,
    ShardError,
    SourceError,
    StreamError,
    TrainingError,
)
from medmoe_hf.evaluation.validation import LOSS_PARTS, RECALLS, describe, validate
from medmoe_hf.model.modeling_medmoe import in_process_group
from medmoe_hf.training import checkpoints
from medmoe_hf.training.adapters import add_lora, save_adapter
from medmoe_hf.training.build import build_model, freeze, parameter_groups, train_mode
from medmoe_hf.training.cached import cached_step
from medmoe_hf.training.config import TrainConfig
from medmoe_hf.training.negatives import gather_rows

_TRIED = 4  # samples of each source that are read before the first step


@dataclass
class TrainingRecord:
    """What happened in a run: written to `training.json` beside the weights, absolute paths cut to their last part.

    Attributes:
        steps: optimiser steps done.
        samples: pairs seen, over all processes.
        seconds: of training, evaluations left out.
        log: every `log_every` steps: step, learning rate, loss parts, gradient norm.
        evaluations: step and the metrics of `medmoe_hf.evaluation.validate`, with the numbers of pairs behind them.
        best_step: of the evaluation with the lowest loss, None before the first.
        skipped: samples of the main process that could not be read, by source and cause.
        resumed: steps at which the run was taken up again.
        config: the run's configuration.
    """

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def train(config: TrainConfig, resume: str | Path | None = None) -> TrainingRecord:
    """Trains a dual encoder as the configuration says and saves it to `config.output_dir`.

    The folder appears whole: it is written beside its final place and renamed. SIGTERM and SIGINT end the run after
    the step that is under way, with a checkpoint.

    Args:
        resume: a checkpoint to go on from, or `auto`: the newest of `config.run_dir` that is whole, if there are any.
            On a CPU, with as many processes as before, the run comes to the same weights, bit for bit, as one that was
            never stopped.

    Returns:
        The record that was also written to `training.json`.

    Raises:
        FileExistsError: if `output_dir` is there already, or checkpoints of a run that is not to be resumed.
        ResumeError: if there is no such checkpoint, it is not whole, or of another configuration or other data.
        TrainingError: if the loss is no number any more, there are no data, or nothing can be written.
        Interrupted: after a signal.
        StreamError: if too many samples cannot be read.

    Whatever ends a run early (of several processes, whatever they can notice together), the last step's state is in a
    checkpoint.
    """
    run = TrainingRun(config, resume)
    try:
        with run.listening():
            run.to_the_end()
    except (TrainingError, StreamError):
        # All processes come here together; trackers keep what they have been told.
        run.accelerator.end_training()
        raise
    run.accelerator.end_training()
    return run.record


@dataclass
class _Moment:
    """Where a run stands between two steps, beside the weights and the optimiser's state.

    Attributes:
        stream: the stream's state.
        random: of `checkpoints.random_state`.
        running: running statistics.
    """

    stream: dict[str, Any]
    random: tuple[dict[str, Any], dict[str, Tensor]]
    running: list[Tensor]


class TrainingRun:
    """A run with all that it needs: model, optimiser, stream, checkpoints. Every process has its own.

    Attributes:
        accelerator: Accelerate's.
        model: the dual encoder (or PEFT's wrapper of it), prepared for its processes.
        inner: the `MedMoEModel` itself.
        ema: the moving average, or None.
        record: what happened so far.
        last: loss parts and gradient norm of the last step.
    """

    def __init__(self, config: TrainConfig, resume: str | Path | None = None) -> None:
        # Activations fade into denormals, which CPUs multiply a hundred times slower; set before the first parallel
        # work.
        torch.set_flush_denormal(True)
        if config.output_dir.exists():
            raise PathExistsError(f"{config.output_dir} exists already; choose another `output_dir` or remove it.")
        self.config = config
        self.folder = config.run_dir / "checkpoints"
        self.record = TrainingRecord(config=config.model_dump(mode="json"))
        self.last: dict[str, float] = {}
        self._check_trackers()
        checkpoint, damaged = self._checkpoint_to_resume(resume)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
            log_with=list(config.trackers) or None,
            project_dir=str(config.run_dir / "logs"),
            # Nothing is unused: with several processes every expert is called. Buffers are the same everywhere.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        _share_cores(accelerator, config.data.num_workers)
        self._check_strategy()
        self._check_folders()
        for problem in damaged:
            accelerator.print(f"Skipped: {problem}")
        if damaged:
            accelerator.print(f"Going on from {checkpoint}, the newest checkpoint that is whole.")
        set_seed(config.seed)
        state: dict[str, Any] | None = None
        tensors: dict[str, dict[str, Tensor]] = {}
        if checkpoint is not None:
            state, tensors = checkpoints.read_state(checkpoint, self.record.config, accelerator.num_processes)
        model, self.processor = build_model(config.model)
        if config.positives is not None:
            model.config.positives = config.positives
        freeze(model, config.freeze)
        self.inner = model
        whole: Any = model if config.lora is None else add_lora(model, config.lora)
        if checkpoint is not None:
            weights = tensors.pop("weights", None)
            if weights is None:
                weights = load_file(checkpoint / "model.safetensors")
            whole.load_state_dict(weights, strict=config.lora is None)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.ema = None
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(whole.to(accelerator.device), decay=config.ema_decay, use_warmup=True)
            if "ema" in tensors:
                self.ema.module.load_state_dict(tensors["ema"])
        if config.compile_towers:
            model.vision_model.backbone.compile()
            model.text_model.encoder.compile()
        optimizer = torch.optim.AdamW(
            # fused: one pass over all parameters; experts have hundreds of small ones
            parameter_groups(whole, config.weight_decay, config.learning_rate, config.layer_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        if config.caches_gradients:
            # Several backward passes through one set of weights: here gradients are averaged by `cached_step`.
            self.model = whole.to(accelerator.device)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            with warnings.catch_warnings():
                # torch is about to rename `broadcast_buffers`, which Accelerate passes on.
                warnings.simplefilter("ignore", FutureWarning)
                self.model, self.optimizer = accelerator.prepare(whole, optimizer)
        self._running = [
            buffer for name, buffer in self.inner.named_buffers() if "running_" in name or "num_batches" in name
        ]
        self.scheduler = self._scheduler(optimizer)
        self.collator = ContrastiveCollator(self.processor, model.config.positives)
        self.stream = self._stream()
        self._held_out_stream = self._make_held_out_stream() if config.evaluates else None
        self._held_out_state = None if self._held_out_stream is None else self._held_out_stream.state_dict()
        self._held_out: list[tuple[dict[str, Any], bool]] | None = None
        self._evaluation_due = False
        self._before_step: _Moment | None = None
        self._updating = False
        # Steps whose checkpoints are of this run. Others may be there, if it was taken up at an older one.
        self._written: set[int] = set()
        self._signal = 0
        self._saved = time.monotonic()
        if checkpoint is not None and state is not None:
            self._restore(checkpoint, state, tensors)

    # What a run may not be

    def _check_trackers(self) -> None:
        for name in self.config.trackers:
            if importlib.util.find_spec(name) is None:
                raise TrainingError(f"`trackers: {name}` needs its package: pip install {name}; or leave it out.")

    def _check_strategy(self) -> None:
        kind, config = self.accelerator.distributed_type, self.config
        sharded = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if sharded and config.caches_gradients:
            raise TrainingError(
                "Gradient caching needs whole weights in every process, and FSDP or DeepSpeed shards them. Set "
                "`gradient_accumulation_steps: 1`, or `negatives: ranks`, or use examples/accelerate/ddp.yaml."
            )
        if sharded and config.ema_decay is not None:
            raise TrainingError("`ema_decay` needs whole weights in every process; use examples/accelerate/ddp.yaml.")

    def _check_folders(self) -> None:
        """Whether the main process can write where it will have to, hours from now."""
        problem: str | None = None
        if self.accelerator.is_main_process:
            for folder in (self.config.output_dir.parent, self.config.run_dir, self.folder):
                try:
                    existing = next(path for path in (folder, *folder.parents) if path.exists())
                    with tempfile.TemporaryDirectory(prefix=".medmoe-", dir=existing):
                        pass
                except OSError as error:
                    problem = f"{folder} cannot be written to ({error.strerror}); choose another `output_dir`."
                    break
        if self._highest(problem is not None):
            raise TrainingError(problem or "The main process cannot write to `output_dir`; its message says why.")

    def _checkpoint_to_resume(self, resume: str | Path | None) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what is wrong with newer ones."""
        if resume is not None and str(resume) != "auto":
            if not (Path(resume) / checkpoints.STATE).is_dir():
                raise ResumeError(
                    f"{resume} is no checkpoint of a run. Those of this configuration are in {self.folder}; "
                    "`--resume auto` takes the newest. To begin a new run from weights, set `model.from_pretrained`."
                )
            checkpoints.check(Path(resume))
            return Path(resume), []
        if resume is None and checkpoints.find_checkpoints(self.folder):
            raise PathExistsError(
                f"{self.folder} holds checkpoints of a run. Go on from the newest with `--resume auto`, remove them, "
                "or choose another `output_dir`."
            )
        return checkpoints.newest_whole(self.folder)

    # Parts

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        config = self.config
        if config.schedule != "plateau":
            return get_scheduler(config.schedule, optimizer, config.warmup_steps, config.max_steps)
        self._warm_up()
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience
        )

    def _stream(self) -> SampleStream:
        data = self.config.data
        return _stream_of(
            "Training data",
            _sources(data.train),
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            mixing=data.mixing,
            once=data.once,
            shuffle=data.shuffle_buffer > 0,
            buffer=data.shuffle_buffer,
            split=Split("train", data.validation_share) if data.validation_share else None,
            max_bad_fraction=data.max_bad_fraction,
            num_workers=data.num_workers,
            prepare=self.collator.prepare,
            draft=self.collator.side if data.reduced_decode else None,
        )

    def _make_held_out_stream(self) -> SampleStream:
        data = self.config.data
        return _stream_of(
            "Held-out data",
            _sources(data.train if data.evaluation is None else data.evaluation),
            shuffle=False,
            split=Split("validation", data.validation_share) if data.evaluation is None else None,
            max_bad_fraction=data.max_bad_fraction,
            prepare=self.collator.prepare,
        )

    def _streams(self) -> dict[str, SampleStream | None]:
        return {"training": self.stream, "held-out": self._held_out_stream}

    def batches(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Full batches with what their samples are called, epoch after epoch; one that an epoch leaves unfinished is
        filled from the next."""
        held: list[Sample] = []
        while True:
            some = False
            for sample in self.stream:
                some = True
                held.append(sample)
                if len(held) == self.config.batch_size:
                    batch = _to_device(self.collator.assemble(held), self.accelerator.device)
                    yield self.collator.normalise(batch), [str(sample["key"]) for sample in held]
                    held = []
            if not some:
                raise TrainingError("The training data are empty: no sample in a whole epoch.")

    # The loop

    def to_the_end(self) -> None:
        """Trains until `max_steps`, evaluates, and saves."""
        config, accelerator, record = self.config, self.accelerator, self.record
        if accelerator.is_main_process:
            checkpoints.clean(self.folder)
        self.check_data()
        self._start_trackers()
        bar = tqdm(
            total=config.max_steps,
            initial=record.steps,
            desc="train",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        try:
            # Closed before an error is printed, so that the error has a line of its own.
            with bar, logging_redirect_tqdm([logging.getLogger(name) for name in (None, "transformers", "datasets")]):
                self._train(bar)
        except (TrainingError, StreamError):
            raise
        except Exception as error:
            self._stop_for_the_unexpected(error)
            raise
        record.skipped = {f"{source}: {cause}": count for (source, cause), count in self.stream.faults.counts.items()}
        if record.skipped and accelerator.is_main_process:
            tqdm.write(f"training data: {self.stream.faults}")
        state_dict = self._state_dict()
        with self._written_by_main("The model", or_a_checkpoint=True):
            if accelerator.is_main_process:
                self._save_model(config.output_dir, state_dict)

    def _train(self, bar: Any) -> None:
        config, record = self.config, self.record
        batches = self.batches()
        if self._evaluation_due:  # when the run was stopped
            self._save_if_due(self._evaluate(bar))
        while record.steps < config.max_steps:
            self.step(batches)
            bar.update()
            last = record.steps == config.max_steps
            due = bool(config.evaluate_every) and record.steps % config.evaluate_every == 0
            self._evaluation_due = config.evaluates and (due or last)
            if record.steps % config.log_every == 0 or last:
                self._log(bar)
            best = self._evaluation_due and self._evaluate(bar)
            self._save_if_due(best)

    def step(self, batches: Iterator[tuple[dict[str, Any], list[str]]]) -> None:
        """One optimiser step.

        Raises:
            StreamError: if some process cannot read on.
            TrainingError: if the loss is no number.
        """
        started = time.monotonic()
        # What a step changes before the weights are updated.
        self._before_step = _Moment(
            self.stream.state_dict(), checkpoints.random_state(), [buffer.clone() for buffer in self._running]
        )
        error: Exception | None = None
        taken: list[tuple[dict[str, Any], list[str]]] = []
        try:
            taken = list(islice(batches, self.config.gradient_accumulation_steps))
        except Exception as problem:
            error = problem
        if self._highest(error is not None):
            self._stop_for_data(error)
        train_mode(self.model)
        losses, counts = self._backward([batch for batch, _ in taken])
        if self._highest(not torch.isfinite(losses["loss"])):
            self._stop_for_numbers(losses["loss"].item(), [key for _, keys in taken for key in keys])
        self._forget_idle_experts(counts)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._before_step, self._updating = None, True
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.get_scale()
        self.optimizer.step()
        # A fused optimiser is called for a step that overflows too, and leaves it out by itself: Accelerate does not
        # see that, but the scale goes down.
        skipped = self.optimizer.step_was_skipped or (scale is not None and scaler.get_scale() < scale)
        self.optimizer.zero_grad()
        record = self.record
        record.steps += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=record.steps)
        if self.config.schedule == "plateau":
            self._warm_up()
        elif not skipped:
            self.scheduler.step()
        record.samples += sum(len(keys) for _, keys in taken) * self.accelerator.num_processes
        record.seconds += time.monotonic() - started
        self.last = {"gradient_norm": float(norm), **{name: losses[name].item() for name in LOSS_PARTS}}
        self._updating = False

    def _backward(self, batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of a step: the losses, and (K,) how many images each expert computed on all processes."""
        accelerator, experts = self.accelerator, len(self.inner.vision_model.experts)
        if self.config.caches_gradients:
            losses = cached_step(self.inner, batches, accelerator.backward, accelerator.autocast)
            return losses, losses["expert_counts"]
        gather = None if self.config.negatives == "micro_batch" else gather_rows
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(experts, dtype=torch.long, device=accelerator.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            waiting: AbstractContextManager = nullcontext() if last else accelerator.no_sync(self.model)
            with waiting:
                output = self.model(**batch, gather=gather)
                accelerator.backward(output.loss / len(batches))
            counts += torch.bincount(output.expert_ids, minlength=experts)
            for name in LOSS_PARTS:
                sums[name] = sums.get(name, 0.0) + output[name].detach() / len(batches)
        if in_process_group():
            distributed.all_reduce(counts)
        return sums, counts

    def _forget_idle_experts(self, counts: Tensor) -> None:
        """An expert that no image of the step was sent to has learned nothing: no decay, no momentum, on any number of
        processes. With several it was called without images, and its gradients are zeros."""
        if self.inner.config.vision_config.mixture != "hard":
            return
        for count, expert in zip(counts.tolist(), self.inner.vision_model.experts, strict=True):
            if not count:
                for parameter in expert.parameters():
                    parameter.grad = None

    def _warm_up(self) -> None:
        steps = self.config.warmup_steps
        if self.record.steps < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (self.record.steps + 1) / steps

    def _highest(self, level: int) -> int:
        """The highest level of any process: all must do the same together, or the others wait for ever."""
        if not in_process_group():
            return level
        levels = torch.tensor([int(level)], device=self.accelerator.device)
        distributed.all_reduce(levels, op=distributed.ReduceOp.MAX)
        return int(levels.item())

    # Ends before the end

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and SIGINT are taken note of in the block, and acted on after a step; a second one acts at once."""
        before: dict[int, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for known, handler in before.items():
                signal.signal(known, handler)

        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                before[each] = signal.signal(each, note)
        except ValueError:  # not in the main thread: whoever runs us there listens himself
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_if_due(self, best: bool) -> None:
        rhythm, steps = self.config.checkpoints, self.record.steps
        if steps == self.config.max_steps:
            return
        timed = bool(rhythm.every_minutes) and time.monotonic() - self._saved > 60 * rhythm.every_minutes
        counted = bool(rhythm.every_steps) and steps % rhythm.every_steps == 0
        due = timed or counted or (best and rhythm.keep_best)
        # One exchange for both: a step is no place for more than it needs.
        level = self._highest(2 if self._signal else int(due))
        if level:
            self.save_checkpoint()
        if level == 2:
            raise Interrupted(
                f"Stopped by {signal.Signals(self._signal or signal.SIGTERM).name} after step {steps}. The checkpoint "
                f"is {self._place()}; go on with `--resume auto`.",
                self._signal or signal.SIGTERM,
            )

    def _stop_for_data(self, error: Exception | None) -> None:
        saved = ""
        if self.record.steps:
            self._save_state_before_step()
            saved = f" All that was learned in {self.record.steps} steps is in {self._place()}."
        if error is not None and not isinstance(error, (TrainingError, StreamError)):
            tqdm.write("The training data cannot be read on:")
            raise error
        stop = TrainingError if isinstance(error, TrainingError) else StreamError
        raise stop(f"Training data: {error or 'another process cannot read on.'}{saved}") from error

    def _stop_for_numbers(self, loss: float, keys: list[str]) -> None:
        if self.record.steps and not self._highest(not _all_finite(self.inner)):
            # Beside the ones before, which may be the better start: what makes no number may have begun earlier.
            self._save_state_before_step(rotate=False)
        if loss == loss and abs(loss) != float("inf"):
            raise TrainingError("The loss is no number in another process; its message says of which samples.")
        found = checkpoints.find_checkpoints(self.folder, self.record.steps)
        raise TrainingError(
            f"The loss is {loss} at step {self.record.steps + 1}; lower `learning_rate`"
            + (" or use `mixed_precision: bf16`" if self.config.mixed_precision == "fp16" else "")
            + f". The samples were {', '.join(keys[:20])}{', ...' if len(keys) > 20 else ''}."
            + (f" The newest checkpoint is {found[-1]}." if found else "")
        )

    def _stop_for_the_unexpected(self, error: Exception) -> None:
        """Writes a checkpoint for an error that nobody foresaw: memory that does not suffice, a tracker that fails."""
        # Several processes would have to fail together, and one alone cannot know whether they did. Within an update
        # of the weights there is no state to go on from.
        steps = self.record.steps
        if not steps or self._updating:
            return
        if steps not in self._written:
            if in_process_group():
                return
            try:
                self._save_state_before_step()
            except Exception as second:
                self.accelerator.print(f"{type(error).__name__}, and no checkpoint could be written: {second}")
                return
        self.accelerator.print(
            f"{type(error).__name__}: the run ends; all that was learned in {steps} steps is in {self._place()}."
        )

    def _save_state_before_step(self, rotate: bool = True) -> None:
        """Writes a checkpoint of the last step that was done, though the next one has begun."""
        moment = self._before_step
        if moment is None:
            self.save_checkpoint(rotate=rotate)
            return
        checkpoints.set_random_state(*moment.random)
        for buffer, value in zip(self._running, moment.running, strict=True):
            buffer.copy_(value)
        self.save_checkpoint(moment.stream, rotate)

    # Writing and reading

    def _place(self) -> Path:
        return self.folder / checkpoints.step_name(self.record.steps)

    def _state_dict(self) -> dict[str, Tensor]:
        return checkpoints.arrived(self.accelerator.get_state_dict(self.model))

    def save_checkpoint(self, stream_state: dict[str, Any] | None = None, rotate: bool = True) -> None:
        """Writes a checkpoint of the last step; every process calls this.

        Args:
            stream_state: where the data stand, if not where the stream is now.
            rotate: whether older ones go, as the configuration says.

        Raises:
            TrainingError: if it cannot be written, a full disk for example; those before it are as they were.
        """
        accelerator = self.accelerator
        weights = self._state_dict()
        tensors = {"optimizer": checkpoints.optimizer_tensors(self.inner, self.optimizer.optimizer), "random": {}}
        if self.config.lora is not None:
            wrapper = accelerator.unwrap_model(self.model)
            trained = {name for name, parameter in wrapper.named_parameters() if parameter.requires_grad}
            trained |= {name for name, _ in wrapper.named_buffers()}
            tensors["weights"] = {name: value for name, value in weights.items() if name in trained}
        if self.ema is not None:
            tensors["ema"] = dict(self.ema.module.state_dict())
        plain, generators = checkpoints.random_state()
        own = {
            "random": plain,
            "generators": generators,
            "stream": self.stream.state_dict() if stream_state is None else stream_state,
        }
        ranks = gather_object([own]) if in_process_group() else [own]
        for rank, one in enumerate(ranks):
            tensors["random"] |= {f"{rank}/{name}": value for name, value in one.pop("generators").items()}
        state = {
            "step": self.record.steps,
            "config": self.record.config,
            "world_size": accelerator.num_processes,
            "record": asdict(self.record),
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "scheduler": {
                key: value for key, value in self.scheduler.state_dict().items() if not key.startswith("lr_lambda")
            },
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "ranks": ranks,
            "evaluation_due": self._evaluation_due,
            "held_out": self._held_out_state,
            "content": {part: None if stream is None else stream.content for part, stream in self._streams().items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        with self._written_by_main(f"The checkpoint of step {self.record.steps}"):
            if accelerator.is_main_process and self.record.steps not in self._written:
                with atomic_dir(self._place(), force=True) as partial:
                    self._write_model(partial, weights, averaged=False)
                    checkpoints.write_state(partial, state, tensors)
            if accelerator.is_main_process and rotate:
                rhythm = self.config.checkpoints
                best = self.record.best_step if rhythm.keep_best else None
                checkpoints.rotate(self.folder, rhythm.keep_last, best, self.record.steps)
        self._written.add(self.record.steps)
        self._saved = time.monotonic()

    @contextmanager
    def _written_by_main(self, what: str, or_a_checkpoint: bool = False) -> Iterator[None]:
        """Turns what can go wrong with a disk into an error that every process raises.

        Args:
            what: is written.
            or_a_checkpoint: whether a checkpoint is written in its place, if that is possible.
        """
        problem: Exception | None = None
        try:
            yield
        except (OSError, SafetensorError) as error:
            problem = error
        if not self._highest(problem is not None):
            return
        if or_a_checkpoint:
            self.save_checkpoint()
        full = getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in str(problem)
        found = checkpoints.find_checkpoints(self.folder, self.record.steps)
        raise TrainingError(
            f"{what} could not be written: {'the disk is full' if full else problem}. "
            + (f"The newest whole checkpoint is {found[-1]}; " if found else "There is no checkpoint yet; ")
            + "make room and go on with `--resume auto`."
        ) from problem

    def _write_model(self, folder: Path, weights: dict[str, Tensor], averaged: bool) -> None:
        """What loads with `from_pretrained` (or, of adapters, with PEFT), and the processor."""
        model = self.accelerator.unwrap_model(self.model)
        if averaged and self.ema is not None:
            model, weights = self.ema.module, dict(self.ema.module.state_dict())
        with _no_foreign_bars():
            if self.config.lora is None:
                model.save_pretrained(folder, state_dict=weights)
                self.processor.save_pretrained(folder)
            elif averaged and self.config.lora.merge:
                model.merge_and_unload(safe_merge=True).save_pretrained(folder)
                self.processor.save_pretrained(folder)
            else:
                save_adapter(model, self.processor, folder, weights)

    def _save_model(self, place: Path, weights: dict[str, Tensor]) -> None:
        with atomic_dir(place) as partial:
            self._write_model(partial, weights, averaged=True)
            text = json.dumps(redact_paths(asdict(self.record)), indent=1) + "\n"
            (partial / "training.json").write_text(text, encoding="utf-8")

    def _restore(self, checkpoint: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        rank = self.accelerator.process_index
        own = state["ranks"][rank]
        for part, stream in self._streams().items():
            if stream is None:
                continue
            checkpoints.compare_content(checkpoint, part, state["content"][part], stream.content)
            try:
                stream.load_state_dict(own["stream"] if stream is self.stream else state["held_out"])
            except StreamError as error:
                raise ResumeError(f"{checkpoint} is of other {part} data. {error}") from error
        record = dict(state["record"], config=self.record.config)
        self.record = TrainingRecord(**record)
        self.record.resumed.append(self.record.steps)
        checkpoints.load_optimizer_tensors(self.inner, self.optimizer.optimizer, tensors.get("optimizer", {}))
        self.scheduler.load_state_dict(self.scheduler.state_dict() | state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._written.add(self.record.steps)
        self._evaluation_due = state["evaluation_due"]
        prefix = f"{rank}/"
        generators = {
            name.removeprefix(prefix): value for name, value in tensors["random"].items() if name.startswith(prefix)
        }
        checkpoints.set_random_state(own["random"], generators)

    # What is seen of it

    def _start_trackers(self) -> None:
        plain = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in self.record.config.items()
            if key != "data"  # names of files and folders may tell more than they should
        }
        self.accelerator.init_trackers("medmoe", config=plain)

    def _log(self, bar: Any) -> None:
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        entry = {"step": self.record.steps, "learning_rate": rate, **self.last}
        self.record.log.append(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=self.record.steps)
        shown = {name.removeprefix("loss_"): f"{self.last[name]:.2f}" for name in LOSS_PARTS}
        bar.set_postfix(shown | ({"skipped": self.stream.faults.bad} if self.stream.faults.bad else {}))

    def _evaluate(self, bar: Any) -> bool:
        """Measures on the held-out pairs, the moving average where there is one; whether the loss is the lowest."""
        self.read_held_out()
        assert self._held_out is not None
        model = self.model if self.ema is None else self.ema.module
        shown = tqdm(
            self._held_out,
            desc=f"measuring at step {self.record.steps}",
            unit="batch",
            leave=False,
            disable=not self.accelerator.is_main_process,
        )
        with self.accelerator.autocast():
            metrics = validate(
                model,
                (self.collator.normalise(_to_device(batch, self.accelerator.device)) for batch, _ in shown),
                [counts for _, counts in self._held_out],
                gather_rows,
            )
        record = self.record
        best = min((one["loss"] for one in record.evaluations), default=float("inf")) > metrics["loss"]
        record.evaluations.append({"step": record.steps, **metrics})
        if best:
            record.best_step = record.steps
        if self.config.schedule == "plateau" and record.steps > self.config.warmup_steps:
            self.scheduler.step(metrics["loss"])
        self._evaluation_due = False
        self.accelerator.log({f"held-out/{name}": value for name, value in metrics.items()}, step=record.steps)
        if self.accelerator.is_main_process:
            bar.write(f"step {record.steps}: {describe(metrics, self.inner.config.positives)}")
        return best

    def check_data(self) -> None:
        """Looks for what would stop the run later: sources of which nothing can be used, held-out data that fail.

        Every process calls this.

        Raises:
            StreamError: as the stream and `read_held_out` raise it.
            TrainingError: of `read_held_out`.
        """
        problem: str | None = None
        if self.accelerator.is_main_process:
            problem = next(filter(None, map(self._unusable, range(len(self.stream.sources)))), None)
            problem = problem or self._without_labels()
            for warning in self.stream.order_warnings():
                tqdm.write(f"training data: {warning}")
        if self._highest(problem is not None):
            raise StreamError(f"Training data: {problem or 'unusable; the message of the main process says why.'}")
        self.read_held_out()

    def _without_labels(self) -> str | None:
        """What is wrong if positives are to be found by labels, and there are none."""
        if self.collator.positives != "label":
            return None
        for stream, kind in ((self.stream, "training"), (self._held_out_stream, "held-out")):
            if stream is None or any(map(has_labels, stream.sources, stream.shards)):
                continue
            return (
                f"`positives: label` needs to know which samples share a label, and no {kind} source has a field "
                "`label`. Name the field by `label` in the source, or use another kind of `positives`."
            )
        return None

    def _unusable(self, source: int) -> str | None:
        """What is wrong with a source, if none of a few samples from here and there can be used."""
        stream, shards = self.stream, self.stream.shards[source]
        reader = Reader(
            stream.sources, stream.shards, stream.split, stream.prepare, stream.draft, (stream.seed, stream.epoch)
        )
        faults: list[Fault] = []
        for part in range(_TRIED):
            number = part * len(shards) // _TRIED
            try:
                shard, rows = shards[number], len(shards[number])
            except (ShardError, OSError):
                continue  # counted when it is read
            if not rows:
                continue
            row = part * rows // _TRIED
            found = reader[Place(0, source, number, shard.locate(row), row)]
            if not isinstance(found, Fault):
                return None
            faults.append(found)
        if not faults:
            return None
        listed = "\n".join(
            dict.fromkeys(f"  {one.path}: {one.cause}" + (f" ({one.reason})" if one.reason else "") for one in faults)
        )
        return f"of {stream.names[source]} none of the samples that were tried can be used:\n{listed}"

    def read_held_out(self) -> None:
        """Reads this process's share of the held-out batches, pixels still in 8 bits, and keeps it.

        Before the first step, so that whatever is wrong with them is found then. Every process gets as many batches,
        since sharded weights are gathered by all at a time; one that is there only for that is marked by False.

        Raises:
            StreamError: if too many of them cannot be read.
            TrainingError: if there are fewer than two.
        """
        if self._held_out_stream is None or self._held_out is not None:
            return
        wanted, main = self.config.evaluation_samples, self.accelerator.is_main_process
        samples: list[Sample] = []
        error: Exception | None = None
        try:
            read = islice(self._held_out_stream, wanted)
            samples += tqdm(read, desc="held-out data", total=wanted, unit="pair", leave=False, disable=not main)
        except StreamError as problem:
            error = problem
        if self._highest(error is not None):
            said = error or "another process cannot read them."
            raise StreamError(f"Held-out data: {said} Nothing was trained yet.") from error
        if len(samples) < 2:
            raise TrainingError(
                f"Held-out data: {'one pair' if samples else 'no pair'} in all, and a loss needs at least two to tell "
                "from each other. Give more to `data.evaluation`, or raise `data.validation_share`."
            )
        # In one step as many pairs are contrasted as in training, as far as one process can hold them.
        size = max(2, self.config.batch_size)
        starts = list(range(0, len(samples), size))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self._held_out = []
        for first in range(0, len(starts), world):
            number = first + rank
            start = starts[min(number, len(starts) - 1)]
            batch = self.collator.assemble(samples[start : start + size])
            self._held_out.append((batch, number < len(starts)))
        if main:
            if self._held_out_stream.faults.bad:
                tqdm.write(f"held-out data: {self._held_out_stream.faults}")
            for line in _on_held_out(len(samples), size):
                tqdm.write(line)


def _on_held_out(pairs: int, batch: int) -> Iterator[str]:
    """What is to be known of measurements on so many pairs, this many at a time."""
    if pairs < batch:
        yield (
            f"held-out data: {pairs} pairs, fewer than `batch_size` {batch}: told from fewer others than in training, "
            "they have a lower loss; it compares with itself alone."
        )
    elif rest := pairs % batch:
        yield (
            f"held-out data: {pairs} pairs, of which the loss leaves out {rest}, as it needs batches of equal size "
            f"({batch}); routing and retrieval are measured on all."
        )
    if left_out := [k for k in RECALLS if k >= pairs]:
        listed = " and ".join(f"R@{k}" for k in left_out)
        yield f"held-out data: {pairs} pairs are too few for {listed}, which would always be 1."


def _all_finite(model: Any) -> bool:
    parts = (value.to_local() if hasattr(value, "to_local") else value for value in model.parameters())
    return all(bool(torch.isfinite(part).all()) for part in parts)


@contextmanager
def _no_foreign_bars() -> Iterator[None]:
    """transformers' bars of writing weights would land in the middle of ours."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _share_cores(accelerator: Accelerator, num_workers: int) -> None:
    """Leaves a core to each reader: on a CPU, threads that wait for a busy core cost more than they bring."""
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Processes on one machine share its cores as well; Accelerate's launcher sets OMP_NUM_THREADS for them.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - num_workers)))


def _sources(section: Any) -> list[Any]:
    return section if isinstance(section, list) else [section]


def _stream_of(part: str, sources: list[Any], **options: Any) -> SampleStream:
    try:
        return SampleStream(sources, part="", **options)  # `part` stands in front of whatever it says
    except SourceError as error:
        raise SourceError(f"{part}: {error}") from error


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
