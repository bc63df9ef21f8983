"""The streams of training and held-out pairs that a configuration names."""

from typing import Any

from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.split import Split
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import SourceError
from medmoe_hf.training.config import TrainConfig


def training_stream(config: TrainConfig, collator: ContrastiveCollator, rank: int, world_size: int) -> SampleStream:
    """The training pairs of one process.

    Args:
        config: The run's configuration.
        collator: Prepares each sample in the data workers.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        SourceError: If a source cannot be used.
    """
    data = config.data
    return _open(
        "Training data",
        data.train,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        mixing=data.mixing,
        balance=data.balance or (),
        balance_power=data.balance_power,
        once=data.once,
        shuffle=data.shuffle_buffer > 0,
        buffer=data.shuffle_buffer,
        split=Split("train", data.validation_share) if data.validation_share else None,
        max_bad_fraction=data.max_bad_fraction,
        num_workers=data.num_workers,
        prepare=collator.prepare,
        draft=collator.side if data.reduced_decode else None,
        augmentation=data.augmentations(),
        shorten=collator.shorten if data.long_captions == "sample" else None,
    )


def held_out_stream(config: TrainConfig, collator: ContrastiveCollator) -> SampleStream:
    """The held-out pairs, all of them in every process, in a random order that is the same in every run.

    Of tables that are sorted by class, the first pairs would be of one class.

    Args:
        config: A configuration with held-out data (`config.evaluates`).
        collator: Prepares each sample.

    Raises:
        SourceError: If a source cannot be used.
    """
    data = config.data
    return _open(
        "Held-out data",
        data.train if data.evaluation is None else data.evaluation,
        split=Split("validation", data.validation_share) if data.evaluation is None else None,
        max_bad_fraction=data.max_bad_fraction,
        prepare=collator.prepare,
        fixed_captions=True,
    )


def _open(title: str, section: Any, **options: Any) -> SampleStream:
    sources = section if isinstance(section, list) else [section]
    try:
        return SampleStream(sources, part="", **options)  # messages begin with the title instead of `part`
    except SourceError as error:
        raise SourceError(f"{title}: {error}") from error
