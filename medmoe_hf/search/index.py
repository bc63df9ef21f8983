"""Search in a folder of embeddings: faiss indexes that are built once, from shards as they stream, and then mapped.

Up to `EXACT` pairs everything is compared. Above, pairs go in segments of `SEGMENT`, each with inverted lists that
share one set of centroids: so building takes the memory of one segment, and searching that of the lists it probes.
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
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.errors import ArgumentError, EncodeError, MissingPackageError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.search.encode import FinishedShard, finished_shards, model_fingerprint, read_shard

try:
    import faiss
except ImportError:  # only search needs it
    faiss = None

EXACT = 100_000
SEGMENT = 250_000
LISTS = 1024
PROBES = 64
"""Inverted lists that a query reads, of `LISTS`."""

_TRAINED_ON = 64  # vectors for each centroid
_COLUMNS = {"images": "image_embeds", "reports": "text_embeds"}
Among = Literal["images", "reports"]


@dataclass(frozen=True)
class Hit:
    """A pair that was found.

    Attributes:
        score: cosine of the query and the pair's image or report.
        source, shard, row, key: where it stands.
        modality, probability: where the image router sends its image.
        caption: its report, if it was kept.
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
    def place(self) -> str:
        """The image's file, or the shard and the row where it has none of its own."""
        return f"{self.shard}, row {self.row}" if self.key == self.shard else self.key

    def __str__(self) -> str:
        said = "" if self.caption is None else f"  {self.caption}"
        return f"{self.score:.3f}  {self.modality} ({self.probability:.2f})  {self.place}{said}"


def hits_table(hits: Sequence[Hit], among: Among) -> str:
    """Hits in columns under a header, and what a reader has to know about them.

    Args:
        hits: at least one.
        among: what was searched.
    """
    # A source is called by its path unless it has a name, and then the images' paths say it too.
    named = not all(hit.place.startswith(hit.source) for hit in hits)
    captions = hits[0].caption is not None
    rows = [["cosine", "routed to", *["source"] * named, "image", *["report"] * captions]]
    for hit in hits:
        routed = f"{hit.modality} ({hit.probability:.2f})"
        said = [] if hit.caption is None else [" ".join(hit.caption.split())]
        rows.append([f"{hit.score:.3f}", routed, *[hit.source] * named, hit.place, *said])
    lines = [text_table(rows)]
    if among == "reports" and not captions:
        lines.append("These are the images of the reports. The reports themselves were not kept: encode with")
        lines.append("--keep-captions to see them here.")
    return "\n".join(lines)


class EmbeddingIndex:
    """The images or the reports of a folder of embeddings, ready to be searched.

    Args:
        out: the folder. Its index is built if there is none, or if the shards are others by now.
        among: what is searched.

    Attributes:
        manifest: what the folder was made from.

    Raises:
        ImportError: without faiss.
        EncodeError: if the folder is none, empty or not finished, or one of its shards is damaged.
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
        place = Path(out) / "index" / among
        if _facts_of(place) != facts:
            _build(place, facts, self._shards, self.manifest)
        # Mapped and not read: what a query does not look at stays on the disk.
        self._segments = [
            faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if exact else faiss.IO_FLAG_MMAP)
            for path in sorted(place.glob("segment-*.faiss"))
        ]
        self._modalities = np.load(place / "modality.npy", mmap_mode="r")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, query: np.ndarray, k: int = 10, modality: str | None = None) -> list[Hit]:
        """The pairs nearest to an embedding, the nearest first.

        Args:
            query: (D,), of length 1.
            k: how many.
            modality: only pairs whose image is sent to this expert: its name in the manifest.

        Raises:
            ValueError: for a modality that the model does not have.
        """
        selector, there = None, len(self)
        if modality is not None:
            if modality not in self.manifest["modalities"]:
                raise ArgumentError(f"There is no modality {modality}, but {', '.join(self.manifest['modalities'])}.")
            wanted = self._modalities == self.manifest["modalities"].index(modality)
            there = int(wanted.sum())
            selector = faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))
        k = min(k, there)
        if k < 1:
            return []
        found = self._nearest(query, k, selector, PROBES)
        if len(found) < k:
            # The lists that were read hold too few of this modality: read them all.
            found = self._nearest(query, k, selector, LISTS)
        return self._hits(found)

    def _nearest(self, query: np.ndarray, k: int, selector: Any, probes: int) -> list[tuple[float, int]]:
        """(score, row) of all segments together."""
        found: list[tuple[float, int]] = []
        for segment in self._segments:
            if isinstance(segment, faiss.IndexIVF):
                parameters = faiss.SearchParametersIVF(sel=selector, nprobe=probes)
            else:
                parameters = faiss.SearchParameters(sel=selector)
            scores, rows = segment.search(query.astype(np.float32)[None], k, params=parameters)
            pairs = zip(scores[0].tolist(), rows[0].tolist(), strict=True)
            # A row of -1 says that there were not as many.
            found += [(score, row) for score, row in pairs if row >= 0]
        return sorted(found, key=lambda one: (-one[0], one[1]))[:k]

    def _hits(self, found: Sequence[tuple[float, int]]) -> list[Hit]:
        columns = ["source", "shard", "row", "key", "modality", "probability"]
        columns += ["caption"] if self.manifest["keep_captions"] else []
        hits: dict[int, Hit] = {}
        scores = {row: score for score, row in found}
        by_shard = groupby(sorted(scores), key=lambda row: int(np.searchsorted(self._starts, row, side="right")) - 1)
        for number, rows in by_shard:
            # A file that is read for a row or two: without its embeddings it is small.
            table = read_shard(self._shards[number].path, columns)
            for row in rows:
                fields = table.slice(row - self._starts[number], 1).to_pylist()[0]
                hits[row] = Hit(score=scores[row], **fields)
        return [hits[row] for _, row in found]


def _facts_of(place: Path) -> dict[str, Any] | None:
    """What an index was built from; None without one, or if its files are not as long as they were."""
    try:
        facts = json.loads((place / "index.json").read_text(encoding="utf-8"))
        sizes = facts.pop("sizes")
        return facts if sizes == _sizes_of(place) else None
    except (OSError, ValueError, LookupError, AttributeError):
        return None


def _sizes_of(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in place.iterdir() if path.name != "index.json"}


def _vectors(shard: FinishedShard, column: str) -> np.ndarray:
    """(n, D) float32 of one shard."""
    values = read_shard(shard.path, [column]).column(column).combine_chunks()
    return values.flatten().to_numpy().astype(np.float32).reshape(len(values), values.type.list_size)


def _build(place: Path, facts: dict[str, Any], shards: Sequence[FinishedShard], manifest: dict[str, Any]) -> None:
    column, total = facts["column"], sum(shard.rows for shard in shards)
    # Before an index is trained on them: every byte is read below in any case.
    for shard in progress(shards, "checking shards", "shard"):
        shard.check()
    # As precise as what is on disk: nothing is lost.
    code = "SQfp16" if manifest["dtype"] == "float16" else "Flat"
    size = pyarrow.parquet.read_schema(shards[0].path).field(column).type.list_size
    exact = facts["exact"]
    empty = faiss.index_factory(size, code if exact else f"IVF{LISTS},{code}", faiss.METRIC_INNER_PRODUCT)
    if not exact:
        # Vectors and not their distances from a centroid: those would be rounded once more.
        empty.by_residual = False
        empty.train(_some_vectors(shards, column, _TRAINED_ON * LISTS))
    modalities = np.zeros(total, np.uint8)
    with atomic_dir(place, force=True) as partial:
        segment, segments, row = faiss.clone_index(empty), 0, 0
        for shard in progress(shards, f"indexing {place.name}", "shard"):
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
    """(count, D) or a few less, from shards all over the folder: neighbours in a source are alike."""
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
    """The images that are nearest to a text or an image, or whose report is; each image file once.

    An image that stands in several pairs, with a report each, is given with the nearest of them.

    Args:
        out: a folder that `encode_sources` wrote.
        text, image: the query, one of the two: a sentence, or an image file (DICOM and NIfTI too).
        among: whether images or reports are compared with it.
        modality: name, alias or id of the expert that the pairs' images are sent to; None for all.
        k: how many images.
        model: folder or Hub id; None takes the one that the embeddings were made with, where it was then.

    Raises:
        EncodeError: if `out` is none, empty or not finished, or of another model.
        ValueError: for both a text and an image, or neither, or an unknown modality.
    """
    if (text is None) == (image is None):
        raise ArgumentError("A search takes either a text or an image (--text or --image).")
    index = EmbeddingIndex(out, among)
    model = index.manifest["model"] if model is None else model
    refuse_missing_folder(model)
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(model).eval()
        processor = MedMoEProcessor.from_pretrained(model)
    if model_fingerprint(loaded, processor) != index.manifest["fingerprint"]:
        raise EncodeError(
            f"{out} was encoded with {index.manifest['model']}, and {model} is another model, or has changed since. "
            "Search with the one that it was encoded with, or encode again."
        )
    if modality is not None:
        modality = loaded.config.modalities[loaded.config.vision_config.modality_ids([modality], 1)[0]]
    if text is not None:
        query = encode_texts(loaded, processor, [text])[0]
    else:
        with torch.inference_mode():
            outputs = loaded.get_image_features(**processor(images=str(image), return_tensors="pt"), local=False)
            query = nn.functional.normalize(outputs.pooler_output[0].float(), dim=-1)
    asked = k
    while True:
        hits = index.search(query.numpy(), asked, modality)
        images: dict[tuple[str, str], Hit] = {}
        for hit in hits:
            images.setdefault((hit.source, hit.place), hit)
        if len(images) >= k or len(hits) < asked:
            return list(images.values())[:k]
        asked *= 2
