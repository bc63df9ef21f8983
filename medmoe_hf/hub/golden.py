"""Golden outputs: a known input and the model's outputs for it, stored with a checkpoint for comparison.

`golden.safetensors` holds `images` (2, 96, 80, 3) uint8 and, in its metadata, texts and the versions of torch and
transformers; `input.*`, the processor's outputs; and `output.*`, the model's outputs for these, in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmoe_hf.common.files import atomic_write
from medmoe_hf.errors import PublishError
from medmoe_hf.hub import clean_load
from medmoe_hf.hub.folder_checks import GOLDEN
from medmoe_hf.model import (
    MedMoEForImageClassification,
    MedMoEModel,
    MedMoEProcessor,
    MedMoETextModel,
    MedMoEVisionModel,
)

RELATIVE_TOLERANCE = 1e-4
"""Largest allowed difference of a tensor, relative to its largest value; more than other hardware causes."""

_TEXTS = (
    "A frontal radiograph of the chest with a small pleural effusion on the left.",
    "Axial computed tomography of the abdomen, without contrast.",
)
_MODELS = {
    kind.__name__: kind for kind in (MedMoEModel, MedMoEForImageClassification, MedMoEVisionModel, MedMoETextModel)
}


def golden_images() -> Tensor:
    """Gradients and rings, (2, 96, 80, 3) uint8; computed from integers, so that they are the same everywhere."""
    rows, columns, colours = torch.arange(96)[:, None, None], torch.arange(80)[None, :, None], torch.arange(3)
    slope = (2 * rows + columns + 20 * colours) % 256
    rings = ((rows - 48) ** 2 + (columns - 40) ** 2 * (colours + 1)) // 16 % 256
    return torch.stack([slope, rings]).to(torch.uint8)


def open_folder(folder: Path) -> tuple[Any, MedMoEProcessor]:
    """Loads a folder with this package's classes, in float32.

    Args:
        folder: Folder of a model and its processor.

    Returns:
        The model, of whatever kind it is, and its processor.

    Raises:
        PublishError: If the folder does not load, or lacks weights.
    """
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        kind = _MODELS[architecture]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PublishError(f"{folder / 'config.json'} names no MedMoE model in `architectures`.") from error
    try:
        model, loading = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        processor = MedMoEProcessor.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PublishError(f"{folder} does not load: {error}") from error
    if loading["missing_keys"]:
        raise PublishError(f"{folder}: the weights lack {', '.join(sorted(loading['missing_keys'])[:8])}.")
    return model, processor


def write_golden(folder: str | Path) -> Path:
    """Writes `golden.safetensors` into a folder, unless it already has one that agrees with the model.

    Args:
        folder: Folder of a model and its processor, which are loaded with this package's classes.

    Returns:
        Path of the file.

    Raises:
        PublishError: If the folder does not load, lacks weights, has the processor of another model, or if outputs are
            not finite.

    Example:
        ```python
        from medmoe_hf.hub import write_golden

        write_golden("runs/first")
        ```
    """
    folder = Path(folder)
    model, processor = open_folder(folder)
    images = golden_images()
    try:
        tensors = clean_load.golden_tensors(model, processor, images, _TEXTS)
    except (LookupError, ValueError, RuntimeError, TypeError) as error:
        raise PublishError(f"{folder}: the model does not accept the outputs of its processor: {error}") from error
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise PublishError(f"{folder}: {', '.join(broken)} of the golden input is not finite; check the weights.")
    path = folder / GOLDEN
    tensors["images"] = images
    if path.is_file() and _agrees(path, tensors):
        return path
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with atomic_write(path) as partial:
        # One key: several would be written in any order, and the file would not be reproducible.
        save_file(tensors, partial, metadata={"golden": json.dumps({"texts": _TEXTS, "versions": versions})})
    return path


def _agrees(path: Path, tensors: dict[str, Tensor]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            texts = json.loads(file.metadata()["golden"])["texts"]
        return (
            texts == list(_TEXTS)
            and max(relative_differences(load_file(path), tensors).values()) <= RELATIVE_TOLERANCE
        )
    except (SafetensorError, ValueError, LookupError, TypeError):
        return False


def relative_differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Returns the largest difference of each tensor, relative to its largest expected value.

    Args:
        expected: The right tensors, by name.
        found: The tensors to compare.

    Returns:
        One number per name; infinite for another shape, a tensor that one side lacks, and integers that differ.
    """
    differences = {}
    for name in sorted({*expected, *found}):
        first, second = expected.get(name), found.get(name)
        if first is None or second is None or first.shape != second.shape:
            differences[name] = float("inf")
            continue
        if first.numel() == 0 or torch.equal(first, second):
            differences[name] = 0.0
            continue
        if not first.is_floating_point():
            differences[name] = float("inf")
            continue
        difference = (first.double() - second.double()).abs().max() / first.double().abs().max()
        # Comparisons with NaN are false, and it must not pass.
        differences[name] = float(difference) if difference.isfinite() else float("inf")
    return differences


def compare_with_golden(folder: str | Path) -> dict[str, float]:
    """Loads a folder in a process without this package, and compares its outputs with `golden.safetensors`.

    The process has no network and no cached code; it runs the folder's own Python files.

    Args:
        folder: Folder of a model and its processor.

    Returns:
        For each tensor of the golden file, the largest difference relative to its largest value; infinite for another
        shape, different integers, or a missing tensor.

    Raises:
        PublishError: If there is no golden file, or if the folder does not load; the message ends with the output of
            the process.
    """
    folder = Path(folder).resolve()
    if not (folder / GOLDEN).is_file():
        raise PublishError(
            f"{folder} has no {GOLDEN} to compare with: `medmoe push` has not published it yet. For a folder that "
            "you trust, `medmoe verify FOLDER --record` writes it and then compares."
        )
    try:
        expected = load_file(folder / GOLDEN)
    except (SafetensorError, OSError) as error:
        raise PublishError(f"{folder / GOLDEN} cannot be read: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.safetensors"
        code = Path(clean_load.__file__).read_text(encoding="utf-8")
        try:
            run_clean(code, str(folder), str(folder / GOLDEN), str(out))
        except PublishError as error:
            raise PublishError(f"{folder} does not load where medmoe_hf is not installed:\n{error}") from error
        found = load_file(out)
    if "output.ood_score" not in expected:
        # Recorded before a rejector was fitted; all other outputs are the same with and without one.
        found.pop("output.ood_score", None)
    return relative_differences({name: value for name, value in expected.items() if name != "images"}, found)


def run_clean(code: str, *arguments: str, show: bool = False) -> None:
    """Runs Python code in a process without network, cached code, or anything that is in the current folder.

    The code itself must refuse this package (`clean_load.RefusePackage`), which may be installed.

    Args:
        code: Text of a Python file.
        *arguments: Its command-line arguments.
        show: Whether what the process prints to standard error is shown; otherwise it is part of the error.

    Raises:
        PublishError: If the process fails; the message ends with what it printed last, unless that was shown.
    """
    with tempfile.TemporaryDirectory(prefix="medmoe_clean_") as home:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_HOME": home,
            "HF_MODULES_CACHE": str(Path(home) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # In an empty folder, since Python looks for modules in the current one.
        (empty := Path(home) / "empty").mkdir()
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=empty,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=None if show else subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            last = "" if show else "\n".join(run.stderr.strip().splitlines()[-12:])
            raise PublishError(last or f"The process ended with status {run.returncode}.")
