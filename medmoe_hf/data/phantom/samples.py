"""Samples of phantoms: an image, its report, and where the finding is."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medmoe_hf.common.files import atomic_write
from medmoe_hf.data.phantom.drawing import DRAW, Mask
from medmoe_hf.data.phantom.reports import random_scene, write_report
from medmoe_hf.errors import ArgumentError, PathExistsError
from medmoe_hf.model.modalities_medmoe import MODALITIES, modality_id

MIN_IMAGE_SIZE = 48


def _check_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    given = (modalities,) if isinstance(modalities, str) else tuple(modalities)
    try:
        chosen = tuple(MODALITIES[modality_id(name)] for name in given)
    except (ValueError, IndexError):
        chosen = ()
    if not chosen or len(set(chosen)) < len(chosen):
        raise ArgumentError(f"modalities must be one or more distinct names from {MODALITIES}, got {given}")
    return chosen


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value}")


def _box(mask: Mask) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def phantom_sample(
    seed: int, index: int, *, image_size: int = 224, modalities: Sequence[str] = MODALITIES
) -> dict[str, Any]:
    """Draws one synthetic image-report pair. It shows no patient and is not clinical evidence.

    Args:
        seed: Seed of the sequence of samples, 0 or more.
        index: Index of the sample in the sequence, 0 or more. Samples are independent of one another.
        image_size: Width and height in pixels, 48 or more.
        modalities: Modalities to choose from, uniformly; distinct names from `MODALITIES`.

    Returns:
        A dictionary with the fields

        - `id`: `"phantom-<seed>-<index>"`;
        - `image`: PIL image of `image_size` x `image_size` pixels, of mode `"L"` for xray, ct, mri and ultrasound and
          `"RGB"` for histopathology and fundus;
        - `caption`: the report, one or two sentences of 8 to 25 words in total (punctuation counted, as BERT splits);
        - `modality`: id 0..5, the index in `MODALITIES` regardless of `modalities`;
        - `finding`: one of `FINDINGS[MODALITIES[modality]]`; a quarter of the samples are `"normal"`;
        - `finding_word`: the word of the caption that names the finding, `""` for normal;
        - `box`: `[x0, y0, x1, y1]` in pixels with exclusive ends, tight around the mask; `[]` for normal;
        - `mask`: PIL image of mode `"L"`, 255 inside the finding and 0 elsewhere.

    Raises:
        ValueError: If `seed` or `index` is negative, `image_size` is below 48, or `modalities` is empty or has an
            unknown or repeated name.

    Example:
        >>> from medmoe_hf.data import phantom_sample
        >>> sample = phantom_sample(seed=0, index=1, image_size=64)
        >>> sample["image"].size
        (64, 64)
    """
    chosen = _check_modalities(modalities)
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    _check_at_least("seed", seed, 0)
    _check_at_least("index", index, 0)
    # Drawing has its own random generator, so that changes to it leave scenes and reports unchanged.
    rng = np.random.default_rng([seed, index, 0])
    scene = random_scene(rng, chosen)
    caption, word = write_report(rng, scene)
    pixels, mask = DRAW[scene.modality](np.random.default_rng([seed, index, 1]), image_size, scene)
    return {
        "id": f"phantom-{seed}-{index}",
        "image": Image.fromarray(pixels),
        "caption": caption,
        "modality": MODALITIES.index(scene.modality),
        "finding": scene.finding,
        "finding_word": word,
        "box": _box(mask),
        "mask": Image.fromarray(mask.astype(np.uint8) * np.uint8(255)),
    }


def _encode(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def write_webdataset(
    out: str | Path,
    *,
    shards: int,
    samples_per_shard: int = 1000,
    seed: int = 0,
    image_size: int = 224,
    modalities: Sequence[str] = MODALITIES,
) -> list[Path]:
    """Writes synthetic samples as WebDataset shards `phantom-000000.tar`, `phantom-000001.tar`, ...

    Sample `i` (see `phantom_sample`) consists of the files `<i>.png` (image), `<i>.mask.png`, `<i>.txt` (caption),
    `<i>.cls` (modality id) and `<i>.json` (`id`, `finding`, `finding_word`, `box`), with `i` in nine digits. Shard `k`
    starts at sample `k * samples_per_shard`. Equal arguments produce equal bytes. Each shard is written atomically.

    Args:
        out: Folder to write to; created if it does not exist.
        shards: Number of shards, 1 or more.
        samples_per_shard: Number of samples per shard, 1 or more.
        seed: Seed of the sequence of samples, 0 or more.
        image_size: Width and height in pixels, 48 or more.
        modalities: Modalities to choose from; see `phantom_sample`.

    Returns:
        Paths of the shards, in order.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If `out` already contains phantom shards. Nothing is overwritten.

    Example:
        >>> import tempfile
        >>> from medmoe_hf.data import write_webdataset
        >>> folder = tempfile.mkdtemp()
        >>> [path.name for path in write_webdataset(folder, shards=1, samples_per_shard=4, image_size=48)]
        ['phantom-000000.tar']
    """
    chosen = _check_modalities(modalities)
    _check_at_least("shards", shards, 1)
    _check_at_least("samples_per_shard", samples_per_shard, 1)
    _check_at_least("seed", seed, 0)
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    out = Path(out)
    present = sorted(out.glob("phantom-*.tar"))
    if present:
        raise PathExistsError(f"{present[0]} already exists; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"phantom-{shard:06d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        with atomic_write(path) as draft, tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(shard * samples_per_shard, (shard + 1) * samples_per_shard):
                sample = phantom_sample(seed, index, image_size=image_size, modalities=chosen)
                _add_to_archive(archive, f"{index:09d}", sample)
    return paths


def _add_to_archive(archive: tarfile.TarFile, key: str, sample: dict[str, Any]) -> None:
    details = {name: sample[name] for name in ("id", "finding", "finding_word", "box")}
    members = {
        "png": _encode(sample["image"], "PNG"),
        "mask.png": _encode(sample["mask"], "PNG"),
        "txt": sample["caption"].encode(),
        "cls": str(sample["modality"]).encode(),
        "json": json.dumps(details).encode(),
    }
    for extension, content in members.items():
        # A new TarInfo has a fixed time, owner and mode, so that the archive's bytes depend on the samples only.
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
