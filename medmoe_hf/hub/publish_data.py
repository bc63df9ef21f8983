"""Publishing data sources on the Hub as sharded Parquet or WebDataset tars, with a card and without identifiers.

Only pixels, captions and modalities are published, under sequential numbers: no headers, paths or metadata of image
files. Text that is burnt into pixels must be checked by people.
"""

import hashlib
import io
import logging
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import datasets
import numpy as np
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image, ImageOps

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.data.fields import IMAGE_FIELDS, find_field
from medmoe_hf.data.stream import SampleStream
from medmoe_hf.errors import ArgumentError, IdentifierError, MissingPackageError, PublishError, ShardError
from medmoe_hf.hub.access import writable
from medmoe_hf.hub.card import markdown_table, source_name
from medmoe_hf.hub.identifiers import kinds
from medmoe_hf.hub.publishing import PublishReport
from medmoe_hf.hub.remote import Remote, readable_size
from medmoe_hf.model.dicom_files_medmoe import no_quotes
from medmoe_hf.model.medical_images_medmoe import is_medical_image
from medmoe_hf.model.modalities_medmoe import MODALITIES, UNKNOWN_MODALITY

try:
    import pydicom
    import pydicom.misc
except ImportError:  # only DICOM needs it
    pydicom = None

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "modality": datasets.ClassLabel(names=list(MODALITIES)),
    }
)
logger = logging.getLogger(__name__)

_NAMED = 20  # files listed in a message
_CARD, _DATA = "README.md", "data/"
_OWN_SHARD = re.compile(r"data/train-\d{5,}\.(?:parquet|tar)")
# The last line of a card. The digest of the text above shows whether it was edited since.
_MARK = "<!-- Written by medmoe data push, which replaces this file while it is unchanged:"
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}

# Header fields of PS3.15 E.1 that identify or describe a person; the second kind may contain a pseudonym.
_IDENTIFYING = (
    *("PatientBirthDate", "PatientBirthTime", "PatientBirthName", "PatientMotherBirthName", "PatientAddress"),
    *("PatientTelephoneNumbers", "PatientTelecomInformation", "OtherPatientIDs", "OtherPatientIDsSequence"),
    *("OtherPatientNames", "MedicalRecordLocator", "PatientComments", "PatientInsurancePlanCodeSequence"),
    *("MilitaryRank", "ResponsiblePerson", "AccessionNumber", "ReferringPhysicianName", "RequestingPhysician"),
    *("PerformingPhysicianName", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy", "OperatorsName"),
    *("InstitutionAddress",),
)
_PSEUDONYMS = ("PatientName", "PatientID")


@dataclass(frozen=True)
class Finding:
    """Something that looks like an identifier.

    Attributes:
        kind: What it looks like.
        location: Name of the file; if the name is the finding, shard and sample number.
    """

    kind: str
    location: str


def export_data(
    sources: Sequence[Any],
    out_dir: str | Path,
    format: Literal["parquet", "webdataset"] = "parquet",
    shard_size: int = 1000,
    i_have_removed_identifiers: bool = False,
    *,
    repo: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes sources as the folder of a Hub dataset: shards in `data/`, and a card.

    Images are written upright as PNG: the same pixels in 8 or 16 bits, without metadata. DICOM and NIfTI images are
    rendered as the source specifies. Captions follow the source's rule; if it draws one of several, that of the first
    epoch is used. Unreadable samples are skipped and counted in the card.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite.
        out_dir: Folder to create; it appears only when it is complete.
        format: `"parquet"` (columns image, caption, modality) or `"webdataset"` (tars of png, txt, cls).
        shard_size: Samples per shard.
        i_have_removed_identifiers: Whether the caller guarantees that the data do not identify patients, so that they
            are not searched for identifiers.
        repo: Hub id for the code examples in the card; `None` to load the folder.
        license: License of the data as a Hub identifier.

    Returns:
        The folder.

    Raises:
        IdentifierError: If headers, captions or file names seem to identify patients.
        FileExistsError: If the folder exists.
        ImportError: For DICOM files without pydicom.
        StreamError: If too many samples cannot be read.
        ValueError: For an endless source, an invalid format or size, or sources without a usable sample.

    Example:
        ```python
        from medmoe_hf.data.sources import PhantomSource
        from medmoe_hf.hub.publish_data import export_data

        export_data([PhantomSource(kind="phantom", length=20)], "phantoms", license="apache-2.0")
        ```
    """
    if format not in _WRITERS or shard_size < 1:
        raise ArgumentError(f"`format` must be one of {', '.join(_WRITERS)}, `shard_size` 1 or more.")
    with atomic_dir(out_dir) as partial:
        (partial / "data").mkdir()
        samples = CheckedSamples(sources, encode_png, i_have_removed_identifiers)
        counts: Counter[tuple[int, int]] = Counter()
        size = 0
        shard: list[dict[str, Any]] = []
        number = 0
        for sample in samples:
            counts[sample["source"], sample["modality"]] += 1
            size += len(sample["image"]) + len(sample["caption"].encode()) + 8
            shard.append(sample)
            if len(shard) == shard_size:
                _WRITERS[format](partial / "data", number, shard)
                shard, number = [], number + 1
        if shard:
            _WRITERS[format](partial / "data", number, shard)
        card = _card(
            sources,
            counts,
            size,
            samples.skipped,
            format,
            i_have_removed_identifiers,
            repo or Path(out_dir).name,
            license,
        )
        text = str(card).strip()
        (partial / _CARD).write_text(f"{text}\n\n{_MARK} {_digest(text)} -->\n", encoding="utf-8")
    return Path(out_dir)


class CheckedSamples:
    """The samples of sources in their order, searched for identifiers: headers and names first, captions on the way.

    Iteration ends with an error if there were identifiers or no samples, so that nothing incomplete is kept.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite.
        encode: Called with each decoded image.
        declared: Whether the caller guarantees that there are no identifiers, so that none are looked for.

    Raises:
        ArgumentError: For an endless source, or sources without a usable sample.
        IdentifierError: If headers, captions or file names seem to identify patients.
    """

    def __init__(self, sources: Sequence[Any], encode: Callable[[Image.Image], Any], declared: bool) -> None:
        for source in sources:
            if source.kind == "phantom" and source.length is None:
                raise ArgumentError("An endless phantom source cannot be published; give it a `length`.")
        self._sources, self._declared = sources, declared
        if not declared:
            _refuse([finding for source in sources for finding in _in_files(source)])
        self._stream = SampleStream(sources, shuffle=False, fixed_captions=True, prepare=encode)

    @property
    def skipped(self) -> int:
        """Number of unreadable samples so far."""
        return self._stream.faults.bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        findings: list[Finding] = []
        empty = True
        for sample in self._stream:
            if not self._declared:
                name = f"{self._stream.names[sample['source']]}, sample {sample['position']}"
                location = _location(sample["key"], name)
                findings += [Finding(f"{kind} in a caption", location) for kind in kinds(sample["caption"])]
            empty = False
            yield sample
        _refuse(findings)
        if empty:
            raise ArgumentError("The sources hold no samples that can be published.")


def push_data(
    sources: Sequence[Any],
    repo: str,
    format: Literal["parquet", "webdataset"] = "parquet",
    shard_size: int = 1000,
    i_have_removed_identifiers: bool = False,
    *,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    commit_message: str = "Upload dataset",
) -> str:
    """Exports sources and uploads them to the Hub in one commit; old shards of an earlier push are removed.

    The repository is created if it does not exist. A push that is interrupted leaves the old revision, and can be
    repeated. Files of others are protected: files under `data/` and a card that this function did not write, or that
    was edited since, stop the push unless `replace` is set. Files outside `data/` are kept.

    Args:
        sources: Sources of `medmoe_hf.data.sources`, all finite.
        repo: Hub id of the dataset, or only the name for the account of the token.
        format: `"parquet"` (columns image, caption, modality) or `"webdataset"` (tars of png, txt, cls).
        shard_size: Samples per shard.
        i_have_removed_identifiers: Whether the caller guarantees that the data do not identify patients, so that they
            are not searched for identifiers.
        license: License of the data as a Hub identifier.
        private: Whether a new repository is private; `None` for the account's default. It must agree with the
            visibility of an existing repository.
        revision: Branch to commit to, created from main if it does not exist; `None` for main.
        create_pr: Whether to open a pull request instead.
        replace: Whether to remove other files under `data/`, and to replace a card of others.
        dry_run: Whether to check and list everything without sending it; no token is needed for a public repository.
        commit_message: Commit message.

    Returns:
        URL of the commit or the pull request; with `dry_run`, each file that would change, and how.

    Raises:
        IdentifierError: If headers, captions or file names seem to identify patients; nothing is sent.
        PublishError: Without a token, permission or network; for a repository with another visibility, or with files
            that `replace` would remove.
        StreamError: If too many samples cannot be read.
        ValueError: For an endless source, an invalid format or size, or sources without a usable sample.

    Example:
        ```python
        from medmoe_hf.data.sources import load_sources
        from medmoe_hf.hub.publish_data import push_data

        push_data(load_sources("sources.yaml"), "you/pairs", private=True, license="cc-by-4.0")
        ```
    """
    if create_pr and revision is not None:
        raise PublishError("A pull request is for main: leave out the branch.")
    # Access first: the export may take hours.
    _find(repo, private, revision, create_pr, replace, dry_run)
    with tempfile.TemporaryDirectory(prefix="medmoe-data-") as temporary:
        folder = export_data(
            sources,
            Path(temporary) / "dataset",
            format,
            shard_size,
            i_have_removed_identifiers,
            repo=writable(repo, dry_run=dry_run),
            license=license,
        )
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        # Checked again, as somebody may have pushed during the export.
        remote = _find(repo, private, revision, create_pr, replace, dry_run)
        changes = list(remote.changes(paths, keep=[path for path in remote.files if not path.startswith(_DATA)]))
        if dry_run:
            return str(PublishReport(remote.repo, remote.branch, changes, dry_run, created=not remote.exists))
        commit, url = remote.send(paths, changes, private, commit_message, create_pr)
    return url if create_pr else f"{remote.page}/commit/{commit}"


def _find(
    repo: str, private: bool | None, revision: str | None, create_pr: bool, replace: bool, dry_run: bool
) -> Remote:
    """The repository, if the push is allowed.

    Raises:
        PublishError: If it has another visibility, or if it holds files of others and `replace` is not set.
    """
    remote = Remote.find(repo, revision, dry_run=dry_run, kind="dataset")
    remote.accept(private, create_pr)
    foreign = _foreign(remote)
    if foreign and not replace:
        listed = "\n".join(f"  {line}" for line in foreign[:_NAMED])
        more = f"\n  and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        raise PublishError(
            f"{remote.repo} holds files that no push created; nothing was sent. `--replace` would remove or replace:"
            f"\n{listed}{more}\nChoose another name, or save what you need and push with `--replace`."
        )
    return remote


def _foreign(remote: Remote) -> list[str]:
    """The files of others that a push would remove or replace, one line each."""
    card = remote.read(_CARD).decode("utf-8", "replace") if _CARD in remote.files else ""
    text, mark, rest = card.rpartition(_MARK)
    foreign = [
        f"{path} ({readable_size(entry.size)})"
        for path, entry in sorted(remote.files.items())
        if path.startswith(_DATA) and not (mark and _OWN_SHARD.fullmatch(path))
    ]
    if _CARD in remote.files and not mark:
        foreign.append(f"{_CARD} ({readable_size(remote.files[_CARD].size)})")
    elif mark and rest.split(maxsplit=1)[:1] != [_digest(text)]:
        foreign.append(f"{_CARD} (written by a push, and edited since)")
    return foreign


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()


# Identifiers


def _in_files(source: Any) -> Iterator[Finding]:
    """Identifiers in headers and file names; phantoms have neither."""
    if source.kind == "phantom":
        return
    for shard in source.shards():
        try:
            count = len(shard)
        except ShardError:
            continue  # reported by the stream
        for number in range(count):
            try:
                row = shard.read(shard.locate(number))
                key = find_field(row, source.image, IMAGE_FIELDS)
                content = None if key is None else row[key]
                path = content.get("path") if isinstance(content, dict) else content
                if isinstance(content, dict) and content.get("bytes") is not None:
                    content = content["bytes"]
                elif isinstance(content, dict):
                    content = path
                name = str(row.get("__key__") or (path if isinstance(path, str) else ""))
                location = _location(name or shard.name, f"{PurePath(shard.name).name}, sample {number}")
                for kind in kinds(PurePath(name).stem):
                    yield Finding(f"{kind} in the name of a file", location)
                if is_medical_image(content):
                    for field in _in_header(content):
                        yield Finding(f"{field} in a DICOM header", location)
            except OSError:
                continue  # counted by the stream


def _in_header(content: Any) -> list[str]:
    """The fields of a DICOM header that contain an identifier; none for NIfTI, which has no such fields."""
    if pydicom is None:
        raise MissingPackageError('Reading DICOM headers needs the package pydicom: pip install "medmoe_hf[dicom]"')
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with no_quotes():
            header = pydicom.dcmread(source, stop_before_pixels=True, force=True)
            removed = str(header.get("PatientIdentityRemoved", "")).strip().upper() == "YES"
            sought = _IDENTIFYING if removed else (*_IDENTIFYING, *_PSEUDONYMS)
            found = {element.keyword for element in header.iterall() if element.keyword in sought and element.value}
    except Exception:  # parsers raise a dozen types, and their messages quote the header
        # Files without DICOM's magic number may be NIfTI.
        marked = pydicom.misc.is_dicom(io.BytesIO(content) if isinstance(content, bytes) else content)
        return ["something unreadable"] if marked else []
    if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES":
        found.add("BurnedInAnnotation")
    return sorted(found)


def _location(name: str, otherwise: str) -> str:
    """The file's name, unless it seems to identify a patient."""
    base = PurePath(name).name
    return otherwise if kinds(PurePath(name).stem) or not base else base


def _refuse(findings: Sequence[Finding]) -> None:
    if not findings:
        return
    counts = Counter(finding.kind for finding in findings)
    locations = list(dict.fromkeys(finding.location for finding in findings))
    listed = "\n".join(f"  {count} x {kind}" for kind, count in counts.most_common())
    more = f", and {len(locations) - _NAMED} more" if len(locations) > _NAMED else ""
    raise IdentifierError(
        f"These data seem to identify patients, and nothing was published:\n{listed}\n"
        f"Files: {', '.join(locations[:_NAMED])}{more}.\n"
        "Remove all identifiers. If these are none, or only in headers, which are never published, add "
        "`--i-have-removed-identifiers`."
    )


# Writing


def encode_png(image: Image.Image) -> bytes:
    """Encodes the upright pixels of an image as PNG, without metadata.

    Raises:
        ValueError: For values outside 16 bits.
    """
    # Of the metadata, only the orientation affects the visible image.
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise ValueError("a PNG holds unsigned integers of 16 bits")
        image = Image.fromarray(values.astype(np.uint16))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    # A new image from the pixels: Pillow would write the colour profile and comments of the old one.
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, "PNG")
    return buffer.getvalue()


def _write_parquet(folder: Path, number: int, samples: Sequence[dict[str, Any]]) -> None:
    rows = {
        "image": [{"bytes": sample["image"], "path": None} for sample in samples],
        "caption": [sample["caption"] for sample in samples],
        "modality": [None if sample["modality"] == UNKNOWN_MODALITY else sample["modality"] for sample in samples],
    }
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"train-{number:05d}.parquet")


def _write_tar(folder: Path, number: int, samples: Sequence[dict[str, Any]]) -> None:
    with tarfile.open(folder / f"train-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, sample in enumerate(samples):
            parts = {
                "png": sample["image"],
                "txt": sample["caption"].encode(),
                "cls": str(sample["modality"]).encode(),
            }
            add_sample(archive, f"{number:05d}-{index:06d}", parts)


def add_sample(archive: tarfile.TarFile, key: str, parts: Mapping[str, bytes]) -> None:
    """Adds the files of a sample to a WebDataset tar.

    Args:
        archive: Tar that is open for writing.
        key: Name of the sample.
        parts: Extension -> content.
    """
    for extension, content in parts.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


_WRITERS = {"parquet": _write_parquet, "webdataset": _write_tar}


# The card

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ total }} medical images with captions{{ " (synthetic drawings, not of patients)" if synthetic }}, \
written by [medmoe_hf](https://arxiv.org/abs/2506.08356) to train image-text models.

License: {{ license or "not stated" }}

## Content

{{ modality_table }}

{{ source_table }}

{% if format == "parquet" -%}
Parquet with the columns `image` (PNG), `caption` and `modality` (empty if unknown).
{%- else -%}
WebDataset tars with `png`, `txt` (the caption) and `cls` (the modality's number, -100 if unknown).
{%- endif %}
Numbers of the modalities: {{ numbers }}. {{ skipped }} unreadable samples were skipped.

## How to load it

```python
from datasets import load_dataset

dataset = load_dataset("{{ dataset_id }}", split="train", streaming=True)
sample = next(iter(dataset))
```

To train on it, as a source of `medmoe train`:

```yaml
- {kind: hub, path: {{ dataset_id }}}
```

## Personal data

{% if declared -%}
The publisher states that these data do not identify patients. They were not searched for identifiers.
{%- elif synthetic -%}
These are synthetic drawings without data of patients.
{%- else -%}
DICOM headers, file names and captions were searched for dates, record numbers, names, phone numbers and e-mail
addresses, and none were found. The search is no proof: it finds known patterns only, and cannot read text in pixels.
{%- endif %}
The data contain only pixels, captions and modalities: no headers, original file names or image metadata.

## Limits

Captions and modalities come from the sources; their accuracy is not stated. There is no field for the person, so
images of one person may be in both parts of a split. Not for decisions about patients.
"""


def _card(
    sources: Sequence[Any],
    counts: Counter[tuple[int, int]],
    size: int,
    skipped: int,
    format: str,
    declared: bool,
    dataset_id: str,
    license: str | None,
) -> DatasetCard:
    """The card of a dataset.

    Args:
        sources: The sources.
        counts: (source, modality) -> number of images.
        size: Bytes of images, captions and modalities.
        skipped: Number of unreadable samples.
        format: Format of the shards.
        declared: Whether the caller guarantees that there are no identifiers.
        dataset_id: Hub id, or name of the folder.
        license: License of the data; `None` if it is not stated.
    """
    total = counts.total()
    by_modality: Counter[int] = Counter()
    by_source: Counter[int] = Counter()
    for (source, modality), count in counts.items():
        by_modality[modality] += count
        by_source[source] += count
    ending = {"parquet": "parquet", "webdataset": "tar"}[format]
    title = dataset_id.split("/")[-1]
    data = DatasetCardData(
        license=license,
        pretty_name=title,
        size_categories=[next((name for limit, name in _SIZES.items() if total < limit), "n>10M")],
        task_categories=["zero-shot-image-classification"],
        tags=["medmoe", "medical-imaging", "image-text"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"data/train-*.{ending}"}]}],
    )
    # The Hub makes Croissant metadata of these, and of the license.
    info = datasets.DatasetInfo(
        # those of tars are found by `datasets`, and include the keys of samples
        features=FEATURES if format == "parquet" else None,
        splits=[{"name": "train", "num_bytes": size, "num_examples": total}],
        dataset_size=size,
    )
    DatasetInfosDict(default=info).to_dataset_card_data(data)
    if license is None:
        logger.warning("The card states no license, and so will Croissant metadata on the Hub: use `--license`.")
    names = {UNKNOWN_MODALITY: "unknown", **dict(enumerate(MODALITIES))}
    return DatasetCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        total=f"{total:,}",
        synthetic=all(source.kind == "phantom" for source in sources),
        modality_table=markdown_table(
            ("modality", "images"), [[names[key], f"{count:,}"] for key, count in sorted(by_modality.items())]
        ),
        source_table=markdown_table(
            ("source", "kind", "images"),
            [
                [source_name(source.model_dump()), source.kind, f"{by_source[index]:,}"]
                for index, source in enumerate(sources)
            ],
        ),
        numbers=", ".join(f"{index} {name}" for index, name in enumerate(MODALITIES)),
        format=format,
        skipped=skipped,
        dataset_id=dataset_id,
        declared=declared,
    )
