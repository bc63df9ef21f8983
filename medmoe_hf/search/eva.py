"""Image embeddings of labelled sources in the layout that kaiko-eva reads: a file per image, and manifest.csv."""

import csv
import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from medmoe_hf.common.files import atomic_dir, atomic_write
from medmoe_hf.data.clip_benchmark import CLASS_NAMES
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, EncodeError, PathExistsError
from medmoe_hf.inference.encoders import load_encoder

EvaSplit = Literal["train", "val", "test"]
MANIFEST = "manifest.csv"
_COLUMNS = ("origin", "embeddings", "target", "split")


def encode_for_eva(
    sources: Sequence[Any],
    folder: str | Path,
    model: str | Path,
    split: EvaSplit = "train",
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
) -> int:
    """Encodes the images of labelled sources as one split of a folder that kaiko-eva's data sets read.

    `SPLIT/00000000.pt` contains the embedding (D,) of an image, float32 of length 1. `manifest.csv` has a row per
    image with the columns `origin` (where the image is in its source), `embeddings`, `target` and `split`; line k + 1
    of `classnames.txt` is the name of target k. A new folder numbers the classes in the order in which they occur,
    other splits use its numbers. A split appears in the manifest once all of it is written.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite, whose samples have labels.
        folder: Folder of all splits.
        model: Any name that `load_encoder` takes.
        split: Name of the split.
        batch_size: Images per batch.
        num_workers: Processes that read and decode.
        max_bad_fraction: Share of faulty samples, of 0..1, above which it stops.

    Returns:
        Number of images.

    Raises:
        PathExistsError: The folder has this split, or is one of something else.
        ArgumentError: A sample has no label, or a class that the existing folder lacks; or a source is endless.
        EncodeError: `manifest.csv` cannot be continued.
        EncoderError: The model cannot be loaded.
        StreamError: If too many samples cannot be read, or there are none.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.search.eva import encode_for_eva

        encode_for_eva(load_sources("train.yaml"), "embeddings", "small", "train")
        encode_for_eva(load_sources("test.yaml"), "embeddings", "small", "test")
        ```
    """
    root = Path(folder)
    if split not in get_args(EvaSplit):
        raise ArgumentError(f"`split` must be {', '.join(get_args(EvaSplit))}, got {split}.")
    if any(source.kind == "phantom" and source.length is None for source in sources):
        raise ArgumentError("An endless phantom source cannot be encoded; set its `length`.")
    written, classes = _read(root)
    if any(row[-1] == split for row in written):
        raise PathExistsError(f"{root / MANIFEST} has the split {split} already; choose another folder.")
    known = bool(classes)
    encoder = load_encoder(model, batch_size)
    stream = SampleStream(
        sources, shuffle=False, fixed_captions=True, num_workers=num_workers, max_bad_fraction=max_bad_fraction
    )
    rows: list[tuple[str, str, int, str]] = []
    # A folder of this split that the manifest does not name is left over from an interruption.
    with atomic_dir(root / split, force=True) as partial:
        samples = iter(stream)
        while batch := list(islice(samples, batch_size)):
            embeds = encoder.encode_images([sample["image"] for sample in batch])
            for sample, embed in zip(batch, embeds, strict=True):
                name = f"{len(rows):08d}.pt"
                # A row of the batch alone would be saved with all of it.
                torch.save(embed.clone(), partial / name)
                rows.append((sample["key"], f"{split}/{name}", _target(sample, classes, known, root), split))
        if not rows:
            raise EncodeError("The sources contain no image that can be read.")
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([_COLUMNS, *written, *rows])
    for path, text in (
        (root / CLASS_NAMES, "".join(f"{name}\n" for name in classes)),
        (root / MANIFEST, buffer.getvalue()),
    ):
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8", newline="")
    return len(rows)


def _read(root: Path) -> tuple[list[list[str]], list[str]]:
    """Rows of an existing manifest, and names of the classes."""
    path = root / MANIFEST
    if not path.is_file():
        # What is left of an interrupted run: splits that the manifest does not name.
        if root.exists() and any(entry.name not in get_args(EvaSplit) for entry in root.iterdir()):
            raise PathExistsError(f"{root} exists and has no {MANIFEST}; choose another folder.")
        return [], []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        classes = (root / CLASS_NAMES).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise EncodeError(f"{path}, or {CLASS_NAMES} beside it, cannot be read: {error}") from error
    if tuple(header) != _COLUMNS:
        raise EncodeError(f"{path} has the columns {', '.join(header)}, not {', '.join(_COLUMNS)}: not one of ours.")
    return rows, classes


def _target(sample: dict[str, Any], classes: list[str], known: bool, root: Path) -> int:
    """Number of a sample's class; adds a class that is new to `classes` unless they are `known`."""
    if sample["label"] is None:
        raise ArgumentError(f"{sample['key']} has no label; name the field of the classes with `label` of the source.")
    # a line of a file
    name = " ".join(str(sample["label"]).split())
    if name not in classes:
        if known:
            raise ArgumentError(f"{sample['key']} is of the class {name!r}, which {root / CLASS_NAMES} lacks.")
        classes.append(name)
    return classes.index(name)
