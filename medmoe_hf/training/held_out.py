"""Held-out pairs of a training run: read once before the first step, evaluated on during training."""

import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from medmoe_hf.common.console import progress
from medmoe_hf.data import MODALITIES
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.reading import Sample
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import StreamError, TrainingError
from medmoe_hf.evaluation.label_tasks import NO_TASK, HeldOutTasks, label_tasks, task_sentences
from medmoe_hf.evaluation.validation import RECALLS, validate
from medmoe_hf.model import Task
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY
from medmoe_hf.training.config import ZeroShotSection
from medmoe_hf.training.negatives import gather_rows, max_over_processes

logger = logging.getLogger(__name__)


def to_device(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """A batch with its tensors on the accelerator's device; the host does not wait for the copies."""
    # Only from pinned memory is a copy to a GPU concurrent.
    pins = accelerator.device.type == "cuda"
    return {
        name: (value.pin_memory() if pins else value).to(accelerator.device, non_blocking=True)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


class HeldOutData:
    """This process's share of the held-out pairs.

    Args:
        stream: All held-out pairs, in the same order in every process.
        accelerator: The run's.
        collator: The run's.
        samples: Number of pairs to read, over all processes.
        batch_size: The run's; a loss depends on the number of pairs in a batch.
        zero_shot: The run's.
        needed: Metrics that the run depends on.
    """

    def __init__(
        self,
        stream: SampleStream,
        accelerator: Accelerator,
        collator: ContrastiveCollator,
        samples: int,
        batch_size: int,
        zero_shot: ZeroShotSection | None = None,
        needed: Collection[str] = (),
    ) -> None:
        self.stream = stream
        self.initial_state = stream.state_dict()
        self._accelerator, self._collator = accelerator, collator
        self._samples, self._batch_size = samples, batch_size
        self._zero_shot, self._needed = zero_shot, needed
        self._batches: list[tuple[dict[str, Any], bool]] | None = None
        self._tasks: HeldOutTasks | None = None

    def read(self) -> None:
        """Reads the batches of this process and keeps them, pixels still in 8 bits. Every process must call this.

        All processes get the same number of batches, since sharded weights are gathered by all at a time; a batch
        that only fills up a process is marked by `False`.

        Raises:
            StreamError: If too many pairs cannot be read.
            TrainingError: If there are fewer than two pairs, or if a metric that the run depends on cannot be measured
                on them.
        """
        if self._batches is not None:
            return
        accelerator, main = self._accelerator, self._accelerator.is_main_process
        samples: list[Sample] = []
        error: Exception | None = None
        try:
            pairs = islice(self.stream, self._samples)
            samples += progress(pairs, "held-out data", "pair", self._samples, delay=0, disable=not main)
        except StreamError as problem:
            error = problem
        if max_over_processes(error is not None, accelerator.device):
            reason = error or "another process cannot read them."
            raise StreamError(f"Held-out data: {reason} Nothing was trained yet.") from error
        if len(samples) < 2:
            raise TrainingError(
                f"Held-out data: {'one pair' if samples else 'no pair'} in all, and a loss needs at least two to "
                "contrast. Add data to `data.evaluation`, or raise `data.validation_share`."
            )
        # As many pairs are contrasted as in training, as far as one process can hold them.
        size = max(2, self._batch_size)
        starts = list(range(0, len(samples), size))
        self._batches = []
        tasks, classes = self._find_tasks(samples)
        parts: list[Tensor] = []
        for first in range(0, len(starts), accelerator.num_processes):
            number = first + accelerator.process_index
            start = starts[min(number, len(starts) - 1)]
            batch = self._collator.assemble(samples[start : start + size])
            self._batches.append((batch, number < len(starts)))
            parts.append(classes[start : start + size])
        if tasks:
            sentences = task_sentences(tasks)
            tokenized = [
                dict(self._collator.processor(text=sentences[first : first + size], return_tensors="pt"))
                for first in range(0, len(sentences), size)
            ]
            self._tasks = HeldOutTasks(tasks, parts, tokenized)
        if main:
            if self.stream.faults.bad:
                logger.warning("held-out data: %s", self.stream.faults)
            for line in _limits(len(samples), size):
                logger.warning(line)

    def _find_tasks(self, samples: list[Sample]) -> tuple[list[Task], Tensor]:
        """The zero-shot tasks of all pairs, and the task and class of each pair."""
        tasks: list[Task] = []
        classes = torch.full((len(samples), 2), NO_TASK)
        section = self._zero_shot
        if section is not None:
            tasks, classes = label_tasks(
                samples,
                dict(enumerate(MODALITIES)),
                self.stream.names if section.by == "source" else None,
                section.templates,
                section.prompts,
                section.smallest_class,
            )
        measured = {f"zero_shot:{task.name}" for task in tasks} | ({"zero_shot"} if tasks else set())
        measured |= {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RECALLS if k < len(samples)}
        if any(int(sample["modality"]) != UNKNOWN_MODALITY for sample in samples):
            measured |= {"routing_image", "routing_report"}
        for metric in self._needed:
            if metric in measured or metric.startswith("loss"):
                continue
            known = f"; there are {', '.join(sorted(measured))}" if measured else ""
            raise TrainingError(
                f"Held-out data: `{metric}` cannot be measured on these {len(samples)} pairs{known}. Zero-shot tasks "
                "need labels, two or more per modality (or source) with enough images: see `zero_shot` and "
                "`evaluation_samples`, and name the field by `label` in the source."
            )
        if section is not None and not tasks and self._accelerator.is_main_process:
            logger.warning(
                "held-out data: no zero-shot task: no modality%s has two labels of %d images or more.",
                " of a source" if section.by == "source" else "",
                section.smallest_class,
            )
        return tasks, classes

    def evaluate(self, model: Any, step: int) -> dict[str, float]:
        """The metrics of `medmoe_hf.evaluation.validate` on all held-out pairs. Every process must call this.

        Args:
            model: A `MedMoEModel`, or a wrapper of one.
            step: Shown in the progress bar.
        """
        self.read()
        assert self._batches is not None
        accelerator = self._accelerator
        batches = progress(
            self._batches,
            f"evaluating at step {step}",
            "batch",
            delay=0,
            disable=not accelerator.is_main_process,
        )
        tasks = self._tasks
        if tasks is not None:
            tasks = replace(tasks, texts=[to_device(text, accelerator) for text in tasks.texts])
        with accelerator.autocast():
            return validate(
                model,
                (self._collator.normalize(to_device(batch, accelerator)) for batch, _ in batches),
                [counts for _, counts in self._batches],
                gather_rows,
                tasks,
            )


def _limits(pairs: int, batch: int) -> Iterator[str]:
    """What limits the metrics on `pairs` held-out pairs in batches of `batch`."""
    if pairs < batch:
        yield (
            f"held-out data: {pairs} pairs, fewer than `batch_size` {batch}: contrasted with fewer pairs than in "
            "training, they have a lower loss; compare it only between evaluations of this run."
        )
    elif rest := pairs % batch:
        yield (
            f"held-out data: {pairs} pairs, of which the loss leaves out {rest}, as it needs batches of equal size "
            f"({batch}); routing and retrieval are measured on all."
        )
    if left_out := [k for k in RECALLS if k >= pairs]:
        listed = " and ".join(f"R@{k}" for k in left_out)
        yield f"held-out data: {pairs} pairs are too few for {listed}, which would always be 1."
