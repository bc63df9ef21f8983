"""Sources of training data: what a YAML says about one, and the stream of pairs that it becomes."""

from glob import glob
from typing import Annotated, Any, Literal

import datasets
from datasets import Features, Image, Value
from pydantic import BaseModel, ConfigDict, Field

from medmoe_hf.data.phantom import MODALITIES, phantom_stream

UNKNOWN_MODALITY = -100


class PhantomSource(BaseModel):
    """Synthetic image-report pairs, drawn while training (see `medmoe_hf.data.phantom`).

    Attributes:
        seed: which endless sequence of samples.
        image_size: side in pixels.
        modalities: which of the six to draw; their ids stay the same.
        length: samples before the stream ends; None for an endless one.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["phantom"]
    seed: int = 0
    image_size: int = Field(default=224, ge=48)
    modalities: list[str] = list(MODALITIES)
    length: int | None = Field(default=None, ge=1)


class WebDatasetSource(BaseModel):
    """Tar shards of samples: an image, `txt` (the caption) and, if there is one, `cls` (the modality id as text).

    The layout of the official code's shards and of `medmoe phantom`.

    Attributes:
        kind: `webdataset`.
        files: paths of tars, or patterns with `*` and `?`.
        image: the image's key; None looks for jpg, jpeg, png and webp.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["webdataset"]
    files: list[str] = Field(min_length=1)
    image: str | None = None


Source = Annotated[PhantomSource | WebDatasetSource, Field(discriminator="kind")]

_IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
_FEATURES = Features({"image": Image(), "caption": Value("string"), "modality": Value("int64")})


def open_source(source: PhantomSource | WebDatasetSource, num_shards: int = 1) -> datasets.IterableDataset:
    """The stream of a source.

    Args:
        source: what to read.
        num_shards: how many readers (DataLoader workers times processes) will share it.

    Returns:
        `datasets.IterableDataset` of `image` (a PIL image), `caption` (str) and `modality` (int, -100 = unknown); a
        phantom stream has its further columns too (see `phantom_sample`).

    Raises:
        FileNotFoundError: for a pattern that no file fits.
        ValueError: for tars that hold no image under a known key.
    """
    if isinstance(source, PhantomSource):
        return phantom_stream(
            source.seed,
            image_size=source.image_size,
            modalities=tuple(source.modalities),
            length=source.length,
            num_shards=num_shards,
        )
    files: list[str] = []
    for pattern in source.files:
        found = sorted(glob(pattern))
        if not found:
            raise FileNotFoundError(f'No file fits "{pattern}" (`files` of a webdataset source).')
        files += found
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    columns = list(stream.features or {})
    key = source.image or next((name for name in _IMAGE_KEYS if name in columns), None)
    if key is None or key not in columns or "txt" not in columns:
        raise ValueError(
            f"{files[0]} has samples of {', '.join(columns)}; expected a caption under txt and an image under "
            f"{source.image or ', '.join(_IMAGE_KEYS)}. Name the image's key by `image:`."
        )

    def rename(sample: dict[str, Any]) -> dict[str, Any]:
        label = sample.get("cls")
        if isinstance(label, bytes):
            label = label.decode()
        return {
            "image": sample[key],
            "caption": sample["txt"].decode() if isinstance(sample["txt"], bytes) else sample["txt"],
            "modality": UNKNOWN_MODALITY if label is None else int(label),
        }

    return stream.map(rename, remove_columns=columns, features=_FEATURES)
