"""What is fuzzed: one function per reader, `(bytes) -> None`, with its first inputs and its mutator.

A harness lets errors of the package's classes pass: they are the right answer to a damaged file. Everything else that
it raises is a finding: another exception, or an assertion about the result. The guard of `campaign.py` adds time and
memory.
"""

import atexit
import contextlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mutators
import seeds

MAX_PIXELS = 2**18  # small, so that 256 MiB are far above what a reader may use
MAX_BYTES = 2**14
"""Largest input."""


class Finding(AssertionError):
    """A result that must not be."""


class Allowed(Exception):
    """Marks an error of another class that is documented for the call."""


def _expect(condition: Any, what: str) -> None:
    if not condition:
        raise Finding(what)


@lru_cache(maxsize=1)
def folder() -> Path:
    """Folder for the files of readers that take paths; in memory where there is such a place."""
    given = os.environ.get("MEDMOE_FUZZ_FOLDER")
    if given:
        return Path(given)
    memory = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(prefix="medmoe_fuzz_", dir=memory if memory.is_dir() else None)
    atexit.register(made.cleanup)
    return Path(made.name)


def _written(name: str, content: bytes) -> str:
    path = f"{folder()}/{name}"
    with open(path, "wb") as file:
        file.write(content)
    return path


def _quotes_nobody(text: str) -> None:
    _expect(seeds.SECRET not in text, "the text quotes the patient's name")


def _check_image(image: Any) -> None:
    import numpy as np

    pixels = image.pixels
    _expect(pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3), f"an image of shape {pixels.shape}")
    _expect(pixels.dtype in (np.uint8, np.float32) and pixels.size > 0, f"{pixels.size} pixels of {pixels.dtype}")
    _expect(pixels.dtype == np.uint8 or (pixels.min() >= 0 and pixels.max() <= 1), "pixels outside of 0..1")
    spacing = image.spacing
    _expect(spacing is None or (min(spacing) > 0 and math.isfinite(sum(spacing))), f"spacing {spacing}")
    _expect(0 <= image.frame < image.frames, f"frame {image.frame} of {image.frames}")


# --- images


def dicom(content: bytes) -> None:
    """One file, read by path, since files without the mark are recognised by their name."""
    from medmoe_hf.errors import MedMoEError
    from medmoe_hf.model.medical_images_medmoe import read_medical_image

    path = _written("x.dcm", content)
    try:
        _check_image(read_medical_image(path, max_pixels=MAX_PIXELS))
    except MedMoEError as error:
        _quotes_nobody(str(error))
        raise


def nifti(content: bytes) -> None:
    """One file by path, then its slices through a `NiftiVolume`."""
    from medmoe_hf.model.medical_images_medmoe import read_medical_image
    from medmoe_hf.model.nifti_medmoe import NiftiVolume

    path = _written("x.nii.gz" if content[:2] == b"\x1f\x8b" else "x.nii", content)
    first = read_medical_image(path, max_pixels=MAX_PIXELS)
    _check_image(first)
    volume = NiftiVolume(path, repr(path), MAX_PIXELS)
    _expect(volume.positions.shape == (volume.count,), "positions of another number of slices")
    _expect(volume.count == first.frames, "another number of slices")
    _check_image(read_medical_image(volume, volume.count - 1, max_pixels=MAX_PIXELS))


def studies(content: bytes) -> None:
    """A folder with a healthy slice, and the file twice; all slices are decoded."""
    from medmoe_hf.errors import MedMoEError
    from medmoe_hf.model.studies_medmoe import read_studies

    place = folder() / "study"
    if not place.is_dir():
        place.mkdir()
        (place / "a.dcm").write_bytes(_healthy())
    medical = content[128:132] == b"DICM" or content[:2] in (b"\x08\0", b"\x02\0", b"\x04\0")
    names = [f"study/{name}" for name in (("x.dcm", "y.dcm") if medical else ("x",))]
    try:
        for name in names:
            _written(name, content)
        found = read_studies(str(place), max_pixels=MAX_PIXELS, max_slices=200)
        for study in found:
            _quotes_nobody(repr(study))
            for series in study.series:
                _quotes_nobody(repr(series))
                for index, image in series:
                    _expect(0 <= index < len(series), "a slice beyond the series")
                    _check_image(image)
                for skipped in series.skipped:
                    _quotes_nobody(skipped.reason)
        for skipped in found.skipped:
            _quotes_nobody(skipped.reason)
    except MedMoEError as error:
        _quotes_nobody(str(error))
        raise
    finally:
        for name in names:
            os.unlink(folder() / name)


@lru_cache(maxsize=1)
def _healthy() -> bytes:
    return seeds.dicom_file(
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=[0, 0, 0], SOPInstanceUID="1.2.3.9"
    )


def picture(content: bytes) -> None:
    """Bytes of a picture, whole and reduced; text as a base64 string."""
    import numpy as np

    from medmoe_hf.model.image_files_medmoe import load_image
    from medmoe_hf.model.image_processing_medmoe import to_rgb

    if content[:8] == b"data:ima":
        load_image(content.decode("latin-1"), max_pixels=MAX_PIXELS)
        return
    for draft in (None, 4):
        image, _ = load_image(content, draft=draft, max_pixels=MAX_PIXELS)
        size = image.size if hasattr(image, "getbands") else image.shape[:2]
        _expect(0 < size[0] * size[1] <= MAX_PIXELS, f"an image of {size}")
        rgb = np.asarray(to_rgb(image, "channels_last"))
        _expect(rgb.shape[0] == 3 and np.isfinite(rgb).all(), f"colours of shape {rgb.shape}")


# --- sources


def tar(content: bytes) -> None:
    """A tar of samples: listed, peeked at, and read as training samples."""
    from medmoe_hf.data.shards import TarShard

    path = _written("x.tar", content)
    shard = TarShard(path)
    count = len(shard)
    fields = shard.fields()
    shard.peek(range(min(count, 3)), fields[:3])
    _read_samples(_source(kind="webdataset", files=[path], modality=["dicom", "caption"]), shard, count)


def parquet(content: bytes) -> None:
    """A parquet file of samples."""
    from medmoe_hf.data.shards import ParquetShard

    path = _written("x.parquet", content)
    shard = ParquetShard(path)
    shard.peek(range(min(len(shard), 3)), shard.fields()[:3])
    _read_samples(_source(kind="parquet", files=[path]), shard, len(shard))


def csv_table(content: bytes) -> None:
    """A CSV, with faulty rows kept and not; what is read by both is equal."""
    _table(content, "x.csv", "csv")


def jsonl_table(content: bytes) -> None:
    """A JSONL file, likewise."""
    _table(content, "x.jsonl", "jsonl")


def _table(content: bytes, name: str, kind: Any) -> None:
    from medmoe_hf.data.tables import FaultyRow, read_table
    from medmoe_hf.errors import MedMoEError

    path = _written(name, content)
    try:
        strict = read_table(path, kind)
    except MedMoEError:
        strict = None
    kept = read_table(path, kind, keep_faulty=True)
    faulty = any(isinstance(row, FaultyRow) for row in kept)
    _expect(strict is None or faulty or strict == kept or "nan" in repr(kept).lower(), "rows depend on keep_faulty")


def rows(content: bytes) -> None:
    """Rows as training samples, through all rules of captions, modalities and images."""
    from medmoe_hf.data.sources import TableSource

    path = _written(f"{_beside_a_picture()}/x.jsonl", content)
    for options in _ROW_OPTIONS:
        source = _source(kind="jsonl", files=[path], **options)
        assert isinstance(source, TableSource)
        (shard,) = source.shards()
        source.check([shard])
        _read_samples(source, shard, len(shard))


_ROW_OPTIONS: tuple[dict[str, Any], ...] = (
    {"modality": ["dicom", "caption"]},
    {
        "captions": ["{label} of the {organ}", {"field": "caption", "weight": 2}, "{view:>4} {organ!r}"],
        "synonyms": {"label": {0: ["no finding", "normal"]}},
        "modality": "field:modality",
        "subject": "subject",
    },
)


@lru_cache(maxsize=1)
def _beside_a_picture() -> str:
    (folder() / "rows").mkdir(exist_ok=True)
    _written("rows/x.png", seeds.pictures()[0])
    return "rows"


@lru_cache(maxsize=64)
def _source_of(text: str) -> Any:
    from pydantic import TypeAdapter

    from medmoe_hf.data.sources import Source

    return TypeAdapter(Source).validate_python(json.loads(text))


def _source(**fields: Any) -> Any:
    return _source_of(json.dumps(fields))


def _read_samples(source: Any, shard: Any, count: int) -> None:
    from medmoe_hf.data.faults import Fault
    from medmoe_hf.data.reading import Reader, SampleIndex

    reader = Reader([source], [[shard]], None, None, 64, (0, 0))
    for row in range(min(count, 6)):
        found = reader[SampleIndex(row, 0, 0, row, shard.locate(row))]
        if isinstance(found, Fault):
            _quotes_nobody(f"{found.cause} {found.reason}")
        else:
            _expect(isinstance(found["caption"], str) and found["caption"].strip(), "an empty caption")
            _expect(found["modality"] in (-100, 0, 1, 2, 3, 4, 5), f"modality {found['modality']}")


# --- configuration


def training_yaml(content: bytes) -> None:
    """A configuration of `medmoe train`."""
    from medmoe_hf.training.config import TrainConfig

    config = TrainConfig.from_yaml(_written("train.yaml", content))
    _expect(TrainConfig.from_dict(config.model_dump()) == config, "a configuration that is not equal to its copy")


def sources_yaml(content: bytes) -> None:
    """A file of sources."""
    from medmoe_hf.data.sources import load_sources, source_names

    found = load_sources(_written("sources.yaml", content))
    _expect(len(source_names(found)) == len(found), "another number of names than of sources")


def recipe_yaml(content: bytes) -> None:
    """A recipe of an evaluation."""
    from medmoe_hf.evaluation.recipes.schema import load_recipe

    load_recipe(_written("recipe.yaml", content))


def task_yaml(content: bytes) -> None:
    """A file of tasks, as users write them."""
    from medmoe_hf.inference.task_files import read_task_file

    for one in read_task_file(_written("task.yaml", content)):
        _expect(len(one.task().classes) >= 1, "a task without classes")


def tasks_json(content: bytes) -> None:
    """A `tasks.json`: what is read can be used, written and read again."""
    import torch

    from medmoe_hf.model.tasks_medmoe import read_tasks, task_tokens, write_tasks

    found = read_tasks(_written("tasks.json", content))
    for task in found.values():
        scores = torch.zeros(1, len(task.classes))
        probabilities = task.probabilities(scores)
        _expect(bool(probabilities.isfinite().all()), "probabilities that are not finite")
        task.decide(scores)
        if task.tokens:
            with contextlib.suppress(ValueError):
                task_tokens(task)
    path = f"{folder()}/written.json"
    write_tasks(path, found)
    _expect(read_tasks(path) == found, "tasks that are not equal to their copies")


def model_config(content: bytes) -> None:
    """A `config.json`; transformers' own errors about values are documented for it."""
    from huggingface_hub.errors import StrictDataclassError

    from medmoe_hf.model.configuration_medmoe import MedMoEConfig

    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Allowed from error
    if not isinstance(values, dict):
        raise Allowed
    try:
        MedMoEConfig.from_dict(values)
    except (ValueError, StrictDataclassError) as error:
        raise Allowed from error


# --- checkpoints


_armed = False
_RUNS = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "webbrowser.",
    "pty.",
    "exec",
    "compile",
    "import",
    "open",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed or not event.startswith(_RUNS):
        return
    if event == "open" and (not isinstance(arguments[1], str) or not set(arguments[1]) & set("wax+")):
        return
    if event in ("os.listdir", "os.scandir", "import", "compile", "exec"):
        # Imports of torch itself, and of codecs, when they are first used.
        frame: Any = sys._getframe(1)
        while frame is not None and "checkpoint_files" not in frame.f_code.co_filename:
            name = frame.f_code.co_filename
            if name.startswith("<frozen importlib") or "torch" in name or "encodings" in name:
                return
            frame = frame.f_back
    raise Finding(f"reading a checkpoint runs {event}")


@lru_cache(maxsize=1)
def _watching() -> bool:
    sys.addaudithook(_watch)
    return True


def checkpoint(content: bytes) -> None:
    """A checkpoint: nothing in it is run, and only tensors come out."""
    import torch

    from medmoe_hf.hub.checkpoint_files import read_state_dict

    global _armed
    path = _written("x.safetensors" if content[8:9] == b"{" else "x.pt", content)
    _watching()
    _armed = True
    try:
        tensors = read_state_dict(path)
    finally:
        _armed = False
    _expect(all(type(name) is str and isinstance(one, torch.Tensor) for name, one in tensors.items()), "no tensors")
    for one in tensors.values():
        if one.numel() < 2**20 and not one.is_meta:
            one.reshape(-1)[:1].clone()


# --- texts


def caption(content: bytes) -> None:
    """Rules, templates, sentences, modalities and identifiers of a caption."""
    from medmoe_hf.data.caption_templates import check_template, fill_template, tidy
    from medmoe_hf.data.captions import CAPTION_RULES, apply_rule, detect_rule, is_empty
    from medmoe_hf.data.cells import cell_text, matches
    from medmoe_hf.data.faults import SampleError
    from medmoe_hf.data.modality_words import modality_from_text
    from medmoe_hf.data.sentences import sample_run, sentence_spans
    from medmoe_hf.errors import CaptionError

    text = content.decode("utf-8", errors="replace")
    rng = random.Random(0)
    for rule in {detect_rule(text), "plain", *random.Random(zlib.crc32(content)).sample(sorted(CAPTION_RULES), 1)}:
        try:
            found = apply_rule(rule, text, rng)
            _expect(found and found == found.strip() and found in text and not is_empty(found), "no caption")
        except CaptionError as error:
            _quotes_nobody(str(error))
    spans = sentence_spans(text)
    _expect(all(0 <= a < b <= len(text) for a, b in spans), "spans outside of the text")
    _expect(all(a[1] <= b[0] for a, b in itertools.pairwise(spans)), "sentences that overlap")
    part = sample_run(text, 6, lambda texts: [len(one.split()) for one in texts], rng)
    _expect(part in text and (len(part.split()) <= 6 or not spans), "a run that is too long")
    modality_from_text(text)
    once = tidy(text)
    _expect(cell_text(cell_text(text)) == cell_text(text), "cells that change")
    matches(text, [once[:20], "*x*"])
    try:
        check_template(text, "template")
    except ValueError:
        return
    row = {"label": "nodule", "organ": ["lung", "pleura"], "view": None, "x": 7}
    try:
        filled = fill_template(text, row, {"label": {"nodule": ["mass"]}}, rng)
        _expect(len(filled) < 2**20, "a filled template of a million characters")
    except SampleError as error:
        _quotes_nobody(error.reason)


def identifiers(content: bytes) -> None:
    """The search for identifiers in what is published."""
    from medmoe_hf.hub.identifiers import cells, kinds, personal_column, unescaped

    text = content.decode("utf-8", errors="replace")
    kinds(text)
    for line in text.split("\n")[:20]:
        personal_column(cells(line))
    unescaped(text)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from medmoe_hf.model.tokenization_medmoe import MedMoETokenizer

    return MedMoETokenizer.from_words(["pleural effusion", "no", "ct of the chest"], max_length=24)


def words(content: bytes) -> None:
    """Tokens, their words, and the pooling of tokens to words against a loop in plain Python."""
    import torch

    from medmoe_hf.model.modeling_medmoe import pool_words, word_starts

    text = content.decode("utf-8", errors="replace")
    texts = [text, "no effusion"]
    batch = _tokenizer()(texts, return_tensors="pt")
    ids = batch["word_ids"]
    _expect(batch["input_ids"].shape == ids.shape and ids.shape[1] <= 24, f"tokens of shape {tuple(ids.shape)}")
    written = _tokenizer().words(texts)
    numbers = [sorted({one for one in row if one >= 0}) for row in ids.tolist()]
    for row, found in zip(numbers, written, strict=True):
        _expect(row == list(range(len(found))), "numbers of words with gaps")
    states = torch.arange(float(ids.numel())).reshape(*ids.shape, 1) + 1
    pooled, mask = pool_words(states, ids, "sum")
    wanted = torch.zeros_like(states)
    for index, row in enumerate(ids.tolist()):
        for at, word in enumerate(row):
            if word >= 0:
                wanted[index, word] += states[index, at]
    _expect(bool(torch.equal(pooled, wanted)), "sums of words that differ")
    _expect(mask.sum(dim=1).tolist() == [len(one) for one in written], "masks that differ")
    _expect(word_starts(ids).sum(dim=1).tolist() == [len(one) for one in written], "starts that differ")


@dataclass(frozen=True)
class Harness:
    """What is fuzzed.

    Args:
        run: The harness.
        seeds: Returns the first inputs.
        mutate: Makes new inputs of old ones.
        modules: What is instrumented for coverage, and imported first.
        instrumented: Top-level packages that are instrumented.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: mutators.Mutator
    modules: Sequence[str]
    instrumented: Sequence[str] = ("medmoe_hf",)


_IMAGES = "medmoe_hf.model.medical_images_medmoe"


def _study_files() -> list[bytes]:
    return [*seeds.dicom(), *seeds.nifti()[:4], *seeds.pictures()[:2]]


def _study(content: bytes, rng: random.Random, maximum: int) -> bytes:
    medical = content[128:132] == b"DICM" or content[:2] in (b"\x08\0", b"\x02\0")
    return (mutators.dicom if medical else mutators.nifti)(content, rng, maximum)


HARNESSES: dict[str, Harness] = {
    "dicom": Harness(dicom, seeds.dicom, mutators.dicom, [_IMAGES, "pydicom"], ["medmoe_hf", "pydicom"]),
    "nifti": Harness(
        nifti, seeds.nifti, mutators.inflated(mutators.nifti), [_IMAGES, "nibabel"], ["medmoe_hf", "nibabel"]
    ),
    "studies": Harness(studies, _study_files, _study, ["medmoe_hf.model.studies_medmoe"], ["medmoe_hf"]),
    "picture": Harness(picture, seeds.pictures, mutators.picture, ["medmoe_hf.model.image_files_medmoe"]),
    "tar": Harness(tar, seeds.tars, mutators.tar, ["medmoe_hf.data.shards", "medmoe_hf.data.reading"]),
    "parquet": Harness(parquet, seeds.parquets, mutators.plain(), ["medmoe_hf.data.shards", "medmoe_hf.data.reading"]),
    "csv": Harness(csv_table, seeds.csv_tables, mutators.table, ["medmoe_hf.data.tables"]),
    "jsonl": Harness(jsonl_table, seeds.jsonl_tables, mutators.json_values, ["medmoe_hf.data.tables"]),
    "rows": Harness(
        rows, seeds.jsonl_tables, mutators.json_values, ["medmoe_hf.data.sources", "medmoe_hf.data.reading"]
    ),
    "training": Harness(training_yaml, seeds.training_files, mutators.yaml_values, ["medmoe_hf.training.config"]),
    "sources": Harness(sources_yaml, seeds.source_files, mutators.yaml_values, ["medmoe_hf.data.sources"]),
    "recipe": Harness(recipe_yaml, seeds.recipe_files, mutators.yaml_values, ["medmoe_hf.evaluation.recipes.schema"]),
    "task": Harness(task_yaml, seeds.task_files, mutators.yaml_values, ["medmoe_hf.inference.task_files"]),
    "tasks": Harness(tasks_json, seeds.tasks_json, mutators.json_values, ["medmoe_hf.model.tasks_medmoe"]),
    "config": Harness(
        model_config, seeds.model_configurations, mutators.json_values, ["medmoe_hf.model.configuration_medmoe"]
    ),
    "checkpoint": Harness(checkpoint, seeds.checkpoints, mutators.checkpoint, ["medmoe_hf.hub.checkpoint_files"]),
    "caption": Harness(
        caption,
        seeds.captions,
        mutators.caption,
        ["medmoe_hf.data.caption_templates", "medmoe_hf.data.modality_words", "medmoe_hf.data.sentences"],
    ),
    "identifiers": Harness(identifiers, seeds.captions, mutators.caption, ["medmoe_hf.hub.identifiers"]),
    "words": Harness(words, seeds.captions, mutators.caption, ["medmoe_hf.model.modeling_medmoe"]),
}
"""By name; each reads what strangers may send."""
