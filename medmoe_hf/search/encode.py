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
from medmoe_hf.data.checkpoint_names import find_checkpoint
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.reading import Sample, SampleIndex
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import EncodeError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor
from medmoe_hf.search.shards import FORMAT, MANIFEST, ShardWriter, read_manifest

_MAY_DIFFER = ("model",)
# Entries of configurations that do not change an embedding.
_VOLATILE = (
    "transformers_version",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "_name_or_path",
    "dtype",
    "processor_class",
)

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
        super().__init__(sources, shuffle=False, fixed_captions=True, **arguments)
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
        model: Folder or Hub id, or `small`, the checkpoint of the package.
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

        record = encode_sources(load_sources("sources.yaml"), "embeds", "scratch/model")
        print(record)
        ```
    """
    for source in sources:
        if source.kind == "phantom" and source.length is None:
            raise EncodeError("An endless phantom source cannot be encoded; set its `length`.")
    # Activations decay to denormals, which CPUs multiply a hundred times more slowly.
    torch.set_flush_denormal(True)
    folder = find_checkpoint(model)
    accelerator = Accelerator()
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(folder).to(accelerator.device).eval()
        processor = MedMoEProcessor.from_pretrained(folder)
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
        "sources": [source.identity() for source in sources],
        # New files that match a pattern would shift every position, and changed files were encoded as they were.
        "content": [[name, source.content_checksums()] for name, source in zip(stream.names, sources, strict=True)],
    }
    if accelerator.is_main_process:
        _claim(out, manifest)
    accelerator.wait_for_everyone()
    _check_manifest(out, manifest)
    encoder = _Encoder(loaded, processor, collator, accelerator, batch_size, np.dtype(dtype))
    writer = ShardWriter(out, accelerator.process_index, accelerator.num_processes)
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


def _run(
    encoder: _Encoder, stream: _LocatedStream, writer: ShardWriter, samples_per_shard: int, keep_captions: bool
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
