"""Sources written in the layouts of other libraries: CLIP_benchmark's webdataset folders and open_clip's CSV.

As for the Hub, only pixels, captions and classes are written, under sequential numbers.
"""

import csv
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from medmoe_hf.common.files import atomic_dir, atomic_write
from medmoe_hf.data.clip_benchmark import CLASS_NAMES, SHARD_COUNT, TEMPLATES, check_template, read_names
from medmoe_hf.errors import ArgumentError, PathExistsError
from medmoe_hf.hub.publish_data import CheckedSamples, add_sample, encode_png
from medmoe_hf.model.image_processing_medmoe import to_rgb

CSV_NAME = "pairs.csv"


def export_clip_benchmark(
    sources: Sequence[Any],
    folder: str | Path,
    split: str = "test",
    templates: Sequence[str] = (),
    shard_size: int = 1000,
    i_have_removed_identifiers: bool = False,
) -> list[str]:
    """Writes sources as a split of a set in CLIP_benchmark's webdataset layout.

    A new folder gets the classes in the order in which they occur; another split of an existing folder uses its
    classes and templates. Images are PNG of 8 bits, since CLIP_benchmark clips larger values.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite, whose samples have labels.
        folder: Folder of the set. The split's folder appears only when it is complete.
        split: Name of the split's folder.
        templates: Sentences with `{c}` in place of the class; by default the class alone.
        shard_size: Samples per tar.
        i_have_removed_identifiers: As for `export_data`.

    Returns:
        Names of the classes.

    Raises:
        ArgumentError: A sample has no label, or a class that the existing folder lacks; fewer than two classes; or
            templates for an existing folder.
        PathExistsError: The split exists, or a folder of something else.
        SourceError: A template has no `{c}`.
        IdentifierError: If headers, captions or file names seem to identify patients.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.hub.data_layouts import export_clip_benchmark

        export_clip_benchmark(load_sources("test.yaml"), "benchmark", templates=["a photo of {c}"])
        ```
    """
    root = Path(folder)
    if shard_size < 1 or Path(split).name != split or split in ("", ".", ".."):
        raise ArgumentError("`shard_size` must be 1 or more, `split` the name of a folder.")
    known = (root / CLASS_NAMES).is_file()
    if not known and root.exists() and any(root.iterdir()):
        raise PathExistsError(f"{root} exists and has no {CLASS_NAMES}; choose another folder.")
    if known and templates:
        raise ArgumentError(f"{root / TEMPLATES} exists already; leave out the templates.")
    for template in templates:
        check_template(template, "template")
    classes = read_names(root)[0] if known else []
    with atomic_dir(root / split) as partial:
        samples = CheckedSamples(sources, _encode_8_bits, i_have_removed_identifiers)
        count = shards = 0
        for batch in _batches(samples, shard_size):
            with tarfile.open(partial / f"{shards}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
                for sample in batch:
                    number = _class_of(sample, classes, known, root)
                    add_sample(archive, f"s{count:07d}", {"png": sample["image"], "cls": str(number).encode()})
                    count += 1
            shards += 1
        if len(classes) < 2:
            raise ArgumentError(f"All samples are of the class {classes[0]!r}; a benchmark needs two or more.")
        (partial / SHARD_COUNT).write_text(f"{shards}\n", encoding="utf-8")
        if not known:
            for name, lines in ((CLASS_NAMES, classes), (TEMPLATES, templates or ["{c}"])):
                with atomic_write(root / name) as path:
                    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return classes


def _batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    rest = iter(samples)
    while batch := list(islice(rest, size)):
        yield batch


def _class_of(sample: dict[str, Any], classes: list[str], known: bool, root: Path) -> int:
    """Number of a sample's class; adds a class that is new to `classes` unless they are `known`."""
    label = sample["label"]
    if label is None:
        raise ArgumentError(f"{sample['key']} has no label; name the field of the classes with `label` of the source.")
    # a line of a file
    name = " ".join(str(label).split())
    if name not in classes:
        if known:
            raise ArgumentError(f"{sample['key']} is of the class {name!r}, which {root / CLASS_NAMES} lacks.")
        classes.append(name)
    return classes.index(name)


def export_open_clip(sources: Sequence[Any], folder: str | Path, i_have_removed_identifiers: bool = False) -> Path:
    """Writes sources as images and the CSV that open_clip trains on.

    The columns are `filepath`, relative to the folder, and `title`, with a tab between them; open_clip must therefore
    be started in the folder. Images are PNG of 8 bits.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite.
        folder: Folder to create; it appears only when it is complete.
        i_have_removed_identifiers: As for `export_data`.

    Returns:
        Path of the CSV.

    Raises:
        PathExistsError: The folder exists.
        ArgumentError: For an endless source, or sources without a usable sample.
        IdentifierError: If headers, captions or file names seem to identify patients.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.hub.data_layouts import export_open_clip

        export_open_clip(load_sources("sources.yaml"), "pairs")
        ```
    """
    with atomic_dir(folder) as partial:
        (partial / "images").mkdir()
        samples = CheckedSamples(sources, _encode_8_bits, i_have_removed_identifiers)
        with open(partial / CSV_NAME, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(("filepath", "title"))
            for number, sample in enumerate(samples):
                path = f"images/{number:08d}.png"
                (partial / path).write_bytes(sample["image"])
                table.writerow((path, " ".join(sample["caption"].split())))
    return Path(folder) / CSV_NAME


def _encode_8_bits(image: Image.Image) -> bytes:
    """PNG as for the Hub, but with values of 16 bits and floats scaled as our processor scales them."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return encode_png(image)
    scaled = to_rgb(image)[0].round().clamp(0, 255).byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(scaled).save(buffer, "PNG")
    return buffer.getvalue()
