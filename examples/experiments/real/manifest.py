"""Reading a folder of real scans: `manifest.csv`, with one row per image, and the images that it names."""

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medmoe_hf.data import MODALITIES
from medmoe_hf.errors import SourceError

SPLITS = ("train", "val", "test", "external")
COLUMNS = ("file", "modality", "split", "source", "subject", "label", "body_part", "view", "text", "licence", "sha256")

DOUBTFUL: dict[str, str] = {
    "lc25000-lung": "no license but a statement of the authors that any AI researcher may use the images freely; the "
    "tiles are augmented copies of few slides",
    "busi": "the license is that of the article, and the page of the data names none",
    "nih-cxr14": "the terms are recalled and not seen: no restriction on use, attribution asked",
    "brain-tumor-mri": "a compilation under CC0 of sets under CC BY 4.0 and MIT, and one (Br35H) without stated terms",
    "hygd": "ODC-By 1.0 was seen at a copy of the data, not at the repository that the images came from",
    "csdi": "one line of its repository still says CC BY-NC 4.0, which its license file replaced",
    "hrf-full": "the license was seen on the card of a copy",
}
"""Source -> why its terms are in doubt. Sources that are not in a folder are ignored."""

Row = Mapping[str, str]


def read_manifest(folder: str | Path) -> list[dict[str, str]]:
    """Reads the rows of `manifest.csv`.

    Args:
        folder: Folder with the manifest; the column `file` is relative to it.

    Returns:
        Column -> cell, for each image.

    Raises:
        SourceError: If the file or a column is missing, or a cell holds no known split or modality.
    """
    path = Path(folder) / "manifest.csv"
    if not path.is_file():
        raise SourceError(f"{path} does not exist; pass the folder that holds manifest.csv and the images.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise SourceError(f"{path} lacks the column {missing[0]}; expected {', '.join(COLUMNS)}.")
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        for column, known in (("split", SPLITS), ("modality", tuple(MODALITIES))):
            if row[column] not in known:
                raise SourceError(
                    f"{path}, line {number}: {column} is {row[column]!r}, not one of {', '.join(known)}."
                )
    return rows


def matching(rows: Iterable[Row], where: Mapping[str, Sequence[str]]) -> list[Row]:
    """Selects rows whose cells are among the accepted ones, for each column of `where`."""
    return [row for row in rows if all(row[column] in accepted for column, accepted in where.items())]


def is_share_alike(row: Row) -> bool:
    """Whether weights that are trained on an image would have to carry its license."""
    return re.search(r"\bSA\b", row["licence"]) is not None


def for_training(rows: Iterable[Row]) -> list[Row]:
    """Selects the rows of the train split that are not share-alike."""
    return [row for row in rows if row["split"] == "train" and not is_share_alike(row)]


def sha256(path: str | Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
