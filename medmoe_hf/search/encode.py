"""Image and report embeddings of whole sources, written as parquet shards: streaming, resumable, on many processes.

A folder of embeddings holds

    encoding.json                         what they were made from: model, sources, their content, precision, processes
    embeds-00000-of-00002-000000.parquet  shard 0 of process 0 of 2, then shard 1, ...
    shards-00000-of-00002.json            size and checksum of each shard of process 0
    index/                                what `medmoe search` builds from them

A shard appears by rename, and its own metadata say where the stream stood after its last sample. It is listed before
it appears, so a shard that is there is always listed, and whatever interrupts a run, the next one goes on after the
newest shard.
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
from tqdm.auto import tqdm

from medmoe_hf.common.console import progress
from medmoe_hf.common.files import atomic_write
from medmoe_hf.common.loading import explain_loading
from medmoe_hf.data.checkpoint_names import refuse_missing_folder
from medmoe_hf.data.collate import ContrastiveCollator
from medmoe_hf.data.stream import Place, Sample, SampleStream
from medmoe_hf.errors import EncodeError
from medmoe_hf.inference.texts import encode_texts
from medmoe_hf.model import MedMoEModel, MedMoEProcessor

MANIFEST = "encoding.json"
FORMAT = 2
"""Of a folder of embeddings. 1 had neither the sources' content nor a list of shards; it can still be searched."""
_STATE = b"medmoe"
# A run may go on with another value of these: nothing that is written depends on them.
_FREE = ("model",)
# What configurations hold that does not change an embedding.
_VOLATILE = ("transformers_version", "architectures", "auto_map", "_name_or_path", "dtype", "processor_class")

_MOST_CHANGES = 5  # lines of a message, for each source


@dataclass
class EncodeRecord:
    """What a call of `encode_sources` did, over all processes.

    Attributes:
        samples: pairs that it encoded.
        total: pairs in the folder, with those of earlier calls.
        seconds: that it took, without loading the model.
        skipped: samples of all calls that could not be read, by source and cause.
    """

    samples: int = 0
    total: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else 0.0
        skipped = ", ".join(f"{count} {cause}" for cause, count in sorted(self.skipped.items())) or "none"
        if not self.samples:
            return f"Nothing was left to encode: {self.total} pairs are there. Skipped: {skipped}."
        return (
            f"{self.samples} pairs encoded in {self.seconds:.0f} s, {rate:.0f} a second; {self.total} in all. "
            f"Skipped: {skipped}."
        )


class _PlacedStream(SampleStream):
    """A stream in the sources' own order, which also tells the shard and row of what it gives, and keeps nothing."""

    def __init__(self, sources: Sequence[Any], **arguments: Any) -> None:
        super().__init__(sources, shuffle=False, **arguments)
        self._waiting: deque[Place] = deque()
        self._begun = [0] * len(self.sources)

    def _places(self) -> Iterator[Place]:
        self._waiting.clear()
        for place in super()._places():
            if place.position >= self._next and place.position % self.world_size == self.rank:
                self._waiting.append(place)
            yield place

    def place(self, sample: Sample) -> tuple[str, int]:
        """Name of the shard, and row in it, of the sample that was given last."""
        while (place := self._waiting.popleft()).position != sample["position"]:
            pass  # this one was skipped
        shards = self.shards[place.source]
        for done in range(self._begun[place.source], place.shard):
            # A copy is what readers in other processes get: without the shard's list of samples. Over millions of them
            # the lists would fill the memory.
            shards[done] = copy(shards[done])
        self._begun[place.source] = place.shard
        return shards[place.shard].name, place.where


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
    """Encodes every pair of the sources, or goes on where an interrupted call has stopped.

    Launched on several processes (`accelerate launch`, `torchrun`) each writes its own share. A shard has the columns
    `source`, `shard`, `row`, `key` and `position` (where a pair stands; in its source, and in the run), `modality` and
    `probability` (where the image router sends the image), `image_embeds` and `text_embeds` (of length 1), and
    `caption` if asked for.

    Args:
        sources: models of `medmoe_hf.data.sources`; none endless.
        out: folder to make, or to go on with.
        model: folder or Hub id.
        batch_size: images, and texts, that are computed at a time.
        samples_per_shard: pairs in a shard: at most so many have to be encoded again after an interruption.
        dtype: of the embeddings on disk.
        keep_captions: whether the reports are written too. They may be about patients.
        num_workers: processes that read and decode, for each process that encodes.
        max_bad_fraction: over this share of faulty samples the run stops.

    Raises:
        EncodeError: if `out` belongs to another model, other sources or settings, or is damaged.
        StreamError: if too many samples cannot be read. What is written stays; a call with a higher limit goes on.
    """
    for source in sources:
        if source.kind == "phantom" and source.length is None:
            raise EncodeError("An endless phantom source cannot be encoded; give it a `length`.")
    # Activations fade into denormals, which CPUs multiply a hundred times slower.
    torch.set_flush_denormal(True)
    refuse_missing_folder(model)
    accelerator = Accelerator()
    with explain_loading(model):
        loaded: Any = MedMoEModel.from_pretrained(model).to(accelerator.device).eval()
        processor = MedMoEProcessor.from_pretrained(model)
    collator = ContrastiveCollator(processor)
    stream = _PlacedStream(
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
        # Files that a pattern has found since would move every position, and changed ones were encoded as they were.
        "content": [[name, source.content_facts()] for name, source in zip(stream.names, sources, strict=True)],
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
    skipped: Counter = Counter()
    for one in records:
        skipped.update(one.skipped)
    return EncodeRecord(
        sum(one.samples for one in records),
        sum(one.total for one in records),
        max(one.seconds for one in records),
        dict(skipped),
    )


def model_fingerprint(model: Any, processor: Any) -> str:
    """A hash of all that an embedding depends on: weights, configuration, image processing, vocabulary."""
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
    """Samples to the columns of a shard."""

    model: Any
    processor: Any
    collator: ContrastiveCollator
    accelerator: Accelerator
    batch_size: int
    dtype: np.dtype

    def images(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Prepared images to `image_embeds` (B, D), `modality` (B,) ids and `probability` (B,)."""
        pixels = torch.from_numpy(np.stack(images)).to(self.accelerator.device, non_blocking=True)
        with torch.inference_mode(), self.accelerator.autocast():
            batch = self.collator.normalise({"pixel_values": pixels})
            outputs = self.model.get_image_features(batch["pixel_values"], local=False)
        return {
            "image_embeds": nn.functional.normalize(outputs.pooler_output.float(), dim=-1).cpu().numpy(),
            "modality": outputs.expert_ids.cpu().numpy(),
            "probability": outputs.router_logits.float().softmax(dim=-1).amax(dim=-1).cpu().numpy(),
        }

    def shard(
        self, samples: Iterator[Sample], stream: _PlacedStream, keep_captions: bool, bar: Any
    ) -> tuple[pyarrow.Table, int]:
        """A table of all the samples, and how many they are. Images are let go a batch at a time."""
        plain: dict[str, list[Any]] = {name: [] for name in ("source", "shard", "row", "key", "position")}
        captions: list[str] = []
        held: list[np.ndarray] = []
        parts: list[dict[str, np.ndarray]] = []
        for sample in samples:
            shard, row = stream.place(sample)
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
    """One process's shards, and the list of them."""

    def __init__(self, out: Path, rank: int, world_size: int) -> None:
        self.out, self.prefix = out, f"embeds-{rank:05d}-of-{world_size:05d}"
        self.list_path = out / f"shards-{rank:05d}-of-{world_size:05d}.json"
        self.listed: dict[str, list[Any]] = {}

    def place(self, number: int) -> Path:
        return self.out / f"{self.prefix}-{number:06d}.parquet"

    def shards(self, listed: bool = True) -> list[Path]:
        """What it has written, in order; sizes are compared with the list, which is read.

        Args:
            listed: whether there is a list, as in every folder of this `FORMAT`.

        Raises:
            EncodeError: if a shard or the list is missing, or a size is another one.
        """
        found = sorted(self.out.glob(f"{self.prefix}-*.parquet"))
        for number, path in enumerate(found):
            if path != self.place(number):
                raise EncodeError(
                    f"{self.place(number)} is missing, and {path.name} is there. Put it back, or remove "
                    f"{path.name} and those after it and run `medmoe encode` again."
                )
        if not listed:
            return found
        self.listed = self._read_list() if found or self.list_path.exists() else {}
        for path in found:
            if path.name not in self.listed:
                raise EncodeError(
                    f"{path} is not listed in {self.list_path.name}: it does not belong to this folder. "
                    f"Remove it, and the shards of its process after it, to encode them again."
                )
            size, written = path.stat().st_size, self.listed[path.name][0]
            if size != written:
                raise _damaged(path, f"it has {size} bytes, and {written} were written")
        return found

    def check(self, path: Path) -> None:
        """Reads a shard and compares it with the list, as `shards` has read it.

        Raises:
            EncodeError: if its content is another one.
        """
        if path.name in self.listed and _checksum(path) != self.listed[path.name][1]:
            raise _damaged(path, "its checksum is not that of what was written")

    def resume(self) -> dict[str, Any] | None:
        """Puts the next shard after those that are there; the newest one's state, None without any.

        Raises:
            EncodeError: if one before it is missing, or any of them is damaged.
        """
        for left in (*self.out.glob(f".{self.prefix}-*"), *self.out.glob(f".{self.list_path.name}*")):
            left.unlink()
        found = self.shards()
        for path in progress(found, "checking shards", "shard"):
            self.check(path)
        # A run that ended between the list and the rename has listed one shard more than there are.
        self.listed = {path.name: self.listed[path.name] for path in found}
        return shard_state(found[-1]) if found else None

    def write(self, table: pyarrow.Table, state: dict[str, Any]) -> None:
        table = table.replace_schema_metadata({_STATE: json.dumps(state).encode()})
        path = self.place(len(self.listed))
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
            return json.loads(self.list_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise EncodeError(
                f"{self.list_path} is missing: without it nobody knows whether the shards are whole. "
                "Put it back, or encode into another folder."
            ) from None
        except ValueError as error:
            raise EncodeError(
                f"{self.list_path} is damaged: {error}. Put it back, or encode into another folder."
            ) from error


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _damaged(path: Path, why: object) -> EncodeError:
    return EncodeError(
        f"{path} is damaged: {why}. Put it back from a copy; or remove it and the shards of its process after it, and "
        "run `medmoe encode` again."
    )


def _run(
    encoder: _Encoder, stream: _PlacedStream, writer: _Writer, samples_per_shard: int, keep_captions: bool
) -> EncodeRecord:
    state = writer.resume()
    complete = state is not None and state["complete"]
    if state is not None and not complete:
        stream.load_state_dict(state["stream"])
    record = EncodeRecord()
    started = time.monotonic()
    samples = iter(stream)
    process = encoder.accelerator
    with tqdm(
        desc="encode" if process.num_processes == 1 else f"encode (process 1 of {process.num_processes})",
        unit="pair",
        initial=state["stream"]["faults"]["good"] if state is not None else 0,
        disable=not process.is_main_process,
    ) as bar:
        while not complete:
            # A shard ends the batch: a resumed run then computes the same batches, and the same numbers.
            table, count = encoder.shard(islice(samples, samples_per_shard), stream, keep_captions, bar)
            # The last shard may be empty; it says that nothing is missing.
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
    """Makes the folder with its manifest, unless it is one already."""
    if (out / MANIFEST).exists():
        return
    if out.exists() and (not out.is_dir() or any(path.name != f".{MANIFEST}.partial" for path in out.iterdir())):
        raise EncodeError(f"{out} is there, and no folder of embeddings (no {MANIFEST} in it); choose another.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _check_manifest(out: Path, manifest: dict[str, Any]) -> None:
    then = read_manifest(out)
    if then.get("format") != FORMAT:
        raise EncodeError(
            f"{out} was written by another version of medmoe_hf (format {then.get('format')}, and not {FORMAT}). "
            "It can be searched; to encode more, choose another folder."
        )
    different = [
        f"  {key}: {_brief(then.get(key))} then, {_brief(value)} now"
        for key, value in manifest.items()
        if key not in (*_FREE, "content") and then.get(key) != value
    ]
    if not different:
        # Other sources have other content: that would say the same twice.
        different = [
            f"  {name}: {change}"
            for (_, before), (name, after) in zip(then["content"], manifest["content"], strict=True)
            for change in _changes(before, after)
        ]
    if different:
        raise EncodeError(
            f"{out} holds embeddings that were made otherwise, and would not go together with new ones:\n"
            + "\n".join(different)
            + "\nGo on with the same model, sources and settings, or choose another folder."
        )


def _changes(before: list[list[Any]], after: list[list[Any]]) -> list[str]:
    """What happened to the files of a source, given `[name, size, checksum]` of each; a line for each of them."""
    old, new = ([tuple(facts) for facts in files] for files in (before, after))
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    sizes = {name: size for name, size, _ in come}
    lines = []
    for name, size, _ in gone:
        if name not in sizes or sizes[name] is None:
            lines.append(f"{name} is gone")
        elif size is None:
            lines.append(f"{name} is new: it was missing then")
        elif size == sizes[name]:
            lines.append(f"{name} has changed: as many bytes ({size}), but others")
        else:
            lines.append(f"{name} has changed: {size} bytes then, {sizes[name]} now")
    known = {name for name, _, _ in gone}
    lines += [f"{name} is new" for name in sizes if name not in known]
    if not lines and old != new:
        lines.append("the same files in another order")
    return lines if len(lines) <= _MOST_CHANGES else [*lines[:_MOST_CHANGES], f"and {len(lines) - _MOST_CHANGES} more"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_manifest(out: Path) -> dict[str, Any]:
    """What a folder of embeddings was made from.

    Raises:
        EncodeError: if it is none.
    """
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise EncodeError(
            f"{out} holds no embeddings (no {MANIFEST}); `medmoe encode SOURCES.yaml {out}` makes them."
        ) from error
    except ValueError as error:
        raise EncodeError(f"{out / MANIFEST} is damaged: {error}. Encode again into another folder.") from error


def shard_state(path: Path) -> dict[str, Any]:
    """Where its process's stream stood after a shard (`stream`), and whether it is the last one (`complete`).

    Raises:
        EncodeError: if it cannot be read.
    """
    try:
        return json.loads(pyarrow.parquet.read_schema(path).metadata[_STATE])
    except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def read_shard(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Some columns of a shard.

    Raises:
        EncodeError: if it cannot be read, or a page's checksum is not that of its content.
    """
    try:
        return pyarrow.parquet.read_table(path, columns=list(columns), page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


@dataclass(frozen=True)
class FinishedShard:
    """A shard of a finished folder.

    Attributes:
        path: where it is.
        rows: number of its pairs.
        checksum: as it is listed; None in a folder of format 1.
        writer: of its process.
    """

    path: Path
    rows: int
    checksum: str | None
    writer: _Writer

    def check(self) -> None:
        """Reads all of it.

        Raises:
            EncodeError: if it is not what was written.
        """
        self.writer.check(self.path)


def finished_shards(out: Path) -> tuple[dict[str, Any], list[FinishedShard]]:
    """The manifest and the shards, in order, of a folder that nothing is missing from; their sizes are right.

    Raises:
        EncodeError: if it is no folder of embeddings, or not finished, or a shard is damaged.
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
            f"{out} is not finished: {missing} of {processes} processes have not come to the end. Run the same "
            "`medmoe encode` again, and it goes on where it was."
        )
    return manifest, shards
