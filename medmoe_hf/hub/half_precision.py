"""Checkpoints of half the size: weights in 16 bits on disk, which load as float32."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmoe_hf.common.files import atomic_dir
from medmoe_hf.data.phantom import phantom_sample
from medmoe_hf.errors import ConvertError, PublishError
from medmoe_hf.hub import clean_load
from medmoe_hf.hub.assembly import refuse_existing
from medmoe_hf.hub.folder_checks import GOLDEN, published_files
from medmoe_hf.hub.golden import open_folder, relative_differences, write_golden
from medmoe_hf.model.modalities_medmoe import MODALITIES

_PAIRS_PER_MODALITY = 2
_STATISTICS = ("running_mean", "running_var")
_INDEX = "model.safetensors.index.json"


@dataclass
class ShrinkReport:
    """The size of a checkpoint before and after, and what it costs.

    Attributes:
        before: Size of the weights in bytes.
        after: The same, of the new folder.
        differences: Largest difference of each output, relative to its largest value, on twelve phantoms and their
            reports; infinite if an image is sent to another expert.
        kept: Names of weights that stay float32, as they hold values that 16 bits cannot.
    """

    before: int
    after: int
    differences: dict[str, float]
    kept: list[str]

    def __str__(self) -> str:
        lines = [f"Weights: {self.before / 1e6:.1f} MB before, {self.after / 1e6:.1f} MB now, in float16."]
        if self.kept:
            lines.append(f"In float32, as their values exceed the range of float16: {', '.join(self.kept)}.")
        routed = self.differences.get("expert_ids")
        if routed is not None:
            lines.append(f"Experts of {len(MODALITIES) * _PAIRS_PER_MODALITY} phantoms: {_same(routed)}.")
        lines.append("Largest differences of the outputs for phantoms, relative to the largest value:")
        shown = [(name, value) for name, value in self.differences.items() if name != "expert_ids"]
        return "\n".join([*lines, *(f"  {name:<22}{value:.1e}" for name, value in shown)])


def _same(difference: float) -> str:
    return "the same" if difference == 0 else "NOT the same"


def shrink(folder: str | Path, out: str | Path, force: bool = False) -> ShrinkReport:
    """Writes a copy of a checkpoint with its weights in float16 on disk: half the size.

    All weights are rounded, except for the running statistics of BatchNorm, whose variances may exceed the range of
    float16, and single numbers. The configuration still says float32, so that `from_pretrained` computes in float32,
    on a CPU too, unless another `dtype` is passed. All other files are copied. `golden.safetensors`, if there is one,
    is recorded again.

    Args:
        folder: Folder of a model and its processor.
        out: Folder to create.
        force: Whether to replace `out` if it exists.

    Returns:
        Sizes, and the differences of outputs.

    Raises:
        ConvertError: If the folder does not load, is a checkpoint to resume from, or is small already.
        FileExistsError: If `out` exists and `force` is `False`.

    Example:
        ```python
        from medmoe_hf.hub import shrink

        print(shrink("runs/first", "models/first"))
        ```
    """
    folder, out = Path(folder), Path(out)
    refuse_existing(out, force)
    if (folder / "training_state").exists():
        raise ConvertError(
            f"{folder} is a checkpoint to resume from, which needs all bits; shrink the run's `output_dir`."
        )
    images, texts = _pairs()
    try:
        before = _outputs(folder, images, texts)
    except PublishError as error:
        raise ConvertError(str(error)) from error
    tensors, sources = _read_weights(folder)
    rounded, kept = _half(tensors)
    if all(rounded[name].dtype == tensor.dtype for name, tensor in tensors.items()):
        raise ConvertError(f"The weights of {folder} have 16 bits already.")
    size = sum(path.stat().st_size for path in sources)
    names = {path.name for path in sources}
    with atomic_dir(out, force) as partial:
        for name, path in published_files(folder).items():
            if name not in names | {_INDEX, GOLDEN}:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, partial / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (partial / "config.json").write_text(json.dumps(_in_float32(config), indent=2) + "\n", encoding="utf-8")
        save_file(rounded, partial / "model.safetensors", metadata={"format": "pt"})
        # safetensors creates files for their owner only.
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)
        differences = relative_differences(before, _outputs(partial, images, texts))
        if GOLDEN in published_files(folder):
            write_golden(partial)
        return ShrinkReport(size, (partial / "model.safetensors").stat().st_size, differences, kept)


def _pairs() -> tuple[Tensor, list[str]]:
    """Phantoms of every modality (B, H, W, 3), and their reports."""
    samples = [
        phantom_sample(0, index, modalities=[modality])
        for modality in MODALITIES
        for index in range(_PAIRS_PER_MODALITY)
    ]
    images = torch.stack([torch.from_numpy(np.array(sample["image"].convert("RGB"))) for sample in samples])
    return images, [sample["caption"] for sample in samples]


def _outputs(folder: Path, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
    """The outputs of a model for images and texts."""
    model, processor = open_folder(folder)
    found = clean_load.golden_tensors(model.eval(), processor, images, texts)
    return {name.removeprefix("output."): value for name, value in found.items() if name.startswith("output.")}


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    try:
        return {name: tensor for path in files for name, tensor in load_file(path).items()}, files
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"The weights of {folder} cannot be read: {error}") from error


def _half(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rounds weights to float16. Returns all tensors, and the names of those whose values do not fit."""
    result, kept = {}, []
    for name, tensor in tensors.items():
        rounded = tensor
        wide = tensor.dtype in (torch.float32, torch.float64)
        if wide and tensor.dim() and not name.endswith(_STATISTICS):
            rounded = tensor.to(torch.float16)
            if rounded.isinf().any():
                rounded = tensor
                kept.append(name)
        result[name] = rounded.contiguous()
    return result, kept


def _in_float32(config: Any) -> Any:
    """A configuration in which every `dtype` is float32: transformers loads weights as it says."""
    if not isinstance(config, dict):
        return config
    return {name: "float32" if name == "dtype" else _in_float32(value) for name, value in config.items()}
