"""From a row of a source to a training pair, or to a fault with its reason; what a stream's workers run.

Nothing that a file holds may end a run: whatever a reader raises becomes a `Fault`. Reasons say where and what is
wrong, and never quote a caption or a header, which may be about patients.
"""

import hashlib
import os
import random
import re
import stat
import string
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from torch.utils.data import Dataset

from medmoe_hf.data.captions import RULE_MODALITY, apply_rule, detect_rule, is_empty
from medmoe_hf.data.modality_words import modality_from_text
from medmoe_hf.data.shards import Shard, TarShard
from medmoe_hf.data.sources import CAPTION_FIELDS, IMAGE_FIELDS, PhantomSource, field_of
from medmoe_hf.errors import CaptionError, ImageTooLargeError, MedicalImageError, ShardError
from medmoe_hf.model.image_files_medmoe import load_image
from medmoe_hf.model.image_processing_medmoe import to_rgb
from medmoe_hf.model.medical_images_medmoe import MAX_PIXELS, is_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY, modality_id

STRICT = "MEDMOE_STRICT_READERS"
"""Environment variable: where it is set, exceptions that no reader expects are raised and not counted. For tests."""

LABEL_FIELDS = ("cls", "modality")
"""Fields that hold the modality where a source does not say which one does."""

_UNKNOWN = ("unknown", "Unknown", "UNKNOWN", b"unknown")
_ADDRESS = re.compile(r"(?:^|[/\\])(?:https?|ftp|s3|gs|hf):[/\\]")  # also after a folder was put in front of it


class Place(NamedTuple):
    """Where a sample of the stream is: its position in the epoch, its source, shard and row, and the shard's own words
    for the row."""

    position: int
    source: int
    shard: int
    where: Any
    row: int = -1


Sample = dict[str, Any]
"""One training pair: `image` (a PIL image, or what the stream's `prepare` made of it), `caption`, `modality` (id, or
-100), `source`, `shard` and `row` (their numbers), `subject` and `label` (what it shows; None where the source
has none), `key` (what it is called there) and `position` (in the epoch)."""


@dataclass(frozen=True)
class Fault:
    """A sample that cannot be used.

    Attributes:
        cause: the kind of fault, in a few words; what is counted.
        reason: what is wrong with this one, and how to mend it; nothing that was in it.
        field: the field that is to blame, None where it is not one.
        path: the image's file; for samples inside a file that file, with the sample's name.
        file: the file itself.
        source, shard, row, position: where it stands; row and position are -1 for a whole shard.
    """

    cause: str
    reason: str
    field: str | None
    path: str
    file: str
    source: int
    shard: int
    row: int
    position: int


@dataclass(frozen=True)
class OtherPart:
    """A sample that belongs to the other part of the split."""

    position: int


class Problem(Exception):
    """A sample's fault on its way to becoming a `Fault`; see there for `cause`, `reason` and `field`."""

    def __init__(self, cause: str, reason: str = "", field: str | None = None) -> None:
        super().__init__(cause)
        self.cause, self.reason, self.field = cause, reason, field


@dataclass(frozen=True)
class Split:
    """Which part of the data a stream reads.

    Attributes:
        part: `train` or `validation`.
        share: of the subjects (or images) that validation gets, 0..1.
        salt: another one gives another split.
    """

    part: Literal["train", "validation"]
    share: float
    salt: str = ""

    def wants(self, row: dict[str, Any], subject: str | None, content: Any) -> bool:
        """Whether a sample belongs to this part: by its subject where there is one, else by its image's content, so
        that an image that stands in several samples is on one side only.

        Args:
            row: the sample's fields.
            subject: the field that holds the subject, or None.
            content: the image: a path, bytes or a picture. Not looked at where the row has a subject.
        """
        name = subject_of(row, subject)
        return self.wants_key([name.encode()] if name is not None else _pieces(content))

    def wants_key(self, pieces: Iterator[bytes] | Sequence[bytes]) -> bool:
        """The same for what decides, in pieces."""
        digest = hashlib.blake2b(digest_size=8, key=self.salt.encode()[:64])
        for piece in pieces:
            digest.update(piece)
        return (int.from_bytes(digest.digest(), "big") / 2**64 < self.share) == (self.part == "validation")


def subject_of(row: dict[str, Any], field: str | None) -> str | None:
    """Whose image a row is: the text of its subject field, the same for 7, 7.0 and " 7 "; None for an empty cell.

    Raises:
        Problem: if the row lacks the field.
    """
    if field is None:
        return None
    if field not in row:
        raise Problem("no subject field", f"the row has no field `{field}`, which `subject` names", field)
    value = row[field]
    if is_empty(value):
        return None
    text = value.decode("utf-8", errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
    return re.sub(r"\.0+$", "", text.strip()) if re.fullmatch(r"-?\d+\.0+", text.strip()) else text.strip()


def label_of(row: dict[str, Any], field: str | None) -> str | int | float | None:
    """What an image shows, of several labels all in one order; None where nothing is said, or no word or number.

    Args:
        row: the sample's fields.
        field: the one that holds it; None for `label`. Elsewhere that may be anything: a mask, say, is no label.
    """
    value = row.get(field or "label")
    if isinstance(value, (bytes, bytearray)):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)) and all(isinstance(part, (str, int)) for part in value):
        value = ", ".join(sorted(map(str, value)))
    return None if is_empty(value) or not isinstance(value, (str, int, float)) else value


def _pieces(content: Any) -> Iterator[bytes]:
    if isinstance(content, (bytes, bytearray, memoryview)):
        yield bytes(content)
    elif isinstance(content, Image.Image):
        yield content.tobytes()
    elif isinstance(content, str):
        with open(content, "rb") as file:
            while piece := file.read(2**20):
                yield piece
    else:  # a nibabel image, as `datasets` decodes them
        yield np.ascontiguousarray(content.affine).tobytes()
        yield np.ascontiguousarray(content.dataobj).tobytes()


def caption_of(source: Any, row: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """The caption of a row, and the rule that it was taken by.

    Raises:
        Problem, CaptionError: if there is none.
    """
    if source.caption_template is not None:
        return "plain", _filled(source.caption_template, row)
    key = field_of(row, source.caption, CAPTION_FIELDS)
    if key is None:
        wanted = f"`{source.caption}`" if source.caption is not None else ", ".join(CAPTION_FIELDS)
        raise Problem("no caption field", f"the row has no field {wanted}; name it by `caption`", source.caption)
    text = row[key]
    if is_empty(text):
        raise Problem("empty caption", "the caption is empty", key)
    text = _text(text, key)
    rule = detect_rule(text) if source.caption_rule == "auto" else source.caption_rule
    try:
        return rule, apply_rule(rule, text, rng)
    except CaptionError as error:
        raise Problem("caption of another layout", str(error), key) from None


def _text(value: Any, key: str) -> str:
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Problem("caption is no UTF-8", "the caption's bytes are no UTF-8; save it as such", key) from None
    if not isinstance(value, str):
        kind = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")
        raise Problem("caption is no text", f"the caption is {kind}; one text is expected", key)
    return value


def _filled(template: str, row: dict[str, Any]) -> str:
    """A template with a row's values; empty cells are left out, and of them alone no caption is made."""
    try:
        names = {re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name}
        missing = sorted(names - row.keys())
        if missing:
            raise Problem(f"no field {missing[0]}", f"the row has no field `{missing[0]}`", missing[0])
        values = {name: "" if is_empty(row[name]) else row[name] for name in names}
        if names and all(value == "" for value in values.values()):
            raise Problem("empty caption", "every field of `caption_template` is empty", min(names))
        for name, value in values.items():
            if isinstance(value, (bytes, bytearray)):
                values[name] = _text(value, name).strip()
        return template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        raise Problem(
            "caption template does not fit", f"the row's values do not fit `caption_template` {template!r}"
        ) from None


def modality_of(source: Any, row: dict[str, Any], rule: str, caption: str, header: str | None) -> int:
    """The modality of a pair, -100 where it stays unknown.

    Args:
        source: a model of `medmoe_hf.data.sources`; its `modality` says where to look.
        row: the sample's fields.
        rule: of the caption.
        caption: as it is trained on.
        header: what the image's header says, None where it says nothing or was not read yet.

    Raises:
        Problem: for a value that names no modality.
    """
    for way in _ways(source, row, rule):
        if way == "unknown":
            return UNKNOWN_MODALITY
        key = way.removeprefix("field:") if way.startswith("field:") else None
        if way == "caption":
            name: Any = modality_from_text(caption)
        elif way == "dicom":
            name = header
        elif key is None:
            name = way
        elif key in row:
            name = row[key]
        elif isinstance(source.modality, list):
            continue
        else:
            raise Problem(f"no field {key}", f"the row has no field `{key}`, which `modality` names", key)
        try:
            found = UNKNOWN_MODALITY if is_empty(name) or name in _UNKNOWN else modality_id(name)
        except ValueError:
            known = ", ".join(MODALITIES)
            raise Problem("wrong label", f"the label is no modality; known are {known} or 0 to 5", key) from None
        if found != UNKNOWN_MODALITY:
            return found
    return UNKNOWN_MODALITY


def _ways(source: Any, row: dict[str, Any], rule: str) -> list[str]:
    """Where to look for the modality of a row, in order."""
    if isinstance(source.modality, list):
        return source.modality
    if source.modality is not None:
        return [source.modality]
    of_rule = RULE_MODALITY.get(rule)
    if of_rule is not None:
        return [of_rule]
    return [f"field:{key}" for key in ("modality", "cls") if key in row][:1]


def known_modality(source: Any) -> int | None:
    """The modality of all pairs of a source, so far as it is known before an image is read: -100 where nothing is, or
    None where each row has its own."""
    if source.modality is None:
        if isinstance(source, PhantomSource):
            # Drawing all of them in advance would take as long as training on them.
            return modality_id(source.modalities[0]) if len(source.modalities) == 1 else UNKNOWN_MODALITY
        of_rule = RULE_MODALITY.get(_rule(source))
        return None if of_rule is None else modality_id(of_rule)
    for way in source.modality if isinstance(source.modality, list) else [source.modality]:
        if way == "caption" or way.startswith("field:"):
            return UNKNOWN_MODALITY if isinstance(source, PhantomSource) else None
        if way != "dicom":
            try:
                return modality_id(way)
            except ValueError:
                return UNKNOWN_MODALITY
    return UNKNOWN_MODALITY


def modality_before_reading(source: Any, row: dict[str, Any]) -> int:
    """What a row alone says about its modality, -100 where only the image's header tells, or nothing does.

    Args:
        source: a model of `medmoe_hf.data.sources`.
        row: the sample's fields, those of `fields_before_reading` at least.
    """
    try:
        rule, caption = _rule(source), ""
        if _needs_caption(source):
            # Where a rule draws one of several sentences, one of them stands for all.
            rule, caption = caption_of(source, row, random.Random(0))
        return modality_of(source, row, rule, caption, None)
    except (Problem, CaptionError):
        return UNKNOWN_MODALITY  # the reader counts it


def fields_before_reading(source: Any) -> set[str]:
    """The fields that `modality_before_reading` looks at."""
    ways = source.modality if isinstance(source.modality, list) else [source.modality or ""]
    fields = {way.removeprefix("field:") for way in ways if way.startswith("field:")}
    if source.modality is None:
        fields |= set(LABEL_FIELDS)
    if _needs_caption(source):
        fields |= {source.caption} if source.caption is not None else set(CAPTION_FIELDS)
        fields |= template_fields(source)
    return fields


def template_fields(source: Any) -> set[str]:
    """The fields that a source's `caption_template` is made of."""
    try:
        parts = list(string.Formatter().parse(source.caption_template or ""))
    except ValueError:
        return set()
    return {re.split(r"[.\[]", name)[0] for _, name, _, _ in parts if name}


def _needs_caption(source: Any) -> bool:
    ways = source.modality if isinstance(source.modality, list) else [source.modality]
    return "caption" in ways or (source.modality is None and _rule(source) == "auto")


def _rule(source: Any) -> str:
    return source.caption_rule if source.caption_template is None else "plain"


@dataclass
class _Progress:
    """How far the reading of a sample has come; what a fault is explained by."""

    stage: str = "row"
    row: dict[str, Any] | None = None
    field: str | None = None
    path: str | None = None
    split: bool = False


class Reader(Dataset):
    """Fetches samples by place; what workers run.

    Args:
        sources: models of `medmoe_hf.data.sources`.
        shards: of each source.
        split: which part of the data; None for all.
        prepare: called on each decoded image.
        draft: side in pixels that JPEGs need not exceed when they are decoded; None for the whole.
        seed: of what is random in captions, and the epoch.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        shards: list[list[Shard]],
        split: Split | None,
        prepare: Callable[[Image.Image], Any] | None,
        draft: int | None,
        seed: tuple[int, int],
    ) -> None:
        self.sources, self.shards, self.split = sources, shards, split
        self.prepare, self.draft, self.seed = prepare, draft, seed

    def __getitem__(self, place: Place) -> Sample | Fault | OtherPart:
        source, shard = self.sources[place.source], self.shards[place.source][place.shard]
        progress = _Progress()
        try:
            return self._read(source, shard, place, progress)
        except Exception as error:
            problem = _explained(error, shard, progress)
        if self.split is not None and not progress.split:
            # A sample without a readable image belongs to one part too, and is counted there only.
            name = progress.path or f"{shard.name} {place.row}"
            if not self.split.wants_key([name.encode(errors="surrogateescape")]):
                return OtherPart(place.position)
        path, file = _where(progress, shard)
        return Fault(
            problem.cause,
            problem.reason or problem.cause,
            progress.field if problem.field is None and progress.stage == "image" else problem.field,
            path,
            file,
            place.source,
            place.shard,
            place.row,
            place.position,
        )

    def _read(self, source: Any, shard: Shard, place: Place, progress: _Progress) -> Sample | OtherPart:
        row = progress.row = shard.read(place.where)
        progress.stage = "image"
        key = progress.field = field_of(row, source.image, IMAGE_FIELDS)
        content = _content(row, key, source)
        progress.path = content if isinstance(content, str) else None
        subject = subject_of(row, source.subject)
        if self.split is not None and subject is not None:
            # Before the image is read: it may lie in the other part, or be missing.
            progress.split = True
            if not self.split.wants(row, source.subject, None):
                return OtherPart(place.position)
        if isinstance(content, str):
            _check_file(content, key)
        if self.split is not None and not progress.split:
            wanted = self.split.wants(row, source.subject, content)
            progress.split = True
            if not wanted:
                return OtherPart(place.position)
        progress.stage = "caption"
        # A random choice belongs to a position of an epoch, whoever reads it.
        rule, caption = caption_of(source, row, random.Random(f"{self.seed} {place.position}"))
        progress.stage = "image"
        image, header = self._decode(content, source.window)
        progress.stage = "modality"
        modality = modality_of(source, row, rule, caption, header)
        progress.stage = "prepare"
        return {
            "image": image if self.prepare is None else self.prepare(image),
            "caption": caption,
            "modality": modality,
            "source": place.source,
            "shard": place.shard,
            "row": place.row,
            "subject": subject,
            "label": label_of(row, source.label),
            "key": _key(row, shard),
            "position": place.position,
        }

    def _decode(self, content: Any, window: Any) -> tuple[Image.Image, str | None]:
        medical = is_medical_image(content)
        try:
            image, header = load_image(content, window=window, draft=self.draft, max_pixels=MAX_PIXELS)
        except ImportError as error:
            raise Problem("missing package", str(error)) from None
        except ImageTooLargeError as error:
            raise Problem("too many pixels", str(error)) from None
        except MedicalImageError as error:
            raise Problem("unreadable DICOM or NIfTI", str(error)) from None
        return (image if isinstance(image, Image.Image) else _picture(image, medical)), header


def _picture(pixels: np.ndarray, medical: bool) -> Image.Image:
    """An array as `load_image` gives it, as a PIL image: whole numbers of 16 bits stay, others become 8 bits."""
    if medical and pixels.dtype != np.uint8:
        # The window is chosen by now: 256 grey levels of it are what a screen shows.
        pixels = (255 * pixels + 0.5).astype(np.uint8)
    if pixels.dtype == np.uint8 or (pixels.ndim == 2 and pixels.dtype in (np.uint16, np.float32)):
        return Image.fromarray(pixels)
    rgb = to_rgb(pixels, "channels_last").permute(1, 2, 0).numpy()
    return Image.fromarray((rgb + 0.5).astype(np.uint8))


def _content(row: dict[str, Any], key: str | None, source: Any) -> Any:
    """What a row has as its image: a path, bytes or a picture. Nothing is read."""
    if key is None:
        wanted = f"`{source.image}`" if source.image is not None else "with an image"
        raise Problem("no image field", f"the row has no field {wanted}; name it by `image`", source.image)
    content = row[key]
    if isinstance(content, dict):
        content = content["bytes"] if content.get("bytes") is not None else content.get("path")
    if isinstance(content, os.PathLike):
        content = os.fspath(content)
    if content is None or content == "" or content == b"" or (isinstance(content, float) and content != content):
        raise Problem("no image", "the image is empty", key)
    if isinstance(content, (bytearray, memoryview)):
        content = bytes(content)
    if not isinstance(content, (str, bytes, Image.Image)) and not is_medical_image(content):
        raise Problem("image is no path", f"the image is a {type(content).__name__}; a path is expected", key)
    return content


def _check_file(path: str, key: str | None) -> None:
    if _ADDRESS.search(path):
        raise Problem("image is an address", "streams fetch nothing; download the image and give its path", key)
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a zero byte, or characters that no file system takes
        raise Problem("image is no path", "the image's path holds characters that no file name has", key) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise Problem("image is no file", f"the image's path leads to {kind}", key)


def _explained(error: Exception, shard: Shard, progress: _Progress) -> Problem:
    """The fault that an exception is.

    Raises:
        Exception: the error itself, if no reader should raise it and `STRICT` is set.
    """
    field, stage = progress.field, progress.stage
    if isinstance(error, Problem):
        return error
    if isinstance(error, ShardError):
        return Problem(error.cause, str(error))
    if isinstance(error, FileNotFoundError):
        if stage == "row" or str(error.filename) == shard.name:
            return Problem("missing shard", f"{shard.name} is not there (any more)")
        return Problem("missing image", "there is no such file", field)
    if stage == "row" and isinstance(error, (OSError, ValueError, pyarrow.ArrowException)):
        if isinstance(shard, TarShard):
            return Problem("truncated shard", "the tar ends inside this sample; copy or make it again")
        return Problem("unreadable row", f"the row cannot be read ({type(error).__name__}); make the file again")
    if stage == "image" and isinstance(error, (OSError, ValueError)):
        return Problem("unreadable image", str(error), field)
    if stage == "prepare" and isinstance(error, ValueError):
        return Problem("unusable image", str(error), field)
    if os.environ.get(STRICT):
        raise error
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Problem(
        f"unexpected {type(error).__name__}",
        f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}; please report it",
        field,
    )


def _where(progress: _Progress, shard: Shard) -> tuple[str, str]:
    """The path that a fault is shown with, and the file that it counts for."""
    if progress.path is not None:
        return progress.path, progress.path
    key = None if progress.row is None else progress.row.get("__key__")
    return (f"{shard.name}/{key}" if key is not None else shard.name), shard.name


def _key(row: dict[str, Any], shard: Shard) -> str:
    """What a sample is called: its key in a tar, its image's path in a table, else its shard."""
    if "__key__" in row:
        return f"{shard.name}/{row['__key__']}"
    named = row.get("id")
    path = next((row[name] for name in IMAGE_FIELDS if isinstance(row.get(name), str)), None)
    return str(path or named or shard.name)
