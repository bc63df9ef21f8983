"""Checks before the first step, so that a run does not fail hours later."""

import importlib.util
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from medmoe_hf.data.faults import Fault
from medmoe_hf.data.reading import SampleIndex
from medmoe_hf.data.sources import has_labels
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ShardError, TrainingError
from medmoe_hf.training.config import TrainConfig

_SAMPLES_TRIED = 4  # per source


def check_trackers(trackers: Iterable[str]) -> None:
    """Checks that the package of each tracker is installed.

    Raises:
        TrainingError: If one is missing.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            package = '"medmoe_hf[train]"' if name == "tensorboard" else name
            raise TrainingError(f"`trackers: {name}` needs its package: pip install {package}; or remove it.")


def check_strategy(config: TrainConfig, kind: DistributedType) -> None:
    """Checks that the configuration works with the way the weights are distributed.

    Raises:
        TrainingError: For gradient caching, a moving average, or parts that are trained later, with sharded weights.
    """
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if config.caches_gradients:
        raise TrainingError(
            "Gradient caching needs all weights in every process, but FSDP and DeepSpeed shard them. Set "
            "`gradient_accumulation_steps: 1`, or `negatives: ranks`, or use examples/accelerate/ddp.yaml."
        )
    if config.ema_decay is not None:
        raise TrainingError("`ema_decay` needs all weights in every process; use examples/accelerate/ddp.yaml.")
    if config.unfreeze_at:
        raise TrainingError(
            "FSDP and DeepSpeed decide once what is trained; for `unfreeze_at` use examples/accelerate/ddp.yaml."
        )


def unwritable_folder(folders: Iterable[Path]) -> str | None:
    """Error message for the first folder that cannot be written to or created; `None` if all can."""
    for folder in folders:
        try:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.TemporaryDirectory(prefix=".medmoe-", dir=existing):
                pass
        except OSError as error:
            return f"{folder} cannot be written to ({error.strerror}); choose another `output_dir`."
    return None


def unusable_source(stream: SampleStream) -> str | None:
    """Error message for the first source of which no sample can be used; `None` if there is no such source.

    A few samples, spread over each source, are read.
    """
    return next(filter(None, (_unusable(stream, source) for source in range(len(stream.sources)))), None)


def _unusable(stream: SampleStream, source: int) -> str | None:
    shards = stream.shards[source]
    reader = stream.reader()
    faults: list[Fault] = []
    for part in range(_SAMPLES_TRIED):
        number = part * len(shards) // _SAMPLES_TRIED
        try:
            rows = stream.known_rows.rows(source, number)
            if not rows:
                continue
            row = rows[part * len(rows) // _SAMPLES_TRIED]
            location = shards[number].locate(row)
        except (ShardError, OSError):
            continue  # counted when it is read
        found = reader[SampleIndex(0, source, number, row, location)]
        if not isinstance(found, Fault):
            return None
        faults.append(found)
    if not faults:
        return None
    listed = "\n".join(
        dict.fromkeys(
            f"  {fault.path}: {fault.cause}" + (f" ({fault.reason})" if fault.reason else "") for fault in faults
        )
    )
    return f"of {stream.names[source]} none of the samples that were tried can be used:\n{listed}"


def missing_labels(streams: dict[str, SampleStream | None]) -> str | None:
    """Error message if no source of a stream has labels, as `positives: label` needs; `None` if all streams have some.

    Args:
        streams: "training" or "held-out" -> stream, `None` if there is none.
    """
    for kind, stream in streams.items():
        if stream is None or any(map(has_labels, stream.sources, stream.shards)):
            continue
        return (
            f"`positives: label` needs to know which samples share a label, and no {kind} source has a field "
            "`label`. Name the field by `label` in the source, or use another kind of `positives`."
        )
    return None


def limit_threads(accelerator: Accelerator, num_workers: int) -> None:
    """Leaves one core per data worker: on a CPU, threads that wait for a busy core cost more than they bring."""
    if accelerator.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Processes on one machine share its cores as well; Accelerate's launcher sets OMP_NUM_THREADS for them.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - num_workers)))
