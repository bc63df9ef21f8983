"""The state of a training run, and its checkpoints."""

import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from safetensors import SafetensorError
from timm.utils import ModelEmaV3
from torch import Tensor
from transformers import get_scheduler
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from medmoe_hf.common.files import atomic_dir, is_disk_full, redact_paths
from medmoe_hf.common.memory import keep_freed_memory
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import PathExistsError, ResumeError, StreamError, TrainingError
from medmoe_hf.model.modeling_medmoe import in_process_group
from medmoe_hf.training import checkpoints, preflight
from medmoe_hf.training.adapters import add_lora, save_adapter
from medmoe_hf.training.build import build_model
from medmoe_hf.training.config import TrainConfig
from medmoe_hf.training.held_out import HeldOutData
from medmoe_hf.training.negatives import max_over_processes
from medmoe_hf.training.optimizer import freeze, frozen_norms, parameter_groups
from medmoe_hf.training.record import TrainingRecord
from medmoe_hf.training.streams import held_out_stream, training_stream
from medmoe_hf.training.unfreezing import Unfreezing, warm_up_late_groups

logger = logging.getLogger(__name__)


class RunState:
    """Model, optimizer, data and progress of a run: everything that its checkpoints save. Every process has one.

    Args:
        config: The run's configuration.
        resume: As for `train`.

    Attributes:
        accelerator: Accelerate's.
        model: The dual encoder (or PEFT's wrapper of it), prepared by Accelerate.
        inner: The `MedMoEModel` itself.
        ema: Moving average of the weights, or `None`.
        held_out: Held-out data, or `None`.
        record: What has happened so far.
        last: Loss terms and gradient norm of the last step.
    """

    def __init__(self, config: TrainConfig, resume: str | Path | None = None) -> None:
        # Activations fade into denormals, which CPUs multiply a hundred times slower. Must be set before the first
        # parallel computation.
        torch.set_flush_denormal(True)
        if config.output_dir.exists():
            raise PathExistsError(f"{config.output_dir} exists already; choose another `output_dir` or remove it.")
        self.config = config
        self.folder = config.run_dir / "checkpoints"
        self.record = TrainingRecord(config=config.model_dump(mode="json"))
        self.last: dict[str, float] = {}
        preflight.check_trackers(config.trackers)
        checkpoint, damaged = self._checkpoint_to_resume(resume)
        self.accelerator = accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
            log_with=list(config.trackers) or None,
            project_dir=str(config.run_dir / "logs"),
            # Nothing is unused (with several processes every expert is called), except parts that are trained later:
            # DDP knows what was trainable when it wrapped the model. Buffers are the same everywhere.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=bool(config.unfreeze_at))
            ],
        )
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        preflight.limit_threads(accelerator, config.data.num_workers)
        preflight.check_strategy(config, accelerator.distributed_type)
        self._check_folders()
        if damaged and accelerator.is_main_process:
            for problem in damaged:
                logger.warning("Skipped: %s", problem)
            logger.warning("Resuming from %s, the newest complete checkpoint.", checkpoint)
        set_seed(config.seed)
        state: dict[str, Any] | None = None
        tensors: dict[str, dict[str, Tensor]] = {}
        if checkpoint is not None:
            state, tensors = checkpoints.read_state(checkpoint, self.record.config, accelerator.num_processes)
        model, self.processor = build_model(config.model)
        if config.positives is not None:
            model.config.positives = config.positives
        freeze(model, config.freeze)
        self.unfreezing = Unfreezing(model, config.unfreeze_at)
        self.still_norms = frozen_norms(model, config.freeze_statistics)
        self.inner = model
        outer: Any = model if config.lora is None else add_lora(model, config.lora)
        if checkpoint is not None:
            tensors.pop("weights", None)
            outer.load_state_dict(checkpoints.read_weights(checkpoint), strict=config.lora is None)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.ema = None
        if config.ema_decay is not None:
            self.ema = ModelEmaV3(outer.to(accelerator.device), decay=config.ema_decay, use_warmup=True)
            if "ema" in tensors:
                self.ema.module.load_state_dict(tensors["ema"])
        if config.compile_towers:
            model.vision_model.backbone.compile()
            # Installed by the first call, they would break its graph.
            maybe_install_capturing_hooks(model.text_model.encoder)
            model.text_model.encoder.compile()
            if accelerator.num_processes == 1 and not config.caches_gradients:
                # Elsewhere their BatchNorm exchanges statistics, at which a graph would break.
                for expert in model.vision_model.experts:
                    expert.compile()
        optimizer = torch.optim.AdamW(
            # fused: one pass over all parameters; experts have hundreds of small ones
            parameter_groups(
                outer,
                config.weight_decay,
                config.learning_rate,
                config.layer_decay,
                config.learning_rates,
                self.unfreezing.starts,
            ),
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        if config.caches_gradients:
            # Several backward passes through one set of weights: `cached_step` averages the gradients.
            self.model = outer.to(accelerator.device)
            self.optimizer = accelerator.prepare(optimizer)
        else:
            with warnings.catch_warnings():
                # torch is about to rename `broadcast_buffers`, which Accelerate passes on.
                warnings.simplefilter("ignore", FutureWarning)
                self.model, self.optimizer = accelerator.prepare(outer, optimizer)
        self._running = [
            buffer for name, buffer in self.inner.named_buffers() if "running_" in name or "num_batches" in name
        ]
        self.scheduler = self._make_scheduler(optimizer)
        self.collator = ContrastiveCollator(self.processor, model.config.positives)
        self.stream = training_stream(config, self.collator, accelerator.process_index, accelerator.num_processes)
        self.held_out: HeldOutData | None = None
        if config.evaluates:
            metrics = {config.best_metric, config.stopping_metric}
            if "routing_report" in metrics and model.report_router is None:
                raise TrainingError("`routing_report` cannot be measured: the model has no report router.")
            self.held_out = HeldOutData(
                held_out_stream(config, self.collator),
                accelerator,
                self.collator,
                config.evaluation_samples,
                config.batch_size,
                config.zero_shot,
                metrics,
            )
        self._evaluation_due = False
        # Steps whose checkpoints this run has written. There may be others, if it was resumed from an older one.
        self._written: set[int] = set()
        self._saved = time.monotonic()
        if checkpoint is not None and state is not None:
            self._restore(checkpoint, state, tensors)

    def _check_folders(self) -> None:
        """Raises a `TrainingError` if the main process cannot write where it will have to, hours from now."""
        problem: str | None = None
        if self.accelerator.is_main_process:
            problem = preflight.unwritable_folder([self.config.output_dir.parent, self.config.run_dir, self.folder])
        if self._any_process(problem is not None):
            raise TrainingError(problem or "The main process cannot write to `output_dir`; its message says why.")

    def _checkpoint_to_resume(self, resume: str | Path | None) -> tuple[Path | None, list[str]]:
        """The checkpoint to resume from, and what is wrong with newer ones."""
        if resume is not None and str(resume) != "auto":
            if not (Path(resume) / checkpoints.STATE).is_dir():
                raise ResumeError(
                    f"{resume} is no checkpoint of a run. Those of this configuration are in {self.folder}; "
                    "`--resume auto` uses the newest. To start a new run from weights, set `model.from_pretrained`."
                )
            checkpoints.check(Path(resume))
            return Path(resume), []
        if resume is None and checkpoints.find_checkpoints(self.folder):
            raise PathExistsError(
                f"{self.folder} holds checkpoints of a run. Resume from the newest with `--resume auto`, remove them, "
                "or choose another `output_dir`."
            )
        return checkpoints.newest_complete(self.folder)

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        config = self.config
        if config.schedule != "plateau":
            scheduler = get_scheduler(config.schedule, optimizer, config.warmup_steps, config.max_steps)
            warm_up_late_groups(scheduler, config.unfreeze_warmup_steps)
            return scheduler
        self._warm_up()
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience
        )

    def _streams(self) -> dict[str, SampleStream | None]:
        return {"training": self.stream, "held-out": None if self.held_out is None else self.held_out.stream}

    def _warm_up(self) -> None:
        steps = self.config.warmup_steps
        if self.record.steps < steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (self.record.steps + 1) / steps

    def _any_process(self, condition: bool | Tensor) -> bool:
        return bool(max_over_processes(int(condition), self.accelerator.device))

    # Writing and reading

    def _checkpoint_path(self) -> Path:
        return self.folder / checkpoints.step_name(self.record.steps)

    def _state_dict(self) -> dict[str, Tensor]:
        return checkpoints.wait_for_async(self.accelerator.get_state_dict(self.model))

    def save_checkpoint(self, stream_state: dict[str, Any] | None = None, rotate: bool = True) -> None:
        """Writes a checkpoint of the last step. Every process must call this.

        Args:
            stream_state: State of the stream, if not its current one.
            rotate: Whether to remove older checkpoints, as configured.

        Raises:
            TrainingError: If it cannot be written, for example because the disk is full; earlier ones are unchanged.
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
            "held_out": None if self.held_out is None else self.held_out.initial_state,
            "content": {part: None if stream is None else stream.content for part, stream in self._streams().items()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        with self._main_process_writes(f"The checkpoint of step {self.record.steps}"):
            if accelerator.is_main_process and self.record.steps not in self._written:
                with atomic_dir(self._checkpoint_path(), force=True) as partial:
                    self._write_model(partial, accelerator.unwrap_model(self.model), weights, final=False)
                    checkpoints.write_state(partial, state, tensors)
            if accelerator.is_main_process and rotate:
                section = self.config.checkpoints
                best = self.record.best_step if section.keep_best else None
                checkpoints.rotate(self.folder, section.keep_last, best, self.record.steps)
        self._written.add(self.record.steps)
        self._saved = time.monotonic()

    @contextmanager
    def _main_process_writes(self, what: str, fall_back: bool = False) -> Iterator[None]:
        """Turns errors of writing into an error that every process raises.

        Args:
            what: Name of what is written, for the message.
            fall_back: Whether to try to write a checkpoint after an error.
        """
        problem: Exception | None = None
        try:
            yield
        except (OSError, SafetensorError) as error:
            problem = error
        if not self._any_process(problem is not None):
            return
        if fall_back:
            self.save_checkpoint()
        found = checkpoints.find_checkpoints(self.folder, self.record.steps)
        raise TrainingError(
            f"{what} could not be written: {'the disk is full' if is_disk_full(problem) else problem}. "
            + (f"The newest complete checkpoint is {found[-1]}; " if found else "There is no checkpoint yet; ")
            + "make room and resume with `--resume auto`."
        ) from problem

    def _write_model(self, folder: Path, model: Any, weights: dict[str, Tensor], final: bool) -> None:
        """Writes what `from_pretrained` (for adapters: PEFT) loads, and the processor."""
        with _no_transformers_bars():
            if self.config.lora is None:
                model.save_pretrained(folder, state_dict=weights)
                self.processor.save_pretrained(folder)
            elif final and self.config.lora.merge:
                model.merge_and_unload(safe_merge=True).save_pretrained(folder)
                self.processor.save_pretrained(folder)
            else:
                save_adapter(model, self.processor, folder, weights)

    def _save_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.ema is not None:
            model, weights = self.ema.module, dict(self.ema.module.state_dict())
        self.record.saved_step = self.record.steps
        if self.config.final_model == "best" and self.record.best_step not in (None, self.record.steps):
            model, weights = self._best_model(model) or (model, weights)
        with atomic_dir(folder) as partial:
            self._write_model(partial, model, weights, final=True)
            text = json.dumps(redact_paths(asdict(self.record)), indent=1) + "\n"
            (partial / "training.json").write_text(text, encoding="utf-8")

    def _best_model(self, model: Any) -> tuple[Any, dict[str, Tensor]] | None:
        """A copy of the model with the weights of the best evaluation; `None` if its checkpoint cannot be used."""
        path = self.folder / checkpoints.step_name(self.record.best_step or 0)
        try:
            checkpoints.check(path)
            weights = checkpoints.read_weights(path, averaged=self.ema is not None)
        except (ResumeError, OSError, SafetensorError) as error:
            logger.error("`final_model: best`: %s The weights of the last step are saved instead.", error)
            return None
        model = copy.deepcopy(model)  # the run's own may still be needed, if the folder cannot be written
        model.load_state_dict(weights, strict=self.config.lora is None)
        self.record.saved_step = self.record.best_step
        return model, dict(model.state_dict())

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


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """Hides transformers' progress bars of writing weights, which would break ours."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
