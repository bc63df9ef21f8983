"""From a row of a source to a training sample, or to a fault with its reason. Runs in the workers of a stream.

No content of a file stops a run: whatever a reader raises becomes a `Fault`. Reasons say where and what is wrong, and
never quote a caption or a header, which may contain patient data.
"""

import os
import random
import re
import stat
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from torch.utils.data import Dataset

from medmoe_hf.data.augmentation import UNKNOWN_LIKE, Augmentation, augment
from medmoe_hf.data.faults import Fault, SampleError
from medmoe_hf.data.fields import IMAGE_FIELDS, find_field
from medmoe_hf.data.parsing import caption_of, label_of, modality_of, subject_of
from medmoe_hf.data.shards import Shard, TarShard
from medmoe_hf.data.split import Split
from medmoe_hf.errors import ImageTooLargeError, MedicalImageError, ShardError
from medmoe_hf.model.image_files_medmoe import load_image
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.medical_images_medmoe import MAX_PIXELS, is_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY

STRICT = "MEDMOE_STRICT_READERS"
"""Environment variable that makes readers raise unexpected exceptions instead of counting them. For tests."""

_URL = re.compile(r"(?:^|[/\\])(?:https?|ftp|s3|gs|hf):[/\\]")  # also after a folder was prepended


class SampleIndex(NamedTuple):
    """Where a sample of a stream is stored.

    Attributes:
        position: Position in the epoch.
        source: Index of the source.
        shard: Index of the shard in the source.
        row: Index of the row in the shard.
        location: What the shard's `locate` returns for the row; None until it is called.
    """

    position: int
    source: int
    shard: int
    row: int
    location: Any = None


Sample = dict[str, Any]
"""One training sample: `image` (a PIL image, or what the stream's `prepare` returned for it), `caption`, `modality`
(id, or -100), `source`, `shard` and `row` (indices), `subject` and `label` (None where the source has none),
`origin` (the row's field `source`, likewise), `key` (its name in the source) and `position` (in the epoch)."""


@dataclass(frozen=True)
class Excluded:
    """A sample that belongs to the other part of the split."""

    position: int


@dataclass
class _Progress:
    """The current stage of reading a sample, from which a fault is explained."""

    stage: str = "row"
    row: dict[str, Any] | None = None
    field: str | None = None
    path: str | None = None
    split: bool = False


class Reader(Dataset[Sample | Fault | Excluded]):
    """Reads samples by index. Runs in workers.

    Args:
        sources: Models of `medmoe_hf.data.sources`.
        shards: Shards of each source.
        split: Part of the data to read; None for all.
        prepare: Called with each decoded image.
        draft: Side in pixels to which JPEGs may be reduced while decoding; None for full resolution.
        seed: Seed of random caption choices and augmentation, and the epoch.
        augmentation: Modality to its augmentation, see `medmoe_hf.data.augmentation`; None for no augmentation.
        shorten: Called with each caption and a generator; returns the part of the caption to use. None for all of it.
        fixed_captions: Whether captions and synonyms are the first ones that fit instead of random ones.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        shards: list[list[Shard]],
        split: Split | None,
        prepare: Callable[[Image.Image], Any] | None,
        draft: int | None,
        seed: tuple[int, int],
        augmentation: Mapping[str, Augmentation] | None = None,
        shorten: Callable[[str, random.Random], str] | None = None,
        fixed_captions: bool = False,
    ) -> None:
        self.sources, self.shards, self.split = sources, shards, split
        self.prepare, self.draft, self.seed, self.augmentation = prepare, draft, seed, augmentation
        self.shorten, self.fixed_captions = shorten, fixed_captions

    def __getitem__(self, index: SampleIndex) -> Sample | Fault | Excluded:
        source, shard = self.sources[index.source], self.shards[index.source][index.shard]
        progress = _Progress()
        try:
            return self._read(source, shard, index, progress)
        except Exception as error:
            problem = _to_sample_error(error, shard, progress)
        if self.split is not None and not progress.split:
            # A sample without a readable image is counted in one part only, too.
            name = progress.path or f"{shard.name} {index.row}"
            if not self.split.contains_key([name.encode(errors="surrogateescape")]):
                return Excluded(index.position)
        path, file = _where(progress, shard)
        return Fault(
            problem.cause,
            problem.reason or problem.cause,
            progress.field if problem.field is None and progress.stage == "image" else problem.field,
            path,
            file,
            index.source,
            index.shard,
            index.row,
            index.position,
        )

    def _read(self, source: Any, shard: Shard, index: SampleIndex, progress: _Progress) -> Sample | Excluded:
        row = progress.row = shard.read(index.location)
        progress.stage = "image"
        key = progress.field = find_field(row, source.image, IMAGE_FIELDS)
        content = _content(row, key, source)
        progress.path = content if isinstance(content, str) else None
        subject = subject_of(row, source.subject)
        if self.split is not None and subject is not None:
            # Before the image is read, since it may belong to the other part, or be missing.
            progress.split = True
            if not self.split.contains(row, source.subject, None):
                return Excluded(index.position)
        if isinstance(content, str):
            _check_file(content, key)
        if self.split is not None and not progress.split:
            contained = self.split.contains(row, source.subject, content)
            progress.split = True
            if not contained:
                return Excluded(index.position)
        progress.stage = "caption"
        # Random choices depend on the epoch and the position only, not on the worker.
        rng = random.Random(f"{self.seed} {index.position}")
        rule, caption = caption_of(source, row, rng, self.fixed_captions)
        progress.stage = "image"
        image, header = self._decode(content, source.window)
        progress.stage = "modality"
        modality = modality_of(source, row, rule, caption, header)
        if self.shorten is not None:
            # After the modality, which any part of the caption may name.
            caption = self.shorten(caption, random.Random(f"{self.seed} {index.position} sentences"))
        progress.stage = "prepare"
        if self.augmentation is not None:
            # Likewise: a resumed run sees the same images.
            rng = random.Random(f"{self.seed} {index.position} augmentation")
            chosen = self.augmentation[MODALITIES[modality] if modality != UNKNOWN_MODALITY else UNKNOWN_LIKE]
            image = augment(image, chosen, rng, caption, self.draft or 0)
        return {
            "image": image if self.prepare is None else self.prepare(image),
            "caption": caption,
            "modality": modality,
            "source": index.source,
            "shard": index.shard,
            "row": index.row,
            "subject": subject,
            "label": label_of(row, source.label),
            "origin": label_of(row, "source"),
            "key": _key(row, shard, source.image),
            "position": index.position,
        }

    def _decode(self, content: Any, window: Any) -> tuple[Image.Image, str | None]:
        medical = is_medical_image(content)
        try:
            image, header = load_image(content, window=window, draft=self.draft, max_pixels=MAX_PIXELS)
        except ImportError as error:
            raise SampleError("missing package", str(error)) from None
        except ImageTooLargeError as error:
            raise SampleError("too many pixels", str(error)) from None
        except MedicalImageError as error:
            raise SampleError("unreadable DICOM or NIfTI", str(error)) from None
        return (image if isinstance(image, Image.Image) else _picture(image, medical)), header


def _picture(pixels: np.ndarray, medical: bool) -> Image.Image:
    """Converts an array from `load_image` to a PIL image: 16-bit integers are kept, others are converted to 8 bits."""
    if medical and pixels.dtype != np.uint8:
        # The window has been applied; 256 gray levels of it are enough, as on a screen.
        pixels = (255 * pixels + 0.5).astype(np.uint8)
    if pixels.dtype == np.uint8 or (pixels.ndim == 2 and pixels.dtype in (np.uint16, np.float32)):
        return Image.fromarray(pixels)
    rgb = to_rgb(pixels, "channels_last").permute(1, 2, 0).numpy()
    return Image.fromarray((rgb + 0.5).astype(np.uint8))


def _content(row: dict[str, Any], key: str | None, source: Any) -> Any:
    """Returns the image of a row, not read: a path, bytes or a decoded image."""
    if key is None:
        wanted = f"`{source.image}`" if source.image is not None else "with an image"
        raise SampleError("no image field", f"the row has no field {wanted}; specify it with `image`", source.image)
    content = row[key]
    if isinstance(content, dict):
        content = content["bytes"] if content.get("bytes") is not None else content.get("path")
    if isinstance(content, os.PathLike):
        content = os.fspath(content)
    if content is None or content == "" or content == b"" or (isinstance(content, float) and content != content):
        raise SampleError("no image", "the image is empty", key)
    if isinstance(content, (bytearray, memoryview)):
        content = bytes(content)
    if not isinstance(content, (str, bytes, Image.Image)) and not is_medical_image(content):
        raise SampleError("image is not a path", f"the image is a {type(content).__name__}, not a path", key)
    return content


def _check_file(path: str, key: str | None) -> None:
    if _URL.search(path):
        raise SampleError("image is a URL", "streams do not download; download the image and specify its path", key)
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a null byte, or characters that file systems do not allow
        raise SampleError(
            "image is not a path", "the image's path has characters that are not allowed in paths", key
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise SampleError("image is not a file", f"the image's path is {kind}", key)


def _to_sample_error(error: Exception, shard: Shard, progress: _Progress) -> SampleError:
    """Converts an exception to a `SampleError`.

    Raises:
        Exception: The error itself, if it is unexpected and `STRICT` is set.
    """
    field, stage = progress.field, progress.stage
    if isinstance(error, SampleError):
        return error
    if isinstance(error, ShardError):
        return SampleError(error.cause, str(error))
    if isinstance(error, FileNotFoundError):
        if stage == "row" or str(error.filename) == shard.name:
            return SampleError("missing shard", f"{shard.name} does not exist")
        return SampleError("missing image", "the file does not exist", field)
    if stage == "row" and isinstance(error, (OSError, ValueError, pyarrow.ArrowException)):
        if isinstance(shard, TarShard):
            return SampleError("truncated shard", "the tar ends inside this sample; copy or create it again")
        return SampleError("unreadable row", f"the row cannot be read ({type(error).__name__}); create the file again")
    if stage == "image" and isinstance(error, (OSError, ValueError)):
        return SampleError("unreadable image", str(error), field)
    if stage == "prepare" and isinstance(error, ValueError):
        return SampleError("unusable image", str(error), field)
    if os.environ.get(STRICT):
        raise error
    last = traceback.extract_tb(error.__traceback__)[-1]
    return SampleError(
        f"unexpected {type(error).__name__}",
        f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}; please report it",
        field,
    )


def _where(progress: _Progress, shard: Shard) -> tuple[str, str]:
    """Returns the path that is shown for a fault, and the file that it is counted for."""
    if progress.path is not None:
        return progress.path, progress.path
    key = None if progress.row is None else progress.row.get("__key__")
    return (f"{shard.name}/{key}" if key is not None else shard.name), shard.name


def _key(row: dict[str, Any], shard: Shard, image: str | None) -> str:
    """Returns the name of a sample: its key in a tar, the path of its `image` in a table, else its shard."""
    if "__key__" in row:
        return f"{shard.name}/{row['__key__']}"
    named = row.get("id")
    fields = IMAGE_FIELDS if image is None else (image, *IMAGE_FIELDS)
    path = next((row[name] for name in fields if isinstance(row.get(name), str)), None)
    return str(path or named or shard.name)
