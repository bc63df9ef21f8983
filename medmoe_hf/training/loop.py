"""The training loop, on Accelerate."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm.contrib.logging import logging_redirect_tqdm

from medmoe_hf.common.console import progress
from medmoe_hf.data.reading import Sample
from medmoe_hf.errors import Interrupted, StreamError, TrainingError
from medmoe_hf.evaluation.validation import LOSS_PARTS, describe
from medmoe_hf.model.modeling_medmoe import in_process_group
from medmoe_hf.training import checkpoints, preflight
from medmoe_hf.training.cached import cached_step
from medmoe_hf.training.config import TrainConfig
from medmoe_hf.training.exchange import exchanged_logits
from medmoe_hf.training.held_out import to_device
from medmoe_hf.training.negatives import gather_rows, max_over_processes
from medmoe_hf.training.optimizer import train_mode
from medmoe_hf.training.record import TrainingRecord
from medmoe_hf.training.run_lock import locked_run
from medmoe_hf.training.run_state import RunState
from medmoe_hf.training.stopping import best_step, reason_to_stop

logger = logging.getLogger(__name__)


def train(config: TrainConfig, resume: str | Path | None = None) -> TrainingRecord:
    """Trains a dual encoder and saves it to `config.output_dir`.

    The folder appears only when it is complete. SIGTERM and SIGINT end the run after the current step, with a
    checkpoint. Whatever else ends a run early, the state of the last step is saved in a checkpoint (with several
    processes: if all of them notice the error).

    Args:
        config: What to train, on which data, and how.
        resume: A checkpoint to resume from; `"auto"` for the newest complete checkpoint in `config.run_dir`, if there
            is one; `None` for a new run. On a CPU and with the same number of processes, a resumed run ends with
            exactly the weights of a run that was never stopped.

    Returns:
        The record that is also written to `training.json`.

    Raises:
        FileExistsError: If `output_dir` exists, or if there are checkpoints and `resume` is `None`.
        ResumeError: If the checkpoint is missing, incomplete, or of another configuration or other data.
        TrainingError: If the loss is not finite, there are no data, nothing can be written, or another run with this
            `output_dir` is going on.
        Interrupted: After a signal.
        StreamError: If too many samples cannot be read.

    Example:
        ```python
        from medmoe_hf.training import TrainConfig, train

        config = TrainConfig.from_dict(
            {
                "output_dir": "runs/first",
                "model": {"preset": "tiny"},
                "data": {"train": {"kind": "phantom", "image_size": 64}},
                "max_steps": 2,
                "batch_size": 8,
            }
        )
        record = train(config)
        print(record.steps, record.samples)
        ```
    """
    with locked_run(config.run_dir):
        run = TrainingRun(config, resume)
        try:
            with run.handle_signals():
                run.train()
        except (TrainingError, StreamError):
            # All processes come here together; trackers keep what they have been told.
            run.accelerator.end_training()
            raise
        run.accelerator.end_training()
        return run.record


@dataclass
class _StepStart:
    """What a step changes before it updates the weights.

    Attributes:
        stream: The stream's state.
        random: State of the random number generators, of `checkpoints.random_state`.
        running: Running statistics of the model's BatchNorms.
    """

    stream: dict[str, Any]
    random: tuple[dict[str, Any], dict[str, Tensor]]
    running: list[Tensor]


class TrainingRun(RunState):
    """A run: its state and the loop that changes it. Every process has one.

    Args:
        config: The run's configuration.
        resume: As for `train`.
    """

    def __init__(self, config: TrainConfig, resume: str | Path | None = None) -> None:
        super().__init__(config, resume)
        self._step_start: _StepStart | None = None
        self._updating = False
        self._signal = 0

    # Before the first step

    def check_data(self) -> None:
        """Looks for what would stop the run later: sources without a usable sample, held-out data that fail.

        Every process must call this.

        Raises:
            StreamError: If a source has no usable sample, or too many held-out pairs cannot be read.
            TrainingError: If there are fewer than two held-out pairs.
        """
        problem: str | None = None
        if self.accelerator.is_main_process:
            problem = preflight.unusable_source(self.stream)
            if problem is None and self.collator.positives == "label":
                problem = preflight.missing_labels(self._streams())
            for warning in self.stream.order_warnings():
                logger.warning("training data: %s", warning)
        if self._any_process(problem is not None):
            raise StreamError(f"Training data: {problem or 'unusable; the message of the main process says why.'}")
        if self.held_out is not None:
            self.held_out.read()

    # The loop

    def batches(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Batches with the keys of their samples, epoch after epoch.

        All are full: a batch that an epoch leaves incomplete is filled from the next epoch.
        """
        samples: list[Sample] = []
        while True:
            empty = True
            for sample in self.stream:
                empty = False
                samples.append(sample)
                if len(samples) == self.config.batch_size:
                    batch = to_device(self.collator.assemble(samples), self.accelerator)
                    yield self.collator.normalize(batch), [str(sample["key"]) for sample in samples]
                    samples = []
            if empty:
                raise TrainingError("The training data are empty: no sample in an entire epoch.")

    def train(self) -> None:
        """Trains until `max_steps` or `early_stopping`, evaluates, and saves the model."""
        config, accelerator, record = self.config, self.accelerator, self.record
        if accelerator.is_main_process:
            checkpoints.clean(self.folder)
        self.check_data()
        self._start_trackers()
        bar = progress(
            None,
            "train",
            "step",
            config.max_steps,
            delay=0,
            leave=True,
            initial=record.steps,
            disable=not accelerator.is_main_process,
        )
        try:
            # Closed before an error is printed, so that the error has its own line.
            with bar, logging_redirect_tqdm([logging.getLogger(name) for name in (None, "transformers", "datasets")]):
                self._train_steps(bar)
        except (TrainingError, StreamError):
            raise
        except Exception as error:
            self._save_after_unexpected(error)
            raise
        record.skipped = {f"{source}: {cause}": count for (source, cause), count in self.stream.faults.counts.items()}
        if record.skipped and accelerator.is_main_process:
            logger.warning("training data: %s", self.stream.faults)
        state_dict = self._state_dict()
        with self._main_process_writes("The model", fall_back=True):
            if accelerator.is_main_process:
                self._save_model(config.output_dir, state_dict)

    def _train_steps(self, bar: Any) -> None:
        config, record = self.config, self.record
        batches = self.batches()
        if self._evaluation_due:  # when the run was stopped
            self._save_if_due(self._evaluate(bar))
        while record.steps < config.max_steps and self._reason_to_stop() is None:
            self.step(batches)
            bar.update()
            last = record.steps == config.max_steps
            due = bool(config.evaluate_every) and record.steps % config.evaluate_every == 0
            self._evaluation_due = config.evaluates and (due or last)
            if record.steps % config.log_every == 0 or last:
                self._log(bar)
            best = self._evaluation_due and self._evaluate(bar)
            self._save_if_due(best)
        record.stopped = "max_steps" if record.steps == config.max_steps else self._reason_to_stop()
        if record.steps < config.max_steps and self.accelerator.is_main_process:
            bar.write(f"stopped early after step {record.steps}: {record.stopped}")

    def step(self, batches: Iterator[tuple[dict[str, Any], list[str]]]) -> None:
        """One optimizer step.

        Args:
            batches: Of `batches()`; `gradient_accumulation_steps` are taken from it.

        Raises:
            StreamError: If some process cannot read its data.
            TrainingError: If the loss is not finite.
        """
        started = time.monotonic()
        self._step_start = _StepStart(
            self.stream.state_dict(), checkpoints.random_state(), [buffer.clone() for buffer in self._running]
        )
        error: Exception | None = None
        taken: list[tuple[dict[str, Any], list[str]]] = []
        try:
            taken = list(islice(batches, self.config.gradient_accumulation_steps))
        except Exception as problem:
            error = problem
        if self._any_process(error is not None):
            self._stop_for_data(error)
        self.unfreezing.apply(self.record.steps)
        train_mode(self.model)
        for norm in self.still_norms:
            norm.eval()
        losses, counts = self._backward([batch for batch, _ in taken])
        if self._any_process(not torch.isfinite(losses["loss"])):
            self._stop_for_loss(losses["loss"].item(), [key for _, keys in taken for key in keys])
        self._drop_idle_expert_gradients(counts)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self._step_start, self._updating = None, True
        scaler = self.accelerator.scaler
        scale = None if scaler is None else scaler.get_scale()
        self.optimizer.step()
        # A fused optimizer is also called for a step that overflows, and skips it by itself: Accelerate does not
        # notice that, but the scale decreases.
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
        """Computes the gradients of a step.

        Returns:
            The loss terms, and (K,) the number of images that each expert computed, over all processes.
        """
        accelerator, experts = self.accelerator, len(self.inner.vision_model.experts)
        if self.config.caches_gradients:
            losses = cached_step(self.inner, batches, accelerator.backward, accelerator.autocast)
            return losses, losses["expert_counts"]
        together: dict[str, Any] = {}
        if self.config.negatives != "micro_batch":
            together = {"gather": gather_rows, "exchange": exchanged_logits}
        sums: dict[str, Tensor] = {}
        counts = torch.zeros(experts, dtype=torch.long, device=accelerator.device)
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            no_sync: AbstractContextManager[Any] = nullcontext() if last else accelerator.no_sync(self.model)
            with no_sync:
                output = self.model(**batch, **together)
                accelerator.backward(output.loss / len(batches))
            counts += torch.bincount(self.inner.vision_model.expert_index(output.expert_ids), minlength=experts)
            for name in LOSS_PARTS:
                sums[name] = sums.get(name, 0.0) + output[name].detach() / len(batches)
        if in_process_group():
            distributed.all_reduce(counts)
        return sums, counts

    def _drop_idle_expert_gradients(self, counts: Tensor) -> None:
        """Leaves experts that computed no image of the step unchanged: no weight decay, no momentum.

        With several processes such an expert is called without images, and its gradients are zeros instead of `None`.
        """
        if self.inner.config.vision_config.mixture != "hard":
            return
        for count, expert in zip(counts.tolist(), self.inner.vision_model.experts, strict=True):
            if not count:
                for parameter in expert.parameters():
                    parameter.grad = None

    # Stopping early

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """In the block, a first SIGTERM or SIGINT ends the run after the current step; a second one acts at once."""
        before: dict[int, Any] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for known, handler in before.items():
                signal.signal(known, handler)

        try:
            for each in (signal.SIGTERM, signal.SIGINT):
                before[each] = signal.signal(each, note)
        except ValueError:  # only the main thread may set handlers
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_if_due(self, best: bool) -> None:
        section, steps = self.config.checkpoints, self.record.steps
        if steps == self.config.max_steps:
            return
        timed = bool(section.every_minutes) and time.monotonic() - self._saved > 60 * section.every_minutes
        counted = bool(section.every_steps) and steps % section.every_steps == 0
        due = timed or counted or (best and section.keep_best)
        # One exchange for both questions, since it happens in every step.
        level = max_over_processes(2 if self._signal else int(due), self.accelerator.device)
        if level:
            self.save_checkpoint()
        if level == 2:
            raise Interrupted(
                f"Stopped by {signal.Signals(self._signal or signal.SIGTERM).name} after step {steps}. The checkpoint "
                f"is {self._checkpoint_path()}; resume with `--resume auto`.",
                self._signal or signal.SIGTERM,
            )

    def _stop_for_data(self, error: Exception | None) -> None:
        saved = ""
        if self.record.steps:
            self._save_step_start()
            saved = f" The state after {self.record.steps} steps is saved in {self._checkpoint_path()}."
        if error is not None and not isinstance(error, (TrainingError, StreamError)):
            logger.error("The training data cannot be read any further:")
            raise error
        kind = TrainingError if isinstance(error, TrainingError) else StreamError
        raise kind(f"Training data: {error or 'another process cannot read its data.'}{saved}") from error

    def _stop_for_loss(self, loss: float, keys: list[str]) -> None:
        if self.record.steps and not self._any_process(not _all_finite(self.inner)):
            # Older checkpoints stay, as they may be the better ones to resume from: the cause may have begun earlier.
            self._save_step_start(rotate=False)
        if loss == loss and abs(loss) != float("inf"):
            raise TrainingError("The loss is not finite in another process; its message names the samples.")
        found = checkpoints.find_checkpoints(self.folder, self.record.steps)
        raise TrainingError(
            f"The loss is {loss} at step {self.record.steps + 1}; lower `learning_rate`"
            + (" or use `mixed_precision: bf16`" if self.config.mixed_precision == "fp16" else "")
            + f". The samples were {', '.join(keys[:20])}{', ...' if len(keys) > 20 else ''}."
            + (f" The newest checkpoint is {found[-1]}." if found else "")
        )

    def _save_after_unexpected(self, error: Exception) -> None:
        """Writes a checkpoint after an error of any kind: out of memory, a tracker that fails."""
        # Several processes would have to fail together, and one alone cannot know whether they did. Within an update
        # of the weights there is no consistent state to save.
        steps = self.record.steps
        if not steps or self._updating:
            return
        if steps not in self._written:
            if in_process_group():
                return
            try:
                self._save_step_start()
            except Exception as second:
                if self.accelerator.is_main_process:
                    logger.error("%s, and no checkpoint could be written: %s", type(error).__name__, second)
                return
        if not self.accelerator.is_main_process:
            return
        logger.error(
            "%s: the run ends; the state after %d steps is saved in %s",
            type(error).__name__,
            steps,
            self._checkpoint_path(),
        )

    def _save_step_start(self, rotate: bool = True) -> None:
        """Writes a checkpoint of the last completed step, although the next one has begun."""
        start = self._step_start
        if start is None:
            self.save_checkpoint(rotate=rotate)
            return
        checkpoints.set_random_state(*start.random)
        for buffer, value in zip(self._running, start.running, strict=True):
            buffer.copy_(value)
        self.save_checkpoint(start.stream, rotate)

    # Logging and evaluation

    def _start_trackers(self) -> None:
        plain = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in self.record.config.items()
            if key != "data"  # names of files and folders may be sensitive
        }
        self.accelerator.init_trackers("medmoe", config=plain)

    def _log(self, bar: Any) -> None:
        rate = max(group["lr"] for group in self.optimizer.param_groups if group["start"] < self.record.steps)
        entry = {"step": self.record.steps, "learning_rate": rate, **self.last}
        self.record.log.append(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=self.record.steps)
        shown = {name.removeprefix("loss_"): f"{self.last[name]:.2f}" for name in LOSS_PARTS}
        bar.set_postfix(shown | ({"skipped": self.stream.faults.bad} if self.stream.faults.bad else {}))

    def _evaluate(self, bar: Any) -> bool:
        """Evaluates on the held-out pairs, the moving average if there is one.

        Returns:
            Whether this evaluation is the best so far.
        """
        assert self.held_out is not None
        record = self.record
        metrics = self.held_out.evaluate(self.model if self.ema is None else self.ema.module, record.steps)
        record.evaluations.append({"step": record.steps, **metrics})
        record.best_step = best_step(record.evaluations, self.config.best_metric)
        if self.config.schedule == "plateau" and record.steps > self.config.warmup_steps:
            self.scheduler.step(metrics["loss"])
        self._evaluation_due = False
        self.accelerator.log({f"held-out/{name}": value for name, value in metrics.items()}, step=record.steps)
        if self.accelerator.is_main_process:
            bar.write(f"step {record.steps}: {describe(metrics, self.inner.config.positives)}")
        return record.best_step == record.steps

    def _reason_to_stop(self) -> str | None:
        section = self.config.early_stopping
        if section is None:
            return None
        return reason_to_stop(
            self.record.evaluations, self.config.stopping_metric, section.patience, section.min_delta
        )


def _all_finite(model: Any) -> bool:
    parts = (value.to_local() if hasattr(value, "to_local") else value for value in model.parameters())
    return all(bool(torch.isfinite(part).all()) for part in parts)
