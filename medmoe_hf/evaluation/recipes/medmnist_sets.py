"""Recipes of the 2D sets of MedMNIST+ and MedMNIST-C, with the classes and tasks that their package states."""

from difflib import get_close_matches
from typing import Any

from medmoe_hf.errors import MissingPackageError, RecipeError

CLEAN, CORRUPTED = "medmnist:", "medmnist-c:"
"""Prefixes of the recipes' names."""

SIZES = (28, 64, 128, 224)
"""Sides of the images in pixels. MedMNIST-C has the largest only."""

# Set -> modality, and the beginning of a sentence that a class completes. Grades without names have no sentences.
_SETS = {
    "pathmnist": ("histopathology", "Histopathology image of the colon"),
    "chestmnist": ("xray", "Chest radiograph"),
    "dermamnist": ("unknown", "Dermoscopy image of the skin"),
    "octmnist": ("unknown", "Optical coherence tomography of the retina"),
    "pneumoniamnist": ("xray", "Chest radiograph of a child"),
    "retinamnist": ("fundus", ""),
    "breastmnist": ("ultrasound", "Ultrasound of the breast"),
    "bloodmnist": ("unknown", "Microscopy of a blood cell"),
    "tissuemnist": ("unknown", "Fluorescence microscopy of the kidney cortex"),
    "organamnist": ("ct", "Axial CT of the abdomen"),
    "organcmnist": ("ct", "Coronal CT of the abdomen"),
    "organsmnist": ("ct", "Sagittal CT of the abdomen"),
}
# Public sets that the images are from, and that models are trained on.
_SOURCES = {
    "pathmnist": "NCT-CRC-HE-100K",
    "chestmnist": "NIH ChestX-ray14 (UniMed, and the checkpoint small, contain images of it)",
    "dermamnist": "HAM10000",
    "octmnist": "Kermany et al. 2018 (OCT)",
    "pneumoniamnist": "Kermany et al. 2018 (chest X-rays of children, which the checkpoint small was trained on)",
    "retinamnist": "DeepDRiD",
    "breastmnist": "BUSI (which the checkpoint small was trained on)",
    "tissuemnist": "BBBC051",
    "organamnist": "LiTS",
    "organcmnist": "LiTS",
    "organsmnist": "LiTS",
}
# The names of these sets in `training_sets.yaml`, where they are not the same.
_PUBLIC_SETS = {
    "chestmnist": "NIH ChestX-ray14",
    "octmnist": "Kermany OCT",
    "pneumoniamnist": "Kermany chest X-rays",
    "breastmnist": "BUSI",
}
# Labels that are no words of a sentence.
_WORDS = {"pleural": "pleural thickening"}


def is_medmnist(name: str) -> bool:
    """Whether a recipe's name is one of this file's."""
    return name.startswith((CLEAN, CORRUPTED))


def medmnist_info(flag: str) -> dict[str, Any]:
    """What the package `medmnist` states about a 2D set.

    Args:
        flag: Name of the set, such as `pathmnist`.

    Returns:
        Its entry of `medmnist.INFO`.

    Raises:
        MissingPackageError: The package is not installed.
        RecipeError: It has no such 2D set.
    """
    try:
        from medmnist.info import INFO
    except ImportError as error:
        raise MissingPackageError('Recipes of MedMNIST need its package: pip install "medmoe_hf[medmnist]"') from error
    if flag not in _SETS or flag not in INFO:
        near = get_close_matches(flag, _SETS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f'MedMNIST has no 2D set "{flag}".{guess} Known: {", ".join(_SETS)}.')
    info: dict[str, Any] = INFO[flag]
    return info


def medmnist_content(name: str) -> dict[str, Any]:
    """Makes the content of a recipe.

    Args:
        name: `medmnist:FLAG` for 28 pixels, `medmnist:FLAG_64`, `_128` or `_224`, or `medmnist-c:FLAG`.

    Returns:
        The keys of `Recipe`.

    Raises:
        MissingPackageError: The package `medmnist` is not installed.
        RecipeError: There is no such set or size.
    """
    corrupted = name.startswith(CORRUPTED)
    flag, _, side = name.removeprefix(CORRUPTED if corrupted else CLEAN).partition("_")
    info = medmnist_info(flag)
    if corrupted and side:
        raise RecipeError(f"MedMNIST-C has one size; use {CORRUPTED}{flag}.")
    if side and side not in map(str, SIZES):
        raise RecipeError(f"MedMNIST+ has no images of {side} pixels, only of {', '.join(map(str, SIZES))}.")
    size = SIZES[-1] if corrupted else int(side or SIZES[0])
    modality, begin = _SETS[flag]
    classes = [info["label"][str(index)] for index in range(len(info["label"]))]
    words = {label: _WORDS.get(label, label) for label in classes}
    multi = info["task"].startswith("multi-label")
    content: dict[str, Any] = {
        "name": f"{flag}-c" if corrupted else flag + (f"_{size}" if side else ""),
        "title": f"MedMNIST{'-C' if corrupted else '+'} {info['python_class']}, {size} pixels",
        "tasks": [*(["zero-shot"] if begin else []), *([] if corrupted else ["linear-probe"])],
        "modality": modality,
        "metric": "macro_auroc",
        "layout": {"kind": "medmnist", "flag": flag, "size": size, "corrupted": corrupted},
        "labels": "multi" if multi else "single",
        "classes": classes,
        "expected": f"{flag}/CORRUPTION.npz   test_images (5 severities, one after another), test_labels"
        if corrupted
        else f"{medmnist_file(flag, size)}   train_images, train_labels, and those of val and test",
        "count": None if corrupted else info["n_samples"]["test"],
        "source": "https://zenodo.org/records/11471504" if corrupted else info[_url(size)].partition("/files/")[0],
        "license": info["license"],
        "overlaps": [f"Its images are from {_SOURCES[flag]}." if flag in _SOURCES else "None known."],
        "public_sets": [_PUBLIC_SETS.get(flag, _SOURCES[flag])] if flag in _SOURCES else [],
        "notes": "Subjects are not known, and intervals may be too narrow.",
    }
    if corrupted and not begin:
        raise RecipeError(f"The classes of {flag} are grades without names, so that zero-shot cannot describe them.")
    if begin:
        content["prompts"] = {label: [f"{begin}: {word}.", f"{word}, {begin}."] for label, word in words.items()}
    if begin and multi:
        content["negative_prompts"] = {
            label: [f"{begin}: no {word}.", f"no {word}, {begin}."] for label, word in words.items()
        }
    return content


def medmnist_file(flag: str, size: int) -> str:
    """Name of the file with the images of a set."""
    return f"{flag}.npz" if size == SIZES[0] else f"{flag}_{size}.npz"


def _url(size: int) -> str:
    return "url" if size == SIZES[0] else f"url_{size}"
