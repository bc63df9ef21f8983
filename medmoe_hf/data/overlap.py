"""Images that two lists of sources share: leakage between training and test data."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from PIL import Image

from medmoe_hf.data.reading import Sample
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, MissingPackageError

try:
    import imagehash
except ImportError:  # required for the comparison only
    imagehash = None

_BITS = 64
_SHOWN = 20  # pairs in a text


@dataclass(frozen=True)
class _Seen:
    """An image: its source and key, the hash of its pixels, and its perceptual hash."""

    name: str
    exact: bytes
    perceptual: int


@dataclass
class Overlap:
    """The images that two lists of sources share. `str(overlap)` lists the first 20.

    Attributes:
        first: Number of readable images in the first list.
        second: Number of readable images in the second list.
        exact: Pairs of images with equal pixels, each image as `source:key`.
        near: Pairs of images whose perceptual hashes differ in few bits, with the number of bits. Exact pairs are
            excluded.
        skipped: Number of samples that could not be read.
    """

    first: int
    second: int
    exact: list[tuple[str, str]]
    near: list[tuple[str, str, int]]
    skipped: int

    def __str__(self) -> str:
        share = len({pair[1] for pair in self.exact} | {pair[1] for pair in self.near})
        lines = [
            f"{self.first} and {self.second} images ({self.skipped} could not be read): {len(self.exact)} exact "
            f"and {len(self.near)} near duplicates; {share} images of the second list are affected."
        ]
        pairs = [f"  equal      {one}  =  {two}" for one, two in self.exact]
        pairs += [f"  {distance:>2} bits    {one}  ~  {two}" for one, two, distance in self.near]
        lines += pairs[:_SHOWN]
        if len(pairs) > _SHOWN:
            lines.append(f"  and {len(pairs) - _SHOWN} more pairs, which medmoe_hf.data.overlap.find_overlap returns")
        return "\n".join(lines)


class _Hashes:
    """Returns the hashes of an image. A class, so that workers can unpickle it."""

    def __call__(self, image: Image.Image) -> tuple[bytes, int]:
        pixels = image.convert("RGB")
        size = f"{image.width}x{image.height}".encode()
        return (
            blake2b(size + pixels.tobytes(), digest_size=16).digest(),
            int(str(imagehash.phash(pixels)), 16),
        )


def find_overlap(first: Sequence[Any], second: Sequence[Any], distance: int = 4, num_workers: int = 0) -> Overlap:
    """Finds the images that two lists of sources share. Requires `pip install "medmoe_hf[data]"`.

    Args:
        first: Models of `medmoe_hf.data.sources`, none endless.
        second: The sources to compare with.
        distance: Number of bits, 0..12 of 64, in which perceptual hashes (`phash` of imagehash) may differ. 0 to 4
            finds re-encoded and resized copies; more also finds similar images, which are common in medicine.
        num_workers: Number of processes that read.

    Returns:
        The pairs of equal and of similar images.

    Raises:
        ImportError: If imagehash is not installed.
        ValueError: For an endless source, or if `distance` is out of range.

    Example:
        >>> from medmoe_hf.data.overlap import find_overlap
        >>> from medmoe_hf.data.sources import PhantomSource
        >>> train = [PhantomSource(kind="phantom", seed=0, image_size=64, length=6)]
        >>> test = [PhantomSource(kind="phantom", seed=0, image_size=64, length=2)]
        >>> len(find_overlap(train, test).exact)
        2
    """
    if imagehash is None:
        raise MissingPackageError('Comparing images requires the imagehash package: pip install "medmoe_hf[data]".')
    if not 0 <= distance <= 12:
        raise ArgumentError(f"distance must be in 0..12 bits, got {distance}.")
    for source in (*first, *second):
        if source.kind == "phantom" and source.length is None:
            raise ArgumentError("An endless phantom source cannot be compared; specify its `length`.")
    (left, skipped_left), (right, skipped_right) = (_read(part, num_workers) for part in (first, second))
    exact = [(one.name, two.name) for one, two in _pairs(left, right, lambda image: [image.exact])]
    # Hashes that differ in at most d bits are equal in at least one of d + 1 pieces.
    edges = [_BITS * piece // (distance + 1) for piece in range(distance + 2)]

    def pieces(image: _Seen) -> list[tuple[int, int]]:
        return [(low, image.perceptual >> low & ((1 << (high - low)) - 1)) for low, high in pairwise(edges)]

    near = []
    for one, two in _pairs(left, right, pieces):
        bits = (one.perceptual ^ two.perceptual).bit_count()
        if bits <= distance and one.exact != two.exact:
            near.append((one.name, two.name, bits))
    return Overlap(len(left), len(right), exact, near, skipped_left + skipped_right)


def _read(sources: Sequence[Any], num_workers: int) -> tuple[list[_Seen], int]:
    stream = SampleStream(sources, shuffle=False, max_bad_fraction=1.0, num_workers=num_workers, prepare=_Hashes())
    seen = [_Seen(f"{stream.names[sample['source']]}:{_place(stream, sample)}", *sample["image"]) for sample in stream]
    return seen, stream.faults.bad


def _place(stream: SampleStream, sample: Sample) -> str:
    """The image's file or key; or the file that holds it and its row, from 1: no two images have the same name."""
    held = sample["key"] == stream.shards[sample["source"]][sample["shard"]].name
    return f"{sample['key']}, row {sample['row'] + 1}" if held else str(sample["key"])


def _pairs(left: Iterable[_Seen], right: Iterable[_Seen], keys: Any) -> list[tuple[_Seen, _Seen]]:
    """Returns the pairs that share a key, each once, in the order of the second list."""
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
