"""Image and report embeddings of complete sources, as parquet shards: streaming, resumable, on many processes.

A folder of embeddings contains

    encoding.json                         model, sources, their content, precision, number of processes
    embeds-00000-of-00002-000000.parquet  shard 0 of process 0 of 2, then shard 1, ...
    shards-00000-of-00002.json            size and checksum of each shard of process 0
    index/                                what `medmoe search` builds from them

A shard is renamed into the folder once it is complete, and its metadata contain the state of the stream after its last
sample. It is listed before the rename, so every existing shard is listed, and after any interruption the next run
resumes after the newest shard.
"""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.reading import Sample, SampleIndex
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import EncodeError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

MANIFEST = "encoding.json"
FORMAT = 2
"""Version of the folder's format; 1, which search still reads, lacks the sources' content and the list of shards."""
_STATE = b"medmoe"
# A run may be resumed with another value of these: nothing that is written depends on them.
_MAY_DIFFER = ("model",)
# Entries of configurations that do not change an embedding.
_VOLATILE = ("transformers_version", "architectures", "auto_map", "_name_or_path", "dtype", "processor_class")

_MOST_CHANGES = 5  # lines of a message per source


@dataclass
class EncodeRecord:
    """Record of a call of `encode_sources`, over all processes.

    Attributes:
        samples: Number of pairs that the call encoded.
        total: Number of pairs in the folder, including earlier calls.
        seconds: Duration without loading the model.
        skipped: Number of samples that could not be read in all calls, by `<source>: <cause>`.

    Example:
        >>> print(EncodeRecord(samples=100, total=300, seconds=2.0))
        100 pairs encoded in 2 s, 50 per second; 300 in total. Skipped: none.
    """

    samples: int = 0
    total: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else 0.0
        skipped = ", ".join(f"{count} {cause}" for cause, count in sorted(self.skipped.items())) or "none"
        if not self.samples:
            return f"Nothing left to encode: the folder contains {self.total} pairs. Skipped: {skipped}."
        return (
            f"{self.samples} pairs encoded in {self.seconds:.0f} s, {rate:.0f} per second; {self.total} in total. "
            f"Skipped: {skipped}."
        )


class _LocatedStream(SampleStream):
    """A stream in the order of the sources, which also knows the shard and row of each sample."""

    def __init__(self, sources: Sequence[Any], **arguments: Any) -> None:
        super().__init__(sources, shuffle=False, **arguments)
        self._waiting: deque[SampleIndex] = deque()
        self._begun = [0] * len(self.sources)

    def _sample_order(self) -> Iterator[SampleIndex]:
        self._waiting.clear()
        for index in super()._sample_order():
            if index.position >= self._next and index.position % self.world_size == self.rank:
                self._waiting.append(index)
            yield index

    def location(self, sample: Sample) -> tuple[str, int]:
        """Returns the name of the shard, and the row in it, of the last sample."""
        while (index := self._waiting.popleft()).position != sample["position"]:
            pass  # this one was skipped
        shards = self.shards[index.source]
        for done in range(self._begun[index.source], index.shard):
            # A copy drops the shard's list of samples, as for readers in other processes: for millions of samples the
            # lists would fill the memory.
            shards[done] = copy(shards[done])
        self._begun[index.source] = index.shard
        return shards[index.shard].name, index.row


def encode_sources(
    sources: Sequence[Any],
    out: str | Path,
    model: str | Path,
    *,
    batch_size: int = 64,
    samples_per_shard: int = 2048,
    dtype: Literal["float16", "float32"] = "float16",
    keep_captions: bool = False,
    num_workers: int = 0,
    max_bad_fraction: float = 0.05,
) -> EncodeRecord:
    """Encodes every pair of the sources, or resumes an interrupted call.

    On several processes (`accelerate launch`, `torchrun`) each writes its own share. A shard has the columns `source`,
    `shard`, `row` and `key` (location of a pair in its source), `position` (in the run), `modality` and `probability`
    (of the expert that the image router selects), `image_embeds` and `text_embeds` (D values each, of length 1), and
    `caption` if requested.

    Args:
        sources: Models of `medmoe_hf.data.sources`; all of them finite.
        out: Folder to create, or to resume.
        model: Folder or Hub id.
        batch_size: Images, and texts, per batch.
        samples_per_shard: Pairs per shard; at most this many are encoded again after an interruption.
        dtype: Data type of the embeddings on disk.
        keep_captions: Whether the reports are written too. Warning: they may contain PHI.
        num_workers: Processes that read and decode, per process that encodes.
        max_bad_fraction: Share of faulty samples, of 0..1, above which the run stops.

    Returns:
        What was encoded.

    Raises:
        EncodeError: If `out` belongs to another model, other sources or settings, or is damaged.
        StreamError: If too many samples cannot be read. Written shards remain; a call with a higher limit resumes.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources

        record = encode_sources(load_sources("sources.yaml"), "embeds", "quickstart/model")
        print(record)
        ```
    """
    for source in sources:
        if source.kind == "phantom" and source.length is None:
            raise EncodeError("An endless phantom source cannot be encoded; set its `length`.")
    # Activations decay to denormals, which CPUs multiply a hundred times more slowly.
    torch.set_flush_denormal(True)
    refuse_missing_folder(model)
    accelerator = Accelerator()
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(model).to(accelerator.device).eval()
        processor = MedMoEProcessor.from_pretrained(model)
    collator = ContrastiveCollator(processor)
    stream = _LocatedStream(
        sources,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        max_bad_fraction=max_bad_fraction,
        num_workers=num_workers,
        prepare=collator.prepare,
    )
    out = Path(out)
    manifest = {
        "format": FORMAT,
        "model": str(model),
        "fingerprint": model_fingerprint(loaded, processor),
        "modalities": list(loaded.config.modalities.values()),
        "processes": accelerator.num_processes,
        "samples_per_shard": samples_per_shard,
        "dtype": dtype,
        "keep_captions": keep_captions,
        "mixed_precision": accelerator.mixed_precision,
        "sources": [source.model_dump(mode="json") for source in sources],
        # New files that match a pattern would shift every position, and changed files were encoded as they were.
        "content": [[name, source.content_checksums()] for name, source in zip(stream.names, sources, strict=True)],
    }
    if accelerator.is_main_process:
        _claim(out, manifest)
    accelerator.wait_for_everyone()
    _check_manifest(out, manifest)
    encoder = _Encoder(loaded, processor, collator, accelerator, batch_size, np.dtype(dtype))
    writer = _Writer(out, accelerator.process_index, accelerator.num_processes)
    record = _run(encoder, stream, writer, samples_per_shard, keep_captions)
    records = gather_object([record]) if accelerator.num_processes > 1 else [record]
    accelerator.end_training()
    skipped: Counter[str] = Counter()
    for one in records:
        skipped.update(one.skipped)
    return EncodeRecord(
        sum(one.samples for one in records),
        sum(one.total for one in records),
        max(one.seconds for one in records),
        dict(skipped),
    )


def model_fingerprint(model: Any, processor: Any) -> str:
    """Hashes everything that an embedding depends on: weights, configuration, image processing, vocabulary.

    Args:
        model: A `MedMoEModel`.
        processor: Its `MedMoEProcessor`.

    Returns:
        16 hexadecimal digits.
    """
    plain = [_lasting(model.config.to_dict()), _lasting(processor.image_processor.to_dict())]
    plain += [processor.tokenizer.get_vocab(), processor.max_length]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _lasting(one) for key, one in value.items() if key not in _VOLATILE}
    return [_lasting(one) for one in value] if isinstance(value, (list, tuple)) else value


@dataclass
class _Encoder:
    """Encodes samples as the columns of a shard."""

    model: Any
    processor: Any
    collator: ContrastiveCollator
    accelerator: Accelerator
    batch_size: int
    dtype: np.dtype

    def images(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Encodes prepared images: `image_embeds` (B, D), `modality` (B,) expert ids and `probability` (B,)."""
        pixels = torch.from_numpy(np.stack(images)).to(self.accelerator.device, non_blocking=True)
        with torch.inference_mode(), self.accelerator.autocast():
            batch = self.collator.normalize({"pixel_values": pixels})
            outputs = self.model.get_image_features(batch["pixel_values"], local=False)
        return {
            "image_embeds": nn.functional.normalize(outputs.pooler_output.float(), dim=-1).cpu().numpy(),
            "modality": outputs.expert_ids.cpu().numpy(),
            "probability": outputs.router_logits.float().softmax(dim=-1).amax(dim=-1).cpu().numpy(),
        }

    def shard(
        self, samples: Iterator[Sample], stream: _LocatedStream, keep_captions: bool, bar: Any
    ) -> tuple[pyarrow.Table, int]:
        """Encodes all samples as a table, and counts them. Images are released batch by batch."""
        plain: dict[str, list[Any]] = {name: [] for name in ("source", "shard", "row", "key", "position")}
        captions: list[str] = []
        held: list[np.ndarray] = []
        parts: list[dict[str, np.ndarray]] = []
        for sample in samples:
            shard, row = stream.location(sample)
            known = {**sample, "source": stream.names[sample["source"]], "shard": shard, "row": row}
            for name, values in plain.items():
                values.append(known[name])
            captions.append(sample["caption"])
            held.append(sample["image"])
            if len(held) == self.batch_size:
                parts.append(self.images(held))
                bar.update(len(held))
                held = []
        if held:
            parts.append(self.images(held))
            bar.update(len(held))
        with self.accelerator.autocast():
            texts = encode_texts(self.model, self.processor, captions, self.batch_size).numpy()
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        modalities = list(self.model.config.modalities.values())
        columns: dict[str, Any] = {
            "source": pyarrow.array(plain["source"], pyarrow.string()),
            "shard": pyarrow.array(plain["shard"], pyarrow.string()),
            "row": pyarrow.array(plain["row"], pyarrow.int64()),
            "key": pyarrow.array(plain["key"], pyarrow.string()),
            "position": pyarrow.array(plain["position"], pyarrow.int64()),
            "modality": pyarrow.array([modalities[index] for index in found.get("modality", ())], pyarrow.string()),
            "probability": pyarrow.array(found.get("probability", ()), pyarrow.float32()),
            "image_embeds": self._vectors(found.get("image_embeds", texts[:0])),
            "text_embeds": self._vectors(texts),
        }
        if keep_captions:
            columns["caption"] = pyarrow.array(captions, pyarrow.string())
        return pyarrow.table(columns), len(captions)

    def _vectors(self, rows: np.ndarray) -> pyarrow.Array:
        flat = pyarrow.array(rows.astype(self.dtype).reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, rows.shape[1])


class _Writer:
    """The shards of one process, and their list."""

    def __init__(self, out: Path, rank: int, world_size: int) -> None:
        self.out, self.prefix = out, f"embeds-{rank:05d}-of-{world_size:05d}"
        self.list_path = out / f"shards-{rank:05d}-of-{world_size:05d}.json"
        self.listed: dict[str, list[Any]] = {}

    def path(self, number: int) -> Path:
        return self.out / f"{self.prefix}-{number:06d}.parquet"

    def shards(self, listed: bool = True) -> list[Path]:
        """Finds the shards that were written and compares their sizes with the list.

        Args:
            listed: Whether there is a list, as in every folder of this `FORMAT`.

        Returns:
            Paths of the shards, in order.

        Raises:
            EncodeError: If a shard or the list is missing, or a size differs.
        """
        found = sorted(self.out.glob(f"{self.prefix}-*.parquet"))
        for number, path in enumerate(found):
            if path != self.path(number):
                raise EncodeError(
                    f"{self.path(number)} is missing, but {path.name} exists. Restore it, or remove "
                    f"{path.name} and those after it and run `medmoe encode` again."
                )
        if not listed:
            return found
        self.listed = self._read_list() if found or self.list_path.exists() else {}
        for path in found:
            if path.name not in self.listed:
                raise EncodeError(
                    f"{path} is not listed in {self.list_path.name}: it does not belong to this folder. "
                    f"Remove it, and the later shards of its process, to encode them again."
                )
            size, written = path.stat().st_size, self.listed[path.name][0]
            if size != written:
                raise _damaged(path, f"it has {size} bytes instead of {written}")
        return found

    def check(self, path: Path) -> None:
        """Compares the checksum of a shard with the list; call `shards` first.

        Raises:
            EncodeError: If they differ.
        """
        if path.name in self.listed and _checksum(path) != self.listed[path.name][1]:
            raise _damaged(path, "its checksum differs from the one in the list")

    def resume(self) -> dict[str, Any] | None:
        """Checks the existing shards, after which the next one is written.

        Returns:
            State of the newest shard; None if there are none.

        Raises:
            EncodeError: If a shard is missing or damaged.
        """
        for left in (*self.out.glob(f".{self.prefix}-*"), *self.out.glob(f".{self.list_path.name}*")):
            left.unlink()
        found = self.shards()
        for path in progress(found, "checking shards", "shard"):
            self.check(path)
        # A run that was interrupted between the list and the rename has listed one shard that does not exist.
        self.listed = {path.name: self.listed[path.name] for path in found}
        return shard_state(found[-1]) if found else None

    def write(self, table: pyarrow.Table, state: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({_STATE: json.dumps(state).encode()})
        path = self.path(len(self.listed))
        with atomic_write(path) as partial:
            # Numbers like these do not compress.
            pyarrow.parquet.write_table(
                table,
                partial,
                compression="none",
                use_dictionary=["source", "shard", "modality"],
                write_page_checksum=True,
            )
            self.listed[path.name] = [partial.stat().st_size, _checksum(partial)]
            with atomic_write(self.list_path) as partial_list:
                partial_list.write_text(json.dumps(self.listed, indent=1) + "\n", encoding="utf-8")

    def _read_list(self) -> dict[str, list[Any]]:
        try:
            listed: dict[str, list[Any]] = json.loads(self.list_path.read_text(encoding="utf-8"))
            return listed
        except FileNotFoundError:
            raise EncodeError(
                f"{self.list_path} is missing: without it the shards cannot be checked. "
                "Restore it, or encode into another folder."
            ) from None
        except ValueError as error:
            raise EncodeError(
                f"{self.list_path} is damaged: {error}. Restore it, or encode into another folder."
            ) from error


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _damaged(path: Path, why: object) -> EncodeError:
    return EncodeError(
        f"{path} is damaged: {why}. Restore it from a copy; or remove it and the later shards of its process, and "
        "run `medmoe encode` again."
    )


def _run(
    encoder: _Encoder, stream: _LocatedStream, writer: _Writer, samples_per_shard: int, keep_captions: bool
) -> EncodeRecord:
    state = writer.resume()
    complete = state is not None and state["complete"]
    if state is not None and not complete:
        stream.load_state_dict(state["stream"])
    record = EncodeRecord()
    started = time.monotonic()
    samples = iter(stream)
    process = encoder.accelerator
    with progress(
        None,
        "encode" if process.num_processes == 1 else f"encode (process 1 of {process.num_processes})",
        unit="pair",
        delay=0,
        leave=True,
        initial=state["stream"]["faults"]["good"] if state is not None else 0,
        disable=not process.is_main_process,
    ) as bar:
        while not complete:
            # No batch spans two shards: a resumed run computes the same batches, and so the same numbers.
            table, count = encoder.shard(islice(samples, samples_per_shard), stream, keep_captions, bar)
            # The last shard may be empty; it marks the end.
            complete = count < samples_per_shard
            state = {"stream": stream.state_dict(), "complete": complete}
            writer.write(table, state)
            record.samples += count
            bar.set_postfix(
                {"shards": len(writer.listed)} | ({"skipped": stream.faults.bad} if stream.faults.bad else {})
            )
    record.seconds = time.monotonic() - started
    assert state is not None
    faults = state["stream"]["faults"]
    record.total = faults["good"]
    record.skipped = {f"{source}: {cause}": count for source, cause, count in faults["counts"]}
    return record


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Creates the folder with its manifest, unless it exists."""
    if (out / MANIFEST).exists():
        return
    if out.exists() and (not out.is_dir() or any(path.name != f".{MANIFEST}.partial" for path in out.iterdir())):
        raise EncodeError(f"{out} exists and is not a folder of embeddings (it has no {MANIFEST}); choose another.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _check_manifest(out: Path, manifest: dict[str, Any]) -> None:
    then = read_manifest(out)
    if then.get("format") != FORMAT:
        raise EncodeError(
            f"{out} was written by another version of medmoe_hf (format {then.get('format')} instead of {FORMAT}). "
            "It can be searched; to encode more, choose another folder."
        )
    different = [
        f"  {key}: {_brief(then.get(key))} before, {_brief(value)} now"
        for key, value in manifest.items()
        if key not in (*_MAY_DIFFER, "content") and then.get(key) != value
    ]
    if not different:
        # Other sources have other content: the difference would be reported twice.
        different = [
            f"  {name}: {change}"
            for (_, before), (name, after) in zip(then["content"], manifest["content"], strict=True)
            for change in _changes(before, after)
        ]
    if different:
        raise EncodeError(
            f"{out} contains embeddings that are not comparable with new ones:\n"
            + "\n".join(different)
            + "\nUse the same model, sources and settings, or choose another folder."
        )


def _changes(before: list[list[Any]], after: list[list[Any]]) -> list[str]:
    """Describes the changes to the files of a source, given `[name, size, checksum]` of each; one line per file."""
    old, new = ([tuple(facts) for facts in files] for files in (before, after))
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    sizes = {name: size for name, size, _ in come}
    lines = []
    for name, size, _ in gone:
        if name not in sizes or sizes[name] is None:
            lines.append(f"{name} is missing")
        elif size is None:
            lines.append(f"{name} is new: it was missing before")
        elif size == sizes[name]:
            lines.append(f"{name} has changed: same size ({size} bytes), other content")
        else:
            lines.append(f"{name} has changed: {size} bytes before, {sizes[name]} now")
    known = {name for name, _, _ in gone}
    lines += [f"{name} is new" for name in sizes if name not in known]
    if not lines and old != new:
        lines.append("the same files in another order")
    return lines if len(lines) <= _MOST_CHANGES else [*lines[:_MOST_CHANGES], f"and {len(lines) - _MOST_CHANGES} more"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_manifest(out: Path) -> dict[str, Any]:
    """Reads the manifest of a folder of embeddings.

    Args:
        out: The folder.

    Returns:
        Model, sources and settings that the embeddings were computed with.

    Raises:
        EncodeError: If it is not a folder of embeddings.
    """
    try:
        manifest: dict[str, Any] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest
    except OSError as error:
        raise EncodeError(
            f"{out} contains no embeddings (no {MANIFEST}); create them with `medmoe encode SOURCES.yaml {out}`."
        ) from error
    except ValueError as error:
        raise EncodeError(f"{out / MANIFEST} is damaged: {error}. Encode again into another folder.") from error


def shard_state(path: Path) -> dict[str, Any]:
    """Reads the state in the metadata of a shard.

    Args:
        path: The shard.

    Returns:
        `stream`, the state of its process's stream after it, and `complete`, whether it is the last one.

    Raises:
        EncodeError: If it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads(pyarrow.parquet.read_schema(path).metadata[_STATE])
        return state
    except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_shard(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Reads columns of a shard.

    Args:
        path: The shard.
        columns: Names of the columns.

    Returns:
        A table with one row per pair.

    Raises:
        EncodeError: If it cannot be read, or the checksum of a page differs.
    """
    try:
        return pyarrow.parquet.read_table(path, columns=list(columns), page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


@dataclass(frozen=True)
class FinishedShard:
    """A shard of a finished folder.

    Attributes:
        path: Path of the file.
        rows: Number of pairs.
        checksum: Checksum in the list; None in a folder of format 1.
        writer: Writer of its process.
    """

    path: Path
    rows: int
    checksum: str | None
    writer: _Writer

    def check(self) -> None:
        """Compares its checksum with the list.

        Raises:
            EncodeError: If they differ.
        """
        self.writer.check(self.path)


def finished_shards(out: Path) -> tuple[dict[str, Any], list[FinishedShard]]:
    """Reads the manifest of a finished folder and finds its shards.

    Args:
        out: The folder.

    Returns:
        The manifest, and the shards in order.

    Raises:
        EncodeError: If it is not a folder of embeddings, not finished, or a shard is damaged.
    """
    manifest = read_manifest(out)
    processes = manifest["processes"]
    listed = manifest.get("format", 1) > 1
    shards, missing = [], 0
    for rank in range(processes):
        writer = _Writer(out, rank, processes)
        found = writer.shards(listed)
        missing += not found or not shard_state(found[-1])["complete"]
        for path in found:
            try:
                rows = pyarrow.parquet.read_metadata(path).num_rows
            except (OSError, pyarrow.ArrowException) as error:
                raise _damaged(path, error) from error
            shards.append(FinishedShard(path, rows, writer.listed.get(path.name, [None, None])[1], writer))
    if missing:
        raise EncodeError(
            f"{out} is not finished: {missing} of {processes} processes were interrupted. Run the same "
            "`medmoe encode` again to resume."
        )
    return manifest, shards
