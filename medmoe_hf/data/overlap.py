"""Images that stand in two lists of sources: the leakage between training and test data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from PIL import Image

from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, MissingPackageError

try:
    import imagehash
except ImportError:  # only the comparison itself needs it
    imagehash = None

_BITS = 64


@dataclass(frozen=True)
class _Seen:
    """One image: where it stands, its pixels' hash, and its perceptual hash."""

    where: str
    exact: bytes
    perceptual: int


@dataclass
class Overlap:
    """What two lists of sources share.

    Attributes:
        first, second: how many images each holds (those that could be read).
        exact: pairs of places whose pixels are equal.
        near: pairs whose perceptual hashes differ in few bits, with the number; exact pairs are not among them.
        skipped: samples that could not be read.
    """

    first: int
    second: int
    exact: list[tuple[str, str]]
    near: list[tuple[str, str, int]]
    skipped: int

    def __str__(self) -> str:
        share = len({pair[1] for pair in self.exact} | {pair[1] for pair in self.near})
        lines = [
            f"{self.first} and {self.second} images ({self.skipped} could not be read): {len(self.exact)} pairs are "
            f"equal, {len(self.near)} look the same; {share} images of the second list are touched."
        ]
        lines += [f"  equal      {one}  =  {two}" for one, two in self.exact]
        lines += [f"  {distance:>2} bits    {one}  ~  {two}" for one, two, distance in self.near]
        return "\n".join(lines)


class _Fingerprint:
    """What a stream's readers make of an image: hashes in place of pixels."""

    def __call__(self, image: Image.Image) -> tuple[bytes, int]:
        pixels = image.convert("RGB")
        size = f"{image.width}x{image.height}".encode()
        return (
            blake2b(size + pixels.tobytes(), digest_size=16).digest(),
            int(str(imagehash.phash(pixels)), 16),
        )


def find_overlap(first: Sequence[Any], second: Sequence[Any], distance: int = 4, num_workers: int = 0) -> Overlap:
    """Compares every image of one list of sources with every one of another.

    Args:
        first, second: models of `medmoe_hf.data.sources`; none endless.
        distance: bits of 64 in which perceptual hashes (imagehash's `phash`) may differ, 0 to 12. 0 to 4 finds
            re-encoded and resized copies; more finds look-alikes too, of which medical images have many.
        num_workers: processes that read.

    Raises:
        ImportError: without the imagehash package.
        ValueError: for an endless source, or a distance out of range.
    """
    if imagehash is None:
        raise MissingPackageError('Comparing images needs the imagehash package: pip install "medmoe_hf[data]".')
    if not 0 <= distance <= 12:
        raise ArgumentError(f"distance must lie in 0..12 bits, got {distance}.")
    for source in (*first, *second):
        if source.kind == "phantom" and source.length is None:
            raise ArgumentError("An endless phantom source cannot be compared; give it a `length`.")
    (left, skipped_left), (right, skipped_right) = (_read(part, num_workers) for part in (first, second))
    exact = [(one.where, two.where) for one, two in _pairs(left, right, lambda image: [image.exact])]
    # Hashes that differ in at most d bits are equal in one of d + 1 pieces.
    edges = [_BITS * piece // (distance + 1) for piece in range(distance + 2)]

    def pieces(image: _Seen) -> list[tuple[int, int]]:
        return [(low, image.perceptual >> low & ((1 << (high - low)) - 1)) for low, high in pairwise(edges)]

    near = []
    for one, two in _pairs(left, right, pieces):
        bits = (one.perceptual ^ two.perceptual).bit_count()
        if bits <= distance and one.exact != two.exact:
            near.append((one.where, two.where, bits))
    return Overlap(len(left), len(right), exact, near, skipped_left + skipped_right)


def _read(sources: Sequence[Any], num_workers: int) -> tuple[list[_Seen], int]:
    stream = SampleStream(
        sources, shuffle=False, max_bad_fraction=1.0, num_workers=num_workers, prepare=_Fingerprint()
    )
    seen = [_Seen(f"{stream.names[sample['source']]}:{sample['key']}", *sample["image"]) for sample in stream]
    return seen, stream.faults.bad


def _pairs(left: Iterable[_Seen], right: Iterable[_Seen], keys: Any) -> list[tuple[_Seen, _Seen]]:
    """Pairs that share a key, each once, in the order of the second list."""
    buckets: dict[Any, list[_Seen]] = defaultdict(list)
    for image in left:
        for key in keys(image):
            buckets[key].append(image)
    found: dict[tuple[int, int], tuple[_Seen, _Seen]] = {}
    for two in right:
        for key in keys(two):
            for one in buckets.get(key, ()):
                found.setdefault((id(one), id(two)), (one, two))
    return list(found.values())
