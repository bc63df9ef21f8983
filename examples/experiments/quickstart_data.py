"""Real scans that Python packages ship, as the files that an export of your own would have: used by the quickstart.

Needs pydicom, nibabel, matplotlib and scikit-image; nothing is downloaded. None of them ships an X-ray.
"""

import csv
import importlib.util
import shutil
import tarfile
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pydicom
from PIL import Image
from skimage.color import rgb2hed

SCANS = {
    "ct-head.dcm": ("pydicom/data/test_files/J2K_pixelrep_mismatch.dcm", "CT scan of the head."),
    "ct-spine.dcm": ("pydicom/data/test_files/CT_small.dcm", "CT scan of the spine."),
    "mri-abdomen.dcm": ("pydicom/data/test_files/examples_overlay.dcm", "MRI of the abdomen."),
    "mri-small.dcm": ("pydicom/data/test_files/MR_small.dcm", "MR image."),
    "mri-brain.nii.gz": ("nibabel/tests/data/example4d.nii.gz", "Axial MRI of the brain."),
    "ultrasound-heart.dcm": ("pydicom/data/test_files/examples_ybr_color.dcm", "Ultrasound of the heart."),
    "ultrasound-node.dcm": ("pydicom/data/test_files/examples_jpeg2k.dcm", "Ultrasound of a lymph node."),
    "fundus.jpg": ("skimage/data/retina.jpg", "Fundus photograph of the retina."),
    "histopathology.png": ("skimage/data/ihc.png", "Histopathology image of the colon, immunohistochemistry."),
}
COVERED = {"ultrasound-node.dcm": 104}
"""Scan -> rows at the top that name a hospital and are blackened, so that no picture of the quickstart shows it."""
REPORTS = {
    "glands": ("Histopathology image of the colon: stained glands.", "Stained glands."),
    "stroma": ("Histopathology image of the colon: stroma between the glands.", "Stroma between the glands."),
}
TILE, TRAIN, TEST = 80, 12, 20  # side in pixels; tiles per tissue


def write_scans(folder: Path) -> None:
    """Write the scans, `scans.csv`, and one shard with all of them but the NIfTI file."""
    (folder / "scans").mkdir(parents=True)
    (folder / "shards").mkdir()
    rows = []
    for name, (file, report) in SCANS.items():
        package, _, inside = file.partition("/")
        spec = importlib.util.find_spec(package)
        shutil.copyfile(Path(spec.submodule_search_locations[0]) / inside, folder / "scans" / name)
        if name in COVERED:
            cover(folder / "scans" / name, COVERED[name])
        rows.append((f"scans/{name}", report, name.split("-")[0].split(".")[0]))
    with matplotlib.cbook.get_sample_data("s1045.ima.gz") as file:
        head = np.frombuffer(file.read(), np.uint16).reshape(256, 256)
    Image.fromarray((head / head.max() * 255).astype(np.uint8)).save(folder / "scan.png")
    rows.append(("scan.png", "Sagittal MRI of the brain.", "mri"))
    write_table(folder / "scans.csv", ("path", "report", "modality"), rows)
    with tarfile.open(folder / "shards" / "train-000000.tar", "w") as shard:
        for number, (path, report, _) in enumerate(row for row in rows if not row[0].endswith(".nii.gz")):
            (folder / "report.txt").write_text(report)
            shard.add(folder / path, f"{number:06d}.{path.partition('.')[2]}")
            shard.add(folder / "report.txt", f"{number:06d}.txt")
    (folder / "report.txt").unlink()


def cover(path: Path, rows: int) -> None:
    """Blacken rows at the top of a DICOM file."""
    scan = pydicom.dcmread(path)
    scan.decompress()
    pixels = scan.pixel_array.copy()
    pixels[:rows] = 0
    scan.PixelData = pixels.tobytes()
    scan.save_as(path)


def write_tiles(folder: Path) -> None:
    """Write tiles of the section, labelled by the amount of stain: `reports.csv` (left half), `test.csv` (right)."""
    section = np.asarray(Image.open(folder / "scans" / "histopathology.png").convert("RGB"))
    stained = rgb2hed(section)[..., 2] > 0.03
    corners = np.random.default_rng(0).permutation(np.mgrid[0:432:24, 0:432:24].reshape(2, -1).T)
    for table, left, count in (("reports.csv", 0, TRAIN), ("test.csv", 256, TEST)):
        rows: list[tuple[str, ...]] = []
        for y, x in corners[(corners[:, 1] >= left) & (corners[:, 1] <= left + 256 - TILE)]:
            share = stained[y : y + TILE, x : x + TILE].mean()
            tissue = "glands" if share > 0.85 else "stroma" if share < 0.35 else None
            number = sum(row[-1] == tissue for row in rows)
            if tissue is None or number == count:
                continue
            path = Path("tiles") / ("test" if left else "train") / tissue / f"{y:03d}-{x:03d}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(section[y : y + TILE, x : x + TILE]).save(folder / path)
            rows.append((path.as_posix(), REPORTS[tissue][number % 2], "histopathology", f"slide-{left}", tissue))
        write_table(folder / table, ("path", "report", "modality", "patient", "tissue"), rows)


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
