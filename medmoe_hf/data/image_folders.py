"""Folders of images: which files are images."""

import os
from collections import Counter
from collections.abc import Iterator

from PIL import Image

from medmoe_hf.model.medical_images_medmoe import is_medical_image

_PLAIN_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_RARE_SUFFIXES = (".avif", ".j2k", ".jp2", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
_IMAGE_SUFFIXES = (*_PLAIN_SUFFIXES, *_RARE_SUFFIXES, ".dcm", ".dicom", ".ima", ".nii", ".nii.gz")
_SIGNED_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Formats with an unambiguous signature."""


_COMPANIONS = (".csv", ".db", ".ini", ".json", ".jsonl", ".md", ".tsv", ".txt", ".xml", ".yaml", ".yml")
"""Files that are common in folders of images and not reported."""


def find_images(folder: str, others: Counter[str], parents: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Yields the paths of the images in a folder and its subfolders, including linked ones.

    Args:
        folder: The folder.
        others: Counter to which the suffixes of files that are not images are added.
        parents: Device and inode of the parent folders, to detect circular links.
    """
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in parents:
        return  # a circular link
    with os.scandir(folder) as entries:
        for entry in entries:
            # hidden files, and the folders of thumbnails on NAS systems
            if entry.name.startswith(".") or entry.name == "@eaDir":
                continue
            if entry.is_dir():
                yield from find_images(entry.path, others, (*parents, identity))
            # A broken link is a missing image, to be reported when it is read.
            elif _is_image(entry.path) and (entry.is_file() or entry.is_symlink()):
                yield entry.path
            elif (suffix := os.path.splitext(entry.name)[1].lower()) not in _COMPANIONS:
                others[suffix] += 1


def _is_image(path: str) -> bool:
    """Returns whether a file is an image, by its name or, for DICOM without a suffix etc., by its first bytes."""
    if path.lower().endswith(_IMAGE_SUFFIXES):
        return True
    if not os.path.isfile(path):
        return False
    if is_medical_image(path):
        return True
    try:
        with Image.open(path, formats=_SIGNED_FORMATS):
            return True
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
