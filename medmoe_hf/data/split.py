"""Splits into a training and a validation set, by subject."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from medmoe_hf.data.parsing import subject_of


@dataclass(frozen=True)
class Split:
    """One part of a random split of the data.

    The split depends on subjects and image content only: not on the order of the samples, the seed or other samples.

    Attributes:
        part: The part: `train` or `validation`.
        share: Share of the subjects (of the images, where there is no subject) in the validation set, 0..1.

    Example:
        >>> from medmoe_hf.data.split import Split
        >>> row = {"patient": "P-0017"}
        >>> [Split(part, 0.2).contains(row, "patient", None) for part in ("train", "validation")]
        [True, False]
    """

    part: Literal["train", "validation"]
    share: float

    def contains(self, row: dict[str, Any], subject: str | None, content: Any) -> bool:
        """Returns whether a sample belongs to this part.

        The subject decides. Where there is none, the content of the image does, so that samples with the same image
        are in the same part.

        Args:
            row: Fields of the sample.
            subject: Field with the subject, if any.
            content: The image: a path, bytes or a PIL image. Ignored if the row has a subject.
        """
        name = subject_of(row, subject)
        return self.contains_key([name.encode()] if name is not None else _image_bytes(content))

    def contains_key(self, key: Iterable[bytes]) -> bool:
        """Returns whether the samples with a key, given in pieces, belong to this part."""
        digest = hashlib.blake2b(digest_size=8)
        for piece in key:
            digest.update(piece)
        return (int.from_bytes(digest.digest(), "big") / 2**64 < self.share) == (self.part == "validation")


def _image_bytes(content: Any) -> Iterator[bytes]:
    if isinstance(content, (bytes, bytearray, memoryview)):
        yield bytes(content)
    elif isinstance(content, Image.Image):
        yield content.tobytes()
    elif isinstance(content, str):
        with open(content, "rb") as file:
            while piece := file.read(2**20):
                yield piece
    else:  # a nibabel image, as decoded by `datasets`
        yield np.ascontiguousarray(content.affine).tobytes()
        yield np.ascontiguousarray(content.dataobj).tobytes()
