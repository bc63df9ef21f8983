"""Held-out pairs of a training run: read once before the first step, evaluated on during training."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from medmoe_hf.common.console import progress
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.reading import Sample
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import StreamError, TrainingError
from medmoe_hf.evaluation.validation import RECALLS, validate
from medmoe_hf.training.negatives import gather_rows, max_over_processes

logger = logging.getLogger(__name__)


def to_device(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """A batch with its tensors on the accelerator's device."""
    return {
        name: value.to(accelerator.device, non_blocking=True) if isinstance(value, Tensor) else value
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
    """

    def __init__(
        self,
        stream: SampleStream,
        accelerator: Accelerator,
        collator: ContrastiveCollator,
        samples: int,
        batch_size: int,
    ) -> None:
        self.stream = stream
        self.initial_state = stream.state_dict()
        self._accelerator, self._collator = accelerator, collator
        self._samples, self._batch_size = samples, batch_size
        self._batches: list[tuple[dict[str, Any], bool]] | None = None

    def read(self) -> None:
        """Reads the batches of this process and keeps them, pixels still in 8 bits. Every process must call this.

        All processes get the same number of batches, since sharded weights are gathered by all at a time; a batch
        that only fills up a process is marked by `False`.

        Raises:
            StreamError: If too many pairs cannot be read.
            TrainingError: If there are fewer than two pairs.
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
        for first in range(0, len(starts), accelerator.num_processes):
            number = first + accelerator.process_index
            start = starts[min(number, len(starts) - 1)]
            batch = self._collator.assemble(samples[start : start + size])
            self._batches.append((batch, number < len(starts)))
        if main:
            if self.stream.faults.bad:
                logger.warning("held-out data: %s", self.stream.faults)
            for line in _limits(len(samples), size):
                logger.warning(line)

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
        with accelerator.autocast():
            return validate(
                model,
                (self._collator.normalize(to_device(batch, accelerator)) for batch, _ in batches),
                [counts for _, counts in self._batches],
                gather_rows,
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
