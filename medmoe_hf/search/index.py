"""Search in a folder of embeddings: faiss indexes that are built once, shard by shard, and then memory-mapped.

Up to `EXACT` pairs the search is exhaustive. Above, pairs are stored in segments of `SEGMENT`, each with inverted
lists that share one set of centroids: building takes the memory of one segment, searching that of the probed lists.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import torch
from torch import nn

from medmoe_hf.common.console import progress, text_table
from medmoe_hf.common.files import atomic_dir
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.errors import ArgumentError, EncodeError, MissingPackageError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.model.modalities_medmoe import UNKNOWN_MODALITY
from medmoe_hf.search.encode import model_fingerprint
from medmoe_hf.search.shards import FinishedShard, finished_shards, read_shard

try:
    import faiss
except ImportError:  # only search needs it
    faiss = None

EXACT = 100_000
SEGMENT = 250_000
LISTS = 1024
PROBES = 64
"""Number of inverted lists, of `LISTS`, that a query reads."""

_TRAINED_ON = 64  # vectors per centroid
_COLUMNS = {"images": "image_embeds", "reports": "text_embeds"}
Among = Literal["images", "reports"]


@dataclass(frozen=True)
class Hit:
    """A pair that was found.

    Attributes:
        score: Cosine of the query and the pair's image or report, -1..1.
        source: Name of the source.
        shard: Name of the source's shard.
        row: Row in the shard, from 0; `location` and tables count from 1.
        key: Key of the sample: the image's file, if it has one of its own.
        modality: Modality of the expert that the image router selects.
        probability: Probability of that expert, 0..1.
        caption: The report, if it was kept.

    Example:
        >>> print(Hit(0.71, "mine", "a.tar", 3, "a.tar", "ct", 0.98))
        0.710  ct (0.98)  a.tar, row 4
    """

    score: float
    source: str
    shard: str
    row: int
    key: str
    modality: str
    probability: float
    caption: str | None = None

    @property
    def location(self) -> str:
        """The image's file, or the shard and the row, from 1, if it has no file of its own."""
        return f"{self.shard}, row {self.row + 1}" if self.key == self.shard else self.key

    def __str__(self) -> str:
        caption = "" if self.caption is None else f"  {self.caption}"
        return f"{self.score:.3f}  {self.modality} ({self.probability:.2f})  {self.location}{caption}"


def hits_table(hits: Sequence[Hit], among: Among) -> str:
    """Formats hits as a table.

    Args:
        hits: At least one hit.
        among: What was searched.

    Returns:
        Aligned columns under a header, and a note if the reports were searched but not kept.
    """
    # An unnamed source is named by its path, which the paths of its images contain anyway.
    named = not all(hit.location.startswith(hit.source) for hit in hits)
    captions = hits[0].caption is not None
    rows = [["cosine", "routed to", *["source"] * named, "image", *["report"] * captions]]
    for hit in hits:
        routed = f"{hit.modality} ({hit.probability:.2f})"
        report = [] if hit.caption is None else [" ".join(hit.caption.split())]
        rows.append([f"{hit.score:.3f}", routed, *[hit.source] * named, hit.location, *report])
    lines = [text_table(rows)]
    if among == "reports" and not captions:
        lines.append("These are the images of the reports. The reports were not kept: encode with --keep-captions")
        lines.append("to show them.")
    return "\n".join(lines)


class EmbeddingIndex:
    """Index of the images or the reports of a folder of embeddings.

    Args:
        out: The folder. Its index is built if there is none, or if the shards have changed.
        among: Whether images or reports are searched.

    Attributes:
        manifest: Model, sources and settings that the embeddings were computed with.

    Raises:
        ImportError: Without faiss.
        EncodeError: If the folder contains no embeddings, is empty or not finished, or a shard is damaged.

    Example:
        ```python
        index = EmbeddingIndex("embeds")
        for hit in index.search(query, k=5, modality="ct"):  # query: (D,) of length 1
            print(hit)
        ```
    """

    def __init__(self, out: str | Path, among: Among = "images") -> None:
        if faiss is None:
            raise MissingPackageError('Searching needs faiss: pip install "medmoe_hf[search]".')
        self.manifest, self._shards = finished_shards(Path(out))
        counts = [shard.rows for shard in self._shards]
        if not sum(counts):
            raise EncodeError(f"{out} is empty: none of its sources' samples could be encoded.")
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        exact = len(self) <= EXACT
        facts = {
            "exact": exact,
            "column": _COLUMNS[among],
            "fingerprint": self.manifest["fingerprint"],
            "shards": [[shard.path.name, shard.rows, shard.checksum] for shard in self._shards],
        }
        folder = Path(out) / "index" / among
        if _facts_of(folder) != facts:
            _build(folder, facts, self._shards, self.manifest)
        # Memory-mapped: what a query does not need stays on disk.
        self._segments = [
            faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if exact else faiss.IO_FLAG_MMAP)
            for path in sorted(folder.glob("segment-*.faiss"))
        ]
        self._modalities = np.load(folder / "modality.npy", mmap_mode="r")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, query: np.ndarray, k: int = 10, modality: str | None = None) -> list[Hit]:
        """Finds the pairs nearest to an embedding.

        Args:
            query: (D,) float array of length 1.
            k: Number of pairs.
            modality: Restricts the search to pairs whose image is routed to this expert: a name in the manifest.

        Returns:
            At most `k` hits, the nearest first.

        Raises:
            ValueError: For a modality that the model does not have.

        Example:
            ```python
            hits = index.search(query, k=5, modality="ct")
            ```
        """
        selector, available = None, len(self)
        if modality is not None:
            if modality not in self.manifest["modalities"]:
                raise ArgumentError(
                    f"There is no modality {modality}; known: {', '.join(self.manifest['modalities'])}."
                )
            wanted = self._modalities == self.manifest["modalities"].index(modality)
            available = int(wanted.sum())
            selector = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
        k = min(k, available)
        if k < 1:
            return []
        found = self._nearest(query, k, selector, PROBES)
        if len(found) < k:
            # The probed lists contain too few pairs of this modality: read all of them.
            found = self._nearest(query, k, selector, LISTS)
        return self._hits(found)

    def _nearest(self, query: np.ndarray, k: int, selector: Any, probes: int) -> list[tuple[float, int]]:
        """(score, row) of the nearest pairs in all segments."""
        found: list[tuple[float, int]] = []
        for segment in self._segments:
            if isinstance(segment, faiss.IndexIVF):
                parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            else:
                parameters = faiss.SearchParameters(sel=selector)
            scores, rows = segment.search(query.astype(np.float32)[None], k, params=parameters)
            pairs = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
            # A row of -1 means that fewer were found.
            found += [(score, row) for score, row in pairs if row >= 0]
        return sorted(found, key=lambda one: (-one[0], one[1]))[:k]

    def _hits(self, found: Sequence[tuple[float, int]]) -> list[Hit]:
        columns = ["source", "shard", "row", "key", "modality", "probability"]
        columns += ["caption"] if self.manifest["keep_captions"] else []
        hits: dict[int, Hit] = {}
        scores = {row: score for score, row in found}
        by_shard = groupby(sorted(scores), key=lambda row: int(np.searchsorted(self._starts, row, side="right")) - 1)
        for number, rows in by_shard:
            # Read for a few rows only: without the embeddings the file is small.
            table = read_shard(self._shards[number].path, columns)
            for row in rows:
                fields = table.slice(row - self._starts[number], 1).to_pylist()[0]
                hits[row] = Hit(score=scores[row], **fields)
        return [hits[row] for _, row in found]


def _facts_of(folder: Path) -> dict[str, Any] | None:
    """What an index was built from; None without an index, or if the size of a file differs."""
    try:
        facts = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        sizes = facts.pop("sizes")
        return facts if sizes == _sizes_of(folder) else None
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def _sizes_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "index.json"}


def _vectors(shard: FinishedShard, column: str) -> np.ndarray:
    """(n, D) float32 of one shard."""
    values = read_shard(shard.path, [column]).column(column).combine_chunks()
    flat: np.ndarray = values.flatten().to_numpy().astype(np.float32)
    return flat.reshape(len(values), values.type.list_size)


def _build(folder: Path, facts: dict[str, Any], shards: Sequence[FinishedShard], manifest: dict[str, Any]) -> None:
    column, total = facts["column"], sum(shard.rows for shard in shards)
    # Before an index is trained on them; every byte is read below anyway.
    for shard in progress(shards, "checking shards", "shard"):
        shard.check()
    # The precision of the shards: nothing is lost.
    code = "SQfp16" if manifest["dtype"] == "float16" else "Flat"
    size = pyarrow.parquet.read_schema(shards[0].path).field(column).type.list_size
    exact = facts["exact"]
    empty = faiss.index_factory(size, code if exact else f"IVF{LISTS},{code}", faiss.METRIC_INNER_PRODUCT)
    if not exact:
        # Vectors, not residuals: those would be rounded again.
        empty.by_residual = False
        empty.train(_some_vectors(shards, column, _TRAINED_ON * LISTS))
    modalities = np.zeros(total, np.uint8)
    with atomic_dir(folder, force=True) as partial:
        segment, segments, row = faiss.clone_index(empty), 0, 0
        for shard in progress(shards, f"indexing {folder.name}", "shard"):
            names = read_shard(shard.path, ["modality"]).column("modality").to_pylist()
            if not names:
                continue
            vectors = _vectors(shard, column)
            modalities[row : row + len(names)] = [manifest["modalities"].index(name) for name in names]
            if exact:
                segment.add(vectors)
            else:
                segment.add_with_ids(vectors, np.arange(row, row + len(names)))
            row += len(names)
            if segment.ntotal >= SEGMENT or row == total:
                faiss.write_index(segment, str(partial / f"segment-{segments:06d}.faiss"))
                segment, segments = faiss.clone_index(empty), segments + 1
        np.save(partial / "modality.npy", modalities)
        recorded = {**facts, "sizes": _sizes_of(partial)}
        (partial / "index.json").write_text(json.dumps(recorded) + "\n", encoding="utf-8")


def _some_vectors(shards: Sequence[FinishedShard], column: str, count: int) -> np.ndarray:
    """(n, D) with n <= count, from random shards: neighbouring samples of a source are similar."""
    order = np.random.default_rng(0).permutation(len(shards))
    parts: list[np.ndarray] = []
    for number in order.tolist():
        parts.append(_vectors(shards[number], column)[:count])
        count -= len(parts[-1])
        if not count:
            break
    return np.concatenate(parts)


def search(
    out: str | Path,
    text: str | None = None,
    image: str | Path | None = None,
    *,
    among: Among = "images",
    modality: str | None = None,
    k: int = 10,
    model: str | Path | None = None,
) -> list[Hit]:
    """Finds the images that are nearest to a text or an image, or whose report is; each image file once.

    An image that belongs to several pairs, each with a report, is returned with the nearest of them.

    Args:
        out: A folder that `encode_sources` wrote.
        text: Sentence to search for; either `text` or `image` is required.
        image: Image file to search for (DICOM and NIfTI too).
        among: Whether images or reports are compared with the query.
        modality: Name, alias or id of the expert that the images are routed to; None for all.
        k: Number of images.
        model: Folder or Hub id; None uses the one that the embeddings were computed with, at its path then.

    Returns:
        At most `k` hits, the nearest first.

    Raises:
        EncodeError: If `out` contains no embeddings, is empty, not finished or of another model.
        ValueError: For both a text and an image, or neither, or an unknown modality.

    Example:
        ```python
        for hit in search("embeds", text="a large pleural effusion", k=5):
            print(hit.score, hit.modality, hit.source, hit.key)
        ```
    """
    if (text is None) == (image is None):
        raise ArgumentError("A search takes either a text or an image (--text or --image).")
    index = EmbeddingIndex(out, among)
    model = index.manifest["model"] if model is None else model
    folder = find_checkpoint(model)
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(folder).eval()
        processor = MedMoEProcessor.from_pretrained(folder)
    if model_fingerprint(loaded, processor) != index.manifest["fingerprint"]:
        raise EncodeError(
            f"{out} was encoded with {index.manifest['model']}, and {model} is another model, or has changed since. "
            "Search with the model that it was encoded with, or encode again."
        )
    if modality is not None:
        number = loaded.config.vision_config.modality_ids([modality], 1)[0]
        if number == UNKNOWN_MODALITY:
            known = ", ".join(loaded.config.modalities.values())
            raise ArgumentError(f"`modality` {modality!r} names no expert; known: {known}.")
        modality = loaded.config.modalities[number]
    if text is not None:
        query = encode_texts(loaded, processor, [text])[0]
    else:
        with torch.inference_mode():
            outputs = loaded.get_image_features(**processor(images=str(image), return_tensors="pt"), local=False)
            query = nn.functional.normalize(outputs.pooler_output[0].float(), dim=-1)
    requested = k
    while True:
        hits = index.search(query.numpy(), requested, modality)
        images: dict[tuple[str, str], Hit] = {}
        for hit in hits:
            images.setdefault((hit.source, hit.location), hit)
        if len(images) >= k or len(hits) < requested:
            return list(images.values())[:k]
        requested *= 2
